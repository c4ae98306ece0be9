//! Doing harm, from the outside: nothing in our programs knows of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

use super::schedule::{Fault, Harm, Step};
use crate::failure::{Explain, Failure, Outcome};
use crate::node::{self, Process};
use crate::process;

/// How long what is to be killed is waited for, when it is not there yet.
const WAIT: Duration = Duration::from_millis(150);

/// The same for a template's maker, whose steps are longer.
const WAIT_FOR_MAKER: Duration = Duration::from_secs(2);

/// The file system of the pods' records.
pub(crate) const RECORDS: &str = "/run";

/// What the cgroup of a template's maker is called, before its process id.
const MAKERS_CGROUP: &str = "bulkhead-template-maker-";

/// The sizes in KiB of file systems that are full.
static WHOLE: Mutex<BTreeMap<PathBuf, u64>> = Mutex::new(BTreeMap::new());

/// A process that may not be there yet, or be another one by now.
#[derive(Debug, Clone)]
pub(crate) enum Whom {
    /// This one.
    This(Process),
    /// The shim that a containerd has started for a container.
    ShimOf {
        /// containerd's socket.
        address: String,
        /// The container.
        id: String,
    },
    /// The containerd with this configuration.
    Containerd(String),
    /// Whoever makes a template.
    Maker,
    /// Nobody.
    Nobody,
}

impl Whom {
    /// The process, if it is there.
    pub(crate) fn find(&self) -> Option<Process> {
        let lives = |process: &Process| process.state != 'Z';
        match self {
            Whom::This(process) => node::process(process.pid).filter(|now| now.started == process.started),
            Whom::ShimOf { address, id } => node::shims(address, id).into_iter().next(),
            Whom::Containerd(config) => {
                let is_it =
                    |process: &Process| process.name == "containerd" && process.command.ends_with(config);
                node::processes().into_iter().find(is_it)
            }
            Whom::Maker => node::template_makers().into_iter().next(),
            Whom::Nobody => None,
        }
        .filter(lives)
    }

    fn kill(&self) -> bool {
        self.find().is_some_and(|process| node::kill_hard(process.pid).is_ok())
    }
}

/// Whom it is done to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The shim.
    pub shim: Whom,
    /// Whose child the VMM and the file server are.
    pub parent: Whom,
    /// containerd.
    pub containerd: Whom,
    /// The control group of the pod.
    pub cgroup: String,
    /// The file system that can be filled.
    pub records: PathBuf,
}

impl Target {
    /// A pod, by its shim.
    pub(crate) fn pod(shim: Whom, cgroup: String) -> Self {
        Self { parent: shim.clone(), shim, containerd: Whom::Nobody, cgroup, records: RECORDS.into() }
    }

    /// Whether the shim is there, and is the same process.
    pub(crate) fn shim_lives(&self) -> bool {
        self.shim.find().is_some()
    }

