//! Further processes in a running container.

use containerd_shim_protos::ttrpc::Code;
use serde_json::json;

use super::{Case, Environment, Fixture};
use crate::bundle;
use crate::failure::Outcome;
use crate::shim::CALL_LIMIT;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("exec-output-and-exit-code", output_and_exit_code).on(Fixture::Pod),
    Case::new("exec-same-namespaces", same_namespaces).on(Fixture::Pod),
    Case::new("exec-user-directory-environment", user_directory_environment).on(Fixture::Pod),
    Case::new("exec-several-at-once", several_at_once).on(Fixture::Pod),
    Case::new("exec-sixty-at-once", sixty_at_once).on(Fixture::Pod),
    Case::new("exec-left-in-the-background", left_in_background).on(Fixture::Pod),
    Case::new("exec-missing-program", missing_program).on(Fixture::Pod),
    Case::new("exec-kill", kill).on(Fixture::Pod),
    Case::new("exec-duplicate-id", duplicate_id).on(Fixture::Pod),
    Case::new("exec-ends-with-its-container", ends_with_container),
    Case::new("cold-exec-ends-with-its-container", ends_with_container).cold(),
];

fn output_and_exit_code(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let ended = pod.exec_script(&name, "echo out; echo err >&2; exit 5")?;
    ensure_eq!(
        (ended.exit_status, ended.stdout.as_str(), ended.stderr.as_str()),
        (5, "out\n", "err\n"),
        "exec"
    );
    let events = environment.host()?.events.of(&pod.bundle.id);
    let topics: Vec<&str> =
        events.iter().filter(|event| event.exec == name).map(|event| event.topic.as_str()).collect();
    ensure!(
        topics.starts_with(&["/tasks/exec-added", "/tasks/exec-started", "/tasks/exit"]),
        "events of the exec: {topics:?}"
    );
    Ok(topics.join(" "))
}

fn same_namespaces(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let script = "for n in pid mnt ipc uts net; do [ $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) ] || echo $n; done; ps";
    let output = pod.exec_script(&name, script)?.success()?;
    let lines: Vec<&str> = output.lines().collect();
    ensure!(
        lines.first().is_some_and(|line| line.contains("PID")),
        "namespaces that differ, or no ps: {output:?}"
    );
    ensure!(output.contains("sleep 100000"), "the container's own process is not seen: {output:?}");
    Ok(format!("{} processes seen", lines.len() - 1))
}

fn user_directory_environment(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let mut process = bundle::shell("id -u; id -g; id -G; pwd; echo $COLOUR");
    process["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [2000, 2001] });
    process["cwd"] = "/tmp".into();
    process["env"] = json!(["PATH=/bin", "COLOUR=dark green"]);
    let stdio = pod.exec(&name, &process, Streams::default())?;
    let exit = pod.shim.wait(&name, CALL_LIMIT)?.exit_status;
    let output = stdio.stdout.to_end(CALL_LIMIT)?;
    pod.shim.delete(&name)?;
    ensure_eq!((exit, output.as_str()), (0, "1000\n1001\n1001 2000 2001\n/tmp\ndark green\n"), "exec");
    Ok(output.lines().collect::<Vec<_>>().join(", "))
}

fn several_at_once(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared()?;
    let names: Vec<String> = (0..4).map(|_| environment.id("exec")).collect();
    let mut running = Vec::new();
    for name in &names {
        let process = bundle::shell(&format!("read line; echo {name} $line"));
        running.push(pod.exec(name, &process, Streams { stdin: true, ..Streams::default() })?);
    }
    for stdio in running.iter_mut().rev() {
        stdio.write(b"go\n")?;
    }
    for (name, stdio) in names.iter().zip(&running) {
        ensure_eq!(pod.shim.wait(name, CALL_LIMIT)?.exit_status, 0, "exit status of {name}");
        ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?, format!("{name} go\n"), "output of {name}");
        pod.shim.delete(name)?;
    }
    Ok(format!("{} execs, each with its own streams", names.len()))
}

