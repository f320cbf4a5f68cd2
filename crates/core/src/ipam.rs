//! Which address a container gets: ranges, the order in which they are walked, and the files that say who holds what.
//!
//! The files are host-local's (`<dir>/<network>/<ip>`), so that either plugin can follow the other. Addresses are walked in a circle from
//! the one that was given last, so that none is used again before the others were: connection tracking still knows the last holder.

use std::net::IpAddr;

use crate::net::{Inet, Prefix, ip_from_bits, ip_to_bits};

/// Addresses of one subnet, first to last, both included; the gateway among them is never given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The network of the addresses, and their prefix length.
    pub subnet: Prefix,
    /// The first address.
    pub first: IpAddr,
    /// The last address.
    pub last: IpAddr,
    /// The way out.
    pub gateway: IpAddr,
}

/// Ranges that stand for each other: a container gets one address of a set. All of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeSet(Vec<Range>);

/// Why ranges cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRange {
    /// Too few addresses.
    #[error("the subnet {0} has no room for a gateway and a container")]
    TooSmall(Prefix),
    /// Addresses that no container can have.
    #[error("the subnet {0} is of {1} addresses")]
    NotUnicast(Prefix, &'static str),
    /// Nothing for a container.
    #[error("the range from {0} to {1} has no address but its gateway's")]
    GatewayAlone(IpAddr, IpAddr),
    /// An address that lies elsewhere.
    #[error("{what} {ip} does not lie in the subnet {subnet}")]
    Outside {
        /// The key.
        what: &'static str,
        /// Its value.
        ip: IpAddr,
        /// The range's subnet.
        subnet: Prefix,
    },
    /// First after last.
    #[error("the range from {0} to {1} is empty")]
    Empty(IpAddr, IpAddr),
    /// No range at all.
    #[error("a range set is empty")]
    NoRange,
    /// Two families in one set.
    #[error("the subnets {0} and {1} of one range set are of two address families")]
    Families(Prefix, Prefix),
    /// Two ranges share addresses.
    #[error("the ranges {} and {} overlap", .0.0, .0.1)]
    Overlap(Box<(Range, Range)>),
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} to {})", self.subnet, self.first, self.last)
    }
}

impl std::fmt::Display for RangeSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ranges: Vec<String> = self.0.iter().map(Range::to_string).collect();
        f.write_str(&ranges.join(", "))
    }
}

impl Range {
    /// What is not given has host-local's default: the second address to the last one (IPv4: before the broadcast address), and the
    /// second address as gateway. IPv4's first and last address are no container's, whatever is asked for.
    pub fn new(
        subnet: Prefix,
        first: Option<IpAddr>,
        last: Option<IpAddr>,
        gateway: Option<IpAddr>,
    ) -> Result<Self, BadRange> {
        if subnet.len() > subnet.bits() - 2 {
            return Err(BadRange::TooSmall(subnet));
        }
        if let Some(kind) = not_for_hosts(subnet.addr()) {
            return Err(BadRange::NotUnicast(subnet, kind));
        }
        let end = if subnet.is_v4() { before(subnet.last()) } else { subnet.last() };
        let second = subnet.nth(1).unwrap_or(subnet.addr());
        for (what, ip) in [("rangeStart", first), ("rangeEnd", last), ("gateway", gateway)] {
            if let Some(ip) = ip.filter(|ip| !subnet.contains(*ip)) {
                return Err(BadRange::Outside { what, ip, subnet });
            }
        }
        let first = first.filter(|ip| !subnet.is_v4() || *ip != subnet.addr()).unwrap_or(second);
        let last = last.filter(|ip| !subnet.is_v4() || *ip != subnet.last()).unwrap_or(end);
        let range = Self { subnet, first, last, gateway: gateway.unwrap_or(second) };
        if ip_to_bits(range.first) > ip_to_bits(range.last) {
            return Err(BadRange::Empty(range.first, range.last));
        }
        if (range.first, range.last) == (range.gateway, range.gateway) {
            return Err(BadRange::GatewayAlone(range.first, range.last));
        }
        Ok(range)
    }

    /// True when `ip` can be given.
    pub fn contains(&self, ip: IpAddr) -> bool {
        let (bits, first, last) = (ip_to_bits(ip), ip_to_bits(self.first), ip_to_bits(self.last));
        ip.is_ipv4() == self.first.is_ipv4() && (first..=last).contains(&bits)
    }

    /// How many addresses, the gateway's among them.
    pub fn size(&self) -> u128 {
        (ip_to_bits(self.last) - ip_to_bits(self.first)).saturating_add(1)
    }

    fn overlaps(&self, other: &Range) -> bool {
        self.contains(other.first) || self.contains(other.last) || other.contains(self.first)
    }

    /// `ip` as the container's device carries it.
    fn give(&self, ip: IpAddr) -> Given {
        // The length is the subnet's, of the same family.
        let inet = Inet::new(ip, self.subnet.len()).unwrap_or(Inet::host(ip));
        Given { inet, gateway: self.gateway }
    }
}

/// An address for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Given {
    /// The address with the subnet's length.
    pub inet: Inet,
    /// The range's gateway.
    pub gateway: IpAddr,
}

