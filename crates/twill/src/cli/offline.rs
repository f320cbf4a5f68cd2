//! Commands that look at store and kernel themselves: `plan`, `leases`, `clean`. None needs an agent, none takes a lease.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use twill_core::alloc::{self, Choice};
use twill_core::backend::Rule;
use twill_core::config::NetworkConfig;
use twill_core::firewall::beside;
use twill_core::host::{HostState, Key, LinkKind, Object, PROTO_TWILL};
use twill_core::iface;
use twill_core::lease::Lease;
use twill_core::lease_set::{LeaseName, LeaseSet};
use twill_core::net::LinkName;
use twill_core::reconcile::{Claim, Desired, Op, Plan, Scope, Wanted, plan};
use twill_core::state_file::State;
use twill_kernel::{Interest, Kernel, LinuxKernel};
use twill_store::{Listing, RawConfig};

use super::ask::Socket;
use super::asked::{AskArgs, Asked};
use super::folder::StateDir;
use crate::agent::compose::{self, Network};
use crate::agent::session::cache;
use crate::agent::session::listing::kept_at_start;
use crate::agent::settings::{AgentArgs, Settings};
use crate::agent::view::PlanView;
use crate::agent::{load_state, refuse_beside_flannel};
use crate::output::{Failure, Output, columns, progress};
use crate::stores::StoreArgs;

/// Show what the agent would change right now; touches nothing, takes no lease, needs no agent. One that runs is asked, unless
/// another store or another setting is named.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill plan\n  twill plan --store http://192.0.2.11:2379 -o json")]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    args: AgentArgs,
    /// Show what stands there as well, before each change
    #[arg(long)]
    diff: bool,
    #[command(flatten)]
    output: Output,
}

