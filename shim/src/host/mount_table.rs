//! The host's mount table (proc(5), `/proc/pid/mountinfo`).

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// What is mounted where.
#[derive(Debug)]
pub(crate) struct MountTable {
    mounts: Vec<TableMount>,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TableMount {
    /// Its number.
    pub id: u64,
    /// What of its file system is mounted: a path in it.
    pub root: PathBuf,
    /// Where it is.
    pub point: PathBuf,
    /// The device number of its file system.
    pub device: (u32, u32),
    /// Its options: what holds for the mount, not for the file system.
    pub options: Vec<String>,
    /// The type of its file system.
    pub kind: String,
    /// What that file system is on, in words of its own.
    pub source: OsString,
}

impl MountTable {
    /// Reads the table of the calling process's mount namespace.
    pub(crate) fn read() -> std::io::Result<MountTable> {
        Ok(MountTable::parse(&fs::read("/proc/thread-self/mountinfo")?))
    }

    fn parse(table: &[u8]) -> MountTable {
        MountTable { mounts: table.split(|&byte| byte == b'\n').filter_map(parse_line).collect() }
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &TableMount> {
        self.mounts.iter()
    }

    /// What is mounted below `path`, which has no symbolic links in it; each after what it is mounted on.
    pub(crate) fn below<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a TableMount> {
        self.mounts.iter().filter(move |mount| mount.point != path && mount.point.starts_with(path))
    }
}

fn parse_line(line: &[u8]) -> Option<TableMount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let text = |field: Option<&[u8]>| Some(std::str::from_utf8(field?).ok()?.to_owned());
    let id = text(fields.next())?.parse().ok()?;
    let device = text(fields.nth(1))?;
    let (major, minor) = device.split_once(':')?;
    let name = |field: Option<&[u8]>| Some(OsString::from_vec(unescape(field?)));
    let root = name(fields.next())?.into();
    let point = name(fields.next())?.into();
    let options = text(fields.next())?.split(',').map(str::to_owned).collect();
    // Optional fields end with a hyphen.
    let mut fields = fields.skip_while(|field| *field != b"-");
    let kind = text(fields.nth(1))?;
    let source = name(fields.next()).unwrap_or_default();
    let device = (major.parse().ok()?, minor.parse().ok()?);
    Some(TableMount { id, device, root, point, options, kind, source })
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
              31 30 0:26 / /srv/a\\040b/below rw,nodev shared:1 - tmpfs tmpfs rw\n",
        );
        let below =
            |path: &'static str| -> Vec<u64> { table.below(Path::new(path)).map(|mount| mount.id).collect() };
        assert_eq!(
            (below("/srv"), below("/srv/a b"), below("/srv/a b/below")),
            (vec![30, 31], vec![31], vec![])
        );
        assert_eq!(below("/srv/a"), [0; 0]);
        let first = table.iter().next().unwrap();
        assert_eq!((first.root.as_path(), first.source.to_str()), (Path::new("/"), Some("/dev/sda1")));
        let last = table.below(Path::new("/srv")).last().unwrap();
        assert_eq!(
            (last.device, last.options.join(","), last.kind.as_str()),
            ((0, 26), "rw,nodev".into(), "tmpfs")
        );
    }

    #[test]
    fn the_own_table_can_be_read() {
        assert!(MountTable::read().unwrap().below(Path::new("/")).next().is_some());
    }
}
