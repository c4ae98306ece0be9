//! Making a container, and with the first one the pod.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_protocol as api;
use containerd_shim_protos::api::CreateTaskRequest;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use oci_spec::runtime::Spec;

use super::container::{Container, Process, State};
use super::disks::{Allowance, ContainerDisks, GuestRoot, OpenDisks};
use super::rootfs::{self, Files};
use super::shim::{Shim, Slot};
use super::stdio::{HostStdio, ProcessIo, Stdio};
use crate::builder::background;
use crate::config::Config;
use crate::error::ApiError;
use crate::events::Event;
use crate::hooks::{self, HostHooks};
use crate::host::cgroup;
use crate::id;
use crate::options::RuntimeOptions;
use crate::pod::agent::AgentError;
use crate::pod::limits::{Claim, PodLimits};
use crate::pod::slots::Slots;
use crate::pod::timeline::now_us;
use crate::pod::{DEATH_LIMIT, Pod, PodSpec, clock, forward, state};
use crate::sizing::Demand;
use crate::spec::sandbox::Role;
use crate::spec::{self, GuestSpec, Member, PodNamespaces};

/// How long after a pod has come to be its first container is sure to run, if all goes well.
const STARTED: Duration = Duration::from_millis(250);

/// What the kernel calls a VMM.
const VMM_NAME: &str = "bulkhead-vmm";

