//! Beside the firewalls of others: an accept in our table cannot override a drop in theirs, so that ours must stand in their chain.
//!
//! ```text
//!   table ip filter   chain FORWARD (policy drop)          Head: ip saddr 10.1.0.0/16 accept comment "twill"
//!                       └─ jump DOCKER-USER   ◀── here           ip daddr 10.1.0.0/16 accept comment "twill"
//! ```
//! The rules compare addresses and nothing else: `iptables-nft` prints them as its own.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::build::{End, family, multicast, within};
use super::policy::TAG;
use super::{
    Base, Chain, ChainKind, ChainName, Cmp, Datum, Expr, Family, Field, Head, Hook, Leftover, Load, Rule, Table,
    TableName, Verdict,
};
use crate::host::{HostState, Object};
use crate::net::{Prefix, ip_to_bits};

/// Where docker leaves room for the rules of others, before its own.
const DOCKER_USER: &str = "DOCKER-USER";
/// Where `iptables` changes sources.
pub const POSTROUTING: &str = "POSTROUTING";
/// What flannel's chains in the tables of `iptables` begin with (`pkg/trafficmngr/iptables/iptables.go`).
const FLANNEL_CHAINS: [&str; 2] = ["FLANNEL-POSTRTG", "FLANNEL-FWD"];

/// What the reference plugins call the chain by which they masquerade a container, and the digits of a hash behind it (`pkg/utils/utils.go`).
const PLUGINS_CHAIN: (&str, usize) = ("CNI-", 24);

/// True for a table that flannel made for itself (`pkg/trafficmngr/nftables/nftables.go`).
pub fn is_flannels(table: &TableName) -> bool {
    matches!((table.family, &*table.name), (Family::Ip, "flannel-ipv4") | (Family::Ip6, "flannel-ipv6"))
}

/// True for a chain that flannel made in a table of `iptables`, nftables' or legacy.
pub fn is_flannels_chain(chain: &str) -> bool {
    FLANNEL_CHAINS.contains(&chain)
}

/// What a rule in `POSTROUTING` of a table that `iptables` made tells of a container of `network`, where the reference bridge masquerades it
/// (`pkg/ip/ipmasq_linux.go`): the container's ID, and what was left for it.
pub fn masqueraded(at: &TableName, legacy: bool, rule: &Rule, network: &str) -> Option<(Box<str>, Leftover)> {
    let (comment, last) = (rule.comment.as_deref()?, rule.exprs.last()?);
    let quoted = comment.strip_prefix("name: \"")?.strip_prefix(network)?;
    let id = quoted.strip_prefix("\" id: \"")?.strip_suffix('"')?;
    let Expr::Verdict(Verdict::Jump(chain)) = last else { return None };
    let digits = chain.strip_prefix(PLUGINS_CHAIN.0)?;
    let is_hash = digits.len() == PLUGINS_CHAIN.1 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let at = ChainName { table: at.clone(), chain: chain.clone() };
    is_hash.then(|| (id.into(), Leftover { at, legacy, bare: None, comment: Some(comment.into()) }))
}

/// The network that a rule is for which flannel before 0.20 left in `POSTROUTING` itself (`network/iptables.go`): C → C, C → elsewhere, elsewhere
/// → P, elsewhere → C. An end is its network, and whether it is that or (`false`) is not.
pub fn bare(src: (Prefix, bool), dst: (Prefix, bool), masquerades: bool) -> Option<Prefix> {
    let (network, groups) = (src.0, multicast(src.0.is_v4()));
    let flannels = match (src.1, dst.1, masquerades) {
        (true, true, false) | (false, true, true) => network == dst.0,
        (true, false, true) => dst.0 == groups,
        (false, true, false) => network.covers(&dst.0) && network != dst.0,
        _ => false,
    };
    flannels.then_some(network)
}

/// As [`bare`], for a rule of nftables.
pub fn bare_rule(rule: &Rule) -> Option<Prefix> {
    let (mut src, mut dst, mut masquerades) = (None, None, false);
    for expr in &rule.exprs {
        match expr {
            Expr::Match { load, op: op @ (Cmp::Eq | Cmp::Ne), value } => {
                let end = if matches!(load.field, Field::SrcV4 | Field::SrcV6) { &mut src } else { &mut dst };
                *end = Some((compared_with(load, value)?, *op == Cmp::Eq));
            }
            Expr::Counter | Expr::Verdict(Verdict::Return) => {}
            Expr::Masquerade { .. } => masquerades = true,
            Expr::Xt { target: true, name, .. } if &**name == "MASQUERADE" => masquerades = true,
            _ => return None,
        }
    }
    let ends = rule.exprs.last().is_some_and(|last| masquerades || *last == Expr::Verdict(Verdict::Return));
    bare(src?, dst?, masquerades).filter(|_| ends)
}

