//! The FUSE library's interface: one method per request.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::CreateIn;
use fuse_backend_rs::api::filesystem::{
    Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, OpenOptions, SetattrValid,
    ZeroCopyReader, ZeroCopyWriter,
};
use rustix::fs::{self, AtFlags, FallocateFlags, FileType, Gid, Mode, OFlags, RenameFlags, Timespec, Uid};
use rustix::io::Errno;

use super::directory::{fitting, list};
use bulkhead_fs::message::NAMELESS;

use super::handles::Handle;
use super::host::{ActingAs, Attributes, FdName};
use super::nodes::Node;
use super::recent::Access;
use super::xattrs::Kept;
use super::{SharedTree, host_flags, open_options, set_id, transfer, xattrs};

/// The longest value or list of names of extended attributes (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const MAX_XATTR: usize = 64 * 1024;

/// `FUSE_OPEN_KILL_SUIDGID`.
const OPEN_KILL_SUIDGID: u32 = 1 << 0;

/// `FUSE_WRITE_KILL_SUIDGID`.
const WRITE_KILL_SUIDGID: u32 = 1 << 2;

/// Whether a file that is opened to be truncated loses its set-id bits.
fn kills_set_id(open_flags: u32) -> bool {
    open_flags & OPEN_KILL_SUIDGID != 0
}

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & 0o7777)
}

impl SharedTree {
    /// Opens the file of an existing name, or creates it, or one that has no name, and tells which inode it is.
    fn create_file(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: &CreateIn,
    ) -> rustix::io::Result<(Entry, u64, OpenOptions)> {
        self.handles.check_room()?;
        self.inodes.check_room()?;
        let directory = self.inodes.get(parent)?;
        let flags = host_flags(args.flags);
        let created = {
            let _acting = ActingAs::new(ctx.uid, ctx.gid)?;
            let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let (name, flags) = match name == NAMELESS {
                true => (c".", flags | OFlags::TMPFILE),
                false => (name, flags | OFlags::CREATE | OFlags::EXCL),
            };
            fs::openat(&*directory, name, flags, mode(args.mode))
        };
        let (entry, file) = match created {
            Ok(file) => {
                let path_fd = self.own_fds.reopen(&file, OFlags::PATH)?;
                (self.enter(path_fd.into(), (parent, &directory), name)?, file.into())
            }
            Err(Errno::EXIST) if args.flags & libc::O_EXCL as u32 == 0 => {
                let entry = self.look_up(parent, name)?;
                let opened = self
                    .inodes
                    .get(entry.inode)
                    .and_then(|inode| self.open_inode(&inode, flags, kills_set_id(args.fuse_flags)));
                match opened {
                    Ok(file) => (entry, file),
                    Err(errno) => {
                        self.inodes.forget(entry.inode, 1);
                        return Err(errno);
                    }
                }
            }
            Err(errno) => return Err(errno),
        };
        let inode = self.inodes.get(entry.inode)?;
        if let Some(recent) = &self.recent {
            let writes = flags.intersects(OFlags::WRONLY | OFlags::RDWR);
            // What was opened to be written only can't be read from later.
            if !flags.contains(OFlags::WRONLY) {
                let access = if writes { Access::Write } else { Access::Read };
                recent.put(Arc::new(Handle::new(entry.inode, file)), access);
            }
            return Ok((entry, 0, open_options(&inode)));
        }
        match self.handles.insert(entry.inode, file) {
            Ok(handle) => Ok((entry, handle, open_options(&inode))),
            Err(errno) => {
                self.inodes.forget(entry.inode, 1);
                Err(errno)
            }
        }
    }

    fn set_times(&self, name: &FdName, attr: &libc::stat64, valid: SetattrValid) -> rustix::io::Result<()> {
        let time = |given, now, seconds, nanoseconds| match (valid.contains(now), valid.contains(given)) {
            (true, _) => Timespec { tv_sec: 0, tv_nsec: fs::UTIME_NOW },
            (false, true) => Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
            (false, false) => Timespec { tv_sec: 0, tv_nsec: fs::UTIME_OMIT },
        };
        let times = fs::Timestamps {
            last_access: time(
                SetattrValid::ATIME,
                SetattrValid::ATIME_NOW,
                attr.st_atime,
                attr.st_atime_nsec,
            ),
            last_modification: time(
                SetattrValid::MTIME,
                SetattrValid::MTIME_NOW,
                attr.st_mtime,
                attr.st_mtime_nsec,
            ),
        };
        fs::utimensat(&self.own_fds, name.as_c_str(), &times, AtFlags::empty())
    }
}

