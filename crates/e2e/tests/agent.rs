//! The agent on a real kernel, against the embedded store, looked at from outside with `ip`, `bridge` and a stock `etcdctl`.
//!
//! ```text
//!   node 10.168.0.2 ─ eth0 ───── eth0 ─ other 10.168.0.3
//!     store on loopback, agent, flannel.1
//! ```

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::node::Node;
use twill_e2e::{eventually, installed};

/// A node, or `None` where this machine grants none (which was said).
fn node() -> Option<(Node, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !installed("etcdctl") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Node::new(bed, dir.path()), dir))
}

#[test]
fn takes_a_subnet_and_programs_peers_as_they_come_and_go() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    let env = std::fs::read_to_string(node.file("subnet.env")).unwrap();
    assert_eq!(
        env,
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.15.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
    let leases = node.leases();
    let own = &leases.iter().find(|(name, _)| name == "10.1.15.0-24").expect("our lease").1;
    assert!(
        own.starts_with(
            r#"{"PublicIP":"10.168.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":""#
        ),
        "{own}"
    );
    assert!(own.contains(r#","Twill":{"node":""#), "{own}");
    node.await_peer(40, true);
    for n in [41, 42] {
        node.put_peer(n);
        node.await_peer(n, true);
    }
    node.delete("subnets/10.1.41.0-24");
    node.await_peer(41, false);
    node.await_peer(42, true);
    assert_eq!(node.twill_json("plan")["steps"], serde_json::json!([]));
    assert_eq!(node.host.run("sysctl -n net.ipv4.ip_forward").trim(), "1");
}

#[test]
fn restart_and_kill_change_nothing_in_the_kernel_and_keep_lease_and_mac() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let agent = node.agent("");
    node.await_peer(40, true);
    let picture = || {
        (
            node.host.run("ip route"),
            node.host.run("ip neigh show dev flannel.1"),
            node.host.run("ip link show flannel.1"),
        )
    };
    let (before, leases) = (picture(), node.leases());
    let pid = agent.pid();
    assert_eq!(agent.end(Signal::TERM), Some(0));
    assert_eq!(picture(), before, "nothing goes with agent {pid}");
    let agent = node.agent("");
    assert_eq!((picture(), node.leases()), (before.clone(), leases.clone()));
    agent.end(Signal::KILL);
    assert_eq!(picture(), before);
    let _agent = node.agent("");
    assert_eq!((picture(), node.leases()), (before, leases));
    // The device is lost while the agent runs: it comes back with the same MAC, since peers have programmed it.
    let mac = |text: &str| text.split("link/ether ").nth(1).unwrap()[..17].to_owned();
    let old = mac(&node.host.run("ip link show flannel.1"));
    node.host.ip("link del flannel.1");
    node.await_peer(40, true);
    assert_eq!(mac(&node.host.run("ip link show flannel.1")), old);
}

#[test]
fn takes_over_what_flannel_left_and_prunes_what_no_lease_explains() {
    let Some((node, _dir)) = node() else { return };
    // As flannel leaves it: a lease without identity, subnet.env, device with a MAC of its own, boot-protocol routes.
    let mac = "5e:f8:4f:00:e3:37";
    let value = format!(
        r#"{{"PublicIP":"10.168.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
    );
    node.put("subnets/10.1.77.0-24", &value);
    node.put_peer(40);
    std::fs::write(
        node.file("subnet.env"),
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.77.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n",
    )
    .unwrap();
    for line in [
        &format!(
            "ip link add flannel.1 mtu 1450 address {mac} type vxlan id 1 dev eth0 local 10.168.0.2 dstport 8472 nolearning"
        ),
        "ip addr add 10.1.77.0/32 dev flannel.1",
        "ip link set flannel.1 up",
        "ip route add 10.1.40.0/24 via 10.1.40.0 dev flannel.1 onlink",
        "ip route add 10.1.99.0/24 via 10.1.99.0 dev flannel.1 onlink",
        "ip neigh add 10.1.99.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent",
        "bridge fdb add 02:00:00:00:00:99 dev flannel.1 dst 10.168.0.99",
    ] {
        node.host.run(line);
    }
    let index = node.host.json("link show flannel.1")[0]["ifindex"].clone();
    let _agent = node.agent_at_once("");
    node.await_peer(40, true);
    node.await_peer(99, false);
    let link = &node.host.json("link show flannel.1")[0];
    assert_eq!(
        (&link["ifindex"], &link["address"]),
        (&index, &Value::from(mac)),
        "the device was taken over, not made anew"
    );
    let route = &node.host.json("route show 10.1.40.0/24")[0];
    assert_eq!(route["protocol"], "116");
    eventually("the lease tells our identity", || {
        let own = node.leases().into_iter().find(|(name, _)| name == "10.1.77.0-24").unwrap().1;
        if own.contains("Twill") { Ok(()) } else { Err(own) }
    });
    // flannel's rewrite drops our key, and must not fence us.
    node.put("subnets/10.1.77.0-24", &value);
    node.put_peer(41);
    node.await_peer(41, true);
    assert_eq!(node.status()["subnets"][0], "10.1.77.0/24");
}

#[test]
fn a_lost_underlay_heals_once_it_is_back_and_a_new_address_goes_into_the_lease() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    node.host.ip("link del eth0");
    node.finding("iface-missing");
    node.host.ip(&format!("link add eth0 type veth peer name eth0 netns {}", node.other.pid()));
    node.host.ip("addr add 10.168.0.9/24 dev eth0");
    node.host.ip("link set eth0 up");
    node.await_peer(40, true);
    eventually("the lease tells the new address", || {
        let own = node.leases().into_iter().find(|(name, _)| name == "10.1.15.0-24").unwrap().1;
        if own.contains(r#""PublicIP":"10.168.0.9""#) { Ok(()) } else { Err((own, node.log("agent.log"))) }
    });
    eventually("the device sends from the new address", || {
        let link = node.host.run("ip -d link show flannel.1");
        if link.contains("local 10.168.0.9 dev eth0") { Ok(()) } else { Err((link, node.log("agent.log"))) }
    });
    node.host.ip("link set eth0 mtu 1400");
    eventually("the MTU follows", || {
        let env = std::fs::read_to_string(node.file("subnet.env")).unwrap();
        if env.contains("FLANNEL_MTU=1350") { Ok(()) } else { Err(env) }
    });
}

#[test]
fn broken_and_foreign_leases_are_named_and_disturb_nobody() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    for (key, value, code) in [
        ("garbage", "x", "bad-lease-key"),
        ("10.1.50.1-24", "{}", "bad-lease-key"),
        ("10.1.51.0-24", "not json", "bad-lease-value"),
        ("10.1.52.0-24", r#"{"PublicIP":"1.2.3","BackendType":"vxlan"}"#, "bad-lease-value"),
        ("10.1.53.0-24", r#"{"PublicIP":"10.168.0.53"}"#, "foreign-backend"),
        (
            "10.1.54.0-24",
            r#"{"PublicIP":"10.168.0.54","BackendType":"vxlan","BackendData":{"VNI":7,"VtepMAC":"02:00:00:00:00:54"}}"#,
            "vni-differs",
        ),
        (
            "10.1.59.0-24",
            r#"{"PublicIP":"10.168.0.59","BackendType":"vxlan","BackendData":{"VNI":99999999999999999999,"VtepMAC":"02:00:00:00:00:59"}}"#,
            "bad-lease-value",
        ),
        (
            "10.1.60.0-24",
            r#"{"PublicIP":"10.168.0.60","BackendType":"vxlan","BackendData":{"VNI":"1","VtepMAC":"02:00:00:00:00:60"}}"#,
            "bad-lease-value",
        ),
        (
            "10.1.55.0-24",
            r#"{"PublicIP":"10.168.0.55","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"03:00:00:00:00:55"}}"#,
            "bad-lease-value",
        ),
        (
            "10.1.56.0-24",
            r#"{"PublicIP":"10.168.0.2","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:56"}}"#,
            "duplicate-public-ip",
        ),
        (
            "10.1.40.0-25",
            r#"{"PublicIP":"10.168.0.57","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:57"}}"#,
            "lease-collision",
        ),
        (
            "192.0.2.0-24",
            r#"{"PublicIP":"10.168.0.58","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:58"}}"#,
            "outside-network",
        ),
    ] {
        node.put(&format!("subnets/{key}"), value);
        eventually(&format!("{key} is named as {code}"), || {
            let status = node.status();
            let named = |f: &Value| f["code"] == code && f["object"] == format!("lease {key}");
            if status["findings"].as_array().unwrap().iter().any(named) { Ok(()) } else { Err(status.to_string()) }
        });
        // Whose lease it is may be a good node's, behind the same address of a NAT.
        let fix = node.finding(code)["fix"].to_string();
        assert_eq!(fix.contains("--public-ip"), code == "duplicate-public-ip", "{fix}");
        node.delete(&format!("subnets/{key}"));
    }
    node.await_peer(40, true);
    node.put_peer(41);
    node.await_peer(41, true);
    eventually("nothing is left to say", || {
        let status = node.status();
        if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status.to_string()) }
    });
}

