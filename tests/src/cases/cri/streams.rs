//! What containers say and are told: execs, terminals, attached streams, logs.

use std::fs;
use std::time::Duration;

use bulkhead_cri::proto;
use bulkhead_cri::stream::{END, RESIZE, STDERR, STDIN, STDOUT};

use crate::cases::Environment;
use crate::cri::shell;
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq, fail};

/// Programs in a container that runs, waited for and streamed.
pub(crate) fn exec(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    let container = pod.start("runs", "sleep 100000", |_| {})?;
    let ended = container.exec("echo out; echo err >&2; exit 5")?;
    ensure_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (5, "out\n", "err\n"), "streams");
    let many = container.exec("i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done")?.success()?;
    ensure!(many.lines().count() == 3000 && many.ends_with("line 2999\n"), "{} bytes", many.len());

    let command = ["/no/such/program".to_owned()];
    let Err(failure) = container.exec_command(&command, Duration::ZERO) else {
        fail!("a program that is not there ran")
    };
    ensure!(failure.0.to_lowercase().contains("no such file"), "{failure}");
    let Err(failure) = container.exec_command(&shell("sleep 100"), Duration::from_secs(1)) else {
        fail!("an exec outlived its time limit")
    };
    ensure!(failure.0.contains("timeout") || failure.0.contains("deadline"), "{failure}");
    let left = container.exec("ps | grep -c 'sleep 10[0]$'")?;
    ensure_eq!(left.stdout, "0\n", "processes of the exec that took too long");

    let mut stream = container.exec_stream(&shell("read a; echo got $a; echo bad >&2; exit 6"), false)?;
    stream.send(STDIN, b"input\n")?;
    let (mut stdout, mut stderr, mut end) = (Vec::new(), Vec::new(), String::new());
    while let Some((channel, data)) = stream.receive()? {
        match channel {
            STDOUT => stdout.extend_from_slice(&data),
            STDERR => stderr.extend_from_slice(&data),
            END => end.push_str(&String::from_utf8_lossy(&data)),
            _ => {}
        }
    }
    ensure_eq!((stdout.as_slice(), stderr.as_slice()), (&b"got input\n"[..], &b"bad\n"[..]), "streamed");
    ensure!(end.contains("NonZeroExitCode") && end.contains("\"6\""), "its end: {end}");
    container.stop(Duration::ZERO)?;
    ensure!(container.exec("true").is_err(), "an exec in a container that has ended");
    container.remove()?;
    Ok("exit code 5, 3000 lines, a missing program, a time limit, streams both ways".into())
}

/// Terminals: of an exec, and of a container that is attached to.
pub(crate) fn terminal(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    let container = pod.start(
        "asks",
        "stty size >/dev/null && echo ready; read a; echo \"it was $a\"; exit 4",
        |config| {
            config.stdin = true;
            config.tty = true;
        },
    )?;
    container.wait_for_output("ready")?;

    let mut stream = container.exec_stream(&shell("read a; stty size; tty; exit 0"), true)?;
    stream.send(RESIZE, br#"{"Width":91,"Height":37}"#)?;
    // The size is taken before the line: both go through one connection, but the kubelet's server handles sizes beside.
    container.exec("sleep 0.3")?.success()?;
    stream.send(STDIN, b"go\n")?;
    let said = stream.receive_until(STDOUT, |said| said.windows(9).any(|part| part == b"/dev/pts/"))?;
    let said = String::from_utf8_lossy(&said).into_owned();
    ensure!(said.contains("37 91\r\n/dev/pts/"), "the exec's terminal: {said:?}");
    drop(stream);

    let mut stream = container.attach(true)?;
    stream.send(STDIN, b"typed\n")?;
    let said = stream.receive_until(STDOUT, |said| said.windows(12).any(|part| part == b"it was typed"))?;
    ensure!(String::from_utf8_lossy(&said).contains("it was typed\r\n"), "attached: {said:?}");
    let ended = container.wait()?;
    ensure_eq!(ended.code, 4, "exit code");
    container.remove()?;
    Ok("37 rows and 91 columns as told, typed into and read".into())
}

/// Logs: both streams, lines of any length, and a file that was moved away.
pub(crate) fn logs(environment: &mut Environment) -> Outcome<String> {
    let pod = environment.shared_pod(environment.handler())?;
    let script = "head -c 40000 /dev/zero | tr '\\0' x; echo; echo err >&2; echo said; \
                  while [ ! -e /more ]; do sleep 0.02; done; echo more";
    let container = pod.start("says", script, |_| {})?;
    container.wait_for_output("said")?;
    let text = fs::read_to_string(&container.log).explain(|| "the log".into())?;
    ensure!(text.lines().filter(|line| line.contains(" stdout P ")).count() >= 2, "a long line in one piece");
    let (stdout, stderr) = container.output()?;
    ensure_eq!(stdout.lines().next().map(str::len), Some(40_000), "the long line");
    ensure_eq!(stderr, "err\n", "standard error");
    let moved = container.log.with_extension("1");
    fs::rename(&container.log, &moved).explain(|| "move the log".into())?;
    let request =
        proto::ReopenContainerLogRequest { container_id: container.id.clone(), ..Default::default() };
    pod.node.client().reopen_container_log(&request).explain(|| "reopen the log".into())?;
    container.exec("touch /more")?.success()?;
    let ended = container.wait()?;
    ensure!(ended.stdout.ends_with("more\n"), "after the log was opened anew: {ended:?}");
    fs::remove_file(&moved).explain(|| "remove the old log".into())?;
    let log = container.log.clone();
    container.remove()?;
    let _ = fs::remove_file(log);
    Ok("a line of 40000 bytes in pieces, both streams, opened anew".into())
}
