//! The store from the command line's side: which one, how to reach it, and how to run our own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::net::TcpListener;
use twill_core::config::NetworkConfig;
use twill_core::lease::RawLease;
use twill_core::net::{BadValue, Prefix};
use twill_core::reconcile::Finding;
use twill_etcd::prefix_end;
use twill_etcd::rpc::RangeRequest;
use twill_etcd::server::{Server, ServerError};
use twill_kernel::process;
use twill_store::{EtcdStore, RawConfig, StoreConfig, StoreError, pem};

use crate::output::Failure;

/// flannel's default key prefix.
pub(crate) const PREFIX: &str = "/coreos.com/network";
/// How often a served store whose disk has failed is opened anew.
const OPEN_AGAIN: std::time::Duration = std::time::Duration::from_secs(1);
/// Where the agent that root runs listens.
pub(crate) const RUN_DIR: &str = "/run/twill";
/// Where a store is looked for.
pub(crate) const ENDPOINT: &str = "http://127.0.0.1:2379";

/// Where the store is, on every command that asks it.
#[derive(Debug, Clone, Args, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct StoreArgs {
    /// Store endpoints, http:// or https://, separated by commas [default: http://127.0.0.1:2379]
    #[arg(long, value_name = "URLS", env = "TWILL_STORE", value_delimiter = ',')]
    pub(crate) store: Vec<String>,
    /// Key prefix [default: /coreos.com/network]
    #[arg(long, value_name = "PREFIX", env = "TWILL_PREFIX", value_parser = key_prefix)]
    pub(crate) prefix: Option<String>,
    /// Certificate authority of the store (PEM)
    #[arg(long, value_name = "FILE", env = "TWILL_CA")]
    pub(crate) ca: Option<PathBuf>,
    /// Client certificate (PEM); needs --key
    #[arg(long, value_name = "FILE", env = "TWILL_CERT")]
    pub(crate) cert: Option<PathBuf>,
    /// Key of the client certificate (PEM)
    #[arg(long, value_name = "FILE", env = "TWILL_KEY")]
    pub(crate) key: Option<PathBuf>,
    /// User of the store; needs --password-file
    #[arg(long, value_name = "NAME", env = "TWILL_USER")]
    pub(crate) user: Option<String>,
    /// File with the user's password
    #[arg(long, value_name = "FILE", env = "TWILL_PASSWORD_FILE")]
    pub(crate) password_file: Option<PathBuf>,
}

impl StoreArgs {
    /// What the flags do not say, from a file's settings.
    pub(crate) fn or(self, other: StoreArgs) -> StoreArgs {
        StoreArgs {
            store: if self.store.is_empty() { other.store } else { self.store },
            prefix: self.prefix.or(other.prefix),
            ca: self.ca.or(other.ca),
            cert: self.cert.or(other.cert),
            key: self.key.or(other.key),
            user: self.user.or(other.user),
            password_file: self.password_file.or(other.password_file),
        }
    }

    /// With files that are found from everywhere.
    pub(crate) fn absolute(self) -> StoreArgs {
        let absolute = |file: Option<PathBuf>| file.map(|file| std::path::absolute(&file).unwrap_or(file));
        StoreArgs {
            ca: absolute(self.ca),
            cert: absolute(self.cert),
            key: absolute(self.key),
            password_file: absolute(self.password_file),
            ..self
        }
    }

    /// The key of the network config.
    pub(crate) fn config_key(&self) -> String {
        format!("{}/config", self.prefix())
    }

    /// The prefix of the store's keys.
    pub(crate) fn prefix(&self) -> &str {
        self.prefix.as_deref().unwrap_or(PREFIX)
    }

    /// A client; it connects when it is first asked. What its files hold is looked at now, and read again for each connection.
    pub(crate) fn connect(&self) -> Result<EtcdStore, Failure> {
        let read = |path: &PathBuf, flag: &str| {
            std::fs::read(path).map_err(|e| {
                Failure::new("store-config", format!("read {flag} {}: {e}", path.display()))
                    .hint("name a file that this user may read")
            })
        };
        let both = |a: bool, b: bool, what: &str| {
            if a == b {
                Ok(())
            } else {
                Err(Failure::new("store-config", format!("{what} belong together")).hint("give both, or neither"))
            }
        };
        both(self.cert.is_some(), self.key.is_some(), "--cert and --key")?;
        both(self.user.is_some(), self.password_file.is_some(), "--user and --password-file")?;
        let identity = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => {
                let (certificate, secret) = (read(cert, "--cert")?, read(key, "--key")?);
                let (of_cert, of_key) = (format!("--cert {}", cert.display()), format!("--key {}", key.display()));
                usable(&of_cert, pem::check_certificates(&certificate), CERTIFICATE)?;
                usable(&of_key, pem::check_key(&secret), "name a file with a line -----BEGIN PRIVATE KEY-----")?;
                let fit = pem::check_pair(&certificate, &secret);
                usable(&format!("{of_cert} and {of_key}"), fit, "name the key that the certificate was made for")?;
                Some((cert.clone(), key.clone()))
            }
            _ => None,
        };
        if let Some(path) = &self.ca {
            let authority = read(path, "--ca")?;
            usable(&format!("--ca {}", path.display()), pem::check_certificates(&authority), CERTIFICATE)?;
        }
        let user = match (&self.user, &self.password_file) {
            (Some(user), Some(file)) => {
                read(file, "--password-file")?;
                Some((user.clone(), file.clone()))
            }
            _ => None,
        };
        let config = StoreConfig {
            endpoints: if self.store.is_empty() { vec![ENDPOINT.into()] } else { self.store.clone() },
            prefix: self.prefix().to_owned(),
            ca: self.ca.clone(),
            identity,
            user,
        };
        EtcdStore::new(config).map_err(Failure::from)
    }
}

