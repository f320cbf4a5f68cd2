//! All leases of the store, and which of them count.
//!
//! Of two leases that collide (a subnet, or the MAC of the tunnel device), the one with the lower create revision wins, then the
//! smaller key. One that loses beats nobody, and neither does one that no node programs: broken, of another backend, outside the
//! network. So a changed lease concerns just itself, the younger ones that it collides with, and those that hang on them in turn: among
//! ten thousand leases a change costs microseconds. Values are kept as bytes and read when they are asked for; that is the compact form.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::backend::Rule;
use crate::lease::{Lease, LeaseKey, PeerFault, RawLease};
use crate::net::{MacAddr, NodeId, Prefix};

/// A lease as kept: without its name.
#[derive(Debug, Clone)]
struct Entry {
    /// It could be read, and the rule takes it: only then it can win.
    counts: bool,
    macs: [Option<MacAddr>; 2],
    value: Box<[u8]>,
    create_rev: i64,
    mod_rev: i64,
    etcd_lease: i64,
}

/// How far a chain of collisions is followed; whoever stands beyond it is taken to win, on every node alike.
const DEEPEST: u32 = 64;

/// A lease's name, e.g. `10.1.15.0-24`: kept once, by everybody who speaks of the lease.
pub type LeaseName = Arc<str>;

/// The leases of a store, by name.
#[derive(Debug, Default)]
pub struct LeaseSet {
    rule: Option<Rule>,
    entries: BTreeMap<LeaseName, Entry>,
    by_subnet: BTreeSet<(Prefix, LeaseName)>,
    by_mac: BTreeSet<(MacAddr, LeaseName)>,
    /// How many subnets of each family and length there are: nobody looks for a wider one where none is.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl LeaseSet {
    /// Which leases count from now on; any verdict may differ then. Without a rule each that can be read does.
    pub fn follow(&mut self, rule: Rule) {
        if self.rule.as_ref() == Some(&rule) {
            return;
        }
        for (name, e) in &mut self.entries {
            let lease = Lease::read(name, &e.value, (e.create_rev, e.mod_rev, e.etcd_lease));
            e.counts = lease.is_ok_and(|lease| rule.accepts(&lease).is_ok());
        }
        self.rule = Some(rule);
    }

    /// Takes in a written lease; gives the names whose verdict may differ now.
    pub fn put(&mut self, raw: RawLease) -> BTreeSet<LeaseName> {
        let mut concerned = self.remove(&raw.name);
        concerned.insert(self.insert(raw));
        self.and_younger(concerned)
    }

    /// Forgets a lease; gives the names whose verdict may differ now.
    pub fn delete(&mut self, name: &str) -> BTreeSet<LeaseName> {
        let concerned = self.remove(name);
        self.and_younger(concerned)
    }

    /// Replaces all; gives the names whose verdict may differ now: those that are gone, new or changed, and what they collide with.
    pub fn reset(&mut self, raws: Vec<RawLease>) -> BTreeSet<LeaseName> {
        let listed: BTreeSet<&str> = raws.iter().map(|raw| raw.name.as_str()).collect();
        let gone: Vec<LeaseName> = self.entries.keys().filter(|name| !listed.contains(&***name)).cloned().collect();
        let mut concerned: BTreeSet<LeaseName> = gone.iter().flat_map(|name| self.remove(name)).collect();
        for raw in raws {
            let known = self.entries.get(raw.name.as_str());
            if known.is_none_or(|e| (e.mod_rev, e.create_rev) != (raw.mod_rev, raw.create_rev)) {
                concerned.append(&mut self.remove(&raw.name));
                concerned.insert(self.insert(raw));
            }
        }
        // Maps that grew in key order are half empty.
        self.entries = std::mem::take(&mut self.entries).into_iter().collect();
        self.by_subnet = std::mem::take(&mut self.by_subnet).into_iter().collect();
        self.by_mac = std::mem::take(&mut self.by_mac).into_iter().collect();
        self.and_younger(concerned)
    }

    /// Adds a lease that is not there.
    fn insert(&mut self, raw: RawLease) -> LeaseName {
        let lease = Lease::parse(&raw).ok();
        let entry = Entry {
            counts: lease.as_ref().is_some_and(|lease| self.accepts(lease).is_ok()),
            macs: lease.as_ref().map_or([None; 2], Lease::vtep_macs),
            value: raw.value.into(),
            create_rev: raw.create_rev,
            mod_rev: raw.mod_rev,
            etcd_lease: raw.etcd_lease,
        };
        let name = LeaseName::from(raw.name);
        for subnet in subnets(&name) {
            self.by_subnet.insert((subnet, name.clone()));
            *self.lengths.entry((subnet.is_v4(), subnet.len())).or_default() += 1;
        }
        for mac in entry.macs.iter().flatten() {
            self.by_mac.insert((*mac, name.clone()));
        }
        self.entries.insert(name.clone(), entry);
        name
    }

