//! Test harness of the end-to-end suite and the demo.
//!
//! Ways to a container: [`containerd::PrivateContainerd`] with the real `ctr`, and [`shim::ShimServer`], which drives a shim
//! over ttrpc just as containerd does and costs a fraction; pods as Kubernetes has them come from [`cri`]. [`leaks`] compares the node before and after either.

pub mod attack;
mod bundle;
pub mod cases;
pub mod chaos;
pub mod cleanup;
pub mod containerd;
pub mod cri;
mod docker;
mod events;
pub mod facilities;
pub mod failure;
mod freeze;
mod layers;
pub mod layout;
pub mod leaks;
mod loopback;
mod netns;
pub mod node;
pub mod process;
pub mod runner;
mod sandbox;
pub mod segments;
mod shim;
mod stdio;
mod volume;
