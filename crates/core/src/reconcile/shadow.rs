//! Owned routes that the kernel does not use, because something stands before them.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::ops::Bound;

use crate::host::{Addr, HostState, Key, Object, Route, RouteKey, Rule, RuleKey, TABLE_LOCAL, TABLE_MAIN};
use crate::net::{LinkName, Prefix};
use crate::words::{protocol, route_kind};

use super::{Claim, Desired, Finding};

/// For each owned route of `want` that is there: what keeps the kernel from using it.
///
/// Looked for: a foreign twin before it, a lower metric for the same prefix, a foreign more specific route inside it, a rule that
/// ends the lookup or finds a route elsewhere first, and that no rule leads to the main table. Cost: one range query for each route.
pub fn shadowed(want: &Desired, have: &HostState) -> Vec<Finding> {
    let (mut findings, mut routes) = (Vec::new(), [Vec::new(), Vec::new()]);
    let kept = kept_subnets(want, have);
    for (key, object) in want.host.iter() {
        let (Key::Route(route_key), Object::Route(route)) = (key, object) else { continue };
        if route_key.table != TABLE_MAIN {
            continue;
        }
        if let Some(addr) = kept.get(&route.key.dst) {
            findings.push(kept_subnet(route, addr));
            continue;
        }
        findings.extend(twin(route, have).or_else(|| in_main(route, have, &want.claim)));
        if have.get(key).is_some() && route.entries.first().is_some_and(|entry| entry.kind == UNICAST) {
            routes[usize::from(!route_key.dst.is_v4())].push(route);
        }
    }
    for (v6, routes) in [false, true].into_iter().zip(&routes) {
        findings.extend(by_rules(v6, routes, have, &want.claim));
    }
    findings
}

/// Subnets of the networks that are a peer's, with the address that a device of this host still has there.
fn kept_subnets<'a>(want: &Desired, have: &'a HostState) -> BTreeMap<Prefix, &'a Addr> {
    let (claim, mut kept) = (&want.claim, BTreeMap::new());
    for (_, object) in have.iter() {
        if let Object::Addr(addr) = object
            && !claim.devices.contains(&addr.link)
            && let Ok(subnet) = Prefix::truncate(addr.inet.addr, addr.inet.len())
            && claim.networks.iter().any(|network| network.covers(&subnet))
            && !claim.subnets.contains(&subnet)
        {
            kept.insert(subnet, addr);
        }
    }
    kept
}

