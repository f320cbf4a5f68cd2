//! Which subnet a node takes: its own again, the one it wishes, or a free one.

use std::net::IpAddr;

use crate::config::{NetworkConfig, Range};
use crate::lease::{Lease, LeaseKey};
use crate::lease_set::LeaseSet;
use crate::net::{MacAddr, NodeId, Prefix};

/// What this node knows of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Me {
    /// Its identity.
    pub node: NodeId,
    /// The addresses that peers are told.
    pub addresses: Vec<IpAddr>,
    /// Subnets that the state file, subnet.env or the live device say were ours.
    pub remembered: Vec<Prefix>,
    /// MACs of the live tunnel devices.
    pub macs: Vec<MacAddr>,
    /// Subnets that were asked for by `--subnet`.
    pub wished: Vec<Prefix>,
}

/// What to do about a subnet.
#[derive(Debug, Clone, PartialEq)]
pub enum Choice {
    /// This lease is ours: keep it.
    Keep(Box<Lease>),
    /// This lease is ours, and the config no longer allows it: give it back, then choose again.
    GiveBack(Box<Lease>),
    /// Nobody has this one: create it.
    Create(LeaseKey),
    /// There is none left, or the one asked for cannot be had.
    Refuse(String),
}

/// True when the lease is this node's: by identity; without one (flannel's) by address and a memory of the subnet. With another
/// identity only when the living device has the very MAC that the lease tells: then it is our identity that was lost.
///
/// docs/decisions/0006 says why.
pub fn is_mine(lease: &Lease, me: &Me) -> bool {
    if lease.attrs.node == Some(me.node) {
        return true;
    }
    let remembered = lease.is_at(&me.addresses) && lease.key.subnets().any(|subnet| me.remembered.contains(&subnet));
    let on_device = || lease.vtep_macs().iter().flatten().any(|mac| me.macs.contains(mac));
    remembered && (lease.attrs.node.is_none() || on_device())
}

/// Decides. `seed` chooses among the free subnets: other nodes that start in the same second have other seeds.
pub fn choose(config: &NetworkConfig, leases: &LeaseSet, me: &Me, seed: u64) -> Choice {
    if let Some(lease) = leases.leases_of(&me.node, &me.remembered).find(|lease| is_mine(lease, me)) {
        let lost = !matches!(leases.standing(&lease.key.to_string()), Some(Ok(_)));
        if lost || !fits(config, &lease.key) {
            return Choice::GiveBack(Box::new(lease));
        }
        if me.wished.iter().all(|wish| lease.key.subnets().any(|s| s == *wish)) {
            return Choice::Keep(Box::new(lease));
        }
        // A good lease is not given away for a subnet that cannot be had.
        let refused = config.ranges().find_map(|range| wished(&range, leases, me, Some(&lease.key))?.err());
        return refused.map_or(Choice::GiveBack(Box::new(lease)), Choice::Refuse);
    }
    let mut key = LeaseKey { v4: None, v6: None };
    for range in config.ranges() {
        let subnet = match pick(&range, leases, me, seed) {
            Ok(subnet) => subnet,
            Err(reason) => return Choice::Refuse(reason),
        };
        if subnet.is_v4() { key.v4 = Some(subnet) } else { key.v6 = Some(subnet) }
    }
    Choice::Create(key)
}

/// True when a winning lease of another node holds what this one still claims, and no lease is this one's: docs/decisions/0006.
pub fn is_lost(leases: &LeaseSet, me: &Me, claimed: &[Prefix]) -> bool {
    let owns = leases.leases_of(&me.node, &me.remembered).any(|lease| is_mine(&lease, me));
    // No subnet is as long as that: a key that does not count is nobody's.
    !owns && leases.held(u8::MAX).any(|held| claimed.iter().any(|ours| ours.overlaps(&held)))
}

fn fits(config: &NetworkConfig, key: &LeaseKey) -> bool {
    let family = |range: Option<Range>, subnet: Option<Prefix>| match (range, subnet) {
        (None, None) => true,
        (Some(range), Some(subnet)) => range.allows(&subnet),
        _ => false,
    };
    family(config.v4, key.v4) && family(config.v6, key.v6)
}

/// The subnet that was asked for, or why it cannot be had; `None`: none was. What our own lease holds is free for us.
fn wished(range: &Range, leases: &LeaseSet, me: &Me, own: Option<&LeaseKey>) -> Option<Result<Prefix, String>> {
    let wish = *me.wished.iter().find(|w| w.is_v4() == range.network.is_v4())?;
    if !range.allows(&wish) {
        let (len, min, max) = (range.subnet_len, range.min, range.max);
        return Some(Err(format!("--subnet {wish} is not a /{len} between {min} and {max}")));
    }
    let ours = |held: &Prefix| own.is_some_and(|key| key.subnets().any(|subnet| subnet == *held));
    let held = leases.held(range.subnet_len).find(|held| held.overlaps(&wish) && !ours(held));
    Some(held.map_or(Ok(wish), |held| Err(format!("--subnet {wish} is held by the lease of {held}"))))
}

