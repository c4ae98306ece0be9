//! The host's end of a connection: a non-blocking stream socket.

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use crate::devices::chain::IoFault;
use crate::devices::{ChainReader, ChainWriter, MemoryFault};

/// A connected stream socket. No call blocks.
#[derive(Debug)]
pub(crate) struct Stream(OwnedFd);

/// How a transfer went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// So many bytes were moved; 0 only if there was nothing to move, or at the end when reading.
    Moved(usize),
    /// Not now.
    WouldBlock,
    /// The other end is gone.
    Gone,
}

impl Stream {
    /// Makes the descriptor non-blocking; call it where `fcntl` is allowed.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: F_GETFL and F_SETFL take integers only, and the descriptor is open.
        let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
        if flags < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: as above.
        if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Stream(fd))
    }

    /// Writes from guest memory.
    pub(crate) fn write_from_guest(
        &self,
        data: &mut ChainReader<'_>,
        limit: usize,
    ) -> Result<Transfer, MemoryFault> {
        outcome(data.write_to(self.as_fd(), limit, None))
    }

    /// Reads into guest memory.
    pub(crate) fn read_to_guest(
        &self,
        room: &mut ChainWriter<'_>,
        limit: usize,
    ) -> Result<Transfer, MemoryFault> {
        outcome(room.read_from(self.as_fd(), limit, None))
    }

    /// Writes bytes.
    pub(crate) fn write(&self, bytes: &[u8]) -> Transfer {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: pointer and length are those of a live slice.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
        usize::try_from(sent).map_or_else(|_| failure(&io::Error::last_os_error()), Transfer::Moved)
    }

    /// Closes one direction: the other end reads the end of the stream after the last byte, or can't write any more.
    pub(crate) fn shut_down(&self, direction: std::net::Shutdown) {
        let how = match direction {
            std::net::Shutdown::Read => libc::SHUT_RD,
            std::net::Shutdown::Write => libc::SHUT_WR,
            std::net::Shutdown::Both => libc::SHUT_RDWR,
        };
        // It fails only if the other end is gone already, which shows by other means.
        // SAFETY: integers only.
        unsafe { libc::shutdown(self.0.as_raw_fd(), how) };
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn outcome(result: Result<usize, IoFault>) -> Result<Transfer, MemoryFault> {
    match result {
        Ok(moved) => Ok(Transfer::Moved(moved)),
        Err(IoFault::Host(error)) => Ok(failure(&error)),
        Err(IoFault::Memory(fault)) => Err(fault),
    }
}

fn failure(error: &io::Error) -> Transfer {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Transfer::WouldBlock,
        _ => Transfer::Gone,
    }
}
