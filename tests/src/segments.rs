//! Datagrams that are sent by the many in one call and cut late (`UDP_SEGMENT`, udp(7)), as QUIC servers do. Our own program
//! is both ends: on the node, and as a file in a container.

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::time::Duration;

use nix::sys::socket::{setsockopt, sockopt};

use crate::failure::{Explain, Failure, Outcome};

/// The port of a receiver in a container.
pub(crate) const PORT: u16 = 5002;

/// Datagrams in all.
pub(crate) const DATAGRAMS: u32 = BATCH * BATCHES;

/// Bytes of a datagram.
const SIZE: usize = 1000;
/// Datagrams of one call.
const BATCH: u32 = 32;
const BATCHES: u32 = 40;
/// How long a batch or its receipt may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Acts as a program in a container: `receive`, which says when it can be sent to, or `send ADDRESS`.
///
/// # Errors
/// When the datagrams do not go as they should, and for other arguments.
pub fn command(arguments: &[String]) -> Outcome {
    let words: Vec<_> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["receive"] => {
            let socket = receiver(PORT).explain(|| format!("listen on port {PORT}"))?;
            println!("listening");
            receive(&socket).explain(|| "receive".into())
        }
        ["send", address] => {
            let address = address.parse().explain(|| format!("the address {address}"))?;
            send(address, PORT).explain(|| "send".into())
        }
        _ => Err(Failure("--segments receive, or --segments send ADDRESS".into())),
    }
}

/// A socket to [`receive`] with.
///
/// # Errors
/// When the port can't be had.
pub(crate) fn receiver(port: u16) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port))?;
    socket.set_read_timeout(Some(LIMIT))?;
    Ok(socket)
}

/// Takes every datagram, and sends a receipt for each batch.
///
/// # Errors
/// When a datagram is not as it was sent, or does not come.
pub(crate) fn receive(socket: &UdpSocket) -> io::Result<()> {
    let mut buffer = [0; 2 * SIZE];
    for batch in 0..BATCHES {
        let mut missing: Vec<u32> = (batch * BATCH..(batch + 1) * BATCH).collect();
        while !missing.is_empty() {
            let (length, sender) = socket.recv_from(&mut buffer)?;
            let number = missing.iter().position(|&number| buffer[..length] == datagram(number));
            let number =
                number.ok_or_else(|| io::Error::other(format!("{length} bytes that nobody sent")))?;
            missing.swap_remove(number);
            if missing.is_empty() {
                socket.send_to(&batch.to_be_bytes(), sender)?;
            }
        }
    }
    Ok(())
}

/// Sends every datagram to a [`receive`]r.
///
/// # Errors
/// When a batch can't be sent, or no receipt comes.
pub(crate) fn send(address: Ipv4Addr, port: u16) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect((address, port))?;
    socket.set_read_timeout(Some(LIMIT))?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &(SIZE as i32))?;
    for batch in 0..BATCHES {
        let bytes: Vec<u8> = (batch * BATCH..(batch + 1) * BATCH).flat_map(datagram).collect();
        socket.send(&bytes)?;
        socket.recv(&mut [0; 4])?;
    }
    Ok(())
}

fn datagram(number: u32) -> [u8; SIZE] {
    let mut bytes = [number as u8; SIZE];
    bytes[..4].copy_from_slice(&number.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_datagram_arrives() {
        let socket = receiver(0).unwrap();
        let port = socket.local_addr().unwrap().port();
        let receiving = std::thread::spawn(move || receive(&socket));
        send(Ipv4Addr::LOCALHOST, port).unwrap();
        receiving.join().unwrap().unwrap();
    }
}
