//! `twill ipam`: which addresses of this node's containers are held, and freeing those that leaked.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;
use twill_cni::conf::NETWORKS;
use twill_cni::error::CniError;
use twill_cni::ipam::{Folder, Held};
use twill_cni::records::Records;
use twill_cni::sweep;
use twill_core::attach::Attachment;
use twill_kernel::files;

use super::folder::StateDir;
use crate::output::{Failure, Output, columns};

/// The addresses of this node's containers: who holds which, and what leaked.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  twill ipam list\n  twill ipam free 10.1.15.9\n  twill ipam free --leaked")]
pub(crate) struct Ipam {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// List the addresses that are held, and by whom
    #[command(after_help = "Examples:\n  twill ipam list\n  twill ipam list --network twill -o json")]
    List(List),
    /// Free addresses that no container has
    #[command(after_help = "Examples:\n  twill ipam free 10.1.15.9\n  twill ipam free --leaked")]
    Free(Free),
}

#[derive(Debug, Args)]
struct Where {
    /// Folder of the address files
    #[arg(long, value_name = "DIR", env = "TWILL_IPAM_DIR", default_value = NETWORKS)]
    data_dir: PathBuf,
    #[command(flatten)]
    state: StateDir,
    /// Only this network
    #[arg(long, value_name = "NAME")]
    network: Option<String>,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    folder: Where,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Free {
    /// The addresses
    #[arg(value_name = "ADDRESS", required_unless_present = "leaked")]
    addresses: Vec<IpAddr>,
    /// All whose container is gone
    #[arg(long, conflicts_with = "addresses")]
    leaked: bool,
    /// Also what a container may have: with its host ports and its attachment file
    #[arg(long, conflicts_with = "leaked")]
    force: bool,
    #[command(flatten)]
    folder: Where,
    #[command(flatten)]
    output: Output,
}

/// One address that is held.
#[derive(Debug, Serialize)]
struct Row {
    network: String,
    address: IpAddr,
    container: String,
    state: State,
    #[serde(skip)]
    record: Option<Attachment>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum State {
    /// Its device or its namespace is there, or its ADD is at work.
    Attached,
    /// Its attachment is written down, and is of an earlier boot, or device and namespace are gone.
    Leaked,
    /// Another plugin's: nothing is written down here.
    Unknown,
}

#[derive(Serialize)]
struct Listed {
    addresses: Vec<Row>,
}

#[derive(Serialize)]
struct Freed {
    freed: Vec<IpAddr>,
}

impl Ipam {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::List(args) => args.run(),
            Command::Free(args) => args.run(),
        }
    }
}

/// The plugin's refusal as a user meets it here.
fn failed(error: CniError) -> Failure {
    Failure::new("ipam-failed", error.msg).hint(error.details)
}

impl Where {
    /// Folders of the networks, by name.
    fn networks(&self) -> anyhow::Result<Vec<(String, PathBuf)>> {
        let entries = match std::fs::read_dir(&self.data_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => {
                let message = format!("list {}: {error}", self.data_dir.display());
                return Err(Failure::new("ipam-failed", message).hint("run it as root").into());
            }
            Ok(entries) => entries.flatten(),
        };
        let named = entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path())));
        let asked = |name: &str| self.network.as_deref().is_none_or(|network| network == name);
        let mut networks: Vec<_> = named.filter(|(name, path)| path.is_dir() && asked(name)).collect();
        networks.sort();
        Ok(networks)
    }

    fn records(&self) -> Records {
        Records::new(self.state.path().join("attachments"))
    }

    fn rows(&self) -> anyhow::Result<Vec<Row>> {
        let mut held = Vec::new();
        for (network, dir) in self.networks()? {
            let Some(folder) = Folder::find(&dir).map_err(failed)? else { continue };
            held.extend(folder.held().map_err(failed)?.into_iter().map(|held| (network.clone(), held)));
        }
        // Read last: an attachment is written down before its addresses are.
        let records = self.records();
        let all = records.all().map_err(failed)?;
        let row = |(network, held): (String, Held)| {
            let record = all.iter().find(|record| {
                let request = &record.request;
                held.holder.as_ref().is_some_and(|h| h.is(&request.container_id, request.ifname.as_str()))
                    && request.addresses.iter().any(|inet| inet.addr == held.ip)
            });
            let state = match record {
                None => State::Unknown,
                Some(record) if sweep::leaked(&records, record).map_err(failed)?.is_some() => State::Leaked,
                Some(_) => State::Attached,
            };
            let container = held.who();
            Ok(Row { network, address: held.ip, container, state, record: record.cloned() })
        };
        held.into_iter().map(row).collect()
    }
}

