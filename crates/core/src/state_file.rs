//! What a node keeps on disk: who it is, what it had, and whom its tunnel reached.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::backend::{TunnelPeer, TunnelSpec};
use crate::net::{LinkName, MacAddr, NodeId, Prefix};

const FORMAT: &str = "twill-state";
const TUNNEL_FORMAT: &str = "twill-tunnel";
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
}
