//! Address arithmetic as a person learns it: class, network and host part, broadcast, masks; and how a network is cut into one subnet
//! for each node.
//!
//! ```text
//!   129.5.1.1 (class B, /16)   10000001.00000101 | 00000001.00000001
//!                              └── network ────┘   └──── host ─────┘
//! ```

use std::net::{IpAddr, Ipv4Addr};

use serde::{Serialize, Serializer};

use crate::config::{self, ConfigFault};
use crate::net::{BadValue, Inet, Prefix, family_bits, ip_from_bits, ip_to_bits};

/// What can be said of one address and its prefix.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Calc {
    /// The address.
    pub address: IpAddr,
    /// Prefix length in bits.
    pub prefix_length: u8,
    /// True when no length was given: then it is the class's (IPv4), or 64 (IPv6).
    pub assumed_length: bool,
    /// IPv4: the class from before prefixes, `A` to `E`.
    pub class: Option<char>,
    /// The class's mask; classes D and E have none.
    pub default_mask: Option<Ipv4Addr>,
    /// The network, as a prefix.
    pub network: Prefix,
    /// The network's first address.
    pub network_address: IpAddr,
    /// The address with its network bits cleared.
    pub host_part: IpAddr,
    /// IPv4 up to /30: the address that all hosts hear.
    pub broadcast: Option<IpAddr>,
    /// The mask: network bits one.
    pub mask: IpAddr,
    /// The mask's complement.
    pub wildcard: IpAddr,
    /// First address that a host may have.
    pub first_host: IpAddr,
    /// Last address that a host may have.
    pub last_host: IpAddr,
    /// Addresses that hosts may have.
    #[serde(serialize_with = "number")]
    pub hosts: Count,
    /// All addresses.
    #[serde(serialize_with = "number")]
    pub addresses: Count,
    /// The address in binary, `|` between network and host part.
    pub binary: String,
    /// What the address is set aside for, where it is.
    pub used_for: Option<&'static str>,
}

/// How many: 0 to 2^128, printed as a decimal number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Count {
    /// Fits.
    Number(u128),
    /// 2^128, one more than fits.
    All,
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Count::Number(n) => write!(f, "{n}"),
            Count::All => f.write_str("340282366920938463463374607431768211456"),
        }
    }
}

/// JSON numbers hold 2^53 exactly; beyond that a decimal text.
fn number<S: Serializer>(count: &Count, s: S) -> Result<S::Ok, S::Error> {
    match count {
        Count::Number(n) if *n <= 1 << 53 => s.serialize_u64(*n as u64),
        big => s.collect_str(big),
    }
}

/// Everything about `text`: an address with or without `/LEN`.
pub fn calc(text: &str) -> Result<Calc, BadValue> {
    let bad = || BadValue::new(text, "an address like 129.5.1.1, 10.1.15.2/24 or fd00::1/64");
    let (address, given) = match text.split_once('/') {
        Some(_) => text.parse::<Inet>().map(|i| (i.addr, Some(i.len()))).map_err(|_| bad())?,
        None => (text.parse::<IpAddr>().map_err(|_| bad())?, None),
    };
    let class = if let IpAddr::V4(v4) = address { Some(class(v4)) } else { None };
    let default = class.and_then(class_length);
    let len = given.unwrap_or(match address {
        IpAddr::V4(_) => default.unwrap_or(32),
        IpAddr::V6(_) => 64,
    });
    let bits = family_bits(&address);
    let network = Prefix::truncate(address, len)?;
    let (first, last) = (network.addr(), network.last());
    // The last two lengths have no broadcast: /31 is a point-to-point link (RFC 3021), /32 a host. IPv6 has none at all.
    let broadcast = (address.is_ipv4() && len < 31).then_some(last);
    let wildcard = ip_to_bits(last) - ip_to_bits(first);
    let step = |ip: IpAddr, up: bool| {
        let n = ip_to_bits(ip);
        ip_from_bits(&ip, if up { n + 1 } else { n - 1 })
    };
    let all = if len == 0 && bits == 128 { Count::All } else { Count::Number(wildcard + 1) };
    let (first_host, last_host, hosts) = match (broadcast, all) {
        (Some(_), Count::Number(n)) => (step(first, true), step(last, false), Count::Number(n - 2)),
        _ => (first, last, all),
    };
    Ok(Calc {
        address,
        prefix_length: len,
        assumed_length: given.is_none(),
        class,
        default_mask: default.map(|len| Ipv4Addr::from_bits(u32::MAX << (32 - len))),
        network,
        network_address: first,
        host_part: ip_from_bits(&address, ip_to_bits(address) & wildcard),
        broadcast,
        mask: ip_from_bits(&address, !wildcard & (u128::MAX >> (128 - u32::from(bits)))),
        wildcard: ip_from_bits(&address, wildcard),
        first_host,
        last_host,
        hosts,
        addresses: all,
        binary: binary(address, len),
        used_for: used_for(address),
    })
}

