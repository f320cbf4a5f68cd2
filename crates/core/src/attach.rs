//! Attaching a container (or a lab's host) to a bridge: what its network namespace and the host's hold afterwards.
//!
//! ```text
//!   host                                      container
//!   cni0 10.1.15.1/24 ── veth… ─┐    ┌─ eth0 10.1.15.2/24
//!                               └────┘   default via 10.1.15.1
//! ```
//! The attachment is kept as `<state>/attachments/<containerID>:<ifname>.json`; the agent only reads these files.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::host::{Addr, Few, HostState, Link, LinkKind, Object, PROTO_BOOT, Route, RouteEntry, RouteKey, TABLE_MAIN};
use crate::net::{Inet, LinkName, Mtu, Prefix};
use crate::reconcile::{Claim, Desired};

/// The `"format"` of an attachment file.
pub const FORMAT: &str = "twill-attachment";
/// The newest `"version"` of an attachment file that is understood.
pub const VERSION: u32 = 1;

/// What is asked for: one device in a container, joined to a bridge of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Who it is for; a runtime's container ID, or a name.
    pub container_id: String,
    /// The device in the container.
    pub ifname: LinkName,
    /// The container's network namespace, as a path.
    pub netns: Box<str>,
    /// The host's end of the pair.
    pub host_device: LinkName,
    /// The bridge; made when it is missing.
    pub bridge: LinkName,
    /// The bridge's own address, the container's way out: one for each family in use.
    pub gateways: Vec<Inet>,
    /// The container's addresses, one for each family in use.
    pub addresses: Vec<Inet>,
    /// MTU of the pair; `None`: the kernel's own.
    pub mtu: Option<Mtu>,
    /// True when the host must forward for the container.
    pub forward: bool,
}

impl Request {
    /// What the host's namespace holds: bridge, its addresses, the pair, forwarding. The pair's other end is made in the container.
    pub fn host_side(&self) -> Desired {
        let mut host = bridge(self.bridge, &self.gateways, self.mtu);
        host.insert(Object::Link(Box::new(Link {
            name: self.host_device,
            kind: LinkKind::Veth { peer: Some(self.ifname), peer_netns: Some(self.netns.clone()) },
            mac: None,
            mtu: self.mtu,
            up: true,
            master: Some(self.bridge),
            carrier: true,
        })));
        if self.forward {
            for gateway in &self.gateways {
                let path = if gateway.addr.is_ipv4() { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" };
                host.insert(Object::Sysctl { path: path.into(), value: "1".into() });
            }
        }
        Desired { host, claim: Claim::default() }
    }

    /// What the container's namespace holds before the pair is there. Without an IPv6 address IPv6 is off, as docker has it: else the
    /// container would speak on the bridge before anybody asked it.
    pub fn container_before(&self) -> Desired {
        let mut host: HostState = loopback().into_iter().collect();
        if self.addresses.iter().all(|inet| inet.addr.is_ipv4()) {
            host.extend(["all", "default"].map(|which| Object::Sysctl {
                path: format!("net/ipv6/conf/{which}/disable_ipv6").into(),
                value: "1".into(),
            }));
        }
        Desired { host, claim: Claim::default() }
    }

    /// What the container's namespace holds, once the pair is there: loopback, the device, its addresses, the way out.
    pub fn container_side(&self) -> Desired {
        let mut host = HostState::new();
        host.extend(loopback());
        host.insert(Object::Link(Box::new(Link {
            name: self.ifname,
            kind: LinkKind::Veth { peer: None, peer_netns: None },
            mac: None,
            mtu: self.mtu,
            up: true,
            master: None,
            carrier: true,
        })));
        host.extend(self.addresses.iter().map(|&inet| Object::Addr(Addr { link: self.ifname, inet, scope: 0 })));
        host.extend(self.gateways.iter().map(|gateway| default_route(self.ifname, gateway.addr)));
        Desired { host, claim: Claim::default() }
    }

    /// What is written down of it.
    pub fn record(&self, boot_id: &str, netns_inode: u64) -> Attachment {
        Attachment {
            format: FORMAT.into(),
            version: VERSION,
            container_id: self.container_id.clone(),
            ifname: self.ifname,
            boot_id: boot_id.to_owned(),
            netns: self.netns.to_string(),
            netns_inode,
            bridge: self.bridge,
            host_device: self.host_device,
            addresses: self.addresses.clone(),
            gateways: self.gateways.iter().map(|gateway| gateway.addr).collect(),
            ports: Vec::new(),
        }
    }
}

/// A bridge that is up, with its addresses.
pub fn bridge(name: LinkName, addresses: &[Inet], mtu: Option<Mtu>) -> HostState {
    let mut host = HostState::new();
    let link = Link { name, kind: LinkKind::Bridge, mac: None, mtu, up: true, master: None, carrier: true };
    host.insert(Object::Link(Box::new(link)));
    host.extend(addresses.iter().map(|&inet| Object::Addr(Addr { link: name, inet, scope: 0 })));
    host
}

/// The loopback device, up.
pub fn loopback() -> Option<Object> {
    let kind = LinkKind::Other { name: "device".into() };
    let name = "lo".parse().ok()?;
    Some(Object::Link(Box::new(Link { name, kind, mac: None, mtu: None, up: true, master: None, carrier: true })))
}

/// As `ip route add default via GATEWAY dev LINK` leaves it.
fn default_route(link: LinkName, gateway: IpAddr) -> Object {
    let (dst, metric) = if gateway.is_ipv4() { (Prefix::DEFAULT_V4, 0) } else { (Prefix::DEFAULT_V6, IPV6_METRIC) };
    let entry = RouteEntry {
        via: Some(gateway),
        dev: Some(link),
        onlink: false,
        protocol: PROTO_BOOT,
        kind: UNICAST,
        scope: 0,
        src: None,
        special: false,
    };
    Object::Route(Route { key: RouteKey { table: TABLE_MAIN, dst, tos: 0, metric }, entries: Few::One(entry) })
}

/// RTN_UNICAST.
const UNICAST: u8 = 1;
/// IP6_RT_PRIO_USER: the metric that IPv6 gives a route without one.
const IPV6_METRIC: u32 = 1024;

/// An attachment as it is kept on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// [`FORMAT`].
    pub format: String,
    /// At most [`VERSION`].
    pub version: u32,
    /// Who it is for.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// The device in the container.
    pub ifname: LinkName,
    /// The boot that it belongs to (/proc/sys/kernel/random/boot_id): after another one it is stale.
    pub boot_id: String,
    /// The container's network namespace, as a path.
    pub netns: String,
    /// The namespace's inode: a path may be used again for another namespace.
    pub netns_inode: u64,
    /// The bridge.
    pub bridge: LinkName,
    /// The host's end of the pair.
    pub host_device: LinkName,
    /// The container's addresses.
    pub addresses: Vec<Inet>,
    /// Its ways out.
    pub gateways: Vec<IpAddr>,
    /// Published ports.
    pub ports: Vec<serde_json::Value>,
}

