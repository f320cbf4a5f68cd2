//! The life of a node in the store: read the config, take a lease, follow everybody's leases, and tell the reconciler.
//!
//! ```text
//!   underlay ─▶ config ─▶ listing ─▶ own lease ─▶ base ─▶ peers ─▶ watch ──▶ (store away: list again)
//!      ▲           │                    │                            │
//!      └───────────┴── waits and tries again, the data path stays ───┘
//! ```
//!
//! [`underlay`]: what the node stands on; [`listing`]: which listings are believed; [`cache`]: what the store said last, for a start without
//! it; [`own`]: the own lease and what stands on it; [`keep`]: its files; [`say`]: waiting, and what `status` shows.

pub(crate) mod cache;
mod keep;
pub(crate) mod listing;
mod own;
mod say;
mod underlay;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use twill_core::backend::{Reach, Rule};
use twill_core::config::NetworkConfig;
use twill_core::host::HostState;
use twill_core::lease::Lease;
use twill_core::lease_set::{LeaseName, LeaseSet};
use twill_core::net::{Inet, Prefix};
use twill_core::reconcile::Finding;
use twill_core::state_file::State;
use twill_kernel::Waker;
use twill_store::{EtcdStore, RawConfig, StoreError, Swap, WatchEvent};

use self::cache::Cache;
use super::compose::{self, Network};
use super::reconciler::Order;
use super::settings::Settings;
use super::view::{PeerView, View, WayView};
use crate::output::Failure;

/// flannel's time to live of a lease, in seconds.
const TTL: i64 = 86_400;
/// How often our etcd lease is kept alive.
const KEEPALIVE: Duration = Duration::from_secs(600);
/// First and longest wait for a store that is away, or for anything else that waiting cures.
const WAIT: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));
/// Our lease is put right at most this often.
const CORRECTIONS: Duration = Duration::from_secs(10);
/// Peers for each order: the reconciler works on some while others are being read.
const BATCH: usize = 1000;
/// What may be wrong with a config that was written while the node runs.
const CONFIG_FINDINGS: [&str; 3] = ["bad-config", "config-missing", "backend-not-built"];

/// What users ask of a running agent.
pub(crate) enum Command {
    Peers(oneshot::Sender<Vec<PeerView>>),
    /// Accept the last listing as it is.
    Accept(oneshot::Sender<Result<usize, Failure>>),
    /// What [`Command::Leave`] would do now.
    Leaving(oneshot::Sender<Result<Vec<String>, Failure>>),
    /// Give the subnet back and remove everything.
    Leave(oneshot::Sender<Result<(), Failure>>),
}

/// How a round of the session ended.
enum End {
    /// Begin again at once: the config or the own lease changed.
    Again,
    /// The store went away.
    Away(StoreError),
    /// The node has left.
    Left,
}

pub(crate) struct Session {
    settings: Settings,
    store: EtcdStore,
    orders: Sender<Order>,
    waker: Waker,
    host: watch::Receiver<Arc<HostState>>,
    view: Arc<Mutex<View>>,
    commands: mpsc::Receiver<Command>,
    state: State,
    leases: LeaseSet,
    cache: Cache,
    faults: BTreeMap<LeaseName, Finding>,
    /// Leases that a strange listing lacked: kept until it is accepted.
    withheld: BTreeSet<LeaseName>,
    /// Those of them that an earlier run knew: what stands for them in the kernel and the tunnel, kept as if their leases said so.
    kept: BTreeMap<LeaseName, Reach>,
    seen: Option<(u64, i64)>,
    /// The underlay's addresses when the store was last asked.
    asked_from: [Option<Inet>; 2],
    /// The first listing may prune what an earlier run left; a strange one may not.
    prune: bool,
    /// What a listing and the own lease make necessary was ordered once.
    established: bool,
    /// What peers stand on while no watch is followed.
    stands_on: Option<Box<(Network, Lease)>>,
    /// What was last said of a store that is away.
    last_away: &'static str,
    /// What is waited for, by code and message.
    waiting: Option<(&'static str, String)>,
    /// Our subnet was left to another node, and we have no other yet.
    left: bool,
    /// Files that could not be written yet.
    unwritten: keep::Unwritten,
    /// When our lease, altered by somebody, is to be put right, and when it last was.
    correct: Option<Instant>,
    corrected: Option<Instant>,
}

impl Session {
    #[expect(clippy::too_many_arguments, reason = "made once, by the agent that owns all of these")]
    pub(crate) fn new(
        settings: Settings,
        store: EtcdStore,
        orders: Sender<Order>,
        waker: Waker,
        host: watch::Receiver<Arc<HostState>>,
        view: Arc<Mutex<View>>,
        commands: mpsc::Receiver<Command>,
        state: State,
    ) -> Self {
        Self {
            cache: Cache::new(&settings.state_dir),
            settings,
            store,
            orders,
            waker,
            host,
            view,
            commands,
            state,
            leases: LeaseSet::default(),
            faults: BTreeMap::new(),
            withheld: BTreeSet::new(),
            kept: BTreeMap::new(),
            seen: None,
            asked_from: [None; 2],
            prune: true,
            established: false,
            stands_on: None,
            last_away: "",
            waiting: None,
            left: false,
            unwritten: keep::Unwritten::default(),
            correct: None,
            corrected: None,
        }
    }

