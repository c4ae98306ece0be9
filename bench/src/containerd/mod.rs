//! A containerd of our own: private root, state, sockets and configuration, gone without a trace afterwards.

pub(crate) mod client;
pub mod image;
pub(crate) mod spec;
pub(crate) mod tar;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::{Child, Command};

use crate::node::{self, processes};
use client::{Client, NAMESPACE};

/// How long containerd may take to answer after its start, and to end after it was told to.
const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(10);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The namespace of everything that comes by way of the CRI.
const CRI_NAMESPACE: &str = "k8s.io";
/// Where cgroups are.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Plugins that pods started through the container API do not need. Fewer of them start faster.
const WITHOUT_CRI: [&str; 5] = [
    "io.containerd.grpc.v1.cri",
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.podsandbox.controller.v1.podsandbox",
    "io.containerd.nri.v1.nri",
];
/// What pods through the CRI do not need either.
const WITHOUT_ANYWAY: [&str; 5] = [
    "io.containerd.internal.v1.tracing",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// What can go wrong with a private containerd.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// A file or directory of its own can't be made.
    #[error("cannot prepare {path}: {source}")]
    Prepare {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The program can't be started.
    #[error("cannot start containerd: {0}; is it in the PATH?")]
    Spawn(#[source] io::Error),
    /// It ended, or gave no answer, before it could be used.
    #[error("containerd {what}; the end of its log:\n{log}")]
    Unusable {
        /// What happened.
        what: String,
        /// The last lines of its log.
        log: String,
    },
}

/// A running containerd. Dropping it ends it, everything that it started, and removes everything it left.
pub struct Containerd {
    process: Option<Child>,
    directory: PathBuf,
}

impl Containerd {
    /// Starts one that keeps everything in the new directory `directory`.
    ///
    /// # Errors
    /// When it can't be started or does not answer in time.
    pub async fn start(directory: &Path) -> Result<(Self, Client), ContainerdError> {
        let disabled = [&WITHOUT_CRI[..], &WITHOUT_ANYWAY].concat();
        Self::start_configured(directory, NAMESPACE, &disabled, "").await
    }

    /// Starts one with its CRI plugin, which `plugins` configures; the client is for the namespace of that.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub(crate) async fn start_with_cri(
        directory: &Path,
        plugins: &str,
    ) -> Result<(Self, Client), ContainerdError> {
        Self::start_configured(directory, CRI_NAMESPACE, &WITHOUT_ANYWAY, plugins).await
    }

    async fn start_configured(
        directory: &Path,
        namespace: &str,
        disabled: &[&str],
        plugins: &str,
    ) -> Result<(Self, Client), ContainerdError> {
        let prepare = |path: &Path| {
            let path = path.to_owned();
            move |source| ContainerdError::Prepare { path, source }
        };
        fs::create_dir_all(directory).map_err(prepare(directory))?;
        mount_for_layers(directory).map_err(prepare(directory))?;
        let config = directory.join("config.toml");
        fs::write(&config, configuration(directory, disabled) + plugins).map_err(prepare(&config))?;
        let log_path = directory.join("containerd.log");
        let log = File::create(&log_path).map_err(prepare(&log_path))?;
        let process = Command::new("containerd")
            .arg("--config")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .map_err(ContainerdError::Spawn)?;
        let mut containerd = Self { process: Some(process), directory: directory.to_owned() };
        let client = containerd.wait_until_ready(namespace).await?;
        Ok((containerd, client))
    }

    /// Where its shims' log lines go too.
    pub fn log_path(&self) -> PathBuf {
        self.directory.join("containerd.log")
    }

    /// The socket of its gRPC server.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Its process id while it runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.process.as_ref().and_then(Child::id)
    }

    async fn wait_until_ready(&mut self, namespace: &str) -> Result<Client, ContainerdError> {
        let deadline = Instant::now() + START_LIMIT;
        let socket = self.socket();
        loop {
            let error = match Client::connect(&socket, namespace).await {
                Ok(client) => match client.version().await {
                    Ok(_) => return Ok(client),
                    Err(error) => error,
                },
                Err(error) => error,
            };
            if let Some(process) = &mut self.process
                && let Ok(Some(status)) = process.try_wait()
            {
                return Err(self.unusable(format!("ended at once ({status})")));
            }
            if Instant::now() > deadline {
                return Err(self.unusable(format!(
                    "does not answer {} s after its start: {error}",
                    START_LIMIT.as_secs()
                )));
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }

    fn unusable(&self, what: String) -> ContainerdError {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        ContainerdError::Unusable { what, log: lines[lines.len().saturating_sub(8)..].join("\n") }
    }

    fn stop(&mut self) {
        // Shims and VMMs first (their command lines name our directory), so that nobody restarts or waits for anything.
        let ours = format!("{}/", self.directory.display());
        // Those that started us may well be told of the directory too.
        let mut spared = node::own_ancestry();
        spared.extend(self.pid());
        for process in processes() {
            if process.command_line.contains(&ours) && !spared.contains(&process.pid) {
                let _ = kill(Pid::from_raw(process.pid as i32), Signal::SIGKILL);
            }
        }
        remove_cgroups();
        if let Some(mut process) = self.process.take() {
            if let Some(pid) = process.id() {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGTERM);
            }
            let deadline = Instant::now() + STOP_LIMIT;
            while matches!(process.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(POLL_INTERVAL);
            }
            // Has no effect on one that has ended.
            let _ = process.start_kill();
        }
        unmount_below(&self.directory);
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        self.stop();
    }
}

fn configuration(directory: &Path, disabled: &[&str]) -> String {
    let directory = directory.display();
    let disabled: Vec<String> = disabled.iter().map(|plugin| format!("{plugin:?}")).collect();
    format!(
        "version = 3\nroot = \"{directory}/root\"\nstate = \"{directory}/state\"\ndisabled_plugins = [{}]\n\
         oom_score = 0\n[grpc]\naddress = \"{directory}/containerd.sock\"\n\
         [ttrpc]\naddress = \"{directory}/containerd.sock.ttrpc\"\n\
         [plugins.'io.containerd.snapshotter.v1.blockfile']\nroot_path = \"{directory}/blockfile\"\n\
         scratch_file = \"{}\"\nfs_type = \"ext4\"\nmount_options = [\"loop\"]\n\
         [plugins.'io.containerd.snapshotter.v1.erofs']\nroot_path = \"{directory}/{LAYERS}\"\n",
        disabled.join(", "),
        node::installed(SCRATCH).display(),
    )
}

/// Mounts an ext4 for the snapshotter `erofs`: where the rest is may be a tmpfs without attributes of users (before Linux 6.6),
/// which an overlay in a guest needs.
fn mount_for_layers(directory: &Path) -> io::Result<()> {
    let (image, point) = (directory.join("layers.ext4"), directory.join(LAYERS));
    fs::create_dir_all(&point)?;
    fs::copy(node::installed(SCRATCH), &image)?;
    let mounted = std::process::Command::new("mount")
        .args(["-t", "ext4", "-o", "loop"])
        .arg(&image)
        .arg(&point)
        .status()?;
    if mounted.success() { Ok(()) } else { Err(io::Error::other(format!("mount: {mounted}"))) }
}

/// Where the snapshotter `erofs` keeps layers, in containerd's directory.
const LAYERS: &str = "layers";

/// An empty ext4.
const SCRATCH: &str = "share/bulkhead/bench-scratch.ext4";

/// Removes the containers' cgroups: from the unified tree, or from that of each controller of version 1.
fn remove_cgroups() {
    let root = Path::new(CGROUP_ROOT);
    remove_cgroup(&root.join(NAMESPACE));
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        remove_cgroup(&entry.path().join(NAMESPACE));
    }
}

