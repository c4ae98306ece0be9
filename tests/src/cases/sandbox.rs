//! Pods through containerd's Sandbox API: no pause container, the guest is the sandbox.

use std::path::PathBuf;
use std::time::Duration;

use containerd_shim_protos::ttrpc::Code;
use serde_json::{Value, json};

use super::{COLD_CONFIG, Case, Container, Environment};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::sandbox::{PodSettings, Sandbox};
use crate::shim::{CALL_LIMIT, CallError, CreateOptions, Shim};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("sandbox-life", life).bulkhead_only(),
    Case::new("cold-sandbox-life", life).cold(),
    Case::new("sandbox-death-of-the-vmm", death_of_the_vmm).bulkhead_only(),
    Case::new("sandbox-death-of-the-shim", death_of_the_shim).bulkhead_only(),
    Case::new("sandbox-refusals", refusals).bulkhead_only(),
];

const SETTINGS: PodSettings<'_> = PodSettings {
    hostname: "web-0",
    nameserver: "10.96.0.10",
    cgroup_parent: "/bulkhead-test",
    sysctl: Some(("net.ipv4.ip_unprivileged_port_start", "77")),
    host_network: false,
};

/// A shim for a sandbox whose pod starts as the case wants it.
fn launched(environment: &Environment) -> Outcome<Sandbox> {
    let config: Option<PathBuf> = environment.config()?;
    Sandbox::launch(environment.host()?, &environment.id("sandbox"), config.as_deref())
}

/// A sandbox that runs, and its VMM's process id.
fn running(environment: &Environment) -> Outcome<(Sandbox, i32)> {
    let sandbox = launched(environment)?;
    sandbox.create(&SETTINGS)?;
    let pid = i32::try_from(sandbox.start()?).explain(|| "sandbox's process id".into())?;
    Ok((sandbox, pid))
}

/// What the CRI plugin writes for a container of the sandbox with the process id `pid`.
fn spec(id: &str, sandbox: &Sandbox, pid: i32, script: &str) -> Value {
    let mut spec = bundle::spec(id, bundle::shell(script));
    let at = |kind: &str| format!("/proc/{pid}/ns/{kind}");
    spec["linux"]["namespaces"] = json!([
        { "type": "pid" }, { "type": "mount" }, { "type": "cgroup" },
        { "type": "network", "path": at("net") }, { "type": "ipc", "path": at("ipc") }, { "type": "uts", "path": at("uts") }
    ]);
    spec["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": sandbox.bundle.id,
    });
    spec
}

/// Creates a container in the sandbox.
fn created(environment: &Environment, sandbox: &Sandbox, pid: i32, script: &str) -> Outcome<Container> {
    let id = environment.id("member");
    created_by(environment, sandbox, &id, &spec(&id, sandbox, pid, script))
}

fn created_by(environment: &Environment, sandbox: &Sandbox, id: &str, spec: &Value) -> Outcome<Container> {
    let host = environment.host()?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.join(&bundle, &sandbox.address)?;
    let stdio = shim.stdio("init", Streams::default())?;
    shim.create(&stdio, CreateOptions::default())?;
    Ok(Container { bundle, shim, stdio })
}

/// Ends a container as containerd does in a sandbox: the shim is asked to shut down after each, and stays.
fn finish(container: Container) -> Outcome {
    let Container { bundle, shim, .. } = container;
    let _ = shim.kill("", 9, true);
    shim.wait("", CALL_LIMIT)?;
    shim.delete("")?;
    shim.shutdown()?;
    drop(shim);
    bundle.remove()
}

fn shim_of(environment: &Environment, sandbox: &Sandbox) -> Outcome<i32> {
    let shim: Shim = environment.host()?.join(&sandbox.bundle, &sandbox.address)?;
    shim.pid()
}

