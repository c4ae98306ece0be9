//! Calls to the guest's agent: each with a time limit, each answer bounded. Only what waits for something to happen in the
//! guest has none, and like every call it fails when the pod ends.

use std::time::Duration;

use bulkhead_agent_protocol as api;
use bulkhead_agent_protocol::AgentClient;
use tokio::net::UnixStream;
use tokio::sync::watch;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::Context;

use super::stream::GuardedStream;
use crate::error::{Classify, Code, untrusted};
use crate::spec::DeviceNumber;

/// Most process ids taken from one answer.
pub(crate) const MAX_PIDS: usize = 8192;

/// Most I/O entries taken from one answer.
pub(crate) const MAX_IO_ENTRIES: usize = 256;

/// An error message of the agent, in bytes.
const MAX_MESSAGE: usize = 2048;

/// What reading from a connection that the other end closed is called by the runtime.
const HUNG_UP: &str = "early eof";

/// For what the agent does in memory.
const QUICK: Duration = Duration::from_secs(5);

/// For what touches file systems or starts processes.
const SLOW: Duration = Duration::from_secs(20);

/// Why a call to the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// It refused.
    #[error("{message}")]
    Refused {
        /// The agent's code, if it is one that the protocol knows.
        code: Code,
        /// The agent's words, cleaned.
        message: String,
    },
    /// It did not answer.
    #[error("the agent in the guest did not answer {call} within {} s", .limit.as_secs())]
    TimedOut {
        /// The call.
        call: &'static str,
        /// How long it had.
        limit: Duration,
    },
    /// The connection is gone.
    #[error("the connection to the agent in the guest is lost")]
    Lost,
}

impl Classify for AgentError {
    fn code(&self) -> Code {
        match self {
            AgentError::Refused { code, .. } => *code,
            AgentError::TimedOut { .. } => Code::DEADLINE_EXCEEDED,
            AgentError::Lost => Code::UNAVAILABLE,
        }
    }
}

/// The agent of one pod.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentClient,
    lost: watch::Sender<bool>,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent").field("lost", &*self.lost.borrow()).finish_non_exhaustive()
    }
}

/// What the agent says of itself and its guest, cleaned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Greeting {
    /// The agent's version.
    pub version: String,
    /// The guest kernel's release.
    pub kernel: String,
    /// The guest's monotonic time when the agent began, microseconds.
    pub started_us: u64,
    /// The guest's monotonic time when the agent was ready, microseconds.
    pub ready_us: u64,
    /// The guest's monotonic time when it answered, microseconds.
    pub now_us: u64,
}

/// How a process in the guest ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + signal.
    pub status: u32,
    /// Nanoseconds since the Unix epoch.
    pub at_ns: i64,
}

/// The end of a process, and what it says of its container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    /// How it ended.
    pub exit: Exit,
    /// Whether a process of its container was killed for want of memory by then.
    pub oom_killed: bool,
}

impl Agent {
    /// Speaks to the agent over `stream`. What is sent waits there until the agent is up.
    pub(crate) fn new(stream: UnixStream) -> Agent {
        let client = Client::new(Socket::new(GuardedStream::new(stream)));
        Agent { client: AgentClient::new(client), lost: watch::Sender::new(false) }
    }

    /// Fails all calls, those under way too: the pod has ended.
    pub(crate) fn hang_up(&self) {
        self.lost.send_replace(true);
    }

    /// Answers when a call has found the connection lost.
    pub(crate) async fn lost(&self) {
        // The sender is ours: it can't be gone.
        let _ = self.lost.subscribe().wait_for(|lost| *lost).await;
    }

