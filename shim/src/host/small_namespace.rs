//! A mount namespace with next to nothing in it, kept for the whole node, to start from.
//!
//! `unshare(2)` copies the mounts of the namespace that it leaves, and whoever then gives them up has the kernel walk them
//! once more. On a node with thousands of mounts a pod would pay for all of them several times, though it needs none. So
//! threads and processes that want a namespace of their own enter this one first. It stays the same from the first pod on,
//! held by a bind mount of its file at [`PIN`]; where that can't be made, each user makes one for itself.
//!
//! The kernel takes such a mount only where it is passed on to nobody, and no copy of a tree that has it can be attached in a
//! younger namespace. So its directory is a mount too, which is private and which no recursive bind mount copies.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, pivot_root};

use super::overlay::mount_id;

/// Where the namespace is held. The name changes with what is in it.
const PIN: &str = "/run/bulkhead/small/1.mnt";

/// Empty directories in the namespace's read-only root to mount on.
pub const POINTS: [&str; 3] = ["/dev", "/a", "/b"];

/// `NS_GET_NSTYPE` of ioctl_ns(2).
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

const EMPTY: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Why there is no small namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A step in making or entering it.
    #[error("can't use a mount namespace: {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// The place where it is held.
    #[error("can't prepare or release {path}, which holds a mount namespace")]
    Pin {
        /// Which file or directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No thread to make it on.
    #[error("can't start a thread that makes a mount namespace")]
    Thread(#[source] io::Error),
    /// The thread is gone.
    #[error("the thread that makes a mount namespace ended early")]
    ThreadLost,
}

fn failed(step: &'static str) -> impl Fn(Errno) -> NamespaceError {
    move |source| NamespaceError::Step { step, source }
}

/// The small namespace: the node's, or one for the caller alone.
pub fn small_namespace() -> Result<OwnedFd, NamespaceError> {
    let pin = Path::new(PIN);
    if let Some(held) = open_pin(pin) {
        return Ok(held);
    }
    make_pin(pin).or_else(|error| {
        log::warn!("each pod copies the node's mount table: {}", crate::error::chain(&error));
        make()
    })
}

/// Leaves the calling thread in a new namespace of its own, with the small one's mounts; the thread must not share its
/// directories with others afterwards. Gives the new namespace.
pub fn enter_new() -> Result<OwnedFd, NamespaceError> {
    let small = small_namespace()?;
    let own = open_own_directory()?;
    unshare(CloneFlags::CLONE_FS).map_err(failed("unshare directories"))?;
    setns(&small, CloneFlags::CLONE_NEWNS).map_err(failed("enter the small one"))?;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare"))?;
    openat(&own, "mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("open the new one"))
}

/// Lets go of the node's small namespace; tells whether one was held. The next pod makes another, and those that run keep
/// theirs.
///
/// # Errors
/// When something at its place can't be unmounted or removed.
pub fn release() -> Result<bool, NamespaceError> {
    release_pin(Path::new(PIN))
}

fn release_pin(pin: &Path) -> Result<bool, NamespaceError> {
    let directory = pin.parent().unwrap_or(Path::new("/"));
    let mut was_held = false;
    // The file, and the private mount of its directory; each as often as it is there.
    for place in [pin, directory] {
        loop {
            match umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
                Ok(()) => was_held = true,
                // Not a mount point, or not there.
                Err(Errno::EINVAL | Errno::ENOENT) => break,
                Err(errno) => {
                    return Err(NamespaceError::Pin { path: place.to_owned(), source: errno.into() });
                }
            }
        }
    }
    let gone = |path: &Path, result: io::Result<()>| match result {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NamespaceError::Pin { path: path.to_owned(), source })
        }
        _ => Ok(()),
    };
    gone(pin, fs::remove_file(pin))?;
    gone(directory, fs::remove_dir(directory))?;
    // What else is in there is not ours to remove.
    let _ = directory.parent().map(fs::remove_dir);
    Ok(was_held)
}

/// The calling thread's namespaces in procfs, for when there is no `/proc` to find them by.
fn open_own_directory() -> Result<OwnedFd, NamespaceError> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/proc/thread-self/ns", flags, Mode::empty()).map_err(failed("open /proc/thread-self/ns"))
}

/// What is held at `pin`, if that is a mount namespace.
fn open_pin(pin: &Path) -> Option<OwnedFd> {
    let file = File::open(pin).ok()?;
    // SAFETY: the request takes no argument; a file that isn't a namespace refuses it.
    let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    (kind == libc::CLONE_NEWNS).then(|| file.into())
}

