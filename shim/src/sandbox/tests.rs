//! The Sandbox API, with a guest that the tests play, and what becomes of a pod's configuration.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bulkhead_vmm_protocol::ExitReason;
use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, ShutdownRequest};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest,
    WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use oci_spec::runtime::LinuxNamespaceType;
use protobuf::CodedOutputStream;
use protobuf::well_known_types::any::Any;
use serde_json::json;
use tempfile::TempDir;
use ttrpc::asynchronous::Server;
use ttrpc::context;

use super::config::{ConfigError, Dns, PodConfig, Resources};
use super::service::SandboxService;
use super::spec;
use crate::error::Code;
use crate::events::Publisher;
use crate::options::RuntimeOptions;
use crate::task::service::services;
use crate::task::shim::Shim;
use crate::task::tests::guest::Guest;

const LIMIT: Duration = Duration::from_secs(10);

/// A field of a message: its number, and what it holds.
enum Field<'a> {
    Text(&'a str),
    Number(i64),
    Message(Vec<u8>),
}
use Field::{Message, Number, Text};

fn message(fields: &[(u32, Field<'_>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut stream = CodedOutputStream::vec(&mut bytes);
    for (number, field) in fields {
        match field {
            Text(text) => stream.write_string(*number, text),
            Number(value) => stream.write_int64(*number, *value),
            Message(value) => stream.write_bytes(*number, value),
        }
        .unwrap();
    }
    stream.flush().unwrap();
    drop(stream);
    bytes
}

fn pair(key: &str, value: &str) -> Field<'static> {
    Message(message(&[(1, Text(key)), (2, Text(value))]))
}

fn any(value: Vec<u8>) -> Any {
    Any { type_url: "runtime.v1.PodSandboxConfig".into(), value, ..Default::default() }
}

/// What the kubelet writes for a pod with limits.
fn kubelets() -> Vec<u8> {
    let metadata = message(&[(1, Text("web-0")), (2, Text("uid-1")), (3, Text("shop")), (4, Number(0))]);
    let dns = message(&[(1, Text("10.0.0.10")), (2, Text("svc")), (3, Text("ndots:5"))]);
    let namespaces = message(&[(2, Number(1))]);
    let linux = message(&[
        (1, Text("/kubepods/burstable/pod1")),
        (2, Message(message(&[(1, Message(namespaces))]))),
        (3, pair("net.core.somaxconn", "1024")),
        (4, Message(message(&[(4, Number(1))]))),
        (
            5,
            Message(message(&[
                (1, Number(100_000)),
                (2, Number(-1)),
                (3, Number(512)),
                (4, Number(1 << 30)),
            ])),
        ),
    ]);
    message(&[
        (1, Message(metadata)),
        (2, Text("web-0")),
        (3, Text("/var/log/pods/1")),
        (4, Message(dns)),
        (6, pair("app", "web")),
        (7, pair("io.bulkhead.vcpus", "2")),
        (7, pair("example.com/secret", "x")),
        (8, Message(linux)),
        (99, Text("from the future")),
    ])
}

#[test]
fn the_kubelets_configuration_is_understood() {
    let config = PodConfig::from_any(&any(kubelets())).unwrap();
    assert_eq!(
        (config.name.as_str(), config.uid.as_str(), config.namespace.as_str()),
        ("web-0", "uid-1", "shop")
    );
    assert_eq!((config.hostname.as_str(), config.log_directory.as_str()), ("web-0", "/var/log/pods/1"));
    let dns = Dns {
        servers: vec!["10.0.0.10".into()],
        searches: vec!["svc".into()],
        options: vec!["ndots:5".into()],
    };
    assert_eq!(config.dns, Some(dns));
    assert_eq!(config.cgroup_parent, "/kubepods/burstable/pod1");
    assert_eq!(config.sysctls["net.core.somaxconn"], "1024");
    // The plugin's own for every pod.
    assert_eq!(config.sysctls["net.ipv4.ip_unprivileged_port_start"], "0");
    let resources = Resources { cpu_period: 100_000, cpu_quota: -1, cpu_shares: 512, memory: 1 << 30 };
    assert_eq!(config.resources, Some(resources));
    assert!(!config.host_network);
    assert_eq!(PodConfig::from_any(&Any::new()).unwrap(), PodConfig::default());
}

#[test]
fn what_is_no_configuration_is_refused() {
    let other = Any { type_url: "example.com/Other".into(), ..Default::default() };
    assert!(matches!(PodConfig::from_any(&other), Err(ConfigError::UnknownType(_))));
    assert!(matches!(PodConfig::from_any(&any(vec![0x0a, 200])), Err(ConfigError::Malformed(_))));
    assert!(matches!(PodConfig::from_any(&any(vec![0; 2 << 20])), Err(ConfigError::TooLarge(_))));
    // Cut anywhere, it is an error or a smaller message, never worse.
    let whole = kubelets();
    for length in 0..whole.len() {
        let _ = PodConfig::from_any(&any(whole[..length].to_vec()));
    }
}

fn sandbox_spec(config: &[u8], netns: &str) -> Result<oci_spec::runtime::Spec, crate::error::ApiError> {
    let config = PodConfig::from_any(&any(config.to_vec())).unwrap();
    let annotations = HashMap::from([("from.containerd".to_owned(), "yes".to_owned())]);
    spec::build(Path::new("/nonexistent"), "s1", &config, netns, &annotations, "k8s.io")
}

#[test]
fn a_sandbox_is_specified_as_its_pause_container_would_be() {
    let spec = sandbox_spec(&kubelets(), "/run/netns/1").unwrap();
    assert_eq!(spec.hostname().as_deref(), Some("web-0"));
    let annotations = spec.annotations().clone().unwrap();
    let annotation = |key: &str| annotations.get(key).map(String::as_str);
    for (key, value) in [
        ("io.kubernetes.cri.container-type", "sandbox"),
        ("io.kubernetes.cri.sandbox-id", "s1"),
        ("io.kubernetes.cri.sandbox-name", "web-0"),
        ("io.kubernetes.cri.sandbox-namespace", "shop"),
        ("io.kubernetes.cri.sandbox-uid", "uid-1"),
        ("io.kubernetes.cri.sandbox-memory", "1073741824"),
        ("io.kubernetes.cri.sandbox-cpu-quota", "-1"),
        ("io.kubernetes.cri.sandbox-cpu-period", "100000"),
        ("io.kubernetes.cri.sandbox-cpu-shares", "512"),
        ("io.bulkhead.vcpus", "2"),
        ("from.containerd", "yes"),
    ] {
        assert_eq!(annotation(key), Some(value), "{key}");
    }
    assert_eq!(annotation("example.com/secret"), None, "not ours");
    let linux = spec.linux().clone().unwrap();
    assert_eq!(linux.cgroups_path().as_deref(), Some(Path::new("/kubepods/burstable/pod1/s1")));
    assert_eq!(linux.sysctl().as_ref().unwrap()["net.core.somaxconn"], "1024");
    let network =
        linux.namespaces().iter().flatten().find(|n| n.typ() == LinuxNamespaceType::Network).unwrap();
    assert_eq!(network.path().as_deref(), Some(Path::new("/run/netns/1")));
    assert_eq!(crate::spec::sandbox::Role::of(&spec).unwrap(), crate::spec::sandbox::Role::Sandbox);
}

#[test]
fn a_sandboxs_cgroup_is_where_others_have_theirs() {
    let cgroup = |parent: &str| {
        let linux = message(&[(1, Text(parent))]);
        let spec = sandbox_spec(&message(&[(8, Message(linux))]), "").unwrap();
        spec.linux().as_ref().unwrap().cgroups_path().clone().unwrap().display().to_string()
    };
    assert_eq!(cgroup("/kubepods/pod1"), "/kubepods/pod1/s1");
    assert_eq!(cgroup("/kubepods.slice/kubepods-pod1.slice"), "kubepods-pod1.slice:cri-containerd:s1");
    assert_eq!(cgroup(""), "/k8s.io/s1");
}

#[test]
fn a_pod_in_the_nodes_network_is_refused() {
    let namespaces = message(&[(1, Number(2))]);
    let linux = message(&[(2, Message(message(&[(1, Message(namespaces))])))]);
    let error = sandbox_spec(&message(&[(8, Message(linux))]), "").unwrap_err();
    assert_eq!(error.code, Code::INVALID_ARGUMENT);
    assert!(error.message.contains("host network"), "{error}");
}

/// A shim with its clients, and a guest for its sandbox.
struct Stage {
    directory: TempDir,
    shim: Arc<Shim>,
    service: Arc<SandboxService>,
    sandbox: SandboxClient,
    task: TaskClient,
    _server: Server,
}

impl Stage {
    async fn new() -> Stage {
        let directory = tempfile::tempdir().unwrap();
        let socket = format!("unix://{}", directory.path().join("shim").display());
        let shim = Arc::new(Shim::new(Publisher::start("", "test"), log::LevelFilter::Off));
        let service = SandboxService::new(&shim, RuntimeOptions::default());
        let mut server = Server::new()
            .bind(&socket)
            .unwrap()
            .register_service(services(&shim))
            .register_service(service.clone().services());
        server.start().await.unwrap();
        let client = Client::connect(&socket).await.unwrap();
        let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
        Stage { directory, shim, service, sandbox, task, _server: server }
    }

    /// The sandbox `p`, created.
    async fn created() -> (Stage, Guest) {
        let stage = Stage::new().await;
        let directory = stage.directory.path().join("pod");
        let (guest, pod) =
            Guest::start("p", directory.clone(), crate::pod::heartbeat::Heartbeat::default()).await;
        let mut slot = stage.shim.slot.lock().await;
        let config = PodConfig { hostname: "web-0".into(), ..PodConfig::default() };
        stage.service.adopt(&mut slot, "p", "web-0".into(), pod, &config, &directory).await.unwrap();
        drop(slot);
        (stage, guest)
    }

    async fn start(&self, id: &str) -> ttrpc::Result<u32> {
        let request = StartSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        self.sandbox.start_sandbox(ctx(), &request).await.map(|response| response.pid)
    }

    async fn stop(&self, id: &str) -> ttrpc::Result<()> {
        let request = StopSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        self.sandbox.stop_sandbox(ctx(), &request).await.map(drop)
    }

    async fn wait(&self) -> ttrpc::Result<WaitSandboxResponse> {
        let request = WaitSandboxRequest { sandbox_id: "p".into(), ..Default::default() };
        self.sandbox.wait_sandbox(ctx(), &request).await
    }

    async fn ping(&self) -> ttrpc::Result<()> {
        let request = PingRequest { sandbox_id: "p".into(), ..Default::default() };
        self.sandbox.ping_sandbox(ctx(), &request).await.map(drop)
    }

    async fn status(&self, id: &str) -> ttrpc::Result<SandboxStatusResponse> {
        let request = SandboxStatusRequest { sandbox_id: id.into(), verbose: true, ..Default::default() };
        self.sandbox.sandbox_status(ctx(), &request).await
    }

    async fn shut_down(&self, id: &str) -> ttrpc::Result<()> {
        let request = ShutdownSandboxRequest { sandbox_id: id.into(), ..Default::default() };
        self.sandbox.shutdown_sandbox(ctx(), &request).await.map(drop)
    }

    async fn exits(&self) -> bool {
        tokio::time::timeout(Duration::from_millis(300), self.shim.exiting()).await.is_ok()
    }

    async fn container(&self, id: &str, annotations: serde_json::Value) -> ttrpc::Result<()> {
        self.container_beside(id, annotations, "").await
    }

    /// Creates a container in a PID namespace.
    async fn container_beside(
        &self,
        id: &str,
        annotations: serde_json::Value,
        pid: &str,
    ) -> ttrpc::Result<()> {
        let bundle = self.directory.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        fs::write(bundle.join("rootfs/file"), "x").unwrap();
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
            "annotations": annotations,
            "linux": {"namespaces": [{"type": "pid", "path": pid}, {"type": "mount"}, {"type": "network"}]}
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        let bundle = bundle.display().to_string();
        let request = CreateTaskRequest { id: id.into(), bundle, ..Default::default() };
        self.task.create(ctx(), &request).await.map(drop)
    }
}

fn ctx() -> context::Context {
    context::with_duration(LIMIT)
}

fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("not a status: {other}"),
    }
}