/// The chains of a table that are worth reading, with those that they lead to: all of ours, and what may drop what we forward.
pub fn roots(table: &TableName, chains: &BTreeMap<Box<str>, Option<Base>>) -> Vec<Box<str>> {
    let ours = table.is_twills();
    let routed = matches!(table.family, Family::Inet | Family::Ip | Family::Ip6);
    let drops = |base: &Base| (base.kind != ChainKind::Nat || base.drops) && base.hook != Hook::Ingress;
    // The rooms for others, also when nothing leads there any more: rules of ours may be left in them.
    let nat = |name: &str| &*table.name == "nat" && name == POSTROUTING;
    let named = |name: &str| name == DOCKER_USER || is_flannels_chain(name) || nat(name);
    let wanted =
        chains.iter().filter(|(name, base)| ours || routed && (base.as_ref().is_some_and(drops) || named(name)));
    wanted.map(|(name, _)| name.clone()).collect()
}

/// Chains of the kind nat, which may drop too, though hardly anybody's do: thousands of chains may lead from them to services.
pub fn translating(table: &TableName, chains: &BTreeMap<Box<str>, Option<Base>>) -> Vec<Box<str>> {
    let routed = matches!(table.family, Family::Inet | Family::Ip | Family::Ip6) && !table.is_twills();
    let nat = |base: &Base| base.kind == ChainKind::Nat && [Hook::Prerouting, Hook::Postrouting].contains(&base.hook);
    let wanted = chains.iter().filter(|(_, base)| routed && base.as_ref().is_some_and(nat));
    wanted.map(|(name, _)| name.clone()).collect()
}

/// What of ours, and of flannel's, stands in somebody else's table.
pub fn found_in(table: &Table) -> Vec<Object> {
    // One that is named as ours is left alone, whoever made it.
    if table.name.is_twills() {
        return Vec::new();
    }
    let mut found = Vec::new();
    for (name, chain) in &table.chains {
        let at = ChainName { table: table.name.clone(), chain: name.clone() };
        let tagged = |rule: &&Rule| rule.comment.as_deref() == Some(TAG);
        let bare = |rule: &Rule| Rule { handle: None, ..rule.clone() };
        let rules: Vec<Rule> = chain.rules.iter().filter(tagged).map(bare).collect();
        if !rules.is_empty() {
            let first = chain.rules.iter().take(rules.len()).all(|rule| tagged(&rule));
            found.push(Object::Head(Box::new(Head { at: at.clone(), rules, first })));
        }
        if is_flannels_chain(name) {
            found.push(Object::Leftover(Box::new(Leftover {
                at: at.clone(),
                legacy: false,
                bare: None,
                comment: None,
            })));
        }
        if &**name == POSTROUTING {
            let networks: BTreeSet<Prefix> = chain.rules.iter().filter_map(bare_rule).collect();
            let left = |network| Leftover { at: at.clone(), legacy: false, bare: Some(network), comment: None };
            found.extend(networks.into_iter().map(|network| Object::Leftover(Box::new(left(network)))));
        }
    }
    found
}

/// The rules that must stand at the head of others' chains for the networks' packets to pass.
pub fn heads(networks: &[Prefix], have: &HostState) -> Vec<Object> {
    let mut heads = Vec::new();
    for table in foreign_tables(have).filter(|table| table.owner.is_none() && !table.name.is_twills()) {
        let forward = table.chains.iter().filter(|(_, chain)| enters(chain, Hook::Forward));
        let places: BTreeSet<&str> = forward.filter_map(|(name, _)| place(table, name)).collect();
        for chain in places {
            let rules: Vec<Rule> = networks.iter().flat_map(|network| accepts(table.name.family, network)).collect();
            if !rules.is_empty() {
                let at = ChainName { table: table.name.clone(), chain: chain.into() };
                heads.push(Object::Head(Box::new(Head { at, rules, first: true })));
            }
        }
    }
    heads
}

/// Tables that are neither ours nor flannel's, and in force.
pub(super) fn foreign_tables(have: &HostState) -> impl Iterator<Item = &Table> {
    have.iter().filter_map(|(_, object)| match object {
        Object::Table(table) if !table.is_ours() && !is_flannels(&table.name) && !table.dormant => Some(&**table),
        _ => None,
    })
}