#[test]
fn a_bad_config_is_named_and_the_last_good_one_stays() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"host-gw"}}"#);
    let _agent = node.agent_at_once("--subnet 10.1.15.0/24");
    assert!(node.finding("backend-not-built")["evidence"].as_str().unwrap().contains("host-gw"));
    assert_eq!(node.status()["store"]["state"], "up", "it has answered");
    node.put("config", r#"{"network":"10.1.0.0/16","Surprise":1,"Backend":{"type":"VXLAN","DirectRouting":true}}"#);
    node.await_peer(40, true);
    let ignored: Vec<String> =
        node.status()["findings"].as_array().unwrap().iter().map(|f| f["evidence"].to_string()).collect();
    assert!(
        ignored.iter().any(|t| t.contains("Surprise")) && ignored.iter().any(|t| t.contains("DirectRouting")),
        "{ignored:?}"
    );
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}"#);
    let evidence = node.finding("bad-config")["evidence"].as_str().unwrap().to_owned();
    assert!(
        evidence.contains("Backend.VNI") && evidence.contains("99999999") && evidence.contains("16777215"),
        "{evidence}"
    );
    node.await_peer(40, true);
    // One fault at a time: what was bad is not there any more.
    node.delete("config");
    node.finding("config-missing");
    let findings = node.status()["findings"].take();
    assert!(!findings.as_array().unwrap().iter().any(|f| f["code"] == "bad-config"), "{findings}");
    // Put right, it is no longer spoken of.
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"host-gw"}}"#);
    node.finding("backend-not-built");
    node.put("config", twill_e2e::node::CONFIG);
    eventually("nothing is left to say", || {
        let findings = node.status()["findings"].take();
        if findings == serde_json::json!([]) { Ok(()) } else { Err(findings) }
    });
    // Another VNI: the device is made anew under its new name, and the old one goes.
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":5,"Port":4789}}"#);
    eventually("flannel.5 is there and flannel.1 is gone", || {
        let links = node.host.run("ip -d link");
        if links.contains("flannel.5") && links.contains("dstport 4789") && !links.contains("flannel.1") {
            Ok(())
        } else {
            Err((links, node.log("agent.log")))
        }
    });
}

