//! Which packets are thought of: one between any two containers, and one for each address and port that a rule names.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::Source;
use super::packet::{Packet, UDP, Way};
use crate::firewall::build;
use crate::firewall::{Datum, Expr, Field, Hook, Keys, Load, PayloadBase, Rule, TableName, policy};
use crate::host::{HostState, Key, LinkKind, Object};
use crate::net::{LinkName, Prefix, ip_to_bits};
use crate::reconcile::Desired;

/// So many addresses and ports that rules name are looked at, and so many pairs of both.
const NAMED: usize = 32;
const PAIRS: usize = 64;
/// Somebody beyond the network.
const BEYOND: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(151, 217, 43, 21)), IpAddr::V6(Ipv6Addr::new(0x2a0f, 0x4ac0, 0, 0, 0, 0, 0, 0x15))];
/// Ports that nobody has a rule for.
const ANY_PORTS: [u16; 2] = [52_917, 47_653];

/// What has to pass, and where.
#[derive(Debug)]
pub(super) struct Scene {
    pub(super) families: Vec<Ends>,
    /// Where peers' datagrams come in, and the device of that address.
    pub(super) outer: Vec<(SocketAddr, Option<LinkName>)>,
    /// Where peers are on the underlay.
    peers: BTreeSet<IpAddr>,
    named: Named,
    /// The numbers of the devices that packets pass.
    indexes: BTreeMap<LinkName, u32>,
}

/// What one family has.
#[derive(Debug)]
pub(super) struct Ends {
    pub(super) network: Prefix,
    pub(super) subnet: Prefix,
    pub(super) tunnel: LinkName,
    pub(super) bridge: LinkName,
    /// The host's own addresses within the subnet.
    own: BTreeSet<IpAddr>,
}

/// Packets that are alike but for protocol and state.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) way: Way,
    pub(super) v4: bool,
    /// Of no port that a rule names.
    pub(super) whole: bool,
    pub(super) packets: Vec<Packet>,
}

/// What rules compare with.
#[derive(Debug, Default)]
struct Named {
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<u16>,
}

