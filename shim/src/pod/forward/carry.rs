//! One connection, between the client on the host and the port in the guest.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bulkhead_agent_protocol::forward::{CONNECTED, LoopbackPort};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use super::super::{Pod, PodError};
use super::knock::Knock;
use super::visitors::Arrived;

/// Bytes copied at a time, in each direction.
pub(super) const BUFFER: usize = 16 * 1024;

/// How long the guest may take to say whether somebody listens: longer than the agent tries.
const CONNECT_LIMIT: Duration = Duration::from_secs(25);

/// How long a server may be silent after its client has said all.
const SERVER_LIMIT: Duration = Duration::from_secs(300);

/// How long a client may be silent after its server has said all: as a rule nobody listens to it any more.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);

/// Why a connection did not come about, or ended early.
#[derive(Debug, thiserror::Error)]
pub(super) enum CarryError {
    #[error("it is between {0} and {1}, which are not both loopback addresses")]
    Stranger(SocketAddr, SocketAddr),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("nobody in the pod listens there")]
    Refused,
    #[error("the guest did not connect within {} s", CONNECT_LIMIT.as_secs())]
    TimedOut,
    #[error("the client's socket failed")]
    Client(#[source] io::Error),
    #[error("the client did not wait for it")]
    Left,
    #[error("it was cut off")]
    Copy(#[source] io::Error),
}

/// Has the guest connect to what a client wants.
pub(super) async fn reach(pod: &Pod, knock: &Knock) -> Result<UnixStream, CarryError> {
    let stranger = || CarryError::Stranger(knock.client, knock.wanted);
    let port =
        LoopbackPort::new(knock.wanted).filter(|_| knock.client.ip().is_loopback()).ok_or_else(stranger)?;
    let mut guest = pod.open_port(port).await?;
    match timeout(CONNECT_LIMIT, guest.read_u8()).await {
        Ok(Ok(CONNECTED)) => Ok(guest),
        Ok(_) => Err(CarryError::Refused),
        Err(_) => Err(CarryError::TimedOut),
    }
}

/// Carries a connection to its end. A client whose connection fails sees it reset, never just ended.
pub(super) async fn carry(mut visitor: Arrived, mut guest: UnixStream) -> Result<(), CarryError> {
    // What comes in pieces has been waited for already.
    visitor.client.set_nodelay(true).map_err(CarryError::Client)?;
    let carried = copy_both_ways(&mut visitor.client, &mut guest).await;
    if carried.is_err() {
        // If even that fails it just ends.
        let _ = visitor.client.set_zero_linger();
    }
    carried.map_err(CarryError::Copy)
}

/// Each direction to its own end.
async fn copy_both_ways(client: &mut TcpStream, guest: &mut UnixStream) -> io::Result<()> {
    let (from_client, to_client) = client.split();
    let (from_guest, to_guest) = guest.split();
    let copied = AtomicU64::new(0);
    let there = copy_to_end(from_client, to_guest, &copied);
    let back = copy_to_end(from_guest, to_client, &copied);
    tokio::pin!(there, back);
    tokio::select! {
        ended = &mut there => {
            ended?;
            while_any(&copied, SERVER_LIMIT, back).await
        }
        ended = &mut back => {
            ended?;
            while_any(&copied, CLIENT_LIMIT, there).await
        }
    }
}

async fn copy_to_end(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    copied: &AtomicU64,
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer).await? {
            0 => return to.shutdown().await,
            length => {
                to.write_all(buffer.get(..length).unwrap_or_default()).await?;
                copied.fetch_add(1, Relaxed);
            }
        }
    }
}

/// Gives a copy up when there has been nothing to copy for long.
async fn while_any(
    copied: &AtomicU64,
    limit: Duration,
    copy: impl Future<Output = io::Result<()>>,
) -> io::Result<()> {
    tokio::pin!(copy);
    loop {
        let before = copied.load(Relaxed);
        match timeout(limit, &mut copy).await {
            Ok(ended) => return ended,
            Err(_) if copied.load(Relaxed) == before => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}
