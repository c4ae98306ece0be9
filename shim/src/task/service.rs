//! The Task API itself: each call, and what it does to the shim's state.
//!
//! A call that changes something is carried out on a task of its own: containerd's connection or deadline may end at any
//! moment, and what was begun is then still finished, so that nothing stays half done.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_agent_protocol as agent_api;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskPaused, TaskResumed, TaskStart,
};
use containerd_shim_protos::shim_async::{Task, create_task};
use protobuf::MessageField;
use ttrpc::asynchronous::{Service, TtrpcContext};

use super::container::{Container, Process, State};
use super::create::explain;
use super::kill;
use super::rootfs;
use super::shim::Shim;
use super::stats;
use super::stdio::{BACKGROUND_IDLE, DRAIN_IDLE, HostStdio, Stdio};
use crate::error::{ApiError, Code};
use crate::events::{Event, timestamp};
use crate::hooks;
use crate::id;
use crate::pod::agent::{AgentError, Exit};
use crate::pod::names;
use crate::pod::now_ns;
use crate::sizing::Demand;
use crate::spec;

/// containerd gives a shim five seconds when it comes back; the agent gets less.
const PIDS_LIMIT: Duration = Duration::from_secs(3);

/// What a process that could not be set up is said to have ended with.
const NOT_STARTED: u32 = 255;

/// The Task API of one shim.
pub(crate) struct TaskService {
    shim: Arc<Shim>,
}

/// The API in both versions that containerd has: they differ in the name only.
pub(crate) fn services(shim: &Arc<Shim>) -> HashMap<String, Service> {
    let service = || Arc::new(TaskService { shim: shim.clone() });
    let mut services = create_task(service());
    services
        .extend(create_task(service()).into_values().map(|v2| ("containerd.task.v2.Task".to_owned(), v2)));
    services
}

