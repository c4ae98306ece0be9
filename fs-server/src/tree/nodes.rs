//! Device nodes that the guest makes. A container may make them, and none is ever one on the host: what stands for a node
//! there is an empty regular file that is marked by the sticky bit and described by an extended attribute, which the guest
//! can neither see nor set. (An overlay's whiteout is made as what it is: the number 0:0 drives no device.)
//!
//! On a file system without such attributes (tmpfs before Linux 6.6) the description is kept here, and the file held open,
//! so that its number can't become another one's. It is forgotten when the guest knows nothing of that file system any more, which is when the container goes.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::{Errno, Result};

use super::host::{Attributes, FdName, OwnFds};

/// Names of extended attributes that are ours.
pub(super) const PREFIX: &[u8] = b"user.bulkhead.";

/// `c` or `b`, then the number.
const NAME: &CStr = c"user.bulkhead.node";

/// The longest description there is.
const MAX_DESCRIPTION: usize = 32;

/// What a marked file stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node {
    /// Character or block device.
    pub kind: FileType,
    /// As in `st_rdev`.
    pub number: u64,
}

impl Node {
    /// From a request to make one, which has the number as the kernel's `new_encode_dev` writes it.
    pub(super) fn new(kind: FileType, encoded: u32) -> Node {
        let (major, minor) = (encoded >> 8 & 0xfff, encoded & 0xff | encoded >> 12 & 0xfff00);
        Node { kind, number: libc::makedev(major, minor) }
    }

    /// Makes the file that stands for it. The thread acts as the owner.
    pub(super) fn create(
        self,
        directory: impl AsFd,
        name: &CStr,
        mode: Mode,
        own_fds: &OwnFds,
        kept: &Kept,
    ) -> Result<()> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(&directory, name, flags, Mode::empty())?;
        let file_name = FdName::new(file.as_fd());
        let described =
            match fs::setxattr(file_name.as_c_str(), NAME, self.description().as_bytes(), XattrFlags::CREATE)
            {
                Err(Errno::OPNOTSUPP) => {
                    own_fds.reopen(&file, OFlags::PATH).and_then(|held| kept.keep(held.into(), self))
                }
                result => result,
            };
        let mark = || fs::chmodat(own_fds, file_name.as_c_str(), mode | Mode::SVTX, AtFlags::empty());
        described.and_then(|()| mark()).inspect_err(|_| {
            // Nothing of it is left; if that fails too, an empty file of its owner's is.
            let _ = fs::unlinkat(&directory, name, AtFlags::empty());
        })
    }

    /// What a marked file stands for.
    pub(super) fn of(file: impl AsFd, number: u64, kept: &Kept) -> Option<Node> {
        kept.get(number).or_else(|| Node::described_by(file))
    }

    fn described_by(file: impl AsFd) -> Option<Node> {
        let mut text = [0; MAX_DESCRIPTION];
        let length = fs::getxattr(FdName::new(file.as_fd()).as_c_str(), NAME, &mut text[..]).ok()?;
        Node::parse(std::str::from_utf8(text.get(..length)?).ok()?)
    }

    /// Attributes as the guest is to see them.
    pub(super) fn show(self, stat: &mut libc::stat64) {
        stat.st_mode = stat.st_mode & !(libc::S_IFMT | libc::S_ISVTX) | self.kind.as_raw_mode();
        stat.st_rdev = self.number;
    }

    fn description(self) -> String {
        let kind = if self.kind == FileType::BlockDevice { 'b' } else { 'c' };
        format!("{kind} {}:{}", libc::major(self.number), libc::minor(self.number))
    }

    fn parse(text: &str) -> Option<Node> {
        let (kind, number) = text.split_once(' ')?;
        let (major, minor) = number.split_once(':')?;
        let kind = match kind {
            "c" => FileType::CharacterDevice,
            "b" => FileType::BlockDevice,
            _ => return None,
        };
        Some(Node { kind, number: libc::makedev(major.parse().ok()?, minor.parse().ok()?) })
    }
}

/// Nodes of one file system that it has no room for, by the numbers of the files that stand for them.
#[derive(Debug, Default)]
pub(super) struct Kept(Mutex<HashMap<u64, (OwnedFd, Node)>>);

/// How many of them all mounts together have.
static KEPT: AtomicUsize = AtomicUsize::new(0);

/// The most there may be: each is an open file.
static KEPT_LIMIT: AtomicUsize = AtomicUsize::new(0);

/// Says how many files that stand for nodes may be held open.
pub(super) fn limit_kept(files: usize) {
    KEPT_LIMIT.store(files, Ordering::Relaxed);
}

impl Kept {
    fn get(&self, number: u64) -> Option<Node> {
        self.lock().get(&number).map(|(_, node)| *node)
    }

    fn keep(&self, file: OwnedFd, node: Node) -> Result<()> {
        let number = Attributes::of(&file)?.number();
        let mut kept = self.lock();
        if KEPT.load(Ordering::Relaxed) >= KEPT_LIMIT.load(Ordering::Relaxed) {
            let before = kept.len();
            kept.retain(|_, (file, _)| Attributes::of(&*file).is_ok_and(|attributes| attributes.links() > 0));
            KEPT.fetch_sub(before - kept.len(), Ordering::Relaxed);
            if kept.len() == before {
                return Err(Errno::NOSPC);
            }
        }
        KEPT.fetch_add(1, Ordering::Relaxed);
        kept.insert(number, (file, node));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (OwnedFd, Node)>> {
        // The map is sound after each statement, whoever may have panicked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        let kept = self.0.get_mut().unwrap_or_else(PoisonError::into_inner);
        KEPT.fetch_sub(kept.len(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_as_the_kernel_writes_them() {
        let node = Node::new(FileType::CharacterDevice, 0x0103);
        assert_eq!(node.description(), "c 1:3");
        // Minor 0x12345 of major 0x678.
        let node = Node::new(FileType::BlockDevice, 0x45 | 0x678 << 8 | 0x123 << 20);
        assert_eq!((libc::major(node.number), libc::minor(node.number)), (0x678, 0x12345));
        assert_eq!(Node::parse(&node.description()), Some(node));
        for wrong in ["", "c", "c 1", "x 1:3", "c 1:", "c -1:3"] {
            assert_eq!(Node::parse(wrong), None, "{wrong}");
        }
    }
}
