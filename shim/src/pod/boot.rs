//! Starting a pod's guest, from a template if there is one: every resource is made here and handed to the VMM as a
//! descriptor.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_vmm_protocol::{Channel, Refusal, RefusalKind};
use log::Level;
use nix::sys::socket::SockType;
use tokio::time::Instant;

use super::agent::{Agent, AgentError, Greeting};
use super::guest::{self, Backends, CONSOLE_KEPT, FileError, Files, Start};
use super::machine::{
    Control, ControlListener, JailNetwork, Jailed, MachineError, identity_args, socket_pair,
};
use super::namespace::TREE;
use super::network::Network;
use super::resources::Resources;
use super::state::StateError;
use super::tail::Tail;
use super::timeline::Timeline;
use super::tree::{SharedTree, TreeError};
use super::{PodError, PodSpec};
use crate::config::Templates;
use crate::error::{Classify, Code, chain};
use crate::host::cgroup::{self, CgroupError, Limits, PodCgroup};
use crate::host::core_scheduling;
use crate::host::process::{Ended, ProcessId};
use crate::host::spawn::check_program;
use crate::net::NetError;
use crate::template::{Found, Order, Recipe, Store, Template};

/// A restored agent is there already: it answers within this time, or something is wrong with the template.
const RESTORE_LIMIT: Duration = Duration::from_secs(5);

/// What a pod consists of once its guest runs.
#[derive(Debug)]
pub(crate) struct Booted {
    pub(super) tree: Arc<SharedTree>,
    pub(super) agent: Agent,
    pub(super) control: Arc<Control>,
    pub(super) listening: ControlListener,
    pub(super) vmm: ProcessId,
    /// When the VMM was started.
    pub(super) launched: Instant,
    /// The agent's first answer, if it has been waited for: from a template.
    pub(super) greeting: Option<Greeting>,
    /// A template that there should be for the next pod like this.
    pub(super) wanted: Option<Order>,
    /// Its cgroup on the host.
    pub(super) cgroup: Option<PodCgroup>,
}

