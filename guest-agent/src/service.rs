//! The agent's API: each request is checked, carried out on the pod or the machine, and answered.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use async_trait::async_trait;
use bulkhead_agent_protocol::{
    AddDiskRequest, AddDiskResponse, AddInterfaceRequest, Agent, AgentEvent, ConfigureRequest,
    ContainerRequest, CreateContainerRequest, CreateExecRequest, CreateProcessResponse, DiskRequest, Empty,
    PidsResponse, ProcessRequest, ReadyResponse, ResizePtyRequest, SetClockRequest, SignalRequest,
    StatsResponse, UpdateRequest, WaitResponse,
};
use bulkhead_base::chain;
use ttrpc::r#async::TtrpcContext;
use ttrpc::{Code, get_status};

use crate::pod::{ErrorClass, Pod, PodError};

/// What the agent does to the machine that it runs on, which tests leave alone.
#[async_trait]
pub trait Machine: Send + Sync {
    /// Makes the guest the pod's.
    ///
    /// # Errors
    /// A message for the operator.
    fn configure(&self, request: &ConfigureRequest) -> Result<(), ConfigureFailure>;

    /// Makes the clock go by what the host's says now.
    ///
    /// # Errors
    /// A message for the operator.
    fn set_clock(&self, realtime_ns: i64) -> Result<(), String>;

    /// Monotonic time when the agent began, in microseconds.
    fn started_us(&self) -> u64;

    /// Monotonic time when the agent was ready, in microseconds.
    fn ready_us(&self) -> u64;

    /// Monotonic time now, in microseconds.
    fn now_us(&self) -> u64;

    /// Forgets what is cached of the files of a container that is gone, so that the host can let go of them.
    fn forget_files(&self);

    /// Takes up the disk in a slot, and mounts it if that is asked for.
    ///
    /// # Errors
    /// A message for the operator.
    async fn add_disk(&self, request: &AddDiskRequest) -> Result<AddDiskResponse, String>;

    /// Lets go of the disk in a slot.
    ///
    /// # Errors
    /// A message for the operator.
    async fn remove_disk(&self, slot: u32) -> Result<(), String>;

    /// Takes up the network interface in a slot, and makes it what it should be.
    ///
    /// # Errors
    /// A message for the operator.
    async fn add_interface(&self, request: &AddInterfaceRequest) -> Result<(), String>;

    /// Ends the machine; the processes are dead already. Does not return on a real one.
    async fn power_off(&self);
}

/// A configuration that could not be carried out.
#[derive(Debug)]
pub struct ConfigureFailure {
    /// Whether the request is to blame.
    pub invalid: bool,
    /// What happened.
    pub message: String,
}

/// Carries requests out.
pub struct Service<M> {
    pod: Arc<Pod>,
    machine: Arc<M>,
    configured: AtomicBool,
}

impl<M: Machine + 'static> Service<M> {
    /// A service for an empty pod.
    pub fn new(pod: Arc<Pod>, machine: Arc<M>) -> Self {
        Self { pod, machine, configured: AtomicBool::new(false) }
    }
}

/// Carries a change out to its end, also when the caller has given up on the answer.
async fn complete<T: Send + 'static>(
    change: impl Future<Output = Result<T, PodError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(change).await {
        Ok(result) => result.map_err(status),
        Err(error) => Err(rpc_error(Code::INTERNAL, error)),
    }
}

/// Longest error message in characters. A specification may have anything in it that a message quotes.
const MAX_MESSAGE: usize = 2048;

fn rpc_error(code: Code, message: impl ToString) -> ttrpc::Error {
    let message: String = message.to_string().chars().take(MAX_MESSAGE).collect();
    ttrpc::Error::RpcStatus(get_status(code, message))
}

fn status(error: PodError) -> ttrpc::Error {
    let code = match error.class() {
        ErrorClass::NotFound => Code::NOT_FOUND,
        ErrorClass::AlreadyExists => Code::ALREADY_EXISTS,
        ErrorClass::FailedPrecondition => Code::FAILED_PRECONDITION,
        ErrorClass::InvalidArgument => Code::INVALID_ARGUMENT,
        ErrorClass::Internal => Code::INTERNAL,
    };
    rpc_error(code, chain(&error))
}

