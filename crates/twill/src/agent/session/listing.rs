//! Which listings are believed. One that is strange withdraws nothing: what an earlier run knew is kept as it stands.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use twill_core::backend::{Reach, TunnelPeer};
use twill_core::host::{Few, Key, Object, Route};
use twill_core::lease::LeaseKey;
use twill_core::lease_set::LeaseName;
use twill_core::net::{LinkName, Prefix};
use twill_core::state_file::State;
use twill_kernel::{Interest, Kernel, LinuxKernel};
use twill_store::Listing;

use super::super::compose::Network;
use super::super::reconciler::Order;
use super::super::tunnel;
use super::Session;

/// A listing that lacks so many known peers, and more than half of them, withdraws nothing.
const MISSING: usize = 10;

impl Session {
    /// Takes a listing in. One that is strange withdraws nothing until it is accepted.
    pub(super) fn take_listing(&mut self, listing: Listing, network: &Network) -> BTreeSet<LeaseName> {
        // The store alone says whether our own lease is there.
        if let Some(own) = self.cache.take_own() {
            self.leases.delete(&own);
        }
        let listed: BTreeSet<&str> = listing.entries.iter().map(|e| e.name.as_str()).collect();
        let mut known: BTreeSet<LeaseName> = self.leases.names().chain(self.kept.keys()).cloned().collect();
        if self.seen.is_none() {
            let told = self.leases.names().map(|name| &**name).chain(listed.iter().copied());
            known.extend(left_behind(network, &self.settings.state_dir, told));
        }
        let lacking: Vec<LeaseName> = known.iter().filter(|name| !listed.contains(&***name)).cloned().collect();
        let other = |cluster| cluster != listing.cluster_id;
        let backwards = match self.seen {
            Some((cluster, revision)) => other(cluster) || revision > listing.revision,
            None => self.state.store.is_some_and(other),
        };
        // What was held back is held back until it is accepted, however often the same is listed.
        let held = lacking.iter().any(|name| self.withheld.contains(name));
        let first = self.seen.is_none();
        self.seen = Some((listing.cluster_id, listing.revision));
        if is_strange(listed.len(), known.len(), lacking.len(), backwards || held) {
            let evidence = format!(
                "the store lists {} leases and lacks {} of {} known ones",
                listed.len(),
                lacking.len(),
                known.len()
            );
            if !self.has_found("strange-listing", &evidence) {
                tracing::warn!("{evidence}: nothing is withdrawn until `twill resync --accept`");
            }
            self.find("strange-listing", "leases", &evidence, "if this is right: twill resync --accept");
            self.prune &= !first;
            if first {
                let names = lacking.iter().filter(|name| self.leases.lease(name).is_none()).cloned();
                self.kept = as_it_stands(&Vec::from_iter(names), network, &self.settings.state_dir);
            }
            // What has come back since is withheld no more.
            self.withheld.retain(|name| !listed.contains(&**name));
            self.withheld.extend(lacking);
            return listing.entries.into_iter().flat_map(|raw| self.leases.put(raw)).collect();
        }
        self.withheld.clear();
        self.unfind("strange-listing");
        self.prune = true;
        self.believe(listing.cluster_id);
        let mut concerned = self.leases.reset(listing.entries);
        if !concerned.is_empty() {
            self.cache.touch();
        }
        concerned.extend(std::mem::take(&mut self.kept).into_keys());
        concerned
    }

    /// The store has told of a lease that a strange listing lacked. After the last one nothing is left to accept.
    pub(super) fn is_back(&mut self, name: &str) {
        if self.withheld.remove(name) && self.withheld.is_empty() {
            self.accepted();
        }
    }

    /// The listing is taken as it is: what it lacks may be pruned.
    pub(super) fn accepted(&mut self) {
        self.unfind("strange-listing");
        self.prune = true;
        self.cache.touch();
        if let Some((cluster, _)) = self.seen {
            self.believe(cluster);
        }
        self.order(Order::Prune);
    }

    /// From now on another store is a strange one.
    pub(super) fn believe(&mut self, cluster: u64) {
        if self.state.store != Some(cluster) {
            self.state.store = Some(cluster);
            self.save();
            self.cache.touch();
        }
    }
}

/// True for a listing that withdraws nothing until it is accepted: it lacks known peers, and is empty, or lacks most of them, or there is
/// something else against it (docs/decisions/0004).
fn is_strange(listed: usize, known: usize, lacking: usize, suspect: bool) -> bool {
    let emptied = listed == 0 && known > 0;
    let halved = lacking >= MISSING && lacking * 2 > known;
    lacking > 0 && (suspect || emptied || halved)
}