/// Why a guest could not be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A directory that must be new or writable.
    #[error("can't create the pod's directory {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The record for `delete`.
    #[error("can't record what the pod holds")]
    State(#[from] StateError),
    /// The shared tree.
    #[error("can't make the pod's shared tree")]
    Tree(#[from] TreeError),
    /// The cgroup.
    #[error("can't make the pod's cgroup")]
    Cgroup(#[from] CgroupError),
    /// The network namespace.
    #[error(transparent)]
    Network(#[from] NetError),
    /// A file that every guest needs.
    #[error(transparent)]
    File(#[from] FileError),
    /// The VMM can't use what it was given.
    #[error("the {what} {path} can't be used")]
    Refused {
        /// What it was.
        what: &'static str,
        /// Where it comes from.
        path: PathBuf,
        /// The VMM's words.
        #[source]
        source: Refusal,
    },
    /// A pipe for the console.
    #[error("can't set up the guest's console")]
    Console(#[source] io::Error),
}

impl Classify for BootError {
    fn code(&self) -> Code {
        match self {
            BootError::File(error) => error.code(),
            BootError::Network(error) => error.code(),
            BootError::Refused { .. } | BootError::Cgroup(CgroupError::Occupied(_)) => {
                Code::FAILED_PRECONDITION
            }
            _ => Code::INTERNAL,
        }
    }
}

/// Makes everything of the pod that is not a container. What was made is in `resources`, however this ends.
pub(super) async fn boot(
    spec: &PodSpec,
    resources: &mut Resources,
    timeline: &Timeline,
) -> Result<Booted, PodError> {
    // Before anything exists: what fails here is what users get wrong.
    let order = Order::of(&spec.config);
    let files = Files::open(&order.recipe).map_err(BootError::from)?;
    for program in [&spec.config.vmm, &spec.config.fs_server] {
        check_program(program).map_err(MachineError::from)?;
    }

    let network = spec.network.as_deref().map(|path| Network::open(path, &spec.config)).transpose();
    let network = network.map_err(BootError::from)?.map(Arc::new);
    let held = network.clone();
    let place = match &held {
        Some(network) => JailNetwork::Pods(network.fd()),
        None if spec.own_network => JailNetwork::Own,
        None => JailNetwork::Empty,
    };

    fs::create_dir(&spec.directory)
        .map_err(|source| BootError::Directory { path: spec.directory.clone(), source })?;
    resources
        .record(|state| {
            state.shim = ProcessId::current().ok();
            state.network = network.as_ref().map(|network| network.record().clone());
        })
        .map_err(BootError::from)?;

    let cgroup = match &spec.cgroup {
        Some(path) => Some(make_cgroup(path, &spec.limits.limits(), resources)?),
        None => None,
    };
    let vmm = Vmm {
        recipe: &order.recipe,
        files: &files,
        cgroup: cgroup.as_ref().map(AsFd::as_fd),
        network: place,
    };
    let (template, wanted) = match spec.config.templates {
        Templates::Auto => look_up(order.store(), &order),
        Templates::Off => (None, None),
    };
    let start = template.as_ref().map_or(Start::Cold, |(_, template)| Start::Template(template));
    // First of all: the host's kernel takes its time with the machine, in which the rest can be done.
    let prepared = vmm.prepare(start, resources)?;
    let cores = spec.config.core_scheduling && separate(prepared.vmm);
    if let Some(network) = network {
        network.begin();
        resources.network = Some(network);
    }
    adopt_network(spec, prepared.vmm, resources);
    timeline.stamp("prepare");

    let tree = Arc::new(SharedTree::create(&spec.directory).await.map_err(BootError::from)?);
    resources.tree = Some(tree.clone());

    let (fuse_server, fuse_vmm) = socket_pair(SockType::SeqPacket)?;
    let (roots_server, roots_vmm) = socket_pair(SockType::SeqPacket)?;
    let mounts = Some((tree.namespace(), TREE));
    let fs_server = Jailed::start(
        &spec.config.fs_server,
        &[],
        "file server",
        &[fuse_server.as_fd(), roots_server.as_fd()],
        vmm.cgroup,
        mounts,
        JailNetwork::Empty,
    )?;
    drop((fuse_server, roots_server));
    let id = fs_server.id();
    resources.fs_server = Some(Arc::new(fs_server));
    resources.record(|state| state.fs_server = Some(id)).map_err(BootError::from)?;
    if cores {
        share(prepared.vmm, id);
    }

    let (console_reader, console_writer) = io::pipe().map_err(BootError::Console)?;
    let console = Tail::start(console_reader.into(), CONSOLE_KEPT, "guest console", Level::Debug);
    resources.console = Some(console.map_err(BootError::Console)?);

    let ends = Ends { console: console_writer.as_fd(), fuse: [fuse_vmm.as_fd(), roots_vmm.as_fd()] };
    timeline.stamp("shim");
    let Some((store, template)) = template else {
        let running = vmm.boot(prepared, ends, timeline).await?;
        return Ok(running.with(tree, wanted, cgroup));
    };
    match vmm.restore(prepared, ends, &template, timeline).await {
        Ok(running) => {
            store.trust(&template.key);
            Ok(running.with(tree, wanted, cgroup))
        }
        Err(error) => {
            give_up(&store, &template, error, resources).await;
            let prepared = vmm.prepare(Start::Cold, resources)?;
            adopt_network(spec, prepared.vmm, resources);
            if cores && separate(prepared.vmm) {
                share(prepared.vmm, id);
            }
            let running = vmm.boot(prepared, ends, timeline).await?;
            Ok(running.with(tree, wanted, cgroup))
        }
    }
}

/// Keeps what is not of the pod off the other threads of a core that its VMM runs on, before it has a guest. Tells whether it does.
fn separate(vmm: ProcessId) -> bool {
    core_scheduling::separate(vmm).unwrap_or_else(|errno| {
        log::warn!("others can run beside the pod on a core's threads (core_scheduling): {errno}");
        false
    })
}

/// The file server may run beside the pod's VMM.
fn share(vmm: ProcessId, fs_server: ProcessId) {
    if let Err(errno) = core_scheduling::share(vmm, fs_server) {
        log::warn!("the file server is not scheduled with the pod's VMM (core_scheduling): {errno}");
    }
}

/// Takes charge of the network namespace that a VMM was born with. Nobody has put anything into it yet.
fn adopt_network(spec: &PodSpec, vmm: ProcessId, resources: &mut Resources) {
    if !spec.own_network {
        return;
    }
    let path = format!("/proc/{}/ns/net", vmm.pid);
    match Network::open(Path::new(&path), &spec.config) {
        Ok(network) => resources.network = Some(Arc::new(network)),
        // A VMM that has ended has none, and what it said on that occasion says more.
        Err(error) => log::debug!("the pod has no network namespace of its own: {}", chain(&error)),
    }
}

/// Makes the pod's cgroup, with a record before anything of it exists.
fn make_cgroup(path: &Path, limits: &Limits, resources: &mut Resources) -> Result<PodCgroup, BootError> {
    // Whoever has it must not hear of us: what is recorded is killed at the end.
    cgroup::check_free(path)?;
    let parents = cgroup::missing_parents(path);
    resources.record(|state| {
        state.cgroup = Some(path.to_owned());
        state.cgroup_parents = parents;
    })?;
    let made = PodCgroup::create(path, limits);
    if let Err(CgroupError::Occupied(_)) = &made {
        // Taken meanwhile.
        resources.record(|state| state.cgroup = None)?;
    }
    Ok(made?)
}

/// The VMM knows descriptors only; people know files.
fn name_refused(error: PodError, recipe: &Recipe) -> PodError {
    let PodError::Machine(MachineError::Refused(source)) = error else { return error };
    let (what, path) = match source.kind {
        RefusalKind::Kernel => ("guest kernel", &recipe.kernel),
        RefusalKind::Disk => ("guest image", &recipe.image),
        RefusalKind::Kvm => ("KVM device", &recipe.kvm),
        RefusalKind::InvalidRequest | RefusalKind::Resources | RefusalKind::Template => {
            return MachineError::Refused(source).into();
        }
    };
    BootError::Refused { what, path: path.clone(), source }.into()
}

/// The template for a pod, or else the order for one. Nothing that is wrong here fails the pod.
fn look_up(store: Store, order: &Order) -> (Option<(Store, Template)>, Option<Order>) {
    match store.find(&order.recipe) {
        Ok(Found::Usable(template)) => {
            // Its maker was killed before the end, which is still to be made.
            let wanted = template.working_set.is_none().then(|| order.clone());
            (Some((store, template)), wanted)
        }
        Ok(Found::Missing) => (None, Some(order.clone())),
        Ok(Found::Damaged(reason)) => {
            log::warn!("the pod boots, because its template was damaged and has been removed: {reason}");
            (None, Some(order.clone()))
        }
        Ok(Found::Refused(reason)) => {
            log::warn!(
                "the pod boots, because its template can't be restored on this host (make it again with bulkhead \
                 template build): {reason}"
            );
            (None, None)
        }
        Err(error) => {
            log::warn!("the pod boots, because templates can't be used: {}", chain(&error));
            (None, None)
        }
    }
}

/// Ends what came of a template that did not work, and sees to it that the next pod does not fall into the same trap.
async fn give_up(store: &Store, template: &Template, error: PodError, resources: &mut Resources) {
    let error = resources.explain(error);
    let ended = resources.end_vmm().await;
    let kept = match &error {
        PodError::Machine(MachineError::Refused(refusal))
            if matches!(refusal.kind, RefusalKind::Resources | RefusalKind::InvalidRequest) =>
        {
            Ok(())
        }
        // The same would come of the same template made again.
        PodError::Machine(MachineError::Refused(_)) => store.refuse(&template.key, &chain(&error)),
        // Somebody killed it, or the kernel did for want of memory in the pod's cgroup: no reason to take it from all others.
        PodError::Dead(_) | PodError::Restored(_) if ended == Some(Ended::Signal(libc::SIGKILL)) => Ok(()),
        // One guest may be slow, or the whole node.
        PodError::Restored(AgentError::TimedOut { .. })
        | PodError::Machine(MachineError::TimedOut { .. }) => store.doubt(&template.key),
        PodError::Dead(_) | PodError::Restored(_) => store.remove(&template.key),
        // The host's own trouble.
        _ => Ok(()),
    };
    log::warn!(
        "the pod boots, because the template {} can't be restored: {}",
        template.key.short(),
        chain(&error)
    );
    super::log_failure("the template stays", kept);
}

/// What a pod's VMM is started with.
struct Vmm<'a> {
    recipe: &'a Recipe,
    files: &'a Files,
    cgroup: Option<BorrowedFd<'a>>,
    network: JailNetwork<'a>,
}

/// The host's ends of the guest's devices, but for the agent's stream.
#[derive(Clone, Copy)]
struct Ends<'a> {
    console: BorrowedFd<'a>,
    fuse: [BorrowedFd<'a>; 2],
}

/// A VMM that gets ready for a machine.
struct Prepared {
    control: Control,
    listening: ControlListener,
    vmm: ProcessId,
    launched: Instant,
}

/// A machine that runs.
struct Running {
    agent: Agent,
    prepared: Prepared,
    greeting: Option<Greeting>,
}

impl Vmm<'_> {
    /// Starts a VMM, which gets ready on its own.
    fn prepare(&self, start: Start<'_>, resources: &mut Resources) -> Result<Prepared, PodError> {
        let launched = Instant::now();
        let (channel, vmm_channel) = Channel::pair().map_err(MachineError::Channel)?;
        let vmm = Jailed::start(
            &self.recipe.vmm,
            &identity_args(),
            "VMM",
            &[vmm_channel.as_fd()],
            self.cgroup,
            None,
            self.network,
        )?;
        drop(vmm_channel);
        let id = vmm.id();
        resources.vmm = Some(Arc::new(vmm));
        resources.record(|state| state.vmm = Some(id)).map_err(BootError::from)?;
        let (control, listening) = Control::new(channel)?;
        guest::prepare(&control, self.recipe, self.files, start)?;
        Ok(Prepared { control, listening, vmm: id, launched })
    }

    /// Has a guest boot.
    async fn boot(
        &self,
        prepared: Prepared,
        ends: Ends<'_>,
        timeline: &Timeline,
    ) -> Result<Running, PodError> {
        let running = self.run(prepared, ends, Start::Cold, timeline).await;
        let running = running.map_err(|error| name_refused(error, self.recipe))?;
        timeline.stamp("vmm");
        Ok(running)
    }

    /// Restores a guest, up to the agent's first answer: if that does not come, there is still time to boot.
    async fn restore(
        &self,
        prepared: Prepared,
        ends: Ends<'_>,
        template: &Template,
        timeline: &Timeline,
    ) -> Result<Running, PodError> {
        let mut running = self.run(prepared, ends, Start::Template(template), timeline).await?;
        timeline.stamp("restore");
        let greeting = guest::greet(
            &running.prepared.control,
            &running.agent,
            &mut running.prepared.listening,
            RESTORE_LIMIT,
        )
        .await?;
        let greeting = greeting.map_err(PodError::Restored)?;
        timeline.stamp("agent");
        super::log_ready("restored", running.prepared.launched, &greeting);
        running.greeting = Some(greeting);
        Ok(running)
    }

    async fn run(
        &self,
        prepared: Prepared,
        ends: Ends<'_>,
        start: Start<'_>,
        timeline: &Timeline,
    ) -> Result<Running, PodError> {
        let Prepared { control, mut listening, vmm, launched } = prepared;
        let (agent_ours, agent_vmm) = socket_pair(SockType::Stream)?;
        let agent = Agent::new(super::from_owned(agent_ours).map_err(PodError::Stream)?);
        guest::prepared(&control, &mut listening).await?;
        timeline.stamp("machine");
        let backends = Backends { console: ends.console, fuse: ends.fuse, agent: agent_vmm.as_fd() };
        let listening = guest::start(&control, listening, self.recipe, self.files, backends, start).await?;
        Ok(Running { agent, prepared: Prepared { control, listening, vmm, launched }, greeting: None })
    }
}

impl Running {
    fn with(self, tree: Arc<SharedTree>, wanted: Option<Order>, cgroup: Option<PodCgroup>) -> Booted {
        let Running { agent, prepared, greeting } = self;
        let Prepared { control, listening, vmm, launched } = prepared;
        Booted { tree, agent, control: Arc::new(control), listening, vmm, launched, greeting, wanted, cgroup }
    }
}
