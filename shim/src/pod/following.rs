//! Volumes into which come the mounts that the node makes later (`rslave`, Kubernetes: `HostToContainer`).
//!
//! Such a volume is mounted twice in the pod's namespace: where nobody looks, as a slave of the node's mount, and as a copy
//! where the file server sees it. What appears in the first is judged, restricted and shown in the second; what goes from
//! it goes from there too. So the node may always unmount it, whatever the guest does with it, and the file server
//! never sees a mount that it may not.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, open, openat2};
use nix::mount::{MntFlags, umount2};
use nix::sys::stat::Mode;

use super::namespace::{EMPTY, staging_for};
use crate::error::chain;
use crate::host::mounts::{DetachedTree, MountError, Propagation, relocate_to};
use crate::host::sharing::{MOUNTINFO, cover_held, mounts, prune};

/// The most mounts that are shown in one volume later. Each costs the shim a descriptor.
const MAX_SHOWN: usize = 512;

/// The most mounts on top of each other that are taken away at once.
const MAX_STACK: usize = 64;

/// What is mounted somewhere: type, device number and directory. What is shown keeps its file system's number from being
/// another's, so equal means the same.
type What = (String, String, String);

/// A volume that follows the node's.
#[derive(Debug)]
pub(crate) struct Following {
    /// Where the slave is mounted, in the pod's namespace.
    slave: PathBuf,
    /// Where the copy is mounted.
    copy: PathBuf,
    /// Where it comes from.
    origin: PathBuf,
    /// What was on top at each place below the slave, relative to it, when it was last looked at.
    seen: BTreeMap<PathBuf, What>,
    /// Mounts that have come since, by their roots.
    shown: BTreeMap<PathBuf, OwnedFd>,
}

impl Following {
    /// Follows what is mounted at `slave` with what will be at `copy`. Called before the copy is made.
    pub(crate) fn new(slave: PathBuf, copy: PathBuf, origin: PathBuf) -> io::Result<Following> {
        let seen = topmost(&fs::read_to_string(MOUNTINFO)?, &slave);
        Ok(Following { slave, copy, origin, seen, shown: BTreeMap::new() })
    }

    /// Where the slave is mounted.
    pub(crate) fn slave(&self) -> &Path {
        &self.slave
    }

    /// Makes the copy as the slave is. `table` is the calling thread's mountinfo.
    pub(crate) fn update(&mut self, table: &str) {
        let now = topmost(table, &self.slave);
        for place in changed(&self.seen, &now) {
            let outcome = self.hide(&place).and_then(|()| match now.get(&place) {
                Some(_) => self.show(&place),
                None => Ok(()),
            });
            if let Err(error) = outcome {
                let place = self.origin.join(&place);
                log::warn!("a pod does not see what has become of {}: {}", place.display(), chain(&error));
            }
        }
        self.seen = now;
    }

    /// Takes away what is mounted at a place of the copy.
    fn hide(&mut self, place: &Path) -> Result<(), MountError> {
        let failed = |source| MountError::Attach { path: self.origin.join(place), source };
        let gone: Vec<PathBuf> = self.shown.keys().filter(|path| path.starts_with(place)).cloned().collect();
        for path in gone {
            if let Some(root) = self.shown.remove(&path) {
                detach(root.as_fd()).map_err(failed)?;
            }
        }
        // What was there from the beginning, or lies below.
        for _ in 0..MAX_STACK {
            match open_below(&self.copy, place).and_then(|root| detach_root(root.as_fd())) {
                Ok(true) => {}
                Ok(false) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => return Ok(()),
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(())
    }

    /// Mounts at a place of the copy what is mounted there in the slave, as far as it may be shared.
    fn show(&mut self, place: &Path) -> Result<(), MountError> {
        let origin = self.origin.join(place);
        let failed = |source| MountError::Attach { path: origin.clone(), source };
        if self.shown.len() >= MAX_SHOWN {
            return Err(failed(Errno::EMFILE));
        }
        let source = open_below(&self.slave, place).map_err(failed)?;
        let target = open_below(&self.copy, place).map_err(failed)?;
        let tree = DetachedTree::bind_held(source.as_fd(), &origin, true)?;
        drop(source);
        tree.restrict(Propagation::Private)?;
        let root = tree
            .as_fd()
            .try_clone_to_owned()
            .map_err(|error| failed(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))))?;
        let placed = tree.judge().and_then(|kind| {
            let staging = Path::new(staging_for(kind));
            tree.attach(staging)?;
            let moved = prune(staging, &origin, EMPTY).and_then(|()| relocate_to(staging, target.as_fd()));
            if moved.is_err() {
                // The namespace is the pod's own: whatever may stay in it nobody sees.
                let _ = umount2(staging, MntFlags::MNT_DETACH);
            }
            moved
        });
        match placed {
            Ok(()) => {
                self.shown.insert(place.to_owned(), root);
                Ok(())
            }
            Err(MountError::Unshareable { what, .. }) => {
                log::debug!("{}: the {what} on it is left out", origin.display());
                cover_held(target.as_fd(), &origin, EMPTY)
            }
            Err(error) => Err(error),
        }
    }
}

