//! Where the parts are below the prefix that Bulkhead is installed under.

/// The shim.
pub const SHIM: &str = "bin/containerd-shim-bulkhead-v1";

/// The operator's command.
pub const COMMAND: &str = "bin/bulkhead";

/// The virtual machine monitor.
pub const VMM: &str = "libexec/bulkhead/bulkhead-vmm";

/// The file server.
pub const FS_SERVER: &str = "libexec/bulkhead/bulkhead-fs";

/// The guest kernel.
pub const KERNEL: &str = "share/bulkhead/vmlinux";

/// The guest image.
pub const IMAGE: &str = "share/bulkhead/guest.erofs";
