//! From config, leases and host facts to what is wanted: the same for the agent, for `plan` and for `--check`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use twill_core::alloc::Me;
use twill_core::backend::{self, Backend, Cx, Reach, Refusal, Underlay};
use twill_core::config::NetworkConfig;
use twill_core::firewall::Policy;
use twill_core::host::{
    Few, HostState, LinkKind, Object, PROTO_TWILL, Remark, Route, RouteEntry, RouteKey, TABLE_MAIN,
};
use twill_core::lease::{Lease, LeaseKey, Peer, PeerFault};
use twill_core::lease_set::LeaseSet;
use twill_core::net::{LinkName, MacAddr, Prefix};
use twill_core::reconcile::{Claim, Finding};
use twill_core::state_file::State;
use twill_kernel::sysctl;

use super::settings::WayOut;

/// A network on this host, without the peers.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) backend: Box<dyn Backend>,
    /// What is done here: the families that this host has.
    pub(crate) cx: Cx,
    /// The networks of all families that the config names.
    configured: Vec<Prefix>,
    /// Those of them that are left out, since something on this host overlaps them.
    pub(crate) overlapping: Vec<Prefix>,
    excluded: Vec<Prefix>,
    way_out: WayOut,
}

impl Network {
    /// Everything but the own subnets, which a lease gives. Refused where no family is carried: why, for each; an MTU first, since that
    /// one takes something away.
    pub(crate) fn new(
        config: &NetworkConfig,
        underlay: Underlay,
        host: &HostState,
        state: &State,
        way_out: WayOut,
    ) -> Result<Self, Vec<Refusal>> {
        let backend = backend::build(&config.backend).map_err(|refusal| vec![refusal])?;
        if let Some(refusal) = backend::bad_public_ip(&underlay, &config.networks()) {
            return Err(vec![refusal]);
        }
        let devices = backend.devices(&config.networks());
        let (mut networks, mut lacking) = (Vec::new(), Vec::new());
        for network in config.networks() {
            match fault(&*backend, &underlay, network.is_v4()) {
                None => networks.push(network),
                Some(refusal) => lacking.push(refusal),
            }
        }
        if networks.is_empty() && !lacking.is_empty() {
            lacking.sort_by_key(|refusal| refusal.code != "mtu-too-small");
            return Err(lacking);
        }
        let cx = Cx { networks, subnets: Vec::new(), underlay, macs: macs(&devices, host, state), node: state.node };
        Ok(Self {
            backend,
            cx,
            configured: config.networks(),
            overlapping: Vec::new(),
            excluded: config.no_masq.clone(),
            way_out,
        })
    }

    /// Does without these networks; false: none is left.
    pub(crate) fn leave_out(&mut self, overlapping: &[Prefix]) -> bool {
        self.overlapping = overlapping.to_vec();
        self.cx.networks.retain(|network| !overlapping.contains(network));
        !self.cx.networks.is_empty()
    }

    /// The networks that the config names, whether this host carries their family or not.
    pub(crate) fn configured(&self) -> &[Prefix] {
        &self.configured
    }

    /// Why a family that the config names is left out with this underlay; the other goes on.
    pub(crate) fn left_out(&self, underlay: &Underlay) -> Vec<Refusal> {
        self.configured.iter().filter_map(|network| fault(&*self.backend, underlay, network.is_v4())).collect()
    }

    /// The node's own objects: what the backend stands on, and the way out.
    pub(crate) fn base(&self) -> Result<HostState, Refusal> {
        let mut base = self.backend.base(&self.cx)?;
        // Where it is refused the tunnel says so.
        let tunnel = self.backend.tunnel(&self.cx).ok().flatten();
        let policy = Policy {
            networks: self.cx.networks.clone(),
            subnets: self.cx.subnets.clone(),
            excluded: self.excluded.clone(),
            tunnels: self.devices(),
            outer: self.outer(&base),
            socket: tunnel.map(|tunnel| tunnel.local),
            masquerade: self.way_out.masquerade,
            clamp: self.way_out.clamp,
        };
        base.insert(Object::Table(Box::new(policy.table())));
        base.extend(self.cx.subnets.iter().map(|subnet| Object::Route(unused(*subnet))));
        Ok(base)
    }

    /// Where there is to be no tunnel: the way out stays, and with it these own subnets. The devices are to go.
    pub(crate) fn way_out_alone(
        config: &NetworkConfig,
        subnets: Vec<Prefix>,
        devices: BTreeSet<LinkName>,
        way_out: WayOut,
    ) -> (HostState, Claim) {
        let networks = config.networks();
        let policy = Policy {
            networks: networks.clone(),
            subnets: subnets.clone(),
            excluded: config.no_masq.clone(),
            masquerade: way_out.masquerade,
            ..Policy::default()
        };
        let mut base: HostState = subnets.iter().map(|subnet| Object::Route(unused(*subnet))).collect();
        base.insert(Object::Table(Box::new(policy.table())));
        let protocol = Some(PROTO_TWILL);
        (base, Claim { devices, protocol, networks, subnets, firewall: true, flannels_firewall: true })
    }

