//! OCI specifications: read from containerd, translated from the host's world into the guest's.
//!
//! What the guest can carry out by itself passes unchanged. What names something of the host is rewritten to its place
//! in the guest, dropped where it can't mean anything there, or refused where dropping it would change what the user
//! asked for.

mod capabilities;
mod devices;
mod labels;
mod mounts;
mod namespaces;
pub(crate) mod rlimits;
pub mod sandbox;
mod seccomp;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::ROOTS_DIR;
use oci_spec::runtime::{Hook, Hooks, Linux, LinuxNamespaceType, LinuxResources, Process, RootBuilder, Spec};

pub(crate) use devices::{DeviceNumber, DiskPlace, HostDisk};
pub(crate) use mounts::HostMount;
pub use namespaces::{Member, PodNamespaces};

use crate::error::{Classify, Code};

/// A specification, or a process or resources object, in bytes: `execve` takes 2 MiB of arguments and variables, and a message to the
/// agent has 4.
const MAX_SPEC: usize = 3 << 20;

/// Most mounts of one container.
const MAX_MOUNTS: usize = 512;

/// Why a container can't run in a pod of ours.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The bundle has none, or it can't be read.
    #[error("can't read the specification {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not an OCI object.
    #[error("{what} can't be understood")]
    Parse {
        /// What it should be.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Too large.
    #[error("{what} is {length} bytes long: {MAX_SPEC} are allowed")]
    TooLarge {
        /// What it should be.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// Not for Linux.
    #[error("the specification has no {0} section")]
    Missing(&'static str),
    /// The container is to share the node's network.
    #[error(
        "the container has no network namespace of its own: host network is not possible, a pod has a kernel of its own"
    )]
    HostNetwork,
    /// A namespace that only exists on the host.
    #[error("the container is to join the {kind} namespace {path}, which only exists on the host")]
    HostNamespace {
        /// Kind of the namespace.
        kind: LinuxNamespaceType,
        /// Its path.
        path: PathBuf,
    },
    /// A device of the host.
    #[error(
        "the container asks for the device {0:?} of the host: only block devices can be passed into a pod"
    )]
    Device(PathBuf),
    /// Network interfaces of the host.
    #[error("linux.netDevices is not supported: interfaces of the host can't be moved into a pod")]
    NetDevices,
    /// A file system that would have to be mounted on the host.
    #[error(
        "the container mounts a {kind:?} on {destination:?}: only bind, proc, sysfs, tmpfs, devpts, mqueue and cgroup mounts are possible"
    )]
    MountType {
        /// Type.
        kind: String,
        /// Where.
        destination: PathBuf,
    },
    /// A bind mount without a source, or of a relative path.
    #[error("the bind mount on {destination:?} has no absolute source")]
    MountSource {
        /// Where.
        destination: PathBuf,
    },
    /// Huge pages, of which a guest has none.
    #[error(
        "the container asks for {bytes} bytes in huge pages of {size}: there are none in a pod's virtual machine"
    )]
    HugePages {
        /// The size of a page.
        size: String,
        /// What it asks for.
        bytes: i64,
    },
    /// Confinement that was asked for and that the guest can't give.
    #[error(
        "the container asks for the AppArmor profile {0:?}: it is loaded into the node's kernel, and a pod has a kernel of its own without AppArmor"
    )]
    AppArmor(String),
    /// Mounts that would have to travel from the guest to the host.
    #[error(
        "the mount on {destination:?} is {option} (Bidirectional): what is mounted inside a pod can't appear on the node"
    )]
    Propagation {
        /// Where.
        destination: PathBuf,
        /// The option.
        option: String,
    },
    /// A namespace of a container that is not there.
    #[error(
        "the container is to join the namespace {path}, which is not that of a running container of this pod"
    )]
    NoSuchContainer {
        /// Its path.
        path: PathBuf,
    },
    /// More than anybody needs.
    #[error("the container has {0} mounts: {MAX_MOUNTS} are possible")]
    TooManyMounts(usize),
    /// The built-in default filter is broken.
    #[error("the default seccomp profile can't be read")]
    DefaultSeccomp(#[source] serde_json::Error),
}