#[test]
fn a_store_that_goes_away_is_waited_for_and_nothing_is_lost() {
    let Some((mut node, _dir)) = node() else { return };
    node.put_peer(40);
    node.kill_store();
    let _agent = node.agent_at_once("--subnet 10.1.15.0/24");
    node.finding("store-away");
    node.start_store();
    node.await_peer(40, true);
    node.kill_store();
    node.finding("store-away");
    node.await_peer(40, true);
    node.host.ip("route del 10.1.40.0/24");
    node.await_peer(40, true);
    node.start_store();
    node.put_peer(41);
    node.await_peer(41, true);
    assert_eq!(node.status()["store"]["state"], "up");
}

#[test]
fn a_listing_that_lacks_everybody_withdraws_nobody_until_it_is_accepted() {
    let Some((mut node, _dir)) = node() else { return };
    node.put_peer(40);
    node.put_peer(41);
    let agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(41, true);
    // Another store under the same address: other cluster, nothing in it.
    node.kill_store();
    std::fs::rename(node.file("store"), node.file("store.lost")).unwrap();
    node.start_store();
    node.put("config", twill_e2e::node::CONFIG);
    node.finding("strange-listing");
    node.await_peer(40, true);
    node.await_peer(41, true);
    assert_eq!(node.twill_json("plan")["steps"], serde_json::json!([]), "the plan is the agent's");
    // An agent that starts meanwhile knows them from the kernel alone: they are kept, listed and repaired all the same.
    agent.end(Signal::TERM);
    assert_eq!(node.twill_json("plan")["steps"], serde_json::json!([]), "so is it before its start");
    let _agent = node.agent_at_once("--subnet 10.1.15.0/24");
    node.finding("strange-listing");
    node.host.ip("route del 10.1.40.0/24");
    node.await_peer(40, true);
    node.host.ip("link del flannel.1");
    node.await_peer(40, true);
    node.await_peer(41, true);
    // Nor does listing the same once more withdraw them.
    node.kill_store();
    node.finding("store-away");
    node.start_store();
    eventually("the store is back", || {
        let status = node.status();
        if status["store"]["state"] == "up" && status["state"] == "running" { Ok(()) } else { Err(status.to_string()) }
    });
    node.finding("strange-listing");
    node.await_peer(40, true);
    let peers = node.twill_json("peers")["peers"].take();
    assert_eq!(peers.as_array().unwrap().len(), 2, "{peers}");
    assert!(peers[0]["fault"].as_str().unwrap().contains("kept as it stands"), "{peers}");
    // A lease that is back is nothing to withdraw.
    node.put_peer(41);
    eventually("the peer is known again", || {
        let peers = node.twill_json("peers")["peers"].take();
        let known = peers.as_array().unwrap().iter().any(|p| p["lease"] == "10.1.41.0-24" && p["fault"].is_null());
        if known { Ok(()) } else { Err(peers) }
    });
    assert_eq!(node.twill_json("resync --accept")["withdrawn"], 1);
    node.await_peer(40, false);
    node.await_peer(41, true);
}

