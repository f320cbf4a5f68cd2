//! The entries of a table: one rule after the other, user chains behind the hooks' own. A pure reading, and the one change that is made.
//!
//! ```text
//!   [PREROUTING rules, policy] … [POSTROUTING rules, policy] [ERROR "CHAIN", its rules, RETURN] … [ERROR "ERROR"]
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use twill_core::firewall::beside::bare;
use twill_core::firewall::legacy::LegacyRule;
use twill_core::net::{Prefix, ip_to_bits};

/// A verdict of a standard target: -NF_DROP - 1, -NF_ACCEPT - 1, XT_RETURN. One that is not negative is the offset of a rule to jump to.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
const RETURN: i32 = -5;
/// IFNAMSIZ; IPT_INV_VIA_IN, IPT_INV_SRCIP and IPT_INV_DSTIP of the inverted flags.
const NAME: usize = 16;
const FROM_INVERTED: u8 = 0x01;
const SRC_INVERTED: u8 = 0x08;
const DST_INVERTED: u8 = 0x10;
/// Chains that lead to each other are followed so far.
const DEPTH: usize = 8;
const STEPS: usize = 100_000;
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
    commented: bool,
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
        plain.then_some(Compared { ends: (prefix(0, 2)?, prefix(1, 3)?), from, not, commented })
    }

    /// A rule of a chain by what it compares, its target left open.
    fn rule(&self, chain: &str) -> Option<LegacyRule> {
        let Compared { ends, from, not, commented } = self.compared()?;
        let from = from.map(|device| (device, not == 0));
        let known = not == 0 || not == FROM_INVERTED && from.is_some();
        known.then(|| LegacyRule { chain: chain.into(), ends, from, commented, drops: true })
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

/// A hook's chain, whose entries stand from `first` to `last`, which is its policy; with those that it leads to in every case.
pub fn parse(v4: bool, entries: &[u8], chain: &str, first: usize, last: usize) -> Vec<LegacyRule> {
    let mut follow = Follow { v4, entries, steps: STEPS, found: Vec::new() };
    follow.chain(chain, first, last, DEPTH);
    follow.found
}

/// A walk through the chains of a table.
struct Follow<'a> {
    v4: bool,
    entries: &'a [u8],
    /// How many entries it may still look at.
    steps: usize,
    found: Vec<LegacyRule>,
}

impl Follow<'_> {
    fn chain(&mut self, chain: &str, first: usize, last: usize, depth: usize) {
        for entry in Entry::walk(self.v4, self.entries, first) {
            self.steps = self.steps.saturating_sub(1);
            if self.steps == 0 || entry.begins().is_some() {
                return;
            }
            if let Some(rule) = entry.rule(chain) {
                let everything = rule.from.is_none() && rule.ends.0.len() == 0 && rule.ends.1.len() == 0;
                match entry.verdict() {
                    Some((_, ACCEPT)) => self.found.push(LegacyRule { drops: false, ..rule }),
                    Some((_, DROP)) => self.found.push(rule),
                    Some((_, RETURN)) if everything => return,
                    Some((_, to)) if to >= 0 && everything && depth > 0 => {
                        let all = Entry::walk(self.v4, self.entries, 0);
                        let mut before = all.filter(|begin| begin.at + begin.bytes.len() == to as usize);
                        if let Some(name) = before.next().and_then(|entry| entry.begins()) {
                            self.chain(name, to as usize, usize::MAX, depth - 1);
                        }
                    }
                    None if entry.name() == Some("REJECT") => self.found.push(rule),
                    _ => {}
                }
            }
            if entry.at >= last {
                return;
            }
        }
    }
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
    let end = all.last().filter(|last| last.at + last.bytes.len() == entries.len() && last.begins().is_some())?;
    let from = all.iter().position(|entry| entry.begins() == Some(chain) && entry.at != end.at)?;
    let to = from + 1 + all[from + 1..].iter().position(|entry| entry.begins().is_some())?;
    let first_rule = all[from + 1].at;
    let leads_there = |entry: &Entry<'_>| entry.verdict().is_some_and(|(_, verdict)| verdict as usize == first_rule);
    rest(&all, |n, entry| (from..to).contains(&n) || leads_there(entry))
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