/// Why an attachment file cannot be read. The file is left untouched.
#[derive(Debug, thiserror::Error)]
pub enum BadAttachment {
    /// Not the JSON of an attachment.
    #[error("it is not an attachment's JSON")]
    Json(#[from] serde_json::Error),
    /// Some other format.
    #[error("its format is {0:?}, not {FORMAT:?}")]
    Format(String),
    /// Written by a newer release.
    #[error("its version is {0}, and {VERSION} is the newest that is understood")]
    Newer(u32),
}

impl Attachment {
    /// The file's name below `attachments/`.
    pub fn file_name(&self) -> String {
        format!("{}:{}.json", self.container_id, self.ifname)
    }

    /// The file's content.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }

    /// Reads a file's content.
    pub fn parse(text: &[u8]) -> Result<Self, BadAttachment> {
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let head: Head = serde_json::from_slice(text)?;
        if head.format != FORMAT {
            return Err(BadAttachment::Format(head.format));
        }
        if head.version > VERSION {
            return Err(BadAttachment::Newer(head.version));
        }
        Ok(serde_json::from_slice(text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::Key;
    use crate::reconcile::{Caps, Scope, effect, plan};

    fn request() -> Request {
        Request {
            container_id: "container-1".into(),
            ifname: "eth0".parse().unwrap(),
            netns: "/proc/7/ns/net".into(),
            host_device: "veth1".parse().unwrap(),
            bridge: "cni0".parse().unwrap(),
            gateways: vec!["10.1.15.1/24".parse().unwrap(), "fd00:15::1/64".parse().unwrap()],
            addresses: vec!["10.1.15.2/24".parse().unwrap(), "fd00:15::2/64".parse().unwrap()],
            mtu: Some(Mtu::try_from(1450).unwrap()),
            forward: true,
        }
    }

    #[test]
    fn the_host_gets_bridge_pair_and_forwarding_for_each_family() {
        let want = request().host_side();
        for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
            assert!(want.host.get(&Key::Sysctl(path.into())).is_some());
        }
        let veth = want.host.link("veth1".parse().unwrap()).unwrap();
        assert_eq!(veth.master, Some("cni0".parse().unwrap()));
    }

    #[test]
    fn the_container_gets_a_way_out_for_each_family() {
        let want = request().container_side();
        let mut have: HostState = loopback().into_iter().collect();
        plan(&want, &have.clone(), &Caps::default(), Scope::All).steps.iter().for_each(|s| effect(&mut have, &s.op));
        let routes = have.iter().filter(|(k, _)| matches!(k, Key::Route(r) if r.dst.len() == 0)).count();
        assert_eq!(routes, 2);
    }

    #[test]
    fn the_file_reads_back_and_a_newer_one_is_refused() {
        let kept = request().record("b", 4026531840);
        assert_eq!(kept.file_name(), "container-1:eth0.json");
        let text = kept.to_json().unwrap();
        assert_eq!(Attachment::parse(text.as_bytes()).unwrap(), kept);
        let newer = text.replace("\"version\": 1", "\"version\": 2");
        assert!(matches!(Attachment::parse(newer.as_bytes()), Err(BadAttachment::Newer(2))));
        let other = text.replace(FORMAT, "x");
        assert!(matches!(Attachment::parse(other.as_bytes()), Err(BadAttachment::Format(_))));
    }
}
