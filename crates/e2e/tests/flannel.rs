//! Beside the real flannel: a cluster of both moves node by node, and back.
//!
//! ```text
//!   store 10.168.0.1, fd00:168::1 ─ br0 ─┬─ eth0 10.168.0.2, fd00:168::2 ─ one ─ cni0: the first addresses of its subnets
//!      (ours, for both)                  └─ eth0 10.168.0.3, fd00:168::3 ─ two ─ cni0
//! ```

use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::flannel::flanneld;
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::{Daemon, spawn};
use twill_e2e::ping::Ping;
use twill_e2e::{bin, eventually, grants, installed};

const STORE: &str = "http://10.168.0.1:2379";

struct Cluster {
    nodes: [Host; 2],
    _store: Daemon,
    middle: Host,
    dir: tempfile::TempDir,
    _bed: Bed,
}

impl Cluster {
    fn new(config: &str) -> Option<Cluster> {
        let bed = Bed::new()?;
        if !["flanneld", "etcdctl", "ping"].into_iter().all(installed) {
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let middle = bed.host("store");
        let nodes = [bed.host("one"), bed.host("two")];
        middle.ip("link add br0 type bridge");
        let address = |host: &Host, dev: &str, n: usize| {
            host.ip(&format!("addr add 10.168.0.{n}/24 dev {dev}"));
            host.ip(&format!("addr add fd00:168::{n}/64 dev {dev} nodad"));
        };
        address(&middle, "br0", 1);
        middle.ip("link set br0 up");
        for (n, node) in nodes.iter().enumerate() {
            bed.wire(node, "eth0", &middle, &format!("p{n}"));
            middle.ip(&format!("link set p{n} master br0"));
            address(node, "eth0", n + 2);
            std::fs::create_dir(dir.path().join(node.name.as_str())).unwrap();
        }
        let mut store = middle.command(bin("twill"));
        store
            .args(["store", "serve", "--listen", "10.168.0.1:2379", "--insecure", "--data"])
            .arg(dir.path().join("store"));
        let store = spawn(store, &dir.path().join("store.log"));
        let cluster = Cluster { nodes, _store: store, middle, dir, _bed: bed };
        eventually("the store takes the config", || {
            let out = cluster.etcdctl(&["put", "/coreos.com/network/config", config]);
            if out.status.success() { Ok(()) } else { Err(out) }
        });
        Some(cluster)
    }

    fn etcdctl(&self, words: &[&str]) -> std::process::Output {
        self.middle
            .command("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", STORE])
            .args(words)
            .output()
            .unwrap()
    }

    fn file(&self, n: usize, name: &str) -> PathBuf {
        self.dir.path().join(&self.nodes[n].name).join(name)
    }

    fn log(&self, n: usize, name: &str) -> String {
        std::fs::read_to_string(self.file(n, name)).unwrap_or_default()
    }

    fn flannel(&self, n: usize) -> Daemon {
        flanneld("flanneld", &self.nodes[n], STORE, &self.dir.path().join(&self.nodes[n].name), "")
    }