    /// Runs until the node leaves; ends early only when its future is dropped.
    pub(crate) async fn run(mut self) {
        let mut wait = WAIT.0;
        loop {
            let started = Instant::now();
            match self.round().await {
                Ok(End::Again) => wait = WAIT.0,
                Ok(End::Left) => return,
                Ok(End::Away(error)) | Err(error) => {
                    self.say_away(&error);
                    self.store.reconnect();
                    self.keep_what_changed().await;
                    self.go_by_cache().await;
                    if started.elapsed() > WAIT.1 {
                        wait = WAIT.0;
                    }
                    self.pause(wait).await;
                    wait = (wait * 2).min(WAIT.1);
                }
            }
        }
    }

    /// From the underlay to the end of a watch.
    async fn round(&mut self) -> Result<End, StoreError> {
        let (network, config) = self.network().await?;
        let Some(mut network) = network else { return Ok(End::Again) };
        if let Ok(rule) = Rule::new(&config) {
            self.leases.follow(rule);
        }
        let listing = self.store.list().await?;
        let revision = listing.revision;
        self.say_up(revision);
        let concerned = self.take_listing(listing, &network);
        let Some(own) = self.acquire(&mut network, &config).await? else { return Ok(End::Again) };
        self.establish(&network, &own).await;
        self.established = true;
        self.unfind("listing-cached");
        let all: BTreeSet<LeaseName> = self.leases.names().chain(self.kept.keys()).cloned().chain(concerned).collect();
        self.send_peers(&network, &own, all);
        if self.prune {
            self.order(Order::Prune);
        }
        self.waits_no_more();
        self.set_state("running");
        let mut stands_on = Box::new((network, own));
        let (network, own) = &mut *stands_on;
        let end = self.follow((network, own), config, revision).await;
        self.stands_on = Some(stands_on);
        end
    }

    fn subnet_env(&self) -> String {
        std::fs::read_to_string(&self.settings.subnet_file).unwrap_or_default()
    }

    /// Tells the reconciler what these leases want.
    fn send_peers(&mut self, network: &Network, own: &Lease, names: impl IntoIterator<Item = LeaseName>) {
        let own_name = own.key.to_string();
        let mut peers = Vec::new();
        for name in names {
            if *name == *own_name {
                continue;
            }
            let reach = network.reach(&self.leases, &name).or_else(|| self.kept.get(&name).cloned());
            let mut reach = reach.unwrap_or_default();
            match reach.fault.take() {
                Some(fault) => {
                    let finding = compose::of_lease(&fault);
                    if self.faults.insert(name.clone(), finding.clone()) != Some(finding) {
                        tracing::warn!(code = fault.code, "{fault}");
                    }
                }
                None => drop(self.faults.remove(&name)),
            }
            peers.push((name, reach));
            if peers.len() == BATCH {
                self.order(Order::Peers(std::mem::take(&mut peers)));
            }
        }
        self.order(Order::Peers(peers));
        self.show_faults();
    }

    /// The watch, until something ends it.
    async fn follow(
        &mut self,
        (network, own): (&mut Network, &mut Lease),
        config: NetworkConfig,
        revision: i64,
    ) -> Result<End, StoreError> {
        let mut stream = self.store.watch(revision + 1).await?;
        let mut keepalive = tokio::time::interval_at(Instant::now() + KEEPALIVE, KEEPALIVE);
        loop {
            let (correct, unwritten) = (self.correct, self.unwritten.due());
            tokio::select! {
                told = stream.next() => {
                    let (revision, events) = match told {
                        Ok(told) => told,
                        Err(error) => return Ok(End::Away(error)),
                    };
                    self.heard(revision);
                    for event in events {
                        if let Some(end) = self.on_event(event, network, &config, own) {
                            return Ok(end);
                        }
                    }
                }
                _ = keepalive.tick(), if own.etcd_lease != 0 => {
                    // A lease that has ended takes the key with it, and the watch says so.
                    self.store.keep_alive(own.etcd_lease).await?;
                }
                () = at(correct), if correct.is_some() => {
                    self.correct = None;
                    self.corrected = Some(Instant::now());
                    match self.refresh(network, own.clone()).await? {
                        Some(lease) => *own = lease,
                        None => return Ok(End::Again),
                    }
                }
                told = self.cache.turn() => self.on_cache(told),
                () = at(unwritten), if unwritten.is_some() => self.write_again(),
                changed = self.host.changed() => {
                    if changed.is_err() {
                        return Ok(End::Left);
                    }
                    if let Some(end) = self.on_host(network, own).await? {
                        return Ok(end);
                    }
                }
                Some(command) = self.commands.recv() => {
                    if let Some(end) = self.on_command(command, network, own).await? {
                        return Ok(end);
                    }
                }
            }
        }
    }

