//! The host's connections to TCP ports of the guest: `kubectl port-forward`.
//!
//! The server may listen on a loopback address only, so this is where the connection has to come from.

use std::io;
use std::time::Duration;

use bulkhead_agent_protocol::forward::{CONNECTED, LoopbackPort};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::Connection;
use super::copy::copy_both_ways;

/// How long a server may leave a connection unanswered.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// Carries a connection of the host to the port, to its end. That it can't be reached shows by the early end.
pub(super) async fn serve(host: Connection, port: LoopbackPort) {
    let server = match connect(port).await {
        Ok(server) => server,
        Err(error) => {
            log::debug!("{}: {error}", port.address());
            return;
        }
    };
    let carried = async {
        host.write_all(&[CONNECTED]).await?;
        copy_both_ways(&host, &server).await
    };
    if let Err(error) = carried.await {
        log::debug!("a connection to {} was cut off: {error}", port.address());
    }
}

async fn connect(port: LoopbackPort) -> io::Result<Connection> {
    let stream = timeout(CONNECT_LIMIT, TcpStream::connect(port.address())).await??;
    // What comes in pieces has been waited for already.
    stream.set_nodelay(true)?;
    Connection::new(stream.into_std()?.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn host() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (Connection::new(ours.into()).unwrap(), theirs)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn each_direction_has_an_end_of_its_own() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = LoopbackPort::new(listener.local_addr().unwrap()).unwrap();
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            client.read_to_end(&mut asked).unwrap();
            // The request has ended; the answer has not begun.
            client.write_all(&asked.repeat(20_000)).unwrap();
        });
        let (ours, mut theirs) = host();
        let client = std::thread::spawn(move || {
            theirs.write_all(b"question").unwrap();
            theirs.shutdown(Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            theirs.read_to_end(&mut answer).unwrap();
            answer
        });
        serve(ours, port).await;
        let answer = client.join().unwrap();
        assert_eq!(answer.first(), Some(&CONNECTED));
        assert!(answer[1..] == *b"question".repeat(20_000), "{} bytes", answer.len());
        server.join().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_port_without_a_server_ends_the_stream() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut address = listener.local_addr().unwrap();
        // The right port of another address.
        address.set_ip("127.0.0.2".parse().unwrap());
        let (ours, mut theirs) = host();
        serve(ours, LoopbackPort::new(address).unwrap()).await;
        let mut answer = Vec::new();
        theirs.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"");
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn half_a_connection_does_not_stay_for_ever() {
        let (ours, theirs) = host();
        let (server, server_end) = host();
        theirs.shutdown(Shutdown::Write).unwrap();
        let error = copy_both_ways(&ours, &server).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(server_end);
    }
}
