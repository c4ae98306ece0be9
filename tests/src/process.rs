//! Running programs with a time limit and captured output.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use std::os::unix::process::ExitStatusExt;

use crate::fail;
use crate::failure::{Explain, Failure, Outcome};

/// How long after a program's end its output may still come: a daemon that it left behind can hold the pipe open for ever.
const OUTPUT_GRACE: Duration = Duration::from_millis(500);

/// How often the end of a process is looked for.
const POLL: Duration = Duration::from_millis(2);

/// What a program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code, or 128 plus the signal that ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: String,
    /// The same, when it may not be text.
    pub stdout_bytes: Vec<u8>,
    /// Its standard error.
    pub stderr: String,
    /// From start to end.
    pub elapsed: Duration,
}

impl Output {
    /// The output, if the program succeeded.
    ///
    /// # Errors
    /// Any other exit code than 0, with what the program said.
    pub fn success(self, what: &str) -> Outcome<Self> {
        match self.code {
            0 => Ok(self),
            code => fail!("{what}: exit code {code}, {}", self.said()),
        }
    }

    /// Both outputs on one line, for messages.
    pub fn said(&self) -> String {
        format!("stdout {:?}, stderr {:?}", self.stdout.trim_end(), self.stderr.trim_end())
    }
}

/// Runs a program to its end.
///
/// # Errors
/// When it can't be started, or has not ended within `limit`; it is killed then.
pub fn run(command: &mut Command, input: &[u8], limit: Duration) -> Outcome<Output> {
    let mut running = Running::start(command)?;
    running.write(input)?;
    running.close_stdin();
    running.finish(limit)
}

/// A program that runs, its output being collected. Killed when dropped.
#[derive(Debug)]
pub(crate) struct Running {
    name: String,
    child: Child,
    started: Instant,
    stdout: Capture,
    stderr: Capture,
}

impl Running {
    /// Starts a program with all three streams piped.
    ///
    /// # Errors
    /// When it can't be started.
    pub(crate) fn start(command: &mut Command) -> Outcome<Self> {
        let name = format!("{command:?}");
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .explain(|| format!("start {name}"))?;
        let stdout = Capture::of(child.stdout.take());
        let stderr = Capture::of(child.stderr.take());
        Ok(Self { name, child, started, stdout, stderr })
    }

    /// Writes to its standard input. A program that does not read is not waited for beyond a pipe's buffer.
    ///
    /// # Errors
    /// When the pipe breaks.
    pub(crate) fn write(&mut self, input: &[u8]) -> Outcome {
        match self.child.stdin.as_mut() {
            _ if input.is_empty() => Ok(()),
            Some(stdin) => stdin.write_all(input).explain(|| format!("write to {}", self.name)),
            None => fail!("write to {}: its standard input is closed", self.name),
        }
    }

    /// Gives it the end of its input.
    pub(crate) fn close_stdin(&mut self) {
        self.child.stdin.take();
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote to its standard output so far.
    pub(crate) fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it has not ended within `limit` of its start; it is killed then.
    pub(crate) fn finish(mut self, limit: Duration) -> Outcome<Output> {
        let deadline = self.started + limit;
        let Some(status) = wait(&mut self.child, deadline).explain(|| format!("wait for {}", self.name))?
        else {
            fail!(
                "{} did not end within {} s; stdout {:?}, stderr {:?}",
                self.name,
                limit.as_secs(),
                self.stdout(),
                self.stderr.text()
            )
        };
        let elapsed = self.started.elapsed();
        let (stdout_bytes, stderr) = (self.stdout.complete(), self.stderr.complete());
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Output {
            code: code(status),
            stdout: text(&stdout_bytes),
            stdout_bytes,
            stderr: text(&stderr),
            elapsed,
        })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for a child's end; `None` when the deadline came first.
pub(crate) fn wait(child: &mut Child, deadline: Instant) -> std::io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(POLL);
    }
}

/// The exit code, or 128 plus the signal, as shells have it.
pub(crate) fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

/// Polls a condition until it holds.
///
/// # Errors
/// `what` and the last reason, when `limit` has passed.
pub fn eventually<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    let deadline = Instant::now() + limit;
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(Failure(reason)) if Instant::now() >= deadline => {
                fail!("{what}: not within {} s: {reason}", limit.as_secs())
            }
            Err(_) => thread::sleep(POLL),
        }
    }
}

/// A stream that a thread reads to its end.
#[derive(Debug)]
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    end: Receiver<()>,
}

impl Capture {
    fn of(stream: Option<impl Read + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (ended, end) = mpsc::channel();
        if let Some(mut stream) = stream {
            let bytes = Arc::clone(&bytes);
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = stream.read(&mut buffer) {
                    bytes.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..count]);
                }
                let _ = ended.send(());
            });
        }
        Self { bytes, end }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    fn complete(&self) -> Vec<u8> {
        let _ = self.end.recv_timeout(OUTPUT_GRACE);
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn code_and_outputs_are_told_apart() {
        let output = run(&mut shell("cat; echo bad >&2; exit 3"), b"in\n", Duration::from_secs(10)).unwrap();
        assert_eq!((output.code, output.stdout.as_str(), output.stderr.as_str()), (3, "in\n", "bad\n"));
    }

    #[test]
    fn a_signal_is_128_and_more() {
        let output = run(&mut shell("kill -TERM $$"), b"", Duration::from_secs(10)).unwrap();
        assert_eq!(output.code, 143);
    }

    #[test]
    fn a_hanging_program_is_killed_in_time() {
        let started = Instant::now();
        let error = run(&mut shell("echo here; exec sleep 60"), b"", Duration::from_secs(1)).unwrap_err();
        assert!(error.0.contains("did not end within 1 s") && error.0.contains("here"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_daemon_that_keeps_the_pipe_is_not_waited_for() {
        let output = run(&mut shell("echo done; sleep 30 &"), b"", Duration::from_secs(20)).unwrap();
        assert_eq!(output.stdout, "done\n");
        assert!(output.elapsed < Duration::from_secs(10));
    }
}
