//! Two hundred agents that start in the same second for two hundred free subnets: all get one, distinct.
//!
//! ```text
//!   node0 eth0 ─┐
//!   node1 eth0 ─┼─ br0 hub 10.168.0.1: store
//!   …      …  ──┘
//! ```

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use twill_e2e::net::{Bed, Host};

use crate::report::Report;

const AGENTS: usize = 200;
const STORE: &str = "http://10.168.0.1:2379";

/// A child that ends with the measurement.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// From the first exec to the last subnet.env.
pub(crate) fn run(twill: &Path, report: &mut Report) {
    let dir = tempfile::tempdir().unwrap();
    let bed = Bed::new().unwrap();
    let hub = bed.host("hub");
    for line in ["link add br0 type bridge", "addr add 10.168.0.1/16 dev br0", "link set br0 up"] {
        hub.ip(line);
    }
    let hosts: Vec<Host> = (0..AGENTS).map(|n| bed.host(&format!("node{n}"))).collect();
    for (n, host) in hosts.iter().enumerate() {
        hub.ip(&format!("link add p{n} type veth peer name eth0 netns {}", host.pid()));
        hub.ip(&format!("link set p{n} master br0 up"));
        host.ip(&format!("addr add 10.168.1.{}/16 dev eth0", 10 + n));
        host.ip("link set eth0 up");
    }
    let mut store = hub.command(twill);
    store.args(["store", "serve", "--insecure", "--listen", "10.168.0.1:2379", "--data"]).arg(dir.path().join("store"));
    let _store = start(&mut store);
    let config = format!(
        r#"{{"Network":"10.1.0.0/16","SubnetMin":"10.1.1.0","SubnetMax":"10.1.{AGENTS}.0","Backend":{{"Type":"vxlan"}}}}"#
    );
    let put = || {
        let mut etcdctl = hub.command("etcdctl");
        etcdctl.env("ETCDCTL_API", "3").args(["--endpoints", STORE, "put", "/coreos.com/network/config", &config]);
        etcdctl.output().unwrap().status.success()
    };
    wait("the store takes the config", put);
    let file = |n: usize, name: &str| dir.path().join(n.to_string()).join(name);
    let began = Instant::now();
    let agents: Vec<Ended> = (0..AGENTS)
        .map(|n| {
            let mut agent = hosts[n].command(twill);
            agent.args(["agent", "--iface", "eth0", "--store", STORE]);
            for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--subnet-file", "subnet.env")] {
                agent.arg(flag).arg(file(n, name));
            }
            start(&mut agent)
        })
        .collect();
    let started = began.elapsed();
    let subnet = |n: usize| {
        let env = std::fs::read_to_string(file(n, "subnet.env")).ok()?;
        env.lines().find(|line| line.starts_with("FLANNEL_SUBNET=")).map(str::to_owned)
    };
    wait("every agent has a subnet", || (0..AGENTS).all(|n| subnet(n).is_some()));
    let took = began.elapsed();
    let distinct: BTreeSet<String> = (0..AGENTS).filter_map(subnet).collect();
    let first = agents.len();
    report.note("200 agents together, first to last exec (ms)", &[started.as_secs_f64() * 1e3]);
    report.note("200 agents together, first exec to last subnet.env (ms)", &[took.as_secs_f64() * 1e3]);
    report.at_least("200 agents for 200 free subnets, distinct ones taken", &[distinct.len() as f64], first as f64);
}

fn start(command: &mut Command) -> Ended {
    Ended(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !done() {
        assert!(Instant::now() < end, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
