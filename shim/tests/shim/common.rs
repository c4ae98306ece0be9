//! A stand-in for containerd: bundles, the `start` and `delete` actions, a Task API client, and a place for events.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{CreateTaskRequest, DeleteResponse, ShutdownRequest};
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, Events, TaskClient, create_events};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protobuf::{Message, MessageField};
use serde_json::{Value, json};
use tempfile::TempDir;
use ttrpc::asynchronous::{Server, TtrpcContext};
use ttrpc::{Code, context};

/// The shim under test.
pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v1");

/// Any call to a shim is answered in this time.
pub(crate) const LIMIT: Duration = Duration::from_secs(10);

/// A containerd of its own, in a directory of its own.
pub(crate) struct Containerd {
    pub directory: TempDir,
    pub events: Arc<Mutex<Vec<String>>>,
    _server: Server,
}

struct EventSink(Arc<Mutex<Vec<String>>>);

#[async_trait]
impl Events for EventSink {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        self.0.lock().unwrap().push(request.envelope.topic.clone());
        Ok(Empty::new())
    }
}

impl Containerd {
    pub(crate) async fn new() -> Containerd {
        let directory = tempfile::tempdir().unwrap();
        let events = Arc::default();
        let address = format!("unix://{}/c.ttrpc", directory.path().display());
        let mut server = Server::new()
            .bind(&address)
            .unwrap()
            .register_service(create_events(Arc::new(EventSink(Arc::clone(&events)))));
        server.start().await.unwrap();
        Containerd { directory, events, _server: server }
    }

    /// A bundle as containerd makes it, with a `busybox`-less root file system of one file.
    pub(crate) fn bundle(&self, id: &str, change: impl FnOnce(&mut Value)) -> Bundle {
        let path = self.directory.path().join(id);
        fs::create_dir_all(path.join("rootfs")).unwrap();
        fs::write(path.join("rootfs/file"), "x").unwrap();
        nix::unistd::mkfifo(&path.join("log"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "network"}]}
        });
        change(&mut spec);
        fs::write(path.join("config.json"), spec.to_string()).unwrap();
        let log = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path.join("log"))
            .unwrap();
        Bundle { id: id.into(), path, log }
    }

    fn command(&self, bundle: &Bundle, arguments: &[&str]) -> Command {
        let mut command = Command::new(SHIM);
        command
            .current_dir(&bundle.path)
            .args(["-namespace", "test", "-address"])
            .arg(self.directory.path().join("c.sock"))
            .args(["-publish-binary", "/proc/self/exe", "-id", &bundle.id])
            .args(arguments)
            .env("TTRPC_ADDRESS", self.directory.path().join("c.ttrpc"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// Runs `start` with `input` on its standard input.
    pub(crate) fn start_with(&self, bundle: &Bundle, input: &[u8]) -> Output {
        let mut child = self.command(bundle, &["start"]).spawn().unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    /// Runs `start` without an address for events.
    pub(crate) fn start_unheard(&self, bundle: &Bundle) -> Output {
        let mut command = self.command(bundle, &["start"]);
        command.env_remove("TTRPC_ADDRESS").stdin(Stdio::null()).output().unwrap()
    }

    /// Runs `start` as containerd 1.x does; gives the address.
    pub(crate) fn start(&self, bundle: &Bundle) -> String {
        let output = self.start_with(bundle, b"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(
            String::from_utf8_lossy(&output.stderr),
            "",
            "containerd takes it for a part of the answer"
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs `delete`.
    pub(crate) fn delete(&self, bundle: &Bundle) -> DeleteResponse {
        let path = bundle.path.display().to_string();
        let output = self.command(bundle, &["-bundle", &path, "delete"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        DeleteResponse::parse_from_bytes(&output.stdout).unwrap()
    }
}

pub(crate) struct Bundle {
    pub id: String,
    pub path: PathBuf,
    log: fs::File,
}

impl Bundle {
    /// What the shim has logged since the last time.
    pub(crate) fn log(&mut self) -> String {
        use std::io::Read;
        let mut text = Vec::new();
        let _ = self.log.read_to_end(&mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// A request to create its container, with a configuration file that holds `config`.
    pub(crate) fn create(&self, config: &str) -> CreateTaskRequest {
        let file = self.path.join("bulkhead.toml");
        fs::write(&file, config).unwrap();
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.path.display().to_string(),
            options: MessageField::some(options(&file)),
            ..Default::default()
        }
    }
}

/// Runtime options that name a configuration file.
pub(crate) fn options(file: &Path) -> Any {
    let path = file.display().to_string();
    let mut value = vec![0x12, path.len() as u8];
    value.extend(path.as_bytes());
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Default::default() }
}

pub(crate) async fn connect(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).await.unwrap())
}

pub(crate) fn ctx() -> context::Context {
    context::with_duration(LIMIT)
}

/// The status that a call was refused with.
pub(crate) fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

/// Shuts a shim down and waits until it is gone.
pub(crate) async fn shut_down(client: &TaskClient, id: &str, address: &str) {
    let pid = client
        .connect(ctx(), &containerd_shim_protos::api::ConnectRequest { id: id.into(), ..Default::default() })
        .await
        .unwrap()
        .shim_pid;
    // The connection may end before the answer is there.
    let _ = client.shutdown(ctx(), &ShutdownRequest { id: id.into(), ..Default::default() }).await;
    await_gone(pid).await;
    let path = address.strip_prefix("unix://").unwrap();
    assert!(!Path::new(path).exists(), "the socket is left");
}

/// Waits until a process is gone (or a zombie, if nobody reaps orphans here).
pub(crate) async fn await_gone(pid: u32) {
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        match fs::read_to_string(format!("/proc/{pid}/stat")) {
            Err(_) => return,
            Ok(stat) if stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('Z')) => return,
            Ok(_) => {}
        }
        assert!(tokio::time::Instant::now() < deadline, "process {pid} does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