#[test]
fn a_strange_listing_ends_when_every_lease_is_back() {
    let Some((mut node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    node.kill_store();
    std::fs::rename(node.file("store"), node.file("store.lost")).unwrap();
    node.start_store();
    node.put("config", twill_e2e::node::CONFIG);
    node.finding("strange-listing");
    node.put_peer(40);
    eventually("nothing is left to accept", || {
        let status = node.status();
        let over = status["findings"] == json!([]) && status["peers"] == 1;
        if over { Ok(()) } else { Err(status.to_string()) }
    });
    assert_eq!(node.twill_json("resync --accept")["withdrawn"], 0);
    node.await_peer(40, true);
}

#[test]
fn a_route_that_the_kernel_does_not_use_is_named() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    node.put_peer(41);
    node.await_peer(41, true);
    node.host.run("ip route add 10.1.40.0/22 via 10.168.0.3 table 77");
    for (make, says) in [
        ("ip route add 10.1.40.128/25 via 10.168.0.3", "more specific"),
        ("ip route prepend 10.1.40.0/24 via 10.168.0.3", "a twin"),
        (
            "ip rule add priority 100 table 77",
            "table 77 first, where route 10.1.40.0/22 via 10.168.0.3 dev eth0 table 77, for 1 more routes too",
        ),
        (
            "ip rule add priority 100 to 10.1.40.0/24 table 77",
            "table 77 first, where route 10.1.40.0/22 via 10.168.0.3 dev eth0 table 77",
        ),
        ("ip rule add priority 101 to 10.1.40.9 blackhole", "ends the lookup"),
        ("ip rule add priority 102 from 10.1.15.0/24 prohibit", "for 1 more routes too"),
        ("ip rule del priority 32766", "no rule leads to the main table"),
        ("ip rule add priority 103 to 10.1.40.0/24 goto 32767", "goes on with rule 32767"),
        ("ip rule add not to 10.1.77.0/24 priority 104 blackhole", "not from all to 10.1.77"),
        ("ip route add local 10.1.40.9/32 dev lo table local", "route local 10.1.40.9 dev lo table local"),
        ("ip route add blackhole 10.1.40.0/25 table local", "blackhole 10.1.40.0/25 table local"),
    ] {
        node.host.run(make);
        let finding = node.finding("route-shadowed");
        assert!(finding["object"].as_str().unwrap().contains("10.1.40.0/24"), "{make}: {finding}");
        let evidence = finding["evidence"].as_str().unwrap();
        assert!(evidence.contains(says), "{make}: {finding}");
        assert!(!says.ends_with("table 77") || evidence.ends_with(says), "{make}: {finding}");
        // What it tells to type is what undoes it.
        let fix = finding["fix"].as_str().unwrap();
        node.host.run(fix);
        eventually("the finding goes", || {
            let status = node.status();
            if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status.to_string()) }
        });
    }
    // A main rule that takes long prefixes alone.
    node.host.run("ip rule add priority 32766 lookup main suppress_prefixlength 24");
    node.host.run("ip rule del priority 32766 lookup main");
    let finding = node.finding("route-shadowed");
    assert!(finding["evidence"].as_str().unwrap().contains("suppress_prefixlength 24"), "{finding}");
    node.host.run(finding["fix"].as_str().unwrap());
    eventually("the finding goes", || {
        let status = node.status();
        if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status.to_string()) }
    });
    // Rules that concern nobody's route, and one behind the main table's.
    node.host.run("ip rule add priority 100 to 10.1.77.0/24 table 77");
    node.host.run("ip rule add priority 101 to 192.0.2.0/24 blackhole");
    node.host.run("ip rule add priority 40000 unreachable");
    node.host.run("ip route add 10.1.41.128/25 via 10.168.0.3");
    node.finding("route-shadowed");
    let findings = node.status()["findings"].take();
    let shadowed = findings.as_array().unwrap().iter().filter(|finding| finding["code"] == "route-shadowed");
    assert_eq!(shadowed.count(), 1, "{findings}");
}