/// Kills what runs in a cgroup (version 1 can't), and removes it with those below.
fn remove_cgroup(cgroup: &Path) {
    if !cgroup.is_dir() {
        return;
    }
    // The file is there in version 2 only.
    let _ = fs::OpenOptions::new()
        .write(true)
        .open(cgroup.join("cgroup.kill"))
        .and_then(|mut file| file.write_all(b"1"));
    let deadline = Instant::now() + STOP_LIMIT;
    while cgroup.exists() && Instant::now() < deadline {
        remove_directories(cgroup);
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn remove_directories(directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_directories(&entry.path());
        }
    }
    // Busy until the last process in it is gone; the caller tries again.
    let _ = fs::remove_dir(directory);
}

/// Unmounts everything below a directory, the newest first.
fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    for place in mounts.lines().rev().filter_map(|line| line.split(' ').nth(4)).map(Path::new) {
        if place.starts_with(directory) {
            let _ = umount2(place, MntFlags::MNT_DETACH);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_only_our_directory_for_writing() {
        let text = configuration(Path::new("/run/x"), &WITHOUT_CRI);
        assert!(text.contains("root = \"/run/x/root\"\n"), "{text}");
        assert!(text.contains("address = \"/run/x/containerd.sock\"\n"), "{text}");
        let lines = text.lines().filter(|line| line.contains("= \"/") && !line.starts_with("scratch_file"));
        for line in lines {
            assert!(line.contains("\"/run/x/"), "{line}");
        }
    }
}
