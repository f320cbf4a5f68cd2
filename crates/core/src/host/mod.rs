//! The state of one network namespace, in one shape: what Twill wants, what the kernel holds, and what a facts file says.
//!
//! ```text
//! HostState = { Key → Object }        Key derives from Object; names, never ifindex
//!    Link  flannel.1   ─┬─ Sysctl  net/ipv6/conf/flannel.1/accept_ra
//!                       ├─ Addr    10.1.15.0/32
//!                       ├─ Neigh   10.1.16.0 → MAC
//!                       ├─ Fdb     MAC → 10.168.0.3
//!                       └─ Route   10.1.16.0/24 via 10.1.16.0 onlink
//! ```
//! A wanted object says `None` for what it does not care about; an object read from the kernel is complete.
//! [`Object::satisfied_by`] is that comparison, and the only one.

mod vxlan;

use std::collections::{BTreeMap, btree_map};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

pub use crate::few::Few;
use crate::firewall::{ChainName, Head, Leftover, Table, TableName};
use crate::net::{Inet, LinkName, MacAddr, Mtu, Port, Prefix, Vni};
pub use vxlan::{FdbRoom, OuterHeader, Vxlan};

/// Route protocol number of every route that Twill adds (`ip route` prints `proto 116`).
pub const PROTO_TWILL: u8 = 116;
/// `RTPROT_KERNEL`: connected routes that come and go with an address.
pub const PROTO_KERNEL: u8 = 2;
/// `RTPROT_BOOT`: what flannel's and a person's `ip route add` leave.
pub const PROTO_BOOT: u8 = 3;
/// `RT_TABLE_MAIN`.
pub const TABLE_MAIN: u32 = 254;
/// `RT_TABLE_LOCAL`.
pub const TABLE_LOCAL: u32 = 255;

/// All objects of one network namespace that somebody looks at.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostState(BTreeMap<Key, Object>);

/// What tells two objects apart, in creation order: sysctls of the namespace first, routes and rules last.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// A device, by name.
    Link(LinkName),
    /// A sysctl, by its path below /proc/sys with `/` between the parts.
    Sysctl(Box<str>),
    /// An address on a device.
    Addr(LinkName, Inet),
    /// A neighbour (ARP or ND) entry.
    Neigh(LinkName, IpAddr),
    /// A forwarding entry of a bridge or VXLAN.
    Fdb(LinkName, MacAddr),
    /// A route; entries with one key stand in order in one object.
    Route(RouteKey),
    /// A policy rule, by priority and its printed selector.
    Rule(RuleKey),
    /// An nftables table.
    Table(TableName),
    /// Rules of ours in somebody else's chain.
    Head(Box<ChainName>),
    /// A chain that flannel left in somebody else's table.
    Leftover(Box<Leftover>),
}

/// What the kernel keeps apart as routes: table, destination, TOS, metric. The protocol is not part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RouteKey {
    /// Routing table number; 254 is main.
    pub table: u32,
    /// Destination.
    pub dst: Prefix,
    /// Type-of-service selector; 0 matches every packet. IPv4 only.
    pub tos: u8,
    /// Priority; lower wins among equal prefixes.
    pub metric: u32,
}

/// A policy rule's identity.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RuleKey {
    /// True for IPv6.
    pub v6: bool,
    /// Priority; lower is looked at first.
    pub priority: u32,
    /// The selector as `ip rule` prints it, e.g. `from 10.0.0.0/8 iif eth0`.
    pub selector: Box<str>,
}

/// One thing in the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "object", rename_all = "kebab-case")]
pub enum Object {
    /// A device.
    Link(Box<Link>),
    /// A sysctl and its value, trimmed.
    Sysctl {
        /// Path below /proc/sys.
        path: Box<str>,
        /// Value without the trailing newline.
        value: Box<str>,
    },
    /// An address.
    Addr(Addr),
    /// A neighbour entry.
    Neigh(Neigh),
    /// A forwarding entry.
    Fdb(Fdb),
    /// All routes of one key, in the kernel's order.
    Route(Route),
    /// A policy rule.
    Rule(Rule),
    /// An nftables table with its chains and rules.
    Table(Box<Table>),
    /// Rules of ours at the head of somebody else's chain.
    Head(Box<Head>),
    /// A chain that flannel left in a table of `iptables`, with the rules that lead to it.
    Leftover(Box<Leftover>),
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    /// Its name.
    pub name: LinkName,
    /// What it is, with what only such a device has.
    pub kind: LinkKind,
    /// Hardware address; wanted `None`: whatever the kernel gives.
    pub mac: Option<MacAddr>,
    /// MTU; wanted `None`: whatever it is.
    pub mtu: Option<Mtu>,
    /// Administratively up (IFF_UP).
    pub up: bool,
    /// The bridge (or other master) it is a port of; wanted `None`: not looked at.
    pub master: Option<LinkName>,
    /// As a port of a bridge: what the bridge does with it. Wanted `None`: whatever it does; read `None`: nothing of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<PortFlags>,
    /// Takes frames for every address (IFF_PROMISC, as somebody asked for it). Wanted `None`: not looked at; read `None`: it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub promisc: Option<bool>,
    /// Keeps a neighbour table (no IFF_NOARP). Wanted `None`: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arp: Option<bool>,
    /// Takes part in multicast (IFF_MULTICAST). Wanted `None`: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub multicast: Option<bool>,
    /// Held without carrier by somebody (IFLA_PROTO_DOWN): it is up and carries nothing. Wanted `None`: not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protodown: Option<bool>,
    /// Read only: lower layer up (IFF_LOWER_UP, "carrier"). Never compared.
    #[serde(default)]
    pub carrier: bool,
}

