//! `twill completions SHELL`.

use std::process::ExitCode;

use clap::Args;

use crate::output;

/// Print a completion script for a shell.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  twill completions bash > /etc/bash_completion.d/twill")]
pub(crate) struct Completions {
    /// Which shell
    shell: clap_complete::Shell,
}

impl Completions {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "twill", &mut script);
        output::print_text(&String::from_utf8_lossy(&script));
        Ok(ExitCode::SUCCESS)
    }
}
