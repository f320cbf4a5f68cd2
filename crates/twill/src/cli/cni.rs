//! `twill cni`: the plugin and its configuration, put where container runtimes look for them.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};
use twill_cni::conf::{STATE, SUBNET_FILE};
use twill_core::flannel::subnet_env::SubnetEnv;
use twill_kernel::{attach, files};

use super::ask::Socket;
use super::folder::StateDir;
use crate::agent::view::View;
use crate::output::{Failure, Output};

/// The plugin's program, and its own configuration's file.
const PLUGIN: &str = "twill-cni";
const CONFLIST: &str = "10-twill.conflist";
/// What a program is called while its name is taken over.
const KEPT: &str = "before-twill";

/// Container runtimes (containerd, CRI-O, podman) attach containers by Twill.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  twill cni install\n  twill cni install --take-over flannel,bridge,host-local\n  twill cni uninstall"
)]
pub(crate) struct Cni {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the plugin and its configuration in place, once this node is ready
    #[command(
        after_help = "Examples:\n  twill cni install\n  twill cni install --bin-dir /usr/lib/cni\n  twill cni install --take-over flannel,bridge,host-local   existing configurations go on, by Twill"
    )]
    Install(Install),
    /// Print the line that makes podman's own network (netavark) on this node's subnet
    #[command(after_help = "Examples:\n  twill cni podman\n  $(twill cni podman)    make it at once")]
    Podman(PodmanLine),
    /// Take them away again, and give the names back that were taken over
    #[command(after_help = "Example:\n  twill cni uninstall")]
    Uninstall(Uninstall),
}

/// Plugins whose configurations Twill understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Name {
    Flannel,
    Bridge,
    HostLocal,
}

impl Name {
    const ALL: [Name; 3] = [Self::Flannel, Self::Bridge, Self::HostLocal];

    const fn program(self) -> &'static str {
        match self {
            Self::Flannel => "flannel",
            Self::Bridge => "bridge",
            Self::HostLocal => "host-local",
        }
    }
}

#[derive(Debug, Clone, Args)]
struct Where {
    /// Folder of the plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Folder of the configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
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
    /// Also serve the configurations of these plugins; their programs are kept
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    take_over: Vec<Name>,
    /// The plugin's program [default: twill-cni beside this one]
    #[arg(long, value_name = "FILE")]
    plugin: Option<PathBuf>,
    /// File that the agent writes [default: /run/flannel/subnet.env]
    #[arg(long, value_name = "FILE", env = "TWILL_SUBNET_FILE")]
    subnet_file: Option<PathBuf>,
    #[command(flatten)]
    socket: Socket,
    #[command(flatten)]
    output: Output,
}

#[derive(Debug, Args)]
struct PodmanLine {
    /// Name of the network
    #[arg(default_value = "twill")]
    name: String,
    /// File that the agent writes [default: /run/flannel/subnet.env]
    #[arg(long, value_name = "FILE", env = "TWILL_SUBNET_FILE")]
    subnet_file: Option<PathBuf>,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Line {
    command: String,
}

#[derive(Debug, Args)]
struct Uninstall {
    #[command(flatten)]
    at: Where,
    /// Also while containers are attached by the plugin
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    output: Output,
}

/// What was done, or would be.
#[derive(Debug, Default, Serialize)]
struct Done {
    dry_run: bool,
    wrote: Vec<PathBuf>,
    kept: Vec<PathBuf>,
    restored: Vec<PathBuf>,
    removed: Vec<PathBuf>,
}

impl Done {
    fn print(&self, output: &Output) -> anyhow::Result<()> {
        output.print(self, || {
            let acts = [
                ("wrote", &self.wrote),
                ("kept", &self.kept),
                ("restored", &self.restored),
                ("removed", &self.removed),
            ];
            let lines =
                acts.iter().flat_map(|(act, paths)| paths.iter().map(move |path| format!("{act} {}", path.display())));
            let lines: Vec<String> = lines.collect();
            let head = if self.dry_run { "nothing was changed; it would be:\n" } else { "" };
            if lines.is_empty() { "nothing to do".to_owned() } else { format!("{head}{}", lines.join("\n")) }
        })
    }
}

impl Cni {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.command {
            Command::Install(args) => args.run(),
            Command::Podman(args) => args.run(),
            Command::Uninstall(args) => args.run(),
        }
    }
}

