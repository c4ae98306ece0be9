//! `delete`: cleans up after a shim that is gone, with no memory but what is in the bundle, and within five seconds.
//!
//! containerd calls it for every container whose connection ended: also when all is long cleaned up, and for a container
//! of a pod that lives on. Only the bundle that the pod was made for holds the pod's record, so only its deletion ends
//! the pod.

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use containerd_shim::Flags;
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message;

use super::start::{ADDRESS_FILE, socket_path};
use crate::error::chain;
use crate::events::timestamp;
use crate::hooks;
use crate::host::cgroup;
use crate::host::process::{ProcessId, signal, wait_ended};
use crate::net::{Namespace, release};
use crate::pod::now_ns;
use crate::pod::state::{self, ExitRecord, State};

/// All killed processes together are gone within this time.
const KILL_LIMIT: Duration = Duration::from_secs(3);

/// containerd waits so long, less what its own steps take.
const LIMIT: Duration = Duration::from_millis(4500);

/// What hooks get in any case.
const HOOKS_LEAST: Duration = Duration::from_millis(500);

const CGROUP_LIMIT: Duration = Duration::from_secs(1);

const NETWORK_LIMIT: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub(super) enum DeleteError {
    #[error("can't find the bundle")]
    Bundle(#[source] io::Error),
    #[error("can't clean up: {0}")]
    Incomplete(String),
    #[error("can't write the answer")]
    Answer(#[source] io::Error),
}

pub(super) fn run(flags: &Flags) -> Result<(), DeleteError> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().map_err(DeleteError::Bundle)?
    } else {
        PathBuf::from(&flags.bundle)
    };
    let started = Instant::now();
    let exit = ExitRecord::load(&bundle);
    let cleaned = clean_up(&bundle);
    hooks::finish_within(&bundle, LIMIT.saturating_sub(started.elapsed()).max(HOOKS_LEAST));
    cleaned?;
    // Whoever died without a record was killed with its pod.
    let exit = exit.unwrap_or(ExitRecord {
        pid: 0,
        status: 128 + libc::SIGKILL.unsigned_abs(),
        exited_at_ns: now_ns(),
    });
    let response = DeleteResponse {
        pid: exit.pid,
        exit_status: exit.status,
        exited_at: timestamp(exit.exited_at_ns),
        ..Default::default()
    };
    let mut stdout = io::stdout().lock();
    response
        .write_to_bytes()
        .map_err(io::Error::other)
        .and_then(|bytes| stdout.write_all(&bytes))
        .and_then(|()| stdout.flush())
        .map_err(DeleteError::Answer)
}

/// Ends the pod that the bundle holds the record of, if there is one.
fn clean_up(bundle: &Path) -> Result<(), DeleteError> {
    let directory = bundle.join(state::DIRECTORY);
    let mut failures = Vec::new();
    match State::load(&directory) {
        Ok(None) => {}
        Ok(Some(state)) => {
            end(&state, &mut failures);
            remove_socket(bundle);
        }
        Err(error) => failures.push(chain(&error)),
    }
    // Nothing is ever mounted below it in this namespace.
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            failures.push(format!("{}: {error}", directory.display()));
        }
        _ => {}
    }
    if failures.is_empty() { Ok(()) } else { Err(DeleteError::Incomplete(failures.join("; "))) }
}

fn end(state: &State, failures: &mut Vec<String>) {
    // The shim first: it would only mourn the others.
    let processes: Vec<(ProcessId, _)> = [state.shim, state.vmm, state.fs_server]
        .into_iter()
        .flatten()
        .filter_map(|id| match id.open() {
            Ok(pidfd) => pidfd.map(|pidfd| (id, pidfd)),
            Err(error) => {
                failures.push(format!("process {}: {error}", id.pid));
                None
            }
        })
        .collect();
    for (id, pidfd) in &processes {
        if let Err(errno) = signal(pidfd.as_fd(), libc::SIGKILL) {
            failures.push(format!("process {}: {errno}", id.pid));
        }
    }
    let deadline = Instant::now() + KILL_LIMIT;
    for (id, pidfd) in &processes {
        let left = deadline.saturating_duration_since(Instant::now());
        if !process_gone(pidfd, left) {
            failures.push(format!("process {} was killed but does not end", id.pid));
        }
    }
    if let Some(namespace) = state.network.as_ref().and_then(Namespace::find)
        && let Err(error) = namespace.inside_blocking(NETWORK_LIMIT, release)
    {
        failures.push(chain(&error));
    }
    if let Some(path) = &state.cgroup {
        if let Err(error) = cgroup::remove(path, CGROUP_LIMIT) {
            failures.push(chain(&error));
        }
        cgroup::remove_empty(&state.cgroup_parents);
    }
}

fn process_gone(pidfd: &impl AsFd, limit: Duration) -> bool {
    wait_ended(pidfd.as_fd(), limit)
}

fn remove_socket(bundle: &Path) {
    if let Ok(address) = fs::read_to_string(bundle.join(ADDRESS_FILE)) {
        let _ = fs::remove_file(socket_path(address.trim()));
    }
}
