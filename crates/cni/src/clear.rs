//! What DEL and GC need of the configuration. It is read leniently: whatever an ADD was refused for, its container has to go.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use twill_core::attach::Attachment;
use twill_core::net::LinkName;

use crate::conf::{self, BRIDGE, NETWORKS, STATE};
use crate::error::{CniError, Code};

/// The configuration, as far as it says what may be left.
#[derive(Debug, Clone, PartialEq)]
pub struct Clear {
    /// The network's name, where it is one.
    pub name: Option<String>,
    /// Twill's state.
    pub state: PathBuf,
    /// Devices are made as well.
    pub has_device: bool,
    /// The bridge, where the containers have one.
    pub bridge: Option<LinkName>,
    /// The folder of the network's address files.
    pub addresses: Option<PathBuf>,
    /// Where flannel's plugin kept a file for each container.
    pub flannel_dir: Option<PathBuf>,
    /// What an earlier ADD answered.
    prev: Value,
    /// GC: who is attached.
    valid: Value,
}

/// One of GC's valid attachments.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Valid {
    /// The container.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Its device.
    pub ifname: String,
}

impl Clear {
    /// Reads a configuration; refused is what is not even a JSON object.
    pub fn parse(text: &[u8]) -> Result<Self, CniError> {
        let value = serde_json::from_slice(text).map(conf::as_go_reads);
        let raw: Map<String, Value> = value.and_then(serde_json::from_value).map_err(conf::unreadable)?;
        let raw = Value::Object(raw);
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let path = |value: &Value| value.as_str().map(PathBuf::from);
        let kind = word(&raw["type"]);
        let (ours, flannel) = (kind == "twill-cni", kind == "flannel");
        let ipam = &raw["ipam"];
        let has_addresses = match word(&ipam["type"]).as_str() {
            "" => ours || flannel,
            kind => ["host-local", "twill-cni"].contains(&kind),
        };
        let name = Some(word(&raw["name"])).filter(|name| conf::is_name(name));
        let folder = path(&ipam["dataDir"]).unwrap_or_else(|| NETWORKS.into());
        let bridge = if flannel { &raw["delegate"]["bridge"] } else { &raw["bridge"] };
        let flannel_dir = || path(&raw["dataDir"]).unwrap_or_else(|| "/var/lib/cni/flannel".into());
        Ok(Self {
            state: path(&raw["stateDir"]).unwrap_or_else(|| STATE.into()),
            // Without a type it is nobody else's.
            has_device: ours || flannel || ["bridge", ""].contains(&&*kind),
            bridge: bridge.as_str().unwrap_or(BRIDGE).parse().ok(),
            addresses: name.as_deref().filter(|_| has_addresses).map(|name| folder.join(name)),
            flannel_dir: flannel.then(flannel_dir),
            name,
            prev: raw["prevResult"].clone(),
            valid: raw["cni.dev/valid-attachments"].clone(),
        })
    }

    /// Attachment files.
    pub fn attachments(&self) -> PathBuf {
        self.state.join("attachments")
    }

    /// True for addresses alone of this network.
    pub(crate) fn has_alone(&self, record: &Attachment) -> bool {
        record.alone.is_some() && self.has(record)
    }

    /// True for an attachment of this network.
    pub(crate) fn has(&self, record: &Attachment) -> bool {
        record.network.as_ref().is_some_and(|network| Some(&network.name) == self.name.as_ref())
    }

    /// True when DEL of this configuration is for the attachment: of this network, or with addresses in its folder, or no network is named.
    pub(crate) fn is_of(&self, record: &Attachment) -> bool {
        let dir = |dir: &PathBuf| record.network.as_ref().is_some_and(|network| Path::new(&*network.dir) == dir);
        self.name.is_none() || self.has(record) || self.addresses.as_ref().is_some_and(dir)
    }

    /// True when an earlier ADD answered that it had made this device of a container.
    pub fn was_answered(&self, ifname: LinkName) -> bool {
        let made = self.prev["interfaces"].as_array();
        let is =
            |made: &Value| made["name"] == ifname.as_str() && made["sandbox"].as_str().is_some_and(|s| !s.is_empty());
        made.is_some_and(|made| made.iter().any(is))
    }

    /// Who is attached, as the runtime knows it.
    pub fn valid(&self) -> Result<Vec<Valid>, CniError> {
        let hint = "the runtime has to list who is attached; without the list everything would be freed";
        if self.valid.is_null() {
            return Err(CniError::new(Code::Config, "GC came without cni.dev/valid-attachments", hint));
        }
        serde_json::from_value(self.valid.clone())
            .map_err(|error| CniError::new(Code::Decode, format!("read cni.dev/valid-attachments: {error}"), hint))
    }
}
