//! Copies a process's standard streams.
//!
//! Buffers exist only while bytes flow. Output is copied until its end or until the host has enough of it: what a process
//! leaves running in the background may write for as long as it lives.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::connection::{Connection, is_passing};

/// Bytes copied at a time.
const BUFFER: usize = 32 * 1024;

/// How long input that is on its way is waited for when it is to be closed.
const CLOSE_GRACE: Duration = Duration::from_millis(50);

/// Copies a pipe or terminal to the host until its end, or until the host closes the connection.
pub(crate) async fn copy_output(from: Arc<Connection>, to: Connection) {
    let copy = async {
        while from.readable().await.is_ok() {
            if !matches!(forward(&from, &to).await, Ok(Flow::Dry)) {
                return;
            }
        }
    };
    tokio::select! {
        biased;
        () = copy => {}
        () = to.hung_up() => {}
    }
    to.shut_down_writing();
}

/// How long a connection of which one direction has ended may be silent.
const HALF_OPEN_LIMIT: Duration = Duration::from_secs(300);

/// Copies between two sockets, each direction to its own end.
///
/// # Errors
/// When one of them fails, or nothing comes for long after one direction's end: both are then to be closed.
pub(crate) async fn copy_both_ways(one: &Connection, other: &Connection) -> io::Result<()> {
    let copied = AtomicUsize::new(0);
    let there = copy_to_end(one, other, &copied);
    let back = copy_to_end(other, one, &copied);
    tokio::pin!(there, back);
    tokio::select! {
        ended = &mut there => {
            ended?;
            while_any(&copied, back).await
        }
        ended = &mut back => {
            ended?;
            while_any(&copied, there).await
        }
    }
}

async fn copy_to_end(from: &Connection, to: &Connection, copied: &AtomicUsize) -> io::Result<()> {
    loop {
        from.readable().await?;
        if let Flow::Ended = forward(from, to).await? {
            to.shut_down_writing();
            return Ok(());
        }
        copied.fetch_add(1, Relaxed);
    }
}

/// Gives a copy up when there has been nothing to copy for long.
async fn while_any(copied: &AtomicUsize, copy: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::pin!(copy);
    loop {
        let before = copied.load(Relaxed);
        match timeout(HALF_OPEN_LIMIT, &mut copy).await {
            Ok(ended) => return ended,
            Err(_) if copied.load(Relaxed) == before => return Err(io::ErrorKind::TimedOut.into()),
            Err(_) => {}
        }
    }
}

/// Reads a terminal to its end for no one.
pub(crate) async fn discard_output(from: Arc<Connection>) {
    let mut buffer = [0; 512];
    while from.readable().await.is_ok() {
        match from.try_read(&mut buffer) {
            Ok(0) => return,
            Err(error) if !is_passing(&error) => return,
            _ => {}
        }
    }
}

/// Closes a process's standard input.
#[derive(Debug, Default)]
pub(crate) struct InputControl {
    close: Notify,
}

impl InputControl {
    /// Has the input closed once what the host has sent so far is delivered.
    pub(crate) fn close(&self) {
        self.close.notify_one();
    }
}

/// Copies the host's input to a pipe or terminal until either side ends, the process does, or it is to be closed.
pub(crate) async fn copy_input(
    from: Connection,
    to: Arc<Connection>,
    control: Arc<InputControl>,
    ended: impl Future<Output = ()>,
) {
    let copy = async {
        loop {
            let ready = tokio::select! {
                biased;
                ready = from.readable() => ready,
                () = control.close.notified() => {
                    deliver_rest(&from, &to).await;
                    return;
                }
            };
            if ready.is_err() || !matches!(forward(&from, &to).await, Ok(Flow::Dry)) {
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
async fn deliver_rest(from: &Connection, to: &Connection) {
    while let Ok(Ok(())) = timeout(CLOSE_GRACE, from.readable()).await {
        if !matches!(forward(from, to).await, Ok(Flow::Dry)) {
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
async fn forward(from: &Connection, to: &Connection) -> io::Result<Flow> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.try_read(&mut buffer) {
            Ok(0) => return Ok(Flow::Ended),
            Ok(length) => to.write_all(buffer.get(..length).unwrap_or_default()).await?,
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
        copy_output(from, to).await;
        feeder.join().unwrap();
        assert_eq!(receiver.join().unwrap(), expected);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_pipe_that_stays_open_is_copied_until_the_host_has_enough() {
        let (reader, mut writer) = pipe().unwrap();
        let (to, mut host) = pair();
        let from = Arc::new(Connection::new(reader.into()).unwrap());
        let copying = tokio::spawn(copy_output(from, to));
        for text in ["first words", "later ones"] {
            sleep(Duration::from_millis(20)).await;
            writer.write_all(text.as_bytes()).unwrap();
            sleep(Duration::from_millis(20)).await;
            let mut buffer = [0; 64];
            let length = host.read(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], text.as_bytes());
        }
        drop(host);
        timeout(Duration::from_secs(5), copying).await.unwrap().unwrap();
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