    async fn call<T>(
        &self,
        call: &'static str,
        limit: Duration,
        answer: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, AgentError> {
        match tokio::time::timeout(limit, self.while_there(answer)).await {
            Ok(answer) => answer,
            Err(_) => Err(AgentError::TimedOut { call, limit }),
        }
    }

    /// An answer, for as long as there is somebody to give it.
    async fn while_there<T>(&self, answer: impl Future<Output = ttrpc::Result<T>>) -> Result<T, AgentError> {
        tokio::select! {
            biased;
            answer = answer => answer.map_err(|error| self.classify(error)),
            () = self.lost() => Err(AgentError::Lost),
        }
    }

    fn classify(&self, error: ttrpc::Error) -> AgentError {
        match error {
            ttrpc::Error::RpcStatus(status) => AgentError::Refused {
                code: match status.code() {
                    // These have a meaning to containerd; `Unimplemented` would make it retry in another version.
                    code @ (Code::NOT_FOUND
                    | Code::ALREADY_EXISTS
                    | Code::FAILED_PRECONDITION
                    | Code::INVALID_ARGUMENT
                    | Code::RESOURCE_EXHAUSTED) => code,
                    _ => Code::INTERNAL,
                },
                message: untrusted(status.message(), MAX_MESSAGE),
            },
            other => {
                self.note_loss(&other);
                AgentError::Lost
            }
        }
    }

    /// Every call that waits for an answer finds the loss out, but it is told once. That the other end hung up is the pod's
    /// end, which is told with its reason.
    fn note_loss(&self, error: &ttrpc::Error) {
        let is_new = !self.lost.send_replace(true);
        let error = error.to_string();
        if is_new && !error.contains(HUNG_UP) {
            log::debug!("the connection to the agent is lost: {error}");
        }
    }

    /// Asks for nothing but an answer, which is the sign that the agent is up.
    pub(crate) async fn ready(&self, limit: Duration) -> Result<Greeting, AgentError> {
        let request = api::Empty::new();
        let answer = self.call("Ready", limit, self.client.ready(Context::default(), &request)).await?;
        Ok(Greeting {
            version: untrusted(&answer.version, 64),
            kernel: untrusted(&answer.kernel_release, 64),
            started_us: answer.started_us,
            ready_us: answer.ready_us,
            now_us: answer.now_us,
        })
    }

    /// Makes the guest the pod's.
    pub(crate) async fn configure(&self, request: &api::ConfigureRequest) -> Result<(), AgentError> {
        self.call("Configure", SLOW, self.client.configure(Context::default(), request)).await.map(drop)
    }

    /// Has the guest take up the disk in a slot and mount what is on it; gives its number there.
    pub(crate) async fn add_disk(&self, request: &api::AddDiskRequest) -> Result<DeviceNumber, AgentError> {
        let answer = self.call("AddDisk", SLOW, self.client.add_disk(Context::default(), request)).await?;
        Ok(DeviceNumber { major: answer.major, minor: answer.minor })
    }

    /// Has the guest let go of the disk in a slot, which it may have to write to first.
    pub(crate) async fn remove_disk(&self, slot: u8, limit: Duration) -> Result<(), AgentError> {
        let request = api::DiskRequest { slot: slot.into(), ..Default::default() };
        self.call("RemoveDisk", limit, self.client.remove_disk(Context::default(), &request)).await.map(drop)
    }

    /// Tells the guest what the time is.
    pub(crate) async fn set_clock(&self, realtime_ns: i64) -> Result<(), AgentError> {
        let request = api::SetClockRequest { realtime_ns, ..Default::default() };
        let answer = self.client.set_clock(Context::default(), &request);
        self.call("SetClock", QUICK, answer).await.map(drop)
    }

    /// Has the guest take up the network interface in a slot.
    pub(crate) async fn add_interface(&self, request: &api::AddInterfaceRequest) -> Result<(), AgentError> {
        let answer = self.client.add_interface(Context::default(), request);
        self.call("AddInterface", SLOW, answer).await.map(drop)
    }

    /// Sets a container up; gives its first process's id in the guest.
    pub(crate) async fn create_container(
        &self,
        request: &api::CreateContainerRequest,
    ) -> Result<u32, AgentError> {
        let answer = self.client.create_container(Context::default(), request);
        self.call("CreateContainer", SLOW, answer).await.map(|answer| answer.pid)
    }

    /// Sets a further process up.
    pub(crate) async fn create_exec(&self, request: &api::CreateExecRequest) -> Result<(), AgentError> {
        self.call("CreateExec", SLOW, self.client.create_exec(Context::default(), request)).await.map(drop)
    }

    /// Executes a process's program.
    pub(crate) async fn start(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = process(container, exec);
        self.call("Start", SLOW, self.client.start(Context::default(), &request)).await.map(drop)
    }

    /// Waits until a process has ended.
    pub(crate) async fn wait(&self, container: &str, exec: &str) -> Result<Ended, AgentError> {
        let request = process(container, exec);
        let answer = self.while_there(self.client.wait(Context::default(), &request)).await?;
        let exit = Exit { status: answer.exit_status, at_ns: answer.exited_at_ns };
        Ok(Ended { exit, oom_killed: answer.oom_killed })
    }

    /// Sends a signal to a process, or to every process of a container.
    pub(crate) async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), AgentError> {
        let request = api::SignalRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.call("Signal", QUICK, self.client.signal(Context::default(), &request)).await.map(drop)
    }

