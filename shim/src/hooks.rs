//! Hooks of a container that run on the host (runtime specification, "POSIX-platform Hooks").
//!
//! They name programs of whoever administers the host, and are how `dockerd` and `nerdctl` get at a container's network: they
//! hear the id of a process whose network namespace is the pod's, and put an interface into it. What is to be run later is
//! written into the bundle before the first one runs, so that `poststop` follows whatever is killed when.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::error::{Classify, Code, chain, untrusted};
use crate::host::process::{ProcessId, wait_ended};

/// How long a hook may take that names no limit. containerd's callers wait ten seconds and more.
const USUAL_LIMIT: Duration = Duration::from_secs(10);

/// The most that a hook can ask for.
const LONGEST_LIMIT: Duration = Duration::from_secs(120);

/// How much of what a failing hook said is passed on, bytes.
const QUOTED: usize = 1024;

/// The record in a container's bundle.
const FILE: &str = "bulkhead-hooks.json";

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// The pod's namespaces exist (deprecated, and what Docker uses).
    Prestart,
    /// The pod's namespaces exist.
    CreateRuntime,
    /// The container's program runs.
    Poststart,
    /// The container is gone.
    Poststop,
}

impl Moment {
    fn name(self) -> &'static str {
        match self {
            Moment::Prestart => "prestart",
            Moment::CreateRuntime => "createRuntime",
            Moment::Poststart => "poststart",
            Moment::Poststop => "poststop",
        }
    }
}

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HookError {
    /// It can't be run.
    #[error("can't run the {moment} hook {path}")]
    Start {
        /// When it was to run.
        moment: &'static str,
        /// Its program.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It failed.
    #[error("the {moment} hook {path} {ended}{said}")]
    Failed {
        /// When it ran.
        moment: &'static str,
        /// Its program.
        path: PathBuf,
        /// How it ended.
        ended: String,
        /// What it said.
        said: String,
    },
    /// What runs later can't be kept.
    #[error("can't record the container's hooks in {path}")]
    Record {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Classify for HookError {
    fn code(&self) -> Code {
        Code::FAILED_PRECONDITION
    }
}

/// The hooks of one container, and what they hear of it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct HostHooks {
    id: String,
    bundle: PathBuf,
    version: String,
    annotations: HashMap<String, String>,
    /// `prestart` and `createRuntime` in the order in which they run.
    #[serde(skip)]
    create: Vec<(Moment, Hook)>,
    poststart: Vec<Hook>,
    poststop: Vec<Hook>,
}

#[allow(deprecated, reason = "Docker has no other hook but prestart")]
fn of_creation(hooks: &oci_spec::runtime::Hooks) -> Vec<(Moment, Hook)> {
    let prestart = hooks.prestart().iter().flatten().map(|hook| (Moment::Prestart, hook.clone()));
    let runtime = hooks.create_runtime().iter().flatten().map(|hook| (Moment::CreateRuntime, hook.clone()));
    prestart.chain(runtime).collect()
}

impl HostHooks {
    /// Those of a specification, if it has any for the host.
    pub(crate) fn of(spec: &Spec, id: &str, bundle: &Path) -> Option<HostHooks> {
        let hooks = spec.hooks().as_ref()?;
        let list = |hooks: &Option<Vec<Hook>>| hooks.clone().unwrap_or_default();
        let all = HostHooks {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            version: spec.version().clone(),
            annotations: spec.annotations().clone().unwrap_or_default(),
            create: of_creation(hooks),
            poststart: list(hooks.poststart()),
            poststop: list(hooks.poststop()),
        };
        (!all.create.is_empty() || !all.poststart.is_empty() || !all.poststop.is_empty()).then_some(all)
    }

    /// Runs those of the creation; `pid` is a process in the pod's network namespace. From here on [`finish`] has to follow.
    pub(crate) async fn create(&self, pid: u32) -> Result<(), HookError> {
        let path = self.bundle.join(FILE);
        let record = serde_json::to_vec(self).map_err(io::Error::other);
        record
            .and_then(|record| fs::write(&path, record))
            .map_err(|source| HookError::Record { path, source })?;
        let (hooks, state) = (self.create.clone(), self.state("creating", Some(pid)));
        let bundle = self.bundle.clone();
        let running = tokio::task::spawn_blocking(move || {
            hooks.iter().try_for_each(|(moment, hook)| run(*moment, hook, &state, &bundle, LONGEST_LIMIT))
        });
        running.await.unwrap_or(Ok(()))
    }

    fn state(&self, status: &str, pid: Option<u32>) -> Vec<u8> {
        let mut state = json!({
            "ociVersion": self.version,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if let Some(pid) = pid {
            state["pid"] = pid.into();
        }
        state.to_string().into_bytes()
    }

    fn load(bundle: &Path) -> Option<HostHooks> {
        serde_json::from_slice(&fs::read(bundle.join(FILE)).ok()?).ok()
    }

    /// One that fails is said, and changes nothing.
    fn run_all(&self, moment: Moment, hooks: &[Hook], state: &[u8], limit: Duration) {
        let deadline = Instant::now() + limit;
        for hook in hooks {
            let left = deadline.saturating_duration_since(Instant::now());
            if let Err(error) = run(moment, hook, state, &self.bundle, left) {
                log::warn!("container {}: {}", self.id, chain(&error));
            }
        }
    }
}

/// Whether the container has any hooks that run on the host.
pub(crate) fn are_recorded(bundle: &Path) -> bool {
    bundle.join(FILE).exists()
}

/// Runs the hooks of a container that has been started.
pub(crate) async fn started(bundle: &Path, pid: u32) {
    let Some(hooks) = HostHooks::load(bundle).filter(|hooks| !hooks.poststart.is_empty()) else { return };
    let running = tokio::task::spawn_blocking(move || {
        hooks.run_all(Moment::Poststart, &hooks.poststart, &hooks.state("running", Some(pid)), LONGEST_LIMIT);
    });
    let _ = running.await;
}

/// Runs the hooks of a container that is gone, as far as its creation got; once.
pub(crate) async fn finish(bundle: &Path) {
    // Next to no container has any: nothing is started for a file that is not there.
    if HostHooks::load(bundle).is_none() {
        return;
    }
    let bundle = bundle.to_owned();
    let _ = tokio::task::spawn_blocking(move || finish_within(&bundle, LONGEST_LIMIT)).await;
}

/// The same without a runtime, and within a limit.
pub(crate) fn finish_within(bundle: &Path, limit: Duration) {
    let Some(hooks) = HostHooks::load(bundle) else { return };
    hooks.run_all(Moment::Poststop, &hooks.poststop, &hooks.state("stopped", None), limit);
    if let Err(error) = fs::remove_file(bundle.join(FILE)) {
        log::warn!("the record of the hooks of {} stays: {error}", hooks.id);
    }
}

/// Runs a hook to its end.
fn run(moment: Moment, hook: &Hook, state: &[u8], bundle: &Path, longest: Duration) -> Result<(), HookError> {
    let moment = moment.name();
    let asked = hook.timeout().and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    let limit = asked.map_or(USUAL_LIMIT, Duration::from_secs).min(longest);
    let mut output = None;
    let ended = execute(hook, state, bundle, limit, &mut output);
    let failed = |ended: String, output: Option<File>| {
        let said = output.map(last_words).filter(|said| !said.is_empty());
        let said = said.map(|said| format!(": {said}")).unwrap_or_default();
        HookError::Failed { moment, path: hook.path().clone(), ended, said }
    };
    match ended {
        Ok(Some(status)) if status.success() => Ok(()),
        Ok(Some(status)) => Err(failed(
            match (status.code(), status.signal()) {
                (Some(code), _) => format!("exited with code {code}"),
                (None, signal) => format!("was killed by signal {}", signal.unwrap_or_default()),
            },
            output,
        )),
        Ok(None) => {
            Err(failed(format!("did not end within {} s and was killed", limit.as_secs_f32()), output))
        }
        Err(source) => Err(HookError::Start { moment, path: hook.path().clone(), source }),
    }
}

/// Gives how it ended, or nothing if it had to be killed. `output` is what it writes to.
fn execute(
    hook: &Hook,
    state: &[u8],
    bundle: &Path,
    limit: Duration,
    output: &mut Option<File>,
) -> io::Result<Option<ExitStatus>> {
    // Files rather than pipes: nobody has to feed them, and what a hook leaves running in the background holds nothing up.
    let file =
        |name: &CStr| memfd_create(name, MFdFlags::MFD_CLOEXEC).map(File::from).map_err(io::Error::from);
    let mut input = file(c"hook-state")?;
    input.write_all(state)?;
    input.rewind()?;
    let said = output.insert(file(c"hook-output")?);
    let mut command = Command::new(hook.path());
    if let Some((name, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.arg0(name).args(arguments);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable.as_str(), ""));
        command.env(name, value);
    }
    let mut child = command
        .current_dir(bundle)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(said.try_clone()?))
        .stderr(Stdio::from(said.try_clone()?))
        .process_group(0)
        .spawn()?;
    // Ours protects the shim and is inherited.
    let _ = fs::write(format!("/proc/{}/oom_score_adj", child.id()), "0");
    // It is our child and not waited for yet: the number is still its own.
    let pid = i32::try_from(child.id()).unwrap_or_default();
    let has_ended = match ProcessId::of(pid).and_then(|id| id.open()) {
        Ok(Some(pidfd)) => wait_ended(pidfd.as_fd(), limit),
        // It has ended already.
        Ok(None) => true,
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            return Err(error);
        }
    };
    if !has_ended {
        // With all that it has started and not let go of.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
    }
    let status = child.wait()?;
    Ok(has_ended.then_some(status))
}

fn last_words(mut output: File) -> String {
    let length = output.metadata().map(|metadata| metadata.len()).unwrap_or(0);
    let mut bytes = Vec::new();
    let start = length.saturating_sub(QUOTED as u64);
    let read =
        output.seek(SeekFrom::Start(start)).and_then(|_| output.take(QUOTED as u64).read_to_end(&mut bytes));
    match read {
        Ok(_) => untrusted(&String::from_utf8_lossy(&bytes), QUOTED),
        Err(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    struct Bundle(TempDir);

    impl Bundle {
        fn new() -> Bundle {
            Bundle(tempfile::tempdir().unwrap())
        }

        fn hooks(&self, hooks: serde_json::Value) -> Option<HostHooks> {
            let spec = json!({"ociVersion": "1.2.1", "annotations": {"a": "b"}, "hooks": hooks});
            HostHooks::of(&serde_json::from_value(spec).unwrap(), "c1", self.0.path())
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.path().join(name)).unwrap_or_default()
        }
    }

    fn shell(script: &str) -> serde_json::Value {
        json!({"path": "/bin/sh", "args": ["hook", "-c", script], "env": ["WORD=from the hook", "PATH=/usr/bin:/bin"]})
    }

    #[tokio::test]
    async fn hooks_run_in_order_and_hear_of_the_container() {
        let bundle = Bundle::new();
        let hooks = bundle.hooks(json!({
            "createRuntime": [shell("echo $WORD >>order; cat >state")],
            "prestart": [shell("echo first; echo prestart $0 $HOME >>order")],
            "poststart": [shell("echo poststart >>order")],
            "poststop": [shell("echo poststop >>order; cat >stopped"), shell("exit 1"), shell("echo last >>order")],
        }));
        let hooks = hooks.unwrap();
        hooks.create(42).await.unwrap();
        started(bundle.0.path(), 42).await;
        finish(bundle.0.path()).await;
        // Once is enough.
        finish(bundle.0.path()).await;
        assert_eq!(bundle.read("order"), "prestart hook\nfrom the hook\npoststart\npoststop\nlast\n");
        let state: serde_json::Value = serde_json::from_str(&bundle.read("state")).unwrap();
        let expected = json!({"ociVersion": "1.2.1", "id": "c1", "status": "creating", "pid": 42, "bundle": bundle.0.path(),
                              "annotations": {"a": "b"}});
        assert_eq!(state, expected);
        let state: serde_json::Value = serde_json::from_str(&bundle.read("stopped")).unwrap();
        assert_eq!((&state["status"], state.get("pid")), (&json!("stopped"), None));
    }

    #[tokio::test]
    async fn a_hook_that_fails_ends_the_creation_with_its_words() {
        let bundle = Bundle::new();
        let hooks = bundle.hooks(json!({
            "prestart": [shell("echo no network left >&2; exit 3"), shell("echo reached >reached")],
            "poststop": [shell("echo poststop >stopped")],
        }));
        let error = chain(&hooks.unwrap().create(1).await.unwrap_err());
        for words in ["prestart", "/bin/sh", "code 3", "no network left"] {
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(bundle.read("reached"), "");
        finish(bundle.0.path()).await;
        assert_eq!(bundle.read("stopped"), "poststop\n");

        let missing = bundle.hooks(json!({"createRuntime": [{"path": "/nonexistent/hook"}]})).unwrap();
        let error = chain(&missing.create(1).await.unwrap_err());
        assert!(error.contains("createRuntime hook /nonexistent/hook"), "{error}");
    }

    #[tokio::test]
    async fn a_hook_that_hangs_is_killed_with_what_it_started() {
        let bundle = Bundle::new();
        let mut hook = shell("sleep 1000 & echo $! >pid; echo waiting; wait");
        hook["timeout"] = 1.into();
        let error = chain(&bundle.hooks(json!({"prestart": [hook]})).unwrap().create(1).await.unwrap_err());
        assert!(error.contains("within 1 s") && error.contains("waiting"), "{error}");
        let pid: i32 = bundle.read("pid").trim().parse().unwrap();
        // On a busy machine what was killed takes a while to be gone.
        let stat = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let is_gone = |stat: &str| stat.is_empty() || stat.contains(") Z ");
        let deadline = Instant::now() + Duration::from_secs(5);
        while !is_gone(&stat()) && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let stat = stat();
        assert!(is_gone(&stat), "{stat}");
    }

    #[tokio::test]
    async fn what_a_hook_leaves_in_the_background_holds_nothing_up() {
        let bundle = Bundle::new();
        let started = Instant::now();
        let hooks = bundle.hooks(json!({"prestart": [shell("sleep 5 & exit 0")]})).unwrap();
        hooks.create(1).await.unwrap();
        assert!(started.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn a_container_without_hooks_for_the_host_has_none() {
        let bundle = Bundle::new();
        assert!(bundle.hooks(json!({"startContainer": [shell("true")], "prestart": []})).is_none());
        finish_within(bundle.0.path(), Duration::ZERO);
    }
}
