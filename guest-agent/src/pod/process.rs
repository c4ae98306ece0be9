//! One process of a container, from being set up to having ended.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use bulkhead_agent_protocol::Stdio;
use tokio::sync::{Mutex, oneshot, watch};
use tokio::time::timeout;

use super::{Pod, PodError};
use crate::container::launch::{ChildStdio, Job, Launch, LaunchError, Progress, Setup, TerminalSize};
use crate::container::process::ProcessPlan;
use crate::reaper::Exit;
use crate::stdio::{Connection, InputControl, copy_input, copy_output, discard_output};
use crate::sys;

/// How long a killed process may take to end.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Status and time.
    pub exit: Exit,
    /// Whether a process of the container was killed for want of memory.
    pub oom_killed: bool,
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    pid: libc::pid_t,
    /// The process's end of setting up, until its program is executed.
    launch: Mutex<Option<Launch>>,
    ended: watch::Receiver<Option<Ended>>,
    terminal: Option<Arc<Connection>>,
    input: Arc<InputControl>,
}

/// What is needed to make a process.
#[derive(Debug)]
pub(crate) struct NewProcess<'a> {
    /// The container's id.
    pub container_id: &'a str,
    /// What kind of process it is.
    pub job: Job<'a>,
    /// The process.
    pub plan: &'a ProcessPlan,
    /// Its streams.
    pub stdio: Stdio,
    /// The container's cgroup.
    pub cgroup: std::os::fd::BorrowedFd<'a>,
}

/// The host's connections for a process.
#[derive(Debug)]
struct HostStreams {
    stdin: Option<Connection>,
    stdout: Option<Connection>,
    stderr: Option<Connection>,
}

/// The agent's ends of a process's standard streams.
#[derive(Debug, Default)]
struct AgentStdio {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Process {
    /// Sets a process up. `on_exit` is called when it has ended, before anyone else hears of it, and says whether a
    /// process of the container was killed for want of memory.
    pub(super) async fn create(
        pod: &Pod,
        new: NewProcess<'_>,
        on_exit: impl FnOnce() -> bool + Send + 'static,
    ) -> Result<Arc<Self>, PodError> {
        let system = |what| move |source| PodError::System { what, source };
        for remark in &new.plan.remarks {
            pod.remark(new.container_id, remark);
        }
        let terminal = new.stdio.terminal.then(|| terminal_size(&new));
        let host = HostStreams {
            stdin: pod.streams.claim(new.stdio.stdin_stream).await?,
            stdout: pod.streams.claim(new.stdio.stdout_stream).await?,
            stderr: pod.streams.claim(new.stdio.stderr_stream).await?,
        };
        let (child, ours) = if terminal.is_some() {
            Default::default()
        } else {
            make_pipes(&host).map_err(system("make pipes for the standard streams"))?
        };
        let guard = pod.reaper.launching();
        let launch = Launch::spawn(Setup {
            container_id: new.container_id,
            job: new.job,
            process: new.plan,
            stdio: child,
            terminal,
            cgroup: new.cgroup,
            null: pod.null(),
        })?;
        let mut pid = launch.first_pid();
        let mut exits = vec![(pid, pod.reaper.expect(pid))];
        let ready = launch.ready(|progress| match progress {
            Progress::Pid(second) => {
                pid = second;
                exits.push((second, pod.reaper.expect(second)));
            }
            Progress::Remark(remark) => pod.remark(new.container_id, &remark),
        });
        let master = match ready.await {
            Ok(master) => master,
            Err(error) => {
                end_half_made(exits).await;
                return Err(error.into());
            }
        };
        drop(guard);
        if let Err(error) = new.plan.limits.apply(pid) {
            end_half_made(exits).await;
            return Err(error.into());
        }
        // The last one is the process; one that made it has nothing left to do.
        let (pid, exit) = exits.pop().ok_or(PodError::Launch(LaunchError::Died))?;
        wait_for_ends(exits).await;
        let terminal =
            master.map(Connection::new).transpose().map_err(system("use the terminal"))?.map(Arc::new);
        let (report, ended) = watch::channel(None);
        tokio::spawn(report_exit(exit, report, on_exit));
        let process = Self { pid, launch: Mutex::new(Some(launch)), ended, terminal, input: Arc::default() };
        process.connect(host, ours).map_err(system("connect the standard streams"))?;
        Ok(Arc::new(process))
    }

    /// Its id in the guest.
    pub(crate) fn pid(&self) -> u32 {
        self.pid.unsigned_abs()
    }

    /// Has its program executed.
    pub(crate) async fn start(&self) -> Result<(), PodError> {
        let mut place = self.launch.lock().await;
        let launch = place.take().ok_or(PodError::Started(self.pid()))?;
        match launch.start().await {
            Ok(()) => Ok(()),
            Err(error) => {
                // It has nothing to do any more, and only an ended process can be deleted.
                self.kill().await?;
                Err(error.into())
            }
        }
    }

    /// How it ended, if it did.
    pub(crate) fn ended(&self) -> Option<Ended> {
        *self.ended.borrow()
    }

    /// Waits until it has ended.
    pub(crate) async fn wait(&self) -> Result<Ended, PodError> {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await.map(|ended| *ended) {
            Ok(Some(ended)) => Ok(ended),
            _ => Err(PodError::System {
                what: "hear of the end of a process",
                source: io::ErrorKind::Other.into(),
            }),
        }
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: u32) -> Result<(), PodError> {
        let number = signal_number(signal)?;
        // The agent alone collects its children, so the id is the process's as long as it has not seen the end.
        if self.ended().is_some() {
            return Err(PodError::Ended(self.pid()));
        }
        match sys::process::kill(self.pid, number) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Err(PodError::Ended(self.pid())),
            result => result.map_err(|source| PodError::System { what: "send a signal", source }),
        }
    }

