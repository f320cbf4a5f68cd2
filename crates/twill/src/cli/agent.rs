//! `twill agent`.

use std::process::ExitCode;

use clap::Args;

use crate::agent::{self, settings::AgentArgs};
use crate::output::{self, Output};

/// Run the node daemon.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  twill agent --check                                     what would be used, and what is in the way
  twill agent --serve-store                               one host alone, store on loopback
  twill agent --serve-store 192.0.2.11:2379 --insecure    the first host; prints the line for the next one
  twill agent --store http://192.0.2.11:2379              every next host
  twill agent --takeover                                  a new version takes the running one's place
  twill agent --store https://etcd1:2379,https://etcd2:2379 --ca ca.pem --cert node.pem --key node-key.pem")]
pub(crate) struct Agent {
    #[command(flatten)]
    args: AgentArgs,
    /// Only look: interface, ports, MTU, overlaps, capabilities; exit 3 on findings
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    output: Output,
}

impl Agent {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let settings = self.args.settings()?;
        if self.check {
            return super::check::run(&settings, self.output);
        }
        output::log_to_stderr();
        agent::run(settings)?;
        Ok(ExitCode::SUCCESS)
    }
}