    fn on_event(
        &mut self,
        event: WatchEvent,
        network: &Network,
        config: &NetworkConfig,
        own: &mut Lease,
    ) -> Option<End> {
        let own_name = own.key.to_string();
        let concerned = match event {
            WatchEvent::Config(raw) => return self.on_config(raw, config),
            WatchEvent::Put(raw) => {
                self.is_back(&raw.name);
                if raw.name == own_name && raw.mod_rev <= own.mod_rev {
                    return None;
                }
                self.kept.remove(raw.name.as_str());
                self.leases.put(raw)
            }
            // Seen in an unbroken watch: always honoured.
            WatchEvent::Delete { name, revision } => {
                if name == own_name && revision < own.mod_rev {
                    return None;
                }
                self.kept.remove(name.as_str());
                self.is_back(&name);
                let mut concerned = self.leases.delete(&name);
                concerned.insert(name.into());
                concerned
            }
        };
        self.cache.touch();
        if concerned.contains(own_name.as_str()) {
            match self.leases.standing(&own_name) {
                Some(Ok(lease)) if self.still_mine(&lease, network) => {
                    if self.told(network, &lease) != lease.attrs {
                        self.on_altered(&own_name);
                    }
                    *own = lease;
                }
                _ => {
                    tracing::warn!(
                        lease = own_name,
                        "our lease was deleted, taken or lost a collision: choosing again"
                    );
                    return Some(End::Again);
                }
            }
        }
        self.send_peers(network, own, concerned);
        None
    }

    /// A rewrite by flannel drops our identity and keeps the address: still ours.
    fn still_mine(&self, lease: &Lease, network: &Network) -> bool {
        let addresses: Vec<_> = [true, false].into_iter().filter_map(|v4| network.cx.underlay.public(v4)).collect();
        lease.attrs.node.map_or_else(|| lease.is_at(&addresses), |node| node == self.state.node)
    }

    /// Somebody has written something else into our lease: peers follow it, so it is put right. At once; if it goes on, somebody else
    /// holds it to be theirs.
    fn on_altered(&mut self, name: &str) {
        let again = self.corrected.filter(|at| at.elapsed() < CORRECTIONS);
        self.correct = Some(again.map_or_else(Instant::now, |at| at + CORRECTIONS));
        match again {
            None => tracing::warn!(lease = name, "our lease was altered in the store: put right"),
            Some(_) => self.find(
                "lease-altered",
                &format!("own lease {name}"),
                "somebody writes it again and again",
                "find the other writer: a second agent with a copy of this node's state folder?",
            ),
        }
    }

    fn on_config(&mut self, raw: Option<RawConfig>, config: &NetworkConfig) -> Option<End> {
        let Some(raw) = raw else {
            self.find_one_of(
                &CONFIG_FINDINGS,
                "config-missing",
                "network config",
                "it was deleted from the store",
                "the last good one stays in force; write it again",
            );
            return None;
        };
        match NetworkConfig::parse(&raw.value) {
            Ok((new, ignored)) => {
                CONFIG_FINDINGS.iter().for_each(|code| self.unfind(code));
                self.show_ignored(&ignored);
                if new == *config {
                    return None;
                }
                if let Err(refusal) = twill_core::backend::build(&new.backend) {
                    self.find(refusal.code, "network config", &refusal.message, "the last good config stays in force");
                    return None;
                }
                tracing::info!("the network config has changed");
                Some(End::Again)
            }
            Err(fault) => {
                let message = fault.at(&self.settings.store.config_key());
                tracing::error!(code = "bad-config", "{message}: the last good config stays in force");
                self.find_one_of(
                    &CONFIG_FINDINGS,
                    "bad-config",
                    "network config",
                    &message,
                    "correct it in the store; the last good one stays in force",
                );
                None
            }
        }
    }

