//! The inodes that the guest knows, each held open as `O_PATH`.
//!
//! An inode's descriptor keeps its file from going away, so while it is here no other file can have the same device,
//! inode number and mount: the key is safe to compare. Node ids are never used twice.
//!
//! A file is one inode whichever mounts it is reached by, as it is on the host: so locks, FIFOs, sockets and shared memory
//! work through all of them. A directory is one per mount, since what is mounted below it may differ.

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::FileType;
use rustix::io::{Errno, Result};

use super::host::Attributes;
use super::mounts::Mount;
use super::nodes::Node;
use super::room::Room;
use super::set_id;

/// The node id of the shared directory itself (`FUSE_ROOT_ID`).
pub(super) const ROOT: u64 = 1;

/// Identifies a file on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// The view it belongs to.
    pub view: u32,
    /// Its file system: the slot of its [`Mount`].
    pub slot: u16,
    /// Its number there.
    pub number: u64,
    /// The mount a directory was reached by.
    pub mount: Option<u64>,
}

/// Where in the shared tree an inode was first found, as far as that matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The shared directory.
    Top,
    /// A container's directory in it.
    Container,
    /// Anywhere else.
    Below,
}

/// A file, directory or anything else the guest has looked up.
#[derive(Debug)]
pub(super) struct Inode {
    path_fd: OwnedFd,
    key: Key,
    mount_id: u64,
    /// Which view of the tree it was found in: 0, or the number of one that the guest has as a file system of its own.
    pub view: u32,
    /// What it is; fixed for an inode's life.
    pub kind: FileType,
    /// Where it was found.
    pub place: Place,
    /// The mount it is on.
    pub mount: Arc<Mount>,
    /// The device node that it stands for.
    pub node: Option<Node>,
    /// Whether it had set-id bits when it was last looked at.
    set_id: AtomicBool,
}

impl Inode {
    /// Wraps an `O_PATH` descriptor of a file with these attributes.
    pub(super) fn new(
        path_fd: OwnedFd,
        attributes: &Attributes,
        place: Place,
        mount: Arc<Mount>,
        view: u32,
    ) -> Self {
        let (kind, mount_id) = (attributes.kind(), attributes.mount_id());
        let key = Key {
            view,
            slot: mount.slot(),
            number: attributes.number(),
            mount: (kind == FileType::Directory).then_some(mount_id),
        };
        let set_id = AtomicBool::new(false);
        Inode { path_fd, key, mount_id, view, kind, place, mount, node: None, set_id }
    }

    /// The same, standing for a device node.
    pub(super) fn standing_for(mut self, node: Option<Node>) -> Self {
        if let Some(node) = node {
            self.kind = node.kind;
        }
        self.node = node;
        self
    }

    /// Whether it may have set-id bits.
    pub(super) fn has_set_id(&self) -> bool {
        self.set_id.load(Ordering::Relaxed)
    }

    /// Notes what its mode is.
    pub(super) fn note_mode(&self, mode: u32) {
        self.set_id.store(set_id::has(mode), Ordering::Relaxed);
    }

    /// Which mount of the host it was reached by.
    pub(super) fn mount_id(&self) -> u64 {
        self.mount_id
    }
}

impl AsFd for Inode {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.path_fd.as_fd()
    }
}

/// All known inodes.
pub(super) struct Inodes {
    room: Arc<Room>,
    table: Mutex<Table>,
}

struct Table {
    by_node: HashMap<u64, Entry>,
    by_key: HashMap<Key, u64>,
    next: u64,
}

struct Entry {
    inode: Arc<Inode>,
    /// How often the guest was told of it, less how often it forgot.
    lookups: u64,
}

impl Inodes {
    /// A table with the root in it, which is not counted.
    pub(super) fn new(root: Inode, room: Arc<Room>) -> Self {
        let by_key = HashMap::from([(root.key, ROOT)]);
        let by_node = HashMap::from([(ROOT, Entry { inode: Arc::new(root), lookups: 1 })]);
        Inodes { room, table: Mutex::new(Table { by_node, by_key, next: ROOT + 1 }) }
    }

    /// The inode with this node id; `ESTALE` if the guest has none such.
    pub(super) fn get(&self, node: u64) -> Result<Arc<Inode>> {
        self.lock().by_node.get(&node).map(|entry| entry.inode.clone()).ok_or(Errno::STALE)
    }

    /// Fails with `ENFILE` when another inode would be too many.
    pub(super) fn check_room(&self) -> Result<()> {
        if self.room.is_left() { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// Counts one lookup of this file, whether it is known or new, and tells its node id and inode.
    pub(super) fn look_up(&self, found: Inode) -> Result<(u64, Arc<Inode>)> {
        let mut table = self.lock();
        if let Some(&node) = table.by_key.get(&found.key)
            && let Some(entry) = table.by_node.get_mut(&node)
        {
            entry.lookups = entry.lookups.saturating_add(1);
            return Ok((node, entry.inode.clone()));
        }
        if !self.room.take() {
            return Err(Errno::NFILE);
        }
        let node = table.next;
        table.next += 1;
        let inode = Arc::new(found);
        table.by_key.insert(inode.key, node);
        table.by_node.insert(node, Entry { inode: inode.clone(), lookups: 1 });
        Ok((node, inode))
    }

    /// Takes back so many lookups; the inode is dropped with the last. The root stays.
    pub(super) fn forget(&self, node: u64, lookups: u64) {
        if node == ROOT {
            return;
        }
        // Declared first, dropped last: closing may take the host time, nobody should wait for it.
        let _forgotten;
        let mut table = self.lock();
        let Some(entry) = table.by_node.get_mut(&node) else { return };
        entry.lookups = entry.lookups.saturating_sub(lookups);
        if entry.lookups == 0 {
            _forgotten = table.by_node.remove(&node);
            if let Some(entry) = &_forgotten {
                self.room.give(1);
                table.by_key.remove(&entry.inode.key);
            }
        }
    }

    /// Forgets all that was found by these mounts, whatever the guest still counts on; gives the node ids.
    pub(super) fn drop_mounts(&self, mounts: &HashSet<u64>) -> Vec<u64> {
        // Declared first, dropped last: closing may take the host time, nobody should wait for it.
        let dropped: Vec<(u64, Entry)>;
        let mut table = self.lock();
        dropped = table
            .by_node
            .extract_if(|&node, entry| node != ROOT && mounts.contains(&entry.inode.mount_id()))
            .collect();
        self.room.give(dropped.len());
        for (_, entry) in &dropped {
            table.by_key.remove(&entry.inode.key);
        }
        drop(table);
        dropped.into_iter().map(|(node, _)| node).collect()
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&self) {
        let mut table = self.lock();
        let before = table.by_node.len();
        table.by_node.retain(|&node, _| node == ROOT);
        self.room.give(before - table.by_node.len());
        table.by_key.retain(|_, &mut node| node == ROOT);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // The table is sound after each statement, whoever may have panicked.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
