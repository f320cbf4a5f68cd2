//! `twill store`: the embedded store, and a look into any store.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Subcommand};
use serde::Serialize;
use twill_core::net::Prefix;

use super::asked::AskArgs;
use crate::output::{self, Output};
use crate::stores;

/// The embedded store, and a look into any store.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill store serve\n  twill store ls /coreos.com/network/subnets")]
pub(crate) struct Store {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a store that speaks etcd's v3 API
    Serve(Serve),
    /// List keys, one on a line
    Ls(Ls),
}

/// Serve a store that speaks etcd's v3 API.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill store serve\n  twill store serve --listen 192.0.2.11:2379 --insecure\n  etcdctl get --prefix /coreos.com/network"
)]
struct Serve {
    /// Address and port to listen on
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:2379", value_parser = crate::agent::settings::address_and_port)]
    listen: SocketAddr,
    /// Folder of the data
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Serve other hosts although nothing authenticates them
    #[arg(long)]
    insecure: bool,
    /// Write a network config where there is none: this network, or one of each family, joined by a comma
    #[arg(long, value_name = "PREFIX", value_delimiter = ',')]
    network: Vec<Prefix>,
    /// With --network: how packets are carried between hosts
    #[arg(long, value_parser = ["vxlan", "udp"], default_value = "vxlan", requires = "network")]
    backend: String,
}

/// List keys, one on a line.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill store ls /coreos.com/network/subnets\n  twill store ls --store http://192.0.2.11:2379 -o json"
)]
struct Ls {
    /// Keys that begin with this
    #[arg(value_name = "PREFIX", default_value = "/")]
    below: String,
    #[command(flatten)]
    store: AskArgs,
    #[command(flatten)]
    output: Output,
}

impl Store {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Serve(args) => args.run(),
            Command::Ls(args) => args.run(),
        }
    }
}

impl Serve {
    fn run(self) -> anyhow::Result<ExitCode> {
        output::log_to_stderr();
        stores::check_listen(self.listen, self.insecure)?;
        let config = match self.network.as_slice() {
            [] => None,
            networks => Some(stores::first_config(networks, &self.backend)?.0),
        };
        let data = self.data.unwrap_or_else(|| stores::state_dir().join("store"));
        crate::runtime()?.block_on(async {
            let listen = self.listen;
            let open = stores::open(listen, &data).await?;
            let served = async move { stores::serve(open, listen, &data, crate::terminated()).await };
            if let Some(config) = config {
                let store = twill_store::EtcdStore::new(twill_store::StoreConfig {
                    endpoints: vec![format!("http://{}", self.listen)],
                    prefix: stores::PREFIX.into(),
                    ..Default::default()
                })?;
                let served = tokio::spawn(served);
                store.create_config(config.as_bytes()).await?;
                return served.await.context("the store's task ended")?.context("serve the store");
            }
            served.await.context("serve the store")
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

#[derive(Serialize)]
struct Keys {
    keys: Vec<String>,
}

impl Ls {
    fn run(self) -> anyhow::Result<ExitCode> {
        let asked = self.store.find()?;
        let store = asked.connect()?;
        let keys = crate::runtime()?.block_on(store.keys(&self.below)).map_err(|error| asked.failed(error))?;
        let keys = Keys { keys };
        self.output
            .print(&keys, || keys.keys.iter().map(|key| output::on_a_line(key)).collect::<Vec<_>>().join("\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
