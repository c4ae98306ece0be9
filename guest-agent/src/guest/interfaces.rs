//! Network interfaces that the host gives to the running guest, and what they are to be.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use bulkhead_agent_protocol::{AddInterfaceRequest, InterfaceAddress};
use bulkhead_netlink::{Address, LinkChange, Mac, Neighbour, Route, Socket};

use super::parameters;
use super::slots::{SlotError, Window, device_below};
use crate::reaper::Reaper;
use crate::sys::network::turn_on_feature;

/// How long the kernel may take to speak with a device.
const LIMIT: Duration = Duration::from_secs(10);

/// Settings of an interface: the host has heard the routers and chosen the addresses.
const SETTINGS: &str = "/proc/sys/net/ipv6/conf";

/// Parameters of the network stack.
const PARAMETERS: &str = "/proc/sys/net";

/// Cutting many datagrams of one call as late as it can be done, to the kernel (`NETIF_F_GSO_UDP_L4`).
const UDP_SEGMENTATION: &str = "tx-udp-segmentation";

/// An interface that can't be taken up or be made what it should be.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub(crate) enum InterfaceError {
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error("there is no network interface in slot {0}")]
    NoDevice(u32),
    #[error("the request for the interface {name} holds {what} that is none")]
    Malformed { name: String, what: &'static str },
    #[error("can't {step} of the interface {name}")]
    Configure { step: String, name: String, source: io::Error },
}

/// Has the kernel take up the interface in a slot, and makes it what it should be.
pub(crate) async fn add(request: &AddInterfaceRequest, reaper: &Reaper) -> Result<(), InterfaceError> {
    let wanted = Wanted::parse(request)?;
    let window = Window::of(request.slot)?;
    let added = async {
        window.bind("take up the network interface in", LIMIT, reaper).await?;
        let device = device_below(&window.device(), "net")
            .map_err(|source| SlotError::System { slot: request.slot, source })?;
        let name = device.as_deref().and_then(|path| path.file_name()?.to_str());
        wanted.set_up(name.ok_or(InterfaceError::NoDevice(request.slot))?)
    };
    let added = added.await;
    if added.is_err() {
        // The slot is for the next device then.
        let _ = window.unbind("let go of the network interface in", LIMIT, reaper).await;
    }
    added
}

/// What an interface is to be. The kernel's number for it is not known yet: it is 0 throughout.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    name: String,
    mac: Mac,
    mtu: u32,
    up: bool,
    addresses: Vec<Address>,
    routes: Vec<Route>,
    neighbours: Vec<Neighbour>,
    parameters: Vec<(String, String)>,
}

impl Wanted {
    fn parse(request: &AddInterfaceRequest) -> Result<Wanted, InterfaceError> {
        let malformed = |what| InterfaceError::Malformed { name: request.name.clone(), what };
        let mac = |bytes: &[u8]| Mac::try_from(bytes).map_err(|_| malformed("a hardware address"));
        let routes = request.routes.iter().map(|route| route_of(route).ok_or_else(|| malformed("a route")));
        let addresses = request.addresses.iter();
        let addresses = addresses.map(|address| address_of(address).ok_or_else(|| malformed("an address")));
        let neighbours = request.neighbours.iter().map(|neighbour| {
            let address = ip(&neighbour.address).ok_or_else(|| malformed("a neighbour"))?;
            Ok::<_, InterfaceError>(Neighbour { index: 0, address, mac: mac(&neighbour.mac)? })
        });
        let parameters = request.parameters.iter().map(|parameter| {
            let pair = (parameter.path.clone(), parameter.value.clone());
            parameters::is_below(&parameter.path)
                .then_some(pair)
                .ok_or_else(|| malformed("the path of a parameter"))
        });
        let mut routes = routes.collect::<Result<Vec<_>, _>>()?;
        // Gateways are looked for on the link, by routes without one.
        routes.sort_by_key(|route| route.gateway.is_some());
        Ok(Wanted {
            name: request.name.clone(),
            mac: mac(&request.mac)?,
            mtu: request.mtu,
            up: request.up,
            addresses: addresses.collect::<Result<_, _>>()?,
            routes,
            neighbours: neighbours.collect::<Result<_, _>>()?,
            parameters: parameters.collect::<Result<_, _>>()?,
        })
    }