impl Shim {
    /// Sets a container up; gives what containerd is told as its process id. Nothing of it is left when this fails.
    pub(crate) async fn create(self: Arc<Self>, request: CreateTaskRequest) -> Result<u32, ApiError> {
        let received_us = now_us();
        id::check(&request.id).map_err(|error| ApiError::invalid(error.to_string()))?;
        if !request.checkpoint.is_empty() {
            return Err(ApiError::invalid("restoring from a checkpoint is not supported"));
        }
        let mut slot = self.slot.lock().await;
        if self.containers().contains_key(&request.id) {
            return Err(ApiError::new(
                ttrpc::Code::ALREADY_EXISTS,
                format!("there is a container {:?} already", request.id),
            ));
        }
        let container = match self.create_in(&mut slot, &request, received_us).await {
            Ok(container) => container,
            Err(error) => {
                hooks::finish(Path::new(&request.bundle)).await;
                log::error!("container {}: {error}", request.id);
                return Err(error);
            }
        };
        self.containers().insert(request.id.clone(), container.clone());
        self.publisher.publish(Event::Create(TaskCreate {
            container_id: request.id,
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: protobuf::MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..Default::default()
            }),
            pid: container.init.pid,
            ..Default::default()
        }));
        self.watch(&container, &container.init);
        Ok(container.init.pid)
    }

    async fn create_in(
        self: &Arc<Self>,
        slot: &mut Slot,
        request: &CreateTaskRequest,
        received_us: u64,
    ) -> Result<Arc<Container>, ApiError> {
        let bundle = PathBuf::from(&request.bundle);
        if !bundle.is_absolute() {
            return Err(ApiError::invalid(format!("the bundle {bundle:?} is not an absolute path")));
        }
        let mut spec = spec::read(&bundle)?;
        let mut role = Role::of(&spec)?;
        if let (Some(sandbox), Some(pod)) = (&slot.sandbox, &slot.pod) {
            if !sandbox.ready {
                let message = format!("the sandbox {:?} has not been started", pod.id());
                return Err(ApiError::precondition(message));
            }
            sandbox.complete(&mut spec);
            // Whoever asks here for a container wants it in the sandbox, whether Kubernetes knows of it or not.
            if role == Role::Single {
                role = Role::Member(pod.id().to_owned());
            }
        }
        let place = match pod_for(slot, &request.id, &role)? {
            Some(pod) => Place::In(pod),
            None => Place::New(Box::new(config(request)?)),
        };

        let mut members = self.members();
        // A sandbox has no first container, whose namespaces would be those of its process id.
        if let (Some(pod), Some(guest_pid), true) = (&slot.pod, slot.first_process, slot.sandbox.is_some()) {
            members.push(Member { host_pid: pod.host_pid(), guest_pid });
        }
        let namespaces =
            PodNamespaces { members, first_process: slot.first_process, is_pod: role != Role::Single };
        let guest = spec::translate(spec.clone(), &request.id, &namespaces)?;
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let host_stdio = HostStdio::open(&stdio, &self.streams)?;
        let root = GuestRoot::open(&request.rootfs, place.allowance(&spec, guest.disks.len()))?;
        let disks = OpenDisks::open(root, &guest.disks)?;
        let root = disks.root_files(&request.rootfs);
        let files = Files::prepare(root, &guest.mounts, &spec, &bundle).await?;

        let hooks = HostHooks::of(&spec, &request.id, &bundle);
        let is_new = matches!(place, Place::New(_));
        let demand = Demand::of(&spec, &role)?;
        let claim = claim(&spec, &role, request, &guest);
        let pod = match place {
            Place::In(pod) => {
                if let Some(words) = demand.beyond(pod.limits().size()) {
                    log::warn!(
                        "the container {} has {words}: it may be ended for want of memory before",
                        request.id
                    );
                }
                pod.add_claim(&request.id, claim);
                pod
            }
            Place::New(config) => {
                let config = *config;
                let id = request.id.clone();
                let (bundle, spec, role) = (&bundle, &spec, &role);
                self.launch(NewPod { id, bundle, spec, role, demand, claim, config, received_us }).await?
            }
        };
        let own_pid_namespace = guest.own_pid_namespace;
        let order = Order { id: &request.id, is_new, hostname: hostname(&spec), guest, hooks };
        match order.carry_out(&pod, files, disks, host_stdio).await {
            Ok(Made { guest_pid, io, disks }) => {
                if is_new {
                    slot.pod = Some(pod.clone());
                    slot.first_process = own_pid_namespace.then_some(guest_pid);
                    self.watch_pod(&pod);
                }
                if let Some(sandbox) = slot.sandbox.as_mut() {
                    sandbox.is_set_up();
                }
                let pid = if is_new { pod.host_pid() } else { pod.task_pid(&namespaces.taken_pids()).await };
                let init = Arc::new(Process::new("", stdio, pid, io));
                let mut container = Container::new(&request.id, bundle, pod, init, own_pid_namespace, disks);
                container.guest_pid = guest_pid;
                Ok(Arc::new(container))
            }
            Err(error) => {
                if is_new {
                    pod.stop().await;
                } else {
                    rootfs::remove(pod.tree(), &request.id).await;
                    pod.remove_claim(&request.id);
                }
                Err(error)
            }
        }
    }

    /// The containers that run, as others can refer to them.
    fn members(&self) -> Vec<Member> {
        let containers = self.containers();
        let running = containers.values().filter(|other| !matches!(other.init.state(), State::Stopped(_)));
        running.map(|other| Member { host_pid: other.init.pid, guest_pid: other.guest_pid }).collect()
    }

    /// Starts a pod: the one way in which pods come to be, whichever API asks.
    pub(crate) async fn launch(&self, new: NewPod<'_>) -> Result<Arc<Pod>, ApiError> {
        let annotations = new.spec.annotations().clone().unwrap_or_default();
        let config = new.config.for_pod(&new.demand, &annotations)?;
        log::set_max_level(config.log_level.max(self.least_logged));
        let directory = new.bundle.join(state::DIRECTORY);
        let limits = PodLimits::new(config.size, &new.demand, *new.role == Role::Single);
        limits.add(&new.id, new.claim);
        let cgroup = pod_cgroup(new.spec)?;
        let network = spec::network_namespace(new.spec);
        if let Some(path) = network.as_deref().filter(|path| is_another_pods(path)) {
            let path = path.display();
            let message =
                format!("the network namespace {path} is another pod's, and two pods can't share one");
            return Err(ApiError::precondition(message));
        }
        // Docker looks for it at the id of the process, from a hook or once the container has been created.
        let own_network = network.is_none();
        let received_us = new.received_us;
        let spec =
            PodSpec { id: new.id, directory, config, network, own_network, limits, cgroup, received_us };
        let pod = Pod::launch(spec).await?;
        self.note_launched(&pod);
        Ok(pod)
    }

    /// Does what is to be done once a pod's guest is the pod's: what nobody waits for.
    pub(crate) fn watch_pod(self: &Arc<Self>, pod: &Arc<Pod>) {
        if let Some(order) = pod.template_wanted() {
            background::start(order);
        }
        tokio::spawn(self.clone().pass_events(pod.clone()));
        tokio::spawn(clock::follow(pod.agent().clone()));
        tokio::spawn(give_memory_back());
        forward::start(pod);
    }
}

