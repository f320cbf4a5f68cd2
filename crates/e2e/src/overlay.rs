//! Two nodes of the udp backend and a container on each.
//!
//! ```text
//!   container 100.96.1.2 ─ docker0 ─ node1 10.168.0.2 ══ eth0 ══ node2 10.168.0.3 ─ docker0 ─ container 100.96.2.2
//!                                    store :2379, agent          agent
//! ```

use std::path::{Path, PathBuf};
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::Value;

use crate::net::{Bed, Host};
use crate::node::{Daemon, spawn};
use crate::{bin, eventually};

/// The network config that the nodes start with.
pub const CONFIG: &str = r#"{"Network":"100.96.0.0/16","Backend":{"Type":"udp"}}"#;

/// Two hosts on one wire, with a store.
#[derive(Debug)]
pub struct Overlay {
    /// Node 1 and node 2.
    pub sites: Vec<Site>,
    store: Option<Daemon>,
    dir: PathBuf,
    /// Without root it holds the user namespace that the hosts stand in: it goes last.
    bed: Bed,
}

/// A host, its container and its agent.
#[derive(Debug)]
pub struct Site {
    /// 1 or 2: the host is 10.168.0.(N+1), its subnet 100.96.N.0/24.
    pub number: u8,
    /// The host.
    pub host: Host,
    /// 100.96.N.2 behind the host's `docker0`.
    pub container: Host,
    agent: Option<Daemon>,
    dir: PathBuf,
}

impl Overlay {
    /// Hosts, containers and the store; no agent yet.
    pub fn new(bed: Bed, dir: &Path) -> Overlay {
        let sites: Vec<Site> = [1, 2].into_iter().map(|number| Site::new(&bed, number, dir)).collect();
        bed.wire(&sites[0].host, "eth0", &sites[1].host, "eth0");
        for site in &sites {
            site.host.ip(&format!("addr add 10.168.0.{}/24 dev eth0", site.number + 1));
        }
        let mut overlay = Overlay { sites, store: None, dir: dir.to_owned(), bed };
        overlay.start_store();
        let put = ["put", "/coreos.com/network/config", CONFIG];
        let out = overlay.etcdctl(&put);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        overlay
    }

    /// With both agents running and both containers reaching each other.
    pub fn running(bed: Bed, dir: &Path) -> Overlay {
        Overlay::running_with(bed, dir, "")
    }

    /// The same with more flags for the agents.
    pub fn running_with(bed: Bed, dir: &Path, flags: &str) -> Overlay {
        let (overlay, ()) = Overlay::running_on(bed, dir, flags, |_, _| ());
        overlay.await_both_ways();
        overlay
    }

    /// With both agents running, on an underlay that `change` has changed before.
    pub fn running_on<T>(bed: Bed, dir: &Path, flags: &str, change: impl FnOnce(&Bed, &Overlay) -> T) -> (Overlay, T) {
        let mut overlay = Overlay::new(bed, dir);
        let changed = change(&overlay.bed, &overlay);
        for number in [1, 2] {
            overlay.site_mut(number).start(flags);
            overlay.site(number).attach();
        }
        (overlay, changed)
    }

    /// Waits until each container has an answer from the other.
    pub fn await_both_ways(&self) {
        for (from, to) in [(1, 2), (2, 1)] {
            eventually(&format!("container {from} reaches container {to}"), || {
                let out = self.site(from).container.try_run(&format!("ping -c 1 -W 1 100.96.{to}.2"));
                let logs = || (self.site(1).log(), self.site(2).log());
                if out.status.success() {
                    Ok(())
                } else {
                    Err((String::from_utf8_lossy(&out.stdout).into_owned(), logs()))
                }
            });
        }
    }

    /// Node 1 or node 2.
    pub fn site(&self, number: u8) -> &Site {
        &self.sites[usize::from(number) - 1]
    }

    /// Node 1 or node 2.
    pub fn site_mut(&mut self, number: u8) -> &mut Site {
        &mut self.sites[usize::from(number) - 1]
    }

    /// Starts the embedded store on node 1.
    pub fn start_store(&mut self) {
        let mut command = self.site(1).host.command(bin("twill"));
        command
            .args(["store", "serve", "--insecure", "--listen", "0.0.0.0:2379", "--data"])
            .arg(self.dir.join("store"));
        self.store = Some(spawn(command, &self.dir.join("store.log")));
        eventually("the store answers", || {
            let out = self.etcdctl(&["get", "/"]);
            if out.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&out.stderr).into_owned()) }
        });
    }

    /// Kills the store.
    pub fn kill_store(&mut self) {
        if let Some(store) = self.store.take() {
            store.end(Signal::KILL);
        }
    }

    /// Runs a stock etcdctl against the store.
    pub fn etcdctl(&self, words: &[&str]) -> std::process::Output {
        self.site(1).host.command("etcdctl").env("ETCDCTL_API", "3").args(words).output().unwrap()
    }

    /// The value of the lease of a node's subnet.
    pub fn lease(&self, number: u8) -> String {
        let key = format!("/coreos.com/network/subnets/100.96.{number}.0-24");
        let out = self.etcdctl(&["get", "--print-value-only", &key]);
        String::from_utf8(out.stdout).unwrap().trim().to_owned()
    }
}

