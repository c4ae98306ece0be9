//! A network namespace with nothing in it, kept for the whole node.
//!
//! Jailed processes have no use for a network. One of its own for each of them would cost the node 209 KiB of memory and its end
//! some milliseconds, so those that nobody looks for in the pod's network are in this one. What processes of one network
//! namespace share are interfaces, of which there is only a loopback that is down, and the names of abstract sockets, which
//! nobody has who can't make a socket: the filters let none of them.

use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, unshare};

use super::pin::{NamespaceError, Own, Pin, failed};

/// Where the namespace is held.
pub(super) const PIN: Pin = Pin { file: "1.net", kind: CloneFlags::CLONE_NEWNET };

/// The node's empty network namespace, or one for the caller alone.
///
/// # Errors
/// When there is none and none can be made.
pub(crate) fn empty_network() -> Result<OwnedFd, NamespaceError> {
    PIN.get("each process of a pod has an empty network of its own", make)
}

/// Makes one, and leaves the calling thread in it.
pub(super) fn make() -> Result<OwnedFd, NamespaceError> {
    let own = Own::of_thread()?;
    unshare(CloneFlags::CLONE_NEWNET).map_err(failed("unshare"))?;
    own.open("net")
}
