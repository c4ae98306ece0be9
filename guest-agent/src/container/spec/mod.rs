//! The OCI runtime specification's `config.json`, version 1.2, as far as it concerns Linux containers.
//!
//! Every property that the specification knows is listed. Those that can't be carried out in the guest are
//! [`Unsupported`]: their presence is an error that names them, since a container that asks for them must not run
//! without. Properties that the specification does not know are ignored, as it demands.

mod linux;
mod process;

pub use linux::*;
pub(crate) use process::*;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::IgnoredAny;

/// Presence of a property that the agent can't carry out.
pub(crate) type Unsupported = Option<IgnoredAny>;

/// `config.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Spec {
    /// Version of the specification.
    pub oci_version: String,
    /// The root file system.
    pub root: Option<Root>,
    /// Mounts beside the root, in order.
    pub mounts: Option<Vec<Mount>>,
    /// The first process.
    pub process: Option<Process>,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// Programs to run at points of the container's life.
    pub hooks: Option<Hooks>,
    /// Linux's own part.
    pub linux: Option<Linux>,
}

/// `root`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Root {
    /// Absolute path in the guest.
    pub path: PathBuf,
    /// Whether the container can't write to it.
    #[serde(default)]
    pub readonly: bool,
}

/// One of `mounts`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mount {
    /// Path in the container.
    pub destination: PathBuf,
    /// File system type; `bind` or absent for a bind mount.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Device, directory or file to mount.
    pub source: Option<String>,
    /// Options as `mount -o` takes them.
    pub options: Option<Vec<String>>,
    /// User ids of an id-mapped mount.
    pub uid_mappings: Option<Vec<IgnoredAny>>,
    /// Group ids of an id-mapped mount.
    pub gid_mappings: Option<Vec<IgnoredAny>>,
}

/// `hooks`: every kind by its name.
pub(crate) type Hooks = BTreeMap<String, Option<Vec<Hook>>>;

/// A program to run.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Hook {
    /// The program.
    #[serde(default)]
    pub path: PathBuf,
    /// Its arguments, with its name.
    pub args: Option<Vec<String>>,
    /// Its environment.
    pub env: Option<Vec<String>>,
    /// Seconds that it may take.
    pub timeout: Option<i64>,
}

/// The elements of an optional list, none if it is absent or null.
pub(crate) fn items<T>(list: &Option<Vec<T>>) -> &[T] {
    list.as_deref().unwrap_or_default()
}