/// The wished subnet, the remembered one when it is free, or a free one.
fn pick(range: &Range, leases: &LeaseSet, me: &Me, seed: u64) -> Result<Prefix, String> {
    if let Some(answer) = wished(range, leases, me, None) {
        return answer;
    }
    let taken = |subnet: &Prefix| leases.held(range.subnet_len).find(|held| held.overlaps(subnet));
    if let Some(old) = me.remembered.iter().find(|p| range.allows(p)).filter(|p| taken(p).is_none()) {
        return Ok(*old);
    }
    let gaps = gaps(range, leases);
    let free: u128 = gaps.iter().map(|(_, len)| len).sum();
    if free == 0 {
        let all = format!("no free subnet: all {} from {} to {} are leased", range.count(), range.min, range.max);
        // One key can hold the place of many.
        let wide =
            leases.held(range.subnet_len).find(|held| held.len() < range.subnet_len && held.overlaps(&range.network));
        return Err(match wide {
            None => all,
            Some(held) => format!("{all}; one lease alone holds {held}"),
        });
    }
    let mut nth = u128::from(seed) % free;
    for (first, len) in gaps {
        if nth < len {
            return range.nth(first + nth).ok_or_else(|| "no free subnet".to_owned());
        }
        nth -= len;
    }
    Err("no free subnet".to_owned())
}

