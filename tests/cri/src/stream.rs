//! The streams behind the addresses that `Exec`, `Attach` and `PortForward` give: a WebSocket (RFC 6455) whose binary messages
//! begin with the number of a channel, as Kubernetes has it (`v4.channel.k8s.io`).

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

/// The channel of a process's standard input.
pub const STDIN: u8 = 0;
/// The channel of a process's standard output.
pub const STDOUT: u8 = 1;
/// The channel of a process's standard error.
pub const STDERR: u8 = 2;
/// The channel on which a process's end is told, as JSON.
pub const END: u8 = 3;
/// The channel of a terminal's size, as JSON.
pub const RESIZE: u8 = 4;

const PROTOCOL: &str = "v4.channel.k8s.io";
/// A response head longer than this is none.
const MAX_HEAD_BYTES: usize = 16 << 10;
/// Frames longer than this are refused; the server's have at most 64 KiB.
const MAX_FRAME_BYTES: u64 = 1 << 20;
const OPCODE_BINARY: u8 = 2;
const OPCODE_CLOSE: u8 = 8;
const OPCODE_PING: u8 = 9;
const OPCODE_PONG: u8 = 10;
const FINAL: u8 = 0x80;
const MASKED: u8 = 0x80;
/// Clients have to mask what they send; any key will do, zeros leave the bytes as they are.
const MASK: [u8; 4] = [0; 4];

/// What can go wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The address is none of the streaming server.
    #[error("{url:?} is no http:// address with host, port and path")]
    Address {
        /// What was given.
        url: String,
    },
    /// The connection failed, or nothing came in time.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The server does not give the stream.
    #[error("the streaming server refused: {0}")]
    Refused(String),
    /// The server speaks something else.
    #[error("the streaming server sent {0}")]
    Protocol(String),
}

/// A stream with several channels.
#[derive(Debug)]
pub struct Stream {
    connection: TcpStream,
}

