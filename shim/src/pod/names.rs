//! Docker's name server, for a guest that can't reach it.
//!
//! In a network of its user's, Docker answers for the names of containers at 127.0.0.11 in the container's network namespace on
//! the host; the guest has a loopback interface of its own. So the agent takes the questions there
//! ([`bulkhead_agent_protocol::names`]), and they are asked here: from the namespace, of that one address and of nothing else.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream as StdTcpStream, UdpSocket as StdUdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_agent_protocol::names::{
    Header, MAX_LINE, MAX_WAITING, MIN_MESSAGE, PORT, READY, SERVER, frame,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{sleep, timeout};

use super::{Pod, PodError};
use crate::error::chain;
use crate::host::netns::{NamespaceError, NetworkNamespace};
use crate::spec;

/// How long the agent may take until it takes questions: the container waits for it.
const READY_LIMIT: Duration = Duration::from_secs(3);

/// How long connecting to the name server may take, and how long its answer.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Questions by TCP at a time, each on a connection of its own.
const MAX_TCP: usize = 8;

/// The longest message.
const MAX_MESSAGE: usize = 65_535;

/// The most that is read of a `resolv.conf`.
const MAX_FILE: u64 = 64 * 1024;

/// How long receiving rests after it has failed.
const PAUSE: Duration = Duration::from_millis(50);

/// Why the pod has no name server.
#[derive(Debug, thiserror::Error)]
enum NamesError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("can't make a socket to ask it from")]
    Socket(#[source] io::Error),
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error("the guest takes no questions")]
    Guest(#[source] io::Error),
    #[error("the guest was not ready for questions within {} s", READY_LIMIT.as_secs())]
    TimedOut,
}

/// Why a pod's name server ends before the pod.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the guest sent something that is no question")]
    Nonsense,
    #[error("the stream to the guest failed")]
    Stream(#[source] io::Error),
}

/// Begins, if Docker has put a name server into the pod's namespace: at once, because the container's first question may come
/// as soon as it runs. A pod without it is still of use, so a failure is said and no more.
pub(crate) async fn start(pod: &Arc<Pod>, bundle: &Path) {
    if !pod.has_own_network() || !is_served(pod.host_pid()) {
        return;
    }
    let namespace = PathBuf::from(format!("/proc/{}/ns/net", pod.host_pid()));
    match begin(pod, &namespace, &external_servers(bundle)).await {
        Ok(names) => {
            let pod = pod.clone();
            tokio::spawn(async move {
                tokio::select! {
                    _ = pod.died() => {}
                    Err(ended) = names.serve() => log::warn!("names of containers are not resolved any more: {}", chain(&ended)),
                }
            });
        }
        Err(error) => log::warn!("names of containers are not resolved in the pod: {}", chain(&error)),
    }
}

/// Whether somebody has a socket at the name server's address in the network namespace of a process.
fn is_served(pid: u32) -> bool {
    let address = u32::from_ne_bytes(SERVER.octets());
    let local = format!(": {address:08X}:");
    fs::read_to_string(format!("/proc/{pid}/net/udp")).is_ok_and(|table| table.contains(&local))
}

/// The name servers that Docker would ask from within the pod's namespace, where answers don't find it: the guest asks them.
/// Docker lists them in the container's `resolv.conf`, together with those that it asks from the host.
fn external_servers(bundle: &Path) -> Vec<IpAddr> {
    let file = || -> Option<PathBuf> {
        let spec = spec::read(bundle).ok()?;
        let mounts = spec.mounts().as_ref()?;
        mounts.iter().find(|mount| mount.destination() == Path::new("/etc/resolv.conf"))?.source().clone()
    };
    let text = file().and_then(|file| {
        let mut text = String::new();
        io::Read::read_to_string(&mut io::Read::take(fs::File::open(file).ok()?, MAX_FILE), &mut text)
            .ok()?;
        Some(text)
    });
    text.map(|text| listed_servers(&text)).unwrap_or_default()
}

