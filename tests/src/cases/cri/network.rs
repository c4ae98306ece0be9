//! The pod network: what CNI gave a pod's network namespace on the node is what its containers have.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::thread;
use std::time::Duration;

use bulkhead_cri::proto;
use bulkhead_cri::stream::Stream;

use crate::cases::Environment;
use crate::cri::{CALL_LIMIT, Container, GATEWAY, Handler, Node, Pod, http_get as get};
use crate::failure::{Explain, Outcome};
use crate::{ensure, ensure_eq};

/// A server of files: its name, and 3 MiB that can be told from any other.
const SERVER: &str =
    "mkdir /www; hostname >/www/name; seq 1 450000 >/www/much; echo serving; exec httpd -f -p 80 -h /www";

/// The length of `/www/much`, and the sum of its bytes.
fn much() -> (usize, u64) {
    let (mut length, mut sum, mut number) = (0, 0, 1_u64);
    while number <= 450_000 {
        let mut rest = number;
        while rest > 0 {
            length += 1;
            sum += b'0' as u64 + rest % 10;
            rest /= 10;
        }
        length += 1;
        sum += b'\n' as u64;
        number += 1;
    }
    (length, sum)
}

/// Starts a pod with a container that serves.
fn serving<'a>(
    node: &'a Node,
    handler: Handler,
    name: &str,
    configure: impl FnOnce(&mut proto::PodSandboxConfig),
) -> Outcome<(Pod<'a>, Container<'a>)> {
    let pod = Pod::run(node, handler, name, configure)?;
    let server = pod.start("server", SERVER, |_| {})?;
    server.wait_for_output("serving")?;
    Ok((pod, server))
}

fn expect_much(bytes: &[u8]) -> Outcome {
    let sum: u64 = bytes.iter().map(|&byte| u64::from(byte)).sum();
    ensure_eq!((bytes.len(), sum), much(), "bytes and their sum");
    Ok(())
}

/// Addresses, routes and interfaces: exactly those of the pod's network namespace, as a pod of runc has them.
pub(crate) fn addresses(environment: &mut Environment) -> Outcome<String> {
    const SHOW: &str = "ip -o addr show | awk '{ print $2, $3, $4 }' | sort; ip route show | sort; ip -6 route show | grep -v fe80 | \
        awk '{ print $1, $2, $3, $4, $5 }' | sort; cat /sys/class/net/eth0/mtu; ls /sys/class/net";
    let ask = |handler: Handler| -> Outcome<(String, String)> {
        let pod = environment.shared_pod(handler)?;
        let said = pod.run_script("looks", SHOW, |_| {})?.success()?;
        let status = pod.status()?;
        let own = &status.network.ip;
        ensure!(said.contains(own.as_str()), "the pod's address {own} is not inside: {said:?}");
        let mut same = said.replace(own.as_str(), "IPV4");
        for (name, ip) in status.network.additional_ips.iter().map(|ip| ("IPV6", &ip.ip)) {
            ensure!(said.contains(ip.as_str()), "the pod's address {ip} is not inside: {said:?}");
            same = same.replace(ip.as_str(), name);
        }
        // Link-local addresses come from the MAC addresses, which differ.
        let same = same.lines().filter(|line| !line.contains("fe80:")).collect::<Vec<_>>().join("\n");
        Ok((same, own.clone()))
    };
    let (right, _) = ask(Handler::Runc)?;
    let (answer, own) = ask(environment.handler())?;
    ensure_eq!(answer, right, "addresses and routes, and runc's");
    Ok(format!("{own}, {} lines as with runc", right.lines().count()))
}

