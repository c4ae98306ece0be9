//! Networks of pods: what CNI plugins put into a pod's network namespace is what its containers have.

use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Case, Container, Environment, Runtime};
use crate::bundle;
use crate::failure::{Explain, Failure, Outcome};
use crate::netns::{Namespace, Network};
use crate::node;
use crate::process::{eventually, run};
use crate::segments;
use crate::shim::{CALL_LIMIT, CreateOptions};
use crate::stdio::Streams;
use crate::{ensure, ensure_eq, fail};

/// The cases of this theme.
pub(crate) const CASES: &[Case] = &[
    Case::new("network-none", none),
    Case::new("network-bridge", |e| bridge(e, 1)),
    Case::new("cold-network-bridge", |e| bridge(e, 1)).cold(),
    Case::new("network-two-vcpus", |e| bridge(e, 2)).bulkhead_only(),
    Case::new("network-ptp-and-a-second-interface", two_interfaces),
    Case::new("network-macvlan", |e| above_a_link(e, "macvlan", "bridge")),
    Case::new("network-ipvlan", |e| above_a_link(e, "ipvlan", "l2")),
    Case::new("network-ipvlan-that-routes-is-refused", routed_ipvlan).bulkhead_only(),
    Case::new("network-segments-of-udp", segments_of_udp),
    Case::new("network-pod-to-pod", pod_to_pod),
    Case::new("network-spoofed-sources-stay-inside", spoofed).bulkhead_only(),
    Case::new("network-death-of-the-shim", death_of_the_shim),
    Case::new("network-death-of-the-vmm", death_of_the_vmm).bulkhead_only(),
    Case::new("network-interface-goes-away", interface_goes_away),
    Case::new("network-wrong-namespaces-are-refused", refused).bulkhead_only(),
];

/// How long a packet may take.
const PACKET: &str = "-c 1 -W 3";

fn specification(id: &str, namespace: &Namespace, script: &str) -> Value {
    let mut spec = bundle::spec(id, bundle::shell(script));
    let path = namespace.path();
    spec["linux"]["namespaces"] = json!([{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" },
                                         { "type": "network", "path": path }]);
    spec
}

fn network(environment: &Environment, number: u8, mtu: u32) -> Outcome<Network> {
    Ok(Network::bridge(environment.host()?.path(), number, mtu))
}

/// What a namespace has, in words that do not depend on who tells: busybox inside, maybe another `ip` outside.
const LOOK: &str = r"ip link | sed -n 's/^[0-9]*: \([^:@]*\).* mtu \([0-9]*\).*/\1 mtu \2/p; s/.*link.ether \([^ ]*\).*/\1/p';
    ip addr | grep -o 'inet6* [^ ]*' | sort;
    ip route | sed 's/ proto [a-z]*//; s/  */ /g; s/ *$//' | sort;
    ip -6 route | grep -o '^[^ ]* \(via [^ ]* \)*dev [^ ]*' | grep -v -e ^unreachable -e ^ff00 -e 'dev lo' | sort -u;";

fn look(namespace: &Namespace) -> Outcome<String> {
    namespace.run(LOOK)
}

/// A container that runs, of a pod with a configuration of its own.
pub(super) fn started_with(
    environment: &Environment,
    id: &str,
    spec: &Value,
    config: &str,
) -> Outcome<Container> {
    let host = environment.host()?;
    let file = host.path().join(format!("{id}.toml"));
    std::fs::write(&file, config).explain(|| format!("write {}", file.display()))?;
    let bundle = host.bundle(id, spec)?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    shim.create(&stdio, CreateOptions { config: Some(&file), ..CreateOptions::default() })?;
    shim.start("")?;
    Ok(Container { bundle, shim, stdio })
}

fn none(environment: &mut Environment) -> Outcome<String> {
    let output = environment.run_script("none", "ls /sys/class/net; ip addr | grep -c inet")?.success()?;
    ensure_eq!(output, "lo\n2\n", "interfaces and addresses");
    Ok("loopback only".into())
}

fn ping(address: &str) -> String {
    format!("ping {PACKET} {address} >/dev/null && echo reached {address}")
}

fn bridge(environment: &mut Environment, vcpus: u8) -> Outcome<String> {
    let network = network(environment, 71, 1450)?;
    let id = environment.id("bridge");
    let mut namespace = Namespace::new(&id)?;
    let [v4, v6] = namespace.add(&network, "eth0")?;
    let before = look(&namespace)?;
    ensure!(before.contains("1450") && before.contains(&v4), "the namespace: {before}");
    let mut spec = specification(&id, &namespace, "sleep 100000");
    spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "7" });
    let container = if vcpus > 1 {
        started_with(environment, &id, &spec, &format!("vcpus = {vcpus}\ntemplates = \"off\"\n"))?
    } else {
        let container = environment.created(&id, &spec, Streams::default())?;
        container.shim.start("")?;
        container
    };
    let inside = container.exec_script("look", LOOK)?.success()?;
    ensure_eq!(inside, before, "what the container sees of its network");
    let script = format!(
        "{} && {} && cat /proc/sys/net/ipv4/ip_unprivileged_port_start",
        ping("10.71.0.1"),
        ping("fd00:71::1")
    );
    let reached = container.exec_script("ping", &script)?.success()?;
    ensure_eq!(reached, "reached 10.71.0.1\nreached fd00:71::1\n7\n", "the gateway, and a sysctl");
    for address in [&v4, &v6] {
        let output = run(Command::new("ping").args(["-c", "3", "-s", "1400", address]), b"", CALL_LIMIT)?;
        output.success(&format!("ping {address} from the node"))?;
    }
    let took = if environment.runtime == Runtime::Bulkhead { start_took(&container)? } else { String::new() };
    container.finish()?;
    ensure_eq!(look(&namespace)?, before, "the namespace after the pod");
    Ok(format!("{took}{}", inside.lines().collect::<Vec<_>>().join("; ")))
}

