//! Collects every process that ends: those the agent started, and those that the kernel gave it to look after.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::io::unix::AsyncFd;
use tokio::sync::oneshot;

use crate::sys::{check, fd};

/// Ends of processes kept for which no one asked yet, while processes are being started.
const MAX_UNCLAIMED: usize = 4096;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Exit code, or 128 + the signal.
    pub status: u32,
    /// When, in nanoseconds since the Unix epoch.
    pub at_ns: i64,
}

/// Waits for every child.
#[derive(Debug)]
pub struct Reaper {
    signals: AsyncFd<OwnedFd>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    expected: HashMap<libc::pid_t, oneshot::Sender<Exit>>,
    /// Ends of processes that no one expected. A process whose id the agent hears of from another one may end earlier.
    unclaimed: HashMap<libc::pid_t, Exit>,
    launches: usize,
}

/// As long as it lives, ends of unknown processes are kept for [`Reaper::expect`].
#[derive(Debug)]
pub(crate) struct LaunchGuard<'a>(&'a Reaper);

impl Reaper {
    /// Directs SIGCHLD to a descriptor. Has to be called inside the runtime, before any child is started.
    pub fn new() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before it is used; signalfd returns a new descriptor.
        let fd = unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()).into())?;
            check(libc::signalfd(-1, &raw const set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC).into())?
        };
        // SAFETY: the call returned a new descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        Ok(Self { signals: fd::watch(fd)?, state: Mutex::default() })
    }

    /// Announces a start of processes.
    pub(crate) fn launching(&self) -> LaunchGuard<'_> {
        self.lock().launches += 1;
        LaunchGuard(self)
    }

    /// Hears of the end of a child. To be called before the runtime gets to run other tasks after the child was cloned, or
    /// under a [`LaunchGuard`].
    pub(crate) fn expect(&self, pid: libc::pid_t) -> oneshot::Receiver<Exit> {
        let (sender, receiver) = oneshot::channel();
        let mut state = self.lock();
        match state.unclaimed.remove(&pid) {
            Some(exit) => {
                // The receiver is right here.
                let _ = sender.send(exit);
            }
            None => {
                state.expected.insert(pid, sender);
            }
        }
        receiver
    }

    /// Collects children for ever.
    ///
    /// # Errors
    /// Only when the descriptor for signals fails.
    pub async fn run(&self) -> io::Result<std::convert::Infallible> {
        loop {
            self.reap();
            let mut guard = self.signals.readable().await?;
            // Several signals may have become one, so they are only counted as a reason to look.
            let drained = guard.try_io(|signals| {
                let mut buffer = [0u8; size_of::<libc::signalfd_siginfo>() * 8];
                // SAFETY: the buffer is writable for its whole length.
                check(
                    unsafe { libc::read(signals.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) } as _
                )
            });
            if let Ok(result) = drained {
                result?;
            }
        }
    }

    fn reap(&self) {
        loop {
            let mut status = 0;
            // SAFETY: the status is a valid place for an int.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return;
            }
            self.deliver(pid, exit(status));
        }
    }

    fn deliver(&self, pid: libc::pid_t, exit: Exit) {
        let mut state = self.lock();
        match state.expected.remove(&pid) {
            // Whoever expected it may have stopped caring.
            Some(sender) => drop(sender.send(exit)),
            None if state.launches > 0 && state.unclaimed.len() < MAX_UNCLAIMED => {
                state.unclaimed.insert(pid, exit);
            }
            None => {}
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for LaunchGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.launches -= 1;
        if state.launches == 0 {
            state.unclaimed.clear();
        }
    }
}

fn exit(status: libc::c_int) -> Exit {
    let code =
        if libc::WIFSIGNALED(status) { 128 + libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Exit { status: code as u32, at_ns: i64::try_from(now.as_nanos()).unwrap_or(i64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statuses_read_as_a_shell_says_them() {
        assert_eq!(exit(7 << 8).status, 7);
        assert_eq!(exit(libc::SIGKILL).status, 137);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn ends_reach_those_who_expect_them_also_late() {
        let reaper = Reaper::new().unwrap();
        let end = |status| Exit { status, at_ns: 0 };
        let expected = reaper.expect(10);
        reaper.deliver(10, end(1));
        assert_eq!(expected.await.unwrap(), end(1));

        reaper.deliver(11, end(2));
        let guard = reaper.launching();
        reaper.deliver(12, end(3));
        assert_eq!(reaper.expect(12).await.unwrap(), end(3));
        let lost = reaper.expect(11);
        drop(guard);
        reaper.deliver(11, end(4));
        assert_eq!(lost.await.unwrap(), end(4), "an end from before the start belongs to an earlier process");
    }
}
