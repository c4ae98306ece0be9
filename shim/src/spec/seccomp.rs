//! The default system call filter of a container that brings none.
//!
//! The profile is for a container without special rights. A right that was given on purpose must not be taken back by the
//! filter, so each such capability brings the calls that it is for.

use std::collections::HashSet;

use oci_spec::runtime::{Capability, LinuxSeccomp, LinuxSeccompAction, LinuxSyscallBuilder, Spec};

use super::SpecError;

/// What a capability is for, beyond the calls that anybody may make.
const BY_CAPABILITY: [(Capability, &[&str]); 11] = [
    (Capability::Bpf, &["bpf"]),
    (Capability::DacReadSearch, &["open_by_handle_at"]),
    (Capability::Perfmon, &["perf_event_open"]),
    (Capability::SysBoot, &["reboot"]),
    (Capability::SysChroot, &["chroot"]),
    (Capability::SysModule, &["delete_module", "init_module", "finit_module"]),
    (Capability::SysNice, &["get_mempolicy", "mbind", "set_mempolicy", "set_mempolicy_home_node"]),
    (Capability::SysPacct, &["acct"]),
    (Capability::SysPtrace, &["kcmp", "process_madvise"]),
    (Capability::SysTime, &["settimeofday", "stime", "clock_settime", "clock_settime64"]),
    (Capability::Syslog, &["syslog"]),
];

/// The default filter for a container with these capabilities in its bounding set; none for one that may do everything.
pub(super) fn default_for(spec: &Spec) -> Result<Option<LinuxSeccomp>, SpecError> {
    let none = HashSet::new();
    let capabilities = spec
        .process()
        .as_ref()
        .and_then(|process| process.capabilities().as_ref())
        .and_then(|capabilities| capabilities.bounding().as_ref())
        .unwrap_or(&none);
    if capabilities.contains(&Capability::SysAdmin) {
        return Ok(None);
    }
    let mut filter: LinuxSeccomp =
        serde_json::from_str(bulkhead_seccomp::workload_default()).map_err(SpecError::DefaultSeccomp)?;
    let mut rules = filter.syscalls().clone().unwrap_or_default();
    for (_, calls) in BY_CAPABILITY.iter().filter(|(capability, _)| capabilities.contains(capability)) {
        let names: Vec<String> = calls.iter().map(|&name| name.to_owned()).collect();
        rules.extend(
            LinuxSyscallBuilder::default().names(names).action(LinuxSeccompAction::ScmpActAllow).build(),
        );
    }
    filter.set_syscalls(Some(rules));
    Ok(Some(filter))
}
