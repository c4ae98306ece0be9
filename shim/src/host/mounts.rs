//! Mounts as descriptors: a tree of mounts that is attached nowhere, to be attached in a pod's own mount namespace.
//!
//! The host's mount table never sees a pod's mounts. So nothing of a pod can be left mounted when all its processes are
//! gone, and whoever removes a bundle recursively can't reach a volume through it.

use std::ffi::{CStr, CString, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};

use bulkhead_vmm_protocol::is_shareable;
use libc::{
    MOUNT_ATTR_NODEV, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH,
    OPEN_TREE_CLOEXEC, OPEN_TREE_CLONE,
};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::fstat;
use nix::sys::statfs::fstatfs;

use super::id_map::{self, IdMap, IdMapError};
use super::overlay::Overlay;
use super::sharing;

/// A page: what the kernel takes as options of one mount (mount(2)).
pub(super) const MAX_OPTIONS: usize = 4096 - 1;

/// Something with a mount that failed.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// No namespace to prepare mounts in.
    #[error("can't create a mount namespace: {step}")]
    Namespace {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// A mount failed.
    #[error("can't mount {kind} {source_path:?}: {hint}")]
    Mount {
        /// File system type.
        kind: String,
        /// What was to be mounted.
        source_path: String,
        /// What it may mean.
        hint: &'static str,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// Not a path the kernel takes.
    #[error("{0:?} can't be used as a path")]
    Path(PathBuf),
    /// Too many or too long options.
    #[error("the options of the {kind} mount are {length} bytes long: {MAX_OPTIONS} are possible")]
    Options {
        /// File system type.
        kind: String,
        /// Their length.
        length: usize,
    },
    /// An option we don't carry out.
    #[error("the mount option {0:?} is not supported")]
    Unsupported(String),
    /// A tree can't be copied.
    #[error("can't bind {path}")]
    Open {
        /// Its root.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Attributes can't be set.
    #[error("can't set the attributes of the mount of {path}")]
    Attributes {
        /// Where it comes from.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A tree can't be looked at.
    #[error("can't look at the mount of {path}")]
    Look {
        /// Where it comes from.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// It is nothing that a pod may share.
    #[error("{path} can't be shared with a pod: it is {what}, which has no meaning in another kernel")]
    Unshareable {
        /// Where it comes from.
        path: PathBuf,
        /// What it is.
        what: String,
    },
    /// A tree can't be attached.
    #[error("can't attach a mount at {path}")]
    Attach {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Owners can't be mapped.
    #[error("can't map the owners of the files in {path}")]
    MapIds {
        /// Where they are.
        path: PathBuf,
        /// Why: the file system may not take part.
        #[source]
        source: io::Error,
    },
    /// Owners are not to be mapped like that.
    #[error(transparent)]
    IdMap(#[from] IdMapError),
    /// No thread to do it on.
    #[error("can't start a thread for mounting")]
    Thread(#[source] io::Error),
    /// The thread is gone.
    #[error("the mounting thread ended early")]
    ThreadLost,
}

/// A tree of mounts that is attached nowhere; it goes when the descriptor goes.
#[derive(Debug)]
pub struct DetachedTree {
    fd: OwnedFd,
    origin: PathBuf,
}

/// What a mount point has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointKind {
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// How mounts propagate from a bind mount's source into its copy (mount_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Later mounts on the host stay out.
    Private,
    /// Later mounts on the host come in.
    Slave,
}

impl DetachedTree {
    /// Copies the mounts at `path`, with those below if `recursive`.
    pub fn bind(path: &Path, recursive: bool) -> Result<DetachedTree, MountError> {
        let c_path = c_string(path)?;
        let recursion = if recursive { libc::AT_RECURSIVE as c_uint } else { 0 };
        let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursion;
        // SAFETY: the path is NUL-terminated and outlives the call.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, c_path.as_ptr(), flags) };
        let fd = Errno::result(fd).map_err(|source| MountError::Open { path: path.to_owned(), source })?;
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(DetachedTree { fd, origin: path.to_owned() })
    }

    /// Copies all mounts at and below `path`, which is another name of `origin`.
    pub fn bind_as(path: &Path, origin: &Path) -> Result<DetachedTree, MountError> {
        DetachedTree::bind(path, true).map(|tree| DetachedTree { origin: origin.to_owned(), ..tree })
    }

    /// The same of a mount that is held as a descriptor; `origin` is where it comes from.
    pub fn bind_held(
        mount: BorrowedFd<'_>,
        origin: &Path,
        recursive: bool,
    ) -> Result<DetachedTree, MountError> {
        let recursion = if recursive { libc::AT_RECURSIVE as c_uint } else { 0 };
        let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursion | libc::AT_EMPTY_PATH as c_uint;
        // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_open_tree, mount.as_raw_fd(), c"".as_ptr(), flags) };
        let fd = Errno::result(fd).map_err(|source| MountError::Open { path: origin.to_owned(), source })?;
        // SAFETY: the kernel has just made this descriptor for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
        Ok(DetachedTree { fd, origin: origin.to_owned() })
    }

    /// What has to be there to attach it to, unless the topmost mount is nothing to be shared. The descriptor itself is
    /// asked: no path is looked up a second time.
    pub fn judge(&self) -> Result<PointKind, MountError> {
        let look = |source| MountError::Look { path: self.origin.clone(), source };
        let unshareable = |what| MountError::Unshareable { path: self.origin.clone(), what };
        let mode = fstat(&self.fd).map_err(look)?.st_mode;
        let kind = match mode & libc::S_IFMT {
            libc::S_IFBLK | libc::S_IFCHR => return Err(unshareable("a device".into())),
            libc::S_IFDIR => PointKind::Directory,
            _ => PointKind::File,
        };
        let file_system = fstatfs(&self.fd).map_err(look)?.filesystem_type().0 as u32;
        if !is_shareable(file_system, true) {
            return Err(unshareable(sharing::describe(file_system)));
        }
        Ok(kind)
    }

    /// Where it comes from.
    pub fn origin(&self) -> &Path {
        &self.origin
    }

    /// Sets what holds for every mount of a pod: device nodes on it are just files, and no set-user-id program on it
    /// counts on the host.
    pub fn restrict(&self, propagation: Propagation) -> Result<(), MountError> {
        let propagation = match propagation {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::Slave => libc::MS_SLAVE,
        };
        self.set(MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID, propagation, true)
    }

    /// Makes the topmost mount read-only, or with `recursive` all of them.
    pub fn make_read_only(&self, recursive: bool) -> Result<(), MountError> {
        self.set(MOUNT_ATTR_RDONLY, 0, recursive)
    }

    /// Has the files of the topmost mount, or with `recursive` of all, show owners of a user namespace.
    pub fn map_ids(&self, namespace: BorrowedFd<'_>, recursive: bool) -> Result<(), MountError> {
        id_map::apply(self.fd.as_fd(), namespace, recursive)
            .map_err(|source| MountError::MapIds { path: self.origin.clone(), source })
    }

    fn set(&self, attributes: u64, propagation: u64, recursive: bool) -> Result<(), MountError> {
        let attributes = libc::mount_attr { attr_set: attributes, attr_clr: 0, propagation, userns_fd: 0 };
        let recursion = if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: an empty path with AT_EMPTY_PATH means the descriptor; the structure is valid for the size given.
        let result = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                self.fd.as_raw_fd(),
                c"".as_ptr(),
                libc::AT_EMPTY_PATH | recursion,
                &raw const attributes,
                size_of::<libc::mount_attr>(),
            )
        };
        Errno::result(result)
            .map(drop)
            .map_err(|source| MountError::Attributes { path: self.origin.clone(), source })
    }

    /// Attaches the tree at `target` in the calling thread's mount namespace.
    pub fn attach(self, target: &Path) -> Result<(), MountError> {
        move_mount((self.fd.as_raw_fd(), c""), (libc::AT_FDCWD, &c_string(target)?), target)
    }

    /// Attaches the tree at a place that is held as a descriptor.
    pub fn attach_to(self, place: BorrowedFd<'_>) -> Result<(), MountError> {
        move_mount((self.fd.as_raw_fd(), c""), (place.as_raw_fd(), c""), &self.origin)
    }
}

/// Moves what is mounted at `from` to `target`.
pub fn relocate(from: &Path, target: &Path) -> Result<(), MountError> {
    move_mount((libc::AT_FDCWD, &c_string(from)?), (libc::AT_FDCWD, &c_string(target)?), target)
}

/// Moves what is mounted at `from` to a place that is held as a descriptor.
pub fn relocate_to(from: &Path, place: BorrowedFd<'_>) -> Result<(), MountError> {
    move_mount((libc::AT_FDCWD, &c_string(from)?), (place.as_raw_fd(), c""), from)
}

/// Moves a mount. An empty path means the descriptor beside it.
fn move_mount(from: (RawFd, &CStr), to: (RawFd, &CStr), target: &Path) -> Result<(), MountError> {
    let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are NUL-terminated and outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_move_mount, from.0, from.1.as_ptr(), to.0, to.1.as_ptr(), flags) };
    Errno::result(result).map(drop).map_err(|source| MountError::Attach { path: target.to_owned(), source })
}

impl AsFd for DetachedTree {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A mount as containerd asks for it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MountRequest {
    /// File system type.
    pub kind: String,
    /// Device, directory, or whatever the type takes.
    pub source: String,
    /// Directory below the root to mount on; empty for the root itself.
    pub target: String,
    /// Options as in fstab(5).
    pub options: Vec<String>,
}

/// Makes the mounts of a root file system on the directory `scratch`, each on top of the one before, and gives them as
/// a detached tree.
///
/// It happens on a thread of its own in a mount namespace of its own: nobody else ever sees `scratch` mounted.
pub async fn assemble(mounts: Vec<MountRequest>, scratch: PathBuf) -> Result<DetachedTree, MountError> {
    if let [request] = mounts.as_slice() {
        let request = request.clone();
        let quickly = on_thread(move || Ok(Overlay::of(&request).and_then(|overlay| overlay.mount())));
        if let Some(tree) = quickly.await? {
            return Ok(tree);
        }
    }
    on_thread(move || {
        let failed = |step| move |source| MountError::Namespace { step, source };
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).map_err(failed("unshare"))?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .map_err(failed("make it private"))?;
        for mut request in mounts {
            match IdMap::take(&mut request.options)? {
                Some(map) => mount_mapped(&request, &map, &scratch)?,
                None => mount_one(&request, &scratch)?,
            }
        }
        DetachedTree::bind(&scratch, true)
    })
    .await
}

/// Runs `work` on a new thread and waits for its result. The thread may change what threads have of their own (its
/// mount namespace, its directory) and takes it along when it ends.
pub async fn on_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, MountError> + Send + 'static,
) -> Result<T, MountError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name("mounts".into())
        .stack_size(128 * 1024)
        .spawn(move || {
            // Nobody waits any more: the result goes, and with it what it owns.
            let _ = sender.send(work());
        })
        .map_err(MountError::Thread)?;
    receiver.await.map_err(|_| MountError::ThreadLost)?
}

