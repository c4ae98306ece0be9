//! The first process of the PID namespace that containers of a pod share where no pause container has one: it does what a
//! pause container does, nothing, and takes the orphans.

use std::io;

use crate::sys::fd;
use crate::sys::process::{CloneOptions, clone_process, exit_now, prctl, reset_signals};

/// Starts it; gives its process id.
pub(crate) fn start() -> io::Result<libc::pid_t> {
    let options = CloneOptions { flags: libc::CLONE_NEWPID as u64, cgroup: None };
    // SAFETY: the agent runs on one thread: its runtime is of the current-thread kind and it starts no others.
    match unsafe { clone_process(options) }? {
        0 => match wait_for_ever() {
            Ok(never) => match never {},
            Err(_) => exit_now(1),
        },
        pid => Ok(pid),
    }
}

fn wait_for_ever() -> io::Result<std::convert::Infallible> {
    fd::close_all_but(&[])?;
    reset_signals()?;
    // SAFETY: ignoring the signal runs no code of ours; the kernel collects ended children then.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
    // SAFETY: the name is NUL-terminated and not longer than the kernel takes.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"pause".as_ptr()) };
    // Nobody in the namespace is to look into what it has inherited.
    prctl(libc::PR_SET_DUMPABLE, 0)?;
    loop {
        // SAFETY: takes nothing. Signals from inside the namespace don't reach its first process.
        unsafe { libc::pause() };
    }
}
