//! Ids of containers and processes: they become parts of paths on the host and in the guest, and each side checks them for itself.

/// The longest id, in bytes; containerd's own limit.
pub const MAX_ID: usize = 76;

/// Whether an id can be used: 1 to [`MAX_ID`] of the characters A-Z a-z 0-9 _ . - with a letter or digit first.
pub fn is_sound(id: &str) -> bool {
    id.len() <= MAX_ID
        && id.starts_with(|first: char| first.is_ascii_alphanumeric())
        && id.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}
