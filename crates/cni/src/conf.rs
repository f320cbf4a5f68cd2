//! The network configuration: raw JSON → what is asked for, checked once.
//!
//! Three types make devices: `twill-cni` (ours), `flannel` (its `delegate` holds the bridge's keys) and `bridge`. Under any other type
//! somebody else's plugin makes the devices and asks for addresses alone: behaviour follows the configuration, never the program's name.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};
use twill_core::ipam::{BadRange, Range, RangeSet};
use twill_core::net::{Inet, LinkName, MacAddr, Mtu, Prefix};
use twill_core::ports::{PortMap, Transport};

use crate::env::{NAMES, address, can_be_made, unicast};
use crate::error::{CniError, Code};
use crate::result::{Answer, RouteTo, Version};

/// Where host-local keeps its addresses.
pub const NETWORKS: &str = "/var/lib/cni/networks";
/// Where Twill keeps its state.
pub const STATE: &str = "/var/lib/twill";
/// What the agent writes.
pub const SUBNET_FILE: &str = "/run/flannel/subnet.env";
/// The bridge that containers join when none is named.
pub const BRIDGE: &str = "cni0";

/// A checked configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Conf {
    /// The version that answers have.
    pub version: Version,
    /// The network's name.
    pub name: String,
    /// Twill's state.
    pub state: PathBuf,
    /// Devices; `None`: addresses alone.
    pub device: Option<Device>,
    /// Addresses; `None`: none at all.
    pub ipam: Option<Ipam>,
    /// flannel's subnet.env, when subnet and MTU come from there.
    pub subnet_file: Option<PathBuf>,
    /// What an earlier ADD answered.
    pub prev: Option<Answer>,
}

/// What the pair and the bridge are to be.
#[derive(Debug, Clone, PartialEq)]
pub struct Device {
    /// The bridge; `None`: point to point.
    pub bridge: Option<LinkName>,
    /// The bridge has the gateway's address.
    pub is_gateway: bool,
    /// The gateway is the container's way out.
    pub default_route: bool,
    /// Hide containers behind the host's address towards the outside; `None`: when subnet.env says that nobody else does.
    pub masquerade: Option<bool>,
    /// MTU; `None`: subnet.env's, or the kernel's own.
    pub mtu: Option<Mtu>,
    /// Frames may leave by the port they came in by.
    pub hairpin: bool,
    /// No frames between containers.
    pub isolated: bool,
    /// The bridge takes every frame.
    pub promisc: bool,
    /// The container's MAC.
    pub mac: Option<MacAddr>,
    /// Published ports.
    pub ports: Vec<PortMap>,
    /// The whole network, where subnet.env names it: containers of other nodes see this one's own address.
    pub networks: Vec<Prefix>,
    /// Told on to the runtime.
    pub dns: Map<String, Value>,
}

/// Where addresses come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Ipam {
    /// `<dataDir>/<network>`.
    pub dir: PathBuf,
    /// One address of each; empty: subnet.env's subnets.
    pub sets: Vec<RangeSet>,
    /// Routes for the container.
    pub routes: Vec<RouteTo>,
    /// Addresses that are asked for by name.
    pub asked: Vec<IpAddr>,
    /// A resolv.conf(5) that is told on.
    pub resolv_conf: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Raw {
    cni_version: Option<String>,
    name: Option<String>,
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(flatten)]
    bridge: RawBridge,
    delegate: Option<RawBridge>,
    ipam: Option<RawIpam>,
    runtime_config: RawRuntime,
    args: RawArgs,
    subnet_file: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    prev_result: Option<Value>,
}

