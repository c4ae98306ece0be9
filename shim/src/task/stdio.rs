//! A process's standard streams: between containerd's FIFOs, or its streams ([`super::streams`]), and the streams into the guest.
//!
//! The shim holds the other end of each FIFO open itself, so that neither containerd's restart nor a client that comes
//! and goes ends a stream. A client opens its ends in its own time, perhaps after the process has ended already: the
//! output of a FIFO that nobody has read from yet waits for its reader. Nothing here ever delays the report that a
//! process has ended: what it left to be read is drained when the process is deleted, within limits.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bulkhead_agent_protocol as api;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::streams::{self, Claim, Output, Streams};
use crate::error::{ApiError, Classify, Code};
use crate::pod::Pod;
use crate::spec::ConsoleSize;

/// Bytes moved at once. The buffer exists only while there is something to move.
const CHUNK: usize = 16 * 1024;

/// When a process is deleted, its output is given up when there was none for this long: nothing is left to write any,
pub(crate) const DRAIN_IDLE: Duration = Duration::from_secs(3);
/// or for this long where the process may have left something running: containerd's own shim waits as long,
pub(crate) const BACKGROUND_IDLE: Duration = Duration::from_secs(10);
/// and after this in any case.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// How often a FIFO whose reader has not come yet is looked at, once there is nothing more to be written to it.
const READER_INTERVAL: Duration = Duration::from_millis(10);

