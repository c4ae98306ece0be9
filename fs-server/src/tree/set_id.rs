//! Set-id bits, which go when a file is changed by a process without `CAP_FSETID`. Whether the guest's process has it the
//! guest's kernel knows, and says so with each request. The host's kernel asks for the capability in the initial user
//! namespace, where the server has none, so it takes the bits away in any case; where they are to stay they are put back.

use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{self, AtFlags, Mode};
use rustix::io::Result;

use super::host::{Attributes, FdName, OwnFds};
use super::inodes::Inode;

/// Bits that a change takes away.
const SET_ID: u32 = libc::S_ISUID | libc::S_ISGID;

/// Whether a file with this mode has something to lose.
pub(super) fn has(mode: u32) -> bool {
    mode & SET_ID != 0
}

/// Whether set-id bits go where a request says nothing about them, as `FUSE_FALLOCATE` and `FUSE_COPY_FILE_RANGE`: unless it is
/// root who asks, who nearly always has `CAP_FSETID`, as nearly nobody else has.
pub(super) fn taken_by(uid: u32) -> bool {
    uid != 0
}

/// Changes the file of `inode` by `change`. Unless `kill`, what set-id bits it has stay.
pub(super) fn keep<T, E: From<rustix::io::Errno>>(
    own_fds: &OwnFds,
    inode: &Inode,
    kill: bool,
    change: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    /// Held while such a file is changed, so that bits which one process's change has taken are not put back after
    /// another's. There are few such files, and they are seldom written to.
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

    if !inode.has_set_id() {
        return change();
    }
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let before = Attributes::of(inode)?.mode();
    let changed = change()?;
    if !kill {
        restore(own_fds, inode, before)?;
    }
    Ok(changed)
}

fn restore(own_fds: &OwnFds, inode: &Inode, mode: u32) -> Result<()> {
    if !has(mode) || Attributes::of(inode)?.mode() == mode {
        return Ok(());
    }
    let name = FdName::new(inode.as_fd());
    fs::chmodat(own_fds, name.as_c_str(), Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())
}
