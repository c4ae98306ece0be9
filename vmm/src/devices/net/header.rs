//! The header before each packet, `struct virtio_net_hdr_v1` (virtio 1.2, section 5.1.6).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of a header.
pub(crate) const HEADER_SIZE: usize = 12;

/// Where in a header the number of buffers is that a received packet fills.
pub(crate) const NUM_BUFFERS: usize = 10;

/// The checksum is left to do.
const NEEDS_CHECKSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;

/// How a packet is to be cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Segmentation {
    /// TCP in IPv4.
    Tcp4,
    /// TCP in IPv6.
    Tcp6,
    /// UDP datagrams, in either.
    Udp,
}

impl Segmentation {
    fn code(self) -> u8 {
        (match self {
            Segmentation::Tcp4 => VIRTIO_NET_HDR_GSO_TCPV4,
            Segmentation::Tcp6 => VIRTIO_NET_HDR_GSO_TCPV6,
            Segmentation::Udp => VIRTIO_NET_HDR_GSO_UDP_L4,
        }) as u8
    }
}

/// A header as it was found: nothing in it has been checked but that it says something at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// What is left to sum up: where it starts, and where from there the sum belongs.
    pub checksum: Option<(usize, usize)>,
    /// What is left to cut up, and the bytes of each segment's payload.
    pub segmentation: Option<(Segmentation, u16)>,
    /// Bytes of all headers of the packet, as a hint.
    pub headers: usize,
}

impl Header {
    /// Reads a driver's header. `None`: it has flags or a type that no driver may use, those for congestion (ECN) included,
    /// since that is not offered.
    pub(crate) fn parse(bytes: &[u8; HEADER_SIZE]) -> Option<Header> {
        let &[flags, kind, headers @ .., _, _] = bytes;
        let word = |at: usize| u16::from_le_bytes([headers[at], headers[at + 1]]);
        let segmentation = match u32::from(kind) {
            VIRTIO_NET_HDR_GSO_NONE => None,
            VIRTIO_NET_HDR_GSO_TCPV4 => Some(Segmentation::Tcp4),
            VIRTIO_NET_HDR_GSO_TCPV6 => Some(Segmentation::Tcp6),
            VIRTIO_NET_HDR_GSO_UDP_L4 => Some(Segmentation::Udp),
            _ => return None,
        };
        let checksum = match flags {
            0 => None,
            NEEDS_CHECKSUM => Some((word(4).into(), word(6).into())),
            _ => return None,
        };
        Some(Header {
            checksum,
            segmentation: segmentation.map(|kind| (kind, word(2))),
            headers: word(0).into(),
        })
    }

    /// The header for the tap: what the checked packet needs, and zero everywhere else.
    pub(crate) fn to_bytes(self) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        // All numbers are offsets in a packet of less than 64 KiB and 20 bytes, and checked to be in its headers.
        let mut put = |at: usize, value: usize| {
            bytes[at..at + 2].copy_from_slice(&u16::try_from(value).unwrap_or(0).to_le_bytes());
        };
        if let Some((start, offset)) = self.checksum {
            put(6, start);
            put(8, offset);
        }
        if let Some((_, size)) = self.segmentation {
            put(2, self.headers);
            put(4, size.into());
        }
        bytes[0] = self.checksum.map_or(0, |_| NEEDS_CHECKSUM);
        bytes[1] = self.segmentation.map_or(0, |(kind, _)| kind.code());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_without_what_means_nothing() {
        let bytes = [1, 1, 66, 0, 0xb4, 5, 34, 0, 16, 0, 9, 9];
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header.checksum, Some((34, 16)));
        assert_eq!(header.segmentation, Some((Segmentation::Tcp4, 1460)));
        assert_eq!(header.headers, 66);
        assert_eq!(header.to_bytes(), [1, 1, 66, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
        // Without segmentation and checksum none of the numbers means anything.
        let plain = Header::parse(&[0, 0, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9]).unwrap();
        assert_eq!(plain.to_bytes(), [0; HEADER_SIZE]);
    }

    #[test]
    fn flags_and_types_that_drivers_may_not_use_are_refused() {
        for flags in 0..=255u8 {
            for kind in 0..=255u8 {
                let mut bytes = [0; HEADER_SIZE];
                (bytes[0], bytes[1]) = (flags, kind);
                let sound = flags <= 1 && [0, 1, 4, 5].contains(&kind);
                assert_eq!(Header::parse(&bytes).is_some(), sound, "flags {flags}, type {kind}");
            }
        }
    }
}