impl FileSystem for SharedTree {
    type Inode = u64;
    type Handle = u64;

    fn destroy(&self) {
        self.clear();
    }

    fn lookup(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        Ok(self.look_up(parent, name)?)
    }

    fn forget(&self, _ctx: &Context, node: u64, count: u64) {
        self.forget_node(node, count);
    }

    fn batch_forget(&self, _ctx: &Context, requests: Vec<(u64, u64)>) {
        for (node, count) in requests {
            self.forget_node(node, count);
        }
    }

    fn getattr(
        &self,
        _ctx: &Context,
        node: u64,
        _handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        Ok(self.attributes(&*self.inodes.get(node)?)?)
    }

    fn setattr(
        &self,
        _ctx: &Context,
        node: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        let inode = self.inodes.get(node)?;
        let name = FdName::new(inode.as_fd());
        if valid.contains(SetattrValid::MODE) {
            // A device node's mark stays.
            let mark = if inode.node.is_some() { Mode::SVTX } else { Mode::empty() };
            fs::chmodat(&self.own_fds, name.as_c_str(), mode(attr.st_mode) | mark, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| Uid::from_raw(attr.st_uid));
            let gid = valid.contains(SetattrValid::GID).then(|| Gid::from_raw(attr.st_gid));
            let flags = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
            fs::chownat(&*inode, c"", uid, gid, flags)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let size = u64::try_from(attr.st_size).map_err(|_| Errno::FBIG)?;
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            let truncate =
                |file: &dyn AsFd| set_id::keep(&self.own_fds, &inode, kill, || fs::ftruncate(file, size));
            match handle {
                Some(handle) => truncate(&self.opened(node, handle, Access::Write)?.file)?,
                None if inode.kind == FileType::RegularFile => {
                    truncate(&self.own_fds.reopen(&*inode, OFlags::WRONLY)?)?;
                }
                None => return Err(Errno::INVAL.into()),
            }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            self.set_times(&name, &attr, valid)?;
        }
        Ok(self.attributes(&inode)?)
    }

    fn readlink(&self, _ctx: &Context, node: u64) -> io::Result<Vec<u8>> {
        let inode = self.inodes.get(node)?;
        Ok(fs::readlinkat(&*inode, c"", Vec::new())?.into_bytes())
    }

    fn symlink(&self, ctx: &Context, target: &CStr, parent: u64, name: &CStr) -> io::Result<Entry> {
        let directory = self.inodes.get(parent)?;
        self.inodes.check_room()?;
        {
            let _acting = ActingAs::new(ctx.uid, ctx.gid)?;
            fs::symlinkat(target, &*directory, name)?;
        }
        Ok(self.look_up(parent, name)?)
    }

    fn mknod(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        node_mode: u32,
        rdev: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        let device = match node_mode & libc::S_IFMT {
            // A whiteout, which drives nothing.
            libc::S_IFCHR if rdev == 0 => None,
            libc::S_IFCHR => Some(Node::new(FileType::CharacterDevice, rdev)),
            libc::S_IFBLK => Some(Node::new(FileType::BlockDevice, rdev)),
            _ => None,
        };
        if let Some(device) = device {
            let directory = self.inodes.get(parent)?;
            self.inodes.check_room()?;
            {
                let _acting = ActingAs::new(ctx.uid, ctx.gid)?;
                device.create(&*directory, name, mode(node_mode), &self.own_fds, &directory.mount.nodes)?;
            }
            return Ok(self.look_up(parent, name)?);
        }
        let kind = match node_mode & libc::S_IFMT {
            0 | libc::S_IFREG => FileType::RegularFile,
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            libc::S_IFCHR => FileType::CharacterDevice,
            _ => return Err(Errno::PERM.into()),
        };
        let directory = self.inodes.get(parent)?;
        self.inodes.check_room()?;
        {
            let _acting = ActingAs::new(ctx.uid, ctx.gid)?;
            fs::mknodat(&*directory, name, kind, mode(node_mode), 0)?;
        }
        Ok(self.look_up(parent, name)?)
    }

    fn mkdir(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        directory_mode: u32,
        _umask: u32,
    ) -> io::Result<Entry> {
        let directory = self.inodes.get(parent)?;
        self.inodes.check_room()?;
        {
            let _acting = ActingAs::new(ctx.uid, ctx.gid)?;
            fs::mkdirat(&*directory, name, mode(directory_mode))?;
        }
        Ok(self.look_up(parent, name)?)
    }