/// What containerd wants a process's streams to be: FIFO paths, `file://` or `ttrpc+unix://` URIs, empty for none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Stdio {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error; not used with a terminal.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// Streams that can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StdioError {
    /// A URI that we do not serve.
    #[error(
        "{uri:?} can't be used as {stream}: use a FIFO, a file:// URI, or ttrpc+unix:// with a streaming_id"
    )]
    Scheme {
        /// Which stream.
        stream: &'static str,
        /// The URI.
        uri: String,
    },
    /// Not a FIFO.
    #[error("{path} can't be used as {stream}: it is not a FIFO")]
    NotAFifo {
        /// Which stream.
        stream: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A stream of another process.
    #[error(transparent)]
    Stream(#[from] streams::StreamError),
    /// It can't be opened.
    #[error("can't open {path} as {stream}")]
    Open {
        /// Which stream.
        stream: &'static str,
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Classify for StdioError {
    fn code(&self) -> Code {
        match self {
            StdioError::Scheme { .. } => Code::INVALID_ARGUMENT,
            StdioError::NotAFifo { .. } | StdioError::Stream(_) | StdioError::Open { .. } => {
                Code::FAILED_PRECONDITION
            }
        }
    }
}

/// The open host ends of a process's streams.
#[derive(Debug, Default)]
pub(crate) struct HostStdio {
    stdin: Option<Source>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    terminal: bool,
}

#[derive(Debug)]
enum Source {
    /// With our own hold on its writing end.
    Fifo(pipe::Receiver, File),
    Stream(Claim),
}

#[derive(Debug)]
enum Sink {
    Fifo(OutputFifo),
    File(File),
    Stream(Output),
}

#[derive(Debug)]
struct OutputFifo {
    writer: pipe::Sender,
    /// Our own hold on its reading end.
    hold: File,
    /// Whether nobody else had opened it for reading when we did.
    is_early: bool,
}

impl OutputFifo {
    fn open(path: &Path) -> io::Result<OutputFifo> {
        let open_writer = || pipe::OpenOptions::new().open_sender(path);
        let found = match open_writer() {
            Err(error) if error.raw_os_error() == Some(nix::libc::ENXIO) => None,
            found => Some(found?),
        };
        let hold = hold(path, OpenOptions::new().read(true))?;
        let is_early = found.is_none();
        let writer = found.map_or_else(open_writer, Ok)?;
        Ok(OutputFifo { writer, hold, is_early })
    }

    /// Closes it, after a reader that has not come so far has had [`DRAIN_LIMIT`] to do so: what is in a FIFO that nobody
    /// has open is lost, and who opens it for reading then waits for ever.
    async fn close(self) {
        let OutputFifo { writer, hold, is_early } = self;
        drop(hold);
        if is_early {
            let reader = async {
                while !has_reader(&writer) {
                    tokio::time::sleep(READER_INTERVAL).await;
                }
            };
            if tokio::time::timeout(DRAIN_LIMIT, reader).await.is_err() {
                log::warn!(
                    "nobody came to read a process's output in {} s: it is dropped",
                    DRAIN_LIMIT.as_secs()
                );
            }
        }
    }
}

/// Whether anybody has the other end of a pipe open.
fn has_reader(writer: &pipe::Sender) -> bool {
    let mut ends = [PollFd::new(writer.as_fd(), PollFlags::empty())];
    // That it fails has no cause that would go away by waiting.
    poll(&mut ends, PollTimeout::ZERO).is_err()
        || !ends[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR))
}

impl HostStdio {
    /// Opens what `stdio` names. Never waits for the other side.
    pub(crate) fn open(stdio: &Stdio, streams: &Arc<Streams>) -> Result<HostStdio, StdioError> {
        let stderr = if stdio.terminal { "" } else { &stdio.stderr };
        Ok(HostStdio {
            stdin: open_input(&stdio.stdin, streams)?,
            stdout: open_output("standard output", &stdio.stdout, streams)?,
            stderr: open_output("standard error", stderr, streams)?,
            terminal: stdio.terminal,
        })
    }

    /// Opens a stream into the guest for each, and starts copying. Gives what the agent has to be told.
    pub(crate) async fn connect(
        self,
        pod: &Pod,
        console_size: Option<ConsoleSize>,
    ) -> Result<(api::Stdio, ProcessIo), ApiError> {
        let ConsoleSize { columns, rows } = console_size.unwrap_or_default();
        let mut streams = api::Stdio { terminal: self.terminal, columns, rows, ..Default::default() };
        let mut io = ProcessIo::default();
        if let Some(source) = self.stdin {
            let (number, stream) = pod.open_stream().await?;
            streams.stdin_stream = number;
            let (hold, input) = match source {
                Source::Fifo(fifo, hold) => (InputHold::Fifo(hold), tokio::spawn(copy_input(fifo, stream))),
                Source::Stream(claim) => {
                    let (hold, closing) = oneshot::channel();
                    (InputHold::Stream(hold), tokio::spawn(streams::copy_input(claim, stream, closing)))
                }
            };
            io.stdin_hold = Mutex::new(Some(hold));
            io.input = Some(input);
        }
        for (sink, number_field) in
            [(self.stdout, &mut streams.stdout_stream), (self.stderr, &mut streams.stderr_stream)]
        {
            let Some(sink) = sink else { continue };
            let (number, stream) = pod.open_stream().await?;
            *number_field = number;
            io.outputs.push(tokio::spawn(copy_output(stream, sink, io.moved.clone())));
        }
        Ok((streams, io))
    }
}

/// While it is there, the process sees no end of its input: our own hold on the writing end of a FIFO, or a stream's.
#[derive(Debug)]
#[expect(dead_code, reason = "it is there, and dropped")]
enum InputHold {
    Fifo(File),
    Stream(oneshot::Sender<()>),
}

/// The copying of a process's streams. Dropping it ends it at once.
#[derive(Debug, Default)]
pub(crate) struct ProcessIo {
    input: Option<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    stdin_hold: Mutex<Option<InputHold>>,
    /// Bytes of output that were taken so far.
    moved: Arc<AtomicU64>,
}

impl ProcessIo {
    /// Lets the process see the end of its input once containerd's clients have closed theirs.
    pub(crate) fn close_input(&self) {
        if let Ok(mut hold) = self.stdin_hold.lock() {
            *hold = None;
        }
    }

    /// Waits until all output has been taken, or there was none for `idle`, and ends the copying.
    pub(crate) async fn finish(mut self, idle: Duration) {
        let moved = self.moved.clone();
        let mut outputs = std::mem::take(&mut self.outputs);
        let stalled = async {
            let mut before = moved.load(Ordering::Relaxed);
            loop {
                tokio::time::sleep(idle).await;
                let now = moved.load(Ordering::Relaxed);
                if now == before {
                    return;
                }
                before = now;
            }
        };
        tokio::select! {
            biased;
            () = join(&mut outputs) => return,
            () = stalled => log::info!("output of a process that has ended is no longer waited for"),
            () = tokio::time::sleep(DRAIN_LIMIT) => {
                log::warn!("the output of a process that has ended is dropped after {} s", DRAIN_LIMIT.as_secs());
            }
        }
        outputs.iter().for_each(JoinHandle::abort);
        join(&mut outputs).await;
    }
}

/// Waits for tasks, also for those that were waited for before.
async fn join(tasks: &mut [JoinHandle<()>]) {
    for task in tasks.iter_mut().filter(|task| !task.is_finished()) {
        // How it ended is its own business.
        let _ = task.await;
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        self.input.iter().chain(&self.outputs).for_each(JoinHandle::abort);
    }
}

fn open_input(uri: &str, streams: &Arc<Streams>) -> Result<Option<Source>, StdioError> {
    let stream = "standard input";
    let path = match target(stream, uri)? {
        None => return Ok(None),
        Some(Target::Fifo(path)) => path,
        Some(Target::Stream(id)) => return Ok(Some(Source::Stream(streams.claim(id)?))),
        Some(Target::File(_)) => return Err(StdioError::Scheme { stream, uri: uri.into() }),
    };
    let failed = |source| StdioError::Open { stream, path: path.clone(), source };
    check_fifo(stream, &path)?;
    // Opened for both, it needs no other side; it bridges the time until our own writer is there.
    let bridge = hold(&path, OpenOptions::new().read(true).write(true)).map_err(failed)?;
    let reader = pipe::OpenOptions::new().open_receiver(&path).map_err(failed)?;
    let writer = hold(&path, OpenOptions::new().write(true)).map_err(failed)?;
    drop(bridge);
    Ok(Some(Source::Fifo(reader, writer)))
}

fn open_output(stream: &'static str, uri: &str, streams: &Arc<Streams>) -> Result<Option<Sink>, StdioError> {
    let target = target(stream, uri)?;
    match target {
        None => Ok(None),
        Some(Target::Stream(id)) => Ok(Some(Sink::Stream(Output::new(streams.claim(id)?)))),
        Some(Target::Fifo(path)) => {
            let failed = |source| StdioError::Open { stream, path: path.clone(), source };
            check_fifo(stream, &path)?;
            OutputFifo::open(&path).map(|fifo| Some(Sink::Fifo(fifo))).map_err(failed)
        }
        Some(Target::File(path)) => {
            let file = OpenOptions::new().append(true).create(true).mode(0o640).open(&path);
            file.map(|file| Some(Sink::File(file))).map_err(|source| StdioError::Open {
                stream,
                path,
                source,
            })
        }
    }
}

enum Target<'a> {
    Fifo(PathBuf),
    File(PathBuf),
    Stream(&'a str),
}

fn target<'a>(stream: &'static str, uri: &'a str) -> Result<Option<Target<'a>>, StdioError> {
    let refused = || StdioError::Scheme { stream, uri: uri.chars().take(256).collect() };
    let absolute = |path: &str| if path.starts_with('/') { Ok(PathBuf::from(path)) } else { Err(refused()) };
    match uri.split_once("://") {
        _ if uri.is_empty() => Ok(None),
        None | Some(("", _)) => Ok(Some(Target::Fifo(absolute(uri)?))),
        Some(("fifo", path)) => Ok(Some(Target::Fifo(absolute(path)?))),
        // Parameters are for other schemes.
        // Its address is the one that containerd has of this shim.
        Some(("ttrpc+unix", rest)) => {
            let parameters = rest.split_once('?').map_or("", |(_, parameters)| parameters);
            let id = parameters.split('&').find_map(|parameter| parameter.strip_prefix("streaming_id="));
            Ok(Some(Target::Stream(id.filter(|id| !id.is_empty()).ok_or_else(refused)?)))
        }
        Some(("file", path)) => Ok(Some(Target::File(absolute(path.split('?').next().unwrap_or(path))?))),
        Some(_) => Err(refused()),
    }
}

fn check_fifo(stream: &'static str, path: &Path) -> Result<(), StdioError> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.file_type().is_fifo() => Ok(()),
        Ok(_) => Err(StdioError::NotAFifo { stream, path: path.to_owned() }),
        Err(source) => Err(StdioError::Open { stream, path: path.to_owned(), source }),
    }
}

fn hold(path: &Path, options: &mut OpenOptions) -> io::Result<File> {
    options.custom_flags(libc::O_NONBLOCK).open(path)
}

async fn copy_input(mut fifo: pipe::Receiver, mut stream: UnixStream) {
    loop {
        if fifo.readable().await.is_err() {
            break;
        }
        let mut buffer = vec![0; CHUNK];
        match fifo.read(&mut buffer).await {
            Ok(0) => break,
            Ok(length) => {
                if stream.write_all(&buffer[..length]).await.is_err() {
                    // The process does not read any more.
                    return;
                }
            }
            Err(error) => {
                log::warn!("can't read standard input: {error}");
                break;
            }
        }
    }
    let _ = stream.shutdown().await;
    // The end is on its way to the guest; closing the stream now could overtake it.
    std::future::pending::<()>().await;
}

async fn copy_output(stream: UnixStream, mut sink: Sink, moved: Arc<AtomicU64>) {
    move_output(stream, &mut sink, &moved).await;
    match sink {
        Sink::Fifo(fifo) => fifo.close().await,
        Sink::Stream(output) => output.close(DRAIN_LIMIT).await,
        Sink::File(_) => {}
    }
}

async fn move_output(mut stream: UnixStream, sink: &mut Sink, moved: &AtomicU64) {
    loop {
        if stream.readable().await.is_err() {
            return;
        }
        let mut buffer = vec![0; CHUNK];
        let length = match stream.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(length) => length,
        };
        let mut rest = &buffer[..length];
        while !rest.is_empty() {
            let written = match sink {
                Sink::Fifo(fifo) => fifo.writer.write(rest).await,
                Sink::File(file) => file.write(rest),
                Sink::Stream(output) => Ok(output.write(rest).await),
            };
            match written {
                Ok(length) => {
                    moved.fetch_add(length as u64, Ordering::Relaxed);
                    rest = &rest[length..];
                }
                Err(error) => return log::warn!("can't write output: {error}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::stat::Mode;
    use tempfile::TempDir;

    use super::*;

    struct Directory(TempDir);

    impl Directory {
        fn new() -> Directory {
            Directory(tempfile::tempdir().unwrap())
        }

        fn fifo(&self, name: &str) -> PathBuf {
            let path = self.0.path().join(name);
            nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
            path
        }
    }

    fn output(path: &Path) -> Sink {
        open_output("standard output", path.to_str().unwrap(), &Arc::default()).unwrap().unwrap()
    }

    #[tokio::test]
    async fn output_survives_readers_that_come_and_go() {
        let directory = Directory::new();
        let path = directory.fifo("out");
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let mut io = ProcessIo::default();
        io.outputs.push(tokio::spawn(copy_output(ours, output(&path), io.moved.clone())));

        // Nobody reads yet: it waits in the FIFO.
        guest.write_all(b"one ").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let mut buffer = [0; 16];
        let length = reader.read(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], b"one ");
        drop(reader);

        guest.write_all(b"two").await.unwrap();
        let mut reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        drop(guest);
        io.finish(DRAIN_IDLE).await;
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"two");
    }

    #[tokio::test]
    async fn output_waits_for_a_reader_that_comes_late() {
        let directory = Directory::new();
        let path = directory.fifo("out");
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let mut io = ProcessIo::default();
        io.outputs.push(tokio::spawn(copy_output(ours, output(&path), io.moved.clone())));
        guest.write_all(b"kept").await.unwrap();
        drop(guest);
        tokio::time::sleep(READER_INTERVAL * 5).await;
        let reader = tokio::task::spawn_blocking(move || std::fs::read(path).unwrap());
        assert_eq!(tokio::time::timeout(DRAIN_IDLE, reader).await.unwrap().unwrap(), b"kept");
        io.finish(DRAIN_IDLE).await;
    }

    #[tokio::test]
    async fn a_reader_that_was_there_and_went_is_not_waited_for() {
        let directory = Directory::new();
        let path = directory.fifo("out");
        let reader = pipe::OpenOptions::new().open_receiver(&path).unwrap();
        let (guest, ours) = UnixStream::pair().unwrap();
        let mut io = ProcessIo::default();
        io.outputs.push(tokio::spawn(copy_output(ours, output(&path), io.moved.clone())));
        drop((reader, guest));
        tokio::time::timeout(DRAIN_IDLE / 2, io.finish(DRAIN_IDLE)).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn output_that_nobody_takes_does_not_hold_up_the_end() {
        let directory = Directory::new();
        let path = directory.fifo("out");
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let mut io = ProcessIo::default();
        io.outputs.push(tokio::spawn(copy_output(ours, output(&path), io.moved.clone())));
        let flood = tokio::spawn(async move {
            let _ = guest.write_all(&vec![0; 1 << 20]).await;
        });
        let started = tokio::time::Instant::now();
        io.finish(DRAIN_IDLE).await;
        assert!(started.elapsed() <= DRAIN_IDLE * 3, "{:?}", started.elapsed());
        flood.abort();
        // And the FIFO is let go: a reader sees its end, behind what is left in it.
        let mut reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path).unwrap();
        let mut rest = Vec::new();
        reader.read_to_end(&mut rest).unwrap();
    }

    #[tokio::test]
    async fn input_ends_only_when_it_is_closed() {
        let directory = Directory::new();
        let path = directory.fifo("in");
        let source = open_input(path.to_str().unwrap(), &Arc::default()).unwrap().unwrap();
        let Source::Fifo(fifo, hold) = source else { panic!("{source:?}") };
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let mut io = ProcessIo::default();
        io.input = Some(tokio::spawn(copy_input(fifo, ours)));
        io.stdin_hold = Mutex::new(Some(InputHold::Fifo(hold)));
        let mut buffer = [0; 16];
        for text in ["first", "second"] {
            OpenOptions::new().write(true).open(&path).unwrap().write_all(text.as_bytes()).unwrap();
            let length = guest.read(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], text.as_bytes());
        }
        let waiting = tokio::time::timeout(Duration::from_millis(100), guest.read(&mut buffer)).await;
        assert!(waiting.is_err(), "the input must not end with its writer");

        // What was written before the close still arrives.
        OpenOptions::new().write(true).open(&path).unwrap().write_all(b"last").unwrap();
        io.close_input();
        let mut rest = Vec::new();
        guest.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"last");
    }

    #[tokio::test]
    async fn output_can_be_appended_to_a_file() {
        let directory = Directory::new();
        let path = directory.0.path().join("log");
        std::fs::write(&path, "old ").unwrap();
        let uri = format!("file://{}?x=y", path.display());
        let sink = open_output("standard output", &uri, &Arc::default()).unwrap().unwrap();
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let mut io = ProcessIo::default();
        io.outputs.push(tokio::spawn(copy_output(ours, sink, io.moved.clone())));
        guest.write_all(b"new").await.unwrap();
        drop(guest);
        io.finish(DRAIN_IDLE).await;
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "old new");
    }

    #[test]
    fn other_targets_are_refused() {
        let streams = Arc::default();
        let plain = ["binary:///bin/logger", "pipe://x", "relative", "file://relative", "http://x/"];
        let streamed =
            ["ttrpc+unix:///run/s", "ttrpc+unix:///run/s?streaming_id=", "grpc+vsock://3?streaming_id=c"];
        for uri in plain.into_iter().chain(streamed) {
            assert!(matches!(target("standard output", uri), Err(StdioError::Scheme { .. })), "{uri}");
        }
        assert!(matches!(
            open_output("standard output", "/etc/passwd", &streams),
            Err(StdioError::NotAFifo { .. })
        ));
        assert!(matches!(open_input("/nonexistent/fifo", &streams), Err(StdioError::Open { .. })));
        assert!(target("standard input", "").unwrap().is_none());
        let stream = "ttrpc+unix:///run/s/a?x=y&streaming_id=c-stdin";
        assert!(matches!(target("standard input", stream), Ok(Some(Target::Stream("c-stdin")))));
    }
}