/// What the network cost the pod's start, of the shim's own account.
fn start_took(container: &Container) -> Outcome<String> {
    let log = container.shim.log.until("timeline id=", CALL_LIMIT)?;
    let at = |phase: &str| -> Outcome<u64> {
        let after = log.split_once(&format!(" {phase}=")).map(|(_, after)| after);
        let digits = after.and_then(|after| after.split([' ', '\n', '"']).next());
        digits
            .and_then(|digits| digits.parse().ok())
            .explain(|| format!("no {phase} in the timeline: {log:?}"))
    };
    let (begin, configured, connected) = (at("containerd")?, at("configure")?, at("network")?);
    Ok(format!("{} us of {} us until then; ", connected - configured, connected - begin))
}

fn two_interfaces(environment: &mut Environment) -> Outcome<String> {
    let ptp = Network::ptp(environment.host()?.path(), 72);
    let bridge = network(environment, 73, 1500)?;
    let id = environment.id("two");
    let mut namespace = Namespace::new(&id)?;
    namespace.add(&ptp, "eth0")?;
    // The second network of a pod does not take the default route.
    let [second, _] = match namespace.add(&bridge, "net1") {
        Ok(addresses) => addresses,
        Err(failure) => fail!("add a second interface: {}", failure.0),
    };
    let before = look(&namespace)?;
    let script = format!("{LOOK} {}; {}", ping("10.72.0.1"), ping("10.73.0.1"));
    let inside = environment.run_to_end(&id, &specification(&id, &namespace, &script))?.success()?;
    ensure_eq!(
        inside,
        format!("{before}reached 10.72.0.1\nreached 10.73.0.1\n"),
        "two interfaces, and their gateways"
    );
    Ok(format!("eth0 as ptp makes it, net1 {second} on a bridge"))
}

