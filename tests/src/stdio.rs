//! A process's streams as containerd hands them to a shim: FIFOs.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::libc::O_NONBLOCK;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::fail;
use crate::failure::{Explain, Outcome};

/// Which streams a process gets.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Streams {
    /// Whether there is a standard input.
    pub stdin: bool,
    /// Whether it gets a terminal; its error output then comes with the rest.
    pub terminal: bool,
    /// When its output is read.
    pub reading: Reading,
}

/// When a process's output is read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Reading {
    /// From the start.
    #[default]
    AtOnce,
    /// From [`Stdio::drain`] on; the FIFO is open for reading before.
    WhenDrained,
    /// From [`Stdio::drain`] on, which opens the FIFO.
    WhenOpened,
}

/// The FIFOs of one process, and what came out of them.
#[derive(Debug)]
pub(crate) struct Stdio {
    /// Path of the input FIFO; empty when there is none.
    pub stdin_path: String,
    /// Path of the output FIFO.
    pub stdout_path: String,
    /// Path of the error FIFO; empty with a terminal.
    pub stderr_path: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    input: Option<File>,
    /// Standard output.
    pub stdout: Reader,
    /// Standard error.
    pub stderr: Reader,
}

impl Stdio {
    /// Makes the FIFOs in a directory, with names that start with `name`.
    ///
    /// # Errors
    /// When they can't be made.
    pub(crate) fn new(directory: &Path, name: &str, streams: Streams) -> Outcome<Self> {
        let fifo = |stream: &str, wanted: bool| -> Outcome<PathBuf> {
            let path = directory.join(format!("{name}-{stream}"));
            if wanted {
                mkfifo(&path, Mode::S_IRWXU).explain(|| format!("make FIFO {}", path.display()))?;
            }
            Ok(path)
        };
        let text =
            |path: &Path, wanted: bool| if wanted { path.display().to_string() } else { String::new() };
        let (stdin, stdout) = (fifo("stdin", streams.stdin)?, fifo("stdout", true)?);
        let stderr = fifo("stderr", !streams.terminal)?;
        // Open both ways: neither this end nor the shim's has to wait for the other.
        let input = match streams.stdin {
            true => Some(both_ways(&stdin)?),
            false => None,
        };
        Ok(Self {
            stdin_path: text(&stdin, streams.stdin),
            stdout_path: text(&stdout, true),
            stderr_path: text(&stderr, !streams.terminal),
            terminal: streams.terminal,
            input,
            stdout: Reader::new(stdout, streams.reading)?,
            stderr: Reader::new(
                stderr,
                if streams.terminal { Reading::WhenOpened } else { streams.reading },
            )?,
        })
    }

    /// Writes to the process's standard input.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Outcome {
        match self.input.as_mut() {
            Some(input) => input.write_all(bytes).explain(|| format!("write to {}", self.stdin_path)),
            None => fail!("the process has no standard input"),
        }
    }

    /// Closes our end of the standard input.
    pub(crate) fn close_stdin(&mut self) {
        self.input.take();
    }

    /// Starts reading streams that were left undrained.
    pub(crate) fn drain(&self) {
        self.stdout.start();
        if !self.stderr_path.is_empty() {
            self.stderr.start();
        }
    }
}

/// Reads one FIFO from its first writer to the last one's close.
#[derive(Debug)]
pub(crate) struct Reader {
    path: PathBuf,
    shared: Arc<(Mutex<Content>, Condvar)>,
    // Keeps a FIFO that nobody reads yet open, so that the shim's open for writing succeeds.
    held: Option<File>,
}

#[derive(Debug, Default)]
struct Content {
    bytes: Vec<u8>,
    ended: bool,
}

impl Reader {
    pub(crate) fn new(path: PathBuf, reading: Reading) -> Outcome<Self> {
        let held = match reading {
            Reading::WhenDrained => Some(both_ways(&path)?),
            Reading::AtOnce | Reading::WhenOpened => None,
        };
        let reader = Self { path, shared: Arc::default(), held };
        if reading == Reading::AtOnce {
            reader.start();
        }
        Ok(reader)
    }

    fn start(&self) {
        let (path, shared) = (self.path.clone(), Arc::clone(&self.shared));
        thread::spawn(move || {
            let (content, changed) = &*shared;
            let mut buffer = [0; 65536];
            if let Ok(mut fifo) = File::open(path) {
                while let Ok(count @ 1..) = fifo.read(&mut buffer) {
                    content
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .bytes
                        .extend_from_slice(&buffer[..count]);
                    changed.notify_all();
                }
            }
            content.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
            changed.notify_all();
        });
    }

    /// What was written so far.
    pub(crate) fn so_far(&self) -> String {
        let content = self.shared.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&content.bytes).into_owned()
    }

    /// Everything that was written, once the last writer has closed it.
    ///
    /// # Errors
    /// When it is still open after `limit`.
    pub(crate) fn to_end(&self, limit: Duration) -> Outcome<String> {
        self.wait(limit, "the end", |content| content.ended)
    }

    /// What was written so far, once it contains `text`.
    ///
    /// # Errors
    /// When it does not within `limit`.
    pub(crate) fn until(&self, text: &str, limit: Duration) -> Outcome<String> {
        let found = |content: &Content| String::from_utf8_lossy(&content.bytes).contains(text);
        self.wait(limit, &format!("{text:?}"), found)
    }

    fn wait(&self, limit: Duration, what: &str, done: impl Fn(&Content) -> bool) -> Outcome<String> {
        let (content, changed) = &*self.shared;
        let content = content.lock().unwrap_or_else(PoisonError::into_inner);
        let (content, _) = changed
            .wait_timeout_while(content, limit, |content| !done(content) && !content.ended)
            .unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8_lossy(&content.bytes).into_owned();
        if !done(&content) {
            let name = self.path.file_name().unwrap_or_default().display();
            let state = if content.ended { "ended" } else { "open" };
            fail!("{name}: {what} did not come within {} s; {state}, so far {text:?}", limit.as_secs())
        }
        Ok(text)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // A reader that still waits for a writer gets one, and with its close the end.
        self.held.take();
        let _ = OpenOptions::new().write(true).custom_flags(O_NONBLOCK).open(&self.path);
    }
}

fn both_ways(path: &Path) -> Outcome<File> {
    OpenOptions::new().read(true).write(true).open(path).explain(|| format!("open {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::WorkDir;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn what_is_written_is_read_to_the_end() {
        let directory = WorkDir::new("stdio").unwrap();
        let stdio = Stdio::new(directory.path(), "p", Streams::default()).unwrap();
        let mut writer = OpenOptions::new().write(true).open(&stdio.stdout_path).unwrap();
        writer.write_all(b"one ").unwrap();
        assert_eq!(stdio.stdout.until("one", LIMIT).unwrap(), "one ");
        writer.write_all(b"two").unwrap();
        assert!(stdio.stdout.to_end(Duration::ZERO).is_err());
        drop(writer);
        assert_eq!(stdio.stdout.to_end(LIMIT).unwrap(), "one two");
    }

    #[test]
    fn undrained_output_waits_in_the_pipe() {
        let directory = WorkDir::new("stdio").unwrap();
        let stdio = Stdio::new(
            directory.path(),
            "p",
            Streams { reading: Reading::WhenDrained, ..Streams::default() },
        )
        .unwrap();
        let mut writer = OpenOptions::new().write(true).open(&stdio.stdout_path).unwrap();
        writer.write_all(b"kept").unwrap();
        stdio.drain();
        assert_eq!(stdio.stdout.until("kept", LIMIT).unwrap(), "kept");
    }
}
