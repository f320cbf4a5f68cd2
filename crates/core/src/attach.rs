//! Attaching a container (or a lab's host) to a bridge: what its network namespace and the host's hold afterwards.
//!
//! ```text
//!   host                                      container
//!   cni0 10.1.15.1/24 ── veth… ─┐    ┌─ eth0 10.1.15.2/24
//!                               └────┘   default via 10.1.15.1
//! ```
//! The attachment is kept as `<state>/attachments/<containerID>:<ifname>.json`; the agent only reads these files.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::host::{
    Addr, Extras, Few, HostState, Key, Link, LinkKind, Object, PROTO_BOOT, PortFlags, Remark, Route, RouteEntry,
    RouteKey, TABLE_MAIN,
};
use crate::net::{Inet, LinkName, MacAddr, Mtu, Prefix};
use crate::ports::PortMap;
use crate::reconcile::{Claim, Desired};

/// The `"format"` of an attachment file.
pub const FORMAT: &str = "twill-attachment";
/// The newest `"version"` of an attachment file that is understood.
pub const VERSION: u32 = 1;

/// What is asked for: one device in a container, joined to a bridge of the host, or point to point to the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Request {
    /// Who it is for; a runtime's container ID, or a name.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The device in the container.
    pub ifname: LinkName,
    /// The container's network namespace, as a path.
    pub netns: Box<str>,
    /// The host's end of the pair.
    pub host_device: LinkName,
    /// The bridge, made when it is missing; `None`: point to point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<LinkName>,
    /// The host's own addresses towards the container, at most one for each family: the bridge's, or (alone) those of the host's end.
    #[serde(default)]
    pub gateways: Vec<Inet>,
    /// The container's addresses.
    pub addresses: Vec<Inet>,
    /// The container's ways out.
    #[serde(default)]
    pub routes: Vec<Way>,
    /// The container's own MAC; `None`: one that container and device always give.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// MTU of the pair; `None`: the kernel's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<Mtu>,
    /// True when the host must forward for the container.
    #[serde(default)]
    pub forward: bool,
    /// What the bridge does with its port.
    #[serde(default)]
    pub port: PortFlags,
    /// The bridge takes frames for every address.
    #[serde(default)]
    pub promisc: bool,
    /// Published ports.
    #[serde(default)]
    pub ports: Vec<PortMap>,
    /// What goes beyond these networks has the host's address; empty: nothing has.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub masquerade_beyond: Vec<Prefix>,
}

/// A route of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Way {
    /// Destination.
    pub dst: Prefix,
    /// Next hop; `None`: on the link.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub via: Option<IpAddr>,
    /// Priority; lower wins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
    /// Routing table; `None`: main.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<u32>,
    /// rtm_scope of an IPv4 route; `None`: that of the link without a next hop, else global.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<u8>,
    /// MTU of the way; `None`: the device's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// TCP's segment size that the other side is told; `None`: what the MTU leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advmss: Option<u32>,
    /// The next hop is on the link, whatever addresses say: point to point.
    #[serde(default)]
    pub onlink: bool,
}

impl Way {
    /// To `dst` by `via`.
    pub const fn new(dst: Prefix, via: Option<IpAddr>) -> Self {
        Self { dst, via, metric: None, table: None, scope: None, mtu: None, advmss: None, onlink: false }
    }

    /// The way out by `gateway`.
    pub const fn out(gateway: IpAddr) -> Self {
        let dst = if gateway.is_ipv4() { Prefix::DEFAULT_V4 } else { Prefix::DEFAULT_V6 };
        Self::new(dst, Some(gateway))
    }

