//! A pod's life on the host: everything it holds is made, owned and released here.
//!
//! [`Pod::launch`] makes the pod's directory, shared tree and cgroup, starts the file server and the VMM and boots the
//! guest; [`Pod::configure`] waits for the agent. From then on the pod watches over its processes: when one of them
//! ends, the pod is dead, with a reason, and releases everything in reverse order. Releasing is idempotent. Nothing that
//! ends a pod depends on the guest: [`Pod::condemn`] asks nobody, and a guest that is silent is condemned ([`heartbeat`]).

pub(crate) mod agent;
pub(crate) mod boot;
pub(crate) mod clock;
pub(crate) mod disks;
mod end;
mod following;
pub(crate) mod forward;
pub(crate) mod guest;
pub(crate) mod heartbeat;
pub(crate) mod limits;
pub(crate) mod machine;
pub(crate) mod names;
mod namespace;
pub(crate) mod network;
pub(crate) mod resources;
pub(crate) mod slots;
pub mod state;
pub(crate) mod stream;
pub(crate) mod tail;
pub(crate) mod timeline;
pub(crate) mod tree;

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bulkhead_agent_protocol::forward::{LoopbackPort, QUESTION};
use bulkhead_agent_protocol::{ConfigureRequest, STDIO_PORT};
use bulkhead_vmm_protocol::Request;
use nix::sys::socket::SockType;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::Instant;

use self::agent::{Agent, Greeting};
use self::boot::{BootError, Booted};
pub(crate) use self::end::{DEATH_LIMIT, Death};
use self::guest::{FS_TAG, ROOTS_TAG};
use self::heartbeat::Heartbeat;
use self::limits::{Claim, PodLimits};
use self::machine::{Control, MachineError, socket_pair};
use self::network::{Network, NetworkError};
use self::resources::Resources;
use self::timeline::{Timeline, now_us};
use self::tree::SharedTree;
use crate::config::{Config, Containers};
use crate::error::{Classify, Code, chain};
use crate::host::cgroup::PodCgroup;
use crate::host::process::ProcessId;
use crate::spec;
use crate::template::Order;

/// From the start of the VMM until the agent answers.
const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// What a pod is made with.
#[derive(Debug)]
pub(crate) struct PodSpec {
    /// Id of the container that it is made for (the sandbox, in Kubernetes).
    pub id: String,
    /// The pod's directory: does not exist yet.
    pub directory: PathBuf,
    /// Sizes and places.
    pub config: Config,
    /// The pod's network namespace on the host, if it has one.
    pub network: Option<PathBuf>,
    /// Whether it gets one that comes and goes with its VMM, if it has none.
    pub own_network: bool,
    /// What it may use.
    pub limits: PodLimits,
    /// Cgroup on the host; `None` on hosts without cgroup version 2.
    pub cgroup: Option<PathBuf>,
    /// When the request for it arrived, on the clock of [`timeline::now_us`].
    pub received_us: u64,
}

/// A pod.
#[derive(Debug)]
pub(crate) struct Pod {
    id: String,
    network_namespace: Option<PathBuf>,
    tree: Arc<SharedTree>,
    agent: Agent,
    control: Arc<Control>,
    vmm: ProcessId,
    launched: Instant,
    timeline: Timeline,
    /// Whether the agent has ever answered: only then can it be asked to power the guest off.
    is_up: AtomicBool,
    /// A template that there should be for the next pod like this.
    wanted: Option<Order>,
    containers: Containers,
    next_stream: AtomicU64,
    slots: slots::Slots,
    limits: PodLimits,
    cgroup: Option<PodCgroup>,
    network: Option<Arc<Network>>,
    /// Whether interfaces come into its namespace only once the first container has been created.
    own_network: bool,
    resources: tokio::sync::Mutex<Resources>,
    /// Set by [`Pod::stop`]: from then on the end of the pod is no accident.
    stopping: watch::Sender<bool>,
    /// Set by [`Pod::condemn`]: why the pod is to end.
    condemned: watch::Sender<Option<String>>,
    death: watch::Sender<Option<Death>>,
}

