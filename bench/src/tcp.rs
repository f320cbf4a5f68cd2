//! TCP between two containers over VXLAN: a lab's network, and the same built by hand with `ip`, sample by sample in turn; and both with
//! masquerading and without, which is the dearest thing of all that either does for a packet (docs/decisions/0017).

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use twill_e2e::eventually;
use twill_e2e::net::{Bed, Host};
use twill_e2e::node::{Daemon, spawn};

use crate::report::Report;

/// What is carried for each sample: short ones, so that what else the machine does falls on both alike.
const BYTES: &str = "600M";
const STORE: &str = "http://10.168.0.1:2379";
/// Samples of ours, each between two by hand.
const PAIRS: usize = 25;

/// Runs all of them.
pub(crate) fn run(twill: &Path, report: &mut Report) {
    let name = format!("bench{}", std::process::id());
    let up = Command::new(twill).args(["lab", "up", "--name", &name, "-o", "json"]).output().unwrap();
    assert!(up.status.success(), "{}", String::from_utf8_lossy(&up.stderr));
    let lab: Value = serde_json::from_slice(&up.stdout).unwrap();
    let container = |n: usize| lab["nodes"][n]["containers"][0].clone();
    let (from, to) = (container(0), container(1));
    let inside = |c: &Value| {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", c["netns"].as_str().unwrap())).arg("--");
        command
    };
    let (bare, masked, plain) = (Hosts::new(), Hosts::new(), Hosts::new());
    bare.tunnel();
    masked.tunnel();
    masked.masquerade();
    let dir = tempfile::tempdir().unwrap();
    let _agents = plain.agents(twill, dir.path());
    [&bare, &masked, &plain].into_iter().for_each(Hosts::attach);
    let over = |of: &Hosts| iperf(|| of.containers[0].command("env"), || of.containers[1].command("env"), "10.1.16.3");
    let (mut ours, mut without) = (Vec::new(), Vec::new());
    let (mut by_hand, mut masquerading) = (vec![over(&bare)], Vec::new());
    for _ in 0..PAIRS {
        ours.push(iperf(|| wrap(inside(&from)), || wrap(inside(&to)), to["address"].as_str().unwrap()));
        without.push(over(&plain));
        by_hand.push(over(&bare));
        masquerading.push(over(&masked));
    }
    Command::new(twill).args(["lab", "down", "--name", &name]).stdout(Stdio::null()).status().unwrap();
    report.note("TCP over VXLAN by hand (Gbit/s)", &by_hand);
    report.note("TCP over VXLAN by hand, with masquerading by nft (Gbit/s)", &masquerading);
    report.note("TCP over VXLAN by Twill (Gbit/s)", &ours);
    report.note("TCP over VXLAN by Twill, --ip-masq=false (Gbit/s)", &without);
    let around: Vec<f64> = by_hand.windows(2).map(|two| (two[0] + two[1]) / 2.0).collect();
    let beside = |ours: &[f64], of: &[f64]| -> Vec<f64> { ours.iter().zip(of).map(|(ours, of)| ours / of).collect() };
    let rows = [
        ("TCP by Twill, --ip-masq=false, against by hand (×), median", beside(&without, &around)),
        ("TCP by Twill against by hand with masquerading (×), median", beside(&ours, &masquerading)),
        ("TCP by Twill with masquerading against by hand without (×), median", beside(&ours, &around)),
    ];
    rows.iter().for_each(|(what, pairs)| report.at_least(what, pairs, 0.95));
}

fn wrap(mut command: Command) -> Command {
    command.arg("env");
    command
}

