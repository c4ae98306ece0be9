//! Clients wait for their connection's handshake until it is known whether somebody in the guest listens.
//!
//! A connection begins with a segment that has `SYN` set and `ACK` not (RFC 9293, 3.5). The sockets that take connections have
//! a filter that drops such segments, without an answer, unless they bear [`MARK`]. A raw socket beside them hears of each, and
//! sends it once more, marked, when the client may come in, or what refuses it: a reset, as the kernel answers where nobody
//! listens. A segment that nothing is done about was lost as far as the client knows: it sends it again.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use bulkhead_netlink::{Instruction, Verdict};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6,
    SockaddrStorage, recvfrom, sendmsg, setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::net::bpf::{Assembler, LOAD_8, LOAD_32, Label, attach};

/// What segments bear that may pass. It is seen in the pod's network namespace on the host only.
const MARK: u32 = 0x6275_0000;

/// `SYN` and `ACK` in the byte of flags.
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// Bytes of a TCP header without options, and with as many as there can be.
const HEADER: usize = 20;
const MAX_HEADER: usize = 60;

/// Places in a TCP header.
const OFFSET_BYTE: usize = 12;
const FLAGS_BYTE: usize = 13;
const CHECKSUM: usize = 16;

/// Somebody who wants to connect, and waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Knock {
    pub(super) client: SocketAddr,
    pub(super) wanted: SocketAddr,
    header: Vec<u8>,
}

impl Knock {
    /// Reads the segment that begins a connection; `None` when it is none.
    fn read(client: IpAddr, wanted: IpAddr, segment: &[u8]) -> Option<Knock> {
        let length = usize::from(*segment.get(OFFSET_BYTE)? >> 4) * 4;
        // Data that came with it is sent again, since it is not acknowledged.
        let header = segment.get(..length).filter(|header| header.len() >= HEADER)?;
        let port = |at| Some(u16::from_be_bytes([*header.get(at)?, *header.get(at + 1)?]));
        Some(Knock {
            client: SocketAddr::new(client, port(0)?),
            wanted: SocketAddr::new(wanted, port(2)?),
            header: header.to_vec(),
        })
    }

    /// The same segment once more.
    fn again(&self) -> Vec<u8> {
        with_checksum(self.header.clone(), self.client.ip(), self.wanted.ip())
    }

    /// The answer of a kernel where nobody listens (RFC 9293, 3.5.2).
    fn refusal(&self) -> Vec<u8> {
        let sequence =
            self.header.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes);
        let mut header = Vec::with_capacity(HEADER);
        header.extend(self.wanted.port().to_be_bytes());
        header.extend(self.client.port().to_be_bytes());
        header.extend(0u32.to_be_bytes());
        header.extend(sequence.wrapping_add(1).to_be_bytes());
        header.extend([(HEADER as u8 / 4) << 4, RST | ACK, 0, 0, 0, 0, 0, 0]);
        with_checksum(header, self.wanted.ip(), self.client.ip())
    }
}

