//! Backends: from one peer's lease to the objects that reach it. Each is one pure file.

pub mod udp;
pub mod vxlan;

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::config::{BackendConfig, NetworkConfig};
use crate::host::{HostState, Object};
use crate::lease::{Lease, LeaseAttrs, Peer, PeerFault};
use crate::net::{Inet, LinkName, MacAddr, Mtu, NodeId, Prefix, is_host};

pub use udp::{TunnelPeer, TunnelSpec};

/// What a backend may know of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Cx {
    /// The whole network of each family in use.
    pub networks: Vec<Prefix>,
    /// Own subnets, one for each family in use.
    pub subnets: Vec<Prefix>,
    /// The underlay as chosen.
    pub underlay: Underlay,
    /// Hardware address of each tunnel device: own lease, live device, state file, derived, in that order.
    pub macs: BTreeMap<LinkName, MacAddr>,
    /// The node's identity, from which a MAC is derived where `macs` has none.
    pub node: NodeId,
}

impl Cx {
    /// The hardware address that `device` is to have.
    pub fn mac(&self, device: LinkName) -> MacAddr {
        self.macs.get(&device).copied().unwrap_or_else(|| vxlan::derive_mac(&self.node, device))
    }
}

/// The host's own network, as chosen by `--iface` and its like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// The device.
    pub link: LinkName,
    /// Its MTU.
    pub mtu: Mtu,
    /// IPv4 address with its length.
    pub v4: Option<Inet>,
    /// IPv6 address with its length.
    pub v6: Option<Inet>,
    /// The address that peers are told, when it is not the device's own (`--public-ip`).
    pub public_v4: Option<IpAddr>,
    /// As `public_v4`, for IPv6.
    pub public_v6: Option<IpAddr>,
}

impl Underlay {
    /// The address of a family that peers are told.
    pub fn public(&self, v4: bool) -> Option<IpAddr> {
        let (told, own) = if v4 { (self.public_v4, self.v4) } else { (self.public_v6, self.v6) };
        told.or(own.map(|inet| inet.addr))
    }
}

/// What reaches a peer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// In the kernel: neighbour, forwarding entry, route.
    pub objects: Vec<Object>,
    /// In the tunnel, where the backend has one.
    pub tunnel: Option<TunnelPeer>,
    /// Why one of its families is left out.
    pub fault: Option<PeerFault>,
}

/// A backend that cannot work with this configuration on this host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// Stable kebab-case code, e.g. `backend-not-built`, `mtu-too-small`.
    pub code: &'static str,
    /// What is wrong and what is allowed.
    pub message: String,
    /// What to do next.
    pub hint: String,
}

/// One way to carry packets between hosts.
pub trait Backend: std::fmt::Debug + Send + Sync {
    /// `BackendType` in a lease; `None` for udp.
    fn lease_type(&self) -> Option<&'static str>;
    /// The tunnel device of IPv4, where there is one.
    fn device(&self) -> Option<LinkName>;
    /// The tunnel devices for these subnets.
    fn devices(&self, subnets: &[Prefix]) -> Vec<LinkName>;
    /// Inner packets of a family travel between the hosts' IPv4 addresses.
    fn over_v4(&self, v4: bool) -> bool {
        v4
    }
    /// MTU of the overlay over this underlay, by the family of the inner packet.
    fn mtu(&self, underlay: &Underlay, v4: bool) -> Result<Mtu, Refusal>;
    /// Own objects: device, address, sysctls.
    fn base(&self, cx: &Cx) -> Result<HostState, Refusal>;
    /// Whether a lease tells what reaches its holder in one family, as far as every node sees it alike: collisions are decided by it.
    fn accepts(&self, networks: &[Prefix], lease: &Lease, v4: bool) -> Result<(), PeerFault>;
    /// What reaches a peer. A fault drops that peer only, and what is missing for one family that family only.
    fn peer(&self, cx: &Cx, peer: &Peer) -> Result<Reach, PeerFault>;
    /// The tunnel that user space runs, where the backend has one. A backend opens no socket.
    fn tunnel(&self, _cx: &Cx) -> Result<Option<TunnelSpec>, Refusal> {
        Ok(None)
    }
    /// What our own lease says of us: type and data (identity is added by the caller).
    fn attrs(&self, cx: &Cx) -> LeaseAttrs;
}

/// The backend that a config names.
pub fn build(config: &BackendConfig) -> Result<Box<dyn Backend>, Refusal> {
    match config {
        BackendConfig::Udp(udp) => Ok(Box::new(udp.clone())),
        BackendConfig::Vxlan(vxlan) => Ok(Box::new(vxlan.clone())),
        BackendConfig::NotBuilt(name) => Err(Refusal {
            code: "backend-not-built",
            message: format!("backend {name:?} is not built yet"),
            hint: "set Backend.Type to vxlan or udp in the network config".into(),
        }),
    }
}

/// Which leases a network's nodes program, as its config says: all of them come to the same answer.
#[derive(Debug)]
pub struct Rule {
    config: NetworkConfig,
    networks: Vec<Prefix>,
    backend: Box<dyn Backend>,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.config == other.config
    }
}

impl Rule {
    /// The rule of a network.
    pub fn new(config: &NetworkConfig) -> Result<Self, Refusal> {
        Ok(Self { config: config.clone(), networks: config.networks(), backend: build(&config.backend)? })
    }