    /// As `ip route add … dev LINK` leaves it.
    pub fn route(&self, link: LinkName) -> Object {
        let v4 = self.dst.is_v4();
        let entry = RouteEntry {
            via: self.via,
            dev: Some(link),
            onlink: self.onlink,
            protocol: PROTO_BOOT,
            kind: UNICAST,
            // IPv6 has no scopes of routes.
            scope: match self.scope.filter(|_| v4) {
                Some(scope) => scope,
                None if v4 && self.via.is_none() => SCOPE_LINK,
                None => 0,
            },
            extras: Extras { src: None, mtu: self.mtu, advmss: self.advmss }.boxed(),
            special: false,
            usurper: Remark::default(),
        };
        let metric = self.metric.unwrap_or(if v4 { 0 } else { IPV6_METRIC });
        let key = RouteKey { table: self.table.unwrap_or(TABLE_MAIN), dst: self.dst, tos: 0, metric };
        Object::Route(Route { key, entries: Few::One(entry) })
    }
}

/// The host's sysctls for either family, see [`Request::forwarding`].
const FORWARD: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];

/// The container's sysctls that an attach may switch, whatever addresses it gets.
pub const SWITCHES_INSIDE: [&str; 2] = ["net/ipv6/conf/all/disable_ipv6", "net/ipv6/conf/default/disable_ipv6"];

/// The host's sysctls that an attach may switch, whatever addresses the container gets. `device` leads to it: the bridge, or its own.
pub fn switches(device: LinkName) -> [Box<str>; 3] {
    let [v4, v6] = FORWARD.map(Box::from);
    [v4, v6, route_localnet(device)]
}

fn route_localnet(device: LinkName) -> Box<str> {
    format!("net/ipv4/conf/{device}/route_localnet").into()
}

/// The name of the host's end that a container's device always gives.
pub fn host_device(container_id: &str, ifname: LinkName) -> LinkName {
    let MacAddr([a, b, c, d, e, g]) = MacAddr::derived([container_id.as_bytes(), b"\0", ifname.as_str().as_bytes()]);
    let hash = format!("veth{a:02x}{b:02x}{c:02x}{d:02x}{e:02x}{:x}", g >> 4);
    // 15 bytes of letters and digits are a device name; the container's own name is one as well.
    hash.parse().unwrap_or(ifname)
}

impl Request {
    /// What the host's namespace holds: bridge, its addresses, the pair; or the pair with addresses and routes. The pair's other end is
    /// made in the container. `have` is what the host holds now: a bridge that is there keeps its MAC, and loses the addresses of
    /// another network when nobody uses it.
    pub fn host_side(&self, have: &HostState) -> Result<Desired, Clash> {
        let mut host = HostState::new();
        let mut claim = Claim::default();
        let link = self.host_device;
        let kind = LinkKind::Veth { peer: Some(self.ifname), peer_netns: Some(self.netns.clone()) };
        let mut pair = Link { mac: Some(self.derive("host")), mtu: self.mtu, ..Link::up(link, kind) };
        if let Some(name) = self.bridge {
            claim.devices.extend(self.clash(have)?);
            host = bridge(name, &self.gateways, self.mtu);
            let mut made = Link { mtu: self.mtu, ..Link::up(name, LinkKind::Bridge) };
            made.promisc = self.promisc.then_some(true);
            if have.link(name).is_some() {
                // Other containers stand on it with an MTU of their own.
                made.mtu = None;
            } else {
                // Without one of its own a bridge takes that of some port, and another when the port goes.
                made.mac = self.bridge_mac(name);
            }
            host.insert(Object::Link(Box::new(made)));
            pair.master = Some(name);
            pair.port = Some(self.port);
        } else {
            let alone = self.gateways.iter().map(|gateway| Inet::host(gateway.addr));
            host.extend(alone.map(|inet| Object::Addr(Addr::global(link, inet))));
            let ways = self.addresses.iter().map(|inet| Way::new(Prefix::host(inet.addr), None));
            host.extend(ways.map(|way| way.route(link)));
        }
        host.insert(Object::Link(Box::new(pair)));
        Ok(Desired { host, claim })
    }

    /// True when the host's firewall has rules for the container.
    pub fn has_rules(&self) -> bool {
        !self.ports.is_empty() || !self.masquerade_beyond.is_empty()
    }

    /// The host's device towards the container, where this host must reach a published port by its loopback address.
    pub fn loopback_device(&self) -> Option<LinkName> {
        let published =
            self.ports.iter().any(|map| map.is_for(true)) && self.addresses.iter().any(|a| a.addr.is_ipv4());
        published.then(|| self.bridge.unwrap_or(self.host_device))
    }

