//! What the tables of others, of nftables and of legacy iptables, do to the packets that have to pass, and how to end it.
//!
//! ```text
//!   peer's container ──▶ prerouting ─▶ forward ─▶ postrouting ──▶ our container, and back
//!   a peer's datagram ─▶ prerouting ─▶ input          output ─▶ postrouting ─▶ ours to a peer
//! ```
//! - `samples`: the packets, drawn from what the rules compare with; `packet`: what a rule sees of one
//! - `matching`: whether an expression holds: yes, no, or it cannot be said; here: the way of a packet through the chains
//! - `report`: the findings
//!
//! What drops is taken note of and then left out, so that all that is in the way is told at once.

mod matching;
mod packet;
mod report;
mod samples;

use std::collections::BTreeMap;

use self::matching::{Truth, holds, ways};
use self::packet::{At, Packet, UDP, Way};
use self::samples::{Group, Scene};
use super::beside::{foreign_tables, is_drop, reached};
use super::policy::TAG;
use super::{Base, Expr, Table, Verdict, build};
use crate::host::HostState;
use crate::net::LinkName;
use crate::reconcile::{Desired, Finding};

/// Chains that lead to each other are followed so far; the kernel follows 16.
const DEPTH: usize = 16;
/// So many rules are looked at, for all packets together: what it takes stays below a tenth of a second. What matters most comes first.
const STEPS: usize = 300_000;

/// What the tables of others drop of what has to pass, each with the command that ends it.
/// `index`: the number of a device; `program`: the name of a process.
pub fn findings(
    want: &Desired,
    have: &HostState,
    legacy: &[Table],
    index: &dyn Fn(LinkName) -> Option<u32>,
    program: &dyn Fn(u32) -> Option<String>,
) -> Vec<Finding> {
    let nft = foreign_tables(have).map(|table| Source { table, legacy: false });
    let all: Vec<Source<'_>> = nft.chain(legacy.iter().map(|table| Source { table, legacy: true })).collect();
    let drops = |source: &Source<'_>| {
        source.table.chains.values().any(|chain| {
            chain.base.is_some_and(|base| base.drops) || chain.rules.iter().any(|rule| rule.exprs.iter().any(is_drop))
        })
    };
    if !all.iter().any(drops) {
        return Vec::new();
    }
    let scene = Scene::new(want, have, &all, index);
    let mut bases: Vec<(&Source<'_>, &str, Base)> = Vec::new();
    for source in &all {
        let entries = source.table.chains.iter().filter_map(|(name, chain)| Some((source, &**name, chain.base?)));
        bases.extend(entries.filter(|(_, name, base)| base.drops || matters(source.table, name)));
    }
    bases.sort_by_key(|(.., base)| base.priority);
    let mut places: BTreeMap<Place<'_>, Hits> = BTreeMap::new();
    let mut steps = STEPS;
    for group in scene.groups() {
        let mut hit: BTreeMap<Place<'_>, Vec<(usize, Truth)>> = BTreeMap::new();
        for (n, packet) in group.packets.iter().enumerate() {
            for (place, truth) in dropped(packet, &bases, &mut steps) {
                hit.entry(place).or_default().push((n, truth));
            }
        }
        for (place, hit) in hit {
            places.entry(place).or_default().add(&group, &hit);
        }
    }
    report::findings(&scene, &places, program)
}

/// True for a chain whose rules may drop, or mark for another one that does.
fn matters(table: &Table, base: &str) -> bool {
    let marks = |expr: &Expr| match expr {
        Expr::SetMark => true,
        Expr::Xt { target: true, name, .. } => matches!(&**name, "MARK" | "CONNMARK"),
        _ => false,
    };
    let chains = reached(table, base).into_iter().filter_map(|name| table.chains.get(name));
    let mut exprs = chains.flat_map(|chain| &chain.rules).flat_map(|rule| &rule.exprs);
    exprs.any(|expr| is_drop(expr) || marks(expr))
}

/// A table, and where it is from.
#[derive(Debug, Clone, Copy)]
struct Source<'a> {
    table: &'a Table,
    /// Legacy iptables.
    legacy: bool,
}

/// Where something is dropped.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    source: Source<'a>,
    /// The chain of a hook, and the one that the rule stands in.
    base: &'a str,
    at: Base,
    chain: &'a str,
    /// The rule; `None`: the policy.
    rule: Option<usize>,
}

