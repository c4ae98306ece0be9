//! containerd's Sandbox API (`sandboxer = "shim"`): the pod is there before its containers, and after them.
//!
//! A request to create a sandbox carries the pod's configuration as the kubelet wrote it ([`config`]). It becomes the
//! specification that a pause container would have had ([`spec`]), so that pods come to be in one way through either API
//! ([`crate::task::shim::Shim::launch`]). No pause process runs: the guest is the sandbox. What containerd leaves to the
//! runtime then, the pod's `/etc/hosts` and the like, is made in [`files`] and put into containers' specifications by
//! [`members`]. Containers are created through the Task API of the same shim.

pub mod config;
pub(crate) mod files;
pub(crate) mod members;
pub(crate) mod service;
pub(crate) mod spec;

pub(crate) use members::FIRST_PROCESS;

#[cfg(test)]
mod tests;
