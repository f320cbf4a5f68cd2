//! Situations that stop a node: each has its clear message, the agent waits, and goes on by itself when it is cured.

use rustix::process::Signal;
use serde_json::json;
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

/// Waits until `status` says nothing is wrong, with this subnet.
fn runs(node: &Node, subnet: &str) {
    eventually(&format!("the node runs with {subnet}, and nothing is left to say"), || {
        let status = node.status();
        let right = status["state"] == "running" && status["subnets"][0] == subnet && status["findings"] == json!([]);
        if right { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
    });
}

/// The finding's evidence has these words, the log has said it once, and it names a way out.
fn told(node: &Node, code: &str, words: &[&str]) {
    let finding = node.finding(code);
    let evidence = finding["evidence"].as_str().unwrap();
    assert!(words.iter().all(|word| evidence.contains(word)), "{finding}");
    assert_ne!(finding["fix"], "", "{finding}");
}

#[test]
fn an_interface_that_is_missing_down_or_without_address_is_waited_for() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.host.ip("link set eth0 down");
    node.host.ip("addr flush dev eth0");
    node.host.ip("link set eth0 name eth7");
    let _agent = node.agent_at_once("--subnet 10.1.15.0/24");
    told(&node, "iface-missing", &["eth0"]);
    // What needs no lease is answered meanwhile.
    assert_eq!(node.twill_json("peers")["peers"], json!([]));
    let refused = node.twill("leave").1.unwrap_err();
    assert!(refused.contains("no interface is") && refused.contains("twill clean"), "{refused}");
    node.host.ip("link set eth7 name eth0");
    told(&node, "iface-down", &["eth0"]);
    node.host.ip("link set eth0 up");
    told(&node, "iface-without-address", &["eth0"]);
    node.host.ip("addr add 10.168.0.2/24 dev eth0");
    node.await_peer(40, true);
    runs(&node, "10.1.15.0/24");
    let log = node.log("agent.log");
    for code in ["iface-missing", "iface-down", "iface-without-address"] {
        assert_eq!(log.matches(&format!("code=\"{code}\"")).count(), 1, "said once: {log}");
    }
    // The same while it runs: named, and the data path stays.
    node.host.ip("link set eth0 down");
    told(&node, "iface-down", &["eth0"]);
    node.await_peer(40, true);
    node.host.ip("link set eth0 name eth7");
    told(&node, "iface-missing", &["eth0"]);
    let findings = node.status()["findings"].to_string();
    assert!(!findings.contains("iface-down"), "what is not there is not down: {findings}");
    node.host.ip("link set eth7 name eth0");
    node.host.ip("link set eth0 up");
    runs(&node, "10.1.15.0/24");
    node.host.ip("addr flush dev eth0");
    told(&node, "iface-without-address", &["eth0"]);
    node.await_peer(40, true);
    node.host.ip("addr add 10.168.0.2/24 dev eth0");
    runs(&node, "10.1.15.0/24");
}

#[test]
fn an_interface_that_cannot_carry_is_answered_with_those_that_can() {
    let Some((node, _dir)) = node() else { return };
    node.host.ip("link add empty0 type bridge");
    node.host.ip("link set empty0 up");
    let hint = |iface: &str| {
        let check = node.twill_json(&format!("agent --check --iface {iface}"));
        let found = check["findings"].as_array().unwrap().iter().find(|f| f["object"] == "underlay").cloned();
        let found = found.unwrap_or_else(|| panic!("{iface}: {check}"));
        (found["code"].as_str().unwrap().to_owned(), found["fix"].as_str().unwrap().to_owned())
    };
    let another = "name with --iface one that has an address: eth0 (10.168.0.2)";
    for (iface, code, fix) in [
        ("lo", "iface-without-address", another.to_owned()),
        ("127.0.0.1", "iface-without-address", another.to_owned()),
        ("nowhere", "iface-missing", another.to_owned()),
        ("empty0", "iface-without-address", format!("give it one: ip addr add ADDRESS/LEN dev empty0; or {another}")),
    ] {
        assert_eq!(hint(iface), (code.into(), fix), "{iface}");
    }
    // Where nothing has an address yet there is nothing to name.
    node.host.ip("addr flush dev eth0");
    let fix = "give a device an address: ip addr add ADDRESS/LEN dev NAME";
    assert_eq!(hint("lo"), ("iface-without-address".into(), fix.into()));
}

