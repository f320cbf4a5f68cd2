//! Model → messages.

use std::net::{IpAddr, SocketAddr};

use twill_core::firewall::{
    Base, Chain, ChainKind, Cmp, Datum, Expr, Family, Field, Hook, Load, PayloadBase, Rule, Set, Verdict,
};

use super::uapi::{
    COUNTER_PACKETS, REG, REG_NEXT, REG_SMALL, REG_VERDICT, UDATA_COMMENT, chain, data, fib, lookup, masq, maxseg,
    meta, nat, payload, range, rule, set, xt,
};
use crate::netlink::wire::Writer;

/// NFPROTO_*.
pub(super) const fn family(family: Family) -> u8 {
    match family {
        Family::Inet => 1,
        Family::Ip => 2,
        Family::Arp => 3,
        Family::Netdev => 5,
        Family::Bridge => 7,
        Family::Ip6 => 10,
    }
}

/// A chain's hook, policy and type.
pub(super) fn base(w: &mut Writer, base: &Base) {
    let hook: u32 = match base.hook {
        Hook::Prerouting => 0,
        Hook::Input => 1,
        Hook::Forward => 2,
        Hook::Output => 3,
        Hook::Postrouting => 4,
        Hook::Ingress => 5,
    };
    w.nest(chain::HOOK, |w| {
        number(w, chain::HOOKNUM, hook);
        number(w, chain::PRIORITY, base.priority as u32);
    });
    // NF_DROP, NF_ACCEPT.
    number(w, chain::POLICY, u32::from(!base.drops));
    w.text(
        chain::TYPE,
        match base.kind {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
            ChainKind::Route => "route",
        },
    );
}

/// A chain without its rules.
pub(super) fn chain(w: &mut Writer, table: &str, name: &str, what: &Chain) {
    w.text(chain::TABLE, table);
    w.text(chain::NAME, name);
    if let Some(found) = &what.base {
        base(w, found);
    }
}

/// A set without its elements. `id` tells it from the other new ones of its transaction.
pub(super) fn set(w: &mut Writer, table: &str, name: &str, what: &Set, id: u32) {
    w.text(set::TABLE, table);
    w.text(set::NAME, name);
    number(w, set::FLAGS, 0);
    number(w, set::KEY_TYPE, if what.v4 { set::TYPE_V4 } else { set::TYPE_V6 });
    number(w, set::KEY_LEN, if what.v4 { 4 } else { 16 });
    number(w, set::ID, id);
}

/// Elements of a set; as many as an attribute has room for.
pub(super) fn elements(w: &mut Writer, table: &str, name: &str, elements: &[IpAddr]) {
    w.text(set::LIST_TABLE, table);
    w.text(set::LIST_SET, name);
    w.nest(set::LIST_ELEMENTS, |w| {
        for ip in elements {
            w.nest(rule::ELEMENT, |w| w.nest(set::ELEMENT_KEY, |w| w.attr(data::VALUE, &Datum::Ip(*ip).bytes())));
        }
    });
}

/// A rule's expressions and comment; its counter has seen `counted` packets.
pub(super) fn rule(w: &mut Writer, what: &Rule, counted: u64) {
    w.nest(rule::EXPRESSIONS, |w| {
        for e in &what.exprs {
            match e {
                Expr::Counter if counted > 0 => {
                    element(w, "counter", |w| w.attr(COUNTER_PACKETS, &counted.to_be_bytes()));
                }
                _ => expr(w, e),
            }
        }
    });
    if let Some(text) = &what.comment {
        comment(w, rule::USERDATA, text);
    }
}

/// A comment as `nft` keeps it: type, length, text with its NUL.
pub(super) fn comment(w: &mut Writer, kind: u16, text: &str) {
    let text = &text.as_bytes()[..text.len().min(254)];
    let mut bytes = vec![UDATA_COMMENT, text.len() as u8 + 1];
    bytes.extend_from_slice(text);
    bytes.push(0);
    w.attr(kind, &bytes);
}

