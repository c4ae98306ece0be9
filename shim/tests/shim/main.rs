//! Tests of the shim's binary, driven as containerd drives it. They need root, and no guest.

#[cfg(test)]
mod actions;
#[cfg(test)]
mod common;
#[cfg(test)]
mod refusals;
#[cfg(test)]
mod sandbox;
