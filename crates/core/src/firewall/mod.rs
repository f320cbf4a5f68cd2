//! nftables as values: tables, chains and rules; what Twill wants of them and what the kernel holds, in one shape.
//!
//! ```text
//!   table inet twill ─┬─ chain "leaving"      base: nat, postrouting, 100
//!                     │    └─ Rule            [Match ip saddr 10.1.0.0/16, Match ip daddr != 224.0.0.0/4, Counter, Masquerade]
//!                     └─ chain "forward"      base: filter, forward, 0
//! ```
//! An expression here is what `nft` prints as one word group: a load with its comparison, a statement, a verdict. The kernel's register
//! machine (loads, bitwise, cmp, …) stays in the kernel crate, which turns one into the other without loss.
//!
//! - [`build`]: rules in few words; [`policy`]: the agent's table; [`beside`]: what it needs in the tables of others
//! - [`judge`]: what the tables of others, nftables' and legacy iptables', do to the network's packets
//! - [`published`]: the table of the containers' host ports

pub mod beside;
pub mod build;
mod datum;
mod display;
pub mod judge;
pub mod policy;
pub mod published;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::net::Prefix;

pub use datum::{Datum, Field, Load, PayloadBase, Type};
pub use policy::Policy;

/// Address family of a table (NFPROTO_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// IPv4 and IPv6 in one table.
    Inet,
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// ARP.
    Arp,
    /// Bridged frames.
    Bridge,
    /// Frames of a device.
    Netdev,
}

/// What tells two tables apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TableName {
    /// Its family.
    pub family: Family,
    /// Its name.
    pub name: Box<str>,
}

/// A table with all that is looked at in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Family and name.
    #[serde(flatten)]
    pub name: TableName,
    /// What `nft` shows as `comment`: by this a table is known as ours.
    pub comment: Option<Box<str>>,
    /// Nothing in it is in force (`flags dormant`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dormant: bool,
    /// The netlink port of the program that alone may change it (`flags owner`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<u32>,
    /// Sets of addresses by name; of others' tables they are not read.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sets: BTreeMap<Box<str>, Set>,
    /// Maps, counters, flowtables and whatever else Twill does not make; of others' tables they are not read.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub others: BTreeSet<Box<str>>,
    /// Chains by name.
    pub chains: BTreeMap<Box<str>, Chain>,
}

/// Addresses of one family that rules ask for by the set's name: a lookup costs the same however many they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Set {
    /// Of IPv4 addresses; else of IPv6.
    pub v4: bool,
    /// The addresses.
    pub elements: BTreeSet<IpAddr>,
}

/// What tells two chains apart.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ChainName {
    /// Its table.
    #[serde(flatten)]
    pub table: TableName,
    /// Its name.
    pub chain: Box<str>,
}

/// What flannel or a reference plugin left in somebody else's table: a chain with the rules that lead to it, or rules without a chain.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Leftover {
    /// The chain, in a table that `iptables` made.
    #[serde(flatten)]
    pub at: ChainName,
    /// In a table of legacy iptables; else of nftables.
    pub legacy: bool,
    /// Not the chain itself: the rules in it by which an old flannel masquerades for this network.
    pub bare: Option<Prefix>,
    /// A reference plugin's: of the rules that lead to the chain those in `POSTROUTING` with this comment, and the chain where no others do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub comment: Option<Box<str>>,
}

/// Rules of ours in somebody else's chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The chain.
    #[serde(flatten)]
    pub at: ChainName,
    /// The rules in order.
    pub rules: Vec<Rule>,
    /// No other rule stands before them.
    pub first: bool,
}

/// A chain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// Where packets enter it; `None`: only by a jump.
    pub base: Option<Base>,
    /// Its rules in order.
    pub rules: Vec<Rule>,
}

/// Where and when a chain is entered, and what holds at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// What it may do.
    pub kind: ChainKind,
    /// When it is entered.
    pub hook: Hook,
    /// Order among the chains of a hook; lower first.
    pub priority: i32,
    /// The verdict at its end: `true` drops.
    pub drops: bool,
}

/// What a chain may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ChainKind {
    /// Accept and drop.
    Filter,
    /// Translate addresses; sees the first packet of a connection only.
    Nat,
    /// Reroute what the host itself sends.
    Route,
}

/// When a chain is entered (NF_INET_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Hook {
    /// Received, before the routing decision.
    Prerouting,
    /// For the host itself.
    Input,
    /// Passing through.
    Forward,
    /// Sent by the host itself.
    Output,
    /// On the way out.
    Postrouting,
    /// At a device's door.
    Ingress,
}

/// A rule: its expressions from left to right; the first that does not match ends it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rule {
    /// The expressions.
    pub exprs: Vec<Expr>,
    /// What `nft` shows as `comment`.
    pub comment: Option<Box<str>>,
    /// By what the kernel knows it, in a table of somebody else.
    #[serde(skip)]
    pub handle: Option<u64>,
}

/// The first and the last of the keys that an element of a set or map stands for. Where they have several fields, each field has its own.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Keys {
    /// The first.
    pub from: Box<[u8]>,
    /// The last.
    pub to: Box<[u8]>,
}

