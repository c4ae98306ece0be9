//! Runs the agent natively, in a mount namespace of its own, with busybox containers, and talks its API to it.
#![allow(dead_code, reason = "not every test file uses everything")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests, which fail by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bulkhead_agent_protocol::*;
use bulkhead_base::capabilities::DEFAULT;
use serde_json::{Value, json};
use ttrpc::Code;
use ttrpc::asynchronous::Client;
use ttrpc::asynchronous::transport::Socket;
use ttrpc::context::{self, Context};

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 35] = [
    "sh", "cat", "cp", "dd", "echo", "env", "false", "grep", "hostname", "id", "ifconfig", "kill", "ls",
    "mkdir", "mknod", "mount", "pwd", "ps", "readlink", "rm", "sleep", "stat", "stty", "sync", "test",
    "touch", "tr", "true", "tty", "umount", "uname", "wc", "seq", "head", "cut",
];

/// Says loudly why a test does nothing.
pub(crate) fn skip(why: &str) {
    eprintln!("SKIPPED: {why}");
}

/// Where cgroup v2 is mounted.
pub(crate) fn cgroups() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    Some(line.split(' ').nth(1)?.into())
}

/// A path, which is another one where the tests run on another machine than they were built on.
fn from_environment(variable: &str, default: &str) -> PathBuf {
    std::env::var_os(variable).map_or_else(|| default.into(), PathBuf::from)
}

/// The agent with what it serves.
pub(crate) struct Guest {
    pub client: AgentClient,
    pub directory: PathBuf,
    pub cgroups: PathBuf,
    agent: Child,
    next_stream: AtomicU64,
    ids: String,
}

/// A process's streams, on the host's side.
pub(crate) struct Streams {
    pub request: Stdio,
    pub stdin: Option<UnixStream>,
    stdout: Option<JoinHandle<Vec<u8>>>,
    stderr: Option<JoinHandle<Vec<u8>>>,
}

/// What a process left.
#[derive(Debug)]
pub(crate) struct Output {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
}

impl Guest {
    /// Starts an agent; `None` where that can't be done, after saying so.
    pub(crate) async fn start(name: &str) -> Option<Self> {
        // SAFETY: takes nothing.
        if unsafe { libc::geteuid() } != 0 {
            skip("only root can make containers");
            return None;
        }
        if !Path::new(BUSYBOX).exists() {
            skip("no /bin/busybox (package busybox-static)");
            return None;
        }
        let Some(cgroups) = cgroups() else {
            skip("cgroup v2 is not mounted anywhere");
            return None;
        };
        let ids = format!("{name}-{}", std::process::id());
        let directory = from_environment("BULKHEAD_TEST_DIR", env!("CARGO_TARGET_TMPDIR")).join(&ids);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let listener = UnixListener::bind(directory.join("streams")).unwrap();
        let agent = spawn_agent(theirs.into(), listener.into(), &cgroups);
        ours.set_nonblocking(true).unwrap();
        let socket = Socket::new(tokio::net::UnixStream::from_std(ours).unwrap());
        let client = AgentClient::new(Client::new(socket));
        Some(Self { client, directory, cgroups, agent, next_stream: AtomicU64::new(1), ids })
    }

    /// A container id that no other test has.
    pub(crate) fn id(&self, name: &str) -> String {
        format!("{}-{name}", self.ids)
    }

