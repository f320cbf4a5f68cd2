//! Messages → model.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use twill_core::firewall::{
    Base, ChainKind, Cmp, Datum, Expr, Family, Field, Hook, Keys, Load, PayloadBase, Rule, Set, Table, TableName, Type,
    Verdict, build,
};

use super::uapi::{
    COUNTER_PACKETS, REG_VERDICT, UDATA_COMMENT, chain, data, fib, lookup, masq, maxseg, meta, nat, payload, range,
    rule, set, table, xt,
};
use crate::netlink::wire::{attr, attrs, text};

/// The attributes of a message, behind its nfgenmsg; and its family.
pub(super) fn body(payload: &[u8]) -> Option<(Family, &[u8])> {
    let family = match payload.first()? {
        1 => Family::Inet,
        2 => Family::Ip,
        3 => Family::Arp,
        5 => Family::Netdev,
        7 => Family::Bridge,
        10 => Family::Ip6,
        _ => return None,
    };
    Some((family, payload.get(4..)?))
}

/// A table without its chains.
pub(super) fn table(payload: &[u8]) -> Option<Table> {
    let (family, body) = body(payload)?;
    let name = text(attr(body, table::NAME)?)?;
    let dormant = number(body, table::FLAGS).is_some_and(|flags| flags & table::DORMANT != 0);
    Some(Table {
        name: TableName::new(family, name),
        comment: attr(body, table::USERDATA).and_then(comment),
        dormant,
        owner: number(body, table::OWNER),
        sets: BTreeMap::new(),
        others: BTreeSet::new(),
        chains: BTreeMap::new(),
    })
}

/// A chain's table, name and base.
pub(super) fn chain(payload: &[u8]) -> Option<(TableName, Box<str>, Option<Base>)> {
    let (family, body) = body(payload)?;
    let of = TableName::new(family, text(attr(body, chain::TABLE)?)?);
    Some((of, text(attr(body, chain::NAME)?)?.into(), base(body)))
}

fn base(body: &[u8]) -> Option<Base> {
    let hook = attr(body, chain::HOOK)?;
    Some(Base {
        kind: match text(attr(body, chain::TYPE)?)? {
            "filter" => ChainKind::Filter,
            "nat" => ChainKind::Nat,
            "route" => ChainKind::Route,
            _ => return None,
        },
        hook: match number(hook, chain::HOOKNUM)? {
            0 => Hook::Prerouting,
            1 => Hook::Input,
            2 => Hook::Forward,
            3 => Hook::Output,
            4 => Hook::Postrouting,
            5 => Hook::Ingress,
            _ => return None,
        },
        priority: number(hook, chain::PRIORITY)? as i32,
        drops: number(body, chain::POLICY) == Some(0),
    })
}

/// A set's or map's table and name, and whether its elements are intervals.
pub(super) fn intervals(payload: &[u8]) -> Option<(TableName, Box<str>, bool)> {
    let (family, body) = body(payload)?;
    let of = TableName::new(family, text(attr(body, set::TABLE)?)?);
    let intervals = number(body, set::FLAGS).unwrap_or(0) & set::INTERVAL != 0;
    Some((of, text(attr(body, set::NAME)?)?.into(), intervals))
}

/// A set's table and name, and itself without its elements where it is a plain one of addresses.
pub(super) fn set(payload: &[u8]) -> Option<(TableName, Box<str>, Option<Set>)> {
    let (family, body) = body(payload)?;
    let of = TableName::new(family, text(attr(body, set::TABLE)?)?);
    let v4 = match number(body, set::KEY_TYPE) {
        Some(set::TYPE_V4) => Some(true),
        Some(set::TYPE_V6) => Some(false),
        _ => None,
    };
    let plain = number(body, set::FLAGS).unwrap_or(0) == 0;
    let what = v4.filter(|_| plain).map(|v4| Set { v4, ..Set::default() });
    Some((of, text(attr(body, set::NAME)?)?.into(), what))
}

