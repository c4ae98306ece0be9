//! Routing netlink (rtnetlink(7)): what of it carries a pod's network from its namespace on the host into the guest.
//!
//! The shim reads links, addresses, routes and neighbours with it and joins two links by traffic control; the agent sets
//! the same up in the guest. Calls block for as long as the kernel needs for one message, [`LIMIT`] at most.

mod address;
mod attributes;
mod link;
mod message;
mod neighbour;
mod route;
mod socket;
#[cfg(feature = "topology")]
mod topology;
mod traffic;

pub use address::Address;
pub use link::{Link, LinkChange};
pub use message::{Answer, Message};
pub use neighbour::Neighbour;
pub use route::Route;
pub use socket::{LIMIT, Socket};
pub use traffic::{Instruction, Verdict};

/// A hardware address.
pub type Mac = [u8; 6];
