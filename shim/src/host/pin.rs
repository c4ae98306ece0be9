//! Namespaces that the node keeps: made with the first pod, and the same for all that come.
//!
//! Each is held by a bind mount of its file in [`DIRECTORY`]; where that can't be made, each user makes one for itself.
//!
//! The kernel takes such a mount only where it is passed on to nobody, and no copy of a tree that has it can be attached in a
//! younger mount namespace. So its directory is a mount too, which is private and which no recursive bind mount copies.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open, openat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::stat::Mode;

use super::overlay::mount_id;

/// Where the files are.
const DIRECTORY: &str = "/run/bulkhead/small";

/// `NS_GET_NSTYPE` of ioctl_ns(2).
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Why there is no such namespace.
#[derive(Debug, thiserror::Error)]
pub enum NamespaceError {
    /// A step in making or entering it.
    #[error("can't use a namespace: {step}")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// The place where it is held.
    #[error("can't prepare or release {path}, which holds a namespace")]
    Pin {
        /// Which file or directory.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// No thread to make it on.
    #[error("can't start a thread that makes a namespace")]
    Thread(#[source] io::Error),
    /// The thread is gone.
    #[error("the thread that makes a namespace ended early")]
    ThreadLost,
}

pub(super) fn failed(step: &'static str) -> impl Fn(Errno) -> NamespaceError {
    move |source| NamespaceError::Step { step, source }
}

/// A namespace of the node's.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pin {
    /// The name of the file that holds it.
    pub file: &'static str,
    /// What kind it is.
    pub kind: CloneFlags,
}

impl Pin {
    /// The node's namespace, or one for the caller alone. `make` runs on a thread of its own.
    ///
    /// # Errors
    /// When there is none and none can be made.
    pub(crate) fn get(
        self,
        without: &str,
        make: fn() -> Result<OwnedFd, NamespaceError>,
    ) -> Result<OwnedFd, NamespaceError> {
        let directory = Path::new(DIRECTORY);
        if let Some(held) = self.find(directory) {
            return Ok(held);
        }
        self.hold(directory, make).or_else(|error| {
            log::warn!("{without}: {}", crate::error::chain(&error));
            on_thread(make)
        })
    }

    /// What is held in the directory, if that is a namespace of this kind.
    fn find(self, directory: &Path) -> Option<OwnedFd> {
        let file = File::open(directory.join(self.file)).ok()?;
        // SAFETY: the request takes no argument; a file that isn't a namespace refuses it.
        let kind = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
        (kind == self.kind.bits()).then(|| file.into())
    }

    /// Makes the namespace and holds it, unless somebody else has just done so.
    fn hold(
        self,
        directory: &Path,
        make: fn() -> Result<OwnedFd, NamespaceError>,
    ) -> Result<OwnedFd, NamespaceError> {
        let failed_at = |path: &Path| {
            let path = path.to_owned();
            move |source| NamespaceError::Pin { path, source }
        };
        fs::create_dir_all(directory).map_err(failed_at(directory))?;
        let lock = File::open(directory).map_err(failed_at(directory))?;
        // Held for a few system calls.
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, errno)| NamespaceError::Pin { path: directory.to_owned(), source: errno.into() })?;
        if let Some(held) = self.find(directory) {
            return Ok(held);
        }
        let made = on_thread(make)?;
        let kept_apart =
            |errno: Errno| NamespaceError::Pin { path: directory.to_owned(), source: errno.into() };
        if mount_id(directory).ok() == directory.parent().and_then(|parent| mount_id(parent).ok()) {
            mount(Some(directory), directory, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(kept_apart)?;
        }
        mount(None::<&str>, directory, None::<&str>, MsFlags::MS_UNBINDABLE, None::<&str>)
            .map_err(kept_apart)?;
        let file = directory.join(self.file);
        File::options().create(true).append(true).open(&file).map_err(failed_at(&file))?;
        let source = format!("/proc/self/fd/{}", made.as_raw_fd());
        mount(Some(source.as_str()), &file, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|errno| NamespaceError::Pin { path: file, source: errno.into() })?;
        Ok(made)
    }
}

fn on_thread(make: fn() -> Result<OwnedFd, NamespaceError>) -> Result<OwnedFd, NamespaceError> {
    let thread = std::thread::Builder::new().name("namespace".into()).stack_size(128 * 1024).spawn(make);
    thread.map_err(NamespaceError::Thread)?.join().map_err(|_| NamespaceError::ThreadLost)?
}

