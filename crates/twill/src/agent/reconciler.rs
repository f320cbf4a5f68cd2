//! The thread that owns the kernel: it waits for orders, for the kernel's word, and for time to pass, and after each plans and applies.
//!
//! ```text
//!   session (async) ──Order──▶ ┌────────────┐ ──apply──▶ kernel
//!   control API     ──Order──▶ │ Reconciler │ ◀─changes─ kernel
//!                              └────────────┘ ──host facts, status──▶ session, control API
//! ```

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::{oneshot, watch};
use twill_cni::ports::{self, Restored};
use twill_cni::records::Records;
use twill_core::backend::{Reach, TunnelSpec};
use twill_core::firewall::TableName;
use twill_core::firewall::policy::STRANGERS;
use twill_core::firewall::{beside, judge};
use twill_core::host::{HostState, Key, Object, PROTO_TWILL};
use twill_core::lease_set::LeaseName;
use twill_core::reconcile::{
    Claim, Desired, Finding, Healer, Journal, Plan, Scope, Wanted, plan, shadowed, taken_tables, taken_tunnels,
};
use twill_kernel::{Interest, Kernel, KernelError, LinuxKernel, Waker};

use super::handover::Handed;
use super::tunnel::TunnelHost;
use super::view::{PlanView, Repairs, View};

/// Sysctls announce nothing: they are read again this often.
const SYSCTLS: Duration = Duration::from_millis(125);
/// Everything is read again this often.
const AUDIT: Duration = Duration::from_secs(60);
/// Legacy iptables announces nothing either.
const LEGACY: Duration = Duration::from_secs(2);
/// Findings are looked for when nothing has happened for so long.
const QUIET: Duration = Duration::from_millis(100);
/// The firewalls of others are judged no more often.
const JUDGE: Duration = Duration::from_secs(1);
/// Changes that are logged one by one.
const LOGGED: usize = 8;
/// Repairs that `status` shows.
const SHOWN_REPAIRS: usize = 20;

/// What the reconciler is told.
pub(crate) enum Order {
    /// The node's own objects, what is claimed, what to watch, and the tunnel. Answered when
    /// applied: whether the firewall is as wanted.
    Base { base: HostState, claim: Claim, tunnel: Option<TunnelSpec>, done: oneshot::Sender<bool> },
    /// What reaches peers, by name; nothing: the peer is gone.
    Peers(Vec<(LeaseName, Reach)>),
    /// What is not wanted may be removed from now on: every peer is known.
    Prune,
    /// Repair nothing (true), or go on (false).
    Hold(bool),
    /// What would be changed now.
    Plan(oneshot::Sender<PlanView>),
    /// What [`Order::Clear`] would do now.
    PlanClear(oneshot::Sender<Vec<String>>),
    /// Stop the tunnel's pumps and give its descriptors away; `None`: no tunnel runs.
    HandOver(oneshot::Sender<Option<Handed>>),
    /// Whoever was to have them went away.
    TakeBack(Option<Handed>),
    /// The agent ends.
    End,
    /// Remove everything that is ours. Answered when applied.
    Clear(oneshot::Sender<bool>),
}

/// The thread's state.
pub(crate) struct Reconciler {
    kernel: LinuxKernel,
    wanted: Wanted,
    tunnel: TunnelHost,
    /// The attachments of this node's containers.
    guests: Records,
    healer: Healer,
    journal: Journal,
    start: Instant,
    held: bool,
    prune: bool,
    /// Looked at in the next round: by order, or since the kernel changed.
    ordered: BTreeSet<Key>,
    drifted: BTreeSet<Key>,
    all: bool,
    /// The whole state was applied once: what differs from now on is drift.
    settled: bool,
    wake: Option<Duration>,
    audit: Duration,
    sysctls: Duration,
    /// When to look at legacy iptables again.
    legacy: Duration,
    findings: Option<Duration>,
    /// What the firewalls of others drop, when they were judged, and whether to do it again.
    judged: (Vec<Finding>, Duration),
    judge: bool,
    trim: bool,
    /// The tunnel's peers may have changed, or the table that names them.
    members: bool,
    /// What [`View`] says of the guard at the tunnel's socket.
    guarded: bool,
    host: watch::Sender<Arc<HostState>>,
    view: Arc<Mutex<View>>,
}