    /// Takes a lease out; gives its name and those that it collided with, none when it was not there.
    fn remove(&mut self, name: &str) -> BTreeSet<LeaseName> {
        let Some((name, entry)) = self.entries.remove_entry(name) else { return BTreeSet::new() };
        let mut concerned: BTreeSet<LeaseName> = self.colliding(&name, &entry).cloned().collect();
        for subnet in subnets(&name) {
            self.by_subnet.remove(&(subnet, name.clone()));
            let length = (subnet.is_v4(), subnet.len());
            self.lengths.entry(length).and_modify(|count| *count -= 1);
            self.lengths.retain(|_, count| *count > 0);
        }
        for mac in entry.macs.iter().flatten() {
            self.by_mac.remove(&(*mac, name.clone()));
        }
        concerned.insert(name);
        concerned
    }

    fn accepts(&self, lease: &Lease) -> Result<(), PeerFault> {
        self.rule.as_ref().map_or(Ok(()), |rule| rule.accepts(lease))
    }

    /// The lease named `name`, or why it does not count; `None`: there is none.
    pub fn verdict(&self, name: &str) -> Option<Result<Lease, PeerFault>> {
        let lease = self.lease(name)?;
        // What counts was accepted when it was taken in.
        let counts = self.entries.get(name).is_some_and(|entry| entry.counts);
        let accepted = lease.and_then(|lease| if counts { Ok(lease) } else { self.accepts(&lease).map(|()| lease) });
        Some(accepted.and_then(|lease| self.unbeaten(name, lease)))
    }

    /// As [`LeaseSet::verdict`] for a lease of the asker's own: what it tells will be put right, so that nothing but an older one is
    /// against it.
    pub fn standing(&self, name: &str) -> Option<Result<Lease, PeerFault>> {
        Some(self.lease(name)?.and_then(|lease| self.unbeaten(name, lease)))
    }

    fn unbeaten(&self, name: &str, lease: Lease) -> Result<Lease, PeerFault> {
        match self.beaten_by(name, &mut BTreeMap::new(), DEEPEST) {
            None => Ok(lease),
            Some(winner) => {
                Err(lease.fault("lease-collision", format!("it collides with {winner}, which is older and wins")))
            }
        }
    }

    /// The lease that `name` loses to: an older one that it collides with and that itself loses to none.
    fn beaten_by(
        &self,
        name: &str,
        known: &mut BTreeMap<LeaseName, Option<LeaseName>>,
        depth: u32,
    ) -> Option<LeaseName> {
        if let Some(answer) = known.get(name) {
            return answer.clone();
        }
        let (name, entry) = self.entries.get_key_value(name)?;
        let older = self.colliding(name, entry).filter_map(|other| self.age(other));
        let mut older: Vec<_> = older.filter(|age| *age < (entry.create_rev, name)).collect();
        // The oldest is the likeliest to win.
        older.sort();
        let mut older = older.into_iter().map(|(_, other)| other);
        let answer = older.find(|other| depth == 0 || self.beaten_by(other, known, depth - 1).is_none());
        known.insert(name.clone(), answer.cloned());
        answer.cloned()
    }

    /// What decides between two, with the name in the set's keeping; `None`: it does not count, and competes with nobody.
    fn age(&self, name: &str) -> Option<(i64, &LeaseName)> {
        let (name, entry) = self.entries.get_key_value(name)?;
        entry.counts.then_some((entry.create_rev, name))
    }

    /// `names`, and all whose verdict hangs on theirs: younger ones that collide with them, and so on.
    fn and_younger(&self, names: BTreeSet<LeaseName>) -> BTreeSet<LeaseName> {
        if self.entries.keys().all(|name| names.contains(name)) {
            return names;
        }
        let (mut all, mut next) = (BTreeSet::new(), Vec::from_iter(names));
        while let Some(name) = next.pop() {
            if let Some(entry) = self.entries.get(&name) {
                let own = (entry.create_rev, &name);
                let younger = self.colliding(&name, entry).filter(|other| self.age(other).is_some_and(|age| age > own));
                next.extend(younger.cloned());
            }
            all.insert(name);
        }
        all
    }

    /// The lease named `name` as it stands in the store, whoever it collides with.
    pub fn lease(&self, name: &str) -> Option<Result<Lease, PeerFault>> {
        let e = self.entries.get(name)?;
        Some(Lease::read(name, &e.value, (e.create_rev, e.mod_rev, e.etcd_lease)))
    }

