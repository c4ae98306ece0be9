//! Connections to loopback addresses of the pod's network namespace on the host: `kubectl port-forward`.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use super::{Case, Container, Environment};
use crate::bundle;
use crate::failure::{Explain, Outcome};
use crate::loopback::NetworkNamespace;
use crate::node;
use crate::process::eventually;
use crate::stdio::Streams;
use crate::{ensure, ensure_eq};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("ports-on-the-pods-loopback", loopback).bulkhead_only(),
    Case::new("ports-many-connections", many).bulkhead_only(),
    Case::new("ports-and-the-shims-death", death).bulkhead_only(),
];

/// Servers of a pod: a page on 80 of 127.0.0.1, one on 8081 of any address, one that answers when the question has ended on
/// 8082, for one client.
const SERVERS: &str = "mkdir /www; echo it works >/www/index.html; httpd -p 127.0.0.1:80 -h /www; httpd -p 8081 -h /www; \
                       nc -l -p 8082 -e /bin/sh -c 'wc -c; echo end' & echo up; exec sleep 100000";

/// How long a client waits.
const LIMIT: Duration = Duration::from_secs(10);

/// A pod with the servers, in a network namespace.
fn pod(environment: &Environment) -> Outcome<(NetworkNamespace, Container)> {
    let namespace = NetworkNamespace::new()?;
    let id = environment.id("ports");
    let mut spec = bundle::spec(&id, bundle::shell(SERVERS));
    let network = spec["linux"]["namespaces"]
        .as_array_mut()
        .and_then(|all| all.iter_mut().find(|namespace| namespace["type"] == "network"))
        .explain(|| "no network namespace in the specification".into())?;
    network["path"] = namespace.path().display().to_string().into();
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    container.stdio.stdout.until("up", LIMIT)?;
    // Ports are forwarded a little after the start.
    eventually("ports are forwarded", LIMIT, || {
        namespace.within(|| TcpStream::connect(("127.0.0.1", 80)))?.explain(|| "connect".into()).map(drop)
    })?;
    Ok((namespace, container))
}

/// Sends a question, ends it, and reads the answer to its end.
fn ask(address: &str, port: u16, question: &[u8]) -> io::Result<String> {
    let stream = asked(address, port, question)?;
    stream.shutdown(Shutdown::Write)?;
    answer(stream)
}

/// Connects and sends a question.
fn asked(address: &str, port: u16, question: &[u8]) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect((address, port))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(question)?;
    Ok(stream)
}

/// The answer to its end.
fn answer(mut stream: TcpStream) -> io::Result<String> {
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

const GET: &[u8] = b"GET /index.html HTTP/1.0\r\n\r\n";

fn loopback(environment: &mut Environment) -> Outcome<String> {
    let (namespace, container) = pod(environment)?;
    let mut took = Vec::new();
    for (address, port) in [("127.0.0.1", 80), ("127.9.8.7", 8081), ("::1", 8081)] {
        let since = Instant::now();
        let answer = namespace.within(move || ask(address, port, GET))?;
        let answer = answer.explain(|| format!("ask {address} port {port}"))?;
        ensure!(answer.ends_with("it works\n"), "{address} port {port} answered {answer:?}");
        took.push(format!("{:.2} ms", since.elapsed().as_secs_f64() * 1e3));
    }
    let question = b"x".repeat(300_000);
    let answer = namespace.within(move || ask("127.0.0.1", 8082, &question))?;
    ensure_eq!(
        answer.explain(|| "ask port 8082".into())?,
        "300000\nend\n",
        "answer after the question's end"
    );
    // Nobody listens on the port, or somebody on another address only.
    for (address, port) in [("127.0.0.1", 9), ("::1", 9), ("127.0.0.2", 80), ("::1", 80)] {
        let refused = namespace.within(move || TcpStream::connect((address, port)).map(drop))?;
        ensure_eq!(
            refused.map_err(|error| error.kind()),
            Err(io::ErrorKind::ConnectionRefused),
            "{address} port {port}, without a server"
        );
    }
    let log = container.shim.log.until("", Duration::ZERO).unwrap_or_default();
    ensure!(!log.contains("level=warn"), "the shim's log has warnings: {log}");
    container.finish()?;
    Ok(format!("a page three times ({}), half-closed connections, four refusals", took.join(", ")))
}

fn many(environment: &mut Environment) -> Outcome<String> {
    const COUNT: usize = 150;
    let (namespace, container) = pod(environment)?;
    let since = Instant::now();
    let answered = namespace.within(|| {
        // All at once: more than are carried at a time.
        let client = || asked("127.0.0.1", 80, GET).and_then(answer);
        let clients: Vec<_> = (0..COUNT).map(|_| thread::spawn(client)).collect();
        let answers = clients.into_iter().filter_map(|client| client.join().ok()?.ok());
        answers.filter(|answer| answer.ends_with("it works\n")).count()
    })?;
    ensure_eq!(answered, COUNT, "answers");
    let took = since.elapsed();
    container.finish()?;
    Ok(format!("{COUNT} at once were answered in {:.3} s", took.as_secs_f64()))
}

/// What forwards is the shim's alone: nothing of it is in the namespace, or anywhere, once the shim is dead.
fn death(environment: &mut Environment) -> Outcome<String> {
    let (namespace, container) = pod(environment)?;
    let shim = container.shim.pid()?;
    node::kill_hard(shim)?;
    eventually("connections are refused", LIMIT, || {
        let refused = namespace.within(|| TcpStream::connect(("127.0.0.1", 80)))?;
        ensure_eq!(
            refused.map(drop).map_err(|error| error.kind()),
            Err(io::ErrorKind::ConnectionRefused),
            "connection after the shim's death"
        );
        Ok(())
    })?;
    environment.host()?.delete(&container.bundle)?;
    container.bundle.remove()?;
    Ok("killed, and connections are refused as if it had never been".into())
}