/// A comparison's operator (NFT_CMP_*).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cmp {
    /// Equal.
    Eq,
    /// Not equal.
    Ne,
    /// Less, in network byte order.
    Lt,
    /// Less or equal.
    Le,
    /// Greater.
    Gt,
    /// Greater or equal.
    Ge,
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expr {
    /// `ip saddr 10.0.0.0/8`, `meta mark & 0x4000 == 0x4000`.
    Match {
        /// What is looked at.
        load: Load,
        /// How it is compared.
        op: Cmp,
        /// With what.
        value: Datum,
    },
    /// `th dport != 1000-2000`.
    Range {
        /// What is looked at.
        load: Load,
        /// The first and the last.
        keys: Keys,
        /// It is between them; else it is not.
        inside: bool,
    },
    /// `ip saddr @peers`, `ip saddr . th dport != @pairs`.
    Member {
        /// What is looked at.
        loads: Vec<Load>,
        /// The set's name.
        set: Box<str>,
        /// It is in the set; else it is not.
        inside: bool,
        /// What is in the set, where it is somebody else's.
        keys: Vec<Keys>,
    },
    /// `ip daddr vmap { 10.1.15.2 : drop }`: what happens depends on what is looked at. It can be looked at, but not written.
    Choose {
        /// What is looked at; empty: it is not known.
        loads: Vec<Load>,
        /// The map's name.
        map: Box<str>,
        /// Its keys with what each leads to.
        ways: Vec<(Keys, Verdict)>,
    },
    /// Counts what comes by. Its figures are no part of the model.
    Counter,
    /// What happens to the packet.
    Verdict(Verdict),
    /// The source becomes the outgoing device's address.
    Masquerade {
        /// A random port for each connection (NF_NAT_RANGE_PROTO_RANDOM_FULLY).
        fully_random: bool,
    },
    /// Connection tracking leaves the packet alone.
    Notrack,
    /// The destination becomes this one (`dnat to`); the packet's family is to be compared before.
    Dnat(SocketAddr),
    /// `tcp option maxseg size set rt mtu`: never raised, only lowered, to what the MTU of the packet's route leaves.
    ClampMaxSeg,
    /// `meta mark set …`.
    SetMark,
    /// A match or a target of `iptables`. It can be looked at, but not written.
    Xt {
        /// A target; else a match.
        target: bool,
        /// Its name.
        name: Box<str>,
        /// Its revision.
        revision: u8,
        /// Its struct.
        data: Box<[u8]>,
    },
    /// An expression that is not known here; it can be looked at, but not written.
    Other {
        /// The kernel's name for it.
        name: Box<str>,
        /// Its attributes, as they came.
        data: Box<[u8]>,
    },
}

/// What happens to a packet.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// This hook's next chain.
    Accept,
    /// The end.
    Drop,
    /// The next rule.
    Continue,
    /// Back to where the chain was called; in a base chain its policy.
    Return,
    /// Through another chain, and back.
    Jump(Box<str>),
    /// Through another chain, and not back.
    Goto(Box<str>),
    /// To a program (NF_QUEUE).
    Queue,
}

impl Expr {
    /// The verdicts that it may end with.
    pub fn verdicts(&self) -> impl Iterator<Item = &Verdict> {
        let (one, many) = match self {
            Expr::Verdict(verdict) => (Some(verdict), None),
            Expr::Choose { ways, .. } => (None, Some(ways)),
            _ => (None, None),
        };
        one.into_iter().chain(many.into_iter().flatten().map(|(_, verdict)| verdict))
    }

    /// The chains that it may lead to.
    pub fn leads_to(&self) -> impl Iterator<Item = &Box<str>> {
        self.verdicts().filter_map(|verdict| match verdict {
            Verdict::Jump(to) | Verdict::Goto(to) => Some(to),
            _ => None,
        })
    }
}

impl TableName {
    /// The table `name` of `family`.
    pub fn new(family: Family, name: &str) -> Self {
        Self { family, name: name.into() }
    }

    /// The agent's table.
    pub fn twill() -> Self {
        Self::new(Family::Inet, "twill")
    }

    /// The table of the containers' host ports: the plugin's, and after a flush the agent's to restore.
    pub fn twill_cni() -> Self {
        Self::new(Family::Inet, "twill-cni")
    }

    /// True for a table that Twill makes, by its name.
    pub fn is_twills(&self) -> bool {
        [Self::twill(), Self::twill_cni()].contains(self)
    }
}

impl Table {
    /// True for a table that Twill made.
    pub fn is_ours(&self) -> bool {
        self.comment.as_deref() == Some(policy::TAG)
    }

    /// True for a table that was made as this one: whoever saved it and loaded it again has lost the comment, and nothing else.
    pub fn is_as_made(&self, made: &Table) -> bool {
        let bare = |rule: &Rule| {
            let mut rule = Rule { handle: None, ..rule.clone() };
            for expr in &mut rule.exprs {
                if let Expr::Member { keys, .. } = expr {
                    keys.clear();
                }
            }
            rule
        };
        let same = |name: &str, chain: &Chain| {
            made.chains.get(name).is_some_and(|ours| {
                ours.base == chain.base && chain.rules.iter().map(bare).eq(ours.rules.iter().cloned())
            })
        };
        self.comment.is_none()
            && self.owner.is_none()
            && self.others.is_empty()
            && !self.chains.is_empty()
            && self.chains.iter().all(|(name, chain)| same(name, chain))
            && self.sets.keys().all(|name| made.sets.contains_key(name))
    }

    /// True when nothing but the elements of sets tells the two apart.
    pub fn differs_in_elements(&self, other: &Table) -> bool {
        let kinds = |table: &Table| table.sets.iter().map(|(name, set)| (name.clone(), set.v4)).collect::<Vec<_>>();
        (&self.name, &self.comment, self.dormant, &self.others, &self.chains)
            == (&other.name, &other.comment, other.dormant, &other.others, &other.chains)
            && kinds(self) == kinds(other)
    }

    /// How many elements are in its sets.
    pub fn elements(&self) -> usize {
        self.sets.values().map(|set| set.elements.len()).sum()
    }

    /// How many rules are in it.
    pub fn rules(&self) -> usize {
        self.chains.values().map(|chain| chain.rules.len()).sum()
    }
}
