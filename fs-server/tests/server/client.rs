//! A file server started as the shim starts it, and a client that speaks FUSE to it by hand.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

pub(crate) use bulkhead_vmm_protocol::fuse::opcode as op;
use bulkhead_vmm_protocol::loan::{self, Loan};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};
use tempfile::TempDir;

/// `FATTR_UID` and `FATTR_GID`: that a request changes both.
pub(crate) const FATTR_UID_GID: u32 = 0b110;

/// The node id of the shared directory.
pub(crate) const ROOT: u64 = 1;

/// A server with a shared directory of its own: `c1/rootfs` is a mount, `c1/mounts/0` another.
///
/// The calling thread gets a mount namespace of its own, which the kernel takes down with it.
pub(crate) struct Server {
    pub shared: TempDir,
    child: Child,
    /// The session of the shared tree.
    pub fuse: Fuse,
    /// That of root file systems.
    pub roots: Fuse,
}

impl Server {
    pub(crate) fn start() -> Self {
        Self::start_with_files(4096)
    }

    /// Starts a server that may have so many open files.
    pub(crate) fn start_with_files(open_files: u64) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests mount and start the server: run them as root");
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let shared = directory.path();
        mount_tmpfs(shared);
        mount(none, shared, none, MsFlags::MS_SHARED, none).unwrap();
        for directory in ["c1/rootfs", "c1/mounts/0"] {
            std::fs::create_dir_all(shared.join(directory)).unwrap();
            mount_tmpfs(&shared.join(directory));
        }

