//! Which packets of a guest may leave it: those that come from the addresses that its interface has been given.
//!
//! A program of classic BPF, as [`bulkhead_netlink`] attaches it. Where the interface has no address, its hardware address
//! alone is held to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bulkhead_netlink::{Instruction, Mac, Verdict};

use super::bpf::{Assembler, LOAD_8, LOAD_16, LOAD_32, Label};

/// `SKF_AD_OFF + SKF_AD_VLAN_TAG_PRESENT`: whether there is a VLAN tag, which the kernel keeps outside of the packet.
const VLAN_TAG_PRESENT: u32 = (-0x1000_i32 + 48).cast_unsigned();

// Offsets from the beginning of the Ethernet header.
const SOURCE: u32 = 6;
const ETHERTYPE: u32 = 12;
const NETWORK: u32 = 14;
const IPV4_SOURCE: u32 = NETWORK + 12;
const ARP_HARDWARE_SOURCE: u32 = NETWORK + 8;
const ARP_SOURCE: u32 = NETWORK + 14;
const IPV6_NEXT: u32 = NETWORK + 6;
const IPV6_SOURCE: u32 = NETWORK + 8;
const IPV6_PAYLOAD: u32 = NETWORK + 40;
/// In a neighbour advertisement.
const ND_TARGET: u32 = IPV6_PAYLOAD + 8;

const IPV4: u32 = 0x0800;
const ARP: u32 = 0x0806;
const IPV6: u32 = 0x86dd;

// What follows an IPv6 header.
const HOP_BY_HOP: u32 = 0;
const ROUTING: u32 = 43;
const AUTHENTICATION: u32 = 51;
const ICMPV6: u32 = 58;
const DESTINATION_OPTIONS: u32 = 60;

// ICMPv6.
const MLD_REPORT: u32 = 131;
const MLD_DONE: u32 = 132;
const ROUTER_ADVERTISEMENT: u32 = 134;
const NEIGHBOUR_SOLICITATION: u32 = 135;
const NEIGHBOUR_ADVERTISEMENT: u32 = 136;
const REDIRECT: u32 = 137;
const MLD2_REPORT: u32 = 143;

/// The program that matches what an interface with these addresses may send.
pub(crate) fn allowed(mac: Mac, addresses: &[IpAddr]) -> Vec<Instruction> {
    let mut code = Assembler::default();
    let (allow, deny) = (code.new_label(), code.new_label());
    code.load(LOAD_32, VLAN_TAG_PRESENT);
    code.unless_equal(0, deny);
    code.unless_mac(SOURCE, mac, deny);
    if !addresses.is_empty() {
        let v4: Vec<Ipv4Addr> = addresses
            .iter()
            .filter_map(|ip| match ip {
                IpAddr::V4(ip) => Some(*ip),
                IpAddr::V6(_) => None,
            })
            .collect();
        let v6: Vec<Ipv6Addr> = addresses
            .iter()
            .filter_map(|ip| match ip {
                IpAddr::V6(ip) => Some(*ip),
                IpAddr::V4(_) => None,
            })
            .collect();
        let (ipv4, arp, ipv6) = (code.new_label(), code.new_label(), code.new_label());
        code.load(LOAD_16, ETHERTYPE);
        for (kind, label) in [(IPV4, ipv4), (ARP, arp), (IPV6, ipv6)] {
            code.if_equal(kind, label);
        }
        code.jump(deny);

        code.place(ipv4);
        code.load(LOAD_32, IPV4_SOURCE);
        v4.iter().for_each(|ip| code.if_equal(ip.to_bits(), allow));
        code.jump(deny);

        code.place(arp);
        code.unless_mac(ARP_HARDWARE_SOURCE, mac, deny);
        code.load(LOAD_32, ARP_SOURCE);
        v4.iter().for_each(|ip| code.if_equal(ip.to_bits(), allow));
        code.jump(deny);

        code.place(ipv6);
        code.ipv6(&v6, allow, deny);
    }
    code.place(allow);
    code.end(Verdict::Matches);
    code.place(deny);
    code.end(Verdict::Passes);
    code.finish()
}

/// The program that matches everything.
pub(crate) fn everything() -> Vec<Instruction> {
    vec![Instruction::end(Verdict::Matches)]
}

/// The program that lets nothing through.
pub(crate) fn nothing() -> Vec<Instruction> {
    vec![Instruction::end(Verdict::Drops)]
}

impl Assembler {
    fn unless_mac(&mut self, offset: u32, mac: Mac, to: Label) {
        let [a, b, c, d, e, f] = mac;
        self.load(LOAD_32, offset);
        self.unless_equal(u32::from_be_bytes([a, b, c, d]), to);
        self.load(LOAD_16, offset + 4);
        self.unless_equal(u16::from_be_bytes([e, f]).into(), to);
    }

