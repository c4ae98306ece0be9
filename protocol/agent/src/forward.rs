//! Streams to TCP ports of the guest: they come to [`STDIO_PORT`](crate::STDIO_PORT) as those of processes do, with a number
//! that says where they go.
//!
//! Once the agent has reached the port it sends [`CONNECTED`]; what follows, both ways, is the connection's. A stream that
//! ends before that was refused.

/// Set in a stream's number that is a port.
const IS_PORT: u64 = 1 << 63;

/// Set when the IPv6 loopback address is tried first.
const IPV6_FIRST: u64 = 1 << 62;

/// The number of a stream for an operator's question: a line of text, at most [`MAX_QUESTION`] bytes. The answer is what comes
/// back until the stream's end.
pub const QUESTION: u64 = 1 << 61;

/// Bytes of a question, with the end of its line.
pub const MAX_QUESTION: usize = 256;

/// The byte that the agent sends when the port has taken the connection.
pub const CONNECTED: u8 = 1;

/// Where a stream goes: a port of the guest's loopback addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoopbackPort {
    /// The TCP port.
    pub port: u16,
    /// Whether `::1` is tried before `127.0.0.1`.
    pub ipv6_first: bool,
}

impl LoopbackPort {
    /// The stream's number.
    pub fn to_number(self) -> u64 {
        IS_PORT | if self.ipv6_first { IPV6_FIRST } else { 0 } | u64::from(self.port)
    }

    /// What a stream's number says; `None` when it is that of a process's stream.
    pub fn from_number(number: u64) -> Option<Self> {
        (number & IS_PORT != 0)
            .then_some(Self { port: (number & 0xffff) as u16, ipv6_first: number & IPV6_FIRST != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_say_where_streams_go() {
        for ipv6_first in [false, true] {
            for port in [0, 1, 80, u16::MAX] {
                let port = LoopbackPort { port, ipv6_first };
                assert_eq!(LoopbackPort::from_number(port.to_number()), Some(port));
            }
        }
        for number in [0, 1, QUESTION, crate::names::STREAM, u64::MAX >> 1] {
            assert_eq!(LoopbackPort::from_number(number), None);
        }
    }
}
