//! Virtio socket device (virtio 1.2, section 5.10), wholly in user space.
//!
//! The guest may open connections only to the ports it was given, each once; everything else gets a `RST`. The host
//! opens connections through a [`VsockConnector`]. Each connection is joined to a stream socket of the host.
//!
//! Towards the guest, bytes go from the stream straight into the guest's buffers, never more than it has room for: what
//! it can't take yet stays in the socket. From the guest, bytes go straight into the socket, and what that can't take
//! waits in a bounded backlog, within the credit the guest was given. So no side can make another wait or grow.

mod connection;
mod connector;
mod device;
mod link;
mod packet;
mod stream;
mod table;
#[cfg(test)]
mod tests;

pub(crate) use connector::VsockConnector;
pub use device::Vsock;
pub(crate) use device::VsockState;
