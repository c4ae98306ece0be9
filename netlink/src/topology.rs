//! Making links as CNI plugins do, for tests.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::message::Message;
use crate::socket::Socket;

const HEADER: [u8; 16] = [0; 16];
const IFLA_IFNAME: u16 = 3;
const IFLA_LINK: u16 = 5;
const IFLA_LINKINFO: u16 = 18;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;

impl Socket {
    /// Makes a link of a kind that needs nothing else, or another link below it (`macvlan`).
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_link(&mut self, name: &str, kind: &str, below: Option<u32>) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut message = Message::new(libc::RTM_NEWLINK, flags, &HEADER);
        message.put_name(IFLA_IFNAME, name);
        if let Some(below) = below {
            message.put_u32(IFLA_LINK, below);
        }
        message.nest(IFLA_LINKINFO, |info| {
            info.put_name(IFLA_INFO_KIND, kind);
        });
        self.request(message)
    }

    /// Makes a pair of virtual Ethernet links, the other one in a namespace.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn add_veth(&mut self, name: &str, other: &str, namespace: BorrowedFd<'_>) -> io::Result<()> {
        let flags = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        let mut message = Message::new(libc::RTM_NEWLINK, flags, &HEADER);
        message.put_name(IFLA_IFNAME, name);
        message.nest(IFLA_LINKINFO, |info| {
            info.put_name(IFLA_INFO_KIND, "veth");
            info.nest(IFLA_INFO_DATA, |data| {
                data.nest_behind(VETH_INFO_PEER, &HEADER, |peer| {
                    peer.put_name(IFLA_IFNAME, other);
                    peer.put_u32(IFLA_NET_NS_FD, namespace.as_raw_fd().cast_unsigned());
                });
            });
        });
        self.request(message)
    }
}
