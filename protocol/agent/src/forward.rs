//! Streams to TCP ports of the guest: they come to [`STDIO_PORT`](crate::STDIO_PORT) as those of processes do, with a number
//! that says where they go.
//!
//! Once the agent has reached the port it sends [`CONNECTED`]; what follows, both ways, is the connection's. A stream that
//! ends before that was refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Set in a stream's number that is a port.
const IS_PORT: u64 = 1 << 63;

/// Set when it is one of `::1`; else the number has the last three bytes of an address in `127.0.0.0/8`, before the port.
const IS_IPV6: u64 = 1 << 62;

/// The number of a stream for an operator's question: a line of text, at most [`MAX_QUESTION`] bytes. The answer is what comes
/// back until the stream's end.
pub const QUESTION: u64 = 1 << 61;

/// Bytes of a question, with the end of its line.
pub const MAX_QUESTION: usize = 256;

/// The byte that the agent sends when the port has taken the connection.
pub const CONNECTED: u8 = 1;

/// Where a stream goes: a port of one of the guest's loopback addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopbackPort(SocketAddr);

impl LoopbackPort {
    /// A port of `::1` or of an address in `127.0.0.0/8`; `None` for any other.
    pub fn new(address: SocketAddr) -> Option<Self> {
        // Flow and scope of an IPv6 address say nothing here.
        address.ip().is_loopback().then(|| Self(SocketAddr::new(address.ip(), address.port())))
    }

    /// Its address.
    pub fn address(self) -> SocketAddr {
        self.0
    }

    /// The stream's number.
    pub fn to_number(self) -> u64 {
        let address = match self.0.ip() {
            IpAddr::V4(address) => u64::from(u32::from(address) & 0xff_ffff) << 16,
            IpAddr::V6(_) => IS_IPV6,
        };
        IS_PORT | address | u64::from(self.0.port())
    }

    /// What a stream's number says; `None` when it is that of a process's stream.
    pub fn from_number(number: u64) -> Option<Self> {
        if number & IS_PORT == 0 {
            return None;
        }
        let address: IpAddr = if number & IS_IPV6 != 0 {
            Ipv6Addr::LOCALHOST.into()
        } else {
            Ipv4Addr::from_bits(127 << 24 | (number >> 16 & 0xff_ffff) as u32).into()
        };
        Some(Self(SocketAddr::new(address, (number & 0xffff) as u16)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_say_where_streams_go() {
        for address in ["127.0.0.1", "127.9.8.7", "127.255.255.255", "::1"] {
            for port in [0, 1, 80, u16::MAX] {
                let address = SocketAddr::new(address.parse().unwrap(), port);
                let port = LoopbackPort::new(address).unwrap();
                assert_eq!(port.address(), address);
                assert_eq!(LoopbackPort::from_number(port.to_number()), Some(port));
            }
        }
        for other in ["10.0.0.1:80", "0.0.0.0:80", "[::]:80", "[fd00::1]:80", "[::ffff:127.0.0.1]:80"] {
            assert_eq!(LoopbackPort::new(other.parse().unwrap()), None);
        }
        for number in [0, 1, QUESTION, crate::names::STREAM, u64::MAX >> 1] {
            assert_eq!(LoopbackPort::from_number(number), None);
        }
    }
}
