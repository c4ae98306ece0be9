//! Standard streams without FIFOs: containerd's Streaming API, which its CRI plugin uses with `io_type = "streaming"`.
//!
//! containerd opens a stream for each of a process's standard streams, by an id, before it asks for the process; the request
//! for that names the ids (`ttrpc+unix://SOCKET?streaming_id=ID`). After a restart it opens them again. Streams wait here for
//! their processes, and processes for their streams. What crosses a stream is in [`connection`].

mod connection;
mod copy;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use tokio::sync::Notify;
use tokio::time::timeout;
use ttrpc::asynchronous::{ServerStream, Service, StreamHandler, StreamInner, TtrpcContext};
use ttrpc::{Code, Response, get_status};

use self::connection::Connection;
pub(crate) use self::copy::{Output, copy_input};

const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
const METHOD: &str = "Stream";

/// How long a client may take to say which stream it opens.
const INIT_LIMIT: Duration = Duration::from_secs(10);

/// Streams that no process has, or that one has had: the oldest is forgotten for one more. A client that has gone shows only
/// when it is written to, so some of these are nobody's.
const MAX_IDLE: usize = 512;

/// An id that names no stream of a process.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StreamError {
    /// Another process has it.
    #[error("the stream {0:?} belongs to another process")]
    Taken(String),
}

/// The streams of a shim.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    slots: Mutex<Slots>,
}

#[derive(Debug, Default)]
struct Slots {
    by_id: HashMap<String, Slot>,
    /// How many there have been.
    count: u64,
}

#[derive(Debug)]
struct Slot {
    number: u64,
    state: State,
    /// The client's end of it that came last, until it is taken.
    latest: Option<Connection>,
    arrived: Arc<Notify>,
}

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// For a process that is still to come.
    Waits,
    /// A process has it.
    Claimed,
    /// The process's stream has ended: whoever opens it again sees its end.
    Ended,
}

/// A stream that belongs to a process, until this is dropped.
#[derive(Debug)]
pub(crate) struct Claim {
    id: String,
    arrived: Arc<Notify>,
    streams: Arc<Streams>,
}

impl Streams {
    /// Makes a stream a process's own; its client may have come already, or is still to come.
    ///
    /// # Errors
    /// When a process has it.
    pub(crate) fn claim(self: &Arc<Self>, id: &str) -> Result<Claim, StreamError> {
        let mut slots = self.lock();
        let slot = slots.find(id);
        if slot.state == State::Claimed {
            return Err(StreamError::Taken(id.to_owned()));
        }
        slot.state = State::Claimed;
        Ok(Claim { id: id.to_owned(), arrived: slot.arrived.clone(), streams: self.clone() })
    }

    /// A client has opened a stream. It takes the place of one that came before.
    fn open(&self, id: &str, connection: Connection) {
        let mut slots = self.lock();
        let slot = slots.find(id);
        if slot.state != State::Ended {
            slot.latest = Some(connection);
            slot.arrived.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Slots {
    fn find(&mut self, id: &str) -> &mut Slot {
        if !self.by_id.contains_key(id) {
            self.make_room();
            self.count += 1;
        }
        let number = self.count;
        self.by_id.entry(id.to_owned()).or_insert_with(|| Slot {
            number,
            state: State::Waits,
            latest: None,
            arrived: Arc::default(),
        })
    }

    fn make_room(&mut self) {
        let idle = || self.by_id.iter().filter(|(_, slot)| slot.state != State::Claimed);
        if idle().count() >= MAX_IDLE {
            let oldest = idle().min_by_key(|(_, slot)| slot.number).map(|(id, _)| id.clone());
            oldest.and_then(|id| self.by_id.remove(&id));
        }
    }
}

impl Claim {
    /// The client's end that came last, once there is one that was not given before.
    async fn next(&self) -> Connection {
        loop {
            let latest = self.streams.lock().by_id.get_mut(&self.id).and_then(|slot| slot.latest.take());
            if let Some(connection) = latest {
                return connection;
            }
            self.arrived.notified().await;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if let Some(slot) = self.streams.lock().by_id.get_mut(&self.id) {
            slot.state = State::Ended;
            slot.latest = None;
        }
    }
}

/// The API under its name.
pub(crate) fn service(streams: &Arc<Streams>) -> HashMap<String, Service> {
    let handler: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Handler(streams.clone()));
    let service = Service { methods: HashMap::new(), streams: [(METHOD.to_owned(), handler)].into() };
    [(SERVICE.to_owned(), service)].into()
}

struct Handler(Arc<Streams>);

#[async_trait]
impl StreamHandler for Handler {
    async fn handler(&self, _: TtrpcContext, inner: StreamInner) -> ttrpc::Result<Option<Response>> {
        let refused = |message: &str| ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, message));
        let mut stream = ServerStream::<Any, Any>::new(inner);
        let first = async {
            match stream.recv().await {
                // containerd's call has no payload and does not say so, which comes out as an empty message.
                Ok(Some(message)) if message == Any::new() => stream.recv().await,
                other => other,
            }
        };
        let first = timeout(INIT_LIMIT, first).await;
        let first = first.map_err(|_| refused("nothing said which stream this is"))??;
        let id = first.as_ref().and_then(connection::init).ok_or_else(|| refused("this opens no stream"))?;
        // It tells the client that it may begin.
        stream.send(&Any::new()).await?;
        let (connection, ended) = Connection::new(stream);
        self.0.open(&id, connection);
        let last = ended.await.unwrap_or_default();
        let mut response = Response::new();
        // A message of two fields can be written.
        response.payload = last.write_to_bytes().unwrap_or_default();
        Ok(Some(response))
    }
}
