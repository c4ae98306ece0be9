//! The host's connections for standard streams: each begins with its number, and waits for the process that it is for.

use std::collections::HashMap;
use std::convert::Infallible;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_agent_protocol::forward::{LoopbackPort, QUESTION};
use bulkhead_agent_protocol::names::STREAM as NAMES;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};
use tokio::time::timeout;

use super::{Connection, names, port, question};
use crate::sys::{check, fd};

/// Most connections that wait for their number or their process.
const MAX_WAITING: usize = 512;

/// How long the host may take to send a connection's number.
const NUMBER_LIMIT: Duration = Duration::from_secs(10);

/// How long a connection waits for its process, and a process for its connection.
const CLAIM_LIMIT: Duration = Duration::from_secs(30);

/// A stream that did not come.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum StreamError {
    #[error("stream {number} was not opened within {} seconds", CLAIM_LIMIT.as_secs())]
    Missing { number: u64 },
}

/// What a connection is for that no process claims.
enum Purpose {
    /// A TCP port.
    Port(LoopbackPort),
    /// What the operator wants to know.
    Question,
    /// Names that the host knows.
    Names,
}

/// Connections by their numbers.
#[derive(Debug, Default)]
pub struct Streams {
    arrived: Mutex<HashMap<u64, Arrived>>,
    changed: Notify,
}

#[derive(Debug)]
struct Arrived {
    connection: Connection,
    /// Its other end hears of it when this one is dropped, which is when the connection is claimed.
    _waits: oneshot::Sender<Infallible>,
}

impl Streams {
    /// Accepts connections for ever from a listening socket. Of vsock peers only the host may connect.
    ///
    /// # Errors
    /// Only when the listening socket fails.
    pub async fn accept(self: &Arc<Self>, listener: OwnedFd) -> io::Result<Infallible> {
        let listener = fd::watch(listener)?;
        let waiting = Arc::new(tokio::sync::Semaphore::new(MAX_WAITING));
        loop {
            let Some(fd) = accept_from_host(&listener).await? else { continue };
            let Ok(place) = waiting.clone().try_acquire_owned() else {
                log::warn!("a stream was refused: {MAX_WAITING} are waiting already");
                continue;
            };
            let streams = self.clone();
            tokio::spawn(async move {
                match streams.receive(fd).await {
                    Ok(None) => {}
                    // These wait for nothing any more. How many there are is for the host to say.
                    Ok(Some((connection, Purpose::Port(port)))) => {
                        drop(place);
                        port::serve(connection, port).await;
                    }
                    Ok(Some((connection, Purpose::Question))) => {
                        drop(place);
                        question::serve(connection).await;
                    }
                    Ok(Some((connection, Purpose::Names))) => {
                        drop(place);
                        names::serve(connection).await;
                    }
                    Err(error) => log::warn!("a stream was dropped before it had a number: {error}"),
                }
            });
        }
    }

    /// Keeps a connection until its process claims it; gives it back if it is for something else.
    async fn receive(&self, fd: OwnedFd) -> io::Result<Option<(Connection, Purpose)>> {
        let connection = Connection::new(fd)?;
        let mut number = [0; 8];
        timeout(NUMBER_LIMIT, connection.read_exact(&mut number)).await??;
        let number = u64::from_le_bytes(number);
        if let Some(port) = LoopbackPort::from_number(number) {
            return Ok(Some((connection, Purpose::Port(port))));
        }
        if number == QUESTION {
            return Ok(Some((connection, Purpose::Question)));
        }
        if number == NAMES {
            return Ok(Some((connection, Purpose::Names)));
        }
        let (waits, claimed) = oneshot::channel();
        if self.lock().insert(number, Arrived { connection, _waits: waits }).is_some() {
            log::warn!("stream {number} was opened twice; the first one is closed");
        }
        self.changed.notify_waiters();
        // A stream that no process wants is closed.
        if timeout(CLAIM_LIMIT, claimed).await.is_err() {
            self.lock().remove(&number);
            log::warn!("stream {number} was closed: no process wanted it");
        }
        Ok(None)
    }