fn expr(w: &mut Writer, expr: &Expr) {
    match expr {
        Expr::Match { load, op, value } => {
            self::load(w, load, REG);
            compare(w, *op, &value.bytes());
        }
        Expr::Range { load, keys, inside } => {
            self::load(w, load, REG);
            element(w, "range", |w| {
                number(w, range::SREG, REG);
                number(w, range::OP, u32::from(!*inside));
                w.nest(range::FROM, |w| w.attr(data::VALUE, &keys.from));
                w.nest(range::TO, |w| w.attr(data::VALUE, &keys.to));
            });
        }
        Expr::Member { loads, set, inside, .. } => {
            joined(w, loads);
            element(w, "lookup", |w| {
                w.text(lookup::SET, set);
                number(w, lookup::SREG, REG);
                number(w, lookup::FLAGS, if *inside { 0 } else { lookup::INVERTED });
            });
        }
        Expr::Choose { loads, map, .. } => {
            joined(w, loads);
            element(w, "lookup", |w| {
                w.text(lookup::SET, map);
                number(w, lookup::SREG, REG);
                number(w, lookup::DREG, REG_VERDICT);
            });
        }
        Expr::Counter => element(w, "counter", |_| {}),
        Expr::Verdict(to) => element(w, "immediate", |w| {
            number(w, data::IMMEDIATE_DREG, REG_VERDICT);
            w.nest(data::IMMEDIATE_DATA, |w| verdict(w, to));
        }),
        Expr::Masquerade { fully_random } => element(w, "masq", |w| {
            if *fully_random {
                number(w, masq::FLAGS, masq::FULLY_RANDOM);
            }
        }),
        Expr::Notrack => element(w, "notrack", |_| {}),
        Expr::Dnat(to) => dnat(w, *to),
        Expr::ClampMaxSeg => clamp(w),
        Expr::SetMark => element(w, "meta", |w| {
            number(w, meta::KEY, meta::KEY_MARK);
            number(w, meta::SREG, REG);
        }),
        Expr::Xt { target, name, revision, data } => element(w, if *target { "target" } else { "match" }, |w| {
            w.text(xt::NAME, name);
            number(w, xt::REVISION, (*revision).into());
            w.attr(xt::INFO, data);
        }),
        Expr::Other { name, data } => w.nest(rule::ELEMENT, |w| {
            w.text(rule::EXPR_NAME, name);
            w.attr(rule::EXPR_DATA, data);
        }),
    }
}

/// Several fields stand side by side in the small registers.
fn joined(w: &mut Writer, loads: &[Load]) {
    let mut register = REG;
    for load in loads {
        self::load(w, load, register);
        let taken = load.field.kind().len().div_ceil(4) as u32;
        register = if register == REG { REG_SMALL } else { register } + taken;
    }
}

/// The field into the register, then its bits that count.
fn load(w: &mut Writer, load: &Load, register: u32) {
    let keyed = |w: &mut Writer, name, key| {
        element(w, name, |w| {
            number(w, meta::DREG, register);
            number(w, meta::KEY, key);
        });
    };
    match load.field {
        Field::Iif => keyed(w, "meta", meta::KEY_IIFNAME),
        Field::Oif => keyed(w, "meta", meta::KEY_OIFNAME),
        Field::IifIndex => keyed(w, "meta", meta::KEY_IIF),
        Field::OifIndex => keyed(w, "meta", meta::KEY_OIF),
        Field::Protocol => keyed(w, "meta", meta::KEY_PROTOCOL),
        Field::PacketType => keyed(w, "meta", meta::KEY_PKTTYPE),
        Field::NfProto => keyed(w, "meta", meta::KEY_NFPROTO),
        Field::L4Proto => keyed(w, "meta", meta::KEY_L4PROTO),
        Field::Mark => keyed(w, "meta", meta::KEY_MARK),
        Field::CtState => keyed(w, "ct", meta::CT_STATE),
        Field::CtStatus => keyed(w, "ct", meta::CT_STATUS),
        Field::DstType => {
            self::load(w, &Field::Fib { result: fib::TYPE as u8, flags: fib::OF_DESTINATION as u8 }.into(), register);
        }
        Field::Fib { result, flags } => element(w, "fib", |w| {
            number(w, fib::DREG, register);
            number(w, fib::RESULT, result.into());
            number(w, fib::FLAGS, flags.into());
        }),
        field => {
            if let Some((base, offset, len)) = field.payload() {
                element(w, "payload", |w| {
                    number(w, payload::DREG, register);
                    number(w, payload::BASE, payload_base(base));
                    number(w, payload::OFFSET, offset.into());
                    number(w, payload::LEN, len.into());
                });
            }
        }
    }
    if let Some(mask) = &load.mask {
        let mask = mask.bytes();
        element(w, "bitwise", |w| {
            number(w, data::BITWISE_SREG, register);
            number(w, data::BITWISE_DREG, register);
            number(w, data::BITWISE_LEN, mask.len() as u32);
            w.nest(data::BITWISE_MASK, |w| w.attr(data::VALUE, &mask));
            w.nest(data::BITWISE_XOR, |w| w.attr(data::VALUE, &vec![0; mask.len()]));
            number(w, data::BITWISE_OP, 0);
        });
    }
}