/// `# ExtServers: [192.0.2.1 host(127.0.0.53)]`
fn listed_servers(text: &str) -> Vec<IpAddr> {
    let list = text.lines().find_map(|line| line.strip_prefix("# ExtServers: [")?.strip_suffix(']'));
    list.unwrap_or_default().split(' ').filter_map(|word| word.parse().ok()).collect()
}

async fn begin(
    pod: &Pod,
    namespace: &Path,
    servers: &[IpAddr],
) -> Result<Names<tokio::net::UnixStream>, NamesError> {
    let namespace = NetworkNamespace::open(namespace)?;
    let udp =
        namespace.within(|| asking(SocketAddr::from((SERVER, PORT)))).await?.map_err(NamesError::Socket)?;
    let udp = UdpSocket::from_std(udp).map_err(NamesError::Socket)?;
    let mut guest = pod.open_names().await?;
    let ready = async {
        guest.write_all(line(servers).as_bytes()).await?;
        match guest.read_u8().await? {
            READY => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    };
    match timeout(READY_LIMIT, ready).await {
        Ok(Ok(())) => Ok(Names { guest, udp, namespace: Arc::new(namespace) }),
        Ok(Err(source)) => Err(NamesError::Guest(source)),
        Err(_) => Err(NamesError::TimedOut),
    }
}

/// The servers on a line that is not too long.
fn line(servers: &[IpAddr]) -> String {
    let mut line = String::new();
    for server in servers {
        let word = server.to_string();
        if line.len() + word.len() + 2 > MAX_LINE {
            break;
        }
        line.push_str(&word);
        line.push(' ');
    }
    line.push('\n');
    line
}

/// A socket that hears of nobody but the name server.
fn asking(server: SocketAddr) -> io::Result<StdUdpSocket> {
    let socket = StdUdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// A question that is on its way: the number that it has there, the agent's, and the one that it came with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    id: [u8; 2],
    tag: u32,
    original: [u8; 2],
}

/// The questions that are on their way, oldest first.
#[derive(Debug, Default)]
struct Waiting {
    next: u16,
    asked: VecDeque<Asked>,
}

impl Waiting {
    /// Gives a question a number of its own; the oldest is forgotten if there are too many.
    fn number(&mut self, tag: u32, question: &mut [u8]) {
        let Some(place) = question.first_chunk_mut::<2>() else { return };
        while self.asked.len() >= MAX_WAITING {
            self.asked.pop_front();
        }
        // Ends soon: there are far more numbers than questions.
        loop {
            self.next = self.next.wrapping_add(1);
            let id = self.next.to_be_bytes();
            if self.asked.iter().all(|asked| asked.id != id) {
                self.asked.push_back(Asked { id, tag, original: *place });
                *place = id;
                return;
            }
        }
    }

    /// Gives an answer back the number that its question came with; tells which question that was.
    fn restore(&mut self, answer: &mut [u8]) -> Option<u32> {
        let place = answer.first_chunk_mut::<2>()?;
        let position = self.asked.iter().position(|asked| asked.id == *place)?;
        let Asked { tag, original, .. } = self.asked.remove(position)?;
        *place = original;
        Some(tag)
    }
}

/// Between the guest and the name server.
#[derive(Debug)]
struct Names<S> {
    guest: S,
    udp: UdpSocket,
    namespace: Arc<NetworkNamespace>,
}

impl<S: AsyncRead + AsyncWrite + Send + 'static> Names<S> {
    /// Serves until the guest has closed its stream.
    async fn serve(self) -> Result<(), Ended> {
        let (mut from_guest, mut to_guest) = tokio::io::split(self.guest);
        let (answers, mut answered) = mpsc::channel::<Vec<u8>>(MAX_WAITING);
        let waiting = Mutex::new(Waiting::default());
        let write = async {
            while let Some(frame) = answered.recv().await {
                to_guest.write_all(&frame).await.map_err(Ended::Stream)?;
            }
            Ok(())
        };
        tokio::select! {
            ended = write => ended,
            ended = take_questions(&mut from_guest, &self.udp, &self.namespace, &waiting, &answers) => ended,
            ended = take_answers(&self.udp, &waiting, &answers) => ended,
        }
    }
}

