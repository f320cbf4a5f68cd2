//! An agent that starts while its store is away goes by what the store said last: that is made and repaired, and nothing is withdrawn.

use std::path::Path;

use rustix::fs::inotify;
use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::node::{CONFIG, Node};
use twill_e2e::overlay::Overlay;
use twill_e2e::{eventually, grants, installed};

fn node() -> Option<(Node, tempfile::TempDir)> {
    if !installed("etcdctl") {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Node::new(Bed::new()?, dir.path()), dir))
}

/// Waits until the cache has these leases, and only these.
fn await_cached(file: &Path, leases: &[&str]) {
    eventually(&format!("the cache has {leases:?}"), || {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let cache: Value = serde_json::from_str(&text).unwrap_or_default();
        let none = Vec::new();
        let names: Vec<_> = cache["leases"].as_array().unwrap_or(&none).iter().map(|lease| &lease["name"]).collect();
        if names == leases { Ok(()) } else { Err(text) }
    });
}

/// Changes the cache as it stands on disk.
fn edit(node: &Node, change: impl FnOnce(&mut Value)) {
    let file = node.file("state/cache.json");
    let mut cache = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    change(&mut cache);
    std::fs::write(&file, cache.to_string()).unwrap();
}

/// A node with these peers whose agent was killed after its store.
fn orphan(peers: &[u8]) -> Option<(Node, tempfile::TempDir)> {
    let (mut node, dir) = node()?;
    // As one that was killed while it wrote has left it.
    let half = node.file("state/.cache.json.4194305");
    std::fs::create_dir_all(node.file("state")).unwrap();
    std::fs::write(&half, "{").unwrap();
    peers.iter().for_each(|n| node.put_peer(*n));
    let agent = node.agent("--subnet 10.1.15.0/24");
    peers.iter().for_each(|n| node.await_peer(*n, true));
    let mut names = vec!["10.1.15.0-24".to_owned()];
    names.extend(peers.iter().map(|n| format!("10.1.{n}.0-24")));
    await_cached(&node.file("state/cache.json"), &names.iter().map(String::as_str).collect::<Vec<_>>());
    eventually("nothing half made is left", || if half.exists() { Err(node.log("agent.log")) } else { Ok(()) });
    node.kill_store();
    agent.end(Signal::KILL);
    Some((node, dir))
}

/// Waits until nothing is wrong, with the subnet that it had.
fn runs(node: &Node) {
    eventually("the node runs, and nothing is left to say", || {
        let status = node.status();
        let right = status["state"] == "running"
            && status["store"]["state"] == "up"
            && status["subnets"][0] == "10.1.15.0/24"
            && status["findings"] == json!([]);
        if right { Ok(()) } else { Err((status.to_string(), node.log("agent.log"))) }
    });
}

