//! What the shim asks of the host's kernel: processes, cgroups, mounts, disks.

pub(crate) mod assemble;
pub(crate) mod cgroup;
pub(crate) mod changes;
pub mod core_scheduling;
pub(crate) mod disk;
pub(crate) mod empty_network;
pub(crate) mod erofs;
pub(crate) mod ext4;
pub(crate) mod id_map;
pub(crate) mod mount_request;
pub(crate) mod mount_table;
pub(crate) mod mounts;
pub(crate) mod netns;
pub(crate) mod opaque;
pub(crate) mod overlay;
pub(crate) mod parameters;
pub mod pin;
pub mod process;
pub(crate) mod sharing;
pub(crate) mod small_namespace;
pub(crate) mod spawn;