    /// Starts our agent on what is there, and waits until nothing is left for it to do.
    fn twill(&self, n: usize) -> Daemon {
        let folders = [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")];
        let mut agent = self.nodes[n].command(bin("twill"));
        agent.args(["agent", "--store", STORE, "--iface", "eth0"]);
        for (flag, name) in folders {
            agent.arg(flag).arg(self.file(n, name));
        }
        let agent = spawn(agent, &self.file(n, "agent.log"));
        eventually("the agent has settled, with one peer", || {
            let ask = |words: &[&str]| {
                let out = self.command(n).args(words).args(["-o", "json"]).output().unwrap();
                serde_json::from_slice::<Value>(&out.stdout).unwrap_or_default()
            };
            let (status, plan) = (ask(&["status"]), ask(&["plan"]));
            let settled = status["state"] == "running" && status["peers"] == 1 && plan["steps"] == json!([]);
            if settled { Ok(()) } else { Err(format!("{status} {plan} {}", self.log(n, "agent.log"))) }
        });
        agent
    }

    /// Our command line beside the agent of this node.
    fn command(&self, n: usize) -> std::process::Command {
        let mut command = self.nodes[n].command(bin("twill"));
        command.env("TWILL_STORE", STORE).env("TWILL_IFACE", "eth0").env("TWILL_RUN_DIR", self.file(n, "run"));
        command.env("TWILL_STATE_DIR", self.file(n, "state")).env("TWILL_SUBNET_FILE", self.file(n, "subnet.env"));
        command
    }

    fn subnet_env(&self, n: usize) -> String {
        std::fs::read_to_string(self.file(n, "subnet.env")).unwrap()
    }

    /// The first address of the node's subnet, of one family.
    fn gateway(&self, n: usize, v4: bool) -> String {
        let key = if v4 { "FLANNEL_SUBNET=" } else { "FLANNEL_IPV6_SUBNET=" };
        let env = self.subnet_env(n);
        let line = env.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_else(|| panic!("{env}"));
        line.to_owned()
    }

    /// Gives the first addresses to a bridge, as a runtime does.
    fn plug(&self, n: usize, families: &[bool]) {
        let host = &self.nodes[n];
        host.ip("link add cni0 type bridge");
        for v4 in families {
            host.ip(&format!("addr add {} dev cni0{}", self.gateway(n, *v4), if *v4 { "" } else { " nodad" }));
        }
        host.ip("link set cni0 up");
    }

    fn ping(&self, v4: bool) -> Ping {
        let [from, to] = [0, 1].map(|n| self.gateway(n, v4).split('/').next().unwrap().to_owned());
        Ping::start(&self.nodes[0], &from, &to, &self.dir.path().join(format!("ping-{v4}.log")))
    }

    /// Name, index and MAC of each VXLAN device.
    fn tunnels(&self, n: usize) -> Vec<Value> {
        let links = self.nodes[n].json("link show type vxlan");
        let facts = |link: &Value| json!([link["ifname"], link["ifindex"], link["address"]]);
        links.as_array().unwrap().iter().map(facts).collect()
    }

    /// Leases by name.
    fn leases(&self) -> String {
        String::from_utf8(self.etcdctl(&["get", "--prefix", "/coreos.com/network/subnets/", "--keys-only"]).stdout)
            .unwrap()
    }
}

const VXLAN: &str =
    r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;
const UDP: &str = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp"}}"#;

/// A cluster of flannel's, then one of ours, node by node; then one goes back, and over again.
const MOVES: [(usize, bool); 5] = [(0, true), (1, true), (0, false), (1, false), (0, true)];

/// Moves nodes between flannel and Twill while packets pass in these families; gives the pings. `clean`: so goes a node of ours.
fn moves(cluster: &Cluster, families: &[bool], clean: bool) -> Vec<Ping> {
    let mut daemons = [0, 1].map(|n| Some(cluster.flannel(n)));
    for n in 0..2 {
        cluster.plug(n, families);
    }
    let (leases, tunnels) = (cluster.leases(), [0, 1].map(|n| cluster.tunnels(n)));
    let pings: Vec<Ping> = families.iter().map(|v4| cluster.ping(*v4)).collect();
    for (n, ours) in MOVES {
        daemons[n].take().unwrap().end(Signal::TERM);
        if !ours && clean {
            let out = cluster.command(n).arg("clean").output().unwrap();
            assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
        daemons[n] = Some(if ours { cluster.twill(n) } else { cluster.flannel(n) });
        let what = format!("with {} on node {n}", if ours { "twill" } else { "flannel" });
        pings.iter().for_each(|ping| ping.more(&what));
    }
    assert_eq!(cluster.leases(), leases, "each node keeps its subnets");
    assert_eq!([0, 1].map(|n| cluster.tunnels(n)), tunnels, "no VXLAN device was made anew");
    pings
}

#[test]
fn a_vxlan_cluster_moves_node_by_node_and_back_and_loses_no_packet() {
    let Some(cluster) = Cluster::new(VXLAN) else { return };
    for ping in moves(&cluster, &[true, false], false) {
        ping.end("from flannel to twill and back, node by node");
    }
}

#[test]
fn a_udp_cluster_moves_node_by_node_and_back() {
    let Some(cluster) = Cluster::new(UDP).filter(|_| grants("udp")) else { return };
    // Flannel's TUN ends with it, and while ours stands flannel gets no flannel0: what is sent meanwhile is lost.
    drop(moves(&cluster, &[true], true));
}

#[test]
fn nothing_starts_beside_flannel_and_nothing_is_touched() {
    let Some(cluster) = Cluster::new(VXLAN) else { return };
    let _flannels = [0, 1].map(|n| cluster.flannel(n));
    let routes = || cluster.nodes[0].json("-N route show dev flannel.1");
    let peers = eventually("flannel reaches its peer", || Some(routes()).filter(|r| r != &json!([])).ok_or(()));
    for (words, code, says) in
        [(&["agent", "--check"][..], 3, "stop it first"), (&["agent"], 1, "runs in this network namespace")]
    {
        let out = cluster.command(0).args(words).output().unwrap();
        let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
        assert!(out.status.code() == Some(code) && said.contains(says), "{words:?}: {said}");
    }
    // Where its containers are is nobody else's.
    let env = cluster.log(0, "subnet.env");
    let first = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).unwrap();
    cluster.nodes[0].ip("link add cni0 up type bridge");
    cluster.nodes[0].ip(&format!("addr add {first} dev cni0"));
    let out = cluster.command(0).args(["agent", "--check", "-o", "json"]).output().unwrap();
    let found = serde_json::from_slice::<Value>(&out.stdout).unwrap()["findings"].take();
    let codes: Vec<&str> = found.as_array().unwrap().iter().filter_map(|f| f["code"].as_str()).collect();
    assert_eq!(codes, ["flanneld-running"], "{found}");
    // What an agent would change can be asked beside it.
    let out = cluster.command(0).args(["plan"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(routes(), peers);
}