/// True for a map, and for a set of more than addresses, that is no part of a rule.
pub(super) fn is_foreign_set(payload: &[u8]) -> bool {
    let flags = body(payload).and_then(|(_, body)| number(body, set::FLAGS)).unwrap_or(0);
    flags & set::ANONYMOUS == 0 && set(payload).is_none_or(|(.., what)| what.is_none())
}

/// The table and the name of a set, an object or a flowtable.
pub(super) fn named(payload: &[u8]) -> Option<(TableName, Box<str>)> {
    let (family, body) = body(payload)?;
    Some((TableName::new(family, text(attr(body, set::TABLE)?)?), text(attr(body, set::NAME)?)?.into()))
}

/// The addresses that a message about elements names.
pub(super) fn elements(payload: &[u8]) -> impl Iterator<Item = IpAddr> {
    let list = body(payload).and_then(|(_, body)| attr(body, set::LIST_ELEMENTS)).unwrap_or_default();
    attrs(list).filter(|(kind, _)| *kind == rule::ELEMENT).filter_map(|(_, element)| {
        let key = attr(attr(element, set::ELEMENT_KEY)?, data::VALUE)?;
        let v4 = || Some(IpAddr::from(<[u8; 4]>::try_from(key).ok()?));
        v4().or_else(|| Some(IpAddr::from(<[u8; 16]>::try_from(key).ok()?)))
    })
}

/// An element of a set or map, as it is told: where an interval of keys begins, or the next one may.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Element {
    key: Box<[u8]>,
    begins: bool,
    to: Option<Box<[u8]>>,
    verdict: Option<Verdict>,
}

/// The elements that a message names.
pub(super) fn keyed(payload: &[u8]) -> impl Iterator<Item = Element> {
    let list = body(payload).and_then(|(_, body)| attr(body, set::LIST_ELEMENTS)).unwrap_or_default();
    attrs(list).filter(|(kind, _)| *kind == rule::ELEMENT).filter_map(|(_, element)| {
        let flags = number(element, set::ELEMENT_FLAGS).unwrap_or(0);
        let value = |attribute| attr(attr(element, attribute)?, data::VALUE);
        let verdict = attr(element, set::ELEMENT_DATA).and_then(|found| verdict(attr(found, data::VERDICT)?));
        // The one for all that the others are not for has no key.
        let all = flags & set::CATCHALL != 0;
        let key = if all { [].into() } else { value(set::ELEMENT_KEY)?.into() };
        Some(Element {
            key,
            begins: flags & set::INTERVAL_END == 0,
            to: value(set::ELEMENT_KEY_END).map(Into::into),
            verdict,
        })
    })
}

/// What these elements of one set stand for, in order. What is for all others comes last.
pub(super) fn spans(mut elements: Vec<Element>, intervals: bool) -> Vec<(Keys, Option<Verdict>)> {
    // An interval that ends where the next one begins: its end comes first.
    elements.sort();
    let mut spans: Vec<(Keys, Option<Verdict>)> = Vec::with_capacity(elements.len());
    let mut others = None;
    for (n, Element { key, to, verdict, .. }) in elements.iter().enumerate().filter(|(_, element)| element.begins) {
        if key.is_empty() {
            others = Some((Keys { from: [].into(), to: [].into() }, verdict.clone()));
            continue;
        }
        let to = to.clone().unwrap_or_else(|| match elements.get(n + 1) {
            _ if !intervals => key.clone(),
            Some(next) => before(&next.key),
            None => vec![0xff; key.len()].into(),
        });
        spans.push((Keys { from: key.clone(), to }, verdict.clone()));
    }
    spans.into_iter().chain(others).collect()
}

/// The key before this one.
fn before(key: &[u8]) -> Box<[u8]> {
    let mut bytes = key.to_vec();
    for byte in bytes.iter_mut().rev() {
        let (less, borrowed) = byte.overflowing_sub(1);
        *byte = less;
        if !borrowed {
            break;
        }
    }
    bytes.into()
}