/// The same with owners mapped: those of an overlay's lower layers, whose upper one already has the right ones, or of what is bound.
fn mount_mapped(request: &MountRequest, map: &IdMap, root: &Path) -> Result<(), MountError> {
    let namespace = map.namespace()?;
    if request.kind != "overlay" {
        let recursive = request.options.iter().any(|option| option == "rbind");
        let tree = DetachedTree::bind(Path::new(&request.source), recursive)?;
        tree.map_ids(namespace.as_fd(), recursive)?;
        if request.options.iter().any(|option| option == "ro") {
            tree.make_read_only(false)?;
        }
        return tree.attach(&target_below(root, &request.target)?);
    }
    // The mapped layers are looked up before the overlay covers them.
    let layers = MountRequest { kind: "tmpfs".into(), source: "layers".into(), ..MountRequest::default() };
    mount_one(&layers, root)?;
    let place = |number: usize| root.join(number.to_string());
    let mut options = request.options.clone();
    for option in &mut options {
        let Some(lower) = option.strip_prefix("lowerdir=") else { continue };
        let mut places = Vec::new();
        for (number, layer) in lower.split(':').enumerate() {
            let tree = DetachedTree::bind(Path::new(layer), false)?;
            tree.map_ids(namespace.as_fd(), false)?;
            let place = place(number);
            std::fs::create_dir(&place)
                .map_err(|source| MountError::MapIds { path: place.clone(), source })?;
            tree.attach(&place)?;
            places.push(place.display().to_string());
        }
        *option = format!("lowerdir={}", places.join(":"));
    }
    mount_one(&MountRequest { options, ..request.clone() }, root)
}