    /// Sets the size of its terminal.
    pub(crate) fn resize(&self, columns: u32, rows: u32) -> Result<(), PodError> {
        let terminal = self.terminal.as_ref().ok_or(PodError::NoTerminal(self.pid()))?;
        let limit = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        sys::terminal::set_size(terminal.fd().as_fd(), limit(columns), limit(rows))
            .map_err(|source| PodError::System { what: "set the size of the terminal", source })
    }

    /// Closes its standard input once what was sent so far is delivered.
    pub(crate) fn close_stdin(&self) {
        self.input.close();
    }

    /// Whether it may be deleted: it has ended, or was never started.
    pub(super) fn require_deletable(&self, id: &str) -> Result<(), PodError> {
        // A start that is under way holds the lock.
        let never_started = self.launch.try_lock().is_ok_and(|launch| launch.is_some());
        if self.ended().is_some() || never_started {
            Ok(())
        } else {
            Err(PodError::State { id: id.to_owned(), state: "running" })
        }
    }

    /// Kills it if it has not ended, and waits for the end.
    pub(super) async fn kill(&self) -> Result<(), PodError> {
        if self.ended().is_none() {
            match self.signal(libc::SIGKILL as u32) {
                Ok(()) | Err(PodError::Ended(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let limit = PodError::Unkillable { pid: self.pid(), seconds: KILL_LIMIT.as_secs() };
        timeout(KILL_LIMIT, self.wait()).await.map_err(|_| limit)?.map(drop)
    }

    fn connect(&self, host: HostStreams, ours: AgentStdio) -> io::Result<()> {
        let pipe = |fd: OwnedFd| Connection::new(fd).map(Arc::new);
        let (stdin, stdout, stderr) = match &self.terminal {
            Some(terminal) => (Some(terminal.clone()), Some(terminal.clone()), None),
            None => (
                ours.stdin.map(pipe).transpose()?,
                ours.stdout.map(pipe).transpose()?,
                ours.stderr.map(pipe).transpose()?,
            ),
        };
        if let (Some(from), Some(to)) = (host.stdin, stdin) {
            tokio::spawn(copy_input(from, to, self.input.clone(), self.end()));
        }
        for (from, to) in [(stdout, host.stdout), (stderr, host.stderr)] {
            match (from, to) {
                (Some(from), Some(to)) => drop(tokio::spawn(copy_output(from, to))),
                // A terminal that no one reads must not stop its process.
                (Some(from), None) => drop(tokio::spawn(discard_output(from))),
                (None, _) => {}
            }
        }
        Ok(())
    }

    fn end(&self) -> impl Future<Output = ()> + use<> {
        let mut ended = self.ended.clone();
        async move {
            // An end that no one can report any more is one too.
            let _ = ended.wait_for(Option::is_some).await;
        }
    }
}

/// The size that the host names, else the one of the specification.
fn terminal_size(new: &NewProcess<'_>) -> TerminalSize {
    let specified = new.plan.console_size.unwrap_or_default();
    let size = |asked: u32, specified: u32| {
        u16::try_from(if asked == 0 { specified } else { asked }).unwrap_or(u16::MAX)
    };
    TerminalSize {
        columns: size(new.stdio.columns, specified.width),
        rows: size(new.stdio.rows, specified.height),
    }
}

/// The signal with this number; 0 only asks whether the process exists.
pub(super) fn signal_number(signal: u32) -> Result<libc::c_int, PodError> {
    libc::c_int::try_from(signal)
        .ok()
        .filter(|number| (0..=64).contains(number))
        .ok_or(PodError::Signal(signal))
}

fn make_pipes(host: &HostStreams) -> io::Result<(ChildStdio, AgentStdio)> {
    let (mut child, mut ours) = (ChildStdio::default(), AgentStdio::default());
    if host.stdin.is_some() {
        let (reader, writer) = io::pipe()?;
        (child.stdin, ours.stdin) = (Some(reader.into()), Some(writer.into()));
    }
    if host.stdout.is_some() {
        let (reader, writer) = io::pipe()?;
        (child.stdout, ours.stdout) = (Some(writer.into()), Some(reader.into()));
    }
    if host.stderr.is_some() {
        let (reader, writer) = io::pipe()?;
        (child.stderr, ours.stderr) = (Some(writer.into()), Some(reader.into()));
    }
    Ok((child, ours))
}

/// A process that takes part in setting one up, and its end.
type Expected = (libc::pid_t, oneshot::Receiver<Exit>);

/// Ends what is left of a process that could not be set up.
async fn end_half_made(mut processes: Vec<Expected>) {
    for (pid, exit) in &mut processes {
        // The id of one that has been collected may be someone else's by now.
        if matches!(exit.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
            // It may be just ending by itself.
            let _ = sys::process::kill(*pid, libc::SIGKILL);
        }
    }
    wait_for_ends(processes).await;
}

async fn wait_for_ends(processes: Vec<Expected>) {
    for (pid, exit) in processes {
        if !exit.is_terminated() && timeout(KILL_LIMIT, exit).await.is_err() {
            log::warn!(
                "process {pid}, which set up another one, did not end in {} seconds",
                KILL_LIMIT.as_secs()
            );
        }
    }
}

async fn report_exit(
    exit: oneshot::Receiver<Exit>,
    report: watch::Sender<Option<Ended>>,
    on_exit: impl FnOnce() -> bool,
) {
    if let Ok(exit) = exit.await {
        let oom_killed = on_exit();
        report.send_replace(Some(Ended { exit, oom_killed }));
    }
}