fn code<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> Code {
    refusal(result).0
}

fn member() -> serde_json::Value {
    json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "p"})
}

#[tokio::test]
async fn a_sandbox_lives_before_and_after_its_containers() {
    let (stage, guest) = Stage::created().await;
    assert_eq!(stage.status("p").await.unwrap().state, "SANDBOX_NOTREADY");
    let (early, message) = refusal(stage.container("early", member()).await);
    assert_eq!(early, Code::FAILED_PRECONDITION, "{message}");
    assert!(message.contains("has not been started"), "{message}");

    assert_eq!(stage.start("p").await.unwrap(), std::process::id());
    assert_eq!(guest.calls("Configure"), ["web-0"]);
    assert_eq!(code(stage.start("p").await), Code::FAILED_PRECONDITION);
    let status = stage.status("p").await.unwrap();
    assert_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", std::process::id()));
    assert!(status.created_at.seconds > 0 && status.exited_at.is_none());
    stage.ping().await.unwrap();
    let platform = PlatformRequest { sandbox_id: "p".into(), ..Default::default() };
    let platform = stage.sandbox.platform(ctx(), &platform).await.unwrap().platform;
    assert_eq!((platform.os.as_str(), platform.architecture.as_str()), ("linux", "amd64"));

    // One of Kubernetes', one that is only asked for here; no second sandbox, and none of another.
    stage.container("a", member()).await.unwrap();
    stage.container("b", json!({})).await.unwrap();
    assert_eq!(guest.calls("Mounts"), ["/etc/hostname /etc/hosts /etc/resolv.conf"; 2]);
    let sandbox = json!({"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "p"});
    assert_eq!(code(stage.container("c", sandbox).await), Code::FAILED_PRECONDITION);
    let other = json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "q"});
    assert_eq!(code(stage.container("d", other).await), Code::FAILED_PRECONDITION);

    // containerd asks for the shim's end after each task: it is not the tasks' to end.
    for id in ["a", "b"] {
        stage.task.delete(ctx(), &DeleteRequest { id: id.into(), ..Default::default() }).await.unwrap();
        stage.task.shutdown(ctx(), &ShutdownRequest { id: id.into(), ..Default::default() }).await.unwrap();
    }
    assert!(!stage.exits().await);
    assert_eq!(stage.status("p").await.unwrap().state, "SANDBOX_READY");

    let (waited, stopped) = tokio::join!(stage.wait(), async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stage.stop("p").await
    });
    stopped.unwrap();
    let waited = waited.unwrap();
    assert_eq!(waited.exit_status, 0, "its end was asked for");
    assert!(waited.exited_at.seconds > 0);
    stage.stop("p").await.unwrap();
    assert_eq!(stage.wait().await.unwrap(), waited);
    let status = stage.status("p").await.unwrap();
    assert_eq!((status.state.as_str(), &status.exited_at), ("SANDBOX_NOTREADY", &waited.exited_at));
    assert!(stage.ping().await.is_err());
    assert!(!stage.directory.path().join("pod").exists(), "the pod is released");
    assert!(!stage.exits().await, "it can still be asked about");

    assert_eq!(code(stage.shut_down("q").await), Code::NOT_FOUND);
    stage.shut_down("p").await.unwrap();
    assert!(stage.exits().await);
}

