//! A minimal gRPC client: one request message, one response message, over HTTP/2 on a Unix socket.
//!
//! That is all that containerd's API and the CRI need here; their streaming calls work the same way as long as one message goes each way.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request};
use protobuf::Message;
use tokio::net::UnixStream;

/// Response messages above this many bytes are refused; containerd's are far smaller.
const MAX_RESPONSE_BYTES: usize = 16 << 20;
/// A flag byte (compressed or not) and the message's length.
const MESSAGE_HEADER_BYTES: usize = 5;
const STATUS_OK: &str = "0";

/// What can go wrong with a call.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// The socket can't be connected to.
    #[error("cannot connect to {path}: {source}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// The HTTP/2 connection or stream failed.
    #[error("{method}: HTTP/2: {source}")]
    Http2 {
        /// The call, or what was done outside a call.
        method: String,
        /// What failed.
        source: h2::Error,
    },
    /// The request can't be put together.
    #[error("{method}: cannot build the request: {message}")]
    Request {
        /// The call.
        method: String,
        /// What is wrong with it.
        message: String,
    },
    /// The server refused the call.
    #[error("{method}: {message} (gRPC status {code})")]
    Status {
        /// The call.
        method: String,
        /// gRPC's status code, as a decimal number.
        code: String,
        /// The server's words.
        message: String,
    },
    /// The answer makes no sense.
    #[error("{method}: the answer is not a gRPC response: {message}")]
    Response {
        /// The call.
        method: String,
        /// What is wrong with it.
        message: String,
    },
    /// No answer in time.
    #[error("{method}: no answer within {} s", limit.as_secs())]
    Timeout {
        /// The call.
        method: String,
        /// How long it was waited for.
        limit: Duration,
    },
}

