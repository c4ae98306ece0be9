//! Processes: cloning into namespaces and a cgroup, joining namespaces, signals of a fresh child.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use bulkhead_base::clone::{CLONE_INTO_CGROUP, CloneArgs};

use super::check;

/// What a clone of the calling process is to be.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CloneOptions<'a> {
    /// `CLONE_NEW*` flags, and `CLONE_PARENT` for a child of the caller's parent.
    pub flags: u64,
    /// Directory of the cgroup v2 group to start in; `None` means the caller's.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Clones the process, as `fork` does. `Ok(0)` is the child.
///
/// # Safety
/// The caller has a single thread: a lock that another thread holds would stay locked in the child for ever.
pub(crate) unsafe fn clone_process(options: CloneOptions<'_>) -> io::Result<libc::pid_t> {
    let mut args = CloneArgs { flags: options.flags, ..CloneArgs::default() };
    // The kernel takes the exit signal from the caller itself with CLONE_PARENT, and refuses one.
    if options.flags & libc::CLONE_PARENT as u64 == 0 {
        args.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(cgroup) = options.cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or(u64::MAX);
    }
    // SAFETY: the structure has the kernel's layout. Without CLONE_VM and with no stack given the child continues on a
    // copy of this stack, as after fork; the caller vouches for having one thread.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of::<CloneArgs>()) })?;
    Ok(pid as libc::pid_t)
}

/// Moves the calling process into the namespaces that `fd` refers to: one namespace, or those of `kinds` of a process.
pub(crate) fn join_namespaces(fd: BorrowedFd<'_>, kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::setns(fd.as_raw_fd(), kinds) }.into()).map(drop)
}

/// Moves the calling process into new namespaces of the kinds given.
pub(crate) fn unshare(kinds: libc::c_int) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::unshare(kinds) }.into()).map(drop)
}

/// A descriptor of a process.
pub(crate) fn open_pidfd(pid: libc::pid_t) -> io::Result<std::os::fd::OwnedFd> {
    use std::os::fd::FromRawFd;
    // SAFETY: takes numbers only and returns a new descriptor.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the call returned a new descriptor that nothing else owns.
    Ok(unsafe { std::os::fd::OwnedFd::from_raw_fd(fd as libc::c_int) })
}

/// Sends a signal to a process.
pub(crate) fn kill(pid: libc::pid_t, signal: libc::c_int) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// Gives every signal its default action and unblocks all, undoing what the runtime library and the agent set.
pub(crate) fn reset_signals() -> io::Result<()> {
    for signal in 1..=64 {
        if signal == libc::SIGKILL || signal == libc::SIGSTOP {
            continue;
        }
        // SAFETY: sets the default action; the C library refuses the two signals it keeps for itself, which nothing
        // here uses.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut()).into()).map(drop)
    }
}

/// A `prctl` that takes a number.
pub fn prctl(option: libc::c_int, value: libc::c_ulong) -> io::Result<libc::c_int> {
    // SAFETY: the callers pass options whose arguments are numbers.
    check(unsafe { libc::prctl(option, value, 0, 0, 0) }.into()).map(|value| value as libc::c_int)
}

/// Ends the process at once, without running destructors or exit handlers.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(status) }
}