impl Classify for SpecError {
    fn code(&self) -> Code {
        match self {
            SpecError::Read { .. } => Code::FAILED_PRECONDITION,
            SpecError::DefaultSeccomp(_) => Code::INTERNAL,
            _ => Code::INVALID_ARGUMENT,
        }
    }
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConsoleSize {
    /// Width.
    pub columns: u32,
    /// Height.
    pub rows: u32,
}

/// A process of an exec, translated.
#[derive(Debug, PartialEq, Eq)]
pub struct GuestProcess {
    /// For the agent.
    pub json: Vec<u8>,
    /// Size of the terminal to begin with.
    pub console_size: Option<ConsoleSize>,
}

/// A container's specification, translated.
#[derive(Debug)]
pub struct GuestSpec {
    spec: Spec,
    /// Block devices of the host.
    pub disks: Vec<HostDisk>,
    /// Bind mounts, in the order of their numbers in the shared tree.
    pub mounts: Vec<HostMount>,
    /// Whether the container has a PID namespace of its own: its first process is then the last to end.
    pub own_pid_namespace: bool,
    /// Size of the terminal to begin with.
    pub console_size: Option<ConsoleSize>,
}

impl GuestSpec {
    /// For the agent. `places` are those of [`GuestSpec::disks`]; `root` is where the root file system is in the guest, if
    /// not in the shared tree.
    /// With `default_filter`, a container without a system call filter gets the default one.
    pub fn to_json(
        &self,
        places: &[DiskPlace],
        root: Option<PathBuf>,
        default_filter: bool,
    ) -> Result<Vec<u8>, SpecError> {
        const WHAT: &str = "the specification";
        if places.is_empty() && root.is_none() && !default_filter {
            return serialize(WHAT, &self.spec);
        }
        let mut spec = self.spec.clone();
        if default_filter {
            let filter = seccomp::default_for(&spec)?;
            if let Some(linux) = spec.linux_mut().as_mut().filter(|linux| linux.seccomp().is_none()) {
                linux.set_seccomp(filter);
            }
        }
        if let (Some(path), Some(root)) = (root, spec.root_mut()) {
            root.set_path(path);
        }
        if let Some(linux) = spec.linux_mut() {
            devices::place(linux.devices_mut().as_deref_mut().unwrap_or_default(), places);
            if let Some(resources) = linux.resources_mut() {
                place_rules(resources, places);
            }
        }
        serialize(WHAT, &spec)
    }
}

fn place_rules(resources: &mut LinuxResources, places: &[DiskPlace]) {
    if let Some(rules) = resources.devices_mut() {
        devices::place_rules(rules, places);
    }
}

/// Reads `config.json` of a bundle.
pub(crate) fn read(bundle: &Path) -> Result<Spec, SpecError> {
    let path = bundle.join("config.json");
    let bytes = fs::read(&path).map_err(|source| SpecError::Read { path, source })?;
    parse("the specification config.json", &bytes)
}

/// The network namespace that a specification names, if it names one.
pub fn network_namespace(spec: &Spec) -> Option<PathBuf> {
    let mut namespaces = spec.linux().as_ref()?.namespaces().iter().flatten();
    let network = namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network)?;
    network.path().clone().filter(|path| !path.as_os_str().is_empty())
}

/// Reads a process object for an exec.
pub fn read_process(json: &[u8]) -> Result<GuestProcess, SpecError> {
    let mut process: Process = parse("the process specification", json)?;
    labels::clear(&mut process)?;
    rlimits::complete(&mut process, rlimits::inherited());
    let console_size = console_size(&process);
    Ok(GuestProcess { json: serialize("the process specification", &process)?, console_size })
}

/// Reads a `linux.resources` object for an update.
pub fn read_resources(json: &[u8]) -> Result<LinuxResources, SpecError> {
    parse("the resources object", json)
}

/// Translates a `linux.resources` object for an update of a container with disks at these places.
pub fn translate_resources(
    mut resources: LinuxResources,
    places: &[DiskPlace],
) -> Result<Vec<u8>, SpecError> {
    translate_limits(&mut resources)?;
    place_rules(&mut resources, places);
    serialize("the resources object", &resources)
}

