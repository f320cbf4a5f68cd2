//! The entries of a table: one rule after the other, user chains behind the hooks' own. A pure reading, and the one change that is made.
//!
//! ```text
//!   [PREROUTING rules, policy] … [POSTROUTING rules, policy] [ERROR "CHAIN", its rules, RETURN] … [ERROR "ERROR"]
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;

use twill_core::firewall::beside::bare;
use twill_core::firewall::{Base, Chain, Cmp, Datum, Expr, Field, Load, PayloadBase, Rule, Verdict};
use twill_core::net::{Prefix, ip_to_bits};

/// A verdict of a standard target: -NF_DROP - 1, -NF_ACCEPT - 1, XT_RETURN. One that is not negative is the offset of a rule to jump to.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
const RETURN: i32 = -5;
/// IFNAMSIZ; IPT_INV_VIA_IN, _VIA_OUT, _SRCIP, _DSTIP, _FRAG and _PROTO of the inverted flags.
const NAME: usize = 16;
const FROM_INVERTED: u8 = 0x01;
const TO_INVERTED: u8 = 0x02;
const SRC_INVERTED: u8 = 0x08;
const DST_INVERTED: u8 = 0x10;
const FRAGMENTS_INVERTED: u8 = 0x20;
const PROTO_INVERTED: u8 = 0x40;
/// IPT_F_FRAG; IPT_F_GOTO and IP6T_F_GOTO.
const LATER_FRAGMENTS: u8 = 0x01;
const GOTO_V4: u8 = 0x02;
const GOTO_V6: u8 = 0x04;
/// struct xt_entry_target: size, name of 29 bytes, revision; what the target itself has comes behind.
const TARGET: usize = 32;

/// One entry of a table.
#[derive(Debug, Clone, Copy)]
struct Entry<'a> {
    v4: bool,
    /// Where it stands.
    at: usize,
    bytes: &'a [u8],
}

/// What an entry compares.
struct Compared {
    ends: (Prefix, Prefix),
    from: Option<Box<str>>,
    /// The flags of what is inverted.
    not: u8,
}

impl<'a> Entry<'a> {
    /// All that are whole; a table that the kernel gives ends with the last of them.
    fn walk(v4: bool, entries: &'a [u8], from: usize) -> impl Iterator<Item = Entry<'a>> {
        let mut at = from;
        std::iter::from_fn(move || {
            let rest = entries.get(at..)?;
            let len = usize::from(u16_at(rest, offsets(v4) + 2)?);
            let entry = Entry { v4, at, bytes: rest.get(..len).filter(|_| len >= header(v4))? };
            at += len;
            Some(entry)
        })
    }

    /// Its target's name; a verdict or a jump has none.
    fn name(&self) -> Option<&'a str> {
        let name = self.bytes.get(self.target()? + 2..self.target()? + 31)?;
        std::str::from_utf8(name.split(|byte| *byte == 0).next()?).ok()
    }

    fn target(&self) -> Option<usize> {
        u16_at(self.bytes, offsets(self.v4)).map(usize::from)
    }

    /// Where a standard target's verdict stands, and what it is.
    fn verdict(&self) -> Option<(usize, i32)> {
        let at = self.target()? + TARGET;
        self.name().filter(|name| name.is_empty())?;
        Some((at, u32_at(self.bytes, at)? as i32))
    }

