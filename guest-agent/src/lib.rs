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

/// An error and its causes in one line.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
