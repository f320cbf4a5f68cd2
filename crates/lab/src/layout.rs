//! Which addresses a lab uses: fixed by its scenario, the same on every run.
//!
//! ```text
//!            underlay 10.168.0.0/24, gateway 10.168.0.1
//!        ┌───────────────┴───────────────┐
//!   node1 eth0 10.168.0.2           node2 eth0 10.168.0.3
//!   subnet 10.1.15.0/24             subnet 10.1.16.0/24
//!   container-1 10.1.15.2           container-2 10.1.16.3
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use twill_core::net::{BadValue, Inet, LinkName, Prefix};

/// Most nodes of a lab.
pub const MOST_NODES: u8 = 16;
/// Most containers of a node.
pub const MOST_CONTAINERS: u8 = 4;
/// The store's port on the underlay gateway.
pub const STORE_PORT: u16 = 2379;
/// The name of the namespace between the hosts.
pub const UNDERLAY: &str = "underlay";

/// A lab's name: 1 to 32 of `a-z`, `0-9` and `-`, not starting with `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name of one of its places for `ip netns`.
    pub fn netns_name(&self, place: &str) -> String {
        format!("twill-{self}-{place}")
    }
}

impl FromStr for LabName {
    type Err = BadValue;

    fn from_str(s: &str) -> Result<Self, BadValue> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if s.is_empty() || s.len() > 32 || s.starts_with('-') || !s.chars().all(fits) {
            return Err(BadValue::new(s, "a lab's name of 1 to 32 characters from a-z, 0-9 and '-'"));
        }
        Ok(Self(s.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = BadValue;
    fn try_from(text: String) -> Result<Self, BadValue> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> String {
        name.0
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The networks of the source document.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// One host, containers on its bridge, no agent.
    Bridge,
    /// Hosts joined by flannel's VXLAN backend.
    Vxlan,
    /// Hosts joined by flannel's UDP backend.
    Udp,
}

/// How packets are carried between hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Backend {
    /// By the kernel.
    #[default]
    Vxlan,
    /// By the agent.
    Udp,
}

impl Backend {
    /// As the network config names it.
    pub const fn name(self) -> &'static str {
        match self {
            Backend::Vxlan => "vxlan",
            Backend::Udp => "udp",
        }
    }
}

/// Which store the agents use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StoreKind {
    /// `twill store serve`.
    #[default]
    Embedded,
    /// The `etcd` program.
    Etcd,
}

/// Which addresses a lab has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Families {
    /// IPv4.
    #[default]
    V4,
    /// IPv4 and IPv6.
    Both,
    /// IPv6, and nothing else on any wire.
    V6,
}

/// What a lab is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Its name.
    pub name: LabName,
    /// `None`: the plain lab, which has the addresses of `vxlan`.
    pub scenario: Option<Scenario>,
    /// 1 to [`MOST_NODES`].
    pub nodes: u8,
    /// On each node; 1 to [`MOST_CONTAINERS`].
    pub containers: u8,
    /// How hosts are joined.
    pub backend: Backend,
    /// Where leases are kept.
    pub store: StoreKind,
    /// Which addresses it has.
    #[serde(default)]
    pub families: Families,
}

/// One host to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// `node1` …
    pub name: String,
    /// On the underlay.
    pub address: Inet,
    /// Its containers' subnet.
    pub subnet: Prefix,
    /// The containers' bridge.
    pub bridge: LinkName,
    /// The bridge's address.
    pub gateway: Inet,
    /// The same of IPv6, beside IPv4.
    pub second: Option<Second>,
    /// Its containers.
    pub containers: Vec<ContainerPlan>,
}

/// What a node has of its second family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Second {
    /// On the underlay.
    pub address: Inet,
    /// Its containers' subnet.
    pub subnet: Prefix,
    /// The bridge's address.
    pub gateway: Inet,
}

/// One container to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerPlan {
    /// `container-1` …, counted over all nodes.
    pub name: String,
    /// In its node's subnet.
    pub address: Inet,
    /// The same of IPv6, beside IPv4.
    pub second: Option<Inet>,
    /// The host's end of its veth pair.
    pub host_device: LinkName,
}

impl Spec {
    /// True when an agent runs on every node.
    pub fn has_agents(&self) -> bool {
        self.scenario != Some(Scenario::Bridge)
    }

