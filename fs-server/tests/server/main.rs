//! The file server, driven through its socket by hand-made FUSE messages. Needs root: it mounts and jails.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "these are tests")]

mod client;
mod files;
mod hostile;
mod mounts;
mod views;
