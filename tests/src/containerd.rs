//! A containerd of our own: own root, state, sockets and configuration; nothing of the system's is touched.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cleanup::WorkDir;
use crate::failure::{Explain, Outcome};
use crate::layers;
use crate::layout::Layout;
use crate::node;
use crate::process::{self, Output, Running, eventually};
use crate::{ensure, fail};

/// How long containerd may take to serve.
const START_LIMIT: Duration = Duration::from_secs(60);

/// How long it may take to end before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// How long one `ctr` command may take unless the caller says otherwise.
pub(crate) const CTR_LIMIT: Duration = Duration::from_secs(30);

/// What containers through `ctr` need none of; without it containerd starts faster.
const WITHOUT_CRI: [&str; 4] = [
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
    "io.containerd.nri.v1.nri",
];

/// What pods through the CRI do not need either.
const WITHOUT_ANYWAY: [&str; 5] = [
    "io.containerd.internal.v1.opt",
    "io.containerd.internal.v1.tracing",
    "io.containerd.tracing.processor.v1.otlp",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
];

/// Where the snapshotter `erofs` keeps layers, in containerd's directory: an ext4.
const LAYERS: &str = "layers";

/// Where containerd puts the control groups of its default namespace's containers.
const CGROUP_PARENT: &str = "default";

/// A private containerd; ended, and everything of it removed, when dropped.
#[derive(Debug)]
pub struct PrivateContainerd {
    daemon: Option<Child>,
    layout: Layout,
    directory: WorkDir,
}

impl PrivateContainerd {
    /// Starts containerd and waits until it serves.
    ///
    /// # Errors
    /// When it does not, with the end of its log.
    pub fn start(layout: &Layout) -> Outcome<Self> {
        let disabled = [&WITHOUT_CRI[..], &WITHOUT_ANYWAY].concat();
        Self::start_configured(layout, &disabled, |path| {
            layers::mount_ext4(layout, &path.join(LAYERS))?;
            Ok(format!(
                "[plugins.'io.containerd.snapshotter.v1.erofs']\nroot_path = \"{}\"\n",
                path.join(LAYERS).display()
            ) + &format!(
                "[plugins.'io.containerd.snapshotter.v1.blockfile']\nroot_path = \"{}/blockfile\"\n\
                 scratch_file = \"{}\"\nfs_type = \"ext4\"\nmount_options = [\"loop\"]\n",
                path.display(),
                layout.rootfs("busybox").with_file_name("scratch.ext4").display(),
            ))
        })
    }

