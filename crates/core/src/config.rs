//! The network config: flannel's JSON below `<prefix>/config`, checked once.

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::backend::udp::UdpConfig;
use crate::backend::vxlan::VxlanConfig;
use crate::flannel::go_json::Fields;
use crate::net::{BadValue, Mtu, Port, Prefix, Vni, ip_to_bits};

/// A network, as the store configures it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetworkConfig {
    /// IPv4, when it is enabled.
    pub v4: Option<Range>,
    /// IPv6, when it is enabled.
    pub v6: Option<Range>,
    /// How packets are carried.
    pub backend: BackendConfig,
    /// Destinations outside that see the containers' own addresses.
    pub no_masq: Vec<Prefix>,
}

/// One family's network, and the subnets that may be leased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The whole network.
    pub network: Prefix,
    /// Length of a node's subnet.
    pub subnet_len: u8,
    /// First subnet that may be leased.
    pub min: Prefix,
    /// Last subnet that may be leased.
    pub max: Prefix,
}

/// The `Backend` object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackendConfig {
    /// Type udp, which an absent Backend means, as in flannel.
    Udp(UdpConfig),
    /// Type vxlan.
    Vxlan(VxlanConfig),
    /// A type of flannel's that is not built here yet, by its name.
    NotBuilt(String),
}

/// A bad value: the key, the value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("network config: {}", self.words())]
pub struct ConfigFault {
    /// The key with its path, e.g. `Backend.VNI`; empty: the whole text.
    pub key: String,
    /// The value and what is allowed.
    pub bad: BadValue,
    /// Where in a text that is no JSON object; else empty.
    pub place: String,
}

/// Types of flannel's that exist elsewhere.
const KNOWN_TYPES: [&str; 9] =
    ["udp", "host-gw", "wireguard", "ipip", "ipsec", "alloc", "extension", "tencent-vpc", "vxlan"];
const KEYS: [&str; 13] = [
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6Network",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "Backend",
    "NoMasqCIDRs",
];
const UDP_KEYS: [&str; 2] = ["Type", "Port"];
const VXLAN_KEYS: [&str; 6] = ["Type", "VNI", "Port", "MTU", "GBP", "Learning"];
/// flannel's default (pkg/backend/udp/udp_amd64.go).
const UDP_PORT: i64 = 8285;
/// The kernel's own VXLAN port where flannel's config says 0 (drivers/net/vxlan/vxlan_core.c `vxlan_port`).
const VXLAN_PORT: i64 = 8472;

impl NetworkConfig {
    /// Reads the config as Go would. Beside it: what was there and is ignored, one sentence each.
    pub fn parse(text: &[u8]) -> Result<(NetworkConfig, Vec<String>), ConfigFault> {
        let fields = Fields::parse(text).map_err(|e| ConfigFault {
            place: format!(": {e}"),
            ..fault("", String::from_utf8_lossy(text), "a JSON object")
        })?;
        let mut ignored: Vec<String> =
            fields.unknown(&KEYS).iter().map(|key| format!("{key} is not a key of the network config")).collect();
        if fields.has("EnableNFTables") {
            ignored.push("EnableNFTables has no effect: nftables is always used".into());
        }
        let flag = |key, default| Ok(value::<bool>(&fields, key, "true or false")?.unwrap_or(default));
        let v4 = flag("EnableIPv4", true)?.then(|| range(&fields, true)).transpose()?;
        let v6 = flag("EnableIPv6", false)?.then(|| range(&fields, false)).transpose()?;
        if v4.is_none() && v6.is_none() {
            return Err(fault("EnableIPv4", "false", "true where EnableIPv6 is not"));
        }
        let backend = match fields.get("Backend") {
            Some(raw) => backend(raw, v4.is_some(), &mut ignored)?,
            None if fields.has("Backend") => return Err(fault("Backend", "null", "an object with a Type")),
            None => udp(&Fields::default(), v4.is_some()).map(BackendConfig::Udp)?,
        };
        Ok((NetworkConfig { v4, v6, backend, no_masq: no_masq(&fields)? }, ignored))
    }