impl RangeSet {
    /// Refused: none, two families, overlaps.
    pub fn new(ranges: Vec<Range>) -> Result<Self, BadRange> {
        let first = ranges.first().ok_or(BadRange::NoRange)?;
        for (n, range) in ranges.iter().enumerate() {
            if range.subnet.is_v4() != first.subnet.is_v4() {
                return Err(BadRange::Families(first.subnet, range.subnet));
            }
            if let Some(other) = ranges[..n].iter().find(|other| range.overlaps(other)) {
                return Err(BadRange::Overlap(Box::new((*other, *range))));
            }
        }
        Ok(Self(ranges))
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range] {
        &self.0
    }

    /// True when two sets share an address.
    pub fn overlaps(&self, other: &RangeSet) -> bool {
        self.0.iter().any(|a| other.0.iter().any(|b| a.overlaps(b)))
    }

    /// True for IPv4.
    pub fn is_v4(&self) -> bool {
        self.0.first().is_some_and(|range| range.subnet.is_v4())
    }

    /// The range that has `ip`.
    pub fn find(&self, ip: IpAddr) -> Option<&Range> {
        self.0.iter().find(|range| range.contains(ip))
    }

    /// An address that somebody asks for by name. A gateway is nobody's.
    pub fn ask(&self, ip: IpAddr) -> Option<Given> {
        self.find(ip).filter(|range| range.gateway != ip).map(|range| range.give(ip))
    }

    /// The first free address after `last`, the one given last, in a circle through all ranges; `None`: all are held.
    pub fn next(&self, last: Option<IpAddr>, mut is_free: impl FnMut(IpAddr) -> bool) -> Option<Given> {
        let at = last.and_then(|ip| self.0.iter().position(|range| range.contains(ip)));
        let (start, after) = match (at, last) {
            (Some(n), Some(ip)) => (n, Some(ip)),
            _ => (0, None),
        };
        let count = self.0.len();
        // The range of `last` comes twice: what lies behind it first, what lies before it at the end.
        for step in 0..=count {
            let range = &self.0[(start + step) % count];
            let (from, to) = match after {
                Some(ip) if step == 0 => (ip_to_bits(ip).saturating_add(1), ip_to_bits(range.last)),
                Some(ip) if step == count => (ip_to_bits(range.first), ip_to_bits(ip)),
                None if step == count => break,
                _ => (ip_to_bits(range.first), ip_to_bits(range.last)),
            };
            let mut bits = from;
            while bits <= to {
                let ip = ip_from_bits(&range.first, bits);
                if ip != range.gateway && is_free(ip) {
                    return Some(range.give(ip));
                }
                let Some(next) = bits.checked_add(1) else { break };
                bits = next;
            }
        }
        None
    }
}

/// What the addresses around `ip` are for, when no host can have one.
fn not_for_hosts(ip: IpAddr) -> Option<&'static str> {
    match ip {
        ip if ip.is_multicast() => Some("multicast"),
        ip if ip.is_loopback() => Some("loopback"),
        IpAddr::V4(ip) if ip.octets()[0] == 0 => Some("unspecified"),
        IpAddr::V4(ip) if ip.octets()[0] >= 240 => Some("reserved"),
        _ => None,
    }
}

/// The address before `ip`, of the same family.
fn before(ip: IpAddr) -> IpAddr {
    ip_from_bits(&ip, ip_to_bits(ip).saturating_sub(1))
}

/// Who holds an address: the content of its file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Holder {
    /// The container.
    pub container_id: String,
    /// The device in it; host-local before 0.7 did not write it.
    pub ifname: Option<String>,
}

impl Holder {
    /// Reads an address file. `None`: it says nothing, as a host-local that was ended in the middle leaves it.
    pub fn parse(text: &str) -> Option<Self> {
        let mut lines = text.split(['\r', '\n']).map(str::trim).filter(|line| !line.is_empty());
        let container_id = lines.next()?.to_owned();
        Some(Self { container_id, ifname: lines.next().map(str::to_owned) })
    }

    /// True when it is this container's device.
    pub fn is(&self, container_id: &str, ifname: &str) -> bool {
        self.container_id == container_id && self.ifname.as_deref().is_none_or(|name| name == ifname)
    }
}

impl std::fmt::Display for Holder {
    /// The file's content, as host-local writes it: no newline at the end.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.container_id)?;
        self.ifname.as_ref().map_or(Ok(()), |ifname| write!(f, "\r\n{ifname}"))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn range(subnet: &str, first: &str, last: &str) -> Range {
        let ip = |text: &str| (!text.is_empty()).then(|| text.parse().unwrap());
        Range::new(subnet.parse().unwrap(), ip(first), ip(last), None).unwrap()
    }