    /// What makes the host forward for the container, where it must.
    pub fn forwarding(&self) -> Desired {
        let paths = self.addresses.iter().map(|inet| match inet.addr {
            IpAddr::V4(_) => FORWARD[0],
            IpAddr::V6(_) => FORWARD[1],
        });
        let loopback = self.loopback_device().map(route_localnet);
        let paths = paths.filter(|_| self.forward).map(Box::from).chain(loopback);
        let sysctls = paths.map(|path| Object::Sysctl { path, value: "1".into() });
        Desired { host: sysctls.collect(), claim: Claim::default() }
    }

    /// What the container's namespace holds before the pair is there. Without an IPv6 address IPv6 is off, as docker has it: else the
    /// container would speak on the bridge before anybody asked it.
    pub fn container_before(&self) -> Desired {
        let mut host: HostState = loopback().into_iter().collect();
        let off = self.addresses.iter().all(|inet| inet.addr.is_ipv4());
        let value = if off { "1" } else { "0" };
        host.extend(SWITCHES_INSIDE.map(|path| Object::Sysctl { path: path.into(), value: value.into() }));
        Desired { host, claim: Claim::default() }
    }

    /// The container's end as it is made, down and with a MAC that nobody has asked for.
    pub fn inner_end(&self) -> Link {
        let kind = LinkKind::Veth { peer: None, peer_netns: None };
        Link { mtu: self.mtu, up: false, ..Link::up(self.ifname, kind) }
    }

    /// A bridge with the MAC that it was made with keeps it; another takes that of some port.
    pub fn keeps_mac(&self, bridge: &Link) -> bool {
        bridge.mac.is_some() && bridge.mac == self.bridge_mac(bridge.name)
    }

    /// What the container's namespace holds, once the pair is there: loopback, the device, its addresses, the ways out.
    pub fn container_side(&self) -> Desired {
        let mut host: HostState = loopback().into_iter().collect();
        let link = self.ifname;
        let mac = Some(self.mac.unwrap_or_else(|| self.derive("container")));
        host.insert(Object::Link(Box::new(Link { mac, up: true, ..self.inner_end() })));
        host.extend(self.addresses.iter().map(|&inet| Object::Addr(Addr::global(link, inet))));
        host.extend(self.routes.iter().map(|way| way.route(link)));
        Desired { host, claim: Claim::default() }
    }

    /// A MAC for one end: the same whenever the container is attached anew.
    fn derive(&self, end: &str) -> MacAddr {
        MacAddr::derived([self.container_id.as_bytes(), b"\0", self.ifname.as_str().as_bytes(), b"\0", end.as_bytes()])
    }

    /// The bridge's MAC, unique as its address is.
    fn bridge_mac(&self, name: LinkName) -> Option<MacAddr> {
        let gateway = self.gateways.first()?.to_string();
        Some(MacAddr::derived([gateway.as_bytes(), b"\0", name.as_str().as_bytes()]))
    }

    /// Whether the bridge can be used as it is. It is given back when it has addresses that have to go, and nobody uses it.
    fn clash(&self, have: &HostState) -> Result<Option<LinkName>, Clash> {
        let Some(link) = self.bridge.and_then(|name| have.link(name)) else { return Ok(None) };
        let bridge = link.name;
        if link.kind != LinkKind::Bridge {
            return Err(Clash::NotABridge(bridge));
        }
        let on_it: Vec<Inet> = have.iter().filter_map(|(_, object)| on(object, bridge)).collect();
        let missing: Vec<&Inet> = self.gateways.iter().filter(|gateway| !on_it.contains(gateway)).collect();
        let foreign = on_it.into_iter().filter(|inet| missing.iter().any(|m| m.addr.is_ipv4() == inet.addr.is_ipv4()));
        let foreign: Vec<Inet> = foreign.collect();
        if foreign.is_empty() {
            return Ok(None);
        }
        let ports = have.range(..Key::Sysctl("".into())).filter_map(|(_, object)| match object {
            Object::Link(port) if port.master == Some(bridge) => Some(port.name),
            _ => None,
        });
        let ports: Vec<LinkName> = ports.collect();
        if ports.is_empty() { Ok(Some(bridge)) } else { Err(Clash::Addresses { bridge, foreign, ports }) }
    }

