//! Messages: a header of the netlink protocol, one of the message's kind, and attributes.

use std::net::IpAddr;

/// `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// Attributes and messages begin at multiples of this.
const ALIGNMENT: usize = 4;

/// Marks an attribute that holds others.
const NESTED: u16 = 1 << 15;

/// A message that is put together.
#[derive(Debug, Clone)]
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// Begins with the message's own header, such as `struct ifinfomsg`.
    pub fn new(kind: u16, flags: libc::c_int, header: &[u8]) -> Message {
        let mut bytes = vec![0; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags as u16).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(header);
        let mut message = Message { bytes };
        message.align();
        message
    }

    /// Adds an attribute.
    pub fn put(&mut self, attribute: u16, value: &[u8]) -> &mut Message {
        // What is put into messages here is far shorter than 64 KiB.
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&attribute.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.align();
        self
    }

    /// Adds a number.
    pub fn put_u32(&mut self, attribute: u16, value: u32) -> &mut Message {
        self.put(attribute, &value.to_ne_bytes())
    }

    /// Adds a NUL-terminated string.
    pub fn put_name(&mut self, attribute: u16, value: &str) -> &mut Message {
        self.put(attribute, &[value.as_bytes(), &[0]].concat())
    }

    /// Adds an address of either family.
    pub fn put_ip(&mut self, attribute: u16, value: IpAddr) -> &mut Message {
        match value {
            IpAddr::V4(ip) => self.put(attribute, &ip.octets()),
            IpAddr::V6(ip) => self.put(attribute, &ip.octets()),
        }
    }

    /// Adds an attribute that holds what `fill` adds.
    pub fn nest(&mut self, attribute: u16, fill: impl FnOnce(&mut Message)) -> &mut Message {
        let start = self.bytes.len();
        self.put(attribute | NESTED, &[]);
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// The same with a header before the attributes.
    #[cfg(feature = "topology")]
    pub(crate) fn nest_behind(
        &mut self,
        attribute: u16,
        header: &[u8],
        fill: impl FnOnce(&mut Message),
    ) -> &mut Message {
        self.nest(attribute, |message| {
            message.bytes.extend_from_slice(header);
            message.align();
            fill(message);
        })
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
    }

    /// The bytes to be sent under a sequence number.
    pub(crate) fn finish(mut self, extra_flags: libc::c_int, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let flags = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | extra_flags as u16;
        self.bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// A message from the kernel, without the netlink header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its type, such as `RTM_NEWLINK`.
    pub kind: u16,
    /// The message's own header and its attributes.
    pub body: Vec<u8>,
}