/// A bridge has its subnet still, though a peer holds it now: who removes the bridge's route cuts its containers off. For IPv6 the kernel
/// takes no route at all (net/ipv6/route.c `ip6_validate_gw`: the gateway is the bridge's anycast address).
fn kept_subnet(route: &Route, Addr { link, inet, .. }: &Addr) -> Finding {
    let evidence = format!(
        "{link} has the address {inet}, of a subnet that is another node's now: containers on {link} go on, and until they have ended this node does not reach that node's containers there"
    );
    let v6 = family(inet.addr);
    let fix = format!(
        "end the containers on {link} that are of that subnet; when none is left: ip {v6}addr del {inet} dev {link}"
    );
    finding(route, &evidence, &fix)
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
        // A route with a TOS is for the packets that have it.
        if found.key.tos != 0 {
            continue;
        }
        let before = found.key.dst == route.key.dst && found.key.metric < route.key.metric;
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

/// The rules of one family: which foreign ones are looked at before the main table, and whether anything looks there at all.
fn by_rules(v6: bool, routes: &[&Route], have: &HostState, claim: &Claim) -> Vec<Finding> {
    let Some(first) = routes.first() else { return Vec::new() };
    let rules = have.iter().filter_map(|(_, object)| match object {
        Object::Rule(rule) if rule.key.v6 == v6 => Some(rule),
        _ => None,
    });
    let mut rules: Vec<&Rule> = rules.collect();
    rules.sort_by_key(|rule| rule.key.priority);
    let leads =
        |rule: &Rule| rule.table == Some(TABLE_MAIN) && rule.suppress.is_none_or(|len| first.key.dst.len() > len);
    let main = rules.iter().position(|rule| leads(rule));
    let before = &rules[..main.unwrap_or(rules.len())];
    let end = main.map(|at| rules[at].key.priority);
    let mut findings: Vec<Finding> = before.iter().filter_map(|rule| by_rule(rule, end, routes, have, claim)).collect();
    if main.is_none() {
        let suppressing = rules.iter().find(|rule| rule.table == Some(TABLE_MAIN));
        let (evidence, priority) = match suppressing {
            Some(rule) => (
                format!(
                    "rule {} ({}) takes no route of the main table as short as this one",
                    rule.key.priority, rule.key.selector
                ),
                32765,
            ),
            None => ("no rule leads to the main table: none of its routes is used".into(), 32766),
        };
        let fix = format!("ip {}rule add priority {priority} lookup main", family(first.key.dst.addr()));
        findings.push(finding(first, &evidence, &fix));
    }
    findings
}

/// A rule that ends the lookup, or whose table has a route that takes packets of ours. One finding for all the routes it hides.
/// `main`: the priority of the rule that leads to the main table.
fn by_rule(rule: &Rule, main: Option<u32>, routes: &[&Route], have: &HostState, claim: &Claim) -> Option<Finding> {
    let table = rule.table;
    let over = rule.goto.filter(|target| main.is_some_and(|main| *target > main));
    let ends = ENDS_LOOKUP.contains(&rule.action) || over.is_some();
    if table.is_none() && !ends {
        return None;
    }
    let foreign: Vec<&Route> = table.map_or_else(Vec::new, |table| foreign_routes(table, rule.key.v6, have, claim));
    let takes = |route: &Route| {
        let concerns = rule.to.is_none_or(|to| to.overlaps(&route.key.dst));
        let suppressed = |found: &Route| rule.suppress.is_some_and(|len| found.key.dst.len() <= len);
        let found = foreign
            .iter()
            .find(|found| found.key.dst.overlaps(&route.key.dst) && found.key.tos == 0 && !suppressed(found));
        (concerns && (ends || found.is_some())).then_some(found)
    };
    let mut hidden = routes.iter().filter_map(|route| Some((*route, takes(route)?)));
    let (first, found) = hidden.next()?;
    let what = match (table, found) {
        (Some(table), Some(found)) => format!("looks into table {table} first, where {found}"),
        _ => over.map_or("ends the lookup before the main table".into(), |target| {
            format!("goes on with rule {target}, behind the main table's")
        }),
    };
    let others = match hidden.count() {
        0 => String::new(),
        n => format!(", for {n} more routes too"),
    };
    let RuleKey { priority, selector, .. } = &rule.key;
    let fix = match (table, found) {
        // What the kernel itself has there is needed.
        (Some(TABLE_LOCAL), Some(found)) => removal(found),
        _ => rule_removal(rule),
    };
    let evidence = format!("rule {priority} ({selector}) {what}{others}");
    Some(finding(first, &evidence, &fix))
}

/// The command that removes this very rule: others may have its priority.
fn rule_removal(rule: &Rule) -> String {
    let RuleKey { v6, priority, selector } = &rule.key;
    let act = match (rule.table, rule.goto, rule.action) {
        (Some(table), ..) => format!(" table {table}"),
        (_, Some(target), _) => format!(" goto {target}"),
        (.., action) => format!(" {}", route_kind(action)),
    };
    format!("ip {}rule del {selector} priority {priority}{act}", if *v6 { "-6 " } else { "" })
}

/// The routes of a table that are not ours and end the lookup there.
fn foreign_routes<'a>(table: u32, v6: bool, have: &'a HostState, claim: &Claim) -> Vec<&'a Route> {
    let key = |table| Key::Route(RouteKey { table, dst: Prefix::DEFAULT_V4, tos: 0, metric: 0 });
    let last = table.checked_add(1).map_or(Bound::Unbounded, |next| Bound::Excluded(key(next)));
    let all = have.range((Bound::Included(key(table)), last)).filter_map(|(_, object)| match object {
        Object::Route(route) if route.key.dst.is_v4() != v6 => Some(route),
        _ => None,
    });
    let ends = |route: &&Route| {
        route.entries.first().is_some_and(|entry| !claim.owns_entry(route, entry) && entry.kind != THROW)
    };
    all.filter(ends).collect()
}

/// FR_ACT_BLACKHOLE, FR_ACT_UNREACHABLE, FR_ACT_PROHIBIT.
const ENDS_LOOKUP: [u8; 3] = [6, 7, 8];

/// RTN_UNICAST.
const UNICAST: u8 = 1;
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
    let (kind, proto) = match entry {
        Some(entry) if entry.kind != UNICAST => {
            (format!("{} ", route_kind(entry.kind)), format!(" proto {}", protocol(entry.protocol)))
        }
        _ => (String::new(), String::new()),
    };
    format!("ip {}route del {kind}{dst}{via}{dev}{table}{proto}{metric}", family(dst.addr()))
}

fn family(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "" } else { "-6 " }
}
