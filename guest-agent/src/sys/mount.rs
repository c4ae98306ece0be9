//! The descriptor-based mount API of Linux 5.2 to 5.12: every mount is made detached and then attached to a place that
//! was looked up beforehand, so that no path is walked twice.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use libc::{
    FSCONFIG_CMD_CREATE, FSCONFIG_CMD_RECONFIGURE, FSCONFIG_SET_FLAG, FSCONFIG_SET_STRING, FSMOUNT_CLOEXEC,
    FSOPEN_CLOEXEC, FSPICK_CLOEXEC, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH, OPEN_TREE_CLOEXEC,
    OPEN_TREE_CLONE,
};

use super::{c_path, c_string, check};

/// Attributes of a mount, from `linux/mount.h`.
pub(crate) mod attr {
    /// Read-only.
    pub(crate) const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
    /// No set-user-id programs.
    pub(crate) const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
    /// No device nodes.
    pub(crate) const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
    /// No programs.
    pub(crate) const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
    /// The bits of the access time policy.
    pub(crate) const ATIME_MASK: u64 = libc::MOUNT_ATTR__ATIME;
    /// Access times follow changes.
    pub(crate) const RELATIME: u64 = libc::MOUNT_ATTR_RELATIME;
    /// No access times.
    pub(crate) const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
    /// Every access sets the access time.
    pub(crate) const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
    /// No access times of directories.
    pub(crate) const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
    /// Symbolic links are not followed.
    pub(crate) const NOSYMFOLLOW: u64 = libc::MOUNT_ATTR_NOSYMFOLLOW;
}

/// Changes of a mount's attributes, as `mount_setattr` takes them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct AttrChange {
    /// Attributes to set.
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// Propagation type (`MS_SHARED` and the like), 0 for no change.
    pub propagation: u64,
    userns_fd: u64,
}

impl AttrChange {
    /// A change of attributes only.
    pub(crate) fn new(set: u64, clear: u64) -> Self {
        Self { set, clear, ..Self::default() }
    }

    /// A change of the propagation type only.
    pub(crate) fn propagation(propagation: u64) -> Self {
        Self { propagation, ..Self::default() }
    }

    /// Whether there is nothing to change.
    pub(crate) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

fn owned(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = check(result)?;
    // SAFETY: the callers pass the result of a call that returns a new descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// A detached copy of the mount at `path` (with everything mounted below it if `recursive`), for a bind mount.
pub(crate) fn clone_tree(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    clone_tree_at(libc::AT_FDCWD, &path, recursive, 0)
}

/// A detached copy of the mount of the file that `fd` refers to, rooted there.
pub(crate) fn clone_tree_of(fd: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    clone_tree_at(fd.as_raw_fd(), c"", recursive, libc::AT_EMPTY_PATH as u32)
}

fn clone_tree_at(dir: RawFd, path: &CStr, recursive: bool, flags: u32) -> io::Result<OwnedFd> {
    let recursive = if recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive | flags;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, dir, path.as_ptr(), flags) })
}

/// Attaches a detached mount to the place that `target` refers to.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: both paths are empty constants.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            target.as_raw_fd(),
            c"".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH,
        )
    })
    .map(drop)
}

/// Changes attributes of the mount that `mount` refers to, and of all mounts below it if `recursive`.
pub(crate) fn set_attributes(mount: BorrowedFd<'_>, change: AttrChange, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the structure has the kernel's layout (four 64-bit fields) and its size is passed with it.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<AttrChange>(),
        )
    })
    .map(drop)
}

/// A new file system of the kind `fstype`, mounted but attached nowhere.
///
/// `options` are the file system's own, each `key=value` or `flag`; `attributes` are those of the mount.
///
/// # Errors
/// The kernel's number, with the text that the file system gave for it if it gave one.
pub(crate) fn new_file_system(
    fstype: &str,
    source: Option<&str>,
    options: &[String],
    attributes: u64,
) -> io::Result<OwnedFd> {
    let name = c_string(fstype)?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let context = owned(unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), FSOPEN_CLOEXEC) })?;
    configure(&context, source, options).map_err(|error| with_log(&context, error))?;
    // SAFETY: takes numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes) })
        .map_err(|error| with_log(&context, error))
}

