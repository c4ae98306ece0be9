//! A container's files: its root file system and its bind mounts, prepared on the host and put into the shared tree.

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use bulkhead_vmm_protocol::roots;
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::Spec;

use crate::error::{ApiError, Classify, Code, chain};
use crate::host::assemble::assemble;
use crate::host::mount_request::MountRequest;
use crate::host::mounts::{DetachedTree, MountError, Propagation};
use crate::pod::tree::{SharedTree, TreeError};
use crate::spec::{self, HostMount};

/// Why a container has no files.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    /// There is nothing to run.
    #[error("the container has no root file system: containerd mounts none, and {path} {what}")]
    Missing {
        /// Where it could have been.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The directory to assemble it on.
    #[error("can't prepare the root file system at {path}")]
    Scratch {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mount failed.
    #[error("can't mount the root file system")]
    Mount(#[source] MountError),
    /// A volume failed.
    #[error("can't bind a volume")]
    Volume(#[source] MountError),
    /// The shared tree.
    #[error("can't put the container's files into the pod")]
    Attach(#[from] TreeError),
}

impl Classify for RootfsError {
    fn code(&self) -> Code {
        match self {
            RootfsError::Missing { .. } | RootfsError::Mount(_) | RootfsError::Volume(_) => {
                Code::FAILED_PRECONDITION
            }
            RootfsError::Scratch { .. } | RootfsError::Attach(_) => Code::INTERNAL,
        }
    }
}

/// What of a root file system is shared as files.
#[derive(Debug, Clone, Copy)]
pub(crate) enum RootFiles<'a> {
    /// All of it, as these mounts (or the bundle's, if there are none).
    Mounts(&'a [Mount]),
    /// What lies below the container's changes, which the guest has on a disk.
    Lower(&'a Mount),
    /// The directory of what the container changes; the guest puts it on top of layers that it has on a disk.
    Changes(&'a Path),
    /// Nothing: it is on a disk.
    None,
}

/// A container's mounts, attached nowhere yet.
#[derive(Debug)]
pub(crate) struct Files {
    /// With the name of its place.
    root: Option<(DetachedTree, &'static str)>,
    volumes: Vec<(DetachedTree, Propagation)>,
}

impl Files {
    /// Mounts what is shared of the root file system, and the volumes.
    pub(crate) async fn prepare(
        root: RootFiles<'_>,
        volumes: &[HostMount],
        spec: &Spec,
        bundle: &Path,
    ) -> Result<Files, ApiError> {
        let root = match root {
            RootFiles::Mounts(mounts) => Some((mount_root(mounts, spec, bundle).await?, roots::ROOTFS)),
            RootFiles::Lower(mount) => Some((mount_lower(mount, bundle).await?, roots::LOWER)),
            RootFiles::Changes(directory) => {
                let changes = DetachedTree::bind(directory, false).map_err(RootfsError::Mount)?;
                changes
                    .judge()
                    .and_then(|_| changes.restrict(Propagation::Private))
                    .map_err(RootfsError::Mount)?;
                Some((changes, roots::CHANGES))
            }
            RootFiles::None => None,
        };
        let volumes = volumes.iter().map(bind).collect::<Result<_, _>>().map_err(RootfsError::Volume)?;
        Ok(Files { root, volumes })
    }

    /// Attaches everything where the translated specification says it is.
    pub(crate) async fn attach(self, tree: &SharedTree, id: &str) -> Result<(), RootfsError> {
        let directory = Path::new(id);
        if let Some((root, name)) = self.root {
            tree.attach(root, &directory.join(name)).await?;
        }
        for (number, (volume, propagation)) in self.volumes.into_iter().enumerate() {
            let point = directory.join("mounts").join(number.to_string());
            match propagation {
                Propagation::Private => tree.attach(volume, &point).await?,
                Propagation::Slave => tree.attach_following(volume, &point).await?,
            }
        }
        Ok(())
    }
}

async fn mount_root(mounts: &[Mount], spec: &Spec, bundle: &Path) -> Result<DetachedTree, ApiError> {
    let rootfs = if mounts.is_empty() {
        let path = spec::bundle_rootfs(spec, bundle)?;
        check_directory(&path)?;
        let tree = DetachedTree::bind(&path, true).map_err(RootfsError::Mount)?;
        tree.judge().map_err(RootfsError::Mount)?;
        tree
    } else {
        assemble(mounts.iter().map(request).collect(), scratch(bundle)?).await.map_err(RootfsError::Mount)?
    };
    rootfs.restrict(Propagation::Private).map_err(RootfsError::Mount)?;
    Ok(rootfs)
}

/// Mounts layers that are read only.
async fn mount_lower(lower: &Mount, bundle: &Path) -> Result<DetachedTree, RootfsError> {
    let tree = assemble(vec![request(lower)], scratch(bundle)?).await;
    let tree = tree.map_err(RootfsError::Mount)?;
    tree.restrict(Propagation::Private)
        .and_then(|()| tree.make_read_only(true))
        .map_err(RootfsError::Mount)?;
    Ok(tree)
}

/// A directory to mount on, where nobody sees it.
fn scratch(bundle: &Path) -> Result<PathBuf, RootfsError> {
    let path = bundle.join("rootfs");
    match fs::create_dir_all(&path) {
        Ok(()) => Ok(path),
        Err(source) => Err(RootfsError::Scratch { path, source }),
    }
}

/// Detaches a container's files; what fails is logged, since the pod's end will do it in any case.
pub(crate) async fn remove(tree: &SharedTree, id: &str) {
    if let Err(error) = tree.remove(id).await {
        log::error!("the files of {id} stay in the pod for now: {}", chain(&error));
    }
}

fn request(mount: &Mount) -> MountRequest {
    MountRequest {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    }
}

fn bind(volume: &HostMount) -> Result<(DetachedTree, Propagation), MountError> {
    let tree = DetachedTree::bind(&volume.source, volume.recursive)?;
    // Early, although attaching it will judge it again: before there is a pod.
    tree.judge()?;
    if let Some(map) = &volume.id_map {
        tree.map_ids(map.namespace()?.as_fd(), volume.maps_below)?;
    }
    tree.restrict(volume.propagation)?;
    if let Some(recursive) = volume.read_only {
        tree.make_read_only(recursive)?;
    }
    Ok((tree, volume.propagation))
}

fn check_directory(path: &Path) -> Result<(), RootfsError> {
    let missing = |what| RootfsError::Missing { path: path.to_owned(), what };
    match fs::read_dir(path) {
        Ok(mut entries) => match entries.next() {
            Some(_) => Ok(()),
            None => Err(missing("is empty")),
        },
        Err(error) => Err(missing(match error.kind() {
            io::ErrorKind::NotFound => "does not exist",
            io::ErrorKind::NotADirectory => "is not a directory",
            _ => "can't be read",
        })),
    }
}
