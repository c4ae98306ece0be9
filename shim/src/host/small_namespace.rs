//! A mount namespace with next to nothing in it, kept for the whole node, to start from.
//!
//! `unshare(2)` copies the mounts of the namespace that it leaves, and whoever then gives them up has the kernel walk them
//! once more. On a node with thousands of mounts a pod would pay for all of them several times, though it needs none. So
//! threads and processes that want a namespace of their own enter this one first.

use std::fs;
use std::os::fd::OwnedFd;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, pivot_root};

use super::pin::{NamespaceError, Own, Pin, failed};

/// Where the namespace is held. The name changes with what is in it.
pub(super) const PIN: Pin = Pin { file: "1.mnt", kind: CloneFlags::CLONE_NEWNS };

/// Empty directories in the namespace's read-only root to mount on.
pub(crate) const POINTS: [&str; 3] = ["/dev", "/a", "/b"];

const EMPTY: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// The small namespace: the node's, or one for the caller alone.
pub(crate) fn small_namespace() -> Result<OwnedFd, NamespaceError> {
    PIN.get("each pod copies the node's mount table", make)
}

/// Leaves the calling thread in a new namespace of its own, with the small one's mounts; the thread must not share its
/// directories with others afterwards. Gives the new namespace.
pub(crate) fn enter_new() -> Result<OwnedFd, NamespaceError> {
    let small = small_namespace()?;
    let own = Own::of_thread()?;
    unshare(CloneFlags::CLONE_FS).map_err(failed("unshare directories"))?;
    setns(&small, CloneFlags::CLONE_NEWNS).map_err(failed("enter the small one"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare"))?;
    own.open("mnt")
}

/// Makes a namespace whose only mount is an empty, read-only root with [`POINTS`], and leaves the calling thread in it.
pub(super) fn make() -> Result<OwnedFd, NamespaceError> {
    let own = Own::of_thread()?;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).map_err(failed("unshare"))?;
    let change = |path: &str, flags| mount(None::<&str>, path, None::<&str>, flags, None::<&str>);
    change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE).map_err(failed("make it private"))?;
    let root = POINTS[0];
    mount(Some("none"), root, Some("tmpfs"), EMPTY, Some("size=64k,nr_inodes=8,mode=755"))
        .map_err(failed("mount an empty directory"))?;
    for point in POINTS {
        fs::create_dir(format!("{root}{point}"))
            .map_err(|source| NamespaceError::Pin { path: point.into(), source })?;
    }
    chdir(root).map_err(failed("enter the empty directory"))?;
    // Both names are the new root: the old one ends up on top of it and is what umount finds.
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach the host's file systems"))?;
    change("/", EMPTY | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY).map_err(failed("make it read-only"))?;
    own.open("mnt")
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io;

    use nix::fcntl::{OFlag, open, openat};
    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn it_holds_one_read_only_mount() {
        let procfs = open("/proc", OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).unwrap();
        let (mounts, refused) = std::thread::spawn(move || {
            enter_new().unwrap();
            let file =
                openat(&procfs, "thread-self/mountinfo", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty());
            let mounts = io::read_to_string(File::from(file.unwrap())).unwrap();
            for point in POINTS {
                assert_eq!(fs::read_dir(point).unwrap().count(), 0, "{point}");
            }
            (mounts, fs::create_dir("/new").unwrap_err())
        })
        .join()
        .unwrap();
        assert_eq!(mounts.lines().count(), 1, "{mounts}");
        assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    }
}