    /// Releases a process, or with an empty exec id a container.
    pub(crate) async fn delete(&self, container: &str, exec: &str) -> Result<(), AgentError> {
        let request = process(container, exec);
        self.call("Delete", SLOW, self.client.delete(Context::default(), &request)).await.map(drop)
    }

    /// Sets the size of a process's terminal.
    pub(crate) async fn resize_pty(
        &self,
        container: &str,
        exec: &str,
        columns: u32,
        rows: u32,
    ) -> Result<(), AgentError> {
        let request = api::ResizePtyRequest {
            container_id: container.into(),
            exec_id: exec.into(),
            columns,
            rows,
            ..Default::default()
        };
        self.call("ResizePty", QUICK, self.client.resize_pty(Context::default(), &request)).await.map(drop)
    }

    /// Freezes a container.
    pub(crate) async fn pause(&self, container: &str) -> Result<(), AgentError> {
        let request = container_request(container);
        self.call("Pause", QUICK, self.client.pause(Context::default(), &request)).await.map(drop)
    }

    /// Thaws a container.
    pub(crate) async fn resume(&self, container: &str) -> Result<(), AgentError> {
        let request = container_request(container);
        self.call("Resume", QUICK, self.client.resume(Context::default(), &request)).await.map(drop)
    }

    /// Changes a container's limits to the OCI `linux.resources` object in `resources`.
    pub(crate) async fn update(&self, container: &str, resources: Vec<u8>) -> Result<(), AgentError> {
        let request = api::UpdateRequest { container_id: container.into(), resources, ..Default::default() };
        self.call("Update", QUICK, self.client.update(Context::default(), &request)).await.map(drop)
    }

    /// The process ids of a container, as the guest counts them; at most [`MAX_PIDS`].
    pub(crate) async fn pids(&self, container: &str, limit: Duration) -> Result<Vec<u32>, AgentError> {
        let request = container_request(container);
        let mut answer = self.call("Pids", limit, self.client.pids(Context::default(), &request)).await?;
        answer.pids.truncate(MAX_PIDS);
        Ok(answer.pids)
    }

    /// A container's figures.
    pub(crate) async fn stats(&self, container: &str) -> Result<api::StatsResponse, AgentError> {
        let request = container_request(container);
        let mut answer = self.call("Stats", QUICK, self.client.stats(Context::default(), &request)).await?;
        answer.io.truncate(MAX_IO_ENTRIES);
        Ok(answer)
    }

    /// Waits for the next event.
    pub(crate) async fn next_event(&self) -> Result<api::AgentEvent, AgentError> {
        let request = api::Empty::new();
        self.while_there(self.client.next_event(Context::default(), &request)).await
    }

    /// Asks the guest to power itself off; there may be no answer.
    pub(crate) async fn power_off(&self, limit: Duration) {
        let request = api::Empty::new();
        let _ = self.call("PowerOff", limit, self.client.power_off(Context::default(), &request)).await;
    }
}

fn process(container: &str, exec: &str) -> api::ProcessRequest {
    api::ProcessRequest { container_id: container.into(), exec_id: exec.into(), ..Default::default() }
}

fn container_request(container: &str) -> api::ContainerRequest {
    api::ContainerRequest { container_id: container.into(), ..Default::default() }
}
