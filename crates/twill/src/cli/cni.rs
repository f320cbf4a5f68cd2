//! `twill cni`: the plugin and its configuration, put where container runtimes look for them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde::Serialize;
use serde_json::{Value, json};
use twill_cni::conf::{STATE, SUBNET_FILE};
use twill_core::flannel::subnet_env::SubnetEnv;
use twill_kernel::files::Lock;
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

/// What stands under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stands {
    Nothing,
    Ours,
    Theirs,
}

impl Stands {
    fn at(path: &Path) -> Result<Self, Failure> {
        match fs::read(path) {
            Ok(program) if is_ours(&program) => Ok(Self::Ours),
            Ok(_) => Ok(Self::Theirs),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => Ok(Self::Nothing),
            // A link that leads nowhere is somebody's.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::Theirs),
            Err(error) => Err(failed("read", path, &error)),
        }
    }
}

/// The program itself says whose it is: so neither a kill halfway, nor an upgrade, nor a copy by hand makes an original of it.
fn is_ours(program: &[u8]) -> bool {
    memchr::memmem::find(program, twill_cni::ABOUT.as_bytes()).is_some()
}

impl Install {
    fn run(self) -> anyhow::Result<ExitCode> {
        let mut names: BTreeSet<Name> = self.take_over.iter().copied().collect();
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
        if !self.at.dry_run {
            fs::create_dir_all(&self.at.bin_dir).map_err(|error| failed("make", &self.at.bin_dir, &error))?;
        }
        let mut done = Done { dry_run: self.at.dry_run, ..Done::default() };
        let _lock = self.at.begin(&mut done)?;
        for name in Name::ALL {
            match Stands::at(&self.at.bin_dir.join(name.program()))? {
                Stands::Theirs if names.contains(&name) => self.at.keep(&mut done, name)?,
                // A newer release goes wherever an older one is.
                Stands::Ours => drop(names.insert(name)),
                Stands::Theirs | Stands::Nothing => {}
            }
        }
        for name in names {
            self.at.write(&mut done, self.at.bin_dir.join(name.program()), &program, 0o755)?;
        }
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
        let missing = |why: &str| {
            Failure::new("plugin-missing", format!("read the plugin {}: {why}", path.display()))
                .hint("it comes with twill; --plugin names another place")
        };
        let program = fs::read(&path).map_err(|error| missing(&error.to_string()))?;
        if !is_ours(&program) {
            return Err(missing("it is no twill-cni").into());
        }
        Ok(program)
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

    /// Alone from here on: what lies beside the files was left by a run that was killed, and goes.
    fn begin(&self, done: &mut Done) -> Result<Option<Lock>, Failure> {
        let lock = match Lock::folder(&self.bin_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            lock => Some(lock.map_err(|error| failed("lock", &self.bin_dir, &error))?),
        };
        let programs = Name::ALL.map(Name::program).into_iter().chain([PLUGIN]).map(|name| self.bin_dir.join(name));
        for path in programs.chain([self.conf_dir.join(CONFLIST)]) {
            for left in files::left_beside(&path).map_err(|error| failed("look beside", &path, &error))? {
                self.remove(done, left)?;
            }
        }
        Ok(lock)
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

    /// Keeps somebody's program of that name: what its package has brought meanwhile goes before what was kept.
    fn keep(&self, done: &mut Done, name: Name) -> Result<(), Failure> {
        let (path, kept) = (self.bin_dir.join(name.program()), self.kept(name));
        if !self.dry_run {
            files::remove(&kept).map_err(|error| failed("remove", &kept, &error))?;
            let keep = || fs::hard_link(&path, &kept).and_then(|()| File::open(&self.bin_dir)?.sync_all());
            keep().map_err(|error| failed("keep", &path, &error))?;
        }
        done.kept.push(kept);
        Ok(())
    }

    fn remove(&self, done: &mut Done, path: PathBuf) -> Result<(), Failure> {
        if fs::symlink_metadata(&path).is_err() {
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
        let attached: Vec<String> = records
            .iter()
            .filter(|r| r.network.is_some() && r.alone.is_none())
            .map(|r| r.request.container_id.clone())
            .collect();
        if !attached.is_empty() && !self.force && !self.at.dry_run {
            let message =
                format!("refuse to uninstall: {} containers are attached: {}", attached.len(), attached.join(", "));
            return Err(Failure::new("containers-attached", message).hint("stop them first, or add --force").into());
        }
        let mut done = Done { dry_run: self.at.dry_run, ..Done::default() };
        let _lock = self.at.begin(&mut done)?;
        // First: nobody is to be sent here any more.
        self.at.remove(&mut done, self.at.conf_dir.join(CONFLIST))?;
        // host-local first: the reference bridge is never to ask ours.
        for name in Name::ALL.into_iter().rev() {
            let (path, kept) = (self.at.bin_dir.join(name.program()), self.at.kept(name));
            match (Stands::at(&path)?, Stands::at(&kept)?) {
                // Its package has brought a newer one, or it was kept and not yet replaced.
                (Stands::Theirs, _) => self.at.remove(&mut done, kept)?,
                (_, Stands::Theirs) => {
                    if !self.at.dry_run {
                        fs::rename(&kept, &path).map_err(|error| failed("restore", &path, &error))?;
                    }
                    done.restored.push(path);
                }
                _ => [path, kept].into_iter().try_for_each(|ours| self.at.remove(&mut done, ours))?,
            }
        }
        self.at.remove(&mut done, self.at.bin_dir.join(PLUGIN))?;
        done.print(&self.output)?;
        Ok(ExitCode::SUCCESS)
    }
}
