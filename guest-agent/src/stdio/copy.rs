//! Copies a process's standard streams.
//!
//! Buffers exist only while bytes flow. Output is copied until its end; after the process has ended, what it left in the
//! pipe still goes out, but neither a grandchild that keeps the pipe open nor a host that does not read holds it for ever.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::connection::{Connection, is_passing};

/// Bytes copied at a time.
const BUFFER: usize = 32 * 1024;

/// How long an empty pipe that someone else still holds is watched after the process has ended.
const LINGER: Duration = Duration::from_secs(2);

/// How long a host that does not read is waited for after the process has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(60);

/// How long input that is on its way is waited for when it is to be closed.
const CLOSE_GRACE: Duration = Duration::from_millis(50);

/// Copies a pipe or terminal to the host until its end. `ended` completes when the process has ended.
pub async fn copy_output(from: Arc<Connection>, to: Connection, ended: impl Future<Output = ()>) {
    let progress = Progress::default();
    let copy = async {
        while from.readable().await.is_ok() {
            if !matches!(forward(&from, &to, &progress).await, Ok(Flow::Dry)) {
                return;
            }
        }
    };
    tokio::pin!(copy);
    tokio::select! {
        biased;
        () = &mut copy => {}
        () = ended => {
            // However it goes, the end of the stream is next.
            let _ = timeout(DRAIN_LIMIT, async {
                tokio::select! {
                    () = copy => {}
                    () = progress.ceased() => {}
                }
            })
            .await;
        }
    }
    to.shut_down_writing();
}

/// Reads a terminal to its end for no one.
pub async fn discard_output(from: Arc<Connection>) {
    let mut buffer = [0; 512];
    while from.readable().await.is_ok() {
        match from.try_read(&mut buffer) {
            Ok(0) => return,
            Err(error) if !is_passing(&error) => return,
            _ => {}
        }
    }
}

/// Whether bytes still flow.
#[derive(Debug, Default)]
struct Progress {
    copied: AtomicUsize,
    busy: AtomicBool,
}

impl Progress {
    /// Completes when there has been nothing to copy for a while.
    async fn ceased(&self) {
        loop {
            let before = self.copied.load(Relaxed);
            sleep(LINGER).await;
            if self.copied.load(Relaxed) == before && !self.busy.load(Relaxed) {
                return;
            }
        }
    }
}

/// Closes a process's standard input.
#[derive(Debug, Default)]
pub struct InputControl {
    close: Notify,
}

impl InputControl {
    /// Has the input closed once what the host has sent so far is delivered.
    pub fn close(&self) {
        self.close.notify_one();
    }
}

/// Copies the host's input to a pipe or terminal until either side ends, the process does, or it is to be closed.
pub async fn copy_input(
    from: Connection,
    to: Arc<Connection>,
    control: Arc<InputControl>,
    ended: impl Future<Output = ()>,
) {
    let progress = Progress::default();
    let copy = async {
        loop {
            let ready = tokio::select! {
                biased;
                ready = from.readable() => ready,
                () = control.close.notified() => {
                    deliver_rest(&from, &to, &progress).await;
                    return;
                }
            };
            if ready.is_err() || !matches!(forward(&from, &to, &progress).await, Ok(Flow::Dry)) {
                return;
            }
        }
    };
    tokio::select! {
        () = copy => {}
        () = ended => {}
        // A process that closed its input: nothing that comes can be delivered.
        () = to.closed() => {}
    }
}

/// Delivers what has arrived or is just arriving.
async fn deliver_rest(from: &Connection, to: &Connection, progress: &Progress) {
    while let Ok(Ok(())) = timeout(CLOSE_GRACE, from.readable()).await {
        if !matches!(forward(from, to, progress).await, Ok(Flow::Dry)) {
            return;
        }
        // Readiness that turned out to be stale must not make this a busy loop.
        sleep(Duration::from_millis(1)).await;
    }
}

enum Flow {
    /// There is nothing more at the moment.
    Dry,
    /// There will be nothing more.
    Ended,
}

/// Forwards what is there.
async fn forward(from: &Connection, to: &Connection, progress: &Progress) -> io::Result<Flow> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.try_read(&mut buffer) {
            Ok(0) => return Ok(Flow::Ended),
            Ok(length) => {
                progress.busy.store(true, Relaxed);
                to.write_all(buffer.get(..length).unwrap_or_default()).await?;
                progress.busy.store(false, Relaxed);
                progress.copied.fetch_add(length, Relaxed);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Flow::Dry),
            Err(error) if is_passing(&error) => {}
            // A terminal whose last user is gone.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(Flow::Ended),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write, pipe};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours.into()).unwrap(), theirs)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn large_output_arrives_whole_before_its_end() {
        let (reader, mut writer) = pipe().unwrap();
        let (to, mut host) = pair();
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
        let expected = bytes.clone();
        let feeder = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
        let receiver = std::thread::spawn(move || {
            let mut received = Vec::new();
            host.read_to_end(&mut received).unwrap();
            received
        });
        let from = Arc::new(Connection::new(reader.into()).unwrap());
        // The process counts as ended from the start: what it wrote still has to arrive.
        copy_output(from, to, std::future::ready(())).await;
        feeder.join().unwrap();
        assert_eq!(receiver.join().unwrap(), expected);
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_pipe_that_stays_open_does_not_hold_the_end() {
        let (reader, mut writer) = pipe().unwrap();
        let (to, mut host) = pair();
        writer.write_all(b"last words").unwrap();
        let from = Arc::new(Connection::new(reader.into()).unwrap());
        copy_output(from, to, std::future::ready(())).await;
        let mut received = String::new();
        host.read_to_string(&mut received).unwrap();
        assert_eq!(received, "last words");
        drop(writer);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn input_ends_when_the_host_ends_it() {
        let (mut reader, writer) = pipe().unwrap();
        let (from, mut host) = pair();
        host.write_all(b"all of it").unwrap();
        host.shutdown(std::net::Shutdown::Write).unwrap();
        let to = Arc::new(Connection::new(writer.into()).unwrap());
        copy_input(from, to, Arc::default(), std::future::pending()).await;
        let mut received = String::new();
        reader.read_to_string(&mut received).unwrap();
        assert_eq!(received, "all of it");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn closing_input_delivers_what_was_sent() {
        let (mut reader, writer) = pipe().unwrap();
        let (from, mut host) = pair();
        let control = Arc::new(InputControl::default());
        host.write_all(b"sent before").unwrap();
        control.close();
        let to = Arc::new(Connection::new(writer.into()).unwrap());
        copy_input(from, to, control, std::future::pending()).await;
        let mut received = String::new();
        reader.read_to_string(&mut received).unwrap();
        assert_eq!(received, "sent before");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn input_stops_when_the_process_closed_its_end() {
        let (reader, writer) = pipe().unwrap();
        let (from, _host) = pair();
        drop(reader);
        let to = Arc::new(Connection::new(writer.into()).unwrap());
        let copy = copy_input(from, to, Arc::default(), std::future::pending());
        timeout(Duration::from_secs(5), copy).await.unwrap();
    }
}
