//! Which of the host's devices carries the tunnel, and why.

use std::net::IpAddr;

use crate::backend::{Refusal, Underlay};
use crate::host::{Addr, HostState, Key, Link, LinkKind, Object, Route, TABLE_MAIN};
use crate::net::{Inet, LinkName};

/// The wishes of flags and file, as text: names or addresses, in order of preference.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wishes {
    /// `--iface`.
    pub iface: Vec<String>,
    /// `--public-ip`: what peers are told, when it is not the device's own.
    pub public: Vec<IpAddr>,
}

/// The chosen device, and why it was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen {
    /// The device.
    pub underlay: Underlay,
    /// In words.
    pub why: String,
}

/// Chooses among `host`'s devices. Every refusal may be cured by waiting: the device may come, come up, or get its address.
pub fn choose(host: &HostState, wishes: &Wishes) -> Result<Chosen, Refusal> {
    let (link, why) = if wishes.iface.is_empty() { by_default_route(host)? } else { by_wish(host, &wishes.iface)? };
    if !link.up {
        return Err(refusal(
            "iface-down",
            format!("interface {} is down", link.name),
            format!("ip link set {} up", link.name),
        ));
    }
    let asked: Option<IpAddr> = wishes.iface.iter().find_map(|wish| wish.parse().ok());
    let of_family = |v4: bool| {
        let mut all = addresses(host, link.name)
            .filter(|a| a.inet.addr.is_ipv4() == v4 && a.scope == 0)
            .map(|a| a.inet)
            .peekable();
        let first = all.peek().copied();
        all.find(|inet| asked == Some(inet.addr)).or(first)
    };
    let (v4, v6): (Option<Inet>, Option<Inet>) = (of_family(true), of_family(false));
    if v4.is_none() && v6.is_none() {
        return Err(without_address(host, link));
    }
    let public = |v4: bool| wishes.public.iter().copied().find(|ip| ip.is_ipv4() == v4);
    let mtu = link.mtu.ok_or_else(|| {
        refusal("iface-without-mtu", format!("interface {} has no MTU", link.name), "name another with --iface".into())
    })?;
    Ok(Chosen {
        underlay: Underlay { link: link.name, mtu, v4, v6, public_v4: public(true), public_v6: public(false) },
        why,
    })
}

fn by_wish<'h>(host: &'h HostState, wishes: &[String]) -> Result<(&'h Link, String), Refusal> {
    for wish in wishes {
        if let Ok(ip) = wish.parse::<IpAddr>() {
            let holder = host.iter().find_map(|(_, o)| match o {
                Object::Addr(a) if a.inet.addr == ip => host.link(a.link),
                _ => None,
            });
            if let Some(link) = holder {
                return Ok((link, format!("--iface {wish}: it has this address")));
            }
        } else if let Some(link) = wish.parse().ok().and_then(|name| host.link(name)) {
            return Ok((link, format!("--iface {wish} names it")));
        }
    }
    let message = format!("no interface is, or has the address, {}", wishes.join(" or "));
    Err(refusal("iface-missing", message, name_another(host)))
}

fn without_address(host: &HostState, link: &Link) -> Refusal {
    if is_loopback(link) {
        let message = format!("interface {} has no global address: it leads to this host alone", link.name);
        return refusal("iface-without-address", message, name_another(host));
    }
    let another = candidates(host).map_or_else(String::new, |names| format!("; or {names}"));
    let fix = format!("give it one: ip addr add ADDRESS/LEN dev {}{another}", link.name);
    refusal("iface-without-address", format!("interface {} has no global address", link.name), fix)
}

/// The way out where a device cannot be used.
fn name_another(host: &HostState) -> String {
    candidates(host).unwrap_or_else(|| "give a device an address: ip addr add ADDRESS/LEN dev NAME".into())
}

/// The devices that can be named instead, with their addresses; `None`: there is none.
fn candidates(host: &HostState) -> Option<String> {
    let global = |link: &Link| {
        let all = addresses(host, link.name).filter(|a| a.scope == 0).map(|a| a.inet.addr.to_string());
        all.collect::<Vec<_>>().join(", ")
    };
    // A tunnel is what the underlay carries.
    let carriers = |link: &&Link| !is_loopback(link) && !matches!(link.kind, LinkKind::Vxlan(_) | LinkKind::Tun);
    let named = links(host).filter(carriers).map(|link| (link.name, global(link)));
    let list: Vec<_> = named.filter(|(_, all)| !all.is_empty()).map(|(name, all)| format!("{name} ({all})")).collect();
    (!list.is_empty()).then(|| format!("name with --iface one that has an address: {}", list.join(", ")))
}

fn is_loopback(link: &Link) -> bool {
    link.name.as_str() == "lo"
}

fn by_default_route(host: &HostState) -> Result<(&Link, String), Refusal> {
    let defaults = host.iter().filter_map(|(_, o)| match o {
        Object::Route(route) if route.key.dst.len() == 0 && route.key.table == TABLE_MAIN => Some(route),
        _ => None,
    });
    let dev = |route: &Route| route.entries.first().and_then(|e| e.dev);
    let best = defaults
        .filter_map(|route| Some((route.key.metric, host.link(dev(route)?)?)))
        .min_by_key(|(metric, _)| *metric);
    best.map(|(metric, link)| (link, format!("it has the default route with the lowest metric ({metric})")))
        .ok_or_else(|| refusal("iface-missing", "no interface has a default route".into(), name_another(host)))
}

fn links(host: &HostState) -> impl Iterator<Item = &Link> {
    host.range(..Key::Sysctl("".into())).filter_map(|(_, o)| match o {
        Object::Link(link) => Some(&**link),
        _ => None,
    })
}

fn addresses(host: &HostState, link: LinkName) -> impl Iterator<Item = &Addr> {
    host.iter().filter_map(move |(_, o)| match o {
        Object::Addr(a) if a.link == link => Some(a),
        _ => None,
    })
}

fn refusal(code: &'static str, message: String, hint: String) -> Refusal {
    Refusal { code, message, hint }
}