impl Site {
    fn new(bed: &Bed, number: u8, dir: &Path) -> Site {
        let dir = dir.join(format!("node{number}"));
        std::fs::create_dir_all(&dir).unwrap();
        let (host, container) = (bed.host(&format!("node{number}")), bed.host(&format!("container{number}")));
        bed.wire(&host, "docker0", &container, "eth0");
        container.ip(&format!("addr add 100.96.{number}.2/24 dev eth0"));
        for (inside, device) in [(&host, "docker0"), (&container, "eth0")] {
            inside.ip(&format!("link set {device} mtu 1472"));
        }
        Site { number, host, container, agent: None, dir }
    }

    /// What docker does with subnet.env: the bridge gets its address.
    pub fn attach(&self) {
        self.host.ip(&format!("addr add 100.96.{}.1/24 dev docker0", self.number));
        self.container.ip(&format!("route replace default via 100.96.{}.1", self.number));
    }

    /// Starts the agent, and waits until it has written subnet.env.
    pub fn start(&mut self, flags: &str) {
        let _ = std::fs::remove_file(self.file("subnet.env"));
        self.start_at_once(flags);
        eventually("the agent writes subnet.env", || {
            std::fs::read_to_string(self.file("subnet.env")).map_err(|_| self.log())
        });
    }

    /// Starts the agent, whatever becomes of it.
    pub fn start_at_once(&mut self, flags: &str) {
        let command = self.agent_command(flags);
        self.agent = Some(spawn(command, &self.file("agent.log")));
    }

    /// Starts the agent by a command of the test's own.
    pub fn start_command(&mut self, command: &mut std::process::Command) {
        let log = std::fs::File::options().create(true).append(true).open(self.file("agent.log")).unwrap();
        self.agent = Some(Daemon::of(command.stderr(log).spawn().unwrap()));
    }

    /// The process that the test started.
    pub fn agent_pid(&self) -> Option<u32> {
        self.agent.as_ref().map(Daemon::pid)
    }

    /// The agent, as [`Site::start`] starts it.
    pub fn agent_command(&self, flags: &str) -> std::process::Command {
        let mut command = self.host.command(bin("twill"));
        command.args(["agent", "--iface", "eth0", "--store", "http://10.168.0.2:2379"]).args(flags.split_whitespace());
        command.arg("--subnet").arg(format!("100.96.{}.0/24", self.number));
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
            command.arg(flag).arg(self.file(name));
        }
        command
    }

    /// Sends the agent a signal and waits for its end.
    pub fn stop(&mut self, signal: Signal) -> Option<i32> {
        self.agent.take().and_then(|agent| agent.end(signal))
    }

    /// Takes the running agent out: another one follows it.
    pub fn take_agent(&mut self) -> Option<Daemon> {
        self.agent.take()
    }

    /// Runs `twill WORDS` on the host with this node's folders; gives exit code and stdout, or stderr.
    pub fn twill(&self, words: &str) -> (Option<i32>, Result<String, String>) {
        let mut command = self.host.command(bin("twill"));
        command.args(words.split_whitespace()).stdin(Stdio::null());
        for (name, file) in [("RUN_DIR", "run"), ("STATE_DIR", "state"), ("SUBNET_FILE", "subnet.env")] {
            command.env(format!("TWILL_{name}"), self.file(file));
        }
        let out = command.output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let good = out.status.success() || out.status.code() == Some(3);
        (out.status.code(), if good { Ok(text(out.stdout)) } else { Err(text(out.stderr)) })
    }

    /// `status`, as soon as the agent listens.
    pub fn status(&self) -> Value {
        eventually("the agent answers", || match self.twill("status -o json").1 {
            Ok(text) => Ok(serde_json::from_str(&text).unwrap()),
            Err(error) => Err((error, self.log())),
        })
    }

    /// Packets that the tunnel dropped for one cause.
    pub fn dropped(&self, cause: &str) -> u64 {
        let status = self.status();
        let drops = status["tunnel"]["drops"].as_array().cloned().unwrap_or_default();
        drops.iter().find(|drop| drop["cause"] == cause).map_or(0, |drop| drop["packets"].as_u64().unwrap())
    }

    /// A file of this node.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What the agent has said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.file("agent.log")).unwrap_or_default()
    }
}