    /// The leases that can be read and may be of `node`: their value has its identity in it, or their subnet is one of these. The
    /// values of all others are not read.
    pub fn leases_of(&self, node: &NodeId, subnets: &[Prefix]) -> impl Iterator<Item = Lease> + '_ {
        let identity = node.to_string().into_bytes();
        let own = subnets.to_vec();
        let may = move |name: &str, entry: &Entry| {
            self::subnets(name).any(|subnet| own.contains(&subnet))
                || entry.value.windows(identity.len()).any(|part| part == identity)
        };
        self.entries.iter().filter(move |(name, entry)| may(name, entry)).filter_map(|(name, _)| self.lease(name)?.ok())
    }

    /// All names, in key order.
    pub fn names(&self) -> impl Iterator<Item = &LeaseName> {
        self.entries.keys()
    }

    /// Everything as it stands in the store, in key order: name, create revision and value.
    pub fn raw(&self) -> impl Iterator<Item = (&str, i64, &[u8])> {
        self.entries.iter().map(|(name, entry)| (&**name, entry.create_rev, &*entry.value))
    }

    /// What is not free for a subnet of this length, in order: what the winners hold, and every key that is no wider than that,
    /// since the store has no place for a second one. A wide key that loses, or does not count, takes the place of nobody.
    pub fn held(&self, len: u8) -> impl Iterator<Item = Prefix> + '_ {
        let wins =
            |name: &str| self.age(name).is_some() && self.beaten_by(name, &mut BTreeMap::new(), DEEPEST).is_none();
        self.by_subnet.iter().filter(move |(subnet, name)| subnet.len() >= len || wins(name)).map(|(subnet, _)| *subnet)
    }

    /// True when a lease tells this MAC.
    pub fn has_mac(&self, mac: MacAddr) -> bool {
        self.by_mac.range((mac, LeaseName::default())..).next().is_some_and(|(told, _)| *told == mac)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Names of other leases that share an address or a MAC with this one.
    fn colliding<'s>(&'s self, name: &'s str, entry: &'s Entry) -> impl Iterator<Item = &'s LeaseName> + use<'s> {
        let subnets = subnets(name).flat_map(|subnet| self.overlapping(subnet));
        let macs = entry.macs.iter().flatten().flat_map(|mac| {
            let from = (*mac, LeaseName::default());
            self.by_mac.range(from..).take_while(move |(m, _)| m == mac).map(|(_, name)| name)
        });
        subnets.chain(macs).filter(move |other| ***other != *name)
    }

    /// Names that hold a subnet inside or around `subnet`.
    fn overlapping(&self, subnet: Prefix) -> impl Iterator<Item = &LeaseName> + use<'_> {
        let at = |p: Prefix| {
            self.by_subnet.range((p, LeaseName::default())..).take_while(move |(q, _)| *q == p).map(|(_, name)| name)
        };
        let wider = self.lengths.range((subnet.is_v4(), 0)..(subnet.is_v4(), subnet.len()));
        let around = wider.filter_map(move |((_, len), _)| Prefix::truncate(subnet.addr(), *len).ok()).flat_map(at);
        let inside =
            self.by_subnet.range((subnet, LeaseName::default())..).take_while(move |(q, _)| q.addr() <= subnet.last());
        around.chain(inside.filter(move |(q, _)| subnet.covers(q)).map(|(_, name)| name))
    }
}

