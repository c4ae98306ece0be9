//! Docker's name server in the pod: programs find it at 127.0.0.11, and the host, which has the real one, answers.
//!
//! Our sockets have a port of their own, to which the kernel leads what goes to port 53 of that address ([`Redirection`]), so
//! that the containers have port 53 to themselves. What the host does not answer soon the pod asks the name servers that
//! Docker would ask, over its own network: their answers would not find the way to Docker.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_agent_protocol::names::{
    Header, MAX_LINE, MAX_QUESTION, MAX_WAITING, MIN_MESSAGE, PORT, READY, SERVER, frame,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

use super::Connection;
use crate::guest::{CGROUPS, Redirection};

/// How long the host may take for its first line.
const LINE_LIMIT: Duration = Duration::from_secs(5);

/// The host knows the names of containers at once. For others it would have to ask somebody.
const HOST_LIMIT: Duration = Duration::from_millis(150);

/// How long a name server may take.
const SERVER_LIMIT: Duration = Duration::from_secs(2);

/// How long a client by TCP may take for a question, and waits for an answer.
const CLIENT_LIMIT: Duration = Duration::from_secs(10);

/// Clients by TCP at a time.
const MAX_TCP: usize = 16;

/// The longest message.
const MAX_MESSAGE: usize = 65_535;

/// `SERVFAIL`, in the fourth byte of a message.
const SERVER_FAILED: u8 = 2;

/// Serves for as long as the host has the stream.
pub(super) async fn serve(host: Connection) {
    if let Err(error) = try_serve(host, Path::new(CGROUPS)).await {
        log::warn!("the host's name server is not reached: {error}");
    }
}

async fn try_serve(host: Connection, cgroups: &Path) -> io::Result<()> {
    let servers = timeout(LINE_LIMIT, read_servers(&host)).await??;
    let (tcp, udp) = listen().await?;
    let port = udp.local_addr()?.port();
    let _redirection = Redirection::attach(cgroups, SocketAddrV4::new(SERVER, PORT), port)?;
    host.write_all(&[READY]).await?;
    let names = Arc::new(Names {
        host,
        udp,
        servers,
        waiting: Mutex::default(),
        writing: tokio::sync::Mutex::default(),
        elsewhere: Arc::new(Semaphore::new(MAX_WAITING)),
    });
    tokio::select! {
        ended = names.take_answers() => ended,
        ended = names.clone().take_datagrams() => ended,
        ended = names.clone().take_connections(tcp) => ended,
    }
}

/// Both sockets on one port, which the kernel picks for the first.
async fn listen() -> io::Result<(TcpListener, UdpSocket)> {
    const TRIES: u32 = 8;
    let mut result = Err(io::ErrorKind::AddrInUse.into());
    for _ in 0..TRIES {
        let tcp = TcpListener::bind((SERVER, 0)).await?;
        match UdpSocket::bind(tcp.local_addr()?).await {
            Ok(udp) => return Ok((tcp, udp)),
            Err(error) => result = Err(error),
        }
    }
    result
}

async fn read_servers(host: &Connection) -> io::Result<Vec<IpAddr>> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        host.read_exact(&mut byte).await?;
        match byte {
            [b'\n'] => break,
            [byte] if line.len() < MAX_LINE => line.push(byte),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
    let line = String::from_utf8_lossy(&line);
    Ok(line.split_whitespace().filter_map(|word| word.parse().ok()).collect())
}

/// Where an answer goes.
#[derive(Debug)]
enum Client {
    Udp(SocketAddr),
    Tcp(oneshot::Sender<Vec<u8>>),
}

/// Who waits for an answer, by the numbers of the questions.
#[derive(Debug, Default)]
struct Waiting {
    next: u32,
    clients: BTreeMap<u32, Client>,
}

impl Waiting {
    fn add(&mut self, client: Client) -> u32 {
        if self.clients.len() >= MAX_WAITING {
            // Programs ask again.
            self.clients.pop_first();
        }
        let tag = self.next;
        self.next = self.next.wrapping_add(1);
        self.clients.insert(tag, client);
        tag
    }
}

#[derive(Debug)]
struct Names {
    host: Connection,
    udp: UdpSocket,
    /// Name servers beyond the host's.
    servers: Vec<IpAddr>,
    waiting: Mutex<Waiting>,
    /// Held while a frame is written.
    writing: tokio::sync::Mutex<()>,
    /// Places for questions to other name servers.
    elsewhere: Arc<Semaphore>,
}

impl Names {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn take_datagrams(self: Arc<Self>) -> io::Result<()> {
        let mut buffer = vec![0; usize::from(MAX_QUESTION) + 1];
        loop {
            let (length, client) = match self.udp.recv_from(&mut buffer).await {
                Ok(received) => received,
                // Of an answer that nobody waited for.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
                Err(error) => return Err(error),
            };
            let question = buffer.get(..length).unwrap_or_default();
            if is_question(question) {
                self.clone().ask(Client::Udp(client), question.to_vec(), false).await?;
            }
        }
    }