    /// Where peers' datagrams come in.
    fn outer(&self, base: &HostState) -> Vec<SocketAddr> {
        let vxlan = base.iter().filter_map(|(_, object)| match object {
            Object::Link(link) => match &link.kind {
                LinkKind::Vxlan(vxlan) => Some(SocketAddr::new(vxlan.local?, vxlan.port.get())),
                _ => None,
            },
            _ => None,
        });
        // Where it is refused the tunnel says so.
        let tunnel = self.backend.tunnel(&self.cx).ok().flatten();
        vxlan.chain(tunnel.map(|tunnel| tunnel.local)).collect()
    }

    /// Takes the subnets of our lease, and the MACs that it tells: peers have programmed them.
    pub(crate) fn take(&mut self, key: &LeaseKey, own: Option<&Lease>) {
        let here = |subnet: &Prefix| self.cx.networks.iter().any(|network| network.is_v4() == subnet.is_v4());
        self.cx.subnets = key.subnets().filter(here).collect();
        let [v4, v6] = own.map_or([None; 2], Lease::vtep_macs);
        for subnet in self.cx.subnets.clone() {
            let mac = if subnet.is_v4() { v4 } else { v6 }.filter(MacAddr::is_unicast);
            if let (Some(mac), Some(device)) = (mac, self.backend.devices(&[subnet]).first()) {
                self.cx.macs.insert(*device, mac);
            }
        }
    }

    /// A new lease tells no MAC that another one tells already: the machine was cloned, or its lease is lost.
    pub(crate) fn avoid_macs_of(&mut self, leases: &LeaseSet) {
        self.cx.macs.retain(|_, mac| !leases.has_mac(*mac));
    }

    /// Tunnel devices in use.
    pub(crate) fn devices(&self) -> Vec<LinkName> {
        self.backend.devices(&self.cx.subnets)
    }

    /// MTU for containers: the smaller one where both families are in use.
    pub(crate) fn mtu(&self) -> Result<twill_core::net::Mtu, Refusal> {
        let of = |p: &Prefix| self.backend.mtu(&self.cx.underlay, p.is_v4());
        let first = self.cx.networks.first().map(of);
        let all = self.cx.networks.iter().map(of).collect::<Result<Vec<_>, _>>()?;
        all.into_iter().min().map_or_else(|| first.unwrap_or_else(|| of(&Prefix::DEFAULT_V4)), Ok)
    }

    /// What is ours on this host.
    pub(crate) fn claim(&self, state: &State) -> Claim {
        let devices = self.devices().into_iter().chain(state.devices.keys().copied()).collect();
        Claim {
            devices,
            protocol: Some(PROTO_TWILL),
            networks: self.cx.networks.clone(),
            subnets: self.cx.subnets.clone(),
            firewall: true,
            flannels_firewall: true,
        }
    }

    /// What reaches the holder of one lease, or the fault that nothing does; `None`: there is no such lease.
    pub(crate) fn reach(&self, leases: &LeaseSet, name: &str) -> Option<Reach> {
        let reach = self.peer(leases, name)?;
        Some(reach.unwrap_or_else(|fault| Reach { fault: Some(fault), ..Reach::default() }))
    }

    /// What reaches the holder of one lease, which is not our own.
    pub(crate) fn peer(&self, leases: &LeaseSet, name: &str) -> Option<Result<Reach, PeerFault>> {
        Some(leases.verdict(name)?.and_then(|lease| self.backend.peer(&self.cx, &Peer { lease })))
    }
}

/// What a person should know of a lease that is left out, in whole or for one family.
pub(crate) fn of_lease(fault: &PeerFault) -> Finding {
    Finding {
        code: fault.code.into(),
        object: format!("lease {}", fault.name),
        evidence: fault.reason.clone(),
        fix: match fault.code {
            // Nodes behind one address of a NAT: others reach them, and they do not reach each other by it.
            "duplicate-public-ip" => {
                "give the node that holds it a --public-ip of its own; where no node does, delete this key"
            }
            _ => "correct or delete this key in the store; other peers are not disturbed",
        }
        .into(),
    }
}

/// Why this underlay cannot carry a family; `None`: it can.
fn fault(backend: &dyn Backend, underlay: &Underlay, v4: bool) -> Option<Refusal> {
    let over = backend.over_v4(v4);
    if underlay.public(over).is_none() {
        let (name, option) = if v4 { ("IPv4", "EnableIPv4") } else { ("IPv6", "EnableIPv6") };
        let (needed, other) = if over { ("IPv4", "") } else { ("IPv6", "-6 ") };
        let (told, enable) = if over { (String::new(), String::new()) } else { v6_disabled(underlay.link) };
        return Some(Refusal {
            code: "family-missing",
            message: format!(
                "the network config asks for {name}, and {} has no global {needed} address{told}",
                underlay.link
            ),
            hint: format!(
                "{enable}ip {other}addr add ADDRESS/LEN dev {}, or set {option} to false in the network config",
                underlay.link
            ),
        });
    }
    backend.mtu(underlay, v4).err()
}

