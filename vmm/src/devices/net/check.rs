//! Whether a packet from the guest is what its header says.
//!
//! The header goes to the host's kernel, whose code for checksums and segmentation believes much of it. So what it says is held
//! against the packet here: nothing goes on that the kernel of an honest guest could not have sent. The caller looks at a copy of
//! the packet's first bytes and sends that very copy, so that the guest can't change its mind in between.

use super::header::{Header, Segmentation};

/// How many of a packet's first bytes are looked at: enough for all headers, with options, that a segmented packet can have.
pub(crate) const HEAD_SIZE: usize = 256;

/// The longest packet: an IP packet of 64 KiB less one byte and its Ethernet header, and one byte more, as Linux has it.
pub(crate) const MAX_PACKET: usize = 65_550;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// Bytes of a VLAN tag.
const VLAN_TAG: usize = 4;
/// How many of these may be in front of a packet.
const VLAN_TAGS: usize = 2;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_VLAN_OUTER: u16 = 0x88a8;

const TCP: u8 = 6;
const UDP: u8 = 17;
/// IPv6 extension headers that may be before the transport header of a segmented packet.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;

/// Offsets of the checksum in the transport headers.
const TCP_CHECKSUM: usize = 16;
const UDP_CHECKSUM: usize = 6;

/// What an interface lets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Whether checksums may be left undone.
    pub checksum: bool,
    /// Whether segments of TCP in IPv4 may be.
    pub tcp4: bool,
    /// Whether segments of TCP in IPv6 may be.
    pub tcp6: bool,
    /// Whether datagrams of UDP may be.
    pub udp: bool,
    /// The most bytes of a packet, or of a segment, without its Ethernet header.
    pub mtu: usize,
}

/// The longest packet with its Ethernet header and VLAN tags, on an interface that does not segment.
pub(crate) const fn frame_size(mtu: usize) -> usize {
    mtu + ETHERNET + VLAN_TAGS * VLAN_TAG
}

/// Why a packet goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub(crate) enum Unsound {
    /// It has no Ethernet header, or more bytes than any packet.
    #[error("too short or too long for packets")]
    Length,
    /// It, or what it would be cut into, is longer than the interface's MTU.
    #[error("longer than the MTU, or to be cut into pieces that are")]
    Mtu,
    /// Flags or a type that are not negotiated or not defined.
    #[error("with offloads that were not negotiated")]
    Offload,
    /// A checksum outside of the packet.
    #[error("with checksums outside of them")]
    Checksum,
    /// What is to be cut up is not such a packet.
    #[error("to be cut up, but not what they are said to be")]
    Segmentation,
}

impl Limits {
    /// Checks a packet of `length` bytes of which the first are in `head`, [`HEAD_SIZE`] of them if there are so many. Returns
    /// its header for the tap.
    pub(crate) fn check(
        &self,
        header: Option<Header>,
        head: &[u8],
        length: usize,
    ) -> Result<Header, Unsound> {
        if !(ETHERNET..=MAX_PACKET).contains(&length) || head.len() < ETHERNET {
            return Err(Unsound::Length);
        }
        let header = header.ok_or(Unsound::Offload)?;
        if let Some((start, offset)) = header.checksum {
            if !self.checksum {
                return Err(Unsound::Offload);
            }
            if start < ETHERNET || start + offset + 2 > length {
                return Err(Unsound::Checksum);
            }
        }
        if let Some((kind, size)) = header.segmentation {
            let headers = self.check_segments(kind, size, &header, head, length)?;
            // What fits one segment needs no cutting.
            if length - headers > size.into() {
                return Ok(Header { headers, ..header });
            }
        }
        if length > frame_size(self.mtu) {
            return Err(Unsound::Mtu);
        }
        Ok(Header { segmentation: None, ..header })
    }