    /// Makes a root file system with busybox in it.
    pub(crate) fn rootfs(&self, name: &str) -> PathBuf {
        let root = self.directory.join(name);
        for directory in ["bin", "dev", "etc", "home/user", "proc", "sys", "tmp", "root"] {
            fs::create_dir_all(root.join(directory)).unwrap();
        }
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
        )
        .unwrap();
        root
    }

    /// A specification like containerd's, for a shell command.
    pub(crate) fn spec(&self, root: &Path, script: &str) -> Value {
        let mut spec = default_spec();
        spec["root"]["path"] = json!(root);
        spec["process"]["args"] = json!(["sh", "-c", script]);
        spec
    }

    /// Whether containers can be limited by a controller; says so if they can't.
    pub(crate) fn has_controller(&self, controller: &str) -> bool {
        let controllers = fs::read_to_string(self.cgroups.join("cgroup.controllers")).unwrap();
        let has = controllers.split_whitespace().any(|name| name == controller);
        if !has {
            skip(&format!("cgroup v2 has no {controller} controller here"));
        }
        has
    }

    /// A file of a container's cgroup.
    pub(crate) fn cgroup_file(&self, id: &str, file: &str) -> String {
        fs::read_to_string(self.cgroups.join(format!("container-{id}")).join(file)).unwrap().trim().to_owned()
    }

    /// Opens streams for a process.
    pub(crate) fn streams(&self) -> Streams {
        let open = || {
            let number = self.next_stream.fetch_add(1, Relaxed);
            let mut stream = UnixStream::connect(self.directory.join("streams")).unwrap();
            stream.write_all(&number.to_le_bytes()).unwrap();
            (number, stream)
        };
        let drain = |mut stream: UnixStream| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                stream.read_to_end(&mut bytes).unwrap();
                bytes
            })
        };
        let (stdin, stdout, stderr) = (open(), open(), open());
        let request = Stdio {
            stdin_stream: stdin.0,
            stdout_stream: stdout.0,
            stderr_stream: stderr.0,
            ..Default::default()
        };
        Streams {
            request,
            stdin: Some(stdin.1),
            stdout: Some(drain(stdout.1)),
            stderr: Some(drain(stderr.1)),
        }
    }

    /// Streams of a process with a terminal.
    pub(crate) fn terminal_streams(&self) -> Streams {
        let mut streams = self.streams();
        streams.request.terminal = true;
        streams.request.stderr_stream = 0;
        streams.stderr = None;
        streams
    }

    pub(crate) async fn create(&self, id: &str, spec: &Value, stdio: &Stdio) -> ttrpc::Result<u32> {
        let request = CreateContainerRequest {
            container_id: id.to_owned(),
            spec: serde_json::to_vec(spec).unwrap(),
            stdio: Some(stdio.clone()).into(),
            ..Default::default()
        };
        Ok(self.client.create_container(limit(), &request).await?.pid)
    }

    pub(crate) async fn create_exec(
        &self,
        id: &str,
        exec: &str,
        process: &Value,
        stdio: &Stdio,
    ) -> ttrpc::Result<u32> {
        let request = CreateExecRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio.clone()).into(),
            ..Default::default()
        };
        Ok(self.client.create_exec(limit(), &request).await?.pid)
    }

    pub(crate) async fn start_process(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        self.client.start(limit(), &process(id, exec)).await.map(drop)
    }

    pub(crate) async fn wait(&self, id: &str, exec: &str) -> WaitResponse {
        self.client.wait(limit(), &process(id, exec)).await.unwrap()
    }

    pub(crate) async fn signal(&self, id: &str, exec: &str, signal: i32, all: bool) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal: signal as u32,
            all,
            ..Default::default()
        };
        self.client.signal(limit(), &request).await.map(drop)
    }

    pub(crate) async fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<()> {
        self.client.delete(limit(), &process(id, exec)).await.map(drop)
    }

    /// Creates and starts a container without streams.
    pub(crate) async fn start_container(&self, id: &str, spec: &Value) -> u32 {
        let pid = self.create(id, spec, &Stdio::default()).await.unwrap();
        self.start_process(id, "").await.unwrap();
        pid
    }

    /// Runs a container to its end and deletes it.
    pub(crate) async fn run(&self, id: &str, spec: &Value) -> Output {
        self.run_with_input(id, spec, b"").await
    }

    pub(crate) async fn run_with_input(&self, id: &str, spec: &Value, input: &[u8]) -> Output {
        let mut streams = self.streams();
        self.create(id, spec, &streams.request).await.unwrap_or_else(|error| panic!("create: {error}"));
        self.start_process(id, "").await.unwrap_or_else(|error| panic!("start: {error}"));
        streams.send(input);
        let status = self.wait(id, "").await.exit_status;
        let output = streams.finish(status).await;
        self.delete(id, "").await.unwrap();
        output
    }

    /// Runs a further process to its end and deletes it.
    pub(crate) async fn exec(&self, id: &str, exec: &str, process: &Value) -> Output {
        let mut streams = self.streams();
        self.create_exec(id, exec, process, &streams.request)
            .await
            .unwrap_or_else(|error| panic!("exec: {error}"));
        self.start_process(id, exec).await.unwrap();
        streams.send(b"");
        let status = self.wait(id, exec).await.exit_status;
        let output = streams.finish(status).await;
        self.delete(id, exec).await.unwrap();
        output
    }

    /// Kills a container and deletes it.
    pub(crate) async fn remove(&self, id: &str) {
        self.signal(id, "", libc::SIGKILL, true).await.unwrap();
        self.wait(id, "").await;
        self.delete(id, "").await.unwrap();
    }

    /// The agent's process id.
    pub(crate) fn agent_pid(&self) -> u32 {
        self.agent.id()
    }

    /// Ends the agent by closing its connection, and checks that it leaves nothing behind.
    pub(crate) async fn finish(mut self) {
        let pid = self.agent.id();
        assert_eq!(children(pid), Vec::<String>::new(), "processes left");
        self.client = dead_client();
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            match self.agent.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() > deadline => panic!("the agent outlives its connection"),
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        assert!(status.success(), "{status}");
        let left: Vec<_> = fs::read_dir(&self.cgroups)
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
            .filter(|name| name.contains(&self.ids))
            .collect();
        assert_eq!(left, Vec::<String>::new(), "cgroups left");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        // What a failed test left in its groups would outlive it.
        for entry in fs::read_dir(&self.cgroups).unwrap().flatten() {
            if entry.file_name().to_string_lossy().contains(&self.ids) {
                let _ = fs::write(entry.path().join("cgroup.kill"), "1");
                std::thread::sleep(Duration::from_millis(50));
                let _ = fs::remove_dir(entry.path());
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Streams {
    /// Sends input and ends it.
    pub(crate) fn send(&mut self, input: &[u8]) {
        if let Some(mut stdin) = self.stdin.take() {
            // The process may have ended already.
            let _ = stdin.write_all(input);
            let _ = stdin.shutdown(std::net::Shutdown::Write);
            self.stdin = Some(stdin);
        }
    }

    /// Reads the output to its end.
    pub(crate) async fn finish(&mut self, status: u32) -> Output {
        let read = |handle: Option<JoinHandle<Vec<u8>>>| async move {
            match handle {
                Some(handle) => {
                    let deadline = Instant::now() + Duration::from_secs(20);
                    while !handle.is_finished() {
                        assert!(Instant::now() < deadline, "the output does not end");
                        tokio::time::sleep(Duration::from_millis(2)).await;
                    }
                    String::from_utf8_lossy(&handle.join().unwrap()).into_owned()
                }
                None => String::new(),
            }
        };
        Output { status, stdout: read(self.stdout.take()).await, stderr: read(self.stderr.take()).await }
    }
}

/// A request that names a process.
pub(crate) fn process(id: &str, exec: &str) -> ProcessRequest {
    ProcessRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() }
}

/// A request that names a container.
pub(crate) fn container(id: &str) -> ContainerRequest {
    ContainerRequest { container_id: id.to_owned(), ..Default::default() }
}

/// No request may take longer than this.
pub(crate) fn limit() -> Context {
    context::with_duration(Duration::from_secs(30))
}

/// The code and message of a failed request.
pub(crate) fn failure<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

/// The process object of a further process.
pub(crate) fn exec_process(script: &str) -> Value {
    let mut process = default_spec()["process"].clone();
    process["args"] = json!(["sh", "-c", script]);
    process
}

/// A client whose connection is closed.
fn dead_client() -> AgentClient {
    let (ours, _) = tokio::net::UnixStream::pair().unwrap();
    AgentClient::new(Client::new(Socket::new(ours)))
}

/// Command names of the children of a process.
pub(crate) fn children(pid: u32) -> Vec<String> {
    let list = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    list.split_whitespace()
        .map(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default())
        .collect()
}

fn spawn_agent(connection: OwnedFd, listener: OwnedFd, cgroups: &Path) -> Child {
    let mut command =
        Command::new(from_environment("BULKHEAD_TEST_AGENT", env!("CARGO_BIN_EXE_bulkhead-agent")));
    let (connection_fd, listener_fd) = (connection.as_raw_fd(), listener.as_raw_fd());
    command
        .args([
            "--serve-fd",
            &connection_fd.to_string(),
            "--streams-fd",
            &listener_fd.to_string(),
            "--cgroups",
        ])
        .arg(cgroups)
        .env_clear();
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(move || {
            for fd in [connection_fd, listener_fd] {
                libc::fcntl(fd, libc::F_SETFD, 0);
            }
            // What the agent mounts stays its own.
            if libc::unshare(libc::CLONE_NEWNS) != 0
                || libc::mount(
                    c"".as_ptr(),
                    c"/".as_ptr(),
                    c"".as_ptr(),
                    libc::MS_REC | libc::MS_PRIVATE,
                    std::ptr::null(),
                ) != 0
            {
                return Err(std::io::Error::last_os_error());
            }
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            Ok(())
        });
    }
    command.spawn().unwrap()
}

fn default_spec() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["true"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "cwd": "/",
            "capabilities": {"bounding": DEFAULT, "effective": DEFAULT, "permitted": DEFAULT},
            "noNewPrivileges": true,
        },
        "root": {"path": ""},
        "hostname": "pod",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["ro", "nosuid", "noexec", "nodev", "relatime"]},
            {"destination": "/run", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": "/default/x",
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"},
                           {"type": "cgroup"}],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                            "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
            "readonlyPaths": ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    })
}
