//! VXLAN (RFC 7348) as flannel's vxlan backend does it: a route, a neighbour and a forwarding entry for each peer, programmed
//! before anyone asks, so that neither ARP nor flooding ever crosses the tunnel.
//!
//! ```text
//!   10.1.16.0/24 ──route──▶ via 10.1.16.0 onlink ──neigh──▶ VTEP MAC of node2 ──fdb──▶ 10.168.0.3
//! ```

use serde_json::{Value, json};

use crate::host::{
    Addr, Fdb, FdbRoom, Few, HostState, Link, LinkKind, Neigh, Object, OuterHeader, PROTO_TWILL, Remark, Route,
    RouteEntry, RouteKey, TABLE_MAIN, Vxlan,
};
use crate::lease::{Lease, LeaseAttrs, Peer, PeerFault};
use crate::net::{Inet, LinkName, MacAddr, Mtu, NodeId, Port, Prefix, Vni};

use super::{Backend, Cx, Reach, Refusal, Underlay, as_v4, as_v6, forwarding, host_of, told_host};

/// Outer Ethernet header is the underlay's; what the tunnel adds to an inner IP packet: outer IPv4 20 + UDP 8 + VXLAN 8 + inner Ethernet 14.
const OVERHEAD_V4: u32 = 50;
/// The same with an outer IPv6 header of 40 bytes.
const OVERHEAD_V6: u32 = 70;
/// IPv6 routes have no metric bucket to spread over; this is the kernel's default (IP6_RT_PRIO_USER).
const METRIC_V6: u32 = 1024;

/// The `Backend` object of a vxlan network config, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VxlanConfig {
    /// VXLAN network identifier; flannel's default is 1.
    pub vni: Vni,
    /// UDP port; the kernel's default is 8472.
    pub port: Port,
    /// MTU of the underlay to reckon with, instead of the device's.
    pub mtu: Option<Mtu>,
    /// Group Based Policy extension.
    pub gbp: bool,
    /// Learn MAC → host from received frames.
    pub learning: bool,
}

impl Backend for VxlanConfig {
    fn lease_type(&self) -> Option<&'static str> {
        Some("vxlan")
    }

    fn device(&self) -> Option<LinkName> {
        self.device_of(true)
    }

    fn devices(&self, subnets: &[Prefix]) -> Vec<LinkName> {
        subnets.iter().filter_map(|subnet| self.device_of(subnet.is_v4())).collect()
    }

    fn mtu(&self, underlay: &Underlay, v4: bool) -> Result<Mtu, Refusal> {
        let lower = self.mtu.unwrap_or(underlay.mtu).get();
        let overhead = if v4 { OVERHEAD_V4 } else { OVERHEAD_V6 };
        let floor = if v4 { 68 } else { 1280 };
        let mtu = lower.checked_sub(overhead).filter(|&mtu| mtu >= floor);
        let (what, hint) = match self.mtu {
            Some(_) => ("a Backend.MTU", "raise Backend.MTU in the network config, or remove it".into()),
            None => ("an underlay MTU", format!("raise the MTU of {}", underlay.link)),
        };
        mtu.and_then(|mtu| Mtu::try_from(i64::from(mtu)).ok()).ok_or_else(|| Refusal {
            code: "mtu-too-small",
            message: format!("{what} of {lower} leaves less than {floor} bytes beside the {overhead} of VXLAN"),
            hint,
        })
    }

    fn base(&self, cx: &Cx) -> Result<HostState, Refusal> {
        let mut host = HostState::new();
        for subnet in &cx.subnets {
            let v4 = subnet.is_v4();
            let Some(name) = self.device_of(v4) else { continue };
            let local = if v4 { cx.underlay.v4 } else { cx.underlay.v6 };
            let kind = LinkKind::Vxlan(Vxlan {
                vni: self.vni,
                port: self.port,
                local: local.map(|inet| inet.addr),
                lower: Some(cx.underlay.link),
                learning: self.learning,
                gbp: self.gbp,
                remote: None,
                outer: OuterHeader::default(),
                room: FdbRoom::default(),
                special: false,
            });
            let (mac, mtu) = (Some(cx.mac(name)), Some(self.mtu(&cx.underlay, v4)?));
            host.insert(Object::Link(Box::new(Link {
                mac,
                mtu,
                arp: Some(true),
                multicast: Some(true),
                protodown: Some(false),
                ..Link::up(name, kind)
            })));
            host.insert(Object::Addr(Addr::global(name, Inet::host(subnet.addr()))));
            host.extend(forwarding(name, v4));
        }
        Ok(host)
    }

    fn accepts(&self, networks: &[Prefix], lease: &Lease, v4: bool) -> Result<(), PeerFault> {
        told_host(networks, lease, v4)?;
        self.vtep_mac(lease, v4).map(drop)
    }

    fn peer(&self, cx: &Cx, peer: &Peer) -> Result<Reach, PeerFault> {
        let lease = &peer.lease;
        let mut reach = Reach { objects: Vec::with_capacity(3), ..Reach::default() };
        for subnet in lease.key.subnets().filter(|s| cx.subnets.iter().any(|own| own.is_v4() == s.is_v4())) {
            match self.way(cx, lease, subnet) {
                Ok(objects) => reach.objects.extend(objects.into_iter().flatten()),
                Err(fault) if fault.code == "bad-lease-value" => reach.fault = Some(fault),
                Err(fault) => return Err(fault),
            }
        }
        match reach.fault {
            Some(fault) if reach.objects.is_empty() => Err(fault),
            _ => Ok(reach),
        }
    }

    fn attrs(&self, cx: &Cx) -> LeaseAttrs {
        let data = |v4| {
            let of_family = cx.subnets.iter().any(|subnet| subnet.is_v4() == v4);
            of_family
                .then(|| self.device_of(v4))
                .flatten()
                .map(|name| json!({"VNI": self.vni, "VtepMAC": cx.mac(name)}))
        };
        LeaseAttrs {
            public_ip: cx.underlay.public(true).and_then(as_v4),
            public_ipv6: cx.underlay.public(false).and_then(as_v6),
            backend_type: Some("vxlan".into()),
            backend_data: data(true),
            backend_v6_data: data(false),
            ..LeaseAttrs::default()
        }
    }
}

