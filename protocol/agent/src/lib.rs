//! The ttrpc API between the shim and the guest agent; `proto/agent.proto` documents it.
#![allow(missing_docs, reason = "the documentation of generated code is in the proto file")]

/// Port on the host side (context id 2) that the agent dials to serve its API.
pub const AGENT_PORT: u32 = 1024;

/// Port in the guest that the host opens stdio streams to.
pub const STDIO_PORT: u32 = 1025;

/// Where the pod's shared tree is mounted in the guest.
pub const SHARED_DIR: &str = "/run/bulkhead/shared";

/// Where file systems on disks are mounted in the guest, each in a directory with the number of its slot.
pub const DISKS_DIR: &str = "/run/bulkhead/disks";

mod agent {
    #![allow(warnings, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    include!(concat!(env!("OUT_DIR"), "/agent.rs"));
}

mod agent_ttrpc {
    #![allow(warnings, clippy::all, clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
}

pub use agent::*;
pub use agent_ttrpc::*;
