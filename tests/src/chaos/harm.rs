//! Doing harm, from the outside: nothing in our programs knows of it.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::posix_fallocate;
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

use super::schedule::{Fault, Harm};
use crate::failure::{Explain, Outcome};
use crate::node::{self, Process};
use crate::process;

/// How long what is to be killed is waited for, when it is not there yet.
const WAIT: Duration = Duration::from_millis(150);

/// A file that takes all the room there is, in the file system of the pods' records.
const FILLER: &str = "/run/bulkhead-chaos";

/// Whom it is done to.
#[derive(Debug, Clone)]
pub struct Target {
    /// The shim.
    pub shim: Process,
    /// The control group of its pod.
    pub cgroup: String,
}

impl Target {
    fn shim_lives(&self) -> bool {
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
    pub fn harm(&self, fault: &Fault) -> bool {
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

/// Takes what room there is.
fn fill() -> Outcome {
    let status = statvfs("/run").explain(|| "ask for the room in /run".into())?;
    let free = status.blocks_available() * status.fragment_size();
    let file = fs::File::create(FILLER).explain(|| format!("make {FILLER}"))?;
    let length = i64::try_from(free).unwrap_or(i64::MAX);
    posix_fallocate(file.as_fd(), 0, length).explain(|| format!("take {free} bytes of /run"))
}

/// Gives the room back.
pub fn relieve() {
    let _ = fs::remove_file(FILLER);
}

/// Whether the pods' records are in a file system that can be filled without harm to others.
pub fn can_fill() -> bool {
    node::mount_points().iter().any(|point| point == Path::new("/run"))
}
