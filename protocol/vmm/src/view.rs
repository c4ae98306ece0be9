//! Views of a pod's shared tree: names in it that mean the whole tree once more, as a file system of its own to the guest.
//!
//! All that a pod shares of one file system of the host its containers find by one view, and by none what is on another one. So
//! device numbers differ where they differ on the host, and a file is the same by whichever mount it is reached.

/// What begins the name of a view. No container's name does.
const PREFIX: &str = "@";

/// The name of the view for a file system of the host, by its device number.
#[must_use]
pub fn view_name(major: u32, minor: u32) -> String {
    format!("{PREFIX}{}", view_of(major, minor))
}

/// The number of the view for a file system of the host; no device has 0.
#[must_use]
pub fn view_of(major: u32, minor: u32) -> u32 {
    // As the kernel has them: 12 and 20 bits.
    (major & 0xfff) << 20 | minor & 0xf_ffff
}

/// The number of the view with this name; never 0.
#[must_use]
pub fn view_number(name: &[u8]) -> Option<u32> {
    let digits = name.strip_prefix(PREFIX.as_bytes())?;
    if !digits.first().is_some_and(|digit| matches!(digit, b'1'..=b'9')) {
        return None;
    }
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_one_name() {
        assert_eq!(view_number(view_name(8, 1).as_bytes()), Some(0x80_0001));
        assert_eq!(view_number(view_name(0, 0xf_ffff).as_bytes()), Some(0xf_ffff));
        assert_eq!(view_number(view_name(0xfff, 0xf_ffff).as_bytes()), Some(u32::MAX));
        for not in ["", "@", "@0", "@01", "@+1", "@4294967296", "1", "@1/", "@x"] {
            assert_eq!(view_number(not.as_bytes()), None, "{not}");
        }
    }
}