/// Two interfaces above one link of the node: the pod's, and another namespace's.
fn above_a_link(environment: &mut Environment, kind: &str, mode: &str) -> Outcome<String> {
    let network = Network::above_a_link(environment.host()?.path(), 78, kind, mode)?;
    let id = environment.id(kind);
    let mut other = Namespace::new(&format!("{id}-other"))?;
    let [other_v4, other_v6] = other.add(&network, "eth0")?;
    let mut namespace = Namespace::new(&id)?;
    let [v4, v6] = namespace.add(&network, "eth0")?;
    let before = look(&namespace)?;
    let container =
        environment.created(&id, &specification(&id, &namespace, "sleep 100000"), Streams::default())?;
    container.shim.start("")?;
    let script = format!("{LOOK} {}; {}", ping(&other_v4), ping(&other_v6));
    let inside = container.exec_script("look", &script)?.success()?;
    let reached = format!("reached {other_v4}\nreached {other_v6}\n");
    ensure_eq!(inside, format!("{before}{reached}"), "what the container sees and reaches");
    let from_outside = other.run(&format!("{}; {}", ping(&v4), ping(&v6)))?;
    ensure_eq!(from_outside, format!("reached {v4}\nreached {v6}\n"), "what the other namespace reaches");
    container.finish()?;
    ensure_eq!(look(&namespace)?, before, "the namespace after the pod");
    Ok(format!("{v4} and {v6} by {kind} reach another namespace, and it them"))
}

fn routed_ipvlan(environment: &mut Environment) -> Outcome<String> {
    let network = Network::above_a_link(environment.host()?.path(), 79, "ipvlan", "l3")?;
    let id = environment.id("routed");
    let mut namespace = Namespace::new(&id)?;
    namespace.add(&network, "eth0")?;
    let host = environment.host()?;
    let bundle = host.bundle(&id, &specification(&id, &namespace, "true"))?;
    let shim = host.start(&bundle)?;
    let stdio = shim.stdio("init", Streams::default())?;
    let created = shim.create(&stdio, CreateOptions::default());
    Container { bundle, shim, stdio }.release()?;
    let Err(error) = created else { fail!("a pod was made on an ipvlan interface that routes") };
    ensure!(error.to_string().contains("with mode l2 it would be possible"), "the error: {error}");
    Ok(error.to_string())
}

/// What a QUIC server does: many datagrams by one call. They cross the boundary as one packet where the kernel can.
fn segments_of_udp(environment: &mut Environment) -> Outcome<String> {
    const GATEWAY: &str = "10.80.0.1";
    let network = network(environment, 80, 1500)?;
    let id = environment.id("segments");
    let mut namespace = Namespace::new(&id)?;
    let [address, _] = namespace.add(&network, "eth0")?;
    let mut spec = specification(&id, &namespace, "sleep 100000");
    let program = std::env::current_exe().explain(|| "the program that this is".into())?;
    bundle::add(&mut spec["mounts"], bundle::bind(&program, "/segments", &["ro"]));
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    let at_the_node = || {
        packets(&std::fs::read_to_string("/proc/self/net/dev").explain(|| "interfaces".into())?, "bhtest80")
    };
    let in_the_pod = |when| packets(&container.exec_script(when, "cat /proc/net/dev")?.success()?, "eth0");

    let socket = segments::receiver(segments::PORT).explain(|| "listen on the node".into())?;
    let receiving = std::thread::spawn(move || segments::receive(&socket));
    let before = at_the_node()?;
    container.exec_script("send", &format!("/segments --segments send {GATEWAY}"))?.success()?;
    receiving
        .join()
        .map_err(|_| Failure("the receiver panicked".into()))?
        .explain(|| "receive on the node".into())?;
    let from_pod = at_the_node()? - before;

    let process = bundle::process(&["/segments", "--segments", "receive"]);
    let stdio = container.exec("receive", &process, Streams::default())?;
    stdio.stdout.until("listening", CALL_LIMIT)?;
    let before = in_the_pod("before")?;
    let server = address.parse().explain(|| format!("the pod's address {address}"))?;
    segments::send(server, segments::PORT).explain(|| "send to the pod".into())?;
    let status = container.shim.wait("receive", CALL_LIMIT)?.exit_status;
    ensure_eq!((status, stdio.stderr.to_end(CALL_LIMIT)?.as_str()), (0, ""), "the receiver in the pod");
    container.shim.delete("receive")?;
    let to_pod = in_the_pod("after")? - before;
    container.finish()?;

    let datagrams = segments::DATAGRAMS;
    let told = format!("{datagrams} datagrams: {from_pod} packets from the pod, {to_pod} to it");
    if node::kernel_is_at_least(6, 2)? {
        ensure!(from_pod < datagrams / 8 && to_pod < datagrams / 8, "not in large packets: {told}");
        return Ok(told);
    }
    Ok(told + "; large packets need Linux 6.2 on the node")
}