impl Reconciler {
    pub(crate) fn new(
        host: watch::Sender<Arc<HostState>>,
        view: Arc<Mutex<View>>,
        guests: Records,
        tunnel: impl FnOnce(Waker) -> TunnelHost,
    ) -> Result<Self, KernelError> {
        let kernel = LinuxKernel::open(Interest { devices: Some(BTreeSet::new()), ..Interest::default() })?;
        let mut reconciler = Self {
            tunnel: tunnel(kernel.waker()),
            guests,
            kernel,
            wanted: Wanted::default(),
            healer: Healer::default(),
            journal: Journal::default(),
            start: Instant::now(),
            held: false,
            prune: false,
            ordered: BTreeSet::new(),
            drifted: BTreeSet::new(),
            all: false,
            settled: false,
            wake: None,
            audit: AUDIT,
            sysctls: SYSCTLS,
            legacy: LEGACY,
            findings: None,
            judged: (Vec::new(), Duration::ZERO),
            judge: false,
            trim: false,
            members: false,
            guarded: false,
            host,
            view,
        };
        reconciler.publish_host();
        Ok(reconciler)
    }

    pub(crate) fn waker(&self) -> Waker {
        self.kernel.waker()
    }

    /// The tunnel of an earlier run goes on before anything else.
    pub(crate) fn restore(&mut self, handed: Option<Handed>) {
        self.tunnel.restore(handed);
    }