        let pair =
            || socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let [(fuse, shared_end), (roots, roots_end)] = [pair(), pair()];
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-fs"));
        command.current_dir(shared).stdin(Stdio::null()).stdout(Stdio::null()).env_clear();
        let sockets = [shared_end.as_raw_fd(), roots_end.as_raw_fd()];
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                use nix::sys::resource::{Resource, setrlimit};
                setrlimit(Resource::RLIMIT_NOFILE, open_files, open_files)?;
                // Out of each other's way.
                let moved = sockets.map(|socket| libc::fcntl(socket, libc::F_DUPFD_CLOEXEC, 10));
                for (socket, place) in moved.into_iter().zip(3..) {
                    if libc::dup2(socket, place) != place {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            })
        };
        let child = command.spawn().unwrap();
        drop((shared_end, roots_end));
        let mut server = Server { shared: directory, child, fuse: Fuse::new(fuse), roots: Fuse::new(roots) };
        server.fuse.init();
        server.roots.init();
        server
    }

    /// Looks the path up, name by name.
    pub(crate) fn node(&mut self, path: &str) -> u64 {
        path.split('/').fold(ROOT, |node, name| self.fuse.lookup(node, name).unwrap().node)
    }

    /// The container's root file system.
    pub(crate) fn rootfs(&mut self) -> u64 {
        self.node("c1/rootfs")
    }

    pub(crate) fn path(&self, below: &str) -> PathBuf {
        self.shared.path().join(below)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How the process ended, within some seconds.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let end = Instant::now() + Duration::from_secs(20);
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("the file server does not end");
    }

    pub(crate) fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the file server died: {status}");
        }
        assert_eq!(self.fuse.call(op::STATFS, ROOT, &[]).map(|body| body.len()), Ok(80));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
        let _busy = nix::mount::umount2(self.shared.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

pub(crate) fn mount_tmpfs(target: &Path) {
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
    mount(Some("none"), target, Some("tmpfs"), flags, Some("mode=755")).unwrap();
}

/// A FUSE client. Calls answer with the reply's body, or its errno.
pub(crate) struct Fuse {
    pub socket: UnixDatagram,
    unique: u64,
    /// Ids in the header of each request.
    pub ids: (u32, u32),
    /// What the server has lent so far.
    pub lent: RefCell<Vec<(Loan, File)>>,
}

/// What a lookup tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub node: u64,
    /// Seconds that the name and the attributes are valid.
    pub valid: (u64, u64),
    pub attr: Attr,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Attr {
    pub number: u64,
    pub size: u64,
    pub mode: u32,
    pub links: u32,
    pub uid: u32,
    pub gid: u32,
}

impl Fuse {
    fn new(socket: OwnedFd) -> Self {
        let socket = UnixDatagram::from(socket);
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.set_write_timeout(Some(Duration::from_secs(20))).unwrap();
        Fuse { socket, unique: 0, ids: (0, 0), lent: RefCell::default() }
    }

    /// A whole request.
    pub(crate) fn packet(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let mut packet = Vec::new();
        packet.extend((40 + body.len() as u32).to_le_bytes());
        packet.extend(opcode.to_le_bytes());
        packet.extend(self.unique.to_le_bytes());
        packet.extend(node.to_le_bytes());
        packet.extend(self.ids.0.to_le_bytes());
        packet.extend(self.ids.1.to_le_bytes());
        packet.extend([0; 8]);
        packet.extend(body);
        packet
    }

    pub(crate) fn send(&self, packet: &[u8]) {
        self.socket.send(packet).unwrap();
    }

    /// The next reply: its `unique`, and body or errno. Files that are lent before it are kept.
    pub(crate) fn receive(&self) -> (u64, Result<Vec<u8>, i32>) {
        let mut reply = vec![0; 256 * 1024];
        loop {
            recv(self.socket.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK)
                .expect("a reply within the time limit");
            let (length, file) = loan::receive(&self.socket, &mut reply).unwrap();
            assert!(length > 0, "the file server is gone");
            let Some(file) = file else {
                reply.truncate(length);
                break;
            };
            self.lent.borrow_mut().push((Loan::parse(&reply[..length]).unwrap(), file.into()));
        }
        let length = reply.len();
        assert_eq!(u32_at(&reply, 0) as usize, length, "the header's length is the packet's");
        let error = u32_at(&reply, 4) as i32;
        let body = reply.split_off(16);
        (u64_at(&reply, 8), if error == 0 { Ok(body) } else { Err(-error) })
    }

    pub(crate) fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let packet = self.packet(opcode, node, body);
        self.send(&packet);
        let (unique, result) = self.receive();
        assert_eq!(unique, self.unique, "the reply is for the request");
        result
    }

    pub(crate) fn init(&mut self) -> Vec<u8> {
        let mut body = bytes(&[7, 41, 128 * 1024, u32::MAX]);
        body.resize(64, 0);
        self.call(op::INIT, 0, &body).unwrap()
    }

    pub(crate) fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        self.call(op::LOOKUP, parent, &name_bytes(name)).map(|body| entry(&body))
    }

    pub(crate) fn forget(&mut self, node: u64, count: u64) {
        let packet = self.packet(op::FORGET, node, &count.to_le_bytes());
        self.send(&packet);
    }

    pub(crate) fn getattr(&mut self, node: u64) -> Result<Attr, i32> {
        self.call(op::GETATTR, node, &[0; 16]).map(|body| attr(&body[16..]))
    }

    /// Creates and opens; the handle too.
    pub(crate) fn create(
        &mut self,
        parent: u64,
        name: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(Entry, u64), i32> {
        let body = [bytes(&[flags as u32, mode, 0, 0]), name_bytes(name)].concat();
        self.call(op::CREATE, parent, &body).map(|body| (entry(&body), u64_at(&body, 128)))
    }

    pub(crate) fn mkdir(&mut self, parent: u64, name: &str, mode: u32) -> Result<Entry, i32> {
        let body = [bytes(&[mode, 0]), name_bytes(name)].concat();
        self.call(op::MKDIR, parent, &body).map(|body| entry(&body))
    }

    pub(crate) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(op::OPEN, node, &bytes(&[flags as u32, 0])).map(|body| u64_at(&body, 0))
    }

    pub(crate) fn opendir(&mut self, node: u64) -> Result<u64, i32> {
        self.call(op::OPENDIR, node, &bytes(&[0, 0])).map(|body| u64_at(&body, 0))
    }

    pub(crate) fn release(&mut self, node: u64, handle: u64) -> Result<Vec<u8>, i32> {
        let mut body = handle.to_le_bytes().to_vec();
        body.resize(24, 0);
        self.call(op::RELEASE, node, &body)
    }

    pub(crate) fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.call(op::READ, node, &read_body(handle, offset, size))
    }

    pub(crate) fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
    ) -> Result<u32, i32> {
        let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
        body.extend(bytes(&[data.len() as u32, 0, 0, 0, flags as u32, 0]));
        body.extend(data);
        self.call(op::WRITE, node, &body).map(|body| u32_at(&body, 0))
    }

    /// `struct fuse_setattr_in` with these fields.
    pub(crate) fn setattr(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        mode: u32,
        ids: (u32, u32),
    ) -> Result<Attr, i32> {
        let mut body = vec![0; 88];
        body[0..4].copy_from_slice(&valid.to_le_bytes());
        body[16..24].copy_from_slice(&size.to_le_bytes());
        body[68..72].copy_from_slice(&mode.to_le_bytes());
        body[76..80].copy_from_slice(&ids.0.to_le_bytes());
        body[80..84].copy_from_slice(&ids.1.to_le_bytes());
        self.call(op::SETATTR, node, &body).map(|body| attr(&body[16..]))
    }

    /// All names of a directory, by requests of `size` bytes.
    pub(crate) fn names(&mut self, node: u64, handle: u64, size: u32) -> Result<Vec<String>, i32> {
        Ok(self.entries(node, handle, size)?.into_iter().map(|(name, _)| name).collect())
    }

    /// The same with the numbers that it says they have.
    pub(crate) fn entries(&mut self, node: u64, handle: u64, size: u32) -> Result<Vec<(String, u64)>, i32> {
        let mut names = Vec::new();
        let mut offset = 0;
        loop {
            let body = self.call(op::READDIR, node, &read_body(handle, offset, size))?;
            if body.is_empty() {
                return Ok(names);
            }
            let mut rest = &body[..];
            while !rest.is_empty() {
                let length = u32_at(rest, 16) as usize;
                offset = u64_at(rest, 8);
                let name = String::from_utf8(rest[24..24 + length].to_vec()).unwrap();
                names.push((name, u64_at(rest, 0)));
                rest = &rest[(24 + length).next_multiple_of(8)..];
            }
        }
    }
}

/// `struct fuse_read_in`.
pub(crate) fn read_body(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = [handle.to_le_bytes(), offset.to_le_bytes()].concat();
    body.extend(size.to_le_bytes());
    body.resize(40, 0);
    body
}

pub(crate) fn name_bytes(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub(crate) fn bytes(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// `struct fuse_entry_out`.
pub(crate) fn entry(body: &[u8]) -> Entry {
    Entry { node: u64_at(body, 0), valid: (u64_at(body, 16), u64_at(body, 24)), attr: attr(&body[40..]) }
}

/// `struct fuse_attr`.
fn attr(body: &[u8]) -> Attr {
    Attr {
        number: u64_at(body, 0),
        size: u64_at(body, 8),
        mode: u32_at(body, 60),
        links: u32_at(body, 64),
        uid: u32_at(body, 68),
        gid: u32_at(body, 72),
    }
}

/// Open descriptors of a process.
pub(crate) fn open_fds(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Expects as many open descriptors of a process, soon: whoever looks for what was unmounted has one more now and then, and
/// forgetting has no answer.
pub(crate) fn expect_open_fds(pid: u32, count: usize) {
    let end = Instant::now() + Duration::from_secs(10);
    while open_fds(pid) != count && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(open_fds(pid), count);
}
