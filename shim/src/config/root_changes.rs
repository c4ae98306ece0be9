//! Where what a container changes of its root file system goes.

use oci_spec::runtime::Spec;
use serde::Deserialize;

use crate::spec::sandbox::is_of_cri;

/// The choice of the operator.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RootChanges {
    /// Into files of the snapshot, which the node sees.
    Files,
    /// Onto a disk in the snapshot, which only the guest reads.
    Disk,
    /// Onto a disk where nobody makes an image of it: containers of Kubernetes pods.
    #[default]
    Auto,
}

impl RootChanges {
    /// Whether this container's go onto a disk. Who can't change anything needs none.
    pub(crate) fn on_disk(self, spec: &Spec) -> bool {
        let is_read_only = spec.root().as_ref().is_some_and(|root| root.readonly().unwrap_or(false));
        !is_read_only
            && match self {
                RootChanges::Files => false,
                RootChanges::Disk => true,
                RootChanges::Auto => is_of_cri(spec),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_can_be_made_of_what_is_not_kubernetes_own() {
        let spec = |kind: Option<&str>, readonly: bool| {
            let annotations = kind.map(|kind| serde_json::json!({"io.kubernetes.cri.container-type": kind}));
            let root = serde_json::json!({"path": "rootfs", "readonly": readonly});
            let value = serde_json::json!({"ociVersion": "1.2.0", "root": root, "annotations": annotations});
            serde_json::from_value::<Spec>(value).unwrap()
        };
        for (kind, readonly, auto, disk) in [
            (Some("container"), false, true, true),
            (Some("container"), true, false, false),
            (Some("sandbox"), true, false, false),
            (None, false, false, true),
        ] {
            let spec = spec(kind, readonly);
            assert_eq!(RootChanges::Auto.on_disk(&spec), auto, "{kind:?} {readonly}");
            assert_eq!(RootChanges::Disk.on_disk(&spec), disk, "{kind:?} {readonly}");
            assert!(!RootChanges::Files.on_disk(&spec));
        }
    }
}