/// Most memory that this process ever needs it needs until a pod has started; what is free of it then goes back to the host.
async fn give_memory_back() {
    tokio::time::sleep(STARTED).await;
    // SAFETY: takes a number; the allocator's own locks are all that it needs.
    unsafe { libc::malloc_trim(0) };
}

/// Where a container is made.
enum Place {
    /// In a pod that there is.
    In(Arc<Pod>),
    /// In one that is to be made.
    New(Box<Config>),
}

impl Place {
    /// What of the container's root file system may be on disks, beside so many that it asks for.
    fn allowance(&self, spec: &Spec, others: usize) -> Allowance {
        let (containers, disks) = match self {
            Place::In(pod) => (pod.containers(), pod.room_for_roots(others)),
            Place::New(config) => (config.containers, Slots::default().room_for_roots(others)),
        };
        Allowance { disks, changes: containers.root_changes.on_disk(spec) }
    }
}

/// What the operator wants of the pod that is to be made.
fn config(request: &CreateTaskRequest) -> Result<Config, ApiError> {
    let options = request.options.as_ref().map(RuntimeOptions::from_any).transpose()?.unwrap_or_default();
    Ok(Config::load(&options.config)?)
}

/// What a pod is made of.
pub(crate) struct NewPod<'a> {
    /// The id of the sandbox, or of the container that is a pod of its own.
    pub id: String,
    /// The bundle that keeps the pod's record.
    pub bundle: &'a Path,
    /// The specification of the sandbox or container.
    pub spec: &'a Spec,
    /// Which of the two it is.
    pub role: &'a Role,
    /// What its limits ask for.
    pub demand: Demand,
    /// What the sandbox or container asks of the host.
    pub claim: Claim,
    /// What the operator wants of pods.
    pub config: Config,
    /// When the request arrived, on the clock of [`now_us`].
    pub received_us: u64,
}

/// The pod's host name: the node's where the specification has none, which is what a container without a name of its own
/// sees elsewhere.
pub(crate) fn hostname(spec: &Spec) -> String {
    match spec.hostname() {
        Some(name) if !name.is_empty() => name.clone(),
        _ => nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default(),
    }
}

/// Whether a network namespace is that of another pod's VMM, which is what `docker run --network container:NAME` names.
fn is_another_pods(network: &Path) -> bool {
    let Some(process) = network.parent().and_then(Path::parent) else { return false };
    network == process.join("ns/net")
        && process.parent() == Some(Path::new("/proc"))
        && std::fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim_end() == VMM_NAME)
}

/// What is to be set up in a pod.
struct Order<'a> {
    id: &'a str,
    /// Whether the pod's guest is only just booting.
    is_new: bool,
    hostname: String,
    guest: GuestSpec,
    hooks: Option<HostHooks>,
}

/// What has been set up.
struct Made {
    /// The first process's id in the guest.
    guest_pid: u32,
    io: ProcessIo,
    disks: ContainerDisks,
}

