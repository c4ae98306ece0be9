//! FUSE replies that are not the library's.

use bulkhead_vmm_protocol::fuse::OUT_HEADER;

/// A reply that says what went wrong, by a positive errno.
pub(crate) fn error(unique: u64, errno: i32) -> Vec<u8> {
    message(unique, -errno, &[])
}

/// A reply with data.
pub(crate) fn data(unique: u64, body: &[u8]) -> Vec<u8> {
    message(unique, 0, body)
}

fn message(unique: u64, error: i32, body: &[u8]) -> Vec<u8> {
    let length = OUT_HEADER + body.len();
    let mut message = Vec::with_capacity(length);
    // Replies made here have less than a hundred bytes.
    message.extend((length as u32).to_le_bytes());
    message.extend(error.to_le_bytes());
    message.extend(unique.to_le_bytes());
    message.extend(body);
    message
}
