//! System calls on files held as descriptors. No path but a single name in a held directory is ever resolved.

use std::ffi::CStr;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_vmm_protocol::is_shareable;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxFlags, Uid, fstatfs, openat, statx};
use rustix::io::{Errno, Result};
use rustix::thread::{set_thread_res_gid, set_thread_res_uid};

/// `/proc/self/fd`, by which a held `O_PATH` descriptor is opened for real, or named where only a path will do.
#[derive(Debug)]
pub(super) struct OwnFds(OwnedFd);

impl OwnFds {
    /// Takes the directory `/proc/self/fd` and makes it the working directory, for the calls that take paths only.
    pub(super) fn new(directory: OwnedFd) -> Result<Self> {
        rustix::process::fchdir(&directory)?;
        Ok(OwnFds(directory))
    }

    /// Opens the file behind an `O_PATH` descriptor.
    pub(super) fn reopen(&self, path_fd: impl AsFd, flags: OFlags) -> Result<File> {
        let name = FdName::new(path_fd.as_fd());
        openat(&self.0, name.as_c_str(), flags | OFlags::CLOEXEC, Mode::empty()).map(File::from)
    }
}

impl AsFd for OwnFds {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A descriptor's name in `/proc/self/fd`.
pub(super) struct FdName([u8; 12]);

impl FdName {
    /// Names an open descriptor.
    pub(super) fn new(fd: BorrowedFd<'_>) -> Self {
        let mut name = [0; 12];
        // Ten digits are the most that there can be; NUL follows.
        let _fits = write!(&mut name[..11], "{}", fd.as_raw_fd());
        FdName(name)
    }

    /// The name, relative to `/proc/self/fd` (which is the working directory).
    pub(super) fn as_c_str(&self) -> &CStr {
        CStr::from_bytes_until_nul(&self.0).unwrap_or(c"")
    }
}

/// Opens a directory's entry as `O_PATH`, following no symbolic link.
pub(super) fn open_entry(directory: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    openat(directory, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

/// Whether the guest may see what is mounted where this file was found: asked of the descriptor that is then used.
pub(super) fn may_enter(path_fd: impl AsFd) -> Result<bool> {
    let stat = fstatfs(path_fd)?;
    let nodev = stat.f_flags as u64 & libc::ST_NODEV != 0;
    // The kernel's numbers have 32 bits, whatever the type they come in.
    Ok(is_shareable(stat.f_type as u32, nodev))
}

/// What the host knows of a held file.
pub(super) struct Attributes(Statx);

impl Attributes {
    const WANTED: StatxFlags = StatxFlags::BASIC_STATS.union(StatxFlags::MNT_ID);

    /// Asks for them.
    pub(super) fn of(file: impl AsFd) -> Result<Self> {
        statx(file, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, Self::WANTED).map(Attributes)
    }

    /// The same of a directory's entry.
    pub(super) fn of_entry(directory: impl AsFd, name: &CStr) -> Result<Self> {
        statx(directory, name, AtFlags::NO_AUTOMOUNT | AtFlags::SYMLINK_NOFOLLOW, Self::WANTED)
            .map(Attributes)
    }

    /// Its number on its file system.
    pub(super) fn number(&self) -> u64 {
        self.0.stx_ino
    }

    /// The mount it was reached by.
    pub(super) fn mount_id(&self) -> u64 {
        self.0.stx_mnt_id
    }

    /// Device number, major and minor.
    pub(super) fn device(&self) -> (u32, u32) {
        (self.0.stx_dev_major, self.0.stx_dev_minor)
    }

    /// Its type and permissions.
    pub(super) fn mode(&self) -> u32 {
        self.0.stx_mode.into()
    }

    /// How many names it has.
    pub(super) fn links(&self) -> u32 {
        self.0.stx_nlink
    }

    /// Whether it is marked as one that may stand for a device node.
    pub(super) fn is_marked(&self) -> bool {
        let Statx { stx_size, stx_mode, .. } = self.0;
        stx_size == 0 && u32::from(stx_mode) & (libc::S_IFMT | libc::S_ISVTX) == libc::S_IFREG | libc::S_ISVTX
    }

    /// What it is.
    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.0.stx_mode.into())
    }

    /// As the FUSE library wants them, with the number that the guest is to see.
    pub(super) fn to_stat(&self, guest_number: u64) -> libc::stat64 {
        let Attributes(from) = self;
        // SAFETY: `stat64` is plain data, for which zeros are valid; it has padding, so it can't be written out in full.
        let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
        stat.st_ino = guest_number;
        stat.st_mode = from.stx_mode.into();
        stat.st_nlink = from.stx_nlink.into();
        stat.st_uid = from.stx_uid;
        stat.st_gid = from.stx_gid;
        stat.st_rdev = libc::makedev(from.stx_rdev_major, from.stx_rdev_minor);
        // The kernel's own sizes are signed 64-bit numbers: these casts lose nothing.
        stat.st_size = from.stx_size as i64;
        stat.st_blocks = from.stx_blocks as i64;
        stat.st_blksize = from.stx_blksize.into();
        stat.st_atime = from.stx_atime.tv_sec;
        stat.st_atime_nsec = from.stx_atime.tv_nsec.into();
        stat.st_mtime = from.stx_mtime.tv_sec;
        stat.st_mtime_nsec = from.stx_mtime.tv_nsec.into();
        stat.st_ctime = from.stx_ctime.tv_sec;
        stat.st_ctime_nsec = from.stx_ctime.tv_nsec.into();
        stat
    }
}

/// The file-creation identity of the calling thread, until dropped: new files belong to this user and group.
#[derive(Debug)]
pub(super) struct ActingAs {
    changed: bool,
}

impl ActingAs {
    /// Takes on the ids of the guest's process. Capabilities stay: see the jail's secure bits.
    pub(super) fn new(uid: u32, gid: u32) -> Result<Self> {
        // All ones means "leave as it is" to the system call, and is no id.
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        // Dropped, and so undone, when the second of the two calls fails.
        let acting = ActingAs { changed: (uid, gid) != (0, 0) };
        if acting.changed {
            set_effective(uid, gid)?;
        }
        Ok(acting)
    }
}

impl Drop for ActingAs {
    fn drop(&mut self) {
        if self.changed && set_effective(0, 0).is_err() {
            // Going on as somebody else would give files to the wrong owner.
            std::process::abort();
        }
    }
}

/// Of this thread only, unlike the C library's functions.
fn set_effective(uid: u32, gid: u32) -> Result<()> {
    set_thread_res_gid(None, Gid::from_raw(gid), None)?;
    set_thread_res_uid(None, Uid::from_raw(uid), None)
}
