//! A round in which containerd leads a pod's life, is killed in the middle of it and started again.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::harm::{Target, Whom};
use super::schedule::{Harm, Schedule, Step};
use super::{Hits, Played};
use crate::cases::Environment;
use crate::cases::ctr::{self, IMAGE};
use crate::containerd::PrivateContainerd;
use crate::failure::{Failure, Outcome};
use crate::process::eventually;
use crate::{ensure, ensure_eq, fail};

/// The pod of the same containerd that nothing happens to.
const BESIDE: &str = "chaos-beside";

/// Where `ctr` makes FIFOs, and leaves them when its containerd is gone.
const FIFOS: &str = "/run/containerd/fifo";

/// What tells one pod from another.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How long a containerd that was started again may take to tell of the end of a pod.
const TOLD_LIMIT: Duration = Duration::from_secs(10);

/// A guest that has stopped is killed in time for this.
const DELETE_LIMIT: Duration = Duration::from_secs(20);

/// Runs in each pod.
const PROCESS: [&str; 2] = ["sleep", "100000"];

/// What rounds with containerd share.
pub(crate) struct Daemon {
    runtime: &'static str,
    state: PathBuf,
    /// The boot id of the pod that nothing happens to.
    beside: String,
    execs: Cell<u32>,
}

/// A pod's life.
struct Life<'a> {
    daemon: &'a Daemon,
    containerd: &'a PrivateContainerd,
    id: &'a str,
    schedule: &'a Schedule,
    target: Target,
    hits: Hits,
    /// Whether `ctr` has been told that its process runs.
    started: bool,
    /// Whether its end was asked for.
    killed: bool,
    boot_id: Option<String>,
}

impl Daemon {
    /// Starts the pod beside those of the rounds.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn new(environment: &mut Environment) -> Outcome<Self> {
        let runtime = environment.runtime.name();
        let containerd = environment.containerd()?;
        let state = containerd.path().join("state");
        let mut daemon = Self { runtime, state, beside: String::new(), execs: Cell::new(0) };
        let run = ["run", "-d", "--null-io", "--runtime", runtime, IMAGE, BESIDE];
        containerd.ctr(&[&run[..], &PROCESS].concat())?.success("ctr run -d")?;
        daemon.beside = daemon.boot_id(containerd, BESIDE)?;
        Ok(daemon)
    }

    /// containerd's directory for what runs.
    pub(crate) fn state(&self) -> PathBuf {
        self.state.clone()
    }

    /// Takes the pod beside down.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn finish(self, environment: &mut Environment) -> Outcome {
        ctr::remove(environment, BESIDE, "137")
    }

    /// Plays a round.
    ///
    /// # Errors
    /// What is not as it has to be.
    pub(crate) fn play(
        &self,
        containerd: &mut PrivateContainerd,
        id: &str,
        schedule: &Schedule,
    ) -> Outcome<Played> {
        let fifos = entries(FIFOS);
        let address = containerd.socket().display().to_string();
        let mut target = Target::pod(Whom::ShimOf { address, id: id.to_owned() }, format!("default/{id}"));
        target.containerd = Whom::Containerd(containerd.config().display().to_string());
        let mut life = Life {
            daemon: self,
            containerd,
            id,
            schedule,
            target: target.clone(),
            hits: Hits::new(),
            started: false,
            killed: false,
            boot_id: None,
        };
        let error = life.live().err().map(last_line);
        if let Some(Failure(reason)) = &error {
            ensure!(!life.hits.is_empty(), "failed without a fault: {reason}");
        }
        let Life { mut hits, started, killed, boot_id, .. } = life;
        if target.containerd.find().is_none() {
            hits.extend(revive(containerd, schedule, &target)?);
        }
        let aftermath = Aftermath { daemon: self, containerd, id, hits: &hits, started, killed, boot_id };
        aftermath.check(error.is_some())?;
        ensure_eq!(self.boot_id(containerd, BESIDE)?, self.beside, "boot id of the pod beside it");
        let new = format!("{id}-new");
        let run = ["run", "--rm", "--runtime", self.runtime, IMAGE, &new, "echo", "new"];
        let output = containerd.ctr(&run)?.success("a new pod")?;
        ensure_eq!(output.stdout, "new\n", "a new pod");
        for left in entries(FIFOS).iter().filter(|path| !fifos.contains(path)) {
            let _ = fs::remove_dir_all(left);
        }
        Ok(Played { hits, reason: error.map(|Failure(reason)| reason) })
    }

    fn boot_id(&self, containerd: &PrivateContainerd, id: &str) -> Outcome<String> {
        self.execs.set(self.execs.get() + 1);
        let exec = format!("e{}", self.execs.get());
        let output = containerd.ctr(&["task", "exec", "--exec-id", &exec, id, "cat", BOOT_ID])?;
        Ok(output.success(&format!("ctr task exec in {id}"))?.stdout)
    }
}

/// Starts containerd again, as the node's service manager does; while it starts, faults happen.
fn revive(containerd: &mut PrivateContainerd, schedule: &Schedule, target: &Target) -> Outcome<Hits> {
    let mut faults = schedule.during(Step::Restart);
    for fault in faults.iter_mut().filter(|fault| fault.harm == Harm::KillContainerd) {
        fault.after += schedule.away;
    }
    let harming = target.harming(faults);
    thread::sleep(schedule.away);
    let revived = containerd.revive();
    let hits = harming.join().unwrap_or_default();
    let again = hits.iter().any(|(harm, _)| *harm == Harm::KillContainerd);
    if again || target.containerd.find().is_none() {
        containerd.revive()?;
    } else {
        revived?;
    }
    Ok(hits)
}

