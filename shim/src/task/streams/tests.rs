//! A real server and clients on a socket; the guest is the test's.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use ttrpc::asynchronous::transport::Listener;
use ttrpc::asynchronous::{CSReceiver, CSSender, Client, ClientStream, Server};

use super::connection::{data, init_message, window_update};
use super::*;

struct Stage {
    streams: Arc<Streams>,
    path: PathBuf,
    _directory: TempDir,
    _server: Server,
}

impl Stage {
    async fn set() -> Stage {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let streams = Arc::new(Streams::default());
        let mut server = Server::new()
            .add_listener(Listener::try_from(listener).unwrap())
            .register_service(service(&streams));
        server.start().await.unwrap();
        Stage { streams, path, _directory: directory, _server: server }
    }

    /// Opens a stream as containerd does, on a connection of its own.
    async fn open(&self, id: &str) -> Opened {
        let client = Client::connect(&format!("unix://{}", self.path.display())).await.unwrap();
        let request =
            ttrpc::Request { service: SERVICE.to_owned(), method: METHOD.to_owned(), ..Default::default() };
        let inner = client.new_stream(request, true, true).await.unwrap();
        let (sender, mut receiver) = ClientStream::<Any, Any>::new(inner).split();
        // What becomes of containerd's request, which does not say that it has no payload.
        sender.send(&Any::new()).await.unwrap();
        sender.send(&init_message(id)).await.unwrap();
        assert_eq!(receiver.recv().await.unwrap(), Any::new());
        Opened { sender, receiver, _client: client }
    }
}

struct Opened {
    sender: CSSender<Any>,
    receiver: CSReceiver<Any>,
    _client: Client,
}

impl Opened {
    async fn allow(&self, bytes: usize) {
        self.sender.send(&window_update(bytes)).await.unwrap();
    }

    async fn receive(&mut self) -> Any {
        timeout(Duration::from_secs(5), self.receiver.recv()).await.unwrap().unwrap()
    }
}

#[tokio::test]
async fn output_keeps_to_what_its_reader_takes_and_has_an_end() {
    let stage = Stage::set().await;
    // containerd opens it before there is a process.
    let mut client = stage.open("c-stdout").await;
    let mut output = Output::new(stage.streams.claim("c-stdout").unwrap());
    assert_eq!(stage.streams.claim("c-stdout").unwrap_err(), StreamError::Taken("c-stdout".to_owned()));
    client.allow(4).await;
    assert_eq!(output.write(b"window").await, 4);
    assert_eq!(client.receive().await, data(b"wind"));
    assert!(timeout(Duration::from_millis(50), output.write(b"ow")).await.is_err(), "beyond the window");
    client.allow(100).await;
    assert_eq!(output.write(b"ow").await, 2);
    assert_eq!(client.receive().await, data(b"ow"));
    output.close(Duration::from_secs(1)).await;
    assert_eq!(client.receive().await, data(b""), "the last message says nothing");
    assert!(client.receiver.recv().await.is_err(), "the stream has ended");
    // So it has for one who comes late.
    let mut late = stage.open("c-stdout").await;
    assert_eq!(late.receive().await, data(b""));
}

#[tokio::test]
async fn output_waits_for_a_client_that_comes_back() {
    let stage = Stage::set().await;
    let mut output = Output::new(stage.streams.claim("c-stdout").unwrap());
    let mut first = stage.open("c-stdout").await;
    first.allow(100).await;
    assert_eq!(output.write(b"one").await, 3);
    assert_eq!(first.receive().await, data(b"one"));
    drop(first);
    let writing = tokio::spawn(async move {
        assert_eq!(output.write(b"two").await, 3);
        output
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let mut second = stage.open("c-stdout").await;
    second.allow(100).await;
    assert_eq!(second.receive().await, data(b"two"));
    drop(writing.await.unwrap());
    assert_eq!(second.receive().await, data(b""));
}

#[tokio::test]
async fn input_reaches_the_guest_and_ends_when_its_client_says_so() {
    let stage = Stage::set().await;
    let claim = stage.streams.claim("c-stdin").unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let (_hold, closing) = oneshot::channel();
    let copying = tokio::spawn(copy_input(claim, ours, closing));
    let mut client = stage.open("c-stdin").await;
    assert_eq!(client.receive().await, window_update(64 * 1024));
    client.sender.send(&data(&vec![b'x'; 40_000])).await.unwrap();
    assert_eq!(client.receive().await, window_update(40_000), "what has been taken may be sent again");
    let mut taken = vec![0; 40_000];
    guest.read_exact(&mut taken).await.unwrap();
    // Without a word: containerd is restarted.
    drop(client);
    let client = stage.open("c-stdin").await;
    client.sender.send(&data(b"last")).await.unwrap();
    client.sender.close_send().await.unwrap();
    drop(client);
    let mut rest = Vec::new();
    timeout(Duration::from_secs(5), guest.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, b"last");
    copying.abort();
}

#[tokio::test]
async fn input_ends_when_it_is_to_be_closed() {
    let stage = Stage::set().await;
    let claim = stage.streams.claim("c-stdin").unwrap();
    let (ours, mut guest) = UnixStream::pair().unwrap();
    let (hold, closing) = oneshot::channel();
    let copying = tokio::spawn(copy_input(claim, ours, closing));
    let client = stage.open("c-stdin").await;
    drop(hold);
    client.sender.send(&data(b"on its way")).await.unwrap();
    let mut all = Vec::new();
    timeout(Duration::from_secs(5), guest.read_to_end(&mut all)).await.unwrap().unwrap();
    assert_eq!(all, b"on its way");
    // The guest may still write: only this direction has ended.
    guest.write_all(b"x").await.unwrap();
    copying.abort();
}

#[tokio::test]
async fn streams_that_nobody_wants_are_only_so_many() {
    let streams = Arc::new(Streams::default());
    let kept = streams.claim("kept").unwrap();
    for number in 0..2 * MAX_IDLE {
        drop(streams.claim(&number.to_string()).unwrap());
    }
    let slots = streams.lock();
    assert_eq!(slots.by_id.len(), MAX_IDLE + 1);
    assert!(
        slots.by_id.contains_key("kept")
            && slots.by_id.contains_key("1023")
            && !slots.by_id.contains_key("0")
    );
    drop(slots);
    drop(kept);
}
