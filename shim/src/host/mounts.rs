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
use nix::sys::stat::fstat;
use nix::sys::statfs::fstatfs;

use super::id_map::{self, IdMapError};
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
pub(crate) struct DetachedTree {
    fd: OwnedFd,
    origin: PathBuf,
}

/// What a mount point has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PointKind {
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
    pub(crate) fn bind(path: &Path, recursive: bool) -> Result<DetachedTree, MountError> {
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
    pub(crate) fn bind_as(path: &Path, origin: &Path) -> Result<DetachedTree, MountError> {
        DetachedTree::bind(path, true).map(|tree| DetachedTree { origin: origin.to_owned(), ..tree })
    }

    /// The same of a mount that is held as a descriptor; `origin` is where it comes from.
    pub(crate) fn bind_held(
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
    pub(crate) fn judge(&self) -> Result<PointKind, MountError> {
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
    pub(crate) fn origin(&self) -> &Path {
        &self.origin
    }

    /// Sets what holds for every mount of a pod: device nodes on it are just files, and no set-user-id program on it
    /// counts on the host.
    pub(crate) fn restrict(&self, propagation: Propagation) -> Result<(), MountError> {
        let propagation = match propagation {
            Propagation::Private => libc::MS_PRIVATE,
            Propagation::Slave => libc::MS_SLAVE,
        };
        self.set(MOUNT_ATTR_NODEV | MOUNT_ATTR_NOSUID, propagation, true)
    }

    /// Makes the topmost mount read-only, or with `recursive` all of them.
    pub(crate) fn make_read_only(&self, recursive: bool) -> Result<(), MountError> {
        self.set(MOUNT_ATTR_RDONLY, 0, recursive)
    }

    /// Has the files of the topmost mount, or with `recursive` of all, show owners of a user namespace.
    pub(crate) fn map_ids(&self, namespace: BorrowedFd<'_>, recursive: bool) -> Result<(), MountError> {
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
    pub(crate) fn attach(self, target: &Path) -> Result<(), MountError> {
        move_mount((self.fd.as_raw_fd(), c""), (libc::AT_FDCWD, &c_string(target)?), target)
    }

    /// Attaches the tree at a place that is held as a descriptor.
    pub(crate) fn attach_to(self, place: BorrowedFd<'_>) -> Result<(), MountError> {
        move_mount((self.fd.as_raw_fd(), c""), (place.as_raw_fd(), c""), &self.origin)
    }
}

/// Moves what is mounted at `from` to `target`.
pub(crate) fn relocate(from: &Path, target: &Path) -> Result<(), MountError> {
    move_mount((libc::AT_FDCWD, &c_string(from)?), (libc::AT_FDCWD, &c_string(target)?), target)
}

/// Moves what is mounted at `from` to a place that is held as a descriptor.
pub(crate) fn relocate_to(from: &Path, place: BorrowedFd<'_>) -> Result<(), MountError> {
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

/// Runs `work` on a new thread and waits for its result. The thread may change what threads have of their own (its
/// mount namespace, its directory) and takes it along when it ends.
pub(crate) async fn on_thread<T: Send + 'static>(
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

pub(crate) fn c_string(path: &Path) -> Result<CString, MountError> {
    use std::os::unix::ffi::OsStrExt;
    CString::new(path.as_os_str().as_bytes()).map_err(|_| MountError::Path(path.to_owned()))
}
