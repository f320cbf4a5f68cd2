//! What a node keeps on disk: who it is, and what it had.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::net::{LinkName, MacAddr, NodeId, Prefix};

const FORMAT: &str = "twill-state";
const VERSION: u32 = 1;

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
        let (devices, subnets, networks) = (BTreeMap::new(), Vec::new(), Vec::new());
        Self { format: FORMAT.into(), version: VERSION, node, machine, devices, subnets, networks }
    }

    /// Reads the file.
    pub fn parse(bytes: &[u8]) -> Result<State, BadState> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let broken = |e: serde_json::Error| BadState::Broken(e.to_string());
        let head: Head = serde_json::from_slice(bytes).map_err(broken)?;
        if head.format != FORMAT {
            return Err(BadState::Broken(format!("its format is {:?}", head.format)));
        }
        if head.version > VERSION {
            return Err(BadState::Newer(head.version));
        }
        serde_json::from_slice(bytes).map_err(broken)
    }

    /// The file's bytes.
    pub fn to_json(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_json::to_vec_pretty(self)
    }
}
