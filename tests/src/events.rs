//! The events service that a shim reports to, as containerd offers it.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{self, Server, TtrpcContext};
use containerd_shim_protos::{Events, create_events};

use crate::fail;
use crate::failure::{Explain, Outcome};

/// One event, in the order of arrival.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Event {
    /// Its topic, such as `/tasks/exit`.
    pub topic: String,
    /// The container it is about.
    pub container: String,
    /// The exec it is about; empty for the container's own process.
    pub exec: String,
    /// The process id that it names, if any.
    pub pid: u32,
    /// The exit status that it names, if any.
    pub exit_status: u32,
}

#[derive(Debug, Default)]
struct Log {
    events: Mutex<Vec<Event>>,
    arrived: Condvar,
}

/// A running events service; what came in is kept.
pub(crate) struct EventServer {
    log: Arc<Log>,
    server: Option<Server>,
}

impl EventServer {
    /// Serves events on a Unix socket.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub(crate) fn start(socket: &Path) -> Outcome<Self> {
        let log = Arc::new(Log::default());
        let service = create_events(Arc::new(Receiver(Arc::clone(&log))));
        let _ = fs::remove_file(socket);
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .explain(|| format!("serve events on {}", socket.display()))?
            .register_service(service);
        server.start().explain(|| "start the events service".into())?;
        Ok(Self { log, server: Some(server) })
    }

    /// The events of a container so far.
    pub(crate) fn of(&self, container: &str) -> Vec<Event> {
        let events = self.log.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.iter().filter(|event| event.container == container).cloned().collect()
    }

    /// Waits for the first event of a container with this topic and exec id.
    ///
    /// # Errors
    /// When it has not come within `limit`.
    pub(crate) fn wait_for(
        &self,
        container: &str,
        topic: &str,
        exec: &str,
        limit: Duration,
    ) -> Outcome<Event> {
        let matches =
            |event: &&Event| event.container == container && event.topic == topic && event.exec == exec;
        let events = self.log.events.lock().unwrap_or_else(PoisonError::into_inner);
        let (events, _) = self
            .log
            .arrived
            .wait_timeout_while(events, limit, |events| !events.iter().any(|event| matches(&event)))
            .unwrap_or_else(PoisonError::into_inner);
        match events.iter().find(matches) {
            Some(event) => Ok(event.clone()),
            None => {
                let came: Vec<&str> =
                    events.iter().filter(|e| e.container == container).map(|e| e.topic.as_str()).collect();
                fail!(
                    "no event {topic} of {container} {exec} within {} s; events: {}",
                    limit.as_secs(),
                    came.join(" ")
                )
            }
        }
    }
}

impl Drop for EventServer {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
    }
}

struct Receiver(Arc<Log>);

impl Events for Receiver {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope();
        let event = decode(&envelope.topic, &envelope.event().value).map_err(|error| {
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, error.to_string()))
        })?;
        self.0.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
        self.0.arrived.notify_all();
        Ok(Empty::new())
    }
}

fn decode(topic: &str, bytes: &[u8]) -> Result<Event, containerd_shim_protos::protobuf::Error> {
    let event = |container: String, exec: String, pid: u32, exit_status: u32| Event {
        topic: topic.to_owned(),
        container,
        exec,
        pid,
        exit_status,
    };
    Ok(match topic {
        "/tasks/create" => {
            TaskCreate::parse_from_bytes(bytes).map(|e| event(e.container_id, String::new(), e.pid, 0))?
        }
        "/tasks/start" => {
            TaskStart::parse_from_bytes(bytes).map(|e| event(e.container_id, String::new(), e.pid, 0))?
        }
        "/tasks/delete" => {
            TaskDelete::parse_from_bytes(bytes).map(|e| event(e.container_id, e.id, e.pid, e.exit_status))?
        }
        "/tasks/exit" => TaskExit::parse_from_bytes(bytes).map(|e| {
            // containerd's own shims name the container's process by the container's id.
            let exec = if e.id == e.container_id { String::new() } else { e.id };
            event(e.container_id, exec, e.pid, e.exit_status)
        })?,
        "/tasks/exec-added" => {
            TaskExecAdded::parse_from_bytes(bytes).map(|e| event(e.container_id, e.exec_id, 0, 0))?
        }
        "/tasks/exec-started" => {
            TaskExecStarted::parse_from_bytes(bytes).map(|e| event(e.container_id, e.exec_id, e.pid, 0))?
        }
        "/tasks/oom" => {
            TaskOOM::parse_from_bytes(bytes).map(|e| event(e.container_id, String::new(), 0, 0))?
        }
        "/tasks/paused" => {
            TaskPaused::parse_from_bytes(bytes).map(|e| event(e.container_id, String::new(), 0, 0))?
        }
        "/tasks/resumed" => {
            TaskResumed::parse_from_bytes(bytes).map(|e| event(e.container_id, String::new(), 0, 0))?
        }
        _ => event(String::new(), String::new(), 0, 0),
    })
}
