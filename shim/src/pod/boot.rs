//! Booting a pod's guest: every resource is opened here and handed to the VMM as a descriptor.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_agent_protocol::AGENT_PORT;
use bulkhead_vmm_protocol::{
    BlockConfig, Channel, FdIndex, FsConfig, GuestStream, MemorySource, Request, VmConfig, VsockConfig,
};
use log::Level;
use nix::sys::socket::SockType;

use super::agent::Agent;
use super::machine::{Control, ControlListener, Jailed, MachineError, identity_args, socket_pair};
use super::resources::Resources;
use super::state::StateError;
use super::tail::Tail;
use super::tree::{SharedTree, TREE, TreeError};
use super::{PodError, PodSpec};
use crate::error::{Classify, Code};
use crate::host::cgroup::{self, CgroupError, PodCgroup};
use crate::host::process::ProcessId;

/// The tag of the shared file system.
pub const FS_TAG: &str = "shared";

/// Every guest's context id: each has a socket device of its own, so they never meet.
const GUEST_CID: u32 = 3;

/// Kernel parameters of every guest; the VMM adds those for its devices.
const KERNEL_PARAMS: &str = "root=/dev/vda rootfstype=erofs ro init=/bulkhead-agent quiet";

/// Bytes of the guest's console that are kept.
const CONSOLE_KEPT: usize = 16 * 1024;

/// What a pod consists of once its guest runs.
#[derive(Debug)]
pub struct Booted {
    pub(super) tree: Arc<SharedTree>,
    pub(super) agent: Agent,
    pub(super) control: Arc<Control>,
    pub(super) listening: ControlListener,
    pub(super) vmm: ProcessId,
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
    /// A file that every pod needs.
    #[error("can't open the {what} {path}: {hint}")]
    Open {
        /// What it is.
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What to do.
        hint: &'static str,
        /// Why it can't be opened.
        #[source]
        source: io::Error,
    },
    /// A file that is not what it should be.
    #[error("the {what} {path} is not a regular file with something in it: check the configuration")]
    NotAFile {
        /// What it should be.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
    },
    /// A pipe for the console.
    #[error("can't set up the guest's console")]
    Console(#[source] io::Error),
}

impl Classify for BootError {
    fn code(&self) -> Code {
        match self {
            BootError::Open { .. } | BootError::NotAFile { .. } => Code::FAILED_PRECONDITION,
            _ => Code::INTERNAL,
        }
    }
}

/// Makes everything of the pod that is not a container. What was made is in `resources`, however this ends.
pub(super) async fn boot(spec: &PodSpec, resources: &mut Resources) -> Result<Booted, PodError> {
    // Before anything exists: what fails here is what users get wrong.
    let files = Files::open(spec)?;

    fs::create_dir(&spec.directory)
        .map_err(|source| BootError::Directory { path: spec.directory.clone(), source })?;
    resources.record(|state| state.shim = ProcessId::current().ok()).map_err(BootError::from)?;

    let cgroup = match &spec.cgroup {
        Some((path, limits)) => {
            let parents = cgroup::missing_parents(path);
            resources
                .record(|state| {
                    state.cgroup = Some(path.clone());
                    state.cgroup_parents = parents;
                })
                .map_err(BootError::from)?;
            Some(PodCgroup::create(path, limits).map_err(BootError::from)?)
        }
        None => None,
    };
    let cgroup_fd = cgroup.as_ref().map(AsFd::as_fd);

    let tree = Arc::new(SharedTree::create(&spec.directory).await.map_err(BootError::from)?);
    resources.tree = Some(tree.clone());

    let (fuse_server, fuse_vmm) = socket_pair(SockType::SeqPacket)?;
    let mounts = Some((tree.namespace(), TREE));
    let fs_server =
        Jailed::start(&spec.config.fs_server, &[], "file server", fuse_server.as_fd(), cgroup_fd, mounts)?;
    drop(fuse_server);
    let id = fs_server.id();
    resources.fs_server = Some(Arc::new(fs_server));
    resources.record(|state| state.fs_server = Some(id)).map_err(BootError::from)?;

    let (channel, vmm_channel) = Channel::pair().map_err(MachineError::Channel)?;
    let vmm = Jailed::start(&spec.config.vmm, &identity_args(), "VMM", vmm_channel.as_fd(), cgroup_fd, None)?;
    drop(vmm_channel);
    let vmm_id = vmm.id();
    resources.vmm = Some(Arc::new(vmm));
    resources.record(|state| state.vmm = Some(vmm_id)).map_err(BootError::from)?;

    let (console_reader, console_writer) = io::pipe().map_err(BootError::Console)?;
    let console = Tail::start(console_reader.into(), CONSOLE_KEPT, "guest console", Level::Debug);
    resources.console = Some(console.map_err(BootError::Console)?);

    let (agent_ours, agent_vmm) = socket_pair(SockType::Stream)?;
    let agent = Agent::new(super::from_owned(agent_ours).map_err(PodError::Stream)?);

    let mut fds = FdList::default();
    let config = VmConfig {
        vcpus: spec.config.size.vcpus,
        memory_mib: spec.config.size.memory_mib,
        memory: MemorySource::Anonymous,
        kvm: fds.add(files.kvm.as_fd()),
        kernel: fds.add(files.kernel.as_fd()),
        cmdline: format!("{KERNEL_PARAMS} {}", spec.config.kernel_params).trim_end().to_owned(),
        console: Some(fds.add(console_writer.as_fd())),
        disks: vec![BlockConfig {
            file: fds.add(files.image.as_fd()),
            read_only: true,
            serial: "guest-image".into(),
        }],
        fs: Some(FsConfig { server: fds.add(fuse_vmm.as_fd()), tag: FS_TAG.into() }),
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            guest_streams: vec![GuestStream { port: AGENT_PORT, stream: fds.add(agent_vmm.as_fd()) }],
        },
    };
    let (control, listener) = Control::new(channel)?;
    let listening = boot_vmm(&control, listener, &Request::Boot(Box::new(config)), &fds.0).await?;
    Ok(Booted { tree, agent, control: Arc::new(control), listening, vmm: vmm_id })
}