/// Runs of free subnets as (first index, length), by walking the held ones in order: no subnet is counted one by one.
fn gaps(range: &Range, leases: &LeaseSet) -> Vec<(u128, u128)> {
    let unit = u32::from(range.network.bits() - range.subnet_len);
    let index = |ip: IpAddr| {
        (crate::net::ip_to_bits(ip) - crate::net::ip_to_bits(range.min.addr())).checked_shr(unit).unwrap_or(0)
    };
    let (mut gaps, mut next) = (Vec::new(), 0u128);
    let count = range.count();
    let end = range.max.last();
    for held in leases
        .held(range.subnet_len)
        .filter(|h| h.is_v4() == range.network.is_v4() && h.last() >= range.min.addr() && h.addr() <= end)
    {
        let first = if held.addr() <= range.min.addr() { 0 } else { index(held.addr()) };
        let last = if held.last() >= end { count - 1 } else { index(held.last()) };
        if first > next {
            gaps.push((next, first - next));
        }
        next = next.max(last + 1);
    }
    if next < count {
        gaps.push((next, count - next));
    }
    gaps
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::RawLease;
    use proptest::prelude::*;

    fn config(json: &str) -> NetworkConfig {
        NetworkConfig::parse(json.as_bytes()).unwrap().0
    }

    fn me(n: u8) -> Me {
        let addresses = vec![IpAddr::from([10, 0, 0, n])];
        Me { node: NodeId([n; 16]), addresses, remembered: vec![], macs: vec![], wished: vec![] }
    }

    fn raw(name: &str, value: &str, rev: i64) -> RawLease {
        RawLease { name: name.into(), value: value.into(), create_rev: rev, mod_rev: rev, etcd_lease: 1 }
    }

    #[test]
    fn a_wide_key_that_loses_or_cannot_be_read_takes_no_place() {
        let config = config(r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan"}}"#);
        let good =
            r#"{"PublicIP":"10.9.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
        let other = good.replace(":09", ":08");
        for (wide, rev) in [("garbage", 1), ("garbage", 9), (other.as_str(), 9)] {
            let mut leases = LeaseSet::default();
            leases.put(raw("10.0.7.0-24", good, 5));
            leases.put(raw("10.0.0.0-16", wide, rev));
            leases.put(raw("10.0.8.0-24", "garbage", 5));
            for seed in 0..600 {
                let Choice::Create(key) = choose(&config, &leases, &me(1), seed) else { panic!("{wide} {rev}") };
                let v4 = key.v4.unwrap().to_string();
                assert!(v4 != "10.0.7.0/24" && v4 != "10.0.8.0/24", "{v4} is a key of the store");
            }
        }
        // A wide one that wins holds all.
        let mut leases = LeaseSet::default();
        leases.put(raw("10.0.0.0-16", good, 1));
        assert!(matches!(choose(&config, &leases, &me(1), 7), Choice::Refuse(_)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn free_subnets_are_those_that_a_walk_finds(held in prop::collection::vec((0u8..64, 22u8..28), 0..20), seed: u64) {
            let config = config(r#"{"Network":"10.0.0.0/20","SubnetLen":24,"SubnetMax":"10.0.13.0","Backend":{"Type":"vxlan"}}"#);
            let mut leases = LeaseSet::default();
            for (n, len) in &held {
                let subnet = Prefix::truncate(IpAddr::from([10, 0, n / 4, (n % 4) * 64]), *len).unwrap();
                leases.put(raw(&format!("{}-{}", subnet.addr(), subnet.len()), "{}", 1));
            }
            let range = config.v4.unwrap();
            let walk: Vec<Prefix> = (0..range.count()).filter_map(|n| range.nth(n))
                .filter(|s| !leases.held(24).any(|h| h.overlaps(s))).collect();
            match choose(&config, &leases, &me(1), seed) {
                Choice::Create(key) => prop_assert!(walk.contains(&key.v4.unwrap())),
                Choice::Refuse(_) => prop_assert!(walk.is_empty()),
                other => prop_assert!(false, "{:?}", other),
            }
            let counted: u128 = gaps(&range, &leases).iter().map(|(_, len)| len).sum();
            prop_assert_eq!(counted, walk.len() as u128);
        }
    }

    #[test]
    fn two_hundred_nodes_share_two_hundred_subnets() {
        let config = config(
            r#"{"Network":"10.0.0.0/16","SubnetMin":"10.0.1.0","SubnetMax":"10.0.200.0","Backend":{"Type":"vxlan"}}"#,
        );
        // Each sees the store as it was when it was last refused: the worst view that compare-and-swap allows.
        let mut store = LeaseSet::default();
        let mut tries = 0;
        for n in 0..200u8 {
            let mut seen = LeaseSet::default();
            let mut seed = u64::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            loop {
                tries += 1;
                let Choice::Create(key) = choose(&config, &seen, &me(n), seed) else { panic!("node {n} gets none") };
                if store.lease(&key.to_string()).is_none() {
                    store.put(raw(&key.to_string(), "{}", i64::from(n) + 1));
                    break;
                }
                seen.put(raw(&key.to_string(), "{}", 1));
                seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            }
        }
        assert_eq!(store.len(), 200);
        assert!(
            matches!(choose(&config, &store, &me(250), 0), Choice::Refuse(_)),
            "after {tries} tries all are leased"
        );
    }

    #[test]
    fn a_subnet_is_lost_to_a_lease_that_counts_and_to_no_other() {
        let json = r#"{"Network":"10.0.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let mut leases = LeaseSet::default();
        leases.follow(crate::backend::Rule::new(&config(json)).unwrap());
        let claimed = ["10.0.7.0/24".parse().unwrap()];
        let theirs =
            r#"{"PublicIP":"10.9.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
        for (value, lost) in [("garbage", false), (theirs, true)] {
            leases.put(raw("10.0.7.0-24", value, 5));
            assert_eq!(is_lost(&leases, &me(1), &claimed), lost, "{value}");
            assert!(!is_lost(&leases, &me(1), &["10.0.8.0/24".parse().unwrap()]));
        }
        let mine = format!(r#"{{"PublicIP":"10.0.0.1","Twill":{{"node":"{}"}}}}"#, NodeId([1; 16]));
        leases.put(raw("10.0.9.0-24", &mine, 6));
        assert!(!is_lost(&leases, &me(1), &claimed), "a lease of our own says what is ours");
    }

    #[test]
    fn a_lease_is_ours_by_identity_or_by_address_and_memory() {
        let node = NodeId([7; 16]);
        let ours =
            Lease::parse(&raw("10.0.1.0-24", &format!(r#"{{"PublicIP":"9.9.9.9","Twill":{{"node":"{node}"}}}}"#), 1))
                .unwrap();
        assert!(is_mine(&ours, &me(7)) && !is_mine(&ours, &me(8)));
        let flannels = Lease::parse(&raw("10.0.1.0-24", r#"{"PublicIP":"10.0.0.7"}"#, 1)).unwrap();
        assert!(!is_mine(&flannels, &me(7)), "the address alone is not enough");
        let remembering = Me { remembered: vec!["10.0.1.0/24".parse().unwrap()], ..me(7) };
        assert!(is_mine(&flannels, &remembering));
        assert!(!is_mine(&flannels, &Me { addresses: vec![], ..remembering.clone() }));
        let value = format!(
            r#"{{"PublicIP":"10.0.0.7","BackendData":{{"VtepMAC":"02:00:00:00:00:07"}},"Twill":{{"node":"{}"}}}}"#,
            NodeId([9; 16])
        );
        let before = Lease::parse(&raw("10.0.1.0-24", &value, 1)).unwrap();
        assert!(!is_mine(&before, &remembering), "another identity at our address is another node");
        let living = Me { macs: vec!["02:00:00:00:00:07".parse().unwrap()], ..remembering };
        assert!(is_mine(&before, &living), "unless our device has its MAC");
        assert!(!is_mine(&before, &Me { remembered: vec![], ..living }));
    }
}
