//! The socket to the file server.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use bulkhead_vmm_protocol::loan::{self, Loan};
use bulkhead_vmm_protocol::{MAX_FUSE_MESSAGE, MessageBuffer};

use crate::devices::chain::IoFault;
use crate::devices::{ChainReader, MemoryFault};

/// The VMM's end. No call blocks.
#[derive(Debug)]
pub(crate) struct Server {
    socket: OwnedFd,
    reply: MessageBuffer,
}

/// How sending went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
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
#[derive(Debug)]
pub(crate) enum Received<'a> {
    /// A packet.
    Packet(&'a [u8]),
    /// A file to use instead of asking.
    Lent(Loan, File),
    /// A packet that is too long for any reply.
    TooLong,
    /// Nothing now.
    WouldBlock,
    /// The server is gone.
    Gone,
}

impl Server {
    /// Takes the socket.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Server { socket, reply: MessageBuffer::default() }
    }

    /// Sends a request: its header and what is left of the guest's buffers.
    pub(crate) fn send(&self, header: &[u8], body: &mut ChainReader<'_>) -> Result<Sent, MemoryFault> {
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
    pub(crate) fn receive(&mut self) -> Received<'_> {
        match loan::receive(&self.socket, self.reply.room()) {
            Ok((0, _)) => Received::Gone,
            Ok((length, _)) if length > MAX_FUSE_MESSAGE => Received::TooLong,
            Ok((length, file)) => {
                self.reply.note(length);
                let packet = &self.reply.room()[..length];
                match file.zip(Loan::parse(packet)) {
                    Some((file, loan)) => Received::Lent(loan, file.into()),
                    None => Received::Packet(packet),
                }
            }
            Err(errno) => match io::Error::from(errno).kind() {
                ErrorKind::WouldBlock | ErrorKind::Interrupted => Received::WouldBlock,
                _ => Received::Gone,
            },
        }
    }

    /// Gives memory of large packets back: none is to come soon.
    pub(crate) fn rest(&mut self) {
        self.reply.give_back();
    }
}

impl AsFd for Server {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
