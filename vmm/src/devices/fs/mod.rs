//! Virtio file system device (virtio 1.2, section 5.11).
//!
//! It carries FUSE messages between the guest and the file server, a process of its own, over a packet socket: one
//! packet is one request or its reply. The VMM looks only at the headers. It trusts neither side: the guest's lengths
//! must agree with its buffers, and a reply must be awaited and fit.
//!
//! The `unique` number of a request is replaced on the way by one of the device's own, and put back into the reply. So
//! the guest can't confuse anybody by using a number twice, nor does a reply to a request from before a reset of the
//! device find its way into memory that is used for something else now.
//!
//! What only the pod changes the server lends, once a file is read or written a second time ([`loans`]): from then on no message
//! is needed, and data is copied once instead of four times. The server decides what is lent, and the guest can reach in it what it
//! could reach by asking.

mod device;
mod loans;
mod message;
mod server;
#[cfg(test)]
mod tests;

pub use device::FileSystem;
