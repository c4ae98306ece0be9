//! Drives a shim's Sandbox API the way containerd does for runtimes with `sandboxer = "shim"`: `start` in a bundle without a
//! specification, then the sandbox, then containers in it through the Task API at the same address.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message, MessageField};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::{Client, Code};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::bundle::Bundle;
use crate::ensure;
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::shim::{CALL_LIMIT, CallError, ShimHost, call};
use crate::stdio::{Reader, Reading};

/// What a pod is to be, as the kubelet would write it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct PodSettings<'a> {
    /// Host name.
    pub hostname: &'a str,
    /// A name server.
    pub nameserver: &'a str,
    /// The pod's cgroup.
    pub cgroup_parent: &'a str,
    /// A kernel parameter and its value.
    pub sysctl: Option<(&'a str, &'a str)>,
    /// Whether it wants the node's network.
    pub host_network: bool,
}

impl PodSettings<'_> {
    /// `runtime.v1.PodSandboxConfig`.
    fn encode(&self) -> Any {
        let dns = message(|to| to.write_string(1, self.nameserver));
        // NODE is 2.
        let namespaces = message(|to| to.write_int32(1, if self.host_network { 2 } else { 0 }));
        let security = message(|to| to.write_bytes(1, &namespaces));
        let linux = message(|to| {
            to.write_string(1, self.cgroup_parent)?;
            to.write_bytes(2, &security)?;
            if let Some((name, value)) = self.sysctl {
                let entry = message(|to| {
                    to.write_string(1, name)?;
                    to.write_string(2, value)
                });
                to.write_bytes(3, &entry)?;
            }
            Ok(())
        });
        let value = message(|to| {
            to.write_string(2, self.hostname)?;
            if !self.nameserver.is_empty() {
                to.write_bytes(4, &dns)?;
            }
            to.write_bytes(8, &linux)
        });
        Any { type_url: "runtime.v1.PodSandboxConfig".into(), value, ..Any::default() }
    }
}

type Written = containerd_shim_protos::protobuf::Result<()>;

