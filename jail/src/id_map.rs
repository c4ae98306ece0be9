//! Mapping the ids of a new user namespace.
//!
//! Only a process of the parent namespace may map more than one id, so a child writes the maps: it is forked before the
//! namespace exists, waits for it, writes, and ends.

use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2, read, write};

use crate::JailError;
use crate::file_server::{open_proc_self, write_at};

/// Every id that there is, to itself; the last 32-bit value means "no id".
const IDENTITY: &[u8] = b"0 0 4294967295\n";

/// A child that waits to write the maps.
pub(crate) struct IdMapper {
    child: Pid,
    go: OwnedFd,
}

impl IdMapper {
    /// Forks the child. The process must have one thread, and `/proc`.
    pub(crate) fn start() -> Result<Self, JailError> {
        let proc_self = open_proc_self().map_err(failed("open /proc/self"))?;
        let (wait, go) = pipe2(OFlag::O_CLOEXEC).map_err(failed("create a pipe"))?;
        // SAFETY: there is one thread, so the child may run any code.
        match unsafe { fork() }.map_err(failed("fork the process that writes the id maps"))? {
            ForkResult::Parent { child } => Ok(IdMapper { child, go }),
            ForkResult::Child => {
                drop(go);
                let status = match map(&wait, &proc_self) {
                    Ok(()) => 0,
                    Err(errno) => errno as i32,
                };
                // SAFETY: ends the child without running anything the parent registered for its own exit.
                unsafe { libc::_exit(status) }
            }
        }
    }

    /// Has the maps written; call it inside the new namespace.
    pub(crate) fn finish(self) -> Result<(), JailError> {
        write(&self.go, b"g").map_err(failed("start the process that writes the id maps"))?;
        drop(self.go);
        loop {
            return match waitpid(self.child, None) {
                Ok(WaitStatus::Exited(_, 0)) => Ok(()),
                Ok(WaitStatus::Exited(_, errno)) => Err(failed("map ids")(Errno::from_raw(errno))),
                Ok(_) => Err(failed("map ids")(Errno::ECHILD)),
                Err(Errno::EINTR) => continue,
                Err(errno) => Err(failed("wait for the process that writes the id maps")(errno)),
            };
        }
    }
}

/// In the child: the parent's end of file means that it failed, and there is nothing to map.
fn map(wait: &OwnedFd, proc_self: &OwnedFd) -> Result<(), Errno> {
    let mut byte = [0];
    if read(wait, &mut byte)? == 0 {
        return Err(Errno::ECANCELED);
    }
    write_at(proc_self, c"uid_map", IDENTITY)?;
    write_at(proc_self, c"gid_map", IDENTITY)
}

fn failed(step: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |source| JailError::UserNamespace { step, source }
}
