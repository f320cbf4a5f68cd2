//! Owned routes that the kernel does not use, because something stands before them.

use std::net::IpAddr;

use crate::host::{HostState, Key, Object, Route, RouteKey, Rule, TABLE_LOCAL, TABLE_MAIN};
use crate::net::{LinkName, Prefix};

use super::{Claim, Desired, Finding};

/// For each owned route of `want` that is there: what keeps the kernel from using it.
///
/// Looked for: a foreign twin before it, a lower metric for the same prefix, a foreign more specific route inside it, and a rule
/// that sends packets to a table with a matching route first. Cost: one range query for each route.
pub fn shadowed(want: &Desired, have: &HostState) -> Vec<Finding> {
    let rules = foreign_rules(have);
    let mut findings = Vec::new();
    for (key, object) in want.host.iter() {
        let (Key::Route(route_key), Object::Route(route)) = (key, object) else { continue };
        if route_key.table != TABLE_MAIN {
            continue;
        }
        findings.extend(twin(route, have).or_else(|| in_main(route, have, &want.claim)));
        findings.extend(rules.iter().filter_map(|rule| by_rule(route, rule, have, &want.claim)));
    }
    findings
}

/// A foreign entry with the same key stands before ours.
fn twin(route: &Route, have: &HostState) -> Option<Finding> {
    let Some(Object::Route(found)) = have.get(&Key::Route(route.key)) else { return None };
    let ours = route.entries.first()?;
    let first = found.entries.first()?;
    let there = found.entries.as_slice().contains(ours);
    (there && first != ours).then(|| finding(route, &format!("a twin stands before it: {found}"), &removal(found)))
}

/// A foreign route for the same prefix with a lower metric, or for a part of it.
fn in_main(route: &Route, have: &HostState, claim: &Claim) -> Option<Finding> {
    let low = |dst: Prefix| Key::Route(RouteKey { table: TABLE_MAIN, dst, tos: 0, metric: 0 });
    let (first, last) = (Prefix::host(route.key.dst.addr()), Prefix::host(route.key.dst.last()));
    let from = Prefix::truncate(first.addr(), 0).ok().filter(|_| route.key.dst.len() == 0).unwrap_or(route.key.dst);
    let to = Key::Route(RouteKey { table: TABLE_MAIN, dst: last, tos: u8::MAX, metric: u32::MAX });
    for (_, object) in have.range(low(from)..=to) {
        let Object::Route(found) = object else { continue };
        let Some(entry) = found.entries.first() else { continue };
        let inside = route.key.dst.covers(&found.key.dst) && found.key.dst != route.key.dst;
        let before = found.key.dst == route.key.dst && (found.key.metric < route.key.metric || found.key.tos != 0);
        if (inside || before) && !claim.owns_entry(found, entry) && entry.protocol != crate::host::PROTO_KERNEL {
            let what = if inside {
                "a more specific route takes its packets"
            } else {
                "a route with a lower metric stands before it"
            };
            return Some(finding(route, &format!("{what}: {found}"), &removal(found)));
        }
    }
    None
}

/// Rules that are looked at before the main table's, other than the kernel's own.
fn foreign_rules(have: &HostState) -> Vec<Rule> {
    let rules = have.iter().filter_map(|(_, object)| match object {
        Object::Rule(rule) => Some(rule),
        _ => None,
    });
    rules
        .filter(|r| r.key.priority < 32_766 && r.table.is_some_and(|t| t != TABLE_MAIN && t != TABLE_LOCAL))
        .cloned()
        .collect()
}

/// A rule's table has a route that takes packets of ours.
fn by_rule(route: &Route, rule: &Rule, have: &HostState, claim: &Claim) -> Option<Finding> {
    let table = rule.table?;
    if rule.key.v6 == route.key.dst.is_v4() {
        return None;
    }
    let first = Key::Route(RouteKey { table, dst: Prefix::DEFAULT_V4, tos: 0, metric: 0 });
    let last = Key::Route(RouteKey { table: table + 1, dst: Prefix::DEFAULT_V4, tos: 0, metric: 0 });
    let taken = have.range(first..last).find_map(|(_, object)| match object {
        Object::Route(found)
            if found.key.dst.overlaps(&route.key.dst)
                && found.entries.first().is_some_and(|e| !claim.owns_entry(found, e) && e.kind != THROW) =>
        {
            Some(found)
        }
        _ => None,
    })?;
    let evidence =
        format!("rule {} ({}) looks into table {table} first, where {taken}", rule.key.priority, rule.key.selector);
    let fix = format!("ip {}rule del priority {}", family(route.key.dst.addr()), rule.key.priority);
    Some(finding(route, &evidence, &fix))
}

/// RTN_THROW: go on with the next rule.
const THROW: u8 = 9;

fn finding(route: &Route, evidence: &str, fix: &str) -> Finding {
    Finding { code: "route-shadowed".into(), object: route.to_string(), evidence: evidence.into(), fix: fix.into() }
}

/// The command that removes the first entry of a route.
fn removal(route: &Route) -> String {
    let RouteKey { table, dst, metric, .. } = route.key;
    let entry = route.entries.first();
    let via = entry.and_then(|e| e.via).map_or(String::new(), |via| format!(" via {via}"));
    let dev = entry.and_then(|e| e.dev).map_or(String::new(), |dev: LinkName| format!(" dev {dev}"));
    let table = if table == TABLE_MAIN { String::new() } else { format!(" table {table}") };
    let metric = if metric == 0 { String::new() } else { format!(" metric {metric}") };
    format!("ip {}route del {dst}{via}{dev}{table}{metric}", family(dst.addr()))
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "" } else { "-6 " }
}
