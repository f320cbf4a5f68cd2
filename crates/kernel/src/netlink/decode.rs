//! Kernel messages → objects.
//!
//! Fixed structs: `ifinfomsg` 16 bytes, `ifaddrmsg` 8, `rtmsg` 12, `ndmsg` 12, `fib_rule_hdr` 12 (include/uapi/linux/rtnetlink.h,
//! neighbour.h, fib_rules.h). A message that does not fit gives `None`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use twill_core::host::{
    Addr, Detour, Extras, Fdb, FdbRoom, Few, Link, LinkKind, Neigh, OuterHeader, PortFlags, Remark, Route, RouteEntry,
    RouteKey, Rule, RuleKey, Vxlan,
};
use twill_core::net::{Inet, LinkName, MacAddr, Mtu, Port, Prefix, Vni};

use super::names::Names;
use super::wire::{attr, attrs, text, u16_at, u32_at};

pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_BRIDGE: u8 = 7;
pub(crate) const AF_INET6: u8 = 10;

/// Attribute numbers of links (include/uapi/linux/if_link.h).
pub(crate) mod ifla {
    pub(crate) const ADDRESS: u16 = 1;
    pub(crate) const IFNAME: u16 = 3;
    pub(crate) const MTU: u16 = 4;
    pub(crate) const LINK: u16 = 5;
    pub(crate) const MASTER: u16 = 10;
    pub(crate) const LINKINFO: u16 = 18;
    pub(crate) const NET_NS_FD: u16 = 28;
    pub(crate) const EXT_MASK: u16 = 29;
    pub(crate) const NUM_TX_QUEUES: u16 = 31;
    pub(crate) const NUM_RX_QUEUES: u16 = 32;
    pub(crate) const LINK_NETNSID: u16 = 37;
    pub(crate) const PROTO_DOWN: u16 = 39;
    pub(crate) const PROTO_DOWN_REASON: u16 = 55;
    /// Within the reason.
    pub(crate) const REASON_MASK: u16 = 1;
    pub(crate) const REASON_VALUE: u16 = 2;
    pub(crate) const INFO_KIND: u16 = 1;
    pub(crate) const INFO_DATA: u16 = 2;
    pub(crate) const INFO_SLAVE_KIND: u16 = 4;
    pub(crate) const INFO_SLAVE_DATA: u16 = 5;
    pub(crate) const BRPORT_STATE: u16 = 1;
    pub(crate) const BRPORT_MODE: u16 = 4;
    pub(crate) const BRPORT_LEARNING: u16 = 8;
    pub(crate) const BRPORT_UNICAST_FLOOD: u16 = 9;
    pub(crate) const BRPORT_ISOLATED: u16 = 33;
    pub(crate) const BRPORT_LOCKED: u16 = 39;
    pub(crate) const VETH_PEER: u16 = 1;
    pub(crate) const VXLAN_ID: u16 = 1;
    pub(crate) const VXLAN_GROUP: u16 = 2;
    pub(crate) const VXLAN_LINK: u16 = 3;
    pub(crate) const VXLAN_LOCAL: u16 = 4;
    pub(crate) const VXLAN_TTL: u16 = 5;
    pub(crate) const VXLAN_TOS: u16 = 6;
    pub(crate) const VXLAN_LEARNING: u16 = 7;
    pub(crate) const VXLAN_AGEING: u16 = 8;
    pub(crate) const VXLAN_LIMIT: u16 = 9;
    pub(crate) const VXLAN_PROXY: u16 = 11;
    pub(crate) const VXLAN_RSC: u16 = 12;
    pub(crate) const VXLAN_L2MISS: u16 = 13;
    pub(crate) const VXLAN_L3MISS: u16 = 14;
    pub(crate) const VXLAN_PORT: u16 = 15;
    pub(crate) const VXLAN_GROUP6: u16 = 16;
    pub(crate) const VXLAN_LOCAL6: u16 = 17;
    pub(crate) const VXLAN_REMCSUM_TX: u16 = 21;
    pub(crate) const VXLAN_GBP: u16 = 23;
    pub(crate) const VXLAN_TTL_INHERIT: u16 = 28;
    pub(crate) const VXLAN_DF: u16 = 29;
}

/// Attribute numbers of neighbours and forwarding entries.
pub(crate) mod nda {
    pub(crate) const DST: u16 = 1;
    pub(crate) const LLADDR: u16 = 2;
    pub(crate) const VLAN: u16 = 5;
    pub(crate) const PORT: u16 = 6;
    pub(crate) const VNI: u16 = 7;
    pub(crate) const IFINDEX: u16 = 8;
    pub(crate) const MASTER: u16 = 9;
    pub(crate) const PROTOCOL: u16 = 12;
    pub(crate) const NH_ID: u16 = 13;
    pub(crate) const FLAGS_EXT: u16 = 15;
}

