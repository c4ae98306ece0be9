//! A bundle as containerd makes it: a directory with `config.json`, and the mounts of the root file system.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_base::capabilities::DEFAULT;
use containerd_shim_protos::api::Mount;
use serde_json::{Value, json};

use crate::failure::{Explain, Outcome};

/// The OCI process object for a command, as `ctr` writes it.
pub(crate) fn process(command: &[&str]) -> Value {
    json!({
        "user": { "uid": 0, "gid": 0 },
        "args": command,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": capabilities(&DEFAULT),
        "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
        "noNewPrivileges": true
    })
}

/// The sets of a process with these capabilities, none of them inheritable.
pub(crate) fn capabilities(names: &[&str]) -> Value {
    json!({ "bounding": names, "effective": names, "permitted": names })
}

/// A shell script as a command.
pub(crate) fn shell(script: &str) -> Value {
    process(&["/bin/sh", "-c", script])
}

/// An OCI specification around a process, as `ctr` writes it.
pub(crate) fn spec(id: &str, process: Value) -> Value {
    json!({
        "ociVersion": "1.2.1",
        "process": process,
        "root": { "path": "rootfs" },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
              "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "cgroupsPath": format!("/bulkhead-test/{id}"),
            "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" }],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                            "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// A bind mount of the host for a specification's `mounts`.
pub(crate) fn bind(source: &Path, destination: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": "bind", "source": source, "options": options })
}

/// Adds to a list of a specification that [`spec`] has.
pub(crate) fn add(list: &mut Value, item: Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(item);
    }
}

/// A bundle directory and its writable layer.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    /// The container's id.
    pub id: String,
    /// The directory that containerd would make for it.
    pub path: PathBuf,
    /// Where writes to the root file system land.
    pub upper: PathBuf,
    /// The mounts that make the root file system.
    pub rootfs: Vec<Mount>,
}

impl Bundle {
    /// Makes a bundle below `directory` with an overlay over the directory `lower`, as the overlayfs snapshotter has it.
    ///
    /// # Errors
    /// When its files can't be made.
    pub(crate) fn new(directory: &Path, id: &str, lower: &Path, spec: &Value) -> Outcome<Self> {
        let path = directory.join("bundles").join(id);
        let layers = directory.join("layers").join(id);
        let (upper, work) = (layers.join("fs"), layers.join("work"));
        for made in [&path.join("rootfs"), &upper, &work] {
            fs::create_dir_all(made).explain(|| format!("make {}", made.display()))?;
        }
        let config = path.join("config.json");
        fs::write(&config, spec.to_string()).explain(|| format!("write {}", config.display()))?;
        let rootfs = Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options: vec![
                "index=off".into(),
                format!("workdir={}", work.display()),
                format!("upperdir={}", upper.display()),
                format!("lowerdir={}", lower.display()),
            ],
            ..Mount::default()
        };
        Ok(Self { id: id.to_owned(), path, upper, rootfs: vec![rootfs] })
    }

    /// Removes the bundle as containerd does after a delete: what the shim left mounted or running there makes it fail.
    ///
    /// # Errors
    /// What can't be removed.
    pub(crate) fn remove(&self) -> Outcome {
        for directory in [Some(self.path.as_path()), self.upper.parent()].into_iter().flatten() {
            fs::remove_dir_all(directory)
                .explain(|| format!("remove {} after the delete", directory.display()))?;
        }
        Ok(())
    }
}
