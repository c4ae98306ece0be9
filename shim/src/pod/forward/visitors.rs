//! Who has knocked and is not gone yet.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

/// A connection: the client's address, and the one that it wants.
type Flow = (SocketAddr, SocketAddr);

/// Visitors at a time, of both families, with those that wait for a place.
const MAX: usize = 512;

/// All of them.
#[derive(Debug, Clone, Default)]
pub(super) struct Visitors {
    /// Whom to tell when a client has come in. Who was told stays until its connection has ended: a segment that is late
    /// does not make it a new visitor.
    flows: Arc<Mutex<HashMap<Flow, Option<oneshot::Sender<TcpStream>>>>>,
}

/// A visitor, until this is dropped.
#[derive(Debug)]
pub(super) struct Expected {
    flow: Flow,
    arrives: oneshot::Receiver<TcpStream>,
    visitors: Visitors,
}

impl Visitors {
    /// A new visitor; `None` when it is there already, or one too many.
    pub(super) fn expect(&self, client: SocketAddr, wanted: SocketAddr) -> Option<Expected> {
        let flow = (client, wanted);
        let mut flows = self.lock();
        if flows.len() >= MAX || flows.contains_key(&flow) {
            return None;
        }
        let (tell, arrives) = oneshot::channel();
        flows.insert(flow, Some(tell));
        Some(Expected { flow, arrives, visitors: self.clone() })
    }

    /// A connection has come about. If nobody waits for it any more it is reset.
    pub(super) fn arrive(&self, client: TcpStream, peer: SocketAddr) {
        let told = client.local_addr().ok().and_then(|wanted| self.lock().get_mut(&(peer, wanted))?.take());
        let unwanted = match told {
            Some(tell) => tell.send(client).err(),
            None => Some(client),
        };
        if let Some(client) = unwanted {
            // If even that fails it just ends.
            let _ = client.set_zero_linger();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Flow, Option<oneshot::Sender<TcpStream>>>> {
        self.flows.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected {
    /// Its connection, once it is there; `None` when it does not come in time. It is a visitor until the connection is dropped.
    pub(super) async fn arrival(mut self, limit: Duration) -> Option<Arrived> {
        let client = timeout(limit, &mut self.arrives).await.ok()?.ok()?;
        Some(Arrived { client, _expected: self })
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        self.visitors.lock().remove(&self.flow);
    }
}

/// A visitor's connection.
#[derive(Debug)]
pub(super) struct Arrived {
    pub(super) client: TcpStream,
    _expected: Expected,
}