    /// The ranges, IPv4 first.
    pub fn ranges(&self) -> impl Iterator<Item = Range> + use<> {
        [self.v4, self.v6].into_iter().flatten()
    }

    /// The networks, IPv4 first.
    pub fn networks(&self) -> Vec<Prefix> {
        self.ranges().map(|range| range.network).collect()
    }

    /// The config that a fresh store gets: one network of each family over this backend.
    pub fn default_json(networks: &[Prefix], backend: &str) -> String {
        let mut config = serde_json::Map::new();
        for network in networks {
            let key = if network.is_v4() { "Network" } else { "IPv6Network" };
            if !network.is_v4() {
                config.insert("EnableIPv6".into(), true.into());
            }
            config.insert(key.into(), network.to_string().into());
        }
        if !config.contains_key("Network") {
            config.insert("EnableIPv4".into(), false.into());
        }
        config.insert("Backend".into(), serde_json::json!({"Type": backend}));
        serde_json::Value::Object(config).to_string()
    }
}

impl Range {
    /// How many subnets may be leased.
    pub fn count(&self) -> u128 {
        let index = |p: &Prefix| self.network.index_of(p).unwrap_or(0);
        index(&self.max).saturating_sub(index(&self.min)).saturating_add(1)
    }

    /// The `n`-th subnet that may be leased.
    pub fn nth(&self, n: u128) -> Option<Prefix> {
        let first = self.network.index_of(&self.min)?;
        self.network.subnet(self.subnet_len, first.checked_add(n)?).filter(|p| p.addr() <= self.max.addr())
    }

    /// True when `subnet` is one that may be leased.
    pub fn allows(&self, subnet: &Prefix) -> bool {
        subnet.len() == self.subnet_len
            && self.network.covers(subnet)
            && subnet.addr() >= self.min.addr()
            && subnet.addr() <= self.max.addr()
    }
}

/// Networks that are not masqueraded; host bits are refused, since they hide a slip.
fn no_masq(fields: &Fields<'_>) -> Result<Vec<Prefix>, ConfigFault> {
    const KEY: &str = "NoMasqCIDRs";
    let allowed = "a list of networks like [\"192.0.2.0/24\"]";
    let texts = value::<Vec<String>>(fields, KEY, allowed)?.unwrap_or_default();
    texts.iter().map(|text| text.parse().map_err(|_| fault(KEY, text, "a network like 192.0.2.0/24"))).collect()
}

/// One family's range by flannel's rules (`pkg/subnet/config.go`).
fn range(fields: &Fields<'_>, v4: bool) -> Result<Range, ConfigFault> {
    let key = |name: &str| if v4 { name.to_owned() } else { format!("IPv6{name}") };
    let network_key = key("Network");
    let allowed = if v4 { "an IPv4 network like 10.244.0.0/16" } else { "an IPv6 network like fd00:244::/56" };
    let text = value::<String>(fields, &network_key, allowed)?.ok_or_else(|| fault(&network_key, "absent", allowed))?;
    let inet: Option<crate::net::Inet> = text.parse().ok();
    let network = inet
        .map(|inet| inet.network())
        .filter(|n| n.is_v4() == v4)
        .ok_or_else(|| fault(&network_key, &text, allowed))?;
    usable(network)?;
    let (usual, deepest) = if v4 { (24, 28) } else { (64, 124) };
    if network.len() > deepest {
        let allowed = if v4 { "a network of /28 or larger" } else { "a network of /124 or larger" };
        return Err(fault(&network_key, network, allowed));
    }
    let default = if network.len() + 2 <= usual { usual } else { network.len() + 2 };
    let len_key = key("SubnetLen");
    let wished =
        value::<u64>(fields, &len_key, if v4 { "a prefix length up to 30" } else { "a prefix length up to 126" })?
            .filter(|&len| len != 0);
    let subnet_len = wished.unwrap_or(u64::from(default));
    if subnet_len < u64::from(network.len()) + 2 {
        return Err(fault(&len_key, subnet_len, "at least two more than the network's length (four subnets)"));
    }
    if subnet_len > u64::from(network.bits()) - 2 {
        return Err(fault(&len_key, subnet_len, if v4 { "at most 30" } else { "at most 126" }));
    }
    let subnet_len = subnet_len as u8;
    let last = (1u128 << (subnet_len - network.len()).min(127)) - 1;
    let bound = |name: &str, default: u128| bound(fields, &key(name), network, subnet_len, default);
    let (min, max) = (bound("SubnetMin", 1)?, bound("SubnetMax", last)?);
    if min.addr() > max.addr() {
        return Err(fault(&key("SubnetMin"), min.addr(), "an address not above SubnetMax"));
    }
    Ok(Range { network, subnet_len, min, max })
}