#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawBridge {
    #[serde(rename = "type")]
    kind: Option<String>,
    bridge: Option<String>,
    is_gateway: Option<bool>,
    is_default_gateway: Option<bool>,
    ip_masq: Option<bool>,
    mtu: Option<i64>,
    hairpin_mode: Option<bool>,
    promisc_mode: bool,
    port_isolation: bool,
    vlan: Option<i64>,
    vlan_trunk: Option<Value>,
    macspoofchk: bool,
    disable_container_interface: bool,
    dns: Map<String, Value>,
    // What a delegate must not have.
    name: Option<String>,
    ipam: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawIpam {
    #[serde(rename = "type")]
    kind: Option<String>,
    #[serde(flatten)]
    range: RawRange,
    ranges: Vec<Vec<RawRange>>,
    routes: Vec<RawRoute>,
    data_dir: Option<PathBuf>,
    resolv_conf: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawRange {
    subnet: Option<Inet>,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
}

#[derive(Debug, Deserialize)]
struct RawRoute {
    dst: Inet,
    #[serde(default)]
    gw: Option<IpAddr>,
    #[serde(flatten)]
    rest: Map<String, Value>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawRuntime {
    ips: Vec<String>,
    mac: Option<String>,
    port_mappings: Vec<RawPort>,
}

/// Numbers of any size, so that a wrong one is named.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct RawPort {
    host_port: i64,
    container_port: i64,
    protocol: String,
    #[serde(rename = "hostIP")]
    host_ip: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RawArgs {
    cni: RawRuntime,
}

fn config(msg: impl Into<String>, details: impl Into<String>) -> CniError {
    CniError::new(Code::Config, msg, details)
}

/// Of a text that is not what a configuration looks like.
pub(crate) fn unreadable(error: serde_json::Error) -> CniError {
    let msg = format!("read the network configuration: {error}");
    CniError::new(Code::Decode, msg, "correct it below /etc/cni/net.d")
}

/// The version that a text asks for, as far as it says one: errors are told in it.
pub fn version_of(text: &[u8]) -> String {
    let value = serde_json::from_slice(text).map(as_go_reads).unwrap_or_default();
    value["cniVersion"].as_str().unwrap_or("0.3.1").to_owned()
}

impl Conf {
    /// Reads and checks a configuration.
    pub fn parse(text: &[u8]) -> Result<Self, CniError> {
        let raw = serde_json::from_slice(text).map(as_go_reads).and_then(serde_json::from_value::<Raw>);
        let raw = raw.map_err(unreadable)?;
        let version = version(raw.cni_version.as_deref())?;
        let name = raw.name.clone().unwrap_or_default();
        if !is_name(&name) {
            let allowed = "letters, digits, '_', '.' and '-' after a letter or digit";
            return Err(config(
                format!("the network configuration's name is {name:?}"),
                format!("give it a name of {allowed}"),
            ));
        }
        let kind = raw.kind.as_deref().unwrap_or_default();
        if kind.is_empty() {
            return Err(config("the network configuration has no type", "write \"type\": \"twill-cni\""));
        }
        let device = match kind {
            "twill-cni" | "bridge" => Some(Device::check(&raw.bridge, kind == "twill-cni", false)?),
            "flannel" => Some(Device::check(&delegate(&raw)?, false, true)?),
            _ => None,
        };
        let from_env = kind == "flannel" || kind == "twill-cni" && raw.ipam.as_ref().is_none_or(RawIpam::has_no_range);
        let subnet_file = from_env.then(|| raw.subnet_file.clone().unwrap_or_else(|| SUBNET_FILE.into()));
        let ipam = ipam(&raw, kind, &name, from_env)?;
        let mut conf = Self {
            version,
            name,
            state: raw.state_dir.clone().unwrap_or_else(|| STATE.into()),
            device,
            ipam,
            subnet_file,
            prev: raw.prev_result.as_ref().map(prev_result).transpose()?,
        };
        conf.asked(&raw)?;
        Ok(conf)
    }

    /// What the runtime asks for this one container.
    fn asked(&mut self, raw: &Raw) -> Result<(), CniError> {
        for asked in [&raw.args.cni, &raw.runtime_config] {
            if let Some(text) = &asked.mac {
                let mac = unicast(text).ok_or_else(|| {
                    config(format!("mac: {text:?} is not the MAC address of a device"), "write it as 02:00:00:00:00:09")
                })?;
                if let Some(device) = &mut self.device {
                    device.mac = Some(mac);
                }
            }
            for text in &asked.ips {
                let ip = address(text);
                let ip =
                    ip.ok_or_else(|| config(format!("ips: {text:?} is not an address"), "write it as 10.1.15.9"))?;
                self.ipam.iter_mut().for_each(|ipam| ipam.asked.push(ip));
            }
        }
        if let Some(device) = &mut self.device {
            device.ports = published(&raw.runtime_config.port_mappings)?;
        }
        Ok(())
    }

    /// Attachment files.
    pub fn attachments(&self) -> PathBuf {
        self.state.join("attachments")
    }
}

/// As Go reads it, in whose words runtimes write: a key's case is nothing (containerd has `HostPort`), `null` is a key that is not
/// there, and of two keys that are one the later counts.
pub(crate) fn as_go_reads(value: Value) -> Value {
    let known = |key: &str| KEYS.split(' ').find(|known| known.eq_ignore_ascii_case(key)).unwrap_or(key).to_owned();
    match value {
        Value::Object(map) => {
            let there = map.into_iter().filter(|(_, value)| !value.is_null());
            there.map(|(key, value)| (known(&key), as_go_reads(value))).collect()
        }
        Value::Array(list) => list.into_iter().map(as_go_reads).collect(),
        other => other,
    }
}

/// Every key that is understood.
const KEYS: &str = "address advmss args bridge cni cni.dev/valid-attachments cniVersion containerID containerPort dataDir delegate \
    disableContainerInterface dns dst gateway gw hairpinMode hostIP hostPort ifname interface interfaces ipMasq ipam ips \
    isDefaultGateway isGateway mac macspoofchk mtu name portIsolation portMappings prevResult priority promiscMode protocol \
    rangeEnd rangeStart ranges resolvConf routes runtimeConfig sandbox scope stateDir subnet subnetFile table type vlan vlanTrunk";

fn version(text: Option<&str>) -> Result<Version, CniError> {
    let text = text.unwrap_or("0.3.1");
    Version::parse(text).ok_or_else(|| {
        let spoken: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
        CniError::new(
            Code::Version,
            format!("the configuration's cniVersion is {text:?}"),
            format!("write one of {} in it", spoken.join(", ")),
        )
    })
}

/// The capability `portMappings`. What another one covers is not asked for anew; two that lead one host port to two places are refused.
fn published(raw: &[RawPort]) -> Result<Vec<PortMap>, CniError> {
    let mut ports: Vec<PortMap> = Vec::new();
    for raw in raw {
        let map = raw.check()?;
        if let Some(other) =
            ports.iter().find(|other| other.clashes(&map) && other.container_port != map.container_port)
        {
            let (first, second) = (other.container_port, map.container_port);
            let msg = format!("portMappings: host port {map} is to lead to port {first}, as {other}, and to {second}");
            return Err(config(msg, "publish each host port once"));
        }
        if !ports.iter().any(|other| other.covers(&map)) {
            ports.retain(|other| !map.covers(other));
            ports.push(map);
        }
    }
    Ok(ports)
}

impl RawPort {
    fn check(&self) -> Result<PortMap, CniError> {
        let port = |key: &str, port: i64| {
            let small = u16::try_from(port).ok().filter(|port| *port != 0);
            small.ok_or_else(|| config(format!("portMappings: {key} is {port}"), "a port is 1 to 65535"))
        };
        let protocol = match self.protocol.as_str() {
            "" => Transport::Tcp,
            name => Transport::parse(name)
                .ok_or_else(|| config(format!("portMappings: the protocol is {name:?}"), "write tcp, udp or sctp"))?,
        };
        let host_ip = match self.host_ip.as_str() {
            "" => None,
            text => Some(text.parse().map_err(|_| {
                config(format!("portMappings: hostIP {text:?} is not an address"), "leave it out for every address")
            })?),
        };
        let (host_port, container_port) =
            (port("hostPort", self.host_port)?, port("containerPort", self.container_port)?);
        Ok(PortMap { host_port, container_port, protocol, host_ip })
    }
}

/// Also the name of a folder.
pub(crate) fn is_name(name: &str) -> bool {
    name.len() <= 200
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(&b))
}

/// flannel's delegate.
fn delegate(raw: &Raw) -> Result<RawBridge, CniError> {
    let delegate = raw.delegate.clone().unwrap_or_default();
    if delegate.name.is_some() || delegate.ipam.is_some() {
        return Err(config(
            "the delegate has a name or ipam",
            "take them out: they come from the network and from subnet.env",
        ));
    }
    match delegate.kind.as_deref() {
        None | Some("bridge") => Ok(delegate),
        Some(other) => Err(CniError::new(
            Code::Unsupported,
            format!("the delegate's type is {other:?}"),
            "only bridge is built in; `twill cni uninstall` gives flannel's own plugin back",
        )),
    }
}

impl Device {
    fn check(raw: &RawBridge, ours: bool, flannel: bool) -> Result<Self, CniError> {
        let asks = [
            ("vlan", raw.vlan.is_some_and(|vlan| vlan != 0)),
            ("vlanTrunk", raw.vlan_trunk.as_ref().is_some_and(|trunk| trunk.as_array().is_none_or(|t| !t.is_empty()))),
            ("macspoofchk", raw.macspoofchk),
            ("disableContainerInterface", raw.disable_container_interface),
        ];
        if let Some((key, _)) = asks.iter().find(|(_, asked)| *asked) {
            return Err(CniError::new(
                Code::Unsupported,
                format!("{key} is not built in"),
                "take the key out, or `twill cni uninstall` gives the original bridge plugin back",
            ));
        }
        let name = raw.bridge.as_deref().unwrap_or(BRIDGE);
        let bridge = match name {
            // Ours, with no bridge at all.
            "" if ours => None,
            name => {
                let name: LinkName =
                    name.parse().map_err(|e| config(format!("bridge: {e}"), "name a bridge such as cni0"))?;
                if !can_be_made(name) {
                    return Err(config(format!("bridge: {name} is not {NAMES}"), "name a bridge such as cni0"));
                }
                Some(name)
            }
        };
        let mtu = raw.mtu.filter(|mtu| *mtu != 0).map(Mtu::try_from).transpose();
        let default_route = raw.is_default_gateway.unwrap_or(ours);
        Ok(Self {
            bridge,
            is_gateway: default_route || raw.is_gateway.unwrap_or(flannel),
            default_route,
            masquerade: raw.ip_masq,
            mtu: mtu.map_err(|e| config(format!("mtu: {e}"), "leave it out for subnet.env's"))?,
            hairpin: raw.hairpin_mode.unwrap_or(ours),
            isolated: raw.port_isolation,
            promisc: raw.promisc_mode,
            mac: None,
            ports: Vec::new(),
            networks: Vec::new(),
            dns: raw.dns.clone(),
        })
    }
}

impl RawIpam {
    fn has_no_range(&self) -> bool {
        self.ranges.is_empty() && self.range.subnet.is_none()
    }
}

impl RawRange {
    fn check(&self) -> Result<Range, CniError> {
        let subnet = self.subnet.ok_or_else(|| config("a range has no subnet", "write one such as 10.1.15.0/24"))?;
        Range::new(subnet.network(), self.range_start, self.range_end, self.gateway).map_err(bad_range)
    }
}

fn bad_range(error: BadRange) -> CniError {
    config(format!("ipam: {error}"), "correct the ranges of the network configuration")
}

fn ipam(raw: &Raw, kind: &str, name: &str, from_env: bool) -> Result<Option<Ipam>, CniError> {
    let none = RawIpam::default();
    let given = raw.ipam.as_ref().unwrap_or(&none);
    match given.kind.as_deref() {
        Some("host-local" | "twill-cni") => {}
        None | Some("") if from_env => {}
        None | Some("") if kind == "bridge" => return Ok(None),
        other => {
            return Err(CniError::new(
                Code::Unsupported,
                format!("the ipam type is {:?}", other.unwrap_or_default()),
                "only host-local is built in; `twill cni uninstall` gives the original plugins back",
            ));
        }
    }
    let mut sets = Vec::new();
    if given.range.subnet.is_some() {
        sets.push(RangeSet::new(vec![given.range.check()?]).map_err(bad_range)?);
    }
    for ranges in &given.ranges {
        let ranges = ranges.iter().map(RawRange::check).collect::<Result<Vec<_>, _>>()?;
        sets.push(RangeSet::new(ranges).map_err(bad_range)?);
    }
    if !from_env && sets.is_empty() {
        return Err(config("ipam has no ranges", "write \"ranges\": [[{\"subnet\": \"10.1.15.0/24\"}]]"));
    }
    for (n, set) in sets.iter().enumerate() {
        if let Some(other) = sets[..n].iter().find(|other| set.overlaps(other)) {
            return Err(config(
                format!("the ranges {other} and {set} overlap"),
                "a container gets one address of each set: set them apart",
            ));
        }
    }
    let routes =
        given.routes.iter().map(|route| RouteTo { dst: route.dst.network(), gw: route.gw, rest: route.rest.clone() });
    Ok(Some(Ipam {
        dir: given.data_dir.as_deref().unwrap_or(Path::new(NETWORKS)).join(name),
        sets: if kind == "flannel" { Vec::new() } else { sets },
        routes: routes.collect(),
        asked: Vec::new(),
        resolv_conf: given.resolv_conf.clone(),
    }))
}

/// host-local's `resolvConf`: resolv.conf(5) as the result's `dns`.
pub fn resolv_conf(text: &str) -> Map<String, Value> {
    let mut dns = Map::new();
    let mut lists: [(&str, Vec<Value>); 3] = [("nameservers", vec![]), ("search", vec![]), ("options", vec![])];
    for line in text.lines() {
        let mut words = line.split_whitespace().map(Value::from);
        match words.next().as_ref().and_then(Value::as_str) {
            Some("nameserver") => lists[0].1.extend(words.take(1)),
            Some("search") => lists[1].1.extend(words),
            Some("options") => lists[2].1.extend(words),
            Some("domain") => dns.extend(words.next().map(|word| ("domain".into(), word))),
            _ => {}
        }
    }
    dns.extend(lists.into_iter().filter(|(_, list)| !list.is_empty()).map(|(key, list)| (key.into(), list.into())));
    dns
}

fn prev_result(value: &Value) -> Result<Answer, CniError> {
    serde_json::from_value(value.clone()).map_err(|error| {
        CniError::new(Code::Decode, format!("read prevResult: {error}"), "the runtime has to pass on what ADD answered")
    })
}

/// What subnet.env adds to a configuration.
impl Ipam {
    /// One address of each of these subnets, and a way to each network.
    pub fn of_subnets(&mut self, pairs: impl IntoIterator<Item = (Prefix, Prefix)>) -> Result<(), CniError> {
        for (network, subnet) in pairs {
            let range = Range::new(subnet, None, None, None).map_err(bad_range)?;
            self.sets.push(RangeSet::new(vec![range]).map_err(bad_range)?);
            self.routes.push(RouteTo { dst: network, gw: None, rest: Map::new() });
        }
        Ok(())
    }
}
