//! The `linux` object.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::Unsupported;

/// `linux`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Linux {
    /// User ids of a new user namespace.
    pub uid_mappings: Option<Vec<IdMapping>>,
    /// Group ids of a new user namespace.
    pub gid_mappings: Option<Vec<IdMapping>>,
    /// Kernel parameters, by name.
    pub sysctl: Option<BTreeMap<String, String>>,
    /// Resource limits.
    pub resources: Option<Resources>,
    /// Cgroup on the host.
    #[expect(dead_code, reason = "the agent names its own")]
    pub cgroups_path: Option<String>,
    /// Namespaces to make or join.
    pub namespaces: Option<Vec<Namespace>>,
    /// Device nodes.
    pub devices: Option<Vec<Device>>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Propagation of the root mount.
    pub rootfs_propagation: Option<String>,
    /// Paths hidden from the container.
    pub masked_paths: Option<Vec<PathBuf>>,
    /// Paths that the container can't write to.
    pub readonly_paths: Option<Vec<PathBuf>>,
    /// SELinux label of mounts.
    #[expect(dead_code, reason = "the guest has no SELinux")]
    pub mount_label: Option<String>,
    /// Execution domain.
    pub personality: Option<Personality>,
    /// Offsets of the clocks of a new time namespace.
    pub time_offsets: Option<BTreeMap<String, TimeOffset>>,
    /// Cache allocation.
    pub intel_rdt: Unsupported,
    /// NUMA policy.
    pub memory_policy: Unsupported,
    /// Network devices to move into the container.
    pub net_devices: Option<BTreeMap<String, IgnoredAny>>,
}

/// A range of user or group ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct IdMapping {
    /// First id in the container.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// Number of ids.
    pub size: u32,
}

/// One of `namespaces`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Namespace {
    /// `pid`, `network`, `mount`, `ipc`, `uts`, `user`, `cgroup` or `time`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Namespace to join; a new one if absent.
    #[serde(default)]
    pub path: PathBuf,
}

/// One of `devices`.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    /// `c`, `b`, `u` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Path in the container.
    pub path: PathBuf,
    /// Major number.
    #[serde(default)]
    pub major: i64,
    /// Minor number.
    #[serde(default)]
    pub minor: i64,
    /// Mode bits.
    pub file_mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// `personality`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    /// Additional flags.
    pub flags: Option<Vec<String>>,
}

/// An offset of a clock.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct TimeOffset {
    /// Seconds.
    #[serde(default)]
    pub secs: i64,
    /// Nanoseconds.
    #[serde(default)]
    pub nanosecs: u32,
}

/// `resources`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Resources {
    /// Rules of device access, later ones overrule earlier ones.
    pub devices: Option<Vec<DeviceRule>>,
    /// Memory.
    pub memory: Option<Memory>,
    /// CPU.
    pub cpu: Option<Cpu>,
    /// Number of tasks.
    pub pids: Option<Pids>,
    /// Block I/O.
    #[serde(rename = "blockIO")]
    pub block_io: Option<BlockIo>,
    /// Huge pages.
    pub hugepage_limits: Option<Vec<HugepageLimit>>,
    /// Network classes of cgroup v1.
    #[expect(dead_code, reason = "cgroup v2 has none")]
    pub network: Option<IgnoredAny>,
    /// RDMA.
    pub rdma: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    /// Files of cgroup v2 and what to write to them.
    pub unified: Option<BTreeMap<String, String>>,
}

/// One of `resources.devices`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct DeviceRule {
    /// Whether access is allowed.
    #[serde(default)]
    pub allow: bool,
    /// `a`, `c` or `b`.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// Major number; all if absent or negative.
    pub major: Option<i64>,
    /// Minor number; all if absent or negative.
    pub minor: Option<i64>,
    /// Some of `rwm`.
    pub access: Option<String>,
}

/// `resources.memory`, bytes; -1 means no limit.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Memory {
    /// Hard limit.
    pub limit: Option<i64>,
    /// Soft limit.
    pub reservation: Option<i64>,
    /// Hard limit of memory and swap together.
    pub swap: Option<i64>,
    /// Whether a limit below the present use is an error.
    #[serde(default)]
    pub check_before_update: bool,
}

/// `resources.cpu`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Cpu {
    /// Relative weight, 2 to 262144, 1024 being usual.
    pub shares: Option<u64>,
    /// Microseconds of CPU time in a period; negative means no limit.
    pub quota: Option<i64>,
    /// Microseconds of unused time that may be used later.
    pub burst: Option<u64>,
    /// Microseconds.
    pub period: Option<u64>,
    /// Real-time limits exist in cgroup v1 only.
    pub realtime_runtime: Option<i64>,
    /// Real-time limits exist in cgroup v1 only.
    pub realtime_period: Option<u64>,
    /// CPUs, as a list of ranges.
    pub cpus: Option<String>,
    /// Memory nodes, as a list of ranges.
    pub mems: Option<String>,
    /// 1 to run only when nothing else does.
    pub idle: Option<i64>,
}

/// `resources.pids`.
#[derive(Debug, Clone, Default, Deserialize)]
pub(crate) struct Pids {
    /// Number of tasks; 0 or negative means no limit.
    pub limit: Option<i64>,
}

/// `resources.blockIO`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct BlockIo {
    /// Relative weight, 10 to 1000.
    pub weight: Option<u16>,
    /// Relative weight on single devices.
    pub weight_device: Option<Vec<WeightDevice>>,
    /// Bytes a second.
    pub throttle_read_bps_device: Option<Vec<ThrottleDevice>>,
    /// Bytes a second.
    pub throttle_write_bps_device: Option<Vec<ThrottleDevice>>,
    /// Operations a second.
    #[serde(rename = "throttleReadIOPSDevice")]
    pub throttle_read_iops_device: Option<Vec<ThrottleDevice>>,
    /// Operations a second.
    #[serde(rename = "throttleWriteIOPSDevice")]
    pub throttle_write_iops_device: Option<Vec<ThrottleDevice>>,
}

/// A block device's weight.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct WeightDevice {
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Relative weight, 10 to 1000.
    pub weight: Option<u16>,
}

/// A block device's limit.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ThrottleDevice {
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Bytes or operations a second; 0 means no limit.
    pub rate: u64,
}

/// A limit of huge pages.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HugepageLimit {
    /// Size of the pages, as in `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// `seccomp`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Seccomp {
    /// What happens to calls that no rule names.
    pub default_action: String,
    /// Error number of the default action.
    pub default_errno_ret: Option<u32>,
    /// Architectures whose calls are let through to the rules.
    pub architectures: Option<Vec<String>>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: Option<Vec<String>>,
    /// Socket of a process that decides calls of `SCMP_ACT_NOTIFY`.
    pub listener_path: Option<PathBuf>,
    /// The rules.
    pub syscalls: Option<Vec<SyscallRule>>,
}

/// One of `seccomp.syscalls`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyscallRule {
    /// System calls.
    pub names: Vec<String>,
    /// What happens to them.
    pub action: String,
    /// Error number of the action.
    pub errno_ret: Option<u32>,
    /// Conditions.
    pub args: Option<Vec<SyscallArg>>,
}

/// A condition on an argument of a system call.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SyscallArg {
    /// Number of the argument, from 0.
    pub index: u32,
    /// Value to compare with; the mask with `SCMP_CMP_MASKED_EQ`.
    #[serde(default)]
    pub value: u64,
    /// The value with `SCMP_CMP_MASKED_EQ`.
    #[serde(default)]
    pub value_two: u64,
    /// `SCMP_CMP_*`.
    pub op: String,
}
