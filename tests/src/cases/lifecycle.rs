//! A container's way from create to delete, and the events on it.

use std::time::Duration;

use containerd_shim_protos::ttrpc::Code;

use super::{Case, Environment, status};
use crate::bundle;
use crate::failure::Outcome;
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("lifecycle-states-output-events", states_output_events),
    Case::new("cold-lifecycle-states-output-events", states_output_events).cold(),
    Case::new("lifecycle-created-and-deleted", created_and_deleted),
    Case::new("lifecycle-signals", signals),
    Case::new("lifecycle-wrong-order-is-refused", wrong_order),
    Case::new("lifecycle-shutdown-is-ignored-while-a-container-lives", shutdown_ignored),
    Case::new("lifecycle-version-and-info", version_and_info),
];

fn states_output_events(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("life");
    let spec = bundle::spec(&id, bundle::shell("echo out; echo err >&2; exit 42"));
    let container = environment.created(&id, &spec, Streams::default())?;
    let shim = &container.shim;
    let state = |expected: i32, what: &str| -> Outcome {
        ensure_eq!(shim.state("")?.status.value(), expected, "state {what}");
        Ok(())
    };
    state(status::CREATED, "after create")?;
    let pid = shim.start("")?;
    ensure!(pid > 0, "start: process id {pid}");
    let exit = shim.wait("", CALL_LIMIT)?;
    ensure_eq!(exit.exit_status, 42, "exit status of wait");
    ensure!(
        exit.exited_at.as_ref().is_some_and(|at| at.seconds > 1_000_000_000),
        "wait: no time of exit: {:?}",
        exit.exited_at
    );
    state(status::STOPPED, "after exit")?;
    ensure_eq!(container.stdio.stdout.to_end(CALL_LIMIT)?, "out\n", "stdout");
    ensure_eq!(container.stdio.stderr.to_end(CALL_LIMIT)?, "err\n", "stderr");
    let deleted = shim.delete("")?;
    ensure_eq!(deleted.exit_status, 42, "exit status of delete");
    ensure_eq!(deleted.pid, pid, "process id of delete");
    container.release()?;

    let events = &environment.host()?.events;
    events.wait_for(&id, "/tasks/delete", "", CALL_LIMIT)?;
    let topics: Vec<String> = events.of(&id).into_iter().map(|event| event.topic).collect();
    ensure_eq!(topics, ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"], "events");
    let exit = events.wait_for(&id, "/tasks/exit", "", Duration::ZERO)?;
    ensure_eq!((exit.exit_status, exit.pid), (42, pid), "exit event");
    Ok(format!("exit code 42 in wait, delete and event; {}", topics.join(" ")))
}

fn created_and_deleted(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("created");
    let container =
        environment.created(&id, &bundle::spec(&id, bundle::shell("echo never")), Streams::default())?;
    // As containerd's clients do: a container that was created is killed before it is deleted.
    ensure_eq!(container.kill()?.exit_status, 137, "exit status");
    container.shim.delete("")?;
    container.release()?;
    let topics: Vec<String> =
        environment.host()?.events.of(&id).into_iter().map(|event| event.topic).collect();
    ensure!(
        !topics.iter().any(|topic| topic == "/tasks/start"),
        "a start event of a container that was not started: {topics:?}"
    );
    Ok("a container that was never started is released".into())
}

fn signals(environment: &mut Environment) -> Outcome<String> {
    // PID 1 of a namespace ignores signals that it has no handler for.
    let script = "trap 'echo caught; exit 7' TERM; echo ready; while :; do sleep 0.1; done";
    let container = environment.started("signal", bundle::shell(script), Streams::default())?;
    container.stdio.stdout.until("ready", CALL_LIMIT)?;
    container.shim.kill("", 15, false)?;
    ensure_eq!(container.shim.wait("", CALL_LIMIT)?.exit_status, 7, "exit status after a caught SIGTERM");
    container.stdio.stdout.until("caught", CALL_LIMIT)?;
    match container.shim.kill("", 15, false) {
        Err(error) if error.code == Code::NOT_FOUND => {}
        other => fail!("kill of a container that ended: {other:?}, expected NOT_FOUND"),
    }
    container.finish()?;

    let container =
        environment.started("signal", bundle::shell("sleep 1000 & sleep 1000 & wait"), Streams::default())?;
    container.shim.kill("", 9, true)?;
    ensure_eq!(container.shim.wait("", CALL_LIMIT)?.exit_status, 137, "exit status after SIGKILL to all");
    container.finish()?;
    Ok("SIGTERM caught: 7; SIGKILL to all: 137; kill of an ended one: NOT_FOUND".into())
}

fn wrong_order(environment: &mut Environment) -> Outcome<String> {
    let container = environment.started("order", bundle::shell("sleep 1000"), Streams::default())?;
    let shim = &container.shim;
    ensure!(shim.delete("").is_err(), "delete of a running container was not refused");
    ensure!(shim.start("").is_err(), "a second start was not refused");
    match shim.state("no-such-exec") {
        Err(error) if error.code == Code::NOT_FOUND => {}
        other => fail!("state of an unknown exec: {other:?}, expected NOT_FOUND"),
    }
    ensure_eq!(shim.state("")?.status.value(), status::RUNNING, "state after what was refused");
    container.finish()?;
    Ok("delete of a running container, a second start and an unknown exec are refused, and it runs on".into())
}

fn shutdown_ignored(environment: &mut Environment) -> Outcome<String> {
    let container =
        environment.started("shutdown", bundle::shell("echo up; sleep 1000"), Streams::default())?;
    container.stdio.stdout.until("up", CALL_LIMIT)?;
    container.shim.shutdown()?;
    eventually("the shim goes on", CALL_LIMIT, || Ok(container.shim.connect()?))?;
    ensure_eq!(container.shim.state("")?.status.value(), status::RUNNING, "state after shutdown");
    container.finish()?;
    Ok("the container runs on".into())
}

fn version_and_info(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("info");
    let host = environment.host()?;
    let bundle = host.bundle(&id, &bundle::spec(&id, bundle::shell("true")))?;
    let version = host.invoke(&bundle, &["-v"])?.success("-v")?.stdout;
    ensure!(version.contains("containerd-shim"), "-v says {version:?}");
    let info = host.invoke(&bundle, &["-info"])?.success("-info")?.stdout;
    ensure!(info.contains("io.containerd."), "-info says {info:?}");
    bundle.remove()?;
    Ok(version.split_whitespace().collect::<Vec<_>>().join(" "))
}