    /// Checks a packet that is to be cut up; returns the bytes of its headers.
    fn check_segments(
        &self,
        kind: Segmentation,
        size: u16,
        header: &Header,
        head: &[u8],
        length: usize,
    ) -> Result<usize, Unsound> {
        let (offered, protocol, sum_at) = match kind {
            Segmentation::Tcp4 => (self.tcp4, TCP, TCP_CHECKSUM),
            Segmentation::Tcp6 => (self.tcp6, TCP, TCP_CHECKSUM),
            Segmentation::Udp => (self.udp, UDP, UDP_CHECKSUM),
        };
        if !offered {
            return Err(Unsound::Offload);
        }
        // The sum of each segment is left to whoever cuts.
        let (start, offset) = header.checksum.ok_or(Unsound::Segmentation)?;
        if size == 0 || header.headers > length {
            return Err(Unsound::Segmentation);
        }
        let found = Transport::find(head).ok_or(Unsound::Segmentation)?;
        let version_fits = match kind {
            Segmentation::Tcp4 => !found.is_ipv6,
            Segmentation::Tcp6 => found.is_ipv6,
            Segmentation::Udp => true,
        };
        if !version_fits || found.protocol != protocol || (start, offset) != (found.at, sum_at) {
            return Err(Unsound::Segmentation);
        }
        let headers = found.at + found.header_size(head).ok_or(Unsound::Segmentation)?;
        if headers > length {
            return Err(Unsound::Segmentation);
        }
        if headers - found.network_at + usize::from(size) > self.mtu {
            return Err(Unsound::Mtu);
        }
        Ok(headers)
    }
}

/// Where a packet's transport header is.
struct Transport {
    is_ipv6: bool,
    protocol: u8,
    /// Where the IP header starts.
    network_at: usize,
    /// Where the transport header starts.
    at: usize,
}

impl Transport {
    /// Finds it in a whole IP packet, not a fragment of one. All headers up to it must be in `head`.
    fn find(head: &[u8]) -> Option<Transport> {
        let mut network_at = ETHERNET;
        let mut ethertype = word(head, ETHERNET - 2)?;
        for _ in 0..VLAN_TAGS {
            if matches!(ethertype, ETHERTYPE_VLAN | ETHERTYPE_VLAN_OUTER) {
                ethertype = word(head, network_at + 2)?;
                network_at += VLAN_TAG;
            }
        }
        match ethertype {
            ETHERTYPE_IPV4 => Transport::find_in_ipv4(head, network_at),
            ETHERTYPE_IPV6 => Transport::find_in_ipv6(head, network_at),
            _ => None,
        }
    }

    fn find_in_ipv4(head: &[u8], network_at: usize) -> Option<Transport> {
        let first = *head.get(network_at)?;
        let header = usize::from(first & 0xf) * 4;
        let fragment = word(head, network_at + 6)? & 0x3fff;
        if first >> 4 != 4 || header < 20 || fragment != 0 {
            return None;
        }
        let protocol = *head.get(network_at + 9)?;
        Some(Transport { is_ipv6: false, protocol, network_at, at: network_at + header })
    }

    fn find_in_ipv6(head: &[u8], network_at: usize) -> Option<Transport> {
        if head.get(network_at)? >> 4 != 6 {
            return None;
        }
        let mut protocol = *head.get(network_at + 6)?;
        let mut at = network_at + 40;
        // Each takes 8 bytes at least, so this ends where `head` does.
        while matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) {
            protocol = *head.get(at)?;
            at += 8 + 8 * usize::from(*head.get(at + 1)?);
        }
        Some(Transport { is_ipv6: true, protocol, network_at, at })
    }

    /// Bytes of the transport header, which must be in `head` as a whole.
    fn header_size(&self, head: &[u8]) -> Option<usize> {
        let size = match self.protocol {
            TCP => usize::from(head.get(self.at + 12)? >> 4) * 4,
            _ => 8,
        };
        let least = if self.protocol == TCP { 20 } else { 8 };
        (size >= least && self.at + size <= head.len()).then_some(size)
    }
}

