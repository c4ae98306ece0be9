//! Freezing, figures, limits at run time.

use std::thread;
use std::time::Duration;

use serde_json::json;

use super::{Case, Environment, Fixture, status};
use crate::bundle;
use crate::failure::Outcome;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("control-pause-and-resume", pause_and_resume),
    Case::new("control-stats", stats).on(Fixture::Pod),
    Case::new("control-update", update),
    Case::new("control-pids-and-connect", pids_and_connect).on(Fixture::Pod),
];

fn pause_and_resume(environment: &mut Environment) -> Outcome<String> {
    let script = "i=0; while :; do i=$((i+1)); echo $i >/count; sleep 0.01; done";
    let container = environment.started("pause", bundle::shell(script), Streams::default())?;
    let file = container.bundle.upper.join("count");
    let count =
        || std::fs::read_to_string(&file).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0);
    crate::process::eventually("the container counts", CALL_LIMIT, || {
        ensure!(count() > 2, "count {}", count());
        Ok(())
    })?;
    container.shim.pause()?;
    ensure_eq!(container.shim.state("")?.status.value(), status::PAUSED, "state after pause");
    let frozen = count();
    thread::sleep(Duration::from_millis(200));
    ensure_eq!(count(), frozen, "the count while paused");
    container.shim.resume()?;
    ensure_eq!(container.shim.state("")?.status.value(), status::RUNNING, "state after resume");
    crate::process::eventually("the container counts again", CALL_LIMIT, || {
        ensure!(count() > frozen, "count {}", count());
        Ok(())
    })?;
    let (id, events) = (container.bundle.id.clone(), &environment.host()?.events);
    events.wait_for(&id, "/tasks/paused", "", CALL_LIMIT)?;
    events.wait_for(&id, "/tasks/resumed", "", CALL_LIMIT)?;
    // A frozen container can be killed.
    container.shim.pause()?;
    container.shim.kill("", 9, true)?;
    ensure_eq!(
        container.shim.wait("", CALL_LIMIT)?.exit_status,
        137,
        "exit status of a container that was killed while paused"
    );
    container.finish()?;
    Ok(format!("stood still at {frozen}, went on, and was killed while paused"))
}

fn stats(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    pod.exec_script(&name, "i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done")?.success()?;
    let metrics = pod.shim.stats()?;
    let (cpu, memory, pids) = (metrics.cpu().usage_usec, metrics.memory().usage, metrics.pids().current);
    ensure!(cpu > 0 && memory > 0 && pids >= 1, "CPU {cpu} us, memory {memory} bytes, {pids} processes");
    ensure!(metrics.memory().usage_limit > 0, "no memory limit is reported");
    Ok(format!("CPU {cpu} us, memory {memory} bytes, {pids} processes"))
}

fn update(environment: &mut Environment) -> Outcome<String> {
    let container = environment.started("update", bundle::shell("sleep 1000"), Streams::default())?;
    container.shim.update(&json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 33 }, "cpu": { "quota": 30_000, "period": 100_000 } }))?;
    let metrics = container.shim.stats()?;
    ensure_eq!(
        (metrics.memory().usage_limit, metrics.pids().limit),
        (64 << 20, 33),
        "limits in the statistics"
    );
    container.finish()?;
    Ok("memory and process limits changed while it ran".into())
}

fn pids_and_connect(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let _stdio = pod.exec(&name, &bundle::shell("sleep 1000"), Streams::default())?;
    let pids = pod.shim.pids()?;
    ensure!(pids.len() >= 2, "processes of a container with an exec: {pids:?}");
    let connected = pod.shim.connect()?;
    ensure!(connected.shim_pid > 1 && connected.task_pid > 1, "connect: {connected:?}");
    ensure_eq!(connected.task_pid, pod.shim.state("")?.pid, "process ids of connect and state");
    pod.shim.kill(&name, 9, false)?;
    pod.shim.wait(&name, CALL_LIMIT)?;
    pod.shim.delete(&name)?;
    Ok(format!("{} processes, shim {}, task {}", pids.len(), connected.shim_pid, connected.task_pid))
}
