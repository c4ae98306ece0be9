//! Pods and containers come and go.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bulkhead_cri::proto::{self, ContainerState, PodSandboxState};
use protobuf::MessageField;

use crate::cases::Environment;
use crate::cri::{CALL_LIMIT, Container, Node, Pod};
use crate::failure::{Explain, Outcome};
use crate::process::eventually;
use crate::{ensure, ensure_eq};

/// From the first call to the last, with everything that the kubelet asks meanwhile.
pub(crate) fn pod(environment: &mut Environment) -> Outcome<String> {
    let (node, handler) = (environment.node()?, environment.handler());
    let started = Instant::now();
    let pod = Pod::run(node, handler, "whole", |config| {
        config.annotations = [("tests/annotation".to_owned(), "kept".to_owned())].into();
    })?;
    let sandbox = started.elapsed();
    let status = pod.status()?;
    ensure_eq!(status.state.enum_value_or_default(), PodSandboxState::SANDBOX_READY, "state");
    ensure_eq!(status.annotations, pod.known.config.annotations, "annotations");
    ensure_eq!(status.labels, pod.known.config.labels, "labels");
    ensure_eq!(status.runtime_handler, handler.name(), "handler");
    ensure!(status.created_at > 0 && !status.network.ip.is_empty(), "{status}");
    ensure_eq!(listed(node, &pod, PodSandboxState::SANDBOX_READY)?, [pod.known.id.as_str()], "ready pods");

    let container = pod.create("main", "echo out; echo err >&2; exec sleep 100000", |_| {})?;
    let status = container.status()?;
    ensure_eq!(status.state.enum_value_or_default(), ContainerState::CONTAINER_CREATED, "state");
    ensure!(status.created_at > 0 && status.started_at == 0, "{status}");
    container.start()?;
    container.wait_for_output("out\n")?;
    let first_byte = started.elapsed();
    eventually("the program after both lines", CALL_LIMIT, || {
        ensure_eq!(container.exec("cat /proc/1/comm")?.success()?, "sleep\n", "process 1");
        Ok(())
    })?;
    let status = container.status()?;
    ensure_eq!(status.state.enum_value_or_default(), ContainerState::CONTAINER_RUNNING, "state");
    ensure!(status.started_at >= status.created_at && status.finished_at == 0, "{status}");
    let filter = proto::ContainerFilter { pod_sandbox_id: pod.known.id.clone(), ..Default::default() };
    let request = proto::ListContainersRequest { filter: MessageField::some(filter), ..Default::default() };
    let list = node.client().list_containers(&request).explain(|| "list containers".into())?.containers;
    ensure_eq!(list.iter().map(|container| &container.id).collect::<Vec<_>>(), [&container.id], "containers");

    container.stop(Duration::ZERO)?;
    let ended = container.wait()?;
    ensure_eq!((ended.code, ended.reason.as_str()), (137, "Error"), "a container that was killed");
    ensure_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("out\n", "err\n"), "its log");
    ensure!(container.status()?.finished_at > 0, "no time of its end");
    pod.stop()?;
    pod.wait_for(PodSandboxState::SANDBOX_NOTREADY)?;
    pod.stop().explain(|| "once more".into())?;
    ensure_eq!(listed(node, &pod, PodSandboxState::SANDBOX_READY)?, [] as [&str; 0], "ready pods");
    let id = pod.known.id.clone();
    pod.remove()?;
    let request = proto::RemovePodSandboxRequest { pod_sandbox_id: id.clone(), ..Default::default() };
    node.client().remove_pod_sandbox(&request).explain(|| "remove a pod that is gone".into())?;
    let request = proto::PodSandboxStatusRequest { pod_sandbox_id: id, ..Default::default() };
    ensure!(node.client().pod_sandbox_status(&request).is_err(), "the pod is still known");
    Ok(format!(
        "sandbox in {:.3} s, first byte after {:.3} s",
        sandbox.as_secs_f64(),
        first_byte.as_secs_f64()
    ))
}

/// The ids of this pod's kind in a state, by label.
fn listed(node: &Node, pod: &Pod<'_>, state: PodSandboxState) -> Outcome<Vec<String>> {
    let filter = proto::PodSandboxFilter {
        state: MessageField::some(proto::PodSandboxStateValue { state: state.into(), ..Default::default() }),
        label_selector: pod.known.config.labels.clone(),
        ..Default::default()
    };
    let request = proto::ListPodSandboxRequest { filter: MessageField::some(filter), ..Default::default() };
    let answer = node.client().list_pod_sandbox(&request).explain(|| "list pods".into())?;
    Ok(answer.items.into_iter().map(|pod| pod.id).collect())
}

/// Several containers at a time: each has its own processes and files; the second of a name comes after the first.
pub(crate) fn containers(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    let script = "echo $$ >/mark; trap 'exit 7' TERM; while :; do sleep 0.05; done";
    let names = ["one", "two", "three"];
    let containers = names.map(|name| pod.start(name, &format!("echo {name} >/name; {script}"), |_| {}));
    let mut seen = BTreeSet::new();
    for (name, container) in names.into_iter().zip(containers) {
        let container = container?;
        let said = container.exec("cat /name; ps | grep -c '[m]ark'; hostname")?.success()?;
        ensure_eq!(said, format!("{name}\n1\nshared\n"), "files and processes");
        seen.insert(container.id.clone());
        container.stop(Duration::from_secs(10))?;
        ensure_eq!(container.wait()?.code, 7, "exit code after SIGTERM");
        // What the kubelet does with a container that ended: another one of the same name beside it.
        let again = pod.start(name, "test ! -e /mark && echo fresh", |_| {})?;
        ensure_eq!(again.wait()?.success()?, "fresh\n", "the second container");
        again.remove()?;
        container.remove()?;
    }
    ensure_eq!(seen.len(), 3, "ids");
    Ok("three beside each other, each ended and started anew".into())
}

