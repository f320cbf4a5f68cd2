//! `twill lab`: whole networks on one machine.

mod crossings;
mod look;
mod scenario;
mod show;
mod whole;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use twill_lab::layout::{Families, MOST_CONTAINERS, MOST_NODES};
use twill_lab::{
    AgentAct, Backend, Home, LabError, LabName, LabState, Request, Scenario, Spec, StoreKind, ask, become_with_kept,
    enter, start,
};

use crate::output::{Failure, Output, USAGE, progress};

/// Whole networks on this machine: hosts, agents, containers in network namespaces. No root needed
///
/// Without a subcommand: two hosts, an agent on each, a container on each, who reaches whom, one path explained, and everything removed
/// again.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  twill lab\n  twill lab up --scenario vxlan\n  twill lab exec node1 -- ip route\n  twill lab explain container-1 container-2\n  twill lab down"
)]
pub(crate) struct Lab {
    #[command(subcommand)]
    command: Option<LabCommand>,
    #[command(flatten)]
    families: Addresses,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Subcommand)]
enum LabCommand {
    /// Make a lab that stays until `down`
    #[command(
        after_help = "Examples:\n  twill lab up\n  twill lab up --scenario bridge\n  twill lab up --nodes 16 --containers 4\n  twill lab up --ipv6-only"
    )]
    Up(Up),
    /// All labs of this user
    #[command(after_help = "Example:\n  twill lab list -o json")]
    List,
    /// Hosts, agents and containers of a lab
    #[command(after_help = "Example:\n  twill lab status --name lab")]
    Status(Named),
    /// Run a command in a host or container
    #[command(after_help = "Examples:\n  twill lab exec node1 -- ip route\n  twill lab exec container-1 -- sh")]
    Exec(Exec),
    /// Ping between every pair of containers; exit code 3 when a pair fails
    #[command(after_help = "Example:\n  twill lab ping -o json")]
    Ping(Named),
    /// Explain the path between two containers or hosts, from the kernel's own tables; exit code 3 when it ends on the way
    #[command(after_help = "Example:\n  twill lab explain container-1 container-2")]
    Explain(look::Explain),
    /// Show packets as they pass a device, layer by layer
    #[command(after_help = "Examples:\n  twill lab capture node1 eth0\n  twill lab capture node1 flannel.1 --count 2")]
    Capture(look::Capture),
    /// Add a host, and show what the others learn
    #[command(subcommand, after_help = "Example:\n  twill lab node add")]
    Node(Node),
    /// Stop, start, restart, kill or hold the agent of a host
    #[command(after_help = "Examples:\n  twill lab agent hold node1\n  twill lab agent start node1")]
    Agent(Agent),
    /// End a lab, and remove every trace of it
    #[command(after_help = "Example:\n  twill lab down --name lab")]
    Down(Named),
    #[command(hide = true)]
    Supervise(Supervise),
    #[command(hide = true)]
    Inside(Words),
    #[command(hide = true)]
    Keep(Keep),
}

/// Which addresses.
#[derive(Debug, Clone, Copy, Default, Args)]
struct Addresses {
    /// IPv6 beside IPv4, on every wire and in every container
    #[arg(long)]
    ipv6: bool,
    /// IPv6 and nothing else
    #[arg(long, conflicts_with = "ipv6")]
    ipv6_only: bool,
}

impl Addresses {
    fn families(self) -> Families {
        match (self.ipv6, self.ipv6_only) {
            (_, true) => Families::V6,
            (true, false) => Families::Both,
            (false, false) => Families::V4,
        }
    }
}

/// Which lab.
#[derive(Debug, Clone, Args)]
struct Named {
    /// The lab's name
    #[arg(long, default_value = "lab")]
    name: LabName,
}

