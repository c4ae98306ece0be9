//! Network interfaces.

use std::io;

use crate::attributes::{Attributes, name, number16, number32};
use crate::message::Message;
use crate::socket::{Socket, unless};
use crate::{Answer, Mac};

/// `struct ifinfomsg`.
const HEADER: usize = 16;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_TXQLEN: u16 = 13;
const IFLA_LINKINFO: u16 = 18;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// `IN6_ADDR_GEN_MODE_NONE`.
const NO_ADDRESSES: u8 = 1;
/// The first attribute of `ipvlan` and of `macvlan`.
const MODE: u16 = 1;

/// An interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind of hardware, such as `ARPHRD_ETHER`.
    pub hardware: u16,
    /// `IFF_UP` and others.
    pub flags: u32,
    /// Its address, if that is one of Ethernet's length.
    pub mac: Option<Mac>,
    /// Its MTU.
    pub mtu: u32,
    /// What made it, such as `veth`; empty for hardware.
    pub kind: String,
    /// The mode of an `ipvlan` or `macvlan` interface, as the kernel counts them.
    pub mode: Option<u32>,
}

impl Link {
    /// Whether it is in use.
    pub fn is_up(&self) -> bool {
        self.has(libc::IFF_UP)
    }

    /// Whether it is the loopback interface.
    pub fn is_loopback(&self) -> bool {
        self.has(libc::IFF_LOOPBACK)
    }

    /// Whether it has a flag.
    pub fn has(&self, flag: libc::c_int) -> bool {
        self.flags & flag.cast_unsigned() != 0
    }

    fn parse(answer: &Answer) -> Option<Link> {
        let body = &answer.body;
        if answer.kind != libc::RTM_NEWLINK {
            return None;
        }
        let mut link = Link {
            hardware: number16(body.get(2..)?)?,
            index: number32(body.get(4..)?)?,
            flags: number32(body.get(8..)?)?,
            ..Link::default()
        };
        for (kind, value) in Attributes::behind(body, HEADER) {
            match kind {
                IFLA_ADDRESS => link.mac = value.try_into().ok(),
                IFLA_IFNAME => link.name = name(value),
                IFLA_MTU => link.mtu = number32(value)?,
                IFLA_LINKINFO => link.read_info(value),
                _ => {}
            }
        }
        Some(link)
    }

    fn read_info(&mut self, value: &[u8]) {
        for (kind, value) in Attributes::within(value) {
            match kind {
                IFLA_INFO_KIND => self.kind = name(value),
                IFLA_INFO_DATA if matches!(self.kind.as_str(), "ipvlan" | "macvlan") => {
                    let mode = Attributes::within(value).find(|(kind, _)| *kind == MODE);
                    self.mode = mode
                        .and_then(|(_, value)| number32(value).or_else(|| number16(value).map(u32::from)));
                }
                _ => {}
            }
        }
    }
}

/// What is to be different about an interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkChange {
    /// A new name, which only an interface that is down can get.
    pub name: Option<String>,
    /// Another address.
    pub mac: Option<Mac>,
    /// Another MTU.
    pub mtu: Option<u32>,
    /// Another length of the queue, in packets.
    pub queue_length: Option<u32>,
    /// Flags to be set.
    pub set: libc::c_int,
    /// That the kernel gives it no IPv6 address of its own making.
    pub no_automatic_addresses: bool,
}

fn header(index: u32, set: libc::c_int) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&set.to_ne_bytes());
    header[12..].copy_from_slice(&set.to_ne_bytes());
    header
}

impl Socket {
    /// Every interface.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn links(&mut self) -> io::Result<Vec<Link>> {
        let answers = self.list(&Message::new(libc::RTM_GETLINK, 0, &header(0, 0)))?;
        Ok(answers.iter().filter_map(Link::parse).collect())
    }

    /// The interface with a name.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    /// Changes an interface.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn change_link(&mut self, index: u32, change: &LinkChange) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &header(index, change.set));
        if let Some(name) = &change.name {
            message.put_name(IFLA_IFNAME, name);
        }
        if let Some(mac) = &change.mac {
            message.put(IFLA_ADDRESS, mac);
        }
        if let Some(mtu) = change.mtu {
            message.put_u32(IFLA_MTU, mtu);
        }
        if let Some(length) = change.queue_length {
            message.put_u32(IFLA_TXQLEN, length);
        }
        if change.no_automatic_addresses {
            message.nest(IFLA_AF_SPEC, |families| {
                families.nest(libc::AF_INET6 as u16, |family| {
                    family.put(IFLA_INET6_ADDR_GEN_MODE, &[NO_ADDRESSES]);
                });
            });
        }
        self.request(message)
    }

    /// Removes an interface; tells whether it was there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn delete_link(&mut self, index: u32) -> io::Result<bool> {
        let message = Message::new(libc::RTM_DELLINK, 0, &header(index, 0));
        unless(self.request(message), &[libc::ENODEV])
    }
}