/// A connection to a gRPC server. Clones share it; calls may overlap.
#[derive(Clone)]
pub struct Channel {
    requests: SendRequest<Bytes>,
    /// Sent with each call.
    metadata: Vec<(&'static str, String)>,
    limit: Duration,
}

impl Channel {
    /// Connects to the server on the socket `path`. `metadata` goes with each call; each call may take `limit`.
    ///
    /// # Errors
    /// When there is no server, or it does not speak HTTP/2.
    pub async fn connect(
        path: &Path,
        metadata: Vec<(&'static str, String)>,
        limit: Duration,
    ) -> Result<Self, GrpcError> {
        let stream = UnixStream::connect(path)
            .await
            .map_err(|source| GrpcError::Connect { path: path.to_owned(), source })?;
        let (requests, connection) = h2::client::handshake(stream)
            .await
            .map_err(|source| GrpcError::Http2 { method: "connecting".to_owned(), source })?;
        // Ends when the last clone of `requests` is dropped, or with an error that every call then reports itself.
        tokio::spawn(async move {
            let _ = connection.await;
        });
        Ok(Self { requests, metadata, limit })
    }

    /// Calls `method` (`package.Service/Method`).
    ///
    /// # Errors
    /// Failure of the connection, a status other than OK, or no answer within the time limit.
    pub async fn call<Answer: Message>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Answer, GrpcError> {
        match tokio::time::timeout(self.limit, self.call_unlimited(method, request)).await {
            Ok(result) => result,
            Err(_) => Err(GrpcError::Timeout { method: method.to_owned(), limit: self.limit }),
        }
    }

    async fn call_unlimited<Answer: Message>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> Result<Answer, GrpcError> {
        let http2 = |source| GrpcError::Http2 { method: method.to_owned(), source };
        let bad_request = |message: String| GrpcError::Request { method: method.to_owned(), message };
        let mut head = Request::builder()
            .method(Method::POST)
            .uri(format!("http://localhost/{method}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in &self.metadata {
            head = head.header(*name, value);
        }
        let head = head.body(()).map_err(|error| bad_request(error.to_string()))?;
        let body = frame(request).map_err(|error| bad_request(error.to_string()))?;

        let mut requests = self.requests.clone().ready().await.map_err(http2)?;
        let (response, mut stream) = requests.send_request(head, false).map_err(http2)?;
        stream.send_data(body, true).map_err(http2)?;
        let (head, mut body) = response.await.map_err(http2)?.into_parts();
        let mut received = BytesMut::new();
        while let Some(chunk) = body.data().await {
            let chunk = chunk.map_err(http2)?;
            if received.len() + chunk.len() > MAX_RESPONSE_BYTES {
                return Err(GrpcError::Response {
                    method: method.to_owned(),
                    message: format!("it is longer than {MAX_RESPONSE_BYTES} bytes"),
                });
            }
            received.extend_from_slice(&chunk);
            body.flow_control().release_capacity(chunk.len()).map_err(http2)?;
        }
        // A server that refuses at once puts the status into the head.
        let trailers = body.trailers().await.map_err(http2)?.unwrap_or(head.headers);
        check_status(method, &trailers)?;
        unframe(&received).map_err(|message| GrpcError::Response { method: method.to_owned(), message })
    }
}

fn frame(message: &impl Message) -> protobuf::Result<Bytes> {
    let encoded = message.write_to_bytes()?;
    let mut framed = BytesMut::with_capacity(MESSAGE_HEADER_BYTES + encoded.len());
    framed.put_u8(0);
    framed.put_u32(encoded.len() as u32);
    framed.extend_from_slice(&encoded);
    Ok(framed.freeze())
}

/// The first message of a response body; further ones can only come from a streaming call.
fn unframe<Answer: Message>(body: &[u8]) -> Result<Answer, String> {
    let Some((header, rest)) = body.split_first_chunk::<MESSAGE_HEADER_BYTES>() else {
        return Err(format!("{} bytes are too few for a message", body.len()));
    };
    let [compressed, length @ ..] = *header;
    if compressed != 0 {
        return Err("it is compressed, which was not asked for".to_owned());
    }
    let length = u32::from_be_bytes(length) as usize;
    let Some(message) = rest.get(..length) else {
        return Err(format!("a message of {length} bytes ends after {}", rest.len()));
    };
    Answer::parse_from_bytes(message).map_err(|error| error.to_string())
}

fn check_status(method: &str, trailers: &HeaderMap) -> Result<(), GrpcError> {
    let text = |name| trailers.get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    match text("grpc-status") {
        Some(status) if status == STATUS_OK => Ok(()),
        Some(code) => Err(GrpcError::Status {
            method: method.to_owned(),
            code,
            message: percent_decode(&text("grpc-message").unwrap_or_default()),
        }),
        None => Err(GrpcError::Response {
            method: method.to_owned(),
            message: "it has no grpc-status".to_owned(),
        }),
    }
}

/// Undoes the percent-encoding of `grpc-message`; what is not validly encoded stays as it is.
fn percent_decode(text: &str) -> String {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, tail)) = rest.split_first() {
        let hex = tail.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        match hex.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) if byte == b'%' => {
                decoded.push(value);
                rest = &tail[2..];
            }
            _ => {
                decoded.push(byte);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{SocketAddr, UnixListener as StdListener};

    use http::Response;
    use tempfile::TempPath;
    use tokio::net::UnixListener;

    use super::*;
    use crate::proto::{ExecSyncRequest, ExecSyncResponse};

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn messages_survive_framing() {
        let message = ExecSyncResponse { exit_code: 7, ..Default::default() };
        let framed = frame(&message).unwrap();
        assert_eq!(&framed[..5], [0, 0, 0, 0, 2]);
        assert_eq!(unframe::<ExecSyncResponse>(&framed).unwrap(), message);
    }

    #[test]
    fn damaged_bodies_are_refused() {
        for (body, said) in [
            (&[][..], "too few"),
            (&[0, 0, 0][..], "too few"),
            (&[1, 0, 0, 0, 0][..], "compressed"),
            (&[0, 0xff, 0xff, 0xff, 0xff, 1][..], "ends after 1"),
        ] {
            let error = unframe::<ExecSyncResponse>(body).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }

    #[test]
    fn percent_decoding_is_lenient() {
        assert_eq!(percent_decode("a%20b%0Ac"), "a b\nc");
        assert_eq!(percent_decode("100% %zz %4"), "100% %zz %4");
    }

    /// What a test's server does with a call of a path: a framed message, silence, or a status with its message.
    type Answer = fn(&str, Bytes) -> Result<Option<Bytes>, (u16, &'static str)>;

    /// A server for one connection.
    fn serve(answer: Answer) -> TempPath {
        let bind = |path: &Path| StdListener::bind_addr(&SocketAddr::from_pathname(path)?);
        let (listener, path) = tempfile::Builder::new().make(bind).unwrap().into_parts();
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            while let Some(call) = connection.accept().await {
                let (request, mut respond) = call.unwrap();
                let (head, mut body) = request.into_parts();
                // Answers from a task of its own: the connection has to be polled while the body comes in.
                tokio::spawn(async move {
                    assert_eq!(head.headers["containerd-namespace"], "test");
                    let mut received = BytesMut::new();
                    while let Some(chunk) = body.data().await {
                        let chunk = chunk.unwrap();
                        received.extend_from_slice(&chunk);
                        body.flow_control().release_capacity(chunk.len()).unwrap();
                    }
                    let mut trailers = HeaderMap::new();
                    let mut stream = respond.send_response(Response::new(()), false).unwrap();
                    match answer(head.uri.path(), received.freeze()) {
                        Ok(Some(data)) => {
                            stream.send_data(data, false).unwrap();
                            trailers.insert("grpc-status", "0".parse().unwrap());
                        }
                        // Never answers.
                        Ok(None) => std::future::pending::<()>().await,
                        Err((code, message)) => {
                            trailers.insert("grpc-status", code.into());
                            trailers.insert("grpc-message", message.parse().unwrap());
                        }
                    }
                    stream.send_trailers(trailers).unwrap();
                });
            }
        });
        path
    }

    async fn channel(path: &Path, limit: Duration) -> Channel {
        Channel::connect(path, vec![("containerd-namespace", "test".to_owned())], limit).await.unwrap()
    }

    #[tokio::test]
    async fn a_call_carries_messages_both_ways() {
        let path = serve(|method, body| {
            assert_eq!(method, "/tasks.Tasks/Start");
            let request: ExecSyncRequest = unframe(&body).unwrap();
            let exit_code = request.container_id.len() as i32;
            Ok(Some(frame(&ExecSyncResponse { exit_code, ..Default::default() }).unwrap()))
        });
        let channel = channel(&path, LIMIT).await;
        // Far more than one flow-control window.
        for length in [1, 1 << 20] {
            let request = ExecSyncRequest { container_id: "c".repeat(length), ..Default::default() };
            let answer: ExecSyncResponse = channel.call("tasks.Tasks/Start", &request).await.unwrap();
            assert_eq!(answer.exit_code, length as i32);
        }
    }

    #[tokio::test]
    async fn a_refusal_is_reported_in_the_servers_words() {
        let path = serve(|_, _| Err((5, "no%20such task")));
        let channel = channel(&path, LIMIT).await;
        let error =
            channel.call::<ExecSyncResponse>("t.T/Start", &ExecSyncRequest::default()).await.unwrap_err();
        assert_eq!(error.to_string(), "t.T/Start: no such task (gRPC status 5)");
    }

    #[tokio::test]
    async fn silence_ends_with_the_time_limit() {
        let path = serve(|_, _| Ok(None));
        let channel = channel(&path, Duration::from_millis(50)).await;
        let error =
            channel.call::<ExecSyncResponse>("t.T/Start", &ExecSyncRequest::default()).await.unwrap_err();
        assert!(matches!(error, GrpcError::Timeout { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_missing_socket_is_named() {
        let error = Channel::connect(Path::new("/nonexistent/s"), Vec::new(), LIMIT).await.err().unwrap();
        assert!(error.to_string().starts_with("cannot connect to /nonexistent/s"), "{error}");
    }
}
