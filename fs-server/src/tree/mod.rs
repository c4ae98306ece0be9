//! The shared directory as a FUSE file system: every request passes through to the host's files.
//!
//! It stands in the place of fuse-backend-rs's own `PassthroughFs`, whose protocol decoding is used as it is. Four
//! things of that one don't do for pods: it remembers every file ever seen, or else gives up after 255 mounts; a guest
//! can make it close a descriptor twice; its extended attributes need a whole `/proc` inside the shared tree; and it
//! creates files with the caller's permissions but without its groups.
//!
//! Files are held as `O_PATH` descriptors ([`inodes`]), so no path of the guest's is ever resolved but a single name in
//! a held directory, without following symbolic links. Only regular files and directories are opened; fifos, sockets
//! and devices work inside the guest's kernel and never reach the host's. The guest's kernel checks permissions; the
//! server acts with root's rights over files, and creates as the caller so that ownership comes out right.

mod crossings;
mod directory;
mod filesystem;
mod handles;
mod host;
mod inodes;
mod mounts;
mod nodes;
mod recent;
mod room;
mod set_id;
mod transfer;
mod xattrs;

use std::ffi::CStr;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_vmm_protocol::{roots, view_number};
use fuse_backend_rs::api::filesystem::{Entry, OpenOptions};
use rustix::fs::{FileType, OFlags, copy_file_range};
use rustix::io::{Errno, Result};

use crossings::Crossings;
use handles::{Handle, Handles};
use host::{Attributes, OwnFds, may_enter, open_entry};
use inodes::{Inode, Inodes, Place};
use mounts::{Mounts, Sharing};
use nodes::Node;
use recent::{Access, Recent};
pub(crate) use room::Rooms;

/// `FUSE_ATTR_SUBMOUNT`: the guest's kernel mounts it, by itself, as a file system of its own.
const ATTR_SUBMOUNT: u32 = 1 << 0;

/// Files that stand for devices on old file systems.
const KEPT_SHARE: usize = 32;

/// After how many transfers that the VMM asked for it is lent a file again.
const LENT_AGAIN: u32 = 64;

/// What the guest may rely on in all of a session: a property of the FUSE connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    /// Of the whole tree: the host may change files, too.
    Shared,
    /// Of root file systems: nobody but the guest changes anything.
    Roots,
}

/// The shared directory.
pub(crate) struct SharedTree {
    inodes: Inodes,
    handles: Handles,
    /// Instead of handles of files, in a session of roots: in that the guest does not say when it opens and closes one.
    recent: Option<Recent>,
    mounts: Mounts,
    crossings: Crossings,
    own_fds: OwnFds,
}

/// A range to copy from one open file to another: `struct fuse_copy_file_range_in`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CopyRange {
    /// Node id and handle of the source, and where to start there.
    pub from: (u64, u64, u64),
    /// Node id and handle of the destination, and where to start there.
    pub to: (u64, u64, u64),
    /// How many bytes.
    pub length: u64,
    /// The user who asks.
    pub uid: u32,
}

impl SharedTree {
    /// Serves the process's root directory. `own_fds` is `/proc/self/fd`.
    pub(crate) fn new(own_fds: OwnedFd, rooms: &Rooms, session: Session) -> Result<Self> {
        // The guest's umask has been applied to the modes it sends.
        rustix::process::umask(rustix::fs::Mode::empty());
        let root = open_entry(rustix::fs::CWD, c"/")?;
        let own_fds = OwnFds::new(own_fds)?;
        let attributes = Attributes::of(&root)?;
        let mounts = Mounts::default();
        let mount = mounts.get(attributes.device(), is_read_only(&root)?, Sharing::WithHost)?;
        let root = Inode::new(root, &attributes, Place::Top, mount, 0);
        nodes::limit_kept(KEPT_SHARE);
        Ok(SharedTree {
            inodes: Inodes::new(root, rooms.inodes.clone()),
            handles: Handles::new(rooms.handles.clone()),
            recent: (session == Session::Roots).then(Recent::default),
            mounts,
            crossings: Crossings::default(),
            own_fds,
        })
    }

    /// What it is served for.
    pub(crate) fn session(&self) -> Session {
        if self.recent.is_some() { Session::Roots } else { Session::Shared }
    }

    /// Closes and forgets everything but the root.
    pub(crate) fn clear(&self) {
        self.handles.clear();
        self.recent.iter().for_each(Recent::clear);
        self.inodes.clear();
    }

