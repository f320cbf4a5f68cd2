//! The own lease: taken, taken again, kept true; and what stands on it: device, address, files.

use tokio::sync::oneshot;
use twill_core::alloc::{self, Choice, Me};
use twill_core::backend::Reach;
use twill_core::config::NetworkConfig;
use twill_core::flannel::subnet_env::SubnetEnv;
use twill_core::lease::{Lease, LeaseAttrs, LeaseKey, RawLease};
use twill_core::net::{LinkName, Mtu, Prefix};
use twill_kernel::files;
use twill_store::{StoreError, Swap};

use super::super::compose::{self, Network};
use super::super::reconciler::Order;
use super::keep::{STATE, SUBNET_ENV};
use super::{Session, TTL};

impl Session {
    /// Our lease: kept, taken again, or taken anew. `None`: none is to be had yet, which was said and waited for.
    pub(super) async fn acquire(
        &mut self,
        network: &mut Network,
        config: &NetworkConfig,
    ) -> Result<Option<Lease>, StoreError> {
        let mut seed = files::random_bytes().map_or(u64::from(std::process::id()), u64::from_ne_bytes);
        loop {
            match self.choose(network, config, seed) {
                Choice::Keep(lease) => {
                    network.take(&lease.key, Some(&lease));
                    return self.refresh(network, *lease).await;
                }
                Choice::GiveBack(lease) => {
                    let name = lease.key.to_string();
                    tracing::info!(lease = name, "our lease no longer fits the config or lost a collision: given back");
                    self.store.delete(&name, lease.mod_rev).await?;
                    self.leases.delete(&name);
                    let left = self.state.subnets.iter().filter(|s| !lease.key.subnets().any(|gone| gone == **s));
                    self.state.hold(left.copied().collect());
                }
                Choice::Create(key) => {
                    network.take(&key, None);
                    network.avoid_macs_of(&self.leases);
                    if let Some(lease) = self.create(network, key).await? {
                        return Ok(Some(lease));
                    }
                    // Somebody was faster, and hardly alone: among two hundred, learning them one by one is quadratic.
                    for raw in self.store.list().await?.entries {
                        self.leases.put(raw);
                    }
                }
                Choice::Refuse(reason) => {
                    self.leave_to_others(network, config).await;
                    let hint = if self.settings.subnet.is_empty() {
                        "free one with `etcdctl del`, or enlarge the Network"
                    } else {
                        "ask for another --subnet, or for none"
                    };
                    self.wait_for("no-free-subnet", &reason, hint).await;
                    return Ok(None);
                }
            }
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        }
    }

    /// Which lease is ours, or is to be, by what the store has told.
    pub(super) fn choose(&self, network: &Network, config: &NetworkConfig, seed: u64) -> Choice {
        alloc::choose(config, &self.leases, &self.me(network, config), seed)
    }

    fn me(&self, network: &Network, config: &NetworkConfig) -> Me {
        let host = self.host.borrow().clone();
        let (underlay, env, devices) = (&network.cx.underlay, self.subnet_env(), all_devices(network, config));
        compose::me(&self.state, underlay, &host, &env, &devices, &self.settings.subnet)
    }

    /// Takes a free subnet by compare-and-swap; `None`: somebody was faster.
    async fn create(&mut self, network: &Network, key: LeaseKey) -> Result<Option<Lease>, StoreError> {
        let mut attrs = network.backend.attrs(&network.cx);
        attrs.node = Some(self.state.node);
        let name = key.to_string();
        match self.store.create(&name, &attrs.to_json(), TTL).await? {
            Swap::Done { revision, etcd_lease } => {
                tracing::info!(subnet = name, "leased");
                let lease = Lease { key, attrs, create_rev: revision, mod_rev: revision, etcd_lease };
                self.put_own(&lease);
                Ok(Some(lease))
            }
            Swap::Lost(_) => Ok(None),
        }
    }

    /// Keeps a lease that is ours: its time starts anew, and its value says what is true now.
    pub(super) async fn refresh(&mut self, network: &Network, lease: Lease) -> Result<Option<Lease>, StoreError> {
        let name = lease.key.to_string();
        let mut etcd_lease = lease.etcd_lease;
        if etcd_lease != 0 && self.store.keep_alive(etcd_lease).await?.is_none() {
            etcd_lease = self.store.grant(TTL).await?;
        }
        let attrs = self.told(network, &lease);
        if attrs == lease.attrs && etcd_lease == lease.etcd_lease {
            return Ok(Some(lease));
        }
        match self.store.update(&name, &attrs.to_json(), lease.mod_rev, etcd_lease).await? {
            Swap::Done { revision, etcd_lease } => {
                tracing::info!(subnet = name, "lease taken again, its value brought up to date");
                let lease = Lease { attrs, mod_rev: revision, etcd_lease, ..lease };
                self.put_own(&lease);
                Ok(Some(lease))
            }
            Swap::Lost(now) => {
                match now {
                    Some(raw) => drop(self.leases.put(raw)),
                    None => drop(self.leases.delete(&name)),
                }
                Ok(None)
            }
        }
    }

    /// What our lease is to say of us. A family that this host lacks for now keeps what was said of it: peers, flannel's above all, have no
    /// use for a subnet without an address, and the other family is not to suffer from it.
    pub(super) fn told(&self, network: &Network, lease: &Lease) -> LeaseAttrs {
        let mut attrs = network.backend.attrs(&network.cx);
        let lacks = |v4: bool| {
            let underlay = network.cx.underlay.public(network.backend.over_v4(v4));
            underlay.is_none() && lease.key.subnets().any(|subnet| subnet.is_v4() == v4)
        };
        if lacks(true) {
            (attrs.public_ip, attrs.backend_data) = (lease.attrs.public_ip, lease.attrs.backend_data.clone());
        }
        if lacks(false) {
            (attrs.public_ipv6, attrs.backend_v6_data) = (lease.attrs.public_ipv6, lease.attrs.backend_v6_data.clone());
        }
        attrs.node = Some(self.state.node);
        attrs.twill_extra = lease.attrs.twill_extra.clone();
        attrs
    }