/// The class of an address by its leading bits (RFC 791 section 3.2; D and E by RFC 1112).
fn class(address: Ipv4Addr) -> char {
    match address.octets()[0] {
        0..=127 => 'A',
        128..=191 => 'B',
        192..=223 => 'C',
        224..=239 => 'D',
        240..=255 => 'E',
    }
}

/// Network bits of a class; D and E have no network part.
const fn class_length(class: char) -> Option<u8> {
    match class {
        'A' => Some(8),
        'B' => Some(16),
        'C' => Some(24),
        _ => None,
    }
}

/// The address in binary: groups of 8 (IPv4, joined by `.`) or 16 bits (IPv6, `:`), with ` | ` where the network ends.
fn binary(address: IpAddr, len: u8) -> String {
    let bits = family_bits(&address);
    let (group, joint) = if address.is_ipv4() { (8, '.') } else { (16, ':') };
    let mut text = String::new();
    for bit in 0..bits {
        let edge = bit == len && bit > 0;
        if edge {
            text.push_str(" | ");
        } else if bit > 0 && bit % group == 0 {
            text.push(joint);
        }
        text.push(if ip_to_bits(address) >> (bits - 1 - bit) & 1 == 1 { '1' } else { '0' });
    }
    text
}

/// What IANA's special-purpose registries (RFC 6890) set these apart for.
fn used_for(address: IpAddr) -> Option<&'static str> {
    const LIST: [(&str, &str); 19] = [
        ("0.0.0.0/8", "this network"),
        ("10.0.0.0/8", "private use"),
        ("100.64.0.0/10", "shared by carriers (CGNAT)"),
        ("127.0.0.0/8", "this host (loopback)"),
        ("169.254.0.0/16", "link-local"),
        ("172.16.0.0/12", "private use"),
        ("192.0.2.0/24", "documentation"),
        ("192.168.0.0/16", "private use"),
        ("198.18.0.0/15", "benchmarks"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("255.255.255.255/32", "every host on this link (broadcast)"),
        ("240.0.0.0/4", "reserved"),
        ("::1/128", "this host (loopback)"),
        ("2001:db8::/32", "documentation"),
        ("fc00::/7", "private use (unique local)"),
        ("fe80::/10", "link-local"),
        ("ff00::/8", "multicast"),
    ];
    let covers = |prefix: &str| prefix.parse::<Prefix>().is_ok_and(|p| p.contains(address));
    LIST.iter().find(|(prefix, _)| covers(prefix)).map(|(_, use_)| *use_)
}

/// A network cut into one subnet for each node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NetworkPlan {
    /// The whole.
    pub network: Prefix,
    /// Nodes asked for.
    pub nodes: u64,
    /// Containers asked for on each node.
    pub containers: u64,
    /// Length of each node's subnet: flannel's `SubnetLen`.
    pub subnet_length: u8,
    /// Subnets that nodes can take. The first of the network is left out, as flannel does.
    #[serde(serialize_with = "number")]
    pub subnets: Count,
    /// Containers that fit on one node: without the network address (the tunnel device's), the bridge's and, in IPv4, the broadcast's.
    #[serde(serialize_with = "number")]
    pub containers_each: Count,
    /// The first subnets, as an example.
    pub examples: Vec<Prefix>,
    /// The network config to put into the store.
    pub config: String,
}

/// Why a network cannot be cut as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanFault {
    /// Zero of something.
    #[error("a plan needs at least one node and one container")]
    Nothing,
    /// No container can have an address in it.
    #[error(transparent)]
    Unusable(#[from] ConfigFault),
    /// Too small.
    #[error(
        "{network} is too small: {nodes} nodes with {containers} containers each need a network of /{needed} or larger"
    )]
    TooSmall {
        /// The network.
        network: Prefix,
        /// As asked.
        nodes: u64,
        /// As asked.
        containers: u64,
        /// The longest prefix that would do.
        needed: u8,
        /// The network of that length around this one, where containers can be in it.
        wider: Option<Prefix>,
    },
    /// No network of the family is large enough.
    #[error("{nodes} nodes with {containers} containers each fit in no network of this family")]
    Never {
        /// As asked.
        nodes: u64,
        /// As asked.
        containers: u64,
    },
}

