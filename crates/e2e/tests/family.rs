//! IPv6 alone, both families together, one of them lacking, and the MTU that each has.
//!
//! ```text
//!   container 10.1.15.2, fd00:1:0:f::2 ─ cni0 ─ node ─ eth0 10.168.0.2, fd00:168::2 ───── eth0 10.168.0.3, fd00:168::3 ─ other
//!                                                 └ flannel.1, flannel-v6.1 ····· flannel-v6.1 fd00:1:0:28::
//! ```

use rustix::process::Signal;
use serde_json::json;
use twill_e2e::net::Bed;
use twill_e2e::site::Site;
use twill_e2e::{eventually, grants, installed};

const DUAL: &str =
    r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;
const ALONE: &str = r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;

/// A site whose hosts have both families on the wire.
fn site() -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !["etcdctl", "nft", "tcpdump"].iter().all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new(bed, dir.path());
    site.speak_ipv6();
    Some((site, dir))
}

fn env(site: &Site) -> String {
    std::fs::read_to_string(site.node.file("subnet.env")).unwrap()
}

fn mtu(site: &Site, device: &str) -> u64 {
    site.node.host.json(&format!("link show {device}"))[0]["mtu"].as_u64().unwrap()
}

#[test]
fn ipv6_alone_end_to_end_and_on_its_way_out() {
    let Some((site, _dir)) = site() else { return };
    // No host of such a network has an IPv4 address: what flannel tells as 0.0.0.0 would match every other's.
    for host in [&site.node.host, &site.node.other] {
        host.ip("-4 addr flush dev eth0");
    }
    site.node.put("config", ALONE);
    let _agent = site.node.agent("--subnet fd00:1:0:f::/64");
    assert_eq!(
        env(&site),
        "FLANNEL_IPV6_NETWORK=fd00:1::/48\nFLANNEL_IPV6_SUBNET=fd00:1:0:f::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    );
    assert_eq!(mtu(&site, "flannel-v6.1"), 1430, "1500 - 40 - 8 - 8 - 14");
    let leases = site.node.leases();
    assert_eq!(leases[0].0, "0.0.0.0-0&fd00:1:0:f::-64");
    assert!(leases[0].1.contains(r#""PublicIPv6":"fd00:168::2""#), "{leases:?}");
    let route = site.node.host.json("-6 route show fd00:1:0:f::/64 type blackhole");
    assert_eq!(route[0]["metric"], 4_294_967_295u32, "{route}");
    site.plug6();
    site.peer6();
    let inside = site.arrives("flannel-v6.1", "fd00:1:0:28::");
    assert!(inside.contains("IP6 fd00:1:0:f::2 > fd00:1:0:28::: ICMP6, echo request"), "{inside}");
    let out = site.arrives("eth0", "fd00:168::3");
    assert!(out.contains("IP6 fd00:168::2 > fd00:168::3: ICMP6, echo request"), "{out}");
    assert_eq!(site.node.twill_json("plan")["steps"], json!([]));
}

#[test]
fn two_nodes_without_ipv4_have_two_subnets() {
    let Some((site, dir)) = site() else { return };
    site.node.put("config", ALONE);
    let _agent = site.node.agent("");
    // The second node's lease, as a flannel without IPv4 writes it: its PublicIP is nobody's, and so is not ours.
    let value = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00:168::3","BackendType":"vxlan","BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:28"}}"#;
    site.node.put("subnets/0.0.0.0-0&fd00:1:0:28::-64", value);
    eventually("the other is a peer", || {
        let routes = site.node.host.run("ip -6 route show dev flannel-v6.1");
        if routes.contains("fd00:1:0:28::/64 via fd00:1:0:28::") { Ok(()) } else { Err((routes, site.node.status())) }
    });
    drop(dir);
}

#[test]
fn both_families_and_a_change_of_one_alone() {
    let Some((site, _dir)) = site() else { return };
    site.node.put("config", DUAL);
    let lease = |mac: &str| {
        format!(
            r#"{{"PublicIP":"10.168.0.3","PublicIPv6":"fd00:168::3","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:00:00:28"}},"BackendV6Data":{{"VNI":1,"VtepMAC":"{mac}"}}}}"#
        )
    };
    let name = "subnets/10.1.40.0-24&fd00:1:0:28::-64";
    site.node.put(name, &lease("02:00:00:00:06:28"));
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    assert_eq!((mtu(&site, "flannel.1"), mtu(&site, "flannel-v6.1")), (1450, 1430));
    assert!(env(&site).contains("FLANNEL_MTU=1430"), "{}", env(&site));
    let fdb = |device: &str, mac: &str, dst: &str| {
        eventually(&format!("{mac} on {device}"), || {
            let text = site.node.host.run(&format!("bridge fdb show dev {device}"));
            if text.contains(&format!("{mac} dst {dst}")) { Ok(()) } else { Err(text) }
        });
    };
    fdb("flannel.1", "02:00:00:00:00:28", "10.168.0.3");
    fdb("flannel-v6.1", "02:00:00:00:06:28", "fd00:168::3");
    site.node.put(name, &lease("02:00:00:00:06:99"));
    fdb("flannel-v6.1", "02:00:00:00:06:99", "fd00:168::3");
    fdb("flannel.1", "02:00:00:00:00:28", "10.168.0.3");
    let table = site.node.host.run("nft list table inet twill");
    for words in ["ip saddr 10.1.0.0/16 ip daddr != 224.0.0.0/4", "ip6 saddr fd00:1::/48 ip6 daddr != ff00::/8"] {
        assert!(table.contains(words), "{table}");
    }
}

#[test]
fn peers_with_both_families_are_known_again_after_a_restart() {
    let Some((site, _dir)) = site() else { return };
    site.node.put("config", DUAL);
    for n in 40..46 {
        let data = |family: u8| format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{family:02}:{n}"}}"#);
        let (v4, v6) = (data(4), data(6));
        let value = format!(
            r#"{{"PublicIP":"10.168.0.{n}","PublicIPv6":"fd00:168::{n}","BackendType":"vxlan","BackendData":{v4},"BackendV6Data":{v6}}}"#
        );
        site.node.put(&format!("subnets/10.1.{n}.0-24&fd00:1:0:{n}::-64"), &value);
    }
    let programmed = || {
        eventually("routes of both families lead to all", || {
            let count = |words: &str| site.node.host.json(words).as_array().unwrap().len();
            let (v4, v6) = (count("-4 route show via 10.1.45.0"), count("-6 route show via fd00:1:0:45::"));
            let status = site.node.status();
            let right = (v4, v6) == (1, 1) && status["state"] == "running" && status["peers"] == 6;
            if right { Ok(status) } else { Err((v4, v6, status)) }
        })
    };
    let agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    programmed();
    agent.end(Signal::TERM);
    let _agent = site.node.agent("");
    let status = programmed();
    assert_eq!(status["findings"], json!([]), "{status}");
}

#[test]
fn a_family_that_the_host_lacks_is_named_and_the_other_goes_on() {
    let Some((site, _dir)) = site() else { return };
    site.node.host.ip("addr del fd00:168::2/64 dev eth0");
    site.node.put("config", DUAL);
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    let finding = site.node.finding("family-missing");
    assert!(finding["fix"].as_str().unwrap().starts_with("ip -6 addr add ADDRESS/LEN dev eth0"), "{finding}");
    assert!(!env(&site).contains("IPV6") && env(&site).contains("FLANNEL_MTU=1450"), "{}", env(&site));
    site.plug();
    site.peer();
    site.arrives("flannel.1", "10.1.40.0");
    site.node.host.ip("addr add fd00:168::2/64 dev eth0 nodad");
    eventually("the family comes with its address", || {
        let status = site.node.status();
        let missing = status["findings"].to_string().contains("family-missing");
        if !missing && env(&site).contains("FLANNEL_IPV6_SUBNET=fd00:1:0:f::1/64") { Ok(()) } else { Err(status) }
    });
    assert_eq!(mtu(&site, "flannel-v6.1"), 1430);
    // Where a sysctl keeps the family away, no address can be given before it is set back.
    let host = &site.node.host;
    for of in ["eth0", "all"] {
        host.run(&format!("sysctl -qw net/ipv6/conf/{of}/disable_ipv6=1"));
        let finding = site.node.finding("family-missing");
        let says = |key: &str| finding[key].as_str().unwrap().to_owned();
        assert!(says("evidence").contains(&format!("net/ipv6/conf/{of}/disable_ipv6")), "{finding}");
        let fix = says("fix");
        let (line, _) = fix.split_once(", or ").unwrap();
        host.feed("sh -e", &format!("{} nodad", line.replace("ADDRESS/LEN", "fd00:168::2/64")));
        eventually("the family is back", || {
            let status = site.node.status();
            let v6 = env(&site).contains("FLANNEL_IPV6_SUBNET=fd00:1:0:f::1/64");
            if v6 && status["findings"] == json!([]) { Ok(()) } else { Err((status, site.node.log("agent.log"))) }
        });
    }
}

#[test]
fn a_family_that_is_lost_takes_nothing_of_the_other_with_it() {
    let Some((site, _dir)) = site() else { return };
    site.node.put("config", DUAL);
    let agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    site.peer();
    site.peer6();
    let own = || site.node.leases().into_iter().find(|(name, _)| name == "10.1.15.0-24&fd00:1:0:f::-64").unwrap().1;
    let told = own();
    assert!(told.contains(r#""PublicIPv6":"fd00:168::2""#) && told.contains("BackendV6Data"), "{told}");
    let v4_goes_on = |when: &str| {
        let finding = site.node.finding("family-missing");
        assert!(finding["evidence"].as_str().unwrap().contains("IPv6"), "{when}: {finding}");
        let inside = site.arrives("flannel.1", "10.1.40.0");
        assert!(inside.contains("IP 10.1.15.2 > 10.1.40.0: "), "{when}: {inside}");
        let out = site.arrives("eth0", "10.168.0.3");
        assert!(out.contains("IP 10.168.0.2 > 10.168.0.3: "), "{when}: {out}");
        // A lease with a subnet and no address for it would have others drop the whole node.
        assert_eq!(own(), told, "{when}");
    };
    site.node.host.ip("addr del fd00:168::2/64 dev eth0");
    v4_goes_on("while it runs");
    agent.end(rustix::process::Signal::TERM);
    let _agent = site.node.agent("");
    v4_goes_on("at a start, as before the router has advertised");
    site.node.host.ip("addr add fd00:168::7/64 dev eth0 nodad");
    eventually("the family comes back with its address", || {
        let (now, status) = (own(), site.node.status());
        let good = now == told.replace("fd00:168::2", "fd00:168::7") && status["findings"] == json!([]);
        if good { Ok(()) } else { Err((now, status, site.node.log("agent.log"))) }
    });
    // Somebody else's lease that lacks one: the other is served.
    let half = r#"{"PublicIP":"10.168.0.41","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:29"}}"#;
    site.node.put("subnets/10.1.41.0-24&fd00:1:0:29::-64", half);
    site.node.await_peer(41, true);
    let finding = site.node.finding("bad-lease-value");
    assert!(finding["evidence"].as_str().unwrap().contains("PublicIPv6 is missing"), "{finding}");
    let full = half
        .replace("null", r#""fd00:168::41""#)
        .replace("}}", r#"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:29"}}"#);
    site.node.put("subnets/10.1.41.0-24&fd00:1:0:29::-64", &full);
    eventually("it has both", || {
        let routes = site.node.host.run("ip -6 route show dev flannel-v6.1");
        let status = site.node.status();
        if routes.contains("fd00:1:0:29::/64") && status["findings"] == json!([]) {
            Ok(())
        } else {
            Err((routes, status))
        }
    });
    // It is named all the same where the way to the store goes with it.
    let host = &site.node.host;
    host.run("nft add table inet closed");
    host.run("nft add chain inet closed out { type filter hook output priority 0 ; }");
    host.run("nft add rule inet closed out oifname lo tcp dport 2379 drop");
    host.ip("addr del fd00:168::7/64 dev eth0");
    site.node.finding("family-missing");
    site.arrives("flannel.1", "10.1.40.0");
    host.run("nft delete table inet closed");
}

#[test]
fn a_networks_families_are_changed_one_by_one() {
    let Some((site, _dir)) = site() else { return };
    let v4 = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#;
    site.node.put("config", v4);
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.peer();
    let shown = |device: &str| site.node.host.try_run(&format!("ip link show {device}")).status.success();
    let before = site.node.host.json("link show flannel.1")[0]["ifindex"].clone();
    for (config, devices, in_env) in [
        (DUAL, [true, true], [true, true]),
        (v4, [true, false], [true, false]),
        (DUAL, [true, true], [true, true]),
        (ALONE, [false, true], [false, true]),
    ] {
        site.node.put("config", config);
        eventually(config, || {
            let seen = (["flannel.1", "flannel-v6.1"].map(shown), env(&site));
            let env = [seen.1.contains("FLANNEL_SUBNET="), seen.1.contains("FLANNEL_IPV6_SUBNET=")];
            let table = site.node.host.run("nft list table inet twill");
            let rules = [table.contains("ip saddr 10.1.0.0/16"), table.contains("ip6 saddr fd00:1::/48")];
            let good = seen.0 == devices && env == in_env && rules == devices;
            if good { Ok(()) } else { Err((seen, table, site.node.log("agent.log"))) }
        });
        if devices[0] {
            // The family that stays is not touched.
            assert_eq!(site.node.host.json("link show flannel.1")[0]["ifindex"], before);
            site.arrives("flannel.1", "10.1.40.0");
        }
    }
}

#[test]
fn the_mtu_follows_the_underlay_for_each_family_and_too_small_a_one_is_named() {
    let Some((site, _dir)) = site() else { return };
    site.node.put("config", DUAL);
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    let becomes = |v4: u64, v6: Option<u64>, all: u64| {
        eventually(&format!("MTUs {v4}, {v6:?}, {all}"), || {
            let link = |device: &str| {
                let links = site.node.host.json("link");
                let link = links.as_array().unwrap().iter().find(|link| link["ifname"] == device).cloned();
                link.and_then(|link| link["mtu"].as_u64())
            };
            let seen = (link("flannel.1"), link("flannel-v6.1"), env(&site));
            let good = seen.0 == Some(v4) && seen.1 == v6 && seen.2.contains(&format!("FLANNEL_MTU={all}\n"));
            if good { Ok(()) } else { Err((seen, site.node.log("agent.log"))) }
        });
    };
    becomes(1450, Some(1430), 1430);
    site.node.host.ip("link set eth0 mtu 1400");
    becomes(1350, Some(1330), 1330);
    // 1340 leaves IPv6 less than its least MTU.
    site.node.host.ip("link set eth0 mtu 1340");
    let finding = site.node.finding("mtu-too-small");
    assert!(finding["evidence"].as_str().unwrap().contains("1280"), "{finding}");
    becomes(1290, None, 1290);
    site.node.host.ip("link set eth0 mtu 1500");
    becomes(1450, Some(1430), 1430);
}

#[test]
fn an_underlay_that_carries_no_family_promises_nothing_and_the_way_out_stays() {
    let Some((site, _dir)) = site() else { return };
    for host in [&site.node.host, &site.node.other] {
        host.ip("-4 addr flush dev eth0");
    }
    site.node.put("config", ALONE);
    let agent = site.node.agent("--subnet fd00:1:0:f::/64");
    site.plug6();
    site.peer6();
    site.attached(&["fd00:1:0:f::2/64"]);
    let carried = |when: &str, mtu: u64| {
        eventually(&format!("{when}: MTU {mtu} on the device and in subnet.env"), || {
            let shown = site.node.host.run("ip -d link show");
            let env = std::fs::read_to_string(site.node.file("subnet.env")).unwrap_or_default();
            let good =
                shown.lines().any(|line| line.contains(" flannel-v6.1: ") && line.contains(&format!(" mtu {mtu} ")))
                    && env.contains(&format!("FLANNEL_MTU={mtu}\n"));
            if good { Ok(()) } else { Err((shown, env, site.node.log("agent.log"))) }
        });
    };
    let withdrawn = |when: &str| {
        let finding = site.node.finding("mtu-too-small");
        assert!(finding["evidence"].as_str().unwrap().contains("no tunnel"), "{when}: {finding}");
        eventually(&format!("{when}: nothing promises more than 1300"), || {
            let gone = !site.node.host.run("ip link show").contains("flannel-v6.1");
            let status = site.node.status();
            let listed = status["findings"].to_string().contains("its MTU is 1500, and the network carries 1300");
            let good = gone && listed && !site.node.file("subnet.env").exists() && status["mtu"] == 1300;
            if good { Ok(()) } else { Err((status, site.node.log("agent.log"))) }
        });
        let out = site.arrives("eth0", "fd00:168::3");
        assert!(out.contains("IP6 fd00:168::2 > fd00:168::3: ICMP6, echo request"), "{when}: {out}");
    };
    site.node.host.ip("link set eth0 mtu 9000");
    carried("before", 8930);
    site.node.host.ip("link set eth0 mtu 1300");
    withdrawn("while it runs");
    site.node.host.ip("link set eth0 mtu 1500");
    carried("after", 1430);
    let inside = site.arrives("flannel-v6.1", "fd00:1:0:28::");
    assert!(inside.contains("IP6 fd00:1:0:f::2 > fd00:1:0:28::: ICMP6, echo request"), "{inside}");
    // The underlay shrinks while no agent looks.
    agent.end(rustix::process::Signal::TERM);
    site.node.host.ip("link set eth0 mtu 1300");
    let _agent = site.node.agent_at_once("");
    withdrawn("at a start");
    site.node.host.ip("link set eth0 mtu 1500");
    carried("after the start", 1430);
    assert_eq!(site.node.leases().len(), 2, "the same lease");
}

#[test]
fn each_backend_and_family_alone_follows_the_underlay() {
    for (backend, families, device, less) in [
        ("vxlan", r#""Network":"10.1.0.0/16""#, "flannel.1", 50),
        ("vxlan", r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48""#, "flannel-v6.1", 70),
        ("udp", r#""Network":"10.1.0.0/16""#, "flannel0", 28),
        ("udp", r#""EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:1::/48""#, "flannel0", 48),
    ] {
        if !grants(backend) {
            continue;
        }
        let Some((site, _dir)) = site() else { return };
        if families.contains("IPv6") {
            // Then the tunnel is IPv6 outside, too.
            site.node.host.ip("-4 addr flush dev eth0");
        }
        site.node.put("config", &format!(r#"{{{families},"Backend":{{"Type":"{backend}"}}}}"#));
        let _agent = site.node.agent("");
        for underlay in [1500, 1400, 9000, 1500] {
            site.node.host.ip(&format!("link set eth0 mtu {underlay}"));
            let mtu = underlay - less;
            eventually(&format!("{backend} {families}: {mtu} over {underlay}"), || {
                let seen = (self::mtu(&site, device), env(&site), site.node.status()["mtu"].clone());
                let good = seen.0 == mtu && seen.1.contains(&format!("FLANNEL_MTU={mtu}\n")) && seen.2 == mtu;
                if good { Ok(()) } else { Err(format!("{seen:?} {}", site.node.log("agent.log"))) }
            });
        }
    }
}

#[test]
fn the_lab_has_both_families_or_ipv6_alone() {
    for (flag, pairs, through) in [("--ipv6", 4, "flannel.1"), ("--ipv6-only", 2, "flannel-v6.1")] {
        let Some(_bed) = Bed::new() else { return };
        let home = tempfile::tempdir().unwrap();
        let mut command = std::process::Command::new(twill_e2e::bin("twill"));
        let out = command.args(["lab", flag, "-o", "json"]).env("XDG_RUNTIME_DIR", home.path()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(out.status.success(), "{flag}: {said}");
        let value: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!((&value["ping"]["pairs"], &value["ping"]["reachable"]), (&pairs.into(), &pairs.into()), "{value}");
        let explanation = value["explain"].to_string();
        assert!(explanation.contains(through), "{explanation}");
    }
}

#[test]
fn the_labs_explanation_arrives_in_both_families() {
    let Some(_bed) = Bed::new() else { return };
    let home = tempfile::tempdir().unwrap();
    let twill = |words: &str| {
        let mut command = std::process::Command::new(twill_e2e::bin("twill"));
        let out = command.args(words.split(' ')).env("XDG_RUNTIME_DIR", home.path()).output().unwrap();
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&[out.stdout, out.stderr].concat()));
        String::from_utf8(out.stdout).unwrap()
    };
    let name = format!("both{}", std::process::id());
    let lab: serde_json::Value = serde_json::from_str(&twill(&format!("lab up --ipv6 --name {name} -o json"))).unwrap();
    let v6 = |n: usize| lab["nodes"][n]["containers"][0]["addresses"][1].as_str().unwrap().to_owned();
    let named = "container-1 container-2".to_owned();
    for (ends, device) in [(named, "flannel.1"), (format!("{} {}", v6(0), v6(1)), "flannel-v6.1")] {
        let said = twill(&format!("lab explain {ends} --name {name}"));
        let unwrapped = said.matches(&format!("are {device}'s: the frame is unwrapped")).count();
        assert_eq!((said.matches("it arrives").count(), unwrapped), (2, 2), "{ends}, there and back: {said}");
    }
    twill(&format!("lab down --name {name}"));
}

#[test]
fn lab_up_shows_the_addresses_of_both_families() {
    if !grants("udp") {
        return;
    }
    let Some(_bed) = Bed::new() else { return };
    let home = tempfile::tempdir().unwrap();
    let twill = |words: &str| {
        let mut command = std::process::Command::new(twill_e2e::bin("twill"));
        let out = command.args(words.split(' ')).env("XDG_RUNTIME_DIR", home.path()).output().unwrap();
        assert!(out.status.success(), "{words}: {}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let name = format!("fam{}", std::process::id());
    // A tunnel of IPv6 alone as well.
    twill(&format!("lab up --ipv6-only --backend udp --name {name}"));
    twill(&format!("lab ping --name {name}"));
    twill(&format!("lab down --name {name}"));
    let lab: serde_json::Value =
        serde_json::from_str(&twill(&format!("lab up --ipv6 --backend udp --name {name} -o json"))).unwrap();
    let node = &lab["nodes"][0];
    assert_eq!(node["addresses"], json!(["10.168.0.2", "fd00:168::2"]));
    assert_eq!(node["subnets"], json!(["10.1.15.0/24", "fd00:1:0:f::/64"]));
    assert_eq!(node["containers"][0]["addresses"], json!(["10.1.15.2", "fd00:1:0:f::2"]));
    twill(&format!("lab ping --name {name}"));
    // As the namespace itself has them.
    let shown = twill(&format!("lab exec --name {name} container-1 -- ip -j addr show eth0"));
    assert!(shown.contains("\"fd00:1:0:f::2\"") && shown.contains("\"10.1.15.2\""), "{shown}");
    twill(&format!("lab down --name {name}"));
}

#[test]
fn the_udp_backends_mtu_follows_the_underlay_for_both_families() {
    let Some((site, _dir)) = site().filter(|_| grants("udp")) else { return };
    site.node.put("config", &DUAL.replace("vxlan", "udp"));
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    let becomes = |mtu: u64| {
        eventually(&format!("MTU {mtu} on the device, in subnet.env and in status"), || {
            let seen = (self::mtu(&site, "flannel0"), env(&site), site.node.status()["mtu"].clone());
            let good = seen.0 == mtu && seen.1.contains(&format!("FLANNEL_MTU={mtu}\n")) && seen.2 == mtu;
            if good { Ok(()) } else { Err(format!("{seen:?} {}", site.node.log("agent.log"))) }
        });
    };
    becomes(1472);
    let addresses = site.node.host.json("addr show flannel0")[0]["addr_info"].to_string();
    assert!(addresses.contains(r#""local":"10.1.15.0","prefixlen":16"#), "{addresses}");
    assert!(addresses.contains(r#""local":"fd00:1:0:f::","prefixlen":48"#), "{addresses}");
    assert_eq!(site.node.leases()[0].0, "10.1.15.0-24&fd00:1:0:f::-64");
    for (underlay, inner) in [(9000, 8972), (1400, 1372), (1500, 1472)] {
        site.node.host.ip(&format!("link set eth0 mtu {underlay}"));
        becomes(inner);
    }
    // 1300 leaves IPv6 less than its least MTU; IPv4 goes on.
    site.node.host.ip("link set eth0 mtu 1300");
    let finding = site.node.finding("mtu-too-small");
    assert!(finding["evidence"].as_str().unwrap().contains("1280"), "{finding}");
    becomes(1272);
    assert!(!env(&site).contains("IPV6"), "{}", env(&site));
    site.node.host.ip("link set eth0 mtu 1500");
    becomes(1472);
    assert!(env(&site).contains("FLANNEL_IPV6_SUBNET=fd00:1:0:f::1/64"), "{}", env(&site));
}

#[test]
fn ipv6_turned_off_on_a_tunnel_device_is_turned_on_again() {
    for (backend, device, own) in
        [("udp", "flannel0", "fd00:1:0:f::/48"), ("vxlan", "flannel-v6.1", "fd00:1:0:f::/128")]
    {
        if !grants(backend) {
            continue;
        }
        let Some((site, _dir)) = site() else { return };
        let host = &site.node.host;
        site.node.put("config", &DUAL.replace("vxlan", backend));
        let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
        let sysctl = |of: &str| format!("net/ipv6/conf/{of}/disable_ipv6");
        let stands = |after: &str| {
            eventually(&format!("after {after} {device} has IPv6"), || {
                let off = String::from_utf8(host.try_run(&format!("sysctl -n {}", sysctl(device))).stdout).unwrap();
                let shown = String::from_utf8(host.try_run(&format!("ip -6 addr show {device}")).stdout).unwrap();
                let good = off.trim() == "0" && shown.contains(&format!("inet6 {own} "));
                if good { Ok(()) } else { Err(format!("{off} {shown} {}", site.node.log("agent.log"))) }
            });
        };
        stands("the start");
        host.run(&format!("sysctl -qw {}=1", sysctl(device)));
        stands("the sysctl");
        // A new device has the namespace's default.
        host.run(&format!("sysctl -qw {}=1", sysctl("default")));
        host.ip(&format!("link del {device}"));
        stands("a default without IPv6");
        // Never an address before its sysctl.
        let log = site.node.log("agent.log");
        assert!(!log.contains("refused") && !log.contains("IPv6 is disabled"), "{log}");
    }
}

#[test]
fn a_probe_asks_in_both_families_and_names_the_one_that_does_not_answer() {
    let Some((site, _dir)) = site() else { return };
    site.node.put("config", DUAL);
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.peer();
    site.peer6();
    // The other host is one peer, not two.
    site.node.delete("subnets/10.1.40.0-24");
    site.node.delete("subnets/0.0.0.0-0&fd00:1:0:28::-64");
    site.node.put(
        "subnets/10.1.40.0-24&fd00:1:0:28::-64",
        r#"{"PublicIP":"10.168.0.3","PublicIPv6":"fd00:168::3","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:28"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:28"}}"#,
    );
    let expect = |v4: [bool; 2], v6: [bool; 2], verdict: &str| {
        eventually(verdict, || {
            let (code, said) = site.node.twill("peers --probe -o json");
            let peers: serde_json::Value = serde_json::from_str(&said.unwrap_or_default()).unwrap_or_default();
            let probe = &peers["peers"][0]["probe"];
            let of = |family: &str, [underlay, overlay]: [bool; 2]| json!({"family": family, "underlay": underlay, "overlay": overlay});
            let want = json!({"underlay": v4[0] && v6[0], "overlay": v4[1] && v6[1], "verdict": verdict,
                "families": [of("IPv4", v4), of("IPv6", v6)]});
            let code_is_right = code == Some(if v4[1] && v6[1] { 0 } else { 3 });
            if code_is_right && *probe == want { Ok(()) } else { Err((code, peers)) }
        });
    };
    expect([true; 2], [true; 2], "both answer");
    let ways = site.node.twill_json("peers")["peers"][0]["ways"].take();
    let way = |family: &str, address: &str, vtep: &str| json!({"family": family, "address": address, "vtep": vtep});
    assert_eq!(ways, json!([way("IPv4", "10.168.0.3", "10.1.40.0"), way("IPv6", "fd00:168::3", "fd00:1:0:28::")]));
    let closed = |rule: &str| {
        site.node.other.try_run("nft delete table inet closed");
        site.node.other.run("nft add table inet closed");
        site.node.other.run("nft add chain inet closed in { type filter hook input priority 0 ; }");
        site.node.other.run(&format!("nft add rule inet closed in {rule} drop"));
    };
    let port = "the host answers, the overlay does not: is the tunnel's UDP port open in both firewalls?";
    closed("meta nfproto ipv6 udp dport 8472");
    expect([true; 2], [true, false], &format!("IPv4: both answer; IPv6: {port}"));
    closed("meta nfproto ipv4 udp dport 8472");
    expect([true, false], [true; 2], &format!("IPv4: {port}; IPv6: both answer"));
    closed("iifname eth0 icmpv6 type echo-request");
    let echo = "the overlay answers; the host drops echo requests on the underlay";
    expect([true; 2], [false, true], &format!("IPv4: both answer; IPv6: {echo}"));
    // A peer's family that is not ours is none of our concern.
    site.node.other.run("nft delete table inet closed");
    site.node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan"}}"#);
    drop(_agent);
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    eventually("the peer is one way", || {
        let ways = site.node.twill_json("peers")["peers"][0]["ways"].take();
        if ways == json!([way("IPv4", "10.168.0.3", "10.1.40.0")]) { Ok(()) } else { Err(ways) }
    });
}

#[test]
fn a_family_that_overlaps_the_underlay_is_named_and_the_other_goes_on() {
    for (network, bad, good) in [
        (
            r#""Network":"10.168.0.0/16","IPv6Network":"fd00:1::/48""#,
            "10.168.0.0/16",
            "FLANNEL_IPV6_NETWORK=fd00:1::/48",
        ),
        (r#""Network":"10.1.0.0/16","IPv6Network":"fd00:168::/48""#, "fd00:168::/48", "FLANNEL_NETWORK=10.1.0.0/16"),
    ] {
        let Some((site, _dir)) = site() else { return };
        site.node.put("config", &format!(r#"{{{network},"EnableIPv6":true,"Backend":{{"Type":"vxlan"}}}}"#));
        let _agent = site.node.agent("");
        let finding = site.node.finding("network-overlap");
        assert!(finding["evidence"].as_str().unwrap().contains(bad) && finding["fix"] != "", "{finding}");
        let env = env(&site);
        assert!(env.contains(good) && !env.contains(bad), "{env}");
        assert_eq!(site.node.status()["state"], "running");
        let table = site.node.host.run("nft list table inet twill");
        assert!(!table.contains(bad), "{table}");
    }
}

#[test]
fn a_configured_mtu_that_leaves_ipv6_too_little_is_named_and_ipv4_goes_on() {
    let Some((site, _dir)) = site() else { return };
    site.node.put("config", &DUAL.replace(r#""vxlan""#, r#""vxlan","MTU":1349"#));
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    let finding = site.node.finding("mtu-too-small");
    let words = |key: &str| finding[key].as_str().unwrap().to_owned();
    assert!(words("evidence").starts_with("a Backend.MTU of 1349 ") && words("evidence").contains("1280"), "{finding}");
    assert!(words("fix").contains("Backend.MTU") && !words("fix").contains("eth0"), "{finding}");
    assert!(env(&site).contains("FLANNEL_MTU=1299") && !env(&site).contains("IPV6"), "{}", env(&site));
    site.node.put("config", &DUAL.replace(r#""vxlan""#, r#""vxlan","MTU":1350"#));
    eventually("1350 is enough", || {
        let now = env(&site);
        if now.contains("FLANNEL_MTU=1280") && now.contains("IPV6") { Ok(()) } else { Err(now) }
    });
}
