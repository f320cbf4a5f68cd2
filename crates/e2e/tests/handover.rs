//! The agent ends, is killed, starts again, and hands over to flannel and back, while packets pass: none is lost.
//!
//! ```text
//!   node 10.168.0.2, flannel.1, 10.1.15.1 ─ eth0 ───── eth0 ─ other 10.168.0.40, flannel.1, 10.1.40.1
//!     store on loopback, agent or flannel      ping ────────▶    made by hand, as a peer would
//! ```

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Child, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::node::Node;
use twill_e2e::{eventually, installed};

/// The node's VTEP MAC, before and after.
const MAC: &str = "5e:f8:4f:00:e3:37";
const SUBNET_ENV: &str =
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.15.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n";

/// A node as flannel leaves it, the peer that it reaches, and an address for containers on both.
fn flannels_node() -> Option<(Node, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !installed("etcdctl") || !installed("ping") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    node.put_peer(40);
    flannel(&node);
    for line in [
        "ip addr add 10.168.0.40/24 dev eth0",
        "ip link add flannel.1 mtu 1450 address 02:00:00:00:00:28 type vxlan id 1 dev eth0 local 10.168.0.40 dstport 8472 nolearning",
        "ip addr add 10.1.40.0/32 dev flannel.1",
        "ip addr add 10.1.40.1/32 dev flannel.1",
        "ip link set flannel.1 up",
        "ip route add 10.1.15.0/24 via 10.1.15.0 dev flannel.1 onlink",
        &format!("ip neigh add 10.1.15.0 lladdr {MAC} dev flannel.1 nud permanent"),
        &format!("bridge fdb add {MAC} dev flannel.1 dst 10.168.0.2"),
    ] {
        node.other.run(line);
    }
    for line in ["ip link add cni0 type bridge", "ip addr add 10.1.15.1/24 dev cni0", "ip link set cni0 up"] {
        node.host.run(line);
    }
    Some((node, dir))
}

/// What a start of flannel does to store, files and kernel (its vxlan backend, with an etcd store).
fn flannel(node: &Node) {
    let value = format!(
        r#"{{"PublicIP":"10.168.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{MAC}"}}}}"#
    );
    // An etcd lease of a day, and the value put on it whatever is there.
    let granted = String::from_utf8(node.etcdctl(&["lease", "grant", "86400"]).stdout).unwrap();
    let lease = granted.split(' ').nth(1).unwrap();
    let key = "/coreos.com/network/subnets/10.1.15.0-24";
    assert!(node.etcdctl(&["put", &format!("--lease={lease}"), key, &value]).status.success());
    std::fs::write(node.file("subnet.env"), SUBNET_ENV).unwrap();
    // A device that is as it shall be is used as it is.
    if node.host.try_run("ip link show flannel.1").status.success() {
        assert_eq!(node.host.json("link show flannel.1")[0]["address"], MAC);
    } else {
        node.host.run(&format!(
            "ip link add flannel.1 mtu 1450 address {MAC} type vxlan id 1 dev eth0 local 10.168.0.2 dstport 8472 nolearning"
        ));
        node.host.run("ip addr add 10.1.15.0/32 dev flannel.1");
    }
    for line in [
        "ip link set flannel.1 up",
        "sysctl -qw net.ipv4.ip_forward=1",
        "ip neigh replace 10.1.40.0 lladdr 02:00:00:00:00:28 dev flannel.1 nud permanent",
        "bridge fdb replace 02:00:00:00:00:28 dev flannel.1 dst 10.168.0.40",
        "ip route replace 10.1.40.0/24 via 10.1.40.0 dev flannel.1 onlink",
    ] {
        node.host.run(line);
    }
}

/// A ping through the overlay, five hundred in a second.
struct Ping {
    child: Ended,
    log: PathBuf,
}

