//! The fields of the VXLAN backend, each changed in the store while the agent runs, and the MAC that outlives everything.

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::node::Node;
use twill_e2e::{eventually, installed};

fn node() -> Option<(Node, tempfile::TempDir)> {
    if !installed("etcdctl") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Node::new(Bed::new()?, dir.path()), dir))
}

/// VNI, port, MTU, GBP, learning and MAC of the node's only VXLAN device.
fn device(node: &Node) -> Vec<Value> {
    let links = node.host.json("-d link show type vxlan");
    let [link] = links.as_array().unwrap().as_slice() else { return vec![links] };
    let data = &link["linkinfo"]["info_data"];
    vec![
        link["ifname"].clone(),
        data["id"].clone(),
        data["port"].clone(),
        link["mtu"].clone(),
        json!(data["gbp"] == true),
        data["learning"].clone(),
        link["address"].clone(),
    ]
}

fn becomes(node: &Node, what: &str, want: &[Value]) {
    eventually(&format!("the device follows {what}"), || {
        let got = device(node);
        if got == want { Ok(()) } else { Err((got, node.log("agent.log"))) }
    });
}

fn mac(node: &Node) -> String {
    device(node).last().unwrap().as_str().unwrap_or_else(|| panic!("no device: {}", node.log("agent.log"))).to_owned()
}

#[test]
fn each_field_of_the_backend_is_followed_while_the_agent_runs() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    let mac = json!(mac(&node));
    let put = |fields: &str| {
        node.put("config", &format!(r#"{{"Network":"10.1.0.0/16","Backend":{{"Type":"vxlan"{fields}}}}}"#));
    };
    let index = || node.host.json("-d link show type vxlan")[0]["ifindex"].clone();
    let plain =
        || vec![json!("flannel.1"), json!(1), json!(8472), json!(1450), json!(false), json!(false), mac.clone()];
    let first = index();
    for (fields, at, value, in_place) in [
        (r#","MTU":1400"#, 3, json!(1350), true),
        (r#","Learning":true"#, 5, json!(true), true),
        ("", 0, json!("flannel.1"), true),
        (r#","Port":4789"#, 2, json!(4789), false),
        (r#","GBP":true"#, 4, json!(true), false),
    ] {
        let mut want = plain();
        want[at] = value;
        put(fields);
        becomes(&node, fields, &want);
        assert_eq!(index() == first, in_place, "{fields}: changed in place");
        node.await_peer(40, true);
        let mtu = format!("FLANNEL_MTU={}", want[3]);
        eventually("subnet.env follows", || {
            let env = std::fs::read_to_string(node.file("subnet.env")).unwrap();
            if env.contains(&mtu) { Ok(()) } else { Err(env) }
        });
    }
    assert!(node.log("agent.log").contains("the kernel cannot change it in place"), "a re-creation is announced");
    // Another VNI is another device; the lease tells it, and a peer with the old one is named.
    put(r#","VNI":7"#);
    let mut want = plain();
    (want[0], want[1]) = (json!("flannel.7"), json!(7));
    becomes(&node, "the VNI", &want);
    node.finding("vni-differs");
    eventually("the lease tells the VNI", || {
        let own = node.leases().into_iter().find(|(name, _)| name == "10.1.15.0-24").unwrap().1;
        if own.contains(r#""VNI":7"#) { Ok(()) } else { Err(own) }
    });
    // Another type is not built yet: named, and the last good config stays in force.
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"ipip"}}"#);
    node.finding("backend-not-built");
    assert_eq!(device(&node), want);
    put("");
    becomes(&node, "the first config again", &plain());
    node.await_peer(40, true);
}

#[test]
fn the_mac_outlives_restart_reboot_device_and_state_file() {
    let Some((node, dir)) = node() else { return };
    let start = |node: &Node| {
        let agent = node.agent("");
        (agent, mac(node), node.status()["subnets"][0].clone())
    };
    let own = |node: &Node, subnet: &Value| {
        let name = subnet.as_str().unwrap().replace('/', "-");
        node.leases().into_iter().find(|(lease, _)| *lease == name).map(|(_, value)| value)
    };
    let (agent, first, subnet) = start(&node);
    agent.end(Signal::TERM);
    // Restart; and the device's loss while no agent runs.
    let (agent, again, same) = start(&node);
    assert_eq!((&again, &same), (&first, &subnet), "restart");
    agent.end(Signal::KILL);
    node.host.ip("link del flannel.1");
    let (agent, again, same) = start(&node);
    assert_eq!((&again, &same), (&first, &subnet), "device loss");
    agent.end(Signal::TERM);
    // The own lease comes before the live device.
    node.host.ip("link set flannel.1 address 02:22:22:22:22:22");
    let (agent, again, same) = start(&node);
    assert_eq!((&again, &same), (&first, &subnet), "the lease before the device");
    agent.end(Signal::TERM);
    // The state file is lost: lease and device know.
    std::fs::remove_dir_all(node.file("state")).unwrap();
    let (agent, again, same) = start(&node);
    assert_eq!((&again, &same), (&first, &subnet), "state lost");
    assert_eq!(node.leases().len(), 1, "no second lease was taken");
    agent.end(Signal::TERM);
    // Reboot: another network namespace, nothing below /run; state and store stay.
    drop(node);
    let Some(bed) = Bed::new() else { return };
    let node = Node::new(bed, dir.path());
    std::fs::remove_file(node.file("subnet.env")).unwrap();
    let (agent, again, same) = start(&node);
    assert_eq!((&again, &same), (&first, &subnet), "reboot");
    agent.end(Signal::TERM);
    // Without a lease the live device comes before the state file …
    node.delete(&format!("subnets/{}", subnet.as_str().unwrap().replace('/', "-")));
    node.host.ip("link set flannel.1 address 02:22:22:22:22:22");
    let (agent, again, same) = start(&node);
    assert_eq!((again.as_str(), &same), ("02:22:22:22:22:22", &subnet), "the device before the state file");
    assert!(own(&node, &subnet).unwrap().contains("02:22:22:22:22:22"));
    agent.end(Signal::TERM);
    // … and without a device the state file knows.
    node.delete(&format!("subnets/{}", subnet.as_str().unwrap().replace('/', "-")));
    node.host.ip("link del flannel.1");
    let (agent, again, _) = start(&node);
    assert_eq!(again, "02:22:22:22:22:22", "the state file");
    agent.end(Signal::TERM);
    // Of a clone neither device nor lease are the original's: here the lease tells our MAC, and is another node's.
    let lease = own(&node, &subnet).unwrap().replace("10.168.0.2", "10.168.0.9");
    node.put(&format!("subnets/{}", subnet.as_str().unwrap().replace('/', "-")), &lease);
    std::fs::remove_dir_all(node.file("state")).unwrap();
    std::fs::remove_file(node.file("subnet.env")).unwrap();
    let (agent, again, other) = start(&node);
    assert!(
        again != "02:22:22:22:22:22" && other != subnet,
        "a clone has a MAC and a subnet of its own: {again} {other}"
    );
    assert_eq!(node.leases().len(), 2);
    agent.end(Signal::TERM);
}