fn mount_one(request: &MountRequest, root: &Path) -> Result<(), MountError> {
    let target = target_below(root, &request.target)?;
    let parsed = parse_options(&request.options)?;
    let (directory, data) = compact_overlay(&request.kind, parsed.data);
    if data.len() > MAX_OPTIONS {
        return Err(MountError::Options { kind: request.kind.clone(), length: data.len() });
    }
    let failed = |source| MountError::Mount {
        kind: request.kind.clone(),
        source_path: request.source.clone(),
        hint: match source {
            Errno::ENODEV => "the host's kernel lacks this file system",
            Errno::ENOENT => "a directory that it names does not exist",
            _ => "the snapshot may be damaged",
        },
        source,
    };
    if let Some(directory) = directory {
        nix::unistd::chdir(Path::new(&directory)).map_err(failed)?;
    }
    let is_bind = parsed.flags.contains(MsFlags::MS_BIND) || request.kind == "bind";
    let flags = if is_bind { parsed.flags | MsFlags::MS_BIND } else { parsed.flags };
    let data = (!data.is_empty()).then_some(data.as_str());
    let outcome = mount(Some(request.source.as_str()), &target, Some(request.kind.as_str()), flags, data);
    let outcome = match outcome {
        // A bind mount takes no other flags the first time.
        Ok(()) if is_bind && flags.contains(MsFlags::MS_RDONLY) => {
            mount(None::<&str>, &target, None::<&str>, flags | MsFlags::MS_REMOUNT, None::<&str>)
        }
        other => other,
    };
    nix::unistd::chdir("/").map_err(failed)?;
    outcome.map_err(failed)
}