/// What the counters of a rule have seen, in packets.
pub(super) fn counted(payload: &[u8]) -> u64 {
    let list = body(payload).and_then(|(_, body)| attr(body, rule::EXPRESSIONS)).unwrap_or_default();
    let raw = attrs(list).filter(|(kind, _)| *kind == rule::ELEMENT).filter_map(|(_, e)| Raw::new(e));
    let packets = |raw: Raw<'_>| Some(u64::from_be_bytes(attr(raw.is("counter")?, COUNTER_PACKETS)?.try_into().ok()?));
    raw.filter_map(packets).sum()
}

/// A rule's handle and content.
pub(super) fn rule(payload: &[u8]) -> Option<(u64, Rule)> {
    let (family, body) = body(payload)?;
    let handle = u64::from_be_bytes(attr(body, rule::HANDLE)?.try_into().ok()?);
    Some((handle, content(family, body)))
}

/// A rule's expressions and comment.
pub(super) fn content(family: Family, body: &[u8]) -> Rule {
    let list = attr(body, rule::EXPRESSIONS).unwrap_or_default();
    let raw: Vec<Raw<'_>> =
        attrs(list).filter(|(kind, _)| *kind == rule::ELEMENT).filter_map(|(_, e)| Raw::new(e)).collect();
    let mut exprs = Vec::with_capacity(raw.len());
    let mut rest = raw.as_slice();
    let mut v4 = family != Family::Ip6;
    let mut held: Option<(Load, u32)> = None;
    let mut said = attr(body, rule::USERDATA).and_then(comment);
    while let Some((first, behind)) = rest.split_first() {
        if let Some(text) = commented(first) {
            said = said.or(Some(text));
            rest = behind;
            continue;
        }
        // The bounds of a range are held against what was loaded once.
        let bound = held.clone().and_then(|(load, register)| comparison(load, register, first, v4));
        held = if bound.is_some() { held } else { loaded(rest).map(|(load, register, _)| (load, register)) };
        let known = bound
            .map(|expr| (expr, behind))
            .or_else(|| compared(rest, v4))
            .or_else(|| dnat(rest))
            .or_else(|| clamp(rest))
            .or_else(|| Some((single(first)?, behind)));
        let (expr, left) = known.unwrap_or_else(|| (first.other(), behind));
        v4 &= expr != build::family(false);
        exprs.push(expr);
        rest = left;
    }
    Rule { exprs, comment: said, handle: None }
}

/// An expression as it stands in the message.
#[derive(Debug, Clone, Copy)]
struct Raw<'a> {
    name: &'a str,
    data: &'a [u8],
}

impl<'a> Raw<'a> {
    fn new(element: &'a [u8]) -> Option<Self> {
        let name = text(attr(element, rule::EXPR_NAME)?)?;
        Some(Self { name, data: attr(element, rule::EXPR_DATA).unwrap_or_default() })
    }

    fn is(&self, name: &str) -> Option<&'a [u8]> {
        (self.name == name).then_some(self.data)
    }

    fn other(&self) -> Expr {
        Expr::Other { name: self.name.into(), data: self.data.into() }
    }
}

/// Loads, and a comparison of the same register or the lookup of all of them.
fn compared<'r, 'a>(rest: &'r [Raw<'a>], v4: bool) -> Option<(Expr, &'r [Raw<'a>])> {
    let (first, register, mut rest) = loaded(rest)?;
    let mut loads = vec![first];
    while let Some((next, _, behind)) = loaded(rest).filter(|(_, other, _)| *other != register) {
        loads.push(next);
        rest = behind;
    }
    let (cmp, rest) = rest.split_first()?;
    if let Some(found) = cmp.is("lookup").filter(|found| number(found, lookup::SREG) == Some(register)) {
        return Some((looked_up(found, loads)?, rest));
    }
    let load = loads.pop().filter(|_| loads.is_empty())?;
    Some((comparison(load, register, cmp, v4)?, rest))
}