fn message(write: impl FnOnce(&mut CodedOutputStream<'_>) -> Written) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut bytes);
    let written = write(&mut stream).and_then(|()| stream.flush());
    drop(stream);
    debug_assert!(written.is_ok(), "a vector takes all");
    bytes
}

/// A shim that serves the Sandbox API.
pub(crate) struct Sandbox {
    /// Its bundle: a directory without a specification.
    pub bundle: Bundle,
    /// The address of its socket.
    pub address: String,
    client: SandboxClient,
    /// What it writes to its log.
    pub log: Reader,
}

impl Sandbox {
    /// Starts a shim for a sandbox, with the runtime options that name `config`.
    ///
    /// # Errors
    /// When it fails, or its answer is not what containerd understands.
    pub(crate) fn launch(host: &ShimHost, id: &str, config: Option<&Path>) -> Outcome<Self> {
        let path = host.path().join("bundles").join(id);
        fs::create_dir_all(&path).explain(|| format!("make {}", path.display()))?;
        let log = path.join("log");
        mkfifo(&log, Mode::S_IRWXU).explain(|| format!("make FIFO {}", log.display()))?;
        let log = Reader::new(log, Reading::AtOnce)?;
        let bundle = Bundle { id: id.to_owned(), path, upper: PathBuf::new(), rootfs: Vec::new() };
        let address = host.start_action(&bundle, config)?;
        let client = Client::connect(&address).explain(|| format!("connect to the shim at {address}"))?;
        Ok(Self { bundle, address, client: SandboxClient::new(client), log })
    }

    /// Creates the sandbox.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn create(&self, settings: &PodSettings<'_>) -> Result<(), CallError> {
        let request = CreateSandboxRequest {
            sandbox_id: self.id(),
            bundle_path: self.bundle.path.display().to_string(),
            options: MessageField::some(settings.encode()),
            ..CreateSandboxRequest::default()
        };
        call("create-sandbox", CALL_LIMIT, |context| self.client.create_sandbox(context, &request)).map(drop)
    }

    /// Starts it; returns its process id.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn start(&self) -> Result<u32, CallError> {
        let request = StartSandboxRequest { sandbox_id: self.id(), ..StartSandboxRequest::default() };
        call("start-sandbox", CALL_LIMIT, |context| self.client.start_sandbox(context, &request))
            .map(|response| response.pid)
    }

    /// The system and the architecture of what runs in it.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn platform(&self) -> Result<(String, String), CallError> {
        let request = PlatformRequest { sandbox_id: self.id(), ..PlatformRequest::default() };
        let response = call("platform", CALL_LIMIT, |context| self.client.platform(context, &request))?;
        let platform = response.platform.unwrap_or_default();
        Ok((platform.os, platform.architecture))
    }

    /// How it is.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn status(&self) -> Result<SandboxStatusResponse, CallError> {
        let request = SandboxStatusRequest { sandbox_id: self.id(), verbose: true, ..Default::default() };
        call("sandbox-status", CALL_LIMIT, |context| self.client.sandbox_status(context, &request))
    }

    /// Whether it is there.
    ///
    /// # Errors
    /// When it is not.
    pub(crate) fn ping(&self) -> Result<(), CallError> {
        let request = PingRequest { sandbox_id: self.id(), ..PingRequest::default() };
        call("ping-sandbox", CALL_LIMIT, |context| self.client.ping_sandbox(context, &request)).map(drop)
    }

    /// Waits for its end, on a thread of its own.
    pub(crate) fn waiting(&self, limit: Duration) -> JoinHandle<Result<WaitSandboxResponse, CallError>> {
        let (client, sandbox_id) = (self.client.clone(), self.id());
        thread::spawn(move || {
            let request = WaitSandboxRequest { sandbox_id, ..WaitSandboxRequest::default() };
            call("wait-sandbox", limit, |context| client.wait_sandbox(context, &request))
        })
    }

    /// Ends it.
    ///
    /// # Errors
    /// What the shim refuses.
    pub(crate) fn stop(&self) -> Result<(), CallError> {
        let request =
            StopSandboxRequest { sandbox_id: self.id(), timeout_secs: 5, ..StopSandboxRequest::default() };
        call("stop-sandbox", CALL_LIMIT, |context| self.client.stop_sandbox(context, &request)).map(drop)
    }

    /// The pod's figures.
    ///
    /// # Errors
    /// What the shim refuses, and statistics that are not of control groups version 2.
    pub(crate) fn metrics(&self) -> Outcome<Metrics> {
        let request = SandboxMetricsRequest { sandbox_id: self.id(), ..SandboxMetricsRequest::default() };
        let response =
            call("sandbox-metrics", CALL_LIMIT, |context| self.client.sandbox_metrics(context, &request))?;
        let metric = response.metrics.as_ref().explain(|| "sandbox-metrics: an empty answer".into())?;
        ensure!(metric.id == self.id() && metric.timestamp.seconds > 0, "whose and when: {metric:?}");
        let any = metric.data.as_ref().explain(|| "sandbox-metrics: no figures".into())?;
        ensure!(any.type_url.ends_with("io.containerd.cgroups.v2.Metrics"), "type {:?}", any.type_url);
        Metrics::parse_from_bytes(&any.value).explain(|| "sandbox-metrics".into())
    }

    /// Ends the shim, waits until it is gone, and removes the bundle after the cleanup that containerd does then.
    ///
    /// # Errors
    /// When the shim stays, or something of the bundle does.
    pub(crate) fn shut_down(self, host: &ShimHost, shim: i32) -> Outcome<DeleteResponse> {
        let request = ShutdownSandboxRequest { sandbox_id: self.id(), ..ShutdownSandboxRequest::default() };
        let answer =
            call("shutdown-sandbox", CALL_LIMIT, |context| self.client.shutdown_sandbox(context, &request));
        match answer {
            // The connection may end before the answer is there.
            Err(error) if error.code != Code::UNKNOWN => return Err(error.into()),
            _ => {}
        }
        node::wait_for_end("the shim", shim, Duration::from_secs(5))?;
        let deleted = host.delete(&self.bundle)?;
        fs::remove_dir_all(&self.bundle.path).explain(|| format!("remove {}", self.bundle.path.display()))?;
        Ok(deleted)
    }

    fn id(&self) -> String {
        self.bundle.id.clone()
    }
}
