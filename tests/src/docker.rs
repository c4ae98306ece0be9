//! Debian's Docker on a containerd of our own, in a network namespace of its own: nothing of the node's own network, rules or
//! Docker is touched.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cases::Runtime;
use crate::cleanup::WorkDir;
use crate::containerd::PrivateContainerd;
use crate::failure::{Explain, Outcome};
use crate::layout::Layout;
use crate::loopback::NetworkNamespace;
use crate::node;
use crate::process::{self, Output, eventually};
use crate::{ensure, fail};

/// How long the daemon may take to serve.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to end before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// How long one command may take.
const LIMIT: Duration = Duration::from_secs(60);

/// The image of the cases.
pub(crate) const IMAGE: &str = "busybox";

/// Where Docker puts the control groups of its containers.
const CGROUP_PARENT: &str = "docker";

/// The programs of it.
const PROGRAMS: [&str; 4] = ["dockerd", "docker", "docker-proxy", "docker-init"];

/// A daemon, whose containers run in microVMs unless a command says otherwise.
#[derive(Debug)]
pub(crate) struct Docker {
    daemon: Option<Child>,
    layout: Layout,
    network: NetworkNamespace,
    directory: WorkDir,
    containerd: PrivateContainerd,
}

impl Docker {
    /// Whether its programs are here.
    pub(crate) fn is_there(layout: &Layout) -> bool {
        PROGRAMS.iter().all(|name| layout.find(name).is_ok())
    }

    /// Starts containerd and Docker and imports the image.
    ///
    /// # Errors
    /// When either does not serve, with the end of its log.
    pub(crate) fn start(layout: &Layout) -> Outcome<Self> {
        let containerd = PrivateContainerd::start(layout)?;
        let directory = WorkDir::new("docker")?;
        let network = NetworkNamespace::new()?;
        let mut docker = Self { daemon: None, layout: layout.clone(), network, directory, containerd };
        docker.launch()?;
        let rootfs = layout.rootfs("busybox");
        let archive = docker.path().join("busybox.tar");
        let mut pack = Command::new("tar");
        process::run(pack.arg("-cf").arg(&archive).arg("-C").arg(rootfs).arg("."), b"", LIMIT)?
            .success("pack the image")?;
        let archive = archive.display().to_string();
        docker
            .run(&["import", "-c", "CMD [\"/bin/sh\"]", "-c", "ENV PATH=/bin", &archive, IMAGE])?
            .success("docker import")?;
        Ok(docker)
    }

    /// The directory with everything of it.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Its containerd.
    pub(crate) fn containerd(&self) -> &PrivateContainerd {
        &self.containerd
    }

    /// Where the ports of its containers are published.
    pub(crate) fn network(&self) -> &NetworkNamespace {
        &self.network
    }

    /// Runs `docker` with some arguments to its end, whose exit code is the caller's to judge.
    ///
    /// # Errors
    /// When it does not end in time.
    pub(crate) fn run(&self, arguments: &[&str]) -> Outcome<Output> {
        self.run_with_input(arguments, b"")
    }

    /// Runs `docker` with something on its standard input.
    ///
    /// # Errors
    /// As [`run`](Self::run).
    pub(crate) fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Outcome<Output> {
        let mut command = Command::new(self.layout.find("docker")?);
        command
            .arg("-H")
            .arg(self.host())
            .args(arguments)
            .env("PATH", self.layout.search_path())
            .env("HOME", self.path())
            .env("DOCKER_BUILDKIT", "0");
        process::run(&mut command, input, LIMIT)
    }

    /// Runs `docker` with some arguments, which has to succeed; gives its output.
    ///
    /// # Errors
    /// When it fails.
    pub(crate) fn ok(&self, arguments: &[&str]) -> Outcome<String> {
        let output = self.run(arguments)?.success(&format!("docker {}", arguments.join(" ")))?;
        Ok(output.stdout)
    }

    /// The end of the daemon's log.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let log = std::fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn host(&self) -> String {
        format!("unix://{}/docker.sock", self.path().display())
    }

    fn log_path(&self) -> std::path::PathBuf {
        self.path().join("docker.log")
    }

    fn launch(&mut self) -> Outcome {
        let log = File::create(self.log_path()).explain(|| "make Docker's log".into())?;
        let place = |name: &str| self.path().join(name);
        let mut command = Command::new(self.layout.find("dockerd")?);
        command
            .arg("--containerd")
            .arg(self.containerd.socket())
            .args(["--default-runtime", Runtime::Bulkhead.name(), "-H", &self.host()])
            .arg("--data-root")
            .arg(place("data"))
            .arg("--exec-root")
            .arg(place("exec"))
            .arg("--pidfile")
            .arg(place("pid"))
            .arg("--userland-proxy-path")
            .arg(self.layout.find("docker-proxy")?)
            .arg("--init-path")
            .arg(self.layout.find("docker-init")?)
            .env("PATH", self.layout.search_path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        let daemon = self.network.within(move || command.spawn())?.explain(|| "start dockerd".into())?;
        self.daemon = Some(daemon);
        let served = eventually("Docker serves", START_LIMIT, || {
            if let Some(status) = self.daemon.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten()) {
                return Ok(Err(status));
            }
            self.run(&["version"])?.success("docker version").map(|_| Ok(()))
        })?;
        match served {
            Ok(()) => Ok(()),
            Err(status) => fail!("dockerd ended with {status}; the end of its log:\n{}", self.log_tail(10)),
        }
    }

    fn stop(&mut self) -> Outcome {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        let pid = i32::try_from(daemon.id()).explain(|| "dockerd's process id".into())?;
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let ended =
            process::wait(&mut daemon, Instant::now() + STOP_LIMIT).explain(|| "wait for dockerd".into())?;
        if ended.is_none() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        ensure!(ended.is_some(), "dockerd did not end within {} s of SIGTERM", STOP_LIMIT.as_secs());
        Ok(())
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _ = self.stop();
        node::remove_control_group(CGROUP_PARENT);
    }
}
