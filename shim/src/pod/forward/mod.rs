//! Connections to loopback addresses in the pod's network namespace on the host are carried to the same port in the guest.
//!
//! `kubectl port-forward` is one: containerd dials `localhost:PORT` in that namespace, where nothing of the pod listens,
//! because its servers are in the guest. Two sockets of ours take every such connection ([`lookup`]). A client whose connection
//! begins waits ([`knock`]) while the agent dials the port where the server is: if that succeeds the client is let in, and the
//! connection is carried as a stream to the agent ([`carry`]), else it is refused, as if nobody had listened.
//!
//! Set up in the background once the pod runs; nothing of it outlives the shim, whose descriptors are all that holds it.

mod carry;
mod knock;
mod lookup;
mod visitors;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use self::carry::CarryError;
use self::knock::{Knock, Porter};
use self::lookup::{LookupError, Redirection, Targets};
use self::visitors::{Expected, Visitors};
use super::Pod;
use super::timeline::now_us;
use crate::error::chain;
use crate::host::netns::{NamespaceError, NetworkNamespace};

/// The pod's first container is to run before this takes the processor.
const DELAY: Duration = Duration::from_millis(100);

/// Connections of a pod at a time; others wait. Each takes two buffers of [`carry::BUFFER`] bytes and one of the 128 vsock
/// connections of the guest.
const MAX_CONNECTIONS: usize = 64;

/// How long a client that is let in may take to come in.
const ENTER_LIMIT: Duration = Duration::from_secs(5);

/// How long hearing and accepting rest after they have failed.
const PAUSE: Duration = Duration::from_millis(100);

