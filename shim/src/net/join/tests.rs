//! Against the kernel, each test in network namespaces of its own (as root).

use std::fs::File;
use std::io::{Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use bulkhead_netlink::{Address, LinkChange, Neighbour, Route};

use super::*;
use crate::net::Namespace;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 5];

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn address(index: u32, text: &str, prefix: u8) -> Address {
    Address {
        index,
        local: ip(text),
        peer: None,
        prefix,
        scope: 0,
        flags: libc::IFA_F_NODAD,
        broadcast: None,
    }
}

/// A pod's namespace as the ptp plugin leaves it, and the namespace with the other end.
async fn pod() -> (Namespace, Namespace) {
    let (pod, node) = (Namespace::for_test(), Namespace::for_test());
    let pod_fd = pod.fd().try_clone_to_owned().unwrap();
    node.inside(move |socket| {
        socket.add_veth("veth0", "eth0", pod_fd.as_fd()).unwrap();
        let index = socket.link("veth0").unwrap().unwrap().index;
        socket.change_link(index, &LinkChange { set: libc::IFF_UP, ..LinkChange::default() }).unwrap();
        socket.add_address(&address(index, "10.1.0.1", 16)).unwrap();
        Ok(())
    })
    .await
    .unwrap();
    pod.inside(|socket| {
        let index = socket.link("eth0").unwrap().unwrap().index;
        let change =
            LinkChange { mac: Some(MAC), mtu: Some(1450), set: libc::IFF_UP, ..LinkChange::default() };
        socket.change_link(index, &change).unwrap();
        let v4 = Address { flags: libc::IFA_F_NOPREFIXROUTE, ..address(index, "10.1.0.5", 16) };
        socket.add_address(&v4).unwrap();
        socket.add_address(&address(index, "fd00::5", 64)).unwrap();
        let link_scope = Route { scope: libc::RT_SCOPE_LINK, ..Route::new(index, ip("10.1.0.1"), 32) };
        socket.add_route(&link_scope).unwrap();
        socket
            .add_route(&Route { gateway: Some(ip("10.1.0.1")), ..Route::new(index, ip("10.1.0.0"), 16) })
            .unwrap();
        socket
            .add_route(&Route {
                gateway: Some(ip("10.1.0.1")),
                metric: 7,
                ..Route::new(index, ip("0.0.0.0"), 0)
            })
            .unwrap();
        socket.add_neighbour(&Neighbour { index, address: ip("10.1.0.1"), mac: [2, 0, 0, 0, 0, 1] }).unwrap();
        Ok(())
    })
    .await
    .unwrap();
    (pod, node)
}

fn arp_request(source: [u8; 6], address: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    [&[0; 12][..], &[0xff; 6], &source, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &source, &address, &[0; 6], &target]
        .concat()
}

/// How long a packet is waited for that should come, on a busy machine; and one that should not.
const COMES: Duration = Duration::from_secs(20);
const STAYS_AWAY: Duration = Duration::from_secs(1);