fn target_below(root: &Path, target: &str) -> Result<PathBuf, MountError> {
    let mut path = root.to_owned();
    for component in Path::new(target).components() {
        match component {
            std::path::Component::RootDir | std::path::Component::CurDir => {}
            std::path::Component::Normal(name) => path.push(name),
            _ => return Err(MountError::Path(PathBuf::from(target))),
        }
    }
    Ok(path)
}

/// A mount's options, taken apart.
pub(super) struct ParsedOptions {
    /// Those that the kernel takes as flags.
    pub flags: MsFlags,
    /// The others, for the file system.
    pub data: Vec<String>,
}

pub(super) fn parse_options(options: &[String]) -> Result<ParsedOptions, MountError> {
    let mut flags = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        let (flag, set) = match option.as_str() {
            "" | "defaults" => (MsFlags::empty(), true),
            "ro" => (MsFlags::MS_RDONLY, true),
            "rw" => (MsFlags::MS_RDONLY, false),
            "bind" => (MsFlags::MS_BIND, true),
            "rbind" => (MsFlags::MS_BIND.union(MsFlags::MS_REC), true),
            "nosuid" => (MsFlags::MS_NOSUID, true),
            "suid" => (MsFlags::MS_NOSUID, false),
            "nodev" => (MsFlags::MS_NODEV, true),
            "dev" => (MsFlags::MS_NODEV, false),
            "noexec" => (MsFlags::MS_NOEXEC, true),
            "exec" => (MsFlags::MS_NOEXEC, false),
            "sync" => (MsFlags::MS_SYNCHRONOUS, true),
            "async" => (MsFlags::MS_SYNCHRONOUS, false),
            "dirsync" => (MsFlags::MS_DIRSYNC, true),
            "noatime" => (MsFlags::MS_NOATIME, true),
            "atime" => (MsFlags::MS_NOATIME, false),
            "nodiratime" => (MsFlags::MS_NODIRATIME, true),
            "diratime" => (MsFlags::MS_NODIRATIME, false),
            "relatime" => (MsFlags::MS_RELATIME, true),
            "norelatime" => (MsFlags::MS_RELATIME, false),
            "strictatime" => (MsFlags::MS_STRICTATIME, true),
            "nostrictatime" => (MsFlags::MS_STRICTATIME, false),
            "loop" | "remount" => return Err(MountError::Unsupported(option.clone())),
            // They could only let more in or out of a namespace that exists for a moment.
            "private" | "rprivate" | "slave" | "rslave" | "shared" | "rshared" => (MsFlags::empty(), true),
            _ => {
                data.push(option.clone());
                continue;
            }
        };
        flags.set(flag, set);
    }
    Ok(ParsedOptions { flags, data })
}

/// Shortens the lower directories of an overlay that would not fit into a page: by their common directory, which the
/// mounting thread then has to be in.
fn compact_overlay(kind: &str, data: Vec<String>) -> (Option<String>, String) {
    let joined = data.join(",");
    if kind != "overlay" || joined.len() <= MAX_OPTIONS {
        return (None, joined);
    }
    let Some(lower) = data.iter().find_map(|option| option.strip_prefix("lowerdir=")) else {
        return (None, joined);
    };
    let directories: Vec<&str> = lower.split(':').collect();
    let Some(common) = common_directory(&directories) else {
        return (None, joined);
    };
    let shortened: Vec<&str> =
        directories.iter().filter_map(|directory| directory.strip_prefix(&common)).collect();
    let replacement = format!("lowerdir={}", shortened.join(":"));
    let data: Vec<&str> = data
        .iter()
        .map(|option| if option.starts_with("lowerdir=") { replacement.as_str() } else { option.as_str() })
        .collect();
    (Some(common), data.join(","))
}

