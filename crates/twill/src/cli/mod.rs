//! The command line: what users type, and which file answers it.

mod completions;
mod ip;
mod lab;
mod show;
mod store;

use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::output;

/// Container networks that explain themselves.
#[derive(Debug, Parser)]
#[command(name = "twill", version, about, max_term_width = 110, disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

/// Every command; none is listed before it works.
#[derive(Debug, Subcommand)]
enum Command {
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
    let cli = Cli::parse();
    let result: anyhow::Result<ExitCode> = match cli.command {
        Command::Completions(args) => args.run(),
        Command::Ip(args) => args.run(),
        Command::Lab(args) => args.run(),
        Command::Show(args) => args.run(),
        Command::Store(args) => args.run(),
    };
    result.unwrap_or_else(|error| output::report(&error))
}