/// The next ARP packet that the guest's end of a tap receives, without the header in front.
fn next_arp(queues: &mut [File], limit: Duration) -> Option<Vec<u8>> {
    let deadline = Instant::now() + limit;
    let mut packet = vec![0; 2048];
    while Instant::now() < deadline {
        for queue in &mut *queues {
            match queue.read(&mut packet) {
                Ok(length) if packet[12 + 12..12 + 14] == [8, 6] => return Some(packet[12..length].to_vec()),
                Ok(_) => {}
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
    None
}

#[tokio::test]
async fn an_interface_is_read_with_all_that_belongs_to_it() {
    let (pod, _node) = pod().await;
    let interfaces = pod.inside(|socket| Interface::read_all(socket, &[])).await.unwrap();
    let [interface] = &interfaces[..] else { panic!("{interfaces:?}") };
    let request = interface.request(3);
    assert_eq!((request.slot, request.name.as_str(), request.mtu, request.up), (3, "eth0", 1450, true));
    assert_eq!(request.mac, MAC);
    let v4 = &request.addresses[0];
    assert_eq!((v4.local.as_slice(), v4.prefix, v4.prefix_route), (&[10, 1, 0, 5][..], 16, false));
    assert!(request.addresses[1..].iter().all(|address| address.prefix_route), "{request}");
    assert!(interface.ips().contains(&ip("fd00::5")));
    let routes: Vec<_> = request
        .routes
        .iter()
        .map(|route| (route.destination[0], route.prefix, route.gateway.len(), route.metric))
        .collect();
    assert_eq!(routes, [(0, 0, 4, 7), (10, 16, 4, 0), (10, 32, 0, 0)]);
    assert_eq!(request.neighbours.len(), 1);
    let none = pod.inside({
        let known = interface.index;
        move |socket| Interface::read_all(socket, &[known])
    });
    assert_eq!(none.await.unwrap(), []);
}

#[tokio::test]
async fn packets_go_both_ways_and_only_the_interfaces_own_leave() {
    for spoof_check in [true, false] {
        let (pod, _node) = pod().await;
        let mut joined = pod.inside(move |socket| join_all(socket, &[], 2, spoof_check)).await.unwrap();
        let Joined { tap, .. } = joined.remove(0);
        assert_eq!(tap.queues.len(), 2);
        assert!(tap.offloads.checksum_and_tso);
        let mut queues: Vec<File> = tap.queues.into_iter().map(File::from).collect();

        let mut expect_answer = |mac: [u8; 6], own: [u8; 4], answers: bool, what: &str| {
            let deadline = Instant::now() + if answers { COMES } else { STAYS_AWAY };
            // Asked again as guests do: what is sent while the kernel is still bringing a link up is lost.
            let arp = std::iter::repeat_with(|| {
                queues[0].write_all(&arp_request(mac, own, [10, 1, 0, 1])).unwrap();
                next_arp(&mut queues, STAYS_AWAY)
            })
            .take_while(|_| Instant::now() < deadline)
            .find_map(|arp| arp);
            let answered = arp.is_some_and(|arp| arp[20..22] == [0, 2] && arp[38..42] == own);
            assert_eq!(answered, answers, "{what}");
        };
        // The other end answers the guest, and nobody in the pod's namespace answers anything.
        expect_answer(MAC, [10, 1, 0, 5], true, "the interface's own address");
        expect_answer([2, 0, 0, 0, 0, 6], [10, 1, 0, 5], !spoof_check, "another MAC");
        expect_answer(MAC, [10, 1, 0, 6], !spoof_check, "another address");
        queues[0].write_all(&arp_request(MAC, [10, 1, 0, 5], [10, 1, 0, 5])).unwrap();
        assert_eq!(next_arp(&mut queues, STAYS_AWAY), None, "the namespace's own stack answered");
    }
}

#[tokio::test]
async fn what_the_node_sends_comes_to_the_guest_and_not_to_the_namespace() {
    let (pod, node) = pod().await;
    let mut joined = pod.inside(|socket| join_all(socket, &[], 1, true)).await.unwrap();
    let mut tap = File::from(joined.remove(0).tap.queues.remove(0));
    node.inside(|_| {
        let socket = std::net::UdpSocket::bind("10.1.0.1:0").unwrap();
        let _ = socket.send_to(b"x", "10.1.0.5:9");
        Ok(())
    })
    .await
    .unwrap();
    let arp = next_arp(std::slice::from_mut(&mut tap), COMES).expect("no question for the guest's address");
    assert_eq!((&arp[20..22], &arp[38..42]), (&[0, 1][..], &[10, 1, 0, 5][..]));
}

#[tokio::test]
async fn what_is_left_behind_is_removed() {
    let (pod, _node) = pod().await;
    let joined = pod.inside(|socket| join_all(socket, &[], 1, true)).await.unwrap();
    let known = [joined[0].interface.index, joined[0].tap.index];
    // Once more over what a shim left that was killed, whose tap is gone.
    drop(joined);
    let joined = pod.inside(move |socket| join_all(socket, &[], 1, true)).await.unwrap();
    assert_eq!((joined.len(), joined[0].interface.index), (1, known[0]));
    drop(joined);
    let record = pod.record().clone();
    let found = Namespace::find(&record).unwrap();
    found.inside_blocking(Duration::from_secs(5), release).unwrap();
    found.inside_blocking(Duration::from_secs(5), release).unwrap();
    let left = pod
        .inside(|socket| {
            let names: Vec<String> = socket.links().unwrap().into_iter().map(|link| link.name).collect();
            let eth0 = socket.link("eth0").unwrap().unwrap().index;
            // There is nothing any more that a program could be added to.
            let bare = socket.redirect(eth0, PRIORITY, &everything(), eth0).is_err();
            Ok((names, bare))
        })
        .await
        .unwrap();
    assert!(!left.0.iter().any(|name| name.starts_with("bulkhead")), "{left:?}");
    assert!(left.1, "the queueing discipline stayed");
}

#[tokio::test]
async fn interfaces_that_can_not_be_carried_are_refused_with_the_reason() {
    let (pod, _node) = pod().await;
    let refused = pod.inside(|socket| {
        let index = socket.link("eth0").unwrap().unwrap().index;
        let _ = index;
        socket.add_link("sit7", "sit", None).map_err(|source| NetError::Read { what: "sit", source })?;
        let index = socket.link("sit7").unwrap().unwrap().index;
        let before = Interface::read_all(socket, &[]).unwrap().len();
        socket.change_link(index, &LinkChange { set: libc::IFF_UP, ..LinkChange::default() }).unwrap();
        Ok((before, Interface::read_all(socket, &[]).unwrap_err().to_string()))
    });
    match refused.await {
        Ok((before, message)) => {
            assert_eq!(before, 1, "one that is not in use stays out");
            assert!(message.contains("sit7") && message.contains("no Ethernet interface"), "{message}");
        }
        // A kernel without this kind of tunnel.
        Err(NetError::Read { what: "sit", .. }) => {}
        Err(error) => panic!("{error}"),
    }
}
