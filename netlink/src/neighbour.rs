//! Neighbours: hardware addresses of others.

use std::io;
use std::net::IpAddr;

use crate::attributes::{Attributes, family, ip, number16, number32};
use crate::message::Message;
use crate::socket::Socket;
use crate::{Answer, Mac};

/// `struct ndmsg`.
const HEADER: usize = 12;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;

/// A neighbour that somebody has entered for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Neighbour {
    /// The interface's number.
    pub index: u32,
    /// Its address.
    pub address: IpAddr,
    /// Its hardware address.
    pub mac: Mac,
}

impl Neighbour {
    fn parse(answer: &Answer) -> Option<Neighbour> {
        let body = &answer.body;
        if answer.kind != libc::RTM_NEWNEIGH || number16(body.get(8..)?)? & libc::NUD_PERMANENT == 0 {
            return None;
        }
        let (mut address, mut mac) = (None, None);
        for (kind, value) in Attributes::behind(body, HEADER) {
            match kind {
                NDA_DST => address = ip(value),
                NDA_LLADDR => mac = value.try_into().ok(),
                _ => {}
            }
        }
        Some(Neighbour { index: number32(body.get(4..)?)?, address: address?, mac: mac? })
    }
}

impl Socket {
    /// Every permanent neighbour.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn permanent_neighbours(&mut self) -> io::Result<Vec<Neighbour>> {
        let answers = self.list(&Message::new(libc::RTM_GETNEIGH, 0, &[0; HEADER]))?;
        Ok(answers.iter().filter_map(Neighbour::parse).collect())
    }

    /// Enters a neighbour for good.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_neighbour(&mut self, neighbour: &Neighbour) -> io::Result<()> {
        let mut header = [0; HEADER];
        header[0] = family(neighbour.address);
        header[4..8].copy_from_slice(&neighbour.index.to_ne_bytes());
        header[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        let flags = libc::NLM_F_CREATE | libc::NLM_F_REPLACE;
        let mut message = Message::new(libc::RTM_NEWNEIGH, flags, &header);
        message.put_ip(NDA_DST, neighbour.address).put(NDA_LLADDR, &neighbour.mac);
        self.request(message)
    }
}