#[test]
fn a_foreign_route_that_goes_with_its_nexthop_object_is_no_finding_any_more() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    node.host.run("ip nexthop add id 9 via 10.168.0.3 dev eth0");
    node.host.run("ip route add 10.1.40.128/25 nhid 9");
    node.finding("route-shadowed");
    node.host.run("ip nexthop del id 9");
    eventually("the finding goes", || {
        let status = node.status();
        if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status.to_string()) }
    });
}

#[test]
fn a_device_that_takes_the_vni_is_named_and_the_way_out_works() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.host.ip("link add stranger type vxlan id 1 dstport 8472 dev eth0");
    let _agent = node.agent_at_once("--subnet 10.1.15.0/24");
    let finding = node.finding("vni-taken");
    assert!(finding["evidence"].as_str().unwrap().contains("stranger"), "{finding}");
    let fix = finding["fix"].as_str().unwrap();
    node.host.run(fix.split(',').next().unwrap());
    node.await_peer(40, true);
    eventually("the finding goes", || {
        let status = node.status();
        if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status.to_string()) }
    });
}

#[test]
fn what_somebody_reverts_again_and_again_is_left_alone_and_named() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    for _ in 0..5 {
        node.await_peer(40, true);
        node.host.ip("route del 10.1.40.0/24");
    }
    let finding = node.finding("fought-over");
    assert!(finding["object"].as_str().unwrap().contains("10.1.40.0/24"), "{finding}");
    assert!(finding["evidence"].as_str().unwrap().contains("somebody else manages this"), "{finding}");
    // From now on theirs stands, while everything else goes on.
    node.host.try_run("ip route del 10.1.40.0/24");
    node.put_peer(41);
    node.await_peer(41, true);
    assert_eq!(node.host.run("ip route show 10.1.40.0/24"), "", "it is left alone");
}

/// All that `clean` and `leave` might change: devices, addresses, routes, neighbours, forwarding entries, files, leases.
fn everything(node: &Node) -> Vec<String> {
    // IPv4 alone: link-local addresses and what hangs on them come when they are ready.
    let mut all: Vec<String> = ["-d link", "-4 addr", "-4 route show table all", "-4 neigh show nud permanent"]
        .iter()
        .map(|words| node.host.ip(words))
        .collect();
    all.push(String::from_utf8(node.host.try_run("bridge fdb show dev flannel.1").stdout).unwrap());
    for file in ["state/state.json", "subnet.env"] {
        all.push(std::fs::read_to_string(node.file(file)).unwrap_or_else(|_| format!("no {file}")));
    }
    all.push(format!("{:?}", node.leases()));
    all
}