fn lock(waiting: &Mutex<Waiting>) -> MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn take_questions(
    guest: &mut (impl AsyncRead + Unpin),
    udp: &UdpSocket,
    namespace: &Arc<NetworkNamespace>,
    waiting: &Mutex<Waiting>,
    answers: &mpsc::Sender<Vec<u8>>,
) -> Result<(), Ended> {
    let places = Arc::new(Semaphore::new(MAX_TCP));
    loop {
        let mut header = [0; Header::SIZE];
        match guest.read_exact(&mut header).await {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            result => drop(result.map_err(Ended::Stream)?),
        }
        let header =
            Header::from_bytes(header).filter(|header| header.is_question()).ok_or(Ended::Nonsense)?;
        let mut question = vec![0; header.length.into()];
        guest.read_exact(&mut question).await.map_err(Ended::Stream)?;
        if !header.tcp {
            lock(waiting).number(header.tag, &mut question);
            // One that is lost is asked again by the program.
            let _ = udp.send(&question).await;
            continue;
        }
        // It is never closed. While there is no place, questions wait in the stream.
        let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
        let (namespace, answers) = (namespace.clone(), answers.clone());
        tokio::spawn(async move {
            let asked = timeout(ANSWER_LIMIT, ask_by_tcp(&namespace, &question)).await;
            let answer = asked.unwrap_or(Err(io::ErrorKind::TimedOut.into()));
            if let Err(error) = &answer {
                log::debug!("a question by TCP: {error}");
            }
            // Nobody is there to take it when the pod ends.
            let _ = answers.send(frame(header.tag, true, &answer.unwrap_or_default())).await;
            drop(place);
        });
    }
}

async fn take_answers(
    udp: &UdpSocket,
    waiting: &Mutex<Waiting>,
    answers: &mpsc::Sender<Vec<u8>>,
) -> Result<(), Ended> {
    let mut buffer = vec![0; MAX_MESSAGE];
    loop {
        let length = match udp.recv(&mut buffer).await {
            Ok(length) => length,
            Err(error) => {
                log::debug!("the name server: {error}");
                sleep(PAUSE).await;
                continue;
            }
        };
        let answer = buffer.get_mut(..length).unwrap_or_default();
        if length < usize::from(MIN_MESSAGE) {
            continue;
        }
        let tag = lock(waiting).restore(answer);
        if let Some(tag) = tag {
            // Its receiver is in the same task.
            let _ = answers.send(frame(tag, false, answer)).await;
        }
    }
}

