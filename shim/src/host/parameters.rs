//! Parameters of the node's kernel that hold for all containers, for the guest's: what an operator has set for the node's workloads
//! (`vm.max_map_count`, `fs.inotify`, `kernel.pid_max`) they find in a pod as well.
//!
//! The guest's kernel begins with its own defaults. Only what differs from these is told, so that as a rule there is little to set.

use std::fs;

/// Where they are.
const ROOT: &str = "/proc/sys";

/// Longest value that is looked at; all are numbers.
const MAX_VALUE: usize = 32;

/// A parameter, by its path below `/proc/sys`, with its value.
pub(crate) type Parameter = (&'static str, String);

/// What is told, with the guest's defaults. An empty default is one that goes by the guest's memory.
///
/// Not among them: what belongs to a namespace (a container's specification chooses it), what is about the machine and not about
/// its workloads (writing back, panics, scheduling), and `core_pattern`, which names a program of the node.
const ALL: [(&str, &str); 31] = [
    ("fs/aio-max-nr", "65536"),
    ("fs/epoll/max_user_watches", ""),
    ("fs/file-max", ""),
    ("fs/inotify/max_queued_events", "16384"),
    ("fs/inotify/max_user_instances", "128"),
    ("fs/inotify/max_user_watches", ""),
    ("fs/nr_open", "1048576"),
    ("fs/pipe-max-size", "1048576"),
    ("fs/pipe-user-pages-hard", "0"),
    ("fs/pipe-user-pages-soft", "16384"),
    ("fs/protected_fifos", "0"),
    ("fs/protected_hardlinks", "0"),
    ("fs/protected_regular", "0"),
    ("fs/protected_symlinks", "0"),
    ("fs/suid_dumpable", "0"),
    ("kernel/dmesg_restrict", "0"),
    ("kernel/io_uring_disabled", "0"),
    ("kernel/keys/maxbytes", "20000"),
    ("kernel/keys/maxkeys", "200"),
    ("kernel/kptr_restrict", "0"),
    ("kernel/perf_event_paranoid", "2"),
    ("kernel/pid_max", "4096"),
    ("kernel/randomize_va_space", "2"),
    ("kernel/threads-max", ""),
    ("kernel/unprivileged_bpf_disabled", "0"),
    ("kernel/yama/ptrace_scope", "0"),
    ("user/max_user_namespaces", ""),
    ("vm/max_map_count", "65530"),
    ("vm/mmap_min_addr", "4096"),
    ("vm/overcommit_memory", "0"),
    ("vm/overcommit_ratio", "50"),
];

/// The node's.
pub(crate) fn of_node() -> Vec<Parameter> {
    ALL.iter().filter_map(|(name, default)| differing(name, default)).collect()
}

/// A parameter that this kernel has and whose value is not the guest's default.
fn differing(name: &'static str, default: &str) -> Option<Parameter> {
    let value = fs::read_to_string(format!("{ROOT}/{name}")).ok()?;
    let value = value.trim_end();
    let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit() || byte == b'-');
    (is_number && value.len() <= MAX_VALUE && value != default).then(|| (name, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_from_the_guests_is_told() {
        let told = of_node();
        let read = |name: &str| fs::read_to_string(format!("{ROOT}/{name}")).unwrap().trim_end().to_owned();
        assert!(told.contains(&("kernel/threads-max", read("kernel/threads-max"))), "{told:?}");
        for (name, value) in &told {
            assert_eq!(*value, read(name), "{name}");
            assert!(!ALL.contains(&(name, value.as_str())), "{name} is the guest's default already");
        }
        assert_eq!(differing("vm/max_map_count", &read("vm/max_map_count")), None);
        assert_eq!(differing("kernel/core_pattern", ""), None, "no number");
        assert_eq!(differing("kernel/no_such_parameter", ""), None);
    }
}