    /// What is written down of it.
    pub fn record(&self, boot_id: &str, netns_inode: u64) -> Attachment {
        Attachment {
            format: FORMAT.into(),
            version: VERSION,
            request: self.clone(),
            boot_id: boot_id.to_owned(),
            netns_inode,
            network: None,
            alone: None,
        }
    }

    /// Addresses and nothing else: what more is wanted is set beside it.
    pub fn alone(container_id: &str, ifname: LinkName, netns: &str, addresses: Vec<Inet>) -> Self {
        Self {
            container_id: container_id.to_owned(),
            ifname,
            netns: netns.into(),
            host_device: host_device(container_id, ifname),
            bridge: None,
            gateways: Vec::new(),
            addresses,
            routes: Vec::new(),
            mac: None,
            mtu: None,
            forward: false,
            port: PortFlags::default(),
            promisc: false,
            ports: Vec::new(),
            masquerade_beyond: Vec::new(),
        }
    }
}

/// The address that `object` is, if it is one of `link` that somebody gave.
fn on(object: &Object, link: LinkName) -> Option<Inet> {
    match object {
        Object::Addr(addr) if addr.link == link && addr.scope == 0 => Some(addr.inet),
        _ => None,
    }
}

/// Why a bridge cannot be used as it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Clash {
    /// Another device has its name.
    #[error("{0} is there, and is no bridge")]
    NotABridge(LinkName),
    /// It has another address.
    #[error("the bridge {bridge} has {}, and serves {}", list(foreign), list(ports))]
    Addresses {
        /// The bridge.
        bridge: LinkName,
        /// What it has.
        foreign: Vec<Inet>,
        /// Who uses it.
        ports: Vec<LinkName>,
    },
}

fn list(items: &[impl std::fmt::Display]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// A bridge that is up, with its addresses.
pub fn bridge(name: LinkName, addresses: &[Inet], mtu: Option<Mtu>) -> HostState {
    let mut host = HostState::new();
    host.insert(Object::Link(Box::new(Link { mtu, ..Link::up(name, LinkKind::Bridge) })));
    host.extend(addresses.iter().map(|&inet| Object::Addr(Addr::global(name, inet))));
    host
}

/// The loopback device, up.
pub fn loopback() -> Option<Object> {
    let name = "lo".parse().ok()?;
    Some(Object::Link(Box::new(Link::up(name, LinkKind::Other { name: "device".into() }))))
}

/// RTN_UNICAST.
const UNICAST: u8 = 1;
/// RT_SCOPE_LINK: what is no farther away has no next hop.
pub const SCOPE_LINK: u8 = 253;
/// IP6_RT_PRIO_USER: the metric that IPv6 gives a route without one.
const IPV6_METRIC: u32 = 1024;

/// An attachment as it is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// [`FORMAT`].
    pub format: String,
    /// At most [`VERSION`].
    pub version: u32,
    /// What was asked for: everything that CHECK compares.
    #[serde(flatten)]
    pub request: Request,
    /// The boot that it belongs to (/proc/sys/kernel/random/boot_id): after another one it is stale.
    pub boot_id: String,
    /// The namespace's inode: a path may be used again for another namespace.
    pub netns_inode: u64,
    /// The network that it belongs to; `None`: to none, as in the lab.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Network>,
    /// Addresses alone: somebody else's plugin has the device, which nobody here knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alone: Option<Alone>,
}

/// Where the namespace's path was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alone {
    /// Device and inode of the folder that its path goes on from: who sees the same folder, and the path no more, knows that the container
    /// is gone. `None`: nobody can know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen_in: Option<(u64, u64)>,
}

/// A network of containers, and the folder of its address files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// `<dataDir>/<name>`; empty: it has no addresses.
    pub dir: Box<str>,
}