/// Sends the boot request while listening for its answer, and gives the listener back.
async fn boot_vmm(
    control: &Control,
    listener: ControlListener,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<ControlListener, PodError> {
    let mut listener = listener;
    tokio::select! {
        biased;
        answer = control.request("Boot", request, fds) => answer?,
        ended = listener.until_ended() => {
            return Err(match ended {
                Some(reason) => PodError::Dead(reason.to_string()),
                None => PodError::Machine(MachineError::Gone),
            });
        }
    }
    Ok(listener)
}

#[derive(Default)]
struct FdList<'a>(Vec<BorrowedFd<'a>>);

impl<'a> FdList<'a> {
    fn add(&mut self, fd: BorrowedFd<'a>) -> FdIndex {
        self.0.push(fd);
        // A boot request has a handful of descriptors.
        FdIndex((self.0.len() - 1) as u8)
    }
}

struct Files {
    kvm: File,
    kernel: File,
    image: File,
}

impl Files {
    fn open(spec: &PodSpec) -> Result<Files, BootError> {
        let config = &spec.config;
        let kvm = OpenOptions::new().read(true).write(true).open(&config.kvm).map_err(|source| BootError::Open {
            what: "KVM device",
            path: config.kvm.clone(),
            hint: match source.kind() {
                io::ErrorKind::NotFound => {
                    "does this machine have virtualization switched on, and is the kvm_intel or kvm_amd module loaded?"
                }
                _ => "may root use it here?",
            },
            source,
        })?;
        Ok(Files {
            kvm,
            kernel: open_regular("guest kernel", &config.kernel)?,
            image: open_regular("guest image", &config.image)?,
        })
    }
}

fn open_regular(what: &'static str, path: &Path) -> Result<File, BootError> {
    let failed = |source| BootError::Open {
        what,
        path: path.to_owned(),
        hint: "is Bulkhead installed completely, or the path in its configuration wrong?",
        source,
    };
    // Not to be caught by a FIFO.
    let file = {
        use std::os::unix::fs::OpenOptionsExt;
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Err(BootError::NotAFile { what, path: path.to_owned() });
    }
    Ok(file)
}
