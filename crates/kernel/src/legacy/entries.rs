//! The entries of a table: one rule after the other, user chains behind the hooks' own. A pure reading, and the one change that is made.
//!
//! ```text
//!   [PREROUTING rules, policy] … [POSTROUTING rules, policy] [ERROR "CHAIN", its rules, RETURN] … [ERROR "ERROR"]
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;

use twill_core::firewall::beside::LegacyForward;
use twill_core::net::{Prefix, ip_to_bits};

/// A verdict of a standard target: -NF_DROP - 1 and -NF_ACCEPT - 1. One that is not negative is the offset of a rule to jump to.
const DROP: i32 = -1;
const ACCEPT: i32 = -2;
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

    /// The addresses that it compares, and whether it compares nothing else.
    fn addresses(&self) -> Option<(Prefix, Prefix, bool)> {
        let width = if self.v4 { 4 } else { 16 };
        let address = |n: usize| self.bytes.get(n * width..(n + 1) * width).and_then(ip_of);
        let prefix = |ip: usize, mask: usize| {
            let len = ip_to_bits(address(mask)?).count_ones() as u8;
            Prefix::truncate(address(ip)?, len).ok()
        };
        // Device masks, protocol, flags: all zero when they are not compared.
        let rest = self.bytes.get(4 * width + 32..offsets(self.v4) - 4)?;
        let plain = self.target() == Some(header(self.v4)) && rest.iter().all(|byte| *byte == 0);
        Some((prefix(0, 2)?, prefix(1, 3)?, plain))
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

/// The forward chain: its entries stand from `first` to `last`, which is its policy.
pub fn parse(v4: bool, entries: &[u8], first: usize, last: usize) -> LegacyForward {
    let mut found = LegacyForward { v4, drops: false, accepts: Vec::new() };
    for entry in Entry::walk(v4, entries, first) {
        if let Some((src, dst, true)) = entry.addresses() {
            let verdict = entry.verdict().map(|(_, verdict)| verdict);
            let drops = verdict == Some(DROP) || entry.name() == Some("REJECT");
            found.drops |= drops && src.len() == 0 && dst.len() == 0;
            found.accepts.extend((verdict == Some(ACCEPT)).then_some((src, dst)));
        }
        if entry.at >= last {
            break;
        }
    }
    found
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

/// The table without a user chain and without the rules that lead to it; `None`: it has no such chain, or is not whole.
pub fn without(v4: bool, entries: &[u8], chain: &str) -> Option<Rest> {
    let all: Vec<Entry<'_>> = Entry::walk(v4, entries, 0).collect();
    let end = all.last().filter(|last| last.at + last.bytes.len() == entries.len() && last.begins().is_some())?;
    let from = all.iter().position(|entry| entry.begins() == Some(chain) && entry.at != end.at)?;
    let to = from + 1 + all[from + 1..].iter().position(|entry| entry.begins().is_some())?;
    let first_rule = all[from + 1].at;
    let leads_there = |entry: &Entry<'_>| entry.verdict().is_some_and(|(_, verdict)| verdict as usize == first_rule);
    let (mut rest, mut len) = (Rest { entries: Vec::new(), kept: Vec::new(), moved: BTreeMap::new() }, 0);
    for (n, entry) in all.iter().enumerate() {
        rest.moved.insert(entry.at, len);
        if !(from..to).contains(&n) && !leads_there(entry) {
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
