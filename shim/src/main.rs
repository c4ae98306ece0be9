//! Bulkhead's containerd shim.
fn main() {}
