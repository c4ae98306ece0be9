//! What a pod serves.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use super::CALL_LIMIT;
use crate::ensure;
use crate::failure::{Explain, Outcome};
use crate::process::eventually;

/// The body of the answer to an HTTP request for `path` at `address` (host and port).
///
/// # Errors
/// When nobody answers in time, or not with success.
pub fn http_get(address: &str, path: &str) -> Outcome<Vec<u8>> {
    let address: SocketAddr = address.parse().explain(|| format!("address {address:?}"))?;
    let answer = eventually(&format!("an answer of {address}"), CALL_LIMIT, || {
        let what = || format!("http://{address}{path}");
        let mut connection = TcpStream::connect_timeout(&address, CALL_LIMIT).explain(what)?;
        connection.set_read_timeout(Some(CALL_LIMIT)).explain(what)?;
        write!(connection, "GET {path} HTTP/1.0\r\n\r\n").explain(what)?;
        let mut answer = Vec::new();
        connection.read_to_end(&mut answer).explain(what)?;
        Ok(answer)
    })?;
    let end = answer
        .windows(4)
        .position(|part| part == b"\r\n\r\n")
        .explain(|| format!("no HTTP answer of {address}"))?;
    let head = String::from_utf8_lossy(&answer[..end]);
    ensure!(head.starts_with("HTTP/1.") && head.split(' ').nth(1) == Some("200"), "{head}");
    Ok(answer[end + 4..].to_vec())
}
