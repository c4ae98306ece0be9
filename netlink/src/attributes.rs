//! Reading attributes.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The flags in an attribute's type: it is nested, it is in network byte order.
const TYPE_MASK: u16 = 0x3fff;

/// The attributes in a range of bytes; what is cut short ends them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    /// The attributes behind a message's own header.
    pub(crate) fn behind(body: &'a [u8], header: usize) -> Attributes<'a> {
        Attributes(body.get(header.next_multiple_of(4)..).unwrap_or_default())
    }

    /// The attributes that an attribute holds.
    pub(crate) fn within(value: &'a [u8]) -> Attributes<'a> {
        Attributes(value)
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let length = usize::from(number16(self.0)?);
        let kind = number16(self.0.get(2..)?)? & TYPE_MASK;
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

pub(crate) fn number16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?))
}

pub(crate) fn number32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?))
}

pub(crate) fn name(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

/// The kernel's number of an address's family.
pub(crate) fn family(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => libc::AF_INET as u8,
        IpAddr::V6(_) => libc::AF_INET6 as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_that_make_no_sense_end_the_list() {
        let good = [8, 0, 1, 0, 9, 9, 9, 9];
        for tail in [&[][..], &[0; 4], &[3, 0, 1, 0], &[12, 0, 1, 0, 1, 2, 3, 4], &[8, 0], &[255]] {
            let bytes = [&good[..], tail].concat();
            let read: Vec<_> = Attributes::within(&bytes).take(9).collect();
            assert_eq!(read, [(1, &[9, 9, 9, 9][..])], "{tail:?}");
        }
    }
}
