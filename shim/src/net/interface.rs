//! The interfaces of a pod's network namespace, and how the guest is told of them.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;

use bulkhead_agent_protocol as api;
use bulkhead_netlink::{Address, Link, Mac, Neighbour, Route, Socket};

use super::NetError;
use super::parameters::{self, Parameter};

/// Ethernet among the kinds of hardware.
const ETHERNET: u16 = libc::ARPHRD_ETHER;

/// What the kernel itself puts into namespaces, where it has these protocols.
const FALLBACKS: [&str; 4] = ["erspan", "gretap", "ip6erspan", "ip6gretap"];

/// Routes that the guest's kernel could not make by itself.
const KINDS: [u8; 5] =
    [libc::RTN_UNICAST, libc::RTN_BLACKHOLE, libc::RTN_UNREACHABLE, libc::RTN_PROHIBIT, libc::RTN_THROW];

/// `RTM_F_CLONED`, and `RTNH_F_ONLINK`.
const CLONED: u32 = 0x200;
const ON_LINK: u32 = 4;

/// The mode of an ipvlan interface that has Ethernet packets: L2.
const IPVLAN_L2: u32 = 0;

/// An interface with all that belongs to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Interface {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// Its MTU.
    pub mtu: u16,
    up: bool,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
    parameters: Vec<Parameter>,
}

impl Interface {
    /// The interfaces of the socket's namespace, but for loopback and those `known` by their numbers.
    pub(crate) fn read_all(socket: &mut Socket, known: &[u32]) -> Result<Vec<Interface>, NetError> {
        let failed = |what| move |source: io::Error| NetError::Read { what, source };
        let links = socket.links().map_err(failed("interfaces"))?;
        let mut interfaces = Vec::new();
        for link in links.into_iter().filter(|link| !link.is_loopback() && !known.contains(&link.index)) {
            interfaces.extend(Interface::of(link)?);
        }
        if interfaces.is_empty() {
            return Ok(interfaces);
        }
        let addresses = socket.addresses().map_err(failed("addresses"))?;
        let routes = socket.routes().map_err(failed("routes"))?;
        let neighbours = socket.permanent_neighbours().map_err(failed("neighbours"))?;
        warn_of_tables(&routes);
        for (number, interface) in interfaces.iter_mut().enumerate() {
            let index = interface.index;
            interface.addresses.extend(addresses.iter().filter(|address| address.index == index).cloned());
            interface.take_routes(&routes, number == 0);
            if number == 0 {
                interface.parameters = parameters::of_namespace();
            }
            interface.parameters.extend(parameters::of_interface(&interface.name));
            interface.neighbours.extend(neighbours.iter().filter(|other| other.index == index).cloned());
        }
        Ok(interfaces)
    }

    /// The interface that a link is, if it is one that concerns the pod.
    fn of(link: Link) -> Result<Option<Interface>, NetError> {
        let unsupported = |reason: String| NetError::Unsupported { name: link.name.clone(), reason };
        let kind = if link.kind.is_empty() { "hardware" } else { &link.kind };
        if !link.is_up() && (link.hardware != ETHERNET || FALLBACKS.contains(&kind)) {
            log::debug!("the network interface {} ({kind}) is not in use and stays out", link.name);
            return Ok(None);
        }
        let (ETHERNET, Some(mac)) = (link.hardware, link.mac) else {
            return Err(unsupported(format!("it ({kind}) is no Ethernet interface")));
        };
        if kind == "ipvlan" && link.mode != Some(IPVLAN_L2) {
            return Err(unsupported(
                "it is an ipvlan interface whose packets the host routes; with mode l2 it would be possible"
                    .into(),
            ));
        }
        Ok(Some(Interface {
            index: link.index,
            mac,
            mtu: u16::try_from(link.mtu).unwrap_or(u16::MAX),
            up: link.is_up(),
            name: link.name,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
            parameters: Vec::new(),
        }))
    }

    /// Leaves out parameters that somebody has chosen, by their names for sysctl(8).
    pub(crate) fn leave_out(&mut self, chosen: &HashMap<String, String>) {
        let chosen: Vec<String> = chosen.keys().map(|name| name.replace('/', ".")).collect();
        let is_chosen = |name: &str| chosen.iter().any(|other| other.strip_prefix("net.") == Some(name));
        // One switch by two names, which throws those of all interfaces.
        let forwards = is_chosen("ipv4.ip_forward") || is_chosen("ipv4.conf.all.forwarding");
        self.parameters.retain(|(path, _)| {
            let name = path.replace('/', ".");
            let is_forwarding =
                name == "ipv4.ip_forward" || name.starts_with("ipv4.conf.") && name.ends_with(".forwarding");
            !(is_chosen(&name) || forwards && is_forwarding)
        });
    }

