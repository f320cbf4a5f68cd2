//! What drops, in words, with the command that ends it.
//!
//! A rule about something of ours, or about a part of it, is deleted; before anything else an accept is put, since more depends on it.

use std::collections::{BTreeMap, BTreeSet};

use super::packet::Way;
use super::samples::{Ends, Scene};
use super::{Hits, Place};
use crate::firewall::{Family, Hook};
use crate::net::Prefix;
use crate::reconcile::Finding;

/// The chains that `iptables` makes.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

pub(super) fn findings(
    scene: &Scene,
    places: &BTreeMap<Place<'_>, Hits>,
    program: &dyn Fn(u32) -> Option<String>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut owned = BTreeSet::new();
    // One accept answers all that a chain drops.
    let mut answered = BTreeSet::new();
    for (place, hits) in places {
        // Our rules stand at the head of these (`beside`), or cannot, and that is told.
        if place.at.hook == Hook::Forward && !place.source.legacy {
            let table = &place.source.table.name;
            if let Some(owner) = place.source.table.owner.filter(|_| owned.insert(table)) {
                findings.push(table_owned(scene, place, owner, program(owner)));
            }
            continue;
        }
        let rule = place.rule.map(|n| scene.named(&place.source.table.chains[place.chain].rules[n]));
        let rule = rule.as_ref();
        let whole = hits.whole();
        // Who keeps containers from leaving by a rule about them, or for a part, means it.
        let inside = hits.ways.iter().any(|((way, _), _)| !matches!(way, Way::Leaves | Way::Returns));
        if !inside && (!whole || rule.is_some_and(|rule| scene.is_about_us(rule))) {
            continue;
        }
        let delete = rule.filter(|rule| place.at.hook != Hook::Forward && scene.is_about_us(rule) || !whole);
        let fix = match delete {
            Some(rule) => delete_rule(place, rule.handle),
            None => accepts(scene, place, hits).join("; "),
        };
        if delete.is_none() && !answered.insert(fix.clone()) {
            continue;
        }
        let what = dropped(scene, hits);
        let text = rule.map_or_else(|| "its policy".into(), |rule| format!("`{rule}`"));
        let place_text = if place.chain == place.base { String::new() } else { format!(" in chain {}", place.chain) };
        let docker = &*place.source.table.name.name == "raw" && delete.is_some();
        let docker = if docker {
            "; docker from 28 on writes such rules, until dockerd runs with --allow-direct-routing"
        } else {
            ""
        };
        let verb = if whole { "drops" } else { "may drop some of" };
        findings.push(Finding {
            code: code(place, hits, whole).into(),
            object: object(place),
            evidence: format!("{text}{place_text} {verb} {what}{docker}"),
            fix,
        });
    }
    findings
}

/// Nobody but its owner may change such a table (NFT_TABLE_F_OWNER).
fn table_owned(scene: &Scene, place: &Place<'_>, owner: u32, program: Option<String>) -> Finding {
    let table = &place.source.table.name;
    let both = scene.families.iter().flat_map(|ends| way_of(Way::In, Hook::Forward, ends));
    let accepts: Vec<String> = both.map(|accept| command(place, &accept)).collect();
    let (owner, end) = match program {
        Some(name) => (format!("{name} (process {owner})"), format!("kill {owner}")),
        None => (format!("the program with the netlink port {owner}"), "end it".into()),
    };
    Finding {
        code: "table-owned".into(),
        object: format!("table {table}"),
        evidence: format!(
            "chain {} drops what containers forward, and {owner} alone may change the table (flags owner): no accept can be put there",
            place.base
        ),
        fix: format!("{end} # with it the table goes; or let it do: {}", accepts.join("; ")),
    }
}

