//! What is wanted, by who wants it: the node's own base, and each peer. Full and incremental work are one code.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use crate::firewall::TableName;
use crate::firewall::policy::PEERS;
use crate::host::{HostState, Key, Object};
use crate::lease_set::LeaseName;

use super::{Claim, Desired};

/// The desired state, kept up to date peer by peer.
#[derive(Debug, Default)]
pub struct Wanted {
    desired: Desired,
    base: BTreeSet<Key>,
    beside: BTreeSet<Key>,
    peers: BTreeMap<LeaseName, Box<[Key]>>,
}

impl Wanted {
    /// The desired state as it stands.
    pub fn desired(&self) -> &Desired {
        &self.desired
    }

    /// Changes what is claimed.
    pub fn set_claim(&mut self, claim: Claim) {
        self.desired.claim = claim;
    }

    /// Replaces the node's own objects; gives the keys to look at.
    pub fn set_base(&mut self, base: HostState) -> BTreeSet<Key> {
        let mut dirty = std::mem::take(&mut self.base);
        for key in &dirty {
            self.desired.host.remove(key);
        }
        self.base = base.iter().map(|(key, _)| key.clone()).collect();
        dirty.extend(self.base.iter().cloned());
        self.desired.host.extend(base.iter().map(|(_, object)| object.clone()));
        dirty
    }

    /// Replaces what the firewalls of others make necessary; gives the keys to look at, none when nothing differs.
    pub fn set_beside(&mut self, objects: Vec<Object>) -> BTreeSet<Key> {
        let same = objects.len() == self.beside.len()
            && objects.iter().all(|object| self.desired.host.get(&object.key()) == Some(object));
        if same {
            return BTreeSet::new();
        }
        let mut dirty = std::mem::take(&mut self.beside);
        for key in &dirty {
            self.desired.host.remove(key);
        }
        self.beside = objects.iter().map(Object::key).collect();
        dirty.extend(self.beside.iter().cloned());
        self.desired.host.extend(objects);
        dirty
    }

    /// Replaces a peer's objects (none: the peer is gone); gives the keys to look at, some of them twice.
    pub fn set_peer(&mut self, name: &LeaseName, objects: Vec<Object>) -> Vec<Key> {
        let mut dirty = self.peers.remove(name).unwrap_or_default().into_vec();
        for key in &dirty {
            self.desired.host.remove(key);
        }
        if !objects.is_empty() {
            let keys: Box<[Key]> = objects.iter().map(Object::key).collect();
            dirty.extend(keys.iter().cloned());
            self.peers.insert(name.clone(), keys);
            self.desired.host.extend(objects);
        }
        dirty
    }

    /// Who may send to the tunnel's socket: the elements of the firewall's set of peers, where the base has one. Gives the key to look at
    /// when they have changed.
    pub fn set_members(&mut self, members: impl IntoIterator<Item = IpAddr>) -> Option<Key> {
        let key = Key::Table(TableName::twill());
        let Some(Object::Table(table)) = self.desired.host.get(&key) else { return None };
        let set = table.sets.get(PEERS)?;
        let elements: BTreeSet<IpAddr> = members.into_iter().filter(|ip| ip.is_ipv4() == set.v4).collect();
        if set.elements == elements {
            return None;
        }
        let mut table = table.clone();
        table.sets.get_mut(PEERS)?.elements = elements;
        self.desired.host.insert(Object::Table(table));
        Some(key)
    }

    /// Packs what is kept, after bulk work.
    pub fn pack(&mut self) {
        self.desired.host.pack();
        self.peers = std::mem::take(&mut self.peers).into_iter().collect();
    }

    /// Names of all peers that want something.
    pub fn peer_names(&self) -> impl Iterator<Item = &LeaseName> {
        self.peers.keys()
    }

    /// How many peers want something.
    pub fn peer_count(&self) -> usize {
        self.peers.len()
    }
}
