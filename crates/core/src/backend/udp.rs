//! flannel's udp backend: a TUN device takes the packets of the whole network, and a program (the tunnel) carries each as the payload of a
//! UDP datagram to the host that holds its subnet.
//!
//! ```text
//!   100.96.0.0/16 ──connected route──▶ flannel0 ──▶ tunnel: 100.96.2.0/24 → 10.168.0.3 ──▶ UDP 8285
//! ```
//! The kernel needs one route, that of the device's address; the peers are the tunnel's alone.

use std::net::{IpAddr, SocketAddr};

use crate::host::{Addr, HostState, Link, LinkKind, Object};
use crate::lease::{Lease, LeaseAttrs, Peer, PeerFault};
use crate::net::{Inet, LinkName, Mtu, Port, Prefix};

use super::{Backend, Cx, Reach, Refusal, Underlay, host_of};

/// Outer IPv4 header of 20 bytes and UDP header of 8: the datagram's payload is the inner packet, nothing else.
const OVERHEAD: u32 = 28;
/// The least MTU that IPv4 allows (RFC 791).
const FLOOR: u32 = 68;
/// flannel makes `flannel%d`, and the first is this.
const DEVICE: &str = "flannel0";

/// The `Backend` object of a udp network config, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UdpConfig {
    /// UDP port on every node; flannel's default is 8285.
    pub port: Port,
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
        self.device().filter(|_| subnets.iter().any(Prefix::is_v4)).into_iter().collect()
    }

    fn mtu(&self, underlay: &Underlay, v4: bool) -> Result<Mtu, Refusal> {
        if !v4 {
            return Err(Refusal {
                code: "backend-not-built",
                message: "the udp backend carries IPv4 networks only".into(),
                hint: "set EnableIPv6 to false, or Backend.Type to vxlan, in the network config".into(),
            });
        }
        let lower = underlay.mtu.get();
        let mtu = lower.checked_sub(OVERHEAD).filter(|&mtu| mtu >= FLOOR);
        mtu.and_then(|mtu| Mtu::try_from(i64::from(mtu)).ok()).ok_or_else(|| Refusal {
            code: "mtu-too-small",
            message: format!("an underlay MTU of {lower} leaves less than {FLOOR} bytes beside the {OVERHEAD} of UDP"),
            hint: format!("raise the MTU of {}", underlay.link),
        })
    }

    fn base(&self, cx: &Cx) -> Result<HostState, Refusal> {
        let mut host = HostState::new();
        let (Some(name), Some((network, subnet))) = (self.device(), v4(cx)) else { return Ok(host) };
        let mtu = Some(self.mtu(&cx.underlay, true)?);
        let link = Link { mtu, ..Link::up(name, LinkKind::Tun) };
        host.insert(Object::Link(Box::new(link)));
        // With the network's length the kernel makes the one route that is needed; flannel has /32 and a route of its own.
        if let Ok(inet) = Inet::new(subnet.addr(), network.len()) {
            host.insert(Object::Addr(Addr { link: name, inet, scope: 0 }));
        }
        for path in ["net/ipv4/ip_forward".into(), format!("net/ipv4/conf/{name}/forwarding").into()] {
            host.insert(Object::Sysctl { path, value: "1".into() });
        }
        Ok(host)
    }

    fn peer(&self, cx: &Cx, peer: &Peer) -> Result<Reach, PeerFault> {
        let lease: &Lease = &peer.lease;
        let Some(subnet) = lease.key.v4 else { return Ok(Reach::default()) };
        let host = host_of(cx, lease, true)?;
        let tunnel = TunnelPeer { name: lease.key.to_string(), host, subnets: vec![subnet] };
        Ok(Reach { objects: Vec::new(), tunnel: Some(tunnel) })
    }

    fn attrs(&self, cx: &Cx) -> LeaseAttrs {
        let public_ip = cx.underlay.public(true).and_then(super::as_v4);
        LeaseAttrs { public_ip, ..LeaseAttrs::default() }
    }

    fn tunnel(&self, cx: &Cx) -> Result<Option<TunnelSpec>, Refusal> {
        let (Some(device), Some(local), Some(_)) = (self.device(), cx.underlay.v4, v4(cx)) else { return Ok(None) };
        let mtu = self.mtu(&cx.underlay, true)?;
        Ok(Some(TunnelSpec { device, mtu, local: SocketAddr::new(local.addr, self.port.get()) }))
    }
}

/// The IPv4 network and our subnet in it.
fn v4(cx: &Cx) -> Option<(Prefix, Prefix)> {
    let network = cx.networks.iter().find(|network| network.is_v4())?;
    Some((*network, *cx.subnets.iter().find(|subnet| subnet.is_v4())?))
}
