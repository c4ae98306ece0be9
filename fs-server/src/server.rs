//! The loop of a worker: one packet in, one packet out.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixDatagram;

use bulkhead_vmm_protocol::fuse::{IN_HEADER, is_silent, opcode};
use bulkhead_vmm_protocol::loan::Loan;
use bulkhead_vmm_protocol::{MAX_FUSE_MESSAGE, MessageBuffer};
use fuse_backend_rs::api::server;
use fuse_backend_rs::transport::{self, FuseBuf, FuseDevWriter, Reader};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::tree::{CopyRange, SharedTree};
use crate::{init, reply};
use bulkhead_fs::message::{Header, Verdict, check, u64_at};

/// A server for a tree and a socket; any number of workers may share it.
pub(crate) struct Server {
    /// Connected, of packets that keep their bounds. The standard library's datagram type does for that.
    socket: UnixDatagram,
    tree: std::sync::Arc<SharedTree>,
    library: server::Server<std::sync::Arc<SharedTree>>,
}

/// Why a worker can't go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// The socket fails, other than by being closed.
    #[error("can't receive FUSE requests")]
    Receive(#[source] io::Error),
    /// Replies can't be sent, other than because the socket is closed.
    #[error("can't send FUSE replies")]
    Send(#[source] io::Error),
    /// The library does not take our buffers.
    #[error("can't use the FUSE library's buffers")]
    Buffers(#[source] transport::Error),
}

impl Server {
    /// Serves the tree on the socket.
    pub(crate) fn new(socket: UnixDatagram, tree: SharedTree) -> Self {
        let tree = std::sync::Arc::new(tree);
        Server { socket, library: server::Server::new(tree.clone()), tree }
    }

    /// The tree it serves.
    pub(crate) fn tree(&self) -> &SharedTree {
        &self.tree
    }

    /// Serves requests until the other end closes the socket.
    pub(crate) fn run(&self) -> Result<(), ServerError> {
        let (mut request, mut reply) = (MessageBuffer::default(), MessageBuffer::default());
        loop {
            let length = match self.receive(&mut request, &mut reply) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(ServerError::Receive(error)),
            };
            request.note(length);
            if length <= MAX_FUSE_MESSAGE && !self.serve(&mut request.room()[..length], &mut reply)? {
                return Ok(());
            }
        }
    }

    /// Waits for the next packet. Memory that large messages took goes back before a wait.
    fn receive(&self, request: &mut MessageBuffer, reply: &mut MessageBuffer) -> io::Result<usize> {
        if request.is_large() || reply.is_large() {
            match rustix::net::recv(&self.socket, request.room(), RecvFlags::DONTWAIT) {
                Err(Errno::AGAIN) => {}
                other => return other.map(|(_, length)| length).map_err(io::Error::from),
            }
            request.give_back();
            reply.give_back();
        }
        self.socket.recv(request.room())
    }

    /// Serves one request. `false` means that the other end is gone.
    fn serve(&self, request: &mut [u8], reply: &mut MessageBuffer) -> Result<bool, ServerError> {
        match check(request) {
            Verdict::Drop => Ok(true),
            Verdict::Refuse { unique, errno } => self.send(&reply::error(unique, errno)),
            Verdict::Serve(header) => match header.opcode {
                opcode::INIT => {
                    // A session begins: the guest's kernel mounts, after a reset of the device for instance. What it
                    // knew before it has forgotten without telling.
                    self.tree.clear();
                    self.send(&init::answer(self.tree.session(), request, header.unique))
                }
                opcode::READ | opcode::WRITE => {
                    self.lend(header.node, u64_at(request, IN_HEADER).unwrap_or(0));
                    self.serve_by_library(header, request, reply)
                }
                opcode::COPY_FILE_RANGE => self.send(&self.copy_range(request, header)),
                opcode::TMPFILE => {
                    // The library does not know it: `create` does, by what stands for the name.
                    request[4..8].copy_from_slice(&opcode::CREATE.to_le_bytes());
                    self.serve_by_library(header, request, reply)
                }
                _ => self.serve_by_library(header, request, reply),
            },
        }
    }

    /// Lends the VMM the file that is about to be read or written, if it should be. A loan that fails costs nothing but time: the
    /// VMM goes on asking.
    fn lend(&self, node: u64, handle: u64) {
        if let Some(open) = self.tree.to_lend(node, handle) {
            let _ = Loan { node, handle }.send(&self.socket, open.file.as_fd());
        }
    }

    fn serve_by_library(
        &self,
        header: Header,
        request: &mut [u8],
        reply: &mut MessageBuffer,
    ) -> Result<bool, ServerError> {
        let reader = Reader::<()>::from_fuse_buffer(FuseBuf::new(request)).map_err(ServerError::Buffers)?;
        let writer = FuseDevWriter::<()>::new(self.socket.as_raw_fd(), &mut reply.room()[..MAX_FUSE_MESSAGE])
            .map_err(ServerError::Buffers)?;
        match self.library.handle_message(reader, writer.into(), None, None) {
            Ok(length) => {
                reply.note(length);
                Ok(true)
            }
            Err(_) if is_silent(header.opcode) => Ok(true),
            // A checked request is not refused by the library's decoding, so it is the reply that could not be sent:
            // the other end is gone, which this finds out; or else the guest's process must not wait for ever.
            Err(_) => self.send(&reply::error(header.unique, libc::EIO)),
        }
    }

    fn copy_range(&self, request: &[u8], header: Header) -> Vec<u8> {
        let field = |index: usize| u64_at(request, IN_HEADER + 8 * index).unwrap_or(0);
        let range = CopyRange {
            from: (header.node, field(0), field(1)),
            to: (field(2), field(3), field(4)),
            length: field(5),
            uid: header.uid,
        };
        match self.tree.copy_range(&range) {
            // struct fuse_write_out
            Ok(copied) => reply::data(header.unique, &(copied as u64).to_le_bytes()),
            Err(errno) => reply::error(header.unique, errno.raw_os_error()),
        }
    }

    fn send(&self, message: &[u8]) -> Result<bool, ServerError> {
        loop {
            match self.socket.send(message) {
                Ok(_) => return Ok(true),
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted => continue,
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => return Ok(false),
                    _ => return Err(ServerError::Send(error)),
                },
            }
        }
    }
}