fn sixty_at_once(environment: &mut Environment) -> Outcome<String> {
    const COUNT: usize = 60;
    let pod = environment.shared()?;
    let names: Vec<String> = (0..COUNT).map(|_| environment.id("exec")).collect();
    let mut running = Vec::new();
    for name in &names {
        let streams = Streams { stdin: true, ..Streams::default() };
        running.push(pod.exec(name, &bundle::shell("read line; echo $line"), streams)?);
    }
    for (name, stdio) in names.iter().zip(&mut running) {
        stdio.write(b"go\n")?;
        ensure_eq!(pod.shim.wait(name, CALL_LIMIT)?.exit_status, 0, "exit status of {name}");
        ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?, "go\n", "output of {name}");
        pod.shim.delete(name)?;
    }
    Ok(format!("{COUNT} execs, all there at the same time"))
}

fn left_in_background(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let stdio = pod.exec(&name, &bundle::shell("(sleep 5; echo later) & echo now"), Streams::default())?;
    let exit = pod.shim.wait(&name, CALL_LIMIT)?;
    ensure_eq!(exit.exit_status, 0, "exit status");
    // containerd's clients delete an exec as soon as it has ended, and have its output until that returns.
    pod.shim.delete(&name)?;
    ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?, "now\nlater\n", "output");
    Ok("what it left running was heard five seconds later".into())
}

fn missing_program(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let stdio = pod.shim.stdio(&name, Streams::default())?;
    pod.shim.exec(&name, &bundle::process(&["/no/such/program"]), &stdio)?;
    let Err(error) = pod.shim.start(&name) else {
        fail!("an exec of a program that does not exist was started")
    };
    ensure!(error.message.contains("/no/such/program"), "the error does not name the program: {error}");
    ensure!(error.message.contains("no such file"), "the error is not the one that runc gives: {error}");
    pod.shim.delete(&name)?;
    let after = environment.id("exec");
    ensure_eq!(pod.exec_script(&after, "echo alive")?.success()?, "alive\n", "an exec after the failed one");
    Ok(error.message)
}

fn kill(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let stdio = pod.exec(&name, &bundle::shell("echo up; exec sleep 1000"), Streams::default())?;
    stdio.stdout.until("up", CALL_LIMIT)?;
    pod.shim.kill(&name, 15, false)?;
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 143, "exit status after SIGTERM");
    ensure_eq!(pod.shim.delete(&name)?.exit_status, 143, "exit status of delete");
    match pod.shim.kill(&name, 15, false) {
        Err(error) if error.code == Code::NOT_FOUND => Ok("143; then NOT_FOUND".into()),
        other => fail!("kill of a deleted exec: {other:?}, expected NOT_FOUND"),
    }
}

fn duplicate_id(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let _stdio = pod.exec(&name, &bundle::shell("sleep 1000"), Streams::default())?;
    let other = pod.shim.stdio(&format!("{name}-again"), Streams::default())?;
    let error = match pod.shim.exec(&name, &bundle::shell("true"), &other) {
        Err(error) if error.code == Code::ALREADY_EXISTS => error,
        other => fail!("an exec with an id in use: {other:?}, expected ALREADY_EXISTS"),
    };
    pod.shim.kill(&name, 9, false)?;
    pod.shim.wait(&name, CALL_LIMIT)?;
    pod.shim.delete(&name)?;
    Ok(error.message)
}

fn ends_with_container(environment: &mut Environment) -> Outcome<String> {
    let container = environment.started("execs", bundle::shell("sleep 1000"), Streams::default())?;
    let stdio = container.exec("last", &bundle::shell("echo up; sleep 1000"), Streams::default())?;
    stdio.stdout.until("up", CALL_LIMIT)?;
    container.kill()?;
    ensure_eq!(container.shim.wait("last", CALL_LIMIT)?.exit_status, 137, "exit status of the exec");
    let (id, events) = (container.bundle.id.clone(), &environment.host()?.events);
    events.wait_for(&id, "/tasks/exit", "", CALL_LIMIT)?;
    let exits: Vec<String> =
        events.of(&id).into_iter().filter(|e| e.topic == "/tasks/exit").map(|e| e.exec).collect();
    ensure_eq!(exits, ["last", ""], "order of the exit events (the exec's first)");
    container.shim.delete("last")?;
    container.finish()?;
    Ok("137, and its exit event comes first".into())
}
