//! Connections to loopback addresses in the pod's network namespace on the host are carried to the same port in the guest.
//!
//! `kubectl port-forward` is one: containerd dials `localhost:PORT` in that namespace, where nothing of the pod listens,
//! because its servers are in the guest. Two sockets of ours take every such connection ([`lookup`]), and each connection
//! becomes a stream to the agent, which dials the port where the server is.
//!
//! Set up in the background once the pod runs; nothing of it outlives the shim, whose descriptors are all that holds it.

mod carry;
mod lookup;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

use self::lookup::{LookupError, Redirection, Targets};
use super::Pod;
use super::timeline::now_us;
use crate::error::chain;
use crate::host::netns::{NamespaceError, NetworkNamespace};

/// The pod's first container is to run before this takes the processor.
const DELAY: Duration = Duration::from_millis(100);

/// Connections of a pod at a time; others wait to be accepted. Each takes two buffers of [`carry::BUFFER`] bytes and one
/// of the 128 vsock connections of the guest.
const MAX_CONNECTIONS: usize = 64;

/// How long accepting rests after it has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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
    #[error("can't watch a listening socket")]
    Watch(#[source] io::Error),
    #[error("can't take connections to every port")]
    Lookup(#[from] LookupError),
}

/// Begins forwarding soon, for as long as the pod lives, if the pod has a network namespace on the host. That the host can't
/// is said once.
pub fn start(pod: &Arc<Pod>) {
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
    match Listeners::open(namespace).await {
        Ok(listeners) => {
            log::debug!("ports are forwarded, set up in {} us", now_us().saturating_sub(began));
            listeners.serve(pod).await;
        }
        Err(error) => log::warn!("ports of the pod are not forwarded: {}", chain(&error)),
    }
}

/// The sockets that take the connections.
#[derive(Debug)]
struct Listeners {
    ipv4: TcpListener,
    /// Where the host has IPv6.
    ipv6: Option<TcpListener>,
    _redirection: Redirection,
}

impl Listeners {
    async fn open(namespace: &Path) -> Result<Listeners, ForwardError> {
        let namespace = NetworkNamespace::open(namespace)?;
        let (ipv4, ipv6) = namespace
            .within(|| (listening(Ipv4Addr::LOCALHOST.into()), listening(Ipv6Addr::LOCALHOST.into())))
            .await?;
        let (ipv4, ipv6) = (ipv4?, ipv6.ok());
        let targets = Targets { ipv4: ipv4.as_fd(), ipv6: ipv6.as_ref().map(AsFd::as_fd) };
        let redirection = Redirection::attach(namespace.file().as_fd(), targets)?;
        let watched = TcpListener::from_std;
        Ok(Listeners {
            ipv4: watched(ipv4).map_err(ForwardError::Watch)?,
            ipv6: ipv6.map(watched).transpose().map_err(ForwardError::Watch)?,
            _redirection: redirection,
        })
    }

    async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let ipv6 = async {
            match &self.ipv6 {
                Some(listener) => listener.accept().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            accepted = self.ipv4.accept() => accepted,
            accepted = ipv6 => accepted,
        }
    }

    /// Takes connections for ever.
    async fn serve(&self, pod: &Arc<Pod>) {
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // It is never closed.
            let Ok(place) = places.clone().acquire_owned().await else { return };
            let (client, peer) = match self.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    log::debug!("a connection to the pod was not accepted: {error}");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let pod = pod.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = pod.died() => {}
                    result = carry::carry(&pod, client, peer) => if let Err(error) = result {
                        log::debug!("a connection to the pod ended: {}", chain(&error));
                    }
                }
                drop(place);
            });
        }
    }
}

/// A listening socket on a port that the kernel picks. The address is a loopback one, so that only connections within the
/// namespace reach it.
fn listening(address: IpAddr) -> Result<StdTcpListener, ForwardError> {
    let address = SocketAddr::new(address, 0);
    let open = || {
        let listener = StdTcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    open().map_err(|source| ForwardError::Listen { address, source })
}

#[cfg(test)]
mod tests;