impl Place<'_> {
    fn key(&self) -> (bool, &super::TableName, &str, &str, std::cmp::Reverse<Option<usize>>) {
        // Rules from the last to the first: who deletes one by its number leaves the others theirs.
        (self.source.legacy, &self.source.table.name, self.base, self.chain, std::cmp::Reverse(self.rule))
    }
}

impl PartialEq for Place<'_> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Place<'_> {}

impl PartialOrd for Place<'_> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Place<'_> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

/// What a place drops.
#[derive(Debug, Default)]
struct Hits {
    /// By way and family: all that goes that way between two addresses; else a part of it.
    ways: BTreeMap<(Way, bool), bool>,
}

impl Hits {
    fn add(&mut self, group: &Group, hit: &[(usize, Truth)]) {
        let sure = |n: usize| hit.contains(&(n, Truth::Yes));
        // Every new connection of TCP and UDP, or all that belongs to one: many a firewall lets ICMP pass and nothing else.
        let halves = [true, false].map(|new| {
            let of_half = |packet: &Packet| packet.new == new && [build::TCP, UDP].contains(&packet.proto);
            let mut half = group.packets.iter().enumerate().filter(|(_, packet)| of_half(packet)).peekable();
            half.peek().is_some() && half.all(|(n, _)| sure(n))
        });
        let whole = group.whole && halves.contains(&true);
        *self.ways.entry((group.way, group.v4)).or_default() |= whole;
    }

    fn whole(&self) -> bool {
        self.ways.values().any(|whole| *whole)
    }
}

/// Where a packet is dropped, for sure or perhaps.
fn dropped<'a>(packet: &Packet, bases: &[(&Source<'a>, &'a str, Base)], steps: &mut usize) -> Vec<(Place<'a>, Truth)> {
    let (mut found, mut marked) = (Vec::new(), false);
    for hook in packet.way.hooks() {
        for (source, name, base) in bases.iter().filter(|(.., base)| base.hook == *hook) {
            let fits = match source.table.name.family {
                super::Family::Ip => packet.v4(),
                super::Family::Ip6 => !packet.v4(),
                super::Family::Inet => true,
                super::Family::Arp | super::Family::Bridge | super::Family::Netdev => false,
            };
            // Only the first packet of what is tracked comes to a chain of the kind nat.
            let tracked = matches!(packet.way, Way::In | Way::Out);
            if !fits || base.kind == super::ChainKind::Nat && !(tracked && packet.new) {
                continue;
            }
            let at = At { hook: *hook, priority: base.priority, marked };
            let mut walk = Walk {
                source: **source,
                base: name,
                root: *base,
                packet,
                at,
                sure: true,
                steps: *steps,
                found: Vec::new(),
            };
            if walk.chain(name, Truth::Yes, DEPTH) == After::Back && base.drops && walk.steps > 0 {
                walk.note(name, None, Truth::Yes);
            }
            (marked, *steps) = (walk.at.marked, walk.steps);
            found.append(&mut walk.found);
        }
    }
    found
}

/// What became of the packet in a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// It left this hook's chain for good.
    Gone,
    /// It goes on behind the jump.
    Back,
}

/// A packet's way through one chain of a hook.
struct Walk<'a, 'p> {
    source: Source<'a>,
    base: &'a str,
    root: Base,
    packet: &'p Packet,
    at: At,
    /// No rule may have let it go before.
    sure: bool,
    steps: usize,
    found: Vec<(Place<'a>, Truth)>,
}

impl<'a> Walk<'a, '_> {
    fn note(&mut self, chain: &'a str, rule: Option<usize>, truth: Truth) {
        let place = Place { source: self.source, base: self.base, at: self.root, chain, rule };
        self.found.push((place, if self.sure { truth } else { Truth::Maybe }));
    }