/// The comparison of what was loaded into a register.
fn comparison(load: Load, register: u32, cmp: &Raw<'_>, v4: bool) -> Option<Expr> {
    let Load { field, mask } = load;
    let kind = field.kind();
    if let Some(found) = cmp.is("range").filter(|found| number(found, range::SREG) == Some(register)) {
        let value = |attribute| attr(attr(found, attribute)?, data::VALUE).filter(|value| value.len() == kind.len());
        let keys = Keys { from: value(range::FROM)?.into(), to: value(range::TO)?.into() };
        let inside = number(found, range::OP)? == 0;
        return Some(Expr::Range { load: Load { field, mask }, keys, inside });
    }
    let cmp = cmp.is("cmp").filter(|cmp| number(cmp, data::CMP_SREG) == Some(register))?;
    let op = match number(cmp, data::CMP_OP)? {
        0 => Cmp::Eq,
        1 => Cmp::Ne,
        2 => Cmp::Lt,
        3 => Cmp::Le,
        4 => Cmp::Gt,
        5 => Cmp::Ge,
        _ => return None,
    };
    let bytes = attr(attr(cmp, data::CMP_DATA)?, data::VALUE)?;
    if let (None, Some(field), Type::Bytes(len)) = (&mask, field.address_begun(v4), kind)
        && bytes.len() == usize::from(len)
    {
        return begun(field, op, bytes);
    }
    // `iptables-nft` compares a name up to its NUL; one that ends with `*` is compared by its beginning alone.
    let whole = bytes.len() == kind.len() || (kind == Type::Name && bytes.last() == Some(&0));
    let mut padded = bytes.to_vec();
    padded.resize(kind.len(), 0);
    let value = if whole { kind.read(&padded)? } else { Datum::Bytes(bytes.into()) };
    Some(Expr::Match { load: Load { field, mask }, op, value })
}

/// A field with the bits of it that count, and the register that they are in.
fn loaded<'r, 'a>(rest: &'r [Raw<'a>]) -> Option<(Load, u32, &'r [Raw<'a>])> {
    let (first, rest) = rest.split_first()?;
    let (field, register) = load(first)?;
    // What is compared with intervals is turned into network order, which one byte has in any case.
    let turned = |raw: &&Raw<'a>| field.kind().len() == 1 && raw.name == "byteorder";
    let rest = if rest.first().filter(turned).is_some() { &rest[1..] } else { rest };
    let Some((found, behind)) = rest.split_first().and_then(|(raw, behind)| Some((raw.is("bitwise")?, behind))) else {
        return Some((field.into(), register, rest));
    };
    let same = [data::BITWISE_SREG, data::BITWISE_DREG].iter().all(|reg| number(found, *reg) == Some(register));
    let plain = number(found, data::BITWISE_OP).unwrap_or(0) == 0;
    let value = |attribute| attr(attr(found, attribute)?, data::VALUE);
    let turned = value(data::BITWISE_XOR)?.iter().any(|byte| *byte != 0);
    let mask = field.kind().read(value(data::BITWISE_MASK)?)?;
    (same && plain && !turned).then_some((Load { field, mask: Some(mask) }, register, behind))
}

/// The lookup in a set, or in a map whose answer is a verdict.
fn looked_up(found: &[u8], loads: Vec<Load>) -> Option<Expr> {
    if let Some(map) = chosen(found) {
        return Some(Expr::Choose { loads, map, ways: Vec::new() });
    }
    let inside = match number(found, lookup::FLAGS).unwrap_or(0) {
        0 => true,
        lookup::INVERTED => false,
        _ => return None,
    };
    // With a register for the answer it is a map's.
    attr(found, lookup::DREG).is_none().then_some(())?;
    Some(Expr::Member { loads, set: text(attr(found, lookup::SET)?)?.into(), inside, keys: Vec::new() })
}

/// The comparison of a whole address that one of its first bytes stands for.
fn begun(field: Field, op: Cmp, bytes: &[u8]) -> Option<Expr> {
    let whole = |bytes: &[u8], fill: usize| {
        let mut all = bytes.to_vec();
        all.resize(field.kind().len(), 0);
        all[..fill].fill(0xff);
        field.kind().read(&all)
    };
    let mask = whole(&[], bytes.len())?;
    Some(Expr::Match { load: Load { field, mask: Some(mask) }, op, value: whole(bytes, 0)? })
}

