//! The machine that every guest gets, whether it boots, is restored, or is saved as a template.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::{AGENT_PORT, Parameter};
use bulkhead_vmm_protocol::{
    BlockConfig, FIRST_GUEST_CID, FdIndex, FsConfig, GuestStream, MemorySource, PrepareConfig, Request,
    RestoreConfig, VmConfig, VsockConfig,
};

use super::PodError;
use super::agent::{Agent, AgentError, Greeting};
use super::machine::{Control, ControlListener, MachineError};
use crate::error::{Classify, Code};
use crate::host::parameters;
use crate::template::{Recipe, Template};

/// The tags of the file systems: the shared tree, and the root file systems in it.
pub(crate) const FS_TAG: &str = "shared";
/// See [`FS_TAG`].
pub(crate) const ROOTS_TAG: &str = "roots";

/// Every guest's context id: each has a socket device of its own, so they never meet.
const GUEST_CID: u32 = FIRST_GUEST_CID;

/// Kernel parameters of every guest; the VMM adds those for its devices. Of its own making the kernel has no network
/// interface but loopback.
const KERNEL_PARAMS: &str =
    "root=/dev/vda rootfstype=erofs ro init=/bulkhead-agent quiet dummy.numdummies=0 fb_tunnels=none";

/// Tables of names and of inodes are a quarter of what the kernel would make them: a guest's first few files dirty all pages of
/// them, which pods share until then. Of directory entries that fill all memory ten or so are to be looked at for each name.
fn hash_tables(memory_mib: u32) -> String {
    format!("dhash_entries={} ihash_entries={}", memory_mib.saturating_mul(32), memory_mib.saturating_mul(16))
}

/// Bytes of the guest's console that are kept.
pub(crate) const CONSOLE_KEPT: usize = 16 * 1024;

/// Parameters of the node's kernel, as the guest is told them.
pub(crate) fn node_parameters() -> Vec<Parameter> {
    let told =
        |(path, value): (&str, String)| Parameter { path: path.to_owned(), value, ..Default::default() };
    parameters::of_node().into_iter().map(told).collect()
}

/// A file that every guest needs can't be had.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It can't be opened.
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
    /// It is not what it should be.
    #[error("the {what} {path} is not a regular file with something in it: check the configuration")]
    NotAFile {
        /// What it should be.
        what: &'static str,
        /// Where it is.
        path: PathBuf,
    },
}

impl Classify for FileError {
    fn code(&self) -> Code {
        Code::FAILED_PRECONDITION
    }
}