/// Attribute numbers of routes.
pub(crate) mod rta {
    pub(crate) const DST: u16 = 1;
    pub(crate) const SRC: u16 = 2;
    pub(crate) const IIF: u16 = 3;
    pub(crate) const OIF: u16 = 4;
    pub(crate) const GATEWAY: u16 = 5;
    pub(crate) const PRIORITY: u16 = 6;
    pub(crate) const PREFSRC: u16 = 7;
    pub(crate) const METRICS: u16 = 8;
    pub(crate) const MULTIPATH: u16 = 9;
    pub(crate) const FLOW: u16 = 11;
    pub(crate) const TABLE: u16 = 15;
    pub(crate) const VIA: u16 = 18;
    pub(crate) const PREF: u16 = 20;
    pub(crate) const ENCAP: u16 = 22;
    pub(crate) const NH_ID: u16 = 30;
    /// Among the metrics.
    pub(crate) const MTU: u16 = 2;
    pub(crate) const ADVMSS: u16 = 8;
}

pub(crate) const NUD_NOARP: u16 = 0x40;
pub(crate) const NUD_PERMANENT: u16 = 0x80;
pub(crate) const RTNH_F_ONLINK: u32 = 4;
const IFF_UP: u32 = 1;
const IFF_NOARP: u32 = 0x80;
const IFF_PROMISC: u32 = 0x100;
const IFF_MULTICAST: u32 = 0x1000;
const IFF_LOWER_UP: u32 = 1 << 16;
const NTF_EXT_LEARNED: u8 = 0x10;
const NTF_STICKY: u8 = 0x40;
const NTF_ROUTER: u8 = 0x80;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
const RTM_F_CLONED: u32 = 0x200;

/// Index and name of a link message: the first pass over a dump.
pub(crate) fn link_name(payload: &[u8]) -> Option<(u32, LinkName)> {
    let name = attr(payload.get(16..)?, ifla::IFNAME).and_then(text)?;
    Some((u32_at(payload, 4)?, name.parse().ok()?))
}

/// A device.
pub(crate) fn link(payload: &[u8], names: &Names) -> Option<Link> {
    let rest = payload.get(16..)?;
    let flags = u32_at(payload, 8)?;
    let mut link = Link {
        name: link_name(payload)?.1,
        kind: LinkKind::Other { name: "device".into() },
        mac: None,
        mtu: None,
        up: flags & IFF_UP != 0,
        master: None,
        port: None,
        promisc: (flags & IFF_PROMISC != 0).then_some(true),
        arp: Some(flags & IFF_NOARP == 0),
        multicast: Some(flags & IFF_MULTICAST != 0),
        protodown: None,
        carrier: flags & IFF_LOWER_UP != 0,
    };
    let elsewhere = attr(rest, ifla::LINK_NETNSID).is_some();
    let mut peer = None;
    for (kind, value) in attrs(rest) {
        match kind {
            ifla::ADDRESS => link.mac = mac(value),
            ifla::MTU => link.mtu = u32_at(value, 0).and_then(|mtu| Mtu::try_from(i64::from(mtu)).ok()),
            ifla::MASTER => link.master = u32_at(value, 0).and_then(|index| names.name(index)),
            ifla::PROTO_DOWN => link.protodown = value.first().map(|on| *on != 0),
            ifla::LINK if !elsewhere => peer = u32_at(value, 0).and_then(|index| names.name(index)),
            _ => {}
        }
    }
    if let Some(info) = attr(rest, ifla::LINKINFO) {
        link.kind = link_kind(info, peer, names)?;
        link.port = port_flags(info);
    }
    Some(link)
}

fn link_kind(info: &[u8], peer: Option<LinkName>, names: &Names) -> Option<LinkKind> {
    let data = attr(info, ifla::INFO_DATA).unwrap_or_default();
    Some(match attr(info, ifla::INFO_KIND).and_then(text)? {
        "vxlan" => LinkKind::Vxlan(vxlan(data, names)?),
        "bridge" => LinkKind::Bridge,
        "veth" => LinkKind::Veth { peer, peer_netns: None },
        "tun" => LinkKind::Tun,
        other => LinkKind::Other { name: other.into() },
    })
}