    /// Goes on at `to` if one of the addresses is at the offset.
    pub(crate) fn if_ipv6(&mut self, offset: u32, addresses: &[Ipv6Addr], to: Label) {
        for address in addresses {
            let next = self.new_label();
            for (position, word) in (offset..).step_by(4).zip(address.octets().as_chunks::<4>().0) {
                self.load(LOAD_32, position);
                self.unless_equal(u32::from_be_bytes(*word), next);
            }
            self.jump(to);
            self.place(next);
        }
    }

    /// Neighbour discovery is ARP's successor: it may not speak for others, nor for routers, nor hide behind headers.
    fn ipv6(&mut self, addresses: &[Ipv6Addr], allow: Label, deny: Label) {
        let [icmp, options, hidden, source] = [(); 4].map(|()| self.new_label());
        self.load(LOAD_8, IPV6_NEXT);
        self.if_equal(ICMPV6, icmp);
        self.if_equal(HOP_BY_HOP, options);
        for header in [ROUTING, DESTINATION_OPTIONS, AUTHENTICATION] {
            self.if_equal(header, hidden);
        }
        self.jump(source);

        self.place(icmp);
        self.load(LOAD_8, IPV6_PAYLOAD);
        self.if_equal(ROUTER_ADVERTISEMENT, deny);
        self.if_equal(REDIRECT, deny);
        self.unless_equal(NEIGHBOUR_ADVERTISEMENT, source);
        self.if_ipv6(ND_TARGET, addresses, source);
        self.jump(deny);

        // Memberships of multicast groups have a router alert in front.
        self.place(options);
        self.load(LOAD_8, IPV6_PAYLOAD);
        self.unless_equal(ICMPV6, hidden);
        self.load(LOAD_8, IPV6_PAYLOAD + 1);
        self.unless_equal(0, deny);
        self.load(LOAD_8, IPV6_PAYLOAD + 8);
        for kind in [MLD_REPORT, MLD_DONE, MLD2_REPORT] {
            self.if_equal(kind, source);
        }
        self.jump(deny);

        self.place(hidden);
        self.load(LOAD_8, IPV6_PAYLOAD);
        for header in [HOP_BY_HOP, ROUTING, AUTHENTICATION, ICMPV6, DESTINATION_OPTIONS] {
            self.if_equal(header, deny);
        }

        self.place(source);
        self.if_ipv6(IPV6_SOURCE, addresses, allow);
        // Who has no address yet asks whether others have it.
        let unspecified = self.new_label();
        self.if_ipv6(IPV6_SOURCE, &[Ipv6Addr::UNSPECIFIED], unspecified);
        self.jump(deny);
        self.place(unspecified);
        self.load(LOAD_8, IPV6_NEXT);
        self.if_equal(HOP_BY_HOP, allow);
        self.unless_equal(ICMPV6, deny);
        self.load(LOAD_8, IPV6_PAYLOAD);
        self.unless_equal(NEIGHBOUR_SOLICITATION, deny);
        self.jump(allow);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;

    use super::*;
    use crate::net::bpf::attach;

    const MAC: Mac = [2, 0, 0, 0, 0, 1];
    const OTHER: Mac = [2, 0, 0, 0, 0, 2];

    /// Has the kernel run the program over packets: a socket whose filter it is receives those that it matches.
    fn judge(program: &[Instruction], packet: &[u8]) -> bool {
        let (sender, receiver) = UnixDatagram::pair().unwrap();
        attach(&receiver, program).unwrap();
        receiver.set_nonblocking(true).unwrap();
        let _ = sender.send(packet);
        receiver.recv(&mut [0; 2048]).is_ok()
    }

    fn ethernet(source: Mac, ethertype: u16, payload: &[u8]) -> Vec<u8> {
        [&[0xff; 6], &source[..], &ethertype.to_be_bytes(), payload].concat()
    }

    fn ipv4(source: &str) -> Vec<u8> {
        let mut header = vec![0; 40];
        header[12..16].copy_from_slice(&source.parse::<Ipv4Addr>().unwrap().octets());
        header
    }

    fn arp(hardware: Mac, source: &str) -> Vec<u8> {
        let ip = source.parse::<Ipv4Addr>().unwrap().octets();
        [&[0, 1, 8, 0, 6, 4, 0, 1], &hardware[..], &ip, &[0; 10]].concat()
    }

    fn ipv6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
        let ip = source.parse::<Ipv6Addr>().unwrap().octets();
        [&[0x60, 0, 0, 0, 0, 0, next, 255], &ip[..], &[0xff; 16], payload].concat()
    }

    fn icmp(kind: u8, target: &str) -> Vec<u8> {
        [&[kind, 0, 0, 0, 0, 0, 0, 0], &target.parse::<Ipv6Addr>().unwrap().octets()[..]].concat()
    }

    fn program() -> Vec<Instruction> {
        allowed(MAC, &["10.0.0.5", "10.0.0.6", "fd00::5", "fe80::5"].map(|ip| ip.parse().unwrap()))
    }

