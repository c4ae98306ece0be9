//! The first pod from a new template: shows that it can be restored, and which of its pages pods use first.
//!
//! The pod goes the way of every pod, up to the end of a container's first process. Its program is as small as one can be: what
//! a larger one would have in memory is in no pod, and pages for it would be copied in vain in each.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_protocol as api;
use bulkhead_agent_protocol::ROOTS_DIR;
use oci_spec::runtime::Spec;
use protobuf::MessageField;
use serde_json::json;
use tokio::io::AsyncReadExt;

use super::working_set;
use crate::config::Config;
use crate::error::{ApiError, chain};
use crate::host::changes::{ChangesDisk, ChangesError};
use crate::host::mounts::{DetachedTree, MountError, Propagation};
use crate::pod::agent::AgentError;
use crate::pod::limits::PodLimits;
use crate::pod::timeline::now_us;
use crate::pod::tree::TreeError;
use crate::pod::{Pod, PodError, PodSpec};
use crate::sizing::Demand;
use crate::spec::{self, PodNamespaces};

/// From the start of the pod until its process has ended.
const LIMIT: Duration = Duration::from_secs(30);

/// The pod and its container.
const ID: &str = "rehearsal";

/// The program's place in the container.
const PROGRAM: &str = "bin/program";

/// The most output that is looked at, bytes.
const MAX_OUTPUT: u64 = 4096;

