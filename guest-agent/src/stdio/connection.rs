//! A descriptor for reading and writing without blocking: a connection, a pipe or a terminal.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use tokio::io::unix::AsyncFd;

use crate::sys::{check, fd};

/// A stream of bytes in the runtime's care.
#[derive(Debug)]
pub(crate) struct Connection(AsyncFd<OwnedFd>);

impl Connection {
    /// Takes a descriptor over. Has to be called inside the runtime.
    pub(crate) fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self(fd::watch(fd)?))
    }

    /// Waits until there is something to read, or the end.
    pub(crate) async fn readable(&self) -> io::Result<()> {
        self.0.readable().await.map(|mut guard| guard.retain_ready())
    }

    /// Reads what is there: 0 bytes at the end.
    ///
    /// # Errors
    /// `WouldBlock` when there is nothing, after which [`readable`](Self::readable) waits again.
    pub(crate) fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.try_io(tokio::io::Interest::READABLE, |fd| {
            // SAFETY: the buffer is writable for its whole length.
            let length =
                check(unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) } as _)?;
            Ok(usize::try_from(length).unwrap_or_default())
        })
    }

    /// Reads exactly as much as fits into the buffer.
    pub(crate) async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            self.readable().await?;
            match self.try_read(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => buffer = buffer.get_mut(length..).unwrap_or_default(),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes everything, waiting as often as it takes.
    pub(crate) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.0.async_io(tokio::io::Interest::WRITABLE, |fd| {
                // SAFETY: the bytes are readable for their whole length. SIGPIPE is ignored by the agent.
                let length =
                    check(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as _)?;
                Ok(usize::try_from(length).unwrap_or_default())
            });
            match written.await {
                Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
                Err(error) if is_passing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells the other side of a socket that nothing more will be written.
    pub(crate) fn shut_down_writing(&self) {
        // SAFETY: takes numbers only. A connection that is gone already needs no telling.
        unsafe { libc::shutdown(self.0.as_raw_fd(), libc::SHUT_WR) };
    }

    /// Waits until the other side of a pipe or socket is gone.
    pub(crate) async fn closed(&self) {
        // A descriptor that fails is as good as closed.
        let _ = self.0.ready(tokio::io::Interest::ERROR).await;
    }

    /// Waits until the other side of a socket, which sends nothing, closes it.
    pub(crate) async fn hung_up(&self) {
        let mut unexpected = [0; 64];
        while self.readable().await.is_ok() {
            match self.try_read(&mut unexpected) {
                Ok(0) => return,
                Err(error) if !is_passing(&error) => return,
                _ => {}
            }
        }
    }

    /// The descriptor.
    pub(crate) fn fd(&self) -> &OwnedFd {
        self.0.get_ref()
    }
}

/// Whether an error means no more than "again".
pub(crate) fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