/// Refuses a network with addresses that no container can have: this network, loopback, link-local, multicast, reserved (RFC 6890).
pub(crate) fn usable(network: Prefix) -> Result<(), ConfigFault> {
    const NEVER: [&str; 8] = [
        "0.0.0.0/8",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::1/128",
        "fe80::/10",
        "ff00::/8",
    ];
    if !NEVER.iter().any(|never| never.parse().is_ok_and(|never: Prefix| never.overlaps(&network))) {
        return Ok(());
    }
    Err(if network.is_v4() {
        let allowed = "a network outside 0.0.0.0/8, 127.0.0.0/8, 169.254.0.0/16, 224.0.0.0/4 and 240.0.0.0/4";
        fault("Network", network, allowed)
    } else {
        fault("IPv6Network", network, "a network outside ::1, fe80::/10 and ff00::/8")
    })
}

/// SubnetMin or SubnetMax: an address in the network, on a subnet's boundary.
fn bound(fields: &Fields<'_>, key: &str, network: Prefix, len: u8, default: u128) -> Result<Prefix, ConfigFault> {
    let Some(text) = value::<String>(fields, key, "an address in the network")? else {
        return network.subnet(len, default).ok_or_else(|| fault(key, "absent", "an address in the network"));
    };
    let addr: std::net::IpAddr = text.parse().map_err(|_| fault(key, &text, "an address in the network"))?;
    if !network.contains(addr) {
        return Err(fault(key, addr, "an address in the network"));
    }
    Prefix::strict(addr, len).map_err(|_| fault(key, addr, "the first address of a subnet of SubnetLen"))
}

fn backend(raw: &RawValue, over_v4: bool, ignored: &mut Vec<String>) -> Result<BackendConfig, ConfigFault> {
    let fields =
        Fields::parse(raw.get().as_bytes()).map_err(|_| fault("Backend", raw.get(), "an object with a Type"))?;
    let kind = value::<String>(&fields, "Type", "a backend's name").map_err(|f| f.below("Backend"))?;
    let kind = kind.unwrap_or_default().to_lowercase();
    match kind.as_str() {
        "vxlan" => {
            for key in fields.unknown(&VXLAN_KEYS) {
                let what = if key.eq_ignore_ascii_case("DirectRouting") {
                    "has no effect yet"
                } else {
                    "is not a key of the vxlan backend"
                };
                ignored.push(format!("Backend.{key} {what}"));
            }
            vxlan(&fields).map(BackendConfig::Vxlan)
        }
        "udp" => {
            let unknown = fields.unknown(&UDP_KEYS);
            ignored.extend(unknown.iter().map(|key| format!("Backend.{key} is not a key of the udp backend")));
            udp(&fields, over_v4).map(BackendConfig::Udp)
        }
        known if KNOWN_TYPES.contains(&known) => Ok(BackendConfig::NotBuilt(kind)),
        _ => Err(fault(
            "Backend.Type",
            &kind,
            "one of vxlan, udp, host-gw, wireguard, ipip, ipsec, alloc, extension, tencent-vpc",
        )),
    }
}

