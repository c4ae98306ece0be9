//! Bulkhead's containerd shim: one process per pod, between containerd and the pod's virtual machine.
//!
//! containerd runs the binary with an action ([`cli`]). `start` leaves a server behind, which speaks containerd's Task
//! API (`task`) for every container of a pod and its Sandbox API ([`sandbox`]) for the pod itself, and owns the pod ([`pod`]): its VMM, its file server, the mounts that
//! make up its shared tree, its cgroup. Templates, saved machines that pods start from, are kept in [`template`] and made by
//! [`builder`]. OCI specifications are translated for the guest in [`spec`]; what the shim
//! asks of the host's kernel is in [`host`].

pub mod builder;
pub mod cli;
pub mod config;
mod error;
mod events;
mod hooks;
pub mod host;
pub mod id;
mod limit;
mod logging;
mod net;
pub mod operator;
pub mod options;
pub mod pod;
pub mod quantity;
pub mod sandbox;
pub mod sizing;
pub mod spec;
mod task;
pub mod template;