/// The map of a lookup whose answer is a verdict.
fn chosen(found: &[u8]) -> Option<Box<str>> {
    let verdict = number(found, lookup::DREG) == Some(REG_VERDICT) && number(found, lookup::FLAGS).unwrap_or(0) == 0;
    Some(text(attr(found, lookup::SET)?)?.into()).filter(|_| verdict)
}

/// The field that an expression loads, and the register that it lands in.
fn load(raw: &Raw<'_>) -> Option<(Field, u32)> {
    let keyed = raw.is("meta").or_else(|| raw.is("ct"));
    if let Some(found) = keyed {
        let field = match (raw.name, number(found, meta::KEY)?) {
            ("meta", meta::KEY_IIFNAME) => Field::Iif,
            ("meta", meta::KEY_OIFNAME) => Field::Oif,
            ("meta", meta::KEY_IIF) => Field::IifIndex,
            ("meta", meta::KEY_OIF) => Field::OifIndex,
            ("meta", meta::KEY_PROTOCOL) => Field::Protocol,
            ("meta", meta::KEY_PKTTYPE) => Field::PacketType,
            ("meta", meta::KEY_NFPROTO) => Field::NfProto,
            ("meta", meta::KEY_L4PROTO) => Field::L4Proto,
            ("meta", meta::KEY_MARK) => Field::Mark,
            ("ct", meta::CT_STATE) => Field::CtState,
            ("ct", meta::CT_STATUS) => Field::CtStatus,
            _ => return None,
        };
        return Some((field, number(found, meta::DREG)?));
    }
    if let Some(found) = raw.is("fib") {
        let (result, flags) = (number(found, fib::RESULT)?, number(found, fib::FLAGS)?);
        let field = match (result, flags) {
            (fib::TYPE, fib::OF_DESTINATION) => Field::DstType,
            _ => Field::Fib { result: u8::try_from(result).ok()?, flags: u8::try_from(flags).ok()? },
        };
        return Some((field, number(found, fib::DREG)?));
    }
    let found = raw.is("payload")?;
    let base = match number(found, payload::BASE)? {
        0 => PayloadBase::Link,
        1 => PayloadBase::Network,
        2 => PayloadBase::Transport,
        _ => return None,
    };
    let small = |attribute| u8::try_from(number(found, attribute)?).ok();
    let field = Field::from_payload(base, small(payload::OFFSET)?, small(payload::LEN)?);
    Some((field, number(found, payload::DREG)?))
}

/// `dnat ip to ADDRESS:PORT`: both values, and what takes them from their registers.
fn dnat<'r, 'a>(rest: &'r [Raw<'a>]) -> Option<(Expr, &'r [Raw<'a>])> {
    let [address, port, nat, rest @ ..] = rest else { return None };
    let value = |raw: &Raw<'a>, kind: Type| {
        let found = raw.is("immediate")?;
        let bytes = attr(attr(found, data::IMMEDIATE_DATA)?, data::VALUE)?;
        Some((number(found, data::IMMEDIATE_DREG)?, kind.read(bytes)?))
    };
    let found = nat.is("nat")?;
    let kind = match number(found, nat::FAMILY)? {
        2 => Type::Ipv4,
        10 => Type::Ipv6,
        _ => return None,
    };
    let (Datum::Ip(ip), Datum::Port(to)) = (value(address, kind)?.1, value(port, Type::Port)?.1) else { return None };
    let takes = |attribute, last, raw: &Raw<'a>, kind| {
        let register = value(raw, kind)?.0;
        let twice = number(found, last).is_none_or(|last| last == register);
        (number(found, attribute)? == register && twice).then_some(register)
    };
    let registers =
        (takes(nat::ADDRESS, nat::ADDRESS_LAST, address, kind)?, takes(nat::PORT, nat::PORT_LAST, port, Type::Port)?);
    let plain = number(found, nat::TYPE) == Some(nat::OF_DESTINATION)
        && number(found, nat::FLAGS).is_none_or(|flags| flags == nat::BOTH_GIVEN)
        && registers.0 != registers.1
        && ![registers.0, registers.1].contains(&REG_VERDICT);
    plain.then(|| (Expr::Dnat(SocketAddr::new(ip, to)), rest))
}