fn compare(w: &mut Writer, op: Cmp, value: &[u8]) {
    let op: u32 = match op {
        Cmp::Eq => 0,
        Cmp::Ne => 1,
        Cmp::Lt => 2,
        Cmp::Le => 3,
        Cmp::Gt => 4,
        Cmp::Ge => 5,
    };
    element(w, "cmp", |w| {
        number(w, data::CMP_SREG, REG);
        number(w, data::CMP_OP, op);
        w.nest(data::CMP_DATA, |w| w.attr(data::VALUE, value));
    });
}

fn verdict(w: &mut Writer, to: &Verdict) {
    let (code, chain): (i32, Option<&str>) = match to {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Queue => (3, None),
        Verdict::Continue => (-1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    w.nest(data::VERDICT, |w| {
        number(w, data::VERDICT_CODE, code as u32);
        if let Some(chain) = chain {
            w.text(data::VERDICT_CHAIN, chain);
        }
    });
}

/// Address and port into their registers, and from there into the packet.
fn dnat(w: &mut Writer, to: SocketAddr) {
    let value = |w: &mut Writer, register, bytes: &[u8]| {
        element(w, "immediate", |w| {
            number(w, data::IMMEDIATE_DREG, register);
            w.nest(data::IMMEDIATE_DATA, |w| w.attr(data::VALUE, bytes));
        });
    };
    value(w, REG, &Datum::Ip(to.ip()).bytes());
    value(w, REG_NEXT, &Datum::Port(to.port()).bytes());
    element(w, "nat", |w| {
        number(w, nat::TYPE, nat::OF_DESTINATION);
        number(w, nat::FAMILY, family(if to.is_ipv4() { Family::Ip } else { Family::Ip6 }).into());
        number(w, nat::ADDRESS, REG);
        number(w, nat::PORT, REG_NEXT);
    });
}

/// The route's segment size, in network order, over the option's.
fn clamp(w: &mut Writer) {
    element(w, "rt", |w| {
        number(w, maxseg::RT_DREG, REG);
        number(w, maxseg::RT_KEY, maxseg::RT_TCPMSS);
    });
    element(w, "byteorder", |w| {
        number(w, maxseg::BYTEORDER_SREG, REG);
        number(w, maxseg::BYTEORDER_DREG, REG);
        number(w, maxseg::BYTEORDER_OP, maxseg::HTON);
        number(w, maxseg::BYTEORDER_LEN, 2);
        number(w, maxseg::BYTEORDER_SIZE, 2);
    });
    element(w, "exthdr", |w| {
        number(w, maxseg::EXTHDR_SREG, REG);
        w.attr(maxseg::EXTHDR_TYPE, &[maxseg::TCPOPT_MAXSEG]);
        number(w, maxseg::EXTHDR_OFFSET, 2);
        number(w, maxseg::EXTHDR_LEN, 2);
        number(w, maxseg::EXTHDR_OP, maxseg::OP_TCPOPT);
    });
}

/// NFT_PAYLOAD_*_HEADER.
const fn payload_base(base: PayloadBase) -> u32 {
    match base {
        PayloadBase::Link => 0,
        PayloadBase::Network => 1,
        PayloadBase::Transport => 2,
    }
}

fn element(w: &mut Writer, name: &str, fill: impl FnOnce(&mut Writer)) {
    w.nest(rule::ELEMENT, |w| {
        w.text(rule::EXPR_NAME, name);
        w.nest(rule::EXPR_DATA, fill);
    });
}

/// Numbers travel in network order.
pub(super) fn number(w: &mut Writer, kind: u16, value: u32) {
    w.attr(kind, &value.to_be_bytes());
}
