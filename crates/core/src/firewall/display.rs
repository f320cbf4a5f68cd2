//! Rules as `nft` prints them, near enough to be searched for in its output.

use std::fmt;

use super::{ChainName, Cmp, Datum, Expr, Family, Field, Head, Load, PayloadBase, Rule, Table, TableName, Verdict};
use crate::net::{Prefix, ip_to_bits};

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Inet => "inet",
            Family::Ip => "ip",
            Family::Ip6 => "ip6",
            Family::Arp => "arp",
            Family::Bridge => "bridge",
            Family::Netdev => "netdev",
        })
    }
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.name)
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "table {} ({} chains, {} rules", self.name, self.chains.len(), self.rules())?;
        if !self.sets.is_empty() {
            write!(f, ", {} peers' addresses", self.elements())?;
        }
        f.write_str(")")
    }
}

impl fmt::Display for ChainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.table, self.chain)
    }
}

impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rules = self.rules.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        write!(f, "rules {}chain {}: {rules}", if self.first { "at the head of " } else { "within " }, self.at)
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Field::Iif => "iifname",
            Field::Oif => "oifname",
            Field::IifIndex => "iif",
            Field::OifIndex => "oif",
            Field::Protocol => "meta protocol",
            Field::PacketType => "meta pkttype",
            Field::Fib { flags, .. } if flags & 1 != 0 => "fib saddr oif",
            Field::Fib { .. } => "fib daddr oif",
            Field::NfProto => "meta nfproto",
            Field::L4Proto => "meta l4proto",
            Field::Mark => "meta mark",
            Field::CtState => "ct state",
            Field::CtStatus => "ct status",
            Field::DstType => "fib daddr type",
            Field::SrcV4 => "ip saddr",
            Field::DstV4 => "ip daddr",
            Field::SrcV6 => "ip6 saddr",
            Field::DstV6 => "ip6 daddr",
            Field::SrcPort => "th sport",
            Field::DstPort => "th dport",
            Field::TcpFlags => "tcp flags",
            Field::Raw { base, offset, len } => {
                let base = match base {
                    PayloadBase::Link => "ll",
                    PayloadBase::Network => "nh",
                    PayloadBase::Transport => "th",
                };
                return write!(f, "@{base},{},{}", u32::from(*offset) * 8, u32::from(*len) * 8);
            }
        })
    }
}

impl fmt::Display for Datum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hex = |f: &mut fmt::Formatter<'_>, bytes: &[u8]| {
            f.write_str("0x")?;
            bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
        };
        match self {
            Datum::Ip(ip) => write!(f, "{ip}"),
            Datum::Byte(byte) => write!(f, "{byte}"),
            Datum::Port(port) => write!(f, "{port}"),
            Datum::Number(number) => write!(f, "{number:#x}"),
            Datum::Name(name) => write!(f, "\"{name}\""),
            Datum::Bytes(bytes) => hex(f, bytes),
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Continue => f.write_str("continue"),
            Verdict::Return => f.write_str("return"),
            Verdict::Jump(chain) => write!(f, "jump {chain}"),
            Verdict::Goto(chain) => write!(f, "goto {chain}"),
            Verdict::Queue => f.write_str("queue"),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.mask {
            None => write!(f, "{}", self.field),
            Some(mask) => write!(f, "{} & {mask}", self.field),
        }
    }
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Expr::Match { load, op, value } => {
                let op = match op {
                    Cmp::Eq => "",
                    Cmp::Ne => "!= ",
                    Cmp::Lt => "< ",
                    Cmp::Le => "<= ",
                    Cmp::Gt => "> ",
                    Cmp::Ge => ">= ",
                };
                match as_network(load, value) {
                    Some(net) => write!(f, "{} {op}{net}", load.field),
                    None if load.mask.is_some() && op.is_empty() => write!(f, "{load} == {value}"),
                    None => write!(f, "{load} {op}{value}"),
                }
            }
            Expr::Range { load, keys, inside } => {
                let not = if *inside { "" } else { "!= " };
                write!(f, "{load} {not}{}-{}", Read(load.field, &keys.from), Read(load.field, &keys.to))
            }
            Expr::Member { loads, set, inside, .. } => {
                write!(f, "{} {}@{set}", joined(loads), if *inside { "" } else { "!= " })
            }
            Expr::Choose { loads, map, .. } => write!(f, "{} vmap @{map}", joined(loads)),
            Expr::SetMark => f.write_str("meta mark set (value)"),
            Expr::Xt { target: true, name, .. } => write!(f, "-j {name}"),
            Expr::Xt { name, .. } => write!(f, "-m {name}"),
            Expr::Counter => f.write_str("counter"),
            Expr::Verdict(verdict) => write!(f, "{verdict}"),
            Expr::Masquerade { fully_random } => {
                f.write_str(if *fully_random { "masquerade fully-random" } else { "masquerade" })
            }
            Expr::Notrack => f.write_str("notrack"),
            Expr::Dnat(to) => write!(f, "dnat to {to}"),
            Expr::ClampMaxSeg => f.write_str("tcp option maxseg size set rt mtu"),
            Expr::Other { name, .. } => write!(f, "({name})"),
        }
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, expr) in self.exprs.iter().enumerate() {
            write!(f, "{}{expr}", if n == 0 { "" } else { " " })?;
        }
        self.comment.as_ref().map_or(Ok(()), |comment| write!(f, " comment {comment:?}"))
    }
}

/// `ip saddr . th dport`.
fn joined(loads: &[Load]) -> String {
    loads.iter().map(ToString::to_string).collect::<Vec<_>>().join(" . ")
}

/// The bytes of a field's value.
struct Read<'a>(Field, &'a [u8]);

impl fmt::Display for Read<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.kind().read(self.1).unwrap_or_else(|| Datum::Bytes(self.1.into())).fmt(f)
    }
}

/// The network that a masked comparison of an address stands for.
fn as_network(load: &Load, value: &Datum) -> Option<Prefix> {
    let (Some(Datum::Ip(mask)), Datum::Ip(base)) = (&load.mask, value) else { return None };
    let len = ip_to_bits(*mask).count_ones() as u8;
    let net = Prefix::strict(*base, len).ok()?;
    (Datum::mask_of(&net) == Datum::Ip(*mask)).then_some(net)
}

#[cfg(test)]
mod tests {
    use super::super::build::{End, family, marked, multicast, within};
    use super::*;

    #[test]
    fn a_rule_reads_as_nft_prints_it() {
        let net: Prefix = "10.1.0.0/16".parse().unwrap();
        let rule = Rule::new([
            family(true),
            within(End::Source, &net, true),
            within(End::Destination, &multicast(true), false),
            marked(0x4000),
            Expr::Counter,
            Expr::Masquerade { fully_random: true },
        ]);
        assert_eq!(
            rule.comment("out").to_string(),
            "meta nfproto 2 ip saddr 10.1.0.0/16 ip daddr != 224.0.0.0/4 meta mark & 0x4000 == 0x4000 counter \
             masquerade fully-random comment \"out\""
        );
    }
}