    /// `Ok`: its holder can be reached in one family at least; else what is wrong with the lease.
    pub fn accepts(&self, lease: &Lease) -> Result<(), PeerFault> {
        if lease.attrs.backend_type.as_deref() != self.backend.lease_type() {
            let theirs = lease.attrs.backend_type.clone().unwrap_or_else(|| "udp".into());
            return Err(
                lease.fault("foreign-backend", format!("its backend is {theirs}, and this network's is another"))
            );
        }
        if let Some(outside) = lease.key.subnets().find(|s| !self.networks.iter().any(|n| n.covers(s))) {
            return Err(lease.fault("outside-network", format!("its subnet {outside} is not in the network")));
        }
        let mut ways = lease.key.subnets().map(|subnet| self.backend.accepts(&self.networks, lease, subnet.is_v4()));
        let first = ways.next().unwrap_or(Ok(()));
        match (first, ways.next()) {
            // What is missing for one family leaves out that family only.
            (Err(fault), Some(second)) if fault.code == "bad-lease-value" => second,
            (Ok(()), Some(Err(fault))) if fault.code != "bad-lease-value" => Err(fault),
            (first, _) => first,
        }
    }
}

/// The node must forward, and the tunnel must not take routes from strangers.
fn forwarding(name: LinkName, v4: bool) -> Vec<Object> {
    let (mut list, of_device) =
        (Vec::new(), |what: &str| format!("net/ipv{}/conf/{name}/{what}", if v4 { 4 } else { 6 }));
    list.push((if v4 { "net/ipv4/ip_forward".into() } else { "net/ipv6/conf/all/forwarding".to_owned() }, "1"));
    list.push((of_device("forwarding"), "1"));
    if !v4 {
        list.push((of_device("accept_ra"), "0"));
        // Where it is 1 the kernel refuses addresses and routes; sysctls are written before both.
        list.push((of_device("disable_ipv6"), "0"));
    }
    list.into_iter().map(|(path, value)| Object::Sysctl { path: path.into(), value: value.into() }).collect()
}

/// The underlay address that a lease tells of its holder.
fn told_host(networks: &[Prefix], lease: &Lease, v4: bool) -> Result<IpAddr, PeerFault> {
    let host = if v4 { lease.attrs.public_ip.map(IpAddr::V4) } else { lease.attrs.public_ipv6.map(IpAddr::V6) };
    let key = if v4 { "PublicIP" } else { "PublicIPv6" };
    let host = host.ok_or_else(|| lease.fault("bad-lease-value", format!("{key} is missing, or all zeros")))?;
    if !is_host(host) {
        return Err(lease.fault("bad-lease-value", not_a_host(key, host)));
    }
    if let Some(network) = networks.iter().find(|network| network.contains(host)) {
        let reason =
            format!("{key} {host} lies in the network {network}: its packets would go through the tunnel again");
        return Err(lease.fault("bad-lease-value", reason));
    }
    Ok(host)
}

fn not_a_host(key: &str, host: IpAddr) -> String {
    format!("{key} {host} is not the address of a host: a unicast address on the underlay is allowed")
}

/// True for the broadcast and the network address of an interface's own IPv4 network.
fn is_for_all(own: Inet, ip: IpAddr) -> bool {
    let network = own.network();
    ip.is_ipv4() && own.len() < 31 && (ip == network.last() || ip == network.addr())
}

/// Why peers must not be told this `--public-ip`; `None`: it is good, or the device's own address.
pub fn bad_public_ip(underlay: &Underlay, networks: &[Prefix]) -> Option<Refusal> {
    let [v4, v6] = [(underlay.public_v4, underlay.v4), (underlay.public_v6, underlay.v6)];
    let (ip, why) = [v4, v6].into_iter().find_map(|(told, own)| {
        let ip = told?;
        match networks.iter().find(|network| network.contains(ip)) {
            Some(network) => Some((ip, format!("lies in the container network {network}"))),
            None => Some((ip, format!("is for all hosts of {}", own.filter(|own| is_for_all(*own, ip))?.network()))),
        }
    })?;
    Some(Refusal {
        code: "bad-public-ip",
        message: format!("public-ip {ip} {why}: a unicast address outside the container network is allowed"),
        hint: "name the address at which the other nodes reach this one".into(),
    })
}

/// The underlay address of the host that holds the lease, which is another one than this.
fn host_of(cx: &Cx, lease: &Lease, v4: bool) -> Result<IpAddr, PeerFault> {
    let host = told_host(&cx.networks, lease, v4)?;
    let own = if v4 { cx.underlay.v4 } else { cx.underlay.v6 };
    let key = if v4 { "PublicIP" } else { "PublicIPv6" };
    if own.is_some_and(|inet| is_for_all(inet, host)) {
        return Err(lease.fault("bad-lease-value", not_a_host(key, host)));
    }
    if own.is_some_and(|inet| inet.addr == host) || cx.underlay.public(v4) == Some(host) {
        return Err(lease.fault("duplicate-public-ip", format!("{key} {host} is this node's own address")));
    }
    Ok(host)
}

fn as_v4(ip: IpAddr) -> Option<std::net::Ipv4Addr> {
    match ip {
        IpAddr::V4(ip) => Some(ip),
        IpAddr::V6(_) => None,
    }
}

fn as_v6(ip: IpAddr) -> Option<std::net::Ipv6Addr> {
    match ip {
        IpAddr::V4(_) => None,
        IpAddr::V6(ip) => Some(ip),
    }
}