/// Where a machine's memory comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Start<'a> {
    /// From nothing: the kernel boots.
    Cold,
    /// The kernel boots in the memory file of a template in the making.
    Draft(&'a File),
    /// From a template.
    Template(&'a Template),
}

/// The host's ends of a machine's devices, to be handed to its VMM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Backends<'a> {
    /// Takes the console's output.
    pub console: BorrowedFd<'a>,
    /// The file server's sockets: for the shared tree, and for root file systems.
    pub fuse: [BorrowedFd<'a>; 2],
    /// The stream that the agent's connection is joined to.
    pub agent: BorrowedFd<'a>,
}

/// Has the VMM behind `control` get ready for a machine of the recipe's size.
pub(crate) fn prepare(
    control: &Control,
    recipe: &Recipe,
    files: &Files,
    start: Start<'_>,
) -> Result<(), MachineError> {
    let mut fds = FdList::default();
    let config = PrepareConfig {
        kvm: fds.add(files.kvm.as_fd()),
        vcpus: recipe.size.vcpus,
        memory_mib: recipe.size.memory_mib,
        memory: match start {
            Start::Cold => MemorySource::Anonymous,
            Start::Draft(memory) => MemorySource::Shared(fds.add(memory.as_fd())),
            Start::Template(template) => MemorySource::Private(fds.add(template.memory.as_fd())),
        },
        working_set: match start {
            Start::Template(Template { working_set: Some(file), .. }) => Some(fds.add(file.as_fd())),
            _ => None,
        },
    };
    control.prepare(config, &fds.0)
}

/// Waits until the VMM is ready, as long as it lives.
pub(crate) async fn prepared(control: &Control, listener: &mut ControlListener) -> Result<(), PodError> {
    tokio::select! {
        biased;
        answer = control.prepared() => Ok(answer?),
        ended = listener.until_ended() => Err(dead(control, ended)),
    }
}

/// Has the VMM behind `control`, which is ready for the same start, run a machine. Listens for its answer, and gives the
/// listener back.
pub(crate) async fn start(
    control: &Control,
    listener: ControlListener,
    recipe: &Recipe,
    files: &Files,
    backends: Backends<'_>,
    start: Start<'_>,
) -> Result<ControlListener, PodError> {
    let mut fds = FdList::default();
    let config = VmConfig {
        kernel: fds.add(files.kernel.as_fd()),
        cmdline: format!("{KERNEL_PARAMS} {} {}", hash_tables(recipe.size.memory_mib), recipe.kernel_params)
            .trim_end()
            .to_owned(),
        console: Some(fds.add(backends.console)),
        disks: vec![BlockConfig {
            file: fds.add(files.image.as_fd()),
            read_only: true,
            serial: "guest-image".into(),
        }],
        fs: backends
            .fuse
            .into_iter()
            .zip([FS_TAG, ROOTS_TAG])
            .map(|(socket, tag)| FsConfig { server: fds.add(socket), tag: tag.into() })
            .collect(),
        vsock: VsockConfig {
            guest_cid: GUEST_CID,
            guest_streams: vec![GuestStream { port: AGENT_PORT, stream: fds.add(backends.agent) }],
        },
    };
    let (name, request) = match start {
        Start::Cold | Start::Draft(_) => ("Boot", Request::Boot(Box::new(config))),
        Start::Template(template) => {
            let state = fds.add(template.state.as_fd());
            ("Restore", Request::Restore(Box::new(RestoreConfig { config, state })))
        }
    };
    let mut listener = listener;
    tokio::select! {
        biased;
        answer = control.request(name, &request, &fds.0) => answer?,
        ended = listener.until_ended() => return Err(dead(control, ended)),
    }
    Ok(listener)
}

/// Waits for the agent's first answer, as long as its machine lives.
pub(crate) async fn greet(
    control: &Control,
    agent: &Agent,
    listener: &mut ControlListener,
    limit: std::time::Duration,
) -> Result<Result<Greeting, AgentError>, PodError> {
    tokio::select! {
        biased;
        ended = listener.until_ended() => Err(dead(control, ended)),
        answer = agent.ready(limit) => Ok(answer),
    }
}

fn dead(control: &Control, ended: Option<bulkhead_vmm_protocol::ExitReason>) -> PodError {
    match (control.last_words(), ended) {
        (Err(refused), _) => refused.into(),
        (Ok(()), Some(reason)) => PodError::Dead(reason.to_string()),
        (Ok(()), None) => PodError::Machine(MachineError::Gone),
    }
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

/// What every machine is handed, open.
#[derive(Debug)]
pub(crate) struct Files {
    kvm: File,
    kernel: File,
    image: File,
}

impl Files {
    /// Opens a recipe's files.
    pub(crate) fn open(recipe: &Recipe) -> Result<Files, FileError> {
        let kvm = OpenOptions::new().read(true).write(true).open(&recipe.kvm).map_err(|source| FileError::Open {
            what: "KVM device",
            path: recipe.kvm.clone(),
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
            kernel: open_regular("guest kernel", &recipe.kernel)?,
            image: open_regular("guest image", &recipe.image)?,
        })
    }
}

fn open_regular(what: &'static str, path: &Path) -> Result<File, FileError> {
    let failed = |source| FileError::Open {
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
        return Err(FileError::NotAFile { what, path: path.to_owned() });
    }
    Ok(file)
}