/// The longest directory, with its trailing slash, that all paths are below.
pub(super) fn common_directory(paths: &[&str]) -> Option<String> {
    let (first, rest) = paths.split_first()?;
    let mut end = first.rfind('/')? + 1;
    while !rest.iter().all(|path| path.starts_with(&first[..end])) {
        end = first[..end - 1].rfind('/')? + 1;
    }
    (end > 1).then(|| first[..end].to_owned())
}

pub(crate) fn c_string(path: &Path) -> Result<CString, MountError> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| MountError::Path(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(list: &[&str]) -> Vec<String> {
        list.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn flags_and_data_are_told_apart() {
        let parsed = parse_options(&options(&["ro", "nosuid", "index=off", "rw", "lowerdir=/a:/b"])).unwrap();
        assert_eq!(parsed.flags, MsFlags::MS_NOSUID);
        assert_eq!(parsed.data, ["index=off", "lowerdir=/a:/b"]);
        assert!(matches!(parse_options(&options(&["loop"])), Err(MountError::Unsupported(_))));
    }

    #[test]
    fn many_layers_are_shortened_by_their_common_directory() {
        let lower: Vec<String> = (0..200).map(|n| format!("/var/lib/containerd/snapshots/{n}/fs")).collect();
        let data =
            vec!["index=off".to_owned(), format!("lowerdir={}", lower.join(":")), "upperdir=/u".to_owned()];
        let (directory, text) = compact_overlay("overlay", data);
        assert_eq!(directory.as_deref(), Some("/var/lib/containerd/snapshots/"));
        assert!(text.starts_with("index=off,lowerdir=0/fs:1/fs:"));
        assert!(text.ends_with(":199/fs,upperdir=/u") && text.len() < MAX_OPTIONS);
    }

    #[test]
    fn few_layers_stay_as_they_are() {
        let data = options(&["lowerdir=/a/1:/a/2"]);
        assert_eq!(compact_overlay("overlay", data), (None, "lowerdir=/a/1:/a/2".to_owned()));
    }

    #[test]
    fn directories_without_anything_in_common_are_left() {
        assert_eq!(common_directory(&["/a/x", "/b/x"]), None);
        assert_eq!(common_directory(&["/s/1/fs", "/s/12/fs"]).as_deref(), Some("/s/"));
        assert_eq!(common_directory(&["relative"]), None);
    }

    #[tokio::test]
    async fn owners_are_mapped() {
        let directory = std::env::temp_dir().join(format!("bulkhead-mapped-{}", std::process::id()));
        for name in ["1", "2", "upper", "work", "root"] {
            std::fs::create_dir_all(directory.join(name)).unwrap();
        }
        std::fs::write(directory.join("1/file"), "x").unwrap();
        let path = directory.display();
        let request = |kind: &str, source: String, others: &[String]| MountRequest {
            kind: kind.into(),
            source,
            target: String::new(),
            options: [&options(&["uidmap=0:100000:65536", "gidmap=0:200000:65536"])[..], others].concat(),
        };
        let layers = [
            format!("lowerdir={path}/2:{path}/1"),
            format!("upperdir={path}/upper"),
            format!("workdir={path}/work"),
        ];
        let requests =
            [request("bind", format!("{path}/1"), &[]), request("overlay", "overlay".into(), &layers)];
        for request in requests {
            let kind = request.kind.clone();
            match assemble(vec![request], directory.join("root")).await {
                Ok(tree) => {
                    let status =
                        nix::sys::stat::fstatat(&tree, "file", nix::fcntl::AtFlags::empty()).unwrap();
                    assert_eq!((status.st_uid, status.st_gid), (100_000, 200_000), "{kind}");
                }
                Err(MountError::MapIds { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                    eprintln!("SKIPPED: the file system of {path} can't map owners");
                }
                Err(error) => panic!("{kind}: {}", crate::error::chain(&error)),
            }
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn targets_stay_below_the_root() {
        assert_eq!(target_below(Path::new("/r"), "/a/b").unwrap(), Path::new("/r/a/b"));
        assert_eq!(target_below(Path::new("/r"), "").unwrap(), Path::new("/r"));
        assert!(target_below(Path::new("/r"), "a/../../b").is_err());
    }
}