/// Fills in the checksum (RFC 9293, 3.1; RFC 8200, 8.1).
fn with_checksum(mut segment: Vec<u8>, from: IpAddr, to: IpAddr) -> Vec<u8> {
    let mut sum = libc::IPPROTO_TCP as u32 + segment.len() as u32;
    let mut add = |bytes: &[u8]| {
        sum += bytes.chunks_exact(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum::<u32>();
    };
    for address in [from, to] {
        match address {
            IpAddr::V4(address) => add(&address.octets()),
            IpAddr::V6(address) => add(&address.octets()),
        }
    }
    segment[CHECKSUM..CHECKSUM + 2].fill(0);
    // A header has an even length.
    add(&segment);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    segment[CHECKSUM..CHECKSUM + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    segment
}

/// A raw socket of the pod's network namespace: hears of everybody who wants to connect to a loopback address of its family.
#[derive(Debug)]
pub(super) struct Porter {
    socket: AsyncFd<OwnedFd>,
    is_ipv6: bool,
}

/// The same before a runtime watches it: to be made within the namespace.
pub(super) fn porter(is_ipv6: bool) -> io::Result<OwnedFd> {
    let family = if is_ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let raw = socket(family, SockType::Raw, flags, SockProtocol::Tcp)?;
    // What comes before the filter is in place concerns nobody: the sockets that take connections are not reached yet.
    if is_ipv6 {
        attach(&raw, &hears_ipv6())?;
    } else {
        attach(&raw, &hears_ipv4())?;
    }
    setsockopt(&raw, sockopt::Mark, &MARK)?;
    Ok(raw)
}

/// Lets only those in who were heard of first.
pub(super) fn hold_back(listener: &impl AsFd) -> io::Result<()> {
    attach(listener, &holds())
}

impl Porter {
    pub(super) fn watch(socket: OwnedFd, is_ipv6: bool) -> io::Result<Porter> {
        // SAFETY: the descriptor is this socket's own and stays open as long as it is watched, since both are the `Porter`'s.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }?;
        Ok(Porter { socket, is_ipv6 })
    }

    /// The next one who wants to connect.
    pub(super) async fn hear(&self) -> io::Result<Knock> {
        // The IP header comes with it on IPv4, and is not longer.
        let mut buffer = [0; 2 * MAX_HEADER];
        loop {
            let heard = self.socket.async_io(Interest::READABLE, |socket| {
                let socket = socket.as_raw_fd();
                if self.is_ipv6 {
                    let (length, from) = recvfrom::<SockaddrIn6>(socket, &mut buffer)?;
                    Ok((length, from.map(|from| from.ip())))
                } else {
                    Ok((recvfrom::<SockaddrIn>(socket, &mut buffer)?.0, None))
                }
            });
            let (length, from) = heard.await?;
            let bytes = buffer.get(..length).unwrap_or(&buffer);
            let knock = match from {
                Some(client) => Knock::read(client.into(), Ipv6Addr::LOCALHOST.into(), bytes),
                None => after_ipv4_header(bytes),
            };
            if let Some(knock) = knock {
                return Ok(knock);
            }
        }
    }

    /// Lets it in: the connection will be there to be accepted.
    pub(super) fn admit(&self, knock: &Knock) -> io::Result<()> {
        self.send(&knock.again(), knock.client.ip(), knock.wanted.ip())
    }

    /// Tells it that nobody listens.
    pub(super) fn refuse(&self, knock: &Knock) -> io::Result<()> {
        self.send(&knock.refusal(), knock.wanted.ip(), knock.client.ip())
    }

    /// Never waits: the loopback interface takes it at once.
    fn send(&self, segment: &[u8], from: IpAddr, to: IpAddr) -> io::Result<()> {
        let in_pktinfo;
        let in6_pktinfo;
        let source = match from {
            IpAddr::V4(from) => {
                in_pktinfo = libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: libc::in_addr { s_addr: u32::from(from).to_be() },
                    ipi_addr: libc::in_addr { s_addr: 0 },
                };
                ControlMessage::Ipv4PacketInfo(&in_pktinfo)
            }
            IpAddr::V6(from) => {
                in6_pktinfo = libc::in6_pktinfo {
                    ipi6_addr: libc::in6_addr { s6_addr: from.octets() },
                    ipi6_ifindex: 0,
                };
                ControlMessage::Ipv6PacketInfo(&in6_pktinfo)
            }
        };
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        let socket = self.socket.get_ref().as_raw_fd();
        sendmsg(socket, &[IoSlice::new(segment)], &[source], MsgFlags::empty(), Some(&to))?;
        Ok(())
    }
}

fn after_ipv4_header(packet: &[u8]) -> Option<Knock> {
    let length = usize::from(packet.first()? & 0xf) * 4;
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(bytes).into())
    };
    Knock::read(address(12)?, address(16)?, packet.get(length..)?)
}

const LOAD_8_BEHIND: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_IND;
const LENGTH_OF_IPV4_HEADER: u32 = libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH;

/// Where a filter finds the mark, and the IP header.
const AT_MARK: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_MARK) as u32;
const AT_NETWORK: u32 = libc::SKF_NET_OFF as u32;

/// Goes on at `other` unless the byte of flags that was loaded begins a connection; then the mark is loaded.
fn load_mark_of_first(code: &mut Assembler, other: Label) {
    code.and((SYN | ACK).into());
    code.unless_equal(SYN.into(), other);
    code.load(LOAD_32, AT_MARK);
}

/// Ends a program that has come to what it matches; `dropped` is everything else.
fn end(mut code: Assembler, dropped: Label) -> Vec<Instruction> {
    code.end(Verdict::Matches);
    code.place(dropped);
    code.end(Verdict::Passes);
    code.finish()
}

/// For sockets that take connections, whose filter sees the TCP header first.
fn holds() -> Vec<Instruction> {
    let mut code = Assembler::default();
    let (passes, dropped) = (code.new_label(), code.new_label());
    code.load(LOAD_8, FLAGS_BYTE as u32);
    load_mark_of_first(&mut code, passes);
    code.unless_equal(MARK, dropped);
    code.place(passes);
    end(code, dropped)
}

