//! Hooks that run inside a container: `createContainer` when it has been made, and `startContainer` before its program.
//!
//! What runs is a program of the container, found by its path there, with the privileges that the container's own program
//! has at that point. There is no host in a guest whose programs could be run.

use std::ffi::CStr;
use std::io::{self, Read, Seek, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::json;

use super::spec::{Hook, Hooks, items};

/// How long a hook may take that names no limit, and the most that one can ask for.
const USUAL_LIMIT: Duration = Duration::from_secs(10);
const LONGEST_LIMIT: Duration = Duration::from_secs(60);

/// How much of what a failing hook said is passed on, bytes.
const QUOTED: u64 = 1024;

/// A hook that did not do its work.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum HookError {
    #[error("can't run the {kind} hook {path:?} in the container")]
    Start { kind: &'static str, path: PathBuf, source: io::Error },
    #[error("the {kind} hook {path:?} {ended}{said}")]
    Failed { kind: &'static str, path: PathBuf, ended: String, said: String },
}

/// Those of one container that run in it.
#[derive(Debug, Clone, Default)]
pub struct GuestHooks {
    create: Vec<Hook>,
    start: Vec<Hook>,
    version: String,
}

impl GuestHooks {
    /// Takes the hooks that run in the container; gives the first that doesn't, if there is one.
    pub(crate) fn new(hooks: Option<&Hooks>, version: &str) -> Result<GuestHooks, (String, String)> {
        let mut own = GuestHooks { version: version.to_owned(), ..GuestHooks::default() };
        for (kind, list) in hooks.into_iter().flatten() {
            match (kind.as_str(), items(list)) {
                (_, []) => {}
                ("createContainer", list) => own.create = list.to_vec(),
                ("startContainer", list) => own.start = list.to_vec(),
                (_, [hook, ..]) => return Err((kind.clone(), hook.path.display().to_string())),
            }
        }
        Ok(own)
    }

    /// Runs those of the creation.
    pub(crate) fn created(&self, id: &str) -> Result<(), HookError> {
        self.run_all("createContainer", &self.create, "creating", id)
    }

    /// Runs those of the start.
    pub(crate) fn starting(&self, id: &str) -> Result<(), HookError> {
        self.run_all("startContainer", &self.start, "created", id)
    }

    fn run_all(&self, kind: &'static str, hooks: &[Hook], status: &str, id: &str) -> Result<(), HookError> {
        if hooks.is_empty() {
            return Ok(());
        }
        let state = json!({
            "ociVersion": self.version,
            "id": id,
            "status": status,
            "pid": std::process::id(),
            "bundle": "/",
        });
        hooks.iter().try_for_each(|hook| run(kind, hook, state.to_string().as_bytes()))
    }
}

fn run(kind: &'static str, hook: &Hook, state: &[u8]) -> Result<(), HookError> {
    let seconds = hook.timeout.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let limit = seconds.map_or(USUAL_LIMIT, Duration::from_secs).min(LONGEST_LIMIT);
    let path = || hook.path.clone();
    let (ended, said) =
        execute(hook, state, limit).map_err(|source| HookError::Start { kind, path: path(), source })?;
    let ended = match ended {
        Some(status) if status.success() => return Ok(()),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exited with code {code}"),
            (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
        },
        None => format!("did not end within {} s and was killed", limit.as_secs()),
    };
    let said = if said.is_empty() { said } else { format!(": {said}") };
    Err(HookError::Failed { kind, path: path(), ended, said })
}

/// Gives how it ended, or nothing if it had to be killed, and the end of what it wrote.
fn execute(hook: &Hook, state: &[u8], limit: Duration) -> io::Result<(Option<ExitStatus>, String)> {
    let file = |name: &CStr| {
        memfd_create(name, MFdFlags::MFD_CLOEXEC).map(std::fs::File::from).map_err(io::Error::from)
    };
    let mut input = file(c"hook-state")?;
    input.write_all(state)?;
    input.rewind()?;
    let mut output = file(c"hook-output")?;
    let mut command = Command::new(&hook.path);
    if let Some((name, arguments)) = items(&hook.args).split_first() {
        command.arg0(name).args(arguments);
    }
    command
        .env_clear()
        .envs(items(&hook.env).iter().map(|entry| entry.split_once('=').unwrap_or((entry.as_str(), ""))));
    let mut child = command
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output.try_clone()?))
        .stderr(Stdio::from(output.try_clone()?))
        .process_group(0)
        .spawn()?;
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_micros(200);
    let mut ended = child.try_wait()?;
    while ended.is_none() && Instant::now() < deadline {
        sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
        ended = child.try_wait()?;
    }
    if ended.is_none() {
        let _ = killpg(Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX)), Signal::SIGKILL);
        child.wait()?;
    }
    output.rewind()?;
    let mut said = Vec::new();
    output.take(QUOTED).read_to_end(&mut said)?;
    Ok((ended, String::from_utf8_lossy(&said).trim().to_owned()))
}
