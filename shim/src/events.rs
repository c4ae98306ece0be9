//! Events for containerd: one queue, in order, each acknowledged before the next is sent.
//!
//! containerd relies on the order of a task's events, and misses those that are lost. So an event stays at the head of
//! the queue until containerd has taken it, also across containerd's restarts. What containerd refuses several times is
//! dropped, or it would stop all that follow.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::sync::{mpsc, watch};

/// Events that may wait for containerd. A pod that causes more than this while containerd is away loses some.
const MAX_WAITING: usize = 4096;

/// containerd takes an event in this time, or the connection is given up.
const FORWARD_LIMIT: Duration = Duration::from_secs(5);

/// Refusals of the same event.
const MAX_REFUSALS: u32 = 5;

/// Pause after a failure, doubled from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// An event of a task.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs, reason = "the messages document themselves")]
pub(crate) enum Event {
    Create(TaskCreate),
    Start(TaskStart),
    ExecAdded(TaskExecAdded),
    ExecStarted(TaskExecStarted),
    Exit(TaskExit),
    Delete(TaskDelete),
    Oom(TaskOOM),
    Paused(TaskPaused),
    Resumed(TaskResumed),
}

impl Event {
    /// Topic, and type of the message. (The types' own descriptors would say it too, and take half a megabyte.)
    fn names(&self) -> (&'static str, &'static str) {
        match self {
            Event::Create(_) => ("/tasks/create", "containerd.events.TaskCreate"),
            Event::Start(_) => ("/tasks/start", "containerd.events.TaskStart"),
            Event::ExecAdded(_) => ("/tasks/exec-added", "containerd.events.TaskExecAdded"),
            Event::ExecStarted(_) => ("/tasks/exec-started", "containerd.events.TaskExecStarted"),
            Event::Exit(_) => ("/tasks/exit", "containerd.events.TaskExit"),
            Event::Delete(_) => ("/tasks/delete", "containerd.events.TaskDelete"),
            Event::Oom(_) => ("/tasks/oom", "containerd.events.TaskOOM"),
            Event::Paused(_) => ("/tasks/paused", "containerd.events.TaskPaused"),
            Event::Resumed(_) => ("/tasks/resumed", "containerd.events.TaskResumed"),
        }
    }

    fn bytes(&self) -> protobuf::Result<Vec<u8>> {
        match self {
            Event::Create(event) => event.write_to_bytes(),
            Event::Start(event) => event.write_to_bytes(),
            Event::ExecAdded(event) => event.write_to_bytes(),
            Event::ExecStarted(event) => event.write_to_bytes(),
            Event::Exit(event) => event.write_to_bytes(),
            Event::Delete(event) => event.write_to_bytes(),
            Event::Oom(event) => event.write_to_bytes(),
            Event::Paused(event) => event.write_to_bytes(),
            Event::Resumed(event) => event.write_to_bytes(),
        }
    }
}

/// A point in time for containerd.
pub(crate) fn timestamp(ns: i64) -> MessageField<Timestamp> {
    MessageField::some(Timestamp {
        seconds: ns.div_euclid(1_000_000_000),
        nanos: ns.rem_euclid(1_000_000_000) as i32,
        ..Default::default()
    })
}

/// The sending end of the queue.
#[derive(Debug, Clone)]
pub(crate) struct Publisher {
    namespace: Arc<str>,
    /// `None` where nobody listens.
    queue: Option<mpsc::UnboundedSender<Envelope>>,
    waiting: Arc<AtomicUsize>,
    /// Number of events that are done with, one way or the other.
    done: watch::Receiver<()>,
}

impl Publisher {
    /// Publishes to the containerd at `address` (its ttrpc socket; empty for nobody) for a containerd namespace. Must be
    /// called in a runtime.
    pub(crate) fn start(address: &str, namespace: &str) -> Publisher {
        let waiting = Arc::new(AtomicUsize::new(0));
        let (done_sender, done) = watch::channel(());
        if address.is_empty() {
            return Publisher { namespace: namespace.into(), queue: None, waiting, done };
        }
        let (queue, receiver) = mpsc::unbounded_channel();
        tokio::spawn(forward_all(Forwarder::new(address), receiver, waiting.clone(), done_sender));
        Publisher { namespace: namespace.into(), queue: Some(queue), waiting, done }
    }

    /// The containerd namespace.
    pub(crate) fn namespace(&self) -> &str {
        &self.namespace
    }

    /// Queues an event. Never waits.
    pub(crate) fn publish(&self, event: Event) {
        let Some(queue) = &self.queue else { return };
        let (topic, type_name) = event.names();
        if self.waiting.load(Ordering::Relaxed) >= MAX_WAITING {
            log::error!("{MAX_WAITING} events wait for containerd: {topic} is lost");
            return;
        }
        let value = match event.bytes() {
            Ok(value) => value,
            Err(error) => return log::error!("can't encode an event for {topic}: {error}"),
        };
        let envelope = Envelope {
            timestamp: timestamp(crate::pod::now_ns()),
            namespace: self.namespace.to_string(),
            topic: topic.into(),
            event: MessageField::some(Any { type_url: type_name.into(), value, ..Default::default() }),
            ..Default::default()
        };
        self.waiting.fetch_add(1, Ordering::Relaxed);
        if queue.send(envelope).is_err() {
            log::error!("the event queue is gone: {topic} is lost");
        }
    }

