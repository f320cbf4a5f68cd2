//! Steps → requests. One step can be several requests (a re-creation, a route with twins); the first refusal is the step's.

use std::fs::File;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use twill_core::host::{
    Addr, Extras, Fdb, Link, LinkKind, Neigh, Object, OuterHeader, PortFlags, Route, RouteEntry, Vxlan,
};
use twill_core::net::LinkName;
use twill_core::reconcile::Op;

use super::decode::{AF_BRIDGE, AF_INET, AF_INET6, NUD_NOARP, NUD_PERMANENT, RTNH_F_ONLINK, ifla, nda, rta};
use super::names::Names;
use super::wire::{Writer, flag};

/// Message types.
pub(crate) mod rtm {
    pub(crate) const NEWLINK: u16 = 16;
    pub(crate) const DELLINK: u16 = 17;
    pub(crate) const GETLINK: u16 = 18;
    pub(crate) const NEWADDR: u16 = 20;
    pub(crate) const DELADDR: u16 = 21;
    pub(crate) const GETADDR: u16 = 22;
    pub(crate) const NEWROUTE: u16 = 24;
    pub(crate) const DELROUTE: u16 = 25;
    pub(crate) const GETROUTE: u16 = 26;
    pub(crate) const NEWNEIGH: u16 = 28;
    pub(crate) const DELNEIGH: u16 = 29;
    pub(crate) const GETNEIGH: u16 = 30;
    pub(crate) const NEWRULE: u16 = 32;
    pub(crate) const DELRULE: u16 = 33;
    pub(crate) const GETRULE: u16 = 34;
    pub(crate) const NEWNEXTHOP: u16 = 104;
    pub(crate) const DELNEXTHOP: u16 = 105;
}

const NTF_SELF: u8 = 2;
const NTF_MASTER: u8 = 4;
/// IFA_F_NODAD: the address is ours by lease, nobody needs to be asked.
const IFA_F_NODAD: u8 = 2;
/// In a delete: of any protocol.
const RTPROT_UNSPEC: u8 = 0;
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
const IFF_PROMISC: u32 = 0x100;
const IFF_MULTICAST: u32 = 0x1000;

/// Writes requests into a batch.
#[derive(Debug)]
pub(crate) struct Encoder<'a> {
    pub(crate) writer: &'a mut Writer,
    pub(crate) names: &'a Names,
    /// Gives each request its number.
    pub(crate) seq: &'a mut u32,
    /// Namespace files that the batch refers to by number.
    pub(crate) files: &'a mut Vec<File>,
}

/// Why a step cannot be written.
pub(crate) type Unwritable = String;

