//! Does an expression hold for a packet: yes, no, or it cannot be said.

use super::packet::{At, Packet, UDP, Value};
use crate::firewall::{Cmp, Datum, Expr, Field, Keys, Load, Verdict, build};

/// What can be said of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Truth {
    No,
    Maybe,
    Yes,
}

use Truth::{Maybe, No, Yes};

impl From<bool> for Truth {
    fn from(holds: bool) -> Self {
        if holds { Yes } else { No }
    }
}

impl Truth {
    pub(super) fn and(self, other: Truth) -> Truth {
        self.min(other)
    }

    /// The opposite, where `turn`.
    fn turned(self, turn: bool) -> Truth {
        match self {
            Yes if turn => No,
            No if turn => Yes,
            other => other,
        }
    }
}

/// Whether an expression lets the rule go on. `next` is the one behind it.
pub(super) fn holds(expr: &Expr, next: Option<&Expr>, packet: &Packet, at: At) -> Truth {
    match expr {
        // Devices have numbers from 2 on, but for `lo`.
        Expr::Match { load: Load { field: Field::IifIndex | Field::OifIndex, .. }, op, value: Datum::Number(1) } => {
            Truth::from(*op != Cmp::Eq)
        }
        Expr::Match { load, op, value } => match looked_at(load, packet, at) {
            Value::Known(bytes) => compared(&bytes, *op, &value.bytes()).into(),
            Value::Unknown => Maybe,
            Value::Absent => No,
        },
        Expr::Range { load, keys, inside } => match looked_at(load, packet, at) {
            Value::Known(bytes) => Truth::from(within(&bytes, keys)).turned(!inside),
            Value::Unknown => Maybe,
            Value::Absent => No,
        },
        Expr::Member { loads, inside, keys, .. } => {
            let found = keys.iter().map(|keys| among(loads, keys, packet, at)).max().unwrap_or(No);
            found.turned(!inside)
        }
        Expr::Xt { target: false, name, revision, data } => xtables(name, *revision, data, packet, at).unwrap_or(Maybe),
        Expr::Other { name, .. } => match &**name {
            "cmp" | "range" | "lookup" | "limit" | "quota" | "connlimit" | "objref" | "dynset" => Maybe,
            // The packets that are thought of here have neither extension headers nor options.
            "exthdr" if matches!(next, Some(Expr::Other { name, .. }) if matches!(&**name, "cmp" | "range" | "lookup" | "bitwise")) => {
                No
            }
            _ => Yes,
        },
        _ => Yes,
    }
}

/// Where a map leads to, with what can be said of each.
pub(super) fn ways<'a>(
    loads: &[Load],
    ways: &'a [(Keys, Verdict)],
    packet: &Packet,
    at: At,
) -> Vec<(Truth, &'a Verdict)> {
    let mut found = Vec::new();
    for (keys, verdict) in ways {
        let truth = if loads.is_empty() { Maybe } else { among(loads, keys, packet, at) };
        if truth == Yes {
            // One element is for this packet, and no other.
            return vec![(Yes, verdict)];
        }
        found.push((truth, verdict));
    }
    found.retain(|(truth, _)| *truth == Maybe);
    found
}

/// What is looked at, as far as it counts.
fn looked_at(load: &Load, packet: &Packet, at: At) -> Value {
    match (packet.value(load.field, at), &load.mask) {
        (Value::Known(bytes), Some(mask)) => {
            Value::Known(bytes.iter().zip(mask.bytes()).map(|(byte, mask)| byte & mask).collect())
        }
        (value, _) => value,
    }
}

/// Fields side by side, each filled up to four bytes, are among the keys of an element.
fn among(loads: &[Load], keys: &Keys, packet: &Packet, at: At) -> Truth {
    let (mut truth, mut begin) = (Yes, 0);
    for load in loads {
        let len = load.field.kind().len();
        let part = |key: &[u8]| key.get(begin..begin + len).map(Box::from);
        // An element for whatever no other is for has no key.
        let (Some(from), Some(to)) = (part(&keys.from), part(&keys.to)) else { return truth };
        truth = truth.and(match looked_at(load, packet, at) {
            Value::Known(bytes) => within(&bytes, &Keys { from, to }).into(),
            Value::Unknown => Maybe,
            Value::Absent => No,
        });
        begin += len.next_multiple_of(4);
    }
    truth
}