/// A child that is ended with the test.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Ping {
    fn start(node: &Node) -> Ping {
        let log = node.file("ping.log");
        let child = node
            .host
            .command("ping")
            .args(["-n", "-i", "0.002", "-I", "10.1.15.1", "10.1.40.1"])
            .stdout(std::fs::File::create(&log).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let ping = Ping { child: Ended(child), log };
        ping.more("before anything happens");
        ping
    }

    /// Sequence numbers that were answered.
    fn answered(&self) -> BTreeSet<u64> {
        let log = std::fs::read_to_string(&self.log).unwrap();
        log.lines().filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok()).collect()
    }

    /// Waits for a hundred more answers.
    fn more(&self, what: &str) {
        let had = self.answered().len();
        eventually(&format!("packets pass {what}"), || {
            let now = self.answered().len();
            if now >= had + 100 { Ok(()) } else { Err((had, now)) }
        });
    }

    /// Ends it: every packet up to the last answered one was answered.
    fn end(mut self, what: &str) {
        self.more("at the end");
        let _ = kill_process(Pid::from_child(&self.child.0), Signal::INT);
        self.child.0.wait().unwrap();
        let answered = self.answered();
        let last = *answered.last().unwrap();
        let lost: Vec<u64> = (1..=last).filter(|seq| !answered.contains(seq)).collect();
        assert_eq!(lost, Vec::<u64>::new(), "of {last} packets, {what}");
    }
}

/// The agent has taken over: its protocol number on the route, its identity in the lease, nothing left to do.
fn is_twills(node: &Node) {
    eventually("the lease tells our identity, and the route our protocol", || {
        let own = node.leases().into_iter().find(|(name, _)| name == "10.1.15.0-24").map(|(_, value)| value);
        let routes = node.host.json("-N route show 10.1.40.0/24");
        let ours = routes.as_array().unwrap().len() == 1 && routes[0]["protocol"] == "116";
        let right = own.as_ref().is_some_and(|v| v.contains("Twill") && v.contains(MAC)) && ours;
        if right { Ok(()) } else { Err((own, routes, node.log("agent.log"))) }
    });
    eventually("the agent has settled", || {
        let status = node.status();
        if status["state"] == "running" && status["peers"] == 1 { Ok(()) } else { Err(status.to_string()) }
    });
    assert_eq!(node.twill_json("plan")["steps"], json!([]));
}

#[test]
fn no_packet_is_lost_while_the_agent_ends_is_killed_and_starts_again() {
    let Some((node, _dir)) = flannels_node() else { return };
    let mut agent = node.agent_at_once("");
    is_twills(&node);
    let ping = Ping::start(&node);
    let changes = || node.log("agent.log").matches(" changed").count();
    let before = changes();
    for signal in [Signal::TERM, Signal::KILL, Signal::KILL] {
        agent.end(signal);
        ping.more("without an agent");
        agent = node.agent_at_once("");
        is_twills(&node);
        ping.more("beside the new agent");
    }
    // The state is lost with the agent: the device knows who we are.
    agent.end(Signal::KILL);
    std::fs::remove_dir_all(node.file("state")).unwrap();
    agent = node.agent_at_once("");
    is_twills(&node);
    ping.end("while the agent was ended, killed, and started again");
    assert_eq!(changes(), before, "no start changed anything in the kernel: {}", node.log("agent.log"));
    agent.end(Signal::TERM);
}

#[test]
fn no_packet_is_lost_from_flannel_to_twill_and_back() {
    let Some((node, dir)) = flannels_node() else { return };
    let ping = Ping::start(&node);
    let index = node.host.json("link show flannel.1")[0]["ifindex"].clone();
    // Beside flanneld nothing starts; a process of that name stands in for it.
    let stand_in = dir.path().join("flanneld");
    std::fs::copy("/bin/sleep", &stand_in).unwrap();
    let flanneld = Ended(node.host.command(&stand_in).arg("infinity").stdin(Stdio::null()).spawn().unwrap());
    eventually("the agent refuses beside flanneld", || {
        let (code, said) = node.twill("agent --check");
        if code == Some(3) { Ok(()) } else { Err(said) }
    });
    let (code, said) = node.twill("agent");
    let said = said.unwrap_err();
    assert!(
        code == Some(1) && said.contains("runs in this network namespace") && said.contains("stop it first"),
        "{said}"
    );
    assert_ne!(node.host.json("-N route show 10.1.40.0/24")[0]["protocol"], "116", "nothing was touched");
    drop(flanneld);
    for _ in 0..2 {
        let agent = node.agent_at_once("");
        is_twills(&node);
        ping.more("with twill");
        agent.end(Signal::TERM);
        flannel(&node);
        let routes = node.host.json("route show 10.1.40.0/24");
        assert_eq!(routes.as_array().unwrap().len(), 1, "flannel's route takes the place of ours: {routes}");
        ping.more("with flannel");
    }
    ping.end("from flannel to twill and back, twice");
    let link: &Value = &node.host.json("link show flannel.1")[0];
    assert_eq!((&link["ifindex"], &link["address"]), (&index, &json!(MAC)), "one device all the while");
}
