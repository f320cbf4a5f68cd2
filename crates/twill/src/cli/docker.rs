//! `twill docker`: docker's own bridge on this node's subnet, by three keys of its daemon.json.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use twill_cni::conf::SUBNET_FILE;
use twill_core::flannel::subnet_env::SubnetEnv;
use twill_core::net::Inet;
use twill_kernel::files;

use super::folder::StateDir;
use crate::output::{Failure, Output};

/// What is written down of an installation, below the state folder.
const RECORD: &str = "docker.json";
const FORMAT: &str = "twill-docker";
const VERSION: u32 = 1;

/// Docker gives its containers addresses of this node's subnet.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill docker install --dry-run\n  twill docker install && systemctl restart docker"
)]
pub(crate) struct Docker {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Merge bip, mtu and ip-masq into docker's daemon.json
    #[command(
        after_help = "Examples:\n  twill docker install --dry-run\n  twill docker install && systemctl restart docker"
    )]
    Install(Install),
    /// Take them out again
    #[command(after_help = "Example:\n  twill docker uninstall && systemctl restart docker")]
    Uninstall(Uninstall),
}

#[derive(Debug, Args)]
struct Where {
    /// Docker's settings
    #[arg(long, value_name = "FILE", default_value = "/etc/docker/daemon.json")]
    file: PathBuf,
    #[command(flatten)]
    state: StateDir,
    /// Say what would be done, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct Install {
    #[command(flatten)]
    at: Where,
    /// File that the agent writes [default: /run/flannel/subnet.env]
    #[arg(long, value_name = "FILE", env = "TWILL_SUBNET_FILE")]
    subnet_file: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct Uninstall {
    #[command(flatten)]
    at: Where,
    #[command(flatten)]
    output: Output,
}

/// Docker's settings, and the mode of their file.
type Settings = (Map<String, Value>, u32);

/// Keys that were put into docker's settings.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    format: String,
    version: u32,
    /// The file was not there before.
    made: bool,
    keys: Map<String, Value>,
}

/// What was done, or would be.
#[derive(Debug, Serialize)]
struct Done {
    dry_run: bool,
    file: PathBuf,
    set: Map<String, Value>,
    removed: Vec<String>,
    restart: Vec<&'static str>,
}

impl Done {
    fn print(&self, output: &Output) -> anyhow::Result<()> {
        output.print(self, || {
            if self.set.is_empty() && self.removed.is_empty() {
                return format!("{} is as it should be", self.file.display());
            }
            let mut lines =
                vec![format!("{}{}", self.file.display(), if self.dry_run { " would be changed:" } else { ":" })];
            lines.extend(self.set.iter().map(|(key, value)| format!("  \"{key}\": {value}")));
            lines.extend(self.removed.iter().map(|key| format!("  \"{key}\" is taken out")));
            lines.push("docker must be restarted: systemctl restart docker".into());
            lines.push("containers on its bridge restart with it, and get addresses of the new subnet".into());
            lines.join("\n")
        })
    }
}

impl Docker {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Install(args) => args.run(),
            Command::Uninstall(args) => args.run(),
        }
    }
}

fn failed(act: &str, path: &Path, error: impl std::fmt::Display) -> Failure {
    Failure::new("docker-failed", format!("{act} {}: {error}", path.display()))
        .hint("correct the file, or run it as root")
}

impl Where {
    fn record_file(&self) -> PathBuf {
        self.state.path().join(RECORD)
    }

    fn record(&self) -> Result<Record, Failure> {
        let path = self.record_file();
        match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            text => {
                let text = text.map_err(|error| failed("read", &path, error))?;
                let record: Record = serde_json::from_slice(&text).map_err(|error| failed("read", &path, error))?;
                if record.format != FORMAT || record.version > VERSION {
                    return Err(failed("read", &path, format!("it is {} version {}", record.format, record.version)));
                }
                Ok(record)
            }
        }
    }

    /// Docker's settings and the file's mode; `None`: there are none.
    fn settings(&self) -> Result<Option<Settings>, Failure> {
        match fs::read(&self.file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            text => {
                let text = text.map_err(|error| failed("read", &self.file, error))?;
                let settings =
                    if text.trim_ascii().is_empty() { Ok(Map::new()) } else { serde_json::from_slice(&text) };
                let mode = fs::metadata(&self.file).map_or(0o644, |meta| meta.permissions().mode() & 0o7777);
                Ok(Some((settings.map_err(|error| failed("read", &self.file, error))?, mode)))
            }
        }
    }

    fn write(&self, settings: &Map<String, Value>, mode: u32) -> anyhow::Result<()> {
        let text = serde_json::to_string_pretty(settings)? + "\n";
        files::write_atomic(&self.real_file(), text.as_bytes(), mode)
            .map_err(|error| failed("write", &self.file, error))?;
        Ok(())
    }

    /// Where the settings are, or would be: whoever has made a link of the file keeps it.
    fn real_file(&self) -> PathBuf {
        let mut file = self.file.clone();
        // As many as the kernel follows: a circle of links is refused when it is read.
        for _ in 0..40 {
            let Ok(to) = fs::read_link(&file) else { break };
            file = file.parent().unwrap_or(Path::new("")).join(to);
        }
        file
    }
}

