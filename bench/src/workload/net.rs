//! Traffic: a server that every runtime's pod runs, and the client, which the benchmark itself and another pod run.
//!
//! A connection begins with one byte that says what it is for. UDP datagrams are counted; one of a single byte asks for the
//! count.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The port of the server, of both kinds.
pub(crate) const PORT: u16 = 5001;

/// What a connection is for: the client sends, and hears how much came.
const SINK: u8 = b'S';
/// The client is sent as much as the eight bytes after this say.
const SOURCE: u8 = b'T';
/// The client gets back what it sends, byte by byte.
const ECHO: u8 = b'E';

/// Bytes of a bulk transfer, over all of its streams.
const BULK_BYTES: u64 = 48 << 20;
/// Bytes of one read or write.
const CHUNK: usize = 128 << 10;
const REQUESTS: u32 = 1000;
const CONNECTIONS: u32 = 200;
/// Datagrams as large as a full Ethernet frame takes.
const DATAGRAM: usize = 1472;
const DATAGRAMS: u64 = 16_000;
/// How long nothing may happen.
const LIMIT: Duration = Duration::from_secs(30);
/// After this long without an answer a datagram counts as lost, and is sent again.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);

/// One measurement: the row's name, its unit and the figure.
pub(crate) type Sample = (&'static str, &'static str, f64);

/// Serves for ever. `ready` is called once it can be connected to.
///
/// # Errors
/// When the ports can't be had.
pub(crate) fn serve(ready: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    serve_on(&listener, socket, ready)
}

fn serve_on(
    listener: &TcpListener,
    socket: UdpSocket,
    ready: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    thread::spawn(move || count_datagrams(&socket));
    ready()?;
    loop {
        let (connection, _) = listener.accept()?;
        // A client that goes away is no concern of the others.
        thread::spawn(move || answer(connection));
    }
}

fn answer(mut connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut kind = [0];
    connection.read_exact(&mut kind)?;
    let mut buffer = vec![0; CHUNK];
    match kind[0] {
        SINK => {
            let mut total = 0_u64;
            loop {
                match connection.read(&mut buffer)? {
                    0 => return connection.write_all(&total.to_be_bytes()),
                    count => total += count as u64,
                }
            }
        }
        SOURCE => {
            let mut length = [0; 8];
            connection.read_exact(&mut length)?;
            send(&mut connection, u64::from_be_bytes(length), &buffer)
        }
        ECHO => loop {
            let mut byte = [0];
            connection.read_exact(&mut byte)?;
            connection.write_all(&byte)?;
        },
        _ => Ok(()),
    }
}

fn count_datagrams(socket: &UdpSocket) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let mut buffer = [0; 2048];
    loop {
        let (length, peer) = socket.recv_from(&mut buffer)?;
        if length == 1 {
            socket.send_to(&COUNT.swap(0, Ordering::Relaxed).to_be_bytes(), peer)?;
        } else {
            COUNT.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn send(connection: &mut TcpStream, mut length: u64, buffer: &[u8]) -> io::Result<()> {
    while length > 0 {
        let part = length.min(buffer.len() as u64) as usize;
        connection.write_all(&buffer[..part])?;
        length -= part as u64;
    }
    Ok(())
}

/// Measures everything with the server at `address`.
///
/// # Errors
/// When the server does not answer as it should.
pub(crate) fn measure(address: Ipv4Addr) -> io::Result<Vec<Sample>> {
    measure_at(SocketAddr::V4(SocketAddrV4::new(address, PORT)))
}

fn measure_at(server: SocketAddr) -> io::Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for (streams, to, from) in [
        (1, "tcp-1-stream-to-pod", "tcp-1-stream-from-pod"),
        (8, "tcp-8-streams-to-pod", "tcp-8-streams-from-pod"),
    ] {
        samples.push((to, "MB/s", bulk(server, streams, upload)?));
        samples.push((from, "MB/s", bulk(server, streams, download)?));
    }
    samples.push(("tcp-request-response", "us", request_response(server)?));
    samples.push(("tcp-connections", "op/s", connections(server)?));
    let (rate, lost) = datagrams(server)?;
    samples.push(("udp-to-pod", "MB/s", rate));
    samples.push(("udp-to-pod-lost", "%", lost));
    Ok(samples)
}

/// Measures one stream from the server at `address`.
///
/// # Errors
/// As [`measure`].
pub(crate) fn measure_one_stream(address: Ipv4Addr) -> io::Result<f64> {
    bulk(SocketAddr::V4(SocketAddrV4::new(address, PORT)), 1, download)
}

fn connect(server: SocketAddr, kind: u8) -> io::Result<TcpStream> {
    let mut connection = TcpStream::connect_timeout(&server, LIMIT)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(LIMIT))?;
    connection.set_write_timeout(Some(LIMIT))?;
    connection.write_all(&[kind])?;
    Ok(connection)
}

