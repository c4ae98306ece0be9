//! A pod, with the steps that the kubelet takes for it.

use std::fs;
use std::path::{Path, PathBuf};

use bulkhead_cri::proto::{self, PodSandboxState};
use protobuf::MessageField;

use super::container::{Container, Ended, shell};
use super::{CGROUP, Handler, IMAGE, Node, make_control_group};
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::{ensure, ensure_eq};

/// A pod that was started.
pub struct Pod<'a> {
    /// Where it runs.
    pub node: &'a Node,
    /// What is known of it.
    pub known: Known,
}

/// What has to be remembered of a pod.
#[derive(Debug, Clone)]
pub struct Known {
    /// containerd's name for it.
    pub id: String,
    /// What it was asked for with.
    pub config: proto::PodSandboxConfig,
    /// Its control group.
    pub group: PathBuf,
    logs: PathBuf,
}

impl<'a> Pod<'a> {
    /// Starts a pod with what the kubelet gives every pod, changed by `configure`.
    ///
    /// # Errors
    /// What containerd refuses.
    pub fn run(
        node: &'a Node,
        handler: Handler,
        name: &str,
        configure: impl FnOnce(&mut proto::PodSandboxConfig),
    ) -> Outcome<Self> {
        let uid = format!("{name}-{}", node.number());
        let group = Path::new("/sys/fs/cgroup").join(CGROUP).join(&uid);
        make_control_group(&group)?;
        let logs = node.containerd().path().join("logs").join(&uid);
        fs::create_dir_all(&logs).explain(|| format!("make {}", logs.display()))?;
        let mut config = proto::PodSandboxConfig {
            metadata: MessageField::some(proto::PodSandboxMetadata {
                name: name.to_owned(),
                uid: uid.clone(),
                namespace: "tests".to_owned(),
                ..Default::default()
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            labels: [("app".to_owned(), uid.clone())].into(),
            linux: MessageField::some(proto::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{CGROUP}/{uid}"),
                security_context: MessageField::some(proto::LinuxSandboxSecurityContext {
                    namespace_options: MessageField::some(namespaces()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        configure(&mut config);
        let request = proto::RunPodSandboxRequest {
            config: MessageField::some(config.clone()),
            runtime_handler: handler.name().to_owned(),
            ..Default::default()
        };
        let result = node.client().run_pod_sandbox(&request);
        if result.is_err() {
            // As the kubelet does with a pod that did not start.
            let _ = fs::remove_dir_all(&logs);
            remove_group(&group)?;
        }
        let id = result.explain(|| format!("pod {name} on {}", handler.name()))?.pod_sandbox_id;
        Ok(Self { node, known: Known { id, config, group, logs } })
    }

    /// The pod's state and addresses.
    ///
    /// # Errors
    /// When containerd does not know it.
    pub(crate) fn status(&self) -> Outcome<proto::PodSandboxStatus> {
        let request =
            proto::PodSandboxStatusRequest { pod_sandbox_id: self.known.id.clone(), ..Default::default() };
        let answer = self.node.client().pod_sandbox_status(&request).explain(|| "pod status".into())?;
        answer.status.into_option().explain(|| "a pod status without a status".into())
    }

    /// The pod's IPv4 address.
    ///
    /// # Errors
    /// When it has none.
    pub fn address(&self) -> Outcome<String> {
        let ip = self.status()?.network.ip.clone();
        ensure!(!ip.is_empty(), "the pod has no address");
        Ok(ip)
    }

    /// Waits until the pod is in a state.
    ///
    /// # Errors
    /// When it does not come to that.
    pub(crate) fn wait_for(&self, state: PodSandboxState) -> Outcome {
        eventually("the pod's state", super::CALL_LIMIT, || {
            ensure_eq!(self.status()?.state.enum_value_or_default(), state, "state");
            Ok(())
        })
    }

    /// Adds a container that runs a shell script, with what the kubelet gives every container, changed by `configure`.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn create(
        &self,
        name: &str,
        script: &str,
        configure: impl FnOnce(&mut proto::ContainerConfig),
    ) -> Outcome<Container<'a>> {
        let attempt = self.node.number();
        let mut config = proto::ContainerConfig {
            metadata: MessageField::some(proto::ContainerMetadata {
                name: name.to_owned(),
                attempt,
                ..Default::default()
            }),
            image: MessageField::some(proto::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: shell(script),
            log_path: format!("{name}-{attempt}.log"),
            linux: MessageField::some(proto::LinuxContainerConfig {
                resources: MessageField::some(proto::LinuxContainerResources::default()),
                security_context: MessageField::some(proto::LinuxContainerSecurityContext {
                    namespace_options: MessageField::some(namespaces()),
                    masked_paths: strings(&MASKED),
                    readonly_paths: strings(&READ_ONLY),
                    seccomp: MessageField::some(proto::SecurityProfile {
                        profile_type: proto::ProfileType::Unconfined.into(),
                        ..Default::default()
                    }),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        configure(&mut config);
        let log = self.known.logs.join(&config.log_path);
        let request = proto::CreateContainerRequest {
            pod_sandbox_id: self.known.id.clone(),
            config: MessageField::some(config),
            sandbox_config: MessageField::some(self.known.config.clone()),
            ..Default::default()
        };
        let answer =
            self.node.client().create_container(&request).explain(|| format!("create container {name}"))?;
        Ok(Container { node: self.node, id: answer.container_id, log })
    }

    /// The same, and starts it.
    ///
    /// # Errors
    /// What containerd refuses.
    pub fn start(
        &self,
        name: &str,
        script: &str,
        configure: impl FnOnce(&mut proto::ContainerConfig),
    ) -> Outcome<Container<'a>> {
        let container = self.create(name, script, configure)?;
        container.start()?;
        Ok(container)
    }

    /// The same, waits for its end and removes it.
    ///
    /// # Errors
    /// What containerd refuses.
    pub fn run_script(
        &self,
        name: &str,
        script: &str,
        configure: impl FnOnce(&mut proto::ContainerConfig),
    ) -> Outcome<Ended> {
        let container = self.start(name, script, configure)?;
        let ended = container.wait()?;
        container.remove()?;
        Ok(ended)
    }

    /// Stops the pod.
    ///
    /// # Errors
    /// What containerd refuses.
    pub(crate) fn stop(&self) -> Outcome {
        let request =
            proto::StopPodSandboxRequest { pod_sandbox_id: self.known.id.clone(), ..Default::default() };
        self.node.client().stop_pod_sandbox(&request).explain(|| "stop the pod".into()).map(drop)
    }

    /// Removes the pod, which has to be stopped.
    ///
    /// # Errors
    /// What containerd refuses, and when something of it is left.
    pub(crate) fn remove(self) -> Outcome {
        let request = proto::RemovePodSandboxRequest { pod_sandbox_id: self.known.id, ..Default::default() };
        self.node.client().remove_pod_sandbox(&request).explain(|| "remove the pod".into())?;
        let _ = fs::remove_dir_all(&self.known.logs);
        remove_group(&self.known.group)
    }

    /// Stops and removes the pod.
    ///
    /// # Errors
    /// As [`stop`](Self::stop) and [`remove`](Self::remove).
    pub fn finish(self) -> Outcome {
        self.stop()?;
        self.remove()
    }
}

/// The pod's own control group goes as the kubelet removes it: it must be empty.
fn remove_group(group: &Path) -> Outcome {
    eventually("the pod's control group is empty", super::CALL_LIMIT, || {
        fs::remove_dir(group).explain(|| format!("remove {}", group.display()))
    })
}

/// What the kubelet asks for unless a pod says something else.
fn namespaces() -> proto::NamespaceOption {
    proto::NamespaceOption { pid: proto::NamespaceMode::CONTAINER.into(), ..Default::default() }
}

/// What the kubelet has masked and read-only in containers that are not privileged.
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|&text| text.to_owned()).collect()
}
