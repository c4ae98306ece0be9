//! Addresses of interfaces.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use crate::Answer;
use crate::attributes::{Attributes, family, ip, number32};
use crate::message::Message;
use crate::socket::{Socket, unless};

/// `struct ifaddrmsg`.
const HEADER: usize = 8;

const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_BROADCAST: u16 = 4;
const IFA_FLAGS: u16 = 8;

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// The interface's number.
    pub index: u32,
    /// The address.
    pub local: IpAddr,
    /// The other end's, on a point-to-point link.
    pub peer: Option<IpAddr>,
    /// Length of the network's prefix.
    pub prefix: u8,
    /// Where it is valid, such as `RT_SCOPE_LINK`.
    pub scope: u8,
    /// `IFA_F_*`.
    pub flags: u32,
    /// The broadcast address.
    pub broadcast: Option<Ipv4Addr>,
}

impl Address {
    fn parse(answer: &Answer) -> Option<Address> {
        let body = &answer.body;
        if answer.kind != libc::RTM_NEWADDR {
            return None;
        }
        let (mut address, mut local, mut broadcast) = (None, None, None);
        let mut flags = u32::from(*body.get(2)?);
        for (kind, value) in Attributes::behind(body, HEADER) {
            match kind {
                IFA_ADDRESS => address = ip(value),
                IFA_LOCAL => local = ip(value),
                IFA_BROADCAST => broadcast = ip(value),
                IFA_FLAGS => flags = number32(value)?,
                _ => {}
            }
        }
        let own = local.or(address)?;
        Some(Address {
            index: number32(body.get(4..)?)?,
            local: own,
            peer: address.filter(|peer| *peer != own),
            prefix: *body.get(1)?,
            scope: *body.get(3)?,
            flags,
            broadcast: match broadcast {
                Some(IpAddr::V4(broadcast)) => Some(broadcast),
                _ => None,
            },
        })
    }
}

impl Socket {
    /// Every address.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn addresses(&mut self) -> io::Result<Vec<Address>> {
        let answers = self.list(&Message::new(libc::RTM_GETADDR, 0, &[0; HEADER]))?;
        Ok(answers.iter().filter_map(Address::parse).collect())
    }

    /// Gives an interface an address, unless it has that one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_address(&mut self, address: &Address) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&[
            family(address.local),
            address.prefix,
            address.flags as u8,
            address.scope,
        ]);
        header[4..].copy_from_slice(&address.index.to_ne_bytes());
        let mut message = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL, &header);
        message.put_ip(IFA_LOCAL, address.local).put_ip(IFA_ADDRESS, address.peer.unwrap_or(address.local));
        if let Some(broadcast) = address.broadcast {
            message.put(IFA_BROADCAST, &broadcast.octets());
        }
        message.put_u32(IFA_FLAGS, address.flags);
        unless(self.request(message), &[libc::EEXIST]).map(drop)
    }
}
