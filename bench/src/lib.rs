//! The isolation-overhead benchmark: the same pods, steps and workloads under runc, crun, gVisor's runsc and Bulkhead,
//! interleaved on one node, through containerd's own API.
//!
//! `docs/benchmark.md` says what each row measures and how.

pub mod arguments;
pub mod compare;
pub mod containerd;
mod cri;
pub mod node;
pub mod pod;
pub mod report;
pub mod rows;
pub mod runtime;
mod stats;
mod timeline;
pub mod workload;

/// containerd's messages, generated from `proto/containerd.proto`.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::pedantic,
    clippy::unwrap_used,
    reason = "generated code"
)]
mod proto {
    include!(concat!(env!("OUT_DIR"), "/proto/mod.rs"));
    pub(crate) use containerd::*;
}