fn entries(directory: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(Path::new(directory)).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

impl Life<'_> {
    fn during<T>(&mut self, step: Step, work: impl FnOnce(&Self) -> T) -> T {
        let harming = self.target.harming(self.schedule.during(step));
        let result = work(self);
        self.hits.extend(harming.join().unwrap_or_default());
        result
    }

    fn ctr(&self, arguments: &[&str]) -> Outcome<String> {
        let what = format!("ctr {}", arguments.join(" "));
        Ok(self.containerd.ctr(arguments)?.success(&what)?.stdout)
    }

    /// What a client does; the first error ends it.
    fn live(&mut self) -> Outcome {
        let create = ["container", "create", "--runtime", self.daemon.runtime, IMAGE, self.id];
        self.ctr(&[&create[..], &PROCESS].concat())?;
        let launching = self.target.harming_once_there(self.schedule.during(Step::Launch));
        let started =
            self.during(Step::Create, |life| life.ctr(&["task", "start", "-d", "--null-io", life.id]));
        self.hits.extend(launching.join().unwrap_or_default());
        started?;
        self.started = true;
        self.boot_id = Some(self.during(Step::Exec, |life| life.daemon.boot_id(life.containerd, life.id))?);
        self.killed = true;
        self.during(Step::Kill, |life| {
            life.ctr(&["task", "kill", "-s", "SIGKILL", life.id])?;
            stopped(life.containerd, life.id)
        })?;
        self.during(Step::Delete, |life| {
            // Its exit code is the task's.
            let deleted = life.containerd.ctr(&["task", "delete", life.id])?;
            ensure!([0, 137].contains(&deleted.code), "ctr task delete: {}", deleted.said());
            life.ctr(&["container", "delete", life.id]).map(drop)
        })
    }
}

/// What matters of an error of `ctr`: its last line.
fn last_line(Failure(reason): Failure) -> Failure {
    match reason.rsplit_once("ctr: ") {
        Some((before, last)) => {
            let what = before.split(": exit code").next().unwrap_or_default();
            Failure(format!("{what}: {}", last.trim_end_matches(['"', '\n'])))
        }
        None => Failure(reason),
    }
}

/// What containerd calls a task's state; `None` if there is none.
fn state_of(containerd: &PrivateContainerd, id: &str) -> Outcome<Option<String>> {
    let list = containerd.ctr(&["task", "ls"])?.success("ctr task ls")?.stdout;
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
    Ok(line.and_then(|line| line.split_whitespace().last()).map(str::to_owned))
}

/// Waits for a task's end. A containerd that does not answer is not waited for.
fn stopped(containerd: &PrivateContainerd, id: &str) -> Outcome {
    eventually("the task stops", TOLD_LIMIT, || match state_of(containerd, id) {
        Err(failure) => Ok(Err(failure)),
        Ok(Some(state)) if state != "STOPPED" => fail!("it is {state}"),
        Ok(_) => Ok(Ok(())),
    })?
}

/// Whether a pod can't outlive a fault: while it is made, it boots when its first VMM was killed.
fn is_the_end((harm, step): &(Harm, Step)) -> bool {
    let kills = [Harm::KillShim, Harm::KillVmm, Harm::KillFileServer].contains(harm);
    kills && ![Step::Create, Step::Launch].contains(step)
}

/// A pod's life after containerd has come back.
struct Aftermath<'a> {
    daemon: &'a Daemon,
    containerd: &'a PrivateContainerd,
    id: &'a str,
    hits: &'a Hits,
    started: bool,
    killed: bool,
    boot_id: Option<String>,
}

impl Aftermath<'_> {
    /// A pod that ran runs, or its end is reported; then it can be removed.
    fn check(&self, failed: bool) -> Outcome {
        let only_containerd = self.hits.iter().all(|(harm, _)| *harm == Harm::KillContainerd);
        let state = state_of(self.containerd, self.id)?;
        if only_containerd && self.started && !self.killed {
            ensure_eq!(state.as_deref(), Some("RUNNING"), "state of a pod that ran before");
            let boot_id = self.daemon.boot_id(self.containerd, self.id)?;
            if let Some(before) = &self.boot_id {
                ensure_eq!(boot_id, *before, "boot id of a pod that ran before");
            }
        } else if self.hits.iter().any(is_the_end) {
            stopped(self.containerd, self.id)?;
        }
        if state.is_some() {
            let _ = self.containerd.ctr(&["task", "kill", "-a", "-s", "SIGKILL", self.id])?;
            eventually("the task can be deleted", DELETE_LIMIT, || {
                let deleted = self.containerd.ctr(&["task", "delete", "-f", self.id])?;
                ensure_eq!(state_of(self.containerd, self.id)?, None, "task after {}", deleted.said());
                Ok(())
            })?;
        }
        let known = self.containerd.ctr(&["container", "ls", "-q"])?.success("ctr container ls")?.stdout;
        if known.lines().any(|line| line == self.id) {
            ensure!(failed || !self.hits.is_empty(), "the container was deleted and is there");
            self.containerd.ctr(&["container", "delete", self.id])?.success("ctr container delete")?;
        }
        Ok(())
    }
}