    /// Makes the interface, which the kernel has called `found`, what it should be.
    fn set_up(self, found: &str) -> Result<(), InterfaceError> {
        let name = self.name.clone();
        let failed = |step: String| {
            let name = name.clone();
            move |source| InterfaceError::Configure { step, name, source }
        };
        let kernel = |source| failed("tell the state".into())(source);
        let mut socket = Socket::open().map_err(kernel)?;
        let link = socket.link(found).map_err(kernel)?;
        let link = link.ok_or_else(|| kernel(io::ErrorKind::NotFound.into()))?;
        let change = LinkChange {
            name: (self.name != found).then(|| self.name.clone()),
            mac: (link.mac != Some(self.mac)).then_some(self.mac),
            mtu: (link.mtu != self.mtu).then_some(self.mtu),
            no_automatic_addresses: true,
            ..LinkChange::default()
        };
        socket
            .change_link(link.index, &change)
            .map_err(failed(format!("set the name, the hardware address and the MTU {}", self.mtu)))?;
        match fs::write(format!("{SETTINGS}/{}/accept_ra", self.name), "0") {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(failed("switch router advertisements off".into())(source));
            }
            _ => {}
        }
        self.set_parameters();
        // Linux leaves this one off where it turns the other segmentations on by itself.
        if let Err(error) = turn_on_feature(&self.name, UDP_SEGMENTATION) {
            log::debug!("datagrams leave {} one by one: {error}", self.name);
        }
        if self.up {
            let up = LinkChange { set: libc::IFF_UP, ..LinkChange::default() };
            socket.change_link(link.index, &up).map_err(failed("begin the use".into()))?;
        }
        for address in &self.addresses {
            socket
                .add_address(&Address { index: link.index, ..address.clone() })
                .map_err(failed(format!("set the address {}/{}", address.local, address.prefix)))?;
        }
        for neighbour in &self.neighbours {
            socket
                .add_neighbour(&Neighbour { index: link.index, ..neighbour.clone() })
                .map_err(failed(format!("enter the neighbour {}", neighbour.address)))?;
        }
        self.add_routes(&mut socket, link.index).map_err(|(route, source)| {
            failed(format!("set the route to {}/{}", route.destination, route.prefix))(source)
        })
    }

    /// Sets what can be set: the host's kernel may have parameters, or values of them, that this one has not.
    fn set_parameters(&self) {
        for (path, value) in &self.parameters {
            if let Err(error) = fs::write(format!("{PARAMETERS}/{path}"), value) {
                log::debug!("the network parameter {path} does not become {value:?}: {error}");
            }
        }
    }

    /// Adds the routes; one that depends on others comes in a further round, as long as there is progress.
    fn add_routes(&self, socket: &mut Socket, index: u32) -> Result<(), (Route, io::Error)> {
        let mut left: Vec<Route> = self.routes.clone();
        loop {
            let before = left.len();
            let mut first_failure = None;
            left.retain(|route| {
                // A route that leads nowhere has no interface.
                let index = (route.kind == libc::RTN_UNICAST).then_some(index);
                match socket.add_route(&Route { index, ..route.clone() }) {
                    Ok(()) => false,
                    Err(error) => {
                        first_failure.get_or_insert((route.clone(), error));
                        true
                    }
                }
            });
            match first_failure {
                None => return Ok(()),
                Some(failure) if left.len() == before => return Err(failure),
                Some(_) => {}
            }
        }
    }
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// An address that may be left out.
fn optional_ip(bytes: &[u8]) -> Option<Option<IpAddr>> {
    if bytes.is_empty() { Some(None) } else { ip(bytes).map(Some) }
}

fn address_of(address: &InterfaceAddress) -> Option<Address> {
    let local = ip(&address.local)?;
    // The address has been in use for as long as the host's interface has been there.
    let duplicates = if local.is_ipv6() { libc::IFA_F_NODAD } else { 0 };
    let prefix_route = if address.prefix_route { 0 } else { libc::IFA_F_NOPREFIXROUTE };
    Some(Address {
        index: 0,
        local,
        peer: optional_ip(&address.peer)?,
        prefix: address.prefix.try_into().ok()?,
        scope: address.scope.try_into().ok()?,
        flags: duplicates | prefix_route,
        broadcast: match optional_ip(&address.broadcast)? {
            Some(IpAddr::V4(broadcast)) => Some(broadcast),
            _ => None,
        },
    })
}