/// For a raw socket of IPv4, whose filter sees the IP header first: of `127.0.0.0/8`.
fn hears_ipv4() -> Vec<Instruction> {
    let mut code = Assembler::default();
    let dropped = code.new_label();
    code.load(LENGTH_OF_IPV4_HEADER, 0);
    code.load(LOAD_8_BEHIND, FLAGS_BYTE as u32);
    load_mark_of_first(&mut code, dropped);
    code.if_equal(MARK, dropped);
    code.load(LOAD_32, AT_NETWORK + 16);
    code.and(0xff00_0000);
    code.unless_equal(0x7f00_0000, dropped);
    end(code, dropped)
}

/// For a raw socket of IPv6, whose filter sees the TCP header first: of `::1`.
fn hears_ipv6() -> Vec<Instruction> {
    let mut code = Assembler::default();
    let (loopback, dropped) = (code.new_label(), code.new_label());
    code.load(LOAD_8, FLAGS_BYTE as u32);
    load_mark_of_first(&mut code, dropped);
    code.if_equal(MARK, dropped);
    code.if_ipv6(AT_NETWORK + 24, &[Ipv6Addr::LOCALHOST], loopback);
    code.jump(dropped);
    code.place(loopback);
    end(code, dropped)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `tcpdump -x` shows of a connection from 127.0.0.1:45678 to 127.0.0.1:80, with the checksum of a driver that left it out.
    fn segment() -> Vec<u8> {
        let mut segment = Vec::new();
        segment.extend(45678u16.to_be_bytes());
        segment.extend(80u16.to_be_bytes());
        segment.extend(0xffff_ffffu32.to_be_bytes());
        segment.extend([0; 4]);
        segment.extend([6 << 4, SYN, 0xff, 0xd7, 0xfe, 0x30, 0, 0, 2, 4, 0xff, 0xd7]);
        segment
    }

    /// The sum over everything is right when it comes to this.
    fn sum(segment: &[u8], from: IpAddr, to: IpAddr) -> u16 {
        let copy = with_checksum(segment.to_vec(), from, to);
        assert_eq!(copy, segment);
        u16::from_be_bytes([segment[CHECKSUM], segment[CHECKSUM + 1]])
    }

    #[test]
    fn a_knock_is_sent_again_as_it_was_or_refused_in_its_own_words() {
        for local in ["127.0.0.1", "::1"] {
            let local: IpAddr = local.parse().unwrap();
            let knock = Knock::read(local, local, &[&segment()[..], b"early data"].concat()).unwrap();
            assert_eq!((knock.client.port(), knock.wanted.port()), (45678, 80));
            let again = knock.again();
            assert_eq!(again[..CHECKSUM], segment()[..CHECKSUM]);
            assert_eq!(again[18..], segment()[18..]);
            assert_ne!(sum(&again, local, local), 0xfe30);
            let refusal = knock.refusal();
            assert_eq!(refusal.len(), HEADER);
            assert_eq!(refusal[..4], [0, 80, 0xb2, 0x6e]);
            // It acknowledges the number after the knock's.
            assert_eq!(refusal[4..14], [0, 0, 0, 0, 0, 0, 0, 0, 5 << 4, RST | ACK]);
            sum(&refusal, local, local);
        }
    }

    #[test]
    fn a_checksum_is_that_of_the_specification() {
        // A segment of 20 bytes from 192.0.2.1 to 192.0.2.2, summed by hand.
        let segment = [0, 1, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0x50, 0x02, 0, 5, 0, 0, 0, 0];
        let with =
            with_checksum(segment.to_vec(), "192.0.2.1".parse().unwrap(), "192.0.2.2".parse().unwrap());
        let words = [0xc000u32, 0x0201, 0xc000, 0x0202, 6, 20, 1, 2, 3, 4, 0x5002, 5];
        let total = words.iter().sum::<u32>();
        let folded = (total & 0xffff) + (total >> 16);
        assert_eq!(with[CHECKSUM..18], (!(folded as u16)).to_be_bytes());
    }

    #[test]
    fn what_is_no_segment_is_passed_over() {
        let local: IpAddr = Ipv4Addr::LOCALHOST.into();
        for length in 0..segment().len() {
            assert_eq!(Knock::read(local, local, &segment()[..length]), None, "{length} bytes");
        }
        let mut short = segment();
        short[OFFSET_BYTE] = 4 << 4;
        assert_eq!(Knock::read(local, local, &short), None);
        for bytes in [&[][..], &[0x45], &[0x4f; 20], &[0x41; 120]] {
            assert_eq!(after_ipv4_header(bytes), None);
        }
    }
}