fn udp(fields: &Fields<'_>, over_v4: bool) -> Result<UdpConfig, ConfigFault> {
    let port = value::<i64>(fields, "Port", "a port from 1 to 65535").map_err(|f| f.below("Backend"))?;
    let port = Port::try_from(port.filter(|&port| port != 0).unwrap_or(UDP_PORT));
    let port = port.map_err(|bad| ConfigFault { key: "Backend.Port".into(), bad, place: String::new() })?;
    Ok(UdpConfig { port, over_v4 })
}

fn vxlan(fields: &Fields<'_>) -> Result<VxlanConfig, ConfigFault> {
    let number = |key: &str, allowed| value::<i64>(fields, key, allowed).map_err(|f| f.below("Backend"));
    let flag = |key: &str| {
        Ok(value::<bool>(fields, key, "true or false").map_err(|f: ConfigFault| f.below("Backend"))?.unwrap_or(false))
    };
    let at = |key: &str| {
        let key = format!("Backend.{key}");
        move |bad: BadValue| ConfigFault { key: key.clone(), bad, place: String::new() }
    };
    let port = number("Port", "a port from 1 to 65535")?.filter(|&port| port != 0).unwrap_or(VXLAN_PORT);
    let mtu = number("MTU", "an MTU from 68 to 65535")?.filter(|&mtu| mtu != 0);
    Ok(VxlanConfig {
        vni: Vni::try_from(number("VNI", "a VNI from 0 to 16777215")?.unwrap_or(1)).map_err(at("VNI"))?,
        port: Port::try_from(port).map_err(at("Port"))?,
        mtu: mtu.map(Mtu::try_from).transpose().map_err(at("MTU"))?,
        gbp: flag("GBP")?,
        learning: flag("Learning")?,
    })
}

/// The value of a key, where it is there.
fn value<'a, T: Deserialize<'a>>(
    fields: &Fields<'a>,
    key: &str,
    allowed: &'static str,
) -> Result<Option<T>, ConfigFault> {
    let parse = |raw: &'a RawValue| serde_json::from_str(raw.get()).map_err(|_| fault(key, raw.get(), allowed));
    fields.get(key).map(parse).transpose()
}

fn fault(key: &str, value: impl std::fmt::Display, allowed: &'static str) -> ConfigFault {
    ConfigFault { key: key.to_owned(), bad: BadValue::new(value, allowed), place: String::new() }
}

impl ConfigFault {
    /// The fault of the config that a store has at this key.
    pub fn at(&self, key: &str) -> String {
        format!("network config {key}: {}", self.words())
    }

    fn words(&self) -> String {
        let key = if self.key.is_empty() { String::new() } else { format!("{}: ", self.key) };
        format!("{key}{}{}", self.bad, self.place)
    }

    fn below(mut self, parent: &str) -> Self {
        self.key = format!("{parent}.{}", self.key);
        self
    }
}

/// What of this host clashes with a network: addresses, and routes of the main table, inside or around it, but for what is ours.
pub fn overlaps(
    networks: &[Prefix],
    host: &crate::host::HostState,
    own_devices: &[crate::net::LinkName],
    own_subnets: &[Prefix],
) -> Vec<String> {
    use crate::host::Object;
    let mine = |dev: Option<crate::net::LinkName>, prefix: &Prefix| {
        dev.is_some_and(|dev| own_devices.contains(&dev)) || own_subnets.iter().any(|own| own.covers(prefix))
    };
    let mut clashes = Vec::new();
    for (_, object) in host.iter() {
        let (dev, prefix, is_default) = match object {
            Object::Addr(addr) => (Some(addr.link), addr.inet.network(), false),
            Object::Route(route) => {
                let entry = route.entries.first();
                let main = route.key.table == crate::host::TABLE_MAIN;
                if !main || entry.is_some_and(|e| e.protocol == crate::host::PROTO_TWILL || e.kind != 1) {
                    continue;
                }
                (entry.and_then(|e| e.dev), route.key.dst, route.key.dst.len() == 0)
            }
            _ => continue,
        };
        if !is_default
            && !mine(dev, &prefix)
            && networks.iter().any(|n| n.overlaps(&prefix))
            && ip_to_bits(prefix.addr()) != 0
        {
            clashes.push(object.to_string());
        }
    }
    clashes
}
