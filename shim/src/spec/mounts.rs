//! Bind mounts of the host go through the shared tree; everything else is the guest's own.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::{SHARED_DIR, SHM_SIZE_OPTION as SIZE_OPTION};
use bulkhead_vmm_protocol::{is_shareable_name, view_name};
use nix::sys::statfs::{self, statfs};
use nix::sys::statvfs::{FsFlags, statvfs};
use oci_spec::runtime::Mount;

use super::SpecError;
use crate::host::id_map::IdMap;
use crate::host::mount_table::{MountTable, TableMount};
use crate::host::mounts::Propagation;
use crate::host::overlay::mount_id;

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

/// The most mounts below a volume that the guest has as mounts of its own. Others are part of the volume to it.
const MAX_BELOW: usize = 64;

/// File systems that answer without asking anybody else. A container's start must not wait for one that does and lies
/// somewhere below a volume.
const LOCAL: &[&str] = &[
    "ext2", "ext3", "ext4", "xfs", "btrfs", "bcachefs", "f2fs", "zfs", "overlay", "tmpfs", "ramfs", "erofs",
    "squashfs", "iso9660", "udf", "vfat", "exfat", "ntfs3",
];

/// What holds for a mount and means the same in the guest.
const FLAGS: &[&str] = &["ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime"];

/// Rewrites the mounts of the container `id`; gives those that the host has to make, in the order of their numbers.
pub(super) fn translate(list: &mut Vec<Mount>, id: &str) -> Result<Vec<HostMount>, SpecError> {
    let mut host = Vec::new();
    let mut table = None;
    let mut translated = Vec::with_capacity(list.len());
    for mut mount in list.drain(..) {
        if !is_bind(&mount) {
            check_type(&mount)?;
            translated.push(mount);
            continue;
        }
        let destination = mount.destination().clone();
        let request = bind(&mount, &destination);
        // Owners are mapped on the host, where the files are.
        mount.set_uid_mappings(None).set_gid_mappings(None);
        let left = options(&mount).filter(|option| !matches!(*option, "idmap" | "ridmap"));
        let left = left.map(str::to_owned).collect();
        mount.set_options(Some(left));
        if destination == Path::new(SHM) {
            // The host's can't be shared coherently between kernels. The guest's is the same for all of the pod.
            share_memory(&mut mount);
            translated.push(mount);
            continue;
        }
        if let Some(device) = same_in_guest(&mount) {
            mount.set_source(Some(PathBuf::from(device)));
            translated.push(mount);
            continue;
        }
        let request = request?;
        let place = format!("{id}/mounts/{}", host.len());
        let below = Below::of(&request, &mut table);
        if request.read_only == Some(false) && !below.is_complete {
            // The guest would make all that it does not know as mounts of their own read-only too. The host's side keeps
            // them apart, and enforces what is read-only.
            let left = options(&mount).filter(|option| *option != "ro").map(str::to_owned).collect();
            mount.set_options(Some(left));
        }
        keep_flags(&mut mount, below.is_complete);
        let recursive: Vec<&str> = options(&mount)
            .filter_map(|option| option.strip_prefix('r'))
            .filter(|flag| FLAGS.contains(flag))
            .collect();
        let below: Vec<Mount> =
            below.mounts.iter().map(|below| below.in_guest(&destination, &place, &recursive)).collect();
        let source = match fs::metadata(&request.source) {
            Ok(metadata) => in_view((libc::major(metadata.dev()), libc::minor(metadata.dev())), &place),
            // Whoever mounts it will find out what is wrong with it.
            Err(_) => Path::new(SHARED_DIR).join(&place),
        };
        mount.set_source(Some(source));
        translated.push(mount);
        translated.extend(below);
        host.push(request);
    }
    *list = translated;
    Ok(host)
}

/// Where the guest finds a place in the shared tree on a file system with this device number.
fn in_view((major, minor): (u32, u32), place: &str) -> PathBuf {
    Path::new(SHARED_DIR).join(view_name(major, minor)).join(place)
}

/// What is mounted below a volume when it is bound, as far as the guest is to have mounts of its own for it.
#[derive(Debug, Default)]
struct Below {
    mounts: Vec<BelowMount>,
    /// Whether that is all that there is or will be.
    is_complete: bool,
}