/// What a bridge does with its port, where it does anything.
fn port_flags(info: &[u8]) -> Option<PortFlags> {
    let data = attr(info, ifla::INFO_SLAVE_DATA)?;
    attr(info, ifla::INFO_SLAVE_KIND).and_then(text).filter(|kind| *kind == "bridge")?;
    let on = |kind| attr(data, kind).and_then(|v| v.first()).is_some_and(|v| *v != 0);
    let flags = PortFlags { hairpin: on(ifla::BRPORT_MODE), isolated: on(ifla::BRPORT_ISOLATED) };
    (flags != PortFlags::default()).then_some(flags)
}

fn vxlan(data: &[u8], names: &Names) -> Option<Vxlan> {
    let byte = |kind| attr(data, kind).and_then(|v| v.first()).copied().unwrap_or_default();
    let number = |kind| attr(data, kind).and_then(|v| u32_at(v, 0)).unwrap_or_default();
    let address = |v4, v6| attr(data, v4).or(attr(data, v6)).and_then(ip).filter(|ip| !ip.is_unspecified());
    let port = attr(data, ifla::VXLAN_PORT).and_then(|v| Some(u16::from_be_bytes(v.try_into().ok()?)));
    Some(Vxlan {
        vni: Vni::try_from(i64::from(u32_at(attr(data, ifla::VXLAN_ID)?, 0)?)).ok()?,
        port: Port::try_from(i64::from(port?)).ok()?,
        local: address(ifla::VXLAN_LOCAL, ifla::VXLAN_LOCAL6),
        remote: address(ifla::VXLAN_GROUP, ifla::VXLAN_GROUP6),
        lower: attr(data, ifla::VXLAN_LINK).and_then(|v| names.name(u32_at(v, 0)?)),
        learning: byte(ifla::VXLAN_LEARNING) != 0,
        gbp: attr(data, ifla::VXLAN_GBP).is_some(),
        outer: OuterHeader { ttl: byte(ifla::VXLAN_TTL), tos: byte(ifla::VXLAN_TOS), df: byte(ifla::VXLAN_DF) },
        room: FdbRoom { ageing: number(ifla::VXLAN_AGEING), limit: number(ifla::VXLAN_LIMIT) },
        special: NEVER_GIVEN.iter().any(|kind| byte(*kind) != 0),
    })
}

/// Flags of a VXLAN that Twill never gives, and that nobody can take from a living one.
const NEVER_GIVEN: [u16; 6] = [
    ifla::VXLAN_PROXY,
    ifla::VXLAN_RSC,
    ifla::VXLAN_L2MISS,
    ifla::VXLAN_L3MISS,
    ifla::VXLAN_REMCSUM_TX,
    ifla::VXLAN_TTL_INHERIT,
];

/// An address.
pub(crate) fn addr(payload: &[u8], names: &Names) -> Option<Addr> {
    let rest = payload.get(8..)?;
    // IFA_LOCAL (2) is the own address where the two differ, IFA_ADDRESS (1) the peer's or the only one.
    let own = attr(rest, 2).or(attr(rest, 1)).and_then(ip)?;
    // IFA_CACHEINFO (6): seconds for which it is preferred, and valid; all ones is for ever.
    let expires = attr(rest, 6).is_some_and(|times| (0..2).any(|n| u32_at(times, 4 * n) != Some(u32::MAX)));
    Some(Addr {
        link: names.name(u32_at(payload, 4)?)?,
        inet: Inet::new(own, *payload.get(1)?).ok()?,
        scope: *payload.get(3)?,
        expires,
        // IFA_ADDRESS, IFA_RT_PRIORITY (9), IFA_FLAGS (8).
        peer: attr(rest, 1).and_then(ip).filter(|peer| *peer != own),
        metric: attr(rest, 9).and_then(|v| u32_at(v, 0)).unwrap_or_default(),
        noprefixroute: attr(rest, 8).and_then(|v| u32_at(v, 0)).is_some_and(|flags| flags & IFA_F_NOPREFIXROUTE != 0),
    })
}

/// Index of the device that a neighbour or forwarding message is about.
pub(crate) fn neigh_index(payload: &[u8]) -> Option<u32> {
    u32_at(payload, 4)
}

/// A neighbour entry; multicast ones are the kernel's own, come and go without a word, and are passed over.
pub(crate) fn neigh(payload: &[u8], names: &Names) -> Option<Neigh> {
    let rest = payload.get(12..)?;
    let state = u16_at(payload, 8)?;
    Some(Neigh {
        link: names.name(neigh_index(payload)?)?,
        ip: attr(rest, nda::DST).and_then(ip).filter(|ip| !ip.is_multicast())?,
        mac: attr(rest, nda::LLADDR).and_then(mac),
        permanent: state & NUD_PERMANENT != 0,
        // Flags of the second word too: managed, locked. And who added it.
        special: is_flagged(payload)
            || [nda::FLAGS_EXT, nda::PROTOCOL].into_iter().any(|kind| attr(rest, kind).is_some()),
        state,
    })
}