impl Encoder<'_> {
    /// The requests of one step.
    pub(crate) fn op(&mut self, op: &Op) -> Result<(), Unwritable> {
        match op {
            Op::Create(Object::Route(route)) => self.routes(route, rtm::NEWROUTE, flag::CREATE | flag::APPEND),
            Op::Update { from: Object::Route(from), to: Object::Route(to) } => self.change_route(from, to),
            Op::Delete(Object::Route(route)) => self.routes(route, rtm::DELROUTE, 0),
            Op::Create(Object::Link(link)) => self.create_link(link),
            Op::Update { from: Object::Link(from), to: Object::Link(to) } => self.change_link(from, to),
            Op::Recreate { from: Object::Link(from), to: Object::Link(to) } => {
                self.delete_link(from.name)?;
                self.create_link(to)
            }
            Op::Delete(Object::Link(link)) => self.delete_link(link.name),
            Op::Create(Object::Fdb(fdb)) if !replaceable(fdb) => self.fdb_hosts(fdb),
            Op::Update { from: Object::Fdb(from), to: Object::Fdb(to) } if !(replaceable(from) && replaceable(to)) => {
                self.fdb(from, true)?;
                self.fdb_hosts(to)
            }
            // The kernel changes lifetime and metric of an address in place, and nothing else of it.
            Op::Update { from: Object::Addr(from), to: Object::Addr(to) } if !same_address(from, to) => {
                self.addr(from, true)?;
                self.addr(to, false)
            }
            // Who added a neighbour can be written over, and never taken away.
            Op::Update { from: Object::Neigh(from), to: Object::Neigh(to) } if from.special && !to.special => {
                self.neigh(from, true)?;
                self.neigh(to, false)
            }
            Op::Delete(object) => self.object(object, true),
            Op::Create(object) | Op::Update { to: object, .. } | Op::Recreate { to: object, .. } => {
                self.object(object, false)
            }
        }
    }

    fn object(&mut self, object: &Object, delete: bool) -> Result<(), Unwritable> {
        match object {
            Object::Addr(addr) => self.addr(addr, delete),
            Object::Neigh(neigh) => self.neigh(neigh, delete),
            Object::Fdb(fdb) => self.fdb(fdb, delete),
            Object::Link(_)
            | Object::Route(_)
            | Object::Sysctl { .. }
            | Object::Rule(_)
            | Object::Table(_)
            | Object::Head(_)
            | Object::Leftover(_) => Err(format!("cannot write {object}")),
        }
    }

    fn begin(&mut self, kind: u16, flags: u16) {
        *self.seq = self.seq.wrapping_add(1).max(1);
        self.writer.begin(kind, flag::REQUEST | flags, *self.seq);
    }

    fn index(&self, name: LinkName) -> Result<u32, Unwritable> {
        self.names.index(name).ok_or_else(|| format!("there is no device {name}"))
    }

    /// `struct ifinfomsg`; of the flags only those given are changed.
    fn ifinfo(&mut self, index: u32, wanted: &[(u32, Option<bool>)]) {
        let (mut flags, mut change) = (0, 0);
        for &(bit, on) in wanted {
            flags |= if on == Some(true) { bit } else { 0 };
            change |= if on.is_some() { bit } else { 0 };
        }
        self.writer.put(&[0; 4]);
        for word in [index, flags, change] {
            self.writer.put(&word.to_ne_bytes());
        }
    }

    fn create_link(&mut self, link: &Link) -> Result<(), Unwritable> {
        let master = link.master.map(|name| self.index(name)).transpose()?;
        let lower = match &link.kind {
            LinkKind::Vxlan(v) => v.lower.map(|name| self.index(name)).transpose()?,
            _ => None,
        };
        let peer_netns = match &link.kind {
            LinkKind::Veth { peer_netns: Some(path), .. } => {
                let file = File::open(&**path).map_err(|e| format!("open the namespace {path}: {e}"))?;
                let fd = file.as_raw_fd();
                self.files.push(file);
                Some(fd)
            }
            _ => None,
        };
        self.begin(rtm::NEWLINK, flag::CREATE | flag::EXCL);
        self.ifinfo(0, &flags(link, None));
        let w = &mut *self.writer;
        w.text(ifla::IFNAME, link.name.as_str());
        link_attrs(w, link, master);
        if matches!(link.kind, LinkKind::Veth { .. }) {
            one_queue(w);
        }
        match &link.kind {
            LinkKind::Vxlan(vxlan) => {
                w.nest(ifla::LINKINFO, |w| {
                    w.text(ifla::INFO_KIND, "vxlan");
                    w.nest(ifla::INFO_DATA, |w| vxlan_attrs(w, vxlan, lower));
                });
            }
            LinkKind::Bridge => w.nest(ifla::LINKINFO, |w| w.text(ifla::INFO_KIND, "bridge")),
            LinkKind::Veth { peer, .. } => w.nest(ifla::LINKINFO, |w| {
                w.text(ifla::INFO_KIND, "veth");
                w.nest(ifla::INFO_DATA, |w| {
                    w.nest(ifla::VETH_PEER, |w| {
                        w.put(&[0; 16]);
                        one_queue(w);
                        if let Some(peer) = peer {
                            w.text(ifla::IFNAME, peer.as_str());
                        }
                        if let Some(mtu) = link.mtu {
                            w.attr(ifla::MTU, &mtu.get().to_ne_bytes());
                        }
                        if let Some(fd) = peer_netns {
                            w.attr(ifla::NET_NS_FD, &fd.to_ne_bytes());
                        }
                    });
                });
            }),
            // A TUN device comes by its own ioctl.
            LinkKind::Tun | LinkKind::Other { .. } => return Err(format!("cannot make {link}")),
        }
        self.writer.end();
        if let Some(port) = link.port {
            self.port_flags(link.name, port);
        }
        Ok(())
    }

    /// What the bridge does with its port. A request of its own: the kernel looks at the master before it changes it
    /// (net/core/rtnetlink.c `__rtnl_newlink`).
    fn port_flags(&mut self, name: LinkName, port: PortFlags) {
        self.begin(rtm::NEWLINK, 0);
        self.ifinfo(0, &[]);
        let w = &mut *self.writer;
        w.text(ifla::IFNAME, name.as_str());
        w.nest(ifla::LINKINFO, |w| {
            w.text(ifla::INFO_SLAVE_KIND, "bridge");
            w.nest(ifla::INFO_SLAVE_DATA, |w| {
                w.attr(ifla::BRPORT_MODE, &[u8::from(port.hairpin)]);
                w.attr(ifla::BRPORT_ISOLATED, &[u8::from(port.isolated)]);
            });
        });
        w.end();
    }

    fn change_link(&mut self, from: &Link, to: &Link) -> Result<(), Unwritable> {
        let index = self.index(to.name)?;
        let master = match to.master {
            Some(master) if from.master != Some(master) => Some(self.index(master)?),
            None if to.stands_alone() && from.master.is_some() => Some(0),
            _ => None,
        };
        let vxlan = match (&from.kind, &to.kind) {
            (LinkKind::Vxlan(was), LinkKind::Vxlan(vxlan)) if !to.kind.satisfied_by(&from.kind) => {
                let lower = vxlan.lower.filter(|l| was.lower != Some(*l)).map(|name| self.index(name)).transpose()?;
                Some((vxlan, was, lower))
            }
            _ => None,
        };
        let flags = flags(to, Some(from));
        // Two requests: the kernel refuses an MTU beside VXLAN's own attributes (`vxlan_nl2conf`), and a lower device bounds it.
        if let Some((vxlan, was, lower)) = vxlan {
            self.begin(rtm::NEWLINK, 0);
            self.ifinfo(index, &[]);
            self.writer.nest(ifla::LINKINFO, |w| {
                w.text(ifla::INFO_KIND, "vxlan");
                w.nest(ifla::INFO_DATA, |w| {
                    w.attr(ifla::VXLAN_LEARNING, &[u8::from(vxlan.learning)]);
                    if vxlan.room.ageing != was.room.ageing {
                        w.attr(ifla::VXLAN_AGEING, &vxlan.room.ageing.to_ne_bytes());
                    }
                    if vxlan.outer != was.outer {
                        outer_attrs(w, vxlan.outer);
                    }
                    if vxlan.local.is_some() && vxlan.local != was.local {
                        address_attr(w, vxlan.local, ifla::VXLAN_LOCAL, ifla::VXLAN_LOCAL6);
                    }
                    if let (Some(was), None) = (was.remote, vxlan.remote) {
                        let nowhere = if was.is_ipv4() { IpAddr::from([0; 4]) } else { IpAddr::from([0; 16]) };
                        address_attr(w, Some(nowhere), ifla::VXLAN_GROUP, ifla::VXLAN_GROUP6);
                    }
                    if let Some(lower) = lower {
                        w.attr(ifla::VXLAN_LINK, &lower.to_ne_bytes());
                    }
                });
            });
            self.writer.end();
        }
        let changed = Link {
            mac: to.mac.filter(|mac| from.mac != Some(*mac)),
            mtu: to.mtu.filter(|mtu| from.mtu != Some(*mtu)),
            ..to.clone()
        };
        let flagged = flags.iter().any(|(_, on)| on.is_some());
        if changed.mac.is_some() || changed.mtu.is_some() || master.is_some() || flagged {
            self.begin(rtm::NEWLINK, 0);
            self.ifinfo(index, &flags);
            link_attrs(self.writer, &changed, master);
            self.writer.end();
        }
        if to.protodown == Some(false) && from.protodown == Some(true) {
            self.carrier_back(index);
        }
        if let Some(port) = to.port.filter(|port| master.is_some() || from.port.unwrap_or_default() != *port) {
            self.port_flags(to.name, port);
        }
        Ok(())
    }

    /// Without all reasons, whoever gave them: as long as there is one, the kernel refuses (net/core/rtnetlink.c `do_set_proto_down`).
    fn carrier_back(&mut self, index: u32) {
        self.begin(rtm::NEWLINK, 0);
        self.ifinfo(index, &[]);
        let w = &mut *self.writer;
        w.nest(ifla::PROTO_DOWN_REASON, |w| {
            w.attr(ifla::REASON_MASK, &u32::MAX.to_ne_bytes());
            w.attr(ifla::REASON_VALUE, &0u32.to_ne_bytes());
        });
        w.attr(ifla::PROTO_DOWN, &[0]);
        w.end();
    }

    fn delete_link(&mut self, name: LinkName) -> Result<(), Unwritable> {
        self.begin(rtm::DELLINK, 0);
        self.ifinfo(0, &[]);
        self.writer.text(ifla::IFNAME, name.as_str());
        self.writer.end();
        Ok(())
    }

    fn addr(&mut self, addr: &Addr, delete: bool) -> Result<(), Unwritable> {
        let index = self.index(addr.link)?;
        let family = family(addr.inet.addr);
        if delete {
            self.begin(rtm::DELADDR, 0)
        } else {
            self.begin(rtm::NEWADDR, flag::CREATE | flag::REPLACE)
        }
        let flags = if family == AF_INET6 { IFA_F_NODAD } else { 0 };
        self.writer.put(&[family, addr.inet.len(), flags, addr.scope]);
        self.writer.put(&index.to_ne_bytes());
        self.writer.attr(2, &octets(addr.inet.addr));
        self.writer.attr(1, &octets(addr.peer.unwrap_or(addr.inet.addr)));
        if addr.metric != 0 {
            self.writer.attr(9, &addr.metric.to_ne_bytes());
        }
        self.writer.end();
        Ok(())
    }

    /// `struct ndmsg`.
    fn ndmsg(&mut self, family: u8, index: u32, state: u16, flags: u8) {
        self.writer.put(&[family, 0, 0, 0]);
        self.writer.put(&index.to_ne_bytes());
        self.writer.put(&state.to_ne_bytes());
        self.writer.put(&[flags, 0]);
    }

    fn neigh(&mut self, neigh: &Neigh, delete: bool) -> Result<(), Unwritable> {
        let index = self.index(neigh.link)?;
        if delete {
            self.begin(rtm::DELNEIGH, 0)
        } else {
            self.begin(rtm::NEWNEIGH, flag::CREATE | flag::REPLACE)
        }
        self.ndmsg(family(neigh.ip), index, if neigh.permanent { NUD_PERMANENT } else { neigh.state }, 0);
        self.writer.attr(nda::DST, &octets(neigh.ip));
        if let Some(mac) = neigh.mac.filter(|_| !delete) {
            self.writer.attr(nda::LLADDR, &mac.0);
        }
        self.writer.end();
        Ok(())
    }

    /// Writes or deletes an entry with one host. A delete without a host takes the entry with all its hosts (`vxlan_fdb_delete`).
    fn fdb(&mut self, fdb: &Fdb, delete: bool) -> Result<(), Unwritable> {
        let dst = fdb.dst.first().filter(|_| !delete).copied();
        if delete {
            self.fdb_message(fdb, rtm::DELNEIGH, 0, dst)
        } else {
            self.fdb_message(fdb, rtm::NEWNEIGH, flag::CREATE | flag::REPLACE, dst)
        }
    }

    /// Adds each host of an entry: an entry with several is never replaced, only appended to.
    fn fdb_hosts(&mut self, fdb: &Fdb) -> Result<(), Unwritable> {
        let mut hosts = fdb.dst.as_slice().iter();
        hosts.try_for_each(|dst| self.fdb_message(fdb, rtm::NEWNEIGH, flag::CREATE | flag::APPEND, Some(*dst)))
    }

    fn fdb_message(&mut self, fdb: &Fdb, kind: u16, flags: u16, dst: Option<IpAddr>) -> Result<(), Unwritable> {
        let index = self.index(fdb.port.unwrap_or(fdb.link))?;
        self.begin(kind, flags);
        let state = if fdb.permanent { NUD_PERMANENT } else { NUD_NOARP };
        self.ndmsg(AF_BRIDGE, index, state, if fdb.port.is_some() { NTF_MASTER } else { NTF_SELF });
        self.writer.attr(nda::LLADDR, &fdb.mac.0);
        if let Some(dst) = dst {
            self.writer.attr(nda::DST, &octets(dst));
        }
        self.writer.end();
        Ok(())
    }

    /// Every entry of a route.
    fn routes(&mut self, route: &Route, kind: u16, flags: u16) -> Result<(), Unwritable> {
        route.entries.as_slice().iter().try_for_each(|entry| self.route(route, entry, kind, flags))
    }

    /// From the twins that are there to those that shall be: the first is replaced in place when it has to go, so that no packet
    /// finds the table without a route. IPv6 refuses a next hop on one device that the tables find on another, `onlink` or not
    /// (net/ipv6/route.c `ip6_route_check_nh_onlink`): there the other device's entry goes first.
    fn change_route(&mut self, from: &Route, to: &Route) -> Result<(), Unwritable> {
        let (was, will) = (from.entries.as_slice(), to.entries.as_slice());
        let mut gone: Vec<&RouteEntry> = was.iter().filter(|entry| !will.contains(entry)).collect();
        for entry in will.iter().filter(|entry| !was.contains(entry)) {
            let strays = |other: &&RouteEntry| !to.key.dst.is_v4() && other.dev != entry.dev;
            for stray in gone.extract_if(.., |other| strays(other)) {
                self.route(from, stray, rtm::DELROUTE, 0)?;
            }
            if gone.first().is_some_and(|first| was.first() == Some(*first)) {
                self.route(to, entry, rtm::NEWROUTE, flag::CREATE | flag::REPLACE)?;
                gone.remove(0);
            } else {
                self.route(to, entry, rtm::NEWROUTE, flag::CREATE | flag::APPEND)?;
            }
        }
        gone.into_iter().try_for_each(|entry| self.route(from, entry, rtm::DELROUTE, 0))
    }

    fn route(&mut self, route: &Route, entry: &RouteEntry, kind: u16, flags: u16) -> Result<(), Unwritable> {
        let oif = entry.dev.map(|dev| self.index(dev)).transpose()?;
        self.begin(kind, flags);
        let key = &route.key;
        // IPv6 takes another's next hop into our route, and tells both as ours; a next hop it has once.
        let joined = kind == rtm::DELROUTE && !key.dst.is_v4() && entry.via.is_some();
        let protocol = if joined { RTPROT_UNSPEC } else { entry.protocol };
        let short = if key.table < 256 { key.table as u8 } else { 0 };
        self.writer.put(&[family(key.dst.addr()), key.dst.len(), 0, key.tos, short, protocol, entry.scope, entry.kind]);
        let flags = if entry.onlink { RTNH_F_ONLINK } else { 0 };
        self.writer.put(&flags.to_ne_bytes());
        let w = &mut *self.writer;
        if key.dst.len() > 0 {
            w.attr(rta::DST, &octets(key.dst.addr()));
        }
        w.attr(rta::TABLE, &key.table.to_ne_bytes());
        if key.metric != 0 {
            w.attr(rta::PRIORITY, &key.metric.to_ne_bytes());
        }
        if let Some(oif) = oif {
            w.attr(rta::OIF, &oif.to_ne_bytes());
        }
        match entry.via {
            Some(via) if family(via) == family(key.dst.addr()) => w.attr(rta::GATEWAY, &octets(via)),
            // struct rtvia: the family, then the address.
            Some(via) => w.attr(rta::VIA, &[&u16::from(family(via)).to_ne_bytes(), &*octets(via)].concat()),
            None => {}
        }
        let Extras { src, mtu, advmss } = entry.extras();
        if let Some(src) = src {
            w.attr(rta::PREFSRC, &octets(src));
        }
        if mtu.or(advmss).is_some() {
            w.nest(rta::METRICS, |w| {
                for (kind, metric) in [(rta::MTU, mtu), (rta::ADVMSS, advmss)] {
                    metric.into_iter().for_each(|metric| w.attr(kind, &metric.to_ne_bytes()));
                }
            });
        }
        self.writer.end();
        Ok(())
    }
}