    /// The chain that begins with this entry.
    fn begins(&self) -> Option<&'a str> {
        self.name().filter(|name| *name == "ERROR")?;
        let name = self.bytes.get(self.target()? + TARGET..)?;
        std::str::from_utf8(name.split(|byte| *byte == 0).next()?).ok()
    }

    /// What it compares, when that is no more than addresses and the device that a packet comes in by.
    fn compared(&self) -> Option<Compared> {
        let width = if self.v4 { 4 } else { 16 };
        let field = |at: usize, len: usize| self.bytes.get(at..at + len);
        let address = |n: usize| field(n * width, width).and_then(ip_of);
        let prefix = |ip: usize, mask: usize| {
            let len = ip_to_bits(address(mask)?).count_ones() as u8;
            Prefix::truncate(address(ip)?, len).ok()
        };
        // struct ipt_ip, ip6t_ip6: names of the devices, their masks, then protocol and flags, the inverted ones last.
        let names = 4 * width;
        let rest = names + 3 * NAME;
        let mut others = field(rest, offsets(self.v4) - 4 - rest)?.to_vec();
        let not = std::mem::take(others.get_mut(NAME + if self.v4 { 3 } else { 4 })?);
        let device = field(names, NAME)?.split(|byte| *byte == 0).next()?;
        let from = match field(names + 2 * NAME, NAME)?.iter().filter(|byte| **byte != 0).count() {
            0 => None,
            // Without its NUL it is the beginning of a name.
            compared if compared == device.len() + 1 => Some(std::str::from_utf8(device).ok()?.into()),
            _ => return None,
        };
        let commented = self.target()? != header(self.v4);
        let plain = others.iter().all(|byte| *byte == 0) && (!commented || self.comment_alone()?);
        plain.then_some(Compared { ends: (prefix(0, 2)?, prefix(1, 3)?), from, not })
    }

    /// What it compares and does, in the words of nftables. `chains`: the names of the user chains by their first rules.
    fn rule(&self, chains: &BTreeMap<usize, &'a str>) -> Option<Rule> {
        let width = if self.v4 { 4 } else { 16 };
        let field = |at: usize, len: usize| self.bytes.get(at..at + len);
        let address = |n: usize| field(n * width, width).and_then(ip_of);
        // struct ipt_ip, ip6t_ip6: addresses, their masks, names of the devices, their masks; protocol; (tos;) flags, inverted ones.
        let rest = 4 * width + 4 * NAME;
        let [flags, not] = *field(rest + if self.v4 { 2 } else { 3 }, 2)? else { return None };
        let op = |bit: u8| if not & bit == 0 { Cmp::Eq } else { Cmp::Ne };
        let mut exprs = Vec::new();
        let ends = if self.v4 { [Field::SrcV4, Field::DstV4] } else { [Field::SrcV6, Field::DstV6] };
        for (n, (field, bit)) in ends.into_iter().zip([SRC_INVERTED, DST_INVERTED]).enumerate() {
            let (ip, mask) = (address(n)?, address(n + 2)?);
            if ip_to_bits(mask) != 0 || not & bit != 0 {
                let load = Load { field, mask: Some(Datum::Ip(mask)) };
                exprs.push(Expr::Match { load, op: op(bit), value: Datum::Ip(ip) });
            }
        }
        for (n, (device, bit)) in [(Field::Iif, FROM_INVERTED), (Field::Oif, TO_INVERTED)].into_iter().enumerate() {
            let name = field(4 * width + n * NAME, NAME)?;
            let mask = field(4 * width + (n + 2) * NAME, NAME)?;
            // Without its NUL it is the beginning of a name.
            let begin = &name[..mask.iter().filter(|byte| **byte != 0).count()];
            if !begin.is_empty() {
                let mut whole = begin.to_vec();
                whole.resize(NAME, 0);
                let value =
                    if begin.ends_with(&[0]) { device.kind().read(&whole)? } else { Datum::Bytes(begin.into()) };
                exprs.push(Expr::Match { load: device.into(), op: op(bit), value });
            }
        }
        let proto = u16_at(self.bytes, rest).map(|proto| proto as u8)?;
        if proto != 0 {
            exprs.push(Expr::Match { load: Field::L4Proto.into(), op: op(PROTO_INVERTED), value: Datum::Byte(proto) });
        }
        if self.v4 && flags & LATER_FRAGMENTS != 0 {
            // ip frag-off & 0x1fff != 0
            let load = Field::from_payload(PayloadBase::Network, 6, 2);
            let op = if not & FRAGMENTS_INVERTED == 0 { Cmp::Ne } else { Cmp::Eq };
            let mask = Some(Datum::Bytes([0x1f, 0xff].into()));
            exprs.push(Expr::Match { load: Load { field: load, mask }, op, value: Datum::Bytes([0, 0].into()) });
        }
        self.matches(|name, revision, data| {
            if name != "comment" {
                let (name, data) = (name.into(), data.into());
                exprs.push(Expr::Xt { target: false, name, revision, data });
            }
        })?;
        exprs.extend(self.does(flags & if self.v4 { GOTO_V4 } else { GOTO_V6 } != 0, chains)?);
        Some(Rule { exprs, comment: self.comment(), handle: None })
    }

    /// Its target; a rule without one goes on with the next.
    fn does(&self, goto: bool, chains: &BTreeMap<usize, &'a str>) -> Option<Option<Expr>> {
        let Some((_, verdict)) = self.verdict() else {
            let data = self.bytes.get(self.target()? + TARGET..)?.into();
            let revision = *self.bytes.get(self.target()? + TARGET - 1)?;
            return Some(Some(Expr::Xt { target: true, name: self.name()?.into(), revision, data }));
        };
        let next = self.at + self.bytes.len();
        Some(
            match verdict {
                ACCEPT => Some(Verdict::Accept),
                DROP => Some(Verdict::Drop),
                RETURN => Some(Verdict::Return),
                to if to as usize == next => None,
                to => {
                    let chain = Box::from(*chains.get(&(to as usize))?);
                    Some(if goto { Verdict::Goto(chain) } else { Verdict::Jump(chain) })
                }
            }
            .map(Expr::Verdict),
        )
    }

    /// The matches between its header and its target (struct xt_entry_match): name, revision and struct of each.
    fn matches(&self, mut each: impl FnMut(&'a str, u8, &'a [u8])) -> Option<()> {
        let (mut at, target) = (header(self.v4), self.target()?);
        while at < target {
            let size = usize::from(u16_at(self.bytes, at)?);
            let one = self.bytes.get(at..at + size).filter(|_| size >= TARGET && at + size <= target)?;
            let name = std::str::from_utf8(one[2..31].split(|byte| *byte == 0).next()?).ok()?;
            each(name, one[TARGET - 1], &one[TARGET..]);
            at += size;
        }
        Some(())
    }

    /// True for a jump to the chain with this first rule.
    fn leads_to(&self, first_rule: usize) -> bool {
        self.verdict().is_some_and(|(_, verdict)| verdict as usize == first_rule)
    }

    fn comment(&self) -> Option<Box<str>> {
        let mut comment = None;
        self.matches(|name, _, data| {
            if name == "comment" {
                comment = data.split(|byte| *byte == 0).next().and_then(|text| std::str::from_utf8(text).ok());
            }
        })?;
        comment.map(Into::into)
    }

    /// See [`bare`].
    fn bare(&self) -> Option<Prefix> {
        let Compared { ends: (src, dst), from, not, .. } = self.compared()?;
        let masquerades = self.name() == Some("MASQUERADE");
        let ends = masquerades || self.verdict().is_some_and(|(_, verdict)| verdict == RETURN);
        let known = ends && from.is_none() && not & !(SRC_INVERTED | DST_INVERTED) == 0;
        bare((src, not & SRC_INVERTED == 0), (dst, not & DST_INVERTED == 0), masquerades).filter(|_| known)
    }

    /// True when between its header and its target there is one match, and that is a comment (struct xt_entry_match).
    fn comment_alone(&self) -> Option<bool> {
        let (at, target) = (header(self.v4), self.target()?);
        let name = self.bytes.get(at + 2..at + 31)?.split(|byte| *byte == 0).next()?;
        Some(name == b"comment" && at + usize::from(u16_at(self.bytes, at)?) == target)
    }
}

