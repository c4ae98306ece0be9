//! Starting the processes that face the guest.
//!
//! Such a process inherits nothing by accident: it gets three standard streams, its sockets as descriptors 3 and up, an empty
//! environment, default signal dispositions, and is born in a PID namespace of its own and in the pod's cgroup. It jails
//! itself further. One `clone3` does it, so there is no moment in which the process exists outside its cgroup.

use std::ffi::{CString, NulError};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_base::clone::{CLONE_CLEAR_SIGHAND, CLONE_INTO_CGROUP, CloneArgs};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::process::ProcessId;

/// Descriptors are moved to here or above before the fork, out of the way of the numbers they get in the child.
const PARKED_FD: RawFd = 16;

/// How long `execve` may take, on a slow disk too.
const EXEC_LIMIT: Duration = Duration::from_secs(10);

/// What to start and with what.
#[derive(Debug)]
pub(crate) struct Spawn<'a> {
    /// The program, in the calling process's mount namespace.
    pub program: &'a Path,
    /// Arguments after the program's name.
    pub args: &'a [String],
    /// Become descriptors 3 and up; a few.
    pub sockets: &'a [BorrowedFd<'a>],
    /// Becomes standard error.
    pub stderr: BorrowedFd<'a>,
    /// Directory of the cgroup (version 2) to be born in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Mount namespace to be born in, and the working directory there.
    pub mounts: Option<(BorrowedFd<'a>, &'a str)>,
    /// Network namespace to be born in.
    pub network: Network<'a>,
}

/// The network namespace of a new process.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Network<'a> {
    /// One of its own.
    New,
    /// This one.
    Of(BorrowedFd<'a>),
}