    fn take_routes(&mut self, all: &[Route], is_first: bool) {
        let (made_by_kernel, others): (Vec<&Route>, Vec<&Route>) = all
            .iter()
            .filter(|route| route.table == u32::from(libc::RT_TABLE_MAIN) && route.flags & CLONED == 0)
            .partition(|route| route.protocol == libc::RTPROT_KERNEL);
        for address in &mut self.addresses {
            // CNI plugins remove some of the routes that the kernel makes for addresses.
            let network = network(address.peer.unwrap_or(address.local), address.prefix);
            let is_host = address.prefix == if address.local.is_ipv4() { 32 } else { 128 };
            let has_route = made_by_kernel.iter().any(|route| {
                route.index == Some(self.index)
                    && (route.destination, route.prefix) == (network, address.prefix)
            });
            if self.up && !is_host {
                let flag = libc::IFA_F_NOPREFIXROUTE;
                address.flags = if has_route { address.flags & !flag } else { address.flags | flag };
            }
        }
        let here = |route: &&Route| match route.kind {
            libc::RTN_UNICAST => route.index == Some(self.index),
            kind => is_first && KINDS.contains(&kind),
        };
        for route in others.into_iter().filter(here) {
            // Of IPv6 the kernel makes one again.
            if route.ways > 1 && route.destination.is_ipv4() {
                log::warn!(
                    "the {} ways to {}/{} are used one after the other in the pod",
                    route.ways,
                    route.destination,
                    route.prefix
                );
            }
            self.routes.push(route.clone());
        }
    }

    /// Its addresses.
    pub(crate) fn ips(&self) -> Vec<IpAddr> {
        self.addresses.iter().map(|address| address.local).collect()
    }

    /// How the guest is told of it, in a slot.
    pub(crate) fn request(&self, slot: u8) -> api::AddInterfaceRequest {
        api::AddInterfaceRequest {
            slot: slot.into(),
            name: self.name.clone(),
            mac: self.mac.to_vec(),
            mtu: self.mtu.into(),
            up: self.up,
            addresses: self.addresses.iter().map(address).collect(),
            routes: self.routes.iter().map(route).collect(),
            neighbours: self
                .neighbours
                .iter()
                .map(|neighbour| api::Neighbour {
                    address: bytes(neighbour.address),
                    mac: neighbour.mac.to_vec(),
                    ..Default::default()
                })
                .collect(),
            parameters: self
                .parameters
                .iter()
                .map(|(path, value)| api::Parameter {
                    path: path.clone(),
                    value: value.clone(),
                    ..Default::default()
                })
                .collect(),
            ..Default::default()
        }
    }
}

fn warn_of_tables(routes: &[Route]) {
    let own = [libc::RT_TABLE_MAIN, libc::RT_TABLE_LOCAL, libc::RT_TABLE_DEFAULT].map(u32::from);
    if let Some(route) = routes.iter().find(|route| !own.contains(&route.table)) {
        log::warn!(
            "routes of the table {} and others that only rules lead to stay out of the pod",
            route.table
        );
    }
}

fn network(ip: IpAddr, prefix: u8) -> IpAddr {
    let prefix = u32::from(prefix);
    match ip {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - prefix.min(32)).unwrap_or(0);
            std::net::Ipv4Addr::from_bits(ip.to_bits() & mask).into()
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - prefix.min(128)).unwrap_or(0);
            std::net::Ipv6Addr::from_bits(ip.to_bits() & mask).into()
        }
    }
}

fn bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn optional_bytes(ip: Option<IpAddr>) -> Vec<u8> {
    ip.map(bytes).unwrap_or_default()
}

fn address(address: &Address) -> api::InterfaceAddress {
    api::InterfaceAddress {
        local: bytes(address.local),
        peer: optional_bytes(address.peer),
        prefix: address.prefix.into(),
        broadcast: optional_bytes(address.broadcast.map(IpAddr::V4)),
        scope: address.scope.into(),
        prefix_route: address.flags & libc::IFA_F_NOPREFIXROUTE == 0,
        ..Default::default()
    }
}

fn route(route: &Route) -> api::Route {
    api::Route {
        destination: bytes(route.destination),
        prefix: route.prefix.into(),
        gateway: optional_bytes(route.gateway),
        source: optional_bytes(route.source),
        kind: route.kind.into(),
        scope: route.scope.into(),
        protocol: route.protocol.into(),
        tos: route.tos.into(),
        metric: route.metric,
        mtu: route.mtu,
        advmss: route.advmss,
        onlink: route.flags & ON_LINK != 0,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_parameters_are_left_out() {
        let parameter = |path: &str| (path.to_owned(), "1".to_owned());
        let mut interface = Interface {
            index: 1,
            name: "eth0.7".into(),
            mac: [2; 6],
            mtu: 1500,
            up: true,
            addresses: Vec::new(),
            routes: Vec::new(),
            neighbours: Vec::new(),
            parameters: [
                "ipv4/ip_forward",
                "ipv4/conf/all/forwarding",
                "ipv6/conf/eth0.7/forwarding",
                "ipv6/conf/all/forwarding",
                "core/somaxconn",
            ]
            .map(parameter)
            .into(),
        };
        let chosen = ["net.ipv4.ip_forward", "net/ipv6/conf/eth0.7/forwarding", "kernel.core.somaxconn"];
        interface.leave_out(&HashMap::from(chosen.map(parameter)));
        assert_eq!(interface.parameters, ["ipv6/conf/all/forwarding", "core/somaxconn"].map(parameter));
    }
}
