//! What the kernel answers to a change, cascades included. Used by the plan and by the in-memory twin; checked against a real
//! namespace by the kernel crate's contract suite.
//!
//! Sources: net/ipv4/fib_frontend.c `fib_netdev_event`, net/core/neighbour.c `neigh_ifdown`, `neigh_changeaddr`,
//! net/ipv6/addrconf.c `addrconf_ifdown`, drivers/net/vxlan/vxlan_core.c `vxlan_handle_lowerdev_unregister`.

use std::net::IpAddr;

use crate::host::{
    Addr, Extras, Few, HostState, Key, LinkKind, Object, PROTO_KERNEL, Remark, Route, RouteEntry, RouteKey, TABLE_MAIN,
};
use crate::net::LinkName;

use super::Op;

/// Changes `have` as the kernel would when `op` works.
pub fn effect(have: &mut HostState, op: &Op) {
    match op {
        Op::Create(object) => create(have, object),
        Op::Update { from, to } => update(have, from, to),
        Op::Recreate { from, to } => {
            delete(have, from);
            create(have, to);
        }
        Op::Delete(object) => delete(have, object),
    }
}

fn create(have: &mut HostState, object: &Object) {
    let mut made = object.clone();
    // A route goes behind the twins that it finds.
    if let (Object::Route(route), Some(Object::Route(twins))) = (&mut made, have.get(&object.key())) {
        let all = twins.entries.as_slice().iter().chain(route.entries.as_slice());
        route.entries = Few::from(all.cloned().collect::<Vec<_>>());
    }
    have.insert(made);
    if let Object::Addr(addr) = object
        && have.link(addr.link).is_some_and(|l| l.up)
    {
        connect(have, addr);
    }
}

fn update(have: &mut HostState, from: &Object, to: &Object) {
    match (from, to) {
        (Object::Link(was), Object::Link(link)) => {
            if was.up && !link.up {
                link_down(have, link.name);
            }
            if link.mac.is_some() && was.mac != link.mac {
                have.retain(|_, o| !matches!(o, Object::Neigh(n) if n.link == link.name));
            }
            let mut merged = (**link).clone();
            merged.mac = link.mac.or(was.mac);
            merged.mtu = link.mtu.or(was.mtu);
            merged.master = link.master.or(was.master.filter(|_| !link.stands_alone()));
            merged.port = link.port.or(was.port);
            merged.promisc = link.promisc.or(was.promisc);
            merged.arp = link.arp.or(was.arp);
            merged.multicast = link.multicast.or(was.multicast);
            merged.protodown = link.protodown.or(was.protodown);
            merged.carrier = was.carrier;
            if let (LinkKind::Vxlan(w), LinkKind::Vxlan(h)) = (&mut merged.kind, &was.kind) {
                w.local = w.local.or(h.local);
                w.lower = w.lower.or(h.lower);
            } else if matches!(merged.kind, LinkKind::Veth { .. }) {
                merged.kind = was.kind.clone();
            }
            have.insert(Object::Link(Box::new(merged)));
            if !was.up && link.up {
                for addr in addresses(have, link.name) {
                    connect(have, &addr);
                }
            }
        }
        _ => {
            have.insert(to.clone());
        }
    }
}

fn delete(have: &mut HostState, object: &Object) {
    let was = have.remove(&object.key());
    match object {
        // Twins that are not named stay.
        Object::Route(gone) => {
            let Some(Object::Route(was)) = was else { return };
            let mut left: Vec<RouteEntry> = was.entries.into();
            left.retain(|entry| !gone.entries.as_slice().contains(entry));
            if !left.is_empty() {
                have.insert(Object::Route(Route { key: gone.key, entries: left.into() }));
            }
        }
        Object::Link(link) => link_gone(have, link.name),
        Object::Addr(addr) => {
            let connected = RouteKey { table: TABLE_MAIN, dst: addr.inet.network(), tos: 0, metric: 0 };
            // The last IPv4 address takes IPv4 from the device: `fib_disable_ip`, `arp_ifdown`.
            let v4 = addr.inet.addr.is_ipv4();
            if v4 && !addresses(have, addr.link).iter().any(|left| left.inet.addr.is_ipv4()) {
                drop_entries(have, |key, entry| key.dst.is_v4() && entry.dev == Some(addr.link));
                have.retain(|_, o| !matches!(o, Object::Neigh(n) if n.link == addr.link && n.ip.is_ipv4()));
            }
            // Routes that prefer it as source go once no device has it any more: `fib_sync_down_addr`.
            let left = have.iter().any(|(_, o)| matches!(o, Object::Addr(a) if a.inet.addr == addr.inet.addr));
            drop_entries(have, |key, entry| {
                (*key == connected && entry.dev == Some(addr.link) && entry.protocol == PROTO_KERNEL)
                    || (!left && entry.extras().src == Some(addr.inet.addr))
            });
        }
        _ => {}
    }
}

