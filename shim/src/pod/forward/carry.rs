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
    #[error("it came from {0}, which is no loopback address")]
    Stranger(SocketAddr),
    #[error("its socket failed")]
    Client(#[source] io::Error),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("nobody in the pod listens on port {0}")]
    Refused(u16),
    #[error("the guest did not connect it to port {port} within {} s", CONNECT_LIMIT.as_secs())]
    TimedOut { port: u16 },
    #[error("it was cut off")]
    Copy(#[source] io::Error),
}

/// Carries a connection to its end. A client whose connection fails sees it reset, never just ended.
pub(super) async fn carry(pod: &Pod, mut client: TcpStream, peer: SocketAddr) -> Result<(), CarryError> {
    let carried = try_carry(pod, &mut client, peer).await;
    if carried.is_err() {
        // If even that fails it just ends.
        let _ = client.set_zero_linger();
    }
    carried
}

async fn try_carry(pod: &Pod, client: &mut TcpStream, peer: SocketAddr) -> Result<(), CarryError> {
    if !peer.ip().is_loopback() {
        return Err(CarryError::Stranger(peer));
    }
    let wanted = client.local_addr().map_err(CarryError::Client)?;
    // What comes in pieces has been waited for already.
    client.set_nodelay(true).map_err(CarryError::Client)?;
    let port = LoopbackPort { port: wanted.port(), ipv6_first: wanted.is_ipv6() };
    let mut guest = pod.open_port(port).await?;
    let refused = || CarryError::Refused(wanted.port());
    match timeout(CONNECT_LIMIT, guest.read_u8()).await {
        Ok(Ok(CONNECTED)) => {}
        Ok(_) => return Err(refused()),
        Err(_) => return Err(CarryError::TimedOut { port: wanted.port() }),
    }
    copy_both_ways(client, &mut guest).await.map_err(CarryError::Copy)
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