    /// Waits until containerd has all events, or the time is up.
    pub(crate) async fn flush(&self, limit: Duration) {
        let mut done = self.done.clone();
        let all_done = async {
            while self.waiting.load(Ordering::Relaxed) > 0 {
                if done.changed().await.is_err() {
                    break;
                }
            }
        };
        if tokio::time::timeout(limit, all_done).await.is_err() {
            log::error!("containerd did not take the last events within {limit:?}");
        }
    }
}

async fn forward_all(
    mut forwarder: Forwarder,
    mut queue: mpsc::UnboundedReceiver<Envelope>,
    waiting: Arc<AtomicUsize>,
    done: watch::Sender<()>,
) {
    while let Some(envelope) = queue.recv().await {
        forwarder.forward(envelope).await;
        waiting.fetch_sub(1, Ordering::Relaxed);
        done.send_replace(());
    }
}

struct Forwarder {
    address: String,
    client: Option<EventsClient>,
}

impl Forwarder {
    fn new(address: &str) -> Forwarder {
        let address = match address.strip_prefix("unix://") {
            Some(_) => address.to_owned(),
            None => format!("unix://{address}"),
        };
        Forwarder { address, client: None }
    }

    /// Sends one event until it is taken or refused for good.
    async fn forward(&mut self, envelope: Envelope) {
        let topic = envelope.topic.clone();
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let (mut pause, longest) = PAUSES;
        let mut refusals = 0;
        loop {
            match self.try_forward(&request).await {
                Ok(()) => return,
                Err(ttrpc::Error::RpcStatus(status)) => {
                    refusals += 1;
                    if refusals == MAX_REFUSALS {
                        return log::error!("containerd refuses the event {topic}: {}", status.message());
                    }
                }
                Err(error) => {
                    log::debug!("can't reach containerd for the event {topic}, trying again: {error}");
                    self.client = None;
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn try_forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match &self.client {
            Some(client) => client,
            None => self.client.insert(EventsClient::new(Client::connect(&self.address).await?)),
        };
        match tokio::time::timeout(FORWARD_LIMIT, client.forward(ttrpc::context::Context::default(), request))
            .await
        {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(ttrpc::Error::Others(format!("no answer within {FORWARD_LIMIT:?}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use async_trait::async_trait;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::well_known_types::empty::Empty;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    /// A containerd that notes the events it takes, and refuses those of one container.
    #[derive(Default)]
    struct Containerd {
        taken: Mutex<Vec<(String, String)>>,
    }

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            let envelope = request.envelope.into_option().unwrap();
            let start = TaskStart::parse_from_bytes(&envelope.event.value).unwrap();
            if start.container_id == "refused" {
                return Err(ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "no")));
            }
            assert_eq!(envelope.namespace, "ns");
            assert_eq!(envelope.event.type_url, "containerd.events.TaskStart");
            self.taken.lock().unwrap().push((envelope.topic, start.container_id));
            Ok(Empty::new())
        }
    }

    async fn serve(path: &std::path::Path) -> (Server, Arc<Containerd>) {
        let _ = std::fs::remove_file(path);
        let containerd = Arc::new(Containerd::default());
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_events(containerd.clone()));
        server.start().await.unwrap();
        (server, containerd)
    }

    fn start(id: &str) -> Event {
        Event::Start(TaskStart { container_id: id.into(), ..Default::default() })
    }

    fn ids(containerd: &Containerd) -> Vec<String> {
        containerd.taken.lock().unwrap().iter().map(|(_, id)| id.clone()).collect()
    }

    #[tokio::test]
    async fn events_arrive_in_order_and_a_refused_one_does_not_stop_the_rest() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let (_server, containerd) = serve(&path).await;
        let publisher = Publisher::start(path.to_str().unwrap(), "ns");
        for id in ["1", "refused", "2", "3"] {
            publisher.publish(start(id));
        }
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(ids(&containerd), ["1", "2", "3"]);
        assert_eq!(containerd.taken.lock().unwrap()[0].0, "/tasks/start");
    }

    #[tokio::test]
    async fn events_wait_for_a_containerd_that_restarts() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let publisher = Publisher::start(path.to_str().unwrap(), "ns");
        publisher.publish(start("before"));
        let (mut server, first) = serve(&path).await;
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(ids(&first), ["before"]);

        server.shutdown().await.unwrap();
        drop(server);
        std::fs::remove_file(&path).unwrap();
        publisher.publish(start("meanwhile"));
        publisher.publish(start("after"));
        tokio::time::sleep(Duration::from_millis(200)).await;
        let (_server, second) = serve(&path).await;
        publisher.flush(Duration::from_secs(10)).await;
        assert_eq!(ids(&second), ["meanwhile", "after"]);
    }

    #[tokio::test]
    async fn flushing_ends_without_a_containerd() {
        let publisher = Publisher::start("/nonexistent/socket", "ns");
        publisher.publish(start("1"));
        let started = std::time::Instant::now();
        publisher.flush(Duration::from_millis(50)).await;
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[tokio::test]
    async fn nobody_is_told_where_nobody_listens() {
        let publisher = Publisher::start("", "ns");
        publisher.publish(start("1"));
        let started = std::time::Instant::now();
        publisher.flush(Duration::from_secs(60)).await;
        assert!(started.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn times_before_the_epoch_do_not_wrap() {
        let time = timestamp(-1);
        assert_eq!((time.seconds, time.nanos), (-1, 999_999_999));
    }
}