    /// The underlay's own addresses, every node's gateways; the first is where the store listens.
    pub fn underlay(&self) -> Result<Vec<Inet>, BadValue> {
        let mut all = Vec::new();
        if self.families != Families::V6 {
            all.push(Inet::new(v4(10, 168, 0, 1), 24)?);
        }
        if self.families != Families::V4 {
            all.push(Inet::new(v6([0xfd00, 0x168, 0, 0], 1), 64)?);
        }
        Ok(all)
    }

    /// Where the store listens: `ADDR:PORT`.
    pub fn store_address(&self) -> Result<String, BadValue> {
        let first = self.underlay()?.into_iter().next().map(|inet| inet.addr);
        let first = first.ok_or_else(|| BadValue::new("", "an address of the underlay"))?;
        Ok(SocketAddr::new(first, STORE_PORT).to_string())
    }

    /// The same as a URL.
    pub fn store_url(&self) -> Result<String, BadValue> {
        self.store_address().map(|address| format!("http://{address}"))
    }

    /// The whole networks that agents share, IPv4 first.
    pub fn networks(&self) -> Result<Vec<Prefix>, BadValue> {
        let mut all = Vec::new();
        if self.scenario == Some(Scenario::Udp) {
            all.push(Prefix::strict(v4(100, 96, 0, 0), 16)?);
        } else if self.families != Families::V6 {
            all.push(Prefix::strict(v4(10, 1, 0, 0), 16)?);
        }
        if self.families != Families::V4 {
            all.push(Prefix::strict(v6([0xfd00, 1, 0, 0], 0), 48)?);
        }
        Ok(all)
    }

    /// Node number `number`, counted from 1.
    pub fn node(&self, number: u8) -> Result<NodePlan, BadValue> {
        if number == 0 || number > MOST_NODES {
            return Err(BadValue::new(number, "a node from 1 to 16"));
        }
        let (subnet, first) = match self.scenario {
            Some(Scenario::Bridge) => (Prefix::strict(v4(172, 17, 0, 0), 16)?, 3),
            Some(Scenario::Udp) => (Prefix::strict(v4(100, 96, number, 0), 24)?, 2),
            Some(Scenario::Vxlan) | None => (Prefix::strict(v4(10, 1, 14 + number, 0), 24)?, 2),
        };
        let of_v4 = Second {
            address: Inet::new(v4(10, 168, 0, 1 + number), 24)?,
            subnet,
            gateway: Inet::new(subnet.nth(1).unwrap_or(subnet.addr()), subnet.len())?,
        };
        let subnet = Prefix::strict(v6([0xfd00, 1, 0, 14 + u16::from(number)], 0), 64)?;
        let of_v6 = Second {
            address: Inet::new(v6([0xfd00, 0x168, 0, 0], 1 + u16::from(number)), 64)?,
            subnet,
            gateway: Inet::new(subnet.nth(1).unwrap_or(subnet.addr()), subnet.len())?,
        };
        let (primary, second) = match self.families {
            Families::V4 => (of_v4, None),
            Families::Both => (of_v4, Some(of_v6)),
            Families::V6 => (of_v6, None),
        };
        let containers = (1..=self.containers).map(|local| {
            // Counted over all nodes, addresses too: the source has container-2 at .3 of its subnet.
            let count = (number - 1) * self.containers + local;
            let host = u128::from(first + count - 1);
            let address = |subnet: Prefix| {
                let address = subnet.nth(host).ok_or_else(|| BadValue::new(host, "an address of the subnet"))?;
                Inet::new(address, subnet.len())
            };
            Ok(ContainerPlan {
                name: format!("container-{count}"),
                address: address(primary.subnet)?,
                second: second.map(|second| address(second.subnet)).transpose()?,
                host_device: format!("veth{count}").parse()?,
            })
        });
        let containers = containers.collect::<Result<_, _>>()?;
        Ok(NodePlan {
            name: format!("node{number}"),
            address: primary.address,
            subnet: primary.subnet,
            bridge: if self.scenario.is_some() { "docker0" } else { "cni0" }.parse()?,
            gateway: primary.gateway,
            second,
            containers,
        })
    }
}