/// The node reaches a pod and a pod the node, over both kinds of addresses, with little and much, by TCP and UDP.
pub(crate) fn host(environment: &mut Environment) -> Outcome<String> {
    let (pod, server) = serving(environment.node()?, environment.handler(), "served", |_| {})?;
    let network = pod.status()?.network.unwrap_or_default();
    ensure_eq!(get(&format!("{}:80", network.ip), "/name")?, b"served\n", "over IPv4");
    let ipv6 = network.additional_ips.first().explain(|| "no IPv6 address".into())?.ip.clone();
    ensure_eq!(get(&format!("[{ipv6}]:80"), "/name")?, b"served\n", "over IPv6");
    expect_much(&get(&format!("{}:80", network.ip), "/much")?)?;

    // From inside: a server of ours that counts what comes.
    let listener = TcpListener::bind((GATEWAY, 0)).explain(|| "listen".into())?;
    let port = listener.local_addr().explain(|| "own port".into())?.port();
    let counted = thread::spawn(move || -> std::io::Result<(Vec<u8>, SocketAddr)> {
        let (mut connection, peer) = listener.accept()?;
        connection.set_read_timeout(Some(CALL_LIMIT))?;
        let mut received = Vec::new();
        connection.read_to_end(&mut received)?;
        Ok((received, peer))
    });
    server.exec(&format!("nc {GATEWAY} {port} </www/much"))?.success()?;
    let received = counted.join().ok().explain(|| "the counting thread".into())?;
    let (received, peer) = received.explain(|| "receive from the pod".into())?;
    expect_much(&received)?;
    ensure_eq!(peer.ip().to_string(), network.ip, "the address that the pod is seen with");

    let socket = UdpSocket::bind((GATEWAY, 0)).explain(|| "a UDP socket".into())?;
    socket.set_read_timeout(Some(CALL_LIMIT)).explain(|| "a time limit".into())?;
    let port = socket.local_addr().explain(|| "own port".into())?.port();
    let answered = thread::spawn(move || -> std::io::Result<()> {
        let mut buffer = [0; 2000];
        // TFTP: a request for a file, and its first block, which is the last as it is short.
        let (_, peer) = socket.recv_from(&mut buffer)?;
        socket.send_to(b"\x00\x03\x00\x01by UDP\n", peer).map(drop)
    });
    let said = server.exec(&format!("tftp -g -r name -l - {GATEWAY} {port}"))?;
    answered.join().ok().explain(|| "the answering thread".into())?.explain(|| "UDP with the pod".into())?;
    ensure_eq!(said.stdout, "by UDP\n", "UDP");
    let pinged = server.exec(&format!("ping -c 2 -i 0.2 -W 5 {GATEWAY}"))?;
    ensure!(pinged.stdout.contains("2 packets received"), "{pinged:?}");
    pod.finish()?;
    Ok(format!("{} bytes each way, IPv4, IPv6, UDP, ping", much().0))
}

/// Pods reach each other, whatever runs them; the containers of a pod share its loopback, and no other pod's.
pub(crate) fn pods(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let (first, server) = serving(node, environment.handler(), "first", |_| {})?;
    let (second, beside) = serving(node, environment.handler(), "second", |_| {})?;
    let (foreign, outside) = serving(node, Handler::Runc, "foreign", |_| {})?;
    let fetch = |from: &Container<'_>, to: &Pod<'_>| -> Outcome<String> {
        let url = format!("http://{}/", to.address()?);
        from.exec(&format!("wget -qO- {url}name; wget -qO- {url}much | wc -c"))?.success()
    };
    for (from, to, name) in [
        (&server, &second, "second"),
        (&beside, &first, "first"),
        (&server, &foreign, "foreign"),
        (&outside, &first, "first"),
        (&server, &first, "first"),
    ] {
        ensure_eq!(fetch(from, to)?, format!("{name}\n{}\n", much().0), "from the pod {name}");
    }
    let loopback = first.run_script("same", "wget -qO- http://127.0.0.1/name", |_| {})?;
    ensure_eq!(loopback.stdout, "first\n", "over the pod's loopback");
    server.stop(Duration::ZERO)?;
    let refused = first.run_script("none", "wget -qO- http://127.0.0.1/name", |_| {})?;
    ensure!(
        refused.code != 0 && refused.stderr.contains("refused"),
        "another pod's loopback answered: {refused:?}"
    );
    for pod in [first, second, foreign] {
        pod.finish()?;
    }
    Ok("each way between two of ours and one of runc's; loopback shared within the pod only".into())
}