    async fn on_command(
        &mut self,
        command: Command,
        network: &Network,
        own: &Lease,
    ) -> Result<Option<End>, StoreError> {
        match command {
            Command::Peers(reply) => drop(reply.send(self.peer_views(network, own))),
            Command::Accept(reply) => {
                // The own lease has been written again.
                let own_name = own.key.to_string();
                let gone: Vec<LeaseName> =
                    std::mem::take(&mut self.withheld).into_iter().filter(|name| **name != *own_name).collect();
                let mut concerned: BTreeSet<LeaseName> =
                    gone.iter().flat_map(|name| self.leases.delete(name)).collect();
                concerned.extend(std::mem::take(&mut self.kept).into_keys());
                self.send_peers(network, own, concerned);
                self.accepted();
                tracing::info!(peers = gone.len(), "the listing was accepted, what it lacks is withdrawn");
                let _ = reply.send(Ok(gone.len()));
            }
            Command::Leaving(reply) => {
                let (plan, steps) = oneshot::channel();
                self.order(Order::PlanClear(plan));
                let steps = steps.await.unwrap_or_default();
                let tunnel = super::tunnel::path(&self.settings.state_dir);
                let files = [&self.settings.subnet_file, &tunnel].into_iter().filter(|file| file.exists()).cloned();
                let files = files.chain(self.cache.announced());
                let files = files.map(|file| format!("delete file {}", file.display()));
                let lease = format!("delete lease {} from the store", own.key);
                let forget =
                    format!("forget subnet and devices in {}", self.settings.state_dir.join("state.json").display());
                drop(reply.send(Ok([lease].into_iter().chain(steps).chain(files).chain([forget]).collect())));
            }
            Command::Leave(reply) => {
                let name = own.key.to_string();
                if let Swap::Lost(Some(_)) = self.store.delete(&name, own.mod_rev).await? {
                    let _ =
                        reply.send(Err(Failure::new("lease-changed", format!("lease {name} was changed meanwhile"))
                            .hint("try again")));
                    return Ok(None);
                }
                tracing::info!(subnet = name, "given back");
                self.state.hold(Vec::new());
                let (done, cleared) = oneshot::channel();
                self.order(Order::Clear(done));
                let _ = cleared.await;
                self.state.devices.clear();
                self.save();
                self.cache.forget().await;
                self.withdraw_subnet_env();
                let _ = reply.send(Ok(()));
                return Ok(Some(End::Left));
            }
        }
        Ok(None)
    }

    fn peer_views(&self, network: &Network, own: &Lease) -> Vec<PeerView> {
        let own_name = own.key.to_string();
        let names = self.leases.names().filter(|name| ***name != *own_name).chain(self.kept.keys());
        let view = |name: &LeaseName| {
            let lease = self.leases.lease(name).and_then(Result::ok);
            let attrs = lease.as_ref().map(|l| &l.attrs);
            let first = lease.as_ref().and_then(|l| l.key.subnets().next());
            let mac = |data: &Option<serde_json::Value>| Some(data.as_ref()?.get("VtepMAC")?.as_str()?.to_owned());
            let way = |subnet: Prefix| {
                let public = attrs.map(|a| (a.public_ip.map(IpAddr::V4), a.public_ipv6.map(IpAddr::V6)));
                WayView {
                    family: if subnet.is_v4() { "IPv4" } else { "IPv6" }.into(),
                    address: public.and_then(|(v4, v6)| if network.backend.over_v4(subnet.is_v4()) { v4 } else { v6 }),
                    vtep: subnet.addr(),
                }
            };
            let shared = |subnet: &Prefix| network.cx.subnets.iter().any(|ours| ours.is_v4() == subnet.is_v4());
            PeerView {
                lease: name.to_string(),
                subnets: lease.iter().flat_map(|l| l.key.subnets()).map(|s| s.to_string()).collect(),
                address: attrs.and_then(|a| a.public_ip.map(Into::into).or(a.public_ipv6.map(Into::into))),
                vtep: first.map(|s| s.addr()),
                ways: lease.iter().flat_map(|l| l.key.subnets()).filter(shared).map(way).collect(),
                mac: attrs.and_then(|a| mac(&a.backend_data)),
                node: attrs.and_then(|a| a.node).map(|n| n.to_string()),
                fault: match network.peer(&self.leases, name) {
                    None => Some("the store's listing lacks it: kept as it stands in the kernel".into()),
                    Some(known) => known.map_or_else(Some, |reach| reach.fault).map(|fault| fault.reason),
                },
                probe: None,
            }
        };
        names.map(view).collect()
    }

    fn order(&self, order: Order) {
        // The reconciler ends only with the process.
        let _ = self.orders.send(order);
        self.waker.wake();
    }
}

/// Ends at this moment.
async fn at(moment: Option<Instant>) {
    tokio::time::sleep_until(moment.unwrap_or_else(Instant::now)).await;
}
