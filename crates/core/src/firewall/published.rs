//! The table `inet twill-cni`: what the attachments of a node's containers ask of its firewall, and nothing else.
//!
//! ```text
//!   loopback    input, filter        from a bridge that is told to route 127.0.0.0/8, to there, and no answer to who was led: drop
//!   arriving    prerouting, dstnat   to an address of this host: jump published
//!   sent        output, dstnat       the same, by the host itself
//!   published                        one rule for each host port and family: dnat
//!   leaving     postrouting, srcnat  led here by `published`, from the container's own subnet or from loopback: masquerade
//!                                    (ipMasq) from the container to beyond its network: masquerade
//! ```
//! A container that is led to its neighbour answers it directly, and would be taken for a stranger: hence the first part of `leaving`.
//! Every rule's comment is its container and device.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use super::build::{End, address, family, from_device, is, masked, multicast, within};
use super::policy::{DSTNAT, FILTER, SRCNAT, TAG};
use super::{Base, Chain, ChainKind, Cmp, Datum, Expr, Field, Hook, Rule, Table, TableName, Verdict};
use crate::attach::Request;
use crate::net::{Inet, LinkName, Prefix};
use crate::ports::PortMap;

/// Where the rules of host ports stand.
const PUBLISHED: &str = "published";
/// RTN_LOCAL.
const LOCAL: u32 = 2;
/// IPS_DST_NAT (include/uapi/linux/netfilter/nf_conntrack_common.h).
const LED: u32 = 1 << 5;

/// The table for these attachments; `None`: they need none.
pub fn table<'a>(attached: impl IntoIterator<Item = &'a Request>) -> Option<Table> {
    let (mut published, mut led, mut beyond) = (Vec::new(), Vec::new(), Vec::new());
    let mut guarded = BTreeSet::new();
    for request in attached {
        let mine = |rule: Rule| rule.comment(&owner(request));
        for map in &request.ports {
            published.extend(targets(request, map).map(|target| mine(dnat(map, target))));
        }
        if !request.ports.is_empty() {
            let ends = [true, false].into_iter().filter_map(|v4| first(request, v4));
            led.extend(ends.flat_map(hairpin).map(mine));
        }
        guarded.extend(request.loopback_device());
        beyond.extend(masquerade(request).map(mine));
    }
    let mut chains = BTreeMap::new();
    let mut add = |name: &str, base: Option<Base>, rules: Vec<Rule>| {
        if !rules.is_empty() {
            chains.insert(name.into(), Chain { base, rules });
        }
    };
    let base = |kind, hook, priority| Some(Base { kind, hook, priority, drops: false });
    if !published.is_empty() {
        add("arriving", base(ChainKind::Nat, Hook::Prerouting, DSTNAT), vec![to_this_host()]);
        add("sent", base(ChainKind::Nat, Hook::Output, DSTNAT), vec![to_this_host()]);
        add(PUBLISHED, None, published);
    }
    add("loopback", base(ChainKind::Filter, Hook::Input, FILTER), guarded.into_iter().map(guard).collect());
    led.append(&mut beyond);
    add("leaving", base(ChainKind::Nat, Hook::Postrouting, SRCNAT), led);
    let table = |chains| Table {
        name: TableName::twill_cni(),
        comment: Some(TAG.into()),
        dormant: false,
        owner: None,
        others: BTreeSet::new(),
        sets: BTreeMap::new(),
        chains,
    };
    (!chains.is_empty()).then(|| table(chains))
}