const CERTIFICATE: &str = "name a file with a line -----BEGIN CERTIFICATE-----";

/// A verdict on files, with the flags that name them.
fn usable(what: &str, verdict: Result<(), String>, hint: &str) -> Result<(), Failure> {
    verdict.map_err(|reason| Failure::new("store-config", format!("{what}: {reason}")).hint(hint))
}

/// A key prefix as flannel writes it; another one would be keys that nobody finds.
pub(crate) fn key_prefix(text: &str) -> Result<String, BadValue> {
    if !text.starts_with('/') || text.ends_with('/') {
        return Err(BadValue::new(text, "a key prefix like /coreos.com/network"));
    }
    Ok(text.to_owned())
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Failure::new(error.code(), error.to_string()).hint(error.hint())
    }
}

/// `/var/lib/twill`, or without root `$XDG_STATE_HOME/twill`.
pub(crate) fn state_dir() -> PathBuf {
    user_dir("XDG_STATE_HOME", ".local/state").unwrap_or_else(|| PathBuf::from("/var/lib/twill"))
}

/// `/run/twill`, or without root `$XDG_RUNTIME_DIR/twill`.
pub(crate) fn run_dir() -> PathBuf {
    user_dir("XDG_RUNTIME_DIR", ".cache").unwrap_or_else(|| PathBuf::from(RUN_DIR))
}

fn user_dir(variable: &str, below_home: &str) -> Option<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return None;
    }
    let dir = std::env::var_os(variable).map(PathBuf::from).filter(|p| p.is_absolute());
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(below_home));
    dir.or_else(home).map(|dir| dir.join("twill"))
}

/// Until joining with a token exists, whoever reaches the port owns the network.
pub(crate) fn check_listen(listen: SocketAddr, insecure: bool) -> Result<(), Failure> {
    if listen.port() == 0 {
        return Err(Failure::new(
            "store-port",
            format!("refuse to serve the store at {listen}: nobody would know the port"),
        )
        .hint("name one: etcd's is 2379"));
    }
    if listen.ip().is_loopback() {
        return Ok(());
    }
    if !insecure {
        let message = format!("refuse to serve the store at {listen}: nothing authenticates those who connect");
        return Err(Failure::new("store-insecure", message)
            .hint("add --insecure inside a network that you trust, or use an etcd with certificates"));
    }
    tracing::warn!(%listen, "the store is open to everybody who reaches this address: nothing authenticates");
    Ok(())
}

/// Refuses an address that the kernel would not let us listen on: it is another host's.
pub(crate) fn check_is_ours(listen: SocketAddr) -> Result<(), Failure> {
    // Any port does, and a datagram socket keeps none from anybody.
    match std::net::UdpSocket::bind(SocketAddr::new(listen.ip(), 0)) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrNotAvailable => {
            let message = format!("listen on {listen}: {} is no address of this host", listen.ip());
            Err(Failure::new("store-listen", message).hint("name an address of this host: ip addr shows them"))
        }
        _ => Ok(()),
    }
}

/// Refuses a port that somebody holds, unless that are the processes `but` alone, which are to end.
pub(crate) fn check_is_free(listen: SocketAddr, but: &[u32]) -> Result<(), Failure> {
    let Err(error) = std::net::TcpListener::bind(listen) else { return Ok(()) };
    let holders = holders(listen);
    let known = error.kind() == std::io::ErrorKind::AddrInUse && !holders.is_empty();
    if known && holders.iter().all(|inode| but.iter().any(|pid| process::has_socket(*pid, *inode))) {
        return Ok(());
    }
    Err(cannot_listen(listen, &error))
}

/// Refuses a port that somebody listens on, without having it for a moment: another program may just be starting.
pub(crate) fn check_nobody_listens(listen: SocketAddr) -> Result<(), Failure> {
    if holders(listen).is_empty() {
        return Ok(());
    }
    Err(cannot_listen(listen, &std::io::ErrorKind::AddrInUse.into()))
}