#[test]
fn files_that_cannot_be_written_are_written_as_soon_as_they_can() {
    let Some((node, _dir)) = node() else { return };
    let _agent = node.agent("--subnet 10.1.15.0/24");
    runs(&node, "10.1.15.0/24");
    // A file where the folder was, and a folder where the file was: neither yields to root.
    let (state, env) = (node.file("state"), node.file("subnet.env"));
    std::fs::rename(&state, node.file("state-away")).unwrap();
    std::fs::write(&state, "").unwrap();
    std::fs::remove_file(&env).unwrap();
    std::fs::create_dir(&env).unwrap();
    node.host.ip("link set eth0 mtu 1400");
    told(&node, "state-unwritable", &[]);
    told(&node, "subnet-env-unwritable", &[]);
    // Nothing but the disk changes from here on.
    std::fs::remove_file(&state).unwrap();
    std::fs::remove_dir(&env).unwrap();
    runs(&node, "10.1.15.0/24");
    let written = |file| std::fs::read_to_string(file).unwrap();
    assert!(written(state.join("state.json")).contains("10.1.15.0/24"));
    assert!(written(env).contains("FLANNEL_MTU=1350"));
}

#[test]
fn the_containers_file_stays_as_the_agent_wrote_it() {
    let Some((mut node, _dir)) = node() else { return };
    let _agent = node.agent("");
    let file = node.file("subnet.env");
    let written = std::fs::read_to_string(&file).unwrap();
    let stands = |what: &str| {
        eventually(what, || {
            let now = std::fs::read_to_string(&file).unwrap_or_default();
            if now == written { Ok(()) } else { Err(now) }
        });
    };
    std::fs::remove_file(&file).unwrap();
    stands("a file that was removed is there again");
    node.kill_store();
    told(&node, "store-away", &["127.0.0.1:2379"]);
    std::fs::write(&file, "FLANNEL_SUBNET=10.9.9.1/24\n").unwrap();
    stands("an altered one too, without a store");
}

#[test]
fn an_overlap_and_the_lack_of_a_free_subnet_are_waited_for() {
    let Some((node, _dir)) = node() else { return };
    node.put(
        "config",
        r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.40.0","SubnetMax":"10.1.41.0","Backend":{"Type":"vxlan"}}"#,
    );
    node.put_peer(40);
    node.put_peer(41);
    node.host.ip("route add 10.1.99.0/24 via 10.168.0.3");
    let _agent = node.agent_at_once("");
    told(&node, "network-overlap", &["10.1.0.0/16", "10.1.99.0/24"]);
    assert!(!node.host.run("ip link").contains("flannel"), "nothing is made");
    node.host.ip("route del 10.1.99.0/24");
    told(&node, "no-free-subnet", &["no free subnet", "10.1.40.0"]);
    assert_eq!(node.leases().len(), 2, "nobody's lease is taken");
    node.delete("subnets/10.1.41.0-24");
    node.await_peer(40, true);
    runs(&node, "10.1.41.0/24");
    // One that comes while the network runs is named, and takes nothing down.
    node.host.ip("route add 10.1.98.0/24 via 10.168.0.3");
    told(&node, "network-overlap", &["10.1.0.0/16", "10.1.98.0/24"]);
    node.await_peer(40, true);
    node.host.ip("route del 10.1.98.0/24");
    runs(&node, "10.1.41.0/24");
    let log = node.log("agent.log");
    for code in ["network-overlap", "no-free-subnet"] {
        assert_eq!(log.matches(&format!("code=\"{code}\"")).count(), 1, "said once: {log}");
    }
}

#[test]
fn a_subnet_that_is_asked_for_and_held_is_refused_in_words() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.put_peer(41);
    let _agent = node.agent_at_once("--subnet 10.1.40.0/24");
    told(&node, "no-free-subnet", &["--subnet 10.1.40.0/24", "held"]);
    node.delete("subnets/10.1.40.0-24");
    runs(&node, "10.1.40.0/24");
}

