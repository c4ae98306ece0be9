//! Routes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::Answer;
use crate::attributes::{Attributes, family, ip, number16, number32};
use crate::message::Message;
use crate::socket::{Socket, unless};

/// `struct rtmsg`, and `struct rtnexthop`.
const HEADER: usize = 12;
const HOP: usize = 8;

const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const RTA_PREFSRC: u16 = 7;
const RTA_METRICS: u16 = 8;
const RTA_MULTIPATH: u16 = 9;
const RTA_TABLE: u16 = 15;
const RTA_VIA: u16 = 18;
const RTA_PREF: u16 = 20;
const RTAX_MTU: u16 = 2;
const RTAX_ADVMSS: u16 = 8;

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Where to; the unspecified address with a prefix of 0 for a default route.
    pub destination: IpAddr,
    /// Length of the destination's prefix.
    pub prefix: u8,
    /// By way of whom; may be of the other family.
    pub gateway: Option<IpAddr>,
    /// The source address that it prefers.
    pub source: Option<IpAddr>,
    /// The interface's number.
    pub index: Option<u32>,
    /// How many ways there are to the destination in one route of the kernel's: this is one of them.
    pub ways: usize,
    /// The table that it is in.
    pub table: u32,
    /// What made it, such as `RTPROT_KERNEL`.
    pub protocol: u8,
    /// How far it reaches, such as `RT_SCOPE_LINK`.
    pub scope: u8,
    /// What it does, such as `RTN_UNICAST`.
    pub kind: u8,
    /// The type of service that it is for.
    pub tos: u8,
    /// `RTNH_F_*` and `RTM_F_*`.
    pub flags: u32,
    /// Its metric; 0 for the kernel's choice.
    pub metric: u32,
    /// The MTU of the path; 0 for the interface's.
    pub mtu: u32,
    /// The largest segment to be announced; 0 for the kernel's choice.
    pub advmss: u32,
    /// The preference of an IPv6 router.
    pub preference: Option<u8>,
}

/// What leads to a next hop.
#[derive(Default)]
struct Way {
    gateway: Option<IpAddr>,
    index: Option<u32>,
    flags: u32,
}

impl Way {
    fn read(&mut self, kind: u16, value: &[u8]) {
        match kind {
            RTA_OIF => self.index = number32(value),
            RTA_GATEWAY => self.gateway = ip(value),
            RTA_VIA => self.gateway = value.get(2..).and_then(ip),
            _ => {}
        }
    }
}

impl Route {
    /// A route to a destination through an interface.
    pub fn new(index: u32, destination: IpAddr, prefix: u8) -> Route {
        Route {
            destination,
            prefix,
            gateway: None,
            source: None,
            index: Some(index),
            ways: 1,
            table: libc::RT_TABLE_MAIN.into(),
            protocol: libc::RTPROT_BOOT,
            scope: libc::RT_SCOPE_UNIVERSE,
            kind: libc::RTN_UNICAST,
            tos: 0,
            flags: 0,
            metric: 0,
            mtu: 0,
            advmss: 0,
            preference: None,
        }
    }

    /// A route for each way.
    fn parse(answer: &Answer) -> Option<Vec<Route>> {
        let body = &answer.body;
        if answer.kind != libc::RTM_NEWROUTE {
            return None;
        }
        let [family, prefix, _, tos, table, protocol, scope, kind] = *body.first_chunk()?;
        let anywhere: IpAddr = match libc::c_int::from(family) {
            libc::AF_INET => Ipv4Addr::UNSPECIFIED.into(),
            libc::AF_INET6 => Ipv6Addr::UNSPECIFIED.into(),
            _ => return None,
        };
        let mut route = Route {
            index: None,
            table: table.into(),
            protocol,
            scope,
            kind,
            tos,
            flags: number32(body.get(8..)?)?,
            ..Route::new(0, anywhere, prefix)
        };
        let mut way = Way::default();
        let mut ways = Vec::new();
        for (kind, value) in Attributes::behind(body, HEADER) {
            match kind {
                RTA_DST => route.destination = ip(value)?,
                RTA_PRIORITY => route.metric = number32(value)?,
                RTA_PREFSRC => route.source = ip(value),
                RTA_TABLE => route.table = number32(value)?,
                RTA_PREF => route.preference = value.first().copied(),
                RTA_METRICS => route.read_metrics(value),
                RTA_MULTIPATH => ways = all_ways(value),
                kind => way.read(kind, value),
            }
        }
        if ways.is_empty() {
            ways.push(way);
        }
        route.ways = ways.len();
        let through = |way: Way| Route {
            gateway: way.gateway,
            index: way.index,
            flags: route.flags | way.flags,
            ..route.clone()
        };
        Some(ways.into_iter().map(through).collect())
    }

