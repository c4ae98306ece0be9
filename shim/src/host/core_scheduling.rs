//! Core scheduling (`PR_SCHED_CORE` of prctl(2), core-scheduling.rst in the kernel's documentation): what has a cookie runs on the
//! threads of a processor's core beside nothing that has another one.

use std::thread;

use nix::errno::Errno;

use super::process::ProcessId;

/// Whether processes can have cookies here: the processor has SMT, and it is on, and the kernel is 5.14 or later with `CONFIG_SCHED_CORE`.
pub fn is_possible() -> bool {
    cookie(0).is_ok()
}

/// The cookie of a thread; 0 stands for none, and for the calling thread.
pub fn cookie(thread: i32) -> Result<u64, Errno> {
    let mut cookie = 0u64;
    let [command, thread, scope] = [libc::PR_SCHED_CORE_GET, thread, libc::PR_SCHED_CORE_SCOPE_THREAD]
        .map(|number| number as libc::c_ulong);
    // SAFETY: the last argument is the address of eight aligned bytes that may be written.
    let result = unsafe { libc::prctl(libc::PR_SCHED_CORE, command, thread, scope, &raw mut cookie) };
    Errno::result(result).map(|_| cookie)
}

/// Gives a process, with all threads that it has and will have, a cookie of its own. Tells whether it has one: on a host without SMT,
/// and with a kernel that can't do it, there are none.
pub fn separate(process: ProcessId) -> Result<bool, Errno> {
    let scope = libc::PR_SCHED_CORE_SCOPE_THREAD_GROUP;
    match core_scheduling(libc::PR_SCHED_CORE_CREATE, process, scope) {
        Ok(()) => Ok(true),
        Err(Errno::ENODEV | Errno::EINVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Gives `other` the cookie of `process`.
pub fn share(process: ProcessId, other: ProcessId) -> Result<(), Errno> {
    // A cookie can only be passed on by a thread that has it, and no thread can get rid of one.
    let pass_on = move || {
        core_scheduling(libc::PR_SCHED_CORE_SHARE_FROM, process, libc::PR_SCHED_CORE_SCOPE_THREAD)?;
        core_scheduling(libc::PR_SCHED_CORE_SHARE_TO, other, libc::PR_SCHED_CORE_SCOPE_THREAD_GROUP)
    };
    let thread = thread::Builder::new().name("cookie".into()).spawn(pass_on);
    thread.map_err(|_| Errno::EAGAIN)?.join().unwrap_or(Err(Errno::EAGAIN))
}

fn core_scheduling(command: libc::c_int, process: ProcessId, scope: libc::c_int) -> Result<(), Errno> {
    let [command, pid, scope] = [command, process.pid, scope].map(|number| number as libc::c_ulong);
    // SAFETY: these commands take integers only.
    let result = unsafe { libc::prctl(libc::PR_SCHED_CORE, command, pid, scope, 0) };
    Errno::result(result).map(drop)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleep() -> (Child, ProcessId) {
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId::of(child.id() as i32).unwrap();
        (child, id)
    }

    #[test]
    fn two_processes_share_a_cookie_that_a_third_does_not_have() {
        let mut children = [sleep(), sleep(), sleep()];
        let [one, two, three] = [0, 1, 2].map(|child| children[child].1);
        assert_eq!(separate(one), Ok(is_possible()));
        if is_possible() {
            assert!(separate(three).unwrap());
            share(one, two).unwrap();
            let [one, two, three] = [one, two, three].map(|process| cookie(process.pid).unwrap());
            assert_ne!(one, 0);
            assert_eq!(one, two);
            assert_ne!(one, three);
            assert_eq!(cookie(0), Ok(0));
        } else {
            eprintln!("SKIPPED: this takes SMT and Linux 5.14 with CONFIG_SCHED_CORE");
        }
        for (child, _) in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }
}