    /// Starts containerd with its CRI plugin, configured by what `plugins` says for containerd's directory.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub(crate) fn start_with_cri(
        layout: &Layout,
        plugins: impl FnOnce(&Path) -> Outcome<String>,
    ) -> Outcome<Self> {
        Self::start_configured(layout, &WITHOUT_ANYWAY, plugins)
    }

    fn start_configured(
        layout: &Layout,
        disabled: &[&str],
        plugins: impl FnOnce(&Path) -> Outcome<String>,
    ) -> Outcome<Self> {
        let directory = WorkDir::new("containerd")?;
        let disabled: Vec<String> = disabled.iter().map(|plugin| format!("{plugin:?}")).collect();
        let path = directory.path().display();
        let config = format!(
            "version = 3\nroot = \"{path}/root\"\nstate = \"{path}/state\"\ntemp = \"{path}/temp\"\ndisabled_plugins = [{}]\n\
             [grpc]\naddress = \"{path}/containerd.sock\"\n[ttrpc]\naddress = \"{path}/containerd.sock.ttrpc\"\n\
             [debug]\nlevel = \"info\"\n{}",
            disabled.join(", "),
            plugins(directory.path())?,
        );
        let mut containerd = Self { daemon: None, layout: layout.clone(), directory };
        let file = containerd.config();
        fs::write(&file, config).explain(|| format!("write {}", file.display()))?;
        containerd.launch()?;
        Ok(containerd)
    }

    /// Ends containerd and starts it again; containers go on meanwhile.
    ///
    /// # Errors
    /// When either does not work in time.
    pub(crate) fn restart(&mut self) -> Outcome {
        self.stop()?;
        self.launch()
    }

    /// Starts containerd again after somebody has killed it.
    ///
    /// # Errors
    /// When it is not dead, or does not serve in time.
    pub fn revive(&mut self) -> Outcome {
        if let Some(daemon) = self.daemon.as_mut() {
            let ended = process::wait(daemon, Instant::now() + STOP_LIMIT);
            ensure!(ended.explain(|| "wait for containerd".into())?.is_some(), "containerd lives");
        }
        self.daemon = None;
        self.launch()
    }

    /// The configuration that it runs with.
    pub fn config(&self) -> PathBuf {
        self.path().join("config.toml")
    }

    /// The directory with everything of it.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Imports one of our test images.
    ///
    /// # Errors
    /// When `ctr` fails.
    pub fn import(&self, image: &str) -> Outcome<String> {
        self.import_for(image, "overlayfs")
    }

    /// Imports one of our test images, or just unpacks it, for a snapshotter.
    ///
    /// # Errors
    /// When `ctr` fails.
    pub(crate) fn import_for(&self, image: &str, snapshotter: &str) -> Outcome<String> {
        let archive = self.layout.image(image).display().to_string();
        self.ctr(&["image", "import", "--local", "--snapshotter", snapshotter, &archive])?
            .success("ctr image import")?;
        Ok(format!("bulkhead.test/{image}:1"))
    }

    /// Imports one of our test images for pods through the CRI.
    ///
    /// # Errors
    /// When `ctr` fails.
    pub(crate) fn import_for_cri(&self, image: &str) -> Outcome<String> {
        let archive = self.layout.image(image).display().to_string();
        self.ctr(&["-n", "k8s.io", "image", "import", "--local", &archive])?.success("ctr image import")?;
        Ok(format!("bulkhead.test/{image}:1"))
    }

    /// Runs `ctr` with some arguments to its end.
    ///
    /// # Errors
    /// When it does not end within [`CTR_LIMIT`]. Its exit code is the caller's to judge.
    pub fn ctr(&self, arguments: &[&str]) -> Outcome<Output> {
        self.ctr_with_input(arguments, b"")
    }

    /// Runs `ctr` with something on its standard input.
    ///
    /// # Errors
    /// As [`ctr`](Self::ctr).
    pub fn ctr_with_input(&self, arguments: &[&str], input: &[u8]) -> Outcome<Output> {
        process::run(&mut self.ctr_command(arguments), input, CTR_LIMIT)
    }

    /// Starts `ctr` and lets it run.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn ctr_running(&self, arguments: &[&str]) -> Outcome<Running> {
        Running::start(&mut self.ctr_command(arguments))
    }

    fn ctr_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.layout.find("ctr").unwrap_or_else(|_| PathBuf::from("ctr")));
        command.arg("-a").arg(self.socket()).args(arguments).env("PATH", self.layout.search_path());
        command
    }

    /// The process ids of the shims that this containerd started for a container.
    pub fn shims(&self, container: &str) -> Vec<i32> {
        let shims = node::shims(&self.socket().display().to_string(), container);
        shims.iter().map(|process| process.pid).collect()
    }

    /// The end of containerd's log, which has the shims' logs too.
    pub(crate) fn log_tail(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// The log without what containerd says while it starts.
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let noise = ["loading plugin", "failed to load plugin", "skip loading plugin", "msg=serving"];
        log.lines()
            .filter(|line| !noise.iter().any(|noise| line.contains(noise)))
            .flat_map(|line| [line, "\n"])
            .collect()
    }

    fn launch(&mut self) -> Outcome {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .explain(|| "open containerd's log".into())?;
        let program = self.layout.find("containerd")?;
        let daemon = Command::new(&program)
            .arg("--config")
            .arg(self.config())
            .env("PATH", self.layout.search_path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .explain(|| format!("start {}", program.display()))?;
        self.daemon = Some(daemon);
        let served = eventually("containerd serves", START_LIMIT, || {
            let ended = self.daemon.as_mut().and_then(|daemon| daemon.try_wait().ok().flatten());
            match (ended, UnixStream::connect(self.socket())) {
                (Some(status), _) => Ok(Err(status)),
                (None, Ok(_)) => Ok(Ok(())),
                (None, Err(error)) => fail!("{}: {error}", self.socket().display()),
            }
        })?;
        match served {
            Ok(()) => Ok(()),
            Err(status) => {
                fail!("containerd ended with {status}; the end of its log:\n{}", self.log_tail(10))
            }
        }
    }

    fn stop(&mut self) -> Outcome {
        let Some(mut daemon) = self.daemon.take() else { return Ok(()) };
        let pid = i32::try_from(daemon.id()).explain(|| "containerd's process id".into())?;
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        let ended = process::wait(&mut daemon, Instant::now() + STOP_LIMIT)
            .explain(|| "wait for containerd".into())?;
        if ended.is_none() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        ensure!(ended.is_some(), "containerd did not end within {} s of SIGTERM", STOP_LIMIT.as_secs());
        Ok(())
    }

    /// The socket of its gRPC server.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path().join("containerd.sock")
    }

    fn log_path(&self) -> PathBuf {
        self.path().join("containerd.log")
    }
}

impl Drop for PrivateContainerd {
    fn drop(&mut self) {
        let _ = self.stop();
        node::remove_control_group(CGROUP_PARENT);
    }
}
