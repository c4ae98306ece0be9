//! Doing harm, from the outside: nothing in our programs knows of it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

use super::schedule::{Fault, Harm};
use crate::failure::{Explain, Failure, Outcome};
use crate::node::{self, Process};
use crate::process;

/// How long what is to be killed is waited for, when it is not there yet.
const WAIT: Duration = Duration::from_millis(150);

/// The file system of the pods' records.
const RECORDS: &str = "/run";

/// Its size in KiB, while it is full.
static WHOLE: Mutex<Option<u64>> = Mutex::new(None);

/// Whom it is done to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// The shim.
    pub shim: Process,
    /// The control group of its pod.
    pub cgroup: String,
}

impl Target {
    /// Whether the shim is there, and is the same process.
    pub(crate) fn shim_lives(&self) -> bool {
        node::process(self.shim.pid).is_some_and(|now| now.started == self.shim.started && now.state != 'Z')
    }

    /// A process of the pod, as soon as it is there.
    fn await_process(&self, name: &str) -> Option<Process> {
        let began = Instant::now();
        loop {
            let found = node::descendants(self.shim.pid, name).into_iter().next();
            if found.is_some() || !self.shim_lives() || began.elapsed() > WAIT {
                return found;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    fn signal(&self, name: &str, signal: Signal) -> bool {
        self.await_process(name).is_some_and(|process| kill(Pid::from_raw(process.pid), signal).is_ok())
    }

    /// Does it; tells whether there was anything to do it to.
    pub(crate) fn harm(&self, fault: &Fault) -> bool {
        match fault.harm {
            Harm::KillShim => self.shim_lives() && node::kill_hard(self.shim.pid).is_ok(),
            Harm::KillVmm => self.signal("bulkhead-vmm", Signal::SIGKILL),
            Harm::KillFileServer => self.signal("bulkhead-fs", Signal::SIGKILL),
            Harm::StopGuest => self.signal("bulkhead-vmm", Signal::SIGSTOP),
            Harm::NoMemory => self.await_process("bulkhead-vmm").is_some() && self.take_memory().is_ok(),
            Harm::NoDescriptors => self.shim_lives() && self.take_descriptors().is_ok(),
            Harm::DiskFull => fill().is_ok(),
            // A process in the container does it.
            Harm::EndGuest => true,
        }
    }

    fn take_memory(&self) -> Outcome {
        let file = Path::new("/sys/fs/cgroup").join(&self.cgroup).join("memory.max");
        fs::write(&file, "1M").explain(|| format!("write {}", file.display()))
    }

    fn take_descriptors(&self) -> Outcome {
        let open = format!("/proc/{}/fd", self.shim.pid);
        let count = fs::read_dir(&open).explain(|| open.clone())?.count();
        let pid = self.shim.pid.to_string();
        let mut command = Command::new("prlimit");
        // The soft limit: what is open stays open.
        command.args(["--pid", &pid, &format!("--nofile={count}:")]);
        process::run(&mut command, b"", Duration::from_secs(5))?.success("prlimit").map(drop)
    }
}

/// Takes what room there is: the file system in memory becomes as small as what is in it.
fn fill() -> Outcome {
    let status = statvfs(RECORDS).explain(|| format!("ask for the room in {RECORDS}"))?;
    let kib = |blocks: u64| blocks * status.fragment_size() / 1024;
    let mut whole = WHOLE.lock().unwrap_or_else(PoisonError::into_inner);
    whole.get_or_insert(kib(status.blocks()));
    resize(kib(status.blocks() - status.blocks_free()).max(4))
}

/// Gives the room back.
pub(crate) fn relieve() {
    let whole = WHOLE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(Err(Failure(reason))) = whole.map(resize) {
        println!("     | {RECORDS} stays full: {reason}");
    }
}

fn resize(kib: u64) -> Outcome {
    let options = format!("size={kib}k");
    mount(None::<&str>, RECORDS, None::<&str>, MsFlags::MS_REMOUNT, Some(options.as_str()))
        .explain(|| format!("remount {RECORDS} with {options}"))
}

/// Whether the pods' records are in a file system that can be filled without harm to others.
pub(crate) fn can_fill() -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let in_memory = |line: &str| line.split(' ').nth(4) == Some(RECORDS) && line.contains(" - tmpfs ");
    table.lines().any(in_memory)
}