/// What a bridge does with one of its ports (IFLA_BRPORT_*).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortFlags {
    /// Frames may leave by the port that they came in by: a container reaches itself by its service's address.
    pub hairpin: bool,
    /// No frames to or from other isolated ports.
    pub isolated: bool,
}

/// Device kinds that Twill makes or looks into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum LinkKind {
    /// VXLAN tunnel end point.
    Vxlan(Vxlan),
    /// Linux bridge.
    Bridge,
    /// One end of a pair; `peer` is wanted at creation only, and never compared.
    Veth {
        /// Name of the other end.
        peer: Option<LinkName>,
        /// Namespace to put the other end into at creation: a path such as /proc/PID/ns/net.
        peer_netns: Option<Box<str>>,
    },
    /// TUN or TAP.
    Tun,
    /// Any other; its IFLA_INFO_KIND, or `device` for hardware.
    Other {
        /// The kernel's word for it.
        name: Box<str>,
    },
}

/// An address on a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addr {
    /// The device.
    pub link: LinkName,
    /// Address with its length.
    pub inet: Inet,
    /// Scope: 0 global, 253 link, 254 host.
    pub scope: u8,
    /// It has a lifetime, at whose end the kernel takes it away or out of use.
    #[serde(default)]
    pub expires: bool,
    /// Whom it is shared with, on a link of two ends: what the kernel knows an IPv4 address by, where it is another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<IpAddr>,
    /// Metric of its connected route; 0: the kernel's default.
    #[serde(default)]
    pub metric: u32,
    /// It brings no connected route.
    #[serde(default)]
    pub noprefixroute: bool,
}

impl Addr {
    /// An address that is known everywhere, and stays.
    pub const fn global(link: LinkName, inet: Inet) -> Self {
        Self { link, inet, scope: 0, expires: false, peer: None, metric: 0, noprefixroute: false }
    }

    /// What the kernel tells two addresses of a device apart by: IPv4 has one several times, each with another peer.
    fn identity(&self) -> Inet {
        let peer = self.peer.filter(IpAddr::is_ipv4);
        peer.and_then(|peer| Inet::new(peer, self.inet.len()).ok()).unwrap_or(self.inet)
    }
}

/// A neighbour entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neigh {
    /// The device.
    pub link: LinkName,
    /// The neighbour's address.
    pub ip: IpAddr,
    /// Its hardware address, where one is known.
    pub mac: Option<MacAddr>,
    /// NUD_PERMANENT: no ARP or ND is ever sent for it.
    pub permanent: bool,
    /// It has flags that Twill never gives: a router, somebody else's to manage.
    #[serde(default)]
    pub special: bool,
    /// The NUD_* state bits; never compared.
    #[serde(default)]
    pub state: u16,
}

/// A forwarding entry: on a VXLAN, MAC → hosts; on a bridge, MAC → port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fdb {
    /// The VXLAN or bridge; for a bridge's entry the port that owns it is `port`.
    pub link: LinkName,
    /// The frame's destination.
    pub mac: MacAddr,
    /// Hosts the frame is sent to, in the kernel's order; empty on a bridge.
    pub dst: Few<IpAddr>,
    /// Bridge port; `None` on a VXLAN.
    pub port: Option<LinkName>,
    /// NUD_PERMANENT.
    pub permanent: bool,
    /// It has a detour, or flags that Twill never gives.
    #[serde(default)]
    pub special: bool,
    /// What it has of its own instead of the tunnel's; boxed, since none of very many has any. Never compared: `special` is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detour: Option<Box<Detour>>,
    /// The NUD_* state bits; never compared.
    #[serde(default)]
    pub state: u16,
}

