//! What an explanation asks of the world.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use twill_core::host::{Addr, Fdb, HostState, Key, Link, LinkKind, Neigh, Object, Route, RouteEntry, RouteKey};
use twill_core::host::{TABLE_LOCAL, TABLE_MAIN};
use twill_core::net::{LinkName, MacAddr};

/// Network namespaces, and the kernel's answers to route questions in each. Every namespace has a name: `node1`, `container-1`.
pub trait Facts {
    /// Names of all places, in the order that people list them.
    fn places(&self) -> Vec<&str>;
    /// What is known of one place.
    fn place(&self, name: &str) -> Option<&PlaceFacts>;
    /// What the kernel of `place` answers to RTM_GETROUTE.
    fn route(&self, place: &str, query: &RouteQuery) -> Result<RouteAnswer, NoRoute>;
}

/// What is known of one network namespace.
#[derive(Debug, Clone, Default)]
pub struct PlaceFacts {
    /// Links, addresses, neighbours, forwarding entries, routes, and the sysctls `net/ipv4/conf/DEV/forwarding` and
    /// `net/ipv6/conf/all/forwarding`.
    pub state: HostState,
    /// For each veth: where its other end is.
    pub peers: BTreeMap<LinkName, Far>,
}

/// A device in another place.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Far {
    /// The place.
    pub place: String,
    /// The device there.
    pub link: LinkName,
}

/// What is asked of RTM_GETROUTE.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteQuery {
    /// Destination.
    pub dst: IpAddr,
    /// Source; `None`: the kernel chooses. Needed with `iif`.
    pub src: Option<IpAddr>,
    /// The device that the packet came in by; `None`: it starts here.
    pub iif: Option<LinkName>,
    /// The device that it must leave by; `None`: any.
    pub oif: Option<LinkName>,
}

/// What RTM_GETROUTE answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteAnswer {
    /// rtm_type: 1 unicast, 2 local, …
    pub kind: u8,
    /// Output device.
    pub dev: Option<LinkName>,
    /// Next hop; `None`: the destination is on the link.
    pub via: Option<IpAddr>,
    /// The source address that a packet from here gets.
    pub src: Option<IpAddr>,
    /// The table that decided.
    pub table: u32,
    /// Further next hops of the same route, among which a hash of the packet chooses.
    #[serde(default)]
    pub others: usize,
}

/// Why there is no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum NoRoute {
    /// The kernel refuses: 101 no route, 113 unreachable, 18 the reverse path does not fit, 13 prohibited, 22 blackhole.
    #[error("the kernel answers {text} (errno {errno})")]
    Refused {
        /// Errno, positive.
        errno: i32,
        /// Its text.
        text: String,
    },
    /// Nobody could be asked.
    #[error("the kernel could not be asked: {0}")]
    NotAsked(String),
}

/// No route: ENETUNREACH.
pub const ENETUNREACH: i32 = 101;

impl PlaceFacts {
    /// The device `name`.
    pub fn link(&self, name: LinkName) -> Option<&Link> {
        self.state.link(name)
    }

    /// All devices.
    pub fn links(&self) -> impl Iterator<Item = &Link> {
        self.state.iter().filter_map(|(_, o)| if let Object::Link(l) = o { Some(&**l) } else { None })
    }

    /// All addresses.
    pub fn addrs(&self) -> impl Iterator<Item = &Addr> {
        self.state.iter().filter_map(|(_, o)| if let Object::Addr(a) = o { Some(a) } else { None })
    }

    /// All routes.
    pub fn routes(&self) -> impl Iterator<Item = &Route> {
        self.state.iter().filter_map(|(_, o)| if let Object::Route(r) = o { Some(r) } else { None })
    }

    /// True when `ip` is an address of this place.
    pub fn owns(&self, ip: IpAddr) -> bool {
        self.addrs().any(|a| a.inet.addr == ip)
    }

    /// The neighbour entry of `ip` on `link`.
    pub fn neigh(&self, link: LinkName, ip: IpAddr) -> Option<&Neigh> {
        match self.state.get(&Key::Neigh(link, ip)) {
            Some(Object::Neigh(n)) => Some(n),
            _ => None,
        }
    }

    /// The forwarding entry of `mac` on `link`, a bridge or VXLAN.
    pub fn fdb(&self, link: LinkName, mac: MacAddr) -> Option<&Fdb> {
        match self.state.get(&Key::Fdb(link, mac)) {
            Some(Object::Fdb(f)) => Some(f),
            _ => None,
        }
    }

    /// The ports of `bridge`.
    pub fn ports(&self, bridge: LinkName) -> impl Iterator<Item = &Link> {
        self.links().filter(move |l| l.master == Some(bridge))
    }

    /// The bridge that `link` is a port of.
    pub fn bridge_of(&self, link: &Link) -> Option<LinkName> {
        let master = self.link(link.master?)?;
        matches!(master.kind, LinkKind::Bridge).then_some(master.name)
    }