/// Gives the tmpfs at `path` room for at least `bytes`.
pub(crate) fn grow_tmpfs(path: &Path, bytes: u64) -> io::Result<()> {
    let now = nix::sys::statvfs::statvfs(path)?;
    if now.blocks().saturating_mul(now.fragment_size()) >= bytes {
        return Ok(());
    }
    let path = c_path(path)?;
    // SAFETY: `path` is a NUL-terminated string that outlives the call.
    let context =
        owned(unsafe { libc::syscall(libc::SYS_fspick, libc::AT_FDCWD, path.as_ptr(), FSPICK_CLOEXEC) })?;
    fsconfig(&context, FSCONFIG_SET_STRING, Some("size"), Some(&bytes.to_string()))
        .and_then(|()| fsconfig(&context, FSCONFIG_CMD_RECONFIGURE, None, None))
        .map_err(|error| with_log(&context, error))
}

fn configure(context: &OwnedFd, source: Option<&str>, options: &[String]) -> io::Result<()> {
    if let Some(source) = source {
        fsconfig(context, FSCONFIG_SET_STRING, Some("source"), Some(source))?;
    }
    for option in options {
        match option.split_once('=') {
            Some((key, value)) => fsconfig(context, FSCONFIG_SET_STRING, Some(key), Some(value))?,
            None => fsconfig(context, FSCONFIG_SET_FLAG, Some(option), None)?,
        }
    }
    fsconfig(context, FSCONFIG_CMD_CREATE, None, None)
}

fn fsconfig(context: &OwnedFd, command: u32, key: Option<&str>, value: Option<&str>) -> io::Result<()> {
    let key = key.map(c_string).transpose()?;
    let value = value.map(c_string).transpose()?;
    let pointer =
        |text: &Option<std::ffi::CString>| text.as_ref().map_or(std::ptr::null(), |text| text.as_ptr());
    // SAFETY: key and value are NUL-terminated strings that outlive the call, or null where the command takes none.
    check(unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, pointer(&key), pointer(&value), 0)
    })
    .map(drop)
}

/// Adds what the file system wrote to its context's log, which says far more than an error number.
fn with_log(context: &OwnedFd, error: io::Error) -> io::Error {
    let mut buffer = [0u8; 256];
    // SAFETY: the buffer is writable for its whole length. The log is read a message a call and never blocks.
    let length = unsafe { libc::read(context.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
    match usize::try_from(length) {
        Ok(length) if length > 0 => {
            let text = String::from_utf8_lossy(&buffer[..length]);
            io::Error::new(error.kind(), format!("{error}: {}", text.trim()))
        }
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detached_tmpfs_can_be_made_with_options() {
        let options = ["mode=700".to_owned(), "size=64k".to_owned()];
        let mount = new_file_system("tmpfs", Some("tmpfs"), &options, attr::NOSUID).unwrap();
        let metadata = std::fs::metadata(format!("/proc/self/fd/{}", mount.as_raw_fd())).unwrap();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777, 0o700);
    }

    #[test]
    fn a_tmpfs_grows_and_never_shrinks() {
        let mount = new_file_system("tmpfs", None, &["size=64k".to_owned()], 0).unwrap();
        let path = std::path::PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        let blocks = || nix::sys::statvfs::statvfs(&path).unwrap().blocks();
        let before = blocks();
        grow_tmpfs(&path, 1024).unwrap();
        assert_eq!(blocks(), before);
        grow_tmpfs(&path, 128 << 10).unwrap();
        assert_eq!(blocks(), 2 * before);
    }

    #[test]
    fn a_wrong_option_is_named_in_the_error() {
        let error = new_file_system("tmpfs", None, &["mood=good".to_owned()], 0).unwrap_err();
        assert!(error.to_string().contains("mood"), "{error}");
    }

    #[test]
    fn attributes_of_a_detached_mount_can_be_changed() {
        use std::os::fd::AsFd;
        let mount = new_file_system("tmpfs", None, &[], 0).unwrap();
        set_attributes(mount.as_fd(), AttrChange::new(attr::RDONLY, 0), false).unwrap();
        let path = format!("/proc/self/fd/{}/file", mount.as_raw_fd());
        assert_eq!(std::fs::write(path, "").unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
}