impl VxlanConfig {
    /// `flannel.<VNI>` or `flannel-v6.<VNI>`; the longest, `flannel-v6.16777215`, is over Linux's 15 bytes: `None`.
    fn device_of(&self, v4: bool) -> Option<LinkName> {
        format!("flannel{}.{}", if v4 { "" } else { "-v6" }, self.vni).parse().ok()
    }

    /// What reaches a peer in the family of its subnet.
    fn way(&self, cx: &Cx, lease: &Lease, subnet: Prefix) -> Result<Option<[Object; 3]>, PeerFault> {
        let v4 = subnet.is_v4();
        let Some(link) = self.device_of(v4) else { return Ok(None) };
        let host = host_of(cx, lease, v4)?;
        let mac = self.vtep_mac(lease, v4)?;
        if mac == cx.mac(link) {
            return Err(lease.fault("mac-clash", format!("its VtepMAC {mac} is this node's own")));
        }
        let vtep = subnet.addr();
        let neigh = Neigh { link, ip: vtep, mac: Some(mac), permanent: true, special: false, state: NUD_PERMANENT };
        let fdb = Fdb {
            link,
            mac,
            dst: Few::One(host),
            port: None,
            permanent: true,
            special: false,
            detour: None,
            state: NUD_PERMANENT,
        };
        let entry = RouteEntry {
            via: Some(vtep),
            dev: Some(link),
            onlink: true,
            protocol: PROTO_TWILL,
            kind: 1,
            scope: 0,
            extras: None,
            special: false,
            usurper: Remark::default(),
        };
        let key = RouteKey { table: TABLE_MAIN, dst: subnet, tos: 0, metric: metric(&cx.networks, &subnet) };
        Ok(Some([Object::Neigh(neigh), Object::Fdb(fdb), Object::Route(Route { key, entries: Few::One(entry) })]))
    }

    /// `VtepMAC`, once type and VNI agree with ours.
    fn vtep_mac(&self, lease: &Lease, v4: bool) -> Result<MacAddr, PeerFault> {
        let key = if v4 { "BackendData" } else { "BackendV6Data" };
        let data = if v4 { &lease.attrs.backend_data } else { &lease.attrs.backend_v6_data };
        let data = data.as_ref().ok_or_else(|| lease.fault("bad-lease-value", format!("{key} is missing")))?;
        // Old leases have none.
        if let Some(told) = field(data, "VNI").filter(|told| !told.is_null()) {
            let vni = told.as_i64().and_then(|vni| Vni::try_from(vni).ok());
            let vni = vni.ok_or_else(|| {
                lease.fault("bad-lease-value", format!("{key}.VNI {told} is not a number from 0 to 16777215"))
            })?;
            if vni != self.vni {
                let text = format!("{key}.VNI is {vni}, and this network's is {}", self.vni);
                return Err(lease.fault("vni-differs", text));
            }
        }
        let told = field(data, "VtepMAC");
        let mac = told.and_then(Value::as_str).and_then(|text| text.parse::<MacAddr>().ok());
        mac.filter(MacAddr::is_unicast).ok_or_else(|| {
            let what = told.map_or("is missing".into(), |told| format!("{told} is not a unicast MAC address"));
            lease.fault("bad-lease-value", format!("{key}.VtepMAC {what}"))
        })
    }
}

/// NUD_PERMANENT (include/uapi/linux/neighbour.h).
const NUD_PERMANENT: u16 = 0x80;

/// A field by its name in any case, the last one winning, as Go reads JSON.
fn field<'a>(data: &'a Value, name: &str) -> Option<&'a Value> {
    data.as_object()?.iter().rfind(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

/// 256 routes share a metric: the kernel keeps routes of one device and metric in one hash bucket (net/ipv4/fib_semantics.c
/// `fib_devindex_hashfn`), and a long bucket makes adding quadratic. 0 for the first 256 subnets, as flannel's routes have it.
fn metric(networks: &[Prefix], subnet: &Prefix) -> u32 {
    if !subnet.is_v4() {
        return METRIC_V6;
    }
    networks.iter().find_map(|network| network.index_of(subnet)).map_or(0, |index| (index / 256) as u32)
}

/// A MAC that a node and device name always give: the first 6 bytes of SHA-256(identity ‖ device name), local, unicast.
pub fn derive_mac(node: &NodeId, device: LinkName) -> MacAddr {
    MacAddr::derived([&node.0, device.as_str().as_bytes()])
}
