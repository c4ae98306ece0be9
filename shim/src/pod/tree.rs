//! The pod's shared tree: what its file server sees, in a mount namespace that only the pod has ([`PodNamespace`]).
//!
//! Containers' root file systems and volumes are attached below `/shared/<container id>/`, each after what a pod may not share
//! has been taken out of it where nobody sees it yet.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_vmm_protocol::roots;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::JoinHandle;

use super::following::Following;
use super::namespace::{EMPTY, FOLLOWING, PodNamespace, PodNamespaceError, TREE, staging_for};
use crate::error::chain;
use crate::host::mounts::{DetachedTree, MountError, PointKind, Propagation, relocate};
use crate::host::sharing::{MOUNTINFO, prune};

/// Something about the shared tree that failed.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A directory or file to mount on can't be made.
    #[error("can't create {path} in the pod's shared tree")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace can't be made or entered.
    #[error(transparent)]
    Namespace(#[from] PodNamespaceError),
    /// What the node mounts later would not be seen.
    #[error("can't watch the pod's mounts")]
    Watch {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A mount failed.
    #[error(transparent)]
    Mount(#[from] MountError),
}

/// The shared tree of one pod.
#[derive(Debug)]
pub(crate) struct SharedTree {
    /// The tree's directory on the host, where only mount points are ever made.
    directory: PathBuf,
    namespace: PodNamespace,
    /// Volumes that follow the node's. Held while something is at a [`staging_for`].
    following: Arc<Mutex<Vec<Following>>>,
    /// Waits for what the node mounts later, once there is a volume that follows it.
    watch: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Drop for SharedTree {
    fn drop(&mut self) {
        // It would keep the namespace.
        if let Some(watch) = self.watch.get_mut().ok().and_then(Option::take) {
            watch.abort();
        }
    }
}

impl SharedTree {
    /// Makes the tree below the pod's directory.
    pub(crate) async fn create(pod_directory: &Path) -> Result<SharedTree, TreeError> {
        let directory = pod_directory.join("shared");
        let namespace = PodNamespace::create(pod_directory).await?;
        Ok(SharedTree { directory, namespace, following: Arc::default(), watch: std::sync::Mutex::default() })
    }

    /// The mount namespace, for processes that are to be born in it.
    pub(crate) fn namespace(&self) -> BorrowedFd<'_> {
        self.namespace.as_fd()
    }

    /// Attaches `tree` at `point` (relative to the tree), for whose last component a mount point is made. What of it may
    /// not be shared with a pod is left out, or fails it if it is the topmost mount.
    pub(crate) async fn attach(&self, tree: DetachedTree, point: &Path) -> Result<(), TreeError> {
        let kind = tree.judge()?;
        make_point(&self.directory, point, kind)?;
        let target = Path::new(TREE).join(point);
        let _one_at_a_time = self.following.lock().await;
        Ok(self.namespace.inside(move || attach_pruned(tree, kind, &target)).await??)
    }

    /// Attaches `tree`, a slave of the node's mounts, like [`attach`](Self::attach). What the node mounts and unmounts in it
    /// later, it mounts and unmounts in the pod.
    pub(crate) async fn attach_following(&self, tree: DetachedTree, point: &Path) -> Result<(), TreeError> {
        let kind = tree.judge()?;
        if kind == PointKind::File {
            // Nothing is mounted below it.
            tree.restrict(Propagation::Private)?;
            return self.attach(tree, point).await;
        }
        make_point(&self.directory, point, kind)?;
        if let Some(pod) = self.directory.parent() {
            make_point(&pod.join("following"), point, kind)?;
        }
        self.watch().await?;
        let (slave, target) = (Path::new(FOLLOWING).join(point), Path::new(TREE).join(point));
        let mut all = self.following.clone().lock_owned().await;
        let work = move || {
            let origin = tree.origin().to_owned();
            tree.attach(&slave)?;
            let look = |path: &Path| {
                let path = path.to_owned();
                move |error: io::Error| MountError::Look {
                    path,
                    source: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
                }
            };
            let new = Following::new(slave, target.clone(), origin.clone()).map_err(look(&origin))?;
            let copy = DetachedTree::bind_as(new.slave(), &origin)?;
            // What a read-only volume is stays, mount by mount.
            copy.restrict(Propagation::Private)?;
            attach_pruned(copy, kind, &target)?;
            all.push(new);
            // What came in between.
            update(&mut all, &fs::read_to_string(MOUNTINFO).map_err(look(&origin))?);
            Ok::<_, MountError>(())
        };
        Ok(self.namespace.inside(work).await??)
    }

    /// Sees to it that what the node mounts later is noticed.
    async fn watch(&self) -> Result<(), TreeError> {
        let is_watched = || self.watch.lock().is_ok_and(|watch| watch.is_some());
        if is_watched() {
            return Ok(());
        }
        let failed = |source: io::Error| TreeError::Watch { source };
        // Opened inside, it is the pod's, whoever reads it.
        let table = self.namespace.inside(|| fs::File::open(MOUNTINFO)).await?.map_err(failed)?;
        // SAFETY: a `File` owns its descriptor, which stays open and the same as long as it is there.
        let changes = unsafe { AsyncFd::register_with_interest(table, Interest::PRIORITY) }
            .map_err(|error| failed(error.into_parts().1))?;
        let task = tokio::spawn(follow(self.namespace.clone(), self.following.clone(), changes));
        match self.watch.lock() {
            Ok(mut watch) if watch.is_none() => *watch = Some(task),
            _ => task.abort(),
        }
        Ok(())
    }

    /// Detaches every mount of a container and removes its mount points. Idempotent.
    pub(crate) async fn remove(&self, container: &str) -> Result<(), TreeError> {
        let points = mount_points(&self.directory.join(container));
        let below: Vec<PathBuf> = points
            .iter()
            .filter_map(|point| point.strip_prefix(&self.directory).ok())
            .map(|point| Path::new(TREE).join(point))
            .collect();
        let mut following = self.following.clone().lock_owned().await;
        let slaves = Path::new(FOLLOWING).join(container);
        self.namespace
            .inside(move || {
                let ended = following.extract_if(.., |volume| volume.slave().starts_with(&slaves));
                let slaves: Vec<PathBuf> = ended.map(|volume| volume.slave().to_owned()).collect();
                for point in slaves.iter().chain(&below) {
                    match umount2(point, MntFlags::MNT_DETACH) {
                        // Not mounted: this is the second time, or the first got only so far.
                        Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
                        Err(source) => return Err(MountError::Attach { path: point.clone(), source }),
                    }
                }
                Ok(())
            })
            .await??;
        let following = self.directory.with_file_name("following");
        for path in [following.join(container), self.directory.join(container)] {
            match fs::remove_dir_all(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(TreeError::Create { path, source });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Brings the copies of volumes up to date, whenever the pod's mounts change.
async fn follow(namespace: PodNamespace, following: Arc<Mutex<Vec<Following>>>, changes: AsyncFd<fs::File>) {
    loop {
        match changes.ready(Interest::PRIORITY).await {
            // Before the table is read, so that no change after that goes unnoticed.
            Ok(mut ready) => ready.clear_ready(),
            Err(error) => {
                log::error!("what the node mounts later stays out of the pod: {error}");
                return;
            }
        }
        let mut all: OwnedMutexGuard<_> = following.clone().lock_owned().await;
        let updated =
            namespace.inside(move || fs::read_to_string(MOUNTINFO).map(|table| update(&mut all, &table)));
        match updated.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => log::error!("can't read the pod's mounts: {error}"),
            Err(error) => log::error!("what the node has mounted is not seen: {}", chain(&error)),
        }
    }
}

fn update(all: &mut [Following], table: &str) {
    all.iter_mut().for_each(|volume| volume.update(table));
}

/// Makes what something can be mounted on: `point` in `directory`.
fn make_point(directory: &Path, point: &Path, kind: PointKind) -> Result<(), TreeError> {
    let path = directory.join(point);
    let create = |source| TreeError::Create { path: point.to_owned(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(create)?;
    }
    match kind {
        PointKind::Directory => fs::create_dir(&path),
        PointKind::File => fs::File::create_new(&path).map(drop),
    }
    .map_err(create)
}

/// Attaches a tree at its staging place, takes out what is not to be shared, and moves the rest to where the file server sees it.
fn attach_pruned(tree: DetachedTree, kind: PointKind, target: &Path) -> Result<(), MountError> {
    let staging = Path::new(staging_for(kind));
    let origin = tree.origin().to_owned();
    tree.attach(staging)?;
    let moved = prune(staging, &origin, EMPTY).and_then(|()| relocate(staging, target));
    if moved.is_err() {
        // The namespace is the pod's own: whatever may stay in it nobody sees.
        let _ = umount2(staging, MntFlags::MNT_DETACH);
    }
    moved
}

/// The mount points of a container as [`SharedTree::attach`] makes them. Looked up in the host's namespace, where they
/// are empty directories and files: nothing below them is ever visited.
fn mount_points(container: &Path) -> Vec<PathBuf> {
    let children = |path: &Path| {
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let mut points = children(&container.join("mounts"));
    points.extend(roots::NAMES.map(|name| container.join(name)));
    points
}

#[cfg(test)]
mod tests {
    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use super::*;
    use crate::host::assemble::assemble;
    use crate::host::mount_request::MountRequest;
    use crate::host::mounts::on_thread;

    async fn read_inside(tree: &SharedTree, path: &'static str) -> io::Result<String> {
        tree.namespace.inside(move || fs::read_to_string(path)).await.unwrap()
    }

    /// The host's mounts at or below `path`.
    fn host_mounts(path: &Path) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(path.to_str().unwrap())).map(str::to_owned).collect()
    }

    #[tokio::test]
    async fn mounts_are_seen_inside_only_and_go_with_the_container() {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in [("pod", ""), ("lower", "image"), ("volume", "volume")] {
            fs::create_dir(directory.path().join(name)).unwrap();
            fs::write(directory.path().join(name).join("file"), text).unwrap();
        }
        for name in ["upper", "work", "scratch"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        let path = |name: &str| directory.path().join(name);
        let tree = SharedTree::create(&path("pod")).await.unwrap();

        let overlay = MountRequest {
            kind: "overlay".into(),
            source: "overlay".into(),
            options: ["lowerdir", "upperdir", "workdir"]
                .into_iter()
                .zip(["lower", "upper", "work"])
                .map(|(key, name)| format!("{key}={}", path(name).display()))
                .collect(),
            ..Default::default()
        };
        let rootfs = assemble(vec![overlay], path("scratch")).await.unwrap();
        tree.attach(rootfs, Path::new("c1/rootfs")).await.unwrap();
        let volume = DetachedTree::bind(&path("volume"), true).unwrap();
        volume.make_read_only(false).unwrap();
        tree.attach(volume, Path::new("c1/mounts/0")).await.unwrap();
        let single = DetachedTree::bind(&path("volume/file"), false).unwrap();
        tree.attach(single, Path::new("c1/mounts/1")).await.unwrap();

        assert_eq!(read_inside(&tree, "/shared/c1/rootfs/file").await.unwrap(), "image");
        assert_eq!(read_inside(&tree, "/shared/c1/mounts/0/file").await.unwrap(), "volume");
        assert_eq!(read_inside(&tree, "/shared/c1/mounts/1").await.unwrap(), "volume");
        tree.namespace.inside(|| fs::write("/shared/c1/rootfs/new", "written")).await.unwrap().unwrap();
        assert_eq!(fs::read_to_string(path("upper").join("new")).unwrap(), "written");
        let refused = tree.namespace.inside(|| fs::write("/shared/c1/mounts/0/new", "x")).await.unwrap();
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EROFS));

        assert_eq!(host_mounts(directory.path()), [""; 0], "the host must not see the pod's mounts");
        assert_eq!(fs::read_dir(path("pod/shared/c1/rootfs")).unwrap().count(), 0);

        tree.remove("c1").await.unwrap();
        tree.remove("c1").await.unwrap();
        assert!(!path("pod/shared/c1").exists());
        assert_eq!(fs::read_to_string(path("volume/file")).unwrap(), "volume");
    }

    /// Procfs, a good file system below it and one beside it, and a single file of procfs, in a directory that is shared.
    #[tokio::test]
    async fn the_hosts_kernel_interfaces_are_taken_out() {
        let directory = tempfile::tempdir().unwrap();
        let volume = directory.path().join("volume");
        for name in ["pod", "volume/proc", "volume/good", "volume/with blank"] {
            fs::create_dir_all(directory.path().join(name)).unwrap();
        }
        fs::write(volume.join("file"), "under it").unwrap();
        let (volume, refusal) = on_thread(move || {
            unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).unwrap();
            let none = None::<&str>;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let make = |kind: &str, name: &str| {
                mount(Some("none"), &volume.join(name), Some(kind), MsFlags::empty(), none).unwrap();
            };
            for (kind, name) in [("proc", "proc"), ("tmpfs", "good"), ("sysfs", "with blank")] {
                make(kind, name);
            }
            // On top of each other: what is below the good one must not come to light.
            make("proc", "good");
            make("tmpfs", "good");
            make("tmpfs", "proc/tty");
            mount(Some("/proc/version"), &volume.join("file"), none, MsFlags::MS_BIND, none).unwrap();
            let tree = DetachedTree::bind(&volume, true)?;
            tree.restrict(Propagation::Private)?;
            let single = DetachedTree::bind(&volume.join("file"), false)?;
            Ok((tree, single.judge()))
        })
        .await
        .map(|(tree, single)| (tree, single.unwrap_err().to_string()))
        .unwrap();
        assert!(refusal.contains("procfs"), "{refusal}");

        let tree = SharedTree::create(&directory.path().join("pod")).await.unwrap();
        tree.attach(volume, Path::new("c/mounts/0")).await.unwrap();
        let report = tree
            .namespace
            .inside(|| {
                let base = Path::new("/shared/c/mounts/0");
                let count = |name: &str| fs::read_dir(base.join(name)).unwrap().count();
                let counts = [count("proc"), count("good"), count("with blank")];
                let removed = [fs::remove_dir(base.join("proc")), fs::remove_file(base.join("file"))];
                let removed = removed.map(|result| result.unwrap_err().raw_os_error());
                let written = fs::write(base.join("proc/x"), "x").unwrap_err().raw_os_error();
                let text = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
                (counts, fs::read_to_string(base.join("file")).unwrap(), removed, written, text)
            })
            .await
            .unwrap();
        let (counts, file, removed, written, mounts) = report;
        assert_eq!((counts, file.as_str()), ([0, 0, 0], ""));
        assert_eq!(removed, [Some(libc::EBUSY); 2], "what the host has mounted there would go with it");
        assert_eq!(written, Some(libc::EROFS));
        let kinds: Vec<_> = mounts.lines().filter(|line| line.contains("/shared/")).collect();
        assert!(
            kinds.iter().all(|line| !line.contains(" - proc ") && !line.contains(" - sysfs ")),
            "{mounts}"
        );
        assert!(!mounts.contains("/staging"), "{mounts}");
    }

    #[tokio::test]
    async fn what_is_no_file_system_with_files_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let tree = SharedTree::create(directory.path()).await.unwrap();
        for (source, what) in [
            ("/proc", "procfs"),
            ("/proc/self/status", "procfs"),
            ("/sys/kernel", "sysfs"),
            ("/dev/null", "a device"),
            ("/dev/pts", "devpts"),
            ("/proc/self/ns/net", "namespace"),
        ] {
            let bound = DetachedTree::bind(Path::new(source), true).unwrap();
            let error = tree.attach(bound, Path::new("c/mounts/0")).await.unwrap_err().to_string();
            assert!(error.contains(what) && error.contains(source), "{source}: {error}");
        }
        assert!(!directory.path().join("shared/c").exists(), "nothing was made for it");
        let found = fs::read_to_string("/proc/self/mountinfo").unwrap();
        if found.contains(" - devtmpfs ") {
            let bound = DetachedTree::bind(Path::new("/dev"), true).unwrap();
            bound.restrict(Propagation::Private).unwrap();
            let error = tree.attach(bound, Path::new("c/mounts/0")).await.unwrap_err().to_string();
            assert!(error.contains("devtmpfs"), "{error}");
        } else {
            eprintln!("SKIPPED: this host has no devtmpfs at /dev");
        }
    }

    #[tokio::test]
    async fn device_nodes_in_the_tree_are_dead() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("volume")).unwrap();
        nix::sys::stat::mknod(
            &directory.path().join("volume/null"),
            nix::sys::stat::SFlag::S_IFCHR,
            nix::sys::stat::Mode::from_bits_truncate(0o666),
            libc::makedev(1, 3),
        )
        .unwrap();
        fs::create_dir(directory.path().join("pod")).unwrap();
        let tree = SharedTree::create(&directory.path().join("pod")).await.unwrap();
        let volume = DetachedTree::bind(&directory.path().join("volume"), true).unwrap();
        volume.restrict(Propagation::Private).unwrap();
        tree.attach(volume, Path::new("c/mounts/0")).await.unwrap();
        let error = read_inside(&tree, "/shared/c/mounts/0/null").await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }

    #[tokio::test]
    async fn mounts_made_on_the_host_later_come_in_when_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("volume");
        fs::create_dir(&shared).unwrap();
        fs::create_dir(directory.path().join("pod")).unwrap();
        let flags = |flags| mount(None::<&str>, &shared, None::<&str>, flags, None::<&str>).unwrap();
        mount(Some("tmpfs"), &shared, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        flags(MsFlags::MS_SHARED);
        fs::create_dir(shared.join("later")).unwrap();

        let tree = SharedTree::create(&directory.path().join("pod")).await.unwrap();
        let volume = DetachedTree::bind(&shared, true).unwrap();
        volume.restrict(Propagation::Slave).unwrap();
        tree.attach_following(volume, Path::new("c/mounts/0")).await.unwrap();
        let inside = async |path: &'static str| {
            // As long as it takes the shim to notice.
            for _ in 0..500 {
                if let Ok(text) = read_inside(&tree, path).await {
                    return text;
                }
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            panic!("{path} does not come");
        };
        let on_node = |kind: &str, name: &str| {
            mount(Some("x"), &shared.join(name), Some(kind), MsFlags::empty(), None::<&str>).unwrap();
        };
        fs::write(shared.join("later/under"), "under").unwrap();
        for round in ["one", "two"] {
            on_node("tmpfs", "later");
            fs::write(shared.join("later/file"), round).unwrap();
            fs::create_dir(shared.join("later/deep")).unwrap();
            assert_eq!(inside("/shared/c/mounts/0/later/file").await, round);
            // Held, as the file server holds what its guest knows.
            let held = tree
                .namespace
                .inside(|| fs::File::open("/shared/c/mounts/0/later/file").unwrap())
                .await
                .unwrap();
            on_node("proc", "later/deep");
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            let listed = tree
                .namespace
                .inside(|| fs::read_dir("/shared/c/mounts/0/later/deep").unwrap().count())
                .await
                .unwrap();
            assert_eq!(listed, 0, "the host's processes are not for a pod");
            umount2(&shared.join("later/deep"), MntFlags::empty()).unwrap();
            umount2(&shared.join("later"), MntFlags::empty()).unwrap();
            assert_eq!(inside("/shared/c/mounts/0/later/under").await, "under");
            drop(held);
        }
        on_node("tmpfs", "later");
        tree.remove("c").await.unwrap();
        assert!(!directory.path().join("pod/following/c").exists());
        umount2(&shared.join("later"), MntFlags::empty()).unwrap();
        umount2(&shared, MntFlags::MNT_DETACH).unwrap();
    }

    #[tokio::test]
    async fn owners_stay_mapped_in_what_is_copied() {
        use std::os::unix::fs::MetadataExt;

        use crate::host::id_map::IdMap;

        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path().join("volume");
        fs::create_dir(&shared).unwrap();
        fs::create_dir(directory.path().join("pod")).unwrap();
        let on_node = |place: &Path| {
            mount(Some("tmpfs"), place, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        };
        on_node(&shared);
        mount(None::<&str>, &shared, None::<&str>, MsFlags::MS_SHARED, None::<&str>).unwrap();
        fs::create_dir(shared.join("below")).unwrap();
        on_node(&shared.join("below"));
        for file in ["file", "below/file"] {
            fs::write(shared.join(file), "").unwrap();
        }

        let tree = SharedTree::create(&directory.path().join("pod")).await.unwrap();
        let volume = DetachedTree::bind(&shared, true).unwrap();
        let map =
            IdMap::take(&mut vec!["uidmap=0:7000:9".into(), "gidmap=0:7000:9".into()]).unwrap().unwrap();
        let mapped = volume.map_ids(map.namespace().unwrap().as_fd(), true);
        if let Err(error) = mapped {
            eprintln!("SKIPPED: {}", chain(&error));
        } else {
            volume.restrict(Propagation::Slave).unwrap();
            tree.attach_following(volume, Path::new("c/mounts/0")).await.unwrap();
            let owner = |path: &'static str| tree.namespace.inside(move || fs::metadata(path).unwrap().uid());
            assert_eq!(owner("/shared/c/mounts/0/file").await.unwrap(), 7000);
            assert_eq!(owner("/shared/c/mounts/0/below/file").await.unwrap(), 7000);
            tree.remove("c").await.unwrap();
        }
        for place in [shared.join("below"), shared] {
            umount2(&place, MntFlags::MNT_DETACH).unwrap();
        }
    }
}
