//! The host's mount table (proc(5), `/proc/pid/mountinfo`).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Where something is mounted.
#[derive(Debug)]
pub struct MountTable {
    points: Vec<PathBuf>,
}

impl MountTable {
    /// Reads the table of the calling process's mount namespace.
    pub fn read() -> std::io::Result<MountTable> {
        Ok(MountTable::parse(&fs::read("/proc/thread-self/mountinfo")?))
    }

    fn parse(table: &[u8]) -> MountTable {
        let points = table.split(|&byte| byte == b'\n').filter_map(|line| {
            let point = line.split(|&byte| byte == b' ').nth(4)?;
            Some(PathBuf::from(OsString::from_vec(unescape(point))))
        });
        MountTable { points: points.collect() }
    }

    /// Whether anything is mounted below `path`, which has no symbolic links in it.
    pub fn has_below(&self, path: &Path) -> bool {
        self.points.iter().any(|point| point != path && point.starts_with(path))
    }
}

/// Blanks and backslashes are written as three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&byte, tail)) = rest.split_first() {
        let octal = |digits: &[u8]| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok();
        match (byte, tail.get(..3).and_then(octal)) {
            (b'\\', Some(escaped)) => {
                plain.push(escaped);
                rest = &tail[3..];
            }
            _ => {
                plain.push(byte);
                rest = tail;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_below_a_path_is_found() {
        let table = MountTable::parse(
            b"21 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
              30 21 0:25 / /srv/a\\040b rw - tmpfs tmpfs rw\n\
              31 30 0:26 / /srv/a\\040b/below rw - tmpfs tmpfs rw\n",
        );
        assert!(table.has_below(Path::new("/srv")) && table.has_below(Path::new("/srv/a b")));
        assert!(!table.has_below(Path::new("/srv/a b/below")) && !table.has_below(Path::new("/srv/a")));
    }

    #[test]
    fn the_own_table_can_be_read() {
        assert!(MountTable::read().unwrap().has_below(Path::new("/")));
    }
}
