//! A part of a pod dies: its containers end with a reason, and nothing is left.

use std::thread;
use std::time::{Duration, Instant};

use bulkhead_base::capabilities::NAMES;
use serde_json::json;

use super::ctr::IMAGE;
use super::{Case, Container, Environment, Fixture, Runtime, status};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::node;
use crate::process::eventually;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("death-of-the-vmm", |e| of_a_child(e, "bulkhead-vmm")).bulkhead_only(),
    Case::new("cold-death-of-the-vmm", |e| of_a_child(e, "bulkhead-vmm")).cold(),
    Case::new("death-of-the-file-server", |e| of_a_child(e, "bulkhead-fs")).bulkhead_only(),
    Case::new("death-of-the-guest", of_the_guest).bulkhead_only(),
    Case::new("death-of-the-shim", of_the_shim),
    Case::new("death-of-the-vmm-at-ctr", of_the_vmm_at_ctr).on(Fixture::Containerd).bulkhead_only(),
    Case::new("death-of-the-shim-at-ctr", of_the_shim_at_ctr).on(Fixture::Containerd),
];

/// SIGBUS: a process may read its program from a file server that has just died before the pod has.
const FAULTED: u32 = 128 + 7;

/// What every container of a pod without its VM comes to: waits and the exit event, then delete and release.
fn expect_dead(environment: &Environment, container: Container, since: Instant) -> Outcome<String> {
    let status = container.shim.wait("", CALL_LIMIT)?.exit_status;
    let took = since.elapsed();
    for status in [status, container.shim.wait("beside", CALL_LIMIT)?.exit_status] {
        ensure!(matches!(status, 137 | FAULTED), "exit status {status}, expected 137");
    }
    let id = container.bundle.id.clone();
    environment.host()?.events.wait_for(&id, "/tasks/exit", "", CALL_LIMIT)?;
    ensure_eq!(container.shim.state("")?.status.value(), status::STOPPED, "state");
    let log = container.shim.log.until("pod", Duration::ZERO).unwrap_or_default();
    container.shim.delete("beside")?;
    container.shim.delete("")?;
    container.release()?;
    let reason = log
        .lines()
        .rev()
        .find(|line| line.contains("level=error") || line.contains("level=warn"))
        .unwrap_or("")
        .trim();
    Ok(format!("known after {:.3} s; {reason}", took.as_secs_f64()))
}

/// A container that runs, with an exec, and its shim's process id.
fn running(environment: &Environment) -> Outcome<(Container, i32)> {
    let container =
        environment.started("death", bundle::process(&["sleep", "100000"]), Streams::default())?;
    container.exec("beside", &bundle::process(&["sleep", "100000"]), Streams::default())?;
    let shim = container.shim.pid()?;
    Ok((container, shim))
}

fn of_a_child(environment: &mut Environment, program: &str) -> Outcome<String> {
    let (container, shim) = running(environment)?;
    let child = node::descendants(shim, program)
        .into_iter()
        .next()
        .explain(|| format!("no {program} below the shim"))?;
    let since = Instant::now();
    node::kill_hard(child.pid)?;
    expect_dead(environment, container, since)
}

/// A privileged container resets the guest by the keyboard controller's port.
fn of_the_guest(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("death");
    let script = "mknod /tmp/port c 1 4 && echo found; read go; \
                  printf '\\376' | dd of=/tmp/port bs=1 seek=100 conv=notrunc; exec sleep 100000";
    let mut process = bundle::shell(script);
    process["capabilities"] = bundle::capabilities(&NAMES);
    let mut spec = bundle::spec(&id, process);
    spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        mounts.push(
            json!({ "destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"] }),
        );
    }
    let mut container = environment.created(&id, &spec, Streams { stdin: true, ..Streams::default() })?;
    container.shim.start("")?;
    container.stdio.stdout.until("found", CALL_LIMIT)?;
    container.exec("beside", &bundle::process(&["sleep", "100000"]), Streams::default())?;
    let since = Instant::now();
    container.stdio.write(b"go\n")?;
    expect_dead(environment, container, since)
}

