//! Which store a command asks: the one that is named, else the node's agent's.

use clap::Args;
use twill_store::{EtcdStore, StoreError};

use super::ask::Socket;
use crate::agent::settings;
use crate::output::Failure;
use crate::stores::StoreArgs;

const STORE: &str = "Store endpoints, http:// or https://, separated by commas [default: those of the agent that runs here, else of agent.toml, else http://127.0.0.1:2379]";
const PREFIX: &str = "Key prefix [default: the agent's in the same way, else /coreos.com/network]";

/// The store of a command that only reads it. Without a name it is the store of the agent that runs here, else that of agent.toml.
#[derive(Debug, Args)]
#[command(mut_arg("store", |arg| arg.help(STORE)), mut_arg("prefix", |arg| arg.help(PREFIX)))]
pub(super) struct AskArgs {
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    agent: Socket,
}

/// A store, and who said that it is this one.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) store: StoreArgs,
    from: String,
}

impl AskArgs {
    pub(super) fn find(self) -> Result<Asked, Failure> {
        if !self.store.store.is_empty() {
            return Ok(Asked::named(self.store, "--store or TWILL_STORE names it"));
        }
        if let Some(asked) = Asked::of_agent(&self.store, &self.agent)? {
            return Ok(asked);
        }
        let (of_file, path) = settings::of_file().map(|(settings, path)| (settings.store, path))?;
        let no_agent = format!("no agent answers in {}", self.agent.dir()?.display());
        let from = match (&path, of_file.store.is_empty()) {
            (Some(path), false) => format!("{no_agent}, {} says so", path.display()),
            (Some(path), true) => format!("the default: {no_agent}, {} names none", path.display()),
            (None, _) => format!("the default: {no_agent}, and there is no {}", settings::FILE),
        };
        Ok(Asked::named(self.store.or(of_file), from))
    }
}

impl Asked {
    pub(super) fn named(store: StoreArgs, from: impl Into<String>) -> Asked {
        Asked { store, from: from.into() }
    }

    /// The store of the agent that runs here, with what was said apart from its address; `None`: none answers, or it is of a release that
    /// does not tell.
    pub(super) fn of_agent(said: &StoreArgs, agent: &Socket) -> Result<Option<Asked>, Failure> {
        let found: Result<StoreArgs, Failure> = crate::runtime()
            .map_err(|e| Failure::new("failed", e.to_string()))?
            .block_on(agent.ask("GET", "/v1/store"));
        let from = format!("the agent in {} uses it", agent.dir()?.display());
        Ok(found.ok().map(|store| Asked::named(said.clone().or(store), from)))
    }

    pub(super) fn connect(&self) -> Result<EtcdStore, Failure> {
        self.store.connect().map_err(|failure| self.told(failure))
    }

    /// The store's error, with who led here.
    pub(super) fn failed(&self, error: StoreError) -> Failure {
        self.told(error.into())
    }

    fn told(&self, mut failure: Failure) -> Failure {
        failure.message = format!("{} ({})", failure.message, self.from);
        failure
    }
}
