//! A node for tests: an agent of the built binary on a [`Host`], with its files in a folder of its own.

use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::net::{Bed, Host};
use crate::{bin, eventually};

/// A child of the test: told to end, then waited for.
#[derive(Debug)]
pub struct Daemon(Child);

impl Daemon {
    /// This child.
    pub(crate) fn of(child: Child) -> Daemon {
        Daemon(child)
    }

    /// Waits until it ends by itself; gives the exit code, if it was one.
    pub fn wait(mut self) -> Option<i32> {
        self.0.wait().unwrap().code()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process(Pid::from_child(&self.0), signal);
    }

    /// Stops it, and waits until every thread of it stands still: one takes the signal, and tells the others.
    pub fn hold(&self) {
        self.signal(Signal::STOP);
        eventually("every thread has stopped", || {
            let mut tasks = std::fs::read_dir(format!("/proc/{}/task", self.pid())).unwrap().flatten();
            let state = |path: PathBuf| {
                let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
                stat.rsplit_once(") ").is_none_or(|(_, rest)| rest.starts_with('T'))
            };
            if tasks.all(|task| state(task.path())) { Ok(()) } else { Err(()) }
        });
    }

    /// Sends a signal and waits for the end; gives the exit code, if it was one.
    pub fn end(mut self, signal: Signal) -> Option<i32> {
        self.signal(signal);
        self.0.wait().unwrap().code()
    }

    /// Its PID.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal(Signal::TERM);
        let _ = self.0.wait();
    }
}

/// A host with `eth0` on a wire, a store of its own on loopback, and what an agent there needs.
#[derive(Debug)]
pub struct Node {
    store: Option<Daemon>,
    /// The host.
    pub host: Host,
    /// The other end of its wire.
    pub other: Host,
    dir: PathBuf,
    /// Without root it holds the user namespace that the hosts stand in: it goes last.
    bed: Bed,
}

/// The network config that a test starts with.
pub const CONFIG: &str = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#;

impl Node {
    /// `eth0` is 10.168.0.2/24, the embedded store serves, and its config is [`CONFIG`].
    pub fn new(bed: Bed, dir: &Path) -> Node {
        let (host, other) = (bed.host("node"), bed.host("other"));
        bed.wire(&host, "eth0", &other, "eth0");
        host.ip("addr add 10.168.0.2/24 dev eth0");
        other.ip("addr add 10.168.0.3/24 dev eth0");
        let mut node = Node { store: None, host, other, dir: dir.to_owned(), bed };
        node.start_store();
        node.put("config", CONFIG);
        node
    }

    /// A container: a namespace with a loopback device.
    pub fn container(&self, name: &str) -> Host {
        self.bed.host(name)
    }

    /// Starts the embedded store on the host's loopback.
    pub fn start_store(&mut self) {
        let mut command = self.host.command(bin("twill"));
        command.args(["store", "serve", "--data"]).arg(self.dir.join("store"));
        self.store = Some(spawn(command, &self.dir.join("store.log")));
        eventually("the store answers", || self.twill("store ls").1.map_err(|e| (e, self.log("store.log"))));
    }

    /// Kills the store.
    pub fn kill_store(&mut self) {
        if let Some(store) = self.store.take() {
            store.end(Signal::KILL);
        }
    }

    /// Starts an agent; gives it back when it has written subnet.env.
    pub fn agent(&self, flags: &str) -> Daemon {
        let _ = std::fs::remove_file(self.dir.join("subnet.env"));
        let daemon = self.agent_at_once(flags);
        eventually("the agent writes subnet.env", || {
            std::fs::read_to_string(self.dir.join("subnet.env")).map_err(|_| self.log("agent.log"))
        });
        daemon
    }