/// Makes the namespace and holds it at `pin`, unless somebody else has just done so.
fn make_pin(pin: &Path) -> Result<OwnedFd, NamespaceError> {
    let failed_at = |path: &Path| {
        let path = path.to_owned();
        move |source| NamespaceError::Pin { path, source }
    };
    let directory = pin.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory).map_err(failed_at(directory))?;
    let lock = File::open(directory).map_err(failed_at(directory))?;
    // Held for a few system calls.
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, errno)| NamespaceError::Pin { path: directory.to_owned(), source: errno.into() })?;
    if let Some(held) = open_pin(pin) {
        return Ok(held);
    }
    let made = make()?;
    let kept_apart = |errno: Errno| NamespaceError::Pin { path: directory.to_owned(), source: errno.into() };
    if mount_id(directory).ok() == directory.parent().and_then(|parent| mount_id(parent).ok()) {
        mount(Some(directory), directory, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(kept_apart)?;
    }
    mount(None::<&str>, directory, None::<&str>, MsFlags::MS_UNBINDABLE, None::<&str>).map_err(kept_apart)?;
    File::options().create(true).append(true).open(pin).map_err(failed_at(pin))?;
    let source = format!("/proc/self/fd/{}", made.as_raw_fd());
    mount(Some(source.as_str()), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .map_err(|errno| NamespaceError::Pin { path: pin.to_owned(), source: errno.into() })?;
    Ok(made)
}

/// Makes a namespace whose only mount is an empty, read-only root with [`POINTS`].
fn make() -> Result<OwnedFd, NamespaceError> {
    let maker = std::thread::Builder::new().name("namespace".into()).stack_size(128 * 1024).spawn(|| {
        let own = open_own_directory()?;
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).map_err(failed("unshare"))?;
        let change = |path: &str, flags| mount(None::<&str>, path, None::<&str>, flags, None::<&str>);
        change("/", MsFlags::MS_REC | MsFlags::MS_PRIVATE).map_err(failed("make it private"))?;
        let root = POINTS[0];
        mount(Some("none"), root, Some("tmpfs"), EMPTY, Some("size=64k,nr_inodes=8,mode=755"))
            .map_err(failed("mount an empty directory"))?;
        for point in POINTS {
            fs::create_dir(format!("{root}{point}"))
                .map_err(|source| NamespaceError::Pin { path: PathBuf::from(point), source })?;
        }
        chdir(root).map_err(failed("enter the empty directory"))?;
        // Both names are the new root: the old one ends up on top of it and is what umount finds.
        pivot_root(".", ".").map_err(failed("pivot_root"))?;
        umount2(".", MntFlags::MNT_DETACH).map_err(failed("detach the host's file systems"))?;
        change("/", EMPTY | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY).map_err(failed("make it read-only"))?;
        openat(&own, "mnt", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed("open it"))
    });
    maker.map_err(NamespaceError::Thread)?.join().map_err(|_| NamespaceError::ThreadLost)?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mounts::DetachedTree;

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

    #[test]
    fn it_is_made_once_and_found_again() {
        let directory = std::env::temp_dir().join(format!("bulkhead-pin-{}/small", std::process::id()));
        let pin = directory.join("pin");
        assert!(open_pin(&pin).is_none());
        let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
        let made = make_pin(&pin).unwrap();
        let found = open_pin(&pin).unwrap();
        let again = make_pin(&pin).unwrap();
        let all = [inode(&made), inode(&found), inode(&again)];
        // What a volume of everything above it would be: without the pin, or it could not be attached in a younger namespace.
        let parent = DetachedTree::bind(directory.parent().unwrap(), true).unwrap();
        let attached = std::thread::spawn(move || {
            enter_new().unwrap();
            parent.attach(Path::new(POINTS[1]))
        });
        attached.join().unwrap().unwrap();
        umount2(&pin, MntFlags::MNT_DETACH).unwrap();
        assert!(open_pin(&pin).is_none(), "an ordinary file is not a namespace");
        let again = make_pin(&pin).unwrap();
        drop(again);
        assert!(release_pin(&pin).unwrap() && !directory.parent().unwrap().exists());
        assert!(!release_pin(&pin).unwrap(), "there is nothing any more");
        assert_eq!(all, [all[0]; 3]);
    }
}