#[derive(Debug)]
struct BelowMount {
    /// Where, relative to the volume.
    place: PathBuf,
    device: (u32, u32),
    flags: Vec<&'static str>,
}

impl Below {
    fn of(request: &HostMount, table: &mut Option<MountTable>) -> Below {
        if !request.recursive || !request.source.is_dir() {
            return Below { is_complete: request.propagation == Propagation::Private, ..Below::default() };
        }
        if request.propagation == Propagation::Slave {
            // They may go again.
            return Below::default();
        }
        if table.is_none() {
            *table = MountTable::read()
                .inspect_err(|error| log::warn!("can't read the mount table: {error}"))
                .ok();
        }
        // Where it is not known, the host's side alone decides.
        let Some(table) = table else { return Below::default() };
        let source = fs::canonicalize(&request.source).unwrap_or_else(|_| request.source.clone());
        let mut all = Below { is_complete: true, ..Below::default() };
        let (known, hidden) = shared(table.below(&source));
        for mount in known {
            match BelowMount::new(mount, &source) {
                Some(below) if all.mounts.len() < MAX_BELOW && !hidden.contains(&mount.point.as_path()) => {
                    all.mounts.push(below);
                }
                _ => all.is_complete = false,
            }
        }
        all
    }
}

/// Those of the mounts that a pod may share, and where the others are. What is mounted on one of these a pod does not have.
fn shared<'a>(below: impl Iterator<Item = &'a TableMount>) -> (Vec<&'a TableMount>, Vec<&'a Path>) {
    let (mut known, others): (Vec<_>, Vec<_>) = below.partition(|mount| is_shareable_name(&mount.kind));
    let hidden: Vec<&Path> = others.into_iter().map(|mount| mount.point.as_path()).collect();
    known.retain(|mount| !hidden.iter().any(|point| mount.point != *point && mount.point.starts_with(point)));
    (known, hidden)
}

impl BelowMount {
    fn new(mount: &TableMount, source: &Path) -> Option<BelowMount> {
        // Something else may lie on top of it, or of where it is.
        if !LOCAL.contains(&mount.kind.as_str()) || mount_id(&mount.point).ok()? != mount.id {
            return None;
        }
        let flags = FLAGS.iter().copied().filter(|flag| mount.options.iter().any(|option| option == flag));
        Some(BelowMount {
            place: mount.point.strip_prefix(source).ok()?.to_owned(),
            device: mount.device,
            flags: flags.collect(),
        })
    }

    /// The guest's mount of it; `recursive` are flags that the volume's mount has for all below it.
    fn in_guest(&self, destination: &Path, place: &str, recursive: &[&str]) -> Mount {
        let flags = self.flags.iter().chain(recursive).map(|flag| (*flag).to_owned());
        let mut mount = Mount::default();
        mount.set_typ(Some("bind".to_owned()));
        mount.set_destination(destination.join(&self.place));
        mount.set_source(Some(in_view(self.device, place).join(&self.place)));
        mount.set_options(Some(std::iter::once("bind".to_owned()).chain(flags).collect()));
        mount
    }
}