/// Why an attachment file cannot be read. The file is left untouched.
#[derive(Debug, thiserror::Error)]
pub enum BadAttachment {
    /// Not the JSON of an attachment.
    #[error("it is not an attachment's JSON")]
    Json(#[from] serde_json::Error),
    /// Some other format.
    #[error("its format is {0:?}, not {FORMAT:?}")]
    Format(String),
    /// Written by a newer release.
    #[error("its version is {0}, and {VERSION} is the newest that is understood")]
    Newer(u32),
}

/// The name of an attachment's file below `attachments/`.
pub fn file_name(container_id: &str, ifname: LinkName) -> String {
    format!("{container_id}:{ifname}.json")
}

impl Attachment {
    /// The file's name below `attachments/`.
    pub fn file_name(&self) -> String {
        file_name(&self.request.container_id, self.request.ifname)
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }

    /// The same without what it asks of the firewall: it leads nothing to its addresses.
    pub fn without_rules(&self) -> Self {
        let request = Request { ports: Vec::new(), masquerade_beyond: Vec::new(), ..self.request.clone() };
        Self { request, ..self.clone() }
    }

    /// Reads what is understood of a newer release's file, for what has to be kept of it.
    pub fn parse_newer(text: &[u8]) -> Option<Self> {
        serde_json::from_slice(text).ok().filter(|kept: &Self| kept.format == FORMAT)
    }

    /// Reads a file's content.
    pub fn parse(text: &[u8]) -> Result<Self, BadAttachment> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(text)?;
        if head.format != FORMAT {
            return Err(BadAttachment::Format(head.format));
        }
        if head.version > VERSION {
            return Err(BadAttachment::Newer(head.version));
        }
        Ok(serde_json::from_slice(text)?)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::reconcile::{Scope, effect, plan};

    pub(crate) fn request() -> Request {
        Request {
            container_id: "container-1".into(),
            ifname: "eth0".parse().unwrap(),
            netns: "/proc/7/ns/net".into(),
            host_device: "veth1".parse().unwrap(),
            bridge: Some("cni0".parse().unwrap()),
            gateways: vec!["10.1.15.1/24".parse().unwrap(), "fd00:15::1/64".parse().unwrap()],
            addresses: vec!["10.1.15.2/24".parse().unwrap(), "fd00:15::2/64".parse().unwrap()],
            routes: vec![Way::out("10.1.15.1".parse().unwrap()), Way::out("fd00:15::1".parse().unwrap())],
            mac: None,
            mtu: Some(Mtu::try_from(1450).unwrap()),
            forward: true,
            port: PortFlags { hairpin: true, isolated: false },
            promisc: false,
            ports: Vec::new(),
            masquerade_beyond: Vec::new(),
        }
    }

    /// What `have` becomes.
    fn settle(want: &Desired, have: &mut HostState) {
        let steps = plan(want, have, Scope::All).steps;
        steps.iter().for_each(|step| effect(have, &step.op));
    }

    #[test]
    fn the_host_gets_bridge_pair_and_forwarding_for_each_family() {
        let want = request().host_side(&HostState::new()).unwrap();
        let forwarding = request().forwarding();
        for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            assert!(forwarding.host.get(&Key::Sysctl(path.into())).is_some());
        }
        let veth = want.host.link("veth1".parse().unwrap()).unwrap();
        assert_eq!(veth.master, Some("cni0".parse().unwrap()));
        assert!(veth.port.unwrap().hairpin);
    }

    #[test]
    fn a_bridge_that_is_made_has_a_mac_of_its_own_and_one_that_is_there_keeps_its() {
        let mut have = HostState::new();
        settle(&request().host_side(&have).unwrap(), &mut have);
        let bridge = have.link("cni0".parse().unwrap()).unwrap().clone();
        let other = Request { container_id: "container-2".into(), host_device: "veth2".parse().unwrap(), ..request() };
        let want = other.host_side(&have).unwrap();
        assert_eq!(want.host.link("cni0".parse().unwrap()).unwrap().mac, None);
        settle(&want, &mut have);
        assert_eq!(have.link("cni0".parse().unwrap()), Some(&bridge));
        let macs = ["veth1", "veth2"].map(|name| have.link(name.parse().unwrap()).unwrap().mac);
        assert!(macs[0].is_some() && macs[0] != macs[1]);
    }