    /// The open file that a request means: by its handle, or else the one of its node id.
    fn opened(&self, node: u64, handle: u64, access: Access) -> Result<Arc<Handle>> {
        let Some(recent) = self.recent.as_ref().filter(|_| handle == 0) else {
            return self.handles.get(handle, node);
        };
        recent.get(node, access, || {
            let inode = self.inodes.get(node)?;
            let flags = if access == Access::Write { OFlags::RDWR } else { OFlags::RDONLY };
            match inode.kind {
                FileType::RegularFile => self.own_fds.reopen(inode.as_fd(), flags),
                _ => Err(Errno::BADF),
            }
        })
    }

    /// Takes back so many lookups of a node.
    fn forget_node(&self, node: u64, lookups: u64) {
        self.inodes.forget(node, lookups);
        if let Some(recent) = &self.recent
            && self.inodes.get(node).is_err()
        {
            recent.remove(node);
        }
    }

    /// Counts a read or write of an open file. The second one of those gives the file, if the VMM may do the others by itself: of what only
    /// the pod changes, where nobody else's disk makes a read wait, and without set-id bits, which need attention at each
    /// write. It does so again after some more, which the VMM would not have asked for if it still had the file.
    pub(crate) fn to_lend(&self, node: u64, handle: u64) -> Option<Arc<Handle>> {
        let open = match &self.recent {
            Some(recent) if handle == 0 => recent.find(node, Access::Read)?,
            _ => self.handles.get(handle, node).ok()?,
        };
        if open.count_transfer() % LENT_AGAIN != 1 {
            return None;
        }
        let inode = self.inodes.get(node).ok()?;
        let is_lent =
            inode.kind == FileType::RegularFile && inode.mount.sharing.is_guest_only() && !inode.has_set_id();
        is_lent.then_some(open)
    }

    /// Copies inside the host, as far as one system call goes; tells how many bytes.
    pub(crate) fn copy_range(&self, range: &CopyRange) -> Result<usize> {
        let (node, handle, mut from) = range.from;
        let source = self.opened(node, handle, Access::Read)?;
        let (node, handle, mut to) = range.to;
        let destination = self.opened(node, handle, Access::Write)?;
        let inode = self.inodes.get(node)?;
        // Bounded, so that one request can't keep a worker for long.
        let length = range.length.min(MAX_COPY) as usize;
        set_id::keep(&self.own_fds, &inode, set_id::taken_by(range.uid), || {
            copy_file_range(&source.file, Some(&mut from), &destination.file, Some(&mut to), length)
        })
    }

    fn look_up(&self, node: u64, name: &CStr) -> Result<Entry> {
        let parent = self.inodes.get(node)?;
        self.inodes.check_room()?;
        if parent.place == Place::Top
            && let Some(view) = view_number(name.to_bytes())
        {
            return self.view(&parent, view);
        }
        let found = match open_entry(&*parent, name) {
            // Told as "no such file, and you may rely on that", where nobody but the guest can create one.
            Err(Errno::NOENT) if parent.mount.sharing.is_guest_only() => {
                return Ok(Entry { entry_timeout: parent.mount.sharing.timeout(), ..Entry::default() });
            }
            found => found?,
        };
        self.enter(found, (node, &parent), name)
    }

    /// The tree once more, as a file system of its own to the guest: with another device number, and the room and the files
    /// that it finds there. The shim has the guest look for all volumes of one of the host's file systems in one view.
    fn view(&self, root: &Inode, view: u32) -> Result<Entry> {
        if root.view != 0 || view == 0 {
            return Err(Errno::NOENT);
        }
        let path_fd = self.own_fds.reopen(root, OFlags::PATH)?;
        let attributes = Attributes::of(&path_fd)?;
        let found = Inode::new(path_fd.into(), &attributes, Place::Top, root.mount.clone(), view);
        let (node, inode) = self.inodes.look_up(found)?;
        Ok(Entry {
            inode: node,
            generation: 0,
            attr: shown(&attributes, &inode),
            attr_flags: ATTR_SUBMOUNT,
            attr_timeout: Sharing::GuestOnly.timeout(),
            entry_timeout: Sharing::GuestOnly.timeout(),
        })
    }