/// Opens what is at a place, without being led astray by links, which the guest can make.
fn open_below(top: &Path, place: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let top = open(top, flags, Mode::empty())?;
    let resolve =
        ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_NO_MAGICLINKS;
    openat2(&top, place, OpenHow::new().flags(flags).resolve(resolve))
}

/// Detaches a mount by its root, wherever it is.
fn detach(root: BorrowedFd<'_>) -> Result<(), Errno> {
    detach_root(root).map(drop)
}

/// The same; `false` if it is not the root of a mount.
fn detach_root(root: BorrowedFd<'_>) -> Result<bool, Errno> {
    match umount2(&PathBuf::from(format!("/proc/thread-self/fd/{}", root.as_raw_fd())), MntFlags::MNT_DETACH)
    {
        Ok(()) => Ok(true),
        Err(Errno::EINVAL) => Ok(false),
        Err(error) => Err(error),
    }
}

/// What is on top at each place below `top`.
fn topmost(table: &str, top: &Path) -> BTreeMap<PathBuf, What> {
    let mut found = BTreeMap::new();
    for mount in mounts(table, top) {
        if let Ok(place) = mount.point.strip_prefix(top)
            && !place.as_os_str().is_empty()
        {
            let (device, root) = mount.what;
            found.insert(place.to_owned(), (mount.kind.to_owned(), device.to_owned(), root.to_owned()));
        }
    }
    found
}

/// The places where something else is mounted than before, without those below others of them.
fn changed(before: &BTreeMap<PathBuf, What>, now: &BTreeMap<PathBuf, What>) -> Vec<PathBuf> {
    let places: BTreeSet<&PathBuf> =
        before.keys().chain(now.keys()).filter(|place| before.get(*place) != now.get(*place)).collect();
    let mut outermost: Vec<PathBuf> = Vec::new();
    for place in places {
        // Sorted: what is above a place comes before it, and after that only what is below the same.
        if !outermost.last().is_some_and(|last| place.starts_with(last)) {
            outermost.push(place.clone());
        }
    }
    outermost
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(mounts: &[(&str, &str)]) -> BTreeMap<PathBuf, What> {
        let lines: Vec<String> = mounts
            .iter()
            .map(|(point, device)| format!("1 1 {device} / /following/c/0{point} rw - tmpfs tmpfs rw\n"))
            .collect();
        topmost(&lines.concat(), Path::new("/following/c/0"))
    }

    #[test]
    fn only_the_outermost_of_what_has_changed_counts() {
        let before = table(&[("", "8:1"), ("/a", "0:1"), ("/a/b", "0:2"), ("/c", "0:3")]);
        assert_eq!(before.len(), 3);
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(changed(&before, &before), paths(&[]));
        assert_eq!(changed(&before, &table(&[("/c", "0:3")])), paths(&["a"]));
        let now = table(&[("/a", "0:1"), ("/a/b", "0:9"), ("/a-b", "0:7"), ("/a.c/d", "0:8"), ("/c", "0:3")]);
        assert_eq!(changed(&before, &now), paths(&["a/b", "a-b", "a.c/d"]));
        // On top of what was there.
        assert_eq!(changed(&table(&[("/c", "0:3")]), &table(&[("/c", "0:3"), ("/c", "0:4")])), paths(&["c"]));
    }
}
