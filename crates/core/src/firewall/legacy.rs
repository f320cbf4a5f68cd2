//! Legacy iptables, which nftables does not show, as far as it may drop what we forward: read and reported, never changed.

use std::collections::BTreeSet;

use crate::net::{LinkName, Prefix};
use crate::reconcile::Finding;

/// A chain that packets enter, with the rules of those that it leads to in every case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyChain {
    /// IPv4.
    pub v4: bool,
    /// `filter`, `raw`, `mangle`.
    pub table: &'static str,
    /// `FORWARD`, `PREROUTING`.
    pub name: &'static str,
    /// In order, the policy last. A rule that compares anything but addresses and a device is not among them.
    pub rules: Vec<LegacyRule>,
}

/// A rule that ends a packet's way through the table, or a policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegacyRule {
    /// The chain that it stands in.
    pub chain: Box<str>,
    /// Source and destination.
    pub ends: (Prefix, Prefix),
    /// The device that the packet comes in by, or (`false`) must not come in by.
    pub from: Option<(Box<str>, bool)>,
    /// It has a comment, which who deletes it has to repeat.
    pub commented: bool,
    /// It drops or rejects; else it accepts.
    pub drops: bool,
}

/// What legacy iptables drops of our networks' packets, with the commands that let them pass.
pub fn findings(networks: &[Prefix], tunnels: &BTreeSet<LinkName>, chains: &[LegacyChain]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for chain in chains {
        let ours = networks.iter().filter(|network| network.is_v4() == chain.v4);
        match chain.name {
            "FORWARD" => {
                findings.extend(ours.filter(|network| drops(chain, network)).map(|network| forward(chain, network)));
            }
            _ => {
                let ours: Vec<&Prefix> = ours.collect();
                let hit =
                    chain.rules.iter().enumerate().filter(|(n, rule)| hits(rule, &chain.rules[..*n], &ours, tunnels));
                findings.extend(hit.map(|(_, rule)| early(chain, rule)));
                let shut = tunnels.iter().filter(|tunnel| !ours.is_empty() && shuts(chain, tunnel));
                findings.extend(shut.map(|tunnel| shut_to(chain, tunnel)));
            }
        }
    }
    findings
}

/// True when something of what comes from the network, or goes to it, is dropped. What compares a device is left out of account.
fn drops(chain: &LegacyChain, network: &Prefix) -> bool {
    let dropped = |turn: fn(&(Prefix, Prefix)) -> (Prefix, Prefix)| {
        let all = chain.rules.iter().filter(|rule| rule.from.is_none());
        let anyhow = all.map(|rule| (rule, turn(&rule.ends))).filter(|(_, (_, other))| other.len() == 0);
        let mut ends =
            anyhow.filter(|(rule, (this, _))| if rule.drops { this.overlaps(network) } else { this.covers(network) });
        ends.next().is_some_and(|(rule, _)| rule.drops)
    };
    dropped(|ends| *ends) || dropped(|(src, dst)| (*dst, *src))
}

/// True for a rule that names an address of ours, drops, may meet what comes through the tunnel, and is reached.
fn hits(rule: &LegacyRule, before: &[LegacyRule], networks: &[&Prefix], tunnels: &BTreeSet<LinkName>) -> bool {
    let (src, dst) = &rule.ends;
    let named = [src, dst].iter().any(|end| end.len() > 0 && networks.iter().any(|network| network.overlaps(end)));
    let elsewhere = rule.from.as_ref().is_some_and(|(device, is)| {
        let tunnel = tunnels.iter().any(|tunnel| tunnel.as_str() == &**device);
        tunnel != *is
    });
    let accepted = |other: &LegacyRule| {
        !other.drops && other.from.is_none() && other.ends.0.covers(src) && other.ends.1.covers(dst)
    };
    rule.drops && named && !elsewhere && !before.iter().any(accepted)
}

/// True for a chain that drops what comes by a device whatever it is.
fn shuts(chain: &LegacyChain, tunnel: &LinkName) -> bool {
    let whatever = |rule: &&LegacyRule| {
        let from = rule.from.as_ref().is_none_or(|(device, is)| (tunnel.as_str() == &**device) == *is);
        from && rule.ends.0.len() == 0 && rule.ends.1.len() == 0
    };
    chain.rules.iter().find(whatever).is_some_and(|rule| rule.drops)
}

