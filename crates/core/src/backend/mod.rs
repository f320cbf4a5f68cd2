//! Backends: from one peer's lease to the objects that reach it. Each is one pure file.

use std::net::IpAddr;

use crate::host::{HostState, Object};
use crate::lease::{LeaseAttrs, Peer, PeerFault};
use crate::net::{Inet, LinkName, MacAddr, Mtu, Prefix};

/// What a backend may know of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Cx {
    /// The whole network of each family in use.
    pub networks: Vec<Prefix>,
    /// Own subnets, one for each family in use.
    pub subnets: Vec<Prefix>,
    /// The underlay as chosen.
    pub underlay: Underlay,
    /// Hardware address for the tunnel device, by device name's family: own lease, live device, state file, derived.
    pub mac: MacAddr,
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
    /// The tunnel device, where there is one.
    fn device(&self) -> Option<LinkName>;
    /// MTU for containers over this underlay.
    fn mtu(&self, underlay: &Underlay) -> Result<Mtu, Refusal>;
    /// Own objects: device, address, sysctls.
    fn base(&self, cx: &Cx) -> Result<HostState, Refusal>;
    /// A peer's objects: neighbour, forwarding entry, route. A fault drops that peer only.
    fn peer(&self, cx: &Cx, peer: &Peer) -> Result<Vec<Object>, PeerFault>;
    /// What our own lease says of us: type and data (identity is added by the caller).
    fn attrs(&self, cx: &Cx) -> LeaseAttrs;
}
