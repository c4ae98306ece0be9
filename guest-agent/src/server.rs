//! Serves the API on one connection that exists already.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bulkhead_agent_protocol::{Agent, create_agent};
use futures_core::Stream;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;
use ttrpc::asynchronous::Server;
use ttrpc::asynchronous::transport::Listener;

use crate::sys::{check, fd};

/// Serves the API until the other side is gone.
///
/// # Errors
/// When serving can't begin.
pub async fn serve(connection: OwnedFd, service: Arc<dyn Agent + Send + Sync>) -> ttrpc::Result<()> {
    let (closed, is_closed) = oneshot::channel();
    let connection = fd::watch(connection).map_err(|error| ttrpc::Error::Others(error.to_string()))?;
    let connection = ControlStream { connection, closed: Some(closed) };
    let mut server = Server::new()
        .add_listener(Listener::new(Once(Some(connection))))
        .register_service(create_agent(service));
    server.start().await?;
    // An error means that the stream was dropped, which is an end too.
    let _ = is_closed.await;
    Ok(())
}

/// The one connection, and then no other.
struct Once(Option<ControlStream>);

impl Stream for Once {
    type Item = io::Result<ControlStream>;

    fn poll_next(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        // The end of the list would end the server.
        self.0.take().map_or(Poll::Pending, |stream| Poll::Ready(Some(Ok(stream))))
    }
}

/// A connection that tells when its other side is gone.
struct ControlStream {
    connection: AsyncFd<OwnedFd>,
    closed: Option<oneshot::Sender<()>>,
}

impl ControlStream {
    fn end(&mut self) {
        if let Some(closed) = self.closed.take() {
            // No one waits for it any more when the agent is ending anyway.
            let _ = closed.send(());
        }
    }
}

impl AsyncRead for ControlStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.connection.poll_read_ready(context))?;
            let result =
                guard.try_io(|fd| {
                    let unfilled = buffer.initialize_unfilled();
                    // SAFETY: the buffer is writable for its whole length.
                    check(unsafe { libc::read(fd.as_raw_fd(), unfilled.as_mut_ptr().cast(), unfilled.len()) }
                        as _)
                });
            match result {
                Ok(Ok(length)) => {
                    if length == 0 {
                        self.end();
                    }
                    buffer.advance(usize::try_from(length).unwrap_or_default());
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => {
                    self.end();
                    return Poll::Ready(Err(error));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for ControlStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.connection.poll_write_ready(context))?;
            let result = guard.try_io(|fd| {
                // SAFETY: the bytes are readable for their whole length. SIGPIPE is ignored by the agent.
                check(unsafe { libc::write(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len()) } as _)
            });
            match result {
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => {
                    return Poll::Ready(result.map(|length| usize::try_from(length).unwrap_or_default()));
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // SAFETY: takes numbers only. A connection that is gone already needs no shutting down.
        unsafe { libc::shutdown(self.connection.as_raw_fd(), libc::SHUT_WR) };
        Poll::Ready(Ok(()))
    }
}