/// Gives a volume's mount in the guest the flags of the host's mount that its source is on, as a bind mount has them on the host.
fn keep_flags(mount: &mut Mount, is_complete: bool) {
    // Whoever mounts it will find out what is wrong with it.
    let Some(found) = mount.source().as_ref().and_then(|source| statvfs(source.as_path()).ok()) else {
        return;
    };
    let flags = found.flags();
    let kept = [
        (FsFlags::ST_NOSUID, "nosuid"),
        (FsFlags::ST_NODEV, "nodev"),
        (FsFlags::ST_NOEXEC, "noexec"),
        (FsFlags::ST_NOATIME, "noatime"),
        (FsFlags::ST_NODIRATIME, "nodiratime"),
    ];
    let kept = kept.iter().filter(|(flag, _)| flags.contains(*flag)).map(|(_, name)| *name);
    // Before the others: `exec` that is asked for counts more.
    let mut all: Vec<String> = kept.chain(options(mount)).map(str::to_owned).collect();
    // Mounts that the guest does not know as such would become read-only too. The host's side enforces what is.
    if flags.contains(FsFlags::ST_RDONLY) && is_complete && !options(mount).any(|option| option == "ro") {
        all.push("ro".to_owned());
    }
    mount.set_options(Some(all));
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

fn is_bind(mount: &Mount) -> bool {
    matches!(mount.typ().as_deref(), Some("bind" | "rbind"))
        || options(mount).any(|o| matches!(o, "bind" | "rbind"))
}

/// Makes a bind of the host's shared memory one of the guest's, with a size of at least as much. A directory that is only a part of
/// some file system of the node's says nothing about sizes: with the Sandbox API containerd mounts nothing there.
fn share_memory(mount: &mut Mount) {
    let source = mount.source().as_deref().filter(|source| is_mount_point(source));
    let size = source.and_then(|source| statfs(source).ok()).and_then(|found| {
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

/// Whether another file system than its parent's begins at a directory.
fn is_mount_point(directory: &Path) -> bool {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    match (device(directory), directory.parent().map(device)) {
        (Ok(own), Some(Ok(parents))) => own != parents,
        _ => false,
    }
}

/// The guest's path of a device that is the same there.
fn same_in_guest(mount: &Mount) -> Option<&'static str> {
    let metadata = fs::metadata(mount.source().as_ref().filter(|source| source.is_absolute())?).ok()?;
    let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let same = SAME_IN_GUEST.iter().find(|(major, minor, _)| (*major, *minor) == number)?;
    metadata.file_type().is_char_device().then_some(same.2)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_as_large_as_what_is_mounted_there() {
        let options_of = |source: &Path| {
            let mut mount = Mount::default();
            mount.set_source(Some(source.to_owned())).set_options(Some(vec!["rbind".into()]));
            share_memory(&mut mount);
            assert_eq!(mount.source().as_deref(), Some(Path::new(SHM)));
            mount.options().clone().unwrap().join(",")
        };
        assert!(options_of(Path::new(SHM)).starts_with(&format!("rbind,{SIZE_OPTION}")));
        // A directory that containerd makes and mounts nothing on.
        let directory = Path::new(SHM).join(format!("bulkhead-shm-{}", std::process::id()));
        fs::create_dir(&directory).unwrap();
        let options = options_of(&directory);
        fs::remove_dir(&directory).unwrap();
        assert_eq!(options, "rbind");
        assert_eq!(options_of(Path::new("/nonexistent/shm")), "rbind");
    }

    #[test]
    fn what_is_mounted_below_is_a_mount_in_the_guest() {
        let below = BelowMount { place: "a/b".into(), device: (0, 5), flags: vec!["nodev"] };
        let mount = below.in_guest(Path::new("/data"), "c/mounts/3", &["ro"]);
        assert_eq!(mount.destination(), Path::new("/data/a/b"));
        assert_eq!(mount.source().as_deref(), Some(Path::new("/run/bulkhead/shared/@5/c/mounts/3/a/b")));
        assert_eq!(mount.options().as_deref(), Some(&["bind", "nodev", "ro"].map(str::to_owned)[..]));
    }

    #[test]
    fn what_is_mounted_on_the_hosts_kernel_interfaces_goes_with_them() {
        let list = [("/dev", "devtmpfs"), ("/dev/shm", "tmpfs"), ("/device", "tmpfs"), ("/dev", "tmpfs")];
        let list = list.map(|(point, kind)| TableMount {
            id: 1,
            point: point.into(),
            device: (0, 5),
            options: Vec::new(),
            kind: kind.into(),
            root: "/".into(),
            source: "none".into(),
        });
        let (known, hidden) = shared(list.iter());
        assert_eq!(known, [&list[2], &list[3]]);
        assert_eq!(hidden, [Path::new("/dev")]);
    }

    #[test]
    fn what_lies_under_something_else_is_left_to_the_host() {
        let mount = |id, kind: &str| TableMount {
            id,
            point: "/".into(),
            device: (0, 5),
            options: vec!["rw".into(), "nodev".into(), "relatime".into()],
            kind: kind.into(),
            root: "/".into(),
            source: "none".into(),
        };
        let id = mount_id("/").unwrap();
        let known = BelowMount::new(&mount(id, "overlay"), Path::new("/")).unwrap();
        assert_eq!((known.device, known.flags), ((0, 5), vec!["nodev"]));
        assert!(BelowMount::new(&mount(id + 1, "overlay"), Path::new("/")).is_none());
        assert!(BelowMount::new(&mount(id, "nfs4"), Path::new("/")).is_none());
    }
}
