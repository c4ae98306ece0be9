//! Between a client's end of a stream and the guest.
//!
//! A client that has gone is no end: containerd comes back after a restart, and the process has waited for it. Only what was on
//! its way then is lost.

use std::pin::pin;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::Claim;
use super::connection::{Connection, Received};

/// Bytes of input that a client may be ahead.
const WINDOW: usize = 64 * 1024;

/// How long what was written before the request to close an input may still take: it comes another way.
const LAST_INPUT: Duration = Duration::from_secs(1);

/// A process's output.
#[derive(Debug)]
pub(crate) struct Output {
    claim: Claim,
    connection: Option<Connection>,
}

impl Output {
    /// On the stream of this name.
    pub(crate) fn new(claim: Claim) -> Output {
        Output { claim, connection: None }
    }

    /// Writes some of the bytes and says how many; waits for a client that takes any.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> usize {
        loop {
            let Some(connection) = &mut self.connection else {
                self.connection = Some(self.claim.next().await);
                continue;
            };
            self.connection = tokio::select! {
                biased;
                other = self.claim.next() => Some(other),
                sent = connection.send(bytes) => match sent {
                    Ok(length) => return length,
                    Err(_) => None,
                },
            };
        }
    }

    /// Ends it; a client that has not come so far has some time left to hear of it.
    pub(crate) async fn close(mut self, limit: Duration) {
        if self.connection.is_none() {
            self.connection = timeout(limit, self.claim.next()).await.ok();
        }
        if self.connection.is_none() {
            log::warn!("nobody came to read a process's output in {} s: it is dropped", limit.as_secs());
        }
    }
}

/// Copies a process's input until its client ends it, or `closing` is dropped.
pub(crate) async fn copy_input(claim: Claim, mut guest: UnixStream, closing: oneshot::Receiver<()>) {
    let closed = async {
        let _ = closing.await;
        sleep(LAST_INPUT).await;
    };
    tokio::select! {
        () = pin!(closed) => {}
        is_ended = feed(&claim, &mut guest) => if !is_ended {
            // The process does not read any more.
            return;
        }
    }
    let _ = guest.shutdown().await;
    // The end is on its way to the guest; closing the stream now could overtake it.
    std::future::pending::<()>().await;
}

/// Answers whether the input has ended; else nobody takes any more.
async fn feed(claim: &Claim, guest: &mut UnixStream) -> bool {
    let mut connection = claim.next().await;
    let mut allowed = 0;
    loop {
        if allowed <= WINDOW / 2 {
            // Who has gone without a word comes back.
            if connection.allow(WINDOW - allowed).await.is_err() {
                (connection, allowed) = (claim.next().await, 0);
                continue;
            }
            allowed = WINDOW;
        }
        let received = tokio::select! {
            biased;
            other = claim.next() => {
                (connection, allowed) = (other, 0);
                continue;
            }
            received = connection.receive() => received,
        };
        match received {
            Ok(Received::Data(bytes)) => {
                if guest.write_all(&bytes).await.is_err() {
                    return false;
                }
                allowed = allowed.saturating_sub(bytes.len());
            }
            Ok(Received::Window(_)) => {}
            Ok(Received::End) => return true,
            Err(_) => (connection, allowed) = (claim.next().await, 0),
        }
    }
}