impl State {
    const fn word(self) -> &'static str {
        match self {
            Self::Attached => "attached",
            Self::Leaked => "leaked",
            Self::Unknown => "unknown",
        }
    }
}

impl List {
    fn run(self) -> anyhow::Result<ExitCode> {
        let listed = Listed { addresses: self.folder.rows()? };
        self.output.print(&listed, || {
            let rows = listed.addresses.iter();
            let rows = rows
                .map(|r| [r.network.clone(), r.address.to_string(), r.container.clone(), r.state.word().to_owned()]);
            columns(&["NETWORK", "ADDRESS", "CONTAINER", "STATE"], rows)
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

impl Free {
    fn run(self) -> anyhow::Result<ExitCode> {
        let rows = self.folder.rows()?;
        let asked: Vec<&Row> = if self.leaked {
            rows.iter().filter(|row| row.state == State::Leaked).collect()
        } else {
            self.asked(&rows)?
        };
        let mut freed = Freed { freed: Vec::new() };
        for row in asked {
            freed.freed.extend(self.free(row, &rows)?);
        }
        self.output.print(&freed, || match freed.freed.as_slice() {
            [] => "nothing to free".to_owned(),
            ips => ips.iter().map(|ip| format!("freed {ip}")).collect::<Vec<_>>().join("\n"),
        })?;
        Ok(ExitCode::SUCCESS)
    }

    /// Frees what a row says if it is so still, and everything that its attachment has besides; gives the addresses.
    fn free(&self, row: &Row, rows: &[Row]) -> anyhow::Result<Vec<IpAddr>> {
        let Some(record) = &row.record else { return self.free_alone(row) };
        let records = self.folder.records();
        let locked = if self.force {
            records.lock(&record.request.container_id, record.request.ifname)
        } else {
            sweep::leaked(&records, record)
        };
        let Some(locked) = locked.map_err(failed)?.filter(|locked| locked.record == *record) else {
            return Ok(Vec::new());
        };
        sweep::free(&locked, &records).map_err(failed)?;
        Ok(rows.iter().filter(|other| other.record.as_ref() == Some(record)).map(|other| other.address).collect())
    }

    /// Another plugin's address: nothing else is known of it.
    fn free_alone(&self, row: &Row) -> anyhow::Result<Vec<IpAddr>> {
        let folder = Folder::find(&self.folder.data_dir.join(&row.network)).map_err(failed)?;
        let Some(folder) = folder else { return Ok(Vec::new()) };
        if folder.look_at(row.address).map_err(failed)?.who() != row.container {
            return Ok(Vec::new());
        }
        let change = folder.free(row.address).map_err(failed)?;
        files::sync_all(change.as_slice())?;
        Ok(change.map(|_| row.address).into_iter().collect())
    }

    /// The rows of the addresses that were typed. What is not known to be leaked may be a container's that runs.
    fn asked<'a>(&self, rows: &'a [Row]) -> anyhow::Result<Vec<&'a Row>> {
        let mut asked = Vec::new();
        for ip in &self.addresses {
            let found: Vec<&Row> = rows.iter().filter(|row| row.address == *ip).collect();
            if found.is_empty() {
                let message = format!("nobody holds {ip}");
                return Err(Failure::new("address-not-held", message)
                    .hint("`twill ipam list` shows what is held")
                    .into());
            }
            if let Some(row) = found.iter().find(|row| row.state != State::Leaked && !self.force) {
                let (why, hint) = match row.state {
                    State::Unknown => ("may run: another plugin's", "when that container is gone, add --force"),
                    State::Attached | State::Leaked => ("is attached", "stop the container first, or add --force"),
                };
                let message = format!("refuse to free {ip}: {} {why}", row.container);
                return Err(Failure::new("address-in-use", message).hint(hint).into());
            }
            asked.extend(found);
        }
        Ok(asked)
    }
}
