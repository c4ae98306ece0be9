//! Questions of a pod's programs to a name server that the host has in the pod's network namespace, where they can't reach it:
//! Docker's, at [`SERVER`].
//!
//! One stream with the number [`STREAM`], which the host opens, carries them all. The host begins with a line: the name servers
//! that the guest may ask itself, by their addresses, with blanks between them; at most [`MAX_LINE`] bytes. The agent sends
//! [`READY`] once it takes questions. From then on frames go both ways: a [`Header`] and a message of the domain name system.

use std::net::Ipv4Addr;

/// The number of the stream.
pub const STREAM: u64 = 1 << 60;

/// Where programs expect the name server.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Its port.
pub const PORT: u16 = 53;

/// Bytes of the host's line, with its end.
pub const MAX_LINE: usize = 512;

/// What the agent says once it takes questions.
pub const READY: u8 = 1;

/// The shortest message: the header of RFC 1035, section 4.1.1.
pub const MIN_MESSAGE: u16 = 12;

/// The longest question; those of programs have a few dozen bytes.
pub const MAX_QUESTION: u16 = 4096;

/// Questions that wait for an answer, at most; the oldest is forgotten for a new one.
pub const MAX_WAITING: usize = 64;

/// What is in front of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The agent's number for the question, which the answer repeats.
    pub tag: u32,
    /// Bytes of the message. An answer of none says that there will be none.
    pub length: u16,
    /// Whether the question came over TCP, and so has to be asked.
    pub tcp: bool,
}

impl Header {
    /// Bytes of a header.
    pub const SIZE: usize = 8;

    /// As it is sent.
    pub fn to_bytes(self) -> [u8; Self::SIZE] {
        let ([a, b, c, d], [e, f]) = (self.tag.to_le_bytes(), self.length.to_le_bytes());
        [a, b, c, d, e, f, self.tcp.into(), 0]
    }

    /// As it arrives; `None` if it can't be one.
    pub fn from_bytes(bytes: [u8; Self::SIZE]) -> Option<Self> {
        let [a, b, c, d, e, f, tcp, zero] = bytes;
        (tcp <= 1 && zero == 0).then_some(Self {
            tag: u32::from_le_bytes([a, b, c, d]),
            length: u16::from_le_bytes([e, f]),
            tcp: tcp == 1,
        })
    }

    /// Whether a question may have this header.
    pub fn is_question(self) -> bool {
        (MIN_MESSAGE..=MAX_QUESTION).contains(&self.length)
    }
}

/// A frame: the header of a message and the message. What is too long becomes an answer of none.
pub fn frame(tag: u32, tcp: bool, message: &[u8]) -> Vec<u8> {
    let (length, message) = match u16::try_from(message.len()) {
        Ok(length) => (length, message),
        Err(_) => (0, &[][..]),
    };
    [&Header { tag, length, tcp }.to_bytes()[..], message].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_survive_and_nonsense_is_refused() {
        for tcp in [false, true] {
            let header = Header { tag: 0xdead_beef, length: 4096, tcp };
            assert_eq!(Header::from_bytes(header.to_bytes()), Some(header));
        }
        assert_eq!(Header::from_bytes([0, 0, 0, 0, 12, 0, 2, 0]), None);
        assert_eq!(Header::from_bytes([0, 0, 0, 0, 12, 0, 0, 1]), None);
        for (length, may) in [(0, false), (11, false), (12, true), (4096, true), (4097, false)] {
            assert_eq!(Header { tag: 1, length, tcp: false }.is_question(), may, "{length}");
        }
    }

    #[test]
    fn a_frame_tells_its_length() {
        assert_eq!(frame(1, true, b"ab"), [1, 0, 0, 0, 2, 0, 1, 0, b'a', b'b']);
        assert_eq!(frame(1, false, &vec![7; 70_000]), [1, 0, 0, 0, 0, 0, 0, 0]);
    }
}