/// The kernel replaces the host of unicast entries only (`vxlan_fdb_update_existing`); they have one, or a nexthop group in its stead,
/// which a replacement would leave there without a word.
fn replaceable(fdb: &Fdb) -> bool {
    fdb.port.is_some() || (fdb.mac.is_unicast() && fdb.dst.as_slice().len() == 1)
}

fn same_address(from: &Addr, to: &Addr) -> bool {
    // IPv6 has no way back to no metric (net/ipv6/addrconf.c `inet6_addr_modify`).
    (from.metric == to.metric || to.inet.addr.is_ipv4())
        && (from.inet, from.scope, from.peer, from.noprefixroute) == (to.inet, to.scope, to.peer, to.noprefixroute)
}

/// A pair uses one queue for each direction. The kernel would make one for each CPU, and then wait for all of them while it takes the
/// others out of use (drivers/net/veth.c `veth_init_queues`).
fn one_queue(w: &mut Writer) {
    w.attr(ifla::NUM_TX_QUEUES, &1u32.to_ne_bytes());
    w.attr(ifla::NUM_RX_QUEUES, &1u32.to_ne_bytes());
}

/// The flags that a device shall have; of one that is there, those that differ.
fn flags(to: &Link, from: Option<&Link>) -> [(u32, Option<bool>); 4] {
    let differing = |of: fn(&Link) -> Option<bool>| of(to).filter(|on| from.and_then(of) != Some(*on));
    let promisc = |on: &bool| from.is_none_or(|was| was.promisc.unwrap_or_default() != *on);
    [
        (IFF_UP, differing(|link| Some(link.up))),
        (IFF_PROMISC, to.promisc.filter(promisc)),
        (IFF_NOARP, differing(|link| link.arp.map(|arp| !arp))),
        (IFF_MULTICAST, differing(|link| link.multicast)),
    ]
}

