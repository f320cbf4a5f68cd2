//! From config, leases and host facts to what is wanted: the same for the agent, for `plan` and for `--check`.

use std::collections::BTreeMap;

use twill_core::alloc::Me;
use twill_core::backend::{self, Backend, Cx, Reach, Refusal, Underlay};
use twill_core::config::NetworkConfig;
use twill_core::host::{HostState, LinkKind, Object, PROTO_TWILL};
use twill_core::lease::{Lease, LeaseKey, Peer, PeerFault};
use twill_core::lease_set::LeaseSet;
use twill_core::net::{LinkName, MacAddr, Prefix};
use twill_core::reconcile::Claim;
use twill_core::state_file::State;

/// A network on this host, without the peers.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) cx: Cx,
}

impl Network {
    /// Everything but the own subnets, which a lease gives.
    pub(crate) fn new(
        config: &NetworkConfig,
        underlay: Underlay,
        host: &HostState,
        state: &State,
    ) -> Result<Self, Refusal> {
        let backend = backend::build(&config.backend)?;
        let devices = config.networks().iter().flat_map(|n| backend.devices(&[*n])).collect::<Vec<_>>();
        let cx = Cx {
            networks: config.networks(),
            subnets: Vec::new(),
            underlay,
            macs: macs(&devices, host, state),
            node: state.node,
        };
        for range in config.ranges() {
            backend.mtu(&cx.underlay, range.network.is_v4())?;
        }
        Ok(Self { backend, cx })
    }

    /// Takes the subnets of our lease, and the MACs that it tells: peers have programmed them.
    pub(crate) fn take(&mut self, key: &LeaseKey, own: Option<&Lease>) {
        self.cx.subnets = key.subnets().collect();
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
        Claim { devices, protocol: Some(PROTO_TWILL), networks: self.cx.networks.clone() }
    }

    /// What reaches the holder of one lease, which is not our own. A peer of another backend is left out with its reason.
    pub(crate) fn peer(&self, leases: &LeaseSet, name: &str) -> Option<Result<Reach, PeerFault>> {
        let peer = |lease: Lease| {
            if lease.attrs.backend_type.as_deref() != self.backend.lease_type() {
                let theirs = lease.attrs.backend_type.clone().unwrap_or_else(|| "udp".into());
                return Err(
                    lease.fault("foreign-backend", format!("its backend is {theirs}, and this network's is another"))
                );
            }
            if let Some(outside) = lease.key.subnets().find(|s| !self.cx.networks.iter().any(|n| n.covers(s))) {
                return Err(lease.fault("outside-network", format!("its subnet {outside} is not in the network")));
            }
            self.backend.peer(&self.cx, &Peer { lease })
        };
        Some(leases.verdict(name)?.and_then(peer))
    }
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