/// Carries a call out even if nobody waits for it any more.
pub(crate) async fn complete<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> ttrpc::Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(ttrpc::Error::from),
        Err(error) => {
            Err(ApiError::new(Code::INTERNAL, format!("the call was not finished: {error}")).into())
        }
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let shim = self.shim.clone();
        let pid = complete(shim.create(request)).await?;
        Ok(CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let shim = self.shim.clone();
        let pid = complete(async move { start(&shim, &request.id, &request.exec_id).await }).await?;
        Ok(StartResponse { pid, ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let shim = self.shim.clone();
        complete(async move { exec(&shim, request).await }).await?;
        Ok(Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let shim = self.shim.clone();
        complete(async move { delete(&shim, &request.id, &request.exec_id).await }).await
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let shim = self.shim.clone();
        complete(async move { kill::kill(&shim, &request).await }).await?;
        Ok(Empty::new())
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let shim = self.shim.clone();
        complete(async move {
            let container = running(&shim, &request.id)?;
            let _guard = container.init.transition.lock().await;
            explain(&container.pod, container.pod.agent().pause(&request.id).await).await?;
            container.paused.store(true, Ordering::Relaxed);
            // Who pauses may do so to make an image of it.
            container.disks.tell_host_of_changes().await;
            shim.publisher
                .publish(Event::Paused(TaskPaused { container_id: request.id, ..Default::default() }));
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let shim = self.shim.clone();
        complete(async move {
            let container = running(&shim, &request.id)?;
            let _guard = container.init.transition.lock().await;
            explain(&container.pod, container.pod.agent().resume(&request.id).await).await?;
            container.paused.store(false, Ordering::Relaxed);
            shim.publisher
                .publish(Event::Resumed(TaskResumed { container_id: request.id, ..Default::default() }));
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let container = self.shim.container(&request.id)?;
        container.pod.check_alive()?;
        complete(async move { update(&container, &request.resources.value).await }).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let (container, process) = self.shim.process(&request.id, &request.exec_id)?;
        alive(&container, &process)?;
        let answer = container
            .pod
            .agent()
            .resize_pty(&request.id, &request.exec_id, request.width, request.height)
            .await;
        explain(&container.pod, answer).await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let (_, process) = self.shim.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let (_, process) = self.shim.process(&request.id, &request.exec_id)?;
        let exit = process.ended().await;
        Ok(WaitResponse { exit_status: exit.status, exited_at: timestamp(exit.at_ns), ..Default::default() })
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let (container, process) = self.shim.process(&request.id, &request.exec_id)?;
        let mut response = StateResponse {
            id: request.id,
            bundle: container.bundle.display().to_string(),
            pid: process.pid,
            stdin: process.stdio.stdin.clone(),
            stdout: process.stdio.stdout.clone(),
            stderr: process.stdio.stderr.clone(),
            terminal: process.stdio.terminal,
            exec_id: request.exec_id,
            ..Default::default()
        };
        let status = match process.state() {
            State::Created => Status::CREATED,
            State::Running if container.paused.load(Ordering::Relaxed) => Status::PAUSED,
            State::Running => Status::RUNNING,
            State::Stopped(exit) => {
                response.exit_status = exit.status;
                response.exited_at = timestamp(exit.at_ns);
                Status::STOPPED
            }
        };
        response.status = status.into();
        Ok(response)
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let container = self.shim.container(&request.id)?;
        let guest = match container.init.state() {
            State::Stopped(_) => Vec::new(),
            _ => container.pod.agent().pids(&request.id, PIDS_LIMIT).await.unwrap_or_else(|error| {
                log::warn!("container {}: no process ids: {error}", request.id);
                Vec::new()
            }),
        };
        // An empty list would make a containerd that comes back take the task for a leak, and its exit status with it.
        let pids = if guest.is_empty() { vec![container.init.pid] } else { guest };
        let processes = pids.into_iter().map(|pid| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.shim.container(&request.id)?;
        alive(&container, &container.init)?;
        let figures = explain(&container.pod, container.pod.agent().stats(&request.id).await).await?;
        let any = stats::convert(&figures).map_err(|error| {
            ApiError::new(Code::INTERNAL, format!("can't encode the statistics: {error}"))
        })?;
        Ok(StatsResponse { stats: MessageField::some(any), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        // Asked by a containerd that comes back, also about a container whose creation never finished.
        let task_pid =
            self.shim.container(&request.id).map(|container| container.init.pid).unwrap_or_default();
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(ApiError::new(Code::UNIMPLEMENTED, "checkpoints are not supported").into())
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let shim = self.shim.clone();
        complete(async move {
            // Asked after the deletion of each task: the pod goes with the last one only, and a sandbox not even
            // then. Unless it has to go now.
            if request.now {
                shim.end_now("containerd has ended it").await;
                shim.exit();
            } else if shim.release_if_empty().await {
                shim.exit();
            } else {
                log::debug!("shutdown asked for by {}: the pod is still there, ignored", request.id);
            }
            Ok(())
        })
        .await?;
        Ok(Empty::new())
    }
}

fn running(shim: &Shim, id: &str) -> Result<Arc<Container>, ApiError> {
    let container = shim.container(id)?;
    match container.init.state() {
        State::Running => Ok(container),
        State::Created => Err(ApiError::precondition(format!("the container {id:?} has not been started"))),
        State::Stopped(_) => Err(ended(&container)),
    }
}

fn alive(container: &Container, process: &Process) -> Result<(), ApiError> {
    match process.state() {
        State::Stopped(_) => Err(ended(container)),
        _ => Ok(()),
    }
}

/// For calls to a process that has ended; tells of the pod's death if that is why.
pub(crate) fn ended(container: &Container) -> ApiError {
    match container.pod.death() {
        Some(death) => ApiError::not_found(format!(
            "the process has ended with its pod's virtual machine: {}",
            death.reason
        )),
        None => ApiError::not_found(format!("the process of the container {:?} has ended", container.id)),
    }
}

async fn start(shim: &Shim, id: &str, exec_id: &str) -> Result<u32, ApiError> {
    let (container, process) = shim.process(id, exec_id)?;
    let _guard = process.transition.lock().await;
    if let Some(refusal) = process.refusal() {
        process.set_state(State::Stopped(Exit { status: NOT_STARTED, at_ns: now_ns() }));
        return Err(refusal.clone());
    }
    match process.state() {
        State::Created => {}
        State::Running => return Err(ApiError::precondition("the process has been started already")),
        State::Stopped(_) => return Err(ended(&container)),
    }
    if exec_id.is_empty() {
        container.pod.connect_late(&container.bundle, hooks::are_recorded(&container.bundle)).await?;
        names::start(&container.pod, &container.bundle).await;
    }
    explain(&container.pod, container.pod.agent().start(id, exec_id).await).await?;
    container.pod.timeline().stamp("start");
    container.pod.timeline().finish(id);
    process.set_state(State::Running);
    let pid = process.pid;
    if exec_id.is_empty() {
        hooks::started(&container.bundle, pid).await;
    }
    shim.publisher.publish(if exec_id.is_empty() {
        Event::Start(TaskStart { container_id: id.into(), pid, ..Default::default() })
    } else {
        Event::ExecStarted(TaskExecStarted {
            container_id: id.into(),
            exec_id: exec_id.into(),
            pid,
            ..Default::default()
        })
    });
    Ok(pid)
}

async fn update(container: &Container, json: &[u8]) -> Result<(), ApiError> {
    let resources = spec::read_resources(json)?;
    let limits = container.pod.limits();
    // Nobody is told of a limit that will never be reached.
    if let Some(words) = Demand::of_resources(&resources).beyond(limits.size()) {
        return Err(ApiError::precondition(format!("the container {:?} can't get {words}", container.id)));
    }
    let for_guest = spec::translate_resources(resources.clone(), &container.disks.places)?;
    explain(&container.pod, container.pod.agent().update(&container.id, for_guest).await).await?;
    limits.update(&container.id, &resources);
    container.pod.apply_limits();
    Ok(())
}

async fn exec(shim: &Shim, request: ExecProcessRequest) -> Result<(), ApiError> {
    id::check(&request.exec_id).map_err(|error| ApiError::invalid(error.to_string()))?;
    let container = running(shim, &request.id)?;
    let guest = spec::read_process(&request.spec.value)?;
    if container.execs().contains_key(&request.exec_id) {
        let message = format!("there is an exec {:?} already", request.exec_id);
        return Err(ApiError::new(Code::ALREADY_EXISTS, message));
    }
    let stdio = Stdio {
        stdin: request.stdin,
        stdout: request.stdout,
        stderr: request.stderr,
        terminal: request.terminal,
    };
    let host_stdio = HostStdio::open(&stdio, &shim.streams)?;
    let (streams, io) = host_stdio.connect(&container.pod, guest.console_size).await?;
    let message = agent_api::CreateExecRequest {
        container_id: request.id.clone(),
        exec_id: request.exec_id.clone(),
        process: guest.json,
        stdio: MessageField::some(streams),
        ..Default::default()
    };
    let pid = container.init.pid;
    let process = match explain(&container.pod, container.pod.agent().create_exec(&message).await).await {
        Ok(_) => Process::new(&request.exec_id, stdio, pid, io),
        // A program that does not exist, and whatever else is wrong with the process.
        Err(error) if matches!(error.code, Code::INVALID_ARGUMENT | Code::INTERNAL) => {
            Process::refused(&request.exec_id, stdio, pid, error)
        }
        Err(error) => return Err(error),
    };
    let process = Arc::new(process);
    container.execs().insert(request.exec_id.clone(), process.clone());
    shim.publisher.publish(Event::ExecAdded(TaskExecAdded {
        container_id: request.id,
        exec_id: request.exec_id,
        ..Default::default()
    }));
    if process.refusal().is_none() {
        shim.watch(&container, &process);
    }
    Ok(())
}

async fn delete(shim: &Arc<Shim>, id: &str, exec_id: &str) -> Result<DeleteResponse, ApiError> {
    let (container, process) = shim.process(id, exec_id)?;
    match process.state() {
        State::Running => return Err(ApiError::precondition("the process is running: kill it first")),
        State::Created if process.refusal().is_some() => {
            process.set_state(State::Stopped(Exit { status: NOT_STARTED, at_ns: now_ns() }));
        }
        State::Created => {
            // Whatever the guest says of it, it ends.
            if let Err(error) = kill::destroy(shim, &container, &process, exec_id.is_empty()).await {
                log::warn!("{id} {exec_id} was never started: {error}");
            }
        }
        State::Stopped(_) => {}
    }
    let exit = process.ended().await;
    if let Some(io) = process.take_io() {
        // What an exec leaves running ends with its container.
        let may_go_on = !exec_id.is_empty() && !matches!(container.init.state(), State::Stopped(_));
        io.finish(if may_go_on { BACKGROUND_IDLE } else { DRAIN_IDLE }).await;
    }
    if container.pod.death().is_none() {
        match container.pod.agent().delete(id, exec_id).await {
            // Gone is what it shall be.
            Ok(()) | Err(AgentError::Lost | AgentError::Refused { code: Code::NOT_FOUND, .. }) => {}
            Err(error) => log::warn!("the agent can't release {id} {exec_id}: {error}"),
        }
    }
    if !exec_id.is_empty() {
        container.execs().remove(exec_id);
    } else {
        // Held by one caller only: whoever takes it out of the list reports it.
        let removed = shim.containers().remove(id);
        if removed.is_some() {
            container.disks.detach(&container.pod).await;
            rootfs::remove(container.pod.tree(), id).await;
            if !shim.containers().is_empty() {
                container.pod.remove_claim(id);
            }
            shim.publisher.publish(Event::Delete(TaskDelete {
                container_id: id.into(),
                pid: process.pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at_ns),
                ..Default::default()
            }));
            shim.release_if_empty().await;
            hooks::finish(&container.bundle).await;
        }
    }
    Ok(DeleteResponse {
        pid: process.pid,
        exit_status: exit.status,
        exited_at: timestamp(exit.at_ns),
        ..Default::default()
    })
}
