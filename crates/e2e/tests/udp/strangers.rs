//! Who is no peer: dropped by nftables before the socket's queue, by a set that changes element by element.

use super::*;

/// The chain's rules as `nft` has them: handles, and packets counted.
fn rules(host: &Host) -> Vec<(u64, u64)> {
    let text = host.run("nft -j list chain inet twill strangers");
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let rules = all["nftables"].as_array().unwrap().iter().filter_map(|object| object.get("rule"));
    let counter = |rule: &serde_json::Value| {
        let exprs = rule["expr"].as_array().unwrap();
        exprs.iter().find_map(|expr| expr["counter"]["packets"].as_u64()).unwrap()
    };
    rules.map(|rule| (rule["handle"].as_u64().unwrap(), counter(rule))).collect()
}

/// The set's elements as `nft` has them.
fn peers(host: &Host) -> Vec<String> {
    let all: serde_json::Value = serde_json::from_str(&host.run("nft -j list set inet twill peers")).unwrap();
    let set = all["nftables"].as_array().unwrap().iter().find_map(|object| object.get("set")).unwrap();
    let elements = set["elem"].as_array().cloned().unwrap_or_default();
    elements.iter().map(|element| element.as_str().unwrap().to_owned()).collect()
}

/// How often the tunnel's threads have waited, as the kernel counts it.
fn waits(site: &Site) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", site.agent_pid().unwrap())).unwrap();
    let read = |task: &std::fs::DirEntry, name: &str| std::fs::read_to_string(task.path().join(name)).unwrap();
    let pumps = tasks.flatten().filter(|task| read(task, "comm").starts_with("tunnel"));
    let waits = pumps.map(|pump| {
        let status = read(&pump, "status");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).unwrap();
        line.trim().parse::<u64>().unwrap()
    });
    waits.sum()
}

#[test]
fn strangers_never_reach_the_socket_and_peers_go_on() {
    let Some((net, _dir)) = running().filter(|_| installed("nft")) else { return };
    let (one, two) = (net.site(1), net.site(2));
    two.host.ip("addr add 10.168.0.99/24 dev eth0");
    let good = inner([100, 96, 2, 2], [100, 96, 1, 2], |_| {});
    assert_eq!(peers(&one.host), ["10.168.0.3"]);
    let [(handle, before)] = rules(&one.host)[..] else { panic!("{:?}", rules(&one.host)) };
    let mut last = 0;
    let waited = eventually("the pumps rest", || {
        let now = waits(one);
        if std::mem::replace(&mut last, now) == now { Ok(now) } else { Err(now) }
    });
    let junk = vec![good.as_str(); 200].join(" ");
    two.host.run(&format!("{WIRE} packet 10.168.0.99:8285 10.168.0.2:8285 {junk}"));
    // Another port is none of its business.
    two.host.run(&format!("{WIRE} packet 10.168.0.99:8285 10.168.0.2:8286 {junk}"));
    eventually("nftables has counted them", || {
        let now = rules(&one.host)[0].1;
        if now == before + 200 { Ok(()) } else { Err(now) }
    });
    assert_eq!(waits(one), waited, "the pump was not woken once");
    two.host.run(&format!("{WIRE} packet 10.168.0.3:5555 10.168.0.2:8285 {good}"));
    eventually("a peer's wakes it, from whatever port", || {
        let now = waits(one);
        if now > waited { Ok(()) } else { Err(now) }
    });
    assert_eq!(one.status()["tunnel"]["strangers"], "nftables");
    assert_eq!(one.dropped("not-a-peer"), before + 200);
    // Under a flood of them good traffic goes on, both ways.
    let mut flood = two.host.command(WIRE);
    flood.args(["flood", "10.168.0.99:8285", "10.168.0.2:8285", &good]);
    let (_flood, _lines) = until_ready(flood, "ready");
    carries(&one.container, &two.container, "10000000", "1500");
    assert!(rules(&one.host)[0].1 > before + 1000, "{:?}", rules(&one.host));
    // Peers come and go by element: the rules are the same ones.
    let key = "/coreos.com/network/subnets/100.96.9.0-24";
    let leases = [r#"{"PublicIP":"10.168.0.9"}"#, r#"{"PublicIP":"10.168.0.10"}"#];
    for (lease, want) in leases.iter().zip([["10.168.0.3", "10.168.0.9"], ["10.168.0.3", "10.168.0.10"]]) {
        assert!(net.etcdctl(&["put", key, lease]).status.success());
        eventually("the set follows", || {
            let now = peers(&one.host);
            if now == want { Ok(()) } else { Err((now, one.log())) }
        });
    }
    assert!(net.etcdctl(&["del", key]).status.success());
    one.host.run("nft delete element inet twill peers { 10.168.0.3 }");
    eventually("what others take out is put back", || {
        let now = peers(&one.host);
        if now == ["10.168.0.3"] { Ok(()) } else { Err((now, one.log())) }
    });
    assert_eq!(rules(&one.host)[0].0, handle, "no rule was made anew");
    // A table that takes the place of an altered one counts on.
    let before = (rules(&one.host)[0].1, one.dropped("not-a-peer"));
    one.host.run("nft add chain inet twill altered");
    eventually("the table is made anew", || match rules(&one.host)[..] {
        [(new, counted)] if new != handle || !one.host.run("nft list chains").contains("altered") => Ok(counted),
        _ => Err(one.log()),
    });
    assert!(rules(&one.host)[0].1 >= before.0 && one.dropped("not-a-peer") >= before.1, "{before:?}");
    net.await_both_ways();
}

#[test]
fn without_a_table_the_tunnel_itself_drops_strangers() {
    let Some((bed, dir)) = place().filter(|_| installed("nft")) else { return };
    let mut net = Overlay::new(bed, dir.path());
    // Somebody else's table of our name is left alone: there is no place for ours.
    net.site(1).host.run("nft add table inet twill");
    for number in [1, 2] {
        net.site_mut(number).start("");
        net.site(number).attach();
    }
    net.await_both_ways();
    let (one, two) = (net.site(1), net.site(2));
    two.host.ip("addr add 10.168.0.99/24 dev eth0");
    let good = inner([100, 96, 2, 2], [100, 96, 1, 2], |_| {});
    let junk = vec![good.as_str(); 20].join(" ");
    two.host.run(&format!("{WIRE} packet 10.168.0.99:8285 10.168.0.2:8285 {junk}"));
    eventually("the tunnel has counted them", || {
        let status = one.status();
        let same = one.dropped("not-a-peer") == 20 && status["tunnel"]["strangers"] == "user-space";
        if same { Ok(()) } else { Err(status.to_string()) }
    });
    eventually("status says why", || {
        let (code, shown) = one.twill("status");
        let shown = shown.unwrap();
        let says = shown.contains("table-taken") && shown.contains("strangers  dropped by the tunnel itself");
        if code == Some(3) && says { Ok(()) } else { Err(shown) }
    });
    assert_eq!(two.status()["tunnel"]["strangers"], "nftables");
    net.await_both_ways();
}