fn program(chain: &LegacyChain) -> &'static str {
    if chain.v4 { "iptables-legacy" } else { "ip6tables-legacy" }
}

fn object(chain: &LegacyChain) -> String {
    let table = if chain.table == "filter" { String::new() } else { format!(" of table {}", chain.table) };
    format!("legacy {} chain {}{table}", if chain.v4 { "iptables" } else { "ip6tables" }, chain.name)
}

fn forward(chain: &LegacyChain, network: &Prefix) -> Finding {
    let table = if chain.table == "filter" { String::new() } else { format!(" -t {}", chain.table) };
    let insert = |end: &str| format!("{}{table} -I FORWARD {end} {network} -j ACCEPT", program(chain));
    Finding {
        code: "legacy-drops-forward".into(),
        object: object(chain),
        evidence: format!(
            "it drops forwarded packets, and no rule before that accepts {network}; nftables cannot override it"
        ),
        fix: format!("{}; {}", insert("-s"), insert("-d")),
    }
}

fn shut_to(chain: &LegacyChain, tunnel: &LinkName) -> Finding {
    Finding {
        code: "dropped-before-forward".into(),
        object: object(chain),
        evidence: format!("it drops what comes through {tunnel}: no rule before accepts it"),
        fix: format!("{} -t {} -I {} -i {tunnel} -j ACCEPT", program(chain), chain.table, chain.name),
    }
}

fn early(chain: &LegacyChain, rule: &LegacyRule) -> Finding {
    let LegacyRule { chain: name, ends: (src, dst), from, .. } = rule;
    let mut words = String::new();
    for (option, end) in [("-s", src), ("-d", dst)].iter().filter(|(_, end)| end.len() > 0) {
        words.push_str(&format!("{option} {end} "));
    }
    if let Some((device, is)) = from {
        words.push_str(&format!("{}-i {device} ", if *is { "" } else { "! " }));
    }
    let (program, table) = (program(chain), chain.table);
    let fix = if rule.commented {
        format!("find it with `{program} -t {table} -S {name}`, then delete it with `{program} -t {table} -D …`")
    } else {
        format!(
            "{program} -t {table} -D {name} {words}-j DROP; where docker made it: start dockerd with --allow-direct-routing"
        )
    };
    Finding {
        code: "dropped-before-forward".into(),
        object: object(chain),
        evidence: format!("`-A {name} {words}-j DROP` drops packets for containers that come through the tunnel"),
        fix,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(src: &str, dst: &str, drops: bool) -> LegacyRule {
        let ends = (src.parse().unwrap(), dst.parse().unwrap());
        LegacyRule { chain: "FORWARD".into(), ends, from: None, commented: false, drops }
    }

    fn named(rules: &[LegacyRule]) -> usize {
        let chain = LegacyChain { v4: true, table: "filter", name: "FORWARD", rules: rules.to_vec() };
        findings(&["10.1.0.0/16".parse().unwrap()], &BTreeSet::new(), &[chain]).len()
    }

    const ALL: &str = "0.0.0.0/0";

    #[test]
    fn the_order_of_rules_decides() {
        let (from, to) = (rule("10.0.0.0/8", ALL, false), rule(ALL, "10.1.0.0/16", false));
        let policy = rule(ALL, ALL, true);
        assert_eq!(named(&[from.clone(), to.clone(), policy.clone()]), 0);
        assert_eq!(named(&[from.clone(), policy.clone(), to.clone()]), 1, "an accept behind the drop");
        assert_eq!(named(&[from.clone(), policy.clone()]), 1, "one way alone");
        assert_eq!(named(&[rule(ALL, "10.1.15.0/24", true), rule(ALL, ALL, false)]), 1, "a part of the network");
        assert_eq!(
            named(&[rule("192.0.2.0/24", "10.1.15.0/24", true), rule(ALL, ALL, false)]),
            0,
            "two ends: somebody's will"
        );
        let device = LegacyRule { from: Some(("eth0".into(), true)), ..policy };
        assert_eq!(named(&[device, rule(ALL, ALL, false)]), 0);
    }
}