/// Where sysctls keep IPv6 from a device: that, and the command that has to come before any address.
fn v6_disabled(link: LinkName) -> (String, String) {
    let path = |of: &str| format!("net/ipv6/conf/{of}/disable_ipv6");
    let is_set = |of: &&str| sysctl::read(&path(of)).is_ok_and(|value| value != "0");
    // Setting the one of all sets every device's; who sets it back last gets the device.
    let set: Vec<&str> = ["all", link.as_str()].into_iter().filter(is_set).collect();
    let Some(_) = set.first() else { return Default::default() };
    let told = format!(": {} disables IPv6 there", set.iter().map(|of| path(of)).collect::<Vec<_>>().join(" and "));
    (told, set.iter().map(|of| format!("sysctl -w {}=0 && ", path(of))).collect())
}

/// Addresses of the own subnet that no container has lead nowhere, and not back to where the packet came from. Any other route of the
/// subnet is better: with a lower metric this one would take the place of the bridge's connected route.
fn unused(subnet: Prefix) -> Route {
    const RTN_BLACKHOLE: u8 = 6;
    // The kernel hangs an IPv6 route of this kind on the loopback device (net/ipv6/route.c `fib6_nh_init`).
    let dev = if subnet.is_v4() { None } else { "lo".parse().ok() };
    let entry = RouteEntry {
        via: None,
        dev,
        onlink: false,
        protocol: PROTO_TWILL,
        special: false,
        usurper: Remark::default(),
        kind: RTN_BLACKHOLE,
        scope: 0,
        extras: None,
    };
    Route { key: RouteKey { table: TABLE_MAIN, dst: subnet, tos: 0, metric: u32::MAX }, entries: Few::One(entry) }
}

/// Hardware addresses by precedence: live device, state file; what neither knows is derived, and the own lease comes on top.
fn macs(devices: &[LinkName], host: &HostState, state: &State) -> BTreeMap<LinkName, MacAddr> {
    let known = |name: &LinkName| live_mac(host, *name).or_else(|| state.devices.get(name).copied());
    devices.iter().filter_map(|name| Some((*name, known(name)?))).collect()
}

/// The MAC of a tunnel device that is there.
fn live_mac(host: &HostState, name: LinkName) -> Option<MacAddr> {
    host.link(name).filter(|link| matches!(link.kind, LinkKind::Vxlan(_))).and_then(|link| link.mac)
}

/// Devices and subnets that are no stranger's: those of an earlier config go once the new ones stand, and a bridge is in a subnet that was ours.
pub(crate) fn ours(network: &Network, configured: &[Prefix], state: &State, env: &str) -> (Vec<LinkName>, Vec<Prefix>) {
    let devices = network.backend.devices(configured).into_iter();
    let remembered = state.known().chain(twill_core::flannel::subnet_env::subnets(env));
    (devices.chain(state.devices.keys().copied()).collect(), remembered.collect())
}

/// The subnets that something on this host calls ours: the state, subnet.env, and the addresses of the tunnel devices.
pub(crate) fn claimed(state: &State, host: &HostState, env: &str, devices: &[LinkName]) -> Vec<Prefix> {
    let on_device = host.iter().filter_map(|(_, o)| match o {
        Object::Addr(a) if devices.contains(&a.link) && a.scope == 0 => {
            Prefix::truncate(a.inet.addr, if a.inet.addr.is_ipv4() { 32 } else { 128 }).ok()
        }
        _ => None,
    });
    state.subnets.iter().copied().chain(twill_core::flannel::subnet_env::subnets(env)).chain(on_device).collect()
}

/// Who we are when it comes to leases: addresses, and every memory of a subnet.
pub(crate) fn me(
    state: &State,
    underlay: &Underlay,
    host: &HostState,
    env: &str,
    devices: &[LinkName],
    wished: &[Prefix],
) -> Me {
    let addresses = [true, false].into_iter().filter_map(|v4| underlay.public(v4)).collect();
    let mut remembered = state.subnets.clone();
    remembered.extend(twill_core::flannel::subnet_env::subnets(env));
    // The tunnel device carries the first address of the subnet that its maker had; its length is not there to be read.
    let on_device = host.iter().filter_map(|(_, o)| match o {
        Object::Addr(a) if devices.contains(&a.link) => Some(a.inet.addr),
        _ => None,
    });
    remembered.extend(on_device.filter_map(|ip| Prefix::truncate(ip, 24).ok()).filter(|p| p.is_v4()));
    let macs = devices.iter().filter_map(|name| live_mac(host, *name)).collect();
    Me { node: state.node, addresses, remembered, macs, wished: wished.to_vec() }
}