impl Scene {
    pub(super) fn new(
        want: &Desired,
        have: &HostState,
        sources: &[Source<'_>],
        index: &dyn Fn(LinkName) -> Option<u32>,
    ) -> Self {
        let mut named = Named::default();
        for rule in sources.iter().flat_map(|source| source.table.chains.values()).flat_map(|chain| &chain.rules) {
            named.take(rule);
        }
        let families = want.claim.networks.iter().filter_map(|network| Ends::new(network, want, have));
        let families: Vec<Ends> = families.collect();
        let holder = |ip: IpAddr| {
            have.iter().find_map(|(_, object)| match object {
                Object::Addr(addr) if addr.inet.addr == ip => Some(addr.link),
                _ => None,
            })
        };
        let outer: Vec<_> = outer(want).into_iter().map(|at| (at, holder(at.ip()))).collect();
        let devices = families.iter().flat_map(|ends| [ends.tunnel, ends.bridge]);
        let devices = devices.chain(outer.iter().filter_map(|(_, device)| *device));
        let indexes = devices.filter_map(|name| Some((name, index(name)?))).collect();
        Self { families, outer, peers: peers(want), named, indexes }
    }

    /// All packets that are thought of.
    pub(super) fn groups(&self) -> Vec<Group> {
        let mut groups = Vec::new();
        for ends in &self.families {
            self.between_containers(ends, &mut groups);
        }
        for (at, device) in &self.outer {
            let some = self.peers.iter().find(|peer| peer.is_ipv4() == at.is_ipv4()).copied();
            let named = self.peers.intersection(&self.named.addresses).take(NAMED).copied();
            for peer in some.into_iter().chain(named).filter(|peer| peer.is_ipv4() == at.is_ipv4()) {
                groups.extend([Way::Heard, Way::Sent].map(|way| datagram(way, *at, peer, *device)));
            }
        }
        for packet in groups.iter_mut().flat_map(|group| &mut group.packets) {
            packet.indexes = packet.devices.map(|device| self.indexes.get(&device?).copied());
        }
        groups.sort_by_key(|group| !group.whole);
        groups
    }

    fn between_containers(&self, ends: &Ends, groups: &mut Vec<Group>) {
        let v4 = ends.network.is_v4();
        let named = self.named.addresses.iter().filter(|ip| ip.is_ipv4() == v4).copied();
        let (mine, theirs): (Vec<IpAddr>, Vec<IpAddr>) =
            named.filter(|ip| ends.network.contains(*ip)).partition(|ip| ends.subnet.contains(*ip));
        let mine = mine.into_iter().filter(|ip| !ends.own.contains(ip) && *ip != ends.subnet.addr());
        let (my, their) = (ends.some(true), ends.some(false));
        let mut pairs = vec![(my, their)];
        pairs.extend(mine.take(NAMED).map(|ip| (ip, their)));
        pairs.extend(theirs.into_iter().filter(|ip| *ip != ends.network.addr()).take(NAMED).map(|ip| (my, ip)));
        let (beyond, outside) = (BEYOND[usize::from(!v4)], self.outer.iter().find_map(|(_, device)| *device));
        for (way, src, dst) in [(Way::Leaves, my, beyond), (Way::Returns, beyond, my)] {
            let mut group = ends.group(way, src, dst, None);
            for packet in &mut group.packets {
                packet.devices[usize::from(way == Way::Leaves)] = outside;
                packet.devices[usize::from(way == Way::Returns)] = Some(ends.bridge);
            }
            // Nobody beyond begins a connection.
            group.packets.retain(|packet| way == Way::Leaves || !packet.new);
            groups.push(group);
        }
        let ports: Vec<u16> = self.named.ports.iter().take(NAMED).copied().collect();
        let crossed = pairs.len() * ports.len() <= PAIRS;
        for (n, (my, their)) in pairs.iter().enumerate() {
            for way in [Way::In, Way::Out] {
                let (src, dst) = if way == Way::In { (*their, *my) } else { (*my, *their) };
                groups.push(ends.group(way, src, dst, None));
                let of_ports = ports.iter().filter(|_| crossed || n == 0);
                groups.extend(of_ports.map(|port| ends.group(way, src, dst, Some(*port))));
            }
        }
    }

    /// The rule with the names of devices whose numbers it has.
    pub(super) fn named(&self, rule: &Rule) -> Rule {
        let mut rule = rule.clone();
        for expr in &mut rule.exprs {
            if let Expr::Match { load: Load { field: Field::IifIndex | Field::OifIndex, .. }, value, .. } = expr
                && let Some((name, _)) = self.indexes.iter().find(|(_, index)| Datum::Number(**index) == *value)
            {
                *value = Datum::Name(*name);
            }
        }
        rule
    }

    /// True for a rule that names something of ours: who deletes it opens nothing else.
    pub(super) fn is_about_us(&self, rule: &Rule) -> bool {
        let mut named = Named::default();
        named.take(rule);
        let address = |ip: &IpAddr| {
            self.families.iter().any(|ends| ends.network.contains(*ip))
                || self.peers.contains(ip)
                || self.outer.iter().any(|(at, _)| at.ip() == *ip)
        };
        let port = |port: &u16| self.outer.iter().any(|(at, _)| at.port() == *port);
        let device = |expr: &Expr| match expr {
            Expr::Match { value: Datum::Name(name), .. } => {
                self.families.iter().any(|ends| ends.tunnel == *name || ends.bridge == *name)
            }
            _ => false,
        };
        named.addresses.iter().any(address) || named.ports.iter().any(port) || rule.exprs.iter().any(device)
    }
}

impl Ends {
    fn new(network: &Prefix, want: &Desired, have: &HostState) -> Option<Self> {
        let subnet = *want.claim.subnets.iter().find(|subnet| network.covers(subnet))?;
        let here = |name: &&LinkName| match have.link(**name).map(|link| &link.kind) {
            Some(LinkKind::Vxlan(vxlan)) => vxlan.is_v4() == network.is_v4(),
            Some(_) => true,
            None => false,
        };
        let wanted = |name: &&LinkName| want.host.get(&Key::Link(**name)).is_some();
        let devices = || want.claim.devices.iter().filter(here);
        let tunnel = *devices().find(wanted).or_else(|| devices().next())?;
        let addresses = have.iter().filter_map(|(_, object)| match object {
            Object::Addr(addr) if subnet.contains(addr.inet.addr) && addr.link != tunnel => Some(addr),
            _ => None,
        });
        let addresses: Vec<_> = addresses.collect();
        let bridge = addresses.first().map(|addr| addr.link).or_else(|| "cni0".parse().ok())?;
        let own = addresses.iter().map(|addr| addr.inet.addr).collect();
        Some(Self { network: *network, subnet, tunnel, bridge, own })
    }

    /// An address that hardly a rule names: of a container of ours, or of a peer's.
    fn some(&self, mine: bool) -> IpAddr {
        let before_last = |net: &Prefix| {
            let back = ip_to_bits(net.last()).saturating_sub(ip_to_bits(net.addr()));
            net.nth(back.saturating_sub(5)).unwrap_or(net.last())
        };
        let theirs = before_last(&self.network);
        match mine {
            true => before_last(&self.subnet),
            // Ours is the last subnet.
            false if self.subnet.contains(theirs) => self.network.nth(5).unwrap_or(theirs),
            false => theirs,
        }
    }