#[test]
fn a_good_lease_is_not_given_away_for_a_subnet_that_cannot_be_had() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.agent("--subnet 10.1.15.0/24").end(Signal::TERM);
    let held = |subnet: &str| node.leases().iter().any(|(name, _)| name == subnet);
    for (wish, words) in
        [("10.1.40.0/24", "held by the lease of 10.1.40.0/24"), ("10.77.1.0/24", "is not a /24 between")]
    {
        let agent = node.agent_at_once(&format!("--subnet {wish}"));
        told(&node, "no-free-subnet", &[wish, words]);
        assert!(node.finding("no-free-subnet")["fix"].as_str().unwrap().contains("--subnet"));
        assert!(held("10.1.15.0-24"), "{:?}", node.leases());
        agent.end(Signal::TERM);
    }
    let _agent = node.agent_at_once("--subnet 10.1.16.0/24");
    runs(&node, "10.1.16.0/24");
    assert!(held("10.1.16.0-24") && !held("10.1.15.0-24"), "{:?}", node.leases());
}

#[test]
fn a_subnet_that_another_node_holds_is_claimed_no_longer_while_there_is_none() {
    for flags in ["--subnet 10.1.15.0/24", ""] {
        let Some((node, _dir)) = node() else { return };
        let config =
            r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.15.0","SubnetMax":"10.1.15.0","Backend":{"Type":"vxlan"}}"#;
        node.put("config", if flags.is_empty() { config } else { twill_e2e::node::CONFIG });
        node.put_peer(40);
        let agent = node.agent(flags);
        node.await_peer(40, true);
        let left = || {
            eventually("nothing says that it is ours", || {
                let said = [
                    node.host.ip("-br addr"),
                    node.host.ip("route show table all root 10.1.0.0/16"),
                    node.host.run("nft list ruleset"),
                    node.status()["subnets"].to_string(),
                    std::fs::read_to_string(node.file("subnet.env")).unwrap_or_default(),
                ];
                let said = said.join("\n");
                let right = !said.contains("10.1.15.") && !said.contains("flannel.1");
                if right { Ok(()) } else { Err((said, node.log("agent.log"))) }
            });
        };
        node.put_peer(15);
        told(&node, "no-free-subnet", &["10.1.15.0"]);
        left();
        assert_eq!(node.log("agent.log").matches("another node's now").count(), 1, "said once");
        // The next start claims nothing either, and neither does one that finds it lost.
        agent.end(Signal::TERM);
        let agent = node.agent_at_once(flags);
        told(&node, "no-free-subnet", &["10.1.15.0"]);
        left();
        node.delete("subnets/10.1.15.0-24");
        runs(&node, "10.1.15.0/24");
        node.await_peer(40, true);
        agent.end(Signal::KILL);
        node.put_peer(15);
        let _agent = node.agent_at_once(flags);
        told(&node, "no-free-subnet", &["10.1.15.0"]);
        left();
        node.delete("subnets/10.1.15.0-24");
        runs(&node, "10.1.15.0/24");
        node.await_peer(40, true);
    }
}

#[test]
fn an_address_that_no_host_can_have_is_not_told_to_others() {
    let Some((node, _dir)) = node() else { return };
    let disguised = ["::ffff:127.0.0.1", "::ffff:1.2.3.4", "::102:304", "100::1"];
    for ip in ["127.0.0.1", "0.0.0.0", "224.1.1.1", "255.255.255.255", "::1"].into_iter().chain(disguised) {
        let (code, said) = node.twill(&format!("agent --iface eth0 --public-ip {ip}"));
        assert_eq!(code, Some(2), "{said:?}");
        assert!(said.unwrap_err().contains(&format!("public-ip {ip} is not the address of a host")));
    }
    // What the config and the interface tell is looked at as soon as they are known.
    for (ip, why) in [
        ("10.1.3.4", "lies in the container network 10.1.0.0/16"),
        ("10.168.0.255", "is for all hosts of 10.168.0.0/24"),
    ] {
        let want = format!("public-ip {ip} {why}: a unicast address outside the container network is allowed");
        let check = node.twill_json(&format!("agent --check --public-ip {ip}"));
        let findings = check["findings"].as_array().unwrap();
        assert!(findings.iter().any(|f| f["code"] == "bad-public-ip" && f["evidence"] == want.as_str()), "{check}");
        let agent = node.agent_at_once(&format!("--public-ip {ip}"));
        told(&node, "bad-public-ip", &[&want]);
        agent.end(Signal::TERM);
    }
    assert!(node.leases().is_empty());
}

