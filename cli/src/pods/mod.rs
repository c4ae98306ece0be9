//! `bulkhead ps`, `logs` and `exec`: the pods of this node, found by the shims that serve them and what those keep on disk.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bulkhead_shim::cli::SERVE;
use bulkhead_shim::host::process::ProcessId;
use bulkhead_shim::operator::{self, AskError, Method};
use bulkhead_shim::pod::state::{self, State};
use serde::Serialize;

const SHIM: &str = "containerd-shim-bulkhead-v1";

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Pod {
    /// The id of its sandbox, or of its only container.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// Kubernetes' namespace and name of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How it is.
    pub state: PodState,
    /// The shim's process id.
    pub shim: i32,
    /// The VMM's process id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vmm: Option<i32>,
    /// What its processes have in memory that no other process shares, and their part of what they share, bytes.
    pub memory: u64,
    /// Seconds since its VMM was started.
    pub uptime: u64,
    /// The address that the shim serves at.
    pub address: String,
}

/// How a pod is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PodState {
    /// There is no virtual machine yet.
    Starting,
    /// The virtual machine runs.
    Running,
    /// The virtual machine has ended.
    Dead,
}

impl PodState {
    fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Dead => "dead",
        }
    }
}

/// A pod that can't be picked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PodsError {
    /// None, or several.
    #[error(
        "{count} pods of this node have an id or a name that begins with {text:?}; bulkhead ps shows them"
    )]
    Ambiguous {
        /// What was given.
        text: String,
        /// How many.
        count: usize,
    },
    /// The shim has no answer.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// Nothing can be printed.
    #[error("can't write to standard output")]
    Output(#[from] io::Error),
}

/// Every pod of this node.
pub(crate) fn running() -> Vec<Pod> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pods: Vec<Pod> =
        entries.filter_map(|entry| pod(entry.file_name().to_str()?.parse().ok()?)).collect();
    pods.sort_by(|one, other| (&one.namespace, &one.id).cmp(&(&other.namespace, &other.id)));
    pods
}

/// The pod whose id, or name, begins with a text.
///
/// # Errors
/// When there is none, or several.
pub(crate) fn pick(text: &str) -> Result<Pod, PodsError> {
    pick_from(running(), text)
}

fn pick_from(mut pods: Vec<Pod>, text: &str) -> Result<Pod, PodsError> {
    let fits = |pod: &Pod| {
        let name = pod.name.as_deref().unwrap_or_default();
        pod.id.starts_with(text) || name.starts_with(text) || name.split('/').nth(1) == Some(text)
    };
    let exact = |pod: &Pod| pod.id == text;
    if pods.iter().any(exact) {
        pods.retain(exact);
    } else {
        pods.retain(fits);
    }
    match (pods.len(), pods.pop()) {
        (1, Some(pod)) => Ok(pod),
        (count, _) => Err(PodsError::Ambiguous { text: text.to_owned(), count }),
    }
}

/// What a shim's arguments say.
#[derive(Debug, Default, PartialEq, Eq)]
struct Server {
    namespace: String,
    id: String,
    bundle: PathBuf,
    address: String,
}

impl Server {
    /// Reads the arguments of a process; `None` if it is no shim that serves a pod.
    fn parse(arguments: &[u8]) -> Option<Self> {
        let arguments: Vec<&str> = arguments
            .split(|byte| *byte == 0)
            .map(|part| std::str::from_utf8(part).unwrap_or_default())
            .collect();
        let (program, rest) = arguments.split_first()?;
        if !program.ends_with(SHIM) || !rest.contains(&SERVE) {
            return None;
        }
        let value = |option: &str| {
            let position = rest.iter().position(|argument| *argument == option)?;
            rest.get(position + 1).map(|value| (*value).to_owned())
        };
        Some(Self {
            namespace: value("-namespace")?,
            id: value("-id")?,
            bundle: value("-bundle")?.into(),
            address: value("-socket")?,
        })
    }
}

/// The pod that a process serves.
fn pod(process: i32) -> Option<Pod> {
    // Anybody can call a process what they like; pods are root's.
    let arguments = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let server = Server::parse(&arguments)?;
    if std::os::unix::fs::MetadataExt::uid(&fs::metadata(format!("/proc/{process}")).ok()?) != 0 {
        return None;
    }
    let record = State::load(&server.bundle.join(state::DIRECTORY)).ok().flatten();
    let is_there = |id: &ProcessId| ProcessId::of(id.pid).is_ok_and(|now| now == *id);
    let vmm = record.as_ref().and_then(|record| record.vmm);
    // The record comes first and goes last.
    let state = match &vmm {
        None if record.is_none() => PodState::Dead,
        None => PodState::Starting,
        Some(vmm) if is_there(vmm) => PodState::Running,
        Some(_) => PodState::Dead,
    };
    let vmm = vmm.filter(|_| state == PodState::Running);
    let processes =
        [Some(process), vmm.map(|vmm| vmm.pid), record.and_then(|record| Some(record.fs_server?.pid))];
    Some(Pod {
        name: name(&server.bundle),
        id: server.id,
        namespace: server.namespace,
        state,
        shim: process,
        vmm: vmm.map(|vmm| vmm.pid),
        memory: processes.into_iter().flatten().map(proportional_memory).sum(),
        uptime: vmm.map_or(0, |vmm| age(vmm.start_time)),
        address: server.address,
    })
}