    /// A process of the pod, as soon as it is there.
    fn await_process(&self, name: &str) -> Option<Process> {
        let began = Instant::now();
        let limit = if matches!(self.parent, Whom::Maker) { WAIT_FOR_MAKER } else { WAIT };
        loop {
            let parent = self.parent.find();
            let found =
                parent.as_ref().and_then(|parent| node::descendants(parent.pid, name).into_iter().next());
            if found.is_some() || began.elapsed() > limit {
                return found;
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn signal(&self, name: &str, signal: Signal) -> bool {
        self.await_process(name).is_some_and(|process| kill(Pid::from_raw(process.pid), signal).is_ok())
    }

    /// Does it; tells whether there was anything to do it to.
    pub(crate) fn harm(&self, fault: &Fault) -> bool {
        match fault.harm {
            Harm::KillShim => self.shim.kill(),
            Harm::KillVmm => self.signal("bulkhead-vmm", Signal::SIGKILL),
            Harm::KillFileServer => self.signal("bulkhead-fs", Signal::SIGKILL),
            Harm::KillContainerd => self.containerd.kill(),
            Harm::KillMaker => Whom::Maker.kill(),
            Harm::StopGuest => self.signal("bulkhead-vmm", Signal::SIGSTOP),
            Harm::NoMemory => self.await_process("bulkhead-vmm").is_some() && self.take_memory().is_ok(),
            Harm::NoDescriptors => self.take_descriptors().is_ok(),
            Harm::DiskFull => fill(&self.records).is_ok(),
            // A process in the container does it.
            Harm::EndGuest => true,
        }
    }

    /// Starts to do what happens in a step.
    pub(crate) fn harming(&self, faults: Vec<Fault>) -> JoinHandle<Vec<(Harm, Step)>> {
        self.harming_after(|_| (), faults)
    }

    /// The same from the moment on at which the shim is there.
    pub(crate) fn harming_once_there(&self, faults: Vec<Fault>) -> JoinHandle<Vec<(Harm, Step)>> {
        let there = |target: &Target| {
            let began = Instant::now();
            while !target.shim_lives() && began.elapsed() < WAIT {
                thread::sleep(Duration::from_micros(200));
            }
        };
        self.harming_after(there, faults)
    }

    fn harming_after(
        &self,
        wait: impl FnOnce(&Target) + Send + 'static,
        faults: Vec<Fault>,
    ) -> JoinHandle<Vec<(Harm, Step)>> {
        let target = self.clone();
        thread::spawn(move || {
            if !faults.is_empty() {
                wait(&target);
            }
            let mut passed = Duration::ZERO;
            let mut hits = Vec::new();
            for fault in faults {
                thread::sleep(fault.after.saturating_sub(passed));
                passed = fault.after;
                if target.harm(&fault) {
                    hits.push((fault.harm, fault.step));
                }
            }
            hits
        })
    }

    fn take_memory(&self) -> Outcome {
        let cgroup = match (&self.parent, self.parent.find()) {
            (Whom::Maker, Some(maker)) => format!("{MAKERS_CGROUP}{}", maker.pid),
            _ => self.cgroup.clone(),
        };
        let file = Path::new("/sys/fs/cgroup").join(cgroup).join("memory.max");
        fs::write(&file, "1M").explain(|| format!("write {}", file.display()))
    }

    fn take_descriptors(&self) -> Outcome {
        let shim = self.shim.find().explain(|| "the shim".into())?;
        let open = format!("/proc/{}/fd", shim.pid);
        let count = fs::read_dir(&open).explain(|| open.clone())?.count();
        let pid = shim.pid.to_string();
        let mut command = Command::new("prlimit");
        // The soft limit: what is open stays open.
        command.args(["--pid", &pid, &format!("--nofile={count}:")]);
        process::run(&mut command, b"", Duration::from_secs(5))?.success("prlimit").map(drop)
    }
}

/// Takes what room there is: the file system in memory becomes as small as what is in it.
fn fill(path: &Path) -> Outcome {
    let status = statvfs(path).explain(|| format!("ask for the room in {}", path.display()))?;
    let kib = |blocks: u64| blocks * status.fragment_size() / 1024;
    let mut whole = WHOLE.lock().unwrap_or_else(PoisonError::into_inner);
    whole.entry(path.to_owned()).or_insert(kib(status.blocks()));
    resize(path, kib(status.blocks() - status.blocks_free()).max(4))
}

/// Gives the room back.
pub(crate) fn relieve() {
    let whole = std::mem::take(&mut *WHOLE.lock().unwrap_or_else(PoisonError::into_inner));
    for (path, kib) in whole {
        if let Err(Failure(reason)) = resize(&path, kib) {
            println!("     | {} stays full: {reason}", path.display());
        }
    }
}

fn resize(path: &Path, kib: u64) -> Outcome {
    let options = format!("size={kib}k");
    mount(None::<&str>, path, None::<&str>, MsFlags::MS_REMOUNT, Some(options.as_str()))
        .explain(|| format!("remount {} with {options}", path.display()))
}

/// Whether the pods' records are in a file system that can be filled without harm to others.
pub(crate) fn can_fill() -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let in_memory = |line: &str| line.split(' ').nth(4) == Some(RECORDS) && line.contains(" - tmpfs ");
    table.lines().any(in_memory)
}
