//! Starting processes: from a checked plan to a process that waits for its program to be executed.
//!
//! The agent has a single thread and clones itself. The child sets itself up ([`child`]) and reports over a socket
//! ([`messages`]); the agent's end of it is a [`Launch`]. One clone is enough for a container whose namespaces are all
//! new. Where namespaces are joined, or a user or time namespace is made, a first child with the agent's privileges does that
//! and clones the second one as the agent's own child, because a process id namespace holds for children only.

mod child;
mod messages;
mod terminal;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::time::timeout;

use super::plan::ContainerPlan;
use super::process::ProcessPlan;
use crate::sys::fd;
use crate::sys::process::{CloneOptions, clone_process};

pub(crate) use messages::FailureKind;
use messages::{MAX_MESSAGE, Message};

/// How long a process may take to set itself up. Mounting may have to wait for the host.
const SETUP_LIMIT: Duration = Duration::from_secs(30);

/// How long executing the program may take.
const EXEC_LIMIT: Duration = Duration::from_secs(10);

/// What kind of process is to be started.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Job<'a> {
    /// A container's first process.
    Container(&'a ContainerPlan),
    /// A further process, which joins the namespaces of the first one.
    Exec {
        /// The first process.
        pidfd: BorrowedFd<'a>,
        /// `CLONE_NEW*` flags of the namespaces to join.
        namespaces: libc::c_int,
    },
}

/// A process's ends of its standard streams. A missing one is the null device.
#[derive(Debug, Default)]
pub(crate) struct ChildStdio {
    /// Read end of standard input.
    pub stdin: Option<OwnedFd>,
    /// Write end of standard output.
    pub stdout: Option<OwnedFd>,
    /// Write end of standard error.
    pub stderr: Option<OwnedFd>,
}

/// The initial size of a terminal in characters; 0 leaves the kernel's.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct TerminalSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// Everything that a child needs.
#[derive(Debug)]
pub(crate) struct Setup<'a> {
    /// Names the session keyring that a container's processes share.
    pub container_id: &'a str,
    /// What kind of process it is.
    pub job: Job<'a>,
    /// The process.
    pub process: &'a ProcessPlan,
    /// Its standard streams, unless it has a terminal.
    pub stdio: ChildStdio,
    /// Its terminal.
    pub terminal: Option<TerminalSize>,
    /// Directory of the cgroup to start in.
    pub cgroup: BorrowedFd<'a>,
    /// The null device, opened by the agent.
    pub null: BorrowedFd<'a>,
}

impl Setup<'_> {
    /// Whether a first child has to make or join namespaces for the second one.
    fn needs_two_steps(&self) -> bool {
        use super::namespaces::Kind;
        match self.job {
            Job::Container(plan) => {
                let namespaces = &plan.namespaces;
                namespaces.joins_any() || namespaces.is_new(Kind::User) || namespaces.is_new(Kind::Time)
            }
            Job::Exec { .. } => true,
        }
    }
}

