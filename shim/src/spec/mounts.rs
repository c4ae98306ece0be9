//! Bind mounts of the host go through the shared tree; everything else is the guest's own.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::SHARED_DIR;
use nix::sys::statfs::{self, FsType, statfs};
use oci_spec::runtime::Mount;

use super::{SpecError, io_error};
use crate::host::mounts::Propagation;

/// Where pods have their POSIX shared memory.
const SHM: &str = "/dev/shm";

/// A bind mount that the host has to put into the shared tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    /// What is bound.
    pub source: PathBuf,
    /// Whether it is a directory.
    pub is_directory: bool,
    /// Whether the mounts below come along.
    pub recursive: bool,
    /// `Some(false)`: the topmost mount is read-only; `Some(true)`: those below too.
    pub read_only: Option<bool>,
    /// Whether mounts that the host makes later come in.
    pub propagation: Propagation,
}

/// Rewrites the mounts of the container `id`; gives those that the host has to make, in the order of their numbers.
pub(super) fn translate(list: &mut [Mount], id: &str) -> Result<Vec<HostMount>, SpecError> {
    let mut host = Vec::new();
    for mount in list {
        if !is_bind(mount) {
            check_type(mount)?;
            continue;
        }
        let destination = mount.destination().clone();
        if destination == Path::new(SHM) {
            // The host's can't be shared coherently between kernels. The guest's is the same for all of the pod.
            mount.set_source(Some(PathBuf::from(SHM)));
            continue;
        }
        let request = bind(mount, &destination)?;
        mount.set_source(Some(PathBuf::from(format!("{SHARED_DIR}/{id}/mounts/{}", host.len()))));
        host.push(request);
    }
    Ok(host)
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn is_bind(mount: &Mount) -> bool {
    matches!(mount.typ().as_deref(), Some("bind" | "rbind"))
        || options(mount).any(|o| matches!(o, "bind" | "rbind"))
}

fn check_type(mount: &Mount) -> Result<(), SpecError> {
    match mount.typ().as_deref().unwrap_or_default() {
        "proc" | "sysfs" | "tmpfs" | "devpts" | "mqueue" | "cgroup" | "cgroup2" => Ok(()),
        kind => Err(SpecError::MountType { kind: kind.to_owned(), destination: mount.destination().clone() }),
    }
}

fn bind(mount: &Mount, destination: &Path) -> Result<HostMount, SpecError> {
    let source = match mount.source() {
        Some(source) if source.is_absolute() => source.clone(),
        _ => return Err(SpecError::MountSource { destination: destination.to_owned() }),
    };
    let failed = |source_error| SpecError::Source {
        path: source.clone(),
        destination: destination.to_owned(),
        source: source_error,
    };
    let unshareable =
        |what| SpecError::Unshareable { path: source.clone(), destination: destination.to_owned(), what };

    let kind = fs::metadata(&source).map_err(failed)?.file_type();
    if kind.is_block_device() || kind.is_char_device() {
        return Err(unshareable("a device"));
    }
    let file_system = statfs(&source).map_err(|errno| failed(io_error(errno)))?.filesystem_type();
    if let Some(what) = kernel_interface(file_system) {
        return Err(unshareable(what));
    }

    let mut request = HostMount {
        source: source.clone(),
        is_directory: kind.is_dir(),
        recursive: mount.typ().as_deref() == Some("rbind"),
        read_only: None,
        propagation: Propagation::Private,
    };
    for option in options(mount) {
        match option {
            "rbind" => request.recursive = true,
            "ro" => request.read_only = request.read_only.or(Some(false)),
            "rro" => request.read_only = Some(true),
            "rw" => request.read_only = None,
            "rslave" | "slave" | "rshared" | "shared" => request.propagation = Propagation::Slave,
            _ => {}
        }
    }
    Ok(request)
}

/// File systems that are windows into the host's kernel rather than files.
fn kernel_interface(file_system: FsType) -> Option<&'static str> {
    /// `SYSFS_MAGIC` and the like are missing from nix.
    const SYSFS: FsType = FsType(0x6265_6572);
    const DEVPTS: FsType = FsType(0x1cd1);
    const DEBUGFS: FsType = FsType(0x6462_6720);
    const SECURITYFS: FsType = FsType(0x7363_6673);
    const BPF: FsType = FsType(0xcafe_4a11);
    match file_system {
        statfs::PROC_SUPER_MAGIC => Some("procfs"),
        SYSFS => Some("sysfs"),
        statfs::CGROUP_SUPER_MAGIC | statfs::CGROUP2_SUPER_MAGIC => Some("a cgroup file system"),
        DEVPTS => Some("devpts"),
        DEBUGFS | statfs::TRACEFS_MAGIC => Some("a debugging file system"),
        SECURITYFS => Some("securityfs"),
        BPF => Some("a BPF file system"),
        statfs::NSFS_MAGIC => Some("a namespace"),
        _ => None,
    }
}
