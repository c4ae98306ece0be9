//! Drives a shim the way containerd 2.1 does: `start` in the bundle, then the Task API over ttrpc.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteRequest, DeleteResponse,
    ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StateRequest, StateResponse, StatsRequest, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message, MessageField};
use containerd_shim_protos::ttrpc::{self, Client, Code, context};
use containerd_shim_protos::{TaskClient, cgroups_v2::metrics::Metrics};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::Value;

use crate::bundle::Bundle;
use crate::cleanup::WorkDir;
use crate::events::EventServer;
use crate::failure::{Explain, Failure, Outcome};
use crate::layout::Layout;
use crate::node;
use crate::process::{self, Output};
use crate::stdio::{Reader, Reading, Stdio, Streams};
use crate::{ensure, fail};

/// How long a call to a shim may take: the time within which every failure has to be reported.
pub(crate) const CALL_LIMIT: Duration = Duration::from_secs(10);

/// The namespace that everything is made in.
const NAMESPACE: &str = "bulkhead-test";

/// Where [`crate::bundle::spec`] puts the containers' control groups.
const CGROUP_PARENT: &str = "bulkhead-test";

/// A call that the shim refused.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{call}: {code:?}: {message}")]
pub(crate) struct CallError {
    /// The method.
    pub call: &'static str,
    /// The ttrpc status code.
    pub code: Code,
    /// What the shim says.
    pub message: String,
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Self(error.to_string())
    }
}

/// containerd's side: its event service, and a directory for bundles.
pub(crate) struct ShimHost {
    layout: Layout,
    directory: Arc<WorkDir>,
    /// What the shims reported.
    pub events: Arc<EventServer>,
    program: &'static str,
}

impl ShimHost {
    /// Serves events and makes room for bundles. `program` is the shim's file name.
    ///
    /// # Errors
    /// When either can't be had.
    pub(crate) fn new(layout: &Layout, program: &'static str) -> Outcome<Self> {
        let directory = Arc::new(WorkDir::new("shim")?);
        let events = Arc::new(EventServer::start(&directory.path().join("events.sock"))?);
        Ok(Self { layout: layout.clone(), directory, events, program })
    }

    /// The same place for shims of another program.
    #[must_use]
    pub(crate) fn with(&self, program: &'static str) -> Self {
        let ShimHost { layout, directory, events, .. } = self;
        Self { layout: layout.clone(), directory: directory.clone(), events: events.clone(), program }
    }

    /// The directory with everything of this host.
    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A bundle over the busybox image.
    ///
    /// # Errors
    /// When its files can't be made.
    pub(crate) fn bundle(&self, id: &str, spec: &Value) -> Outcome<Bundle> {
        Bundle::new(self.path(), id, &self.layout.rootfs("busybox"), spec)
    }

    /// Starts a shim for a bundle.
    ///
    /// # Errors
    /// When it fails, or its answer is not what containerd understands.
    pub(crate) fn start(&self, bundle: &Bundle) -> Outcome<Shim> {
        let log = bundle.path.join("log");
        mkfifo(&log, Mode::S_IRWXU).explain(|| format!("make FIFO {}", log.display()))?;
        let log = Reader::new(log, Reading::AtOnce)?;
        let address = self.start_action(bundle, None)?;
        let client = Client::connect(&address).explain(|| format!("connect to the shim at {address}"))?;
        Ok(Shim { bundle: bundle.clone(), address, client: TaskClient::new(client), log })
    }

    /// Speaks to a shim that serves already, about the container of `bundle`.
    ///
    /// # Errors
    /// When it can't be reached.
    pub(crate) fn join(&self, bundle: &Bundle, address: &str) -> Outcome<Shim> {
        let log = bundle.path.join("log.member");
        if !log.exists() {
            mkfifo(&log, Mode::S_IRWXU).explain(|| format!("make FIFO {}", log.display()))?;
        }
        let log = Reader::new(log, Reading::AtOnce)?;
        let client = Client::connect(address).explain(|| format!("connect to the shim at {address}"))?;
        let (bundle, address) = (bundle.clone(), address.to_owned());
        Ok(Shim { bundle, address, client: TaskClient::new(client), log })
    }

