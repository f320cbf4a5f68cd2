//! Which of the host's devices carries the tunnel, and why.

use std::net::IpAddr;

use crate::backend::{Refusal, Underlay};
use crate::host::{Addr, HostState, Key, Link, Object, Route, TABLE_MAIN};
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
        let fix = format!("give it one: ip addr add ADDRESS/LEN dev {}", link.name);
        return Err(refusal("iface-without-address", format!("interface {} has no global address", link.name), fix));
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
    let have: Vec<&str> = links(host).filter(|l| l.name.as_str() != "lo").map(|l| l.name.as_str()).collect();
    let message = format!("no interface is, or has the address, {}", wishes.join(" or "));
    Err(refusal("iface-missing", message, format!("this host has: {}", have.join(", "))))
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
    best.map(|(metric, link)| (link, format!("it has the default route with the lowest metric ({metric})"))).ok_or_else(
        || {
            refusal(
                "iface-missing",
                "no interface has a default route".into(),
                "name one with --iface NAME or --iface ADDRESS".into(),
            )
        },
    )
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