impl PlanArgs {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let agent = self.args.of_a_running_agent().filter(|_| !self.diff).map(Socket::new);
        let known = match agent {
            // Who may not ask it still may look.
            Some(agent) => crate::runtime()?.block_on(agent.plan()).unwrap_or_default(),
            None => None,
        };
        let (view, diff) = match known {
            Some(view) => (view, None),
            None => {
                let agent = self.args.names_no_store().then(|| Socket::new(self.args.run_dir.clone()));
                let settings = self.args.settings()?;
                let of_agent = agent.map(|agent| Asked::of_agent(&StoreArgs::default(), &agent)).transpose()?.flatten();
                let asked =
                    of_agent.unwrap_or_else(|| Asked::named(settings.store.clone(), "as the agent's settings say"));
                let plan = compute(&settings, &asked)?;
                let diff = self.diff.then(|| plan.steps.iter().map(ToString::to_string).collect::<Vec<_>>());
                (PlanView::from(&plan), diff)
            }
        };
        let short = || view.steps.iter().map(|s| format!("{} {}: {}", s.op, s.object, s.why)).collect();
        let lines = diff.unwrap_or_else(short);
        self.output.print(&view, || if lines.is_empty() { "nothing to change".into() } else { lines.join("\n") })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What an agent with these settings would do now.
fn compute(settings: &Settings, asked: &Asked) -> anyhow::Result<Plan> {
    let state = load_state(&settings.state_dir)?;
    let (raw, listing) = read(asked)?;
    let config = parse_config(raw, &asked.store)?.0;
    let everything = LinuxKernel::open(Interest::default()).context("look at this host's network")?;
    let host = everything.mirror().clone();
    let chosen = iface::choose(&host, &settings.wishes).map_err(refused)?;
    let mut network = Network::new(&config, chosen.underlay, &host, &state, settings.way_out)
        .map_err(|mut refusals| refused(refusals.swap_remove(0)))?;
    let mut leases = LeaseSet::default();
    leases.follow(Rule::new(&config).map_err(refused)?);
    let kept = kept_at_start(&listing, &network, &state, &settings.state_dir);
    leases.reset(listing.entries);
    let own = match choose(settings, &config, &network, &leases, &host, &state) {
        Choice::Keep(lease) => {
            network.take(&lease.key, Some(&lease));
            Some(lease.key.to_string())
        }
        Choice::GiveBack(lease) => Some(lease.key.to_string()),
        Choice::Create(key) => {
            network.take(&key, None);
            network.avoid_macs_of(&leases);
            None
        }
        Choice::Refuse(reason) => return Err(Failure::new("no-free-subnet", reason).into()),
    };
    let mut wanted = Wanted::default();
    wanted.set_claim(network.claim(&state));
    wanted.set_base(network.base().map_err(refused)?);
    let mut members = Vec::new();
    for name in leases.names().filter(|name| own.as_deref() != Some(&***name)) {
        if let Some(Ok(reach)) = network.peer(&leases, name) {
            members.extend(reach.tunnel.map(|peer| peer.host));
            wanted.set_peer(name, reach.objects);
        }
    }
    for (name, reach) in kept.iter().flatten() {
        members.extend(reach.tunnel.iter().map(|peer| peer.host));
        wanted.set_peer(name, reach.objects.clone());
    }
    wanted.set_members(members);
    let mut plan = against_kernel(wanted, &network)?;
    if kept.is_some() {
        plan.steps.retain(|step| !matches!(step.op, Op::Delete(_)));
        progress("the store's listing is strange: nothing is withdrawn until `twill resync --accept`");
    }
    Ok(plan)
}

/// The subnet that an agent with these settings would have.
pub(super) fn choose(
    settings: &Settings,
    config: &NetworkConfig,
    network: &Network,
    leases: &LeaseSet,
    host: &HostState,
    state: &State,
) -> Choice {
    let devices = network.backend.devices(&config.networks());
    let env = std::fs::read_to_string(&settings.subnet_file).unwrap_or_default();
    let me = compose::me(state, &network.cx.underlay, host, &env, &devices, &settings.subnet);
    alloc::choose(config, leases, &me, 0)
}

fn against_kernel(mut wanted: Wanted, network: &Network) -> anyhow::Result<Plan> {
    let sysctls = wanted
        .desired()
        .host
        .iter()
        .filter_map(|(k, _)| if let Key::Sysctl(path) = k { Some(path.clone()) } else { None });
    let interest = Interest {
        devices: Some(wanted.desired().claim.devices.clone()),
        sysctls: sysctls.collect(),
        firewall: true,
        ..Interest::default()
    };
    let kernel = LinuxKernel::open(interest).context("look at this host's network")?;
    wanted.set_beside(beside::heads(&network.cx.networks, kernel.mirror()));
    Ok(plan(wanted.desired(), kernel.mirror(), Scope::All))
}

/// Network config and leases.
fn read(asked: &Asked) -> anyhow::Result<(Option<RawConfig>, Listing)> {
    let store = asked.connect()?;
    let found = crate::runtime()?.block_on(async { Ok((store.config().await?, store.list().await?)) });
    found.map_err(|error| asked.failed(error).into())
}

/// The network config, or the error that a user can act on.
pub(crate) fn parse_config(raw: Option<RawConfig>, store: &StoreArgs) -> anyhow::Result<(NetworkConfig, Vec<String>)> {
    let Some(raw) = raw else {
        return Err(Failure::new("config-missing", "the store has no network config")
            .hint("the first agent writes one: twill agent --serve-store")
            .into());
    };
    NetworkConfig::parse(&raw.value)
        .map_err(|e| Failure::new("bad-config", e.at(&store.config_key())).hint("correct it in the store").into())
}

/// A refusal of core as the user meets it.
pub(crate) fn refused(refusal: twill_core::backend::Refusal) -> Failure {
    Failure::new(refusal.code, refusal.message).hint(refusal.hint)
}

/// List the leases in the store.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill leases\n  twill leases --store http://192.0.2.11:2379 -o json")]
pub(crate) struct Leases {
    #[command(flatten)]
    store: AskArgs,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct LeaseRows {
    revision: i64,
    leases: Vec<LeaseRow>,
}

#[derive(Serialize)]
struct LeaseRow {
    lease: String,
    public_ip: Option<String>,
    backend: Option<String>,
    node: Option<String>,
    reservation: bool,
    revision: i64,
    fault: Option<String>,
}

impl Leases {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let asked = self.store.find()?;
        let (raw, listing) = read(&asked)?;
        let revision = listing.revision;
        let reserved: BTreeSet<String> =
            listing.entries.iter().filter(|e| e.etcd_lease == 0).map(|e| e.name.clone()).collect();
        let mut set = LeaseSet::default();
        // Without a config that can be read they are judged by themselves.
        if let Some(rule) = parse_config(raw, &asked.store).ok().and_then(|(config, _)| Rule::new(&config).ok()) {
            set.follow(rule);
        }
        set.reset(listing.entries);
        let row = |name: &LeaseName| {
            let lease: Option<Lease> = set.lease(name).and_then(Result::ok);
            let attrs = lease.as_ref().map(|l| &l.attrs);
            LeaseRow {
                lease: name.to_string(),
                public_ip: attrs
                    .and_then(|a| a.public_ip.map(|ip| ip.to_string()).or(a.public_ipv6.map(|ip| ip.to_string()))),
                // flannel writes no type for its UDP backend.
                backend: attrs.map(|a| a.backend_type.clone().unwrap_or_else(|| "udp".into())),
                node: attrs.and_then(|a| a.node).map(|n| n.to_string()),
                reservation: reserved.contains(&**name),
                revision: lease.as_ref().map_or(0, |l| l.mod_rev),
                fault: set.verdict(name).and_then(Result::err).map(|f| f.reason),
            }
        };
        let rows = LeaseRows { revision, leases: set.names().map(row).collect() };
        self.output.print(&rows, || lease_table(&rows.leases))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn lease_table(rows: &[LeaseRow]) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
    let cells = |row: &LeaseRow| {
        let note =
            row.fault.clone().unwrap_or_else(|| if row.reservation { "reservation".into() } else { String::new() });
        [row.lease.clone(), text(&row.public_ip), text(&row.backend), text(&row.node), note]
    };
    columns(&["LEASE", "PUBLIC IP", "BACKEND", "NODE", "NOTE"], rows.iter().map(cells))
}

/// Remove everything that Twill owns on this host; the lease stays.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill clean --dry-run\n  twill clean")]
pub(crate) struct Clean {
    /// Only say what would be removed
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    state: StateDir,
    /// File for container runtimes [default: /run/flannel/subnet.env]
    #[arg(long, value_name = "FILE", env = "TWILL_SUBNET_FILE")]
    subnet_file: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Cleaned {
    removed: bool,
    steps: Vec<String>,
    failed: Vec<String>,
    left: Vec<String>,
}

impl Clean {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let state_dir = self.state.path();
        let lock = twill_kernel::files::Lock::try_exclusive(&state_dir.join("agent.lock"))
            .with_context(|| format!("lock {}", state_dir.display()))?;
        if lock.is_none() && !self.dry_run {
            return Err(Failure::new("agent-running", "the agent runs, and would put everything back")
                .hint("stop it first: systemctl stop twill")
                .into());
        }
        let _network = if self.dry_run { None } else { crate::agent::place::network()? };
        refuse_beside_flannel()?;
        let mut state = load_state(&state_dir)?;
        let interest = Interest { firewall: true, ..Interest::default() };
        let mut kernel = LinuxKernel::open(interest).context("look at this host's network")?;
        let desired = Desired { host: HostState::new(), claim: claim(&state, kernel.mirror()) };
        let todo = plan(&desired, kernel.mirror(), Scope::All);
        let mut steps: Vec<String> = todo.steps.iter().map(|s| s.op.to_string()).collect();
        let env = self.subnet_file.clone().unwrap_or_else(|| PathBuf::from("/run/flannel/subnet.env"));
        // The tunnel that used it is not to come back, nor is what a store said.
        let files = [env, crate::agent::tunnel::path(&state_dir), cache::path(&state_dir)]
            .into_iter()
            .filter(|file| file.exists());
        let files: Vec<PathBuf> = files.collect();
        steps.extend(files.iter().map(|file| format!("delete file {}", file.display())));
        if !state.devices.is_empty() {
            steps.push(format!("forget the devices in {}", state_dir.join("state.json").display()));
        }
        let mut failed = Vec::new();
        if !self.dry_run {
            let outcome = kernel.apply(&todo);
            failed =
                todo.steps.iter().zip(outcome.steps).filter_map(|(s, r)| Some(format!("{s}: {}", r.err()?))).collect();
            state.devices.clear();
            let bytes = state.to_json().context("write the state")?;
            twill_kernel::files::write_atomic(&state_dir.join("state.json"), &bytes, 0o600)
                .context("write the state")?;
            for file in &files {
                std::fs::remove_file(file).with_context(|| format!("delete {}", file.display()))?;
            }
        }
        let forwarding = twill_kernel::sysctl::read("net/ipv4/ip_forward").unwrap_or_default();
        let mut left = vec![format!("sysctl net/ipv4/ip_forward = {forwarding}")];
        left.extend(strangers(kernel.mirror(), &desired.claim).map(|device| {
            let lost = state_dir.join("state.json");
            format!(
                "device {device}: {} does not say whose it is; if nobody else uses it: ip link del {device}",
                lost.display()
            )
        }));
        let cleaned = Cleaned { removed: !self.dry_run, steps, failed, left };
        self.output.print(&cleaned, || describe(&cleaned))?;
        Ok(if cleaned.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// Devices that the state file remembers, and VXLANs that carry routes of ours.
fn claim(state: &State, have: &HostState) -> Claim {
    let mut devices: BTreeSet<_> = state.devices.keys().copied().collect();
    for (_, object) in have.iter() {
        let Object::Route(route) = object else { continue };
        let ours = route.entries.as_slice().iter().filter(|e| e.protocol == PROTO_TWILL);
        let tunnels =
            ours.filter_map(|e| e.dev).filter(|d| have.link(*d).is_some_and(|l| matches!(l.kind, LinkKind::Vxlan(_))));
        devices.extend(tunnels);
    }
    Claim {
        devices,
        protocol: Some(PROTO_TWILL),
        networks: state.networks.clone(),
        subnets: Vec::new(),
        firewall: true,
        flannels_firewall: false,
    }
}

/// Devices with the name of a tunnel, of which nothing says that they are ours: state that was lost, or flannel.
fn strangers<'a>(have: &'a HostState, claim: &'a Claim) -> impl Iterator<Item = LinkName> + 'a {
    let links =
        have.iter().filter_map(|(_, object)| if let Object::Link(link) = object { Some(link.name) } else { None });
    links.filter(|name| name.as_str().starts_with("flannel") && !claim.devices.contains(name))
}

fn describe(cleaned: &Cleaned) -> String {
    let mut lines = Vec::new();
    if cleaned.steps.is_empty() {
        lines.push("nothing of Twill's is here".to_owned());
    } else {
        lines.push(if cleaned.removed { "removed:".into() } else { "would remove:".to_owned() });
        lines.extend(cleaned.steps.iter().map(|s| format!("  {s}")));
    }
    lines.extend(cleaned.failed.iter().map(|f| format!("failed: {f}")));
    lines.extend(cleaned.left.iter().map(|l| format!("left as it is: {l}")));
    lines.join("\n")
}