/// What a VXLAN's forwarding entry says for itself alone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detour {
    /// UDP destination port.
    pub port: Option<Port>,
    /// VXLAN network identifier.
    pub vni: Option<Vni>,
    /// Device that the outer packet must leave by, whatever the tables say.
    pub via: Option<LinkName>,
    /// Nexthop group that holds the hosts.
    pub group: Option<u32>,
}

/// All routes of one key, in the kernel's order. Only the first is used for a lookup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Table, destination, TOS, metric.
    #[serde(flatten)]
    pub key: RouteKey,
    /// The twins; wanted objects have exactly one.
    pub entries: Few<RouteEntry>,
}

/// One of the routes of a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteEntry {
    /// Next hop address; `None`: the destination is on the link.
    pub via: Option<IpAddr>,
    /// Output device; `None` for blackhole and its like.
    pub dev: Option<LinkName>,
    /// RTNH_F_ONLINK: the next hop is reachable on `dev` whatever the tables say.
    pub onlink: bool,
    /// Who added it (rtm_protocol).
    pub protocol: u8,
    /// rtm_type: 1 unicast, 2 local, 3 broadcast, 6 blackhole, 7 unreachable, …
    pub kind: u8,
    /// rtm_scope: 0 global, 253 link, 254 host.
    pub scope: u8,
    /// What hardly any of very many routes has; boxed for that. Always by [`Extras::boxed`].
    pub extras: Option<Box<Extras>>,
    /// It has other metrics, an encapsulation, a realm or a next-hop object of its own.
    #[serde(default)]
    pub special: bool,
    /// Read only: it was put in the place of an entry of a device that somebody reconciles (NLM_F_REPLACE).
    #[serde(skip)]
    pub usurper: Remark,
}

/// What few routes say for themselves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extras {
    /// Preferred source address.
    pub src: Option<IpAddr>,
    /// MTU of the way (RTAX_MTU).
    pub mtu: Option<u32>,
    /// TCP's segment size that the other side is told (RTAX_ADVMSS).
    pub advmss: Option<u32>,
}

impl Extras {
    /// `None` when there is nothing.
    pub fn boxed(self) -> Option<Box<Self>> {
        (self != Self::default()).then(|| Box::new(self))
    }
}

impl RouteEntry {
    /// What it has beside the usual.
    pub fn extras(&self) -> Extras {
        self.extras.as_deref().copied().unwrap_or_default()
    }
}

/// Something known about an object that is no part of what it is: all remarks are equal.
#[derive(Debug, Clone, Copy, Default)]
pub struct Remark(pub bool);

impl PartialEq for Remark {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Remark {}

/// A policy rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// Its identity.
    #[serde(flatten)]
    pub key: RuleKey,
    /// What it does with a packet: FR_ACT_*, 1 looks into a table, 6 to 8 end the lookup (include/uapi/linux/fib_rules.h).
    pub action: u8,
    /// Table it sends the lookup to; `None` for other actions.
    pub table: Option<u32>,
    /// Priority of the rule that it goes on with (FR_ACT_GOTO).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goto: Option<u32>,
    /// What its table finds by a prefix no longer than this is not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suppress: Option<u8>,
    /// Destinations that it is for; `None`: all, or all but some.
    pub to: Option<Prefix>,
    /// rtm_protocol of who added it.
    pub protocol: u8,
}

impl Link {
    /// A routed tunnel: as somebody's port it would carry nothing.
    pub fn stands_alone(&self) -> bool {
        matches!(self.kind, LinkKind::Vxlan(_))
    }

    /// A wanted device that is up, whatever else it has.
    pub const fn up(name: LinkName, kind: LinkKind) -> Self {
        Self {
            name,
            kind,
            mac: None,
            mtu: None,
            up: true,
            master: None,
            port: None,
            promisc: None,
            arp: None,
            multicast: None,
            protodown: None,
            carrier: true,
        }
    }
}

impl Key {
    /// The device that this object stands or falls with.
    pub fn link(&self) -> Option<LinkName> {
        match self {
            Key::Link(l) | Key::Addr(l, _) | Key::Neigh(l, _) | Key::Fdb(l, _) => Some(*l),
            Key::Sysctl(_) | Key::Route(_) | Key::Rule(_) | Key::Table(_) | Key::Head(_) | Key::Leftover(_) => None,
        }
    }
}