/// How many packets came in by an interface, of the words of `/proc/net/dev`.
fn packets(text: &str, interface: &str) -> Outcome<u32> {
    let line = text.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':'));
    let count = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
    count.explain(|| format!("no packets of {interface}: {text}"))
}

fn pod_to_pod(environment: &mut Environment) -> Outcome<String> {
    let network = network(environment, 74, 1500)?;
    let (server_id, client_id) = (environment.id("server"), environment.id("client"));
    let mut server_namespace = Namespace::new(&server_id)?;
    let [server, _] = server_namespace.add(&network, "eth0")?;
    let mut client_namespace = Namespace::new(&client_id)?;
    client_namespace.add(&network, "eth0")?;
    let script =
        "dd if=/dev/zero of=/big bs=1M count=4 2>/dev/null; echo hello >/index.html; httpd -f -p 80 -h /";
    let spec = specification(&server_id, &server_namespace, script);
    let container = environment.created(&server_id, &spec, Streams::default())?;
    container.shim.start("")?;
    let fetch = format!(
        "for i in 1 2 3 4 5 6 7 8 9; do wget -q -O - http://{server}/ && break; sleep 1; done; wget -q -O - http://{server}/big | wc -c"
    );
    let spec = specification(&client_id, &client_namespace, &fetch);
    let output = environment.run_to_end(&client_id, &spec)?.success()?;
    ensure_eq!(output, "hello\n4194304\n", "what another pod fetched");
    let output = run(
        Command::new("wget").args(["-q", "-O", "-", &format!("http://{server}/index.html")]),
        b"",
        CALL_LIMIT,
    )?;
    ensure_eq!(output.success("wget from the node")?.stdout, "hello\n", "what the node fetched");
    container.finish()?;
    Ok(format!("{server} served 4 MiB to another pod, and the node"))
}

/// A pod that may change its interface, with an address that is not its own.
fn spoofed(environment: &mut Environment) -> Outcome<String> {
    let network = network(environment, 75, 1500)?;
    for check in [true, false] {
        let id = environment.id("spoof");
        let mut namespace = Namespace::new(&id)?;
        namespace.add(&network, "eth0")?;
        let script = format!(
            "{}; ip addr add 10.75.0.99/24 dev eth0; ping {PACKET} -I 10.75.0.99 10.75.0.1 >/dev/null; echo address $?; \
             ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up; \
             ping {PACKET} 10.75.0.1 >/dev/null; echo mac $?",
            ping("10.75.0.1")
        );
        let mut spec = specification(&id, &namespace, &script);
        for set in ["bounding", "effective", "permitted"] {
            bundle::add(&mut spec["process"]["capabilities"][set], "CAP_NET_ADMIN".into());
        }
        let container = started_with(environment, &id, &spec, &format!("spoof_check = {check}\n"))?;
        container.shim.wait("", CALL_LIMIT)?;
        let output = container.stdio.stdout.to_end(CALL_LIMIT)?;
        container.finish()?;
        let wanted = if check { "address 1\nmac 1\n" } else { "address 0\nmac 0\n" };
        ensure_eq!(output, format!("reached 10.75.0.1\n{wanted}"), "with spoof_check = {check}");
    }
    Ok("another address and another MAC reach nobody, unless spoof_check is off".into())
}

