//! Making the host's kernel load a module: what loads one by itself when it is named, and the calls that load one.

use serde_json::Value;

use super::stage::{Said, Stage, volume};
use super::{Attempt, Program};
use crate::failure::{Explain, Outcome};
use crate::process;
use crate::shim::CALL_LIMIT;

const fn trigger(name: &'static str, what: &'static str, program: &'static [&'static str]) -> Attempt {
    Attempt::new(name, what, Program::Attack(program)).breaks_runc()
}

/// The attempts of this theme.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    trigger("modules-socket-families", "sockets of all 46 families", &["socket-families"]).smoke(),
    trigger(
        "modules-inet-protocols",
        "DCCP, SCTP, L2TP and other sockets of IPv4 and IPv6",
        &["inet-protocols"],
    ),
    trigger("modules-netlink-protocols", "netlink sockets of all 32 protocols", &["netlink-protocols"]),
    trigger("modules-generic-netlink", "families of generic netlink by name", &["generic-netlink"]),
    trigger("modules-file-systems", "mount and fsopen of 20 rare file systems", &["file-systems"]).smoke(),
    trigger("modules-binary-formats", "executables in unknown formats", &["binary-formats"]),
    trigger("modules-device-kinds", "network devices of 17 kinds by rtnetlink", &["device-kinds"]),
    trigger("modules-traffic-control", "queueing disciplines by name", &["traffic-control"]),
    trigger("modules-crypto", "algorithms by AF_ALG", &["crypto"]),
    trigger("modules-line-disciplines", "all line disciplines on a terminal", &["line-disciplines"]),
    trigger("modules-device-numbers", "device nodes of 21 rare majors, made and opened", &["device-numbers"]),
    trigger("modules-interface-names", "ioctls on interfaces that are not there", &["interface-names"]),
    trigger("modules-tcp", "congestion controls and upper layers of TCP by name", &["tcp-modules"]),
    trigger("modules-packet-filters", "tables of iptables and ip6tables", &["packet-filters"]),
    trigger(
        "modules-load",
        "init_module, finit_module and delete_module with a module of the host's in a volume",
        &["load-module", "/module/module.ko"],
    )
    .with(share_a_module)
    .judged(no_loader)
    .smoke(),
    Attempt::new(
        "modules-helper",
        "another program for the kernel to run as modprobe, and a reason to run it",
        Program::Shell(
            "printf \"#!/bin/sh\\necho out >$OUTSIDE/helper\\n\" >/helper; chmod 755 /helper; \
             echo $UPPER/helper >/proc/sys/kernel/modprobe && echo set; attack socket-families",
        ),
    )
    .breaks_runc(),
];

/// A module that is at hand on the node and not loaded.
const MODULE: &str = "dummy";

fn share_a_module(stage: &mut Stage, spec: &mut Value) -> Outcome {
    let directory = stage.share("module")?;
    let mut command = std::process::Command::new("modprobe");
    command.args(["-D", MODULE]);
    let mut found = process::run(&mut command, b"", CALL_LIMIT)?.stdout;
    if found.is_empty() {
        // As busybox's has no such option.
        let mut command = std::process::Command::new("find");
        command.args(["/lib/modules/", "-name", &format!("{MODULE}.ko*")]);
        found = process::run(&mut command, b"", CALL_LIMIT)?.stdout;
    }
    let file = found.split_whitespace().find(|word| word.contains(".ko"));
    let file = file.explain(|| format!("no file of the module {MODULE} on this node"))?;
    std::fs::copy(file, directory.join("module.ko")).explain(|| format!("copy {file}"))?;
    volume(spec, &directory, "/module", &["rbind", "ro"]);
    Ok(())
}

/// In a guest there is no loader, whatever the privileges.
fn no_loader(stage: &Stage, said: &Said) -> Outcome<Vec<String>> {
    let refused = "Function not implemented";
    let missing = stage.is_bulkhead() && !said.stdout.contains(refused);
    Ok(missing.then(|| format!("init_module does not fail with {refused:?}")).into_iter().collect())
}