#[test]
fn an_address_that_no_host_can_have_is_not_programmed() {
    let Some((node, _dir)) = node() else { return };
    let _agent = node.agent("--subnet 10.1.15.0/24");
    let all =
        ["255.255.255.255", "10.168.0.255", "10.168.0.0", "224.0.0.1", "239.1.1.1", "127.0.0.1", "0.0.0.0", "10.1.9.9"];
    for ip in all {
        let data = r#"{"VNI":1,"VtepMAC":"02:00:00:00:00:28"}"#;
        let lease = format!(r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{data}}}"#);
        node.put("subnets/10.1.40.0-24", &lease);
        eventually(&format!("{ip} is named"), || {
            let findings = node.status()["findings"].take();
            let named = |f: &serde_json::Value| {
                let evidence = f["evidence"].as_str().unwrap();
                let value =
                    evidence.contains(&format!("PublicIP {ip} ")) || ip == "0.0.0.0" && evidence.contains("all zeros");
                f["code"] == "bad-lease-value" && f["object"] == "lease 10.1.40.0-24" && value
            };
            if findings.as_array().unwrap().iter().any(named) { Ok(()) } else { Err(findings) }
        });
        node.await_peer(40, false);
    }
    node.put_peer(40);
    node.await_peer(40, true);
}

#[test]
fn check_names_collisions_and_broken_leases_as_status_does() {
    let Some((node, _dir)) = node() else { return };
    let lease = |ip: &str, kind: &str| {
        format!(
            r#"{{"PublicIP":"{ip}","BackendType":"{kind}","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:28"}}}}"#
        )
    };
    node.put_peer(40);
    node.put("subnets/10.1.41.0-24", &lease("10.168.0.41", "vxlan"));
    node.put("subnets/10.1.42.0-24", "garbage");
    node.put("subnets/10.1.43.0-24", &lease("127.0.0.1", "vxlan"));
    node.put("subnets/10.1.44.0-24", &lease("10.168.0.44", "host-gw"));
    node.put("subnets/nonsense", &lease("10.168.0.45", "vxlan"));
    let of_leases = |shown: serde_json::Value| -> Vec<serde_json::Value> {
        let all = shown["findings"].as_array().unwrap().iter();
        all.filter(|finding| finding["object"].as_str().unwrap().starts_with("lease ")).cloned().collect()
    };
    let before = of_leases(node.twill_json("agent --check"));
    let codes: Vec<_> = before.iter().map(|finding| finding["code"].as_str().unwrap()).collect();
    let want = ["lease-collision", "bad-lease-value", "bad-lease-value", "foreign-backend", "bad-lease-key"];
    assert_eq!(codes, want, "{before:?}");
    assert_eq!(node.twill("agent --check").0, Some(3));
    // With a lease of its own it is not among them.
    let _agent = node.agent("--subnet 10.1.15.0/24");
    eventually("status says the same", || {
        let shown = of_leases(node.status());
        if shown == before { Ok(()) } else { Err(shown) }
    });
    assert_eq!(of_leases(node.twill_json("agent --check")), before);
}

#[test]
fn a_broken_or_beaten_wide_key_keeps_no_node_from_joining() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    for wide in [
        "garbage",
        r#"{"PublicIP":"10.168.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#,
    ] {
        node.put("subnets/10.1.0.0-16", wide);
        let agent = node.agent_at_once("");
        node.await_peer(40, true);
        eventually("the node has a subnet", || {
            let status = node.status();
            if status["state"] == "running" { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
        });
        agent.end(Signal::TERM);
        node.twill("clean").1.unwrap();
    }
}

