//! The table `inet twill`: what may leave the network, how, and what may not enter it.
//!
//! ```text
//!   C = the network, P = own subnet; once for each family
//!   sent         output, raw             the tunnel's own datagrams: no connection tracking
//!   heard        prerouting, raw         the same; from the tunnel with a source in P: drop
//!   clamp        forward, mangle         (option) a SYN through the tunnel announces no more than the route's MTU carries
//!   forward      forward, filter         into the tunnel from C but not from P: drop
//!   strangers    input, filter           (udp) to the tunnel's socket from no peer's address: drop, before the socket's queue
//!   leaving      postrouting, srcnat     mark 0x4000: no; to P: no; P → C: no; C → excluded: no; C → elsewhere: yes; elsewhere → C: yes
//! ```
//! With a VXLAN of the kernel strangers are heard: docs/decisions/0016 says why.
//! The order and the meaning of the last chain are flannel's (`pkg/trafficmngr/iptables/iptables.go`), for both families alike.
//! No rule accepts: nothing here drops the rest, and what others drop is answered in their chains (`beside`). What every packet between
//! containers passes is kept short, since each chain costs such a packet one hundredth of its time: few chains, and the rules begin with
//! the devices.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::build::{End, address, compare, family, from_device, is, marked, masked, multicast, to_device, within};
use super::{Base, Chain, ChainKind, Cmp, Datum, Expr, Field, Hook, Load, Rule, Set, Table, TableName, Verdict};
use crate::net::{LinkName, Prefix};

/// Comment of the table and of every rule that we put into the chains of others.
pub const TAG: &str = "twill";

/// flannel's mark for packets that shall keep their source; other bits belong to others.
const KEEP_SOURCE: u32 = 0x4000;
/// Priorities by `nft`'s names (include/uapi/linux/netfilter_ipv4.h).
const RAW: i32 = -300;
const MANGLE: i32 = -150;
pub(super) const DSTNAT: i32 = -100;
pub(super) const FILTER: i32 = 0;
pub(super) const SRCNAT: i32 = 100;
/// SYN and RST of the TCP flags (RFC 9293).
const SYN: u8 = 0x02;
const SYN_RST: u8 = 0x06;
/// IPPROTO_TCP.
const TCP: u8 = 6;
/// IPPROTO_UDP.
const UDP: u8 = 17;

/// The set of the peers' addresses on the underlay, and the chain that drops everybody else.
pub const PEERS: &str = "peers";
/// See [`PEERS`].
pub const STRANGERS: &str = "strangers";

/// What the table depends on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The network of each family in use.
    pub networks: Vec<Prefix>,
    /// Own subnets.
    pub subnets: Vec<Prefix>,
    /// Destinations that see the containers' own addresses (`NoMasqCIDRs`).
    pub excluded: Vec<Prefix>,
    /// Devices that lead to the peers' containers and to nothing else.
    pub tunnels: Vec<LinkName>,
    /// Where peers' datagrams come in on the underlay. Ours go from this address to the same port of a peer.
    pub outer: Vec<SocketAddr>,
    /// The socket of a tunnel in user space: it hears peers and nobody else. Who they are is kept by element, see [`PEERS`].
    pub socket: Option<SocketAddr>,
    /// Masquerade what leaves the network.
    pub masquerade: bool,
    /// Clamp TCP's segment size to the route's MTU.
    pub clamp: bool,
}

impl Policy {
    /// The table that this asks for.
    pub fn table(&self) -> Table {
        let mut chains = BTreeMap::new();
        let mut add = |name: &str, kind, hook, priority, rules: Vec<Rule>| {
            if !rules.is_empty() {
                let base = Some(Base { kind, hook, priority, drops: false });
                chains.insert(name.into(), Chain { base, rules });
            }
        };
        add("sent", ChainKind::Filter, Hook::Output, RAW, self.untracked(End::Source));
        add(
            "heard",
            ChainKind::Filter,
            Hook::Prerouting,
            RAW,
            [self.spoofed(), self.untracked(End::Destination)].concat(),
        );
        add("clamp", ChainKind::Filter, Hook::Forward, MANGLE, self.clamp());
        add("forward", ChainKind::Filter, Hook::Forward, FILTER, self.forward());
        add(STRANGERS, ChainKind::Filter, Hook::Input, FILTER, self.strangers());
        add("leaving", ChainKind::Nat, Hook::Postrouting, SRCNAT, self.masquerade());
        let peers = |at: SocketAddr| (PEERS.into(), Set { v4: at.is_ipv4(), ..Set::default() });
        let sets = self.socket.into_iter().map(peers).collect();
        Table {
            name: TableName::twill(),
            comment: Some(TAG.into()),
            dormant: false,
            owner: None,
            sets,
            others: BTreeSet::new(),
            chains,
        }
    }