/// The subnets that a lease's name tells, where it can be read.
fn subnets(name: &str) -> impl Iterator<Item = Prefix> + use<> {
    name.parse().into_iter().flat_map(|key: LeaseKey| key.subnets())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NetworkConfig;
    use proptest::prelude::*;

    /// Values of vxlan's VNI 1 and 2, of udp, and of a holder inside the network of the first config.
    fn raw(name: &str, (kind, mac): (u8, u8), rev: i64) -> RawLease {
        let ip = if kind == 3 { "10.0.1.9" } else { "192.0.2.1" };
        let data = format!(r#""BackendData":{{"VNI":{},"VtepMAC":"02:00:00:00:00:{mac:02x}"}}"#, kind.max(1));
        let backend = if kind == 0 { "" } else { r#""BackendType":"vxlan","# };
        let value = format!(r#"{{"PublicIP":"{ip}",{backend}{data}}}"#);
        RawLease { name: name.into(), value: value.into(), create_rev: rev, mod_rev: rev, etcd_lease: 0 }
    }

    const CONFIGS: [&str; 4] = [
        r#"{"Network":"10.0.0.0/21","Backend":{"Type":"vxlan"}}"#,
        r#"{"Network":"10.0.0.0/22","Backend":{"Type":"vxlan","VNI":2}}"#,
        r#"{"Network":"10.0.0.0/8"}"#,
        r#"{"Network":"10.0.4.0/22","Backend":{"Type":"vxlan","VNI":3}}"#,
    ];

    /// What the lines above say, config by config.
    fn slow_counts(config: Option<usize>, raw: &RawLease) -> bool {
        let value = String::from_utf8_lossy(&raw.value);
        let addr = |third: u8| raw.name.starts_with(&format!("10.0.{third}."));
        let wide = raw.name.ends_with("-21");
        let inside = value.contains("10.0.1.9");
        match config {
            None => true,
            Some(0) => value.contains("\"VNI\":1,") && value.contains("vxlan") && !inside,
            Some(1) => value.contains("\"VNI\":2,") && !inside && !wide && (0..4).any(addr),
            Some(2) => !value.contains("vxlan"),
            _ => value.contains("\"VNI\":3,") && (4..8).any(addr),
        }
    }

    /// The rule as one would say it: the oldest first, each that counts and collides with no winner.
    fn slow_winners(all: &BTreeMap<String, RawLease>, config: Option<usize>) -> BTreeSet<String> {
        let counting = all.iter().filter(|(_, raw)| slow_counts(config, raw));
        let parsed: Vec<(&String, Lease)> = counting.filter_map(|(n, r)| Some((n, Lease::parse(r).ok()?))).collect();
        let collide = |a: &Lease, b: &Lease| {
            a.key.subnets().any(|x| b.key.subnets().any(|y| x.overlaps(&y))) || a.vtep_macs()[0] == b.vtep_macs()[0]
        };
        let mut by_age = parsed;
        by_age.sort_by_key(|(name, lease)| (lease.create_rev, *name));
        let mut winners: Vec<(&String, Lease)> = Vec::new();
        for (name, lease) in by_age {
            if !winners.iter().any(|(_, winner)| collide(&lease, winner)) {
                winners.push((name, lease));
            }
        }
        winners.into_iter().map(|(name, _)| name.clone()).collect()
    }

    fn op() -> impl Strategy<Value = (String, (u8, u8), i64, bool)> {
        let name = prop_oneof![
            (0u8..6).prop_map(|n| format!("10.0.{n}.0-24")),
            (0u8..3).prop_map(|n| format!("10.0.{}.0-23", n * 2)),
            Just("10.0.0.0-21".to_owned()),
            Just("garbage".to_owned()),
        ];
        (name, (0u8..4, 0u8..5), 1i64..6, prop::bool::weighted(0.7))
    }

    fn winners(set: &LeaseSet) -> BTreeSet<String> {
        set.names().filter(|n| matches!(set.verdict(n), Some(Ok(_)))).map(ToString::to_string).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn the_set_decides_as_oldest_first_does_and_names_who_is_concerned(
            turns in prop::collection::vec(
                (prop::collection::vec(op(), 1..8), any::<bool>(), prop::option::weighted(0.2, 0..CONFIGS.len())), 1..12)
        ) {
            let (mut set, mut all, mut now, mut config) = (LeaseSet::default(), BTreeMap::new(), 10, None);
            for (ops, listed, newer) in turns {
                if let Some(n) = newer {
                    config = newer;
                    set.follow(Rule::new(&NetworkConfig::parse(CONFIGS[n].as_bytes()).unwrap().0).unwrap());
                }
                let before = slow_winners(&all, config);
                prop_assert_eq!(&winners(&set), &before);
                let mut concerned = BTreeSet::new();
                for (name, told, rev, put) in ops {
                    now += 1;
                    let lease = RawLease { mod_rev: now, ..raw(&name, told, rev) };
                    if put {
                        all.insert(name.clone(), lease.clone());
                    } else {
                        all.remove(&name);
                    }
                    // What a listing brings comes at once, what a watch brings one by one.
                    if !listed {
                        concerned.append(&mut if put { set.put(lease) } else { set.delete(&name) });
                    }
                }
                if listed {
                    concerned = set.reset(all.values().cloned().collect());
                }
                let after = slow_winners(&all, config);
                prop_assert_eq!(&winners(&set), &after);
                for changed in before.symmetric_difference(&after) {
                    prop_assert!(concerned.contains(changed.as_str()), "{} is not named", changed);
                }
                // No key of the store is handed out a second time, whatever it says, and a winner's place neither.
                let held: BTreeSet<Prefix> = set.held(24).collect();
                for name in all.keys().filter(|name| name.ends_with("-24") || after.contains(*name)) {
                    prop_assert!(subnets(name).all(|subnet| held.contains(&subnet)), "{} is free", name);
                }
            }
        }
    }
}
