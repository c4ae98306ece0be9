//! Pods that ask for what is the node's, and get what is the pod's in its place.

use bulkhead_cri::proto::{self, NamespaceMode};

use super::like_runc::security;
use crate::cases::Environment;
use crate::cri::{Handler, Pod};
use crate::ensure_eq;
use crate::failure::Outcome;

fn of_pod(config: &mut proto::PodSandboxConfig) -> &mut proto::LinuxSandboxSecurityContext {
    config.linux.mut_or_insert_default().security_context.mut_or_insert_default()
}

/// What a pod of runc answers, which is what a pod of the handler under test has to answer.
fn same(environment: &Environment, ask: impl Fn(Handler) -> Outcome<String>) -> Outcome<String> {
    let right = ask(Handler::Runc)?;
    ensure_eq!(ask(environment.handler())?, right, "answer, and runc's");
    Ok(right)
}

/// `hostPID`: all containers see each other's processes, and are nobody's first; one that ends takes none along.
pub(crate) fn processes(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    same(environment, |handler| {
        let pod = Pod::run(node, handler, "host-pid", |config| {
            of_pod(config).namespace_options.mut_or_insert_default().pid = NamespaceMode::NODE.into();
        })?;
        let nodes = |config: &mut proto::ContainerConfig| {
            security(config).namespace_options.mut_or_insert_default().pid = NamespaceMode::NODE.into();
        };
        let first = pod.start("first", "exec sleep 31416", nodes)?;
        let script = "[ $$ != 1 ] && echo second; ps -o args | grep -c '^sleep 3141[6]'";
        let second = pod.run_script("second", script, nodes)?.success()?;
        let exec = first.exec("ps -o args | grep -c '^sleep 3141[6]'")?.success()?;
        // Its children are nobody's after it, and go with it.
        let left = pod.run_script("leaves", "sleep 31417 & sleep 31417 & echo $!", nodes)?.code;
        let gone = first.exec("ps -o args | grep -c '^sleep 3141[7]'")?.stdout;
        // Only its own: under runc it sees the processes of the whole node.
        let kills = "kill -9 $(ps -o pid,args | sed -n 's/^ *\\([0-9]*\\) sleep 31416$/\\1/p'); echo $?";
        let killed = pod.run_script("kills", kills, nodes)?.success()?;
        let ended = first.wait()?.code;
        pod.finish()?;
        Ok(format!("{second} {exec} {left} {gone} {killed} {ended}")
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" "))
    })
}

/// `hostIPC`: the containers share memory.
pub(crate) fn ipc(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    same(environment, |handler| {
        let pod = Pod::run(node, handler, "host-ipc", |config| {
            of_pod(config).namespace_options.mut_or_insert_default().ipc = NamespaceMode::NODE.into();
        })?;
        let nodes = |config: &mut proto::ContainerConfig| {
            security(config).namespace_options.mut_or_insert_default().ipc = NamespaceMode::NODE.into();
        };
        let first =
            pod.start("first", "echo shared >/dev/shm/bulkhead-ipc; echo up; exec sleep 31416", nodes)?;
        first.wait_for_output("up")?;
        let script = "cat /dev/shm/bulkhead-ipc; rm /dev/shm/bulkhead-ipc; ls /dev/mqueue >/dev/null && echo mqueue; ipcs -m | wc -l";
        let second = pod.run_script("second", script, nodes)?.stdout;
        pod.finish()?;
        Ok(second.split_whitespace().collect::<Vec<_>>().join(" "))
    })
}

/// A privileged container: all capabilities, nothing masked or read-only, no filter, and mounts of its own.
pub(crate) fn privileged(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    same(environment, |handler| {
        let pod = Pod::run(node, handler, "privileged", |config| of_pod(config).privileged = true)?;
        let script = "grep -E '^(CapEff|CapBnd|NoNewPrivs|Seccomp:)' /proc/self/status; \
            mkdir /m && mount -t tmpfs none /m && echo mounted; mount --bind /m /mnt 2>/dev/null || mkdir -p /mnt && mount --bind /m /mnt && echo bound; \
            awk '$2 ~ /^.(proc|sys)/ { print $2, $3, substr($4, 1, 2) }' /proc/mounts; \
            echo 77 >/proc/sys/net/core/somaxconn && cat /proc/sys/net/core/somaxconn; \
            mkdir /sys/fs/cgroup/made && rmdir /sys/fs/cgroup/made && echo cgroup; \
            ip link add dummy7 type dummy && ip link del dummy7 && echo link; \
            mknod /tmp/disk b 8 0 && echo node; ls /dev | grep -Ex 'null|zero|full|random|urandom|tty|ptmx|pts|shm|mqueue|fuse|kmsg' | sort; \
            hostname changed && hostname; ls /sys/firmware >/dev/null && echo firmware; chroot / /bin/true && echo chroot; \
            unshare -m -p -f true && echo unshared";
        let ended = pod.run_script("all", script, |config| {
            security(config).privileged = true;
            security(config).masked_paths.clear();
            security(config).readonly_paths.clear();
            security(config).seccomp = protobuf::MessageField::none();
        })?;
        pod.finish()?;
        Ok(format!("{}{}", ended.stdout, ended.stderr))
    })
}