/// True when an entry has a flag that only others give: of a router, learned elsewhere, sticky.
fn is_flagged(payload: &[u8]) -> bool {
    payload.get(10).is_some_and(|flags| flags & (NTF_EXT_LEARNED | NTF_STICKY | NTF_ROUTER) != 0)
}

/// A forwarding entry; of a bridge's only those without VLAN (each entry is told once for each VLAN).
pub(crate) fn fdb(payload: &[u8], names: &Names) -> Option<Fdb> {
    let rest = payload.get(12..)?;
    let state = u16_at(payload, 8)?;
    let device = names.name(neigh_index(payload)?)?;
    let master = attr(rest, nda::MASTER).and_then(|v| names.name(u32_at(v, 0)?));
    if attr(rest, nda::VLAN).is_some() {
        return None;
    }
    let dst = attr(rest, nda::DST).and_then(ip);
    let number = |kind| attr(rest, kind).and_then(|v| u32_at(v, 0));
    let has_detour = [nda::PORT, nda::VNI, nda::IFINDEX, nda::NH_ID].into_iter().any(|kind| attr(rest, kind).is_some());
    let detour = has_detour.then(|| Detour {
        port: attr(rest, nda::PORT)
            .and_then(|v| Port::try_from(i64::from(u16::from_be_bytes(v.try_into().ok()?))).ok()),
        vni: number(nda::VNI).and_then(|vni| Vni::try_from(i64::from(vni)).ok()),
        via: number(nda::IFINDEX).and_then(|index| names.name(index)),
        group: number(nda::NH_ID),
    });
    Some(Fdb {
        link: master.unwrap_or(device),
        mac: attr(rest, nda::LLADDR).and_then(mac)?,
        dst: dst.map_or(Few::none(), Few::One),
        port: master.map(|_| device),
        permanent: state & NUD_PERMANENT != 0,
        special: detour.is_some() || is_flagged(payload),
        detour: detour.map(Box::new),
        state,
    })
}