fn route_of(route: &bulkhead_agent_protocol::Route) -> Option<Route> {
    /// `RTNH_F_ONLINK`.
    const ON_LINK: u32 = 4;
    Some(Route {
        gateway: optional_ip(&route.gateway)?,
        source: optional_ip(&route.source)?,
        kind: route.kind.try_into().ok()?,
        scope: route.scope.try_into().ok()?,
        protocol: route.protocol.try_into().ok()?,
        tos: route.tos.try_into().ok()?,
        flags: if route.onlink { ON_LINK } else { 0 },
        metric: route.metric,
        mtu: route.mtu,
        advmss: route.advmss,
        ..Route::new(0, ip(&route.destination)?, route.prefix.try_into().ok()?)
    })
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use bulkhead_agent_protocol as api;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn bytes(text: &str) -> Vec<u8> {
        match text.parse().unwrap() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        }
    }

    fn address(local: &str, prefix: u32) -> InterfaceAddress {
        InterfaceAddress { local: bytes(local), prefix, prefix_route: true, ..Default::default() }
    }

    fn route(destination: &str, prefix: u32, gateway: &str) -> api::Route {
        let gateway = if gateway.is_empty() { Vec::new() } else { bytes(gateway) };
        let scope = if gateway.is_empty() { libc::RT_SCOPE_LINK } else { libc::RT_SCOPE_UNIVERSE };
        api::Route {
            destination: bytes(destination),
            prefix,
            gateway,
            kind: libc::RTN_UNICAST.into(),
            scope: scope.into(),
            protocol: libc::RTPROT_BOOT.into(),
            ..Default::default()
        }
    }

    fn request() -> AddInterfaceRequest {
        AddInterfaceRequest {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 5],
            mtu: 1450,
            up: true,
            ..Default::default()
        }
    }

    /// An interface in a namespace of the test's own, and what it is made of by the request.
    fn set_up(request: &AddInterfaceRequest) -> (Result<(), InterfaceError>, Socket) {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let mut socket = Socket::open().unwrap();
        let here = File::open("/proc/thread-self/ns/net").unwrap();
        socket.add_veth("found", "other", here.as_fd()).unwrap();
        let other = socket.link("other").unwrap().unwrap().index;
        socket.change_link(other, &LinkChange { set: libc::IFF_UP, ..Default::default() }).unwrap();
        (Wanted::parse(request).unwrap().set_up("found"), socket)
    }

    #[test]
    fn an_interface_becomes_what_it_is_on_the_host() {
        let request = AddInterfaceRequest {
            addresses: vec![address("10.1.0.5", 32), address("fd00::5", 64), address("fe80::5", 64)],
            // In an order that can't be carried out.
            routes: vec![
                route("10.2.0.0", 16, "10.3.0.1"),
                route("0.0.0.0", 0, "169.254.1.1"),
                route("10.3.0.1", 32, ""),
                route("169.254.1.1", 32, ""),
                route("::", 0, "fe80::1"),
                api::Route { kind: libc::RTN_BLACKHOLE.into(), ..route("10.4.0.0", 16, "") },
            ],
            neighbours: vec![api::Neighbour {
                address: bytes("169.254.1.1"),
                mac: vec![2, 0, 0, 0, 0, 6],
                ..Default::default()
            }],
            ..request()
        };
        let (result, mut socket) = set_up(&request);
        result.unwrap();
        let link = socket.link("eth0").unwrap().unwrap();
        assert_eq!((link.mtu, link.mac, link.is_up()), (1450, Some([2, 0, 0, 0, 0, 5]), true));
        let addresses = socket.addresses().unwrap();
        let addresses: Vec<_> = addresses.iter().filter(|address| address.index == link.index).collect();
        assert_eq!(addresses.len(), 3, "{addresses:?}");
        assert!(addresses.iter().all(|address| address.flags & libc::IFA_F_TENTATIVE == 0), "{addresses:?}");
        let routes = socket.routes().unwrap();
        let to = |text: &str| {
            routes.iter().find(|route| route.destination.to_string() == text && route.table == 254)
        };
        assert_eq!(to("0.0.0.0").unwrap().gateway, Some("169.254.1.1".parse().unwrap()));
        assert_eq!(to("10.2.0.0").unwrap().gateway, Some("10.3.0.1".parse().unwrap()));
        assert_eq!(to("::").unwrap().gateway, Some("fe80::1".parse().unwrap()));
        assert_eq!(to("10.4.0.0").unwrap().kind, libc::RTN_BLACKHOLE);
        assert_eq!(socket.permanent_neighbours().unwrap().len(), 1);
    }

    #[test]
    fn an_interface_that_is_not_in_use_stays_so() {
        let (result, mut socket) = set_up(&AddInterfaceRequest { up: false, ..request() });
        result.unwrap();
        assert!(!socket.link("eth0").unwrap().unwrap().is_up());
    }

    #[test]
    fn what_can_not_be_set_is_named() {
        let routes = vec![route("10.2.0.0", 16, "10.3.0.1")];
        let (result, _) = set_up(&AddInterfaceRequest { routes, ..request() });
        let error = result.unwrap_err().to_string();
        assert_eq!(error, "can't set the route to 10.2.0.0/16 of the interface eth0");
    }

    #[test]
    fn a_request_that_makes_no_sense_is_refused() {
        for request in [
            AddInterfaceRequest { mac: vec![1], ..request() },
            AddInterfaceRequest { addresses: vec![InterfaceAddress::default()], ..request() },
            AddInterfaceRequest { addresses: vec![address("10.0.0.1", 256)], ..request() },
            AddInterfaceRequest { routes: vec![api::Route::default()], ..request() },
            AddInterfaceRequest { neighbours: vec![api::Neighbour::default()], ..request() },
        ] {
            assert!(matches!(Wanted::parse(&request), Err(InterfaceError::Malformed { .. })), "{request}");
        }
    }
}
