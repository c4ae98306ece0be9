//! The guest agent: process 1 of the microVM, which runs OCI containers for the shim.
//!
//! - [`guest`]: what makes the agent process 1: early mounts, the connection to the host, powering off.
//! - [`server`] and [`service`]: the API, over one connection.
//! - [`pod`]: containers and processes, and their states.
//! - [`container`]: how a container is made, one module a part of the OCI specification.
//! - [`stdio`]: standard streams. [`reaper`]: ends of processes. [`sys`]: system calls.
//!
//! The agent runs on one thread, so that it can clone itself at any time.

pub mod container;
pub mod guest;
pub mod logging;
pub mod pod;
pub mod reaper;
pub mod server;
pub mod service;
pub mod stdio;
pub mod sys;