async fn ask_by_tcp(namespace: &NetworkNamespace, question: &[u8]) -> io::Result<Vec<u8>> {
    let server = SocketAddr::from((SERVER, PORT));
    let connect = move || {
        let stream = StdTcpStream::connect_timeout(&server, CONNECT_LIMIT)?;
        stream.set_nonblocking(true)?;
        Ok::<_, io::Error>(stream)
    };
    let stream = namespace.within(connect).await.map_err(io::Error::other)??;
    let mut stream = TcpStream::from_std(stream)?;
    let length = u16::try_from(question.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    fn what_docker_lists_is_understood() {
        let text = "nameserver 127.0.0.11\nsearch a.test\noptions ndots:0\n\n# Based on host file: '/etc/resolv.conf' (internal \
                    resolver)\n# ExtServers: [192.0.2.53 host(127.0.0.53) fd00::1]\n# Overrides: []\n";
        let servers = listed_servers(text);
        assert_eq!(servers, ["192.0.2.53".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
        assert_eq!(line(&servers), "192.0.2.53 fd00::1 \n");
        assert!(line(&vec![servers[0]; 100]).len() <= MAX_LINE);
        assert_eq!(listed_servers("nameserver 1.1.1.1\n"), [] as [IpAddr; 0]);
    }

    #[test]
    fn questions_have_numbers_of_their_own_on_their_way() {
        let mut waiting = Waiting { next: u16::MAX - 1, ..Waiting::default() };
        let (mut one, mut other) = ([7, 7, 1], [7, 7, 2]);
        waiting.number(1, &mut one);
        waiting.number(2, &mut other);
        assert_ne!(one[..2], other[..2]);
        assert_eq!(waiting.restore(&mut other), Some(2));
        assert_eq!((other, waiting.restore(&mut other)), ([7, 7, 2], None));
        for tag in 0..2 * MAX_WAITING as u32 {
            waiting.number(tag, &mut [0; 12]);
        }
        assert_eq!(waiting.asked.len(), MAX_WAITING);
        assert_eq!(waiting.restore(&mut one), None, "the oldest is forgotten");
    }

    /// A namespace with a name server that answers every question with its own bytes, and three more.
    async fn namespace_with_server() -> NetworkNamespace {
        let (told, made) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            assert!(Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap().success());
            let udp = StdUdpSocket::bind((SERVER, PORT)).unwrap();
            let tcp = std::net::TcpListener::bind((SERVER, PORT)).unwrap();
            let path =
                PathBuf::from(format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid()));
            told.send(path).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 5000];
                while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                    udp.send_to(&[&buffer[..length], b"udp"].concat(), from).unwrap();
                }
            });
            for stream in tcp.incoming() {
                let mut stream = stream.unwrap();
                let mut length = [0; 2];
                io::Read::read_exact(&mut stream, &mut length).unwrap();
                let mut question = vec![0; u16::from_be_bytes(length).into()];
                io::Read::read_exact(&mut stream, &mut question).unwrap();
                let answer = [&question[..], b"tcp"].concat();
                io::Write::write_all(&mut stream, &(answer.len() as u16).to_be_bytes()).unwrap();
                io::Write::write_all(&mut stream, &answer).unwrap();
            }
        });
        NetworkNamespace::open(&made.await.unwrap()).unwrap()
    }

    async fn served() -> (tokio::net::UnixStream, tokio::task::JoinHandle<Result<(), Ended>>) {
        let namespace = namespace_with_server().await;
        let udp = namespace.within(|| asking(SocketAddr::from((SERVER, PORT)))).await.unwrap().unwrap();
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let udp = UdpSocket::from_std(udp).unwrap();
        let names = Names { guest: ours, udp, namespace: Arc::new(namespace) };
        (theirs, tokio::spawn(names.serve()))
    }

    #[tokio::test]
    async fn questions_are_answered_from_the_namespace() {
        let (mut guest, serving) = served().await;
        let question = *b"\x12\x34 question of a program";
        for (tag, tcp, ending) in [(5, false, b"udp"), (6, true, b"tcp"), (7, false, b"udp")] {
            guest.write_all(&frame(tag, tcp, &question)).await.unwrap();
            let mut header = [0; Header::SIZE];
            guest.read_exact(&mut header).await.unwrap();
            let length = question.len() as u16 + 3;
            assert_eq!(Header::from_bytes(header), Some(Header { tag, length, tcp }));
            let mut answer = vec![0; length.into()];
            guest.read_exact(&mut answer).await.unwrap();
            assert_eq!(answer, [&question[..], ending].concat());
        }
        drop(guest);
        assert!(matches!(serving.await.unwrap(), Ok(())));
    }

    #[tokio::test]
    async fn nonsense_ends_it() {
        for nonsense in [frame(1, false, b"short"), frame(1, false, &[0; 5000]), vec![0xff; 8]] {
            let (mut guest, serving) = served().await;
            guest.write_all(&nonsense).await.unwrap();
            assert!(matches!(serving.await.unwrap(), Err(Ended::Nonsense)));
        }
    }
}
