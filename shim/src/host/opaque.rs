//! What a guest's overlay says of directories, said to the host: which of them hide what is below them in the image.
//!
//! Whoever makes an image of a container's changes, or mounts them on the host, finds it in `trusted.overlay.opaque`, which
//! the file server can't write. It leaves a note in an attribute of its own.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions, ReadDir};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bulkhead_vmm_protocol::OPAQUE_NOTE;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

const OPAQUE: &CStr = c"trusted.overlay.opaque";

/// What an opaque directory says.
const YES: &[u8] = b"y";

/// How deep directories may be: each level is two descriptors.
const MAX_DEPTH: usize = 512;

/// How many entries are looked at: the guest decides how many there are.
const MAX_ENTRIES: usize = 4_000_000;

/// Why not every directory is as it should be.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpaqueError {
    /// A directory.
    #[error("can't look into a directory of {path}")]
    Look {
        /// All that was to be looked through.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// There is more than anybody should wait for.
    #[error("{0} has more than {MAX_ENTRIES} files, or directories more than {MAX_DEPTH} deep")]
    TooMuch(PathBuf),
}

/// Tells the host of every directory in `changes` with a note; gives how many there were.
///
/// Nothing that is not a directory is opened, no link is followed, and the guest may go on changing things meanwhile.
pub(crate) fn tell_host(changes: &Path) -> Result<usize, OpaqueError> {
    let look = |source: io::Error| OpaqueError::Look { path: changes.to_owned(), source };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let top = OpenOptions::new().read(true).custom_flags(flags.bits()).open(changes).map_err(look)?;
    let (mut open, mut entries, mut told) = (vec![Level::of(top).map_err(look)?], 0, 0);
    while let Some(level) = open.last_mut() {
        let Some(entry) = level.entries.next() else {
            open.pop();
            continue;
        };
        entries += 1;
        let entry = entry.map_err(look)?;
        if !entry.file_type().map_err(look)?.is_dir() {
            continue;
        }
        let below = match openat(&level.directory, entry.file_name().as_os_str(), flags, Mode::empty()) {
            Ok(below) => File::from(below),
            // It is gone, or something else by now.
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => continue,
            Err(errno) => return Err(look(errno.into())),
        };
        told += usize::from(tell_of(&below).map_err(look)?);
        if open.len() == MAX_DEPTH || entries >= MAX_ENTRIES {
            return Err(OpaqueError::TooMuch(changes.to_owned()));
        }
        open.push(Level::of(below).map_err(look)?);
    }
    Ok(told)
}

/// A directory that is looked through.
struct Level {
    directory: File,
    entries: ReadDir,
}

impl Level {
    fn of(directory: File) -> io::Result<Level> {
        // The descriptor's name leads to the directory itself, whatever has become of its path.
        let entries = fs::read_dir(format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        Ok(Level { directory, entries })
    }
}

/// Tells the host of a directory if it has a note; gives whether it has.
fn tell_of(directory: &File) -> io::Result<bool> {
    let fd = directory.as_raw_fd();
    let mut value = [0u8; 1];
    let note = OPAQUE_NOTE.as_ptr();
    // SAFETY: the name ends with NUL, and the buffer is as long as is said.
    let length = unsafe { libc::fgetxattr(fd, note, value.as_mut_ptr().cast(), value.len()) };
    match Errno::result(length) {
        Ok(1) if value == YES => {}
        // None, or nothing that an overlay says.
        Ok(_) | Err(Errno::ENODATA | Errno::ERANGE | Errno::EOPNOTSUPP) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    }
    // SAFETY: as above.
    let set = unsafe { libc::fsetxattr(fd, OPAQUE.as_ptr(), YES.as_ptr().cast(), YES.len(), 0) };
    Errno::result(set)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn set(path: &Path, name: &CStr, value: &[u8]) {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: both names end with NUL, and the value is as long as is said.
        let result =
            unsafe { libc::lsetxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), 0) };
        Errno::result(result).unwrap();
    }

    fn is_opaque(path: &Path) -> bool {
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: both names end with NUL; no value is asked for.
        unsafe { libc::lgetxattr(path.as_ptr(), OPAQUE.as_ptr(), std::ptr::null_mut(), 0) == 1 }
    }

    #[test]
    fn directories_with_a_note_are_opaque_to_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("top");
        for name in ["a/b/c", "plain/sub", "odd"] {
            fs::create_dir_all(top.join(name)).unwrap();
        }
        fs::write(top.join("a/file"), "").unwrap();
        std::os::unix::fs::symlink("/etc", top.join("link")).unwrap();
        set(&top.join("a"), OPAQUE_NOTE, b"y");
        set(&top.join("a/b/c"), OPAQUE_NOTE, b"y");
        set(&top.join("odd"), OPAQUE_NOTE, b"something");
        assert_eq!(tell_host(&top).unwrap(), 2);
        for (name, opaque) in [("a", true), ("a/b", false), ("a/b/c", true), ("plain", false), ("odd", false)]
        {
            assert_eq!(is_opaque(&top.join(name)), opaque, "{name}");
        }
        fs::remove_dir_all(&top).unwrap();
        assert!(matches!(tell_host(&top), Err(OpaqueError::Look { .. })));
    }

    #[test]
    fn there_is_an_end_to_depth() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().join("top");
        let deep: PathBuf = std::iter::repeat_n("d", MAX_DEPTH + 1).collect();
        fs::create_dir_all(top.join(deep)).unwrap();
        assert!(matches!(tell_host(&top), Err(OpaqueError::TooMuch(_))));
    }
}