fn of_the_shim(environment: &mut Environment) -> Outcome<String> {
    let (container, shim) = running(environment)?;
    let helpers = [node::descendants(shim, "bulkhead-vmm"), node::descendants(shim, "bulkhead-fs")].concat();
    node::kill_hard(shim)?;
    node::wait_for_end("the shim", shim, CALL_LIMIT)?;
    let deleted = environment.host()?.delete(&container.bundle)?;
    ensure_eq!(deleted.exit_status, 137, "exit status that the shim's delete reports");
    for helper in &helpers {
        ensure!(
            node::process(helper.pid).is_none_or(|now| now.started != helper.started || now.state == 'Z'),
            "{} is still there",
            helper.name
        );
    }
    // Once more, as containerd may: it finds nothing and is content.
    environment.host()?.delete(&container.bundle)?;
    let address = container.shim.address.trim_start_matches("unix://").to_owned();
    let bundle = container.bundle.clone();
    drop(container);
    let _ = std::fs::remove_file(&address);
    bundle.remove()?;
    Ok(format!("delete cleaned up, twice; {} processes went with the shim", helpers.len()))
}

fn of_the_vmm_at_ctr(environment: &mut Environment) -> Outcome<String> {
    let (id, runtime) = (environment.id("death"), environment.runtime.name());
    let containerd = environment.containerd()?;
    let running = containerd.ctr_running(&[
        "run",
        "--rm",
        "--runtime",
        runtime,
        IMAGE,
        &id,
        "/bin/sh",
        "-c",
        "echo up; exec sleep 1000",
    ])?;
    eventually("the container runs", CALL_LIMIT * 2, || {
        ensure!(running.stdout().contains("up"), "stdout {:?}", running.stdout());
        Ok(())
    })?;
    let shim = *containerd.shims(&id).first().explain(|| "no shim of the container".into())?;
    let vmm = node::descendants(shim, "bulkhead-vmm")
        .into_iter()
        .next()
        .explain(|| "no VMM below the shim".into())?;
    let since = Instant::now();
    node::kill_hard(vmm.pid)?;
    let output = running.finish(CALL_LIMIT * 4)?;
    let took = since.elapsed();
    ensure!(took <= CALL_LIMIT, "ctr run took {:.1} s to end", took.as_secs_f64());
    ensure_eq!(output.code, 137, "exit code of ctr run, {}", output.said());
    Ok(format!("ctr run ended with 137 after {:.3} s", took.as_secs_f64()))
}

fn of_the_shim_at_ctr(environment: &mut Environment) -> Outcome<String> {
    let (id, runtime) = (environment.id("death"), environment.runtime.name());
    let containerd = environment.containerd()?;
    containerd
        .ctr(&["run", "-d", "--null-io", "--runtime", runtime, IMAGE, &id, "sleep", "1000"])?
        .success("ctr run -d")?;
    let shim = *containerd.shims(&id).first().explain(|| "no shim of the container".into())?;
    let since = Instant::now();
    node::kill_hard(shim)?;
    eventually("containerd knows that the task has ended", CALL_LIMIT, || {
        let list = containerd.ctr(&["task", "ls"])?.stdout;
        let line = list.lines().find(|line| line.starts_with(&id)).unwrap_or_default().to_owned();
        ensure!(!line.contains("RUNNING"), "{line:?}");
        thread::sleep(Duration::from_millis(50));
        Ok(())
    })?;
    let took = since.elapsed();
    let _ = containerd.ctr(&["task", "delete", &id])?;
    containerd.ctr(&["container", "delete", &id])?.success("ctr container delete")?;
    if environment.runtime == Runtime::Runc {
        // runc's shim leaves its socket when it is killed.
        let _ = std::fs::remove_dir_all("/run/containerd/s");
    }
    Ok(format!("containerd knew after {:.3} s and cleaned up", took.as_secs_f64()))
}