fn life(environment: &mut Environment) -> Outcome<String> {
    let sandbox = launched(environment)?;
    expect(sandbox.start(), Code::FAILED_PRECONDITION, "start before create")?;
    sandbox.create(&SETTINGS)?;
    let how = if environment.config()?.is_some_and(|path| path.ends_with(COLD_CONFIG)) {
        "booted"
    } else {
        "restored"
    };
    expect(sandbox.create(&SETTINGS), Code::ALREADY_EXISTS, "a second create")?;
    ensure_eq!(sandbox.status()?.state, "SANDBOX_NOTREADY", "state before start");
    let pid = i32::try_from(sandbox.start()?).explain(|| "sandbox's process id".into())?;
    let log = sandbox.log.until("agent ready", CALL_LIMIT)?;
    ensure!(log.contains(&format!("agent ready, {how}")), "the pod was not {how}: {log}");
    ensure_eq!(
        node::process(pid).explain(|| "the sandbox's process".into())?.name,
        "bulkhead-vmm",
        "process"
    );
    let status = sandbox.status()?;
    ensure_eq!((status.state.as_str(), status.pid), ("SANDBOX_READY", pid.unsigned_abs()), "status");
    ensure!(status.created_at.seconds > 1_000_000_000, "created at {:?}", status.created_at);
    ensure_eq!(sandbox.platform()?, ("linux".to_owned(), "amd64".to_owned()), "platform");
    sandbox.ping()?;

    // Two containers with what the pod gives them, one after the other, and one beside.
    let script = "hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/net/ipv4/ip_unprivileged_port_start; test -s /etc/hosts && echo hosts; \
                  grep -c ' /dev/shm ' /proc/mounts; echo shared >/dev/shm/file; sleep 1000";
    let first = created(environment, &sandbox, pid, script)?;
    first.shim.start("")?;
    let said = first.stdio.stdout.until("hosts\n1\n", CALL_LIMIT)?;
    ensure_eq!(
        said,
        "web-0\nweb-0\nnameserver 10.96.0.10\n77\nhosts\n1\n",
        "what the container has of its pod"
    );
    let beside = created(environment, &sandbox, pid, "cat /dev/shm/file; sleep 1000")?;
    beside.shim.start("")?;
    beside.stdio.stdout.until("shared", CALL_LIMIT)?;
    let seen = first.exec_script("look", "echo execed")?.success()?;
    ensure_eq!(seen, "execed\n", "output of the exec");
    let (container, pod) = (first.shim.stats()?, sandbox.metrics()?);
    finish(first)?;
    finish(beside)?;
    ensure_eq!(sandbox.status()?.state, "SANDBOX_READY", "state without containers");
    // One that shares the processes of the pod, whose first process does nothing else.
    let id = environment.id("member");
    let mut shared = spec(&id, &sandbox, pid, "cat /proc/1/comm; exit 3");
    shared["linux"]["namespaces"][0]["path"] = format!("/proc/{pid}/ns/pid").into();
    let again = created_by(environment, &sandbox, &id, &shared)?;
    again.shim.start("")?;
    ensure_eq!(again.shim.wait("", CALL_LIMIT)?.exit_status, 3, "exit status");
    ensure_eq!(again.stdio.stdout.to_end(CALL_LIMIT)?, "pause\n", "first process of the pod");
    finish(again)?;
    // The pod's figures count what the VM costs, so they are more than its containers'.
    let (cpu, memory) = (pod.cpu().usage_usec, pod.memory().usage);
    ensure!(
        cpu > container.cpu().usage_usec && memory > container.memory().usage && pod.pids().current > 1,
        "the pod's figures: {pod:?}; those of its container: {container:?}"
    );
    ensure!(pod.memory().usage_limit != u64::MAX && pod.memory().usage_limit > 0, "the pod's limit: {pod:?}");

    let shim = shim_of(environment, &sandbox)?;
    let waiting = sandbox.waiting(CALL_LIMIT);
    sandbox.stop()?;
    let waited = waiting.join().map_err(|_| crate::failure::Failure("the waiting thread".into()))??;
    ensure_eq!(waited.exit_status, 0, "exit status of a sandbox that was stopped");
    sandbox.stop()?;
    let status = sandbox.status()?;
    ensure_eq!(status.state, "SANDBOX_NOTREADY", "state after stop");
    ensure_eq!(status.exited_at, waited.exited_at, "time of exit");
    sandbox.shut_down(environment.host()?, shim)?;
    Ok(format!("{how}; 3 containers; the pod used {} ms of CPU and {} MiB", cpu / 1000, memory >> 20))
}

fn death_of_the_vmm(environment: &mut Environment) -> Outcome<String> {
    let (sandbox, pid) = running(environment)?;
    let shim = shim_of(environment, &sandbox)?;
    let container = created(environment, &sandbox, pid, "sleep 1000")?;
    container.shim.start("")?;
    let waiting = sandbox.waiting(CALL_LIMIT);
    node::kill_hard(pid)?;
    let waited = waiting.join().map_err(|_| crate::failure::Failure("the waiting thread".into()))??;
    ensure_eq!(waited.exit_status, 137, "exit status of the sandbox");
    ensure_eq!(container.shim.wait("", CALL_LIMIT)?.exit_status, 137, "exit status of the container");
    environment.host()?.events.wait_for(&container.bundle.id, "/tasks/exit", "", CALL_LIMIT)?;
    let status = sandbox.status()?;
    ensure_eq!(status.state, "SANDBOX_NOTREADY", "state");
    ensure!(sandbox.ping().is_err(), "a dead sandbox answers to pings");
    finish(container)?;
    sandbox.stop()?;
    sandbox.shut_down(environment.host()?, shim)?;
    Ok(status.info.get("reason").cloned().unwrap_or_default())
}