/// Nothing of Twill's is left, and all that is not Twill's is there.
fn assert_gone(node: &Node) {
    let mut all = everything(node);
    all.pop().expect("the leases, which are not the host's");
    let left = all.join("\n");
    assert!(!left.contains("flannel.1") && !left.contains("proto 116") && !left.contains("10.1.40."), "{left}");
    assert!(left.contains("192.0.2.0/24") && left.contains("no subnet.env"), "{left}");
}

#[test]
fn clean_says_what_it_leaves_when_the_state_is_lost() {
    let Some((node, _dir)) = node() else { return };
    node.agent("").end(Signal::TERM);
    std::fs::remove_file(node.file("state/state.json")).unwrap();
    for words in ["clean --dry-run", "clean"] {
        let left = node.twill_json(words)["left"].to_string();
        assert!(left.contains("device flannel.1") && left.contains("ip link del flannel.1"), "{words}: {left}");
        assert!(node.host.ip("link show flannel.1").contains("flannel.1"), "{words}");
    }
}

#[test]
fn clean_removes_everything_owned_and_leave_gives_the_subnet_back() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.host.ip("route add 192.0.2.0/24 via 10.168.0.3");
    let agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    let (code, said) = node.twill("clean");
    assert!(
        code == Some(1) && said.as_ref().unwrap_err().contains("stop it first"),
        "beside a running agent: {said:?}"
    );
    agent.end(Signal::TERM);
    // What a tunnel in user space would leave.
    std::fs::write(node.file("state/tunnel.json"), "{}").unwrap();
    let before = everything(&node);
    let dry = node.twill_json("clean --dry-run");
    let announced = dry["steps"].to_string();
    for word in ["flannel.1", "subnet.env", "tunnel.json", "forget the devices in ", "table inet twill"] {
        assert!(announced.contains(word), "{word}: {dry}");
    }
    assert_eq!(everything(&node), before, "a dry run changes nothing");
    let done = node.twill_json("clean");
    assert_eq!((&done["steps"], &done["failed"]), (&dry["steps"], &serde_json::json!([])), "it does what it announced");
    assert_gone(&node);
    assert!(!node.file("state/tunnel.json").exists());
    assert!(done["left"].to_string().contains("ip_forward"), "{done}");
    assert!(node.leases().iter().any(|(name, _)| name == "10.1.15.0-24"), "clean leaves the lease");

    let agent = node.agent("");
    node.await_peer(40, true);
    std::fs::create_dir_all(node.file("state/attachments")).unwrap();
    std::fs::write(node.file("state/attachments/abc:eth0.json"), "{}").unwrap();
    let before = everything(&node);
    assert!(node.twill("leave").1.unwrap_err().contains("abc:eth0"));
    let elsewhere = node.twill(&format!("leave --state-dir {}", node.file("elsewhere").display()));
    assert!(elsewhere.1.unwrap_err().contains("abc:eth0"), "the agent knows its folder");
    std::fs::remove_file(node.file("state/attachments/abc:eth0.json")).unwrap();
    let dry = node.twill_json("leave --dry-run");
    assert_eq!(
        (&dry["left"], &dry["subnets"][0], &dry["removes"][0]),
        (&false.into(), &"10.1.15.0/24".into(), &"flannel.1".into())
    );
    assert_eq!(everything(&node), before, "neither a refusal nor a dry run changes anything");
    let announced = dry["steps"].to_string();
    let words = [
        "delete lease 10.1.15.0-24",
        "link flannel.1",
        "route blackhole 10.1.15.0/24",
        "table inet twill",
        "subnet.env",
        "state.json",
    ];
    for word in words {
        assert!(announced.contains(word), "{word}: {dry}");
    }
    assert_eq!(node.twill_json("leave")["steps"], dry["steps"], "it does what it announced");
    assert_gone(&node);
    assert!(!node.leases().iter().any(|(name, _)| name == "10.1.15.0-24"), "leave gives the lease back");
    eventually("the agent ends", || {
        let (code, said) = node.twill("status");
        if code == Some(1) { Ok(()) } else { Err(said) }
    });
    drop(agent);
}

