//! The command line: what users type, and which file answers it.

mod agent;
mod ask;
mod asked;
mod check;
mod cni;
mod completions;
mod docker;
mod folder;
mod ip;
mod ipam;
mod lab;
mod offline;
mod show;
mod store;
mod top;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::output;

/// Container networks that explain themselves.
#[derive(Debug, Parser)]
#[command(name = "twill", version, about, max_term_width = 110, disable_help_subcommand = true)]
#[command(
    after_help = "Examples:\n  twill lab                    see it work: hosts, agents and containers on this machine\n  twill agent --serve-store    the first host of a network\n  twill status"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Every command; none is listed before it works.
#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node daemon
    Agent(Box<agent::Agent>),
    /// Show this node: subnet, underlay, store, findings, repairs
    Status(ask::Status),
    /// Show the peers; with --probe ask each of them
    Peers(ask::PeersArgs),
    /// Watch what the udp backend's tunnel carries, peer by peer
    Top(top::Top),
    /// List the leases in the store
    Leases(Box<offline::Leases>),
    /// Show what the agent would change right now
    Plan(Box<offline::PlanArgs>),
    /// Accept a strange listing of the store
    Resync(ask::Resync),
    /// Give the subnet back and remove everything from this node
    Leave(ask::Leave),
    /// Remove everything that Twill owns on this host; the lease stays
    Clean(offline::Clean),
    /// Attach containers of containerd, CRI-O and podman by Twill
    Cni(cni::Cni),
    /// Put docker's bridge on this node's subnet
    Docker(docker::Docker),
    /// List the addresses of this node's containers, free what leaked
    Ipam(ipam::Ipam),
    /// Print a completion script for a shell
    Completions(completions::Completions),
    /// Calculate with addresses, plan a network
    Ip(ip::Ip),
    /// Make whole networks on this machine: hosts, agents, containers; no root needed
    Lab(lab::Lab),
    /// Show the kernel's tables: neighbours, forwarding entries, bridges, routes
    Show(show::Show),
    /// Serve the embedded store, look into any store
    Store(store::Store),
}

/// The whole command tree, for what is generated from it.
pub(crate) fn command() -> clap::Command {
    Cli::command()
}

/// Parses the arguments, runs the command, and turns what came of it into an exit code:
/// 0 ok, 1 failed, 2 usage, 3 findings or unreachable.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return output::usage(&error),
    };
    let result: anyhow::Result<ExitCode> = match cli.command {
        Command::Agent(args) => args.run(),
        Command::Status(args) => args.run(),
        Command::Peers(args) => args.run(),
        Command::Top(args) => args.run(),
        Command::Leases(args) => args.run(),
        Command::Plan(args) => args.run(),
        Command::Resync(args) => args.run(),
        Command::Leave(args) => args.run(),
        Command::Clean(args) => args.run(),
        Command::Cni(args) => args.run(),
        Command::Docker(args) => args.run(),
        Command::Ipam(args) => args.run(),
        Command::Completions(args) => args.run(),
        Command::Ip(args) => args.run(),
        Command::Lab(args) => args.run(),
        Command::Show(args) => args.run(),
        Command::Store(args) => args.run(),
    };
    result.unwrap_or_else(|error| output::report(&error))
}
