//! containerd's Task API, for all containers of one pod.

pub(crate) mod changes;
pub(crate) mod container;
pub(crate) mod create;
pub(crate) mod disks;
pub(crate) mod kill;
pub(crate) mod layers;
pub(crate) mod rootfs;
pub(crate) mod service;
pub(crate) mod shim;
pub(crate) mod stats;
pub(crate) mod stdio;
pub(crate) mod streams;

#[cfg(test)]
pub(crate) mod tests;