/// For an agent that starts with this listing: what it would keep as it stands in the kernel, where the listing is strange.
pub(crate) fn kept_at_start(
    listing: &Listing,
    network: &Network,
    state: &State,
    state_dir: &Path,
) -> Option<BTreeMap<LeaseName, Reach>> {
    let listed: BTreeSet<&str> = listing.entries.iter().map(|e| e.name.as_str()).collect();
    let known = left_behind(network, state_dir, listed.iter().copied());
    let lacking: Vec<LeaseName> = known.iter().filter(|name| !listed.contains(&***name)).cloned().collect();
    let other = state.store.is_some_and(|cluster| cluster != listing.cluster_id);
    is_strange(listed.len(), known.len(), lacking.len(), other).then(|| as_it_stands(&lacking, network, state_dir))
}

/// Lease names of the peers that an earlier run left in the kernel and in its tunnel. A subnet tells its lease's whole name where that
/// is among those told, the last of them; else it stands for itself.
fn left_behind<'a>(network: &Network, state_dir: &Path, told: impl Iterator<Item = &'a str>) -> BTreeSet<LeaseName> {
    let devices = tunnels(network);
    let Ok(kernel) = LinuxKernel::open(Interest { devices: Some(BTreeSet::new()), ..Default::default() }) else {
        return BTreeSet::new();
    };
    let on_ours = |dst: &Route| {
        dst.entries.first().is_some_and(|e| e.via.is_some() && e.dev.is_some_and(|d| devices.contains(&d)))
    };
    let routes = kernel.mirror().iter().filter_map(|(_, o)| match o {
        Object::Route(r) if on_ours(r) => Some(r.key.dst),
        _ => None,
    });
    let names: BTreeMap<Prefix, &str> = told.flat_map(|name| subnets(name).map(move |subnet| (subnet, name))).collect();
    let name = |subnet: Prefix| {
        let [v4, v6] = [true, false].map(|v4| Some(subnet).filter(|subnet| subnet.is_v4() == v4));
        names.get(&subnet).map_or_else(|| LeaseKey { v4, v6 }.to_string(), |name| (*name).to_owned())
    };
    routes.map(name).chain(in_tunnel(state_dir).map(|peer| peer.name)).map(LeaseName::from).collect()
}

/// The peers of the tunnel that ran last.
fn in_tunnel(state_dir: &Path) -> impl Iterator<Item = TunnelPeer> + use<> {
    tunnel::remembered(&tunnel::path(state_dir)).into_iter().flat_map(|memory| memory.peers)
}

/// The subnets that a lease's name tells.
fn subnets(name: &str) -> impl Iterator<Item = Prefix> + use<> {
    name.parse().into_iter().flat_map(|key: LeaseKey| key.subnets())
}

/// The tunnel devices of all families in use; the own subnets need not be known yet.
fn tunnels(network: &Network) -> Vec<LinkName> {
    network.backend.devices(&network.cx.networks)
}

/// What stands for these leases, in the kernel and in the tunnel.
fn as_it_stands(names: &[LeaseName], network: &Network, state_dir: &Path) -> BTreeMap<LeaseName, Reach> {
    let mut by_subnet = in_kernel(&tunnels(network));
    let mut peers: BTreeMap<String, TunnelPeer> = in_tunnel(state_dir).map(|peer| (peer.name.clone(), peer)).collect();
    let mut kept = |name: &LeaseName| {
        let objects = subnets(name).flat_map(|subnet| by_subnet.remove(&subnet)).flatten().collect();
        (name.clone(), Reach { objects, tunnel: peers.remove(&**name), fault: None })
    };
    names.iter().map(&mut kept).collect()
}

/// Routes on these devices with their neighbours and forwarding entries.
fn in_kernel(devices: &[LinkName]) -> BTreeMap<Prefix, Vec<Object>> {
    let mut by_subnet = BTreeMap::<Prefix, Vec<Object>>::new();
    let interest = Interest { devices: Some(devices.iter().copied().collect()), ..Interest::default() };
    let Ok(kernel) = LinuxKernel::open(interest) else { return by_subnet };
    let have = kernel.mirror();
    for (_, object) in have.iter() {
        let Object::Route(route) = object else { continue };
        let Some(entry) = route.entries.as_slice().iter().find(|e| e.dev.is_some_and(|dev| devices.contains(&dev)))
        else {
            continue;
        };
        let (Some(dev), Some(via)) = (entry.dev, entry.via) else { continue };
        let objects = by_subnet.entry(route.key.dst).or_default();
        objects.push(Object::Route(Route { key: route.key, entries: Few::One(entry.clone()) }));
        if let Some(Object::Neigh(neigh)) = have.get(&Key::Neigh(dev, via)) {
            objects.push(Object::Neigh(neigh.clone()));
            objects.extend(neigh.mac.and_then(|mac| have.get(&Key::Fdb(dev, mac))).cloned());
        }
    }
    by_subnet
}