    async fn take_connections(self: Arc<Self>, listener: TcpListener) -> io::Result<()> {
        let places = Arc::new(Semaphore::new(MAX_TCP));
        loop {
            // It is never closed.
            let Ok(place) = places.clone().acquire_owned().await else { return Ok(()) };
            let (client, _) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => {
                    log::debug!("a question was not accepted: {error}");
                    sleep(HOST_LIMIT).await;
                    continue;
                }
            };
            let names = self.clone();
            tokio::spawn(async move {
                // However it ends, it ends.
                let _ = names.serve_connection(client).await;
                drop(place);
            });
        }
    }

    async fn serve_connection(self: Arc<Self>, mut client: TcpStream) -> io::Result<()> {
        loop {
            let question =
                timeout(CLIENT_LIMIT, read_message(&mut client, usize::from(MAX_QUESTION))).await??;
            if !is_question(&question) {
                return Ok(());
            }
            let (answer, answered) = oneshot::channel();
            self.clone().ask(Client::Tcp(answer), question, true).await?;
            let Ok(Ok(answer)) = timeout(CLIENT_LIMIT, answered).await else { return Ok(()) };
            timeout(CLIENT_LIMIT, write_message(&mut client, &answer)).await??;
        }
    }

    /// Passes a question on.
    async fn ask(self: Arc<Self>, client: Client, question: Vec<u8>, tcp: bool) -> io::Result<()> {
        let tag = self.waiting().add(client);
        let bytes = frame(tag, tcp, &question);
        {
            let _writing = self.writing.lock().await;
            self.host.write_all(&bytes).await?;
        }
        if self.servers.is_empty() {
            return Ok(());
        }
        // In a flood of questions some are lost, as anywhere.
        if let Ok(place) = self.elsewhere.clone().try_acquire_owned() {
            tokio::spawn(async move {
                self.ask_elsewhere(tag, question, tcp).await;
                drop(place);
            });
        }
        Ok(())
    }

    /// Asks the other name servers as long as there is no answer.
    async fn ask_elsewhere(&self, tag: u32, question: Vec<u8>, tcp: bool) {
        sleep(HOST_LIMIT).await;
        for server in &self.servers {
            if !self.waiting().clients.contains_key(&tag) {
                return;
            }
            let asked = async {
                if tcp { ask_by_tcp(*server, &question).await } else { ask_by_udp(*server, &question).await }
            };
            match timeout(SERVER_LIMIT, asked).await {
                Ok(Ok(answer)) => return self.answer(tag, answer).await,
                Ok(Err(error)) => log::debug!("the name server {server}: {error}"),
                Err(_) => log::debug!("the name server {server} does not answer"),
            }
        }
    }

    /// Takes the host's answers until the stream's end.
    async fn take_answers(&self) -> io::Result<()> {
        loop {
            let mut header = [0; Header::SIZE];
            match self.host.read_exact(&mut header).await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                result => result?,
            }
            let header = Header::from_bytes(header).ok_or(io::ErrorKind::InvalidData)?;
            let mut answer = vec![0; header.length.into()];
            self.host.read_exact(&mut answer).await?;
            let failed = answer.get(3).is_none_or(|byte| byte & 0xf == SERVER_FAILED);
            // Somebody else may know.
            if !failed || self.servers.is_empty() {
                self.answer(header.tag, answer).await;
            }
        }
    }

    async fn answer(&self, tag: u32, answer: Vec<u8>) {
        let client = self.waiting().clients.remove(&tag);
        if answer.len() < usize::from(MIN_MESSAGE) {
            return;
        }
        // Whoever asked may be gone.
        match client {
            Some(Client::Udp(client)) => drop(self.udp.send_to(&answer, client).await),
            Some(Client::Tcp(client)) => drop(client.send(answer)),
            None => {}
        }
    }
}

fn is_question(message: &[u8]) -> bool {
    (usize::from(MIN_MESSAGE)..=MAX_QUESTION.into()).contains(&message.len())
}

async fn ask_by_udp(server: IpAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect((server, PORT)).await?;
    socket.send(question).await?;
    let mut answer = vec![0; MAX_MESSAGE];
    loop {
        let length = socket.recv(&mut answer).await?;
        // An answer has the question's number.
        if length >= 2 && answer.get(..2) == question.get(..2) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn ask_by_tcp(server: IpAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect((server, PORT)).await?;
    write_message(&mut stream, question).await?;
    read_message(&mut stream, MAX_MESSAGE).await
}

async fn read_message(stream: &mut TcpStream, limit: usize) -> io::Result<Vec<u8>> {
    let length = usize::from(stream.read_u16().await?);
    if length > limit {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut message = vec![0; length];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    stream.write_all(&[&length.to_be_bytes()[..], message].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_question_is_forgotten() {
        let mut waiting = Waiting { next: u32::MAX - 2, ..Waiting::default() };
        let client = || Client::Udp(SocketAddr::from(([127, 0, 0, 1], 1)));
        let tags: Vec<u32> = (0..MAX_WAITING + 1).map(|_| waiting.add(client())).collect();
        assert_eq!(waiting.clients.len(), MAX_WAITING);
        assert_eq!((tags[0], tags[3]), (u32::MAX - 2, 0));
    }

    #[test]
    fn what_cannot_be_a_question_is_not_passed_on() {
        assert!(is_question(&[0; 12]) && is_question(&[0; 4096]));
        assert!(!is_question(&[0; 11]) && !is_question(&[0; 4097]));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_hosts_line_names_servers() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let host = Connection::new(ours.into()).unwrap();
        std::io::Write::write_all(&mut theirs, b"192.0.2.53 nonsense fd00::1\n").unwrap();
        let servers = read_servers(&host).await.unwrap();
        assert_eq!(servers, ["192.0.2.53".parse::<IpAddr>().unwrap(), "fd00::1".parse().unwrap()]);
    }
}