/// Sockets that listen where one of ours would have to.
fn holders(listen: SocketAddr) -> Vec<u64> {
    let in_the_way = |at: &SocketAddr| {
        let wide = at.ip().is_unspecified() || listen.ip().is_unspecified();
        at.port() == listen.port() && (wide || at.ip() == listen.ip())
    };
    process::listeners().into_iter().filter(|(at, _)| in_the_way(at)).map(|(_, inode)| inode).collect()
}

fn cannot_listen(listen: SocketAddr, error: &std::io::Error) -> Failure {
    Failure::new("store-listen", format!("listen on {listen}: {error}"))
        .hint("name another address or port: store serve --listen ADDR:PORT, agent --serve-store ADDR:PORT")
}

/// The config that a fresh store gets, checked as every reader will.
pub(crate) fn first_config(networks: &[Prefix], backend: &str) -> Result<(String, NetworkConfig), Failure> {
    let text = NetworkConfig::default_json(networks, backend);
    match NetworkConfig::parse(text.as_bytes()) {
        Ok((config, _)) => Ok((text, config)),
        Err(fault) => {
            Err(Failure::new("bad-config", fault.to_string()).hint("name another network with --network PREFIX"))
        }
    }
}

/// What to say of a network that was asked for, where the store has a config already: nothing, when it is the config's.
pub(crate) fn ignored_network(asked: Option<Prefix>, config: &[u8]) -> Option<Finding> {
    let networks = NetworkConfig::parse(config).ok()?.0.networks();
    let asked = asked.filter(|asked| !networks.contains(asked))?;
    let has = networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" and ");
    Some(Finding {
        code: "network-ignored".into(),
        object: "network config".into(),
        evidence: format!("--network {asked} is ignored: the store has a config already, with {has}"),
        fix: "leave --network away, or change the config in the store with etcdctl put".into(),
    })
}

/// Serves until `shutdown` ends. Where the disk fails (full, read-only), it is opened again until that succeeds: nothing that was
/// acknowledged is lost, and clients find the store at its place.
pub(crate) async fn serve(
    (mut server, mut listener): (Server, TcpListener),
    listen: SocketAddr,
    data: &Path,
    shutdown: impl Future<Output = ()>,
) -> Result<(), ServerError> {
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        match server.serve(listener, shutdown.as_mut()).await {
            Err(ServerError::Ended) => {}
            ended => return ended,
        }
        let mut said = String::new();
        (server, listener) = loop {
            tokio::select! {
                () = tokio::time::sleep(OPEN_AGAIN) => {}
                () = shutdown.as_mut() => return Ok(()),
            }
            match open(listen, data).await {
                Ok(open) => break open,
                Err(failure) if said == failure.message => {}
                Err(failure) => {
                    tracing::warn!(error = %failure, "the store is not back yet, it is tried again");
                    said = failure.message;
                }
            }
        };
    }
}

/// Config and leases of a store that does not run, without a change to its folder; `None`: it has none.
pub(crate) fn look(data: &Path, prefix: &str) -> Result<Option<(RawConfig, Vec<RawLease>)>, Failure> {
    let Some(keys) = twill_etcd::server::look(data).map_err(|e| bad_data(data, &e.into()))? else { return Ok(None) };
    let range = |key: String, range_end: Vec<u8>| {
        let request = RangeRequest { key: key.into(), range_end: range_end.into(), ..RangeRequest::default() };
        // The newest revision is never refused.
        keys.range(&request).map(|answer| answer.kvs).unwrap_or_default()
    };
    let subnets = format!("{prefix}/subnets/");
    let Some(config) = range(format!("{prefix}/config"), Vec::new()).into_iter().next() else { return Ok(None) };
    let config = RawConfig { value: config.value.to_vec(), mod_rev: config.mod_revision };
    let leases = range(subnets.clone(), prefix_end(subnets.as_bytes()));
    Ok(Some((config, leases.into_iter().filter_map(|kv| twill_store::raw_lease(kv, &subnets)).collect())))
}

/// Opens the data and the port.
pub(crate) async fn open(listen: SocketAddr, data: &Path) -> Result<(Server, TcpListener), Failure> {
    let random = twill_kernel::files::random_bytes().map_err(|e| failed("no-randomness", &e))?;
    let server = Server::open(data, random, &format!("http://{listen}")).map_err(|e| bad_data(data, &e))?;
    let listener = TcpListener::bind(listen).await.map_err(|e| cannot_listen(listen, &e))?;
    tracing::info!(%listen, data = %data.display(), "the store serves");
    Ok((server, listener))
}

fn bad_data(data: &Path, error: &ServerError) -> Failure {
    let folder = data.display();
    let hint = match error {
        ServerError::Disk(disk) if disk.is_in_use() => format!("another store runs on {folder}: stop that one, or"),
        _ => format!("see whether {folder} is full, read-only or broken, or"),
    };
    failed("store-data", error)
        .hint(format!("{hint} name another folder: store serve --data DIR, agent --state-dir DIR"))
}

fn failed(code: &'static str, error: &dyn std::error::Error) -> Failure {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    Failure::new(code, message)
}