/// All that stands on a device goes with it; so do the tunnels over it and the membership of its ports.
fn link_gone(have: &mut HostState, name: LinkName) {
    have.retain(|key, _| key.link() != Some(name));
    drop_entries(have, |_, entry| entry.dev == Some(name));
    let mut tunnels = Vec::new();
    let mut ports = Vec::new();
    for (_, object) in have.range(..Key::Sysctl("".into())) {
        let Object::Link(link) = object else { continue };
        if matches!(&link.kind, LinkKind::Vxlan(v) if v.lower == Some(name)) {
            tunnels.push(link.name);
        } else if link.master == Some(name) {
            ports.push(link.clone());
        }
    }
    for mut port in ports {
        port.master = None;
        have.insert(Object::Link(port));
    }
    for tunnel in tunnels {
        have.remove(&Key::Link(tunnel));
        link_gone(have, tunnel);
    }
}

/// Routes, permanent neighbours and IPv6 addresses go; forwarding entries and IPv4 addresses stay.
fn link_down(have: &mut HostState, name: LinkName) {
    have.retain(|_, object| match object {
        Object::Neigh(n) => n.link != name,
        Object::Addr(a) => a.link != name || a.inet.addr.is_ipv4(),
        _ => true,
    });
    drop_entries(have, |_, entry| entry.dev == Some(name));
}

fn addresses(have: &HostState, link: LinkName) -> Vec<Addr> {
    let all = have.iter().filter_map(|(_, o)| match o {
        Object::Addr(a) if a.link == link => Some(a.clone()),
        _ => None,
    });
    all.collect()
}

/// The connected route that comes with an address; a host address brings none in the main table.
fn connect(have: &mut HostState, addr: &Addr) {
    let IpAddr::V4(_) = addr.inet.addr else { return };
    if addr.inet.len() == 32 {
        return;
    }
    let key = RouteKey { table: TABLE_MAIN, dst: addr.inet.network(), tos: 0, metric: 0 };
    let entry = RouteEntry {
        via: None,
        dev: Some(addr.link),
        onlink: false,
        protocol: PROTO_KERNEL,
        kind: 1,
        scope: 253,
        extras: Extras { src: Some(addr.inet.addr), ..Extras::default() }.boxed(),
        special: false,
        usurper: Remark::default(),
    };
    let mut entries: Vec<RouteEntry> = match have.remove(&Key::Route(key)) {
        Some(Object::Route(route)) => route.entries.into(),
        _ => Vec::new(),
    };
    // A further address of the same network is a secondary one, and brings no second route.
    if !entries.iter().any(|e| e.dev == entry.dev && e.protocol == PROTO_KERNEL) {
        entries.push(entry);
    }
    have.insert(Object::Route(Route { key, entries: Few::from(entries) }));
}

/// Takes out the route entries that `gone` names, and routes that have none left.
fn drop_entries(have: &mut HostState, gone: impl Fn(&RouteKey, &RouteEntry) -> bool) {
    let mut changed = Vec::new();
    have.retain(|_, object| {
        let Object::Route(route) = object else { return true };
        let all = route.entries.as_slice();
        let left: Vec<RouteEntry> = all.iter().filter(|entry| !gone(&route.key, entry)).cloned().collect();
        if left.len() == all.len() {
            return true;
        }
        if !left.is_empty() {
            changed.push(Route { key: route.key, entries: Few::from(left) });
        }
        false
    });
    have.extend(changed.into_iter().map(Object::Route));
}
