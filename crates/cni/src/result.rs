//! What ADD answers, in the shape of each version of the specification.
//!
//! 0.3.1 and 0.4.0 say of each address which family it is; from 1.0.0 on nobody does. 1.1.0 adds an interface's MTU.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use twill_core::net::{Inet, MacAddr, Prefix};

/// A version of the specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.3.0: as 0.3.1.
    V030,
    /// 0.3.1.
    V031,
    /// 0.4.0: CHECK.
    V040,
    /// 1.0.0: addresses without `version`.
    V100,
    /// 1.1.0: GC, STATUS, MTU.
    V110,
}

impl Version {
    /// All that are spoken, oldest first.
    pub const ALL: [Version; 5] = [Self::V030, Self::V031, Self::V040, Self::V100, Self::V110];

    /// As a configuration writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V030 => "0.3.0",
            Self::V031 => "0.3.1",
            Self::V040 => "0.4.0",
            Self::V100 => "1.0.0",
            Self::V110 => "1.1.0",
        }
    }

    /// `None`: not spoken.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }

    /// VERSION's answer, in the caller's version.
    pub fn list(asked: &str) -> String {
        let spoken: Vec<&str> = Self::ALL.iter().map(|version| version.as_str()).collect();
        serde_json::json!({"cniVersion": asked, "supportedVersions": spoken}).to_string()
    }
}

/// ADD's answer; also the `prevResult` that CHECK and later plugins get.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Answer {
    /// Devices: the bridge, the host's end, the container's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// Addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    /// The container's routes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<RouteTo>,
    /// Resolvers, as they were configured.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub dns: Map<String, Value>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// Its MTU; told from 1.1.0 on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The container's namespace; absent for the host's devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
}

/// An address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ip {
    /// The address with its length.
    pub address: Inet,
    /// The way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// Position among the interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTo {
    /// Destination.
    pub dst: Prefix,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// Whatever else was configured (mtu, advmss, priority, table, scope).
    #[serde(flatten)]
    pub rest: Map<String, Value>,
}

impl Answer {
    /// The answer in the shape of `version`.
    pub fn to_json(&self, version: Version) -> String {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        value["cniVersion"] = version.as_str().into();
        if version < Version::V110 {
            each(&mut value, "interfaces", |interface| drop(interface.remove("mtu")));
            each(&mut value, "routes", |route| route.retain(|key, _| key == "dst" || key == "gw"));
        }
        if version < Version::V100 {
            each(&mut value, "ips", |ip| {
                let v6 = ip.get("address").and_then(Value::as_str).is_some_and(|address| address.contains(':'));
                ip.insert("version".into(), if v6 { "6" } else { "4" }.into());
            });
        }
        value.to_string()
    }
}

fn each(value: &mut Value, list: &str, change: impl Fn(&mut Map<String, Value>)) {
    let items = value.get_mut(list).and_then(Value::as_array_mut);
    items.into_iter().flatten().filter_map(Value::as_object_mut).for_each(change);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_version_has_its_shape_and_reads_back() {
        let answer: Answer = serde_json::from_str(
            r#"{"interfaces":[{"name":"eth0","mac":"02:00:00:00:00:09","mtu":1450,"sandbox":"/run/netns/a"}],
                "ips":[{"address":"10.1.15.2/24","gateway":"10.1.15.1","interface":0},{"address":"fd00::2/64"}],
                "routes":[{"dst":"0.0.0.0/0","gw":"10.1.15.1","mtu":1400}],"dns":{"nameservers":["10.0.0.1"]}}"#,
        )
        .unwrap();
        let json = |version| serde_json::from_str::<Value>(&answer.to_json(version)).unwrap();
        assert_eq!(json(Version::V110)["interfaces"][0]["mtu"], 1450);
        assert_eq!(json(Version::V110)["routes"][0]["mtu"], 1400);
        assert!(json(Version::V100)["interfaces"][0].get("mtu").is_none());
        assert!(json(Version::V100)["ips"][0].get("version").is_none());
        assert_eq!(
            (&json(Version::V040)["ips"][0]["version"], &json(Version::V031)["ips"][1]["version"]),
            (&"4".into(), &"6".into())
        );
        for version in Version::ALL {
            assert_eq!(json(version)["cniVersion"], version.as_str());
            let back: Answer = serde_json::from_str(&answer.to_json(version)).unwrap();
            assert_eq!(back.ips, answer.ips);
        }
    }
}
