//! Whether anything is left of a pod: the node's state before and after.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cri;
use crate::fail;
use crate::failure::Outcome;
use crate::node;
use crate::process::eventually;

/// How long what is being released may take to be gone.
const LIMIT: Duration = Duration::from_secs(5);

/// Directories outside our own ones where a shim, or containerd for it, puts something.
const WATCHED: [&str; 3] = ["/run/containerd", "/run/bulkhead", "/var/lib/bulkhead"];

/// Directories that the first container makes and that stay for the next ones.
const COMMON: [&str; 10] = [
    "/run/containerd/s",
    "/run/containerd/fifo",
    "/run/containerd/runc",
    "/run/containerd/runc/bulkhead-test",
    "/run/containerd/runc/default",
    "/run/containerd/runc/k8s.io",
    "/run/containerd/runc/moby",
    "io.containerd.runtime.v2.task/default",
    "io.containerd.runtime.v2.task/moby",
    "io.containerd.sandbox.controller.v1.shim/k8s.io",
];

/// What a node gets with its first pod and keeps: the namespaces that pods start from.
const KEPT: [&str; 4] =
    ["/run/bulkhead", "/run/bulkhead/small", "/run/bulkhead/small/1.mnt", "/run/bulkhead/small/1.net"];

/// Templates stay for the pods to come.
const TEMPLATES: &str = "/var/lib/bulkhead/templates";

/// What begins like this among them is on the way in or out.
const HALF_MADE: [&str; 2] = [".new-", ".old-"];

/// Control groups that the first container makes, and the harness removes at its end.
const COMMON_GROUPS: [&str; 5] = ["default", "bulkhead-test", "docker", "k8s.io", cri::CGROUP];

/// Everything on the node that a pod could leave behind, as lines for a person.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    directories: Vec<PathBuf>,
    items: BTreeSet<String>,
}

impl Snapshot {
    /// The node as it is: processes, mounts, interfaces, sockets, control groups, and what is in `directories`.
    pub fn take(directories: &[&Path]) -> Self {
        let directories: Vec<PathBuf> =
            directories.iter().copied().chain(WATCHED.iter().map(Path::new)).map(Path::to_owned).collect();
        let mut items = BTreeSet::new();
        // A zombie holds nothing, and whoever has to reap it may have other things to do.
        let processes = node::processes().into_iter().filter(|process| process.state != 'Z');
        // containerd itself is the harness's to start and end.
        let processes = processes.filter(|process| process.name != "containerd");
        items.extend(processes.map(|p| format!("process {} {} {}", p.pid, p.name, p.command)));
        let mounts = node::mount_points().into_iter().filter(|path| !is_kept(path));
        items.extend(mounts.map(|path| format!("mount {}", path.display())));
        items.extend(node::interfaces().iter().map(|name| format!("network interface {name}")));
        let sockets = node::unix_sockets().into_iter().filter(|path| !path.ends_with(DOCKER_SOCKET));
        items.extend(sockets.map(|path| format!("socket {path}")));
        let groups = node::control_groups().into_iter();
        let groups = groups.filter(|path| !COMMON_GROUPS.iter().any(|name| path.ends_with(name)));
        items.extend(groups.map(|path| format!("control group {}", path.display())));
        let files = directories.iter().flat_map(|directory| node::tree(directory));
        let files =
            files.filter(|path| !COMMON.iter().any(|common| path.ends_with(common.trim_start_matches('/'))));
        let files = files.filter(|path| !stays(path) && !is_kept(path));
        items.extend(files.map(|path| format!("file {}", path.display())));
        Self { directories, items }
    }

    /// What is there now that was not there then.
    pub(crate) fn since(&self) -> Vec<String> {
        let directories: Vec<&Path> = self.directories.iter().map(PathBuf::as_path).collect();
        Self::take(&directories).items.difference(&self.items).cloned().collect()
    }

    /// How many things of each kind the snapshot has, for evidence.
    pub fn summary(&self) -> String {
        let count = |kind: &str| self.items.iter().filter(|item| item.starts_with(kind)).count();
        format!(
            "processes {}, mounts {}, interfaces {}, sockets {}, control groups {}, files {}",
            count("process "),
            count("mount "),
            count("network interface "),
            count("socket "),
            count("control group "),
            count("file ")
        )
    }

    /// Waits until nothing new is left. Whoever has a template made has to wait for its maker.
    ///
    /// # Errors
    /// What is still there after [`LIMIT`], and a template's maker that is there at all: it would end by itself within that
    /// time.
    pub fn expect_nothing_left(&self) -> Outcome {
        if let Some(maker) = self.since().iter().find(|item| node::makes_template(item)) {
            fail!("a template is still being made: {maker}")
        }
        eventually("everything released", LIMIT, || match self.since() {
            left if left.is_empty() => Ok(()),
            left => fail!("left behind: {}", left.join("; ")),
        })
    }
}

/// Docker's name for the node's network namespace, which it makes when first asked for it.
const DOCKERS: &str = "exec/netns/default";

/// Docker's connections to its clients are its own to end.
const DOCKER_SOCKET: &str = "/docker.sock";

/// Whether a node keeps what is there.
fn is_kept(path: &Path) -> bool {
    KEPT.iter().any(|kept| path == Path::new(kept)) || path.ends_with(DOCKERS)
}

/// Whether a file is a template's, or the store's own.
fn stays(path: &Path) -> bool {
    match path.strip_prefix(TEMPLATES).map(|inside| inside.to_string_lossy().into_owned()) {
        Ok(inside) => !HALF_MADE.iter().any(|prefix| inside.starts_with(prefix)),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::ensure;

    #[test]
    fn half_made_templates_do_not_stay() {
        assert!(stays(Path::new("/var/lib/bulkhead/templates")));
        assert!(stays(Path::new("/var/lib/bulkhead/templates/3fd01c/memory")));
        assert!(!stays(Path::new("/var/lib/bulkhead/templates/.new-1-0/memory")));
        assert!(!stays(Path::new("/var/lib/bulkhead/other")));
    }

    /// A process is there before the kernel says what it is.
    fn has_arguments(child: &Child) -> Outcome {
        eventually("the process has its arguments", LIMIT, || {
            let process = node::process(child.id() as i32);
            ensure!(process.is_some_and(|process| process.command.contains(' ')), "it has none");
            Ok(())
        })
    }

    #[test]
    fn a_maker_is_not_waited_for() {
        let before = Snapshot::take(&[]);
        let mut command = Command::new("sh");
        let mut child =
            command.args(["-c", "read line", "make-template"]).stdin(Stdio::piped()).spawn().unwrap();
        let seen = has_arguments(&child);
        let result = before.expect_nothing_left();
        child.kill().unwrap();
        child.wait().unwrap();
        seen.unwrap();
        assert!(result.unwrap_err().0.contains("still being made"));
    }

    #[test]
    fn a_file_and_a_process_are_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let before = Snapshot::take(&[directory.path()]);
        std::fs::write(directory.path().join("left"), "").unwrap();
        let mut child = Command::new("sleep").arg("61").spawn().unwrap();
        let seen = has_arguments(&child);
        let left = before.since();
        child.kill().unwrap();
        child.wait().unwrap();
        seen.unwrap();
        assert!(left.iter().any(|item| item.ends_with("/left")), "{left:?}");
        assert!(
            left.iter().any(|item| item.starts_with("process ") && item.ends_with("sleep 61")),
            "{left:?}"
        );
    }
}