impl PodmanLine {
    /// podman refuses a subnet that an address of its own namespace stands in, as the tunnel's does: hence one without any. No name
    /// service: podman's needs a package of its own, and knows this host's containers alone.
    fn run(self) -> anyhow::Result<ExitCode> {
        let file = self.subnet_file.unwrap_or_else(|| SUBNET_FILE.into());
        let env = subnet_env(&file)?;
        let mut words = vec!["unshare --net podman network create --disable-dns".to_owned()];
        words.extend(env.v6.map(|_| "--ipv6".to_owned()));
        for (_, subnet) in [env.v4, env.v6].into_iter().flatten() {
            words.push(format!("--subnet {subnet} --gateway {}", subnet.nth(1).unwrap_or(subnet.addr())));
        }
        words.push(format!("--opt mtu={} {}", env.mtu, self.name));
        let line = Line { command: words.join(" ") };
        self.output.print(&line, || line.command.clone())?;
        Ok(ExitCode::SUCCESS)
    }
}

/// What the agent has written of this node's lease.
fn subnet_env(file: &Path) -> Result<SubnetEnv, Failure> {
    let not_ready = |why: &dyn std::fmt::Display| {
        Failure::new("node-not-ready", format!("read {}: {why}", file.display()))
            .hint("wait until `twill status` says running")
    };
    let text = fs::read_to_string(file).map_err(|error| not_ready(&error))?;
    SubnetEnv::parse(&text).map_err(|error| not_ready(&error))
}

fn failed(act: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new("install-failed", format!("{act} {}: {error}", path.display()))
        .hint("run it as root, on a file system with room")
}

impl Install {
    fn run(self) -> anyhow::Result<ExitCode> {
        let names: BTreeSet<Name> = self.take_over.iter().copied().collect();
        if names.contains(&Name::HostLocal) && !names.contains(&Name::Bridge) {
            let message =
                "host-local alone cannot be taken over: the reference bridge would ask it under the type bridge";
            return Err(Failure::new("take-over-both", message)
                .hint("--take-over bridge,host-local")
                .exit(crate::output::USAGE)
                .into());
        }
        let subnet_file = self.subnet_file.clone().unwrap_or_else(|| SUBNET_FILE.into());
        self.ready(&subnet_file)?;
        let program = self.program()?;
        let mut done = Done { dry_run: self.at.dry_run, ..Done::default() };
        // A newer release goes wherever the older one is; neither is anybody's original.
        let is_ours = |name: &Name| self.at.has_taken(*name) || self.at.holds(name.program(), &program);
        let taken: BTreeSet<Name> = Name::ALL.into_iter().filter(is_ours).collect();
        for name in names.difference(&taken) {
            self.at.keep(&mut done, *name)?;
        }
        for name in names.union(&taken) {
            self.at.write(&mut done, self.at.bin_dir.join(name.program()), &program, 0o755)?;
        }
        // After them: while it is the older one, they are known by it.
        self.at.write(&mut done, self.at.bin_dir.join(PLUGIN), &program, 0o755)?;
        // Last: what it names is there by now.
        let text = serde_json::to_string_pretty(&self.conflist(&subnet_file))? + "\n";
        self.at.write(&mut done, self.at.conf_dir.join(CONFLIST), text.as_bytes(), 0o644)?;
        done.print(&self.output)?;
        Ok(ExitCode::SUCCESS)
    }

    fn program(&self) -> anyhow::Result<Vec<u8>> {
        let beside = || Ok::<_, io::Error>(std::env::current_exe()?.with_file_name(PLUGIN));
        let path = self.plugin.clone().map_or_else(beside, Ok)?;
        Ok(fs::read(&path).map_err(|error| {
            let message = format!("read the plugin {}: {error}", path.display());
            Failure::new("plugin-missing", message).hint("it comes with twill; --plugin names another place")
        })?)
    }

    /// A runtime that finds the configuration sends containers at once: the node must be able to take them.
    fn ready(&self, subnet_file: &Path) -> anyhow::Result<()> {
        let not_ready =
            |why: String| Failure::new("node-not-ready", why).hint("wait until `twill status` says running");
        let view: View = crate::runtime()?.block_on(self.socket.ask("GET", "/v1/status"))?;
        if view.state != "running" || view.subnets.is_empty() {
            return Err(not_ready(format!("this node is {}, with {} subnets", view.state, view.subnets.len())).into());
        }
        let env = subnet_env(subnet_file)?;
        let told = [env.v4, env.v6].into_iter().flatten().map(|(_, subnet)| subnet.to_string());
        if let Some(other) = told.into_iter().find(|subnet| !view.subnets.contains(subnet)) {
            return Err(not_ready(format!(
                "{} says {other}, the lease says {}",
                subnet_file.display(),
                view.subnets.join(", ")
            ))
            .into());
        }
        let links = attach::devices().map_err(|e| not_ready(e.to_string()))?;
        let is_up = |device: &str| links.iter().any(|link| link.up && link.name.as_str() == device);
        if let Some(down) = view.devices.iter().find(|device| !is_up(device)) {
            return Err(not_ready(format!("the device {down} is not up")).into());
        }
        Ok(())
    }

