//! Reviews of the profiles that a machine can do.
#![allow(clippy::expect_used, reason = "a profile that can't be read fails its test")]

use std::collections::BTreeSet;
use std::fs;

use serde_json::Value;

const PROFILES: [&str; 6] =
    ["vmm-control", "vmm-template", "vmm-device", "vmm-storage", "vmm-vcpu", "fs-server"];

/// Calls that no thread of ours that faces the guest may ever make, whatever its arguments.
const NEVER: [&str; 40] = [
    "accept",
    "accept4",
    "add_key",
    "bind",
    "bpf",
    "chroot",
    "clone",
    "connect",
    "create_module",
    "delete_module",
    "execve",
    "execveat",
    "finit_module",
    "fork",
    "fsconfig",
    "fsmount",
    "fsopen",
    "init_module",
    "io_uring_enter",
    "io_uring_register",
    "io_uring_setup",
    "ioperm",
    "iopl",
    "kexec_load",
    "keyctl",
    "listen",
    "mount",
    "move_mount",
    "open_by_handle_at",
    "open_tree",
    "perf_event_open",
    "pivot_root",
    "process_vm_readv",
    "process_vm_writev",
    "ptrace",
    "request_key",
    "setns",
    "socket",
    "umount2",
    "vfork",
];

fn profile(name: &str) -> Value {
    let text =
        fs::read_to_string(format!("{}/{name}.json", env!("CARGO_MANIFEST_DIR"))).expect("read the profile");
    serde_json::from_str::<Value>(&text).expect("parse the profile")[name].clone()
}

fn rules(profile: &Value) -> &[Value] {
    profile["filter"].as_array().expect("a list of rules")
}

/// `name`, or `name(...)` when a rule checks arguments.
fn allowed(profile: &Value) -> BTreeSet<String> {
    rules(profile)
        .iter()
        .map(|rule| {
            let name = rule["syscall"].as_str().expect("a call's name");
            if rule.get("args").is_some() { format!("{name}(...)") } else { name.to_owned() }
        })
        .collect()
}

#[test]
fn everything_else_kills_the_process() {
    for name in PROFILES {
        let profile = profile(name);
        assert_eq!(profile["mismatch_action"], "kill_process", "{name}");
        assert_eq!(profile["match_action"], "allow", "{name}");
    }
}

#[test]
fn each_rule_says_why() {
    for name in PROFILES {
        for rule in rules(&profile(name)) {
            let reason = rule["comment"].as_str().unwrap_or_default();
            assert!(reason.len() > 5, "{name}: no reason for {}", rule["syscall"]);
        }
    }
}

#[test]
fn no_filter_allows_what_none_may() {
    for name in PROFILES {
        for call in allowed(&profile(name)) {
            assert!(!NEVER.contains(&call.as_str()), "{name} allows {call}");
        }
    }
}

/// A filter that grows or shrinks shows in the review as a change of `allowed.txt`.
#[test]
fn the_list_of_allowed_calls_is_current() {
    let mut list = String::new();
    for name in PROFILES {
        let calls: Vec<String> = allowed(&profile(name)).into_iter().collect();
        list += &format!("{name}: {}\n", calls.join(" "));
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/allowed.txt");
    let recorded = fs::read_to_string(path).unwrap_or_default();
    assert_eq!(
        list, recorded,
        "the filters changed: review, then put the left side into seccomp-profiles/allowed.txt"
    );
}

#[test]
fn the_workload_default_denies_what_it_must() {
    let profile: Value = serde_json::from_str(bulkhead_seccomp::workload_default()).expect("parse");
    assert_eq!(profile["defaultAction"], "SCMP_ACT_ERRNO");
    for rule in profile["syscalls"].as_array().expect("a list of rules") {
        if rule["action"] != "SCMP_ACT_ALLOW" || rule.get("args").is_some() {
            continue;
        }
        for name in rule["names"].as_array().expect("names") {
            let name = name.as_str().expect("a name");
            let harmless =
                ["accept", "accept4", "bind", "connect", "execve", "execveat", "fork", "listen", "vfork"];
            let debugging = ["process_vm_readv", "process_vm_writev", "ptrace"];
            let fine = harmless.contains(&name) || debugging.contains(&name);
            assert!(fine || !NEVER.contains(&name), "workloads may call {name}");
        }
    }
}