/// `tcp option maxseg size set rt mtu`.
fn clamp<'r, 'a>(rest: &'r [Raw<'a>]) -> Option<(Expr, &'r [Raw<'a>])> {
    let [route, order, option, rest @ ..] = rest else { return None };
    let (route, order, option) = (route.is("rt")?, order.is("byteorder")?, option.is("exthdr")?);
    let known = number(route, maxseg::RT_KEY) == Some(maxseg::RT_TCPMSS)
        && number(order, maxseg::BYTEORDER_OP) == Some(maxseg::HTON)
        && number(option, maxseg::EXTHDR_OP) == Some(maxseg::OP_TCPOPT)
        && attr(option, maxseg::EXTHDR_TYPE) == Some(&[maxseg::TCPOPT_MAXSEG])
        && number(option, maxseg::EXTHDR_OFFSET) == Some(2)
        && attr(option, maxseg::EXTHDR_SREG).is_some();
    known.then_some((Expr::ClampMaxSeg, rest))
}

/// An expression that stands for itself.
fn single(raw: &Raw<'_>) -> Option<Expr> {
    match raw.name {
        "counter" => Some(Expr::Counter),
        "notrack" => Some(Expr::Notrack),
        "meta" if number(raw.data, meta::KEY) == Some(meta::KEY_MARK) => {
            attr(raw.data, meta::SREG).map(|_| Expr::SetMark)
        }
        "match" | "target" => Some(Expr::Xt {
            target: raw.name == "target",
            name: text(attr(raw.data, xt::NAME)?)?.into(),
            revision: u8::try_from(number(raw.data, xt::REVISION).unwrap_or(0)).ok()?,
            data: attr(raw.data, xt::INFO)?.into(),
        }),
        "lookup" => Some(Expr::Choose { loads: Vec::new(), map: chosen(raw.data)?, ways: Vec::new() }),
        "immediate" if number(raw.data, data::IMMEDIATE_DREG) == Some(REG_VERDICT) => {
            verdict(attr(attr(raw.data, data::IMMEDIATE_DATA)?, data::VERDICT)?).map(Expr::Verdict)
        }
        "masq" => match number(raw.data, masq::FLAGS).unwrap_or(0) {
            0 if attrs(raw.data).count() == 0 => Some(Expr::Masquerade { fully_random: false }),
            masq::FULLY_RANDOM => Some(Expr::Masquerade { fully_random: true }),
            _ => None,
        },
        _ => None,
    }
}

fn verdict(found: &[u8]) -> Option<Verdict> {
    let chain = || Some(text(attr(found, data::VERDICT_CHAIN)?)?.into());
    Some(match number(found, data::VERDICT_CODE)? as i32 {
        0 => Verdict::Drop,
        1 => Verdict::Accept,
        3 => Verdict::Queue,
        -1 => Verdict::Continue,
        -3 => Verdict::Jump(chain()?),
        -4 => Verdict::Goto(chain()?),
        -5 => Verdict::Return,
        _ => return None,
    })
}

/// The comment of `iptables-nft`, which is a match (struct xt_comment_info): by this it prints what others have told it as user data, too.
fn commented(raw: &Raw<'_>) -> Option<Box<str>> {
    let found = raw.is("match").filter(|found| attr(found, xt::NAME).and_then(text) == Some("comment"))?;
    let info = attr(found, xt::INFO)?;
    Some(std::str::from_utf8(info.split(|byte| *byte == 0).next()?).ok()?.into())
}

/// `nft`'s comment in the user data: a list of (type, length, value).
fn comment(mut bytes: &[u8]) -> Option<Box<str>> {
    while let [kind, len, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*len))?;
        if *kind == UDATA_COMMENT {
            return text(value).map(Into::into);
        }
        bytes = &rest[value.len()..];
    }
    None
}

/// Numbers travel in network order.
pub(super) fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(attr(bytes, kind)?.try_into().ok()?))
}