/// A process that could not be started.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum LaunchError {
    #[error("can't clone a process")]
    Clone(#[source] io::Error),
    #[error("{message}")]
    Child { kind: FailureKind, message: String },
    #[error("the process ended while it was being set up")]
    Died,
    // The words of other OCI runtimes.
    #[error("unable to start container process: container init was OOM-killed (memory limit too low?)")]
    OutOfMemory,
    #[error("the process was not {what} within {} seconds", limit.as_secs())]
    TimedOut { what: &'static str, limit: Duration },
    #[error("can't talk to the process that is being set up")]
    Socket(#[source] io::Error),
    #[error("the process that is being set up sent nonsense")]
    Nonsense,
}

/// What a child told before it was ready.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The id of the process, in the agent's namespace.
    Pid(libc::pid_t),
    /// Something for the log.
    Remark(String),
}

/// A process on its way.
#[derive(Debug)]
pub(crate) struct Launch {
    socket: AsyncFd<OwnedFd>,
    first_pid: libc::pid_t,
}

impl Launch {
    /// Clones the child. Has to be called inside the runtime.
    pub(crate) fn spawn(setup: Setup<'_>) -> Result<Self, LaunchError> {
        let (ours, theirs) = fd::message_pair().map_err(LaunchError::Socket)?;
        let two_steps = setup.needs_two_steps();
        let options = CloneOptions {
            flags: match setup.job {
                // The child makes its own mount namespace when it has opened what comes from the guest's.
                Job::Container(plan) if !two_steps => {
                    (plan.namespaces.clone_flags() & !libc::CLONE_NEWNS) as u64
                }
                _ => 0,
            },
            cgroup: (!two_steps || child::starts_in_cgroup(&setup)).then_some(setup.cgroup),
        };
        // SAFETY: the agent runs on one thread: its runtime is of the current-thread kind and it starts no others.
        let pid = unsafe { clone_process(options) }.map_err(LaunchError::Clone)?;
        if pid == 0 {
            drop(ours);
            child::run(setup, theirs, two_steps);
        }
        let socket = fd::watch(ours).map_err(LaunchError::Socket)?;
        Ok(Self { socket, first_pid: pid })
    }

    /// The child that was cloned: the process itself, or the one that makes it.
    pub(crate) fn first_pid(&self) -> libc::pid_t {
        self.first_pid
    }

    /// Waits until the process only has to execute its program. Returns the master of its terminal, if it has one.
    pub(crate) async fn ready(
        &self,
        mut on_progress: impl FnMut(Progress),
    ) -> Result<Option<OwnedFd>, LaunchError> {
        let wait = async {
            let mut terminal = None;
            loop {
                match self.receive().await? {
                    Some((Message::Pid(pid), _)) => on_progress(Progress::Pid(pid)),
                    Some((Message::Remark(text), _)) => on_progress(Progress::Remark(text)),
                    Some((Message::Terminal, fd)) => terminal = fd,
                    Some((Message::Ready, _)) => return Ok(terminal),
                    Some((Message::Failed { kind, message }, _)) => {
                        return Err(LaunchError::Child { kind, message });
                    }
                    None => return Err(LaunchError::Died),
                }
            }
        };
        timeout(SETUP_LIMIT, wait)
            .await
            .unwrap_or(Err(LaunchError::TimedOut { what: "set up", limit: SETUP_LIMIT }))
    }

    /// Has the program executed.
    pub(crate) async fn start(&self) -> Result<(), LaunchError> {
        fd::send_message(self.socket.get_ref().as_fd(), messages::START, None).map_err(|error| {
            if error.raw_os_error() == Some(libc::EPIPE) {
                LaunchError::Died
            } else {
                LaunchError::Socket(error)
            }
        })?;
        let wait = async {
            // The child's end is closed by the execution itself.
            match self.receive().await? {
                None => Ok(()),
                Some((Message::Failed { kind, message }, _)) => Err(LaunchError::Child { kind, message }),
                Some(_) => Err(LaunchError::Nonsense),
            }
        };
        timeout(EXEC_LIMIT, wait)
            .await
            .unwrap_or(Err(LaunchError::TimedOut { what: "executed", limit: EXEC_LIMIT }))
    }

    async fn receive(&self) -> Result<Option<(Message, Option<OwnedFd>)>, LaunchError> {
        let mut buffer = [0u8; MAX_MESSAGE];
        loop {
            let mut guard = self.socket.readable().await.map_err(LaunchError::Socket)?;
            match guard.try_io(|socket| fd::receive_message(socket.get_ref().as_fd(), &mut buffer)) {
                Ok(Ok((0, _))) => return Ok(None),
                Ok(Ok((length, fd))) => {
                    let message = Message::decode(&buffer[..length]).ok_or(LaunchError::Nonsense)?;
                    return Ok(Some((message, fd)));
                }
                Ok(Err(error)) => return Err(LaunchError::Socket(error)),
                Err(_would_block) => {}
            }
        }
    }
}
