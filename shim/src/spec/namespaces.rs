//! Namespaces: the pod's own take the place of the host's.
//!
//! A pod has one network, one IPC and one host name, those of its guest. A PID namespace may be a container's own, or
//! that of the pod's first container.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType};

use super::SpecError;

/// What a container can share with others of its pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNamespaces {
    /// The process id that containerd was told for every container of the pod; none before the first.
    pub host_pid: Option<u32>,
    /// The process in the guest whose PID namespace stands for the one of `host_pid`, if that has its own.
    pub first_process: Option<u32>,
    /// Whether the container is part of a Kubernetes pod (also as its sandbox).
    pub is_pod: bool,
}

/// Rewrites the namespaces of a container; tells whether it shares the guest's UTS namespace.
pub(super) fn translate(linux: &mut Linux, pod: &PodNamespaces) -> Result<bool, SpecError> {
    let wanted = linux.namespaces().clone().unwrap_or_default();
    let has = |kind| wanted.iter().any(|namespace| namespace.typ() == kind);
    if !has(LinuxNamespaceType::Network) {
        return Err(SpecError::HostNetwork);
    }
    let mut kept = Vec::new();
    for namespace in wanted.iter() {
        if let Some(namespace) = translate_one(namespace, pod)? {
            kept.push(namespace);
        }
    }
    let own_uts = kept.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    linux.set_namespaces(Some(kept));
    Ok(!own_uts)
}

fn translate_one(
    namespace: &LinuxNamespace,
    pod: &PodNamespaces,
) -> Result<Option<LinuxNamespace>, SpecError> {
    let path = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
    match (namespace.typ(), path) {
        // The guest's are the pod's.
        (LinuxNamespaceType::Network, _) => Ok(None),
        (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, Some(_)) => Ok(None),
        (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, None) if pod.is_pod => Ok(None),
        (LinuxNamespaceType::Pid, Some(path)) => shared_pid(path, pod).map(Some),
        (kind @ (LinuxNamespaceType::User | LinuxNamespaceType::Time), Some(path)) => {
            Err(SpecError::HostNamespace { kind, path: path.clone() })
        }
        (kind, Some(_)) => Ok(Some(new(kind))),
        (kind, None) => Ok(Some(new(kind))),
    }
}

/// A PID namespace by path is the pod's if it is that of the process that stands for the pod.
fn shared_pid(path: &Path, pod: &PodNamespaces) -> Result<LinuxNamespace, SpecError> {
    let kind = LinuxNamespaceType::Pid;
    let is_pods = pod.host_pid.is_some_and(|pid| path == Path::new(&format!("/proc/{pid}/ns/pid")));
    match pod.first_process {
        Some(process) if is_pods => {
            let mut namespace = new(kind);
            namespace.set_path(Some(PathBuf::from(format!("/proc/{process}/ns/pid"))));
            Ok(namespace)
        }
        _ => Err(SpecError::HostNamespace { kind, path: path.to_owned() }),
    }
}

fn new(kind: LinuxNamespaceType) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace
}
