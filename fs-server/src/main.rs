//! The jailed file server behind virtio-fs.
fn main() {}
