//! Pods as the kubelet makes them: a containerd with its CRI plugin, a pod network, and a handler for each runtime.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bulkhead_cri::grpc::GrpcError;
use bulkhead_cri::{Client, proto};
use protobuf::MessageField;

use crate::containerd::client::NAMESPACE;
use crate::containerd::image::{self, Image, ImageError};
use crate::containerd::{Containerd, ContainerdError};
use crate::node;
use crate::runtime::Runtime;
use crate::workload::files;

/// One call may take this long.
const CALL_LIMIT: Duration = Duration::from_secs(60);
/// How long a container may be silent.
const OUTPUT_LIMIT: Duration = Duration::from_secs(60);
/// How often a container's log is looked at: what this costs is the same for all runtimes.
const POLL_INTERVAL: Duration = Duration::from_micros(200);
/// Where Debian has the CNI plugins.
const CNI_PLUGINS: &str = "/usr/lib/cni";
const BRIDGE: &str = "bulkhead-bench";

/// Why pods through the CRI can't be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    /// The pod network's plugins are not there.
    #[error("no CNI plugins: neither {0} nor {CNI_PLUGINS} is there")]
    NoPlugins(PathBuf),
    /// A file can't be written or read.
    #[error("cannot use {path}: {source}")]
    File {
        /// Which one.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// containerd does not start.
    #[error(transparent)]
    Containerd(#[from] ContainerdError),
    /// The image can't be imported.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A call failed.
    #[error(transparent)]
    Call(#[from] GrpcError),
    /// The container printed nothing.
    #[error("the container printed nothing within {} s", OUTPUT_LIMIT.as_secs())]
    Silent,
    /// The pod has no address.
    #[error("the pod has no IPv4 address but {0:?}")]
    Address(String),
    /// A program in a container failed.
    #[error("exit code {code}: {output}")]
    Failed {
        /// Its exit code.
        code: i32,
        /// What it said.
        output: String,
    },
    /// Traffic did not go as it should.
    #[error("traffic with the pod: {0}")]
    Traffic(#[source] io::Error),
}

/// The node.
pub(crate) struct Node {
    client: Client,
    logs: PathBuf,
    // Ends it when dropped.
    _containerd: Containerd,
}

/// A pod with one container whose program has begun to print.
pub(crate) struct Pod<'a> {
    node: &'a Node,
    pod: String,
    container: String,
    log: PathBuf,
}

/// How long the calls of a start took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct StartTimes {
    /// `RunPodSandbox`, network included.
    pub sandbox: Duration,
    /// `CreateContainer`.
    pub create: Duration,
    /// `StartContainer`, and what passed until the first byte of output was in the container's log.
    pub start: Duration,
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Node {
    /// Starts it in a new directory, with handlers for `runtimes`.
    ///
    /// # Errors
    /// What is missing, or does not work.
    pub(crate) async fn start(
        directory: &Path,
        image: &Image,
        runtimes: &[Runtime],
    ) -> Result<Self, CriError> {
        let ours = node::installed("cni");
        let plugins = if ours.is_dir() { ours.clone() } else { CNI_PLUGINS.into() };
        if !plugins.is_dir() {
            return Err(CriError::NoPlugins(ours));
        }
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| CriError::File { path, source }
        };
        let (network, logs) = (directory.join("cni"), directory.join("logs"));
        for path in [&network, &logs] {
            std::fs::create_dir_all(path).map_err(file(path))?;
        }
        let list = network.join("10-pods.conflist");
        std::fs::write(&list, network_configuration()).map_err(file(&list))?;
        let configuration = configuration(&network, &plugins, runtimes);
        let (containerd, images) = Containerd::start_with_cri(directory, &configuration).await?;
        image.import(&images).await?;
        let client = Client::connect(&containerd.socket(), CALL_LIMIT).await?;
        Ok(Self { client, logs, _containerd: containerd })
    }

    /// Starts a pod and in it the workload with `args`, and waits for the first byte of its output.
    ///
    /// # Errors
    /// What containerd refuses; the pod is removed then.
    pub(crate) async fn run(
        &self,
        runtime: &Runtime,
        args: &[&str],
    ) -> Result<(Pod<'_>, StartTimes), CriError> {
        let name = format!("{}-{}", runtime.kind.name(), NEXT.fetch_add(1, Ordering::Relaxed));
        let config = proto::PodSandboxConfig {
            metadata: MessageField::some(proto::PodSandboxMetadata {
                name: name.clone(),
                uid: name.clone(),
                namespace: "bench".to_owned(),
                ..Default::default()
            }),
            hostname: name.clone(),
            log_directory: self.logs.display().to_string(),
            linux: MessageField::some(proto::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{NAMESPACE}/{name}"),
                ..Default::default()
            }),
            ..Default::default()
        };
        let started = Instant::now();
        let request = proto::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: runtime.kind.name().to_owned(),
            ..Default::default()
        };
        let pod = self.client.run_pod_sandbox(&request).await?.pod_sandbox_id;
        let sandbox = started.elapsed();
        let log = self.logs.join(format!("{name}.log"));
        let mut pod = Pod { node: self, pod, container: String::new(), log };
        match pod.start(&name, args, config).await {
            Ok((create, start)) => Ok((pod, StartTimes { sandbox, create, start })),
            Err(error) => {
                // The first error is what matters.
                let _ = pod.stop().await;
                Err(error)
            }
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", BRIDGE]).status();
    }
}

