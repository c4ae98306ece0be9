//! Headers of FUSE messages (the kernel's `include/uapi/linux/fuse.h`).

use bulkhead_vmm_protocol::MAX_FUSE_MESSAGE;
use bulkhead_vmm_protocol::fuse::{self, IN_HEADER, OUT_HEADER};

/// Errors in replies are greater than this (`fuse_dev_do_write`).
const ERROR_LIMIT: i32 = -512;

/// The header of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RequestHeader {
    bytes: [u8; IN_HEADER],
}

impl RequestHeader {
    /// Takes a header as the guest wrote it. `None` if it does not say the length that its buffers have.
    pub(crate) fn parse(bytes: [u8; IN_HEADER], available: usize) -> Option<Self> {
        let header = RequestHeader { bytes };
        (header.u32_at(0) as usize == available && available <= MAX_FUSE_MESSAGE).then_some(header)
    }

    /// The number by which the guest knows the request.
    pub(crate) fn unique(&self) -> u64 {
        u64::from(self.u32_at(8)) | u64::from(self.u32_at(12)) << 32
    }

    /// The header with another number.
    pub(crate) fn with_unique(mut self, unique: u64) -> [u8; IN_HEADER] {
        self.bytes[8..16].copy_from_slice(&unique.to_le_bytes());
        self.bytes
    }

    /// What is asked for; see [`fuse::opcode`].
    pub(crate) fn opcode(&self) -> u32 {
        self.u32_at(4)
    }

    /// The node id it is about.
    pub(crate) fn node(&self) -> u64 {
        u64::from(self.u32_at(16)) | u64::from(self.u32_at(20)) << 32
    }

    /// Whether there is no reply to such a request.
    pub(crate) fn is_silent(&self) -> bool {
        fuse::is_silent(self.opcode())
    }

    fn u32_at(&self, at: usize) -> u32 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|index| self.bytes[at + index]);
        u32::from_le_bytes([a, b, c, d])
    }
}

/// The header of a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReplyHeader {
    /// Bytes of the whole reply.
    pub length: u32,
    /// 0, or a negative errno; then there is nothing but the header.
    pub error: i32,
    /// The request's number.
    pub unique: u64,
}

impl ReplyHeader {
    /// Takes a reply as the server sent it. `None` if it is none.
    pub(crate) fn parse(reply: &[u8]) -> Option<Self> {
        let &[length, error, unique_low, unique_high] = reply.first_chunk::<OUT_HEADER>()?.as_chunks().0
        else {
            return None;
        };
        let header = ReplyHeader {
            length: u32::from_le_bytes(length),
            error: i32::from_le_bytes(error),
            unique: u64::from(u32::from_le_bytes(unique_low))
                | u64::from(u32::from_le_bytes(unique_high)) << 32,
        };
        let sound = header.length as usize == reply.len()
            && (header.error == 0
                || (header.error > ERROR_LIMIT && header.error < 0 && reply.len() == OUT_HEADER));
        sound.then_some(header)
    }

    /// A reply that says nothing but a (positive) errno.
    pub(crate) fn error(unique: u64, errno: i32) -> Self {
        ReplyHeader { length: OUT_HEADER as u32, error: -errno, unique }
    }

    /// As the guest reads it.
    pub(crate) fn to_bytes(self) -> [u8; OUT_HEADER] {
        let mut bytes = [0; OUT_HEADER];
        bytes[..4].copy_from_slice(&self.length.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.error.to_le_bytes());
        bytes[8..].copy_from_slice(&self.unique.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(length: u32, opcode: u32) -> [u8; IN_HEADER] {
        let mut bytes = [0; IN_HEADER];
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
        bytes[8..16].copy_from_slice(&0x0102_0304_0506_0708u64.to_le_bytes());
        bytes
    }

    #[test]
    fn a_request_must_say_its_length() {
        assert!(RequestHeader::parse(request(40, 1), 40).is_some());
        for length in [0, 39, 41, u32::MAX] {
            assert_eq!(RequestHeader::parse(request(length, 1), 40), None);
        }
        let limit = MAX_FUSE_MESSAGE;
        assert!(RequestHeader::parse(request(limit as u32, 1), limit).is_some());
        assert_eq!(RequestHeader::parse(request(limit as u32 + 1, 1), limit + 1), None);
    }

    #[test]
    fn the_number_is_replaced_and_nothing_else() {
        let header = RequestHeader::parse(request(40, 1), 40).unwrap();
        assert_eq!(header.unique(), 0x0102_0304_0506_0708);
        let replaced = header.with_unique(9);
        assert_eq!(replaced[8..16], 9u64.to_le_bytes());
        assert_eq!((&replaced[..8], &replaced[16..]), (&request(40, 1)[..8], &request(40, 1)[16..]));
    }

    #[test]
    fn forgetting_is_silent() {
        let silent = |opcode| RequestHeader::parse(request(40, opcode), 40).unwrap().is_silent();
        assert!([2, 36, 41, 42].into_iter().all(silent));
        assert!(![0, 1, 3, 15, 26, 38, u32::MAX].into_iter().any(silent));
    }

    #[test]
    fn a_reply_must_be_sound() {
        let reply = |length: u32, error: i32, size: usize| {
            let mut bytes = ReplyHeader { length, error, unique: 7 << 40 | 5 }.to_bytes().to_vec();
            bytes.resize(size, 0);
            ReplyHeader::parse(&bytes)
        };
        assert_eq!(reply(20, 0, 20), Some(ReplyHeader { length: 20, error: 0, unique: 7 << 40 | 5 }));
        assert_eq!(reply(16, -2, 16), Some(ReplyHeader { length: 16, error: -2, unique: 7 << 40 | 5 }));
        for (length, error, size) in [(16, 0, 20), (20, 0, 16), (15, 0, 15), (0, 0, 0), (20, -2, 20)] {
            assert_eq!(reply(length, error, size), None, "{length} {error} {size}");
        }
        for error in [1, -512, -4095, i32::MIN, i32::MAX] {
            assert_eq!(reply(16, error, 16), None, "{error}");
        }
    }
}