/// Where struct ipt_entry (ipt_ip of 84 bytes, nfcache) and struct ip6t_entry (ip6t_ip6 of 136) have the offset of the target and, behind
/// it, of the next entry.
const fn offsets(v4: bool) -> usize {
    if v4 { 88 } else { 140 }
}

/// Size of these structs, with comefrom and counters.
const fn header(v4: bool) -> usize {
    if v4 { 112 } else { 168 }
}

/// All chains of a table: those of the hooks with where their first rules and their policies stand, and the users'.
pub fn parse(v4: bool, entries: &[u8], hooks: &[(&str, Base, usize, usize)]) -> BTreeMap<Box<str>, Chain> {
    let mut starts = BTreeMap::new();
    let mut heads = Vec::new();
    for entry in Entry::walk(v4, entries, 0) {
        if let Some(name) = entry.begins() {
            let first = entry.at + entry.bytes.len();
            starts.insert(first, name);
            heads.push((name, first));
        }
    }
    // The last one is the end of the table.
    heads.pop();
    let mut chains = BTreeMap::new();
    for (name, base, first, last) in hooks {
        let policy = Entry::walk(v4, entries, *last).next().and_then(|entry| entry.verdict());
        let base = Base { drops: policy.is_some_and(|(_, verdict)| verdict == DROP), ..*base };
        let rules = Entry::walk(v4, entries, *first).take_while(|entry| entry.at < *last && entry.begins().is_none());
        let rules = rules.map(|entry| entry.rule(&starts).unwrap_or_default()).collect();
        chains.insert(Box::from(*name), Chain { base: Some(base), rules });
    }
    for (name, first) in heads {
        let rules = Entry::walk(v4, entries, first).take_while(|entry| entry.begins().is_none());
        let mut rules: Vec<Rule> = rules.map(|entry| entry.rule(&starts).unwrap_or_default()).collect();
        // The return at its end is nobody's rule.
        rules.pop();
        chains.insert(name.into(), Chain { base: None, rules });
    }
    chains
}

