//! The folder that several commands share.

use std::path::PathBuf;

use clap::Args;

use crate::stores;

/// Where the agent keeps its state.
#[derive(Debug, Clone, Args)]
pub(super) struct StateDir {
    /// Folder of the agent's state [default: /var/lib/twill]
    #[arg(long, value_name = "DIR", env = "TWILL_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

impl StateDir {
    pub(super) fn path(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(stores::state_dir)
    }
}