    /// The sysctl that lets a packet of `dst`'s family which came in by `iif` be forwarded, and its value; `None`: not known.
    pub fn forwarding(&self, iif: LinkName, dst: IpAddr) -> (String, Option<bool>) {
        // IPv4 asks the device it came in by, IPv6 the whole namespace (net/ipv4/route.c ip_route_input_slow; net/ipv6/ip6_output.c ip6_forward).
        let path = if dst.is_ipv4() {
            format!("net/ipv4/conf/{iif}/forwarding")
        } else {
            "net/ipv6/conf/all/forwarding".to_owned()
        };
        let value = match self.state.get(&Key::Sysctl(path.as_str().into())) {
            Some(Object::Sysctl { value, .. }) => Some(&**value != "0"),
            _ => None,
        };
        (path, value)
    }

    /// The table line that an answer came from: among those of its table that cover `dst` and name its device and next hop, the
    /// longest prefix with the lowest metric.
    pub fn line_of(&self, dst: IpAddr, answer: &RouteAnswer) -> Option<(RouteKey, &RouteEntry)> {
        let covering = self.routes().filter(|r| r.key.table == answer.table && r.key.dst.contains(dst));
        let entries = covering.flat_map(|r| r.entries.as_slice().iter().map(|e| (r.key, e)));
        entries
            .filter(|(_, e)| e.dev == answer.dev && e.via == answer.via && e.kind == answer.kind)
            .max_by_key(|(k, _)| (k.dst.len(), std::cmp::Reverse(k.metric)))
    }
}

/// Facts in memory. Looks routes up by itself (longest prefix, then lowest metric, local table first; no policy rules), so that it
/// serves tests and files; where a kernel is there, the kernel is asked.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    places: Vec<(String, PlaceFacts)>,
}

impl Memory {
    /// Adds or replaces a place.
    pub fn insert(&mut self, name: impl Into<String>, facts: PlaceFacts) {
        let name = name.into();
        match self.places.iter_mut().find(|(n, _)| *n == name) {
            Some((_, old)) => *old = facts,
            None => self.places.push((name, facts)),
        }
    }

    /// A place, to change it.
    pub fn place_mut(&mut self, name: &str) -> Option<&mut PlaceFacts> {
        self.places.iter_mut().find(|(n, _)| n == name).map(|(_, facts)| facts)
    }
}

impl Facts for Memory {
    fn places(&self) -> Vec<&str> {
        self.places.iter().map(|(n, _)| n.as_str()).collect()
    }

    fn place(&self, name: &str) -> Option<&PlaceFacts> {
        self.places.iter().find(|(n, _)| n == name).map(|(_, facts)| facts)
    }

    fn route(&self, place: &str, query: &RouteQuery) -> Result<RouteAnswer, NoRoute> {
        let facts = self.place(place).ok_or_else(|| NoRoute::NotAsked(format!("nothing is known of {place}")))?;
        lookup(facts, query)
    }
}

/// A route lookup as the kernel does it without policy rules: the local table, then main.
pub fn lookup(facts: &PlaceFacts, query: &RouteQuery) -> Result<RouteAnswer, NoRoute> {
    if facts.owns(query.dst) {
        let dev = facts.addrs().find(|a| a.inet.addr == query.dst).map(|a| a.link);
        return Ok(RouteAnswer { kind: 2, dev, via: None, src: Some(query.dst), table: TABLE_LOCAL, others: 0 });
    }
    let usable = |e: &&RouteEntry| e.dev.is_none_or(|d| facts.link(d).is_some_and(|l| l.up));
    let leaves = |e: &RouteEntry| query.oif.is_none() || e.dev == query.oif;
    let best = facts
        .routes()
        .filter(|r| r.key.table == TABLE_MAIN && r.key.dst.contains(query.dst))
        .filter_map(|r| Some((r.key, r.entries.as_slice().iter().find(|e| usable(e) && leaves(e))?)))
        .max_by_key(|(k, _)| (k.dst.len(), std::cmp::Reverse(k.metric)));
    match best {
        Some((key, e)) if e.kind == 1 => {
            let src = e.extras().src.or_else(|| source_on(facts, e.dev?, query.dst));
            Ok(RouteAnswer { kind: 1, dev: e.dev, via: e.via, src, table: key.table, others: 0 })
        }
        Some((_, e)) => {
            let (errno, text) = match e.kind {
                6 => (22, "invalid argument"),
                8 => (13, "permission denied"),
                _ => (113, "no route to host"),
            };
            Err(NoRoute::Refused { errno, text: text.to_owned() })
        }
        None => Err(NoRoute::Refused { errno: ENETUNREACH, text: "network is unreachable".to_owned() }),
    }
}

/// The first address of `dst`'s family on `link`.
fn source_on(facts: &PlaceFacts, link: LinkName, dst: IpAddr) -> Option<IpAddr> {
    facts.addrs().find(|a| a.link == link && a.inet.addr.is_ipv4() == dst.is_ipv4()).map(|a| a.inet.addr)
}