#[tokio::test]
async fn a_sandboxs_processes_are_shared_by_its_process_id() {
    let (stage, guest) = Stage::created().await;
    let pid = stage.start("p").await.unwrap();
    stage.container_beside("a", member(), &format!("/proc/{pid}/ns/pid")).await.unwrap();
    let shared = bulkhead_agent_protocol::POD_PID_NAMESPACE;
    assert_eq!(guest.calls("PidNamespace"), [shared], "that which the agent makes");
    let other = stage.container_beside("b", member(), "/proc/1/ns/pid").await;
    assert_eq!(code(other), Code::INVALID_ARGUMENT, "the host's");
}

#[tokio::test]
async fn a_sandbox_whose_machine_dies_is_not_ready_and_tells_why() {
    let (stage, guest) = Stage::created().await;
    stage.start("p").await.unwrap();
    stage.container("a", member()).await.unwrap();
    let (waited, ()) = tokio::join!(stage.wait(), async { guest.end(ExitReason::Panic) });
    assert_eq!(waited.unwrap().exit_status, 137);
    let status = stage.status("p").await.unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(status.info["reason"].contains("panicked"), "{:?}", status.info);
    let (dead, message) = refusal(stage.ping().await);
    assert_eq!(dead, Code::FAILED_PRECONDITION);
    assert!(message.contains("panicked"), "{message}");
    stage.stop("p").await.unwrap();
    assert_eq!(stage.wait().await.unwrap().exit_status, 137, "what was dead was not stopped");
    stage.shut_down("p").await.unwrap();
    assert!(stage.exits().await);
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_the_book() {
    let stage = Stage::new().await;
    assert_eq!(code(stage.start("p").await), Code::FAILED_PRECONDITION);
    assert_eq!(code(stage.stop("p").await), Code::NOT_FOUND);
    assert_eq!(code(stage.wait().await), Code::NOT_FOUND);
    assert_eq!(code(stage.status("p").await), Code::NOT_FOUND);
    assert_eq!(code(stage.ping().await), Code::NOT_FOUND);
    let create = |id: &str, bundle: &str, options: Any| CreateSandboxRequest {
        sandbox_id: id.into(),
        bundle_path: bundle.into(),
        options: protobuf::MessageField::some(options),
        ..Default::default()
    };
    let other = Any { type_url: "example.com/Other".into(), ..Default::default() };
    for request in [
        create("../p", "/tmp", Any::new()),
        create("p", "relative", Any::new()),
        create("p", "/tmp", other),
        create("p", "/tmp", any(vec![0x0a, 200])),
    ] {
        assert_eq!(code(stage.sandbox.create_sandbox(ctx(), &request).await), Code::INVALID_ARGUMENT);
    }
    // containerd does this after a creation that failed, and the shim has to go.
    stage.shut_down("p").await.unwrap();
    assert!(stage.exits().await);

    let (stage, _guest) = Stage::created().await;
    let request = create("p", "/tmp", Any::new());
    assert_eq!(code(stage.sandbox.create_sandbox(ctx(), &request).await), Code::ALREADY_EXISTS);
    assert_eq!(code(stage.start("q").await), Code::NOT_FOUND);
    let metrics = SandboxMetricsRequest { sandbox_id: "p".into(), ..Default::default() };
    assert_eq!(code(stage.sandbox.sandbox_metrics(ctx(), &metrics).await), Code::UNAVAILABLE);
    // A sandbox that was never started ends like others.
    stage.stop("p").await.unwrap();
    assert_eq!(code(stage.start("p").await), Code::FAILED_PRECONDITION);
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_started_is_ended() {
    let (stage, guest) = Stage::created().await;
    guest.refuse("Configure", Code::INTERNAL, "no such name");
    let (_, message) = refusal(stage.start("p").await);
    assert!(message.contains("no such name"), "{message}");
    assert_eq!(stage.status("p").await.unwrap().state, "SANDBOX_NOTREADY");
    stage.shut_down("p").await.unwrap();
    assert!(stage.exits().await);
    assert!(!stage.directory.path().join("pod").exists());
}