    /// `here`: whether the packet comes to this chain.
    fn chain(&mut self, name: &'a str, mut here: Truth, depth: usize) -> After {
        let Some(chain) = self.source.table.chains.get(name).filter(|_| depth > 0) else {
            // What it does is not known.
            self.sure = false;
            return After::Back;
        };
        for (n, rule) in chain.rules.iter().enumerate() {
            self.steps = self.steps.saturating_sub(1);
            if self.steps == 0 {
                return After::Back;
            }
            let mut truth = Truth::Yes;
            for (k, expr) in rule.exprs.iter().enumerate() {
                truth = truth.and(holds(expr, rule.exprs.get(k + 1), self.packet, self.at));
                if truth == Truth::No {
                    break;
                }
                for (sure, does) in self.does(expr) {
                    let holds = truth.and(sure);
                    match self.act(does, n, name, here, holds, depth, rule.comment.as_deref() == Some(TAG)) {
                        Next::Rule => {}
                        Next::Left(after) => return after,
                        Next::Unsure => here = here.and(Truth::Maybe),
                    }
                }
            }
        }
        After::Back
    }

    /// What an expression that holds does to the packet.
    fn does(&mut self, expr: &'a Expr) -> Vec<(Truth, Does<'a>)> {
        let of = |verdict: &'a Verdict| match verdict {
            Verdict::Accept | Verdict::Queue => Does::Leave,
            Verdict::Drop => Does::Drop,
            Verdict::Continue => Does::Nothing,
            Verdict::Return => Does::Return,
            Verdict::Jump(to) => Does::Call(to),
            Verdict::Goto(to) => Does::Goto(to),
        };
        let does = match expr {
            Expr::Choose { loads, ways: all, .. } => {
                let ways = ways(loads, all, self.packet, self.at);
                return ways.into_iter().map(|(truth, verdict)| (truth, of(verdict))).collect();
            }
            Expr::Verdict(verdict) => of(verdict),
            expr if is_drop(expr) => Does::Drop,
            Expr::Masquerade { .. } | Expr::Dnat(_) => Does::Leave,
            Expr::SetMark => {
                self.at.marked = true;
                Does::Nothing
            }
            Expr::Xt { target: true, name, .. } => match &**name {
                "MARK" | "CONNMARK" => {
                    self.at.marked = true;
                    Does::Nothing
                }
                "MASQUERADE" | "SNAT" | "DNAT" | "REDIRECT" | "NETMAP" | "NFQUEUE" => Does::Leave,
                _ => Does::Nothing,
            },
            Expr::Other { name, .. } => match &**name {
                "nat" | "masq" | "redir" | "queue" | "fwd" | "synproxy" => Does::Leave,
                _ => Does::Nothing,
            },
            _ => Does::Nothing,
        };
        vec![(Truth::Yes, does)]
    }

    #[allow(clippy::too_many_arguments, reason = "one step of the walk, apart from it to keep both short")]
    fn act(
        &mut self,
        does: Does<'a>,
        rule: usize,
        chain: &'a str,
        here: Truth,
        holds: Truth,
        depth: usize,
        ours: bool,
    ) -> Next {
        match does {
            Does::Nothing => Next::Rule,
            Does::Drop => {
                if !ours {
                    self.note(chain, Some(rule), here.and(holds));
                }
                Next::Rule
            }
            Does::Leave => self.leave(here, holds),
            Does::Return => back(holds),
            Does::Call(to) => match self.chain(to, here.and(holds), depth - 1) {
                After::Gone => self.leave(here, holds),
                After::Back => Next::Rule,
            },
            Does::Goto(to) => match self.chain(to, here.and(holds), depth - 1) {
                After::Gone => self.leave(here, holds),
                After::Back => back(holds),
            },
        }
    }

    fn leave(&mut self, here: Truth, holds: Truth) -> Next {
        if here == Truth::Yes && holds == Truth::Yes {
            return Next::Left(After::Gone);
        }
        self.sure = false;
        // Whoever comes here goes; who does not has left the chain before.
        if holds == Truth::Yes { Next::Left(After::Back) } else { Next::Rule }
    }
}

/// The end of the chain, for all that comes here, or for some.
fn back(holds: Truth) -> Next {
    if holds == Truth::Yes { Next::Left(After::Back) } else { Next::Unsure }
}

/// What an expression does.
#[derive(Debug, Clone, Copy)]
enum Does<'a> {
    Nothing,
    Drop,
    Leave,
    Return,
    Call(&'a str),
    Goto(&'a str),
}

/// What comes after a step.
enum Next {
    /// The next one.
    Rule,
    /// The same; the packet may have left the chain.
    Unsure,
    /// Nothing more in this chain.
    Left(After),
}