/// The leases of the peers that are shown.
fn peers(node: &Node) -> Vec<String> {
    let shown = node.twill_json("peers");
    shown["peers"].as_array().unwrap().iter().map(|peer| peer["lease"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn peers_are_shown_while_the_store_is_away() {
    let Some((mut node, _dir)) = node() else { return };
    [40, 41].iter().for_each(|n| node.put_peer(*n));
    let _agent = node.agent("--subnet 10.1.15.0/24");
    [40, 41].iter().for_each(|n| node.await_peer(*n, true));
    let before = node.twill_json("peers");
    node.kill_store();
    node.finding("store-away");
    assert_eq!((node.twill_json("peers"), peers(&node).len()), (before, 2));
    node.start_store();
    node.delete("subnets/10.1.40.0-24");
    eventually("the store's word holds", || match peers(&node).as_slice() {
        [one] if one == "10.1.41.0-24" => Ok(()),
        peers => Err(peers.to_vec()),
    });
}

fn left_aside(node: &Node, reason: &str) {
    eventually("the log says why the cache is left aside", || {
        let log = node.log("agent.log");
        if log.contains(&format!("left aside: {reason}")) { Ok(()) } else { Err(log) }
    });
}

#[test]
fn what_a_reboot_takes_away_is_back_before_the_store_is() {
    let Some((mut node, _dir)) = orphan(&[40]) else { return };
    let mac = node.host.json("link show flannel.1")[0]["address"].clone();
    node.host.ip("link del flannel.1");
    node.host.ip("route del blackhole 10.1.15.0/24 metric 4294967295");
    let nft = installed("nft");
    if nft {
        node.host.run("nft delete table inet twill");
    }
    edit(&node, |cache| cache["at"] = (cache["at"].as_u64().unwrap() - 10_000).into());
    // This waits for subnet.env, which a reboot takes away as well.
    let _agent = node.agent("");
    node.await_peer(40, true);
    let device = &node.host.json("-d addr show flannel.1")[0];
    assert_eq!((&device["address"], &device["addr_info"][0]["local"]), (&mac, &json!("10.1.15.0")), "{device}");
    assert!(node.host.ip("route show type blackhole").contains("10.1.15.0/24"));
    if nft {
        assert!(node.host.run("nft list table inet twill").contains("masquerade"));
    }
    let status = node.status();
    assert_eq!((&status["state"], &status["store"]["state"]), (&json!("running"), &json!("away")), "{status}");
    assert_eq!(peers(&node), ["10.1.40.0-24"]);
    node.finding("store-away");
    let finding = node.finding("listing-cached");
    let evidence = finding["evidence"].as_str().unwrap();
    assert!(evidence.contains("came 2 h ago, with 2 leases"), "{finding}");
    assert_ne!(finding["fix"], "");
    // What is altered meanwhile is repaired, as ever.
    node.host.ip("route del 10.1.40.0/24");
    node.await_peer(40, true);
    assert!(node.twill("leave").1.unwrap_err().contains("the store is away"));
    node.start_store();
    node.put_peer(41);
    node.await_peer(41, true);
    node.await_peer(40, true);
    runs(&node);
}

#[test]
fn what_the_kernel_alone_knows_stays_until_the_store_answers() {
    let Some((mut node, _dir)) = orphan(&[40, 41]) else { return };
    edit(&node, |cache| cache["leases"].as_array_mut().unwrap().retain(|lease| lease["name"] != "10.1.41.0-24"));
    node.host.ip("route del 10.1.40.0/24");
    node.host.ip("neigh del 10.1.40.0 dev flannel.1");
    let _agent = node.agent("");
    node.await_peer(40, true);
    node.await_peer(41, true);
    // Then it is known again; and one that has left meanwhile goes.
    node.start_store();
    node.delete("subnets/10.1.40.0-24");
    node.await_peer(40, false);
    runs(&node);
    node.await_peer(41, true);
}

#[test]
fn a_cache_that_is_not_this_nodes_is_left_aside_in_words() {
    let Some((node, _dir)) = orphan(&[40]) else { return };
    node.host.ip("link del flannel.1");
    let file = node.file("state/cache.json");
    let good = std::fs::read(&file).unwrap();
    let text = String::from_utf8(good.clone()).unwrap();
    let identity = text.split(r#"node\":\""#).nth(1).unwrap().split('\\').next().unwrap().to_owned();
    let changed = |from: &str, to: &str| {
        let changed = text.replace(from, to);
        assert_ne!(changed, text, "{from}");
        changed.into_bytes()
    };
    let store = text.split(r#""store":"#).nth(1).unwrap().split(',').next().unwrap();
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("--prefix /other", good.clone(), "it is of the prefix \"/coreos.com/network\""),
        ("--store http://127.0.0.1:2378", good.clone(), "it is of another store"),
        ("", changed(&format!(r#""store":{store}"#), r#""store":1"#), "it is of another store"),
        ("", changed("10.1.0.0/16", "10.2.0.0/16"), "it is of another network than 10.1.0.0/16"),
        ("", changed("vxlan\\\"}}", "vxlan\\\"}"), "network config"),
        ("", good[..good.len() / 2].to_vec(), "the state file is broken"),
        ("", b"\xff\x1b[31m".to_vec(), "the state file is broken"),
        ("", changed(r#""version":1"#, r#""version":9"#), "the state file has version 9"),
        ("", changed(&identity, &"0".repeat(32)), "no lease in it is this node's"),
    ];
    for (flags, bytes, reason) in cases {
        std::fs::write(&file, bytes).unwrap();
        std::fs::remove_file(node.file("agent.log")).unwrap();
        let agent = node.agent_at_once(flags);
        left_aside(&node, reason);
        node.finding("store-away");
        let status = node.status();
        assert_eq!(status["findings"].as_array().unwrap().len(), 1, "{reason}: {status}");
        assert!(!node.host.run("ip link").contains("flannel"), "{reason}: nothing is made");
        agent.end(Signal::TERM);
        let log = node.log("agent.log");
        assert_eq!(log.matches("left aside").count(), 1, "said once: {log}");
        assert!(!log.contains("panicked") && !log.contains("\u{1b}[31m"), "{log}");
    }
    // As it was it is good.
    std::fs::write(&file, good).unwrap();
    let _agent = node.agent("");
    node.await_peer(40, true);
}

#[test]
fn the_cache_is_written_when_something_changes_and_only_then() {
    let Some((mut node, _dir)) = node() else { return };
    node.put_peer(40);
    let _agent = node.agent("--subnet 10.1.15.0/24");
    node.await_peer(40, true);
    let file = node.file("state/cache.json");
    await_cached(&file, &["10.1.15.0-24", "10.1.40.0-24"]);
    let told = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
    inotify::add_watch(&told, node.file("state"), inotify::WatchFlags::MOVED_TO).unwrap();
    // Drift is no change of what the store says, and neither is the same listing after a while without one.
    node.host.ip("link del flannel.1");
    node.await_peer(40, true);
    node.kill_store();
    node.finding("store-away");
    node.start_store();
    runs(&node);
    node.put_peer(41);
    node.put_peer(42);
    await_cached(&file, &["10.1.15.0-24", "10.1.40.0-24", "10.1.41.0-24", "10.1.42.0-24"]);
    let mut space = [std::mem::MaybeUninit::uninit(); 4096];
    let mut events = inotify::Reader::new(&told, &mut space);
    let mut writes = 0;
    while let Ok(event) = events.next() {
        writes += usize::from(event.file_name().is_some_and(|name| name.to_bytes() == b"cache.json"));
    }
    assert!((1..=2).contains(&writes), "{writes} writes for two changes");
}

#[test]
fn a_cache_that_cannot_be_written_is_named_until_it_can() {
    let Some((node, _dir)) = node() else { return };
    std::fs::create_dir_all(node.file("state/cache.json")).unwrap();
    let _agent = node.agent("--subnet 10.1.15.0/24");
    let finding = node.finding("cache-unwritable");
    assert!(finding["object"].as_str().unwrap().ends_with("state/cache.json"), "{finding}");
    std::fs::remove_dir(node.file("state/cache.json")).unwrap();
    runs(&node);
    await_cached(&node.file("state/cache.json"), &["10.1.15.0-24"]);
}

#[test]
fn clean_and_leave_remove_the_cache() {
    let Some((node, _dir)) = node() else { return };
    let file = node.file("state/cache.json");
    let agent = node.agent("--subnet 10.1.15.0/24");
    await_cached(&file, &["10.1.15.0-24"]);
    let dry = node.twill_json("leave --dry-run");
    assert!(dry["steps"].to_string().contains("cache.json"), "{dry}");
    assert_eq!(node.twill_json("leave")["steps"], dry["steps"]);
    assert!(!file.exists());
    drop(agent);
    let agent = node.agent("--subnet 10.1.15.0/24");
    await_cached(&file, &["10.1.15.0-24"]);
    agent.end(Signal::TERM);
    let dry = node.twill_json("clean --dry-run");
    assert!(dry["steps"].to_string().contains("cache.json") && file.exists(), "{dry}");
    node.twill("clean").1.unwrap();
    assert!(!file.exists());
}

#[test]
fn a_listing_that_lacks_everybody_withdraws_nobody_of_the_cache() {
    let Some((mut node, _dir)) = orphan(&[40, 41]) else { return };
    node.host.ip("link del flannel.1");
    let _agent = node.agent("");
    node.await_peer(40, true);
    // Another store under the same address: other cluster, nothing in it.
    std::fs::rename(node.file("store"), node.file("store.lost")).unwrap();
    node.start_store();
    node.put("config", CONFIG);
    node.finding("strange-listing");
    // The cache alone is no lease: it is taken again.
    eventually("our lease is in the store", || {
        let leases = node.leases();
        if leases.iter().any(|(name, _)| name == "10.1.15.0-24") { Ok(()) } else { Err(node.log("agent.log")) }
    });
    node.host.ip("link del flannel.1");
    node.await_peer(40, true);
    node.await_peer(41, true);
    await_cached(&node.file("state/cache.json"), &["10.1.15.0-24", "10.1.40.0-24", "10.1.41.0-24"]);
    // While the store is away again nothing is accepted, and nobody is told that it were.
    node.kill_store();
    node.finding("store-away");
    let said = node.twill("resync --accept").1.unwrap_err();
    assert!(said.contains("nothing is withdrawn now"), "{said}");
    node.start_store();
    eventually("it is accepted", || {
        let (_, said) = node.twill("resync --accept -o json");
        if said.as_ref().is_ok_and(|said| said.contains("\"withdrawn\": 2")) { Ok(()) } else { Err(said) }
    });
    node.await_peer(40, false);
    runs(&node);
    await_cached(&node.file("state/cache.json"), &["10.1.15.0-24"]);
}

#[test]
fn the_udp_tunnel_carries_packets_again_without_a_store() {
    if !installed("etcdctl") || !grants("udp") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let Some(bed) = Bed::new() else { return };
    let mut net = Overlay::running(bed, dir.path());
    await_cached(&net.site(1).file("state/cache.json"), &["100.96.1.0-24", "100.96.2.0-24"]);
    net.kill_store();
    net.site_mut(1).stop(Signal::KILL);
    let site = net.site(1);
    site.host.ip("link del flannel0");
    std::fs::remove_file(site.file("state/tunnel.json")).unwrap();
    net.site_mut(1).start("");
    net.await_both_ways();
    eventually("the peer is shown, and the store as away", || {
        let status = net.site(1).status();
        let right = status["store"]["state"] == "away" && status["peers"] == 1;
        if right { Ok(()) } else { Err(status.to_string()) }
    });
    net.start_store();
    eventually("nothing is left to say", || {
        let status = net.site(1).status();
        let right = status["state"] == "running" && status["findings"] == json!([]);
        if right { Ok(()) } else { Err((status.to_string(), net.site(1).log())) }
    });
    net.await_both_ways();
}
