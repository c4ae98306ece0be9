//! The stream to the agent, as far as it is trusted: its messages are small and don't come fast.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::time::{Instant, Sleep, sleep_until};

/// Length of a ttrpc message header: payload length (4, big endian), stream (4), type (1), flags (1).
const HEADER: usize = 10;

/// The largest payload taken from the agent, in bytes. Its largest honest answers are statistics and process lists.
pub(crate) const MAX_PAYLOAD: u32 = 64 * 1024;

/// Bytes that the agent may send at once.
const BURST: usize = 1 << 20;

/// How long the agent's credit takes to come back once it is used up.
const REFILL: Duration = Duration::from_secs(1);

/// A stream that ends with an error when a message is too large, and is read no faster than [`BURST`] in [`REFILL`].
#[derive(Debug)]
pub(crate) struct GuardedStream {
    stream: UnixStream,
    header: [u8; HEADER],
    header_filled: usize,
    payload_left: usize,
    credit: usize,
    refill: Option<Pin<Box<Sleep>>>,
}

impl GuardedStream {
    /// Guards a connected stream.
    pub(crate) fn new(stream: UnixStream) -> GuardedStream {
        GuardedStream {
            stream,
            header: [0; HEADER],
            header_filled: 0,
            payload_left: 0,
            credit: BURST,
            refill: None,
        }
    }

    /// Follows the message boundaries through `bytes`, of which none reaches past the current header or payload.
    fn follow(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.credit -= bytes.len().min(self.credit);
        if self.payload_left > 0 {
            self.payload_left -= bytes.len();
            return Ok(());
        }
        self.header[self.header_filled..self.header_filled + bytes.len()].copy_from_slice(bytes);
        self.header_filled += bytes.len();
        if self.header_filled == HEADER {
            self.header_filled = 0;
            let [l0, l1, l2, l3, ..] = self.header;
            let length = u32::from_be_bytes([l0, l1, l2, l3]);
            if length > MAX_PAYLOAD {
                return Err(io::Error::other(format!(
                    "the agent sent a message of {length} bytes: {MAX_PAYLOAD} are allowed"
                )));
            }
            self.payload_left = length as usize;
        }
        Ok(())
    }

    fn poll_credit(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if self.credit > 0 {
            return Poll::Ready(());
        }
        let timer = self.refill.get_or_insert_with(|| Box::pin(sleep_until(Instant::now() + REFILL)));
        ready!(timer.as_mut().poll(context));
        self.refill = None;
        self.credit = BURST;
        Poll::Ready(())
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.poll_credit(context));
        let boundary = if this.payload_left > 0 { this.payload_left } else { HEADER - this.header_filled };
        let room = buffer.remaining().min(boundary).min(this.credit);
        let mut limited = ReadBuf::new(buffer.initialize_unfilled_to(room));
        ready!(Pin::new(&mut this.stream).poll_read(context, &mut limited))?;
        let length = limited.filled().len();
        this.follow(limited.filled())?;
        buffer.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn message(length: u32) -> Vec<u8> {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, 1, 2, 0]);
        bytes.extend(std::iter::repeat_n(7, length as usize));
        bytes
    }

    #[tokio::test]
    async fn messages_within_the_limit_pass_unchanged() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let mut guarded = GuardedStream::new(ours);
        let mut all = Vec::new();
        for length in [0, 1, 5000, MAX_PAYLOAD, 3] {
            all.extend(message(length));
        }
        let sent = all.clone();
        tokio::spawn(async move {
            for chunk in sent.chunks(777) {
                agent.write_all(chunk).await.unwrap();
            }
        });
        let mut received = Vec::new();
        guarded.read_to_end(&mut received).await.unwrap();
        assert!(received == all);
    }

    #[tokio::test]
    async fn an_oversized_message_ends_the_stream() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let mut guarded = GuardedStream::new(ours);
        agent.write_all(&message(4)).await.unwrap();
        agent.write_all(&(MAX_PAYLOAD + 1).to_be_bytes()).await.unwrap();
        agent.write_all(&[0; 6]).await.unwrap();
        let mut received = Vec::new();
        let error = guarded.read_to_end(&mut received).await.unwrap_err();
        assert!(error.to_string().contains("65537"), "{error}");
    }

    #[tokio::test]
    async fn a_flood_is_slowed_down() {
        let (ours, mut agent) = UnixStream::pair().unwrap();
        let mut guarded = GuardedStream::new(ours);
        tokio::spawn(async move {
            let bytes = message(60_000);
            while agent.write_all(&bytes).await.is_ok() {}
        });
        let started = Instant::now();
        let mut received = 0;
        let mut buffer = vec![0; 16 * 1024];
        while received <= BURST {
            received += guarded.read(&mut buffer).await.unwrap();
        }
        assert!(started.elapsed() >= REFILL, "{:?}", started.elapsed());
    }
}
