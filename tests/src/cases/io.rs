//! Standard streams and terminals.

use super::{Case, Environment, Fixture};
use crate::bundle;
use crate::failure::Outcome;
use crate::shim::CALL_LIMIT;
use crate::stdio::{Reading, Streams};
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("io-stdin-and-close-io", stdin_and_close_io).on(Fixture::Pod),
    Case::new("io-stdin-ends-with-its-writer", stdin_ends).on(Fixture::Pod),
    Case::new("io-large-output-is-complete", large_output).on(Fixture::Pod),
    Case::new("io-large-input-is-complete", large_input).on(Fixture::Pod),
    Case::new("io-output-waits-for-a-late-reader", late_reader).on(Fixture::Pod),
    Case::new("io-undrained-output-does-not-block-kill", undrained),
    Case::new("io-terminal", terminal),
    Case::new("cold-io-terminal", terminal).cold(),
    Case::new("io-exec-terminal-and-resize", exec_terminal).on(Fixture::Pod),
    Case::new("io-daemon-keeps-stdout", daemon_keeps_stdout).on(Fixture::Pod),
];

const STDIN: Streams = Streams { stdin: true, terminal: false, reading: Reading::AtOnce };
const TERMINAL: Streams = Streams { stdin: true, terminal: true, reading: Reading::AtOnce };

fn stdin_and_close_io(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let mut stdio = pod.exec(&name, &bundle::shell("cat; echo end"), STDIN)?;
    stdio.write(b"one\n")?;
    stdio.stdout.until("one\n", CALL_LIMIT)?;
    stdio.write(b"two\n")?;
    stdio.stdout.until("two\n", CALL_LIMIT)?;
    pod.shim.close_stdin(&name)?;
    // Our end is closed as well, as containerd's client does: the FIFO would have a writer otherwise.
    stdio.close_stdin();
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 0, "exit status");
    ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?, "one\ntwo\nend\n", "stdout");
    pod.shim.delete(&name)?;
    Ok("echoed line by line, and the end of the input was seen".into())
}

fn stdin_ends(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let mut stdio = pod.exec(&name, &bundle::shell("wc -c"), STDIN)?;
    stdio.write(b"12345")?;
    stdio.close_stdin();
    pod.shim.close_stdin(&name)?;
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 0, "exit status");
    ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?.trim(), "5", "bytes counted");
    pod.shim.delete(&name)?;
    Ok("5 bytes, then the end".into())
}

fn large_output(environment: &mut Environment) -> Outcome<String> {
    const LINES: usize = 30_000;
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let ended = pod.exec_script(&name, &format!("seq 1 {LINES}"))?;
    let expected: String = (1..=LINES).map(|number| format!("{number}\n")).collect();
    ensure_eq!(ended.exit_status, 0, "exit status");
    ensure_eq!(ended.stdout.len(), expected.len(), "bytes of output");
    ensure!(ended.stdout == expected, "the output has the right size and the wrong contents");
    Ok(format!("{} bytes, though the process had ended before they were read", expected.len()))
}

fn large_input(environment: &mut Environment) -> Outcome<String> {
    const CHUNK: usize = 16 * 1024;
    const CHUNKS: usize = 12;
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let mut stdio = pod.exec(&name, &bundle::shell("sleep 0.2; wc -c"), STDIN)?;
    for _ in 0..CHUNKS {
        stdio.write(&[b'x'; CHUNK])?;
    }
    stdio.close_stdin();
    pod.shim.close_stdin(&name)?;
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 0, "exit status");
    ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?.trim(), (CHUNK * CHUNKS).to_string(), "bytes counted");
    pod.shim.delete(&name)?;
    Ok(format!("{} bytes written before the process read any", CHUNK * CHUNKS))
}

fn late_reader(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let streams = Streams { reading: Reading::WhenOpened, ..Streams::default() };
    let stdio = pod.exec(&name, &bundle::shell("echo output; echo error >&2"), streams)?;
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 0, "exit status");
    // Long enough for all of it to have arrived.
    std::thread::sleep(std::time::Duration::from_millis(100));
    stdio.drain();
    ensure_eq!(stdio.stdout.to_end(CALL_LIMIT)?, "output\n", "stdout");
    ensure_eq!(stdio.stderr.to_end(CALL_LIMIT)?, "error\n", "stderr");
    pod.shim.delete(&name)?;
    Ok("both streams came whole and ended, though nobody had opened them when the process ended".into())
}

fn undrained(environment: &mut Environment) -> Outcome<String> {
    let streams = Streams { reading: Reading::WhenDrained, ..Streams::default() };
    let container = environment.started(
        "undrained",
        bundle::shell("while :; do echo 0123456789012345678901234567890123456789; done"),
        streams,
    )?;
    // Long enough for every buffer on the way to fill.
    std::thread::sleep(std::time::Duration::from_millis(100));
    ensure_eq!(container.kill()?.exit_status, 137, "exit status");
    let id = container.bundle.id.clone();
    environment.host()?.events.wait_for(&id, "/tasks/exit", "", CALL_LIMIT)?;
    container.stdio.drain();
    container.finish()?;
    Ok("nobody read its output, and SIGKILL, wait and the exit event came through".into())
}

fn terminal(environment: &mut Environment) -> Outcome<String> {
    let id = environment.id("terminal");
    let mut process = bundle::shell("tty; stty size; read line; echo got $line; echo err >&2");
    process["terminal"] = true.into();
    process["consoleSize"] = serde_json::json!({ "height": 33, "width": 111 });
    let mut container = environment.created(&id, &bundle::spec(&id, process), TERMINAL)?;
    container.shim.start("")?;
    container.stdio.stdout.until("/dev/pts/", CALL_LIMIT)?;
    container.stdio.write(b"typed\n")?;
    ensure_eq!(container.shim.wait("", CALL_LIMIT)?.exit_status, 0, "exit status");
    let output = container.stdio.stdout.to_end(CALL_LIMIT)?;
    for expected in ["33 111\r\n", "got typed\r\n", "err\r\n"] {
        ensure!(output.contains(expected), "{expected:?} is not in the terminal's output {output:?}");
    }
    container.finish()?;
    Ok(output.split_whitespace().collect::<Vec<_>>().join(" "))
}

fn exec_terminal(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let mut process = bundle::shell("echo up; read line; stty size; exit 3");
    process["terminal"] = true.into();
    let mut stdio = pod.exec(&name, &process, TERMINAL)?;
    stdio.stdout.until("up", CALL_LIMIT)?;
    pod.shim.resize(&name, 77, 22)?;
    stdio.write(b"\n")?;
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 3, "exit status");
    let output = stdio.stdout.to_end(CALL_LIMIT)?;
    ensure!(output.contains("22 77"), "size after resize: {output:?}");
    pod.shim.delete(&name)?;
    Ok("22 rows, 77 columns after resize".into())
}

fn daemon_keeps_stdout(environment: &mut Environment) -> Outcome<String> {
    let (pod, name) = (environment.shared()?, environment.id("exec"));
    let stdio = pod.exec(&name, &bundle::shell("sleep 2 & echo started"), Streams::default())?;
    ensure_eq!(pod.shim.wait(&name, CALL_LIMIT)?.exit_status, 0, "exit status");
    stdio.stdout.until("started\n", CALL_LIMIT)?;
    pod.shim.delete(&name)?;
    Ok("the exit is reported while a child still holds the output".into())
}
