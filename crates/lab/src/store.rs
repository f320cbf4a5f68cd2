//! The lab's store: `twill store serve`, or a stock etcd, in the underlay's namespace.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use twill_core::config::NetworkConfig;

use crate::children::{Children, own_program};
use crate::error::{Act, LabError};
use crate::home::LabDir;
use crate::layout::{Spec, StoreKind};
use crate::notify::Notify;
use crate::wiring::Place;

/// How long a store may take to answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// Where flannel looks for its config.
const CONFIG_KEY: &str = "/coreos.com/network/config";

/// A store that was started and may not answer yet.
#[derive(Debug)]
pub(crate) struct StoreProcess {
    pid: u32,
    notify: Notify,
    log: PathBuf,
    address: String,
    config: String,
}

/// Starts the store.
pub(crate) fn start(
    spec: &Spec,
    dir: &LabDir,
    underlay: &Place,
    children: &Children,
) -> Result<StoreProcess, LabError> {
    let (log, data) = (dir.path().join("store.log"), dir.path().join("store"));
    let notify = Notify::bind(&dir.path().join("store.sock")).act(|| "listen for the store".into())?;
    let address = spec.store_address().act(|| "plan the store".into())?;
    let networks = spec.networks().act(|| "plan the network".into())?;
    let mut command = match spec.store {
        StoreKind::Embedded => {
            let mut command = own_program()?;
            command.args(["store", "serve", "--listen", &address, "--insecure"]);
            let networks: Vec<String> = networks.iter().map(ToString::to_string).collect();
            command.args(["--network", &networks.join(","), "--backend", spec.backend.name()]);
            command.arg("--data").arg(data);
            command
        }
        StoreKind::Etcd => {
            let url = spec.store_url().act(|| "plan the store".into())?;
            let mut command = program("etcd");
            command.arg("--data-dir").arg(data).args(["--listen-client-urls", &url, "--advertise-client-urls", &url]);
            command.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
            command
        }
    };
    command.env("NOTIFY_SOCKET", notify.path());
    let pid = children.spawn(&underlay.netns, &mut command, &log, None).map_err(|error| missing(spec.store, &error))?;
    Ok(StoreProcess { pid, notify, log, address, config: NetworkConfig::default_json(&networks, spec.backend.name()) })
}

impl StoreProcess {
    /// Waits until it answers and has the network config; gives its address.
    pub(crate) fn ready(self, spec: &Spec, underlay: &Place, children: &Children) -> Result<String, LabError> {
        let answers = |said: bool| {
            let connected = underlay.netns.run(|| TcpStream::connect(&self.address).is_ok());
            said || connected.unwrap_or(false)
        };
        if !self.notify.wait(PATIENCE, || children.is_alive(self.pid), answers) {
            return Err(self.failed("the store does not answer"));
        }
        if spec.store == StoreKind::Etcd {
            let url = spec.store_url().act(|| "plan the store".into())?;
            let mut put = program("etcdctl");
            put.env("ETCDCTL_API", "3").args(["--endpoints", &url, "put", CONFIG_KEY, &self.config]);
            let pid =
                children.spawn(&underlay.netns, &mut put, &self.log, None).map_err(|e| missing(spec.store, &e))?;
            if !children.wait(pid, PATIENCE) || !children.succeeded(pid) {
                return Err(self.failed("etcdctl cannot write the network config"));
            }
        }
        Ok(self.address)
    }

    fn failed(&self, what: &str) -> LabError {
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let last = said.lines().rfind(|line| line.starts_with("error:")).or(said.lines().last());
        LabError::new("store-failed", format!("{what}: {}", last.unwrap_or("it said nothing")))
    }
}

fn missing(store: StoreKind, error: &std::io::Error) -> LabError {
    let failed = LabError::new("store-failed", format!("start the store: {error}"));
    match store {
        StoreKind::Embedded => failed,
        StoreKind::Etcd => {
            failed.hint("--store etcd needs the programs etcd and etcdctl (Debian: etcd-server, etcd-client)")
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "--store etcd is there to run a stock etcd")]
fn program(name: &str) -> Command {
    Command::new(name)
}
