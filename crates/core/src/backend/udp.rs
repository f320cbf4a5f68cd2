//! flannel's udp backend: a TUN device takes the packets of the whole network, and a program (the tunnel) carries each as the payload of a
//! UDP datagram to the host that holds its subnet.
//!
//! ```text
//!   100.96.0.0/16 ──connected route──▶ flannel0 ──▶ tunnel: 100.96.2.0/24 → 10.168.0.3 ──▶ UDP 8285
//! ```
//! The kernel needs one route of each family, that of the device's address; the peers are the tunnel's alone. One device and one socket
//! carry both families.

use std::net::{IpAddr, SocketAddr};

use crate::host::{Addr, HostState, Link, LinkKind, Object};
use crate::lease::{Lease, LeaseAttrs, Peer, PeerFault};
use crate::net::{Inet, LinkName, Mtu, Port, Prefix};

use super::{Backend, Cx, Reach, Refusal, Underlay, as_v4, as_v6, forwarding, host_of, told_host};

/// What the tunnel adds: an outer IP header of 20 bytes (IPv6: 40) and a UDP header of 8; the payload is the inner packet, nothing else.
const OVERHEAD: [u32; 2] = [28, 48];
/// The least MTU that IPv4 (RFC 791) and IPv6 (RFC 8200) allow.
const FLOOR: [u32; 2] = [68, 1280];
/// flannel makes `flannel%d`, and the first is this.
const DEVICE: &str = "flannel0";

/// The `Backend` object of a udp network config, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpConfig {
    /// UDP port on every node; flannel's default is 8285.
    pub port: Port,
    /// The network has IPv4: both families then travel between the hosts' IPv4 addresses; else between their IPv6 ones.
    pub over_v4: bool,
}

/// What the tunnel needs beside its peers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TunnelSpec {
    /// The TUN device.
    pub device: LinkName,
    /// Its MTU.
    pub mtu: Mtu,
    /// The socket's own address and port. Datagrams go to the same port of a peer.
    pub local: SocketAddr,
}

/// A host on the other side of the tunnel.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct TunnelPeer {
    /// Its lease's name, e.g. `100.96.2.0-24`.
    pub name: String,
    /// Its address on the underlay. Several peers may share one.
    pub host: IpAddr,
    /// The inner addresses that it stands for.
    pub subnets: Vec<Prefix>,
}

impl Backend for UdpConfig {
    fn lease_type(&self) -> Option<&'static str> {
        None
    }

    fn device(&self) -> Option<LinkName> {
        DEVICE.parse().ok()
    }

    fn devices(&self, subnets: &[Prefix]) -> Vec<LinkName> {
        self.device().filter(|_| !subnets.is_empty()).into_iter().collect()
    }

    fn over_v4(&self, _v4: bool) -> bool {
        self.over_v4
    }

    fn mtu(&self, underlay: &Underlay, v4: bool) -> Result<Mtu, Refusal> {
        let (lower, overhead) = (underlay.mtu.get(), OVERHEAD[usize::from(!self.over_v4)]);
        let floor = FLOOR[usize::from(!v4)];
        let mtu = lower.checked_sub(overhead).filter(|&mtu| mtu >= floor);
        mtu.and_then(|mtu| Mtu::try_from(i64::from(mtu)).ok()).ok_or_else(|| Refusal {
            code: "mtu-too-small",
            message: format!("an underlay MTU of {lower} leaves less than {floor} bytes beside the {overhead} of UDP"),
            hint: format!("raise the MTU of {}", underlay.link),
        })
    }

    fn base(&self, cx: &Cx) -> Result<HostState, Refusal> {
        let mut host = HostState::new();
        let (Some(name), false) = (self.device(), cx.subnets.is_empty()) else { return Ok(host) };
        let mtu = self.device_mtu(cx)?;
        host.insert(Object::Link(Box::new(Link { mtu: Some(mtu), ..Link::up(name, LinkKind::Tun) })));
        for (network, subnet) in own(cx) {
            // With the network's length the kernel makes the one route that is needed; flannel has /32 and a route of its own.
            if let Ok(inet) = Inet::new(subnet.addr(), network.len()) {
                host.insert(Object::Addr(Addr::global(name, inet)));
            }
            host.extend(forwarding(name, subnet.is_v4()));
        }
        Ok(host)
    }

    fn accepts(&self, networks: &[Prefix], lease: &Lease, _v4: bool) -> Result<(), PeerFault> {
        told_host(networks, lease, self.over_v4).map(drop)
    }

    fn peer(&self, cx: &Cx, peer: &Peer) -> Result<Reach, PeerFault> {
        let lease: &Lease = &peer.lease;
        let here = |subnet: &Prefix| cx.subnets.iter().any(|own| own.is_v4() == subnet.is_v4());
        let subnets: Vec<Prefix> = lease.key.subnets().filter(here).collect();
        if subnets.is_empty() {
            return Ok(Reach::default());
        }
        let host = host_of(cx, lease, self.over_v4)?;
        let tunnel = TunnelPeer { name: lease.key.to_string(), host, subnets };
        Ok(Reach { objects: Vec::new(), tunnel: Some(tunnel), fault: None })
    }

    fn attrs(&self, cx: &Cx) -> LeaseAttrs {
        let v6 = cx.subnets.iter().any(|subnet| !subnet.is_v4());
        LeaseAttrs {
            public_ip: cx.underlay.public(true).and_then(as_v4),
            public_ipv6: cx.underlay.public(false).filter(|_| v6).and_then(as_v6),
            ..LeaseAttrs::default()
        }
    }

    fn tunnel(&self, cx: &Cx) -> Result<Option<TunnelSpec>, Refusal> {
        let local = if self.over_v4 { cx.underlay.v4 } else { cx.underlay.v6 };
        let (Some(device), Some(local), false) = (self.device(), local, cx.subnets.is_empty()) else { return Ok(None) };
        let mtu = self.device_mtu(cx)?;
        Ok(Some(TunnelSpec { device, mtu, local: SocketAddr::new(local.addr, self.port.get()) }))
    }
}

impl UdpConfig {
    /// One device carries both families: what is enough for the own ones.
    fn device_mtu(&self, cx: &Cx) -> Result<Mtu, Refusal> {
        self.mtu(&cx.underlay, cx.subnets.iter().all(Prefix::is_v4))
    }
}

/// Our subnets, each with the network that it is in.
fn own(cx: &Cx) -> impl Iterator<Item = (Prefix, Prefix)> {
    let network = |subnet: &Prefix| cx.networks.iter().find(|network| network.is_v4() == subnet.is_v4()).copied();
    cx.subnets.iter().filter_map(move |subnet| Some((network(subnet)?, *subnet)))
}