    #[test]
    fn the_container_gets_a_way_out_for_each_family() {
        let mut have: HostState = loopback().into_iter().collect();
        settle(&request().container_side(), &mut have);
        let routes = have.iter().filter(|(k, _)| matches!(k, Key::Route(r) if r.dst.len() == 0)).count();
        assert_eq!(routes, 2);
    }

    #[test]
    fn point_to_point_the_host_has_a_route_for_each_address() {
        let want = Request { bridge: None, ..request() }.host_side(&HostState::new()).unwrap();
        let lines: Vec<String> = want.host.iter().map(|(_, object)| object.to_string()).collect();
        assert!(lines.contains(&"address 10.1.15.1/32 dev veth1".into()), "{lines:?}");
        assert!(lines.iter().any(|l| l.starts_with("route 10.1.15.2 dev veth1 scope link")), "{lines:?}");
        assert!(lines.iter().any(|l| l.starts_with("route fd00:15::2 dev veth1")), "{lines:?}");
    }

    #[test]
    fn a_bridge_with_another_address_is_repaired_while_nobody_uses_it() {
        let bridge: LinkName = "cni0".parse().unwrap();
        let foreign: Inet = "10.1.99.1/24".parse().unwrap();
        let mut have = super::bridge(bridge, &[foreign], None);
        let mut repaired = have.clone();
        settle(&request().host_side(&have).unwrap(), &mut repaired);
        let left: Vec<Inet> = repaired.iter().filter_map(|(_, object)| on(object, bridge)).collect();
        assert_eq!(left, request().gateways);
        let port = Link {
            master: Some(bridge),
            ..Link::up("veth9".parse().unwrap(), LinkKind::Other { name: "dummy".into() })
        };
        have.insert(Object::Link(Box::new(port)));
        let refused = request().host_side(&have).unwrap_err().to_string();
        assert_eq!(refused, "the bridge cni0 has 10.1.99.1/24, and serves veth9");
        have.insert(Object::Addr(Addr::global(bridge, "10.1.15.1/24".parse().unwrap())));
        assert!(request().host_side(&have).is_ok(), "ours beside it");
        let dummy: HostState =
            [Object::Link(Box::new(Link::up(bridge, LinkKind::Other { name: "dummy".into() })))].into_iter().collect();
        assert_eq!(request().host_side(&dummy).unwrap_err(), Clash::NotABridge(bridge));
    }

    #[test]
    fn a_host_device_is_named_after_the_container() {
        let name = |id, ifname: &str| host_device(id, ifname.parse().unwrap());
        assert_eq!(name("abc", "eth0"), name("abc", "eth0"));
        assert_ne!(name("abc", "eth0"), name("abc", "eth1"));
        assert_ne!(name("abc", "eth0"), name("abd", "eth0"));
        assert!(name("abc", "eth0").as_str().starts_with("veth"));
    }

    #[test]
    fn the_file_reads_back_and_a_newer_one_is_refused() {
        let mut kept = request().record("b", 4026531840);
        // As a file was before routes had metrics.
        assert!(!kept.to_json().unwrap().contains("advmss"));
        kept.request.routes[0].mtu = Some(1400);
        kept.request.routes[1].advmss = Some(1300);
        assert_eq!(kept.file_name(), "container-1:eth0.json");
        let text = kept.to_json().unwrap();
        assert_eq!(Attachment::parse(text.as_bytes()).unwrap(), kept);
        let newer = text.replace("\"version\": 1", "\"version\": 2");
        assert!(matches!(Attachment::parse(newer.as_bytes()), Err(BadAttachment::Newer(2))));
        let other = text.replace(FORMAT, "x");
        assert!(matches!(Attachment::parse(other.as_bytes()), Err(BadAttachment::Format(_))));
    }
}
