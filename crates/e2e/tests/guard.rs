//! What the network keeps out, for each backend and family: stolen sources, and containers whose subnet was taken away.
//!
//! ```text
//!   container 10.1.15.2, fd00:1:0:f::2 ─ cni0 ─ node ─ eth0 10.168.0.2, fd00:168::2 ───── eth0 10.168.0.3, fd00:168::3 ─ other
//!                                                 └ flannel.1, flannel-v6.1 or flannel0
//! ```

use rustix::process::Signal;
use serde_json::json;
use twill_e2e::capture::Capture;
use twill_e2e::net::Bed;
use twill_e2e::site::Site;
use twill_e2e::{eventually, grants, installed};

/// Both families, over a backend.
fn site(backend: &str) -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !grants(backend) || !["etcdctl", "nft", "tcpdump"].iter().all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new(bed, dir.path());
    site.speak_ipv6();
    let config = json!({
        "Network": "10.1.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:1::/48", "Backend": {"Type": backend},
    });
    site.node.put("config", &config.to_string());
    Some((site, dir))
}

/// The tunnel devices of a backend, for IPv4 and for IPv6.
fn devices(backend: &str) -> [&str; 2] {
    if backend == "udp" { ["flannel0"; 2] } else { ["flannel.1", "flannel-v6.1"] }
}

/// Sends until a rule of `chain` with these words has dropped some more.
fn dropped(site: &Site, what: &str, chain: &str, words: [&str; 2], send: impl Fn()) {
    let before = site.node.dropped(chain, &words);
    eventually(what, || {
        send();
        let now = site.node.dropped(chain, &words);
        if now > before { Ok(()) } else { Err(site.node.host.run("nft list table inet twill")) }
    });
}

#[test]
fn no_container_sends_another_nodes_address_into_the_tunnel() {
    for backend in ["vxlan", "udp"] {
        let Some((site, _dir)) = site(backend) else { return };
        let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
        site.plug();
        site.plug6();
        let tunnels = devices(backend);
        // A peer that is nobody: what goes to it goes into the tunnel.
        let lease = if backend == "udp" {
            json!({"PublicIP": "10.168.0.3", "PublicIPv6": "fd00:168::3"})
        } else {
            json!({"PublicIP": "10.168.0.3", "PublicIPv6": "fd00:168::3", "BackendType": "vxlan",
                "BackendData": {"VNI": 1, "VtepMAC": "02:00:00:00:00:28"},
                "BackendV6Data": {"VNI": 1, "VtepMAC": "02:00:00:00:06:28"}})
        };
        site.node.put("subnets/10.1.40.0-24&fd00:1:0:28::-64", &lease.to_string());
        for (stolen, own, to, device, saddr) in [
            ("10.1.77.7", "10.1.15.2", "10.1.40.2", tunnels[0], "ip saddr 10.1.0.0/16"),
            ("fd00:1:0:4d::7", "fd00:1:0:f::2", "fd00:1:0:28::2", tunnels[1], "ip6 saddr fd00:1::/48"),
        ] {
            let (len, nodad) = if stolen.contains(':') { (128, "nodad") } else { (32, "") };
            site.container.ip(&format!("addr add {stolen}/{len} dev eth0 {nodad}"));
            let oif = format!("oifname \"{device}\"");
            let sends = |from: &str| drop(site.container.try_run(&format!("ping -c 1 -W 1 -I {from} {to}")));
            // With its own address it gets there: what a person outside would see of both.
            let sent = |host: &str| {
                let text = host.to_owned();
                eventually("the container's own packets go into the tunnel", || {
                    sends(own);
                    let link = site.node.host.json(&format!("-s link show {device}"));
                    let packets = link[0]["stats64"]["tx"]["packets"].as_u64().unwrap();
                    if packets > 0 { Ok(packets) } else { Err((text.clone(), link)) }
                })
            };
            sent(own);
            dropped(&site, "a stolen source is dropped before the tunnel", "forward", [&oif, saddr], || sends(stolen));
        }
    }
}