/// A route and its entries (several for a multipath route); `None` for cache entries and multicast.
pub(crate) fn route(payload: &[u8], names: &Names) -> Option<Route> {
    let rest = payload.get(12..)?;
    let (family, len, tos) = (*payload.first()?, *payload.get(1)?, *payload.get(3)?);
    if u32_at(payload, 8)? & RTM_F_CLONED != 0 {
        return None;
    }
    let any = match family {
        AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let dst = attr(rest, rta::DST).and_then(ip).unwrap_or(any);
    let key = RouteKey {
        table: attr(rest, rta::TABLE).and_then(|v| u32_at(v, 0)).unwrap_or(u32::from(*payload.get(4)?)),
        dst: Prefix::truncate(dst, len).ok()?,
        tos,
        metric: attr(rest, rta::PRIORITY).and_then(|v| u32_at(v, 0)).unwrap_or(0),
    };
    let metrics = attr(rest, rta::METRICS).unwrap_or_default();
    let number = |kind| attr(metrics, kind).and_then(|v| u32_at(v, 0));
    let base = RouteEntry {
        via: None,
        dev: None,
        onlink: false,
        protocol: *payload.get(5)?,
        kind: *payload.get(7)?,
        scope: *payload.get(6)?,
        extras: Extras {
            src: attr(rest, rta::PREFSRC).and_then(ip),
            mtu: number(rta::MTU),
            advmss: number(rta::ADVMSS),
        }
        .boxed(),
        special: attrs(metrics).any(|(kind, _)| ![rta::MTU, rta::ADVMSS].contains(&kind))
            || [rta::FLOW, rta::ENCAP, rta::NH_ID].into_iter().any(|kind| attr(rest, kind).is_some())
            || attr(rest, rta::PREF).is_some_and(|pref| pref != [0]),
        usurper: Remark::default(),
    };
    let entries = match attr(rest, rta::MULTIPATH) {
        Some(hops) => Few::from(multipath(hops, &base, names)),
        None => Few::One(hop(rest, u32_at(payload, 8)?, attr(rest, rta::OIF).and_then(|v| u32_at(v, 0)), base, names)),
    };
    Some(Route { key, entries })
}

/// `struct rtnexthop` of 8 bytes each, with attributes behind.
fn multipath(mut hops: &[u8], base: &RouteEntry, names: &Names) -> Vec<RouteEntry> {
    let mut entries = Vec::new();
    while let (Some(len), Some(index)) = (u16_at(hops, 0), u32_at(hops, 4)) {
        let Some(rest) = hops.get(8..usize::from(len)) else { break };
        entries.push(hop(rest, u32::from(hops[2]), Some(index), base.clone(), names));
        hops = hops.get(usize::from(len).next_multiple_of(4)..).unwrap_or_default();
    }
    entries
}

fn hop(rest: &[u8], flags: u32, index: Option<u32>, base: RouteEntry, names: &Names) -> RouteEntry {
    // RTA_VIA: a next hop of the other family, after its family's number of 2 bytes.
    let via = attr(rest, rta::GATEWAY).or(attr(rest, rta::VIA).and_then(|v| v.get(2..))).and_then(ip);
    RouteEntry { via, dev: index.and_then(|i| names.name(i)), onlink: flags & RTNH_F_ONLINK != 0, ..base }
}

/// A policy rule, its selector printed as `ip rule` prints it.
pub(crate) fn rule(payload: &[u8]) -> Option<Rule> {
    let rest = payload.get(12..)?;
    let (family, dst_len, src_len) = (*payload.first()?, *payload.get(1)?, *payload.get(2)?);
    let number = |kind| attr(rest, kind).and_then(|v| u32_at(v, 0));
    let net = |kind, len| attr(rest, kind).and_then(ip).and_then(|ip| Prefix::truncate(ip, len).ok());
    let (from, to) = (net(2, src_len), net(1, dst_len));
    // FIB_RULE_INVERT.
    let inverted = u32_at(payload, 8)? & 2 != 0;
    let not = if inverted { "not " } else { "" };
    let mut selector = format!("{not}from {}", from.map_or("all".into(), |from| from.to_string()));
    if let Some(to) = to {
        selector += &format!(" to {to}");
    }
    // FRA_FWMARK 10, FRA_FWMASK 16, FRA_IIFNAME 3, FRA_OIFNAME 17.
    if let Some(mark) = number(10) {
        selector += &format!(" fwmark {mark:#x}/{:#x}", number(16).unwrap_or(u32::MAX));
    }
    for (kind, word) in [(3, "iif"), (17, "oif")] {
        if let Some(name) = attr(rest, kind).and_then(text) {
            selector += &format!(" {word} {name}");
        }
    }
    if let Some(tos @ 1..) = payload.get(3) {
        selector += &format!(" tos {tos:#x}");
    }
    // FRA_UID_RANGE 20, FRA_IP_PROTO 22, FRA_SPORT_RANGE 23, FRA_DPORT_RANGE 24.
    if let Some((from, to)) = attr(rest, 20).and_then(|v| Some((u32_at(v, 0)?, u32_at(v, 4)?))) {
        selector += &format!(" uidrange {from}-{to}");
    }
    if let Some(number) = attr(rest, 22).and_then(|v| v.first()) {
        selector += &format!(" ipproto {number}");
    }
    for (kind, word) in [(23, "sport"), (24, "dport")] {
        if let Some((from, to)) = attr(rest, kind).and_then(|v| Some((u16_at(v, 0)?, u16_at(v, 2)?))) {
            selector += &format!(" {word} {from}-{to}");
        }
    }
    // FRA_SUPPRESS_PREFIXLEN 14, all ones: none; FRA_GOTO 4.
    let suppress = number(14).and_then(|len| u8::try_from(len).ok());
    if let Some(len) = suppress {
        selector += &format!(" suppress_prefixlength {len}");
    }
    // FRA_PRIORITY 6, FRA_TABLE 15, FRA_PROTOCOL 21; action 1 is "look into a table".
    let table = number(15).unwrap_or(u32::from(*payload.get(4)?));
    Some(Rule {
        key: RuleKey { v6: family == AF_INET6, priority: number(6).unwrap_or(0), selector: selector.into() },
        action: *payload.get(7)?,
        table: (*payload.get(7)? == 1).then_some(table),
        goto: number(4).filter(|_| payload.get(7) == Some(&2)),
        suppress,
        to: to.filter(|_| !inverted),
        protocol: attr(rest, 21).and_then(|v| v.first()).copied().unwrap_or(0),
    })
}

pub(crate) fn ip(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
        _ => None,
    }
}

fn mac(bytes: &[u8]) -> Option<MacAddr> {
    bytes.try_into().ok().map(MacAddr)
}
