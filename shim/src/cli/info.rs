//! `-v` and `-info`: what this runtime is, for people and for containerd.

use std::io::Write;

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::RUNTIME;

/// Type of the features object (runtime specification, "Features Structure") in containerd's notation.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What the guest's agent carries out. containerd's CRI plugin asks it for recursive read-only mounts.
const FEATURES: &str = r#"{
    "ociVersionMin": "1.0.0",
    "ociVersionMax": "1.2.0",
    "mountOptions": ["bind", "rbind", "ro", "rw", "rro", "nosuid", "nodev", "noexec", "relatime", "noatime",
        "private", "rprivate", "slave", "rslave", "idmap", "ridmap"],
    "linux": {
        "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
        "cgroup": { "v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false },
        "seccomp": { "enabled": true },
        "apparmor": { "enabled": false },
        "selinux": { "enabled": false },
        "intelRdt": { "enabled": false },
        "mountExtensions": { "idmap": { "enabled": true } }
    }
}"#;

/// Prints the version for people.
pub(super) fn print_version() -> Result<(), String> {
    write(format!("{}:\n  Version:  {}\n", env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION")).as_bytes())
}

/// Prints the description for containerd: a `RuntimeInfo` message.
pub(super) fn print_info() -> Result<(), String> {
    let info = RuntimeInfo {
        name: RUNTIME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES_TYPE.into(),
            value: FEATURES.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    write(&info.write_to_bytes().map_err(|error| error.to_string())?)
}

fn write(bytes: &[u8]) -> Result<(), String> {
    let mut stdout = std::io::stdout().lock();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| format!("can't write to standard output: {error}"))
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::Features;

    use super::*;

    #[test]
    fn the_features_are_a_features_object() {
        let features: Features = serde_json::from_str(FEATURES).unwrap();
        assert_eq!(features.oci_version_max(), "1.2.0");
        assert!(features.mount_options().as_ref().unwrap().contains(&"rro".to_owned()));
    }
}
