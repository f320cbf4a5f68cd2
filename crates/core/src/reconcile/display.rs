//! Objects and steps as one line each, in the words of `ip` and `bridge`.

use std::fmt;

use crate::host::{Addr, Fdb, Link, LinkKind, Neigh, Object, PROTO_TWILL, Route, Rule, TABLE_MAIN};

use super::{Op, Step, Why};

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Object::Link(link) => link.fmt(f),
            Object::Sysctl { path, value } => write!(f, "sysctl {path} = {value}"),
            Object::Addr(Addr { link, inet, .. }) => write!(f, "address {inet} dev {link}"),
            Object::Neigh(neigh) => neigh.fmt(f),
            Object::Fdb(fdb) => fdb.fmt(f),
            Object::Route(route) => route.fmt(f),
            Object::Rule(Rule { key, table, .. }) => {
                write!(f, "rule {}: {}", key.priority, key.selector)?;
                table.map_or(Ok(()), |table| write!(f, " lookup {table}"))
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
        f.write_str(if self.up { " up" } else { " down" })
    }
}

impl fmt::Display for Neigh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "neigh {} dev {}", self.ip, self.link)?;
        if let Some(mac) = self.mac {
            write!(f, " lladdr {mac}")?;
        }
        f.write_str(if self.permanent { " PERMANENT" } else { "" })
    }
}

impl fmt::Display for Fdb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "fdb {} dev {}", self.mac, self.port.unwrap_or(self.link))?;
        self.dst.as_slice().iter().try_for_each(|dst| write!(f, " dst {dst}"))?;
        match self.port {
            Some(_) => write!(f, " master {}", self.link)?,
            None => f.write_str(" self")?,
        }
        f.write_str(if self.permanent { " permanent" } else { "" })
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, entry) in self.entries.as_slice().iter().enumerate() {
            if n > 0 {
                f.write_str("; then ")?;
            }
            write!(f, "route {}", RouteKind(entry.kind))?;
            if self.key.dst.len() == 0 {
                f.write_str("default")?
            } else {
                write!(f, "{}", self.key.dst)?
            }
            if let Some(via) = entry.via {
                write!(f, " via {via}")?;
            }
            if let Some(dev) = entry.dev {
                write!(f, " dev {dev}")?;
            }
            match entry.protocol {
                2 => f.write_str(" proto kernel")?,
                3 => {}
                4 => f.write_str(" proto static")?,
                PROTO_TWILL => write!(f, " proto {PROTO_TWILL}")?,
                other => write!(f, " proto {other}")?,
            }
            if entry.scope == 253 {
                f.write_str(" scope link")?;
            }
            if let Some(src) = entry.src {
                write!(f, " src {src}")?;
            }
            if self.key.table != TABLE_MAIN {
                write!(f, " table {}", self.key.table)?;
            }
            if self.key.metric != 0 {
                write!(f, " metric {}", self.key.metric)?;
            }
            if entry.onlink {
                f.write_str(" onlink")?;
            }
        }
        Ok(())
    }
}

/// rtm_type as `ip route` prints it; nothing for unicast.
struct RouteKind(u8);

impl fmt::Display for RouteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => Ok(()),
            2 => f.write_str("local "),
            3 => f.write_str("broadcast "),
            6 => f.write_str("blackhole "),
            7 => f.write_str("unreachable "),
            8 => f.write_str("prohibit "),
            9 => f.write_str("throw "),
            other => write!(f, "type-{other} "),
        }
    }
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
