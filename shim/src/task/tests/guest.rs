//! A guest played by the test: the agent's API on a socket pair, and a VMM's end of a control socket.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bulkhead_agent_protocol as api;
use bulkhead_agent_protocol::{Agent, create_agent};
use bulkhead_vmm_protocol::{Channel, Event, ExitReason, FromVmm, Packet, Request};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{Server, TtrpcContext};

use crate::pod::Pod;
use crate::pod::heartbeat::Heartbeat;

/// What the agent does, as far as a test wants it to be special.
#[derive(Default)]
struct Script {
    /// Exit statuses by "container exec".
    exits: watch::Sender<HashMap<String, u32>>,
    /// Whether what ends was killed for want of memory.
    oom_killed: AtomicBool,
    calls: Mutex<Vec<(&'static str, String)>>,
    delays: Mutex<HashMap<&'static str, Duration>>,
    refusals: Mutex<HashMap<&'static str, (ttrpc::Code, String)>>,
    /// From when on nothing is answered any more.
    silent: watch::Sender<bool>,
    /// Whether signals end nothing.
    lies: AtomicBool,
    oom: watch::Sender<Vec<String>>,
}

impl Script {
    async fn call(&self, name: &'static str, what: String) -> ttrpc::Result<()> {
        self.calls.lock().unwrap().push((name, what));
        if *self.silent.borrow() {
            std::future::pending::<()>().await;
        }
        let delay = self.delays.lock().unwrap().get(name).copied();
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        match self.refusals.lock().unwrap().remove(name) {
            Some((code, message)) => Err(ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))),
            None => Ok(()),
        }
    }

    fn exit(&self, container: &str, exec: &str, status: u32) {
        self.exits.send_modify(|exits| {
            exits.insert(format!("{container} {exec}"), status);
        });
    }
}

struct FakeAgent(Arc<Script>, Arc<Channel>);

