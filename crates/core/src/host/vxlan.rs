//! What a VXLAN device has of its own.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::net::{LinkName, Port, Vni};

/// What a VXLAN device has. `vni`, `port`, `gbp`, `special` and the limit of `room` cannot change in place (kernel:
/// drivers/net/vxlan/vxlan_core.c, `vxlan_nl2conf`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vxlan {
    /// VXLAN network identifier.
    pub vni: Vni,
    /// UDP destination port, and the port it listens on.
    pub port: Port,
    /// Outer source address.
    pub local: Option<IpAddr>,
    /// Where frames for unknown and all destinations go (IFLA_VXLAN_GROUP); wanted: nowhere.
    #[serde(default)]
    pub remote: Option<IpAddr>,
    /// Underlay device (IFLA_VXLAN_LINK).
    pub lower: Option<LinkName>,
    /// Learn MAC → host from received frames.
    pub learning: bool,
    /// Group Based Policy extension.
    pub gbp: bool,
    /// What is written into the outer IP header.
    #[serde(default)]
    pub outer: OuterHeader,
    /// How long, and how many, entries may be in its forwarding table.
    #[serde(default)]
    pub room: FdbRoom,
    /// It has flags that Twill never gives: remote checksum offload, which peers drop, the inner packet's TTL, answers in others' names.
    #[serde(default)]
    pub special: bool,
}

/// A tunnel's forwarding table (IFLA_VXLAN_AGEING, _LIMIT).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdbRoom {
    /// Seconds after which a learned entry is forgotten; 0: never.
    pub ageing: u32,
    /// Most entries; 0: any number.
    pub limit: u32,
}

impl Default for FdbRoom {
    /// The kernel's (drivers/net/vxlan/vxlan_core.c `FDB_AGE_DEFAULT`).
    fn default() -> Self {
        Self { ageing: 300, limit: 0 }
    }
}

impl Vxlan {
    /// True when it speaks IPv4 outside: its socket is of one family, without `local` of IPv4.
    pub fn is_v4(&self) -> bool {
        self.local.is_none_or(|ip| ip.is_ipv4())
    }
}

/// Fixed values for a tunnel's outer IP header; 0 is the kernel's default for each (IFLA_VXLAN_TTL, _TOS, _DF).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OuterHeader {
    /// Time to live; 0: as the namespace has it.
    pub ttl: u8,
    /// Type of service; 1: the inner packet's.
    pub tos: u8,
    /// Don't fragment: 0 off, 1 on, 2 the inner packet's.
    pub df: u8,
}