/// The pod's namespace and name, from the annotations of containerd's CRI plugin.
fn name(bundle: &Path) -> Option<String> {
    let text = fs::read(bundle.join("config.json")).ok()?;
    let config: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let annotation = |key: &str| config["annotations"][key].as_str();
    let namespace = annotation("io.kubernetes.cri.sandbox-namespace")?;
    Some(format!("{namespace}/{}", annotation("io.kubernetes.cri.sandbox-name")?))
}

fn proportional_memory(process: i32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or_default() * 1024
}

/// Seconds since a moment in clock ticks after the host's start.
fn age(start_time: u64) -> u64 {
    // The kernel's ABI on x86-64, whatever the kernel's own clock.
    const TICKS_PER_SECOND: u64 = 100;
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let now = text.split('.').next().and_then(|seconds| seconds.parse::<u64>().ok()).unwrap_or_default();
    now.saturating_sub(start_time / TICKS_PER_SECOND)
}

/// Asks a pod's shim, and prints the answer.
///
/// # Errors
/// When there is no such pod, or no answer.
pub(crate) fn ask(pod: &str, method: Method, question: &str, out: &mut impl Write) -> Result<(), PodsError> {
    let answer = operator::ask(&pick(pod)?.address, method, question)?;
    out.write_all(answer.as_bytes())?;
    if !answer.is_empty() && !answer.ends_with('\n') {
        out.write_all(b"\n")?;
    }
    Ok(())
}

/// Prints the pods.
///
/// # Errors
/// When they can't be printed.
pub(crate) fn list(json: bool, out: &mut impl Write) -> Result<(), PodsError> {
    let pods = running();
    if json {
        writeln!(out, "{:#}", serde_json::json!(pods))?;
        return Ok(());
    }
    let header = ["POD", "NAME", "NAMESPACE", "STATE", "VMM", "MEMORY", "UPTIME"].map(str::to_owned);
    let rows: Vec<[String; 7]> = [header].into_iter().chain(pods.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..7).map(width).collect();
    for row in &rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

fn row(pod: &Pod) -> [String; 7] {
    [
        pod.id.chars().take(13).collect(),
        pod.name.clone().unwrap_or_else(|| "-".to_owned()),
        pod.namespace.clone(),
        pod.state.name().to_owned(),
        pod.vmm.map_or_else(|| "-".to_owned(), |pid| pid.to_string()),
        format!("{:.1} MiB", pod.memory as f64 / f64::from(1 << 20)),
        duration(pod.uptime),
    ]
}

fn duration(seconds: u64) -> String {
    let whole = Duration::from_secs(seconds).as_secs();
    match (whole / 86400, whole / 3600 % 24, whole / 60 % 60, whole % 60) {
        (0, 0, 0, seconds) => format!("{seconds}s"),
        (0, 0, minutes, seconds) => format!("{minutes}m{seconds}s"),
        (0, hours, minutes, _) => format!("{hours}h{minutes}m"),
        (days, hours, ..) => format!("{days}d{hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str, name: Option<&str>) -> Pod {
        Pod {
            id: id.to_owned(),
            namespace: "k8s.io".to_owned(),
            name: name.map(str::to_owned),
            state: PodState::Running,
            shim: 1,
            vmm: Some(2),
            memory: 6 << 20,
            uptime: 3700,
            address: String::new(),
        }
    }

    #[test]
    fn servers_are_known_by_their_arguments() {
        let arguments =
            b"/usr/local/bin/containerd-shim-bulkhead-v1\0-namespace\0k8s.io\0-id\0abc\0-address\0/c.sock\0-bundle\0/run/b\0-socket\0unix:///s\0serve\0";
        assert_eq!(
            Server::parse(arguments),
            Some(Server {
                namespace: "k8s.io".into(),
                id: "abc".into(),
                bundle: "/run/b".into(),
                address: "unix:///s".into()
            })
        );
        let other = b"/usr/bin/containerd-shim-runc-v2\0-namespace\0k8s.io\0-id\0abc\0";
        assert_eq!(Server::parse(other), None);
        assert_eq!(Server::parse(b"containerd-shim-bulkhead-v1\0-id\0abc\0delete\0"), None);
        assert_eq!(Server::parse(b""), None);
    }

    #[test]
    fn a_pod_is_picked_by_the_beginning_of_its_id_or_its_name() {
        let pods =
            || vec![pod("abc1", Some("default/web")), pod("abc2", Some("default/db")), pod("abc", None)];
        assert_eq!(pick_from(pods(), "abc2").unwrap().id, "abc2");
        assert_eq!(pick_from(pods(), "web").unwrap().id, "abc1");
        assert_eq!(pick_from(pods(), "default/d").unwrap().id, "abc2");
        assert_eq!(pick_from(pods(), "abc").unwrap().id, "abc", "an id that is another's beginning");
        for (text, count) in [("ab", 3), ("x", 0), ("default/", 2)] {
            let error = pick_from(pods(), text).unwrap_err().to_string();
            assert!(error.starts_with(&count.to_string()), "{text}: {error}");
        }
    }

    #[test]
    fn times_are_short() {
        for (seconds, expected) in [(5, "5s"), (65, "1m5s"), (3700, "1h1m"), (90_000, "1d1h")] {
            assert_eq!(duration(seconds), expected);
        }
    }
}