#[test]
fn a_lease_that_is_skipped_takes_nobodys_place() {
    let Some((node, _dir)) = node() else { return };
    let lease = |ip: &str, vni: u8, mac: u8| {
        let data = format!(r#"{{"VNI":{vni},"VtepMAC":"02:00:00:00:00:{mac:02x}"}}"#);
        format!(r#"{{"PublicIP":"{ip}","BackendType":"vxlan","BackendData":{data}}}"#)
    };
    let skipped = [
        ("10.1.40.0-25", r#"{"PublicIP":"10.168.0.90"}"#.to_owned(), "foreign-backend"),
        ("10.1.41.0-25", lease("10.168.0.91", 7, 0x91), "vni-differs"),
        ("10.1.92.0-24", lease("10.168.0.92", 7, 42), "vni-differs"),
        ("192.0.2.0-24", lease("10.168.0.93", 1, 43), "outside-network"),
        ("10.1.44.0-23", lease("10.1.9.9", 1, 0x94), "bad-lease-value"),
        ("10.1.45.0-25", lease("255.255.255.255", 1, 0x95), "bad-lease-value"),
    ];
    for (key, value, _) in &skipped {
        node.put(&format!("subnets/{key}"), value);
    }
    let peers = [40, 41, 42, 43, 44, 45];
    peers.iter().for_each(|n| node.put_peer(*n));
    let _agent = node.agent("--subnet 10.1.15.0/24");
    peers.iter().for_each(|n| node.await_peer(*n, true));
    let status = node.status();
    for (key, _, code) in &skipped {
        let named = |f: &serde_json::Value| f["code"] == *code && f["object"] == format!("lease {key}");
        assert!(status["findings"].as_array().unwrap().iter().any(named), "{key} {code}: {status:#}");
    }
    // The same leases under another config: who is skipped, and who wins, has changed.
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#);
    eventually("those of VNI 7 are the peers", || {
        let shown = node.host.try_run("ip route show dev flannel.7").stdout;
        let routes = String::from_utf8_lossy(&shown).into_owned();
        let there = |net: &str| routes.contains(&format!("{net} via"));
        let good = there("10.1.41.0/25") && there("10.1.92.0/24") && routes.lines().count() == 2;
        if good { Ok(()) } else { Err((routes, node.log("agent.log"))) }
    });
}

#[test]
fn a_bridge_with_a_subnet_that_was_ours_keeps_nobody_from_starting() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    node.agent("--subnet 10.1.15.0/24").end(Signal::TERM);
    let agent = node.agent("");
    node.host.ip("link add docker0 type bridge");
    node.host.ip("addr add 10.1.15.1/24 dev docker0");
    node.host.ip("link set docker0 up");
    // Somebody else has the subnet now, and the node another one.
    let theirs =
        r#"{"PublicIP":"10.168.0.15","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:0f"}}"#;
    node.put("subnets/10.1.15.0-24", theirs);
    let moved = || {
        let status = node.status();
        let moved = status["state"] == "running" && status["subnets"][0] != "10.1.15.0/24";
        if moved { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
    };
    eventually("the node has another subnet", moved);
    agent.end(Signal::TERM);
    let _agent = node.agent_at_once("");
    eventually("it runs again with docker's bridge as it was", moved);
    node.host.ip("route del 10.1.40.0/24");
    node.await_peer(40, true);
    // What the bridge hides is named.
    assert!(node.finding("route-shadowed")["evidence"].as_str().unwrap().contains("docker0"));
}

#[test]
fn a_wide_lease_disturbs_no_peer_and_is_named_where_it_leaves_no_subnet() {
    let Some((node, _dir)) = node() else { return };
    let agent = node.agent("--subnet 10.1.15.0/24");
    let value =
        r#"{"PublicIP":"10.168.0.9","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:09"}}"#;
    node.put("subnets/10.1.0.0-16", value);
    node.put_peer(40);
    // The wide one loses to ours, and what has lost beats nobody.
    node.await_peer(40, true);
    let finding = node.finding("lease-collision");
    assert!(finding["object"].as_str().unwrap().contains("10.1.0.0-16"), "{finding}");
    agent.end(Signal::TERM);
    node.delete("subnets/10.1.15.0-24");
    std::fs::remove_dir_all(node.file("state")).unwrap();
    std::fs::remove_file(node.file("subnet.env")).unwrap();
    let _agent = node.agent_at_once("");
    told(&node, "no-free-subnet", &["no free subnet", "one lease alone holds 10.1.0.0/16"]);
    node.delete("subnets/10.1.0.0-16");
    eventually("the agent has a subnet", || std::fs::read_to_string(node.file("subnet.env")));
}

#[test]
fn names_and_values_of_others_do_not_steer_the_terminal() {
    let Some((node, _dir)) = node() else { return };
    let value = r#"{"PublicIP":"10.168.0.9","BackendType":"vx\u001b[31mlan","BackendData":{"VNI":1}}"#;
    node.put("subnets/10.1.9.0-24", value);
    node.put("subnets/\u{1b}[2Jx", "{}");
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.finding("bad-lease-key");
    for words in ["leases", "peers", "status", "store ls"] {
        let text = node.twill(words).1.unwrap();
        assert!(!text.contains('\u{1b}') && text.contains("u{1b}"), "{words}: {text:?}");
    }
}

#[test]
fn a_flush_is_repaired_and_no_fight_and_what_failed_once_is_not_told_for_ever() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    // Their loops may meet what the agent has repaired already, and say so.
    node.host.try_run("ip route flush 10.1.40.0/24");
    node.host.try_run("ip neigh flush dev flannel.1 nud permanent");
    node.await_peer(40, true);
    runs(&node, "10.1.15.0/24");
    // The new device has another name, and what the old one had fails until the peers are told.
    node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":7}}"#);
    eventually("the device follows", || {
        node.host.try_run("ip link show flannel.7").status.success().then_some(()).ok_or("")
    });
    eventually("nothing is left to say but the peer's VNI", || {
        let findings = node.status()["findings"].clone();
        let only = findings.as_array().unwrap().iter().all(|f| f["code"] == "vni-differs");
        if only { Ok(()) } else { Err(findings.to_string()) }
    });
}

#[test]
fn an_own_lease_that_is_deleted_or_overwritten_is_taken_again_or_given_up() {
    let Some((node, _dir)) = node() else { return };
    node.put_peer(40);
    let agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    agent.end(Signal::TERM);
    let agent = node.agent("");
    node.await_peer(40, true);
    let lease = |node: &Node, name: &str| node.leases().into_iter().find(|(n, _)| n == name).map(|(_, value)| value);
    let (index, before) = (node.host.json("link show flannel.1")[0]["ifindex"].clone(), lease(&node, "10.1.15.0-24"));
    // Deleted by hand: taken again as it was; device and peers stay.
    node.delete("subnets/10.1.15.0-24");
    eventually("the lease is back", || {
        let now = lease(&node, "10.1.15.0-24");
        if now == before { Ok(()) } else { Err((now, node.log("agent.log"))) }
    });
    node.await_peer(40, true);
    assert_eq!(node.host.json("link show flannel.1")[0]["ifindex"], index, "the device stays");
    // Another MAC or backend written into it by hand would lead every peer astray: put right at once, the second time after a while.
    let mine = before.clone().unwrap();
    let mac = node.host.json("link show flannel.1")[0]["address"].as_str().unwrap().to_owned();
    assert!(mine.contains(&mac), "{mine}");
    node.put("subnets/10.1.15.0-24", &mine.replace(&mac, "02:aa:aa:aa:aa:aa"));
    let is_back = || {
        let now = lease(&node, "10.1.15.0-24");
        if now == before { Ok(()) } else { Err((now, node.log("agent.log"))) }
    };
    eventually("the lease says again what is true", is_back);
    node.put("subnets/10.1.15.0-24", &mine.replace("\"vxlan\"", "\"host-gw\""));
    told(&node, "lease-altered", &["again and again"]);
    eventually("the lease says again what is true", is_back);
    // Another node writes itself into it: the subnet is left to it, and it becomes a peer of the subnet that we take instead.
    let theirs = r#"{"PublicIP":"10.168.0.15","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:0f"}}"#;
    node.put("subnets/10.1.15.0-24", theirs);
    node.await_peer(15, true);
    assert_eq!(lease(&node, "10.1.15.0-24").as_deref(), Some(theirs), "their lease is not touched");
    let subnet = node.status()["subnets"][0].as_str().unwrap().to_owned();
    assert_ne!(subnet, "10.1.15.0/24");
    let addresses = node.host.json("addr show flannel.1")[0]["addr_info"].to_string();
    assert!(addresses.contains(subnet.split('/').next().unwrap()) && !addresses.contains("10.1.15.0"), "{addresses}");
    let env = std::fs::read_to_string(node.file("subnet.env")).unwrap();
    assert!(!env.contains("10.1.15."), "{env}");
    node.await_peer(40, true);
    // A lease around ours that is older wins: while we were away somebody was given a part of our subnet back.
    agent.end(Signal::TERM);
    let name = subnet.replace('/', "-");
    let own = lease(&node, &name).unwrap();
    node.delete(&format!("subnets/{name}"));
    node.put(
        &format!("subnets/{}", name.replace("-24", "-25")),
        &theirs.replace("168.0.15", "168.0.16").replace("0f", "10"),
    );
    node.put(&format!("subnets/{name}"), &own);
    let _agent = node.agent("");
    eventually("the node takes another subnet, and gives the lost one back", || {
        let (status, left) = (node.status(), lease(&node, &name));
        let moved = status["state"] == "running" && status["subnets"][0] != subnet.as_str();
        if moved && left.is_none() { Ok(()) } else { Err((status.to_string(), left, node.log("agent.log"))) }
    });
    node.await_peer(40, true);
}

#[test]
fn a_store_that_was_not_asked_yet_is_not_away() {
    let Some((mut node, _dir)) = node() else { return };
    let store = |node: &Node, state: &str, words: &str| {
        eventually(&format!("the store is {state}"), || {
            let status = node.status();
            if status["store"]["state"] == state { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
        });
        let text = node.twill("status").1.unwrap();
        assert!(text.contains(words), "{text}");
    };
    // Without an underlay nobody asks it.
    node.host.ip("addr flush dev eth0");
    node.kill_store();
    let _agent = node.agent_at_once("");
    node.finding("iface-without-address");
    store(&node, "not-asked", "http://127.0.0.1:2379 not asked yet");
    node.host.ip("addr add 10.168.0.2/24 dev eth0");
    told(&node, "store-away", &["127.0.0.1:2379"]);
    store(&node, "away", "http://127.0.0.1:2379 away at revision 0");
}

#[test]
fn a_store_that_is_away_stops_neither_repairs_nor_the_way_out() {
    let Some((mut node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    node.kill_store();
    told(&node, "store-away", &["127.0.0.1:2379"]);
    node.host.ip("link del flannel.1");
    node.await_peer(40, true);
    let refused = node.twill("leave").1.unwrap_err();
    assert!(refused.contains("the store is away") && refused.contains("twill clean"), "{refused}");
    node.start_store();
    runs(&node, "10.1.15.0/24");
    assert_eq!(node.log("agent.log").matches("the data path keeps running").count(), 1, "said once");
}

#[test]
fn a_second_agent_on_a_host_is_refused_and_takes_nothing() {
    let Some((node, _dir)) = node() else { return };
    let agent = node.agent("--subnet 10.1.15.0/24");
    eventually("the lease stands", || (node.status()["state"] == "running").then_some(()).ok_or("not yet"));
    let stands = || {
        let key = "/coreos.com/network/subnets/";
        let leases = String::from_utf8(node.etcdctl(&["get", "--prefix", key, "-w", "fields"]).stdout).unwrap();
        let leases: Vec<String> =
            leases.lines().filter(|line| !line.starts_with("\"Revision\"")).map(str::to_owned).collect();
        (leases, node.host.run("ip -d addr show flannel.1"), node.host.run("nft list ruleset"))
    };
    let before = stands();
    let second = |words: &str| {
        let mut command = node.host.command(twill_e2e::bin("twill"));
        command.args(words.split_whitespace());
        for (name, folder) in [("STATE_DIR", "state2"), ("RUN_DIR", "run2"), ("SUBNET_FILE", "subnet2.env")] {
            command.env(format!("TWILL_{name}"), node.file(folder));
        }
        command
    };
    let state = node.file("state").canonicalize().unwrap();
    for words in ["agent --iface eth0", "agent --iface eth0 --takeover", "clean"] {
        let out = second(words).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        let errors: Vec<&str> = said.lines().filter(|line| line.contains("error: ")).collect();
        assert_eq!((out.status.code(), errors.len()), (Some(1), 1), "{words}: {said}");
        assert!(
            errors[0].contains(&format!("another agent (pid {}, ", agent.pid()))
                && errors[0].contains(&*state.to_string_lossy()),
            "{said}"
        );
        assert!(said.contains("hint: one agent serves a host; stop that one first: kill "), "{said}");
    }
    assert_eq!(stands(), before);
    assert!(!node.file("subnet2.env").exists() && !node.file("run2/twill.sock").exists());
    agent.end(Signal::KILL);
    // Its place is free at once, however it ended.
    let next = twill_e2e::node::spawn(second("agent --iface eth0"), &node.file("agent.log"));
    eventually("the next one runs", || std::fs::read_to_string(node.file("subnet2.env")));
    next.end(Signal::TERM);
}

#[test]
fn a_stranger_who_locks_the_namespace_keeps_no_agent_out() {
    let Some((node, _dir)) = node() else { return };
    if !installed("flock") || !installed("setpriv") {
        return;
    }
    let lock = "setpriv --reuid 65534 --clear-groups flock --no-fork /proc/self/ns/net";
    let can = node.host.try_run(&format!("{lock} true"));
    if !can.status.success() {
        println!("SKIP: nobody else can be here: {}", String::from_utf8_lossy(&can.stderr));
        return;
    }
    let mut words = lock.split(' ');
    let mut command = node.host.command(words.next().unwrap());
    command.args(words).args(["sleep", "infinity"]);
    let stranger = twill_e2e::node::spawn(command, &node.file("stranger.log"));
    eventually("it holds the lock", || {
        let out = node.host.try_run("flock -n /proc/self/ns/net true");
        if out.status.success() { Err("free") } else { Ok(()) }
    });
    let _agent = node.agent("--subnet 10.1.15.0/24");
    assert!(node.log("agent.log").contains("another user"), "{}", node.log("agent.log"));
    stranger.end(Signal::KILL);
}

#[test]
fn a_new_address_of_the_underlay_breaks_no_connection_to_the_store() {
    let Some((node, _dir)) = node() else { return };
    let mut serve = node.other.command(twill_e2e::bin("twill"));
    serve.args(["store", "serve", "--insecure", "--listen", "10.168.0.3:2379", "--data"]).arg(node.file("store2"));
    let store = twill_e2e::node::spawn(serve, &node.file("store2.log"));
    let there = |words: &str| {
        let out = node.other.try_run(&format!("etcdctl --endpoints http://10.168.0.3:2379 {words}"));
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        if out.status.success() { Ok(text(&out.stdout)) } else { Err(text(&out.stderr)) }
    };
    let config = format!("put /coreos.com/network/config {}", twill_e2e::node::CONFIG);
    eventually("the store takes the config", || there(&config));
    let _agent = node.agent("--subnet 10.1.15.0/24 --store http://10.168.0.3:2379");
    runs_at(&node, "10.168.0.2");
    for (old, new) in [("10.168.0.2/24", "10.168.0.9/24"), ("10.168.0.9/24", "10.168.0.10/24")] {
        node.host.ip(&format!("addr del {old} dev eth0"));
        node.host.ip(&format!("addr add {new} dev eth0"));
        let ip = new.trim_end_matches("/24");
        eventually("lease and device follow", || {
            let lease = there("get --prefix /coreos.com/network/subnets/")?;
            let link = node.host.run("ip -d link show flannel.1");
            let good = lease.contains(&format!("\"PublicIP\":\"{ip}\"")) && link.contains(&format!("local {ip} "));
            if good { Ok(()) } else { Err(format!("{lease} {link} {}", node.log("agent.log"))) }
        });
        // The watch is a new one, too.
        let peer = if ip.ends_with('9') { 40 } else { 41 };
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{peer:02x}"}}"#);
        let lease = format!(r#"{{"PublicIP":"10.168.0.{peer}","BackendType":"vxlan","BackendData":{data}}}"#);
        there(&format!("put /coreos.com/network/subnets/10.1.{peer}.0-24 {lease}")).unwrap();
        node.await_peer(peer, true);
    }
    // Nothing was waited for: a connection that hangs is seen as a store that is away.
    let log = node.log("agent.log");
    assert!(!log.contains("store-away"), "{log}");
    store.end(Signal::KILL);
}

/// Waits until the node runs, at this address.
fn runs_at(node: &Node, address: &str) {
    eventually(&format!("the node runs at {address}"), || {
        let status = node.status();
        let right = status["state"] == "running" && status["underlay"]["addresses"][0] == address;
        if right { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
    });
}