    fn subnet(&self, network: &Prefix) -> Option<&Prefix> {
        self.subnets.iter().find(|subnet| network.covers(subnet))
    }

    /// A tunnel's datagrams belong to no connection: each flow goes one way only, under a source port of its own. Tracking them costs
    /// as much as tracking what is inside, and fills the table.
    fn untracked(&self, here: End) -> Vec<Rule> {
        let rule = |at: &SocketAddr| {
            let v4 = at.is_ipv4();
            let ours = is(address(here, v4), Datum::Ip(at.ip()));
            let port = is(Field::DstPort, Datum::Port(at.port()));
            Rule::new([family(v4), ours, is(Field::L4Proto, Datum::Byte(UDP)), port, Expr::Counter, Expr::Notrack])
        };
        self.outer.iter().map(rule).collect()
    }

    /// A peer has no container with an address of ours.
    fn spoofed(&self) -> Vec<Rule> {
        let rule = |tunnel: &LinkName, subnet: &Prefix| {
            let from = [from_device(*tunnel), family(subnet.is_v4()), within(End::Source, subnet, true)];
            ending(from, Verdict::Drop)
        };
        self.subnets.iter().flat_map(|subnet| self.tunnels.iter().map(move |tunnel| rule(tunnel, subnet))).collect()
    }

    fn clamp(&self) -> Vec<Rule> {
        let syn = || {
            let flags = masked(Field::TcpFlags, Datum::Byte(SYN_RST), Cmp::Eq, Datum::Byte(SYN));
            [is(Field::L4Proto, Datum::Byte(TCP)), flags, Expr::Counter, Expr::ClampMaxSeg]
        };
        let ways = |tunnel: &LinkName| [from_device(*tunnel), to_device(*tunnel)];
        let ways = self.tunnels.iter().filter(|_| self.clamp).flat_map(ways);
        ways.map(|way| Rule::new([way].into_iter().chain(syn()))).collect()
    }

    fn forward(&self) -> Vec<Rule> {
        let mut rules = Vec::new();
        for network in &self.networks {
            for (subnet, tunnel) in
                self.subnet(network).into_iter().flat_map(|s| self.tunnels.iter().map(move |t| (s, t)))
            {
                let not_ours = [
                    to_device(*tunnel),
                    family(network.is_v4()),
                    within(End::Source, subnet, false),
                    within(End::Source, network, true),
                    compare(Field::Iif, Cmp::Ne, Datum::Name(*tunnel)),
                ];
                rules.push(ending(not_ours, Verdict::Drop));
            }
        }
        rules
    }

    /// A chain of the input hook sees packets whole, and before the socket's queue: junk takes no room there from peers.
    fn strangers(&self) -> Vec<Rule> {
        let rule = |at: SocketAddr| {
            let v4 = at.is_ipv4();
            let load = Load::from(address(End::Source, v4));
            let to_it = [
                family(v4),
                is(address(End::Destination, v4), Datum::Ip(at.ip())),
                is(Field::L4Proto, Datum::Byte(UDP)),
                is(Field::DstPort, Datum::Port(at.port())),
                Expr::Member { loads: vec![load], set: PEERS.into(), inside: false, keys: Vec::new() },
            ];
            ending(to_it, Verdict::Drop)
        };
        self.socket.into_iter().map(rule).collect()
    }

    fn masquerade(&self) -> Vec<Rule> {
        if !self.masquerade {
            return Vec::new();
        }
        let mut rules = vec![ending([marked(KEEP_SOURCE)], Verdict::Return)];
        for network in &self.networks {
            let of_family = family(network.is_v4());
            let mut keep = |exprs: &[Expr]| {
                rules.push(ending([of_family.clone()].into_iter().chain(exprs.iter().cloned()), Verdict::Return));
            };
            if let Some(subnet) = self.subnet(network) {
                keep(&[within(End::Destination, subnet, true)]);
                keep(&[within(End::Source, subnet, true), within(End::Destination, network, true)]);
            }
            for excluded in self.excluded.iter().filter(|excluded| excluded.is_v4() == network.is_v4()) {
                keep(&[within(End::Source, network, true), within(End::Destination, excluded, true)]);
            }
            let mut change = |ends: [Expr; 2]| {
                let what = [Expr::Counter, Expr::Masquerade { fully_random: true }];
                rules.push(Rule::new([of_family.clone()].into_iter().chain(ends).chain(what)));
            };
            let groups = multicast(network.is_v4());
            change([within(End::Source, network, true), within(End::Destination, &groups, false)]);
            change([within(End::Source, network, false), within(End::Destination, network, true)]);
        }
        rules
    }
}

