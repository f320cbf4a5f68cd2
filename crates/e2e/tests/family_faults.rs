//! Two families, of which each has a fault of its own, or one alone has changed.

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::site::Site;
use twill_e2e::{eventually, installed};

/// A site whose hosts and network have both families.
fn site() -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !["etcdctl", "nft", "tcpdump"].iter().all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new(bed, dir.path());
    site.speak_ipv6();
    site.node.put("config", &config("10.1.0.0/16", "fd00:1::/48"));
    Some((site, dir))
}

fn config(v4: &str, v6: &str) -> String {
    json!({"Network": v4, "EnableIPv6": true, "IPv6Network": v6, "Backend": {"Type": "vxlan"}}).to_string()
}

/// The findings of `status`, once they are of these codes.
fn found(site: &Site, when: &str, codes: &[&str]) -> Vec<Value> {
    eventually(&format!("{when}: {codes:?}"), || {
        let status = site.node.status();
        let mut all = status["findings"].as_array().unwrap().clone();
        all.sort_by_key(|finding| finding["code"].to_string());
        if all.iter().map(|finding| &finding["code"]).eq(codes) {
            Ok(all)
        } else {
            Err((status, site.node.log("agent.log")))
        }
    })
}

#[test]
fn an_address_that_is_missing_and_an_mtu_that_is_too_small_are_two_faults() {
    let Some((site, _dir)) = site() else { return };
    let agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    site.peer();
    site.peer6();
    let host = &site.node.host;
    let v4 = |when: &str| {
        let inside = site.arrives("flannel.1", "10.1.40.0");
        assert!(inside.contains("IP 10.1.15.2 > 10.1.40.0: "), "{when}: {inside}");
    };
    let v6 = |when: &str| {
        let inside = site.arrives("flannel-v6.1", "fd00:1:0:28::");
        assert!(inside.contains("IP6 fd00:1:0:f::2 > fd00:1:0:28::: "), "{when}: {inside}");
    };
    let both = |when: &str| {
        let all = found(&site, when, &["family-missing", "mtu-too-small"]);
        let says = |n: usize| all[n]["evidence"].as_str().unwrap().to_owned();
        assert!(says(0).contains("IPv4") && says(1).contains("1280"), "{when}: {all:?}");
    };
    v4("before");
    v6("before");
    for when in ["the address first", "the MTU first", "at a start"] {
        let lines = ["addr del 10.168.0.2/24 dev eth0", "link set eth0 mtu 1300"];
        match when {
            "the MTU first" => lines.iter().rev().for_each(|line| drop(host.ip(line))),
            _ => lines.iter().for_each(|line| drop(host.ip(line))),
        }
        both(when);
        // Each comes back by itself.
        host.ip("addr add 10.168.0.2/24 dev eth0");
        let all = found(&site, when, &["mtu-too-small"]);
        assert!(all[0]["evidence"].as_str().unwrap().contains("1280"), "{when}: {all:?}");
        v4(when);
        host.ip("addr del 10.168.0.2/24 dev eth0");
        both(when);
        host.ip("link set eth0 mtu 1500");
        let all = found(&site, when, &["family-missing"]);
        assert!(all[0]["evidence"].as_str().unwrap().contains("IPv4"), "{when}: {all:?}");
        v6(when);
        host.ip("addr add 10.168.0.2/24 dev eth0");
        found(&site, when, &[]);
        v4(when);
        v6(when);
    }
    assert_eq!(agent.end(Signal::TERM), Some(0));
    // With both faults from the beginning.
    host.ip("addr del 10.168.0.2/24 dev eth0");
    host.ip("link set eth0 mtu 1300");
    let _agent = site.node.agent_at_once("");
    both("at a start");
    host.ip("addr add 10.168.0.2/24 dev eth0");
    host.ip("link set eth0 mtu 1500");
    found(&site, "after a start", &[]);
    v4("after a start");
    v6("after a start");
}

#[test]
fn a_network_of_which_one_family_has_changed_strands_the_addresses_of_that_one() {
    for first in [("10.1.0.0/16", "fd00:2::/48", [false, true]), ("10.2.0.0/16", "fd00:1::/48", [true, false])] {
        let Some((site, _dir)) = site() else { return };
        assert_eq!(site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64").end(Signal::TERM), Some(0));
        let _agent = site.node.agent("");
        site.plug();
        site.plug6();
        site.attached(&["10.1.15.2/24", "fd00:1:0:f::2/64"]);
        assert_eq!(found(&site, "before", &["container-mtu"]).len(), 1);
        for (v4, v6, these) in [first, ("10.2.0.0/16", "fd00:2::/48", [true, true])] {
            site.node.put("config", &config(v4, v6));
            eventually(&format!("{v4} {v6}: {these:?}"), || {
                let status = site.node.status();
                let all = status["findings"].as_array().unwrap().iter();
                let of_code = all.filter(|finding| finding["code"] == "container-stranded");
                let told: Vec<&str> = of_code.map(|finding| finding["evidence"].as_str().unwrap()).collect();
                let named = ["10.1.15.2", "fd00:1:0:f::2"].map(|ip| told.iter().any(|text| text.contains(ip)));
                let settled = [v4, v6].iter().all(|net| status["networks"].to_string().contains(net));
                let good = settled && named == these && told.len() == 1;
                if good { Ok(()) } else { Err((status, site.node.log("agent.log"))) }
            });
        }
    }
}

#[test]
fn an_ipv6_address_that_no_host_can_have_is_not_programmed() {
    let Some((site, _dir)) = site() else { return };
    let node = &site.node;
    let alone =
        json!({"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:1::/48", "Backend": {"Type": "vxlan"}});
    node.put("config", &alone.to_string());
    let _agent = node.agent("--subnet fd00:1:0:f::/64");
    let bad = ["::ffff:127.0.0.1", "::ffff:1.2.3.4", "::1.2.3.4", "100::1", "::1", "ff02::1", "fd00:1:0:9::9"];
    let put = |ip: &str| {
        let data = json!({"VNI": 1, "VtepMAC": "02:00:00:00:00:28"});
        let lease = json!({"PublicIP": "0.0.0.0", "PublicIPv6": ip, "BackendType": "vxlan", "BackendV6Data": data});
        node.put("subnets/0.0.0.0-0&fd00:1:0:28::-64", &lease.to_string());
    };
    let programmed = || node.host.run("ip -6 route show fd00:1:0:28::/64").contains("flannel-v6.1");
    for ip in bad {
        put(ip);
        let all = eventually(&format!("{ip} is named"), || {
            let all = node.status()["findings"].take();
            let printed = ip.parse::<std::net::Ipv6Addr>().unwrap();
            let named = |f: &Value| f["evidence"].as_str().unwrap().contains(&format!("PublicIPv6 {printed} "));
            if all.as_array().unwrap().iter().any(named) { Ok(all) } else { Err(all) }
        });
        assert_eq!((&all[0]["code"], programmed()), (&"bad-lease-value".into(), false), "{all}");
    }
    put("fd00:168::3");
    eventually("a good one is programmed", || if programmed() { Ok(()) } else { Err(node.status()) });
}
