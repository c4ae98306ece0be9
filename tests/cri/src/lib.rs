//! A client of Kubernetes' Container Runtime Interface (CRI), as far as the tests and the benchmark speak it, and the gRPC that it
//! takes.
//!
//! [`Client`] is for programs with a tokio runtime, [`blocking::Client`] for those without; [`stream`] speaks to the server
//! behind the addresses that `Exec`, `Attach` and `PortForward` give.

pub mod blocking;
mod client;
pub mod grpc;
pub mod stream;

pub use client::Client;

/// The interface's messages, generated from `proto/cri.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "generated code"
)]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
    pub use cri::*;
}
