//! Objects and steps as one line each, in the words of `ip` and `bridge`.

use std::fmt;

use crate::host::{Addr, FdbRoom, Link, LinkKind, Object, OuterHeader, PortFlags, Route, Rule, Vxlan};
use crate::words;

use super::{Op, Step, Why};

fn address(addr: &Addr, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let Addr { link, inet, scope, expires, peer, metric, noprefixroute } = addr;
    match peer {
        Some(peer) => write!(f, "address {} peer {peer}/{} dev {link}", inet.addr, inet.len())?,
        None => write!(f, "address {inet} dev {link}")?,
    }
    for (word, number) in [("scope", u32::from(*scope)), ("metric", *metric)].into_iter().filter(|(_, n)| *n != 0) {
        write!(f, " {word} {number}")?;
    }
    f.write_str(if *noprefixroute { " noprefixroute" } else { "" })?;
    f.write_str(if *expires { " expires" } else { "" })
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Link(link) => link.fmt(f),
            Object::Sysctl { path, value } => write!(f, "sysctl {path} = {value}"),
            Object::Addr(addr) => address(addr, f),
            Object::Neigh(neigh) => write!(f, "neigh {}{}", words::neigh_line(neigh), more(neigh.special)),
            Object::Fdb(fdb) => {
                write!(f, "fdb {}{}", words::fdb_line(fdb).replace('\n', "; "), more(fdb.special))
            }
            Object::Route(route) => route.fmt(f),
            Object::Rule(Rule { key, table, .. }) => {
                write!(f, "rule {}: {}", key.priority, key.selector)?;
                table.map_or(Ok(()), |table| write!(f, " lookup {table}"))
            }
            Object::Table(table) => table.fmt(f),
            Object::Head(head) => head.fmt(f),
            Object::Leftover(left) => {
                match (left.bare, &left.comment) {
                    (Some(network), _) => write!(f, "flannel's rules for {network} in chain {}", left.at)?,
                    (None, Some(comment)) => write!(f, "the reference bridge's chain {} of {comment}", left.at)?,
                    (None, None) => write!(f, "flannel's chain {}", left.at)?,
                }
                f.write_str(if left.legacy { " of legacy iptables" } else { "" })
            }
        }
    }
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "link {}", self.name)?;
        match &self.kind {
            LinkKind::Vxlan(v) => {
                write!(f, " vxlan id {} dstport {}", v.vni, v.port)?;
                if let Some(local) = v.local {
                    write!(f, " local {local}")?;
                }
                if let Some(lower) = v.lower {
                    write!(f, " dev {lower}")?;
                }
                f.write_str(if v.learning { " learning" } else { " nolearning" })?;
                if v.gbp {
                    f.write_str(" gbp")?;
                }
                stray(f, v)?;
                f.write_str(more(v.special))?;
            }
            LinkKind::Bridge => f.write_str(" bridge")?,
            LinkKind::Veth { peer, .. } => {
                f.write_str(" veth")?;
                if let Some(peer) = peer {
                    write!(f, " peer {peer}")?;
                }
            }
            LinkKind::Tun => f.write_str(" tun")?,
            LinkKind::Other { name } => write!(f, " {name}")?,
        }
        if let Some(mac) = self.mac {
            write!(f, " address {mac}")?;
        }
        if let Some(mtu) = self.mtu {
            write!(f, " mtu {mtu}")?;
        }
        if let Some(master) = self.master {
            write!(f, " master {master}")?;
        }
        if let Some(PortFlags { hairpin, isolated }) = self.port {
            let word = |on| if on { "on" } else { "off" };
            write!(f, " hairpin {} isolated {}", word(hairpin), word(isolated))?;
        }
        if self.promisc == Some(true) {
            f.write_str(" promisc on")?;
        }
        if self.arp == Some(false) {
            f.write_str(" noarp")?;
        }
        if self.multicast == Some(false) {
            f.write_str(" multicast off")?;
        }
        if self.protodown == Some(true) {
            f.write_str(" protodown on")?;
        }
        f.write_str(if self.up { " up" } else { " down" })
    }
}

/// What no tunnel of ours has: said where it was found.
fn stray(f: &mut fmt::Formatter<'_>, vxlan: &Vxlan) -> fmt::Result {
    if let Some(remote) = vxlan.remote {
        write!(f, " remote {remote}")?;
    }
    let (FdbRoom { ageing, limit }, usual) = (vxlan.room, FdbRoom::default());
    let OuterHeader { ttl, tos, df } = vxlan.outer;
    let all = [
        ("ageing", ageing, usual.ageing),
        ("maxaddress", limit, usual.limit),
        ("ttl", ttl.into(), 0),
        ("tos", tos.into(), 0),
        ("df", df.into(), 0),
    ];
    all.iter().filter(|(_, is, usual)| is != usual).try_for_each(|(word, is, _)| write!(f, " {word} {is}"))
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines =
            self.entries.as_slice().iter().map(|entry| words::route_line(&self.key, entry) + more(entry.special));
        write!(f, "route {}", lines.collect::<Vec<_>>().join("; then "))
    }
}

/// A line does not name everything that an object can have; no object of ours has more.
const fn more(special: bool) -> &'static str {
    if special { " with attributes that are not Twill's" } else { "" }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Create(object) | Op::Delete(object) => write!(f, "{} {object}", self.verb()),
            Op::Update { from, to } | Op::Recreate { from, to } => write!(f, "{} {to} (was: {from})", self.verb()),
        }
    }
}

impl Why {
    /// The reason in words.
    pub const fn words(self) -> &'static str {
        match self {
            Why::Missing => "it is not there",
            Why::Differs => "it differs",
            Why::Renamed => "somebody has renamed it",
            Why::CannotChangeInPlace => "the kernel cannot change it in place",
            Why::NotWanted => "nothing wants it any more",
            Why::Cascade => "the kernel drops it with an earlier step",
        }
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.op, self.why.words())
    }
}
