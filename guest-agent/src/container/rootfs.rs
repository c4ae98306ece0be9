//! A container's root: its mounts, devices, hidden and read-only paths, and the change into it.
//!
//! Everything is prepared below the root's mount while the guest's own tree is still there; every path of the container
//! is looked up inside that root, so that links in its image can't lead out of it.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::devices::{self, DeviceError, DevicePlan};
use super::mount_options;
use super::mounts::{MountError, MountPlan, Mounted};
use super::spec::{Linux, Root, Spec, items};
use crate::sys::mount::{self, AttrChange, attr};
use crate::sys::path;
use crate::sys::{c_path, check};

/// A checked description of a container's root.
#[derive(Debug, Clone)]
pub struct RootPlan {
    path: PathBuf,
    read_only: bool,
    propagation: u64,
    mounts: Vec<MountPlan>,
    devices: Vec<DevicePlan>,
    masked: Vec<PathBuf>,
    read_only_paths: Vec<PathBuf>,
}

/// A wrong root, or one that could not be made.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum RootError {
    #[error("root is missing")]
    Missing,
    #[error("root.path {0:?} is not an absolute path")]
    Relative(PathBuf),
    #[error("linux.rootfsPropagation: there is no propagation type {0:?}")]
    Propagation(String),
    #[error(transparent)]
    Mount(#[from] MountError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("can't open the root file system {path:?}")]
    Open { path: PathBuf, source: io::Error },
    #[error("can't set the propagation of the root mount")]
    SetPropagation(#[source] io::Error),
    #[error("can't hide {path:?}")]
    Mask { path: PathBuf, source: io::Error },
    #[error("can't make {path:?} read-only")]
    ReadOnly { path: PathBuf, source: io::Error },
    #[error("can't change into the root file system: {step}")]
    Pivot { step: &'static str, source: io::Error },
}

/// What of a root has to be opened with the guest's own privileges.
#[derive(Debug)]
pub(crate) struct OpenedRoot {
    root: OwnedFd,
    sources: Vec<Option<OwnedFd>>,
}

/// A root with all that is in it.
#[derive(Debug)]
pub(crate) struct BuiltRoot {
    root: OwnedFd,
    /// Mounts that are to become read-only.
    read_only: Vec<(PathBuf, OwnedFd)>,
    /// What was left out, for the log.
    pub remarks: Vec<String>,
}

impl RootError {
    /// Whether the specification names something that does not exist.
    pub(crate) fn is_specification(&self) -> bool {
        match self {
            Self::Open { source, .. } | Self::Mount(MountError::OpenSource { source, .. }) => {
                source.kind() == io::ErrorKind::NotFound
            }
            Self::Mount(MountError::NotOrdinary { .. }) | Self::Device(DeviceError::Absent { .. }) => true,
            _ => false,
        }
    }
}

impl RootPlan {
    /// Reads and checks the parts of the specification that concern the root.
    pub(crate) fn new(spec: &Spec, linux: &Linux) -> Result<Self, RootError> {
        let Root { path, readonly } = spec.root.clone().ok_or(RootError::Missing)?;
        if !path.is_absolute() {
            return Err(RootError::Relative(path));
        }
        let propagation = match linux.rootfs_propagation.as_deref() {
            None | Some("") => libc::MS_SLAVE,
            Some(name) => match mount_options::propagation(name) {
                Some((kind, _)) => kind,
                None => return Err(RootError::Propagation(name.to_owned())),
            },
        };
        let rules = linux.resources.as_ref().map(|resources| items(&resources.devices)).unwrap_or_default();
        Ok(Self {
            path,
            read_only: readonly,
            propagation,
            mounts: items(&spec.mounts).iter().map(MountPlan::new).collect::<Result<_, _>>()?,
            devices: devices::plan(items(&linux.devices), rules)?,
            masked: items(&linux.masked_paths).to_vec(),
            read_only_paths: items(&linux.readonly_paths).to_vec(),
        })
    }

    /// Opens the root and the sources of bind mounts. With `own_users` the container has a user namespace of its own, and with
    /// `own_ipc` an IPC namespace.
    pub(crate) fn open(&self, own_users: bool, own_ipc: bool) -> Result<OpenedRoot, RootError> {
        let root = mount::clone_tree(&self.path, true)
            .map_err(|source| RootError::Open { path: self.path.clone(), source })?;
        let sources =
            self.mounts.iter().map(|plan| plan.open_source(own_users, own_ipc)).collect::<Result<_, _>>()?;
        Ok(OpenedRoot { root, sources })
    }

    /// Makes the root with all that is in it. The calling process is in the container's mount namespace, which still
    /// holds the guest's tree.
    pub(crate) fn build(&self, opened: OpenedRoot) -> Result<BuiltRoot, RootError> {
        let OpenedRoot { root, sources } = opened;
        self.detach_from_guest()?;
        self.attach_root(root.as_fd())?;
        let mut remarks = Vec::new();
        let mut read_only = Vec::new();
        for (plan, source) in self.mounts.iter().zip(sources) {
            match plan.mount(root.as_fd(), source)? {
                Mounted::Done => {}
                Mounted::ReadOnlyLater(mount) => read_only.push((plan.destination.clone(), mount)),
                Mounted::Skipped(remark) => remarks.push(remark),
            }
        }
        for device in &self.devices {
            device.make(root.as_fd())?;
        }
        devices::make_links(root.as_fd())?;
        self.read_only_paths.iter().try_for_each(|path| {
            make_read_only(root.as_fd(), path)
                .map_err(|source| RootError::ReadOnly { path: path.clone(), source })
        })?;
        self.masked.iter().try_for_each(|path| {
            hide(root.as_fd(), path).map_err(|source| RootError::Mask { path: path.clone(), source })
        })?;
        Ok(BuiltRoot { root, read_only, remarks })
    }

    /// Keeps mounts made here from appearing in the guest's namespace.
    fn detach_from_guest(&self) -> Result<(), RootError> {
        let kind = if self.propagation == libc::MS_PRIVATE { libc::MS_PRIVATE } else { libc::MS_SLAVE };
        let guest_root = path::open_directory(Path::new("/")).map_err(RootError::SetPropagation)?;
        mount::set_attributes(guest_root.as_fd(), AttrChange::propagation(kind), true)
            .map_err(RootError::SetPropagation)
    }

    fn attach_root(&self, root: BorrowedFd<'_>) -> Result<(), RootError> {
        path::open_directory(&self.path)
            .and_then(|target| mount::attach(root, target.as_fd()))
            .map_err(|source| RootError::Open { path: self.path.clone(), source })
    }

    /// Makes the root that [`build`](Self::build) made the root directory of the process and its namespace.
    pub(crate) fn enter(&self, built: &BuiltRoot) -> Result<(), RootError> {
        let root = built.root.as_fd();
        let error = |step| move |source| RootError::Pivot { step, source };
        let guest_root = path::open_directory(Path::new("/")).map_err(error("open the old root"))?;
        change_directory_to(root).map_err(error("change the directory"))?;
        // With both arguments the same the old root ends up on top of the new one, from where it is detached.
        // SAFETY: both paths are constants.
        check(unsafe { libc::syscall(libc::SYS_pivot_root, c".".as_ptr(), c".".as_ptr()) })
            .map_err(error("pivot_root"))?;
        change_directory_to(guest_root.as_fd()).map_err(error("change to the old root"))?;
        mount::set_attributes(guest_root.as_fd(), AttrChange::propagation(libc::MS_SLAVE), true)
            .map_err(error("make the old root slave"))?;
        // SAFETY: the path is a constant.
        check(unsafe { libc::umount2(c".".as_ptr(), libc::MNT_DETACH) }.into())
            .map_err(error("detach the old root"))?;
        // SAFETY: the path is a constant.
        check(unsafe { libc::chdir(c"/".as_ptr()) }.into()).map_err(error("change to the new root"))?;
        if matches!(self.propagation, libc::MS_SHARED | libc::MS_UNBINDABLE) {
            mount::set_attributes(root, AttrChange::propagation(self.propagation), true)
                .map_err(RootError::SetPropagation)?;
        }
        Ok(())
    }

    /// Makes read-only what is to be; the last thing that is done to a root.
    pub(crate) fn finish(&self, built: BuiltRoot) -> Result<(), RootError> {
        let own = self.read_only.then(|| (PathBuf::from("/"), built.root));
        for (path, mount) in built.read_only.into_iter().chain(own) {
            mount::set_attributes(mount.as_fd(), AttrChange::new(attr::RDONLY, 0), false)
                .map_err(|source| RootError::ReadOnly { path, source })?;
        }
        Ok(())
    }
}

fn change_directory_to(directory: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: takes a number only.
    check(unsafe { libc::fchdir(directory.as_raw_fd()) }.into()).map(drop)
}

/// Opens a path of the container for hiding it; `None` if it does not exist.
fn open_existing(root: BorrowedFd<'_>, path: &Path) -> io::Result<Option<OwnedFd>> {
    match path::open_in_root(root, path, libc::O_PATH) {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn make_read_only(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let Some(target) = open_existing(root, path)? else { return Ok(()) };
    let copy = mount::clone_tree_of(target.as_fd(), true)?;
    mount::set_attributes(copy.as_fd(), AttrChange::new(attr::RDONLY, 0), true)?;
    mount::attach(copy.as_fd(), target.as_fd())
}

/// Covers a directory with an empty one, and a file with the guest's own null device, which the container can't replace.
fn hide(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let Some(target) = open_existing(root, path)? else { return Ok(()) };
    let cover = if path::file_type(target.as_fd())? == libc::S_IFDIR {
        let options = ["nr_inodes=1".to_owned(), "nr_blocks=1".to_owned(), "mode=755".to_owned()];
        let cover = mount::new_file_system("tmpfs", Some("tmpfs"), &options, attr::RDONLY)?;
        mount::attach(cover.as_fd(), target.as_fd())?;
        return Ok(());
    } else {
        mount::clone_tree(Path::new("/dev/null"), false)?
    };
    mount::attach(cover.as_fd(), target.as_fd())
}

/// Changes into the working directory of a process inside the container, making it if it is missing.
pub(crate) fn make_working_directory(path: &Path) -> io::Result<()> {
    let root = path::open_directory(Path::new("/"))?;
    path::create_in_root(root.as_fd(), path, path::Missing::Directory).map(drop)
}

/// Changes into `path`.
///
/// # Errors
/// `ENOENT` when the directory turns out to lie outside the root directory of the process.
pub(crate) fn change_directory(path: &Path) -> io::Result<()> {
    let c_path = c_path(path)?;
    // SAFETY: the path is NUL-terminated and outlives the call.
    check(unsafe { libc::chdir(c_path.as_ptr()) }.into())?;
    // The kernel says "(unreachable)/..." of a directory that is not below the root.
    let reachable = nix::unistd::getcwd()?.is_absolute();
    if reachable { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::ENOENT)) }
}
