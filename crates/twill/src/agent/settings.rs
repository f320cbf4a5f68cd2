//! The agent's settings: flags, `TWILL_*`, and `/etc/twill/agent.toml`, in this order of precedence.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Deserialize;
use twill_core::iface::Wishes;
use twill_core::net::{BadValue, Prefix, is_host};

use crate::output::{Failure, USAGE};
use crate::stores::{self, StoreArgs};

/// Where the file is looked for when `--config` names none.
pub(crate) const FILE: &str = "/etc/twill/agent.toml";

/// What can be said on the command line.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub(crate) struct AgentArgs {
    /// Settings file [default: /etc/twill/agent.toml, when it is there]
    #[arg(long, value_name = "FILE", env = "TWILL_CONFIG")]
    config: Option<PathBuf>,
    #[command(flatten)]
    store: StoreArgs,
    /// Serve the store as well; without an address on loopback only
    #[arg(long, value_name = "ADDR:PORT", env = "TWILL_SERVE_STORE", num_args = 0..=1, default_missing_value = "127.0.0.1:2379", value_parser = address_and_port)]
    serve_store: Option<SocketAddr>,
    /// Serve the store to other hosts although nothing authenticates them
    #[arg(long)]
    insecure: bool,
    /// Network to configure where the served store has none [default: 10.244.0.0/16]
    #[arg(long, value_name = "PREFIX", env = "TWILL_NETWORK")]
    network: Option<Prefix>,
    /// Interface of the underlay, by name or address; repeat for a second choice
    #[arg(long, value_name = "NAME|ADDR", env = "TWILL_IFACE", value_delimiter = ',', value_parser = interface)]
    iface: Vec<String>,
    /// Address that peers are told, when it is not the interface's own
    #[arg(long, value_name = "ADDR", env = "TWILL_PUBLIC_IP", value_delimiter = ',', value_parser = address)]
    public_ip: Vec<IpAddr>,
    /// Ask for this subnet
    #[arg(long, value_name = "PREFIX", env = "TWILL_SUBNET", value_delimiter = ',')]
    subnet: Vec<Prefix>,
    /// Masquerade what leaves the network [default: true]
    #[arg(long, value_name = "BOOL", env = "TWILL_IP_MASQ", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ip_masq: Option<bool>,
    /// Lower the segment size that TCP announces through the tunnel to what the route's MTU carries [default: false]
    #[arg(long, value_name = "BOOL", env = "TWILL_CLAMP_MSS", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    clamp_mss: Option<bool>,
    /// File for container runtimes [default: /run/flannel/subnet.env]
    #[arg(long, value_name = "FILE", env = "TWILL_SUBNET_FILE")]
    subnet_file: Option<PathBuf>,
    /// Carry packets of the udp backend one by one, although this kernel knows better
    #[arg(long)]
    no_tunnel_offloads: bool,
    /// Take the place of the agent that runs here, without losing a packet of the udp backend
    #[arg(long)]
    takeover: bool,
    /// Folder that survives a reboot [default: /var/lib/twill]
    #[arg(long, value_name = "DIR", env = "TWILL_STATE_DIR")]
    pub(crate) state_dir: Option<PathBuf>,
    /// Folder of the control socket [default: /run/twill]
    #[arg(long, value_name = "DIR", env = "TWILL_RUN_DIR")]
    pub(crate) run_dir: Option<PathBuf>,
}

/// The file, as it stands there.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    version: u32,
    #[serde(default)]
    store: Vec<String>,
    #[serde(default, deserialize_with = "below")]
    prefix: Option<String>,
    ca: Option<PathBuf>,
    cert: Option<PathBuf>,
    key: Option<PathBuf>,
    user: Option<String>,
    password_file: Option<PathBuf>,
    #[serde(default, deserialize_with = "served_at")]
    serve_store: Option<SocketAddr>,
    #[serde(default)]
    insecure: bool,
    network: Option<Prefix>,
    #[serde(default, deserialize_with = "interfaces")]
    iface: Vec<String>,
    #[serde(default, deserialize_with = "addresses")]
    public_ip: Vec<IpAddr>,
    #[serde(default)]
    subnet: Vec<Prefix>,
    ip_masq: Option<bool>,
    clamp_mss: Option<bool>,
    subnet_file: Option<PathBuf>,
    tunnel_offloads: Option<bool>,
    state_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

/// Settings, checked.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) store: StoreArgs,
    pub(crate) serve_store: Option<SocketAddr>,
    pub(crate) insecure: bool,
    pub(crate) network: Prefix,
    /// The network as somebody asked for it.
    pub(crate) asked_network: Option<Prefix>,
    pub(crate) wishes: Wishes,
    pub(crate) subnet: Vec<Prefix>,
    pub(crate) way_out: WayOut,
    pub(crate) subnet_file: PathBuf,
    pub(crate) tunnel_offloads: bool,
    pub(crate) takeover: bool,
    pub(crate) state_dir: PathBuf,
    pub(crate) run_dir: PathBuf,
}

/// How packets leave the network.
#[derive(Debug, Clone, Copy)]
pub(crate) struct WayOut {
    /// With the node's address as their source.
    pub(crate) masquerade: bool,
    /// TCP with segments that fit into the tunnel.
    pub(crate) clamp: bool,
}

impl AgentArgs {
    /// Where the agent listens, when nothing is said of what it is to do: then a running one knows that best.
    pub(crate) fn of_a_running_agent(&self) -> Option<Option<PathBuf>> {
        let said = AgentArgs { run_dir: None, ..self.clone() };
        (said == AgentArgs::default()).then(|| self.run_dir.clone())
    }

