//! Containers and their processes, as containerd sees them: states, exits, and the order of their events.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskExit, TaskOOM};
use tokio::sync::watch;

use super::disks::ContainerDisks;
use super::stdio::{ProcessIo, Stdio};
use crate::error::ApiError;
use crate::events::{Event, Publisher, timestamp};
use crate::pod::Pod;
use crate::pod::agent::{AgentError, Ended, Exit};
use crate::pod::state::ExitRecord;

/// What a process is reported to have ended with when its pod died under it: killed.
const KILLED: u32 = 128 + libc::SIGKILL as u32;

/// Execs whose container has ended are reported within this time, by the agent or without it.
const EXEC_LIMIT: Duration = Duration::from_secs(5);

/// Pauses between questions to an agent that does not know when a process ends.
const RETRY: Duration = Duration::from_secs(1);
const RETRIES: u32 = 3;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Set up, its program not executed yet.
    Created,
    /// Started.
    Running,
    /// Ended.
    Stopped(Exit),
}

/// A process: a container's first, or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    /// Empty for a container's first process.
    pub exec_id: String,
    /// What containerd asked for.
    pub stdio: Stdio,
    /// What containerd is told as its process id.
    pub pid: u32,
    state: watch::Sender<State>,
    /// Held while the state changes and the event about it is queued, so that events come in the order of the states.
    pub transition: tokio::sync::Mutex<()>,
    io: Mutex<Option<ProcessIo>>,
    /// Why it could not be set up, which its start tells.
    refusal: Option<ApiError>,
}

impl Process {
    /// A process that has just been set up.
    pub(crate) fn new(exec_id: &str, stdio: Stdio, pid: u32, io: ProcessIo) -> Process {
        Process {
            exec_id: exec_id.to_owned(),
            stdio,
            pid,
            state: watch::Sender::new(State::Created),
            transition: tokio::sync::Mutex::new(()),
            io: Mutex::new(Some(io)),
            refusal: None,
        }
    }

    /// A process that could not be set up. It is there all the same, until it is deleted: that an exec can't be carried out is
    /// told when it is started.
    pub(crate) fn refused(exec_id: &str, stdio: Stdio, pid: u32, refusal: ApiError) -> Process {
        let process = Process::new(exec_id, stdio, pid, ProcessIo::default());
        Process { refusal: Some(refusal), ..process }
    }

    /// Why it could not be set up.
    pub(crate) fn refusal(&self) -> Option<&ApiError> {
        self.refusal.as_ref()
    }

    /// Where it is.
    pub(crate) fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Changes the state; the caller holds [`Process::transition`].
    pub(crate) fn set_state(&self, state: State) {
        self.state.send_replace(state);
    }

    /// Answers when it has ended.
    pub(crate) async fn ended(&self) -> Exit {
        let mut state = self.state.subscribe();
        loop {
            if let State::Stopped(exit) = *state.borrow_and_update() {
                return exit;
            }
            if state.changed().await.is_err() {
                // The sender is ours: it can't be gone.
                std::future::pending::<()>().await;
            }
        }
    }

    /// Lets it see the end of its input.
    pub(crate) fn close_input(&self) {
        if let Some(io) = self.lock_io().as_ref() {
            io.close_input();
        }
    }

    /// Takes its streams, to finish them.
    pub(crate) fn take_io(&self) -> Option<ProcessIo> {
        self.lock_io().take()
    }

    fn lock_io(&self) -> std::sync::MutexGuard<'_, Option<ProcessIo>> {
        self.io.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    /// containerd's id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The pod it is in.
    pub pod: Arc<Pod>,
    /// Its first process.
    pub init: Arc<Process>,
    /// Its first process, as the guest counts it.
    pub guest_pid: u32,
    /// Whether the end of the first process is the end of all.
    pub own_pid_namespace: bool,
    /// The disks that the pod has for it.
    pub disks: ContainerDisks,
    /// Whether it is frozen.
    pub paused: AtomicBool,
    /// Whether containerd knows that something in it was killed for want of memory.
    oom_told: AtomicBool,
    execs: Mutex<BTreeMap<String, Arc<Process>>>,
}

impl Container {
    /// A container that has just been set up.
    pub(crate) fn new(
        id: &str,
        bundle: PathBuf,
        pod: Arc<Pod>,
        init: Arc<Process>,
        own_pid_namespace: bool,
        disks: ContainerDisks,
    ) -> Container {
        Container {
            id: id.to_owned(),
            bundle,
            pod,
            init,
            guest_pid: 0,
            own_pid_namespace,
            disks,
            paused: AtomicBool::new(false),
            oom_told: AtomicBool::new(false),
            execs: Mutex::default(),
        }
    }

    /// A process by its exec id; empty for the first.
    pub(crate) fn process(&self, exec_id: &str) -> Option<Arc<Process>> {
        if exec_id.is_empty() { Some(self.init.clone()) } else { self.execs().get(exec_id).cloned() }
    }