    #[test]
    fn what_comes_from_the_interfaces_addresses_passes() {
        let program = program();
        let router_alert = |icmp: Vec<u8>| [&[58, 0, 5, 2, 0, 0, 1, 0], &icmp[..]].concat();
        for (what, ethertype, payload) in [
            ("the first IPv4 address", 0x0800, ipv4("10.0.0.5")),
            ("the second IPv4 address", 0x0800, ipv4("10.0.0.6")),
            ("ARP", 0x0806, arp(MAC, "10.0.0.6")),
            ("an IPv6 address", 0x86dd, ipv6("fd00::5", 6, &[0; 20])),
            ("the link's IPv6 address", 0x86dd, ipv6("fe80::5", 17, &[0; 8])),
            ("a fragment", 0x86dd, ipv6("fd00::5", 44, &[17; 16])),
            ("an echo", 0x86dd, ipv6("fd00::5", 58, &icmp(128, "::"))),
            ("a solicitation", 0x86dd, ipv6("fd00::5", 58, &icmp(135, "fd00::1"))),
            ("an advertisement", 0x86dd, ipv6("fe80::5", 58, &icmp(136, "fd00::5"))),
            ("a question for duplicates", 0x86dd, ipv6("::", 58, &icmp(135, "fd00::5"))),
            ("a membership", 0x86dd, ipv6("fe80::5", 0, &router_alert(icmp(143, "::")))),
            (
                "a membership before there is an address",
                0x86dd,
                ipv6("::", 0, &router_alert(icmp(143, "::"))),
            ),
        ] {
            assert!(judge(&program, &ethernet(MAC, ethertype, &payload)), "{what}");
            assert!(!judge(&program, &ethernet(OTHER, ethertype, &payload)), "{what}, from another MAC");
        }
    }

    #[test]
    fn what_speaks_for_others_does_not() {
        let program = program();
        let hidden = |kind: u8, header: &[u8]| [header, &icmp(kind, "fd00::1")].concat();
        for (what, ethertype, payload) in [
            ("another IPv4 address", 0x0800, ipv4("10.0.0.7")),
            ("no IPv4 address", 0x0800, ipv4("0.0.0.0")),
            ("ARP for another address", 0x0806, arp(MAC, "10.0.0.7")),
            ("ARP from another MAC", 0x0806, arp(OTHER, "10.0.0.5")),
            ("another IPv6 address", 0x86dd, ipv6("fd00::6", 6, &[0; 20])),
            ("no IPv6 address", 0x86dd, ipv6("::", 6, &[0; 20])),
            ("an advertisement for another", 0x86dd, ipv6("fd00::5", 58, &icmp(136, "fd00::1"))),
            ("a router's advertisement", 0x86dd, ipv6("fe80::5", 58, &icmp(134, "::"))),
            ("a redirect", 0x86dd, ipv6("fe80::5", 58, &icmp(137, "fd00::1"))),
            (
                "an advertisement behind options",
                0x86dd,
                ipv6("fd00::5", 0, &hidden(136, &[58, 0, 0, 0, 0, 0, 0, 0])),
            ),
            ("one behind long options", 0x86dd, ipv6("fd00::5", 0, &hidden(143, &[58, 1, 0, 0, 0, 0, 0, 0]))),
            (
                "one behind more options",
                0x86dd,
                ipv6("fd00::5", 60, &hidden(136, &[58, 0, 0, 0, 0, 0, 0, 0])),
            ),
            ("one behind two headers", 0x86dd, ipv6("fd00::5", 0, &hidden(136, &[60, 0, 0, 0, 0, 0, 0, 0]))),
            ("another protocol", 0x88cc, vec![0; 60]),
        ] {
            assert!(!judge(&program, &ethernet(MAC, ethertype, &payload)), "{what}");
        }
        for length in 0..40 {
            let cut = &ethernet(MAC, 0x86dd, &ipv6("fd00::5", 58, &icmp(136, "fd00::5")))[..length];
            assert!(!judge(&program, cut), "{length} bytes of a packet");
        }
    }

    #[test]
    fn an_interface_without_addresses_is_held_to_its_hardware_address() {
        let program = allowed(MAC, &[]);
        assert!(judge(&program, &ethernet(MAC, 0x88cc, &[0; 60])));
        assert!(judge(&program, &ethernet(MAC, 0x0800, &ipv4("10.0.0.7"))));
        assert!(!judge(&program, &ethernet(OTHER, 0x0800, &ipv4("10.0.0.7"))));
    }

    #[test]
    fn many_addresses_fit() {
        let addresses: Vec<IpAddr> = (0..60).map(|n| Ipv6Addr::from_bits(n).into()).collect();
        let program = allowed(MAC, &addresses);
        assert!(judge(&program, &ethernet(MAC, 0x86dd, &ipv6("::3b", 6, &[0; 20]))));
        assert!(!judge(&program, &ethernet(MAC, 0x86dd, &ipv6("::3c", 6, &[0; 20]))));
        assert!(judge(&everything(), &[0; 20]));
    }
}
