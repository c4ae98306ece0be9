//! What the shim asks of the host's kernel: processes, cgroups, mounts.

pub mod cgroup;
pub mod mounts;
pub mod process;
pub mod spawn;