/// Megabytes a second over some streams at once.
fn bulk(
    server: SocketAddr,
    streams: u64,
    transfer: fn(SocketAddr, u64) -> io::Result<()>,
) -> io::Result<f64> {
    let started = Instant::now();
    let threads: Vec<_> =
        (0..streams).map(|_| thread::spawn(move || transfer(server, BULK_BYTES / streams))).collect();
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a thread of the client ended early"))??;
    }
    Ok(BULK_BYTES as f64 / 1e6 / started.elapsed().as_secs_f64())
}

fn upload(server: SocketAddr, length: u64) -> io::Result<()> {
    let mut connection = connect(server, SINK)?;
    send(&mut connection, length, &vec![0; CHUNK])?;
    connection.shutdown(std::net::Shutdown::Write)?;
    let mut received = [0; 8];
    connection.read_exact(&mut received)?;
    match u64::from_be_bytes(received) {
        received if received == length => Ok(()),
        received => Err(io::Error::other(format!("{received} of {length} bytes came"))),
    }
}

fn download(server: SocketAddr, length: u64) -> io::Result<()> {
    let mut connection = connect(server, SOURCE)?;
    connection.write_all(&length.to_be_bytes())?;
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    while total < length {
        match connection.read(&mut buffer)? {
            0 => return Err(io::Error::other(format!("{total} of {length} bytes came"))),
            count => total += count as u64,
        }
    }
    Ok(())
}

/// Microseconds from a byte sent to the same byte back.
fn request_response(server: SocketAddr) -> io::Result<f64> {
    let mut connection = connect(server, ECHO)?;
    let started = Instant::now();
    for _ in 0..REQUESTS {
        let mut byte = [0];
        connection.write_all(&byte)?;
        connection.read_exact(&mut byte)?;
    }
    Ok(started.elapsed().as_secs_f64() * 1e6 / f64::from(REQUESTS))
}

/// Connections a second, each with one byte both ways.
fn connections(server: SocketAddr) -> io::Result<f64> {
    let started = Instant::now();
    for _ in 0..CONNECTIONS {
        let mut connection = connect(server, ECHO)?;
        let mut byte = [0];
        connection.write_all(&byte)?;
        connection.read_exact(&mut byte)?;
    }
    Ok(f64::from(CONNECTIONS) / started.elapsed().as_secs_f64())
}

/// Megabytes a second of datagrams that came, and how many of a hundred did not.
fn datagrams(server: SocketAddr) -> io::Result<(f64, f64)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(ANSWER_LIMIT))?;
    ask(&socket)?;
    let started = Instant::now();
    for _ in 0..DATAGRAMS {
        socket.send(&[0; DATAGRAM])?;
    }
    // The question waits in the same queues behind the datagrams, and may get lost like these.
    let (received, waited) = ask(&socket)?;
    let elapsed = started.elapsed().saturating_sub(waited).as_secs_f64();
    let lost = 100.0 * (1.0 - received as f64 / DATAGRAMS as f64);
    Ok((received as f64 * DATAGRAM as f64 / 1e6 / elapsed, lost))
}

/// Asks how many datagrams have come since the last question. Returns that, and how long was waited for answers that did not
/// come.
fn ask(socket: &UdpSocket) -> io::Result<(u64, Duration)> {
    let started = Instant::now();
    loop {
        let waited = started.elapsed();
        socket.send(b"?")?;
        let mut answer = [0; 8];
        match socket.recv(&mut answer) {
            Ok(_) => return Ok((u64::from_be_bytes(answer), waited)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && waited < LIMIT => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn client_and_server_agree() {
        // A port that is free for both: any other may be somebody's.
        let (listener, socket) = std::iter::repeat_with(|| {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
            let socket = UdpSocket::bind(listener.local_addr().unwrap());
            (listener, socket)
        })
        .take(100)
        .find_map(|(listener, socket)| Some((listener, socket.ok()?)))
        .unwrap();
        let server = listener.local_addr().unwrap();
        thread::spawn(move || serve_on(&listener, socket, || Ok(())));
        let samples = measure_at(server).unwrap();
        assert!(samples.iter().all(|(row, _, value)| *value > 0.0 || row.ends_with("lost")), "{samples:?}");
    }
}