impl Object {
    /// The key that this object has.
    pub fn key(&self) -> Key {
        match self {
            Object::Link(l) => Key::Link(l.name),
            Object::Sysctl { path, .. } => Key::Sysctl(path.clone()),
            Object::Addr(a) => Key::Addr(a.link, a.identity()),
            Object::Neigh(n) => Key::Neigh(n.link, n.ip),
            Object::Fdb(f) => Key::Fdb(f.link, f.mac),
            Object::Route(r) => Key::Route(r.key),
            Object::Rule(r) => Key::Rule(r.key.clone()),
            Object::Table(t) => Key::Table(t.name.clone()),
            Object::Head(head) => Key::Head(Box::new(head.at.clone())),
            Object::Leftover(at) => Key::Leftover(at.clone()),
        }
    }

    /// True when `have`, read from the kernel, is what this wanted object asks for.
    pub fn satisfied_by(&self, have: &Object) -> bool {
        match (self, have) {
            (Object::Link(w), Object::Link(h)) => {
                w.name == h.name
                    && w.up == h.up
                    && wish(w.mac, h.mac)
                    && wish(w.mtu, h.mtu)
                    && (wish(w.master, h.master) && !(w.stands_alone() && h.master.is_some()))
                    && wish(w.port, Some(h.port.unwrap_or_default()))
                    && wish(w.promisc, Some(h.promisc.unwrap_or_default()))
                    && wish(w.arp, h.arp)
                    && wish(w.multicast, h.multicast)
                    && wish(w.protodown, h.protodown)
                    && w.kind.satisfied_by(&h.kind)
            }
            (Object::Neigh(w), Object::Neigh(h)) => {
                (w.link, w.ip, w.mac, w.permanent, w.special) == (h.link, h.ip, h.mac, h.permanent, h.special)
            }
            (Object::Fdb(w), Object::Fdb(h)) => {
                (w.link, w.mac, &w.dst, w.port, w.permanent, w.special)
                    == (h.link, h.mac, &h.dst, h.port, h.permanent, h.special)
            }
            (want, have) => want == have,
        }
    }
}

impl LinkKind {
    /// As [`Object::satisfied_by`], for the kind.
    pub fn satisfied_by(&self, have: &LinkKind) -> bool {
        match (self, have) {
            (LinkKind::Veth { .. }, LinkKind::Veth { .. }) => true,
            (LinkKind::Vxlan(w), LinkKind::Vxlan(h)) => {
                (w.vni, w.port, w.remote, w.learning, w.gbp, w.outer, w.room, w.special)
                    == (h.vni, h.port, h.remote, h.learning, h.gbp, h.outer, h.room, h.special)
                    && wish(w.local, h.local)
                    && wish(w.lower, h.lower)
            }
            (want, have) => want == have,
        }
    }
}

/// A wish of `None` is met by everything.
fn wish<T: PartialEq>(want: Option<T>, have: Option<T>) -> bool {
    want.is_none() || want == have
}

impl HostState {
    /// Nothing at all.
    pub const fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// Puts `object` in, and gives back what had its key.
    pub fn insert(&mut self, object: Object) -> Option<Object> {
        self.0.insert(object.key(), object)
    }

    /// Takes out what has `key`.
    pub fn remove(&mut self, key: &Key) -> Option<Object> {
        self.0.remove(key)
    }

    /// What has `key`.
    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.0.get(key)
    }

    /// The device named `name`.
    pub fn link(&self, name: LinkName) -> Option<&Link> {
        match self.0.get(&Key::Link(name)) {
            Some(Object::Link(l)) => Some(l),
            _ => None,
        }
    }

    /// All objects, in key order.
    pub fn iter(&self) -> btree_map::Iter<'_, Key, Object> {
        self.0.iter()
    }

    /// The objects whose keys lie in `range`, in key order.
    pub fn range<R: std::ops::RangeBounds<Key>>(&self, range: R) -> btree_map::Range<'_, Key, Object> {
        self.0.range(range)
    }

    /// Keeps only what `keep` says.
    pub fn retain(&mut self, mut keep: impl FnMut(&Key, &Object) -> bool) {
        self.0.retain(|k, o| keep(k, o));
    }

    /// Packs the map: one that grew in key order is half empty.
    pub fn pack(&mut self) {
        self.0 = std::mem::take(&mut self.0).into_iter().collect();
    }

    /// How many objects.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<Object> for HostState {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> Self {
        Self(objects.into_iter().map(|o| (o.key(), o)).collect())
    }
}

impl Extend<Object> for HostState {
    fn extend<I: IntoIterator<Item = Object>>(&mut self, objects: I) {
        self.0.extend(objects.into_iter().map(|o| (o.key(), o)));
    }
}