/// Pods go on while containerd is away; afterwards everything about them works.
pub(crate) fn restart(environment: &mut Environment) -> Outcome<String> {
    let handler = environment.handler();
    let pod = Pod::run(environment.node()?, handler, "restart", |_| {})?;
    let script = "trap 'echo asked; exit 9' TERM; echo 0 >/count; \
                  while :; do i=$((i+1)); echo $i >/next; mv /next /count; sleep 0.02; done";
    let container = pod.start("counts", script, |_| {})?;
    let count = |container: &Container<'_>| -> Outcome<u64> {
        let text = container.exec("cat /count")?.success()?;
        text.trim().parse().explain(|| format!("count {text:?}"))
    };
    let before = eventually("the container counts", CALL_LIMIT, || count(&container))?;
    let (known, id, log) = (pod.known, container.id, container.log);
    environment.node_mut()?.restart()?;
    let node = environment.node()?;
    let (pod, container) = (Pod { node, known }, Container { node, id, log });
    ensure_eq!(pod.status()?.state.enum_value_or_default(), PodSandboxState::SANDBOX_READY, "pod");
    let state = container.status()?.state.enum_value_or_default();
    ensure_eq!(state, ContainerState::CONTAINER_RUNNING, "container");
    let after = count(&container)?;
    ensure!(after >= before, "the container was started anew: it counted {before}, then {after}");
    pod.run_script("beside", "echo more", |_| {})?.success()?;
    container.stop(Duration::from_secs(10))?;
    let ended = container.wait()?;
    ensure_eq!((ended.code, ended.stdout.as_str()), (9, "asked\n"), "exit code, and what it said in the end");
    pod.finish()?;
    Ok(format!("counted on from {before} to {after}, took another container, ended with its own code"))
}

/// A container's limits can be changed, and what it and its pod use is told.
pub(crate) fn resources(environment: &mut Environment) -> Outcome<String> {
    const MIB: i64 = 1 << 20;
    let node = environment.node()?;
    let pod = Pod::run(node, environment.handler(), "resources", |_| {})?;
    let container = pod.start(
        "uses",
        "head -c 20m /dev/zero >/dev/shm/held; echo held; while :; do :; done",
        |config| {
            config.linux.mut_or_insert_default().resources =
                MessageField::some(limits(64 * MIB, 50_000, 256));
        },
    )?;
    container.wait_for_output("held")?;
    let group = "cd /sys/fs/cgroup; cat memory.max cpu.max pids.max";
    let said = container.exec(group)?.success()?;
    ensure!(said.starts_with(&format!("{}\n50000 100000\n", 64 * MIB)), "limits inside: {said:?}");
    let request = proto::UpdateContainerResourcesRequest {
        container_id: container.id.clone(),
        linux: MessageField::some(limits(96 * MIB, 80_000, 512)),
        ..Default::default()
    };
    node.client().update_container_resources(&request).explain(|| "update".into())?;
    let said = container.exec(group)?.success()?;
    ensure!(said.starts_with(&format!("{}\n80000 100000\n", 96 * MIB)), "new limits inside: {said:?}");
    let reported = container.status()?.resources.linux.clone().unwrap_or_default();
    ensure_eq!(reported.memory_limit_in_bytes, 96 * MIB, "memory limit in the status");

    let stats = |_| -> Outcome<proto::ContainerStats> {
        let request =
            proto::ContainerStatsRequest { container_id: container.id.clone(), ..Default::default() };
        let answer = node.client().container_stats(&request).explain(|| "statistics".into())?;
        answer.stats.into_option().explain(|| "statistics without statistics".into())
    };
    let first = stats(1)?;
    container.exec("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")?.success()?;
    let second = stats(2)?;
    let cpu = |stats: &proto::ContainerStats| stats.cpu.usage_core_nano_seconds.value;
    ensure!(cpu(&first) > 0 && cpu(&second) > cpu(&first), "CPU: {first} then {second}");
    let memory = second.memory.working_set_bytes.value as i64;
    ensure!((20 * MIB..=96 * MIB).contains(&memory), "working set of {memory} bytes with 20 MiB held");
    ensure!(second.memory.usage_bytes.value as i64 >= memory, "usage below the working set: {second}");
    let request =
        proto::PodSandboxStatsRequest { pod_sandbox_id: pod.known.id.clone(), ..Default::default() };
    let answer = node.client().pod_sandbox_stats(&request).explain(|| "pod statistics".into())?;
    let linux = answer.stats.linux.clone().unwrap_or_default();
    ensure!(linux.cpu.usage_core_nano_seconds.value > 0, "the pod's CPU: {linux}");
    ensure!(linux.memory.working_set_bytes.value > 0, "the pod's memory: {linux}");
    ensure_eq!(linux.containers.len(), 1, "containers in the pod's statistics");
    pod.finish()?;
    Ok(format!(
        "64 to 96 MiB; container {} ms of CPU and {} MiB, pod {} ms and {} MiB",
        cpu(&second) / 1_000_000,
        memory / MIB,
        linux.cpu.usage_core_nano_seconds.value / 1_000_000,
        linux.memory.working_set_bytes.value as i64 / MIB
    ))
}

fn limits(memory: i64, quota: i64, shares: i64) -> proto::LinuxContainerResources {
    proto::LinuxContainerResources {
        memory_limit_in_bytes: memory,
        cpu_quota: quota,
        cpu_period: 100_000,
        cpu_shares: shares,
        ..Default::default()
    }
}
