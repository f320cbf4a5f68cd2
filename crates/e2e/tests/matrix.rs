//! Family × backend × foreign firewall, in pairs: what leaves the network is masqueraded, what stays is not.
//!
//! ```text
//!   container 1 10.1.15.2, fd00:1:0:f::2 ─ cni0 ─ node 1 10.168.0.2, fd00:168::2 ═ eth0 ═ node 2 10.168.0.3, fd00:168::3 ─ cni0 ─ container 2
//!                                                 the foreign firewall, store :2379                      10.1.16.2, fd00:1:0:10::2
//! ```

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use twill_e2e::foreign::Foreign;
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::Daemon;
use twill_e2e::site::arrives;
use twill_e2e::{bin, eventually, grants, installed, node};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Families {
    V4,
    V6,
    Both,
}

/// When the foreign firewall starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    Before,
    After,
}

use Families::{Both, V4, V6};
use Order::{After, Before};

impl Families {
    /// Each in use, IPv4 first.
    fn each(self) -> Vec<bool> {
        [true, false].into_iter().filter(|v4| self == Both || (self == V4) == *v4).collect()
    }
}

/// What node or container `n` has in a family.
fn underlay(n: u8, v4: bool) -> String {
    if v4 { format!("10.168.0.{}", n + 1) } else { format!("fd00:168::{}", n + 1) }
}
fn subnet(n: u8, v4: bool) -> String {
    if v4 { format!("10.1.{}", n + 14) } else { format!("fd00:1:0:{:x}:", n + 14) }
}
fn container(n: u8, v4: bool) -> String {
    format!("{}{}2", subnet(n, v4), if v4 { "." } else { ":" })
}

/// Two nodes, their containers and agents.
struct Pair {
    families: Families,
    endpoint: String,
    nodes: [Host; 2],
    containers: [Host; 2],
    agents: Vec<Daemon>,
    _store: Daemon,
    dir: PathBuf,
    _bed: Bed,
}

impl Pair {
    fn new(bed: Bed, dir: &Path, families: Families, backend: &str) -> Pair {
        let nodes = [bed.host("node1"), bed.host("node2")];
        let containers = [bed.host("container1"), bed.host("container2")];
        bed.wire(&nodes[0], "eth0", &nodes[1], "eth0");
        for (n, node) in (1..).zip(&nodes) {
            for v4 in families.each() {
                let len = if v4 { "24" } else { "64 nodad" };
                node.ip(&format!("addr add {}/{len} dev eth0", underlay(n, v4))
                    .replace("64 nodad dev eth0", "64 dev eth0 nodad"));
            }
        }
        let first = underlay(1, families.each()[0]);
        let address = if families == V6 { format!("[{first}]:2379") } else { format!("{first}:2379") };
        let endpoint = format!("http://{address}");
        let mut command = nodes[0].command(bin("twill"));
        command.args(["store", "serve", "--insecure", "--listen", &address, "--data"]).arg(dir.join("store"));
        let store = node::spawn(command, &dir.join("store.log"));
        let mut config =
            json!({"EnableIPv4": families != V6, "EnableIPv6": families != V4, "Backend": {"Type": backend}});
        for v4 in families.each() {
            config[if v4 { "Network" } else { "IPv6Network" }] = if v4 { "10.1.0.0/16" } else { "fd00:1::/48" }.into();
        }
        let pair = Pair {
            families,
            endpoint,
            nodes,
            containers,
            agents: Vec::new(),
            _store: store,
            dir: dir.to_owned(),
            _bed: bed,
        };
        eventually("the store takes the config", || {
            let mut command = pair.nodes[0].command("etcdctl");
            command.env("ETCDCTL_API", "3").args(["--endpoints", &pair.endpoint, "put", "/coreos.com/network/config"]);
            let out = command.arg(config.to_string()).output().unwrap();
            if out.status.success() { Ok(()) } else { Err(out) }
        });
        pair
    }

    fn file(&self, n: u8, name: &str) -> PathBuf {
        self.dir.join(format!("node{n}-{name}"))
    }