/// What the namespace has to be after a pod that did not end in order: as CNI left it.
fn expect_as_before(namespace: &Namespace, before: &str, address: &str) -> Outcome {
    eventually("the namespace is as it was", Duration::from_secs(10), || {
        ensure_eq!(look(namespace)?, before, "the namespace");
        Ok(())
    })?;
    // What the node sends comes to the namespace itself again.
    let output = run(Command::new("ping").args(["-c", "1", "-W", "3", address]), b"", CALL_LIMIT)?;
    output.success("ping the namespace").map(drop)
}

fn running(environment: &Environment) -> Outcome<(Network, Namespace, String, String, Container)> {
    let network = network(environment, 76, 1500)?;
    let id = environment.id("death");
    let mut namespace = Namespace::new(&id)?;
    let [address, _] = namespace.add(&network, "eth0")?;
    let before = look(&namespace)?;
    let spec = specification(&id, &namespace, "sleep 100000");
    let container = environment.created(&id, &spec, Streams::default())?;
    container.shim.start("")?;
    Ok((network, namespace, address, before, container))
}

fn death_of_the_shim(environment: &mut Environment) -> Outcome<String> {
    let (_network, namespace, address, before, container) = running(environment)?;
    let shim = container.shim.pid()?;
    node::kill_hard(shim)?;
    environment.host()?.delete(&container.bundle)?;
    expect_as_before(&namespace, &before, &address)?;
    container.bundle.remove()?;
    Ok("nothing of the pod is left in its namespace".into())
}

fn death_of_the_vmm(environment: &mut Environment) -> Outcome<String> {
    let (_network, namespace, address, before, container) = running(environment)?;
    let vmm = node::descendants(container.shim.pid()?, "bulkhead-vmm");
    let [vmm] = &vmm[..] else { fail!("the VMMs: {vmm:?}") };
    node::kill_hard(vmm.pid)?;
    container.shim.wait("", CALL_LIMIT)?;
    expect_as_before(&namespace, &before, &address)?;
    container.finish()?;
    Ok("nothing of the pod is left in its namespace".into())
}

fn interface_goes_away(environment: &mut Environment) -> Outcome<String> {
    let (_network, namespace, _, _, container) = running(environment)?;
    namespace.run("ip link del eth0")?;
    let output =
        container.exec_script("after", &format!("ping {PACKET} 10.76.0.1 >/dev/null; echo alive"))?;
    ensure_eq!(output.stdout, "alive\n", "the pod");
    container.finish()?;
    Ok("the pod goes on without its interface".into())
}

fn refused(environment: &mut Environment) -> Outcome<String> {
    let mut errors = Vec::new();
    // The suite has a node's network of its own, and its shims are on that node.
    let hosts = format!("/proc/{}/ns/net", std::process::id());
    for (path, words) in [
        ("/run/netns/of-nobody", "can't open the pod's network namespace /run/netns/of-nobody"),
        ("/dev/null", "/dev/null is no network namespace"),
        (hosts.as_str(), "host network is not possible"),
    ] {
        let id = environment.id("refused");
        let mut spec = bundle::spec(&id, bundle::process(&["true"]));
        spec["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "network", "path": path }]);
        let host = environment.host()?;
        let bundle = host.bundle(&id, &spec)?;
        let shim = host.start(&bundle)?;
        let stdio = shim.stdio("init", Streams::default())?;
        let created = shim.create(&stdio, CreateOptions::default());
        Container { bundle, shim, stdio }.release()?;
        let Err(error) = created else { fail!("a pod was made in {path}") };
        ensure!(error.to_string().contains(words), "the error for {path}: {error}");
        errors.push(error.to_string());
    }
    debug_assert_eq!(environment.runtime, Runtime::Bulkhead);
    Ok(errors.join("; "))
}
