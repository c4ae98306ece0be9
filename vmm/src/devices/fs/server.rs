//! The socket to the file server.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use bulkhead_vmm_protocol::MAX_FUSE_MESSAGE;

use crate::devices::chain::IoFault;
use crate::devices::{ChainReader, MemoryFault};

/// The VMM's end. No call blocks.
#[derive(Debug)]
pub struct Server {
    socket: OwnedFd,
    /// Room for the longest packet and one byte, by which a longer one is told.
    reply: Vec<u8>,
}

/// How sending went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// The packet is on its way.
    Yes,
    /// The server has to catch up first.
    WouldBlock,
    /// The kernel can't send such a packet.
    Refused,
    /// The server is gone.
    Gone,
}

/// What came from the server.
#[derive(Debug, PartialEq, Eq)]
pub enum Received<'a> {
    /// A packet.
    Packet(&'a [u8]),
    /// A packet that is too long for any reply.
    TooLong,
    /// Nothing now.
    WouldBlock,
    /// The server is gone.
    Gone,
}

impl Server {
    /// Takes the socket.
    pub fn new(socket: OwnedFd) -> Self {
        Server { socket, reply: vec![0; MAX_FUSE_MESSAGE + 1] }
    }

    /// Sends a request: its header and what is left of the guest's buffers.
    pub fn send(&self, header: &[u8], body: &mut ChainReader<'_>) -> Result<Sent, MemoryFault> {
        match body.send_packet(self.socket.as_fd(), header) {
            Ok(()) => Ok(Sent::Yes),
            Err(IoFault::Memory(fault)) => Err(fault),
            Err(IoFault::Host(error)) => Ok(match error.kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Sent::WouldBlock,
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::NotConnected => Sent::Gone,
                _ => Sent::Refused,
            }),
        }
    }

    /// Takes the next packet, if there is one.
    pub fn receive(&mut self) -> Received<'_> {
        let (buffer, size) = (self.reply.as_mut_ptr().cast(), self.reply.len());
        // SAFETY: pointer and length are those of a live, exclusive buffer.
        let length = unsafe { libc::recv(self.socket.as_raw_fd(), buffer, size, libc::MSG_DONTWAIT) };
        match usize::try_from(length) {
            Ok(0) => Received::Gone,
            Ok(length) if length > MAX_FUSE_MESSAGE => Received::TooLong,
            Ok(length) => Received::Packet(&self.reply[..length]),
            Err(_) => match io::Error::last_os_error().kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Received::WouldBlock,
                _ => Received::Gone,
            },
        }
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
