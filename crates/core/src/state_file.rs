//! What a node keeps on disk: who it is, what it had, whom its tunnel reached, and what the store said last.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::backend::{TunnelPeer, TunnelSpec};
use crate::config::NetworkConfig;
use crate::lease::RawLease;
use crate::net::{LinkName, MacAddr, NodeId, Prefix};

const FORMAT: &str = "twill-state";
const TUNNEL_FORMAT: &str = "twill-tunnel";
const CACHE_FORMAT: &str = "twill-cache";
const VERSION: u32 = 1;
/// So many former subnets are remembered.
const FORMER: usize = 16;

/// The state file's content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    format: String,
    version: u32,
    /// The node's identity.
    pub node: NodeId,
    /// The machine that it was made on: a clone is another node.
    pub machine: String,
    /// Tunnel devices that we made or took over, with their MACs.
    #[serde(default)]
    pub devices: BTreeMap<LinkName, MacAddr>,
    /// Own subnets.
    #[serde(default)]
    pub subnets: Vec<Prefix>,
    /// Subnets that were ours and are no longer: bridges of container runtimes may still have them. The last ones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub former: Vec<Prefix>,
    /// The store whose leases were last taken as they are, by its cluster's identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<u64>,
    /// The networks that they lie in.
    #[serde(default)]
    pub networks: Vec<Prefix>,
}

/// Why a state file is not used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadState {
    /// It cannot be read.
    #[error("the state file is broken: {0}")]
    Broken(String),
    /// A newer program wrote it.
    #[error("the state file has version {0}, and this program knows {VERSION}")]
    Newer(u32),
}

impl State {
    /// A new node.
    pub fn new(node: NodeId, machine: String) -> Self {
        let (devices, subnets, former, networks) = (BTreeMap::new(), Vec::new(), Vec::new(), Vec::new());
        let store = None;
        Self { format: FORMAT.into(), version: VERSION, node, machine, devices, subnets, former, store, networks }
    }

    /// From now on these are the own subnets, and those before were.
    pub fn hold(&mut self, subnets: Vec<Prefix>) {
        let gone = std::mem::replace(&mut self.subnets, subnets);
        self.former.extend(gone);
        let (held, mut seen) = (&self.subnets, std::collections::BTreeSet::new());
        self.former.reverse();
        self.former.retain(|subnet| !held.contains(subnet) && seen.insert(*subnet));
        self.former.truncate(FORMER);
        self.former.reverse();
    }

    /// All subnets that are or were ours.
    pub fn known(&self) -> impl Iterator<Item = Prefix> + '_ {
        self.subnets.iter().chain(&self.former).copied()
    }

    /// Reads the file.
    pub fn parse(bytes: &[u8]) -> Result<State, BadState> {
        parse(bytes, FORMAT)
    }

    /// The file's bytes.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }
}

/// The tunnel as it ran last: it runs again before the store has answered, and without one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelMemory {
    format: String,
    version: u32,
    /// Device, address and port.
    pub spec: TunnelSpec,
    /// Whom it reached.
    pub peers: Vec<TunnelPeer>,
}

impl TunnelMemory {
    /// This tunnel.
    pub fn new(spec: TunnelSpec, peers: Vec<TunnelPeer>) -> Self {
        Self { format: TUNNEL_FORMAT.into(), version: VERSION, spec, peers }
    }

    /// Reads the file.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadState> {
        parse(bytes, TUNNEL_FORMAT)
    }

    /// The file's bytes.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }
}

/// What the store said last, as it stands there: an agent that starts while the store is away goes by it (docs/decisions/0018).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCache {
    format: String,
    version: u32,
    /// Where the store was reached, and where its keys are.
    pub source: StoreSource,
    /// The store by its cluster's identity.
    pub store: u64,
    /// When this was written down, in seconds since 1970.
    pub at: u64,
    /// The value of `<prefix>/config`.
    pub config: String,
    /// Everything below `<prefix>/subnets/`, in key order.
    pub leases: Vec<CachedLease>,
}

/// Where a store is, as the settings say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreSource {
    /// Endpoints, separated by commas.
    pub endpoints: String,
    /// Key prefix.
    pub prefix: String,
}

/// A lease with what tells which one wins a collision. It has no revision to compare with: nothing is written to the store by it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CachedLease {
    /// As in [`RawLease`].
    pub name: String,
    /// As in [`RawLease`].
    pub create_rev: i64,
    /// The value; one that is no UTF-8 can be no lease's, and is left out.
    pub value: String,
}

