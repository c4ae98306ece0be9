//! Real sockets in a network namespace of the test's own; the VMM and the guest behind it are the test's.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream as StdTcpStream};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::Instant;

use bulkhead_agent_protocol::forward::{CONNECTED, LoopbackPort};
use bulkhead_vmm_protocol::{Channel, Event, ExitReason, FromVmm, Packet, Request};
use nix::sched::{CloneFlags, unshare};
use tempfile::TempDir;
use tokio::net::UnixStream;

use super::*;
use crate::pod::heartbeat::Heartbeat;

/// A server in the guest echoes on this port.
const ECHO: u16 = 80;
/// On this one it says a word and cuts the connection off.
const RUDE: u16 = 81;
/// Whether somebody listens on this one the guest never says.
const SILENT: u16 = 82;

/// A new network namespace, which is there as long as its thread is.
fn namespace() -> (PathBuf, mpsc::Sender<()>) {
    let (told, path) = mpsc::channel();
    let (keeper, ended) = mpsc::channel::<()>();
    thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
        assert!(up.success());
        // SAFETY: takes nothing.
        let thread = unsafe { libc::gettid() };
        told.send(PathBuf::from(format!("/proc/{}/task/{thread}/ns/net", std::process::id()))).unwrap();
        let _ = ended.recv();
    });
    (path.recv().unwrap(), keeper)
}

/// What the guest does with a stream; counts those that are open.
fn guest(mut stream: StdUnixStream, open: &AtomicUsize) {
    let mut number = [0; 8];
    stream.read_exact(&mut number).unwrap();
    let port = LoopbackPort::from_number(u64::from_le_bytes(number)).unwrap();
    open.fetch_add(1, Relaxed);
    match port.address().port() {
        ECHO => {
            stream.write_all(&[CONNECTED]).unwrap();
            stream.write_all(format!("{} ", port.address().ip()).as_bytes()).unwrap();
            // It says nothing before it has been told everything.
            let mut all = Vec::new();
            if stream.read_to_end(&mut all).is_ok() {
                let _ = stream.write_all(&all);
            }
        }
        SILENT => {
            let _ = stream.read(&mut number);
        }
        RUDE => stream.write_all(&[CONNECTED, b'x']).unwrap(),
        _ => {}
    }
    open.fetch_sub(1, Relaxed);
}

struct Stage {
    pod: Arc<Pod>,
    vmm: Arc<Channel>,
    namespace: PathBuf,
    open: Arc<AtomicUsize>,
    _keeper: mpsc::Sender<()>,
    _agent: UnixStream,
    _directory: TempDir,
}

impl Stage {
    async fn set(name: &str) -> Stage {
        let (ours, agent) = UnixStream::pair().unwrap();
        let (channel, vmm) = Channel::pair().unwrap();
        let vmm = Arc::new(vmm);
        let open = Arc::new(AtomicUsize::new(0));
        let (serving, counter) = (vmm.clone(), open.clone());
        thread::spawn(move || {
            while let Ok(Packet { message: Request::ConnectVsock { .. }, mut fds }) = serving.receive() {
                let stream = StdUnixStream::from(fds.remove(0));
                let counter = counter.clone();
                thread::spawn(move || guest(stream, &counter));
                serving.send(&FromVmm::Reply(Ok(())), &[]).unwrap();
            }
        });
        let directory = tempfile::tempdir().unwrap();
        let pod =
            Pod::with_guest(name, directory.path().join("pod"), ours, channel, Heartbeat::default()).await;
        let (namespace, keeper) = namespace();
        Stage { pod, vmm, namespace, open, _keeper: keeper, _agent: agent, _directory: directory }
    }

