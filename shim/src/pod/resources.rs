//! What a pod holds on the host, and its release in reverse order.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::machine::{Jailed, MachineError};
use super::network::Network;
use super::state::State;
use super::tail::Tail;
use super::tree::SharedTree;
use super::{PodError, log_failure};
use crate::host::cgroup;
use crate::host::process::Ended;

/// How long the end of a VMM whose sockets are closed is waited for.
const OWN_END: Duration = Duration::from_millis(100);

/// A killed process is gone within this time, or something is wrong with the host.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// Removing a cgroup whose processes are gone.
const CGROUP_LIMIT: Duration = Duration::from_secs(2);

/// How much of a console or standard error goes into an error message, in lines and bytes.
const QUOTED: (usize, usize) = (3, 600);

/// Everything that has to be released.
#[derive(Debug)]
pub(crate) struct Resources {
    directory: PathBuf,
    /// What is on disk for `delete`.
    state: State,
    pub(super) tree: Option<Arc<SharedTree>>,
    pub(super) fs_server: Option<Arc<Jailed>>,
    pub(super) vmm: Option<Arc<Jailed>>,
    pub(super) console: Option<Tail>,
    pub(super) network: Option<Arc<Network>>,
    released: bool,
}

impl Resources {
    pub(super) fn new(directory: PathBuf) -> Resources {
        Resources {
            directory,
            state: State::default(),
            tree: None,
            fs_server: None,
            vmm: None,
            console: None,
            network: None,
            released: false,
        }
    }

    /// Changes the record on disk.
    pub(super) fn record(&mut self, change: impl FnOnce(&mut State)) -> Result<(), super::state::StateError> {
        change(&mut self.state);
        self.state.save(&self.directory)
    }

    /// The VMM and the file server.
    pub(super) fn processes(&self) -> (Option<Arc<Jailed>>, Option<Arc<Jailed>>) {
        (self.vmm.clone(), self.fs_server.clone())
    }

    /// Kills the pod's processes.
    pub(super) fn kill(&self) {
        for process in self.vmm.iter().chain(&self.fs_server) {
            process.child.kill();
        }
    }

    /// Ends the VMM alone, so that another can take its place. Tells how it ended, if it did so by itself.
    pub(super) async fn end_vmm(&mut self) -> Option<Ended> {
        let vmm = self.vmm.take()?;
        let ended = tokio::time::timeout(OWN_END, vmm.child.wait()).await.ok().flatten();
        if ended.is_none() {
            vmm.child.kill();
            reap("VMM", &vmm).await;
        }
        ended
    }

    /// The end of the guest's console.
    pub(super) fn console_tail(&self) -> String {
        let console =
            self.console.as_ref().map(|tail| tail.last_lines(QUOTED.0, QUOTED.1)).unwrap_or_default();
        if console.is_empty() { "none".to_owned() } else { console }
    }

    /// All that is kept of what the processes and the console said.
    pub(super) fn last_words(&self) -> String {
        let sources = [
            ("VMM", self.vmm.as_ref().map(|process| process.stderr.all())),
            ("file server", self.fs_server.as_ref().map(|process| process.stderr.all())),
            ("guest console", self.console.as_ref().map(Tail::all)),
        ];
        let kept = sources.into_iter().filter_map(|(name, text)| Some((name, text?)));
        kept.filter(|(_, text)| !text.is_empty()).map(|(name, text)| format!("== {name}\n{text}\n")).collect()
    }

    /// Adds what the processes and the console said to the reason of an end that needs explaining.
    pub(super) fn explain_end(&self, mut reason: String) -> String {
        let sources = [
            ("VMM", self.vmm.as_ref().map(|process| process.stderr.last_lines(QUOTED.0, QUOTED.1))),
            (
                "file server",
                self.fs_server.as_ref().map(|process| process.stderr.last_lines(QUOTED.0, QUOTED.1)),
            ),
            ("guest console", self.console.as_ref().map(|console| console.last_lines(QUOTED.0, QUOTED.1))),
        ];
        for (name, text) in sources {
            if let Some(text) = text.filter(|text| !text.is_empty()) {
                reason.push_str(&format!("; {name}: {text}"));
            }
        }
        reason
    }

    /// Replaces the sight of a closed socket by what the process behind it said.
    pub(super) fn explain(&self, error: PodError) -> PodError {
        match error {
            PodError::Machine(MachineError::Gone) => {
                PodError::Dead(self.explain_end("the VMM ended before it had booted the guest".to_owned()))
            }
            other => other,
        }
    }

    /// Releases everything, in reverse order. Idempotent. Failures are logged: nobody could do anything about them, and
    /// the rest must still be released.
    pub(super) async fn release(&mut self) {
        if std::mem::replace(&mut self.released, true) {
            return;
        }
        self.kill();
        for (name, process) in [("VMM", self.vmm.take()), ("file server", self.fs_server.take())] {
            if let Some(process) = process {
                reap(name, &process).await;
            }
        }
        if let Some(network) = self.network.take() {
            network.release().await;
        }
        // Closes the namespace with all its mounts.
        self.tree = None;
        if let Some(path) = self.state.cgroup.take() {
            let parents = std::mem::take(&mut self.state.cgroup_parents);
            let removal = tokio::task::spawn_blocking(move || {
                log_failure("the pod's cgroup stays", cgroup::remove(&path, CGROUP_LIMIT));
                cgroup::remove_empty(&parents);
            });
            let _ = removal.await;
        }
        match fs::remove_dir_all(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                log::error!("can't remove {}: {error}", self.directory.display());
            }
            _ => {}
        }
    }
}

/// Waits for a killed process.
async fn reap(name: &str, process: &Jailed) {
    match tokio::time::timeout(KILL_LIMIT, process.child.wait()).await {
        Ok(Some(Ended::Signal(libc::SIGSYS))) => {
            log::error!("the {name} was killed by its seccomp filter: please report this");
        }
        Ok(_) => {}
        Err(_) => {
            log::error!("the {name} (process {}) was killed but does not end", process.id().pid)
        }
    }
}