    fn start_agents(&mut self) {
        for n in [1, 2] {
            let mut command = self.nodes[usize::from(n) - 1].command(bin("twill"));
            command.args(["agent", "--iface", "eth0", "--store", &self.endpoint, "--subnet"]);
            let nets = self
                .families
                .each()
                .into_iter()
                .map(|v4| format!("{}{}", subnet(n, v4), if v4 { ".0/24" } else { ":/64" }));
            command.arg(nets.collect::<Vec<_>>().join(","));
            for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
                command.arg(flag).arg(self.file(n, name));
            }
            self.agents.push(node::spawn(command, &self.file(n, "log")));
        }
        for n in [1, 2] {
            eventually("the agent writes subnet.env", || {
                std::fs::read_to_string(self.file(n, "subnet.env"))
                    .map_err(|_| std::fs::read_to_string(self.file(n, "log")))
            });
            self.plug(n);
        }
    }

    /// The container behind a bridge, as a plugin makes it.
    fn plug(&self, n: u8) {
        let (node, inside) = (&self.nodes[usize::from(n) - 1], &self.containers[usize::from(n) - 1]);
        let env = std::fs::read_to_string(self.file(n, "subnet.env")).unwrap();
        let mtu = env.lines().find_map(|line| line.strip_prefix("FLANNEL_MTU=")).unwrap();
        node.ip("link add cni0 type bridge");
        node.ip(&format!("link add veth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}", inside.pid()));
        node.ip("link set cni0 up");
        node.ip("link set veth0 master cni0 up");
        inside.ip("link set eth0 up");
        for v4 in self.families.each() {
            let (len, own) = if v4 { ("24", ".1") } else { ("64", ":1") };
            let nodad = if v4 { "" } else { "nodad" };
            node.ip(&format!("addr add {}{own}/{len} dev cni0 {nodad}", subnet(n, v4)));
            inside.ip(&format!("addr add {}/{len} dev eth0 {nodad}", container(n, v4)));
            inside.ip(&format!("route add default via {}{own} dev eth0", subnet(n, v4)));
        }
    }

    fn status(&self, n: u8) -> Value {
        eventually("the agent answers", || {
            let mut command = self.nodes[usize::from(n) - 1].command(bin("twill"));
            command.args(["status", "-o", "json"]).env("TWILL_RUN_DIR", self.file(n, "run"));
            let out = command.output().unwrap();
            serde_json::from_slice(&out.stdout).map_err(|_| (out, std::fs::read_to_string(self.file(n, "log"))))
        })
    }

    /// Each way and in each family: the packet that arrives, and what the first node's connection tracking knows of it.
    fn right(&self) {
        for v4 in self.families.each() {
            let ip = if v4 { "IP" } else { "IP6" };
            let (own, other, beyond) = (container(1, v4), container(2, v4), underlay(2, v4));
            let more = || format!("{}\n{}", self.nodes[0].run("nft list ruleset"), self.status(1));
            let stays = arrives(&self.containers[0], &other, &self.containers[1], "eth0", more);
            assert!(stays.contains(&format!("{ip} {own} > {other}: ")), "{stays}");
            self.tracked(v4, &own, &other, &own);
            let back = arrives(&self.containers[1], &own, &self.containers[0], "eth0", more);
            assert!(back.contains(&format!("{ip} {other} > {own}: ")), "{back}");
            self.tracked(v4, &other, &own, &other);
            let leaves = arrives(&self.containers[0], &beyond, &self.nodes[1], "eth0", more);
            assert!(leaves.contains(&format!("{ip} {} > {beyond}: ", underlay(1, v4))), "{leaves}");
            self.tracked(v4, &own, &beyond, &underlay(1, v4));
        }
    }

    /// The connections from `src` to `dst` are answered to `answered`, all of them.
    fn tracked(&self, v4: bool, src: &str, dst: &str, answered: &str) {
        let words = ["-L", "-f", if v4 { "ipv4" } else { "ipv6" }, "-s", src, "-d", dst];
        let out = self.nodes[0].command("conntrack").args(words).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let of_one =
            |line: &str| line.rsplit("dst=").next().is_some_and(|rest| rest.starts_with(&format!("{answered} ")));
        assert!(!text.is_empty() && text.lines().all(of_one), "answered to {answered}: {text}");
    }
}