impl Order<'_> {
    /// Sets the container up.
    async fn carry_out(
        self,
        pod: &Arc<Pod>,
        files: Files,
        disks: OpenDisks,
        host_stdio: HostStdio,
    ) -> Result<Made, ApiError> {
        let attach = async { files.attach(pod.tree(), self.id).await.map_err(ApiError::from) };
        let hooks = async {
            match &self.hooks {
                Some(hooks) => hooks.create(pod.host_pid()).await.map_err(ApiError::from),
                None => Ok(()),
            }
        };
        if self.is_new {
            // The guest boots meanwhile.
            let configure = async { pod.configure(&self.hostname).await.map_err(ApiError::from) };
            tokio::try_join!(attach, configure, hooks)?;
        } else {
            tokio::try_join!(attach, hooks)?;
        }
        let disks = disks.attach(pod, self.id).await?;
        match self.make(pod, &disks, host_stdio).await {
            Ok((guest_pid, io)) => {
                pod.timeline().stamp("container");
                Ok(Made { guest_pid, io, disks })
            }
            Err(error) => {
                // A new pod ends with its only container, and its disks with it.
                if !self.is_new {
                    // The agent may have got further than its answer.
                    let _ = pod.agent().delete(self.id, "").await;
                    disks.detach(pod).await;
                }
                Err(error)
            }
        }
    }

    async fn make(
        &self,
        pod: &Pod,
        disks: &ContainerDisks,
        host_stdio: HostStdio,
    ) -> Result<(u32, ProcessIo), ApiError> {
        let (streams, io) = host_stdio.connect(pod, self.guest.console_size).await?;
        let message = api::CreateContainerRequest {
            container_id: self.id.to_owned(),
            spec: self.guest.to_json(&disks.places, disks.root.clone(), pod.containers().default_seccomp)?,
            stdio: protobuf::MessageField::some(streams),
            ..Default::default()
        };
        let answer = pod.agent().create_container(&message).await;
        Ok((explain(pod, answer).await?, io))
    }
}

/// Puts the reason of the pod's death in the place of the broken connection that it was noticed by.
pub(crate) async fn explain<T>(pod: &Pod, answer: Result<T, AgentError>) -> Result<T, ApiError> {
    match answer {
        Err(AgentError::Lost) => {
            let death = tokio::time::timeout(DEATH_LIMIT, pod.died()).await;
            match death {
                Ok(_) => Err(pod.check_alive().err().unwrap_or_else(|| AgentError::Lost.into())),
                Err(_) => Err(AgentError::Lost.into()),
            }
        }
        other => Ok(other?),
    }
}

/// The pod that a container belongs into, if there is one yet.
fn pod_for(slot: &Slot, id: &str, role: &Role) -> Result<Option<Arc<Pod>>, ApiError> {
    match (&slot.pod, role) {
        (None, Role::Single | Role::Sandbox) => Ok(None),
        (None, Role::Member(sandbox)) => Err(ApiError::precondition(format!(
            "the container {id:?} belongs to the pod {sandbox:?}, which does not run in this shim"
        ))),
        (Some(pod), Role::Member(sandbox)) if pod.id() == sandbox => {
            pod.check_alive()?;
            Ok(Some(pod.clone()))
        }
        (Some(pod), _) => Err(ApiError::precondition(format!(
            "the container {id:?} does not belong to the pod {:?} of this shim",
            pod.id()
        ))),
    }
}

fn pod_cgroup(spec: &Spec) -> Result<Option<PathBuf>, ApiError> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_ref());
    let Some(path) = path.filter(|path| !path.as_os_str().is_empty()) else { return Ok(None) };
    let path = cgroup::resolve(path).map_err(|error| ApiError::invalid(error.to_string()))?;
    if !cgroup::is_unified() {
        log::warn!(
            "this host has no plain cgroup version 2 hierarchy: the pod's processes run without limits on the host"
        );
        return Ok(None);
    }
    Ok(Some(path))
}

/// What a container asks of the host itself.
fn claim(spec: &Spec, role: &Role, request: &CreateTaskRequest, guest: &GuestSpec) -> Claim {
    let volumes = guest.mounts.iter().filter(|mount| mount.read_only.is_none() && mount.source.is_dir());
    let upper = request.rootfs.iter().flat_map(|mount| &mount.options);
    let upper = upper.filter_map(|option| option.strip_prefix("upperdir=")).map(Path::new);
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    Claim::new(volumes.map(|volume| volume.source.as_path()).chain(upper), resources, role)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_of_another_pods_vmm_is_known_by_its_process() {
        let vmm = std::thread::Builder::new().name(VMM_NAME.to_owned()).spawn(|| {
            let path = format!("/proc/{}/ns/net", nix::unistd::gettid());
            is_another_pods(Path::new(&path))
        });
        assert!(vmm.unwrap().join().unwrap());
        for other in ["/proc/self/ns/net", "/proc/1/ns/net", "/proc/1/ns/pid", "/run/netns/cni-1", "/", ""] {
            assert!(!is_another_pods(Path::new(other)), "{other:?}");
        }
    }
}