/// Why there is no pod.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    /// It could not be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A process or the VMM's channel.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// It died.
    #[error("the pod's virtual machine has ended: {0}")]
    Dead(String),
    /// The agent did not come up.
    #[error("the agent in the guest did not answer within {} s of the start of the VMM; last console lines: {console}", BOOT_LIMIT.as_secs())]
    NoAgent {
        /// What the guest's console said.
        console: String,
    },
    /// The agent in a restored guest does not answer.
    #[error("the agent in the restored guest does not answer")]
    Restored(#[source] agent::AgentError),
    /// The agent refused its configuration.
    #[error("the agent refused its configuration")]
    Configure(#[source] agent::AgentError),
    /// The network does not get into it.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// No randomness for the guest.
    #[error("can't read random bytes for the guest")]
    Entropy(#[source] std::io::Error),
    /// A stream to the guest can't be set up.
    #[error("can't set up a stream to the guest")]
    Stream(#[source] std::io::Error),
}

impl Classify for PodError {
    fn code(&self) -> Code {
        match self {
            PodError::Boot(error) => error.code(),
            PodError::Machine(error) => error.code(),
            PodError::Dead(_) => Code::FAILED_PRECONDITION,
            PodError::NoAgent { .. } => Code::DEADLINE_EXCEEDED,
            PodError::Configure(error) | PodError::Restored(error) => error.code(),
            PodError::Network(error) => error.code(),
            PodError::Entropy(_) | PodError::Stream(_) => Code::INTERNAL,
        }
    }
}

impl Pod {
    /// Starts the pod's processes and boots the guest. Nothing is left behind when it fails.
    pub(crate) async fn launch(spec: PodSpec) -> Result<Arc<Pod>, PodError> {
        let mut resources = Resources::new(spec.directory.clone());
        let timeline = Timeline::new(spec.received_us);
        match boot::boot(&spec, &mut resources, &timeline).await {
            Ok(booted) => Ok(Pod::assemble(spec, booted, resources, timeline, Heartbeat::default())),
            Err(error) => {
                let explained = resources.explain(error);
                resources.release().await;
                Err(explained)
            }
        }
    }

    /// Takes charge of a guest that boots.
    fn assemble(
        spec: PodSpec,
        booted: Booted,
        resources: Resources,
        timeline: Timeline,
        heartbeat: Heartbeat,
    ) -> Arc<Pod> {
        let pod = Arc::new(Pod {
            id: spec.id,
            network_namespace: spec.network,
            tree: booted.tree,
            agent: booted.agent,
            control: booted.control,
            vmm: booted.vmm,
            launched: booted.launched,
            timeline,
            is_up: AtomicBool::new(booted.greeting.is_some()),
            wanted: booted.wanted,
            containers: spec.config.containers,
            next_stream: AtomicU64::new(1),
            slots: slots::Slots::default(),
            limits: spec.limits,
            cgroup: booted.cgroup,
            network: resources.network.clone(),
            own_network: spec.own_network,
            resources: tokio::sync::Mutex::new(resources),
            stopping: watch::Sender::new(false),
            condemned: watch::Sender::new(None),
            death: watch::Sender::new(None),
        });
        tokio::spawn(pod.clone().watch_over(booted.listening, heartbeat));
        pod
    }

    /// A pod whose guest is played by a test, at the other ends of `agent` and `channel`.
    #[cfg(test)]
    pub(crate) async fn with_guest(
        id: &str,
        directory: PathBuf,
        agent: UnixStream,
        channel: bulkhead_vmm_protocol::Channel,
        heartbeat: Heartbeat,
    ) -> Arc<Pod> {
        std::fs::create_dir(&directory).unwrap();
        let (control, listening) = Control::new(channel).unwrap();
        let booted = Booted {
            tree: Arc::new(SharedTree::create(&directory).await.unwrap()),
            agent: Agent::new(agent),
            control: Arc::new(control),
            listening,
            vmm: ProcessId::current().unwrap(),
            launched: Instant::now(),
            greeting: None,
            wanted: None,
            cgroup: None,
        };
        let config = Config::load(&crate::config::Source::Inline(String::new())).unwrap();
        let limits = PodLimits::new(config.size, &crate::sizing::Demand::default(), true);
        let spec = PodSpec {
            id: id.to_owned(),
            directory: directory.clone(),
            config,
            network: None,
            own_network: false,
            limits,
            cgroup: None,
            received_us: 0,
        };
        let resources = Resources::new(directory);
        let pod = Pod::assemble(spec, booted, resources, Timeline::new(now_us()), heartbeat);
        pod.is_up.store(true, Ordering::Relaxed);
        pod
    }

    /// Waits for the agent and makes the guest this pod's, with its network.
    pub(crate) async fn configure(&self, hostname: &str) -> Result<(), PodError> {
        if !self.is_up.load(Ordering::Relaxed) {
            let left = BOOT_LIMIT.saturating_sub(self.launched.elapsed());
            match self.while_alive(self.agent.ready(left)).await? {
                Ok(greeting) => {
                    self.is_up.store(true, Ordering::Relaxed);
                    let now = now_us();
                    let agent_us = greeting.ready_us.saturating_sub(greeting.started_us);
                    self.timeline.stamp_at("kernel", now.saturating_sub(agent_us));
                    self.timeline.stamp_at("agent", now);
                    log_ready("booted", self.launched, &greeting);
                }
                Err(agent::AgentError::TimedOut { .. }) => {
                    let console = self.resources.lock().await.console_tail();
                    return Err(PodError::NoAgent { console });
                }
                Err(error) => return Err(self.explain(error).await),
            }
        }
        // Only now: the wall clock must not be old when the guest gets it.
        let request = ConfigureRequest {
            hostname: hostname.into(),
            entropy: entropy()?,
            shared_tag: FS_TAG.into(),
            roots_tag: ROOTS_TAG.into(),
            parameters: guest::node_parameters(),
            realtime_ns: now_ns(),
            ..Default::default()
        };
        // The machine gets its interfaces meanwhile.
        let both = async { tokio::join!(self.agent.configure(&request), self.attach_interfaces()) };
        let (configured, attached) = self.while_alive(both).await?;
        match configured {
            Ok(()) => self.timeline.stamp("configure"),
            Err(error) => return Err(self.explain(error).await),
        }
        self.while_alive(self.introduce_interfaces(attached?, &HashMap::new())).await??;
        Ok(())
    }

    /// An answer of the agent, or the end of the pod.
    async fn while_alive<T>(&self, answer: impl Future<Output = T>) -> Result<T, PodError> {
        tokio::select! {
            // The VMM's own words about its end say more than the broken connection.
            biased;
            death = self.died() => Err(PodError::Dead(death.reason)),
            answer = answer => Ok(answer),
        }
    }

    async fn explain(&self, error: agent::AgentError) -> PodError {
        match error {
            agent::AgentError::Lost => match tokio::time::timeout(DEATH_LIMIT, self.died()).await {
                Ok(death) => PodError::Dead(death.reason),
                Err(_) => PodError::Configure(agent::AgentError::Lost),
            },
            error => PodError::Configure(error),
        }
    }

    /// The order for a template that would have served this pod, if there was none.
    pub(crate) fn template_wanted(&self) -> Option<&Order> {
        self.wanted.as_ref()
    }

    /// The pod's id: that of the container it was made for.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// The network namespace that somebody made for the pod on the host.
    pub(crate) fn network_namespace(&self) -> Option<&Path> {
        self.network_namespace.as_deref()
    }

    /// The guest's agent.
    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// Its cgroup on the host, with all that is of it there.
    pub(crate) fn cgroup(&self) -> Option<&Path> {
        self.cgroup.as_ref().map(PodCgroup::path)
    }

    /// The tree that the guest shares with the host.
    pub(crate) fn tree(&self) -> &SharedTree {
        &self.tree
    }

    /// What it may use.
    pub(crate) fn limits(&self) -> &PodLimits {
        &self.limits
    }

    /// Looks for interfaces that came after the pod was made, which it would not have been told of: by a hook, or by Docker. The
    /// parameters that the container in `bundle` asks for have been set already, and stay.
    pub(crate) async fn connect_late(&self, bundle: &Path, had_hooks: bool) -> Result<(), PodError> {
        if !self.own_network && !had_hooks {
            return Ok(());
        }
        let spec = spec::read(bundle).ok();
        let chosen =
            spec.as_ref().and_then(|spec| spec.linux().as_ref()).and_then(|linux| linux.sysctl().clone());
        self.while_alive(self.connect_network(&chosen.unwrap_or_default())).await?.map_err(PodError::from)
    }

    /// Whether the pod's network namespace is one that its VMM brought along, for Docker to find.
    pub(crate) fn has_own_network(&self) -> bool {
        self.own_network
    }

    /// Counts a container in that the pod was not made with.
    pub(crate) fn add_claim(&self, id: &str, claim: Claim) {
        self.limits.add(id, claim);
        self.apply_limits();
    }

    /// Counts a container out that the pod outlives.
    pub(crate) fn remove_claim(&self, id: &str) {
        self.limits.remove(id);
        self.apply_limits();
    }

    /// Has the host follow the limits still, whatever others have done to its control groups.
    pub(crate) fn keep_limits(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.keep(|| self.limits.limits());
        }
    }

    /// Has the host follow the limits after a change.
    pub(crate) fn apply_limits(&self) {
        if let Some(cgroup) = &self.cgroup {
            cgroup.limit(&self.limits.limits());
        }
    }

    /// The moments of its start.
    pub(crate) fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// The process that containerd is told as the pid of the first task: it lives as long as the pod, and so its number
    /// can't be mistaken for another process of the host.
    pub(crate) fn host_pid(&self) -> u32 {
        self.vmm.pid.unsigned_abs()
    }

    /// What containerd is told as the pid of a further task: a thread of the pod's processes, which live as long. A
    /// container that is to share another one's processes names that one by its pid, so it is one that is not among
    /// `taken` as long as there are any.
    pub(crate) async fn task_pid(&self, taken: &[u32]) -> u32 {
        let file_server = self.resources.lock().await.fs_server.as_ref().map(|process| process.child.id);
        let processes = [Some(self.vmm), file_server];
        let threads = processes.into_iter().flatten().flat_map(|process| process.threads());
        let mut free = threads.filter(|thread| *thread != self.host_pid() && !taken.contains(thread));
        free.next().unwrap_or_else(|| self.host_pid())
    }

    /// What holds for each of its containers.
    pub(crate) fn containers(&self) -> Containers {
        self.containers
    }

    /// Opens a new stdio stream into the guest; gives its number and the shim's end.
    pub(crate) async fn open_stream(&self) -> Result<(u64, UnixStream), PodError> {
        let number = self.next_stream.fetch_add(1, Ordering::Relaxed);
        Ok((number, self.open_numbered(number).await?))
    }

    /// Opens a new stream to a TCP port of the guest; what it then says is in [`bulkhead_agent_protocol::forward`].
    pub(crate) async fn open_port(&self, port: LoopbackPort) -> Result<UnixStream, PodError> {
        self.open_numbered(port.to_number()).await
    }

    /// Opens the stream for names; what goes over it is in [`bulkhead_agent_protocol::names`].
    async fn open_names(&self) -> Result<UnixStream, PodError> {
        self.open_numbered(bulkhead_agent_protocol::names::STREAM).await
    }

    /// Asks the guest a question of the operator's; what it answers is the guest's, and cut at `limit` bytes.
    pub(crate) async fn ask(&self, question: &str, limit: u64) -> Result<Vec<u8>, PodError> {
        let mut stream = self.open_numbered(QUESTION).await?;
        stream.write_all(format!("{question}\n").as_bytes()).await.map_err(PodError::Stream)?;
        let mut answer = Vec::new();
        stream.take(limit).read_to_end(&mut answer).await.map_err(PodError::Stream)?;
        Ok(answer)
    }

    /// The last lines of the guest's console and of the pod's processes, as far as they are kept, for a person.
    pub(crate) async fn last_words(&self) -> String {
        self.resources.lock().await.last_words()
    }

    async fn open_numbered(&self, number: u64) -> Result<UnixStream, PodError> {
        let (ours, theirs) = socket_pair(SockType::Stream)?;
        let connect = Request::ConnectVsock { port: STDIO_PORT };
        self.control.request("ConnectVsock", &connect, &[theirs.as_fd()]).await?;
        let mut stream = from_owned(ours).map_err(PodError::Stream)?;
        // Eight bytes fit into the empty socket: this does not wait for the guest.
        stream.write_all(&number.to_le_bytes()).await.map_err(PodError::Stream)?;
        Ok(stream)
    }
}

/// A connected socket for the runtime around us.
pub(crate) fn from_owned(fd: OwnedFd) -> std::io::Result<UnixStream> {
    let stream = StdUnixStream::from(fd);
    stream.set_nonblocking(true)?;
    UnixStream::from_std(stream)
}

/// Fresh random bytes for a guest.
fn entropy() -> Result<Vec<u8>, PodError> {
    let mut entropy = vec![0; 64];
    // SAFETY: the buffer is valid for its length. 64 bytes are read at once or not at all (getrandom(2)).
    let read = unsafe { libc::getrandom(entropy.as_mut_ptr().cast(), entropy.len(), 0) };
    if read != entropy.len() as isize {
        return Err(PodError::Entropy(std::io::Error::last_os_error()));
    }
    Ok(entropy)
}

fn log_ready(how: &str, launched: Instant, greeting: &Greeting) {
    log::info!(
        "agent ready, {how}: {} us after the start of the VMM, {} us of guest time, agent {}, guest kernel {}",
        launched.elapsed().as_micros(),
        greeting.now_us,
        greeting.version,
        greeting.kernel,
    );
}

/// The wall clock, nanoseconds since the Unix epoch.
pub(crate) fn now_ns() -> i64 {
    let since_epoch = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_nanos()).unwrap_or(i64::MAX)
}

/// Logs an error that can't be acted upon.
fn log_failure(what: &str, result: Result<(), impl std::error::Error>) {
    if let Err(error) = result {
        log::error!("{what}: {}", chain(&error));
    }
}