    fn put_own(&mut self, lease: &Lease) {
        let (name, value) = (lease.key.to_string(), lease.attrs.to_json());
        let (create_rev, mod_rev, etcd_lease) = (lease.create_rev, lease.mod_rev, lease.etcd_lease);
        self.leases.put(RawLease { name, value, create_rev, mod_rev, etcd_lease });
        self.cache.touch();
    }

    /// Device, address, sysctls; then the files that say so.
    pub(super) async fn establish(&mut self, network: &Network, own: &Lease) {
        self.left = false;
        let old: Vec<_> = self.state.devices.keys().copied().collect();
        for device in network.devices() {
            self.state.devices.insert(device, network.cx.mac(device));
        }
        self.state.hold(own.key.subnets().collect());
        self.state.networks = network.cx.networks.clone();
        self.save();
        self.show_left_out(&network.left_out(&network.cx.underlay));
        let both = network.base().and_then(|base| Ok((base, network.backend.tunnel(&network.cx)?)));
        match both {
            Ok((base, tunnel)) => {
                let (done, applied) = oneshot::channel();
                let claim = network.claim(&self.state);
                self.order(Order::Base { base, claim, tunnel, done });
                let firewall = applied.await.unwrap_or(false);
                self.write_subnet_env(network, own, firewall && self.settings.way_out.masquerade);
            }
            Err(refusal) => self.find(refusal.code, "backend", &refusal.message, &refusal.hint),
        }
        // What an earlier config had is gone, or goes with the peers' order to prune.
        if self.prune && old.iter().any(|device| !network.devices().contains(device)) {
            self.state.devices.retain(|device, _| network.devices().contains(device));
            self.save();
        }
        self.show_network(network);
    }

    /// No family fits into the underlay: the tunnel goes, and the file by which containers start, since both promise more. The way out stays.
    pub(super) async fn withdraw(&mut self, config: &NetworkConfig, carried: Mtu) {
        if self.state.subnets.is_empty() {
            return;
        }
        self.take_down(config, self.state.subnets.clone(), &[]).await;
        if let Ok(mut view) = self.view.lock() {
            view.mtu = Some(carried.get());
        }
    }

    /// There is no subnet for us: where another node holds the one that we had, nothing here says any longer that it is ours.
    async fn leave_to_others(&mut self, network: &Network, config: &NetworkConfig) {
        let devices = all_devices(network, config);
        let claimed = compose::claimed(&self.state, &self.host.borrow(), &self.subnet_env(), &devices);
        if self.left || !alloc::is_lost(&self.leases, &self.me(network, config), &claimed) {
            return;
        }
        tracing::warn!("our subnet is another node's now, and no other is to be had: device and file are withdrawn");
        self.take_down(config, Vec::new(), &devices).await;
        // Only now: who is killed before it finds by this that something is left to do.
        self.state.hold(Vec::new());
        self.save();
        self.left = true;
        if let Ok(mut view) = self.view.lock() {
            view.subnets.clear();
        }
    }

    /// Tunnel, peers and the containers' file go; the way out of these own subnets stays.
    async fn take_down(&mut self, config: &NetworkConfig, subnets: Vec<Prefix>, devices: &[LinkName]) {
        let peers = self.leases.names().chain(self.kept.keys()).map(|name| (name.clone(), Reach::default()));
        self.order(Order::Peers(peers.collect()));
        let devices = self.state.devices.keys().chain(devices).copied().collect();
        let (base, claim) = Network::way_out_alone(config, subnets, devices, self.settings.way_out);
        let (done, applied) = oneshot::channel();
        self.order(Order::Base { base, claim, tunnel: None, done });
        self.order(Order::Prune);
        let _ = applied.await;
        self.withdraw_subnet_env();
        if let Ok(mut view) = self.view.lock() {
            view.devices.clear();
        }
    }

    pub(super) fn save(&mut self) {
        let path = self.settings.state_dir.join("state.json");
        match self.state.to_json() {
            Ok(bytes) => drop(self.write(&STATE, &path, bytes)),
            Err(error) => tracing::error!(%error, "the state is no JSON"),
        }
    }

    fn write_subnet_env(&mut self, network: &Network, own: &Lease, ip_masq: bool) {
        let Ok(mtu) = network.mtu() else { return };
        let pair = |v4: bool| {
            let network = network.cx.networks.iter().find(|n| n.is_v4() == v4)?;
            Some((*network, own.key.subnets().find(|s| s.is_v4() == v4)?))
        };
        // Where we do not masquerade, docker and the bridge plugin shall.
        let env = SubnetEnv { v4: pair(true), v6: pair(false), mtu, ip_masq }.to_string();
        let path = self.settings.subnet_file.clone();
        self.keep_subnet_env(env.clone());
        if self.subnet_env() == env {
            self.need_not_write(&SUBNET_ENV);
        } else if self.write(&SUBNET_ENV, &path, env.into_bytes()) {
            tracing::info!(file = %path.display(), "wrote the subnet for container runtimes");
        }
    }
}

/// The tunnel devices of all networks, whether this host carries them or not.
fn all_devices(network: &Network, config: &NetworkConfig) -> Vec<LinkName> {
    network.backend.devices(&config.networks())
}
