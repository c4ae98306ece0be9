//! Against the kernel, each test in a network namespace of its own (as root).
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsFd;

use bulkhead_netlink::{Address, Instruction, LinkChange, Neighbour, Route, Socket, Verdict};
use nix::sched::{CloneFlags, unshare};

/// Leaves the thread of a test in a namespace of its own.
fn own_namespace() -> Socket {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    Socket::open().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A pair of links in this namespace: their numbers.
fn pair(socket: &mut Socket) -> (u32, u32) {
    let here = File::open("/proc/thread-self/ns/net").unwrap();
    socket.add_veth("one", "other", here.as_fd()).unwrap();
    let mut index = |name| socket.link(name).unwrap().unwrap().index;
    (index("one"), index("other"))
}

fn up(socket: &mut Socket, index: u32) {
    socket.change_link(index, &LinkChange { set: libc::IFF_UP, ..LinkChange::default() }).unwrap();
}

#[test]
fn links_are_read_as_they_are_made() {
    let mut socket = own_namespace();
    let (one, _) = pair(&mut socket);
    let change = LinkChange {
        name: Some("eth7".into()),
        mac: Some([2, 0, 0, 0, 0, 7]),
        mtu: Some(1450),
        queue_length: Some(500),
        set: libc::IFF_UP,
        no_automatic_addresses: true,
    };
    socket.change_link(one, &change).unwrap();
    let link = socket.link("eth7").unwrap().unwrap();
    assert_eq!((link.index, link.mtu, link.mac), (one, 1450, Some([2, 0, 0, 0, 0, 7])));
    assert_eq!((link.kind.as_str(), link.is_up(), link.is_loopback()), ("veth", true, false));
    let other = socket.link("other").unwrap().unwrap().index;
    up(&mut socket, other);
    let addresses = socket.addresses().unwrap();
    assert!(!addresses.iter().any(|address| address.index == one), "{addresses:?}");
    assert!(addresses.iter().any(|address| address.index == other), "{addresses:?}");

    socket.add_link("mac0", "macvlan", Some(other)).unwrap();
    let macvlan = socket.link("mac0").unwrap().unwrap();
    assert_eq!((macvlan.kind.as_str(), macvlan.mode), ("macvlan", Some(2)));
    assert!(socket.delete_link(one).unwrap());
    assert!(!socket.delete_link(one).unwrap());
}

#[test]
fn addresses_routes_and_neighbours_come_back() {
    let mut socket = own_namespace();
    let (one, other) = pair(&mut socket);
    up(&mut socket, one);
    up(&mut socket, other);
    let address = |local: &str, prefix, scope, flags| Address {
        index: one,
        local: ip(local),
        peer: None,
        prefix,
        scope,
        flags,
        broadcast: None,
    };
    let mut wanted = vec![
        address("10.1.0.2", 16, 0, 0),
        address("10.2.0.2", 32, libc::RT_SCOPE_LINK, 0),
        address("fd00::2", 64, 0, libc::IFA_F_NODAD),
    ];
    wanted[0].broadcast = Some("10.1.255.255".parse().unwrap());
    wanted[1].peer = Some(ip("10.3.0.1"));
    for address in &wanted {
        socket.add_address(address).unwrap();
        socket.add_address(address).unwrap();
    }
    let found = socket.addresses().unwrap();
    for address in &wanted {
        let matches = |found: &&Address| found.index == one && found.local == address.local;
        let found = found.iter().find(matches).unwrap();
        let strip = |address: &Address| Address { flags: 0, ..address.clone() };
        assert_eq!(strip(found), strip(address));
    }

    let mut routes = vec![
        Route { scope: libc::RT_SCOPE_LINK, ..Route::new(one, ip("169.254.1.1"), 32) },
        Route { gateway: Some(ip("169.254.1.1")), ..Route::new(one, ip("0.0.0.0"), 0) },
        Route { gateway: Some(ip("10.9.9.9")), flags: 4, metric: 77, ..Route::new(one, ip("10.7.0.0"), 16) },
        Route {
            mtu: 1300,
            advmss: 1200,
            source: Some(ip("10.1.0.2")),
            gateway: Some(ip("10.1.0.1")),
            ..Route::new(one, ip("10.8.0.0"), 16)
        },
        Route { gateway: Some(ip("fd00::1")), metric: 1024, ..Route::new(one, ip("::"), 0) },
        Route { gateway: Some(ip("fd00::1")), ..Route::new(one, ip("10.6.0.0"), 16) },
        Route { index: None, kind: libc::RTN_BLACKHOLE, table: 1000, ..Route::new(one, ip("10.5.0.0"), 16) },
    ];
    for route in &routes {
        socket.add_route(route).unwrap();
        socket.add_route(route).unwrap();
    }
    routes[4].preference = Some(0);
    let found = socket.routes().unwrap();
    for route in &routes {
        assert!(found.contains(route), "{route:?} is not among {found:#?}");
    }

    // A second way, which IPv6 joins to the first.
    for gateway in ["10.9.9.8", "fd00::9"] {
        let anywhere = if gateway.contains(':') { "::" } else { "10.7.0.0" };
        let prefix = if gateway.contains(':') { 0 } else { 16 };
        let metric = if gateway.contains(':') { 1024 } else { 77 };
        let flags = if gateway.contains(':') { 0 } else { 4 };
        let route =
            Route { gateway: Some(ip(gateway)), metric, flags, ..Route::new(one, ip(anywhere), prefix) };
        socket.add_route(&route).unwrap();
        let found = socket.routes().unwrap();
        let ways: Vec<_> = found
            .iter()
            .filter(|found| {
                (found.destination, found.prefix) == (route.destination, prefix) && found.metric == metric
            })
            .collect();
        assert_eq!(ways.len(), 2, "{ways:#?}");
        assert_eq!(ways[1].gateway, route.gateway);
        assert_eq!(ways[1].ways, if anywhere == "::" { 2 } else { 1 });
    }

    let neighbour = Neighbour { index: one, address: ip("10.1.0.1"), mac: [2, 0, 0, 0, 0, 9] };
    socket.add_neighbour(&neighbour).unwrap();
    socket.add_neighbour(&neighbour).unwrap();
    assert_eq!(socket.permanent_neighbours().unwrap(), [neighbour]);
}

#[test]
fn an_error_comes_with_the_kernels_words() {
    let mut socket = own_namespace();
    let (one, _) = pair(&mut socket);
    let route = Route { gateway: Some(ip("10.9.9.9")), ..Route::new(one, ip("0.0.0.0"), 0) };
    let error = socket.add_route(&route).unwrap_err().to_string();
    assert!(
        error.contains("Device for nexthop is not up") || error.contains("Nexthop has invalid gateway"),
        "{error}"
    );
    // The socket is of use afterwards.
    assert!(socket.link("one").unwrap().is_some());
}

#[test]
fn programs_come_and_go() {
    let mut socket = own_namespace();
    let (one, other) = pair(&mut socket);
    let every = [Instruction::end(Verdict::Matches)];
    let none = [Instruction::end(Verdict::Drops)];
    for _ in 0..2 {
        socket.add_ingress(one).unwrap();
    }
    socket.redirect(one, 7, &every, other).unwrap();
    socket.decide(one, 8, &none).unwrap();
    assert!(socket.redirect(one, 7, &every, other).is_err(), "a second one of the same priority");
    assert!(socket.remove_program(one, 7).unwrap());
    assert!(!socket.remove_program(one, 7).unwrap());
    assert!(socket.remove_program(one, 8).unwrap());
    // With the last one all went: it can be made anew.
    assert!(socket.redirect(one, 7, &every, other).is_err(), "the discipline stayed");
    assert!(!socket.remove_program(one, 7).unwrap());
    assert!(!socket.remove_program(9999, 7).unwrap());
}
