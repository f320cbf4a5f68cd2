//! Commands that ask the running agent: `status`, `peers`, `resync`, `leave`.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::folder::StateDir;
use crate::agent::view::{FamilyProbe, PeerView, Peers, PlanView, Probe, TunnelView, View, WayView};
use crate::agent::{control, guests, settings};
use crate::output::{FINDINGS, Failure, Output, columns, on_a_line};
use crate::{probe, stores};

/// Where the agent listens, on every command that asks it.
#[derive(Debug, Clone, Args)]
pub(crate) struct Socket {
    /// Folder of the agent's control socket [default: /run/twill, or agent.toml's run_dir]
    #[arg(long, value_name = "DIR", env = "TWILL_RUN_DIR")]
    run_dir: Option<PathBuf>,
}

/// How long an agent may take to answer what it knows.
const PATIENCE: Duration = Duration::from_secs(10);

impl Socket {
    pub(super) fn new(run_dir: Option<PathBuf>) -> Self {
        Self { run_dir }
    }

    /// A user who runs no agent means the host's, which may have been told another place by its file. Whoever names a file means the
    /// agent of that one, and no other.
    pub(super) fn dir(&self) -> Result<PathBuf, Failure> {
        if let Some(dir) = &self.run_dir {
            return Ok(dir.clone());
        }
        let (file, is_named) = (settings::of_file(), std::env::var_os("TWILL_CONFIG").is_some());
        let file = if is_named { Some(file?) } else { file.ok() };
        let own = stores::run_dir();
        let of_file = file.map(|(settings, _)| settings.run_dir).filter(|dir| *dir != own);
        let own = Some(own).filter(|dir| !(is_named && of_file.is_some()) && control::is_there(dir));
        Ok(own.or(of_file).unwrap_or_else(|| PathBuf::from(stores::RUN_DIR)))
    }

    /// What a running agent would change; `None`: none runs, or it does not know yet.
    pub(super) async fn plan(&self) -> Result<Option<PlanView>, Failure> {
        let Some(view) = control::call::<View>(&self.dir()?, "GET", "/v1/status").await? else { return Ok(None) };
        match view.state.as_str() {
            "running" | "held" => self.ask("GET", "/v1/plan").await.map(Some),
            _ => Ok(None),
        }
    }

    /// The agent's answer; without an agent the error that says how to start one. What is only looked at is not waited for without end.
    pub(super) async fn ask<T: serde::de::DeserializeOwned>(&self, method: &str, path: &str) -> Result<T, Failure> {
        let dir = self.dir()?;
        let call = control::call(&dir, method, path);
        let answer = if method == "GET" {
            tokio::time::timeout(PATIENCE, call).await.map_err(|_| {
                let silent = format!("the agent in {} does not answer within {PATIENCE:?}", dir.display());
                Failure::new("agent-silent", silent)
                    .hint("see what it does: systemctl status twill; then: systemctl restart twill")
            })?
        } else {
            call.await
        };
        answer?.ok_or_else(|| {
            Failure::new("no-agent", format!("no agent listens in {}", dir.display()))
                .hint("start it: systemctl start twill, or: twill agent")
        })
    }
}

/// Show this node: subnet, underlay, store, findings, repairs.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill status\n  twill status -o json")]
pub(crate) struct Status {
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    output: Output,
}

impl Status {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let view: View = crate::runtime()?.block_on(self.socket.ask("GET", "/v1/status"))?;
        self.output.print(&view, || describe(&view))?;
        Ok(if view.findings.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(FINDINGS) })
    }
}