/// Cuts `network` for `nodes` with `containers` each: the longest subnets that hold the containers, but not longer than flannel's
/// default (/24, /64) unless the nodes need it.
pub fn plan(network: Prefix, nodes: u64, containers: u64) -> Result<NetworkPlan, PlanFault> {
    if nodes == 0 || containers == 0 {
        return Err(PlanFault::Nothing);
    }
    config::usable(network)?;
    let bits = network.bits();
    // Three addresses of a subnet are no container's: network (the tunnel device), bridge, broadcast (kept free in IPv6 too).
    let host_bits = ceil_log2(u128::from(containers) + 3).max(2);
    let node_bits = ceil_log2(u128::from(nodes) + 1).max(2);
    let needed = u32::from(bits).checked_sub(host_bits + node_bits);
    let needed = needed.ok_or(PlanFault::Never { nodes, containers })? as u8;
    if network.len() > needed {
        let wider = Prefix::truncate(network.addr(), needed).ok().filter(|wider| config::usable(*wider).is_ok());
        return Err(PlanFault::TooSmall { network, nodes, containers, needed, wider });
    }
    let (longest, shortest) = (bits - host_bits as u8, network.len() + node_bits as u8);
    let usual = if network.is_v4() { 24 } else { 64 };
    let len = usual.clamp(shortest, longest);
    let subnets = (1u128 << (len - network.len()).min(127)) - 1;
    let each = if bits - len == 128 { u128::MAX } else { (1u128 << (bits - len)) - 3 };
    let examples = (1..=nodes.min(4)).filter_map(|n| network.subnet(len, n.into())).collect();
    let (net, length) = if network.is_v4() { ("Network", "SubnetLen") } else { ("IPv6Network", "IPv6SubnetLen") };
    let family = if network.is_v4() { "" } else { "\"EnableIPv4\":false,\"EnableIPv6\":true," };
    let config = format!("{{{family}\"{net}\":\"{network}\",\"{length}\":{len},\"Backend\":{{\"Type\":\"vxlan\"}}}}");
    let (subnets, containers_each) = (Count::Number(subnets), Count::Number(each));
    Ok(NetworkPlan { network, nodes, containers, subnet_length: len, subnets, containers_each, examples, config })
}