/// One sample in Gbit/s, each end on a core of its own: the sender's carries the packets, and nobody moves it.
fn iperf(from: impl Fn() -> Command, to: impl Fn() -> Command, address: &str) -> f64 {
    let address = address.split('/').next().unwrap();
    let mut server = to().args(["taskset", "-c", "1", "iperf3", "-s", "-1"]).stdout(Stdio::null()).spawn().unwrap();
    let answer = loop {
        let out = from().args(["taskset", "-c", "0", "iperf3", "-J", "-c", address, "-n", BYTES]).output().unwrap();
        let answer: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
        // Refused until the server listens.
        if answer["end"]["sum_received"]["bits_per_second"].is_number() {
            break answer;
        }
    };
    let _ = server.wait();
    answer["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e9
}

/// Two hosts and two containers by `ip` alone, as the lab has them; nothing joins them yet.
struct Hosts {
    containers: [Host; 2],
    hosts: [Host; 3],
    bed: Bed,
}

impl Hosts {
    fn new() -> Hosts {
        let bed = Bed::new().unwrap();
        let hosts = [bed.host("one"), bed.host("two"), bed.host("underlay")];
        let containers = [bed.host("c1"), bed.host("c2")];
        hosts[2].ip("link add br0 type bridge");
        hosts[2].ip("link set br0 up");
        hosts[2].ip("addr add 10.168.0.1/24 dev br0");
        for n in 0..2 {
            let host = &hosts[n];
            bed.wire(host, "eth0", &hosts[2], &format!("p{n}"));
            hosts[2].ip(&format!("link set p{n} master br0"));
            host.ip(&format!("addr add 10.168.0.{}/24 dev eth0", 2 + n));
        }
        Hosts { containers, hosts, bed }
    }

    /// The bridge and the container of each host.
    fn attach(&self) {
        for (n, (host, container)) in self.hosts.iter().zip(&self.containers).enumerate() {
            let own = 15 + n;
            host.ip("link add cni0 mtu 1450 type bridge");
            host.ip(&format!("addr add 10.1.{own}.1/24 dev cni0"));
            host.ip("link set cni0 up");
            host.run("sysctl -qw net.ipv4.ip_forward=1");
            self.bed.wire(container, "eth0", host, "veth1");
            host.ip("link set veth1 mtu 1450 master cni0");
            container.ip("link set eth0 mtu 1450");
            container.ip(&format!("addr add 10.1.{own}.{}/24 dev eth0", 2 + n));
            container.ip(&format!("route add default via 10.1.{own}.1"));
        }
    }

    /// The tunnel by hand.
    fn tunnel(&self) {
        for (n, host) in self.hosts[..2].iter().enumerate() {
            let (own, peer) = (15 + n, 16 - n);
            host.ip(&format!("link add flannel.1 address 02:00:00:00:00:{own} mtu 1450 type vxlan id 1 dev eth0 local 10.168.0.{} dstport 8472 nolearning", 2 + n));
            host.ip(&format!("addr add 10.1.{own}.0/32 dev flannel.1"));
            host.ip("link set flannel.1 up");
            host.ip(&format!("neigh add 10.1.{peer}.0 lladdr 02:00:00:00:00:{peer} dev flannel.1 nud permanent"));
            host.run(&format!("bridge fdb add 02:00:00:00:00:{peer} dev flannel.1 dst 10.168.0.{}", 3 - n));
            host.ip(&format!("route add 10.1.{peer}.0/24 via 10.1.{peer}.0 dev flannel.1 onlink"));
        }
    }

    /// What a network needs besides, whose containers reach anything else: any masquerading brings connection tracking.
    fn masquerade(&self) {
        for host in &self.hosts[..2] {
            host.feed(
                "nft -f -",
                "table ip nat { chain postrouting { type nat hook postrouting priority srcnat; \
                 ip saddr 10.1.0.0/16 ip daddr != 10.1.0.0/16 masquerade; }; }",
            );
        }
    }

    /// The tunnel by agents that masquerade as little as it does by hand.
    fn agents(&self, twill: &Path, dir: &Path) -> Vec<Daemon> {
        let mut store = self.hosts[2].command(twill);
        store.args(["store", "serve", "--insecure", "--listen", "10.168.0.1:2379", "--data"]).arg(dir.join("store"));
        let mut daemons = vec![spawn(store, &dir.join("store.log"))];
        let config = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#;
        eventually("the store takes the config", || {
            let mut etcdctl = self.hosts[2].command("etcdctl");
            etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", STORE, "put", "/coreos.com/network/config", config]);
            let out = etcdctl.output().unwrap();
            if out.status.success() { Ok(()) } else { Err(out) }
        });
        for (n, host) in self.hosts[..2].iter().enumerate() {
            let file = |name: &str| dir.join(format!("{n}-{name}"));
            let mut agent = host.command(twill);
            agent.args(["agent", "--iface", "eth0", "--store", STORE, "--ip-masq=false"]);
            agent.arg("--subnet").arg(format!("10.1.{}.0/24", 15 + n));
            for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
                agent.arg(flag).arg(file(name));
            }
            daemons.push(spawn(agent, &file("log")));
        }
        for (n, host) in self.hosts[..2].iter().enumerate() {
            eventually("the agent has a route to the other host", || {
                let route = host.try_run(&format!("ip route show 10.1.{}.0/24 dev flannel.1", 16 - n));
                let log = || std::fs::read_to_string(dir.join(format!("{n}-log")));
                if route.stdout.is_empty() { Err(log()) } else { Ok(()) }
            });
        }
        daemons
    }
}
