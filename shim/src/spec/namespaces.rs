//! Namespaces: the pod's own take the place of the host's.
//!
//! A pod has one network, one IPC and one host name, those of its guest. A PID namespace may be a container's own, that of
//! another container, or that of the pod's first container. What asks for the host's PID or IPC namespace gets the pod's.

use std::path::{Path, PathBuf};

use bulkhead_agent_protocol::POD_PID_NAMESPACE;
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType};

use super::SpecError;
use crate::sandbox::FIRST_PROCESS;

/// What a container can share with others of its pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodNamespaces {
    /// The running containers of the pod.
    pub members: Vec<Member>,
    /// The process in the guest whose PID namespace is the pod's: that of its first container.
    pub first_process: Option<u32>,
    /// Whether the container is part of a Kubernetes pod (also as its sandbox).
    pub is_pod: bool,
}

impl PodNamespaces {
    /// The process ids that containerd was told of.
    pub(crate) fn taken_pids(&self) -> Vec<u32> {
        self.members.iter().map(|member| member.host_pid).collect()
    }
}

/// A running container, whose PID namespace another one may join.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// The process id that containerd was told.
    pub host_pid: u32,
    /// Its first process, as the guest counts it.
    pub guest_pid: u32,
}

/// Rewrites the namespaces of a container; tells whether it shares the guest's UTS namespace.
pub(super) fn translate(linux: &mut Linux, pod: &PodNamespaces) -> Result<bool, SpecError> {
    let wanted = linux.namespaces().clone().unwrap_or_default();
    let has = |kind| wanted.iter().any(|namespace| namespace.typ() == kind);
    if !has(LinuxNamespaceType::Network) {
        return Err(SpecError::HostNetwork);
    }
    let is_some = |map: &Option<Vec<_>>| map.as_ref().is_some_and(|map| !map.is_empty());
    let maps_users = is_some(linux.uid_mappings()) && is_some(linux.gid_mappings());
    let mut kept = Vec::new();
    for namespace in wanted.iter() {
        if let Some(namespace) = translate_one(namespace, pod, maps_users)? {
            kept.push(namespace);
        }
    }
    if !has(LinuxNamespaceType::Pid) {
        kept.push(pods_pid(pod));
    }
    let joins_users = kept
        .iter()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User && namespace.path().is_some());
    if joins_users {
        // They are those that the namespace was made with.
        linux.set_uid_mappings(None);
        linux.set_gid_mappings(None);
    }
    let own_uts = kept.iter().any(|namespace| namespace.typ() == LinuxNamespaceType::Uts);
    linux.set_namespaces(Some(kept));
    Ok(!own_uts)
}

fn translate_one(
    namespace: &LinuxNamespace,
    pod: &PodNamespaces,
    maps_users: bool,
) -> Result<Option<LinuxNamespace>, SpecError> {
    let path = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
    match (namespace.typ(), path) {
        // The guest's are the pod's.
        (LinuxNamespaceType::Network, _) => Ok(None),
        (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, Some(_)) => Ok(None),
        (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, None) if pod.is_pod => Ok(None),
        (LinuxNamespaceType::Pid, Some(path)) => shared_pid(path, pod).map(Some),
        (LinuxNamespaceType::User, Some(path)) => shared_users(path, pod, maps_users),
        (kind @ LinuxNamespaceType::Time, Some(path)) => {
            Err(SpecError::HostNamespace { kind, path: path.clone() })
        }
        (kind, Some(_)) => Ok(Some(new(kind))),
        (kind, None) => Ok(Some(new(kind))),
    }
}

/// What "the host's" PID namespace is in a pod: the one of its first container.
fn pods_pid(pod: &PodNamespaces) -> LinuxNamespace {
    match pod.first_process {
        Some(process) => joined_pid(process),
        None => new(LinuxNamespaceType::Pid),
    }
}

/// A PID namespace by path is that of the container with this process id.
fn shared_pid(path: &Path, pod: &PodNamespaces) -> Result<LinuxNamespace, SpecError> {
    member(path, "pid", pod).map(|member| joined_pid(member.guest_pid))
}

/// And a user namespace as well. One that the engine has made on the host is made in the guest anew, with the same mapping; and
/// where the pod has no process but the guest's first one, each container has one of its own.
fn shared_users(
    path: &Path,
    pod: &PodNamespaces,
    maps_users: bool,
) -> Result<Option<LinuxNamespace>, SpecError> {
    let kind = LinuxNamespaceType::User;
    match member(path, "user", pod) {
        Ok(member) if member.guest_pid != FIRST_PROCESS => Ok(Some(joined(kind, "user", member.guest_pid))),
        Ok(_) => Ok(Some(new(kind))),
        Err(_) if maps_users && !path.starts_with("/proc") => Ok(Some(new(kind))),
        Err(error) => Err(error),
    }
}

/// The container whose namespace has this path.
fn member<'a>(path: &Path, name: &str, pod: &'a PodNamespaces) -> Result<&'a Member, SpecError> {
    let is_of = |member: &&Member| path == Path::new(&format!("/proc/{}/ns/{name}", member.host_pid));
    pod.members.iter().find(is_of).ok_or_else(|| SpecError::NoSuchContainer { path: path.to_owned() })
}

/// Where the pod has no process but the guest's first one, its agent makes a namespace for whoever shares.
fn joined_pid(process: u32) -> LinuxNamespace {
    let mut namespace = joined(LinuxNamespaceType::Pid, "pid", process);
    if process == FIRST_PROCESS {
        namespace.set_path(Some(PathBuf::from(POD_PID_NAMESPACE)));
    }
    namespace
}

fn joined(kind: LinuxNamespaceType, name: &str, process: u32) -> LinuxNamespace {
    let mut namespace = new(kind);
    namespace.set_path(Some(PathBuf::from(format!("/proc/{process}/ns/{name}"))));
    namespace
}

fn new(kind: LinuxNamespaceType) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind);
    namespace
}