/// The smallest `b` with 2^b ≥ `n`, for `n` ≥ 1.
const fn ceil_log2(n: u128) -> u32 {
    128 - (n - 1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetworkConfig;
    use proptest::prelude::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_example_that_the_basics_open_with() {
        let c = calc("129.5.1.1").unwrap();
        assert_eq!((c.class, c.default_mask), (Some('B'), Some(Ipv4Addr::new(255, 255, 0, 0))));
        assert_eq!((c.prefix_length, c.assumed_length), (16, true));
        assert_eq!((c.network_address, c.broadcast), (ip("129.5.0.0"), Some(ip("129.5.255.255"))));
        assert_eq!((c.host_part, c.wildcard), (ip("0.0.1.1"), ip("0.0.255.255")));
        assert_eq!((c.first_host, c.last_host), (ip("129.5.0.1"), ip("129.5.255.254")));
        assert_eq!((c.hosts, c.addresses), (Count::Number(65_534), Count::Number(65_536)));
        assert_eq!(c.binary, "10000001.00000101 | 00000001.00000001");
    }

    #[test]
    fn ipv6_has_no_class_and_no_broadcast() {
        let c = calc("fd00:15::2/64").unwrap();
        assert_eq!((c.class, c.broadcast, c.default_mask), (None, None, None));
        assert_eq!((c.network_address, c.last_host), (ip("fd00:15::"), ip("fd00:15::ffff:ffff:ffff:ffff")));
        assert_eq!(c.hosts, Count::Number(1 << 64));
        assert_eq!(c.mask, ip("ffff:ffff:ffff:ffff::"));
        assert_eq!(c.used_for, Some("private use (unique local)"));
        assert!(c.binary.starts_with("1111110100000000:") && c.binary.matches(" | ").count() == 1);
        assert_eq!(calc("::/0").unwrap().addresses, Count::All);
    }

    #[test]
    fn short_subnets_have_no_broadcast() {
        let two = calc("10.0.0.1/31").unwrap();
        assert_eq!((two.broadcast, two.hosts, two.first_host), (None, Count::Number(2), ip("10.0.0.0")));
        let one = calc("10.0.0.1/32").unwrap();
        assert_eq!((one.hosts, one.last_host, one.binary.contains('|')), (Count::Number(1), ip("10.0.0.1"), false));
        assert_eq!(calc("0.0.0.0/0").unwrap().hosts, Count::Number((1 << 32) - 2));
    }

    #[test]
    fn what_is_no_address_is_refused_with_an_example() {
        for bad in ["", "129.5.1", "129.5.1.1/33", "129.5.1.1/", "fd00::1/129", "129.5.1.1/016", "host"] {
            let error = calc(bad).unwrap_err().to_string();
            assert!(error.contains("is not an address like 129.5.1.1"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_plan_says_how_to_cut() {
        let p = plan("10.244.0.0/16".parse().unwrap(), 100, 50).unwrap();
        assert_eq!((p.subnet_length, p.subnets, p.containers_each), (24, Count::Number(255), Count::Number(253)));
        assert_eq!(p.examples[0].to_string(), "10.244.1.0/24");
        assert_eq!(p.config, r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#);
        let many = plan("10.244.0.0/16".parse().unwrap(), 1000, 20).unwrap();
        assert_eq!((many.subnet_length, many.containers_each), (26, Count::Number(61)));
        let error = plan("10.244.0.0/20".parse().unwrap(), 100, 200).unwrap_err();
        assert!(error.to_string().ends_with("need a network of /17 or larger"), "{error}");
        assert_eq!(plan("10.0.0.0/8".parse().unwrap(), 0, 1).unwrap_err(), PlanFault::Nothing);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        /// A plan holds what was asked, and its config is one that agents take.
        #[test]
        fn a_plan_holds_what_was_asked(v4: bool, len in 5u8..=30, nodes in 1u64..5000, containers in 1u64..5000) {
            let network = if v4 { Prefix::truncate(ip("10.0.0.0"), len) } else { Prefix::truncate(ip("fd00::"), len * 4) }.unwrap();
            match plan(network, nodes, containers) {
                Ok(p) => {
                    let (Count::Number(subnets), Count::Number(each)) = (p.subnets, p.containers_each) else { panic!("{p:?}") };
                    prop_assert!(subnets >= nodes.into() && each >= containers.into());
                    prop_assert!(p.examples.iter().all(|e| network.covers(e)));
                    let (config, unknown) = NetworkConfig::parse(p.config.as_bytes()).unwrap();
                    prop_assert_eq!(config.networks(), vec![network]);
                    prop_assert!(unknown.is_empty());
                    let range = config.ranges().next().unwrap();
                    prop_assert!(range.count() >= nodes.into(), "{range:?}");
                }
                Err(PlanFault::TooSmall { needed, .. }) => {
                    prop_assert!(network.len() > needed);
                    let wider = Prefix::truncate(network.addr(), needed).unwrap();
                    prop_assert!(plan(wider, nodes, containers).is_ok());
                }
                Err(other) => prop_assert!(false, "{other}"),
            }
        }

        /// Against counting one by one.
        #[test]
        fn calc_equals_counting(bits: u32, len in 20u8..=32) {
            let address = Ipv4Addr::from_bits(bits);
            let c = calc(&format!("{address}/{len}")).unwrap();
            let inside = |n: &u32| u64::from(*n) >> (32 - len) == u64::from(bits) >> (32 - len);
            let near = bits.saturating_sub(1 << 12)..=bits.saturating_add(1 << 12);
            let all: Vec<u32> = near.filter(inside).collect();
            prop_assert_eq!(c.addresses, Count::Number(all.len() as u128));
            prop_assert_eq!(c.network_address, IpAddr::from(Ipv4Addr::from_bits(all[0])));
            let hosts = if len < 31 { &all[1..all.len() - 1] } else { &all[..] };
            prop_assert_eq!(c.first_host, IpAddr::from(Ipv4Addr::from_bits(hosts[0])));
            prop_assert_eq!(c.last_host, IpAddr::from(Ipv4Addr::from_bits(hosts[hosts.len() - 1])));
            prop_assert_eq!(c.hosts, Count::Number(hosts.len() as u128));
        }
    }
}