fn within(bytes: &[u8], keys: &Keys) -> bool {
    bytes >= &*keys.from && bytes <= &*keys.to
}

/// A comparison with fewer bytes is one with the beginning.
fn compared(bytes: &[u8], op: Cmp, value: &[u8]) -> bool {
    let order = bytes[..bytes.len().min(value.len())].cmp(value);
    match op {
        Cmp::Eq => order.is_eq(),
        Cmp::Ne => order.is_ne(),
        Cmp::Lt => order.is_lt(),
        Cmp::Le => order.is_le(),
        Cmp::Gt => order.is_gt(),
        Cmp::Ge => order.is_ge(),
    }
}

/// A match of `iptables`; `None`: it is not known (include/uapi/linux/netfilter/xt_*.h).
fn xtables(name: &str, revision: u8, data: &[u8], packet: &Packet, at: At) -> Option<Truth> {
    let byte = |n: usize| data.get(n).copied();
    let short = |n: usize| Some(u16::from_ne_bytes(data.get(n..n + 2)?.try_into().ok()?));
    let long = |n: usize| Some(u32::from_ne_bytes(data.get(n..n + 4)?.try_into().ok()?));
    let [from, to] = packet.ports;
    let between = |port: u16, n: usize| Some(Truth::from((short(n)?..=short(n + 2)?).contains(&port)));
    Some(match name {
        "comment" => Yes,
        "tcp" | "udp" => {
            let tcp = name == "tcp";
            let not = byte(if tcp { 11 } else { 8 })?;
            let ports = between(from, 0)?.turned(not & 1 != 0).and(between(to, 4)?.turned(not & 2 != 0));
            let flags = |mask, value| Truth::from(packet.tcp_flags() & mask == value).turned(not & 4 != 0);
            match tcp {
                true if packet.proto != build::TCP => No,
                // A TCP option, which none of ours has.
                true if byte(8)? != 0 && not & 8 == 0 => No,
                true => ports.and(flags(byte(9)?, byte(10)?)),
                false => ports.and((packet.proto == UDP).into()),
            }
        }
        "icmp" | "icmp6" => {
            let icmp = ![build::TCP, UDP].contains(&packet.proto);
            let kind = byte(0)? == u8::MAX && byte(1)? == 0 && byte(2)? == u8::MAX
                || byte(0)? == packet.icmp() && byte(1)? == 0;
            Truth::from(kind).turned(byte(3)? & 1 != 0).and(icmp.into())
        }
        "multiport" if revision == 1 => {
            let (count, mut found) = (usize::from(byte(1)?).min(15), false);
            for n in 0..count {
                let first = short(2 + 2 * n)?;
                // The first of a range is flagged, and the last stands behind it.
                let last = if byte(32 + n)? != 0 { short(4 + 2 * n)? } else { first };
                let port = |port: u16| (first..=last).contains(&port);
                found |= match byte(0)? {
                    0 => port(from),
                    1 => port(to),
                    _ => port(from) || port(to),
                };
            }
            let ported = [build::TCP, UDP].contains(&packet.proto);
            Truth::from(found).turned(byte(47)? != 0).and(ported.into())
        }
        "mark" if revision == 1 && !at.marked => Truth::from(long(0)? == 0).turned(byte(8)? != 0),
        "state" => Truth::from(long(0)? & packet.state(at)? != 0),
        // XT_CONNTRACK_STATE alone; here untracked has another bit than in nft.
        "conntrack" if revision >= 2 && short(146)? == 1 => {
            let state = packet.state(at)?;
            let state = if state == 64 { 1 << 8 } else { state };
            Truth::from(u32::from(short(150)?) & state != 0).turned(short(148)? & 1 != 0)
        }
        "addrtype" if revision == 1 && long(4)? & !3 == 0 => {
            let of = |mask: u16, source, not: u32| {
                let is = mask == 0 || u32::from(mask) & (1 << packet.kind(source)) != 0;
                Some(Truth::from(is).turned(mask != 0 && long(4)? & not != 0))
            };
            of(short(0)?, true, 1)?.and(of(short(2)?, false, 2)?)
        }
        "pkttype" => Truth::from(long(0)? == 0).turned(long(4)? != 0),
        // The way back to each of them is the one that it comes by.
        "rpfilter" => Truth::from(byte(0)? & 8 == 0),
        _ => return None,
    })
}
