//! What containerd writes for a container, an ordinary or a privileged one.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use bulkhead_base::capabilities::NAMES;
use nix::sys::stat::{major, minor};
use serde_json::{Value, json};

use super::Profile;
use crate::{bundle, node};

/// Every capability there is.
pub(super) fn all_capabilities() -> Value {
    let mut all = bundle::capabilities(&NAMES);
    all["inheritable"] = all["permitted"].clone();
    all
}

/// The specification of a container with a process.
pub(super) fn specification(id: &str, process: Value, profile: Profile) -> Value {
    let mut process = process;
    let mut spec = bundle::spec(id, Value::Null);
    if profile == Profile::Privileged {
        if process["capabilities"].is_object() {
            process["capabilities"] = all_capabilities();
        }
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
        spec["linux"]["devices"] = host_devices();
        spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if let Some(options) = mount["options"].as_array_mut() {
                options.retain(|option| option != "ro");
            }
        }
        if let Some(mounts) = spec["mounts"].as_array_mut() {
            mounts.push(json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                                "options": ["nosuid", "noexec", "nodev", "relatime", "rw"] }));
        }
    }
    spec["process"] = process;
    spec
}

/// All device nodes of the host, as a privileged container gets them.
fn host_devices() -> Value {
    let mut found = Vec::new();
    for path in node::tree(Path::new("/dev")) {
        let Ok(status) = fs::symlink_metadata(&path) else { continue };
        let kind = status.file_type();
        if !kind.is_char_device() && !kind.is_block_device() {
            continue;
        }
        found.push(json!({
            "path": path, "type": if kind.is_block_device() { "b" } else { "c" },
            "major": major(status.rdev()), "minor": minor(status.rdev()),
            "fileMode": status.mode() & 0o777, "uid": status.uid(), "gid": status.gid(),
        }));
    }
    found.into()
}
