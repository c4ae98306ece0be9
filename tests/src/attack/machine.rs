//! The machine itself, by its memory, ports, registers and devices, from a program that has the guest's kernel do it. What a guest
//! does that has taken over its kernel, the programs for the VMM's devices do (`vmm/tests/programs.rs`).

use super::escapes::without_pid_namespace;
use super::{Attempt, Program};

const HARM: &str = "it would stop or spoil the node";

const fn program(name: &'static str, what: &'static str, arguments: &'static [&'static str]) -> Attempt {
    Attempt::new(name, what, Program::Attack(arguments))
}

/// The attempts of this theme.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    program("machine-memory", "physical memory, and every device's registers with garbage, by /dev/mem", &["memory"])
        .alone()
        .not_on_runc(HARM),
    program("machine-ports", "every I/O port read and written, at last those that end the machine", &["ports"])
        .alone()
        .not_on_runc(HARM)
        .smoke(),
    program("machine-registers", "model specific registers", &["registers"]).not_on_runc(HARM),
    program(
        "machine-instructions",
        "instructions that the hypervisor has to handle, and locks across cache lines",
        &["instructions"],
    )
    .not_on_runc("no hypervisor is there to be attacked"),
    program("machine-drivers", "drivers taken off the devices and put back, until nothing works", &["drivers"])
        .alone()
        .not_on_runc(HARM)
        .smoke(),
    program("machine-entropy", "the entropy device, drained", &["entropy", "0.3"])
        .not_on_runc("no device is there to be drained"),
    program("machine-vsock-ports", "ports of the host and of other machines by vsock", &["vsock-ports"]),
    program("machine-vsock-flood", "connections by vsock, begun by the thousand and never finished", &["vsock-flood"])
        .not_on_runc("no device is there to be flooded"),
    program("machine-agent", "the first process of the machine, its memory overwritten", &["spoil", "1"])
        .with(without_pid_namespace)
        .not_on_runc(HARM),
    Attempt::new(
        "machine-agent-frozen",
        "all control groups of the machine frozen, starved and killed, the agent's among them, so that nobody answers",
        Program::Shell(
            "mkdir /cg; mount -t cgroup2 none /cg; echo start; for g in $(find /cg -mindepth 1 -type d -not -path /cg/self); do \
             echo 1 >$g/pids.max; echo 0 >$g/memory.high; done 2>/dev/null; mkdir /cg/self; echo $$ >/cg/self/cgroup.procs; \
             for g in $(find /cg -mindepth 1 -type d -not -path /cg/self); do echo 1 >$g/cgroup.freeze; echo 1 >$g/cgroup.kill; done 2>/dev/null; echo end; sleep 1000",
        ),
    )
    .alone()
    .within(3)
    .not_on_runc(HARM),
];