impl Pod<'_> {
    async fn start(
        &mut self,
        name: &str,
        args: &[&str],
        sandbox: proto::PodSandboxConfig,
    ) -> Result<(Duration, Duration), CriError> {
        let started = Instant::now();
        let config = proto::ContainerConfig {
            metadata: MessageField::some(proto::ContainerMetadata {
                name: "workload".to_owned(),
                ..Default::default()
            }),
            image: MessageField::some(proto::ImageSpec {
                image: image::NAME.to_owned(),
                ..Default::default()
            }),
            args: args.iter().map(|&argument| argument.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: MessageField::some(proto::LinuxContainerConfig::default()),
            ..Default::default()
        };
        let request = proto::CreateContainerRequest {
            pod_sandbox_id: self.pod.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(sandbox),
            ..Default::default()
        };
        self.container = self.node.client.create_container(&request).await?.container_id;
        let create = started.elapsed();
        let request =
            proto::StartContainerRequest { container_id: self.container.clone(), ..Default::default() };
        self.node.client.start_container(&request).await?;
        while !std::fs::metadata(&self.log).is_ok_and(|log| log.len() > 0) {
            if started.elapsed() > OUTPUT_LIMIT {
                return Err(CriError::Silent);
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        Ok((create, started.elapsed() - create))
    }

    /// Runs the workload with `args` beside, to its end; gives its output and how long that took.
    ///
    /// # Errors
    /// What containerd refuses, and an exit code other than 0.
    pub(crate) async fn exec(&self, args: &[&str]) -> Result<(String, Duration), CriError> {
        let mut cmd = vec![files::PROGRAM.to_owned()];
        cmd.extend(args.iter().map(|&argument| argument.to_owned()));
        let request =
            proto::ExecSyncRequest { container_id: self.container.clone(), cmd, ..Default::default() };
        let started = Instant::now();
        let answer = self.node.client.exec_sync(&request).await?;
        let elapsed = started.elapsed();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match answer.exit_code {
            0 => Ok((text(&answer.stdout), elapsed)),
            code => Err(CriError::Failed { code, output: text(&answer.stdout) + &text(&answer.stderr) }),
        }
    }

    /// The pod's address.
    ///
    /// # Errors
    /// When it has none.
    pub(crate) async fn address(&self) -> Result<Ipv4Addr, CriError> {
        let request =
            proto::PodSandboxStatusRequest { pod_sandbox_id: self.pod.clone(), ..Default::default() };
        let status = self.node.client.pod_sandbox_status(&request).await?.status.unwrap_or_default();
        status.network.ip.parse().map_err(|_| CriError::Address(status.network.ip.clone()))
    }

    /// Stops and removes it, and tells how long that took.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) async fn stop(self) -> Result<Duration, CriError> {
        let client = &self.node.client;
        let started = Instant::now();
        let request = proto::StopPodSandboxRequest { pod_sandbox_id: self.pod.clone(), ..Default::default() };
        client.stop_pod_sandbox(&request).await?;
        let request = proto::RemovePodSandboxRequest { pod_sandbox_id: self.pod, ..Default::default() };
        client.remove_pod_sandbox(&request).await?;
        Ok(started.elapsed())
    }
}

fn configuration(network: &Path, plugins: &Path, runtimes: &[Runtime]) -> String {
    let runtime = "plugins.'io.containerd.cri.v1.runtime'";
    let handlers: String = runtimes.iter().map(Runtime::handler).collect();
    format!(
        "[plugins.'io.containerd.nri.v1.nri']\ndisable = true\n\
         [plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = \"{}\"\n\
         [plugins.'io.containerd.grpc.v1.cri']\ndisable_tcp_service = true\nstream_server_address = \"127.0.0.1\"\n\
         stream_server_port = \"0\"\n\
         [{runtime}]\nnetns_mounts_under_state_dir = true\n\
         [{runtime}.cni]\nbin_dirs = [\"{}\"]\nconf_dir = \"{}\"\n{handlers}",
        image::NAME,
        plugins.display(),
        network.display(),
    )
}

fn network_configuration() -> String {
    format!(
        r#"{{ "cniVersion": "1.0.0", "name": "bulkhead-bench", "plugins": [
            {{ "type": "bridge", "bridge": "{BRIDGE}", "isGateway": true, "ipMasq": false,
               "ipam": {{ "type": "host-local", "ranges": [[{{ "subnet": "10.89.0.0/16" }}]],
                          "routes": [{{ "dst": "0.0.0.0/0" }}] }} }} ] }}"#
    )
}
