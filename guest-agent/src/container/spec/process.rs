//! The `process` object.

use std::path::PathBuf;

use serde::Deserialize;

use super::Unsupported;

/// `process`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Process {
    /// Whether it has a terminal.
    #[expect(dead_code, reason = "the request says it")]
    #[serde(default)]
    pub terminal: bool,
    /// Initial size of the terminal.
    pub console_size: Option<ConsoleSize>,
    /// Identity.
    #[serde(default)]
    pub user: User,
    /// Program and arguments.
    pub args: Option<Vec<String>>,
    /// Environment, `KEY=value`.
    pub env: Option<Vec<String>>,
    /// Working directory.
    #[serde(default)]
    pub cwd: PathBuf,
    /// Capability sets.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Option<Vec<Rlimit>>,
    /// Whether `execve` can't add privileges.
    #[serde(default)]
    pub no_new_privileges: bool,
    /// AppArmor profile; the guest has no AppArmor.
    pub apparmor_profile: Option<String>,
    /// Inclination to be killed for want of memory.
    pub oom_score_adj: Option<i32>,
    /// SELinux label; the guest has no SELinux.
    pub selinux_label: Option<String>,
    /// I/O priority.
    pub io_priority: Option<IoPriority>,
    /// Scheduling policy.
    pub scheduler: Option<Scheduler>,
    /// CPUs to run on around exec.
    #[serde(rename = "execCPUAffinity")]
    pub exec_cpu_affinity: Unsupported,
}

/// `consoleSize`, in characters.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u32,
    /// Columns.
    pub width: u32,
}

/// `user`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// User id.
    #[serde(default)]
    pub uid: u32,
    /// Group id.
    #[serde(default)]
    pub gid: u32,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Option<Vec<u32>>,
}

/// `capabilities`: names with the `CAP_` prefix.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Capabilities {
    /// Bounding set.
    pub bounding: Option<Vec<String>>,
    /// Effective set.
    pub effective: Option<Vec<String>>,
    /// Inheritable set.
    pub inheritable: Option<Vec<String>>,
    /// Permitted set.
    pub permitted: Option<Vec<String>>,
    /// Ambient set.
    pub ambient: Option<Vec<String>>,
}

/// One of `rlimits`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Rlimit {
    /// `RLIMIT_*`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Hard limit.
    pub hard: u64,
    /// Soft limit.
    pub soft: u64,
}

/// `ioPriority`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct IoPriority {
    /// `IOPRIO_CLASS_*`.
    pub class: String,
    /// Priority within the class.
    #[serde(default)]
    pub priority: i64,
}

/// `scheduler`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Scheduler {
    /// `SCHED_*`.
    pub policy: String,
    /// Nice value.
    #[serde(default)]
    pub nice: i32,
    /// Static priority.
    #[serde(default)]
    pub priority: i32,
    /// `SCHED_FLAG_*`.
    pub flags: Option<Vec<String>>,
    /// Nanoseconds.
    #[serde(default)]
    pub runtime: u64,
    /// Nanoseconds.
    #[serde(default)]
    pub deadline: u64,
    /// Nanoseconds.
    #[serde(default)]
    pub period: u64,
}
