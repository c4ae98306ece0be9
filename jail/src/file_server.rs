//! The jail of the file server: it needs root's rights over files, and nothing else of root's.
//!
//! It becomes root of a user namespace of its own that maps every id to itself. There its capabilities hold for the
//! files of any owner (the kernel asks that owner and group are mapped), but nothing on the host that asks for a
//! capability of the initial namespace heeds them: device nodes, `trusted.*` attributes, mounts, modules, raw I/O. The
//! mount namespace stays the initial user namespace's, so even inside its own the process may not mount anything.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use crate::capabilities::{self, Capability};
use crate::id_map::IdMapper;
use crate::{
    JailError, Limits, NAMESPACES, Root, clear_environment, close_descriptors_above, landlock, speculation,
};

/// What serving files of any owner takes.
const CAPABILITIES: [Capability; 7] = [
    Capability::CHOWN,
    Capability::DAC_OVERRIDE,
    Capability::FOWNER,
    Capability::FSETID,
    Capability::SETGID,
    Capability::SETUID,
    Capability::SETFCAP,
];

/// Jails the calling process as a file server for its working directory, which must be a mount point. The process must
/// be root and still have only one thread.
///
/// The working directory becomes the root directory, read-only in itself: only mounts below it can be written to.
/// Descriptors above `last_fd` are closed.
pub fn enter_file_server(last_fd: RawFd, limits: &Limits) -> Result<OwnFiles, JailError> {
    close_descriptors_above(last_fd)?;
    clear_environment();
    limits.apply()?;

    let mapper = IdMapper::start()?;
    unshare(NAMESPACES).map_err(JailError::Namespaces)?;
    let own_fds = detach(c"/proc/self/fd")?;
    let mount_table = detach(c"/proc/self/mountinfo")?;
    Root::CurrentDirectory.enter()?;
    protect_top()?;
    // Not before: it holds the root directory that the process has when it opens it.
    let mount_table = reopen(&mount_table, &own_fds)?;

    unshare(CloneFlags::CLONE_NEWUSER)
        .map_err(|source| JailError::UserNamespace { step: "create it", source })?;
    mapper.finish()?;
    keep_only(&CAPABILITIES)?;
    Ok(OwnFiles { own_fds, mount_table })
}

/// What a jailed file server has of procfs.
#[derive(Debug)]
pub struct OwnFiles {
    /// The process's own `/proc/self/fd`, detached from the rest of procfs: the only way to open a file again that is held
    /// as `O_PATH`.
    pub own_fds: OwnedFd,
    /// The table of its mounts, open to wait for changes (proc_pid_mountinfo(5)).
    pub mount_table: OwnedFd,
}

/// Opens a detached file for reading.
fn reopen(detached: &OwnedFd, own_fds: &OwnedFd) -> Result<OwnedFd, JailError> {
    let name = detached.as_raw_fd().to_string();
    nix::fcntl::openat(own_fds, name.as_str(), OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())
        .map_err(|source| JailError::Root { step: "open the table of its mounts", source })
}

/// A mount whose root is this file or directory of procfs: no path leads from it to the rest.
fn detach(path: &CStr) -> Result<OwnedFd, JailError> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a valid C string; nothing else is passed by reference.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = Errno::result(fd)
        .map_err(|source| JailError::Root { step: "detach a part of /proc/self from procfs", source })?;
    // SAFETY: the call just returned this descriptor, nobody else owns it. Descriptors are ints.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The top of the shared tree is the host's to arrange; mounts below have flags of their own.
fn protect_top() -> Result<(), JailError> {
    let flags = MsFlags::MS_REMOUNT
        | MsFlags::MS_BIND
        | MsFlags::MS_RDONLY
        | MsFlags::MS_NOSUID
        | MsFlags::MS_NODEV
        | MsFlags::MS_NOEXEC;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>)
        .map_err(|source| JailError::Root { step: "make the top of the shared tree read-only", source })
}

/// Gives up every capability but these, for good, and everything by which a process gains some.
fn keep_only(kept: &[Capability]) -> Result<(), JailError> {
    let failed = |step| move |source| JailError::Privileges { step, source };
    setgroups(&[]).map_err(failed("drop supplementary groups"))?;
    let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
    setresgid(gid, gid, gid).map_err(failed("become group 0 of the user namespace"))?;
    setresuid(uid, uid, uid).map_err(failed("become user 0 of the user namespace"))?;
    // A thread that acts as another user keeps its capabilities: the guest's kernel has checked permissions already,
    // with groups and capabilities that the host knows nothing of.
    capabilities::separate_from_identity().map_err(failed("set the secure bits"))?;
    capabilities::bound_to(kept).map_err(failed("reduce the capability bounding set"))?;
    capabilities::reduce_to(kept).map_err(failed("reduce the capabilities"))?;
    nix::sys::prctl::set_dumpable(false).map_err(failed("become undumpable"))?;
    nix::sys::prctl::set_no_new_privs().map_err(failed("set no_new_privs"))?;
    landlock::refuse_all_but_files().map_err(failed("have Landlock refuse ports and signals"))?;
    speculation::disable().map_err(failed("switch speculation off"))
}

/// Opens this process's directory in procfs, so that another process finds it whatever it calls the pid.
pub(crate) fn open_proc_self() -> Result<OwnedFd, Errno> {
    open("/proc/self", OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Writes a whole small file below `directory`, in one write as procfs demands.
pub(crate) fn write_at(directory: &OwnedFd, name: &CStr, text: &[u8]) -> Result<(), Errno> {
    let file = nix::fcntl::openat(directory, name, OFlag::O_WRONLY | OFlag::O_CLOEXEC, Mode::empty())?;
    // SAFETY: the buffer is valid for its length, the descriptor is open.
    let written = unsafe { libc::write(file.as_raw_fd(), text.as_ptr().cast(), text.len()) };
    Errno::result(written).map(drop)
}