    /// Runs `start` in a bundle, with the runtime options that name `config`; gives the address in its reply.
    ///
    /// # Errors
    /// When it fails, or its answer is not what containerd understands.
    pub(crate) fn start_action(&self, bundle: &Bundle, config: Option<&Path>) -> Outcome<String> {
        let options = config.map(|config| runtime_options(config).write_to_bytes());
        let options =
            options.transpose().explain(|| "encode the runtime options".into())?.unwrap_or_default();
        let output = self.invoke_with(bundle, &["start"], &options)?.success("shim start")?;
        ensure!(
            output.stderr.is_empty(),
            "shim start wrote to stderr, which containerd takes for the reply: {}",
            output.said()
        );
        let reply: Value = serde_json::from_str(&output.stdout)
            .explain(|| format!("reply of shim start {:?}", output.stdout))?;
        let address =
            reply["address"].as_str().explain(|| format!("no address in the reply of shim start {reply}"))?;
        ensure!(
            reply["version"] == 3 && reply["protocol"] == "ttrpc",
            "shim start offers {reply}, not ttrpc in version 3"
        );
        Ok(address.to_owned())
    }

    /// Runs the shim's `delete`, as containerd does after a shim died.
    ///
    /// # Errors
    /// When it fails.
    pub(crate) fn delete(&self, bundle: &Bundle) -> Outcome<DeleteResponse> {
        let path = bundle.path.display().to_string();
        let output = self.invoke(bundle, &["-bundle", &path, "delete"])?.success("shim delete")?;
        DeleteResponse::parse_from_bytes(&output.stdout_bytes)
            .explain(|| format!("reply of shim delete, {}", output.said()))
    }

    /// Runs the shim with some arguments after those that containerd always gives.
    ///
    /// # Errors
    /// When it does not end in time.
    pub(crate) fn invoke(&self, bundle: &Bundle, arguments: &[&str]) -> Outcome<Output> {
        self.invoke_with(bundle, arguments, b"")
    }

    fn invoke_with(&self, bundle: &Bundle, arguments: &[&str], input: &[u8]) -> Outcome<Output> {
        let socket = self.path().join("events.sock");
        let mut command = Command::new(self.layout.find(self.program)?);
        command
            .args(["-namespace", NAMESPACE, "-id", &bundle.id, "-address"])
            .arg(self.path().join("containerd.sock"))
            .arg("-publish-binary")
            .arg(self.layout.find("containerd")?)
            .args(arguments)
            .current_dir(&bundle.path)
            .env("PATH", self.layout.search_path())
            .env("NAMESPACE", NAMESPACE)
            .env("TTRPC_ADDRESS", &socket)
            .env("MAX_SHIM_VERSION", "3");
        process::run(&mut command, input, CALL_LIMIT)
    }
}

impl Drop for ShimHost {
    fn drop(&mut self) {
        if Arc::strong_count(&self.directory) == 1 {
            node::remove_control_group(CGROUP_PARENT);
        }
    }
}

/// A shim that serves the Task API.
pub(crate) struct Shim {
    /// The bundle that it was started for.
    pub bundle: Bundle,
    /// The address of its socket.
    pub address: String,
    client: TaskClient,
    /// What it writes to its log.
    pub log: Reader,
}

/// How to create a container.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct CreateOptions<'a> {
    /// Configuration file for the runtime options.
    pub config: Option<&'a Path>,
    /// Leave the root file system's mounts out.
    pub without_rootfs: bool,
}