    /// The connection with a number, once it is there; `None` for number 0, which means none.
    pub(crate) async fn claim(&self, number: u64) -> Result<Option<Connection>, StreamError> {
        if number == 0 {
            return Ok(None);
        }
        let wait = async {
            loop {
                let changed = self.changed.notified();
                if let Some(Arrived { connection, .. }) = self.lock().remove(&number) {
                    return Some(connection);
                }
                changed.await;
            }
        };
        timeout(CLAIM_LIMIT, wait).await.map_err(|_| StreamError::Missing { number })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arrived>> {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The next connection; `None` if it came from elsewhere, such as from a container by way of the loopback transport.
async fn accept_from_host(listener: &AsyncFd<OwnedFd>) -> io::Result<Option<OwnedFd>> {
    loop {
        let mut guard = listener.readable().await?;
        match guard.try_io(|listener| accept(listener.get_ref())) {
            Ok(Ok((fd, from_host))) => return Ok(from_host.then_some(fd)),
            Ok(Err(error)) if is_peers_fault(&error) => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

fn is_peers_fault(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED | libc::EINTR | libc::ECONNRESET | libc::EMFILE | libc::ENFILE | libc::ENOBUFS
        )
    )
}

fn accept(listener: &OwnedFd) -> io::Result<(OwnedFd, bool)> {
    let mut address = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    let mut length = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    // SAFETY: address and length describe a place that is large enough for every kind of address.
    let fd = check(
        unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                address.as_mut_ptr().cast(),
                &raw mut length,
                libc::SOCK_CLOEXEC,
            )
        }
        .into(),
    )?;
    // SAFETY: the call returned a new descriptor that nothing else owns.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
    // SAFETY: zeros are a valid address, and so is what the kernel wrote.
    let address = unsafe { address.assume_init() };
    let from_host = match i32::from(address.ss_family) {
        libc::AF_VSOCK => {
            // SAFETY: the family says that this is a vsock address, which fits into the storage.
            let vsock = unsafe { *std::ptr::from_ref(&address).cast::<libc::sockaddr_vm>() };
            vsock.svm_cid == libc::VMADDR_CID_HOST
        }
        // Whoever made the listening socket decides who reaches it.
        _ => true,
    };
    Ok((fd, from_host))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::{UnixListener, UnixStream};

    use tempfile::TempPath;

    use super::*;

    async fn streams() -> (Arc<Streams>, TempPath) {
        let socket = tempfile::Builder::new().make(|path| UnixListener::bind(path)).unwrap();
        let (listener, path) = socket.into_parts();
        let streams = Arc::new(Streams::default());
        let accepting = streams.clone();
        tokio::spawn(async move { accepting.accept(listener.into()).await });
        (streams, path)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn streams_are_claimed_by_number_in_any_order() {
        let (streams, path) = streams().await;
        let mut first = UnixStream::connect(&path).unwrap();
        let mut second = UnixStream::connect(&path).unwrap();
        second.write_all(&8u64.to_le_bytes()).unwrap();
        first.write_all(&7u64.to_le_bytes()[..3]).unwrap();
        let claim = streams.claim(7);
        first.write_all(&7u64.to_le_bytes()[3..]).unwrap();
        assert!(claim.await.unwrap().is_some());
        assert!(streams.claim(8).await.unwrap().is_some());
        assert!(streams.claim(0).await.unwrap().is_none());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn only_those_that_wait_are_counted() {
        let (streams, path) = streams().await;
        for number in 1..=2 * MAX_WAITING as u64 {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(&number.to_le_bytes()).unwrap();
            assert!(streams.claim(number).await.unwrap().is_some());
        }
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn neither_side_waits_for_ever() {
        let (streams, path) = streams().await;
        assert!(matches!(streams.claim(9).await, Err(StreamError::Missing { number: 9 })));
        let mut late = UnixStream::connect(&path).unwrap();
        late.write_all(&9u64.to_le_bytes()).unwrap();
        while streams.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(CLAIM_LIMIT * 2).await;
        assert!(streams.lock().is_empty());
    }
}
