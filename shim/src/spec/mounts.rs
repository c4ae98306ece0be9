//! Bind mounts of the host go through the shared tree; everything else is the guest's own.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::{SHARED_DIR, SHM_SIZE_OPTION as SIZE_OPTION};
use nix::sys::statfs::{self, statfs};
use oci_spec::runtime::Mount;

use super::SpecError;
use crate::host::id_map::IdMap;
use crate::host::mount_table::MountTable;
use crate::host::mounts::Propagation;

/// Where pods have their POSIX shared memory.
const SHM: &str = "/dev/shm";

/// Devices that mean the same on the host and in the guest, by number, with the guest's path.
const SAME_IN_GUEST: [(u32, u32, &str); 9] = [
    (1, 3, "/dev/null"),
    (1, 5, "/dev/zero"),
    (1, 7, "/dev/full"),
    (1, 8, "/dev/random"),
    (1, 9, "/dev/urandom"),
    (1, 11, "/dev/kmsg"),
    (5, 0, "/dev/tty"),
    (10, 200, "/dev/net/tun"),
    (10, 229, "/dev/fuse"),
];

/// A bind mount that the host has to put into the shared tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMount {
    /// What is bound.
    pub source: PathBuf,
    /// Whether the mounts below come along.
    pub recursive: bool,
    /// `Some(false)`: the topmost mount is read-only; `Some(true)`: those below too.
    pub read_only: Option<bool>,
    /// Whether mounts that the host makes later come in.
    pub propagation: Propagation,
    /// How the owners of its files are mapped.
    pub id_map: Option<IdMap>,
    /// Whether those of the mounts below are mapped too.
    pub maps_below: bool,
}

/// Rewrites the mounts of the container `id`; gives those that the host has to make, in the order of their numbers.
pub(super) fn translate(list: &mut [Mount], id: &str) -> Result<Vec<HostMount>, SpecError> {
    let mut host = Vec::new();
    let mut table = None;
    for mount in list {
        if !is_bind(mount) {
            check_type(mount)?;
            continue;
        }
        let destination = mount.destination().clone();
        let request = bind(mount, &destination);
        // Owners are mapped on the host, where the files are.
        mount.set_uid_mappings(None).set_gid_mappings(None);
        let left = options(mount).filter(|option| !matches!(*option, "idmap" | "ridmap"));
        let left = left.map(str::to_owned).collect();
        mount.set_options(Some(left));
        if destination == Path::new(SHM) {
            // The host's can't be shared coherently between kernels. The guest's is the same for all of the pod.
            share_memory(mount);
            continue;
        }
        if let Some(device) = same_in_guest(mount) {
            mount.set_source(Some(PathBuf::from(device)));
            continue;
        }
        let request = request?;
        if !looks_read_only_below(&request, &mut table) {
            let left = options(mount).filter(|option| *option != "ro").map(str::to_owned).collect();
            mount.set_options(Some(left));
        }
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

/// Makes a bind of the host's shared memory one of the guest's, with a size of at least as much.
fn share_memory(mount: &mut Mount) {
    let size = mount.source().as_deref().and_then(|source| statfs(source).ok()).and_then(|found| {
        let blocks = u64::try_from(found.block_size()).ok()?.checked_mul(found.blocks())?;
        (found.filesystem_type() == statfs::TMPFS_MAGIC && blocks > 0).then_some(blocks)
    });
    mount.set_source(Some(PathBuf::from(SHM)));
    if let Some(size) = size {
        let mut options = mount.options().clone().unwrap_or_default();
        options.push(format!("{SIZE_OPTION}{size}"));
        mount.set_options(Some(options));
    }
}

/// The guest's path of a device that is the same there.
fn same_in_guest(mount: &Mount) -> Option<&'static str> {
    let metadata = fs::metadata(mount.source().as_ref().filter(|source| source.is_absolute())?).ok()?;
    let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let same = SAME_IN_GUEST.iter().find(|(major, minor, _)| (*major, *minor) == number)?;
    metadata.file_type().is_char_device().then_some(same.2)
}

/// Whether all that the guest finds at a mount may be made read-only when the mount itself is. For the guest, mounts
/// below are part of it; the host's side keeps them apart, and enforces what is read-only.
fn looks_read_only_below(request: &HostMount, table: &mut Option<MountTable>) -> bool {
    if request.read_only != Some(false) || !request.recursive || !request.source.is_dir() {
        return true;
    }
    if request.propagation == Propagation::Slave {
        return false;
    }
    if table.is_none() {
        *table =
            MountTable::read().inspect_err(|error| log::warn!("can't read the mount table: {error}")).ok();
    }
    let source = fs::canonicalize(&request.source).unwrap_or_else(|_| request.source.clone());
    // Where it is not known, the host's side alone decides.
    table.as_ref().is_some_and(|table| !table.has_below(&source))
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
    let mut request = HostMount {
        source,
        recursive: mount.typ().as_deref() == Some("rbind"),
        read_only: None,
        propagation: Propagation::Private,
        id_map: IdMap::of(mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref()),
        maps_below: options(mount).any(|option| option == "ridmap"),
    };
    for option in options(mount) {
        match option {
            "rbind" => request.recursive = true,
            "ro" => request.read_only = request.read_only.or(Some(false)),
            "rro" => request.read_only = Some(true),
            "rw" => request.read_only = None,
            "rslave" | "slave" => request.propagation = Propagation::Slave,
            "rshared" | "shared" => {
                return Err(SpecError::Propagation {
                    destination: destination.to_owned(),
                    option: option.to_owned(),
                });
            }
            _ => {}
        }
    }
    Ok(request)
}