/// The address `host` of the network that begins with these four groups.
const fn v6(net: [u16; 4], host: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(net[0], net[1], net[2], net[3], 0, 0, 0, host))
}

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(scenario: Option<Scenario>, containers: u8) -> Spec {
        let name = "lab".parse().unwrap();
        let (backend, store, families) = (Backend::Vxlan, StoreKind::Embedded, Families::V4);
        Spec { name, scenario, nodes: 2, containers, backend, store, families }
    }

    #[test]
    fn the_vxlan_scenario_has_the_addresses_of_the_source() {
        let spec = spec(Some(Scenario::Vxlan), 1);
        let (one, two) = (spec.node(1).unwrap(), spec.node(2).unwrap());
        assert_eq!(one.address.to_string(), "10.168.0.2/24");
        assert_eq!((one.subnet.to_string(), two.subnet.to_string()), ("10.1.15.0/24".into(), "10.1.16.0/24".into()));
        assert_eq!(one.containers[0].address.to_string(), "10.1.15.2/24");
        assert_eq!(two.containers[0].address.to_string(), "10.1.16.3/24");
        assert_eq!(one.bridge.as_str(), "docker0");
    }

    #[test]
    fn the_udp_scenario_has_the_addresses_of_the_source() {
        let spec = spec(Some(Scenario::Udp), 1);
        assert_eq!(spec.networks().unwrap()[0].to_string(), "100.96.0.0/16");
        let nodes: Vec<_> = (1..=3).map(|n| spec.node(n).unwrap()).collect();
        let gateways: Vec<_> = nodes.iter().map(|n| n.gateway.to_string()).collect();
        assert_eq!(gateways, ["100.96.1.1/24", "100.96.2.1/24", "100.96.3.1/24"]);
        let containers: Vec<_> = nodes.iter().map(|n| n.containers[0].address.addr.to_string()).collect();
        assert_eq!(containers, ["100.96.1.2", "100.96.2.3", "100.96.3.4"]);
        assert_eq!(nodes[2].address.to_string(), "10.168.0.4/24");
    }

    #[test]
    fn the_bridge_scenario_has_the_addresses_of_the_source() {
        let node = spec(Some(Scenario::Bridge), 2).node(1).unwrap();
        let addresses: Vec<_> = node.containers.iter().map(|c| c.address.addr.to_string()).collect();
        assert_eq!(addresses, ["172.17.0.3", "172.17.0.4"]);
        assert_eq!(node.gateway.to_string(), "172.17.0.1/16");
    }

    #[test]
    fn both_families_have_the_same_numbers_and_ipv6_alone_has_no_ipv4() {
        let both = Spec { families: Families::Both, ..spec(None, 1) };
        let node = both.node(2).unwrap();
        assert_eq!(
            (node.subnet.to_string(), node.second.unwrap().subnet.to_string()),
            ("10.1.16.0/24".into(), "fd00:1:0:10::/64".into())
        );
        assert_eq!(node.containers[0].second.unwrap().to_string(), "fd00:1:0:10::3/64");
        let alone = Spec { families: Families::V6, ..spec(None, 1) };
        assert_eq!(alone.store_url().unwrap(), "http://[fd00:168::1]:2379");
        let node = alone.node(1).unwrap();
        assert!(
            node.second.is_none()
                && [node.address, node.gateway, node.containers[0].address].iter().all(|inet| inet.addr.is_ipv6())
        );
    }

    #[test]
    fn the_largest_lab_has_no_name_or_address_twice() {
        let spec = spec(None, MOST_CONTAINERS);
        let nodes: Vec<_> = (1..=MOST_NODES).map(|n| spec.node(n).unwrap()).collect();
        let containers: Vec<_> = nodes.iter().flat_map(|n| &n.containers).collect();
        let names: std::collections::BTreeSet<_> = containers.iter().map(|c| &c.name).collect();
        let addresses: std::collections::BTreeSet<_> = containers.iter().map(|c| c.address).collect();
        assert_eq!((names.len(), addresses.len()), (64, 64));
        assert!(nodes.iter().all(|n| n.containers.iter().all(|c| n.subnet.contains(c.address.addr))));
    }

    #[test]
    fn names_that_could_leave_their_folder_are_refused() {
        for bad in ["", ".", "../x", "a/b", "A", "-x", "a b", &"x".repeat(33)] {
            assert!(bad.parse::<LabName>().is_err(), "{bad}");
        }
    }
}