fn describe(view: &View) -> String {
    let or_none = |list: &[String]| if list.is_empty() { "none yet".to_owned() } else { list.join(", ") };
    let mut lines = vec![
        format!("node      {} ({})", view.node, view.state),
        format!("subnet    {} of {}", or_none(&view.subnets), or_none(&view.networks)),
        format!(
            "backend   {} on {}, MTU {}",
            view.backend.as_deref().unwrap_or("none yet"),
            or_none(&view.devices),
            view.mtu.map_or_else(|| "unknown".into(), |mtu| mtu.to_string())
        ),
    ];
    if let Some(underlay) = &view.underlay {
        let (addresses, mtu) = (underlay.addresses.join(", "), underlay.mtu);
        lines.push(format!("underlay  {} {addresses}, MTU {mtu}: {}", underlay.interface, underlay.why));
    }
    let open = if view.store.open { ", nothing authenticates" } else { "" };
    let state = match view.store.state.as_str() {
        "not-asked" => "not asked yet".to_owned(),
        "connecting" => "connecting, no answer yet".to_owned(),
        state => format!("{state} at revision {}", view.store.revision),
    };
    lines.push(format!("store     {} {state}{open}", view.store.endpoints));
    if let Some(tunnel) = &view.tunnel {
        lines.extend(describe_tunnel(tunnel));
    }
    lines.push(format!("peers     {}", view.peers));
    lines.push(format!("repairs   {}", view.repairs.total));
    for repair in &view.repairs.recent {
        let before = repair.before.as_ref().map_or(String::new(), |before| format!(" (was: {before})"));
        lines.push(format!("  {} {} {}{before}", clock(repair.unix_ms), repair.op, repair.object));
    }
    if view.findings.is_empty() {
        lines.push("findings  none".into());
    }
    for finding in &view.findings {
        lines.push(format!("finding   {}: {}", finding.code, on_a_line(&finding.object)));
        lines.push(format!("          {}", on_a_line(&finding.evidence)));
        lines.push(format!("          fix: {}", finding.fix));
    }
    lines.join("\n")
}

fn describe_tunnel(tunnel: &TunnelView) -> Vec<String> {
    let mut lines = vec![format!("tunnel    {} on UDP {}: {}", tunnel.device, tunnel.local, tunnel.means)];
    let strangers = match tunnel.strangers.as_str() {
        "nftables" => "dropped by nftables, before the socket's queue",
        _ => "dropped by the tunnel itself: nftables has no table of Twill's here",
    };
    lines.push(format!("  strangers  {strangers}"));
    for (what, flow) in [("sent", tunnel.sent), ("received", tunnel.received)] {
        lines.push(format!("  {what:<11}{} packets, {} bytes", flow.packets, flow.bytes));
    }
    let causes = tunnel.drops.iter().map(|drop| format!("{} {}", drop.cause, drop.packets)).collect::<Vec<_>>();
    lines.push(format!("  dropped    {}", if causes.is_empty() { "none".into() } else { causes.join(", ") }));
    lines
}

/// Time of day, UTC.
fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000 % 86_400;
    format!("{:02}:{:02}:{:02}.{:03}Z", seconds / 3600, seconds / 60 % 60, seconds % 60, unix_ms % 1000)
}

/// Show the peers; with --probe ask each of them.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill peers\n  twill peers --probe      which of underlay and overlay answers, in each family; exit 3 when an overlay does not"
)]
pub(crate) struct PeersArgs {
    /// Ask each peer through the overlay and on the underlay
    #[arg(long)]
    probe: bool,
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    output: Output,
}

impl PeersArgs {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let mut peers: Peers = crate::runtime()?.block_on(self.socket.ask("GET", "/v1/peers"))?;
        if self.probe {
            probe_all(&mut peers.peers)?;
        }
        let all_answer = peers.peers.iter().all(|p| p.probe.as_ref().is_none_or(|probe| probe.overlay));
        self.output.print(&peers, || peers_table(&peers.peers))?;
        Ok(if all_answer { ExitCode::SUCCESS } else { ExitCode::from(FINDINGS) })
    }
}

fn peers_table(peers: &[PeerView]) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".into());
    let row = |p: &PeerView| {
        let verdict = match (&p.fault, &p.probe) {
            (Some(fault), _) => format!("left out: {fault}"),
            (None, Some(probe)) => probe.verdict.clone(),
            (None, None) => "programmed".into(),
        };
        [p.subnets.join(","), p.address.map_or_else(|| "-".into(), |ip| ip.to_string()), text(&p.mac), verdict]
    };
    columns(&["SUBNET", "ADDRESS", "VTEP MAC", "STATE"], peers.iter().map(row))
}