/// What matches is counted, and that is its end.
fn ending(exprs: impl IntoIterator<Item = Expr>, verdict: Verdict) -> Rule {
    Rule::new(exprs.into_iter().chain([Expr::Counter, Expr::Verdict(verdict)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy {
            networks: vec!["10.1.0.0/16".parse().unwrap(), "fd00:1::/48".parse().unwrap()],
            subnets: vec!["10.1.15.0/24".parse().unwrap(), "fd00:1:0:f::/64".parse().unwrap()],
            excluded: vec!["192.0.2.0/24".parse().unwrap()],
            tunnels: vec!["flannel.1".parse().unwrap()],
            outer: vec!["10.168.0.2:8472".parse().unwrap()],
            socket: None,
            masquerade: true,
            clamp: true,
        }
    }

    fn lines(table: &Table, chain: &str) -> Vec<String> {
        table.chains[chain].rules.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_masquerade_chain_reads_as_flannels_for_both_families() {
        let table = policy().table();
        assert_eq!(
            lines(&table, "leaving"),
            [
                "meta mark & 0x4000 == 0x4000 counter return",
                "meta nfproto 2 ip daddr 10.1.15.0/24 counter return",
                "meta nfproto 2 ip saddr 10.1.15.0/24 ip daddr 10.1.0.0/16 counter return",
                "meta nfproto 2 ip saddr 10.1.0.0/16 ip daddr 192.0.2.0/24 counter return",
                "meta nfproto 2 ip saddr 10.1.0.0/16 ip daddr != 224.0.0.0/4 counter masquerade fully-random",
                "meta nfproto 2 ip saddr != 10.1.0.0/16 ip daddr 10.1.0.0/16 counter masquerade fully-random",
                "meta nfproto 10 ip6 daddr fd00:1:0:f::/64 counter return",
                "meta nfproto 10 ip6 saddr fd00:1:0:f::/64 ip6 daddr fd00:1::/48 counter return",
                "meta nfproto 10 ip6 saddr fd00:1::/48 ip6 daddr != ff00::/8 counter masquerade fully-random",
                "meta nfproto 10 ip6 saddr != fd00:1::/48 ip6 daddr fd00:1::/48 counter masquerade fully-random",
            ]
        );
        assert_eq!(
            [lines(&table, "sent"), lines(&table, "heard")].concat(),
            [
                "meta nfproto 2 ip saddr 10.168.0.2 meta l4proto 17 th dport 8472 counter notrack",
                "iifname \"flannel.1\" meta nfproto 2 ip saddr 10.1.15.0/24 counter drop",
                "iifname \"flannel.1\" meta nfproto 10 ip6 saddr fd00:1:0:f::/64 counter drop",
                "meta nfproto 2 ip daddr 10.168.0.2 meta l4proto 17 th dport 8472 counter notrack",
            ]
        );
        assert_eq!(lines(&table, "forward").len(), 2);
        assert_eq!(lines(&table, "clamp").len(), 2);
    }

    #[test]
    fn who_is_no_peer_is_dropped_at_the_tunnels_socket_alone() {
        let table = Policy { socket: Some("10.168.0.2:8285".parse().unwrap()), ..policy() }.table();
        assert_eq!(
            lines(&table, "strangers"),
            ["meta nfproto 2 ip daddr 10.168.0.2 meta l4proto 17 th dport 8285 ip saddr != @peers counter drop"]
        );
        assert!(table.sets["peers"].v4 && !policy().table().chains.contains_key("strangers"));
    }

    #[test]
    fn what_is_not_asked_for_has_no_chain() {
        let table =
            Policy { masquerade: false, clamp: false, tunnels: Vec::new(), outer: Vec::new(), ..policy() }.table();
        assert_eq!(table.chains.keys().map(AsRef::as_ref).collect::<Vec<&str>>(), <[&str; 0]>::default());
        assert!(table.is_ours());
    }
}
