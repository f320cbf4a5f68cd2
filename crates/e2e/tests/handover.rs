//! The agent takes over what flannel has left, ends, is killed and starts again while packets pass: none is lost.
//!
//! ```text
//!   node 10.168.0.2, flannel.1, 10.1.15.1 ─ eth0 ───── eth0 ─ other 10.168.0.40, flannel.1, 10.1.40.1
//!     store on loopback, agent                 ping ────────▶    made by hand, as a peer would
//! ```

use rustix::process::Signal;
use serde_json::json;
use twill_e2e::net::Bed;
use twill_e2e::node::Node;
use twill_e2e::ping::Ping;
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
    let ping = Ping::start(&node.host, "10.1.15.1", "10.1.40.1", &node.file("ping.log"));
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
fn a_takeover_that_could_not_serve_the_store_leaves_the_running_agent_alone() {
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut node = Node::new(bed, dir.path());
    let agent = node.agent("--subnet 10.1.15.0/24");
    let pid = agent.pid();
    // The store that the node has got already is at this port.
    for address in ["127.0.0.1:2379", "0.0.0.0:2379 --insecure"] {
        let refused = node.agent_at_once(&format!("--takeover --serve-store {address}"));
        assert_eq!(refused.wait(), Some(1), "{address}: {}", node.log("agent.log"));
    }
    let log = node.log("agent.log");
    assert_eq!(log.matches("error: listen on ").count(), 2, "{log}");
    assert!(log.contains("hint: name another address or port") && !log.contains("the next agent has"), "{log}");
    let socket = |line: &str| line.contains(&format!("pid={pid},"));
    assert!(node.host.run("ss -Hlxp").lines().any(|line| socket(line) && line.contains("handover.sock")));
    node.put_peer(40);
    node.await_peer(40, true);
    assert_eq!(node.status()["state"], "running");
    // A port of the running agent's own is free once that one has ended.
    node.kill_store();
    agent.end(Signal::TERM);
    let first = node.agent("--serve-store --network 10.1.0.0/16");
    let next = node.agent_at_once("--takeover --serve-store");
    assert_eq!(first.wait(), Some(0), "{}", node.log("agent.log"));
    eventually("the next agent serves, and runs", || {
        let status = node.status();
        let right = status["state"] == "running" && status["store"]["state"] == "up";
        if right { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
    });
    next.end(Signal::TERM);
}