    /// Works until the orders end. What was applied stays in the kernel.
    pub(crate) fn run(mut self, orders: &Receiver<Order>) {
        loop {
            let changes = match self.kernel.changes(Some(self.timeout())) {
                Ok(changes) => changes,
                Err(error) => {
                    tracing::error!(%error, cause = ?error.source, "the kernel cannot be asked");
                    return;
                }
            };
            let facts =
                changes.all || changes.dirty.iter().any(|k| matches!(k, Key::Link(_) | Key::Addr(..) | Key::Route(_)));
            self.all |= changes.all;
            if facts && changes.dirty.iter().chain(self.ordered.iter()).any(|k| !self.is_ours(k)) || changes.all {
                self.publish_host();
            }
            // With them go, or have gone, the sysctls that an address needs.
            if changes.dirty.iter().any(|k| matches!(k, Key::Link(_) | Key::Addr(..)) && self.is_ours(k)) {
                self.sysctls = Duration::ZERO;
            }
            self.drifted.extend(changes.dirty);
            self.on_time();
            let mut answers = Vec::new();
            loop {
                match orders.try_recv() {
                    Ok(Order::End) => return self.tunnel.save(),
                    Ok(order) => self.on_order(order, &mut answers),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => return self.tunnel.save(),
                }
            }
            self.look_beside();
            self.restore_ports();
            self.admit();
            self.reconcile();
            self.bring_up_tunnel();
            self.publish_guard();
            for done in answers {
                // Whoever asked may have gone.
                let _ = done.send(self.firewall_stands());
            }
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Until the next thing that time alone brings.
    fn timeout(&self) -> Duration {
        let sysctls = (!self.kernel.interest().sysctls.is_empty()).then_some(self.sysctls);
        let legacy = self.kernel.interest().firewall.then_some(self.legacy);
        let next =
            [self.wake, sysctls, legacy, self.findings, Some(self.audit)].into_iter().flatten().min().unwrap_or(AUDIT);
        next.saturating_sub(self.now())
    }

    fn on_time(&mut self) {
        let now = self.now();
        if now >= self.sysctls {
            self.sysctls = now + SYSCTLS;
            let dirty = self.kernel.poll_sysctls();
            self.drifted.extend(dirty);
        }
        if self.kernel.interest().firewall && now >= self.legacy {
            self.legacy = now + LEGACY;
            let before = self.kernel.legacy().to_vec();
            let dirty = self.kernel.poll_legacy();
            self.drifted.extend(dirty);
            self.look_at_owned();
            if before != self.kernel.legacy() {
                (self.findings, self.judge) = (Some(now), true);
            }
        }
        if self.wake.is_some_and(|at| now >= at) {
            self.wake = None;
            self.all = true;
        }
        if now >= self.audit {
            self.audit = now + AUDIT;
            self.healer.settle(now);
            if let Err(error) = self.kernel.read(Scope::All) {
                tracing::warn!(%error, "audit");
            }
            self.all = true;
        }
        if self.findings.is_some_and(|at| now >= at) {
            self.findings = None;
            self.publish_status();
            self.tunnel.save();
            if std::mem::take(&mut self.trim) {
                self.kernel.pack();
                self.wanted.pack();
                twill_kernel::process::trim_heap();
            }
        }
    }

    /// A table that goes with its owner goes without a word.
    fn look_at_owned(&mut self) {
        let owned = self.kernel.mirror().iter().filter_map(|(key, object)| match object {
            Object::Table(table) if table.owner.is_some() => Some(key.clone()),
            _ => None,
        });
        let owned: BTreeSet<Key> = owned.collect();
        if owned.is_empty() {
            return;
        }
        if let Err(error) = self.kernel.read(Scope::Keys(&owned)) {
            tracing::warn!(%error, "tables with an owner");
        }
        self.drifted.extend(owned.into_iter().filter(|key| self.kernel.mirror().get(key).is_none()));
    }

    fn on_peers(&mut self, peers: Vec<(LeaseName, Reach)>) {
        let before = self.tunnel.peer_count();
        let dirty = peers.into_iter().flat_map(|(name, reach)| {
            self.tunnel.set_peer(&name, reach.tunnel);
            self.wanted.set_peer(&name, reach.objects)
        });
        let dirty: BTreeSet<Key> = dirty.collect();
        self.ordered.extend(dirty);
        self.members = true;
        // A tunnel's peer has no object in the kernel whose coming would be told.
        let soon = if self.tunnel.peer_count() == before { QUIET } else { Duration::ZERO };
        self.findings = Some(self.now() + soon);
    }

    fn on_order(&mut self, order: Order, answers: &mut Vec<oneshot::Sender<bool>>) {
        match order {
            Order::Base { base, claim, tunnel, done } => {
                self.tunnel.set_spec(tunnel);
                let devices =
                    base.iter().filter_map(|(key, _)| if let Key::Link(name) = key { Some(*name) } else { None });
                let devices = devices.chain(claim.devices.iter().copied()).collect();
                let sysctls =
                    base.iter().filter_map(|(k, _)| if let Key::Sysctl(path) = k { Some(path.clone()) } else { None });
                let interest = Interest {
                    devices: Some(devices),
                    sysctls: sysctls.collect(),
                    firewall: claim.firewall,
                    ..Interest::default()
                };
                if let Err(error) = self.kernel.set_interest(interest) {
                    tracing::warn!(%error, "watch the tunnel device");
                }
                self.wanted.set_claim(claim);
                let dirty = self.wanted.set_base(base);
                self.ordered.extend(dirty);
                (self.all, self.settled, self.members) = (true, false, true);
                answers.push(done);
            }
            Order::Peers(peers) => self.on_peers(peers),
            Order::HandOver(reply) => {
                if let Err(handed) = reply.send(self.tunnel.hand_over()) {
                    self.tunnel.take_back(handed);
                }
            }
            Order::TakeBack(handed) => self.tunnel.take_back(handed),
            Order::End => self.tunnel.take_back(None),
            Order::Prune => {
                self.tunnel.forget_remembered();
                (self.prune, self.all, self.settled, self.members) = (true, true, false, true);
            }
            Order::Hold(held) => {
                self.held = held;
                self.all |= !held;
                self.findings = Some(self.now());
            }
            Order::Plan(reply) => drop(reply.send(PlanView::from(&self.plan(Scope::All)))),
            Order::PlanClear(reply) => {
                let nothing = Desired { host: HostState::new(), claim: self.wanted.desired().claim.clone() };
                let plan = plan(&nothing, self.kernel.mirror(), Scope::All);
                drop(reply.send(plan.steps.iter().map(|step| step.op.to_string()).collect()));
            }
            Order::Clear(done) => {
                let names: Vec<LeaseName> = self.wanted.peer_names().cloned().collect();
                names.iter().for_each(|name| drop(self.wanted.set_peer(name, Vec::new())));
                self.wanted.set_base(HostState::new());
                self.tunnel.clear();
                (self.all, self.prune, self.settled, self.members) = (true, true, false, true);
                answers.push(done);
            }
        }
    }

    fn plan(&self, scope: Scope<'_>) -> Plan {
        let mut plan = plan(self.wanted.desired(), self.kernel.mirror(), scope);
        if !self.prune {
            plan.steps.retain(|step| !matches!(step.op, twill_core::reconcile::Op::Delete(_)));
        }
        plan
    }

    /// What the firewalls of others make necessary, when they or what we want have changed.
    fn look_beside(&mut self) {
        if !self.all && !self.drifted.iter().any(|key| matches!(key, Key::Table(_))) {
            return;
        }
        let desired = self.wanted.desired();
        let wanted = desired.host.get(&Key::Table(TableName::twill())).is_some();
        let networks = if wanted { desired.claim.networks.as_slice() } else { &[] };
        let heads = beside::heads(networks, self.kernel.mirror());
        let dirty = self.wanted.set_beside(heads);
        self.ordered.extend(dirty);
    }

    /// The table of host ports is the plugin's. It follows the attachments: when it does not, somebody has altered it.
    fn restore_ports(&mut self) {
        let altered = self.drifted.contains(&Key::Table(TableName::twill_cni()));
        if self.held || !(self.all || altered) {
            return;
        }
        match ports::restore(&self.guests) {
            Ok(Restored::Stood) => {}
            Ok(Restored::Done(step)) => {
                tracing::info!("repaired: {step}");
                self.journal.note(&step, unix_ms());
                self.findings = Some(self.now() + QUIET);
            }
            Ok(Restored::Busy) => {
                let soon = self.now() + QUIET;
                self.wake = Some(self.wake.map_or(soon, |at| at.min(soon)));
            }
            Err(error) => tracing::warn!(%error, hint = error.details, "cannot restore the host ports of containers"),
        }
    }

    /// Whom the firewall lets through to the tunnel's socket: whoever the tunnel itself hears.
    fn admit(&mut self) {
        if std::mem::take(&mut self.members) {
            let dirty = self.wanted.set_members(self.tunnel.hosts());
            self.ordered.extend(dirty);
        }
    }

    /// Plans what is dirty, applies it, and notes what came of it.
    fn reconcile(&mut self) {
        let seen = |key: &Key| !matches!(key, Key::Sysctl(_) | Key::Route(_) | Key::Neigh(..) | Key::Rule(_));
        self.judge |= self.all || self.ordered.iter().chain(&self.drifted).any(seen);
        let idle = !self.all && self.ordered.is_empty() && self.drifted.is_empty();
        if idle || self.held || self.wanted.desired().claim == Claim::default() {
            return;
        }
        let ordered = std::mem::take(&mut self.ordered);
        let mut dirty = std::mem::take(&mut self.drifted);
        dirty.extend(ordered.iter().cloned());
        let todo = if std::mem::take(&mut self.all) {
            let whole = self.plan(Scope::All);
            self.healer.cured(&whole);
            whole
        } else {
            self.plan(Scope::Keys(&dirty))
        };
        let (todo, wake) = self.healer.filter(todo, self.now());
        self.wake = [self.wake, wake].into_iter().flatten().min();
        self.findings = Some(self.now() + QUIET);
        if todo.steps.is_empty() {
            self.settled = true;
            return;
        }
        let outcome = self.kernel.apply(&todo);
        let now = self.now();
        let (mut failed, mut repairs) = (false, 0);
        for (step, result) in todo.steps.iter().zip(&outcome.steps) {
            let repair = self.settled && !ordered.contains(&step.op.object().key());
            self.healer.record(step, result, repair, now);
            if repair && result.is_ok() {
                self.journal.note(step, unix_ms());
                repairs += 1;
            }
            failed |= result.is_err();
        }
        log(&todo, &outcome.steps, repairs > 0);
        self.trim |= todo.steps.len() > 1000;
        // Look again: at what failed when its time comes, and at what this plan could not see.
        self.wake = Some(self.wake.unwrap_or(now + QUIET).min(now + QUIET)).filter(|_| failed).or(self.wake);
        self.settled |= !failed;
    }

    fn bring_up_tunnel(&mut self) {
        let before = self.tunnel.finding().cloned();
        let again = self.tunnel.bring_up(self.kernel.mirror(), self.now());
        self.wake = [self.wake, again].into_iter().flatten().min();
        if before.as_ref() != self.tunnel.finding() {
            self.findings = Some(self.now());
        }
    }

    /// True when every table that is wanted is there.
    fn firewall_stands(&self) -> bool {
        let have = self.kernel.mirror();
        let mut tables = self.wanted.desired().host.iter().filter(|(key, _)| matches!(key, Key::Table(_)));
        tables.all(|(key, want)| have.get(key).is_some_and(|have| want.satisfied_by(have)))
    }

    /// Tells whether nftables keeps strangers from the tunnel's socket.
    fn publish_guard(&mut self) {
        let table = self.kernel.mirror().get(&Key::Table(TableName::twill()));
        let guarded =
            matches!(table, Some(Object::Table(table)) if table.is_ours() && table.chains.contains_key(STRANGERS));
        if guarded != std::mem::replace(&mut self.guarded, guarded)
            && let Ok(mut view) = self.view.lock()
        {
            view.guarded = guarded;
        }
    }

    fn is_ours(&self, key: &Key) -> bool {
        self.wanted.desired().host.get(key).is_some()
    }

    /// Tells the session what this host looks like, without our own peers.
    fn publish_host(&mut self) {
        let ours =
            |o: &Object| matches!(o, Object::Route(r) if r.entries.first().is_some_and(|e| e.protocol == PROTO_TWILL));
        let facts = self.kernel.mirror().iter().map(|(_, o)| o).filter(|o| match o {
            Object::Link(_) | Object::Addr(_) => true,
            Object::Route(_) => !ours(o),
            _ => false,
        });
        let facts: HostState = facts.cloned().collect();
        self.host.send_if_modified(|old| {
            let differs = **old != facts;
            if differs {
                *old = Arc::new(facts);
            }
            differs
        });
    }

    fn publish_status(&mut self) {
        let mut findings = shadowed(self.wanted.desired(), self.kernel.mirror());
        findings.extend(taken_tunnels(&self.wanted.desired().host, self.kernel.mirror()));
        findings.extend(taken_tables(self.wanted.desired(), self.kernel.mirror()));
        let now = self.now();
        if self.judge && now < self.judged.1 + JUDGE {
            self.findings = Some(self.judged.1 + JUDGE);
        } else if std::mem::take(&mut self.judge) {
            let (want, have) = (self.wanted.desired(), self.kernel.mirror());
            let found = judge::findings(
                want,
                have,
                self.kernel.legacy(),
                &|name| self.kernel.index(name),
                &twill_kernel::process::name,
            );
            self.judged = (found, now);
        }
        findings.extend(self.judged.0.iter().cloned());
        let (mut refused, lacking) = (self.healer.findings(), self.kernel.without_nftables());
        if let Some(error) = lacking {
            refused.retain(|finding| finding.code != "kernel-refused" || !finding.object.starts_with("table "));
            findings.push(nf_tables_missing(error));
        }
        // What stands in its way is told in plain words.
        refused.retain(|finding| !findings.iter().any(|f| f.code == "route-shadowed" && f.object == finding.object));
        findings.extend(refused);
        findings.extend(self.tunnel.finding().cloned());
        let recent =
            self.journal.repairs().rev().take(SHOWN_REPAIRS).cloned().collect::<Vec<_>>().into_iter().rev().collect();
        if let Ok(mut view) = self.view.lock() {
            view.findings.retain(|f| f.code.starts_with("session:") || !KERNEL_CODES.contains(&f.code.as_str()));
            view.findings.extend(findings);
            view.repairs = Repairs { total: self.journal.total(), recent };
            view.peers = self.wanted.peer_count() + self.tunnel.peer_count();
            if self.held {
                view.state = "held".into();
            } else if view.state == "held" {
                view.state = "running".into();
            }
        }
    }
}

/// Findings that come from here; the others are the session's.
const KERNEL_CODES: [&str; 13] = [
    "route-shadowed",
    "vni-taken",
    "nf-tables-missing",
    "table-taken",
    "dropped-before-forward",
    "dropped-after-forward",
    "tunnel-dropped",
    "may-drop",
    "table-owned",
    "legacy-drops-forward",
    "fought-over",
    "kernel-refused",
    "tunnel-down",
];

/// Without nftables there is a network, but no way out of it.
fn nf_tables_missing(error: &std::io::Error) -> Finding {
    Finding {
        code: "nf-tables-missing".into(),
        object: "this kernel".into(),
        evidence: format!(
            "nftables cannot be asked ({error}): nothing is masqueraded, accepted or guarded; containers of the network reach each other"
        ),
        fix: "modprobe -a nf_tables nft_masq nft_ct, or a kernel with CONFIG_NF_TABLES; it is tried again by itself"
            .into(),
    }
}

/// One line for each change, or one for all when there are many.
fn log(plan: &Plan, results: &[Result<(), twill_core::reconcile::StepError>], drift: bool) {
    let act = if drift { "repaired" } else { "changed" };
    let failed = results.iter().filter(|r| r.is_err()).count();
    if plan.steps.len() > LOGGED {
        tracing::info!(steps = plan.steps.len(), failed, "{act} many objects, the first: {}", plan.steps[0]);
    }
    for (n, (step, result)) in plan.steps.iter().zip(results).enumerate() {
        match result {
            Err(error) if failed <= LOGGED || n == 0 => tracing::warn!("{step}: {error}"),
            Ok(()) if plan.steps.len() <= LOGGED => tracing::info!("{act}: {step}"),
            _ => {}
        }
    }
}

fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64)
}