/// What of the table `want` the table `have` lacks, or has otherwise, as far as it is `request`'s: for people.
pub fn differences(have: Option<&Table>, want: &Table, request: &Request) -> Vec<String> {
    let Some(have) = have else { return vec![format!("table {} is missing", want.name)] };
    let mut found = Vec::new();
    let rules_of = |table: &Table, chain: &str| -> Vec<Rule> {
        let rules = table.chains.get(chain).map(|chain| chain.rules.clone()).unwrap_or_default();
        rules.into_iter().filter(|rule| rule.comment.as_deref() == Some(&owner(request))).collect()
    };
    for map in &request.ports {
        for target in targets(request, map) {
            let rule = dnat(map, target).comment(&owner(request));
            let there = have.chains.get(PUBLISHED).is_some_and(|chain| chain.rules.contains(&rule));
            if !there {
                found.push(format!("host port {map} does not lead to {target}"));
            }
        }
    }
    for (name, wanted) in &want.chains {
        let is = have.chains.get(name);
        let shared = |chain: &Chain| -> Vec<Rule> {
            chain.rules.iter().filter(|rule| rule.comment.is_none()).cloned().collect()
        };
        let same = is.is_some_and(|is| is.base == wanted.base && shared(is) == shared(wanted));
        if !same {
            found.push(format!("chain {} {name} is missing or altered", want.name));
        } else if &**name != PUBLISHED && rules_of(have, name) != rules_of(want, name) {
            found.push(format!("the container's rules of chain {} {name} are altered", want.name));
        }
    }
    found
}

/// The comment of a container's rules.
fn owner(request: &Request) -> String {
    format!("{}:{}", request.container_id, request.ifname)
}

/// The container's first address of a family.
fn first(request: &Request, v4: bool) -> Option<Inet> {
    request.addresses.iter().find(|inet| inet.addr.is_ipv4() == v4).copied()
}

/// Where a host port leads: one for each family that both have.
fn targets(request: &Request, map: &PortMap) -> impl Iterator<Item = SocketAddr> {
    let families = [true, false].into_iter().filter(|v4| map.is_for(*v4));
    families.filter_map(|v4| first(request, v4)).map(|inet| SocketAddr::new(inet.addr, map.container_port))
}

fn to_this_host() -> Rule {
    Rule::new([is(Field::DstType, Datum::Number(LOCAL)), Expr::Verdict(Verdict::Jump(PUBLISHED.into()))])
}

fn dnat(map: &PortMap, target: SocketAddr) -> Rule {
    let at = map.only_at().map(|ip| is(address(End::Destination, ip.is_ipv4()), Datum::Ip(ip)));
    let port = [
        is(Field::L4Proto, Datum::Byte(map.protocol.number())),
        is(Field::DstPort, Datum::Port(map.host_port)),
        Expr::Counter,
        Expr::Dnat(target),
    ];
    Rule::new([family(target.is_ipv4())].into_iter().chain(at).chain(port))
}

/// Those that must not see the container answer by itself: it and its neighbours, and this host by its loopback address. IPv6 has no
/// way to route that one.
fn hairpin(inet: Inet) -> impl Iterator<Item = Rule> {
    let loopback = Prefix::truncate(IpAddr::from([127, 0, 0, 0]), 8).ok().filter(|_| inet.addr.is_ipv4());
    [inet.network()].into_iter().chain(loopback).map(move |from| {
        Rule::new([
            masked(Field::CtStatus, Datum::Number(LED), Cmp::Ne, Datum::Number(0)),
            family(from.is_v4()),
            within(End::Source, &from, true),
            within(End::Destination, &Prefix::host(inet.addr), true),
            Expr::Counter,
            Expr::Masquerade { fully_random: true },
        ])
    })
}

/// 127.0.0.0/8 is routed on this device for the host alone (`route_localnet`).
fn guard(device: LinkName) -> Rule {
    let loopback = Prefix::truncate(IpAddr::from([127, 0, 0, 0]), 8).map(|net| within(End::Destination, &net, true));
    let stranger = masked(Field::CtStatus, Datum::Number(LED), Cmp::Eq, Datum::Number(0));
    let exprs = [from_device(device), family(true)].into_iter().chain(loopback).chain([stranger]);
    Rule::new(exprs.chain([Expr::Counter, Expr::Verdict(Verdict::Drop)]))
}