impl Install {
    fn run(self) -> anyhow::Result<ExitCode> {
        let wanted = self.wanted()?;
        let record = self.at.record()?;
        let (mut settings, mode, made) = match self.at.settings()? {
            Some((settings, mode)) => (settings, mode, record.made),
            None => (Map::new(), 0o644, true),
        };
        refuse_clash(&settings, &wanted, &record, &self.at.file)?;
        let set: Map<String, Value> = wanted
            .iter()
            .filter(|(key, value)| settings.get(*key) != Some(value))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        if !set.is_empty() && !self.at.dry_run {
            let mut keys = record.keys;
            keys.extend(set.clone());
            let record = Record { format: FORMAT.into(), version: VERSION, made, keys };
            let path = self.at.record_file();
            files::write_atomic(&path, (serde_json::to_string_pretty(&record)? + "\n").as_bytes(), 0o644)
                .map_err(|error| failed("write", &path, error))?;
            settings.extend(set.clone());
            self.at.write(&settings, mode)?;
        }
        let restart = if set.is_empty() { vec![] } else { vec!["docker"] };
        Done { dry_run: self.at.dry_run, file: self.at.file, set, removed: Vec::new(), restart }.print(&self.output)?;
        Ok(ExitCode::SUCCESS)
    }

    /// docker's bridge has the subnet's first address; whoever masquerades, it is one of the two.
    fn wanted(&self) -> anyhow::Result<Map<String, Value>> {
        let file = self.subnet_file.clone().unwrap_or_else(|| SUBNET_FILE.into());
        let hint = "start `twill agent`; `twill status` says what it waits for";
        let not_ready =
            |why: String| Failure::new("node-not-ready", format!("read {}: {why}", file.display())).hint(hint);
        let text = fs::read_to_string(&file).map_err(|error| not_ready(error.to_string()))?;
        let env = SubnetEnv::parse(&text).map_err(|error| not_ready(error.to_string()))?;
        let Some((_, subnet)) = env.v4 else { return Err(not_ready("it has no IPv4 subnet".into()).into()) };
        let gateway = Inet::new(subnet.nth(1).unwrap_or(subnet.addr()), subnet.len())?;
        let keys = json!({"bip": gateway, "mtu": env.mtu.get(), "ip-masq": !env.ip_masq});
        Ok(serde_json::from_value(keys)?)
    }
}

/// What somebody else has set stays: it is named, with what would have to go.
fn refuse_clash(
    settings: &Map<String, Value>,
    wanted: &Map<String, Value>,
    record: &Record,
    file: &Path,
) -> Result<(), Failure> {
    let ours = |key: &str, value: &Value| record.keys.get(key) == Some(value);
    let mut clashes: Vec<String> = wanted
        .iter()
        .filter_map(|(key, value)| {
            Some((key, value, settings.get(key).filter(|there| *there != value && !ours(key, there))?))
        })
        .map(|(key, value, there)| format!("\"{key}\" is {there}, and must be {value}"))
        .collect();
    let excluded = ["bridge", "fixed-cidr"].iter().filter_map(|key| Some((key, settings.get(*key)?)));
    clashes.extend(excluded.map(|(key, there)| format!("\"{key}\" is {there}, and excludes bip")));
    if clashes.is_empty() {
        return Ok(());
    }
    let message = format!("refuse to change {}: {}", file.display(), clashes.join("; "));
    Err(Failure::new("docker-clash", message).hint("take these keys out of the file, then install again"))
}

impl Uninstall {
    fn run(self) -> anyhow::Result<ExitCode> {
        let record = self.at.record()?;
        let (mut settings, mode) = self.at.settings()?.unwrap_or((Map::new(), 0o644));
        let removed = record.keys.iter().filter(|(key, value)| settings.get(*key) == Some(value));
        let removed: Vec<String> = removed.map(|(key, _)| key.clone()).collect();
        if !self.at.dry_run {
            removed.iter().for_each(|key| drop(settings.shift_remove(key)));
            if !removed.is_empty() && record.made && settings.is_empty() {
                fs::remove_file(self.at.real_file()).map_err(|error| failed("remove", &self.at.file, error))?;
            } else if !removed.is_empty() {
                self.at.write(&settings, mode)?;
            }
            let path = self.at.record_file();
            files::remove(&path).or_else(gone).map_err(|error| failed("remove", &path, error))?;
        }
        let restart = if removed.is_empty() { vec![] } else { vec!["docker"] };
        Done { dry_run: self.at.dry_run, file: self.at.file, set: Map::new(), removed, restart }.print(&self.output)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// A folder that is missing has no file.
fn gone(error: io::Error) -> io::Result<Option<files::Unsynced>> {
    if error.kind() == io::ErrorKind::NotFound { Ok(None) } else { Err(error) }
}