/// Reads an object that is called `what` in errors.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, SpecError> {
    if json.len() > MAX_SPEC {
        return Err(SpecError::TooLarge { what, length: json.len() });
    }
    match serde_json::from_slice(json) {
        Ok(object) => Ok(object),
        Err(source) => {
            let known = capabilities::only_known(json).and_then(|json| serde_json::from_value(json).ok());
            known.ok_or(SpecError::Parse { what, source })
        }
    }
}

fn serialize(what: &'static str, value: &impl serde::Serialize) -> Result<Vec<u8>, SpecError> {
    serde_json::to_vec(value).map_err(|source| SpecError::Parse { what, source })
}

/// Translates the specification of the container `id`.
pub fn translate(mut spec: Spec, id: &str, pod: &PodNamespaces) -> Result<GuestSpec, SpecError> {
    let inside = hooks_inside(spec.hooks().as_ref());
    spec.set_hooks(inside);
    let process = spec.process_mut().as_mut().ok_or(SpecError::Missing("process"))?;
    labels::clear(process)?;
    rlimits::complete(process, rlimits::inherited());
    let console_size = console_size(process);

    let host_mounts = match spec.mounts_mut() {
        Some(list) if list.len() > MAX_MOUNTS => return Err(SpecError::TooManyMounts(list.len())),
        Some(list) => mounts::translate(list, id)?,
        None => Vec::new(),
    };

    let linux = spec.linux_mut().as_mut().ok_or(SpecError::Missing("linux"))?;
    let shares_uts = namespaces::translate(linux, pod)?;
    let own_pid_namespace = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid && namespace.path().is_none());
    let disks = devices::translate(linux)?;
    translate_linux(linux, id)?;

    if shares_uts {
        // The pod's name is set already, and it is the pod's.
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    let root = RootBuilder::default().path(format!("{ROOTS_DIR}/{id}/rootfs")).readonly(read_only).build();
    spec.set_root(root.ok());
    // They are for the host's components, and none of the guest's business.
    spec.set_annotations(None);

    Ok(GuestSpec { spec, disks, mounts: host_mounts, own_pid_namespace, console_size })
}

/// The hooks that run in the container, and so in the guest; all others run on the host ([`crate::hooks`]).
fn hooks_inside(hooks: Option<&Hooks>) -> Option<Hooks> {
    let filled = |list: &Option<Vec<Hook>>| list.clone().filter(|list| !list.is_empty());
    let mut inside = Hooks::default();
    inside.set_create_container(filled(hooks?.create_container()));
    inside.set_start_container(filled(hooks?.start_container()));
    (inside != Hooks::default()).then_some(inside)
}

fn console_size(process: &Process) -> Option<ConsoleSize> {
    let size = process.console_size()?;
    let clamp = |value: u64| u32::try_from(value).unwrap_or(0);
    Some(ConsoleSize { columns: clamp(size.width()), rows: clamp(size.height()) })
}

fn translate_linux(linux: &mut Linux, id: &str) -> Result<(), SpecError> {
    if linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty()) {
        return Err(SpecError::NetDevices);
    }
    linux.set_cgroups_path(Some(PathBuf::from(format!("/{id}"))));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_memory_policy(None);
    if let Some(resources) = linux.resources_mut() {
        translate_limits(resources)?;
    }
    Ok(())
}

/// Drops limits that name something of the host by numbers that mean something else in the guest (the host honours those that
/// it can, see [`crate::pod::limits`]), and refuses what can't be had.
fn translate_limits(resources: &mut LinuxResources) -> Result<(), SpecError> {
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    // Cpusets count the host's CPUs and memory nodes.
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    // The guest reserves no huge pages, so a limit of none is kept by itself.
    let asked = resources.hugepage_limits().iter().flatten().find(|limit| limit.limit() > 0);
    if let Some(limit) = asked {
        return Err(SpecError::HugePages { size: limit.page_size().clone(), bytes: limit.limit() });
    }
    resources.set_hugepage_limits(None);
    Ok(())
}

/// The directory of a bundle that is the container's root file system when containerd mounts nothing.
pub(crate) fn bundle_rootfs(spec: &Spec, bundle: &Path) -> Result<PathBuf, SpecError> {
    let root = spec.root().as_ref().ok_or(SpecError::Missing("root"))?;
    // `join` leaves an absolute path as it is.
    Ok(bundle.join(root.path()))
}

#[cfg(test)]
mod tests;