    /// The configuration says 1.0.0: containerd 1.6 and podman 4.3 know nothing newer.
    fn conflist(&self, subnet_file: &Path) -> Value {
        let mut plugin = json!({"type": PLUGIN, "capabilities": {"ips": true, "mac": true, "portMappings": true}});
        if subnet_file != Path::new(SUBNET_FILE) {
            plugin["subnetFile"] = json!(subnet_file);
        }
        let state = self.at.state.path();
        if state != Path::new(STATE) {
            plugin["stateDir"] = json!(state);
            plugin["ipam"] = json!({"dataDir": state.join("networks")});
        }
        json!({"cniVersion": "1.0.0", "name": "twill", "plugins": [plugin]})
    }
}

impl Where {
    fn kept(&self, name: Name) -> PathBuf {
        self.bin_dir.join(format!("{}.{KEPT}", name.program()))
    }

    /// True when the plugin that is installed stands under that name.
    fn has_taken(&self, name: Name) -> bool {
        fs::read(self.bin_dir.join(PLUGIN)).is_ok_and(|ours| self.holds(name.program(), &ours))
    }

    fn holds(&self, name: &str, program: &[u8]) -> bool {
        fs::read(self.bin_dir.join(name)).is_ok_and(|there| there == program)
    }

    fn write(&self, done: &mut Done, path: PathBuf, bytes: &[u8], mode: u32) -> Result<(), Failure> {
        if fs::read(&path).is_ok_and(|there| there == bytes) {
            return Ok(());
        }
        if !self.dry_run {
            files::write_atomic(&path, bytes, mode).map_err(|error| failed("write", &path, &error))?;
        }
        done.wrote.push(path);
        Ok(())
    }

    /// Keeps the program of that name, if there is one: what its package has brought meanwhile goes before what was kept.
    fn keep(&self, done: &mut Done, name: Name) -> Result<(), Failure> {
        let (path, kept) = (self.bin_dir.join(name.program()), self.kept(name));
        if !path.exists() {
            return Ok(());
        }
        if !self.dry_run {
            files::remove(&kept).map_err(|error| failed("remove", &kept, &error))?;
            fs::hard_link(&path, &kept).map_err(|error| failed("keep", &path, &error))?;
        }
        done.kept.push(kept);
        Ok(())
    }

    fn remove(&self, done: &mut Done, path: PathBuf) -> Result<(), Failure> {
        if !path.exists() {
            return Ok(());
        }
        if !self.dry_run {
            fs::remove_file(&path).map_err(|error| failed("remove", &path, &error))?;
        }
        done.removed.push(path);
        Ok(())
    }
}

impl Uninstall {
    fn run(self) -> anyhow::Result<ExitCode> {
        let records = twill_cni::records::Records::new(self.at.state.path().join("attachments")).all();
        let records = records.map_err(|e| Failure::new("ipam-failed", e.msg).hint(e.details))?;
        let attached: Vec<String> =
            records.iter().filter(|r| r.network.is_some()).map(|r| r.request.container_id.clone()).collect();
        if !attached.is_empty() && !self.force && !self.at.dry_run {
            let message =
                format!("refuse to uninstall: {} containers are attached: {}", attached.len(), attached.join(", "));
            return Err(Failure::new("containers-attached", message).hint("stop them first, or add --force").into());
        }
        let mut done = Done { dry_run: self.at.dry_run, ..Done::default() };
        // First: nobody is to be sent here any more.
        self.at.remove(&mut done, self.at.conf_dir.join(CONFLIST))?;
        let plugin = self.at.bin_dir.join(PLUGIN);
        for name in Name::ALL {
            let (path, kept) = (self.at.bin_dir.join(name.program()), self.at.kept(name));
            let ours = self.at.has_taken(name);
            if kept.exists() && path.exists() && !ours {
                // Its package has brought a newer one.
                self.at.remove(&mut done, kept)?;
            } else if kept.exists() {
                if !self.at.dry_run {
                    fs::rename(&kept, &path).map_err(|error| failed("restore", &path, &error))?;
                }
                done.restored.push(path);
            } else if ours {
                self.at.remove(&mut done, path)?;
            }
        }
        self.at.remove(&mut done, plugin)?;
        done.print(&self.output)?;
        Ok(ExitCode::SUCCESS)
    }
}