fn death_of_the_shim(environment: &mut Environment) -> Outcome<String> {
    let (sandbox, pid) = running(environment)?;
    let shim = shim_of(environment, &sandbox)?;
    let container = created(environment, &sandbox, pid, "sleep 1000")?;
    container.shim.start("")?;
    node::kill_hard(shim)?;
    node::wait_for_end("the shim", shim, CALL_LIMIT)?;
    let host = environment.host()?;
    host.delete(&sandbox.bundle)?;
    ensure!(
        node::process(pid).is_none_or(|process| process.state == 'Z'),
        "the VMM {pid} is still there after the delete"
    );
    ensure_eq!(host.delete(&container.bundle)?.exit_status, 137, "exit status of the container");
    host.delete(&sandbox.bundle)?;
    let socket = sandbox.address.trim_start_matches("unix://").to_owned();
    let (path, member) = (sandbox.bundle.path.clone(), container.bundle.clone());
    drop((sandbox, container));
    let _ = std::fs::remove_file(socket);
    std::fs::remove_dir_all(&path).explain(|| format!("remove {}", path.display()))?;
    member.remove()?;
    Ok("delete cleaned up after the sandbox's shim, twice".into())
}

fn refusals(environment: &mut Environment) -> Outcome<String> {
    let sandbox = launched(environment)?;
    let shim = shim_of(environment, &sandbox)?;
    expect(sandbox.stop(), Code::NOT_FOUND, "stop of none")?;
    expect(sandbox.status(), Code::NOT_FOUND, "status of none")?;
    let network = PodSettings { host_network: true, ..SETTINGS };
    let said = expect(sandbox.create(&network), Code::INVALID_ARGUMENT, "the node's network")?;
    ensure!(said.contains("host network"), "{said}");
    let cgroup = PodSettings { cgroup_parent: "/../escape", ..SETTINGS };
    expect(sandbox.create(&cgroup), Code::INVALID_ARGUMENT, "a cgroup that is none")?;
    // As containerd does after a creation that failed.
    sandbox.shut_down(environment.host()?, shim)?;

    let config = environment.host()?.path().join("sandbox-broken.toml");
    std::fs::write(&config, "kernel = \"/nonexistent/vmlinux\"\n")
        .explain(|| "write a configuration".into())?;
    let sandbox = Sandbox::launch(environment.host()?, &environment.id("sandbox"), Some(&config))?;
    let shim = shim_of(environment, &sandbox)?;
    let missing = expect(sandbox.create(&SETTINGS), Code::FAILED_PRECONDITION, "no kernel")?;
    ensure!(missing.contains("/nonexistent/vmlinux"), "{missing}");
    sandbox.shut_down(environment.host()?, shim)?;
    std::fs::remove_file(&config).explain(|| "remove a configuration".into())?;

    // Created and never started: no container, and nothing stays.
    let sandbox = launched(environment)?;
    let shim = shim_of(environment, &sandbox)?;
    sandbox.create(&SETTINGS)?;
    let id = environment.id("member");
    let host = environment.host()?;
    let bundle = host.bundle(&id, &spec(&id, &sandbox, 1, "true"))?;
    let member = host.join(&bundle, &sandbox.address)?;
    let stdio = member.stdio("init", Streams::default())?;
    let early = expect(
        member.create(&stdio, CreateOptions::default()),
        Code::FAILED_PRECONDITION,
        "a container before the start",
    )?;
    drop((member, stdio));
    bundle.remove()?;
    sandbox.shut_down(environment.host()?, shim)?;
    std::thread::sleep(Duration::from_millis(10));
    Ok(format!("{said}; {missing}; {early}"))
}

/// The message of a refusal with this code.
fn expect<T: std::fmt::Debug>(answer: Result<T, CallError>, code: Code, what: &str) -> Outcome<String> {
    match answer {
        Err(error) if error.code == code => Ok(error.message),
        other => fail!("{what}: {other:?}, expected {code:?}"),
    }
}
