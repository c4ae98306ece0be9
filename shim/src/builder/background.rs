//! Making a template beside a pod: in a process of its own, which outlives the pod but not its time.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::{BuildError, Options, build, confine};
use crate::error::chain;
use crate::host::process::{Child, ProcessId};
use crate::template::{Order, StoreError};

/// The action by which the shim runs itself.
pub(crate) const ACTION: &str = "make-template";

/// The pod that asked for the template gets this much of a start.
const DELAY: Duration = Duration::from_secs(1);

/// The process is killed after this time, seconds, whatever it waits for.
const LIFETIME: u32 = 120;

/// It yields to everybody.
const NICENESS: i32 = 10;

/// An order or a report is never near this size, bytes.
const MAX_MESSAGE: u64 = 64 * 1024;

/// How making a template went.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// It was made.
    Made { key: String, ms: u64 },
    /// There was nothing to do, or somebody else is doing it.
    Idle,
    /// There is none.
    Failed(String),
}

/// Has a template made, and logs in time how that went. Must be called in a runtime.
pub(crate) fn start(order: &Order) {
    match spawn(order) {
        Ok((child, report)) => drop(tokio::spawn(follow(child, report, order.clone()))),
        Err(error) => log::warn!("no template is made: can't start the process for it: {error}"),
    }
}

fn spawn(order: &Order) -> io::Result<(Child, pipe::Receiver)> {
    let (report, writer) = io::pipe()?;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg(ACTION)
        .env_clear()
        // Not the bundle, which is to be removed.
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(OwnedFd::from(writer))
        .stderr(Stdio::null())
        .process_group(0);
    let mut process = command.spawn()?;
    // It holds a copy of the report's end; the report would never end.
    drop(command);
    // An order fits into the empty pipe. Without the whole of it the process ends by itself.
    let sent = match process.stdin.take() {
        Some(mut stdin) => stdin.write_all(&serde_json::to_vec(order)?),
        None => Ok(()),
    };
    let id = ProcessId::of(process.id() as i32)?;
    // Not reaped yet, so its number is still its own.
    let pidfd = id.open()?.ok_or_else(|| io::Error::other("it is gone already"))?;
    sent?;
    Ok((Child::new(id, pidfd)?, pipe::Receiver::from_owned_fd(report.into())?))
}

async fn follow(child: Child, report: pipe::Receiver, order: Order) {
    let mut bytes = Vec::new();
    let read = report.take(MAX_MESSAGE).read_to_end(&mut bytes).await;
    let report = read.map_err(serde_json::Error::io).and_then(|_| serde_json::from_slice(&bytes));
    match &report {
        Ok(Report::Made { key, ms }) => log::info!("template {key} made in {ms} ms"),
        Ok(Report::Idle) => log::debug!("the template exists already, or another process makes one"),
        Ok(Report::Failed(reason)) => log::warn!("no template could be made: {reason}"),
        Err(_) => {}
    }
    let ended = child.wait().await;
    if let Err(error) = report {
        let how = ended.map_or_else(|| error.to_string(), |ended| format!("it {ended}"));
        log::warn!("no template could be made: its maker ended early: {how}");
        let _ = tokio::task::spawn_blocking(move || tidy(&order)).await;
    }
    confine::remove(child.id.pid.unsigned_abs()).await;
}

/// Removes what a maker that was killed has left half made. Who makes the next template would do it too, but that may be long after.
fn tidy(order: &Order) {
    match order.store().lock(Duration::ZERO) {
        Ok(_) | Err(StoreError::Busy(_)) => {}
        Err(error) => log::warn!("a half-made template stays until the next one is made: {}", chain(&error)),
    }
}

/// The process itself: takes an order from standard input, and reports on standard output.
pub(crate) fn run() -> io::Result<()> {
    // SAFETY: both take numbers only. The alarm's default action ends the process, and its VMM with it.
    unsafe {
        libc::alarm(LIFETIME);
        libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS);
    }
    // Ours is the shim's, which is to be spared. That it may fail is no reason not to go on.
    let _ = fs::write("/proc/self/oom_score_adj", "500");
    let mut bytes = Vec::new();
    io::stdin().take(MAX_MESSAGE).read_to_end(&mut bytes)?;
    let order: Order = serde_json::from_slice(&bytes)?;
    let options = Options { delay: DELAY, confined: true, ..Options::default() };
    let report = match build(&order, options) {
        Ok(built) => match built.took {
            Some(took) => Report::Made { key: built.key.short().to_owned(), ms: took.as_millis() as u64 },
            None => Report::Idle,
        },
        Err(BuildError::Store(StoreError::Busy(_))) => Report::Idle,
        Err(error) => Report::Failed(chain(&error)),
    };
    // The shim may be gone by now.
    let _ = io::stdout().write_all(&serde_json::to_vec(&report)?);
    Ok(())
}
