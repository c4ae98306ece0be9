//! containerd's Task API, for all containers of one pod.

pub mod changes;
pub mod container;
pub mod create;
pub mod disks;
pub mod kill;
pub mod layers;
pub mod rootfs;
pub mod service;
pub mod shim;
pub mod stats;
pub mod stdio;

#[cfg(test)]
pub(crate) mod tests;