#[derive(Debug, Args)]
struct Up {
    #[command(flatten)]
    named: Named,
    /// A classic textbook network, with its very addresses
    #[arg(long, value_enum)]
    scenario: Option<Network>,
    /// How many hosts, 1 to 16 [default: 2; bridge: 1; udp: 3]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_NODES)))]
    nodes: Option<u8>,
    /// How many containers on each host, 1 to 4 [default: 1; bridge: 2]
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=i64::from(MOST_CONTAINERS)))]
    containers: Option<u8>,
    #[command(flatten)]
    families: Addresses,
    /// How packets are carried between hosts [default: vxlan, or the scenario's]
    #[arg(long)]
    backend: Option<String>,
    /// Where the agents keep their leases
    #[arg(long, value_enum, default_value = "embedded")]
    store: Store,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Network {
    /// One host, its containers on docker0, no agent
    Bridge,
    /// Hosts joined by VXLAN: flannel.1, docker0
    Vxlan,
    /// Hosts joined by packets in UDP, which the agent carries: flannel0, docker0
    Udp,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Store {
    /// `twill store serve`
    Embedded,
    /// The programs etcd and etcdctl
    Etcd,
}

#[derive(Debug, Args)]
struct Exec {
    #[command(flatten)]
    named: Named,
    /// node1 …, container-1 …, or underlay
    place: String,
    /// The command and its arguments, after `--`
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

#[derive(Debug, Subcommand)]
enum Node {
    /// One more host, with an agent and containers
    #[command(after_help = "Example:\n  twill lab node add --name lab")]
    Add(Named),
}

#[derive(Debug, Args)]
struct Agent {
    #[command(flatten)]
    named: Named,
    /// What to do
    #[arg(value_enum)]
    act: Act,
    /// node1 …
    node: String,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Act {
    /// Ask it to end
    Stop,
    /// Start it, or let a held one go on
    Start,
    /// Stop and start
    Restart,
    /// End it without a word
    Kill,
    /// It keeps running, and repairs nothing
    Hold,
}

#[derive(Debug, Args)]
struct Supervise {
    #[arg(long)]
    inner: bool,
    #[arg(long)]
    user_namespace: bool,
    spec: String,
}

#[derive(Debug, Args)]
struct Words {
    #[arg(last = true, required = true)]
    words: Vec<OsString>,
}

#[derive(Debug, Args)]
struct Keep {
    names: String,
    #[command(flatten)]
    words: Words,
}

impl Words {
    fn cannot_run(&self, error: &std::io::Error) -> anyhow::Result<ExitCode> {
        let program = self.words.first().map(|word| word.to_string_lossy().into_owned()).unwrap_or_default();
        Err(Failure::new("cannot-run", format!("run {program}: {error}")).exit(127).into())
    }
}

impl From<LabError> for Failure {
    fn from(error: LabError) -> Self {
        Failure { code: error.code(), message: error.message, hint: error.hint, exit: 1 }
    }
}

impl Lab {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let output = self.output;
        let Some(command) = self.command else { return whole::run(self.families.families(), output) };
        match command {
            LabCommand::Up(up) => return up.run(output),
            LabCommand::List => show::list(output)?,
            LabCommand::Status(named) => show::print(output, &state(&named)?)?,
            LabCommand::Exec(exec) => return exec.run(),
            LabCommand::Ping(named) => return look::ping(&named, output),
            LabCommand::Explain(explain) => return explain.run(output),
            LabCommand::Capture(capture) => return capture.run(output),
            LabCommand::Node(Node::Add(named)) => {
                let state =
                    ask(&home()?.lab(&named.name), &Request::NodeAdd, |text| progress(text)).map_err(Failure::from)?;
                show::print(output, &state)?;
            }
            LabCommand::Agent(agent) => agent.run(output)?,
            LabCommand::Down(named) => down(&named)?,
            LabCommand::Supervise(it) if it.inner => return Ok(ended(start::supervise(&it.spec, it.user_namespace))),
            LabCommand::Supervise(it) => return Ok(ended(start::launch(&it.spec))),
            LabCommand::Inside(it) => return it.cannot_run(&enter::become_command(&it.words)),
            LabCommand::Keep(it) => return it.words.cannot_run(&become_with_kept(&it.names, &it.words.words)),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What the supervisor's processes could not do, they have said on stdout.
fn ended(result: Result<(), LabError>) -> ExitCode {
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn home() -> Result<Home, Failure> {
    Ok(Home::open()?)
}

/// A running lab.
fn state(named: &Named) -> Result<LabState, Failure> {
    Ok(ask(&home()?.lab(&named.name), &Request::Status, |_| ())?)
}

impl Up {
    fn run(self, output: Output) -> anyhow::Result<ExitCode> {
        let spec = self.spec()?;
        let started = start::up(&home()?, &spec, |text| progress(text)).map_err(Failure::from)?;
        let state = started.stay().map_err(Failure::from)?;
        let shown = match spec.scenario {
            Some(scenario) => {
                enter::user(&state).map_err(Failure::from)?;
                scenario::show(scenario, &state).map_err(Failure::from)?
            }
            None => Vec::new(),
        };
        show::print_with(output, &state, shown)?;
        Ok(ExitCode::SUCCESS)
    }

    fn spec(&self) -> Result<Spec, Failure> {
        let scenario = self.scenario.map(|network| match network {
            Network::Bridge => Scenario::Bridge,
            Network::Vxlan => Scenario::Vxlan,
            Network::Udp => Scenario::Udp,
        });
        let backend = self.backend(scenario)?;
        let bridge = scenario == Some(Scenario::Bridge);
        if bridge && self.nodes.is_some_and(|nodes| nodes != 1) {
            return Err(Failure::new("bad-lab", "the scenario bridge has one host")
                .hint("leave --nodes away")
                .exit(USAGE));
        }
        let families = self.families.families();
        if scenario.is_some() && families != Families::V4 {
            return Err(Failure::new("bad-lab", "the scenarios have the IPv4 addresses of their source")
                .hint("leave --scenario away, or --ipv6 and --ipv6-only")
                .exit(USAGE));
        }
        let (nodes, containers) = match scenario {
            Some(Scenario::Bridge) => (1, 2),
            Some(Scenario::Udp) => (3, 1),
            Some(Scenario::Vxlan) | None => (2, 1),
        };
        let store = match self.store {
            Store::Embedded => StoreKind::Embedded,
            Store::Etcd => StoreKind::Etcd,
        };
        Ok(Spec {
            name: self.named.name.clone(),
            scenario,
            nodes: self.nodes.unwrap_or(nodes),
            containers: self.containers.unwrap_or(containers),
            backend,
            store,
            families,
        })
    }

    fn backend(&self, scenario: Option<Scenario>) -> Result<Backend, Failure> {
        let own = match scenario {
            Some(Scenario::Udp) => Backend::Udp,
            Some(Scenario::Bridge | Scenario::Vxlan) | None => Backend::Vxlan,
        };
        let asked = match self.backend.as_deref() {
            None => own,
            Some("vxlan") => Backend::Vxlan,
            Some("udp") => Backend::Udp,
            Some(other) => {
                let failure = Failure::new("backend-not-built", format!("backend {other:?} is not built yet"));
                return Err(failure.hint("take --backend vxlan or --backend udp").exit(USAGE));
            }
        };
        if scenario.is_some() && asked != own {
            let message = format!("the scenario has the backend {}", own.name());
            return Err(Failure::new("bad-lab", message).hint("leave --backend away").exit(USAGE));
        }
        Ok(asked)
    }
}

impl Exec {
    fn run(self) -> anyhow::Result<ExitCode> {
        let state = state(&self.named)?;
        let dir = home()?.lab(&self.named.name);
        let status = enter::exec(&state, &dir, &self.place, &self.command).map_err(Failure::from)?;
        Ok(ExitCode::from(enter::exit_code(status)))
    }
}

impl Agent {
    fn run(self, output: Output) -> anyhow::Result<()> {
        let act = match self.act {
            Act::Stop => AgentAct::Stop,
            Act::Start => AgentAct::Start,
            Act::Restart => AgentAct::Restart,
            Act::Kill => AgentAct::Kill,
            Act::Hold => AgentAct::Hold,
        };
        let request = Request::Agent { act, node: self.node };
        let state = ask(&home()?.lab(&self.named.name), &request, |text| progress(text)).map_err(Failure::from)?;
        show::print(output, &state)
    }
}

fn down(named: &Named) -> Result<(), Failure> {
    if !start::down(&home()?.lab(&named.name))? {
        return Err(Failure::new("no-such-lab", format!("there is no lab {:?}", named.name.to_string()))
            .hint("`twill lab list` shows those that are"));
    }
    Ok(())
}