    #[test]
    fn defaults_are_host_locals() {
        let v4 = range("10.1.15.0/24", "", "");
        assert_eq!(v4.to_string(), "10.1.15.0/24 (10.1.15.1 to 10.1.15.254)");
        assert_eq!(v4.gateway.to_string(), "10.1.15.1");
        let whole = range("10.1.15.0/24", "10.1.15.0", "10.1.15.255");
        assert_eq!(whole, v4, "the network's own and the broadcast address are nobody's");
        let v6 = range("fd00:15::/64", "", "");
        assert_eq!(v6.last.to_string(), "fd00:15::ffff:ffff:ffff:ffff");
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        let new = |subnet: &str, first: Option<&str>, last: Option<&str>| {
            let ip = |text: Option<&str>| text.map(|text| text.parse().unwrap());
            Range::new(subnet.parse().unwrap(), ip(first), ip(last), None).unwrap_err().to_string()
        };
        assert_eq!(new("10.0.0.0/31", None, None), "the subnet 10.0.0.0/31 has no room for a gateway and a container");
        assert_eq!(
            new("10.0.0.0/24", Some("10.0.1.1"), None),
            "rangeStart 10.0.1.1 does not lie in the subnet 10.0.0.0/24"
        );
        assert_eq!(new("224.0.0.0/24", None, None), "the subnet 224.0.0.0/24 is of multicast addresses");
        let alone = new("10.0.0.0/24", None, Some("10.0.0.1"));
        assert_eq!(alone, "the range from 10.0.0.1 to 10.0.0.1 has no address but its gateway's");
        let empty = new("10.0.0.0/24", Some("10.0.0.9"), Some("10.0.0.8"));
        assert_eq!(empty, "the range from 10.0.0.9 to 10.0.0.8 is empty");
        assert_eq!(RangeSet::new(vec![]).unwrap_err(), BadRange::NoRange);
        let mixed = RangeSet::new(vec![range("10.0.0.0/24", "", ""), range("fd00::/64", "", "")]);
        assert!(matches!(mixed, Err(BadRange::Families(..))));
        let twice = RangeSet::new(vec![range("10.0.0.0/24", "", "10.0.0.9"), range("10.0.0.0/24", "10.0.0.9", "")]);
        assert!(matches!(twice, Err(BadRange::Overlap(..))));
    }

    #[test]
    fn the_last_address_of_a_family_ends_the_walk() {
        let all = Prefix::strict("fe00::".parse().unwrap(), 8).unwrap();
        let last = all.last();
        let set = RangeSet::new(vec![Range::new(all, Some(last), None, None).unwrap()]).unwrap();
        assert_eq!(set.next(None, |_| true).unwrap().inet.addr, last);
        assert_eq!(set.next(Some(last), |_| false), None);
    }

    #[test]
    fn holder_files_are_host_locals() {
        let holder = Holder { container_id: "abc".into(), ifname: Some("eth0".into()) };
        assert_eq!(holder.to_string(), "abc\r\neth0");
        assert_eq!(Holder::parse("abc\r\neth0").unwrap(), holder);
        assert_eq!(Holder::parse("abc\n").unwrap(), Holder { container_id: "abc".into(), ifname: None });
        assert!(Holder::parse("abc").unwrap().is("abc", "eth7"));
        assert!(!holder.is("abc", "eth1"));
        assert_eq!(Holder::parse(" \r\n"), None);
    }

    /// All addresses in order, turned so that the one after `last` comes first.
    fn slow(set: &RangeSet, last: Option<IpAddr>, held: &BTreeSet<IpAddr>) -> Option<IpAddr> {
        let all: Vec<IpAddr> = set
            .ranges()
            .iter()
            .flat_map(|r| (ip_to_bits(r.first)..=ip_to_bits(r.last)).map(|bits| ip_from_bits(&r.first, bits)))
            .collect();
        let start = last.and_then(|ip| all.iter().position(|a| *a == ip)).map_or(0, |n| n + 1);
        let turned = all[start..].iter().chain(&all[..start]);
        turned.copied().find(|ip| !held.contains(ip) && set.ranges().iter().all(|r| r.gateway != *ip))
    }

    proptest! {
        #[test]
        fn the_walk_is_a_circle_from_the_last_one(
            bounds in prop::collection::vec((1u8..20, 0u8..20), 1..4),
            last in prop::option::of(0u8..80),
            held in prop::collection::btree_set(0u8..80, 0..80),
        ) {
            // One that holds its gateway alone is no range.
            let bounds = bounds.iter().enumerate().filter(|(_, bounds)| **bounds != (1, 0));
            let ranges: Vec<Range> = bounds.map(|(n, (first, more))| {
                let net = n as u8 * 64;
                let ip = |host: u8| IpAddr::from([10, 0, 0, net + host]);
                Range::new(Prefix::strict(ip(0), 26).unwrap(), Some(ip(*first)), Some(ip(first + more)), None).unwrap()
            }).collect();
            prop_assume!(!ranges.is_empty());
            let set = RangeSet::new(ranges).unwrap();
            let ip = |n: u8| IpAddr::from([10, 0, 0, n]);
            let held: BTreeSet<IpAddr> = held.into_iter().map(ip).collect();
            let given = set.next(last.map(ip), |ip| !held.contains(&ip));
            prop_assert_eq!(given.map(|g| g.inet.addr), slow(&set, last.map(ip), &held));
        }
    }
}
