//! Each virtio device between a guest and a host of the fuzzer's making.

pub mod blk;
pub mod console;
pub mod fs;
pub mod net;
pub mod vsock;
