//! The two processes of a pod: its VMM, driven over the control socket, and its file server.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_vmm_protocol::{
    Channel, ChannelError, Event, ExitReason, FromVmm, Packet, PrepareConfig, Refusal, RefusalKind, Request,
};
use log::Level;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{Mutex, mpsc};

use super::tail::Tail;
use crate::error::{Classify, Code, untrusted};
use crate::host::empty_network::empty_network;
use crate::host::pin::NamespaceError;
use crate::host::process::{Child, ProcessId};
use crate::host::small_namespace::small_namespace;
use crate::host::spawn::{Network, Spawn, SpawnError, spawn};

/// The VMM answers a request within this time, or is given up.
const REPLY_LIMIT: Duration = Duration::from_secs(10);

/// Bytes of standard error that are kept of each process.
const STDERR_KEPT: usize = 4096;

/// VMMs get a user of their own: this base plus the shim's process id, unique among live pods.
const UID_BASE: u32 = 0x7000_0000;

/// What goes wrong with the pod's processes.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A process did not start.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// No namespaces for it to be born in.
    #[error("can't prepare the pod's processes")]
    Namespace(#[from] NamespaceError),
    /// A socket pair, a pipe or the like.
    #[error("can't prepare the pod's processes: {step}")]
    Prepare {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The control socket failed.
    #[error("can't reach the VMM")]
    Channel(#[source] ChannelError),
    /// No answer in time.
    #[error("the VMM did not answer {request} within {} s", REPLY_LIMIT.as_secs())]
    TimedOut {
        /// The request.
        request: &'static str,
    },
    /// It is gone.
    #[error("the VMM is gone")]
    Gone,
    /// It refused.
    #[error("the VMM refused")]
    Refused(#[source] Refusal),
}

impl Classify for MachineError {
    fn code(&self) -> Code {
        match self {
            MachineError::Spawn(SpawnError::Program { .. }) => Code::FAILED_PRECONDITION,
            MachineError::Refused(refusal) => match refusal.kind {
                RefusalKind::InvalidRequest => Code::INVALID_ARGUMENT,
                RefusalKind::Resources => Code::RESOURCE_EXHAUSTED,
                RefusalKind::Kernel | RefusalKind::Disk | RefusalKind::Kvm | RefusalKind::Template => {
                    Code::FAILED_PRECONDITION
                }
            },
            MachineError::TimedOut { .. } => Code::DEADLINE_EXCEEDED,
            MachineError::Gone => Code::UNAVAILABLE,
            _ => Code::INTERNAL,
        }
    }
}

/// Arguments by which the VMM becomes a user of its own.
pub(crate) fn identity_args() -> [String; 4] {
    let id = (UID_BASE + std::process::id()).to_string();
    ["--uid".to_owned(), id.clone(), "--gid".to_owned(), id]
}

/// The network namespace that a jailed process is born in and stays in. It can make no socket in any.
#[derive(Debug, Clone, Copy)]
pub(crate) enum JailNetwork<'a> {
    /// The node's empty one.
    Empty,
    /// The pod's. Whoever counts the pod's packets or adds an interface looks for it at the id of the pod's process.
    Pods(BorrowedFd<'a>),
    /// One of its own, which becomes the pod's: Docker and hooks put a network into it.
    Own,
}

/// A running jailed process and what it said.
#[derive(Debug)]
pub(crate) struct Jailed {
    /// The process.
    pub child: Child,
    /// Its standard error.
    pub stderr: Tail,
}

impl Jailed {
    /// Starts `program` with `socket` as descriptor 3, in the given mount namespace and directory; without one it is born
    /// where there is nothing to see.
    pub(crate) fn start(
        program: &Path,
        args: &[String],
        name: &'static str,
        sockets: &[BorrowedFd<'_>],
        cgroup: Option<BorrowedFd<'_>>,
        mounts: Option<(BorrowedFd<'_>, &str)>,
        network: JailNetwork<'_>,
    ) -> Result<Jailed, MachineError> {
        let prepare = |step| move |source| MachineError::Prepare { step, source };
        let (reader, writer) = io::pipe().map_err(prepare("create a pipe"))?;
        let nothing = match mounts {
            Some(_) => None,
            None => Some(small_namespace()?),
        };
        let mounts = mounts.or_else(|| nothing.as_ref().map(|namespace| (namespace.as_fd(), "/")));
        let empty;
        let network = match network {
            JailNetwork::Empty => {
                empty = empty_network()?;
                Network::Of(empty.as_fd())
            }
            JailNetwork::Pods(namespace) => Network::Of(namespace),
            JailNetwork::Own => Network::New,
        };
        let spawned =
            spawn(&Spawn { program, args, sockets, stderr: writer.as_fd(), cgroup, mounts, network })?;
        drop(writer);
        let stderr =
            Tail::start(reader.into(), STDERR_KEPT, name, Level::Warn).map_err(prepare("read a pipe"))?;
        let pid = spawned.id.pid;
        // Ours protects the shim and is inherited; the pod must be killed before the shim is.
        if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), "0") {
            log::warn!("can't reset the OOM score of {name} (process {pid}): {error}");
        }
        let child = Child::new(spawned.id, spawned.pidfd).map_err(prepare("watch a process"))?;
        Ok(Jailed { child, stderr })
    }

    /// Which process.
    pub(crate) fn id(&self) -> ProcessId {
        self.child.id
    }
}

/// A pair of connected sockets, close-on-exec.
pub(crate) fn socket_pair(kind: SockType) -> Result<(OwnedFd, OwnedFd), MachineError> {
    socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
        .map_err(|errno| MachineError::Prepare { step: "create a socket pair", source: errno.into() })
}

/// The shim's end of the control socket.
#[derive(Debug)]
pub(crate) struct Control {
    channel: Arc<AsyncFd<Channel>>,
    /// Requests are answered in order: whoever holds this is next.
    replies: Mutex<Replies>,
}

/// The listening side of [`Control`]: must run for replies to arrive.
#[derive(Debug)]
pub(crate) struct ControlListener {
    channel: Arc<AsyncFd<Channel>>,
    replies: mpsc::Sender<Result<(), Refusal>>,
}

impl Control {
    /// Takes the shim's end.
    pub(crate) fn new(channel: Channel) -> Result<(Control, ControlListener), MachineError> {
        let prepare = |source: Errno| MachineError::Prepare {
            step: "unblock the control socket",
            source: source.into(),
        };
        let flags = OFlag::from_bits_retain(fcntl(&channel, FcntlArg::F_GETFL).map_err(prepare)?);
        fcntl(&channel, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map_err(prepare)?;
        // SAFETY: the AsyncFd owns the channel, so its descriptor stays open and the same while it is registered.
        let channel =
            unsafe { AsyncFd::register_with_interest(channel, Interest::READABLE) }.map_err(|error| {
                MachineError::Prepare { step: "watch the control socket", source: error.into() }
            })?;
        let channel = Arc::new(channel);
        let (sender, receiver) = mpsc::channel(1);
        let listener = ControlListener { channel: channel.clone(), replies: sender };
        Ok((Control { channel, replies: Mutex::new(receiver) }, listener))
    }

    /// Sends the first request, with its descriptors. [`Control::prepared`] waits for the answer.
    pub(crate) fn prepare(&self, config: PrepareConfig, fds: &[BorrowedFd<'_>]) -> Result<(), MachineError> {
        self.send(&Request::Prepare(config), fds)
    }

    /// Waits for the answer to [`Control::prepare`]; before any other request.
    pub(crate) async fn prepared(&self) -> Result<(), MachineError> {
        self.limited("Prepare", async { receive(&mut *self.replies.lock().await).await }).await
    }

    /// The answer that came just before the VMM ended, if one did: a refusal says more than the end.
    pub(crate) fn last_words(&self) -> Result<(), MachineError> {
        match self.replies.try_lock().ok().and_then(|mut replies| replies.try_recv().ok()) {
            Some(reply) => reply.map_err(refused),
            None => Ok(()),
        }
    }

    fn send(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<(), MachineError> {
        // The socket's buffer is empty whenever the last request has been answered, so this does not block.
        self.channel.get_ref().send(request, fds).map_err(|error| match error {
            ChannelError::Closed => MachineError::Gone,
            other => MachineError::Channel(other),
        })
    }

    /// Sends a request with its descriptors and waits for the answer.
    pub(crate) async fn request(
        &self,
        name: &'static str,
        request: &Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), MachineError> {
        let exchange = async {
            let mut replies = self.replies.lock().await;
            self.send(request, fds)?;
            receive(&mut replies).await
        };
        self.limited(name, exchange).await
    }

    /// A part of an exchange with the VMM; what goes wrong there makes the connection useless.
    async fn limited(
        &self,
        request: &'static str,
        exchange: impl Future<Output = Result<(), MachineError>>,
    ) -> Result<(), MachineError> {
        let answer = tokio::time::timeout(REPLY_LIMIT, exchange).await;
        if matches!(answer, Err(_) | Ok(Err(MachineError::Channel(_)))) {
            // The answer to this could be taken for the answer to the next.
            self.close();
        }
        answer.unwrap_or(Err(MachineError::TimedOut { request }))
    }

    /// Closes the connection, which ends the virtual machine.
    pub(crate) fn close(&self) {
        // SAFETY: shutdown takes a descriptor number, which the channel keeps open.
        unsafe { libc::shutdown(self.channel.get_ref().as_raw_fd(), libc::SHUT_RDWR) };
    }
}

type Replies = mpsc::Receiver<Result<(), Refusal>>;

async fn receive(replies: &mut Replies) -> Result<(), MachineError> {
    match replies.recv().await {
        Some(reply) => reply.map_err(refused),
        None => Err(MachineError::Gone),
    }
}

fn refused(refusal: Refusal) -> MachineError {
    let message = untrusted(&refusal.message, 4096);
    MachineError::Refused(Refusal { message, ..refusal })
}

impl ControlListener {
    /// Receives until the virtual machine has ended: its own reason, or `None` if the VMM just went away.
    pub(crate) async fn run(mut self) -> Option<ExitReason> {
        self.until_ended().await
    }

    /// As [`ControlListener::run`]; nothing is lost when it is given up and called again.
    pub(crate) async fn until_ended(&mut self) -> Option<ExitReason> {
        loop {
            let Ok(mut ready) = self.channel.readable().await else { return None };
            match self.channel.get_ref().receive() {
                Ok(Packet { message: FromVmm::Reply(reply), .. }) => {
                    // An answer that nobody asked for is the VMM's mistake or worse.
                    if self.replies.try_send(reply).is_err() {
                        log::error!("the VMM answered without having been asked: giving it up");
                        return None;
                    }
                }
                Ok(Packet { message: FromVmm::Event(Event::Exited(reason)), .. }) => return Some(reason),
                // Would block.
                Err(ChannelError::TimedOut) => ready.clear_ready(),
                Err(ChannelError::Closed) => return None,
                Err(error) => {
                    log::error!("the VMM can't be understood, giving it up: {}", crate::error::chain(&error));
                    return None;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_vmm_protocol::{Refusal, RefusalKind};

    use super::*;

    fn pair() -> (Control, ControlListener, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        theirs.set_timeout(Some(Duration::from_secs(5))).unwrap();
        let (control, listener) = Control::new(ours).unwrap();
        (control, listener, theirs)
    }

    #[tokio::test]
    async fn requests_are_answered_and_the_end_is_told() {
        let (control, listener, vmm) = pair();
        let listening = tokio::spawn(listener.run());
        let served = std::thread::spawn(move || {
            let first: Packet<Request> = vmm.receive().unwrap();
            assert_eq!(first.message, Request::ConnectVsock { port: 1 });
            vmm.send(&FromVmm::Reply(Ok(())), &[]).unwrap();
            let _: Packet<Request> = vmm.receive().unwrap();
            let refusal = Refusal { kind: RefusalKind::Resources, message: "full\n".into() };
            vmm.send(&FromVmm::Reply(Err(refusal)), &[]).unwrap();
            vmm.send(&FromVmm::Event(Event::Exited(ExitReason::Panic)), &[]).unwrap();
        });

        control.request("ConnectVsock", &Request::ConnectVsock { port: 1 }, &[]).await.unwrap();
        let error =
            control.request("ConnectVsock", &Request::ConnectVsock { port: 2 }, &[]).await.unwrap_err();
        assert_eq!(error.code(), Code::RESOURCE_EXHAUSTED);
        assert_eq!(crate::error::chain(&error), "the VMM refused: full");
        assert_eq!(listening.await.unwrap(), Some(ExitReason::Panic));
        served.join().unwrap();
    }

    #[tokio::test]
    async fn a_vmm_that_goes_away_fails_the_request_at_once() {
        let (control, listener, vmm) = pair();
        let listening = tokio::spawn(listener.run());
        drop(vmm);
        let error =
            control.request("ConnectVsock", &Request::ConnectVsock { port: 1 }, &[]).await.unwrap_err();
        assert!(matches!(error, MachineError::Gone), "{error}");
        assert_eq!(listening.await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_refusal_is_heard_behind_the_end() {
        let (control, mut listener, vmm) = pair();
        let refusal = Refusal { kind: RefusalKind::Kvm, message: "not KVM".into() };
        vmm.send(&FromVmm::Reply(Err(refusal)), &[]).unwrap();
        drop(vmm);
        assert_eq!(listener.until_ended().await, None);
        assert!(matches!(control.last_words(), Err(MachineError::Refused(_))));
        assert!(control.last_words().is_ok(), "there was one answer only");
    }

    #[tokio::test]
    async fn answers_without_a_question_end_it() {
        let (_control, listener, vmm) = pair();
        for _ in 0..3 {
            vmm.send(&FromVmm::Reply(Ok(())), &[]).unwrap();
        }
        assert_eq!(listener.run().await, None);
    }
}