    fn group(&self, way: Way, src: IpAddr, dst: IpAddr, port: Option<u16>) -> Group {
        let devices = if way == Way::In { [self.tunnel, self.bridge] } else { [self.bridge, self.tunnel] }.map(Some);
        let packet = |proto, ports, new| Packet { way, src, dst, devices, indexes: [None; 2], proto, ports, new };
        let v4 = src.is_ipv4();
        let mut packets = Vec::new();
        for proto in Packet::protocols(v4) {
            match port {
                None => packets.extend([true, false].map(|new| packet(proto, ANY_PORTS, new))),
                Some(port) if [build::TCP, UDP].contains(&proto) => {
                    let [from, to] = ANY_PORTS;
                    packets.extend([true, false].map(|new| packet(proto, [from, port], new)));
                    packets.push(packet(proto, [port, to], false));
                }
                Some(_) => {}
            }
        }
        Group { way, v4, whole: port.is_none(), packets }
    }
}

fn datagram(way: Way, at: SocketAddr, peer: IpAddr, device: Option<LinkName>) -> Group {
    let (src, dst, devices) =
        if way == Way::Heard { (peer, at.ip(), [device, None]) } else { (at.ip(), peer, [None, device]) };
    let ports = [ANY_PORTS[0], at.port()];
    let packet = Packet { way, src, dst, devices, indexes: [None; 2], proto: UDP, ports, new: true };
    Group { way, v4: at.is_ipv4(), whole: true, packets: vec![packet] }
}

/// Where peers' datagrams come in: as our own table says it.
fn outer(want: &Desired) -> Vec<SocketAddr> {
    let Some(Object::Table(table)) = want.host.get(&Key::Table(TableName::twill())) else { return Vec::new() };
    let before = table.chains.values().filter(|chain| chain.base.is_some_and(|base| base.hook == Hook::Prerouting));
    let untracked = before.flat_map(|chain| &chain.rules).filter(|rule| rule.exprs.contains(&Expr::Notrack));
    let named = untracked.map(|rule| {
        let mut named = Named::default();
        named.take(rule);
        named
    });
    named.filter_map(|named| Some(SocketAddr::new(*named.addresses.first()?, *named.ports.first()?))).collect()
}

/// Where peers are on the underlay: whom the tunnel's socket hears, or where frames are sent.
fn peers(want: &Desired) -> BTreeSet<IpAddr> {
    let mut peers = BTreeSet::new();
    for (_, object) in want.host.iter() {
        match object {
            Object::Table(table) => {
                peers.extend(table.sets.get(policy::PEERS).into_iter().flat_map(|set| &set.elements));
            }
            Object::Fdb(entry) => peers.extend(entry.dst.as_slice()),
            _ => {}
        }
    }
    peers
}

impl Named {
    fn take(&mut self, rule: &Rule) {
        for expr in &rule.exprs {
            match expr {
                Expr::Match { load, value, .. } => self.value(load.field, &value.bytes()),
                Expr::Range { load, keys, .. } => self.keys(std::slice::from_ref(load), keys),
                Expr::Member { loads, keys, .. } => keys.iter().for_each(|keys| self.keys(loads, keys)),
                Expr::Choose { loads, ways, .. } => ways.iter().for_each(|(keys, _)| self.keys(loads, keys)),
                Expr::Xt { target: false, name, data, .. } => self.xtables(name, data),
                _ => {}
            }
        }
    }

    fn keys(&mut self, loads: &[Load], keys: &Keys) {
        let mut begin = 0;
        for load in loads {
            let len = load.field.kind().len();
            for part in [&keys.from, &keys.to].into_iter().filter_map(|key| key.get(begin..begin + len)) {
                self.value(load.field, part);
            }
            begin += len.next_multiple_of(4);
        }
    }

    fn value(&mut self, field: Field, bytes: &[u8]) {
        let ip = |bytes: &[u8]| match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
            _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
        };
        let port = |bytes: &[u8]| bytes.try_into().ok().map(u16::from_be_bytes);
        match field {
            Field::SrcV4 | Field::DstV4 | Field::SrcV6 | Field::DstV6 => self.addresses.extend(ip(bytes)),
            Field::SrcPort | Field::DstPort => self.ports.extend(port(bytes)),
            // `nft` looks at neighbouring fields at once.
            Field::Raw { base: PayloadBase::Network, offset: 12, len: 8 } => {
                self.addresses.extend(bytes.chunks(4).filter_map(ip));
            }
            Field::Raw { base: PayloadBase::Network, offset: 8, len: 32 } => {
                self.addresses.extend(bytes.chunks(16).filter_map(ip));
            }
            Field::Raw { base: PayloadBase::Transport, offset: 0, len: 4 } => {
                self.ports.extend(bytes.chunks(2).filter_map(port));
            }
            _ => {}
        }
    }

    /// Ports of the matches of `iptables`, in the host's order.
    fn xtables(&mut self, name: &str, data: &[u8]) {
        let (begin, count) = match name {
            "tcp" | "udp" => (0, 4),
            "multiport" => (2, usize::from(data.get(1).copied().unwrap_or(0)).min(15)),
            _ => return,
        };
        let ports = data.get(begin..begin + 2 * count).unwrap_or_default().chunks(2);
        let ports = ports.filter_map(|bytes| bytes.try_into().ok().map(u16::from_ne_bytes));
        // The ends of a range of all ports.
        self.ports.extend(ports.filter(|port| ![0, u16::MAX].contains(port)));
    }
}