#[test]
fn nobody_comes_through_the_tunnel_with_an_address_of_this_nodes() {
    let Some((site, _dir)) = site("vxlan") else { return };
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    site.peer();
    site.peer6();
    site.arrives("flannel.1", "10.1.40.0");
    site.arrives("flannel-v6.1", "fd00:1:0:28::");
    for (stolen, container, node, device, saddr) in [
        ("10.1.15.9/32", "10.1.15.2", "10.1.15.0", "flannel.1", "ip saddr 10.1.15.0/24"),
        ("fd00:1:0:f::9/128", "fd00:1:0:f::2", "fd00:1:0:f::", "flannel-v6.1", "ip6 saddr fd00:1:0:f::/64"),
    ] {
        site.node.other.ip(&format!("addr add {stolen} dev lo"));
        let (from, iif) = (stolen.split('/').next().unwrap(), format!("iifname \"{device}\""));
        for to in [container, node] {
            let send = || drop(site.node.other.try_run(&format!("ping -c 1 -W 1 -I {from} {to}")));
            dropped(&site, "a stolen source is dropped behind the tunnel", "heard", [&iif, saddr], send);
        }
    }
}

#[test]
fn a_udp_tunnel_takes_no_address_of_this_nodes_from_a_peer_in_either_family() {
    let Some((site, _dir)) = site("udp") else { return };
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    let lease = json!({"PublicIP": "10.168.0.3", "PublicIPv6": "fd00:168::3"});
    site.node.put("subnets/10.1.40.0-24&fd00:1:0:28::-64", &lease.to_string());
    let tunnel = |what: &str| {
        let tunnel = &site.node.status()["tunnel"];
        if what == "received" {
            return tunnel["received"]["packets"].as_u64().unwrap();
        }
        let drops = tunnel["drops"].as_array().cloned().unwrap_or_default();
        drops.iter().find(|drop| drop["cause"] == what).map_or(0, |drop| drop["packets"].as_u64().unwrap())
    };
    // IPv6, IPv4: header and a UDP datagram of one byte.
    let six = |from: &str| format!("60000000000911 40{from}fd000001 0000000f 0000000000000002 a55a a55a0009000058");
    let four = |from: &str, sum: &str| format!("4500001d000100004011{sum}{from}0a010f02 a55aa55a0009000058");
    for (packet, what) in [
        (six("fd000001 0000000f 0000000000000009"), "wrong-source"),
        (six("fd000001 00000028 0000000000000002"), "received"),
        (four("0a010f09", "48c3"), "wrong-source"),
        (four("0a012802", "2fca"), "received"),
    ] {
        let (packet, before) = (packet.replace(' ', ""), tunnel(what));
        eventually(&format!("{packet}: {what}"), || {
            site.node
                .other
                .run(&format!("{} packet 10.168.0.3:5555 10.168.0.2:8285 {packet}", env!("CARGO_BIN_EXE_wire")));
            let now = tunnel(what);
            if now > before { Ok(()) } else { Err((now, site.node.status())) }
        });
    }
}