/// What leaves the container for elsewhere has the host's address.
fn masquerade(request: &Request) -> impl Iterator<Item = Rule> {
    let asked = request.addresses.iter().filter(|_| !request.masquerade_beyond.is_empty());
    asked.map(|inet| {
        let v4 = inet.addr.is_ipv4();
        let keep = request.masquerade_beyond.iter().filter(move |net| net.is_v4() == v4);
        let keep = keep.map(|net| within(End::Destination, net, false));
        let from = [family(v4), within(End::Source, &Prefix::host(inet.addr), true)];
        let what =
            [within(End::Destination, &multicast(v4), false), Expr::Counter, Expr::Masquerade { fully_random: true }];
        Rule::new(from.into_iter().chain(keep).chain(what))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attach::tests::request;
    use crate::ports::Transport;

    fn lines(table: &Table, chain: &str) -> Vec<String> {
        table.chains[chain].rules.iter().map(ToString::to_string).collect()
    }

    fn published() -> Request {
        let map = |host_ip: &str, protocol| PortMap {
            host_port: 8080,
            container_port: 80,
            protocol,
            host_ip: host_ip.parse().ok(),
        };
        let ports = vec![map("", Transport::Tcp), map("10.0.0.1", Transport::Udp)];
        Request { ports, masquerade_beyond: vec!["10.1.0.0/16".parse().unwrap()], ..request() }
    }

    #[test]
    fn host_ports_lead_to_the_container_in_each_family() {
        let table = table([&published()]).unwrap();
        assert_eq!(
            lines(&table, "published"),
            [
                "meta nfproto 2 meta l4proto 6 th dport 8080 counter dnat to 10.1.15.2:80 comment \"container-1:eth0\"",
                "meta nfproto 10 meta l4proto 6 th dport 8080 counter dnat to [fd00:15::2]:80 comment \"container-1:eth0\"",
                "meta nfproto 2 ip daddr 10.0.0.1 meta l4proto 17 th dport 8080 counter dnat to 10.1.15.2:80 comment \"container-1:eth0\"",
            ]
        );
        assert_eq!(lines(&table, "arriving"), ["fib daddr type 0x2 jump published"]);
        assert_eq!(lines(&table, "sent"), lines(&table, "arriving"));
        assert_eq!(
            lines(&table, "loopback"),
            ["iifname \"cni0\" meta nfproto 2 ip daddr 127.0.0.0/8 ct status & 0x20 == 0x0 counter drop"]
        );
        let of = |from: &str, to: &str, family: u8, ip: &str| {
            format!(
                "ct status & 0x20 != 0x0 meta nfproto {family} {ip} saddr {from} {ip} daddr {to} counter masquerade \
                 fully-random comment \"container-1:eth0\""
            )
        };
        assert_eq!(
            lines(&table, "leaving"),
            [
                of("10.1.15.0/24", "10.1.15.2", 2, "ip"),
                of("127.0.0.0/8", "10.1.15.2", 2, "ip"),
                of("fd00:15::/64", "fd00:15::2", 10, "ip6"),
                "meta nfproto 2 ip saddr 10.1.15.2 ip daddr != 10.1.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade \
                 fully-random comment \"container-1:eth0\""
                    .into(),
                "meta nfproto 10 ip6 saddr fd00:15::2 ip6 daddr != ff00::/8 counter masquerade fully-random comment \
                 \"container-1:eth0\""
                    .into(),
            ]
        );
    }

    #[test]
    fn who_asks_for_nothing_has_no_table_and_the_order_of_files_changes_nothing_of_ones_own() {
        assert_eq!(table([&request()]), None);
        let other = Request { container_id: "other".into(), ..published() };
        let (one, two) = (table([&published(), &other]).unwrap(), table([&other, &published()]).unwrap());
        assert_eq!(differences(Some(&one), &two, &published()), Vec::<String>::new());
    }

    #[test]
    fn every_difference_is_named() {
        let want = table([&published()]).unwrap();
        assert_eq!(differences(None, &want, &published()), ["table inet twill-cni is missing"]);
        let alter = |change: fn(&mut Table)| {
            let mut have = want.clone();
            change(&mut have);
            differences(Some(&have), &want, &published())
        };
        let gone = alter(|have| drop(have.chains.get_mut("published").unwrap().rules.remove(0)));
        assert_eq!(gone, ["host port 8080/tcp does not lead to 10.1.15.2:80"]);
        let gone = alter(|have| have.chains.get_mut("arriving").unwrap().rules.clear());
        assert_eq!(gone, ["chain inet twill-cni arriving is missing or altered"]);
        let gone = alter(|have| drop(have.chains.get_mut("leaving").unwrap().rules.pop()));
        assert_eq!(gone, ["the container's rules of chain inet twill-cni leaving are altered"]);
    }
}
