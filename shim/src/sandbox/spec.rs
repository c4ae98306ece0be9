//! The specification that a pause container of the pod would have had: what a pod is made by, through either API.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType, Spec};

use super::config::PodConfig;
use crate::config::ANNOTATIONS;
use crate::error::ApiError;
use crate::spec::{self, SpecError};

/// Prefix of what containerd's CRI plugin says of a sandbox.
const CRI: &str = "io.kubernetes.cri.";

/// What containerd's CRI plugin puts before a pod's id in names of systemd's scopes.
const SCOPE_PREFIX: &str = "cri-containerd";

/// Makes the specification of the sandbox `id`. A containerd that writes one into the bundle knows best; what the
/// configuration says is added. Without a parent, the cgroup is below `namespace`, containerd's, as it is for others.
pub(crate) fn build(
    bundle: &Path,
    id: &str,
    config: &PodConfig,
    netns: &str,
    annotations: &HashMap<String, String>,
    namespace: &str,
) -> Result<Spec, ApiError> {
    // Its containers would be told the same.
    if config.host_network {
        return Err(SpecError::HostNetwork.into());
    }
    let mut spec = if bundle.join("config.json").exists() {
        spec::read(bundle)?
    } else {
        spec::parse("an empty specification", br#"{"ociVersion": "1.2.0"}"#)?
    };
    if !config.hostname.is_empty() {
        spec.set_hostname(Some(config.hostname.clone()));
    }
    let mut all = spec.annotations().clone().unwrap_or_default();
    // The others are nobody's business here.
    all.extend(config.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATIONS)).map(clone_pair));
    all.extend(annotations.iter().map(clone_pair));
    all.extend(cri_annotations(id, config));
    spec.set_annotations(Some(all));
    spec.set_linux(Some(linux(
        spec.linux().clone().unwrap_or_else(empty_linux),
        id,
        config,
        netns,
        namespace,
    )));
    Ok(spec)
}

fn clone_pair((key, value): (&String, &String)) -> (String, String) {
    (key.clone(), value.clone())
}

fn empty_linux() -> Linux {
    let mut linux = Linux::default();
    linux.set_namespaces(None).set_resources(None).set_masked_paths(None).set_readonly_paths(None);
    linux
}

fn linux(mut linux: Linux, id: &str, config: &PodConfig, netns: &str, namespace: &str) -> Linux {
    if !config.cgroup_parent.is_empty() {
        linux.set_cgroups_path(Some(cgroups_path(&config.cgroup_parent, id)));
    } else if linux.cgroups_path().is_none() {
        linux.set_cgroups_path(Some(Path::new("/").join(namespace).join(id)));
    }
    if !config.sysctls.is_empty() {
        let sysctls = config.sysctls.iter().map(clone_pair).collect();
        linux.set_sysctl(Some(sysctls));
    }
    if linux.namespaces().is_none() || !netns.is_empty() {
        let path = Some(PathBuf::from(netns)).filter(|_| !netns.is_empty());
        linux.set_namespaces(Some(vec![
            namespace_of(LinuxNamespaceType::Network, path),
            namespace_of(LinuxNamespaceType::Ipc, None),
            namespace_of(LinuxNamespaceType::Uts, None),
            namespace_of(LinuxNamespaceType::Mount, None),
        ]));
    }
    linux
}

fn namespace_of(kind: LinuxNamespaceType, path: Option<PathBuf>) -> LinuxNamespace {
    let mut namespace = LinuxNamespace::default();
    namespace.set_typ(kind).set_path(path);
    namespace
}

/// As containerd's CRI plugin writes it: a slice of systemd's stands for systemd's notation.
fn cgroups_path(parent: &str, id: &str) -> PathBuf {
    match Path::new(parent).file_name().and_then(|name| name.to_str()) {
        Some(slice) if slice.ends_with(".slice") => PathBuf::from(format!("{slice}:{SCOPE_PREFIX}:{id}")),
        _ => Path::new(parent).join(id),
    }
}

/// What the CRI plugin tells of a sandbox that is a container.
fn cri_annotations(id: &str, config: &PodConfig) -> Vec<(String, String)> {
    let mut said = vec![
        ("container-type", "sandbox".to_owned()),
        ("sandbox-id", id.to_owned()),
        ("sandbox-name", config.name.clone()),
        ("sandbox-namespace", config.namespace.clone()),
        ("sandbox-uid", config.uid.clone()),
        ("sandbox-log-directory", config.log_directory.clone()),
    ];
    if let Some(resources) = config.resources {
        said.extend([
            ("sandbox-cpu-period", resources.cpu_period.to_string()),
            ("sandbox-cpu-quota", resources.cpu_quota.to_string()),
            ("sandbox-cpu-shares", resources.cpu_shares.to_string()),
            ("sandbox-memory", resources.memory.to_string()),
        ]);
    }
    said.into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(key, value)| (format!("{CRI}{key}"), value))
        .collect()
}