fn code(place: &Place<'_>, hits: &Hits, whole: bool) -> &'static str {
    if !whole {
        return "may-drop";
    }
    if hits.ways.iter().any(|((way, _), whole)| *whole && matches!(way, Way::Heard | Way::Sent)) {
        return "tunnel-dropped";
    }
    match place.at.hook {
        Hook::Forward => "legacy-drops-forward",
        Hook::Postrouting => "dropped-after-forward",
        _ => "dropped-before-forward",
    }
}

fn object(place: &Place<'_>) -> String {
    let table = &place.source.table.name;
    if !place.source.legacy {
        return format!("chain {table} {}", place.chain);
    }
    let of = if &*table.name == "filter" { String::new() } else { format!(" of table {}", table.name) };
    format!("legacy {} chain {}{of}", if table.family == Family::Ip { "iptables" } else { "ip6tables" }, place.chain)
}

/// What is dropped, for people.
fn dropped(scene: &Scene, hits: &Hits) -> String {
    let whole = hits.whole();
    let ways = hits.ways.iter().filter(|(_, all)| **all == whole).map(|(way, _)| *way);
    let tunnel = |v4: bool| scene.families.iter().find(|ends| ends.network.is_v4() == v4).map(|ends| ends.tunnel);
    let texts: BTreeSet<String> = ways
        .map(|(way, v4)| {
            let tunnel = tunnel(v4).map_or_else(|| "the tunnel".into(), |name| name.to_string());
            match way {
                Way::In => format!("what comes through {tunnel} for containers"),
                Way::Out => format!("what containers send through {tunnel}"),
                Way::Leaves => "what containers send beyond the network".into(),
                Way::Returns => "what comes back to them from beyond".into(),
                Way::Heard => "the tunnel's datagrams that come in".into(),
                Way::Sent => "the tunnel's datagrams that go out".into(),
            }
        })
        .collect();
    texts.into_iter().collect::<Vec<_>>().join(", ")
}

/// The program of `iptables`, for a table that it made.
fn program(place: &Place<'_>) -> Option<&'static str> {
    let family = place.source.table.name.family;
    match (family, place.source.legacy) {
        (Family::Ip, true) => Some("iptables-legacy -w"),
        (Family::Ip6, true) => Some("ip6tables-legacy -w"),
        (Family::Ip, false) if BUILT_IN.contains(&place.base) => Some("iptables-nft"),
        (Family::Ip6, false) if BUILT_IN.contains(&place.base) => Some("ip6tables-nft"),
        _ => None,
    }
}

/// ` -t raw`; what is `filter` need not be said.
fn option(place: &Place<'_>) -> String {
    let table = &place.source.table.name.name;
    if &**table == "filter" { String::new() } else { format!(" -t {table}") }
}

fn delete_rule(place: &Place<'_>, handle: Option<u64>) -> String {
    match (handle, program(place), place.rule) {
        (None, Some(program), Some(n)) => format!("{program}{} -D {} {}", option(place), place.chain, n + 1),
        _ => {
            let table = &place.source.table.name;
            format!("nft delete rule {table} {} handle {}", place.chain, handle.unwrap_or_default())
        }
    }
}

/// Rules at the head of the hook's chain that let pass what it drops.
fn accepts(scene: &Scene, place: &Place<'_>, hits: &Hits) -> Vec<String> {
    let mut all = BTreeSet::new();
    for (way, v4) in hits.ways.keys() {
        if let Way::Heard | Way::Sent = way {
            let ports = scene.outer.iter().filter(|(at, _)| at.is_ipv4() == *v4).map(|(at, _)| at.port());
            all.extend(ports.map(Accept::Port));
        }
        for ends in scene.families.iter().filter(|ends| ends.network.is_v4() == *v4) {
            all.extend(way_of(*way, place.at.hook, ends));
        }
    }
    all.into_iter().map(|accept| command(place, &accept)).collect()
}

/// What an accept compares.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Accept {
    From(Prefix),
    To(Prefix),
    Iif(crate::net::LinkName),
    Oif(crate::net::LinkName),
    Port(u16),
}

fn way_of(way: Way, hook: Hook, ends: &Ends) -> Vec<Accept> {
    match (way, hook) {
        // Both, whichever was seen: answers go the other way.
        (Way::In | Way::Out | Way::Leaves | Way::Returns, Hook::Forward) => {
            vec![Accept::From(ends.network), Accept::To(ends.network)]
        }
        (Way::In, Hook::Prerouting) => vec![Accept::Iif(ends.tunnel)],
        (Way::In, _) => vec![Accept::To(ends.subnet)],
        (Way::Out, Hook::Prerouting) => vec![Accept::From(ends.subnet)],
        (Way::Out, _) => vec![Accept::Oif(ends.tunnel)],
        (Way::Heard | Way::Sent | Way::Leaves | Way::Returns, _) => Vec::new(),
    }
}

fn command(place: &Place<'_>, accept: &Accept) -> String {
    if let Some(program) = program(place) {
        let words = match accept {
            Accept::From(net) => format!("-s {net}"),
            Accept::To(net) => format!("-d {net}"),
            Accept::Iif(name) => format!("-i {name}"),
            Accept::Oif(name) => format!("-o {name}"),
            Accept::Port(port) => format!("-p udp --dport {port}"),
        };
        return format!("{program}{} -I {} {words} -j ACCEPT", option(place), place.base);
    }
    let ip = |net: &Prefix| if net.is_v4() { "ip" } else { "ip6" };
    let words = match accept {
        Accept::From(net) => format!("{} saddr {net}", ip(net)),
        Accept::To(net) => format!("{} daddr {net}", ip(net)),
        Accept::Iif(name) => format!("iifname {name}"),
        Accept::Oif(name) => format!("oifname {name}"),
        Accept::Port(port) => format!("udp dport {port}"),
    };
    format!("nft insert rule {} {} {words} accept", place.source.table.name, place.base)
}