fn link_attrs(w: &mut Writer, link: &Link, master: Option<u32>) {
    if let Some(mac) = link.mac {
        w.attr(ifla::ADDRESS, &mac.0);
    }
    if let Some(mtu) = link.mtu {
        w.attr(ifla::MTU, &mtu.get().to_ne_bytes());
    }
    if let Some(master) = master {
        w.attr(ifla::MASTER, &master.to_ne_bytes());
    }
}

fn vxlan_attrs(w: &mut Writer, vxlan: &Vxlan, lower: Option<u32>) {
    w.attr(ifla::VXLAN_ID, &vxlan.vni.get().to_ne_bytes());
    w.attr(ifla::VXLAN_PORT, &vxlan.port.get().to_be_bytes());
    w.attr(ifla::VXLAN_LEARNING, &[u8::from(vxlan.learning)]);
    if vxlan.gbp {
        w.attr(ifla::VXLAN_GBP, &[]);
    }
    outer_attrs(w, vxlan.outer);
    w.attr(ifla::VXLAN_AGEING, &vxlan.room.ageing.to_ne_bytes());
    w.attr(ifla::VXLAN_LIMIT, &vxlan.room.limit.to_ne_bytes());
    address_attr(w, vxlan.local, ifla::VXLAN_LOCAL, ifla::VXLAN_LOCAL6);
    if let Some(lower) = lower {
        w.attr(ifla::VXLAN_LINK, &lower.to_ne_bytes());
    }
}

fn outer_attrs(w: &mut Writer, outer: OuterHeader) {
    for (kind, value) in [(ifla::VXLAN_TTL, outer.ttl), (ifla::VXLAN_TOS, outer.tos), (ifla::VXLAN_DF, outer.df)] {
        w.attr(kind, &[value]);
    }
}

fn address_attr(w: &mut Writer, address: Option<IpAddr>, v4: u16, v6: u16) {
    match address {
        Some(IpAddr::V4(ip)) => w.attr(v4, &ip.octets()),
        Some(IpAddr::V6(ip)) => w.attr(v6, &ip.octets()),
        None => {}
    }
}

pub(crate) fn family(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { AF_INET } else { AF_INET6 }
}

/// An address's bytes as they stand in an attribute.
pub(crate) fn octets(ip: IpAddr) -> Octets {
    match ip {
        IpAddr::V4(ip) => Octets::V4(ip.octets()),
        IpAddr::V6(ip) => Octets::V6(ip.octets()),
    }
}

/// 4 or 16 bytes; reads as a slice.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Octets {
    V4([u8; 4]),
    V6([u8; 16]),
}

impl std::ops::Deref for Octets {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Octets::V4(bytes) => bytes,
            Octets::V6(bytes) => bytes,
        }
    }
}