/// A big-endian word.
fn word(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

#[cfg(test)]
mod tests {
    use super::super::header::HEADER_SIZE;
    use super::*;
    use crate::devices::testing::Nonsense;

    const LIMITS: Limits = Limits { checksum: true, tcp4: true, tcp6: true, udp: true, mtu: 1500 };

    /// An Ethernet frame of `length` bytes with these headers.
    fn frame(headers: &[&[u8]], length: usize) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET - 2];
        frame.extend(headers.concat());
        frame.resize(length, 0xaa);
        frame
    }

    const V4: [u8; 2] = [8, 0];
    const V6: [u8; 2] = [0x86, 0xdd];

    fn ipv4(protocol: u8) -> [u8; 20] {
        [0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]
    }

    fn ipv6(next: u8) -> [u8; 40] {
        let mut header = [0; 40];
        (header[0], header[6]) = (0x60, next);
        header
    }

    fn tcp() -> [u8; 20] {
        let mut header = [0; 20];
        header[12] = 5 << 4;
        header
    }

    fn checked(limits: Limits, bytes: [u8; HEADER_SIZE], frame: &[u8]) -> Result<[u8; HEADER_SIZE], Unsound> {
        let head = &frame[..frame.len().min(HEAD_SIZE)];
        limits.check(Header::parse(&bytes), head, frame.len()).map(Header::to_bytes)
    }

    /// flags, type, length of headers, segment, checksum's start and offset.
    fn header(flags: u8, kind: u8, headers: u16, size: u16, start: u16, offset: u16) -> [u8; HEADER_SIZE] {
        let mut bytes = [0; HEADER_SIZE];
        (bytes[0], bytes[1]) = (flags, kind);
        for (at, value) in [(2, headers), (4, size), (6, start), (8, offset)] {
            bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    const T4: u8 = 1;
    const T6: u8 = 4;
    const U: u8 = 5;

    #[test]
    fn what_linux_sends_goes_through() {
        let tcp4 = frame(&[&V4, &ipv4(TCP), &tcp()], 65_000);
        // The hint is replaced by what the headers really have.
        assert_eq!(
            checked(LIMITS, header(1, T4, 2000, 1460, 34, 16), &tcp4),
            Ok(header(1, T4, 54, 1460, 34, 16))
        );
        let tcp6 = frame(&[&V6, &ipv6(TCP), &tcp()], 65_000);
        assert_eq!(
            checked(LIMITS, header(1, T6, 74, 1440, 54, 16), &tcp6),
            Ok(header(1, T6, 74, 1440, 54, 16))
        );
        let udp4 = frame(&[&V4, &ipv4(UDP), &[0; 8]], 65_000);
        let plain = header(1, U, 42, 1472, 34, 6);
        assert_eq!(checked(LIMITS, plain, &udp4), Ok(plain));
        let udp6 = frame(&[&V6, &ipv6(UDP), &[0; 8]], 65_000);
        let plain = header(1, U, 62, 1452, 54, 6);
        assert_eq!(checked(LIMITS, plain, &udp6), Ok(plain));
        // Options, extension headers, VLANs.
        let mut longest = tcp();
        longest[12] = 15 << 4;
        let options = [0; 40];
        let mut ip = ipv4(TCP);
        ip[0] = 0x4f;
        let big = frame(&[&[0x88, 0xa8, 0, 7, 0x81, 0, 0, 8], &V4, &ip, &options, &longest, &options], 9000);
        assert_eq!(
            checked(LIMITS, header(1, T4, 142, 1300, 82, 16), &big),
            Ok(header(1, T4, 142, 1300, 82, 16))
        );
        let extended = frame(
            &[
                &V6,
                &ipv6(HOP_BY_HOP),
                &[DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0],
                &[TCP, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
                &tcp(),
            ],
            9000,
        );
        let plain = header(1, T6, 98, 1400, 78, 16);
        assert_eq!(checked(LIMITS, plain, &extended), Ok(plain));
        // Without segmentation: anything with a sum inside, and everything else is zero.
        let small = frame(&[&V4, &ipv4(132), &[0; 12]], 60);
        assert_eq!(checked(LIMITS, header(1, 0, 7, 7, 34, 8), &small), Ok(header(1, 0, 0, 0, 34, 8)));
        let arp = frame(&[&[8, 6]], 42);
        assert_eq!(checked(LIMITS, header(0, 0, 7, 7, 7, 7), &arp), Ok([0; HEADER_SIZE]));
        assert_eq!(checked(LIMITS, [0; HEADER_SIZE], &frame(&[&V4], 14)), Ok([0; HEADER_SIZE]));
    }

    #[test]
    fn what_fits_one_segment_is_not_cut() {
        let short = frame(&[&V4, &ipv4(TCP), &tcp()], 54 + 1000);
        for size in [1000, 1400] {
            assert_eq!(
                checked(LIMITS, header(1, T4, 54, size, 34, 16), &short),
                Ok(header(1, 0, 0, 0, 34, 16))
            );
        }
        assert!(checked(LIMITS, header(1, T4, 54, 999, 34, 16), &short).unwrap()[1] == T4);
        let none = frame(&[&V4, &ipv4(UDP), &[0; 8]], 42);
        assert_eq!(checked(LIMITS, header(1, U, 42, 1, 34, 6), &none), Ok(header(1, 0, 0, 0, 34, 6)));
    }

    #[test]
    fn what_is_not_sound_is_refused() {
        let tcp4 = frame(&[&V4, &ipv4(TCP), &tcp()], 9000);
        let tcp6 = frame(&[&V6, &ipv6(TCP), &tcp()], 9000);
        let udp4 = frame(&[&V4, &ipv4(UDP), &[0; 8]], 9000);
        let edit = |frame: &[u8], at: usize, value: u8| {
            let mut frame = frame.to_vec();
            frame[at] = value;
            frame
        };
        let cut = |length| frame(&[&V4, &ipv4(TCP), &tcp()], 9000)[..length].to_vec();
        let sound = header(1, T4, 54, 1400, 34, 16);
        assert!(checked(LIMITS, sound, &tcp4).is_ok());
        let (seg, off, sum) = (Unsound::Segmentation, Unsound::Offload, Unsound::Checksum);
        let cases: Vec<(&str, Unsound, [u8; HEADER_SIZE], Vec<u8>)> = vec![
            ("no Ethernet header", Unsound::Length, [0; HEADER_SIZE], vec![0; 13]),
            ("nothing", Unsound::Length, [0; HEADER_SIZE], vec![]),
            ("too long", Unsound::Length, sound, frame(&[&V4, &ipv4(TCP), &tcp()], MAX_PACKET + 1)),
            ("longer than the MTU", Unsound::Mtu, [0; HEADER_SIZE], vec![0; 1523]),
            ("segments longer than the MTU", Unsound::Mtu, header(1, T4, 54, 1461, 34, 16), tcp4.clone()),
            ("one segment longer than the MTU", Unsound::Mtu, header(1, T4, 54, 9000, 34, 16), tcp4.clone()),
            ("the flag of devices", off, header(2, 0, 0, 0, 0, 0), tcp4.clone()),
            ("both flags", off, header(3, T4, 54, 1400, 34, 16), tcp4.clone()),
            ("fragmentation of UDP", off, header(1, 3, 42, 1400, 34, 6), udp4.clone()),
            ("congestion", off, header(1, T4 | 0x80, 54, 1400, 34, 16), tcp4.clone()),
            ("an unknown type", off, header(1, 2, 54, 1400, 34, 16), tcp4.clone()),
            ("no checksum", seg, header(0, T4, 54, 1400, 34, 16), tcp4.clone()),
            ("no segment", seg, header(1, T4, 54, 0, 34, 16), tcp4.clone()),
            ("headers outside", seg, header(1, T4, 9001, 1400, 34, 16), tcp4.clone()),
            ("a sum outside", sum, header(1, 0, 0, 0, 34, 16), cut(51)),
            ("a sum far outside", sum, header(1, 0, 0, 0, 0xffff, 0xffff), cut(100)),
            ("a sum in the Ethernet header", sum, header(1, 0, 0, 0, 13, 16), cut(100)),
            ("a sum elsewhere", seg, header(1, T4, 54, 1400, 35, 16), tcp4.clone()),
            ("UDP's place of the sum", seg, header(1, T4, 54, 1400, 34, 6), tcp4.clone()),
            ("IPv6 as IPv4", seg, header(1, T4, 74, 1400, 54, 16), tcp6.clone()),
            ("IPv4 as IPv6", seg, header(1, T6, 54, 1400, 34, 16), tcp4.clone()),
            ("UDP as TCP", seg, header(1, T4, 54, 1400, 34, 16), udp4.clone()),
            ("TCP as UDP", seg, header(1, U, 54, 1400, 34, 6), tcp4.clone()),
            ("no IP", seg, sound, edit(&tcp4, 12, 9)),
            ("a wrong version", seg, sound, edit(&tcp4, 14, 0x65)),
            ("a short IP header", seg, sound, edit(&tcp4, 14, 0x44)),
            ("a long IP header", seg, sound, edit(&tcp4, 14, 0x46)),
            ("a fragment", seg, sound, edit(&tcp4, 21, 1)),
            ("a first fragment", seg, sound, edit(&tcp4, 20, 0x20)),
            ("a short TCP header", seg, sound, edit(&tcp4, 46, 4 << 4)),
            ("a cut TCP header", seg, sound, cut(53)),
            ("an IPv6 fragment", seg, header(1, T6, 74, 1400, 54, 16), edit(&tcp6, 20, 44)),
            ("extension headers without end", seg, header(1, T6, 74, 1400, 54, 16), edit(&tcp6, 20, 0)),
        ];
        for (what, why, bytes, frame) in cases {
            assert_eq!(checked(LIMITS, bytes, &frame), Err(why), "{what}");
        }
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let sound = [
            (header(1, T4, 54, 1400, 34, 16), frame(&[&V4, &ipv4(TCP), &tcp()], 9000)),
            (header(1, T6, 74, 1400, 54, 16), frame(&[&V6, &ipv6(TCP), &tcp()], 9000)),
            (header(1, U, 42, 1400, 34, 6), frame(&[&V4, &ipv4(UDP), &[0; 8]], 9000)),
            (header(1, 0, 0, 0, 34, 6), frame(&[&V4, &ipv4(UDP), &[0; 8]], 900)),
        ];
        let without = [
            Limits { tcp4: false, ..LIMITS },
            Limits { tcp6: false, ..LIMITS },
            Limits { udp: false, ..LIMITS },
            Limits { checksum: false, ..LIMITS },
        ];
        for (limits, (bytes, frame)) in without.into_iter().zip(sound) {
            assert!(checked(LIMITS, bytes, &frame).is_ok());
            assert_eq!(checked(limits, bytes, &frame), Err(Unsound::Offload), "{limits:?}");
        }
    }

    #[test]
    fn random_packets_never_panic_and_what_goes_through_holds_together() {
        let mut nonsense = Nonsense(0x7777);
        let mut through = 0;
        for _ in 0..20_000 {
            let v6 = nonsense.below(2) == 0;
            let protocol = [TCP, UDP, HOP_BY_HOP, 44][nonsense.below(4) as usize];
            let network: Vec<u8> = if v6 { ipv6(protocol).to_vec() } else { ipv4(protocol).to_vec() };
            let length = [20, 60, 90, 2000, 65_550][nonsense.below(5) as usize];
            let mut frame = frame(&[if v6 { &V6 } else { &V4 }, &network, &tcp()], length);
            for _ in 0..nonsense.below(3) {
                let at = nonsense.below(80.min(length as u64)) as usize;
                frame[at] = nonsense.next() as u8;
            }
            let start = if v6 { 54 } else { 34 };
            let mut bytes = header(
                1,
                [0, T4, T6, U][nonsense.below(4) as usize],
                54,
                nonsense.below(1600) as u16,
                start,
                [16, 6][nonsense.below(2) as usize],
            );
            if nonsense.below(4) == 0 {
                bytes[nonsense.below(12) as usize] = nonsense.next() as u8;
            }
            let Ok(checked) = checked(LIMITS, bytes, &frame) else { continue };
            through += 1;
            let word = |at: usize| usize::from(u16::from_le_bytes([checked[at], checked[at + 1]]));
            if checked[0] & 1 != 0 {
                assert!(word(6) + word(8) + 2 <= length);
            }
            if checked[1] != 0 {
                assert!(word(2) > word(6) && word(2) < length && word(4) > 0);
                assert!(word(2) - 14 + word(4) <= 1500 && length - word(2) > word(4));
            } else {
                assert!(length <= 1522);
            }
        }
        assert!((1000..15_000).contains(&through), "{through} went through");
    }
}