    /// Starts an agent, whatever becomes of it.
    pub fn agent_at_once(&self, flags: &str) -> Daemon {
        let mut command = self.host.command(bin("twill"));
        command.args(["agent", "--iface", "eth0"]).args(flags.split_whitespace());
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
            command.arg(flag).arg(self.dir.join(name));
        }
        spawn(command, &self.dir.join("agent.log"))
    }

    /// Runs `twill WORDS` on the host with this node's folders where the command takes them; gives exit code and stdout.
    pub fn twill(&self, words: &str) -> (Option<i32>, Result<String, String>) {
        let out = self.try_twill(words);
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let good = out.status.success() || out.status.code() == Some(3);
        (out.status.code(), if good { Ok(text(out.stdout)) } else { Err(text(out.stderr)) })
    }

    fn try_twill(&self, words: &str) -> Output {
        let mut command = self.host.command(bin("twill"));
        command.args(words.split_whitespace());
        command.env("TWILL_RUN_DIR", self.dir.join("run")).env("TWILL_STATE_DIR", self.dir.join("state"));
        command.env("TWILL_SUBNET_FILE", self.dir.join("subnet.env")).env("TWILL_IFACE", "eth0").stdin(Stdio::null());
        command.output().unwrap()
    }

    /// `twill WORDS -o json`, which must work.
    pub fn twill_json(&self, words: &str) -> Value {
        let (code, text) = self.twill(&format!("{words} -o json"));
        serde_json::from_str(&text.unwrap_or_else(|e| panic!("twill {words}: {code:?} {e}"))).unwrap()
    }

    /// `status`, as soon as the agent listens.
    pub fn status(&self) -> Value {
        eventually("the agent answers", || match self.twill("status -o json").1 {
            Ok(text) => Ok(serde_json::from_str(&text).unwrap()),
            Err(error) => Err((error, self.log("agent.log"))),
        })
    }

    /// Waits until `status` has a finding of this code; gives it.
    pub fn finding(&self, code: &str) -> Value {
        eventually(&format!("status finds {code}"), || {
            let status = self.status();
            let found = status["findings"].as_array().unwrap().iter().find(|f| f["code"] == code).cloned();
            found.ok_or_else(|| (status.to_string(), self.log("agent.log")))
        })
    }

    /// Writes `<prefix>/KEY` with a stock etcdctl.
    pub fn put(&self, key: &str, value: &str) {
        let out = self.etcdctl(&["put", &format!("/coreos.com/network/{key}"), value]);
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    }

    /// Deletes `<prefix>/KEY` with a stock etcdctl.
    pub fn delete(&self, key: &str) {
        assert!(self.etcdctl(&["del", &format!("/coreos.com/network/{key}")]).status.success());
    }

    /// Names and values below `<prefix>/subnets/`, by a stock etcdctl.
    pub fn leases(&self) -> Vec<(String, String)> {
        let out = self.etcdctl(&["get", "--prefix", "/coreos.com/network/subnets/"]);
        let text = String::from_utf8(out.stdout).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        lines.chunks(2).map(|pair| (pair[0].rsplit('/').next().unwrap().to_owned(), pair[1].to_owned())).collect()
    }

    /// Runs a stock etcdctl against the store.
    pub fn etcdctl(&self, words: &[&str]) -> Output {
        self.host.command("etcdctl").env("ETCDCTL_API", "3").args(words).output().unwrap()
    }

    /// A flannel lease for peer `n`: subnet 10.1.n.0/24 at 10.168.0.n.
    pub fn put_peer(&self, n: u8) {
        let value = format!(
            r#"{{"PublicIP":"10.168.0.{n}","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:{n:02x}"}}}}"#
        );
        self.put(&format!("subnets/10.1.{n}.0-24"), &value);
    }

    /// Waits until route, neighbour and forwarding entry of peer `n` are there (or, with `false`, are gone), as `ip` and `bridge` show.
    pub fn await_peer(&self, n: u8, there: bool) {
        eventually(&format!("peer {n} there: {there}"), || {
            let seen = self.peer_lines(n);
            if seen.iter().all(|found| *found == there) { Ok(()) } else { Err((seen, self.log("agent.log"))) }
        });
    }

    fn peer_lines(&self, n: u8) -> [bool; 3] {
        let route = self.host.try_run(&format!("ip route show 10.1.{n}.0/24"));
        let neigh = self.host.try_run("ip neigh show dev flannel.1");
        let fdb = self.host.try_run("bridge fdb show dev flannel.1");
        let has = |out: Output, text: &str| String::from_utf8_lossy(&out.stdout).contains(text);
        [
            has(route, &format!("via 10.1.{n}.0 dev flannel.1")),
            has(neigh, &format!("10.1.{n}.0 lladdr 02:00:00:00:00:{n:02x} PERMANENT")),
            has(fdb, &format!("02:00:00:00:00:{n:02x} dst 10.168.0.{n} self permanent")),
        ]
    }

    /// Packets that rules of our table's `chain` with all these words have dropped.
    pub fn dropped(&self, chain: &str, words: &[&str]) -> u64 {
        let rules = self.host.run(&format!("nft list chain inet twill {chain}"));
        let hits = |line: &str| line.ends_with(" drop") && words.iter().all(|word| line.contains(word));
        let packets = |line: &str| line.split("counter packets ").nth(1)?.split(' ').next()?.parse::<u64>().ok();
        rules.lines().filter(|line| hits(line)).map(|line| packets(line).unwrap()).sum()
    }

    /// A file of this node.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// What a daemon has said.
    pub fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.join(name)).unwrap_or_default()
    }
}

/// Starts a daemon; what it says goes behind what stands in `log`.
pub fn spawn(mut command: std::process::Command, log: &Path) -> Daemon {
    let file = std::fs::File::options().create(true).append(true).open(log).unwrap();
    Daemon(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file).spawn().unwrap())
}