    fn unlink(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        Ok(fs::unlinkat(&*self.inodes.get(parent)?, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _ctx: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        Ok(fs::unlinkat(&*self.inodes.get(parent)?, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(
        &self,
        _ctx: &Context,
        old_parent: u64,
        old_name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT).contains(flags) {
            return Err(Errno::INVAL.into());
        }
        let (old, new) = (self.inodes.get(old_parent)?, self.inodes.get(new_parent)?);
        Ok(fs::renameat_with(&*old, old_name, &*new, new_name, flags)?)
    }

    fn link(&self, _ctx: &Context, node: u64, new_parent: u64, new_name: &CStr) -> io::Result<Entry> {
        let (inode, directory) = (self.inodes.get(node)?, self.inodes.get(new_parent)?);
        let name = FdName::new(inode.as_fd());
        fs::linkat(&self.own_fds, name.as_c_str(), &*directory, new_name, AtFlags::SYMLINK_FOLLOW)?;
        Ok(self.look_up(new_parent, new_name)?)
    }

    fn open(
        &self,
        _ctx: &Context,
        node: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        if self.recent.is_some() {
            // The guest's kernel does not ask again.
            return Err(Errno::NOSYS.into());
        }
        let (handle, options) = SharedTree::open(self, node, host_flags(flags), kills_set_id(fuse_flags))?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        let (entry, handle, options) = self.create_file(ctx, parent, name, &args)?;
        Ok((entry, Some(handle), options, None))
    }

    fn read(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        reply: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.opened(node, handle, Access::Read)?;
        let size = (size as usize).min(reply.available_bytes());
        transfer::read(&handle.file, reply, size, offset)
    }

    fn write(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        request: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed_write: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        let handle = self.opened(node, handle, Access::Write)?;
        let inode = self.inodes.get(node)?;
        set_id::keep(&self.own_fds, &inode, fuse_flags & WRITE_KILL_SUIDGID != 0, || {
            transfer::write(&handle.file, request, size as usize, offset, flags)
        })
    }

    fn fsync(&self, _ctx: &Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        let handle = self.opened(node, handle, Access::Read)?;
        Ok(if datasync { fs::fdatasync(&handle.file) } else { fs::fsync(&handle.file) }?)
    }

    fn fallocate(
        &self,
        ctx: &Context,
        node: u64,
        handle: u64,
        bits: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let (handle, inode) = (self.opened(node, handle, Access::Write)?, self.inodes.get(node)?);
        Ok(set_id::keep(&self.own_fds, &inode, set_id::taken_by(ctx.uid), || {
            fs::fallocate(&handle.file, FallocateFlags::from_bits_retain(bits), offset, length)
        })?)
    }

    fn release(
        &self,
        _ctx: &Context,
        node: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        if self.recent.is_some() && handle == 0 {
            return Ok(());
        }
        Ok(self.handles.remove(handle, node)?)
    }

    fn statfs(&self, _ctx: &Context, node: u64) -> io::Result<libc::statvfs64> {
        let from = fs::fstatvfs(&*self.inodes.get(node)?)?;
        // SAFETY: `statvfs64` is plain data, for which zeros are valid; it has padding, so it can't be written out.
        let mut stat: libc::statvfs64 = unsafe { std::mem::zeroed() };
        stat.f_bsize = from.f_bsize;
        stat.f_frsize = from.f_frsize;
        stat.f_blocks = from.f_blocks;
        stat.f_bfree = from.f_bfree;
        stat.f_bavail = from.f_bavail;
        stat.f_files = from.f_files;
        stat.f_ffree = from.f_ffree;
        stat.f_favail = from.f_favail;
        stat.f_namemax = from.f_namemax;
        Ok(stat)
    }

    fn setxattr(&self, _ctx: &Context, node: u64, name: &CStr, value: &[u8], flags: u32) -> io::Result<()> {
        let inode = self.inodes.get(node)?;
        let Kept::As(name) = xattrs::keep(name, inode.mount.sharing)? else { return Ok(()) };
        let flags = fs::XattrFlags::from_bits_retain(flags);
        Ok(fs::setxattr(FdName::new(inode.as_fd()).as_c_str(), &*name, value, flags)?)
    }

    fn getxattr(&self, _ctx: &Context, node: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let inode = self.inodes.get(node)?;
        let Ok(Kept::As(name)) = xattrs::keep(name, inode.mount.sharing) else {
            return Err(xattrs::missing(name).into());
        };
        let path = FdName::new(inode.as_fd());
        if size == 0 {
            return Ok(GetxattrReply::Count(fs::getxattr_query(path.as_c_str(), &*name)? as u32));
        }
        let mut value = vec![0; (size as usize).min(MAX_XATTR)];
        let length = fs::getxattr(path.as_c_str(), &*name, &mut value[..])?;
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, ctx: &Context, node: u64, size: u32) -> io::Result<ListxattrReply> {
        let inode = self.inodes.get(node)?;
        let mut names = vec![0; MAX_XATTR];
        let length = fs::listxattr(FdName::new(inode.as_fd()).as_c_str(), &mut names[..])?;
        names.truncate(length);
        let shown = xattrs::in_guest(&names, ctx.uid == 0);
        match size as usize {
            0 => Ok(ListxattrReply::Count(shown.len() as u32)),
            room if room < shown.len() => Err(Errno::RANGE.into()),
            _ => Ok(ListxattrReply::Names(shown)),
        }
    }

    fn removexattr(&self, _ctx: &Context, node: u64, name: &CStr) -> io::Result<()> {
        let inode = self.inodes.get(node)?;
        let Kept::As(name) = xattrs::keep(name, inode.mount.sharing)? else {
            return Err(Errno::NODATA.into());
        };
        Ok(fs::removexattr(FdName::new(inode.as_fd()).as_c_str(), &*name)?)
    }

    fn opendir(&self, _ctx: &Context, node: u64, _flags: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = SharedTree::open(self, node, OFlags::RDONLY | OFlags::DIRECTORY, false)?;
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (handle, inode) = (self.handles.get(handle, node)?, self.inodes.get(node)?);
        Ok(list(&handle, offset, fitting(size, false), |listed| {
            let number = self.number_of_listed(&inode, listed, || {
                let attributes = Attributes::of_entry(&handle.file, listed.name)?;
                let mount = self.mounts.within(&inode.mount, attributes.device())?;
                Ok((attributes.mount_id(), mount))
            });
            Ok(add_entry(listed.to_dir_entry(number)).map_err(|_| Errno::IO)? > 0)
        })?)
    }

    fn readdirplus(
        &self,
        _ctx: &Context,
        node: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add_entry: &mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>,
    ) -> io::Result<()> {
        let (handle, inode) = (self.handles.get(handle, node)?, self.inodes.get(node)?);
        Ok(list(&handle, offset, fitting(size, true), |listed| {
            let entry = self.look_up_listed(node, listed)?;
            let number = self.number_of_listed(&inode, listed, || {
                let found = self.inodes.get(entry.inode)?;
                Ok((found.mount_id(), found.mount.clone()))
            });
            let mut told = listed.to_dir_entry(number);
            if entry.inode != 0 {
                // A file may stand for a device node.
                told.type_ = (entry.attr.st_mode & libc::S_IFMT) >> 12;
            }
            let added = add_entry(told, entry);
            if !matches!(added, Ok(1..)) && entry.inode != 0 {
                // Not told, so the guest won't forget it.
                self.inodes.forget(entry.inode, 1);
            }
            Ok(added.map_err(|_| Errno::IO)? > 0)
        })?)
    }

    fn fsyncdir(&self, ctx: &Context, node: u64, datasync: bool, handle: u64) -> io::Result<()> {
        self.fsync(ctx, node, datasync, handle)
    }

    fn releasedir(&self, _ctx: &Context, node: u64, _flags: u32, handle: u64) -> io::Result<()> {
        Ok(self.handles.remove(handle, node)?)
    }

    fn access(&self, _ctx: &Context, node: u64, _mask: u32) -> io::Result<()> {
        // The guest's kernel has checked the mode; it asks only for what it can't know, and there is nothing such.
        self.inodes.get(node).map(drop).map_err(io::Error::from)
    }

    fn lseek(&self, _ctx: &Context, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let handle = self.opened(node, handle, Access::Read)?;
        let position = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => fs::SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => fs::SeekFrom::Hole(offset),
            // The guest's kernel does the others itself.
            _ => return Err(Errno::INVAL.into()),
        };
        // A directory's is not known after this.
        let _unknown = handle.lock_position().take();
        Ok(fs::seek(&handle.file, position)?)
    }
}