/// The rows of one foreign firewall.
fn rows(foreign: Option<Foreign>, rows: [(Families, &str, Order); 3]) {
    let programs = ["etcdctl", "nft", "tcpdump", "conntrack"];
    if !programs.iter().chain(foreign.map_or(&[][..], Foreign::needs)).all(|program| installed(program)) {
        return;
    }
    if foreign.is_some_and(Foreign::needs_root) && !rustix::process::geteuid().is_root() {
        return println!("SKIP: {foreign:?} needs root");
    }
    for (families, backend, order) in rows {
        println!("{foreign:?} {families:?} {backend} {order:?}");
        if !grants(backend) {
            continue;
        }
        let Some(bed) = Bed::new() else { return };
        let dir = tempfile::tempdir().unwrap();
        let mut pair = Pair::new(bed, dir.path(), families, backend);
        let start = |pair: &Pair| foreign.map(|foreign| foreign.start(&pair.nodes[0], dir.path()));
        let before = (order == Before).then(|| start(&pair));
        pair.start_agents();
        if order == After {
            pair.right();
        }
        let _running = before.unwrap_or_else(|| start(&pair));
        if matches!(foreign, Some(Foreign::IptablesLegacy | Foreign::DockerLegacy)) {
            let number = let_pass(&pair);
            // Docker leaves the policy alone where the host forwards already, and where it has no IPv6.
            let of_docker = foreign == Some(Foreign::DockerLegacy) && order == After;
            assert!(number > 0 || of_docker, "nothing drops");
        }
        pair.right();
        // What is left in place is no false alarm.
        eventually("status names nothing", || {
            let status = pair.status(1);
            if status["findings"] == json!([]) { Ok(()) } else { Err(status.to_string()) }
        });
    }
}

/// Nothing of legacy iptables is changed: what is to be typed is said, for each family that drops. Gives how many do.
fn let_pass(pair: &Pair) -> usize {
    let drops = |v4: &bool| {
        let program = if *v4 { "iptables-legacy" } else { "ip6tables-legacy" };
        pair.nodes[0].run(&format!("{program} -S FORWARD")).contains("-P FORWARD DROP")
    };
    let number = pair.families.each().iter().filter(|v4| drops(v4)).count();
    let findings = eventually("status names the chains", || {
        let status = pair.status(1);
        let all = status["findings"].as_array().unwrap().iter().filter(|f| f["code"] == "legacy-drops-forward");
        let all: Vec<Value> = all.cloned().collect();
        if all.len() == number { Ok(all) } else { Err((status.to_string(), number)) }
    });
    for finding in &findings {
        pair.nodes[0].feed("sh", finding["fix"].as_str().unwrap());
    }
    number
}

#[test]
fn alone() {
    rows(None, [(V4, "udp", Before), (V6, "vxlan", Before), (Both, "udp", Before)]);
}

#[test]
fn beside_iptables_nft() {
    rows(Some(Foreign::IptablesNft), [(V4, "vxlan", Before), (V6, "udp", After), (Both, "vxlan", After)]);
}

#[test]
fn beside_legacy_iptables() {
    rows(Some(Foreign::IptablesLegacy), [(V4, "udp", After), (V6, "vxlan", Before), (Both, "udp", Before)]);
}

#[test]
fn beside_firewalld() {
    rows(Some(Foreign::Firewalld), [(V4, "vxlan", Before), (V6, "udp", Before), (Both, "vxlan", After)]);
}

#[test]
fn beside_docker() {
    rows(Some(Foreign::Docker), [(V4, "udp", Before), (V6, "vxlan", After), (Both, "udp", After)]);
}

#[test]
fn beside_docker_with_legacy_iptables() {
    rows(Some(Foreign::DockerLegacy), [(V6, "vxlan", Before), (Both, "udp", Before), (V4, "udp", After)]);
}

#[test]
fn beside_kube_proxy() {
    rows(Some(Foreign::KubeProxy), [(V4, "vxlan", Before), (V6, "udp", After), (Both, "udp", Before)]);
}