/// Why ports can't be forwarded.
#[derive(Debug, thiserror::Error)]
enum ForwardError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("can't listen on {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("can't hear of connections to loopback addresses of {family}")]
    Hear {
        family: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("can't watch a socket")]
    Watch(#[source] io::Error),
    #[error("can't take connections to every port")]
    Lookup(#[from] LookupError),
}

/// Begins forwarding soon, for as long as the pod lives, if the pod has a network namespace on the host. That the host can't
/// is said once.
pub(crate) fn start(pod: &Arc<Pod>) {
    if let Some(namespace) = pod.network_namespace() {
        start_in(pod.clone(), namespace.to_owned());
    }
}

fn start_in(pod: Arc<Pod>, namespace: PathBuf) {
    tokio::spawn(async move {
        tokio::select! {
            _ = pod.died() => {}
            () = run(&pod, &namespace) => {}
        }
    });
}

async fn run(pod: &Arc<Pod>, namespace: &Path) {
    tokio::time::sleep(DELAY).await;
    let began = now_us();
    match Entrance::open(namespace).await {
        Ok(entrance) => {
            log::debug!("ports are forwarded, set up in {} us", now_us().saturating_sub(began));
            entrance.serve(pod).await;
        }
        Err(error) => log::warn!("ports of the pod are not forwarded: {}", chain(&error)),
    }
}

/// Where clients of the pod's loopback addresses come in.
#[derive(Debug)]
struct Entrance {
    ipv4: Door,
    /// Where the host has IPv6.
    ipv6: Option<Door>,
    _redirection: Redirection,
}

/// One family's part of it.
#[derive(Debug)]
struct Door {
    porter: Arc<Porter>,
    listener: TcpListener,
}

impl Entrance {
    async fn open(namespace: &Path) -> Result<Entrance, ForwardError> {
        let namespace = NetworkNamespace::open(namespace)?;
        let (ipv4, ipv6) = namespace
            .within(|| (sockets(Ipv4Addr::LOCALHOST.into()), sockets(Ipv6Addr::LOCALHOST.into())))
            .await?;
        let (ipv4, ipv6) = (ipv4?, ipv6.ok());
        let targets =
            Targets { ipv4: ipv4.listener.as_fd(), ipv6: ipv6.as_ref().map(|ipv6| ipv6.listener.as_fd()) };
        let redirection = Redirection::attach(namespace.file().as_fd(), targets)?;
        Ok(Entrance {
            ipv4: ipv4.watch(false).map_err(ForwardError::Watch)?,
            ipv6: ipv6.map(|ipv6| ipv6.watch(true)).transpose().map_err(ForwardError::Watch)?,
            _redirection: redirection,
        })
    }

    /// Takes connections for ever.
    async fn serve(&self, pod: &Arc<Pod>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let visitors = Visitors::default();
        let ipv6 = async {
            if let Some(door) = &self.ipv6 {
                tokio::join!(door.hear(pod, &places, &visitors), door.accept(&visitors));
            }
        };
        tokio::join!(self.ipv4.hear(pod, &places, &visitors), self.ipv4.accept(&visitors), ipv6);
    }
}

impl Door {
    /// Answers everybody who knocks.
    async fn hear(&self, pod: &Arc<Pod>, places: &Arc<Semaphore>, visitors: &Visitors) {
        loop {
            let knock = match self.porter.hear().await {
                Ok(knock) => knock,
                Err(error) => {
                    log::debug!("a client of the pod was not heard: {error}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            // Who waits already has knocked again, and so will those who are too many.
            let Some(expected) = visitors.expect(knock.client, knock.wanted) else { continue };
            let (pod, porter, places) = (pod.clone(), self.porter.clone(), places.clone());
            tokio::spawn(async move {
                let seen_to = async {
                    // They are never closed.
                    let Ok(_place) = places.acquire().await else { return };
                    if let Err(error) = attend(&pod, &porter, &knock, expected).await {
                        log::debug!("a connection to {} of the pod: {}", knock.wanted, chain(&error));
                    }
                };
                tokio::select! {
                    _ = pod.died() => {}
                    () = seen_to => {}
                }
            });
        }
    }

    /// Hands those who come in to whoever expects them.
    async fn accept(&self, visitors: &Visitors) {
        loop {
            match self.listener.accept().await {
                Ok((client, peer)) => visitors.arrive(client, peer),
                Err(error) => {
                    log::debug!("a connection to the pod was not accepted: {error}");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

/// Sees to a client, to the end of its connection.
async fn attend(pod: &Pod, porter: &Porter, knock: &Knock, expected: Expected) -> Result<(), CarryError> {
    let guest = match carry::reach(pod, knock).await {
        Ok(guest) => guest,
        // Under a server that is there and does not answer a client waits, too.
        Err(error @ CarryError::TimedOut) => return Err(error),
        Err(error) => {
            porter.refuse(knock).map_err(CarryError::Client)?;
            return Err(error);
        }
    };
    porter.admit(knock).map_err(CarryError::Client)?;
    let visitor = expected.arrival(ENTER_LIMIT).await.ok_or(CarryError::Left)?;
    carry::carry(visitor, guest).await
}

/// The sockets of a door, before anything watches them.
struct Sockets {
    porter: OwnedFd,
    listener: StdTcpListener,
}

impl Sockets {
    fn watch(self, is_ipv6: bool) -> io::Result<Door> {
        Ok(Door {
            porter: Arc::new(Porter::watch(self.porter, is_ipv6)?),
            listener: TcpListener::from_std(self.listener)?,
        })
    }
}

/// Sockets of the namespace that the thread is in. The listening one has a port that the kernel picks; its address is a loopback
/// one, so that only connections within the namespace reach it.
fn sockets(address: IpAddr) -> Result<Sockets, ForwardError> {
    let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
    let porter = knock::porter(address.is_ipv6()).map_err(|source| ForwardError::Hear { family, source })?;
    let address = SocketAddr::new(address, 0);
    let open = || {
        let listener = StdTcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        knock::hold_back(&listener)?;
        Ok(listener)
    };
    let listener = open().map_err(|source| ForwardError::Listen { address, source })?;
    Ok(Sockets { porter, listener })
}

#[cfg(test)]
mod tests;
