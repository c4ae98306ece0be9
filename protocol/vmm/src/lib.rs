//! The control protocol between the shim and the VMM.
//!
//! One `SOCK_SEQPACKET` socket pair carries it. The VMM finds its end at [`CONTROL_FD`]. A packet is one JSON value of
//! at most [`MAX_PACKET`] bytes, with at most [`MAX_FDS`] file descriptors beside it (`SCM_RIGHTS`). Messages name the
//! descriptors that came with them by [`FdIndex`], their position in the packet.
//!
//! The shim sends a [`Request`] and gets exactly one [`FromVmm::Reply`] for it, in order. The VMM sends
//! [`FromVmm::Event`] at any time. When either end closes, the other ends the virtual machine.

mod attach;
mod buffer;
mod channel;
mod config;
mod file_systems;
pub mod fuse;
pub mod loan;
mod message;
mod packet;
pub mod roots;
mod view;

pub use attach::{
    AttachDisk, AttachNet, DEVICE_SLOTS, DiskRole, MAX_PARTS, MAX_QUEUE_PAIRS, NetOffloads, PART_ALIGNMENT,
};
pub use buffer::MessageBuffer;
pub use channel::{Channel, ChannelError, MAX_FDS, MAX_PACKET, Packet};
pub use config::{
    BlockConfig, ConfigError, FIRST_GUEST_CID, FdIndex, FsConfig, GuestStream, MAX_VCPUS, MIN_MEMORY_MIB,
    MemorySource, PAGES_WRITTEN, PrepareConfig, RestoreConfig, VmConfig, VsockConfig,
};
pub use file_systems::{is_shareable, is_shareable_name};
pub use message::{Event, ExitReason, FromVmm, Refusal, RefusalKind, Request};
pub use view::{view_name, view_number, view_of};

/// The descriptor number at which the VMM finds its end of the control socket.
pub const CONTROL_FD: i32 = 3;

/// The descriptor number at which the file server finds its end of the FUSE socket.
///
/// That socket is `SOCK_SEQPACKET` too: one packet is one FUSE request from the guest (header and payload, at most
/// [`MAX_FUSE_MESSAGE`] bytes), or one FUSE reply to it, matched by the `unique` field of the FUSE header, or a [`loan`].
pub const FUSE_FD: i32 = 3;

/// The same for a second socket, by which root file systems are served, and nothing else: what only the pod changes.
pub const ROOTS_FD: i32 = 4;

/// The largest FUSE message on the file server's socket, in bytes: 128 KiB of data and room for headers.
///
/// A packet has to fit the default send buffer of a Unix socket (212 992 bytes), since neither end may raise it.
pub const MAX_FUSE_MESSAGE: usize = 128 * 1024 + 4096;

/// Where the file server notes that a directory of a container's changes hides what is below it in the image, in an attribute of
/// the directory: the host's kernel has a name for that (`trusted.overlay.opaque`) which the server may not use.
pub const OPAQUE_NOTE: &std::ffi::CStr = c"user.bulkhead.trusted.overlay.opaque";