    /// Makes a file known to the guest that was found (or created) in `parent`.
    fn enter(&self, path_fd: OwnedFd, (directory, parent): (u64, &Inode), name: &CStr) -> Result<Entry> {
        let attributes = Attributes::of(&path_fd)?;
        let crossed = attributes.mount_id() != parent.mount_id();
        // The shim has taken out what may not be here, but for what the host mounts later.
        if crossed && !may_enter(&path_fd)? {
            return Err(Errno::ACCESS);
        }
        let place = match parent.place {
            Place::Top if !crossed => Place::Container,
            _ => Place::Below,
        };
        let entered = if crossed {
            self.crossings.note(attributes.mount_id(), directory, name);
            let sharing = match name.to_str() {
                Ok(roots::ROOTFS) if parent.place == Place::Container => Sharing::GuestOnly,
                Ok(roots::CHANGES) if parent.place == Place::Container => Sharing::Changes,
                Ok(roots::LOWER) if parent.place == Place::Container => Sharing::Nobody,
                _ => Sharing::WithHost,
            };
            self.mounts.get(attributes.device(), is_read_only(&path_fd)?, sharing)?
        } else {
            parent.mount.clone()
        };
        let stands_for = if attributes.is_marked() {
            Node::of(&path_fd, attributes.number(), &entered.nodes)
        } else {
            None
        };
        let mount = self.mounts.within(&entered, attributes.device())?;
        let found = Inode::new(path_fd, &attributes, place, mount, parent.view).standing_for(stands_for);
        let (node, inode) = self.inodes.look_up(found)?;
        Ok(Entry {
            inode: node,
            generation: 0,
            attr: shown(&attributes, &inode),
            attr_flags: 0,
            attr_timeout: inode.mount.sharing.timeout(),
            // The name is an entry of the parent's file system, whatever is mounted there.
            entry_timeout: parent.mount.sharing.timeout(),
        })
    }

    fn attributes(&self, inode: &Inode) -> Result<(libc::stat64, Duration)> {
        let attributes = Attributes::of(inode)?;
        Ok((shown(&attributes, inode), inode.mount.sharing.timeout()))
    }

    /// Opens a regular file or directory and nothing else.
    fn open(&self, node: u64, flags: OFlags, kill: bool) -> Result<(u64, OpenOptions)> {
        self.handles.check_room()?;
        let inode = self.inodes.get(node)?;
        let file = self.open_inode(&inode, flags, kill)?;
        Ok((self.handles.insert(node, file)?, open_options(&inode)))
    }

    fn open_inode(&self, inode: &Inode, flags: OFlags, kill: bool) -> Result<File> {
        match inode.kind {
            FileType::RegularFile if flags.contains(OFlags::TRUNC) => {
                set_id::keep(&self.own_fds, inode, kill, || self.own_fds.reopen(inode.as_fd(), flags))
            }
            FileType::RegularFile | FileType::Directory => self.own_fds.reopen(inode.as_fd(), flags),
            _ => Err(Errno::NXIO),
        }
    }
}

/// Whether the mount by which a file was reached is read-only.
fn is_read_only(file: impl AsFd) -> Result<bool> {
    Ok(rustix::fs::fstatvfs(file)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// Attributes as the guest is to see them.
fn shown(attributes: &Attributes, inode: &Inode) -> libc::stat64 {
    inode.note_mode(attributes.mode());
    let mut stat = attributes.to_stat(inode.mount.guest_number(inode.view, attributes.number()));
    if let Some(node) = inode.node {
        node.show(&mut stat);
    }
    stat
}

/// The most bytes that one copy request moves.
const MAX_COPY: u64 = 16 * 1024 * 1024;

/// What the guest's kernel may do with an open file.
///
/// It keeps the data it has cached: when the host changes a file, its modification time tells, at the latest when the
/// cached attributes run out (`FUSE_AUTO_INVAL_DATA`). Listings have no such check.
fn open_options(inode: &Inode) -> OpenOptions {
    match (inode.kind, inode.mount.sharing) {
        (FileType::Directory, Sharing::WithHost) => OpenOptions::empty(),
        (FileType::Directory, _) => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
        _ => OpenOptions::KEEP_CACHE,
    }
}

/// The open flags that mean something on the host. Not `O_DIRECT`: it asks for aligned buffers that messages don't
/// have, and the guest's kernel already goes around its own cache. Not `O_APPEND`: each write says so itself.
fn host_flags(guest: u32) -> OFlags {
    let meaningful = OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC | OFlags::NOATIME;
    OFlags::from_bits_truncate(guest) & meaningful
}
