//! The mount namespace that only the pod has.
//!
//! It holds three mounts to begin with: the pod's directory as `/`, the shared tree at `/shared` (shared, so that the file
//! server's copy of it receives what is attached later), and `/proc` for the file server until it has jailed itself. When the
//! pod's processes are gone and the shim has closed the namespace, all mounts of the pod are gone.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, pivot_root};

use crate::host::mounts::{DetachedTree, MountError, PointKind, Propagation, on_thread};
use crate::host::pin::NamespaceError;
use crate::host::sharing::Empty;
use crate::host::small_namespace;

/// The tree's place in the pod's namespace.
pub(crate) const TREE: &str = "/shared";

/// Where a directory or a file is mounted first in the pod's namespace, unseen by the file server.
const STAGING: [&str; 2] = ["/staging", "/staging-file"];

/// Where volumes are mounted that follow the node's, unseen by the file server too.
pub(crate) const FOLLOWING: &str = "/following";

/// In the place of what may not be shared.
pub(crate) const EMPTY: Empty = Empty { directory: "/empty", file: "/empty-file" };

/// Why there is no namespace, or no way into it.
#[derive(Debug, thiserror::Error)]
pub enum PodNamespaceError {
    /// What it is to show can't be made.
    #[error("can't create {path} in the pod's shared tree")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It can't be made or entered.
    #[error("can't set up the pod's mount namespace: {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// There is none to begin with.
    #[error("can't set up the pod's mount namespace")]
    Small(#[from] NamespaceError),
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// The namespace, which is there as long as this or a process in it.
#[derive(Debug, Clone)]
pub(crate) struct PodNamespace {
    fd: Arc<OwnedFd>,
}

impl PodNamespace {
    /// Makes it around the pod's directory, which is empty.
    pub(crate) async fn create(pod_directory: &Path) -> Result<PodNamespace, PodNamespaceError> {
        for name in ["shared", "proc", "staging", "empty", "following"] {
            let path = pod_directory.join(name);
            fs::create_dir(&path).map_err(|source| PodNamespaceError::Create { path, source })?;
        }
        for name in ["staging-file", "empty-file"] {
            let path = pod_directory.join(name);
            fs::File::create_new(&path).map_err(|source| PodNamespaceError::Create { path, source })?;
        }
        let proc = DetachedTree::bind(Path::new("/proc"), false)?;
        proc.restrict(Propagation::Private)?;
        let root = DetachedTree::bind(pod_directory, false)?;
        root.restrict(Propagation::Private)?;
        let fd = on_thread(move || Ok(enter_new(root, proc))).await??;
        Ok(PodNamespace { fd: Arc::new(fd) })
    }

    /// Runs `work` on a thread in it.
    pub(crate) async fn inside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PodNamespaceError> {
        let fd = self.fd.clone();
        let result = on_thread(move || {
            Ok(unshare(CloneFlags::CLONE_FS)
                .and_then(|()| setns(&fd, CloneFlags::CLONE_NEWNS))
                .map(|()| work()))
        })
        .await?;
        result.map_err(|source| PodNamespaceError::Step { step: "enter it", source })
    }
}

impl AsFd for PodNamespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Where such a thing is mounted first.
pub(crate) fn staging_for(kind: PointKind) -> &'static str {
    let [directory, file] = STAGING;
    match kind {
        PointKind::Directory => directory,
        PointKind::File => file,
    }
}

/// Leaves the calling thread in a new namespace whose root is `root`, and gives that namespace.
fn enter_new(root: DetachedTree, proc: DetachedTree) -> Result<OwnedFd, PodNamespaceError> {
    let failed = |step| move |source| PodNamespaceError::Step { step, source };
    let remount = |path: &str, flags| mount(None::<&str>, path, None::<&str>, flags, None::<&str>);

    let namespace = small_namespace::enter_new()?;
    let [point, ..] = small_namespace::POINTS;
    root.attach(Path::new(point))?;
    chdir(point).map_err(failed("enter the pod's directory"))?;
    // Both names are the new root; the old one ends up on top of it and is what umount finds.
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach the root it began with"))?;
    chdir("/").map_err(failed("enter the new root"))?;

    proc.attach(Path::new("/proc"))?;
    mount(Some(TREE), TREE, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(failed("bind the tree"))?;
    remount(TREE, MsFlags::MS_SHARED).map_err(failed("share the tree"))?;
    Ok(namespace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_namespace_shows_nothing_of_the_host() {
        let directory = tempfile::tempdir().unwrap();
        let namespace = PodNamespace::create(directory.path()).await.unwrap();
        let names = namespace
            .inside(|| fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>())
            .await
            .unwrap();
        let mut names: Vec<_> = names.iter().map(|name| name.to_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["empty", "empty-file", "following", "proc", "shared", "staging", "staging-file"]);
        let mounts =
            namespace.inside(|| fs::read_to_string("/proc/thread-self/mountinfo")).await.unwrap().unwrap();
        assert_eq!(mounts.lines().count(), 3, "{mounts}");
    }
}