    /// Nothing says which store.
    pub(crate) fn names_no_store(&self) -> bool {
        self.config.is_none() && self.serve_store.is_none() && self.store == StoreArgs::default()
    }

    /// Flags over environment over file over defaults.
    pub(crate) fn settings(self) -> Result<Settings, Failure> {
        let file = match &self.config {
            Some(path) => {
                read(path)?.ok_or_else(|| Failure::new("bad-settings", format!("{} is not there", path.display())))?
            }
            None => read(Path::new(FILE))?.unwrap_or_default(),
        };
        let from_file = StoreArgs {
            store: file.store,
            prefix: file.prefix,
            ca: file.ca,
            cert: file.cert,
            key: file.key,
            user: file.user,
            password_file: file.password_file,
        };
        let serve_store = self.serve_store.or(file.serve_store);
        let mut store = self.store.or(from_file);
        if let (Some(address), true) = (serve_store, store.store.is_empty()) {
            store.store = vec![format!("http://{address}")];
        }
        let list = |flag: Vec<String>, file| if flag.is_empty() { file } else { flag };
        let public = if self.public_ip.is_empty() { file.public_ip } else { self.public_ip };
        if let Some(ip) = public.iter().find(|ip| !is_host(**ip)) {
            return Err(Failure::new("bad-settings", format!("public-ip {ip} is not the address of a host"))
                .hint("name the address at which the other nodes reach this one")
                .exit(USAGE));
        }
        let network = self.network.or(file.network);
        if let (Some(network), None) = (network, serve_store) {
            let message = format!("network {network} is for a store that this agent serves, and it serves none");
            let hint = "add --serve-store, or leave it out: the store has the network";
            return Err(Failure::new("bad-settings", message).hint(hint).exit(USAGE));
        }
        let runtime_file =
            || if rustix::process::geteuid().is_root() { "/run/flannel".into() } else { stores::run_dir() };
        Ok(Settings {
            store,
            serve_store,
            insecure: self.insecure || file.insecure,
            asked_network: network,
            network: match network {
                Some(network) => network,
                None => "10.244.0.0/16".parse().map_err(|e| Failure::new("bad-settings", format!("{e}")))?,
            },
            wishes: Wishes { iface: list(self.iface, file.iface), public },
            subnet: if self.subnet.is_empty() { file.subnet } else { self.subnet },
            way_out: WayOut {
                masquerade: self.ip_masq.or(file.ip_masq).unwrap_or(true),
                clamp: self.clamp_mss.or(file.clamp_mss).unwrap_or(false),
            },
            subnet_file: self.subnet_file.or(file.subnet_file).unwrap_or_else(|| runtime_file().join("subnet.env")),
            tunnel_offloads: !self.no_tunnel_offloads && file.tunnel_offloads.unwrap_or(true),
            takeover: self.takeover,
            state_dir: self.state_dir.or(file.state_dir).unwrap_or_else(stores::state_dir),
            run_dir: self.run_dir.or(file.run_dir).unwrap_or_else(stores::run_dir),
        })
    }
}

/// The settings of an agent that has them from its file alone, and the file, where there is one.
pub(crate) fn of_file() -> Result<(Settings, Option<PathBuf>), Failure> {
    let config = std::env::var_os("TWILL_CONFIG").map(PathBuf::from);
    let path = config.clone().or_else(|| Some(PathBuf::from(FILE)).filter(|path| path.exists()));
    Ok((AgentArgs { config, ..AgentArgs::default() }.settings()?, path))
}

/// `ADDR:PORT`.
pub(crate) fn address_and_port(text: &str) -> Result<SocketAddr, BadValue> {
    text.parse().map_err(|_| BadValue::new(text, "an address and port like 192.0.2.11:2379"))
}

fn address(text: &str) -> Result<IpAddr, BadValue> {
    text.parse().map_err(|_| BadValue::new(text, "an address like 192.0.2.11"))
}

fn interface(text: &str) -> Result<String, BadValue> {
    if text.trim().is_empty() {
        return Err(BadValue::new(text, "a device's name or address like eth0 or 192.0.2.11"));
    }
    Ok(text.to_owned())
}

fn interfaces<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    let texts = Vec::<String>::deserialize(d)?;
    texts.iter().map(|text| interface(text).map_err(serde::de::Error::custom)).collect()
}

fn below<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<String>, D::Error> {
    stores::key_prefix(&String::deserialize(d)?).map(Some).map_err(serde::de::Error::custom)
}

fn served_at<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<SocketAddr>, D::Error> {
    address_and_port(&String::deserialize(d)?).map(Some).map_err(serde::de::Error::custom)
}

fn addresses<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Vec<IpAddr>, D::Error> {
    let texts = Vec::<String>::deserialize(d)?;
    texts.iter().map(|text| address(text).map_err(serde::de::Error::custom)).collect()
}

/// The settings file; `None`: there is none.
fn read(path: &Path) -> Result<Option<File>, Failure> {
    let bad = |message: String| {
        Failure::new("bad-settings", format!("{}: {message}", path.display()))
            .hint("docs/guide/settings.md lists every key with what is allowed")
    };
    let bytes = twill_kernel::files::read_limited(path, 1 << 20).map_err(|e| bad(e.to_string()))?;
    let Some(bytes) = bytes else { return Ok(None) };
    let text = String::from_utf8(bytes).map_err(|e| bad(e.to_string()))?;
    let file: File = toml::from_str(&text).map_err(|e| bad(e.to_string()))?;
    if file.version != 1 {
        return Err(bad(format!("version: {} is not 1", file.version)));
    }
    Ok(Some(file))
}