#[async_trait]
impl<M: Machine + 'static> Agent for Service<M> {
    async fn ready(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<ReadyResponse> {
        Ok(ReadyResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: crate::sys::kernel_release(),
            ready_us: self.machine.ready_us(),
            started_us: self.machine.started_us(),
            now_us: self.machine.now_us(),
            ..Default::default()
        })
    }

    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> ttrpc::Result<Empty> {
        if self.configured.swap(true, Relaxed) {
            return Err(rpc_error(Code::FAILED_PRECONDITION, "the guest is configured already"));
        }
        self.machine.configure(&request).map_err(|failure| {
            self.configured.store(false, Relaxed);
            let code = if failure.invalid { Code::INVALID_ARGUMENT } else { Code::INTERNAL };
            rpc_error(code, failure.message)
        })?;
        Ok(Empty::new())
    }

    async fn set_clock(&self, _: &TtrpcContext, request: SetClockRequest) -> ttrpc::Result<Empty> {
        if request.realtime_ns <= 0 {
            return Err(rpc_error(Code::INVALID_ARGUMENT, "realtime_ns: not a time after 1970"));
        }
        self.machine
            .set_clock(request.realtime_ns)
            .map(|()| Empty::new())
            .map_err(|message| rpc_error(Code::INTERNAL, message))
    }

    async fn add_disk(&self, _: &TtrpcContext, request: AddDiskRequest) -> ttrpc::Result<AddDiskResponse> {
        let machine = self.machine.clone();
        complete(async move { Ok(machine.add_disk(&request).await) })
            .await?
            .map_err(|message| rpc_error(Code::INTERNAL, message))
    }

    async fn remove_disk(&self, _: &TtrpcContext, request: DiskRequest) -> ttrpc::Result<Empty> {
        let machine = self.machine.clone();
        complete(async move { Ok(machine.remove_disk(request.slot).await) })
            .await?
            .map(|()| Empty::new())
            .map_err(|message| rpc_error(Code::INTERNAL, message))
    }

    async fn add_interface(&self, _: &TtrpcContext, request: AddInterfaceRequest) -> ttrpc::Result<Empty> {
        let machine = self.machine.clone();
        complete(async move { Ok(machine.add_interface(&request).await) })
            .await?
            .map(|()| Empty::new())
            .map_err(|message| rpc_error(Code::INTERNAL, message))
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> ttrpc::Result<CreateProcessResponse> {
        let pod = self.pod.clone();
        let process = complete(async move {
            let stdio = request.stdio.unwrap_or_default();
            pod.create(&request.container_id, &request.spec, stdio).await
        });
        Ok(CreateProcessResponse { pid: process.await?.pid(), ..Default::default() })
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: CreateExecRequest,
    ) -> ttrpc::Result<CreateProcessResponse> {
        let pod = self.pod.clone();
        let process = complete(async move {
            let container = pod.container(&request.container_id)?;
            let stdio = request.stdio.unwrap_or_default();
            container.create_exec(&pod, &request.exec_id, &request.process, stdio).await
        });
        Ok(CreateProcessResponse { pid: process.await?.pid(), ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        let process = self.pod.process(&request.container_id, &request.exec_id).map_err(status)?;
        complete(async move { process.start().await }).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        let process = self.pod.process(&request.container_id, &request.exec_id).map_err(status)?;
        let ended = process.wait().await.map_err(status)?;
        Ok(WaitResponse {
            exit_status: ended.exit.status,
            exited_at_ns: ended.exit.at_ns,
            oom_killed: ended.oom_killed,
            ..Default::default()
        })
    }

    async fn signal(&self, _: &TtrpcContext, request: SignalRequest) -> ttrpc::Result<Empty> {
        let SignalRequest { container_id, exec_id, signal, all, .. } = request;
        let sent = match (all, exec_id.is_empty()) {
            (true, false) => Err(PodError::SignalAll),
            (true, true) => {
                self.pod.container(&container_id).and_then(|container| container.signal_all(signal))
            }
            (false, _) => {
                self.pod.process(&container_id, &exec_id).and_then(|process| process.signal(signal))
            }
        };
        sent.map(|()| Empty::new()).map_err(status)
    }

    async fn delete(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        let (pod, machine) = (self.pod.clone(), self.machine.clone());
        complete(async move {
            if request.exec_id.is_empty() {
                pod.delete(&request.container_id).await?;
                // After the last one the guest is about to end, and with it the cache.
                if !pod.is_empty() {
                    machine.forget_files();
                }
                Ok(())
            } else {
                pod.container(&request.container_id)?.delete_exec(&request.exec_id).await
            }
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let process = self.pod.process(&request.container_id, &request.exec_id).map_err(status)?;
        process.resize(request.columns, request.rows).map(|()| Empty::new()).map_err(status)
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessRequest) -> ttrpc::Result<Empty> {
        self.pod.process(&request.container_id, &request.exec_id).map_err(status)?.close_stdin();
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.set_paused(&request.container_id, true).await
    }

    async fn resume(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<Empty> {
        self.set_paused(&request.container_id, false).await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> ttrpc::Result<Empty> {
        let container = self.pod.container(&request.container_id).map_err(status)?;
        container.update(&self.pod, &request.resources).map(|()| Empty::new()).map_err(status)
    }

    async fn pids(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.pod.container(&request.container_id).map_err(status)?;
        let pids = container.cgroup().pids().map_err(|error| status(error.into()))?;
        Ok(PidsResponse { pids, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        Ok(self.pod.container(&request.container_id).map_err(status)?.stats())
    }

    async fn next_event(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<AgentEvent> {
        Ok(self.pod.events().next().await)
    }

    async fn power_off(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.pod.end_everything().await;
        self.machine.power_off().await;
        Ok(Empty::new())
    }
}

impl<M: Machine + 'static> Service<M> {
    async fn set_paused(&self, container_id: &str, paused: bool) -> ttrpc::Result<Empty> {
        let container = self.pod.container(container_id).map_err(status)?;
        complete(async move { container.set_paused(paused).await }).await?;
        Ok(Empty::new())
    }
}