#[async_trait]
impl Agent for FakeAgent {
    async fn configure(&self, _: &TtrpcContext, request: api::ConfigureRequest) -> ttrpc::Result<api::Empty> {
        self.0.call("Configure", request.hostname).await?;
        Ok(api::Empty::new())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> ttrpc::Result<api::CreateProcessResponse> {
        let spec: serde_json::Value = serde_json::from_slice(&request.spec).unwrap();
        self.0.call("Root", spec["root"]["path"].as_str().unwrap_or_default().to_owned()).await?;
        let mounts = spec["mounts"].as_array().cloned().unwrap_or_default();
        let mounts = mounts.iter().filter_map(|mount| mount["destination"].as_str());
        let namespaces = spec["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
        let pid = namespaces.iter().find(|namespace| namespace["type"] == "pid");
        let pid = pid.and_then(|namespace| namespace["path"].as_str()).unwrap_or_default();
        self.0.call("PidNamespace", pid.to_owned()).await?;
        self.0.call("Mounts", mounts.collect::<Vec<_>>().join(" ")).await?;
        self.0.call("CreateContainer", request.container_id).await?;
        Ok(api::CreateProcessResponse { pid: 42, ..Default::default() })
    }

    async fn add_disk(
        &self,
        _: &TtrpcContext,
        request: api::AddDiskRequest,
    ) -> ttrpc::Result<api::AddDiskResponse> {
        let what = format!("{} {} {}", request.slot, request.file_system, request.options.join(","));
        self.0.call("AddDisk", what).await?;
        Ok(api::AddDiskResponse { major: 254, minor: 16, ..Default::default() })
    }

    async fn remove_disk(&self, _: &TtrpcContext, request: api::DiskRequest) -> ttrpc::Result<api::Empty> {
        self.0.call("RemoveDisk", request.slot.to_string()).await?;
        Ok(api::Empty::new())
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: api::CreateExecRequest,
    ) -> ttrpc::Result<api::CreateProcessResponse> {
        self.0.call("CreateExec", request.exec_id).await?;
        Ok(api::CreateProcessResponse::new())
    }

    async fn start(&self, _: &TtrpcContext, request: api::ProcessRequest) -> ttrpc::Result<api::Empty> {
        self.0.call("Start", request.container_id).await?;
        Ok(api::Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::ProcessRequest) -> ttrpc::Result<api::WaitResponse> {
        let key = format!("{} {}", request.container_id, request.exec_id);
        let mut exits = self.0.exits.subscribe();
        loop {
            let status = exits.borrow_and_update().get(&key).copied();
            if let Some(exit_status) = status {
                let oom_killed = self.0.oom_killed.load(Ordering::Relaxed);
                return Ok(api::WaitResponse {
                    exit_status,
                    exited_at_ns: 1,
                    oom_killed,
                    ..Default::default()
                });
            }
            exits.changed().await.unwrap();
        }
    }

    async fn signal(&self, _: &TtrpcContext, request: api::SignalRequest) -> ttrpc::Result<api::Empty> {
        let all = if request.all { " all" } else { "" };
        let what = format!("{} {} {}{all}", request.container_id, request.exec_id, request.signal);
        self.0.call("Signal", what).await?;
        if !self.0.lies.load(Ordering::Relaxed) {
            self.0.exit(&request.container_id, &request.exec_id, 128 + request.signal);
        }
        Ok(api::Empty::new())
    }

    async fn delete(&self, _: &TtrpcContext, request: api::ProcessRequest) -> ttrpc::Result<api::Empty> {
        self.0.call("Delete", format!("{} {}", request.container_id, request.exec_id)).await?;
        Ok(api::Empty::new())
    }

    async fn ready(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::ReadyResponse> {
        self.0.call("Ready", String::new()).await?;
        Ok(api::ReadyResponse::new())
    }

    async fn pause(&self, _: &TtrpcContext, _: api::ContainerRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, _: api::ContainerRequest) -> ttrpc::Result<api::Empty> {
        Ok(api::Empty::new())
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> ttrpc::Result<api::PidsResponse> {
        self.0.call("Pids", request.container_id).await?;
        Ok(api::PidsResponse { pids: vec![42], ..Default::default() })
    }

    async fn power_off(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::Empty> {
        self.0.call("PowerOff", String::new()).await?;
        self.1.send(&FromVmm::Event(Event::Exited(ExitReason::PowerOff)), &[]).unwrap();
        Ok(api::Empty::new())
    }

    async fn next_event(&self, _: &TtrpcContext, _: api::Empty) -> ttrpc::Result<api::AgentEvent> {
        let mut oom = self.0.oom.subscribe();
        loop {
            let next = {
                let ids = oom.borrow_and_update();
                let calls = self.0.calls.lock().unwrap().len();
                ids.get(calls % ids.len().max(1)).cloned()
            };
            if let Some(id) = next {
                self.0.calls.lock().unwrap().push(("NextEvent", id.clone()));
                let mut event = api::AgentEvent::new();
                event.set_oom(id);
                return Ok(event);
            }
            oom.changed().await.unwrap();
        }
    }
}

/// The guest's side of a pod.
pub(crate) struct Guest {
    script: Arc<Script>,
    vmm: Arc<Channel>,
    streams: Arc<Mutex<Vec<OwnedFd>>>,
    hang_up: watch::Sender<bool>,
}

impl Guest {
    pub(crate) async fn start(id: &str, directory: PathBuf, heartbeat: Heartbeat) -> (Guest, Arc<Pod>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (channel, vmm) = Channel::pair().unwrap();
        let script = Arc::new(Script::default());

        let hang_up = watch::Sender::new(false);
        let mut hung_up = hang_up.subscribe();
        let vmm = Arc::new(vmm);
        let agent = FakeAgent(script.clone(), vmm.clone());
        tokio::spawn(async move {
            let listener = Listener::new(Once(Some(theirs)));
            let mut server =
                Server::new().add_listener(listener).register_service(create_agent(Arc::new(agent)));
            server.start().await.unwrap();
            hung_up.wait_for(|hung_up| *hung_up).await.unwrap();
            server.disconnect().await;
        });

        let streams: Arc<Mutex<Vec<OwnedFd>>> = Arc::default();
        let (serving, connected, asked) = (vmm.clone(), streams.clone(), script.clone());
        std::thread::spawn(move || {
            let note = |name, what: String| asked.calls.lock().unwrap().push((name, what));
            while let Ok(Packet { message, mut fds }) = serving.receive() {
                match message {
                    Request::ConnectVsock { .. } => connected.lock().unwrap().append(&mut fds),
                    Request::AttachDisk(disk) => {
                        note("AttachDisk", format!("{} {} {}", disk.slot, disk.read_only, fds.len()));
                    }
                    Request::DetachDevice { slot } => note("DetachDevice", slot.to_string()),
                    _ => return,
                }
                serving.send(&FromVmm::Reply(Ok(())), &[]).unwrap();
            }
        });
        let pod = Pod::with_guest(id, directory, ours, channel, heartbeat).await;
        (Guest { script, vmm, streams, hang_up }, pod)
    }

    /// A process ends, and with it the streams of all.
    pub(crate) fn exit(&self, container: &str, exec: &str, status: u32) {
        self.streams.lock().unwrap().clear();
        self.script.exit(container, exec, status);
    }

    /// A process ends because there is no memory left.
    pub(crate) fn exit_without_memory(&self, container: &str) {
        self.script.oom_killed.store(true, Ordering::Relaxed);
        self.exit(container, "", 137);
    }

    /// What calls of this name were about.
    pub(crate) fn calls(&self, name: &str) -> Vec<String> {
        let calls = self.script.calls.lock().unwrap();
        calls.iter().filter(|(called, _)| *called == name).map(|(_, what)| what.clone()).collect()
    }

    /// The names of the calls among these, in the order in which they came.
    pub(crate) fn order(&self, names: &[&str]) -> Vec<&'static str> {
        let calls = self.script.calls.lock().unwrap();
        calls.iter().map(|(called, _)| *called).filter(|called| names.contains(called)).collect()
    }

    /// Answers calls of this name later.
    pub(crate) fn delay(&self, name: &'static str, delay: Duration) {
        self.script.delays.lock().unwrap().insert(name, delay);
    }

    /// Refuses the next call of this name.
    pub(crate) fn refuse(&self, name: &'static str, code: ttrpc::Code, message: &str) {
        self.script.refusals.lock().unwrap().insert(name, (code, message.to_owned()));
    }

    /// The agent keeps its connection and answers nothing any more.
    pub(crate) fn fall_silent(&self) {
        self.script.silent.send_replace(true);
    }

    /// The agent answers signals as if it had sent them.
    pub(crate) fn lie(&self) {
        self.script.lies.store(true, Ordering::Relaxed);
    }

    /// The virtual machine ends.
    pub(crate) fn end(&self, reason: ExitReason) {
        self.streams.lock().unwrap().clear();
        self.vmm.send(&FromVmm::Event(Event::Exited(reason)), &[]).unwrap();
    }

    /// The agent closes its connection.
    pub(crate) fn hang_up(&self) {
        self.hang_up.send_replace(true);
    }

    /// Writes to the first stdio stream without end.
    pub(crate) fn write_endlessly(&self) -> JoinHandle<()> {
        let stream = std::os::unix::net::UnixStream::from(self.streams.lock().unwrap().remove(0));
        stream.set_nonblocking(true).unwrap();
        let mut stream = UnixStream::from_std(stream).unwrap();
        tokio::spawn(async move { while stream.write_all(&[b'x'; 4096]).await.is_ok() {} })
    }

    /// Reports processes killed for want of memory, as fast as it is asked, in these containers.
    pub(crate) fn flood_with_oom(&self, containers: &[&str]) {
        self.script.oom.send_replace(containers.iter().map(|&id| id.to_owned()).collect());
    }
}

/// A stream of one connection that never ends.
struct Once(Option<UnixStream>);

impl futures_core::Stream for Once {
    type Item = std::io::Result<UnixStream>;

    fn poll_next(
        mut self: std::pin::Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Self::Item>> {
        match self.0.take() {
            Some(stream) => std::task::Poll::Ready(Some(Ok(stream))),
            None => std::task::Poll::Pending,
        }
    }
}