/// Why no pod could be started from a new template.
#[derive(Debug, thiserror::Error)]
pub enum RehearsalError {
    /// Its files.
    #[error("can't prepare its files at {path}")]
    Files {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its specification.
    #[error("its specification makes no sense")]
    Spec(#[from] serde_json::Error),
    /// Its specification, as far as the host is concerned.
    #[error("its specification can't be translated: {0}")]
    Translate(ApiError),
    /// A mount.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// The shared tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// The disk for changes.
    #[error("can't make a disk")]
    Changes(#[from] ChangesError),
    /// The pod.
    #[error(transparent)]
    Pod(#[from] PodError),
    /// The agent.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// The pages that it used.
    #[error("can't tell which pages of the template it used")]
    Pages(#[from] working_set::PagesError),
    /// It takes too long.
    #[error("it did not come to its end within {} s", LIMIT.as_secs())]
    TimedOut,
}

/// Starts a pod from the template that `config` leads to, whose memory file has the inode number `memory`, and gives the list
/// of the pages that it used. `directory` does not exist yet; nothing of it is left.
pub(crate) async fn rehearse(
    config: Config,
    memory: u64,
    directory: &Path,
) -> Result<Vec<u8>, RehearsalError> {
    let result = run(config, memory, directory).await;
    let removed = fs::remove_dir_all(directory);
    if let Err(error) = removed {
        log::warn!("the rehearsal's files stay in {}: {error}", directory.display());
    }
    result
}

async fn run(config: Config, memory: u64, directory: &Path) -> Result<Vec<u8>, RehearsalError> {
    let rootfs = directory.join("rootfs");
    let files = |path: &Path| {
        let path = path.to_owned();
        move |source| RehearsalError::Files { path, source }
    };
    for place in ["bin", "dev", "proc", "run", "sys"] {
        let path = rootfs.join(place);
        fs::create_dir_all(&path).map_err(files(&path))?;
    }
    let path = rootfs.join(PROGRAM);
    write_program(&path).map_err(files(&path))?;
    let pod_spec = PodSpec {
        id: ID.to_owned(),
        directory: directory.join("pod"),
        network: None,
        own_network: false,
        limits: PodLimits::new(config.size, &Demand::default(), true),
        config,
        cgroup: None,
        received_us: now_us(),
    };
    let upper = directory.join("upper");
    fs::create_dir(&upper).map_err(files(&upper))?;
    let changes = ChangesDisk::make(&upper)?;
    let pod = Pod::launch(pod_spec).await?;
    let used = tokio::time::timeout(LIMIT, use_pod(&pod, &rootfs, &changes, memory)).await;
    pod.stop().await;
    used.unwrap_or(Err(RehearsalError::TimedOut))
}

/// Runs a container to its end.
async fn use_pod(
    pod: &Arc<Pod>,
    rootfs: &Path,
    changes: &ChangesDisk,
    memory: u64,
) -> Result<Vec<u8>, RehearsalError> {
    let tree = DetachedTree::bind(rootfs, false)?;
    tree.restrict(Propagation::Private)?;
    let attach = async {
        let point = Path::new(ID).join("rootfs");
        Ok::<_, RehearsalError>(pod.tree().attach(tree, &point).await?)
    };
    let configure = async { Ok(pod.configure(ID).await?) };
    tokio::try_join!(attach, configure)?;
    let (number, mut output) = pod.open_stream().await?;
    let guest = spec::translate(specification()?, ID, &PodNamespaces::default())
        .map_err(|error| RehearsalError::Translate(error.into()))?;
    let request = api::CreateContainerRequest {
        container_id: ID.to_owned(),
        spec: guest.to_json(&[], None, true).map_err(|error| RehearsalError::Translate(error.into()))?,
        stdio: MessageField::some(api::Stdio { stderr_stream: number, ..Default::default() }),
        ..Default::default()
    };
    pod.agent().create_container(&request).await?;
    pod.agent().start(ID, "").await?;
    let mut said = Vec::new();
    // What it says does not matter, only that it does.
    let _ = (&mut output).take(MAX_OUTPUT).read_to_end(&mut said).await;
    pod.agent().wait(ID, "").await?;
    let used = working_set::used_pages(pod.host_pid(), memory)?;
    // Pages that only a disk takes are not among them: many pods have none.
    let lower = Path::new(ROOTS_DIR).join(ID).join("rootfs").display().to_string();
    if let Err(error) = pod.attach_changes(&changes.disk, Some(&lower), &[]).await {
        log::warn!("pods from this template can't have changes on disks: {}", chain(&error));
    }
    Ok(used)
}

/// Writes an executable file of one page that says a byte on standard error and ends.
fn write_program(path: &Path) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o755).open(path)?;
    file.write_all(&program())
}

/// The machine that it is for (`e_machine`), and its instructions: `write(2, <its first byte>, 1)`, `exit_group(0)`.
#[cfg(target_arch = "x86_64")]
const MACHINE: (u16, &[u8]) = (
    62,
    &[
        0xb8, 1, 0, 0, 0, // mov eax, 1
        0xbf, 2, 0, 0, 0, // mov edi, 2
        0xbe, 0, 0, 0x40, 0, // mov esi, 0x400000
        0xba, 1, 0, 0, 0, // mov edx, 1
        0x0f, 0x05, // syscall
        0xb8, 231, 0, 0, 0, // mov eax, 231
        0x31, 0xff, // xor edi, edi
        0x0f, 0x05, // syscall
    ],
);

/// An ELF file (System V ABI, "Object Files") with one segment.
fn program() -> Vec<u8> {
    const ADDRESS: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let (machine, code) = MACHINE;
    let size = HEADERS + code.len() as u64;
    let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let halves =
        |bytes: &mut Vec<u8>, values: &[u16]| bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
    let words =
        |bytes: &mut Vec<u8>, values: &[u32]| bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
    let longs =
        |bytes: &mut Vec<u8>, values: &[u64]| bytes.extend(values.iter().flat_map(|n| n.to_le_bytes()));
    halves(&mut bytes, &[2, machine]); // ET_EXEC
    words(&mut bytes, &[1]); // EV_CURRENT
    longs(&mut bytes, &[ADDRESS + HEADERS, 64, 0]); // entry, program headers, no sections
    words(&mut bytes, &[0]);
    halves(&mut bytes, &[64, 56, 1, 64, 0, 0]);
    words(&mut bytes, &[1, 5]); // PT_LOAD, readable and executable
    longs(&mut bytes, &[0, ADDRESS, ADDRESS, size, size, 4096]);
    bytes.extend(code);
    bytes
}

/// What `ctr run` asks for.
fn specification() -> Result<Spec, serde_json::Error> {
    let capabilities =
        ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"];
    serde_json::from_value(json!({
        "ociVersion": "1.2.1",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": [format!("/{PROGRAM}"), "rehearsal"],
            "env": ["PATH=/bin"],
            "cwd": "/",
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs" },
        "hostname": ID,
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" },
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }))
}

fn mount(destination: &str, kind: &str, options: &[&str]) -> serde_json::Value {
    json!({ "destination": destination, "type": kind, "source": kind, "options": options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_says_a_byte_and_ends() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        write_program(&path).unwrap();
        let output = std::process::Command::new(&path).output().unwrap();
        assert!(output.status.success());
        assert_eq!((output.stdout, output.stderr), (vec![], vec![0x7f]));
    }

    #[test]
    fn the_specification_can_be_translated() {
        let guest = spec::translate(specification().unwrap(), ID, &PodNamespaces::default()).unwrap();
        assert!(guest.mounts.is_empty());
        assert!(guest.own_pid_namespace);
    }
}