/// One echo each way to every peer in every family, all at once.
fn probe_all(peers: &mut [PeerView]) -> anyhow::Result<()> {
    let asked = peers.iter().filter(|p| p.fault.is_none()).flat_map(ways);
    let targets = asked.flat_map(|way| [way.address, Some(way.vtep)]).flatten().collect::<Vec<_>>();
    let answered = probe::echo(&targets, Duration::from_secs(1)).map_err(|e| {
        Failure::new("probe-refused", format!("open a ping socket: {e}"))
            .hint("run as root, or allow it: sysctl net.ipv4.ping_group_range='0 2147483647'")
    })?;
    for peer in peers.iter_mut().filter(|p| p.fault.is_none()) {
        let answers = |ip: IpAddr| answered.contains(&ip);
        let found = |way: &WayView| FamilyProbe {
            family: way.family.clone(),
            underlay: way.address.is_some_and(answers),
            overlay: answers(way.vtep),
        };
        peer.probe = Some(judge(ways(peer).iter().map(found).collect()));
    }
    Ok(())
}

/// The ways to a peer. An older agent names none, nor has a peer one that shares no family with us: its first address is asked.
fn ways(peer: &PeerView) -> Vec<WayView> {
    let family = |vtep: IpAddr| if vtep.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned();
    let first = peer.vtep.filter(|_| peer.ways.is_empty());
    let first = first.map(|vtep| WayView { family: family(vtep), address: peer.address, vtep });
    peer.ways.iter().cloned().chain(first).collect()
}

/// One word for all families when all answer, else one for each.
fn judge(families: Vec<FamilyProbe>) -> Probe {
    let verdict = |found: &FamilyProbe| match (found.underlay, found.overlay) {
        (true, true) => "both answer",
        (true, false) => "the host answers, the overlay does not: is the tunnel's UDP port open in both firewalls?",
        (false, true) => "the overlay answers; the host drops echo requests on the underlay",
        (false, false) => "neither answers: is the host up?",
    };
    let (underlay, overlay) = (families.iter().all(|f| f.underlay), families.iter().all(|f| f.overlay));
    let verdict = match families.as_slice() {
        [one] => verdict(one).to_owned(),
        _ if underlay && overlay => "both answer".to_owned(),
        several => several.iter().map(|f| format!("{}: {}", f.family, verdict(f))).collect::<Vec<_>>().join("; "),
    };
    Probe { underlay, overlay, families, verdict }
}

/// Accept a strange listing of the store.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  twill resync --accept    withdraw the peers that the store's last listing lacked")]
pub(crate) struct Resync {
    /// The listing is right: withdraw what it lacks
    #[arg(long, required = true)]
    accept: bool,
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    output: Output,
}

impl Resync {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let answer: Value = crate::runtime()?.block_on(self.socket.ask("POST", "/v1/resync"))?;
        self.output.print(&answer, || format!("withdrew {} peers", answer["withdrawn"]))?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Give the subnet back and remove everything from this node.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill leave --dry-run\n  twill leave")]
pub(crate) struct Leave {
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    /// Leave although containers are attached
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    state: StateDir,
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Left {
    left: bool,
    subnets: Vec<String>,
    removes: Vec<String>,
    attached: Vec<String>,
    /// Each thing that is, or would be, done.
    steps: Vec<String>,
}

#[derive(Deserialize)]
struct Leaving {
    steps: Vec<String>,
    /// Its folder may be another than the one that is named here. An older agent does not say.
    attached: Option<Vec<String>>,
}

impl Leave {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let runtime = crate::runtime()?;
        let view: View = runtime.block_on(self.socket.ask("GET", "/v1/status"))?;
        let Leaving { steps, attached } = runtime.block_on(self.socket.ask("GET", "/v1/leave"))?;
        let attached = attached.unwrap_or_else(|| guests::attached(&self.state.path()));
        if !attached.is_empty() && !self.force && !self.dry_run {
            let message =
                format!("refuse to leave: {} containers are attached: {}", attached.len(), attached.join(", "));
            return Err(Failure::new("containers-attached", message).hint("stop them first, or add --force").into());
        }
        if !self.dry_run {
            let _: Value = runtime.block_on(self.socket.ask("POST", "/v1/leave"))?;
        }
        let left = Left { left: !self.dry_run, subnets: view.subnets, removes: view.devices, attached, steps };
        self.output.print(&left, || {
            let act = if left.left { "gave back" } else { "would give back" };
            let told = format!("{act} {}, with {}", left.subnets.join(", "), left.removes.join(", "));
            let told = match left.attached.as_slice() {
                [] => told,
                attached if left.left => format!("{told}; still attached: {}", attached.join(", ")),
                attached => format!("{told}, but only with --force while attached: {}", attached.join(", ")),
            };
            left.steps.iter().fold(told, |told, step| format!("{told}\n  {step}"))
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
