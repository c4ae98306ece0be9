//! PID 1 of the guest: runs OCI containers.
fn main() {}
