//! A process that is held by a pidfd, so that a recycled process id can never be mistaken for it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// What identifies a process on this host until it is rebooted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since boot (proc(5), `/proc/pid/stat`, field 22).
    pub start_time: u64,
}

impl ProcessId {
    /// The calling process.
    pub(crate) fn current() -> io::Result<ProcessId> {
        ProcessId::of(std::process::id() as i32)
    }

    /// The process that has `pid` now.
    pub fn of(pid: i32) -> io::Result<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = start_time(&stat).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
        Ok(ProcessId { pid, start_time })
    }

    /// The ids of its threads, in their order; its own comes first.
    pub(crate) fn threads(&self) -> Vec<u32> {
        let entries = fs::read_dir(format!("/proc/{}/task", self.pid)).into_iter().flatten().flatten();
        let mut threads: Vec<u32> =
            entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        threads.sort_unstable();
        threads
    }

    /// Whether somebody on the host keeps it from running: it is stopped, traced, or in a frozen cgroup.
    pub(crate) fn is_held(&self) -> bool {
        let read = |name: &str| fs::read_to_string(format!("/proc/{}/{name}", self.pid)).unwrap_or_default();
        let stat = read("stat");
        if start_time(&stat) != Some(self.start_time) {
            return false;
        }
        let state = stat.rsplit_once(')').and_then(|(_, fields)| fields.trim_start().chars().next());
        matches!(state, Some('T' | 't')) || super::cgroup::is_frozen(&read("cgroup"))
    }

    /// A pidfd for this process, or `None` if it is gone.
    pub(crate) fn open(&self) -> io::Result<Option<OwnedFd>> {
        // SAFETY: pidfd_open takes integers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let fd = match Errno::result(fd) {
            Ok(fd) => fd as i32,
            Err(Errno::ESRCH) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        };
        // SAFETY: the kernel has just made this descriptor for us.
        let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
        // The pidfd pins whoever has the number now; only then does a comparison of start times mean something.
        match ProcessId::of(self.pid) {
            Ok(now) if now == *self => Ok(Some(pidfd)),
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

fn start_time(stat: &str) -> Option<u64> {
    // The command name is in parentheses and may hold anything, parentheses and spaces included.
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

/// Sends a signal to a process.
pub(crate) fn signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    // SAFETY: a null siginfo is allowed; the rest are integers.
    let result = unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<u8>(), 0)
    };
    match Errno::result(result) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Waits without a runtime until a process has ended; false when the time was up first.
pub(crate) fn wait_ended(pidfd: BorrowedFd<'_>, limit: Duration) -> bool {
    let timeout = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    matches!(poll(&mut fds, timeout), Ok(1))
}

/// How a child ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It exited with this code.
    Code(i32),
    /// A signal killed it.
    Signal(i32),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Ended::Code(code) => write!(f, "exited with code {code}"),
            Ended::Signal(signal) => match nix::sys::signal::Signal::try_from(*signal) {
                Ok(signal) => write!(f, "was killed by {signal}"),
                Err(_) => write!(f, "was killed by signal {signal}"),
            },
        }
    }
}

/// A child process of the shim.
#[derive(Debug)]
pub(crate) struct Child {
    /// Which process.
    pub id: ProcessId,
    pidfd: AsyncFd<OwnedFd>,
}

impl Child {
    /// Takes charge of a child. Must be called in a runtime.
    pub(crate) fn new(id: ProcessId, pidfd: OwnedFd) -> io::Result<Child> {
        // SAFETY: the AsyncFd owns the descriptor, so it stays open and the same while it is registered.
        let pidfd =
            unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }.map_err(io::Error::from)?;
        Ok(Child { id, pidfd })
    }

    /// Kills it, at once and for sure.
    pub(crate) fn kill(&self) {
        if let Err(errno) = signal(self.pidfd.get_ref().as_fd(), libc::SIGKILL) {
            log::error!("can't kill process {}: {errno}", self.id.pid);
        }
    }

    /// Waits until it has ended and reaps it. Can be called again, and by several tasks; those that come after the
    /// reaping learn nothing.
    pub(crate) async fn wait(&self) -> Option<Ended> {
        loop {
            // Readable stays readable: a pidfd becomes so once, when the process has ended.
            if let Err(error) = self.pidfd.readable().await {
                log::error!("can't wait for process {}: {error}", self.id.pid);
                return None;
            }
            match waitid(Id::PIDFd(self.pidfd.get_ref().as_fd()), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
            {
                Ok(WaitStatus::Exited(_, code)) => return Some(Ended::Code(code)),
                Ok(WaitStatus::Signaled(_, signal, _)) => return Some(Ended::Signal(signal as i32)),
                // Readiness that came too early; the kernel tells when it is true.
                Ok(_) => tokio::task::yield_now().await,
                Err(Errno::EINTR) => {}
                Err(_) => return None,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("12 (a) b (c) {}", fields.join(" "));
        assert_eq!(start_time(&stat), Some(22));
        assert_eq!(start_time("garbage"), None);
    }

    #[test]
    fn a_process_is_found_only_by_its_own_start_time() {
        let me = ProcessId::current().unwrap();
        assert!(me.open().unwrap().is_some());
        assert!(ProcessId { start_time: me.start_time + 1, ..me }.open().unwrap().is_none());
        assert!(ProcessId { pid: i32::MAX - 1, start_time: 1 }.open().unwrap().is_none());
    }

    #[tokio::test]
    #[allow(clippy::zombie_processes, reason = "reaping it is what is tested")]
    async fn a_child_that_is_killed_is_reported_as_killed() {
        let spawned = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let id = ProcessId::of(spawned.id() as i32).unwrap();
        let child = Child::new(id, id.open().unwrap().unwrap()).unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(50), child.wait()).await.is_err());

        child.kill();

        assert_eq!(child.wait().await, Some(Ended::Signal(libc::SIGKILL)));
        assert_eq!(child.wait().await, None);
    }
}
