//! The OCI runtime specification that every container of the benchmark gets: what `ctr run` would generate.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::client::NAMESPACE;

/// What differs between the containers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Container {
    /// The process's arguments, the program first.
    pub args: Vec<String>,
    /// A block device of the host that the container may use, at the same path.
    pub device: Option<BlockDevice>,
}

/// A block device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlockDevice {
    /// Where it is, on the host and in the container.
    pub path: PathBuf,
    /// Its major number.
    pub major: u64,
    /// Its minor number.
    pub minor: u64,
}

/// containerd's defaults since 2.0.
const CAPABILITIES: [&str; 9] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_KILL",
];

/// The specification of the container `id`, as JSON.
pub(crate) fn spec(id: &str, container: &Container) -> Value {
    let mut device_rules = vec![json!({ "allow": false, "access": "rwm" })];
    let mut devices = Vec::new();
    if let Some(device) = &container.device {
        let (major, minor) = (device.major, device.minor);
        devices.push(
            json!({ "path": device.path, "type": "b", "major": major, "minor": minor, "fileMode": 0o600 }),
        );
        device_rules
            .push(json!({ "allow": true, "type": "b", "major": major, "minor": minor, "access": "rwm" }));
    }
    json!({
        "ociVersion": "1.1.0",
        "root": { "path": "rootfs" },
        "hostname": "bench",
        "process": {
            "cwd": "/",
            "args": container.args,
            "env": ["PATH=/bin"],
            "user": { "uid": 0, "gid": 0 },
            "noNewPrivileges": true,
            "capabilities": { "bounding": CAPABILITIES, "permitted": CAPABILITIES, "effective": CAPABILITIES },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
        },
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        ],
        "linux": {
            "cgroupsPath": format!("/{NAMESPACE}/{id}"),
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" },
            ],
            "devices": devices,
            "resources": { "devices": device_rules },
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/sys/devices/virtual/powercap", "/proc/scsi",
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_made_and_allowed() {
        let device = BlockDevice { path: "/dev/loop3".into(), major: 7, minor: 3 };
        let spec = spec("a", &Container { args: vec!["x".to_owned()], device: Some(device) });
        assert_eq!(spec["linux"]["devices"][0]["path"], "/dev/loop3");
        assert_eq!(spec["linux"]["resources"]["devices"][1]["minor"], 3);
        assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], false);
        assert_eq!(spec["linux"]["cgroupsPath"], "/bulkhead-bench/a");
        assert_eq!(spec["process"]["args"], json!(["x"]));
    }
}