    fn read_metrics(&mut self, value: &[u8]) {
        for (kind, value) in Attributes::within(value) {
            match kind {
                RTAX_MTU => self.mtu = number32(value).unwrap_or_default(),
                RTAX_ADVMSS => self.advmss = number32(value).unwrap_or_default(),
                _ => {}
            }
        }
    }
}

/// Several next hops.
fn all_ways(mut value: &[u8]) -> Vec<Way> {
    let mut ways = Vec::new();
    while let Some(length) = number16(value).map(usize::from) {
        let Some(hop) = value.get(..length).filter(|hop| hop.len() >= HOP) else { break };
        let mut way = Way { gateway: None, index: number32(&hop[4..]), flags: u32::from(hop[2]) };
        Attributes::behind(hop, HOP).for_each(|(kind, value)| way.read(kind, value));
        ways.push(way);
        value = value.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    ways
}

impl Socket {
    /// Every route of both families, of all tables.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn routes(&mut self) -> io::Result<Vec<Route>> {
        let mut routes = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let mut header = [0; HEADER];
            header[0] = family as u8;
            let answers = self.list(&Message::new(libc::RTM_GETROUTE, 0, &header))?;
            routes.extend(answers.iter().filter_map(Route::parse).flatten());
        }
        Ok(routes)
    }

    /// Adds a route behind those to the same destination, unless it is there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_route(&mut self, route: &Route) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(&[
            family(route.destination),
            route.prefix,
            0,
            route.tos,
            libc::RT_TABLE_UNSPEC,
            route.protocol,
            route.scope,
            route.kind,
        ]);
        header[8..].copy_from_slice(&route.flags.to_ne_bytes());
        let mut message = Message::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, &header);
        message.put_u32(RTA_TABLE, route.table);
        if route.prefix > 0 {
            message.put_ip(RTA_DST, route.destination);
        }
        if let Some(index) = route.index {
            message.put_u32(RTA_OIF, index);
        }
        match route.gateway {
            Some(gateway) if family(gateway) == family(route.destination) => {
                message.put_ip(RTA_GATEWAY, gateway);
            }
            Some(gateway) => {
                let mut via = u16::from(family(gateway)).to_ne_bytes().to_vec();
                match gateway {
                    IpAddr::V4(ip) => via.extend_from_slice(&ip.octets()),
                    IpAddr::V6(ip) => via.extend_from_slice(&ip.octets()),
                }
                message.put(RTA_VIA, &via);
            }
            None => {}
        }
        if let Some(source) = route.source {
            message.put_ip(RTA_PREFSRC, source);
        }
        if route.metric > 0 {
            message.put_u32(RTA_PRIORITY, route.metric);
        }
        if let Some(preference) = route.preference {
            message.put(RTA_PREF, &[preference]);
        }
        if route.mtu > 0 || route.advmss > 0 {
            message.nest(RTA_METRICS, |metrics| {
                for (kind, value) in [(RTAX_MTU, route.mtu), (RTAX_ADVMSS, route.advmss)] {
                    if value > 0 {
                        metrics.put_u32(kind, value);
                    }
                }
            });
        }
        unless(self.request(message), &[libc::EEXIST]).map(drop)
    }
}
