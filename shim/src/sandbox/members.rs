//! What a sandbox means for the containers that are created in it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

use super::files::PodFile;

/// Where pods have their POSIX shared memory.
const SHM: &str = "/dev/shm";

/// The process that a sandbox's PID namespace is that of: no pause process has one, so it is the agent's.
pub(crate) const FIRST_PROCESS: u32 = 1;

/// A sandbox as its containers see it.
#[derive(Debug, Default)]
pub(crate) struct Members {
    /// Whether it has been started: before that there are no containers.
    pub ready: bool,
    /// Files that all of them have, unless they have their own there.
    pub files: Vec<PodFile>,
    /// Kernel parameters of the pod. The guest's namespaces are the pod's, so its first container sets them for all.
    pub sysctls: HashMap<String, String>,
}

impl Members {
    /// Adds to a container's specification what it shares with the others.
    pub(crate) fn complete(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        for file in &self.files {
            if !mounts.iter().any(|mount| mount.destination() == Path::new(file.destination)) {
                mounts.push(bind(file.source.clone(), file.destination, read_only));
            }
        }
        // A container's own would be the default of containerd's, for want of a pod's. The guest has the pod's: no place on the
        // node is named, whose size it would get.
        for mount in &mut mounts {
            if mount.destination() == Path::new(SHM) && mount.typ().as_deref() == Some("tmpfs") {
                *mount = bind(PathBuf::from("shm"), SHM, false);
            }
        }
        spec.set_mounts(Some(mounts));
        if let (false, Some(linux)) = (self.sysctls.is_empty(), spec.linux_mut()) {
            let mut all = self.sysctls.clone();
            all.extend(linux.sysctl().clone().unwrap_or_default());
            linux.set_sysctl(Some(all));
        }
    }

    /// Notes that a container is set up.
    pub(crate) fn is_set_up(&mut self) {
        self.sysctls.clear();
    }
}

fn bind(source: PathBuf, destination: &str, read_only: bool) -> Mount {
    let access = if read_only { "ro" } else { "rw" };
    let options = ["rbind", "rprivate", access].map(str::to_owned).to_vec();
    let mut mount = Mount::default();
    mount
        .set_destination(PathBuf::from(destination))
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(source))
        .set_options(Some(options));
    mount
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mounts(spec: &str) -> Vec<(String, String, String)> {
        let mut spec: Spec = serde_json::from_str(spec).unwrap();
        let file = |destination| PodFile { source: PathBuf::from("/pod").join("file"), destination };
        let files = vec![file("/etc/hostname"), file("/etc/hosts")];
        Members { ready: true, files, ..Members::default() }.complete(&mut spec);
        let show = |mount: &Mount| {
            let source = mount.source().clone().unwrap_or_default().display().to_string();
            let options = mount.options().clone().unwrap_or_default().join(",");
            (mount.destination().display().to_string(), source, options)
        };
        spec.mounts().iter().flatten().map(show).collect()
    }

    fn row(destination: &str, source: &str, options: &str) -> (String, String, String) {
        (destination.into(), source.into(), options.into())
    }

    #[test]
    fn containers_get_the_pods_files_unless_they_have_their_own() {
        let spec = r#"{"ociVersion": "1.2.0", "root": {"path": "rootfs", "readonly": true}, "mounts": [
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=64k"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/kubelet/hosts", "options": ["rbind", "rw"]}]}"#;
        assert_eq!(
            mounts(spec),
            [
                row("/dev/shm", "shm", "rbind,rprivate,rw"),
                row("/etc/hosts", "/kubelet/hosts", "rbind,rw"),
                row("/etc/hostname", "/pod/file", "rbind,rprivate,ro"),
            ]
        );
    }

    #[test]
    fn the_first_container_sets_the_pods_parameters() {
        let sysctls = HashMap::from([("net.a".to_owned(), "pod".to_owned()), ("net.b".into(), "pod".into())]);
        let mut members = Members { ready: true, sysctls, ..Members::default() };
        let sysctls = |members: &Members| {
            let spec = r#"{"ociVersion": "1.2.0", "linux": {"sysctl": {"net.b": "own"}}}"#;
            let mut spec: Spec = serde_json::from_str(spec).unwrap();
            members.complete(&mut spec);
            let mut sysctls: Vec<_> =
                spec.linux().clone().unwrap().sysctl().clone().unwrap().into_iter().collect();
            sysctls.sort();
            sysctls.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>()
        };
        assert_eq!(sysctls(&members), ["net.a=pod", "net.b=own"]);
        // It may fail, and the next one is the first.
        assert_eq!(sysctls(&members), ["net.a=pod", "net.b=own"]);
        members.is_set_up();
        assert_eq!(sysctls(&members), ["net.b=own"]);
    }

    #[test]
    fn files_can_be_written_where_the_root_can() {
        let spec = r#"{"ociVersion": "1.2.0", "root": {"path": "rootfs"}}"#;
        assert_eq!(
            mounts(spec),
            [
                row("/etc/hostname", "/pod/file", "rbind,rprivate,rw"),
                row("/etc/hosts", "/pod/file", "rbind,rprivate,rw")
            ]
        );
    }
}