impl Shim {
    /// The shim's process id.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn pid(&self) -> Outcome<i32> {
        i32::try_from(self.connect()?.shim_pid).explain(|| "shim's process id".into())
    }

    /// FIFOs in the bundle for a process of the container.
    ///
    /// # Errors
    /// When they can't be made.
    pub(crate) fn stdio(&self, name: &str, streams: Streams) -> Outcome<Stdio> {
        Stdio::new(&self.bundle.path, name, streams)
    }

    /// Creates the bundle's container; returns the process id.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn create(&self, stdio: &Stdio, options: CreateOptions) -> Result<u32, CallError> {
        let request = CreateTaskRequest {
            id: self.id(),
            bundle: self.bundle.path.display().to_string(),
            rootfs: if options.without_rootfs { Vec::new() } else { self.bundle.rootfs.clone() },
            terminal: stdio.terminal,
            stdin: stdio.stdin_path.clone(),
            stdout: stdio.stdout_path.clone(),
            stderr: stdio.stderr_path.clone(),
            options: options.config.map(runtime_options).into(),
            ..CreateTaskRequest::default()
        };
        self.call("create", |context| self.client.create(context, &request)).map(|response| response.pid)
    }

    /// Checks how the pod was started, `booted` or `restored`, once its container has been created; returns the microseconds
    /// from the start of its VMM to the agent's first answer.
    ///
    /// # Errors
    /// When it was started in another way.
    pub(crate) fn expect_started(&self, how: &str) -> Outcome<u64> {
        let log = self.log.until("agent ready", CALL_LIMIT)?;
        let expected = format!("agent ready, {how}: ");
        let after = log.split_once(&expected).map(|(_, after)| after);
        let digits = after.and_then(|after| after.split(' ').next());
        digits
            .and_then(|digits| digits.parse().ok())
            .explain(|| format!("the pod was not {how}; the shim's log: {log:?}"))
    }

    /// Starts the container's process (`exec` empty) or an exec; returns the process id.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn start(&self, exec: &str) -> Result<u32, CallError> {
        let request = StartRequest { id: self.id(), exec_id: exec.into(), ..StartRequest::default() };
        self.call("start", |context| self.client.start(context, &request)).map(|response| response.pid)
    }

    /// Adds an exec of an OCI process object.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn exec(&self, exec: &str, process: &Value, stdio: &Stdio) -> Result<(), CallError> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.to_string().into_bytes(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: self.id(),
            exec_id: exec.into(),
            terminal: stdio.terminal,
            stdin: stdio.stdin_path.clone(),
            stdout: stdio.stdout_path.clone(),
            stderr: stdio.stderr_path.clone(),
            spec: MessageField::some(spec),
            ..ExecProcessRequest::default()
        };
        self.call("exec", |context| self.client.exec(context, &request)).map(drop)
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// When it has not ended within `limit`, or is unknown.
    pub(crate) fn wait(&self, exec: &str, limit: Duration) -> Result<WaitResponse, CallError> {
        let request = WaitRequest { id: self.id(), exec_id: exec.into(), ..WaitRequest::default() };
        call("wait", limit, |context| self.client.wait(context, &request))
    }

    /// The state of a process.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn state(&self, exec: &str) -> Result<StateResponse, CallError> {
        let request = StateRequest { id: self.id(), exec_id: exec.into(), ..StateRequest::default() };
        self.call("state", |context| self.client.state(context, &request))
    }

    /// Sends a signal to a process, or to every process of the container.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn kill(&self, exec: &str, signal: u32, all: bool) -> Result<(), CallError> {
        let request =
            KillRequest { id: self.id(), exec_id: exec.into(), signal, all, ..KillRequest::default() };
        self.call("kill", |context| self.client.kill(context, &request)).map(drop)
    }

    /// Deletes a process that has ended.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn delete(&self, exec: &str) -> Result<DeleteResponse, CallError> {
        let request = DeleteRequest { id: self.id(), exec_id: exec.into(), ..DeleteRequest::default() };
        self.call("delete", |context| self.client.delete(context, &request))
    }

    /// Process ids of the container.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn pids(&self) -> Result<Vec<u32>, CallError> {
        let request = PidsRequest { id: self.id(), ..PidsRequest::default() };
        let response = self.call("pids", |context| self.client.pids(context, &request))?;
        Ok(response.processes.iter().map(|process| process.pid).collect())
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn pause(&self) -> Result<(), CallError> {
        let request = PauseRequest { id: self.id(), ..PauseRequest::default() };
        self.call("pause", |context| self.client.pause(context, &request)).map(drop)
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn resume(&self) -> Result<(), CallError> {
        let request = ResumeRequest { id: self.id(), ..ResumeRequest::default() };
        self.call("resume", |context| self.client.resume(context, &request)).map(drop)
    }

    /// Changes the size of a process's terminal.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn resize(&self, exec: &str, width: u32, height: u32) -> Result<(), CallError> {
        let request = ResizePtyRequest {
            id: self.id(),
            exec_id: exec.into(),
            width,
            height,
            ..ResizePtyRequest::default()
        };
        self.call("resize-pty", |context| self.client.resize_pty(context, &request)).map(drop)
    }

    /// Closes a process's standard input.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn close_stdin(&self, exec: &str) -> Result<(), CallError> {
        let request =
            CloseIORequest { id: self.id(), exec_id: exec.into(), stdin: true, ..CloseIORequest::default() };
        self.call("close-io", |context| self.client.close_io(context, &request)).map(drop)
    }

    /// Changes limits, given as the OCI `linux.resources` object.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn update(&self, resources: &Value) -> Result<(), CallError> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
            ..Any::default()
        };
        let request = UpdateTaskRequest {
            id: self.id(),
            resources: MessageField::some(resources),
            ..UpdateTaskRequest::default()
        };
        self.call("update", |context| self.client.update(context, &request)).map(drop)
    }

    /// The container's figures.
    ///
    /// # Errors
    /// What the shim refuses, and statistics that are not of control groups version 2.
    pub(crate) fn stats(&self) -> Outcome<Metrics> {
        let request = StatsRequest { id: self.id(), ..StatsRequest::default() };
        let response = self.call("stats", |context| self.client.stats(context, &request))?;
        let any = response.stats.as_ref().explain(|| "stats: an empty answer".into())?;
        if !any.type_url.ends_with("io.containerd.cgroups.v2.Metrics") {
            fail!("stats: type {:?}, which containerd does not take for version 2", any.type_url)
        }
        Metrics::parse_from_bytes(&any.value).explain(|| "stats".into())
    }

    /// Who serves.
    ///
    /// # Errors
    /// When it does not answer.
    pub(crate) fn connect(&self) -> Result<ConnectResponse, CallError> {
        let request = ConnectRequest { id: self.id(), ..ConnectRequest::default() };
        self.call("connect", |context| self.client.connect(context, &request))
    }

    /// Asks the shim to end, which it does when it has no container any more.
    ///
    /// # Errors
    /// A refusal. That the connection breaks is none.
    pub(crate) fn shutdown(&self) -> Result<(), CallError> {
        let request = ShutdownRequest { id: self.id(), ..ShutdownRequest::default() };
        match self.call("shutdown", |context| self.client.shutdown(context, &request)) {
            Err(error) if error.code != Code::UNKNOWN => Err(error),
            _ => Ok(()),
        }
    }

    fn id(&self) -> String {
        self.bundle.id.clone()
    }

    fn call<T>(
        &self,
        name: &'static str,
        request: impl FnOnce(context::Context) -> ttrpc::Result<T>,
    ) -> Result<T, CallError> {
        call(name, CALL_LIMIT, request)
    }
}

/// Makes a call, and takes its refusal for what it is.
///
/// # Errors
/// The refusal, or that there is no answer within `limit`.
pub(crate) fn call<T>(
    call: &'static str,
    limit: Duration,
    request: impl FnOnce(context::Context) -> ttrpc::Result<T>,
) -> Result<T, CallError> {
    let nanoseconds = i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX);
    request(context::with_timeout(nanoseconds)).map_err(|error| match error {
        ttrpc::Error::RpcStatus(status) => CallError { call, code: status.code(), message: status.message },
        // Not an answer of the shim: the connection broke, or the time is over.
        other => CallError { call, code: Code::UNKNOWN, message: other.to_string() },
    })
}

/// `runtimeoptions.v1.Options` with its `config_path`, field 2.
fn runtime_options(config: &Path) -> Any {
    let mut value = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut value);
    let written = stream.write_string(2, &config.display().to_string()).and_then(|()| stream.flush());
    drop(stream);
    debug_assert!(written.is_ok(), "a vector takes all");
    Any { type_url: "runtimeoptions.v1.Options".into(), value, ..Any::default() }
}