/// A process that was started.
#[derive(Debug)]
pub(crate) struct Spawned {
    /// Which process.
    pub id: ProcessId,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

/// Why a process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// There is no such program, or it can't be read.
    #[error("can't open the program {path}: is Bulkhead installed completely?")]
    Program {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An argument with a NUL byte.
    #[error("an argument holds a NUL byte")]
    Argument(#[from] NulError),
    /// Something that is prepared before the process exists.
    #[error("can't start {path}: {step}")]
    Prepare {
        /// The program.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A step in the new process failed.
    #[error("can't start {path}: {step} in the new process")]
    Child {
        /// The program.
        path: PathBuf,
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The new process does nothing.
    #[error("can't start {path}: nothing happened for {} s", EXEC_LIMIT.as_secs())]
    TimedOut {
        /// The program.
        path: PathBuf,
    },
}

/// Steps in the child, in order; their numbers travel over the report pipe.
const STEPS: [&str; 7] = [
    "join the network namespace",
    "join the mount namespace",
    "change the directory",
    "place descriptors",
    "mark descriptors",
    "reset signals",
    "exec",
];

/// Everything the child needs, made before the fork: afterwards it must not allocate.
struct Plan {
    program: OwnedFd,
    argv: Vec<*const libc::c_char>,
    null: OwnedFd,
    sockets: Vec<OwnedFd>,
    stderr: OwnedFd,
    network: Option<OwnedFd>,
    mounts: Option<OwnedFd>,
    directory: Option<CString>,
    report: OwnedFd,
}

/// Whether there is such a program at all: to be asked before anything else is done that would have to be undone.
pub(crate) fn check_program(path: &Path) -> Result<(), SpawnError> {
    let found = std::fs::metadata(path);
    found.map(drop).map_err(|source| SpawnError::Program { path: path.to_owned(), source })
}

/// Starts a process and waits until its program runs.
pub(crate) fn spawn(request: &Spawn<'_>) -> Result<Spawned, SpawnError> {
    let path = || request.program.to_owned();
    let prepare = |step| move |source: io::Error| SpawnError::Prepare { path: path(), step, source };

    let program = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(request.program)
        .map_err(|source| SpawnError::Program { path: path(), source })?;
    let null =
        OpenOptions::new().read(true).write(true).open("/dev/null").map_err(prepare("open /dev/null"))?;
    let (report_reader, report_writer) = io::pipe().map_err(prepare("create a pipe"))?;

    let name = request.program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let args = std::iter::once(name)
        .chain(request.args.iter().cloned())
        .map(CString::new)
        .collect::<Result<Vec<_>, _>>()?;
    let argv = args.iter().map(|arg| arg.as_ptr()).chain([std::ptr::null()]).collect();

    let park = |fd: BorrowedFd<'_>| park(fd).map_err(|errno| prepare("copy a descriptor")(errno.into()));
    let plan = Plan {
        program: park(program.as_fd())?,
        argv,
        null: park(null.as_fd())?,
        sockets: request.sockets.iter().map(|socket| park(*socket)).collect::<Result<_, _>>()?,
        stderr: park(request.stderr)?,
        network: match request.network {
            Network::Of(namespace) => Some(park(namespace)?),
            Network::New => None,
        },
        mounts: request.mounts.map(|(namespace, _)| park(namespace)).transpose()?,
        directory: request.mounts.map(|(_, directory)| CString::new(directory)).transpose()?,
        report: park(report_writer.as_fd())?,
    };
    drop(report_writer);

    let own_network = matches!(request.network, Network::New);
    let (pid, pidfd) =
        fork(&plan, request.cgroup, own_network).map_err(|errno| prepare("clone3")(errno.into()))?;
    // Ours must go, or the pipe would never end.
    drop(plan);
    drop(args);

    let outcome = read_report(report_reader, path);
    let id = ProcessId::of(pid).map_err(prepare("read its start time"));
    match (outcome, id) {
        (Ok(()), Ok(id)) => Ok(Spawned { id, pidfd }),
        (Err(error), _) | (Ok(()), Err(error)) => {
            let _ = super::process::signal(pidfd.as_fd(), libc::SIGKILL);
            super::process::wait_ended(pidfd.as_fd(), EXEC_LIMIT);
            let _ = nix::sys::wait::waitid(
                nix::sys::wait::Id::PIDFd(pidfd.as_fd()),
                nix::sys::wait::WaitPidFlag::WEXITED | nix::sys::wait::WaitPidFlag::WNOHANG,
            );
            Err(error)
        }
    }
}

fn park(fd: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let parked = fcntl(fd, FcntlArg::F_DUPFD_CLOEXEC(PARKED_FD))?;
    // SAFETY: fcntl has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(parked) })
}

fn fork(plan: &Plan, cgroup: Option<BorrowedFd<'_>>, own_network: bool) -> Result<(i32, OwnedFd), Errno> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        // Handlers are reset with the clone: ours must never run in the child.
        flags: (libc::CLONE_PIDFD | libc::CLONE_NEWPID) as u64 | CLONE_CLEAR_SIGHAND,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    if own_network {
        args.flags |= libc::CLONE_NEWNET as u64;
    }
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the arguments are a valid clone_args of the size given, and the pidfd's place outlives the call. Without
    // CLONE_VM the child gets a copy of our memory and goes on on its copy of this stack, as after fork(2); it makes
    // only async-signal-safe calls until it executes a program or exits.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    match Errno::result(result)? {
        0 => child(plan),
        // SAFETY: the kernel has just made this descriptor for us.
        pid => Ok((pid as i32, unsafe { OwnedFd::from_raw_fd(pidfd) })),
    }
}

/// The child's side: only system calls, no allocation, no return.
fn child(plan: &Plan) -> ! {
    let step = match become_program(plan) {
        Ok(never) => match never {},
        Err(step) => step,
    };
    let mut report = [0; 5];
    report[0] = step;
    report[1..].copy_from_slice(&Errno::last_raw().to_le_bytes());
    // SAFETY: the buffer is valid for its length; _exit never returns and runs nothing of the parent's.
    unsafe {
        libc::write(plan.report.as_raw_fd(), report.as_ptr().cast(), report.len());
        libc::_exit(127)
    }
}

/// Executes the program; gives the number of the step that failed, whose reason is in `errno`.
fn become_program(plan: &Plan) -> Result<std::convert::Infallible, u8> {
    let check = |step: u8, result: libc::c_long| if result < 0 { Err(step) } else { Ok(()) };
    // SAFETY: these are plain system calls on descriptors and strings that the plan keeps alive; none of them touches
    // memory but the argument vectors, which are NULL-terminated, and the zeroed signal structures.
    unsafe {
        if let Some(network) = &plan.network {
            check(0, libc::setns(network.as_raw_fd(), libc::CLONE_NEWNET).into())?;
        }
        if let Some(mounts) = &plan.mounts {
            check(1, libc::setns(mounts.as_raw_fd(), libc::CLONE_NEWNS).into())?;
        }
        if let Some(directory) = &plan.directory {
            check(2, libc::chdir(directory.as_ptr()).into())?;
        }
        let mut place = 0;
        for fd in [&plan.null, &plan.null, &plan.stderr].into_iter().chain(&plan.sockets) {
            check(3, libc::dup2(fd.as_raw_fd(), place).into())?;
            place += 1;
        }
        check(4, libc::syscall(libc::SYS_close_range, place, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC))?;

        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(5, libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()).into())?;
        // Rust ignores it from the start, and that would be inherited.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::umask(0);
        libc::setsid();

        let environment = [std::ptr::null::<libc::c_char>()];
        libc::syscall(
            libc::SYS_execveat,
            plan.program.as_raw_fd(),
            c"".as_ptr(),
            plan.argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    Err(6)
}

/// The report pipe ends without a word when the program was executed.
fn read_report(reader: impl Into<OwnedFd>, path: impl Fn() -> PathBuf) -> Result<(), SpawnError> {
    let mut reader = File::from(reader.into());
    let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
    let timeout = PollTimeout::try_from(EXEC_LIMIT).unwrap_or(PollTimeout::MAX);
    if !matches!(poll(&mut fds, timeout), Ok(1)) {
        return Err(SpawnError::TimedOut { path: path() });
    }
    let mut report = Vec::new();
    let read = Read::by_ref(&mut reader).take(5).read_to_end(&mut report);
    match (read, report.as_slice()) {
        (Ok(0), _) => Ok(()),
        (Ok(_), &[step, e0, e1, e2, e3]) => Err(SpawnError::Child {
            path: path(),
            step: STEPS.get(usize::from(step)).copied().unwrap_or("an unknown step"),
            source: io::Error::from_raw_os_error(i32::from_le_bytes([e0, e1, e2, e3])),
        }),
        (Ok(_), _) => Err(SpawnError::Child {
            path: path(),
            step: "report",
            source: io::Error::from(io::ErrorKind::UnexpectedEof),
        }),
        (Err(source), _) => Err(SpawnError::Prepare { path: path(), step: "read its report", source }),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::host::process;

    /// Runs a shell in the new process, and gives what it wrote to its standard error.
    fn run(script: &str, args: &[&str]) -> String {
        let ours = File::open("/proc/self/ns/net").unwrap();
        run_in(Network::Of(ours.as_fd()), script, args)
    }

    fn run_in(network: Network<'_>, script: &str, args: &[&str]) -> String {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let mut all = vec!["-c".to_owned(), script.to_owned(), "sh".to_owned()];
        all.extend(args.iter().map(|&arg| arg.to_owned()));
        let spawned = spawn(&Spawn {
            program: Path::new("/bin/sh"),
            args: &all,
            sockets: &[theirs.as_fd()],
            stderr: writer.as_fd(),
            cgroup: None,
            mounts: None,
            network,
        })
        .unwrap();
        drop((theirs, writer));
        let _ = (&ours).write_all(b"over the socket\n");
        drop(ours);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(process::wait_ended(spawned.pidfd.as_fd(), Duration::from_secs(5)));
        text
    }

    #[test]
    fn nothing_is_inherited_but_what_was_asked_for() {
        // SAFETY: tests of this crate only ever add this variable.
        unsafe { std::env::set_var("BULKHEAD_TEST_LEAK", "1") };
        let _leak = File::open("/dev/zero").unwrap();
        let text =
            run("exec >&2; set | grep -c BULKHEAD_TEST_LEAK; ls /proc/self/fd | tr '\\n' ' '; cat <&3", &[]);
        let mut lines = text.lines();
        assert_eq!(lines.next(), Some("0"));
        // 4 is ls's own view of the directory.
        assert_eq!(lines.next(), Some("0 1 2 3 4 over the socket"));
    }

    #[test]
    fn it_is_born_in_the_network_that_was_asked_for() {
        let identity = |path: &str| std::fs::read_link(path).unwrap().display().to_string();
        let ours = identity("/proc/self/ns/net");
        let script = "readlink /proc/self/ns/net >&2";
        let new = run_in(Network::New, script, &[]);
        assert!(new.starts_with("net:[") && new.trim() != ours, "{new}");
        let namespace = File::open("/proc/self/ns/net").unwrap();
        assert_eq!(run_in(Network::Of(namespace.as_fd()), script, &[]).trim(), ours);
    }

    #[test]
    fn it_is_process_1_and_gets_its_arguments() {
        assert_eq!(run("echo $$ $1 >&2", &["an argument"]), "1 an argument\n");
    }

    #[test]
    fn a_missing_program_is_named() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let sockets = [ours.as_fd()];
        let request = |program| Spawn {
            program,
            args: &[],
            sockets: &sockets,
            stderr: theirs.as_fd(),
            cgroup: None,
            mounts: None,
            network: Network::New,
        };
        let error = spawn(&request(Path::new("/nonexistent/vmm"))).unwrap_err();
        assert!(matches!(error, SpawnError::Program { .. }), "{error}");
        assert!(error.to_string().contains("/nonexistent/vmm"));

        let error = spawn(&request(Path::new("/etc/passwd"))).unwrap_err();
        assert!(matches!(error, SpawnError::Child { step: "exec", .. }), "{error:?}");
    }
}