fn enters(chain: &Chain, hook: Hook) -> bool {
    chain.base.is_some_and(|base| base.kind == ChainKind::Filter && base.hook == hook)
}

/// The chain to stand in, for a base chain that may drop; `None`: it drops nothing.
fn place<'a>(table: &'a Table, base: &'a str) -> Option<&'a str> {
    let chain = &table.chains[base];
    let policy = chain.base.is_some_and(|base| base.drops);
    // Where the policy drops, so does what ends the way through the chain.
    let ends = |rule: &Rule| policy && rule.exprs.iter().flat_map(Expr::verdicts).any(leaves);
    let first = chain.rules.iter().position(|rule| ends(rule) || may_drop(table, rule)).unwrap_or(chain.rules.len());
    let drops = policy || first < chain.rules.len();
    // Docker's place for the rules of others, unless a drop stands before it, or not everything passes there.
    let to_docker = |rule: &Rule| rule.exprs.iter().flat_map(Expr::leads_to).any(|to| &**to == DOCKER_USER);
    let plain = |rule: &Rule| rule.exprs.iter().all(|expr| matches!(expr, Expr::Counter | Expr::Verdict(_)));
    let docker = chain.rules.iter().position(|rule| to_docker(rule) && plain(rule)).filter(|at| *at <= first);
    drops.then(|| if docker.is_some() { DOCKER_USER } else { base })
}

/// True for a base chain that may drop.
pub fn may_shut(table: &Table, base: &str) -> bool {
    table.chains.contains_key(base) && place(table, base).is_some()
}

/// True for what a base chain's policy decides on.
fn leaves(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Return | Verdict::Goto(_))
}

/// True for a rule of somebody else that drops, or that leads to one.
fn may_drop(table: &Table, rule: &Rule) -> bool {
    let drops = |rule: &Rule| rule.comment.as_deref() != Some(TAG) && rule.exprs.iter().any(is_drop);
    let beyond = rule.exprs.iter().flat_map(Expr::leads_to).flat_map(|to| reached(table, to));
    drops(rule) || beyond.filter_map(|name| table.chains.get(name)).flat_map(|chain| &chain.rules).any(drops)
}

/// A chain and all that it leads to.
pub(super) fn reached<'a>(table: &'a Table, from: &'a str) -> BTreeSet<&'a str> {
    let (mut reached, mut todo) = (BTreeSet::new(), vec![from]);
    while let Some(name) = todo.pop() {
        if reached.insert(name) {
            let exprs = table.chains.get(name).into_iter().flat_map(|chain| chain.rules.iter().flat_map(|r| &r.exprs));
            todo.extend(exprs.flat_map(Expr::leads_to).map(AsRef::as_ref));
        }
    }
    reached
}

/// `drop`, `reject`, a map that leads to one, and the REJECT target of `iptables`.
pub(super) fn is_drop(expr: &Expr) -> bool {
    match expr {
        Expr::Verdict(_) | Expr::Choose { .. } => expr.verdicts().any(|verdict| *verdict == Verdict::Drop),
        Expr::Other { name, .. } => &**name == "reject",
        Expr::Xt { target: true, name, .. } => &**name == "REJECT",
        _ => false,
    }
}

/// Plain comparisons; a table of both families compares the family before.
fn accepts(of: Family, network: &Prefix) -> Vec<Rule> {
    let v4 = network.is_v4();
    if !matches!((of, v4), (Family::Inet, _) | (Family::Ip, true) | (Family::Ip6, false)) {
        return Vec::new();
    }
    let rule = |end| {
        let first = (of == Family::Inet).then(|| family(v4));
        let rest = [within(end, network, true), Expr::Counter, Expr::Verdict(Verdict::Accept)];
        Rule::new(first.into_iter().chain(rest)).comment(TAG)
    };
    [End::Source, End::Destination].map(rule).into()
}

/// The network that an address of the packet is compared with.
pub(super) fn compared_with(load: &Load, value: &Datum) -> Option<Prefix> {
    let Datum::Ip(ip) = value else { return None };
    let address = matches!(load.field, Field::SrcV4 | Field::SrcV6 | Field::DstV4 | Field::DstV6);
    let len = match &load.mask {
        None => load.field.kind().len() as u8 * 8,
        Some(Datum::Ip(mask)) => ip_to_bits(IpAddr::to_canonical(mask)).count_ones() as u8,
        Some(_) => return None,
    };
    Prefix::truncate(*ip, len).ok().filter(|_| address)
}
