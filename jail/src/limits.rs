//! Resource limits of a jailed process.

use nix::sys::resource::{Resource, setrlimit};

use crate::JailError;

/// The one size that means no core dump at all. With 0 the kernel would still pipe one to the program that `core_pattern`
/// names, if the process is dumpable, which the file server becomes again when a thread of it changes its user (core(5)).
const NO_CORE: u64 = 1;

/// Limits that stay for the process's life: hard and soft alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors.
    pub open_files: u64,
    /// Processes and threads of the process's user. Root's are not counted.
    pub processes: u64,
}

impl Limits {
    /// Applies these limits, no core dumps (they would hold guest memory), and no POSIX queues or locked memory.
    pub(crate) fn apply(&self) -> Result<(), JailError> {
        let limits = [
            (Resource::RLIMIT_NOFILE, self.open_files, "open files"),
            (Resource::RLIMIT_NPROC, self.processes, "processes"),
            (Resource::RLIMIT_CORE, NO_CORE, "core dumps"),
            (Resource::RLIMIT_MEMLOCK, 0, "locked memory"),
            (Resource::RLIMIT_MSGQUEUE, 0, "message queues"),
        ];
        for (resource, value, name) in limits {
            setrlimit(resource, value, value).map_err(|errno| JailError::Limit(name, errno))?;
        }
        Ok(())
    }
}