#[test]
fn check_says_what_is_in_the_way_and_exits_with_three() {
    let Some((node, _dir)) = node() else { return };
    assert_eq!(node.twill("agent --check").0, Some(0), "{:?}", node.twill("agent --check"));
    node.host.run("ip route add 10.1.200.0/24 via 10.168.0.3");
    let (code, text) = node.twill("agent --check");
    assert!(code == Some(3) && text.as_ref().unwrap().contains("network-overlap"), "{text:?}");
    node.host.run("ip link set eth0 down");
    let (code, text) = node.twill("agent --check");
    assert!(code == Some(3) && text.as_ref().unwrap().contains("iface-down"), "{text:?}");
    let (code, text) = node.twill("agent --check --store ftp://x");
    assert!(code == Some(3) && text.as_ref().unwrap().contains("http://"), "{text:?}");
}

/// bench/ has two hundred.
#[test]
fn agents_that_start_together_for_as_many_subnets_all_get_one() {
    let agents = 24;
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // A store on a bridge that joins all agents' hosts.
    let hub = bed.host("hub");
    hub.ip("link add br0 type bridge");
    hub.ip("addr add 10.168.0.1/16 dev br0");
    hub.ip("link set br0 up");
    let hosts: Vec<_> = (0..agents).map(|n| bed.host(&format!("node{n}"))).collect();
    let wires = hosts.iter().enumerate().map(|(n, host)| {
        let pid = host.pid();
        format!("link add p{n} type veth peer name eth0 netns {pid}\nlink set p{n} master br0 up\n")
    });
    std::fs::write(dir.path().join("wires"), wires.collect::<String>()).unwrap();
    hub.ip(&format!("-batch {}", dir.path().join("wires").display()));
    let mut store = hub.command(twill_e2e::bin("twill"));
    store.args(["store", "serve", "--insecure", "--listen", "10.168.0.1:2379", "--data"]).arg(dir.path().join("store"));
    let mut children = vec![Ended(store.stderr(std::process::Stdio::null()).spawn().unwrap())];
    let config = format!(
        r#"{{"Network":"10.1.0.0/16","SubnetMin":"10.1.1.0","SubnetMax":"10.1.{agents}.0","Backend":{{"Type":"vxlan"}}}}"#
    );
    let etcdctl = |words: &[&str]| {
        let mut command = hub.command("etcdctl");
        let out = command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", "http://10.168.0.1:2379"])
            .args(words)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        if out.status.success() { Ok(text(out.stdout)) } else { Err(text(out.stderr)) }
    };
    eventually("the store takes the config", || etcdctl(&["put", "/coreos.com/network/config", &config]));
    let twill = twill_e2e::bin("twill");
    for (n, host) in hosts.iter().enumerate() {
        let own = dir.path().join(n.to_string());
        let line = format!(
            "ip addr add 10.168.1.{}/16 dev eth0 && ip link set eth0 up && exec {} agent --iface eth0 --store http://10.168.0.1:2379 \
             --state-dir {own}/state --run-dir {own}/run --subnet-file {own}/subnet.env",
            10 + n,
            twill.display(),
            own = own.display()
        );
        let mut command = host.command("sh");
        children.push(Ended(command.args(["-c", &line]).stderr(std::process::Stdio::null()).spawn().unwrap()));
    }
    let subnets = eventually("every agent has a subnet", || {
        let read = |n: usize| std::fs::read_to_string(dir.path().join(format!("{n}/subnet.env"))).ok();
        let all: Vec<String> =
            (0..agents).filter_map(read).filter_map(|env| env.lines().nth(1).map(str::to_owned)).collect();
        if all.len() == agents { Ok(all) } else { Err(all.len()) }
    });
    let distinct: std::collections::BTreeSet<_> = subnets.iter().collect();
    assert_eq!(distinct.len(), agents, "{subnets:?}");
    let leases = etcdctl(&["get", "--prefix", "--keys-only", "/coreos.com/network/subnets/"]).unwrap();
    assert_eq!(leases.split_whitespace().count(), agents);
    for child in &mut children {
        assert_eq!(child.0.try_wait().unwrap(), None, "nobody has given up");
    }
}

/// A child that is ended, by pid, with the test.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