/// The calling thread's namespaces in procfs, for when there is no `/proc` to find them by.
pub(super) struct Own(OwnedFd);

impl Own {
    pub(crate) fn of_thread() -> Result<Self, NamespaceError> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open("/proc/thread-self/ns", flags, Mode::empty());
        directory.map(Self).map_err(failed("open /proc/thread-self/ns"))
    }

    /// Opens the one that the thread is in now.
    pub(crate) fn open(&self, name: &str) -> Result<OwnedFd, NamespaceError> {
        openat(&self.0, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
            .map_err(failed("open the new one"))
    }
}

/// Lets go of the node's namespaces; tells whether any was held. The next pod makes others, and those that run keep theirs.
///
/// # Errors
/// When something at their place can't be unmounted or removed.
pub fn release() -> Result<bool, NamespaceError> {
    release_all(Path::new(DIRECTORY))
}

fn release_all(directory: &Path) -> Result<bool, NamespaceError> {
    let error = |path: &Path, source: io::Error| NamespaceError::Pin { path: path.to_owned(), source };
    let mut was_held = false;
    // Each as often as it is there.
    let mut unmount = |place: &Path| loop {
        match umount2(place, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => was_held = true,
            // Not a mount point, or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(error(place, errno.into())),
        }
    };
    let files = match fs::read_dir(directory) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(source) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(error(directory, source)),
    };
    for file in &files {
        unmount(file)?;
    }
    // The private mount of the directory.
    unmount(directory)?;
    let gone = |path: &Path, result: io::Result<()>| match result {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(error(path, source)),
        _ => Ok(()),
    };
    for file in &files {
        gone(file, fs::remove_file(file))?;
    }
    gone(directory, fs::remove_dir(directory))?;
    // What else is in there is not ours to remove.
    let _ = directory.parent().map(fs::remove_dir);
    Ok(was_held)
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::super::empty_network;
    use super::super::small_namespace::{self, POINTS};
    use super::*;
    use crate::host::mounts::DetachedTree;

    #[test]
    fn they_are_made_once_and_found_again() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("pins/small");
        let inode = |fd: &OwnedFd| nix::sys::stat::fstat(fd).unwrap().st_ino;
        let pins = [
            (small_namespace::PIN, small_namespace::make as fn() -> _),
            (empty_network::PIN, empty_network::make as fn() -> _),
        ];
        let mut found = Vec::new();
        for (pin, make) in pins {
            assert!(pin.find(&directory).is_none());
            let all: Vec<u64> = [
                pin.hold(&directory, make).unwrap(),
                pin.find(&directory).unwrap(),
                pin.hold(&directory, make).unwrap(),
            ]
            .iter()
            .map(inode)
            .collect();
            assert_eq!(all, [all[0]; 3], "{pin:?}");
            found.push(all[0]);
        }
        assert_ne!(found[0], found[1]);
        // What a volume of everything above would be: without the pin, or it could not be attached in a younger namespace.
        let parent = DetachedTree::bind(directory.parent().unwrap(), true).unwrap();
        let attached = std::thread::spawn(move || {
            small_namespace::enter_new().unwrap();
            parent.attach(Path::new(POINTS[1]))
        });
        attached.join().unwrap().unwrap();
        let [(pin, make), (other, _)] = pins;
        umount2(&directory.join(pin.file), MntFlags::MNT_DETACH).unwrap();
        assert!(pin.find(&directory).is_none(), "an ordinary file is not a namespace");
        assert!(Pin { kind: pin.kind, ..other }.find(&directory).is_none(), "one of another kind");
        drop(pin.hold(&directory, make).unwrap());
        assert!(release_all(&directory).unwrap() && !directory.parent().unwrap().exists());
        assert!(!release_all(&directory).unwrap(), "there is nothing any more");
    }

    #[test]
    fn of_many_that_make_one_at_once_all_have_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let directory = scratch.path().join("pins/small");
        let makers: Vec<_> = (0..8)
            .map(|_| {
                let directory = directory.clone();
                std::thread::spawn(move || empty_network::PIN.hold(&directory, empty_network::make).unwrap())
            })
            .collect();
        let all: Vec<OwnedFd> = makers.into_iter().map(|maker| maker.join().unwrap()).collect();
        let inodes: Vec<u64> = all.iter().map(|fd| nix::sys::stat::fstat(fd).unwrap().st_ino).collect();
        assert!(inodes.iter().all(|inode| *inode == inodes[0]), "{inodes:?}");
        assert!(release_all(&directory).unwrap());
    }
}
