//! What the shim asks of the host's kernel: processes, cgroups, mounts, disks.

pub mod cgroup;
pub mod changes;
pub mod disk;
pub mod empty_network;
pub mod erofs;
pub mod ext4;
pub mod id_map;
pub mod mount_table;
pub mod mounts;
pub mod netns;
pub mod opaque;
pub mod overlay;
pub mod parameters;
pub mod pin;
pub mod process;
pub mod sharing;
pub mod small_namespace;
pub mod spawn;