#[test]
fn containers_of_a_subnet_that_was_taken_away_run_on_and_are_fenced_off() {
    for backend in ["vxlan", "udp"] {
        let Some((site, _dir)) = site(backend) else { return };
        let first = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
        first.end(Signal::TERM);
        // It keeps its subnets, and no longer insists on them.
        let _agent = site.node.agent("");
        site.plug();
        site.plug6();
        site.attached(&["10.1.15.2/24", "fd00:1:0:f::2/64"]);
        let fits = if backend == "udp" { 1472 } else { 1430 };
        let finding = site.node.finding("container-mtu");
        let evidence = finding["evidence"].as_str().unwrap();
        assert!(evidence.starts_with(&format!("its MTU is 1500, and the network carries {fits}")), "{finding}");
        // Both subnets are somebody else's now, and some other peer is there.
        let lease = |n: u8| match backend {
            "udp" => json!({"PublicIP": format!("10.168.0.{n}"), "PublicIPv6": format!("fd00:168::{n}")}),
            _ => {
                json!({"PublicIP": format!("10.168.0.{n}"), "PublicIPv6": format!("fd00:168::{n}"), "BackendType": "vxlan",
                "BackendData": {"VNI": 1, "VtepMAC": format!("02:00:00:00:00:{n}")},
                "BackendV6Data": {"VNI": 1, "VtepMAC": format!("02:00:00:00:06:{n}")}})
            }
        };
        site.node.put("subnets/10.1.40.0-24&fd00:1:0:28::-64", &lease(40).to_string());
        let taken = "subnets/10.1.15.0-24&fd00:1:0:f::-64";
        site.node.delete(taken);
        let stranded = eventually("the container is stranded", || {
            site.node.put(taken, &lease(15).to_string());
            let status = site.node.status();
            let all = status["findings"].as_array().unwrap();
            let found = all.iter().find(|finding| finding["code"] == "container-stranded").cloned();
            let moved = status["subnets"][0] != "10.1.15.0/24" && status["subnets"][1] != "fd00:1:0:f::/64";
            found.filter(|_| moved).ok_or((status.to_string(), site.node.log("agent.log")))
        });
        assert_eq!(stranded["object"], "container box, device eth0");
        assert!(stranded["fix"].as_str().unwrap().contains("all others of that subnet"), "{stranded}");
        // No command of a finding cuts it off, and why the new owner is out of reach is said in words.
        if backend == "vxlan" {
            eventually("the subnets that the bridge still has are named", || {
                let status = site.node.status();
                let all = status["findings"].as_array().unwrap();
                let of = |code: &str| all.iter().filter(|f| f["code"] == code).cloned().collect::<Vec<_>>();
                let shadowed = of("route-shadowed");
                let says = |word: &str| {
                    shadowed.iter().any(|f| {
                        f["evidence"].as_str().unwrap().contains(&format!("cni0 has the address {word}"))
                            && f["fix"].as_str().unwrap().starts_with("end the containers on cni0")
                    })
                };
                let good = shadowed.len() == 2 && says("10.1.15.1/24") && says("fd00:1:0:f::1/64");
                if good && of("kernel-refused").is_empty() {
                    Ok(())
                } else {
                    Err((status.clone(), site.node.log("agent.log")))
                }
            });
        }
        let tunnels = devices(backend);
        for (to, device, saddr) in
            [("10.1.40.2", tunnels[0], "ip saddr 10.1.0.0/16"), ("fd00:1:0:28::2", tunnels[1], "ip6 saddr fd00:1::/48")]
        {
            let send = || drop(site.container.try_run(&format!("ping -c 1 -W 1 {to}")));
            let oif = format!("oifname \"{device}\"");
            dropped(&site, "it is fenced off from other nodes", "forward", [&oif, saddr], send);
        }
        // It runs on as it is: with its device, its neighbours and its way out.
        let link = site.node.host.json("link show veth0");
        assert_eq!((&link[0]["mtu"], &link[0]["operstate"]), (&1500.into(), &"UP".into()));
        for (gateway, outside) in [("10.1.15.1", "10.168.0.3"), ("fd00:1:0:f::1", "fd00:168::3")] {
            site.container.run(&format!("ping -c 1 -W 5 {gateway}"));
            site.arrives("eth0", outside);
        }
    }
}

#[test]
fn containers_of_a_former_network_are_listed() {
    let Some((site, _dir)) = site("vxlan") else { return };
    site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64").end(Signal::TERM);
    let _agent = site.node.agent("");
    site.plug();
    site.attached(&["10.1.15.2/24"]);
    let stranded = || site.node.status()["findings"].to_string().contains("container-stranded");
    assert!(!stranded());
    let config = json!({"Network": "10.2.0.0/16", "Backend": {"Type": "vxlan"}});
    site.node.put("config", &config.to_string());
    let finding = site.node.finding("container-stranded");
    assert!(finding["evidence"].as_str().unwrap().contains("10.1.15.2"), "{finding}");
    // An address that was never of this node's subnets is somebody else's affair.
    site.attached(&["192.0.2.2/24"]);
    assert!(!stranded());
    // Nor is the file of a container that was, kept for the next one.
    site.attached(&["10.1.15.2/24"]);
    assert!(stranded());
    let file = site.node.file("state/attachments/box:eth0.json");
    std::fs::rename(&file, file.with_file_name(".spare")).unwrap();
    assert!(!stranded());
}

#[test]
fn a_vxlan_peer_that_sends_from_another_address_than_its_lease_tells_is_heard() {
    let Some((site, _dir)) = site("vxlan") else { return };
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.peer();
    // As behind a router that translates addresses, or with a second one on the wire.
    site.node.other.ip("addr add 10.168.0.99/24 dev eth0");
    site.node.other.ip("link set flannel.1 type vxlan local 10.168.0.99");
    site.arrives("flannel.1", "10.1.40.0");
    let answers = site.node.other.try_run("ping -c 1 -W 1 -I 10.1.40.0 10.1.15.2");
    assert!(answers.status.success(), "{answers:?}");
    eventually("its datagrams have the other address", || {
        let capture =
            Capture::start(&site.node.host, "eth0", &[], Some(1), "inbound and udp port 8472 and src 10.168.0.99");
        site.node.other.try_run("ping -c 5 -i 0.2 -W 1 -I 10.1.40.0 10.1.15.2");
        capture.stop();
        if capture.text().is_empty() { Err(()) } else { Ok(()) }
    });
}