    /// The execs, by id.
    pub(crate) fn execs(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Process>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the end of a process and reports it. One such task runs for each process from its creation.
    pub(crate) async fn watch(self: Arc<Self>, process: Arc<Process>, publisher: Publisher) {
        let exit = tokio::select! {
            // The pod's death knows the time better than a broken connection.
            biased;
            death = self.pod.died() => Exit { status: KILLED, at_ns: death.at_ns },
            exit = self.ask(&process, &publisher) => exit,
        };
        if process.exec_id.is_empty() && self.own_pid_namespace {
            self.await_execs(exit, &publisher).await;
        }
        self.report(&process, exit, &publisher).await;
    }

    /// Tells containerd that a process in it was killed for want of memory.
    pub(crate) fn report_oom(&self, publisher: &Publisher) {
        self.oom_told.store(true, Ordering::Relaxed);
        log::warn!("container {}: a process was killed for want of memory", self.id);
        publisher.publish(Event::Oom(TaskOOM { container_id: self.id.clone(), ..Default::default() }));
    }

    async fn ask(&self, process: &Process, publisher: &Publisher) -> Exit {
        let mut failures = 0;
        loop {
            match self.pod.agent().wait(&self.id, &process.exec_id).await {
                Ok(Ended { exit, oom_killed }) => {
                    // The event of its own may be on its way still, and whoever hears of the exit wants to know why.
                    if oom_killed && !self.oom_told.load(Ordering::Relaxed) {
                        self.report_oom(publisher);
                    }
                    return plausible(exit, crate::pod::now_ns());
                }
                // The pod's death follows.
                Err(AgentError::Lost) => std::future::pending().await,
                Err(error) => {
                    failures += 1;
                    log::warn!(
                        "the agent can't tell when process {:?} of {} ends: {error}",
                        process.exec_id,
                        self.id
                    );
                    if failures == RETRIES {
                        return Exit { status: 255, at_ns: crate::pod::now_ns() };
                    }
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// The end of a PID namespace is the end of every exec in it, and has to be reported after theirs.
    async fn await_execs(&self, exit: Exit, publisher: &Publisher) {
        let execs: Vec<_> = self.execs().values().cloned().collect();
        let all = async {
            for exec in execs.iter().filter(|exec| exec.state() == State::Running) {
                exec.ended().await;
            }
        };
        if tokio::time::timeout(EXEC_LIMIT, all).await.is_err() {
            log::warn!("the agent did not report the end of every exec of {}", self.id);
        }
        for exec in &execs {
            self.report(exec, Exit { status: KILLED, at_ns: exit.at_ns }, publisher).await;
        }
    }

    /// Reports a process as killed that the guest does not end.
    pub(crate) async fn give_up(&self, process: &Process, publisher: &Publisher) {
        self.report(process, Exit { status: KILLED, at_ns: crate::pod::now_ns() }, publisher).await;
    }

    async fn report(&self, process: &Process, exit: Exit, publisher: &Publisher) {
        let _guard = process.transition.lock().await;
        let before = process.state();
        if matches!(before, State::Stopped(_)) {
            return;
        }
        // Before anybody can hear of it, and so before the bundle can be deleted.
        let is_init = process.exec_id.is_empty();
        if is_init {
            let record = ExitRecord { pid: process.pid, status: exit.status, exited_at_ns: exit.at_ns };
            if let Err(error) = record.save(&self.bundle) {
                log::warn!("can't record how {} ended: {error}", self.id);
            }
            self.paused.store(false, Ordering::Relaxed);
            self.disks.tell_host_of_changes().await;
        }
        process.set_state(State::Stopped(exit));
        // An exec that was never started has never been announced.
        if is_init || before == State::Running {
            publisher.publish(Event::Exit(TaskExit {
                container_id: self.id.clone(),
                id: if is_init { self.id.clone() } else { process.exec_id.clone() },
                pid: process.pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at_ns),
                ..Default::default()
            }));
        }
    }
}

/// What the guest says of an exit, within what can be: containerd and others compute with it.
fn plausible(exit: Exit, now_ns: i64) -> Exit {
    /// The report is on its way for milliseconds; a guest's clock may be off by some more.
    const SLACK_NS: i64 = 5_000_000_000;
    let at_ns = if (now_ns - SLACK_NS..=now_ns).contains(&exit.at_ns) { exit.at_ns } else { now_ns };
    Exit { status: exit.status.min(255), at_ns }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_that_cannot_be_are_bounded() {
        let now = 100_000_000_000;
        let plausible = |status, at_ns| {
            let exit = plausible(Exit { status, at_ns }, now);
            (exit.status, exit.at_ns)
        };
        assert_eq!(plausible(3, now - 1), (3, now - 1));
        for wrong in [i64::MIN, 0, now + 1, i64::MAX] {
            assert_eq!(plausible(u32::MAX, wrong), (255, now));
        }
    }
}
