//! Resource limits of a jailed process.

use nix::sys::resource::{Resource, setrlimit};

use crate::JailError;

/// Limits that stay for the process's life: hard and soft alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open descriptors.
    pub open_files: u64,
}

impl Limits {
    /// Applies these limits, no core dumps (they would hold guest memory), and no POSIX queues or locked memory.
    pub(crate) fn apply(&self) -> Result<(), JailError> {
        let limits = [
            (Resource::RLIMIT_NOFILE, self.open_files, "open files"),
            (Resource::RLIMIT_CORE, 0, "core dumps"),
            (Resource::RLIMIT_MEMLOCK, 0, "locked memory"),
            (Resource::RLIMIT_MSGQUEUE, 0, "message queues"),
        ];
        for (resource, value, name) in limits {
            setrlimit(resource, value, value).map_err(|errno| JailError::Limit(name, errno))?;
        }
        Ok(())
    }
}