impl Stream {
    /// Opens the stream behind `url`; each wait for something from it may take `limit`.
    ///
    /// # Errors
    /// When nobody answers there, or not with the stream.
    pub fn open(url: &str, limit: Duration) -> Result<Self, StreamError> {
        let bad = || StreamError::Address { url: url.to_owned() };
        let (host, path) =
            url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).ok_or_else(bad)?;
        let io = |what| move |source| StreamError::Io { what, source };
        let mut connection = TcpStream::connect(host).map_err(io("connect to the streaming server"))?;
        connection.set_read_timeout(Some(limit)).map_err(io("set a time limit"))?;
        connection.set_write_timeout(Some(limit)).map_err(io("set a time limit"))?;
        connection.set_nodelay(true).map_err(io("set no delay"))?;
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: YnVsa2hlYWQtdGVzdC1rZQ==\r\n\
             Sec-WebSocket-Protocol: {PROTOCOL}\r\n\r\n"
        );
        connection.write_all(request.as_bytes()).map_err(io("ask for the stream"))?;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            connection.read_exact(&mut byte).map_err(io("read the answer's head"))?;
            head.push(byte[0]);
            if head.len() > MAX_HEAD_BYTES {
                return Err(StreamError::Protocol(format!("a head of more than {MAX_HEAD_BYTES} bytes")));
            }
        }
        let head = String::from_utf8_lossy(&head);
        if !head.starts_with("HTTP/1.1 101 ") {
            let mut body = [0; 1024];
            let count = connection.read(&mut body).unwrap_or(0);
            let body = String::from_utf8_lossy(&body[..count]).trim().to_owned();
            return Err(StreamError::Refused(format!("{}: {body}", head.lines().next().unwrap_or_default())));
        }
        Ok(Self { connection })
    }

    /// Sends bytes on a channel.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn send(&mut self, channel: u8, data: &[u8]) -> Result<(), StreamError> {
        self.send_frame(OPCODE_BINARY, &[&[channel], data].concat())
    }

    /// The next bytes on any channel; `None` at the end.
    ///
    /// # Errors
    /// When the connection breaks, and when nothing comes in time.
    pub fn receive(&mut self) -> Result<Option<(u8, Vec<u8>)>, StreamError> {
        loop {
            let (opcode, payload) = self.receive_frame()?;
            match opcode {
                OPCODE_CLOSE => return Ok(None),
                OPCODE_PING => self.send_frame(OPCODE_PONG, &payload)?,
                OPCODE_PONG => {}
                _ => match payload.split_first() {
                    Some((channel, data)) => return Ok(Some((*channel, data.to_vec()))),
                    None => return Err(StreamError::Protocol("a message without a channel".to_owned())),
                },
            }
        }
    }

    /// What comes on one channel until `enough` says so or the stream ends; what comes on others meanwhile is dropped.
    ///
    /// # Errors
    /// As [`receive`](Self::receive).
    pub fn receive_until(
        &mut self,
        channel: u8,
        enough: impl Fn(&[u8]) -> bool,
    ) -> Result<Vec<u8>, StreamError> {
        let mut received = Vec::new();
        while !enough(&received) {
            match self.receive()? {
                Some((from, data)) if from == channel => received.extend_from_slice(&data),
                Some(_) => {}
                None => break,
            }
        }
        Ok(received)
    }

    fn send_frame(&mut self, opcode: u8, payload: &[u8]) -> Result<(), StreamError> {
        let mut frame = vec![FINAL | opcode];
        match payload.len() {
            length @ ..126 => frame.push(MASKED | length as u8),
            length @ ..0x1_0000 => {
                frame.push(MASKED | 126);
                frame.extend_from_slice(&(length as u16).to_be_bytes());
            }
            length => {
                frame.push(MASKED | 127);
                frame.extend_from_slice(&(length as u64).to_be_bytes());
            }
        }
        frame.extend_from_slice(&MASK);
        frame.extend_from_slice(payload);
        self.connection
            .write_all(&frame)
            .map_err(|source| StreamError::Io { what: "send to the streaming server", source })
    }

    /// One frame; the server neither fragments its messages nor masks them.
    fn receive_frame(&mut self) -> Result<(u8, Vec<u8>), StreamError> {
        let [first, second] = self.bytes::<2>()?;
        let length = match second {
            126 => u64::from(u16::from_be_bytes(self.bytes::<2>()?)),
            127 => u64::from_be_bytes(self.bytes::<8>()?),
            length => u64::from(length),
        };
        if first & FINAL == 0 || second & MASKED != 0 || length > MAX_FRAME_BYTES {
            return Err(StreamError::Protocol(format!("a frame that begins with {first:#x} {second:#x}")));
        }
        let mut payload = vec![0; length as usize];
        self.read(&mut payload)?;
        Ok((first & 0xf, payload))
    }

    fn bytes<const COUNT: usize>(&mut self) -> Result<[u8; COUNT], StreamError> {
        let mut bytes = [0; COUNT];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        self.connection
            .read_exact(bytes)
            .map_err(|source| StreamError::Io { what: "read from the streaming server", source })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    /// A server that takes one connection, answers with `head`, and then sends `frames` and gives back what it got.
    fn serve(head: &'static [u8], frames: Vec<u8>) -> (String, thread::JoinHandle<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/exec/token", listener.local_addr().unwrap());
        let server = thread::spawn(move || {
            let (mut connection, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                connection.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            connection.write_all(head).unwrap();
            connection.write_all(&frames).unwrap();
            connection.shutdown(std::net::Shutdown::Write).unwrap();
            let mut received = Vec::new();
            connection.read_to_end(&mut received).unwrap();
            received
        });
        (url, server)
    }

    #[test]
    fn channels_come_apart_and_the_end_is_told() {
        let mut frames = vec![0x82, 3, STDERR, b'e', b'\n'];
        let long = vec![b'x'; 300];
        frames.extend_from_slice(&[0x82, 126]);
        frames.extend_from_slice(&301_u16.to_be_bytes());
        frames.push(STDOUT);
        frames.extend_from_slice(&long);
        frames.extend_from_slice(&[0x88, 0]);
        let (url, server) = serve(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", frames);
        let mut stream = Stream::open(&url, LIMIT).unwrap();
        stream.send(STDIN, b"in").unwrap();
        assert_eq!(stream.receive().unwrap(), Some((STDERR, b"e\n".to_vec())));
        assert_eq!(stream.receive().unwrap(), Some((STDOUT, long)));
        assert_eq!(stream.receive().unwrap(), None);
        drop(stream);
        assert_eq!(server.join().unwrap(), [0x82, 0x83, 0, 0, 0, 0, STDIN, b'i', b'n']);
    }

    #[test]
    fn a_refusal_is_told_in_the_servers_words() {
        let (url, server) = serve(b"HTTP/1.1 404 Not Found\r\n\r\n", b"no such token".to_vec());
        let error = Stream::open(&url, LIMIT).unwrap_err();
        assert!(error.to_string().ends_with("404 Not Found: no such token"), "{error}");
        server.join().unwrap();
    }

    #[test]
    fn an_endless_frame_is_refused() {
        let frames = [&[0x82, 127][..], &u64::MAX.to_be_bytes()].concat();
        let (url, server) = serve(b"HTTP/1.1 101 Switching Protocols\r\n\r\n", frames);
        let mut stream = Stream::open(&url, LIMIT).unwrap();
        assert!(matches!(stream.receive(), Err(StreamError::Protocol(_))));
        drop(stream);
        server.join().unwrap();
    }
}