/// A port of the node leads to the pod, from the node itself and from another pod.
pub(crate) fn host_port(environment: &mut Environment) -> Outcome<String> {
    const PORT: i32 = 18080;
    if !["/usr/sbin/iptables", "/sbin/iptables"].iter().any(|path| Path::new(path).exists()) {
        return Ok("SKIPPED: the portmap plugin needs iptables, which this machine has not".into());
    }
    let node = environment.node()?;
    let (pod, _) = serving(node, environment.handler(), "mapped", |config| {
        config.port_mappings = vec![proto::PortMapping {
            protocol: proto::Protocol::TCP.into(),
            container_port: 80,
            host_port: PORT,
            ..Default::default()
        }];
    })?;
    ensure_eq!(get(&format!("127.0.0.1:{PORT}"), "/name")?, b"mapped\n", "over the node's loopback");
    ensure_eq!(get(&format!("{GATEWAY}:{PORT}"), "/name")?, b"mapped\n", "over the node's address");
    let other = Pod::run(node, environment.handler(), "asks", |_| {})?;
    let said = other.run_script("asks", &format!("wget -qO- http://{GATEWAY}:{PORT}/name"), |_| {})?;
    ensure_eq!(said.success()?, "mapped\n", "from another pod");
    other.finish()?;
    pod.finish()?;
    ensure!(TcpStream::connect(("127.0.0.1", PORT as u16)).is_err(), "the port is still open");
    Ok(format!("{PORT} of the node leads to 80 of the pod, and is closed with it"))
}

/// The kubelet's port-forward: to a server on all addresses, to one on the pod's loopback only, and to nobody.
pub(crate) fn port_forward(environment: &mut Environment) -> Outcome<String> {
    let node = environment.node()?;
    let refused = |handler: Handler| -> Outcome<String> {
        let (pod, _) = serving(node, handler, "forwarded", |_| {})?;
        let inner = pod.start(
            "inner",
            "echo inner >/name; httpd -p 127.0.0.1:8081 -h /; echo up; exec sleep 100000",
            |_| {},
        )?;
        inner.wait_for_output("up")?;
        for (port, path, expected) in [(80, "/name", "forwarded\n"), (8081, "/name", "inner\n")] {
            let answer = forwarded(node, &pod, port, path)?;
            ensure!(answer.ends_with(expected), "port {port}: {answer:?}");
        }
        let body = forwarded(node, &pod, 80, "/much")?;
        ensure!(body.len() > much().0, "{} bytes of {}", body.len(), much().0);
        let refused = forwarded(node, &pod, 9, "/")?.replace(&pod.known.id, "POD");
        let known =
            |word: &str| if word.contains("/cni-") { "NAMESPACE:".to_owned() } else { word.to_owned() };
        let refused = refused.split(' ').map(known).collect::<Vec<_>>().join(" ");
        ensure!(refused.contains("refused"), "a port that nobody listens on: {refused:?}");
        pod.finish()?;
        Ok(refused)
    };
    let right = refused(Handler::Runc)?;
    ensure_eq!(refused(environment.handler())?, right, "a port that nobody listens on, and with runc");
    let length = much().0;
    Ok(format!("to all addresses, to the pod's loopback, {length} bytes; nobody listens: {}", right.trim()))
}

/// What an HTTP request gets over the kubelet's port-forward: the answer, or the words of its error channel.
fn forwarded(node: &Node, pod: &Pod<'_>, port: i32, path: &str) -> Outcome<String> {
    let request = proto::PortForwardRequest {
        pod_sandbox_id: pod.known.id.clone(),
        port: vec![port],
        ..Default::default()
    };
    let url = node.client().port_forward(&request).explain(|| "port-forward".into())?.url;
    let mut stream = Stream::open(&url, CALL_LIMIT)?;
    stream.send(0, format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())?;
    let mut channels = [Vec::new(), Vec::new()];
    while let Some((channel, data)) = stream.receive()? {
        channels[usize::from(channel.min(1))].extend_from_slice(&data);
    }
    // The first message of either names the port.
    let [data, error] =
        channels.map(|bytes| String::from_utf8_lossy(bytes.get(2..).unwrap_or_default()).into_owned());
    Ok(data + &error)
}
