//! Parameters of the network stack in the pod's namespace on the host, for the guest's: what a new namespace takes from the
//! node (`net.ipv4.conf`, sizes of TCP buffers), and what CNI plugins have set in it since.
//!
//! The guest's kernel begins with its own defaults. Only what differs from these is told, so that as a rule there is little to set.

use std::fs;

/// Where they are; a thread sees those of its own network namespace.
const ROOT: &str = "/proc/sys/net";

/// Longest value that is looked at.
const MAX_VALUE: usize = 256;

/// A parameter, by its path below `net`, with its value.
pub(crate) type Parameter = (String, String);

/// What the defaults are that this kernel and the guest's have in common. Switching forwarding changes others, so it comes first.
const IPV4_CONF: [(&str, &str); 24] = [
    ("forwarding", "0"),
    ("accept_local", "0"),
    ("accept_redirects", "1"),
    ("accept_source_route", "1"),
    ("arp_accept", "0"),
    ("arp_announce", "0"),
    ("arp_filter", "0"),
    ("arp_ignore", "0"),
    ("arp_notify", "0"),
    ("disable_policy", "0"),
    ("disable_xfrm", "0"),
    ("drop_gratuitous_arp", "0"),
    ("drop_unicast_in_l2_multicast", "0"),
    ("ignore_routes_with_linkdown", "0"),
    ("log_martians", "0"),
    ("promote_secondaries", "0"),
    ("proxy_arp", "0"),
    ("proxy_arp_pvlan", "0"),
    ("route_localnet", "0"),
    ("rp_filter", "0"),
    ("secure_redirects", "1"),
    ("send_redirects", "1"),
    ("shared_media", "1"),
    ("src_valid_mark", "0"),
];

/// The same. Router advertisements and the search for duplicates are not among them: addresses are those that the host has.
const IPV6_CONF: [(&str, &str); 11] = [
    ("disable_ipv6", "0"),
    ("forwarding", "0"),
    ("accept_redirects", "1"),
    ("accept_source_route", "0"),
    ("drop_unsolicited_na", "0"),
    ("hop_limit", "64"),
    ("ignore_routes_with_linkdown", "0"),
    ("keep_addr_on_down", "0"),
    ("ndisc_notify", "0"),
    ("proxy_ndp", "0"),
    ("use_tempaddr", "0"),
];

/// Those that are not an interface's. An empty default is none: such a parameter is always told.
const OTHERS: [(&str, &str); 32] = [
    ("core/somaxconn", "4096"),
    ("ipv4/icmp_echo_ignore_all", "0"),
    ("ipv4/icmp_echo_ignore_broadcasts", "1"),
    ("ipv4/ip_default_ttl", "64"),
    ("ipv4/ip_forward_use_pmtu", "0"),
    ("ipv4/ip_local_port_range", "32768\t60999"),
    ("ipv4/ip_no_pmtu_disc", "0"),
    ("ipv4/ip_nonlocal_bind", "0"),
    ("ipv4/ip_unprivileged_port_start", "1024"),
    ("ipv4/ping_group_range", "1\t0"),
    ("ipv4/tcp_congestion_control", ""),
    ("ipv4/tcp_ecn", "2"),
    ("ipv4/tcp_fastopen", "1"),
    ("ipv4/tcp_fin_timeout", "60"),
    ("ipv4/tcp_keepalive_intvl", "75"),
    ("ipv4/tcp_keepalive_probes", "9"),
    ("ipv4/tcp_keepalive_time", "7200"),
    ("ipv4/tcp_mtu_probing", "0"),
    ("ipv4/tcp_no_metrics_save", "0"),
    ("ipv4/tcp_notsent_lowat", "4294967295"),
    ("ipv4/tcp_retries2", "15"),
    ("ipv4/tcp_rmem", ""),
    ("ipv4/tcp_sack", "1"),
    ("ipv4/tcp_slow_start_after_idle", "1"),
    ("ipv4/tcp_syn_retries", "6"),
    ("ipv4/tcp_synack_retries", "5"),
    ("ipv4/tcp_timestamps", "1"),
    ("ipv4/tcp_tw_reuse", "2"),
    ("ipv4/tcp_window_scaling", "1"),
    ("ipv4/tcp_wmem", ""),
    ("ipv6/bindv6only", "0"),
    ("ipv6/ip_nonlocal_bind", "0"),
];

/// The parameters of the calling thread's namespace that are not one interface's.
pub(crate) fn of_namespace() -> Vec<Parameter> {
    let mut found: Vec<_> =
        OTHERS.iter().filter_map(|(name, default)| differing((*name).to_owned(), default)).collect();
    found.extend(conf("all"));
    found.extend(conf("default"));
    found
}

/// The parameters of an interface.
pub(crate) fn of_interface(name: &str) -> Vec<Parameter> {
    conf(name).collect()
}

fn conf(name: &str) -> impl Iterator<Item = Parameter> {
    let ipv4 = IPV4_CONF.iter().map(|entry| ("ipv4", entry));
    let ipv6 = IPV6_CONF.iter().map(|entry| ("ipv6", entry));
    ipv4.chain(ipv6).filter_map(move |(family, (parameter, default))| {
        differing(format!("{family}/conf/{name}/{parameter}"), default)
    })
}

/// A parameter that this kernel has and whose value is not the default one.
fn differing(name: String, default: &str) -> Option<Parameter> {
    let value = fs::read_to_string(format!("{ROOT}/{name}")).ok()?;
    let value = value.trim_end();
    (value != default && value.len() <= MAX_VALUE).then(|| (name, value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::super::{Namespace, NetError};
    use super::*;

    #[tokio::test]
    async fn what_was_set_in_the_namespace_is_found() {
        let set = |name: &str, value: &str| fs::write(format!("{ROOT}/{name}"), value).unwrap();
        let work = move |_: &mut bulkhead_netlink::Socket| {
            let before = of_namespace();
            set("core/somaxconn", "777");
            set("ipv4/ip_forward", "1");
            set("ipv4/conf/lo/arp_notify", "1");
            Ok::<_, NetError>((before, of_namespace(), of_interface("lo")))
        };
        let (before, after, lo) = Namespace::for_test().inside(work).await.unwrap();
        let value = |list: &[Parameter], name: &str| {
            list.iter().find(|(found, _)| found == name).map(|(_, value)| value.clone())
        };
        assert_eq!(value(&before, "core/somaxconn"), None);
        assert_eq!(value(&after, "core/somaxconn").as_deref(), Some("777"));
        for name in ["ipv4/conf/all/forwarding", "ipv4/conf/default/forwarding"] {
            assert_eq!(value(&after, name).as_deref(), Some("1"), "{name}");
        }
        assert_eq!(value(&lo, "ipv4/conf/lo/arp_notify").as_deref(), Some("1"));
        assert_eq!(of_interface("nonexistent"), []);
    }
}
