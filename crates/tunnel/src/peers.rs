//! Who stands for which inner addresses.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use twill_core::backend::TunnelPeer;
use twill_core::net::{Prefix, ip_to_bits};

use crate::counters::{Counters, PeerCounters, PeerSnapshot};

/// All peers, for lookup by longest prefix: one step for each prefix length that occurs, however many peers there are.
#[derive(Debug, Default)]
pub struct Peers {
    all: Vec<Peer>,
    /// By family and length, longest first.
    lengths: Vec<Level>,
    /// The first peer at each address.
    hosts: HashMap<IpAddr, usize>,
}

#[derive(Debug)]
struct Level {
    v4: bool,
    len: u8,
    nets: HashMap<u128, usize>,
}

/// One peer.
#[derive(Debug)]
pub struct Peer {
    /// As the backend told it.
    pub told: TunnelPeer,
    /// Where its datagrams go.
    pub to: SocketAddr,
    pub(crate) counters: Arc<PeerCounters>,
}

impl Peer {
    /// True for an inner address of its own.
    pub(crate) fn holds(&self, inner: IpAddr) -> bool {
        self.told.subnets.iter().any(|subnet| subnet.contains(inner))
    }
}

impl Peers {
    /// These peers, all listening on `port`. Of two that name one subnet the first counts; leases that overlap never come here.
    pub fn new(peers: impl IntoIterator<Item = TunnelPeer>, port: u16) -> Self {
        let mut new = Self::default();
        for told in peers {
            let number = new.all.len();
            for subnet in &told.subnets {
                new.level(subnet).nets.entry(ip_to_bits(subnet.addr())).or_insert(number);
            }
            new.hosts.entry(told.host).or_insert(number);
            let to = SocketAddr::new(told.host, port);
            new.all.push(Peer { told, to, counters: Arc::default() });
        }
        new.lengths.sort_by_key(|level| std::cmp::Reverse(level.len));
        new
    }

    fn level(&mut self, prefix: &Prefix) -> &mut Level {
        let (v4, len) = (prefix.is_v4(), prefix.len());
        let place = self.lengths.iter().position(|level| (level.v4, level.len) == (v4, len));
        let place = place.unwrap_or_else(|| {
            self.lengths.push(Level { v4, len, nets: HashMap::new() });
            self.lengths.len() - 1
        });
        &mut self.lengths[place]
    }

    /// The peer that stands for an inner address.
    pub fn of(&self, inner: IpAddr) -> Option<&Peer> {
        self.position(inner).map(|number| self.at(number))
    }

    /// A peer by its [`Peers::position`].
    pub(crate) fn at(&self, position: usize) -> &Peer {
        &self.all[position]
    }

    /// Where the peer that stands for an inner address is.
    pub(crate) fn position(&self, inner: IpAddr) -> Option<usize> {
        let bits = ip_to_bits(inner);
        let (v4, width) = if inner.is_ipv4() { (true, 32) } else { (false, 128) };
        let levels = self.lengths.iter().filter(|level| level.v4 == v4);
        let hit = |level: &Level| {
            let host = width - u32::from(level.len);
            let net = bits.checked_shr(host).unwrap_or(0).checked_shl(host).unwrap_or(0);
            level.nets.get(&net).copied()
        };
        levels.filter_map(hit).next()
    }

    /// The first peer whose datagrams may come from `host`; their port does not matter, behind a NAT it is any.
    pub fn at_host(&self, host: IpAddr) -> Option<&Peer> {
        self.hosts.get(&host).map(|number| self.at(*number))
    }

    /// The counters of all of them at one moment.
    pub fn snapshots(&self) -> Vec<PeerSnapshot> {
        self.all.iter().map(|peer| peer.counters.snapshot(&peer.told.name, peer.told.host)).collect()
    }