    /// Does something in the namespace as a client.
    async fn client<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        NetworkNamespace::open(&self.namespace).unwrap().within(work).await.unwrap()
    }

    async fn forwarded(&self) {
        start_in(self.pod.clone(), self.namespace.clone());
        for _ in 0..1000 {
            tokio::time::sleep(Duration::from_millis(20)).await;
            if self.client(|| StdTcpStream::connect(("127.0.0.1", ECHO))).await.is_ok() {
                // That one is over before others are counted.
                return self.is_left().await;
            }
        }
        panic!("ports are not forwarded");
    }

    /// Waits until no stream of the guest is open.
    async fn is_left(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.open.load(Relaxed) > 0 {
            assert!(Instant::now() < deadline, "a stream stays open");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn end(self) {
        self.vmm.send(&FromVmm::Event(Event::Exited(ExitReason::Reset)), &[]).unwrap();
        self.pod.died().await;
        self.pod.stop().await;
    }
}

/// Sends a question, ends it, and reads the answer to its end.
fn ask(address: &str, port: u16, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = StdTcpStream::connect((address, port))?;
    stream.write_all(question)?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

#[tokio::test]
async fn connections_reach_the_guest_and_each_direction_has_an_end_of_its_own() {
    let stage = Stage::set("carry").await;
    stage.forwarded().await;
    let question = b"0123456789".repeat(50_000);
    for address in ["127.0.0.1", "127.9.8.7", "::1"] {
        let asked = question.clone();
        let answer = stage.client(move || ask(address, ECHO, &asked)).await.unwrap();
        let expected = [address.as_bytes(), b" ", &question].concat();
        assert!(answer == expected, "{address}: {} bytes", answer.len());
    }
    stage.end().await;
}

#[tokio::test]
async fn a_port_without_a_server_is_refused_and_other_addresses_are_left_alone() {
    let stage = Stage::set("refuse").await;
    stage.forwarded().await;
    for address in ["127.0.0.1", "127.9.8.7", "::1"] {
        let mut soonest = Duration::MAX;
        for _ in 0..5 {
            let since = Instant::now();
            let error = stage.client(move || StdTcpStream::connect((address, 9))).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{address}");
            soonest = soonest.min(since.elapsed());
        }
        // At once, not when the client has asked again, but for a moment in which the machine is busy.
        assert!(soonest < Duration::from_millis(900), "{address}: {soonest:?}");
    }
    // What a server has sent before it cuts the connection off arrives.
    let answer = stage.client(|| ask("127.0.0.1", RUDE, b"")).await.unwrap();
    assert_eq!(answer, b"x");
    // An address of the namespace that is no loopback address.
    let error = stage
        .client(|| {
            let added =
                std::process::Command::new("ip").args(["addr", "add", "10.9.8.7/32", "dev", "lo"]).status();
            assert!(added.unwrap().success());
            ask("10.9.8.7", ECHO, b"")
        })
        .await
        .unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    stage.end().await;
}

#[tokio::test]
async fn a_guest_that_does_not_say_keeps_its_client_waiting() {
    let stage = Stage::set("silent").await;
    stage.forwarded().await;
    let connect = || {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), SILENT);
        StdTcpStream::connect_timeout(&address, Duration::from_millis(1500))
    };
    let error = stage.client(connect).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    // Its client asked twice, and is one.
    assert_eq!(stage.open.load(Relaxed), 1);
    stage.end().await;
}

#[tokio::test]
async fn there_are_only_so_many_at_a_time_and_the_others_wait() {
    let stage = Stage::set("many").await;
    stage.forwarded().await;
    let count = MAX_CONNECTIONS + 10;
    let (go, answers) = (Arc::new(Barrier::new(MAX_CONNECTIONS + 1)), Arc::new(AtomicUsize::new(0)));
    for _ in 0..count {
        let (go, answers) = (go.clone(), answers.clone());
        let namespace = NetworkNamespace::open(&stage.namespace).unwrap();
        let visit = move || {
            let mut client = StdTcpStream::connect(("127.0.0.1", ECHO)).unwrap();
            // The first ones in stay until there are as many as there can be.
            if answers.load(Relaxed) == 0 {
                go.wait();
            }
            client.write_all(b"a").unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "127.0.0.1 a");
            answers.fetch_add(1, Relaxed);
        };
        tokio::spawn(async move { namespace.within(visit).await.unwrap() });
    }
    let reached = async |counter: &AtomicUsize, wanted| {
        let settled = async {
            while counter.load(Relaxed) < wanted {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), settled).await.unwrap();
    };
    reached(&stage.open, MAX_CONNECTIONS).await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(stage.open.load(Relaxed), MAX_CONNECTIONS);
    // When the first end the others get their turn.
    let all_in = go.clone();
    tokio::task::spawn_blocking(move || all_in.wait()).await.unwrap();
    reached(&answers, count).await;
    stage.end().await;
}

#[tokio::test]
async fn everything_ends_with_the_pod() {
    let stage = Stage::set("end").await;
    stage.forwarded().await;
    let _client = stage.client(|| StdTcpStream::connect(("127.0.0.1", ECHO)).unwrap()).await;
    let (namespace, keeper) = (NetworkNamespace::open(&stage.namespace).unwrap(), stage._keeper.clone());
    stage.end().await;
    let connect = || {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), ECHO);
        StdTcpStream::connect_timeout(&address, Duration::from_secs(1))
            .map(drop)
            .map_err(|error| error.kind())
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut last = namespace.within(connect).await.unwrap();
    while last != Err(io::ErrorKind::ConnectionRefused) && Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(10)).await;
        last = namespace.within(connect).await.unwrap();
    }
    assert_eq!(last, Err(io::ErrorKind::ConnectionRefused));
    drop(keeper);
}