impl StoreCache {
    /// This listing of a store. `leases`: name, create revision and value.
    pub fn new<'a>(
        source: StoreSource,
        store: u64,
        at: u64,
        config: &str,
        leases: impl Iterator<Item = (&'a str, i64, &'a [u8])>,
    ) -> Self {
        let lease = |(name, create_rev, value): (&str, i64, &[u8])| {
            let value = str::from_utf8(value).ok()?.to_owned();
            Some(CachedLease { name: name.to_owned(), create_rev, value })
        };
        let (format, version, leases) = (CACHE_FORMAT.into(), VERSION, leases.filter_map(lease).collect());
        Self { format, version, source, store, at, config: config.to_owned(), leases }
    }

    /// The network config, or why this is not what this node's store said last.
    pub fn trusted(&self, source: &StoreSource, state: &State) -> Result<NetworkConfig, String> {
        let shared = |endpoint: &str| source.endpoints.split(',').any(|other| other == endpoint);
        if self.source.prefix != source.prefix {
            return Err(format!("it is of the prefix {:?}", self.source.prefix));
        }
        if !self.source.endpoints.split(',').any(shared) || state.store != Some(self.store) {
            return Err(format!("it is of another store, {:?}", self.source.endpoints));
        }
        let config = NetworkConfig::parse(self.config.as_bytes()).map_err(|fault| fault.to_string())?.0;
        let networks = config.networks();
        match state.networks.iter().find(|network| !networks.contains(network)) {
            Some(network) => Err(format!("it is of another network than {network}")),
            None => Ok(config),
        }
    }

    /// The leases as the store gives them, without what a write to it would need.
    pub fn into_leases(self) -> impl Iterator<Item = RawLease> {
        let raw = |CachedLease { name, create_rev, value }| RawLease {
            name,
            value: value.into_bytes(),
            create_rev,
            mod_rev: 0,
            etcd_lease: 0,
        };
        self.leases.into_iter().map(raw)
    }

    /// Reads the file.
    pub fn parse(bytes: &[u8]) -> Result<Self, BadState> {
        parse(bytes, CACHE_FORMAT)
    }

    /// The file's bytes.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec(self)
    }
}

/// Reads a file of ours: first what it is, then all of it.
fn parse<T: serde::de::DeserializeOwned>(bytes: &[u8], format: &str) -> Result<T, BadState> {
    #[derive(Deserialize)]
    struct Head {
        format: String,
        version: u32,
    }
    let broken = |e: serde_json::Error| BadState::Broken(e.to_string());
    let head: Head = serde_json::from_slice(bytes).map_err(broken)?;
    if head.format != format {
        return Err(BadState::Broken(format!("its format is {:?}", head.format)));
    }
    if head.version > VERSION {
        return Err(BadState::Newer(head.version));
    }
    serde_json::from_slice(bytes).map_err(broken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Mtu;

    #[test]
    fn a_tunnel_is_remembered_and_nothing_else_is_taken_for_one() {
        let spec = TunnelSpec {
            device: "flannel0".parse().unwrap(),
            mtu: Mtu::try_from(1472).unwrap(),
            local: "10.168.0.2:8285".parse().unwrap(),
        };
        let peer = TunnelPeer {
            name: "100.96.2.0-24".into(),
            host: "10.168.0.3".parse().unwrap(),
            subnets: vec!["100.96.2.0/24".parse().unwrap()],
        };
        let memory = TunnelMemory::new(spec, vec![peer]);
        let bytes = memory.to_json().unwrap();
        assert_eq!(TunnelMemory::parse(&bytes).unwrap(), memory);
        let newer = String::from_utf8(bytes).unwrap().replace("\"version\":1", "\"version\":2");
        assert_eq!(TunnelMemory::parse(newer.as_bytes()), Err(BadState::Newer(2)));
        let state = State::new(NodeId([0; 16]), String::new()).to_json().unwrap();
        assert!(matches!(TunnelMemory::parse(&state), Err(BadState::Broken(_))));
        assert!(matches!(TunnelMemory::parse(b"{"), Err(BadState::Broken(_))));
    }

    #[test]
    fn a_cache_is_trusted_where_store_prefix_and_network_are_this_nodes() {
        let source = |endpoints: &str, prefix: &str| StoreSource { endpoints: endpoints.into(), prefix: prefix.into() };
        let here = source("http://10.0.0.1:2379,http://10.0.0.2:2379", "/coreos.com/network");
        let config = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let leases: [(&str, i64, &[u8]); 2] = [("10.1.40.0-24", 7, b"{}"), ("10.1.41.0-24", 8, b"\xff")];
        let cache = StoreCache::new(here.clone(), 5, 1_000, config, leases.into_iter());
        assert_eq!(StoreCache::parse(&cache.to_json().unwrap()).as_ref(), Ok(&cache));
        let mut state = State::new(NodeId([0; 16]), String::new());
        (state.store, state.networks) = (Some(5), vec!["10.1.0.0/16".parse().unwrap()]);
        assert!(cache.trusted(&here, &state).is_ok());
        // A cluster that has grown or moved in part is the same.
        assert!(cache.trusted(&source("http://10.0.0.3:2379,http://10.0.0.2:2379", &here.prefix), &state).is_ok());
        let refused = |source: &StoreSource, state: &State| cache.trusted(source, state).unwrap_err();
        assert_eq!(refused(&source(&here.endpoints, "/other"), &state), "it is of the prefix \"/coreos.com/network\"");
        assert!(refused(&source("http://10.0.0.3:2379", &here.prefix), &state).contains("another store"));
        for store in [None, Some(6)] {
            assert!(refused(&here, &State { store, ..state.clone() }).contains("another store"));
        }
        let moved = State { networks: vec!["10.2.0.0/16".parse().unwrap()], ..state.clone() };
        assert_eq!(refused(&here, &moved), "it is of another network than 10.2.0.0/16");
        let broken = StoreCache { config: "{".into(), ..cache.clone() }.trusted(&here, &state).unwrap_err();
        assert!(broken.contains("network config"), "{broken}");
        // What cannot be a lease is none, and what can writes nothing.
        let raw =
            RawLease { name: "10.1.40.0-24".into(), value: b"{}".to_vec(), create_rev: 7, mod_rev: 0, etcd_lease: 0 };
        assert_eq!(cache.into_leases().collect::<Vec<_>>(), [raw]);
    }
}