    /// With the counters that these peers had before.
    pub(crate) fn counted(mut self, counters: &Counters) -> Self {
        counters.keep(self.all.iter_mut().map(|peer| (peer.told.name.as_str(), &mut peer.counters)));
        self
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(name: &str, host: &str, subnets: &[&str]) -> TunnelPeer {
        let subnets = subnets.iter().map(|s| s.parse().unwrap()).collect();
        TunnelPeer { name: name.into(), host: host.parse().unwrap(), subnets }
    }

    #[test]
    fn the_longest_prefix_wins_in_each_family() {
        let told = [
            peer("wide", "10.0.0.1", &["10.1.0.0/16", "::/0"]),
            peer("narrow", "10.0.0.2", &["10.1.2.0/24", "fd00::/64"]),
            peer("host", "10.0.0.3", &["10.1.2.3/32", "fd00::3/128"]),
        ];
        let peers = Peers::new(told, 8285);
        let name = |ip: &str| peers.of(ip.parse().unwrap()).map(|p| p.told.name.as_str());
        assert_eq!(name("10.1.2.3"), Some("host"));
        assert_eq!(name("10.1.2.4"), Some("narrow"));
        assert_eq!(name("10.1.3.4"), Some("wide"));
        assert_eq!(name("10.2.0.0"), None);
        assert_eq!(name("fd00::3"), Some("host"));
        assert_eq!(name("fd00::4"), Some("narrow"));
        assert_eq!(name("fd01::4"), Some("wide"));
    }

    /// The same answer by looking at everybody: of the longest prefixes that hold it the first one's.
    fn slow(peers: &[TunnelPeer], inner: IpAddr) -> Option<usize> {
        let all = peers.iter().enumerate().flat_map(|(n, peer)| peer.subnets.iter().map(move |subnet| (n, subnet)));
        let holding = all.filter(|(_, subnet)| subnet.contains(inner));
        // Of equals `max_by_key` takes the last: they come backwards.
        holding.collect::<Vec<_>>().into_iter().rev().max_by_key(|(_, subnet)| subnet.len()).map(|(n, _)| n)
    }

    /// Addresses that lie close together, so that prefixes hold each other.
    fn address() -> impl Strategy<Value = IpAddr> {
        let near = proptest::array::uniform3(prop_oneof![Just(0u8), Just(1), Just(128), any::<u8>()]);
        (near, any::<bool>()).prop_map(|([a, b, c], v4)| {
            if v4 {
                IpAddr::from([10, a, b, c])
            } else {
                let mut bytes = [0; 16];
                (bytes[0], bytes[1], bytes[7], bytes[15]) = (0xfd, a, b, c);
                IpAddr::from(bytes)
            }
        })
    }

    fn subnet() -> impl Strategy<Value = Prefix> {
        (address(), any::<u8>()).prop_map(|(address, len)| {
            let bits = if address.is_ipv4() { 32 } else { 128 };
            Prefix::truncate(address, len % (bits + 1)).unwrap()
        })
    }

    proptest! {
        #[test]
        fn lookup_is_that_of_the_slow_twin(
            subnets in proptest::collection::vec(proptest::collection::vec(subnet(), 0..4), 0..40),
            asked in proptest::collection::vec(address(), 1..60),
        ) {
            let told: Vec<TunnelPeer> = subnets.into_iter().enumerate().map(|(n, subnets)| {
                TunnelPeer { name: n.to_string(), host: IpAddr::from([192, 0, 2, (n % 7) as u8]), subnets }
            }).collect();
            let peers = Peers::new(told.clone(), 8285);
            for inner in asked {
                prop_assert_eq!(peers.position(inner), slow(&told, inner), "{}", inner);
                prop_assert_eq!(peers.of(inner).map(|peer| peer.holds(inner)), slow(&told, inner).map(|_| true));
            }
            for host in (0..8).map(|n| IpAddr::from([192, 0, 2, n])) {
                let first = told.iter().find(|peer| peer.host == host);
                prop_assert_eq!(peers.at_host(host).map(|peer| &peer.told), first);
            }
        }
    }
}
