//! The names of what may be of a container's root file system in its directory of the shared tree: the file server knows by them who
//! changes it.

/// All of it.
pub const ROOTFS: &str = "rootfs";

/// What the container changes, if the rest is on a disk.
pub const CHANGES: &str = "changes";

/// What lies below its changes, if these are on a disk: nobody changes it.
pub const LOWER: &str = "lower";

/// All names.
pub const NAMES: [&str; 3] = [ROOTFS, CHANGES, LOWER];
