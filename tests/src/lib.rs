//! Test harness of the end-to-end suite and the demo.
//!
//! Ways to a container: [`containerd::PrivateContainerd`] with the real `ctr`, and [`shim::ShimServer`], which drives a shim
//! over ttrpc just as containerd does and costs a fraction; pods as Kubernetes has them come from [`cri`]. [`leaks`] compares the node before and after either.

pub mod attack;
pub mod bundle;
pub mod cases;
pub mod chaos;
pub mod cleanup;
pub mod containerd;
pub mod cri;
pub mod docker;
pub mod events;
pub mod facilities;
pub mod failure;
pub mod freeze;
pub mod layers;
pub mod layout;
pub mod leaks;
pub mod loopback;
pub mod netns;
pub mod node;
pub mod process;
pub mod runner;
pub mod sandbox;
pub mod segments;
pub mod shim;
pub mod stdio;
pub mod volume;
