//! The child's side: a process becomes a container's, step by step, and executes its program.
//!
//! Privileges go as late as possible, and what the container could influence comes as late as possible too. Until the
//! program is executed the process can't be traced (the agent is not dumpable, and its clones inherit that), and it holds
//! no descriptors but its own.

use std::ffi::{CString, OsStr};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use bulkhead_base::chain;

use super::messages::{FailureKind, MAX_MESSAGE, Message, START};
use super::terminal::{Terminal, TerminalError};
use super::{Job, Setup};
use crate::container::capabilities::CapabilityError;
use crate::container::executable::{self, ExecutableError};
use crate::container::hooks::HookError;
use crate::container::namespaces::{Kind, NamespaceError};
use crate::container::plan::ContainerPlan;
use crate::container::rootfs::{self, BuiltRoot, OpenedRoot, RootError};
use crate::container::sysctl::{self, SysctlError};
use crate::container::user::{self, UserError};
use crate::sys::process::{
    CloneOptions, clone_process, exit_now, join_namespaces, prctl, reset_signals, unshare,
};
use crate::sys::{check, fd};

/// A step that failed.
#[derive(Debug, thiserror::Error)]
enum ChildError {
    #[error("can't {what}")]
    Step { what: &'static str, source: io::Error },
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(transparent)]
    Root(#[from] RootError),
    #[error(transparent)]
    Sysctl(#[from] SysctlError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error(transparent)]
    User(#[from] UserError),
    #[error(transparent)]
    Capability(#[from] CapabilityError),
    #[error(transparent)]
    Hook(#[from] HookError),
    // The words of other OCI runtimes, which tools look for.
    #[error("unable to start container process")]
    Executable(#[from] ExecutableError),
}

impl ChildError {
    fn kind(&self) -> FailureKind {
        match self {
            Self::Executable(_) | Self::Hook(_) => FailureKind::Specification,
            Self::Sysctl(SysctlError::Missing(_)) => FailureKind::Specification,
            Self::Root(error) if error.is_specification() => FailureKind::Specification,
            _ => FailureKind::Internal,
        }
    }
}

/// Names a step in its error.
trait Step<T> {
    fn step(self, what: &'static str) -> Result<T, ChildError>;
}

impl<T> Step<T> for io::Result<T> {
    fn step(self, what: &'static str) -> Result<T, ChildError> {
        self.map_err(|source| ChildError::Step { what, source })
    }
}

/// The agent, at the other end of the socket.
struct Agent(OwnedFd);

impl Agent {
    fn tell(&self, message: &Message) -> Result<(), ChildError> {
        fd::send_message(self.0.as_fd(), &message.encode(), None).step("report to the agent")
    }

    fn give_terminal(&self, master: BorrowedFd<'_>) -> Result<(), ChildError> {
        fd::send_message(self.0.as_fd(), &Message::Terminal.encode(), Some(master))
            .step("hand the terminal over")
    }

    /// Waits for the order to execute the program; without an agent there is nothing to live for.
    fn wait_for_start(&self) -> Result<(), ChildError> {
        let mut buffer = [0; MAX_MESSAGE];
        match crate::sys::retry(|| fd::receive_message(self.0.as_fd(), &mut buffer))
            .step("hear from the agent")?
        {
            (length, _) if buffer[..length] == *START => Ok(()),
            _ => exit_now(1),
        }
    }
}

/// Whether the first of two children has to start in the container's cgroup already: the second one can't be put there
/// by a process that has given up its privileges for a user namespace.
pub(crate) fn starts_in_cgroup(setup: &Setup<'_>) -> bool {
    match setup.job {
        Job::Container(plan) => plan.namespaces.has(Kind::User) && !plan.namespaces.is_new(Kind::User),
        Job::Exec { namespaces, .. } => namespaces & libc::CLONE_NEWUSER != 0,
    }
}

/// Sets the process up and executes its program.
pub(crate) fn run(setup: Setup<'_>, socket: OwnedFd, two_steps: bool) -> ! {
    let agent = Agent(socket);
    let error = match set_up(setup, &agent, two_steps) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    // Without an agent there is no one left to tell.
    let _ = agent.tell(&Message::Failed { kind: error.kind(), message: chain(&error) });
    exit_now(1)
}

fn set_up(setup: Setup<'_>, agent: &Agent, two_steps: bool) -> Result<std::convert::Infallible, ChildError> {
    close_inherited(&setup, agent).step("close the agent's descriptors")?;
    reset_signals().step("reset the signals")?;
    match setup.job {
        Job::Container(plan) => {
            let (own_users, own_ipc) = (plan.namespaces.has(Kind::User), plan.namespaces.has(Kind::Ipc));
            // In the guest's mount namespace: there the kernel mounts each view of the shared tree once, for all containers.
            // One of a container's own would have other inodes, and FIFOs, sockets and shared memory end at an inode.
            let opened = plan.root.open(own_users, own_ipc)?;
            if !two_steps && plan.namespaces.is_new(Kind::Mount) {
                unshare(libc::CLONE_NEWNS).step("make a mount namespace")?;
            }
            if two_steps {
                if own_users {
                    // Those of the pod, which are not the user namespace's to set.
                    sysctl::apply(plan.sysctl.iter().filter(|(name, _)| !is_own(plan, name)))?;
                }
                let cgroup = plan.namespaces.join()?;
                plan.namespaces.unshare_time()?;
                second_step(&setup, agent, plan.namespaces.clone_flags())?;
                if let Some(cgroup) = cgroup {
                    join_namespaces(cgroup.as_fd(), libc::CLONE_NEWCGROUP)
                        .step("join the cgroup namespace")?;
                }
            }
            if plan.namespaces.has(Kind::User) {
                become_namespace_root()?;
            }
            start_session()?;
            let built = enter_container(plan, opened, agent)?;
            plan.hooks.created(setup.container_id)?;
            connect_stdio(&setup, agent)?;
            // Only now: the terminal's file in /dev may have had to be made.
            plan.root.finish(built)?;
        }
        Job::Exec { pidfd, namespaces } => {
            let cgroup = namespaces & libc::CLONE_NEWCGROUP;
            join_namespaces(pidfd, namespaces & !cgroup).step("join the container's namespaces")?;
            second_step(&setup, agent, 0)?;
            if cgroup != 0 {
                // A process outside the group that is the root of the namespace could not be cloned into the group.
                join_namespaces(pidfd, cgroup).step("join the container's cgroup namespace")?;
            }
            if namespaces & libc::CLONE_NEWUSER != 0 {
                become_namespace_root()?;
            }
            start_session()?;
            connect_stdio(&setup, agent)?;
        }
    }
    become_process(setup, agent)
}

fn close_inherited(setup: &Setup<'_>, agent: &Agent) -> io::Result<()> {
    let mut keep: Vec<RawFd> =
        vec![0, 1, 2, agent.0.as_raw_fd(), setup.cgroup.as_raw_fd(), setup.null.as_raw_fd()];
    let stdio = &setup.stdio;
    keep.extend([&stdio.stdin, &stdio.stdout, &stdio.stderr].into_iter().flatten().map(AsRawFd::as_raw_fd));
    if let Job::Exec { pidfd, .. } = setup.job {
        keep.push(pidfd.as_raw_fd());
    }
    fd::close_all_but(&keep)
}

/// Clones the process that becomes the container's, as a child of the agent, and ends.
fn second_step(setup: &Setup<'_>, agent: &Agent, flags: libc::c_int) -> Result<(), ChildError> {
    let (mut wait, mut release) = io::pipe().step("make a pipe")?;
    let options = CloneOptions {
        flags: (flags | libc::CLONE_PARENT) as u64,
        cgroup: (!starts_in_cgroup(setup)).then_some(setup.cgroup),
    };
    // SAFETY: the process is a clone of the single-threaded agent and started no threads.
    let pid = unsafe { clone_process(options) }.step("clone the container's process")?;
    if pid == 0 {
        drop(release);
        // The first process may have failed to write the id maps, and has told so.
        return match wait.read_exact(&mut [0]) {
            Ok(()) => Ok(()),
            Err(_) => exit_now(1),
        };
    }
    drop(wait);
    agent.tell(&Message::Pid(pid))?;
    if let Job::Container(plan) = setup.job
        && plan.namespaces.is_new(Kind::User)
    {
        plan.namespaces.write_id_maps(pid)?;
    }
    release.write_all(&[1]).step("release the container's process")?;
    exit_now(0)
}

/// Becomes root of the user namespace, as whom the setup goes on.
fn become_namespace_root() -> Result<(), ChildError> {
    let root = crate::container::spec::User { umask: Some(0o022), ..Default::default() };
    Ok(user::become_user(&root)?)
}

fn start_session() -> Result<(), ChildError> {
    // SAFETY: takes nothing.
    check(unsafe { libc::setsid() }.into()).map(drop).step("start a session")
}

fn enter_container(plan: &ContainerPlan, opened: OpenedRoot, agent: &Agent) -> Result<BuiltRoot, ChildError> {
    if plan.namespaces.is_new(Kind::Cgroup) {
        // Only now, inside the container's group, which becomes the root of the view.
        unshare(libc::CLONE_NEWCGROUP).step("make a cgroup namespace")?;
    }
    if plan.namespaces.is_new(Kind::Network) {
        crate::sys::network::bring_loopback_up().step("bring the loopback interface up")?;
    }
    set_names(plan)?;
    let built = plan.root.build(opened)?;
    for remark in &built.remarks {
        agent.tell(&Message::Remark(remark.clone()))?;
    }
    let own_users = plan.namespaces.has(Kind::User);
    sysctl::apply(plan.sysctl.iter().filter(|(name, _)| !own_users || is_own(plan, name)))?;
    plan.root.enter(&built)?;
    rootfs::make_working_directory(&plan.process.directory).step("make the working directory")?;
    Ok(built)
}

/// Whether a kernel parameter is that of a namespace of the container's own.
fn is_own(plan: &ContainerPlan, name: &str) -> bool {
    plan.namespaces.has(sysctl::namespace_of(name))
}

fn set_names(plan: &ContainerPlan) -> Result<(), ChildError> {
    if let Some(name) = &plan.hostname {
        nix::unistd::sethostname(name).map_err(io::Error::from).step("set the host name")?;
    }
    if let Some(name) = &plan.domainname {
        // SAFETY: the pointer and the length describe the string.
        check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into())
            .step("set the domain name")?;
    }
    Ok(())
}

/// The steps that a container's first process and a further one have in common.
fn become_process(setup: Setup<'_>, agent: &Agent) -> Result<std::convert::Infallible, ChildError> {
    let plan = setup.process;
    join_keyring(setup.container_id, agent)?;
    if let Some(personality) = plan.personality {
        // SAFETY: takes a number only.
        check(unsafe { libc::personality(personality) }.into()).step("set the personality")?;
    }
    if plan.no_new_privileges {
        prctl(libc::PR_SET_NO_NEW_PRIVS, 1).step("give up new privileges")?;
    }
    // Root may be able to change into a directory that the user can't, and the other way round.
    let as_root = rootfs::change_directory(&plan.directory);
    plan.capabilities.prepare()?;
    user::become_user(&plan.user)?;
    let keep_admin = plan.filter.is_some() && !plan.no_new_privileges;
    plan.capabilities.apply(keep_admin)?;
    as_root
        .or_else(|_| rootfs::change_directory(&plan.directory))
        .step("change into the working directory")?;

    let mut environment = plan.environment.clone();
    if plan.variable("HOME").is_none_or(<[u8]>::is_empty) {
        environment.retain(|entry| !entry.as_bytes().starts_with(b"HOME="));
        environment.extend(CString::new(format!("HOME={}", user::home_directory(plan.user.uid))));
    }
    let name = plan.arguments.first().map(|name| OsStr::from_bytes(name.to_bytes())).unwrap_or_default();
    let program = executable::find(name, plan.variable("PATH").map(OsStr::from_bytes))?;

    agent.tell(&Message::Ready)?;
    agent.wait_for_start()?;
    if let Job::Container(container) = setup.job {
        container.hooks.starting(setup.container_id)?;
    }

    if let Some(filter) = &plan.filter {
        filter.install().step("install the system call filter")?;
        if keep_admin {
            plan.capabilities.drop_to_final()?;
        }
    }
    let failure = executable::execute(&program, &plan.arguments, &environment);
    // The process has started: as under other OCI runtimes it says itself what it ends by, to whoever reads its output.
    let _ = writeln!(io::stderr(), "{failure}");
    exit_now(1)
}

fn connect_stdio(setup: &Setup<'_>, agent: &Agent) -> Result<(), ChildError> {
    let uid = setup.process.user.uid;
    let streams: [BorrowedFd<'_>; 3];
    let terminal;
    match setup.terminal {
        Some(size) => {
            terminal = Terminal::open(size)?;
            terminal.make_controlling()?;
            if matches!(setup.job, Job::Container(_)) {
                terminal.bind_console()?;
            }
            user::give(terminal.slave.as_fd(), uid);
            agent.give_terminal(terminal.master.as_fd())?;
            streams = [terminal.slave.as_fd(); 3];
        }
        None => {
            let stdio = &setup.stdio;
            streams = [&stdio.stdin, &stdio.stdout, &stdio.stderr].map(|stream| match stream {
                Some(stream) => {
                    user::give(stream.as_fd(), uid);
                    stream.as_fd()
                }
                None => setup.null,
            });
        }
    }
    for (number, stream) in (0..).zip(streams) {
        fd::duplicate_to(stream, number).step("connect the standard streams")?;
    }
    Ok(())
}

/// Processes of a container share a session keyring, which those of other containers don't see.
fn join_keyring(container_id: &str, agent: &Agent) -> Result<(), ChildError> {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    let name =
        CString::new(format!("_ses.{container_id}")).map_err(io::Error::from).step("name the keyring")?;
    // SAFETY: the name is NUL-terminated and outlives the call.
    let joined = check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, name.as_ptr()) });
    match joined {
        // A kernel without keyrings has none to keep apart.
        Err(error) if error.raw_os_error() != Some(libc::ENOSYS) => {
            agent.tell(&Message::Remark(format!("no session keyring of its own: {error}")))
        }
        _ => Ok(()),
    }
}
