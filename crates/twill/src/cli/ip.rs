//! `twill ip calc` and `twill ip plan`: address arithmetic, for learning and for planning.

use std::fmt::Write as _;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use twill_core::ipcalc::{self, Calc, NetworkPlan, PlanFault};
use twill_core::net::Prefix;

use crate::output::{Failure, Output, USAGE};

/// Address arithmetic: class, network, broadcast, masks; and how to cut a network for nodes.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill ip calc 129.5.1.1\n  twill ip plan --network 10.244.0.0/16 --nodes 100 --containers 50"
)]
pub(crate) struct Ip {
    #[command(subcommand)]
    command: IpCommand,
}

#[derive(Debug, Subcommand)]
enum IpCommand {
    /// Class, network address, host part, broadcast address, masks and binary view of an address
    #[command(
        after_help = "Examples:\n  twill ip calc 129.5.1.1\n  twill ip calc 10.1.15.2/24\n  twill ip calc fd00:15::2/64 -o json"
    )]
    Calc(CalcArgs),
    /// Cut a network into one subnet for each node, and print the config that does it
    #[command(after_help = "Example:\n  twill ip plan --network 10.244.0.0/16 --nodes 100 --containers 50")]
    Plan(PlanArgs),
}

#[derive(Debug, Args)]
struct CalcArgs {
    /// ADDRESS or ADDRESS/LEN, IPv4 or IPv6; without LEN the length of its class (IPv6: 64)
    address: String,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct PlanArgs {
    /// The whole network, such as 10.244.0.0/16 or fd00:10::/48
    #[arg(long)]
    network: Prefix,
    /// How many nodes it must hold
    #[arg(long)]
    nodes: u64,
    /// How many containers each node must hold
    #[arg(long)]
    containers: u64,
    #[command(flatten)]
    output: Output,
}

impl Ip {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            IpCommand::Calc(args) => {
                let calc =
                    ipcalc::calc(&args.address).map_err(|e| Failure::new("bad-address", e.to_string()).exit(USAGE))?;
                args.output.print(&calc, || calc_text(&calc))?;
            }
            IpCommand::Plan(args) => {
                let plan = ipcalc::plan(args.network, args.nodes, args.containers).map_err(refusal)?;
                args.output.print(&plan, || plan_text(&plan))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn refusal(fault: PlanFault) -> Failure {
    let (code, hint) = match &fault {
        PlanFault::Nothing => ("empty-plan", "ask for one node and one container or more".to_owned()),
        PlanFault::Unusable(_) => {
            ("bad-config", "take one for private use, such as --network 10.244.0.0/16".to_owned())
        }
        PlanFault::TooSmall { needed, wider: Some(wider), .. } => {
            ("network-too-small", format!("take a /{needed}, such as --network {wider}"))
        }
        PlanFault::TooSmall { .. } | PlanFault::Never { .. } => {
            ("network-too-small", "take fewer nodes or containers".to_owned())
        }
    };
    Failure::new(code, fault.to_string()).hint(hint)
}

fn calc_text(calc: &Calc) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &dyn std::fmt::Display| {
        let _ = writeln!(text, "{name:<17}  {value}");
    };
    line("address", &calc.address);
    if let Some(class) = calc.class {
        let mask = calc.default_mask.map_or("no default mask".to_owned(), |m| format!("default mask {m}"));
        line("class", &format_args!("{class} ({mask})"));
    }
    let assumed = if calc.assumed_length { ", length assumed" } else { "" };
    line("network", &format_args!("{} (/{}{assumed})", calc.network_address, calc.prefix_length));
    line("host part", &calc.host_part);
    match calc.broadcast {
        Some(broadcast) => line("broadcast", &broadcast),
        None => line("broadcast", &"none"),
    }
    line("mask", &calc.mask);
    line("wildcard", &calc.wildcard);
    line("hosts", &format_args!("{} to {}, {} of them", calc.first_host, calc.last_host, calc.hosts));
    line("addresses", &calc.addresses);
    line("network | host", &calc.binary);
    if let Some(used_for) = calc.used_for {
        line("set aside for", &used_for);
    }
    text
}

fn plan_text(plan: &NetworkPlan) -> String {
    let examples: Vec<String> = plan.examples.iter().map(ToString::to_string).collect();
    let more = if plan.nodes > examples.len() as u64 { ", …" } else { "" };
    format!(
        "network            {}\n\
         each node gets     a /{}, {} containers fit\n\
         nodes that fit     {}\n\
         the first subnets  {}{more}\n\
         config             {}\n",
        plan.network,
        plan.subnet_length,
        plan.containers_each,
        plan.subnets,
        examples.join(", "),
        plan.config
    )
}