/// Names of the user chains.
pub fn chains(v4: bool, entries: &[u8]) -> Vec<&str> {
    let mut names: Vec<&str> = Entry::walk(v4, entries, 0).filter_map(|entry| entry.begins()).collect();
    // The last one is the end of the table.
    names.pop();
    names
}

/// A table without some of its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rest {
    /// Its entries, each jump where its chain stands now.
    pub entries: Vec<u8>,
    /// For each of them, its number in the whole table.
    pub kept: Vec<usize>,
    /// Old offset → new offset; that of a rule that is gone is the next one's.
    pub moved: BTreeMap<usize, usize>,
}

/// The networks for which an old flannel left rules between two entries.
pub fn bare_networks(v4: bool, entries: &[u8], first: usize, last: usize) -> BTreeSet<Prefix> {
    Entry::walk(v4, entries, first).take_while(|entry| entry.at < last).filter_map(|entry| entry.bare()).collect()
}

/// The table without these rules.
pub fn without_bare(v4: bool, entries: &[u8], first: usize, last: usize, network: Prefix) -> Option<Rest> {
    let all: Vec<Entry<'_>> = Entry::walk(v4, entries, 0).collect();
    rest(&all, |_, entry| (first..last).contains(&entry.at) && entry.bare() == Some(network))
}

/// The table without a user chain and without the rules that lead to it; `None`: it has no such chain, or is not whole.
pub fn without(v4: bool, entries: &[u8], chain: &str) -> Option<Rest> {
    let all: Vec<Entry<'_>> = Entry::walk(v4, entries, 0).collect();
    let own = numbers(&all, entries.len(), chain)?;
    let first_rule = all[own.start + 1].at;
    rest(&all, |n, entry| own.contains(&n) || entry.leads_to(first_rule))
}

/// The table without the rules within `hook` that have this comment and lead to a user chain, and without the chain where no others lead to
/// it; `None`: it has no such rule, or is not whole.
pub fn without_commented(v4: bool, entries: &[u8], hook: Range<usize>, chain: &str, comment: &str) -> Option<Rest> {
    let all: Vec<Entry<'_>> = Entry::walk(v4, entries, 0).collect();
    let own = numbers(&all, entries.len(), chain)?;
    let first_rule = all[own.start + 1].at;
    let leads_there = |entry: &Entry<'_>| entry.leads_to(first_rule);
    let goes = |entry: &Entry<'_>| {
        hook.contains(&entry.at) && leads_there(entry) && entry.comment().as_deref() == Some(comment)
    };
    all.iter().any(goes).then_some(())?;
    let used = all.iter().any(|entry| leads_there(entry) && !goes(entry));
    rest(&all, |n, entry| goes(entry) || !used && own.contains(&n))
}

/// The numbers of a user chain's entries in a table that is whole, its head first.
fn numbers(all: &[Entry<'_>], len: usize, chain: &str) -> Option<Range<usize>> {
    let end = all.last().filter(|last| last.at + last.bytes.len() == len && last.begins().is_some())?;
    let from = all.iter().position(|entry| entry.begins() == Some(chain) && entry.at != end.at)?;
    Some(from..from + 1 + all[from + 1..].iter().position(|entry| entry.begins().is_some())?)
}

/// All entries but those that go.
fn rest(all: &[Entry<'_>], goes: impl Fn(usize, &Entry<'_>) -> bool) -> Option<Rest> {
    let (mut rest, mut len) = (Rest { entries: Vec::new(), kept: Vec::new(), moved: BTreeMap::new() }, 0);
    for (n, entry) in all.iter().enumerate() {
        rest.moved.insert(entry.at, len);
        if !goes(n, entry) {
            rest.kept.push(n);
            len += entry.bytes.len();
        }
    }
    for n in &rest.kept {
        let (entry, begin) = (&all[*n], rest.entries.len());
        rest.entries.extend_from_slice(entry.bytes);
        if let Some((at, verdict)) = entry.verdict()
            && verdict >= 0
        {
            let moved = *rest.moved.get(&(verdict as usize))?;
            rest.entries[begin + at..begin + at + 4].copy_from_slice(&(moved as u32).to_ne_bytes());
        }
    }
    Some(rest)
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}
