//! Every object of the live desired state, altered from outside in every field: it comes back, and the journal says so.
//!
//! The objects are read from a settled node with `ip -j`, `bridge -j` and `nft`, and held against what `twill plan` wanted before
//! anything was there. Each becomes a line in the words of `twill plan`; what is done to it follows from the line.
//!
//! ```text
//!   node 10.168.0.2, fd00:168::2 ─ eth0 ───── eth0 ─ other
//!     store on loopback, agent, flannel.1, flannel-v6.1; eth1: a device that nobody uses
//! ```

use std::collections::{BTreeMap, BTreeSet};

use rustix::process::Signal;
use serde_json::{Value, json};
use twill_e2e::net::Bed;
use twill_e2e::node::{Daemon, Node};
use twill_e2e::{eventually, installed};

const DEVICES: [&str; 2] = ["flannel.1", "flannel-v6.1"];
const CONFIG: &str =
    r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;

/// All that stands there in Twill's place, one line each, in the words of `twill plan`.
fn picture(node: &Node, sysctls: &[String]) -> BTreeSet<String> {
    let mut lines = BTreeSet::new();
    let files: Vec<String> = sysctls.iter().map(|path| format!("/proc/sys/{path}")).collect();
    // All in one go: this is asked some hundred times.
    let shell = format!(
        "ip -j -d addr show; echo =; ip -j neigh show; echo =; bridge -j fdb show; echo =; ip -j -N route show table main; echo =; \
         ip -j -6 -N route show table main; echo =; nft -j list tables; echo =; nft list table inet twill 2>&1; echo =; grep -H . {}",
        files.join(" ")
    );
    let out = node.host.command("sh").args(["-c", &shell]).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    let mut parts = text.split("=\n");
    let mut list = || serde_json::from_str::<Vec<Value>>(parts.next().unwrap().trim()).unwrap_or_default();
    let on_ours = |object: &Value| DEVICES.iter().any(|dev| object["ifname"] == *dev || object["dev"] == *dev);
    for link in list() {
        if on_ours(&link) || link["linkinfo"]["info_kind"] == "vxlan" {
            lines.insert(link_line(&link));
            let dev = word(&link["ifname"]);
            for addr in link["addr_info"].as_array().unwrap().iter().filter(|a| !word(&a["local"]).starts_with("fe80"))
            {
                let mut line = format!("address {}/{} dev {dev}", word(&addr["local"]), addr["prefixlen"]);
                // ip prints all ones for ever.
                if addr["valid_life_time"] != u32::MAX {
                    line += " expires";
                }
                if addr["scope"] != "global" {
                    line += &format!(" scope {}", word(&addr["scope"]));
                }
                let stray = ["address", "metric", "noprefixroute"].into_iter().filter(|key| addr[*key] != Value::Null);
                stray.for_each(|key| line += &format!(" {key} {}", addr[key]));
                lines.insert(line);
            }
        }
    }
    for neigh in list().iter().filter(|neigh| on_ours(neigh)) {
        let (dst, dev, mac) = (word(&neigh["dst"]), word(&neigh["dev"]), word(&neigh["lladdr"]));
        let line = format!("neigh {dst} dev {dev} lladdr {mac} {}", word(&neigh["state"][0]));
        // A flag is a key without a value.
        lines.insert(with_rest(line, neigh.clone(), &["dst", "dev", "lladdr", "state"], |_| String::new()));
    }
    for fdb in list().into_iter().filter(on_ours) {
        let line = format!("fdb {} dev {} dst {} self", word(&fdb["mac"]), word(&fdb["ifname"]), word(&fdb["dst"]));
        lines.insert(with_rest(line, fdb, &["mac", "ifname", "dst"], |rest| {
            rest.retain(|key, value| key != "flags" || *value != json!(["self"]));
            let state = rest.remove("state").unwrap_or(json!("dynamic"));
            format!(" {}", word(&state))
        }));
    }
    for route in [list(), list()].concat() {
        if route["protocol"] == "2" {
            continue;
        }
        let kind = route["type"]
            .as_str()
            .map_or(String::new(), |kind| format!("{} ", if kind == "6" { "blackhole" } else { kind }));
        let mut line = format!("route {kind}{}", word(&route["dst"]));
        for (key, name) in [("gateway", "via"), ("dev", "dev"), ("protocol", "proto"), ("metric", "metric")] {
            if route[key] != Value::Null {
                line += &format!(" {name} {}", word(&route[key]));
            }
        }
        let known = ["type", "dst", "gateway", "dev", "protocol", "metric"];
        lines.insert(with_rest(line, route, &known, |rest| {
            rest.retain(|key, value| key != "pref" || value != "medium");
            let onlink = rest.remove("flags") == Some(json!(["onlink"]));
            if onlink { " onlink".into() } else { String::new() }
        }));
    }
    let tables = parts.next().unwrap().contains("twill");
    let table = parts.next().unwrap();
    if tables {
        let count = |is: &dyn Fn(&str) -> bool| table.lines().map(str::trim).filter(|line| is(line)).count();
        let chains = count(&|line| line.starts_with("chain "));
        let rules = count(&|line| line.contains("counter packets") || line == "drop");
        lines.insert(format!("table inet twill ({chains} chains, {rules} rules)"));
    }
    for (path, value) in
        parts.next().unwrap().lines().filter_map(|line| line.strip_prefix("/proc/sys/")?.split_once(':'))
    {
        lines.insert(format!("sysctl {path} = {value}"));
    }
    lines
}

fn link_line(link: &Value) -> String {
    let data = &link["linkinfo"]["info_data"];
    let local = if data["local"] == Value::Null { word(&data["local6"]) } else { word(&data["local"]) };
    let learning = if data["learning"] == true { "learning" } else { "nolearning" };
    let up = link["flags"].as_array().unwrap().contains(&json!("UP"));
    let fixed = ["ttl", "tos", "df", "remote", "remote6", "remcsum_tx"]
        .map(|key| (key, &data[key]))
        .into_iter()
        .chain([("master", &link["master"])]);
    let is_set = |value: &Value| ![json!(null), json!(0), json!("unset"), json!("auto")].contains(value);
    let mut stray: String = fixed.filter(|(_, v)| is_set(v)).map(|(key, value)| format!(" {key} {value}")).collect();
    if data["ageing"] != 300 || data["limit"].as_u64().is_some_and(|limit| limit != 0) {
        stray += &format!(" ageing {} limit {}", data["ageing"], data["limit"]);
    }
    for (flag, there) in [("NOARP", true), ("MULTICAST", false)] {
        if link["flags"].as_array().unwrap().contains(&json!(flag)) == there {
            stray += &format!(" {flag} {there}");
        }
    }
    if link["proto_down"] == true {
        stray += " protodown on";
    }
    format!(
        "link {} vxlan id {} dstport {} local {local} dev {} {learning}{} address {} mtu {} {}",
        word(&link["ifname"]),
        data["id"],
        data["port"],
        word(&data["link"]),
        if data["gbp"] == true { " gbp" } else { "" },
        word(&link["address"]),
        link["mtu"],
        if up { "up" } else { "down" }
    ) + &stray
}

/// The line, and behind it whatever else `ip` or `bridge` say of the object: nothing can be altered unseen.
fn with_rest(
    line: String,
    object: Value,
    known: &[&str],
    more: impl FnOnce(&mut serde_json::Map<String, Value>) -> String,
) -> String {
    let Value::Object(mut rest) = object else { panic!("{object}") };
    known.iter().for_each(|key| drop(rest.remove(*key)));
    let line = line + &more(&mut rest);
    rest.retain(|_, value| *value != json!([]) && *value != json!(""));
    if rest.is_empty() { line } else { format!("{line} {}", Value::Object(rest)) }
}

fn word(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// What may be done to an object from outside: deleted, and each field altered. Several commands in one (` ; `) run while the
/// agent is stopped.
fn harms(line: &str) -> Vec<String> {
    let words: Vec<&str> = line.split(' ').collect();
    let after = |name: &str| words.iter().position(|w| *w == name).map_or("", |at| words[at + 1]);
    let (name, dev) = (words[1], after("dev"));
    let v6 = format!("{name} {dev}").contains("v6");
    let (ip, other) = if v6 { ("ip -6", "fd00:168::77") } else { ("ip", "10.168.0.77") };
    let metric = if v6 { " metric 1024" } else { "" };
    match words[0] {
        "link" => vec![
            format!("ip link set {name} mtu 1302"),
            format!("ip link set {name} address 02:11:11:11:11:11"),
            format!("ip link set {name} type vxlan learning"),
            format!("ip link set {name} type vxlan local {other}"),
            format!("ip link set {name} type vxlan dev eth1"),
            format!("ip link set {name} down"),
            format!("ip link del {name}"),
            format!("ip link del {name} ; ip link add {name} type vxlan id 99 dstport 8472 dev eth0"),
            format!("ip link del {name} ; ip link add {name} type vxlan id 1 dstport 4789 dev eth0 gbp"),
            format!("ip link del {name} ; ip link add {name} type bridge"),
            format!("ip link set {name} name stranger0"),
            format!("ip link set {name} arp off"),
            format!("ip link set {name} master br9"),
            format!("ip link set {name} type vxlan ttl 1"),
            format!("ip link set {name} type vxlan tos 4"),
            format!("ip link set {name} type vxlan df set"),
            format!("ip link set {name} type vxlan remote {other}"),
            format!("ip link set {name} multicast off"),
            format!("ip link set {name} protodown on"),
            format!("ip link set {name} protodown on ; ip link set {name} protodown_reason 3 on"),
            format!("ip link set {name} type vxlan ageing 7"),
            format!(
                "ip link del {name} ; ip link add {name} type vxlan id 1 dstport 8472 dev eth0 local {} maxaddress 1",
                own(v6)
            ),
            format!(
                "ip link del {name} ; ip link add {name} type vxlan id 1 dstport 8472 dev eth0 local {} remcsumtx",
                own(v6)
            ),
            format!(
                "ip link del {name} ; ip link add {name} type vxlan id 1 dstport 8472 dev eth0 local {} ttl inherit",
                own(v6)
            ),
        ],
        "address" => {
            let mut harms = vec![
                format!("ip addr del {name} dev {dev}"),
                format!("ip addr change {name} dev {dev} valid_lft 1000 preferred_lft 1000"),
                format!("ip addr add {} dev {dev}", if v6 { "fd00:1:0:99::1/64" } else { "10.1.99.1/24" }),
                format!("ip addr change {name} dev {dev} metric 5"),
                format!("ip addr del {name} dev {dev} ; ip addr add {name} dev {dev} noprefixroute metric 7"),
            ];
            let local = name.split('/').next().unwrap();
            if v6 {
                harms.push(format!("ip addr change {local} peer fd00:1:0:98::9/128 dev {dev}"));
            } else {
                harms.push(format!("ip addr add {local} peer 10.1.98.9/32 dev {dev}"));
                // The scope of an IPv6 address follows from the address.
                harms.push(format!("ip addr del {name} dev {dev} ; ip addr add {name} dev {dev} scope link"));
            }
            harms
        }
        "route" if name == "blackhole" => {
            let dst = words[2];
            let ip = if dst.contains(':') { "ip -6" } else { "ip" };
            let metric = "metric 4294967295";
            vec![
                format!("{ip} route del blackhole {dst} {metric}"),
                format!("{ip} route replace unreachable {dst} {metric} proto 116"),
                format!("{ip} route add blackhole {dst} metric 4294967294 proto 116"),
            ]
        }
        "route" => {
            let (proto, via) = ("proto 116", after("via"));
            let twin = if v6 { "fd00:1:0:41::9" } else { "10.1.41.9" };
            let mut harms = vec![
                format!("{ip} route del {name}"),
                format!("{ip} route replace {name} via {twin} dev {dev} onlink {proto}{metric}"),
                format!("{ip} route replace {name} via {other} dev eth0 onlink {proto}{metric}"),
                format!("{ip} route replace {name} via {other} dev eth0 onlink{metric}"),
                format!("{ip} route change {name} via {other} dev eth0 onlink proto static{metric}"),
                format!("{ip} route replace blackhole {name}{metric}"),
                format!("{ip} route replace {name} via {via} dev {dev} onlink proto static{metric}"),
                format!("{ip} route replace {name} via {via} dev {dev} onlink {proto}{metric} mtu 1200"),
                format!("{ip} route replace {name} via {via} dev {dev} onlink {proto}{metric} src {}", own(v6)),
                format!("{ip} route add {name} via {twin} dev {dev} onlink {proto} metric 7"),
                format!("{ip} route append {name} via {twin} dev {dev} onlink {proto}{metric}"),
                format!("{ip} route prepend {name} via {twin} dev {dev} onlink {proto}{metric}"),
                format!(
                    "{ip} route replace {name}{metric} nexthop via {via} dev {dev} onlink nexthop via {other} dev eth0"
                ),
                format!("{ip} route del {name} ; {ip} route add blackhole {name} {proto}{metric}"),
            ];
            // IPv6 takes it into our route, as one more next hop of it.
            if v6 {
                harms.push(format!("{ip} route append {name} via {other} dev eth0{metric}"));
                harms.push(format!("{ip} route append {name} via {twin} dev {dev} onlink{metric}"));
            }
            harms
        }
        "neigh" => vec![
            format!("ip neigh del {name} dev {dev}"),
            format!("ip neigh replace {name} lladdr 02:00:00:00:00:99 dev {dev} nud permanent"),
            format!("ip neigh replace {name} lladdr {} dev {dev} nud stale", after("lladdr")),
            format!("ip neigh replace {name} lladdr {} dev {dev} nud noarp", after("lladdr")),
            format!("ip neigh replace {name} lladdr {} dev {dev} nud permanent router", after("lladdr")),
            format!("ip neigh replace {name} lladdr {} dev {dev} nud permanent extern_learn", after("lladdr")),
            // Changed alone, it is announced by nobody.
            format!(
                "ip neigh del {name} dev {dev} ; ip neigh add {name} lladdr {} dev {dev} nud permanent protocol 33",
                after("lladdr")
            ),
        ],
        "fdb" => vec![
            format!("bridge fdb del {name} dev {dev}"),
            format!("bridge fdb replace {name} dev {dev} dst {other}"),
            format!("bridge fdb replace {name} dev {dev} dst {} dynamic", after("dst")),
            format!("bridge fdb replace {name} dev {dev} dst {} port 1234", after("dst")),
            format!("bridge fdb replace {name} dev {dev} dst {} vni 7", after("dst")),
            format!("bridge fdb replace {name} dev {dev} dst {} via eth1", after("dst")),
            format!("bridge fdb replace {name} dev {dev} dst {} router", after("dst")),
            format!(
                "bridge fdb del {name} dev {dev} ; bridge fdb add {name} dev {dev} dst {} extern_learn",
                after("dst")
            ),
            format!(
                "ip nexthop replace id {0} via {other} fdb ; ip nexthop replace id {0}1 group {0} fdb ; \
                 bridge fdb del {name} dev {dev} ; bridge fdb add {name} dev {dev} nhid {0}1 self permanent",
                if v6 { 6 } else { 4 }
            ),
        ],
        "sysctl" => vec![format!("sysctl -qw {name}={}", if line.ends_with('1') { 0 } else { 1 })],
        "table" => [
            "nft flush ruleset",
            "nft delete table inet twill",
            "nft flush chain inet twill leaving",
            "nft insert rule inet twill forward drop",
            "nft add chain inet twill stranger",
            "nft delete table inet twill ; nft flush ruleset",
        ]
        .map(str::to_owned)
        .to_vec(),
        other => panic!("what is a {other}?"),
    }
}

fn own(v6: bool) -> &'static str {
    if v6 { "fd00:168::2" } else { "10.168.0.2" }
}

/// An agent that has done all that it will do.
fn settled(node: &Node) -> Daemon {
    let agent = node.agent_at_once("");
    eventually("the agent has settled", || {
        let status = node.status();
        if status["state"] == "running" && status["peers"] == 1 { Ok(()) } else { Err(status.to_string()) }
    });
    agent
}

#[test]
fn every_object_of_the_live_desired_state_comes_back_whatever_is_done_to_it() {
    let Some(bed) = Bed::new() else { return };
    if !installed("etcdctl") || !installed("nft") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let node = Node::new(bed, dir.path());
    node.host.ip("addr add fd00:168::2/64 dev eth0 nodad");
    node.host.ip("link add eth1 type veth peer name eth1p");
    node.host.ip("link set eth1 up");
    node.host.ip("link add br9 type bridge");
    node.put("config", CONFIG);
    node.put(
        "subnets/10.1.41.0-24&fd00:1:0:41::-64",
        r#"{"PublicIP":"10.168.0.41","PublicIPv6":"fd00:168::41","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:29"},"BackendV6Data":{"VNI":1,"VtepMAC":"02:00:00:00:06:29"}}"#,
    );
    // What Twill wants, said by `twill` when nothing of it is there …
    drop(settled(&node));
    node.twill("clean").1.unwrap();
    node.host.run("sysctl -qw net.ipv4.ip_forward=0 net.ipv6.conf.all.forwarding=0");
    let plan = node.twill_json("plan");
    let wanted: BTreeSet<String> = plan["steps"].as_array().unwrap().iter().map(|s| word(&s["object"])).collect();
    let sysctls: Vec<String> =
        wanted.iter().filter_map(|l| l.strip_prefix("sysctl ")?.split(' ').next().map(str::to_owned)).collect();
    // … is what stands there when the agent has settled, seen from outside.
    let mut agent = settled(&node);
    let kinds: BTreeSet<&str> = wanted.iter().filter_map(|l| l.split(' ').next()).collect();
    assert_eq!(kinds.into_iter().collect::<Vec<_>>(), ["address", "fdb", "link", "neigh", "route", "sysctl", "table"]);
    is_right(&node, "the agent's start", &wanted, &sysctls);
    // Its harm takes addresses, routes and neighbours of IPv6 with it.
    assert!(wanted.contains("sysctl net/ipv6/conf/flannel-v6.1/disable_ipv6 = 0"), "{wanted:#?}");

    // The same harm to each object before the next harm, and a fresh agent in time: five reverts of one object in ten seconds
    // would be a fight.
    let mut reverts: BTreeMap<&str, usize> = BTreeMap::new();
    let mut repairs = 0;
    for nth in 0..24 {
        for (line, harm) in wanted.iter().filter_map(|line| Some((line, harms(line).into_iter().nth(nth)?))) {
            // What hangs on a device is dropped with it, and put right with it.
            let all = line.starts_with("link") || line.starts_with("address") || line.contains("/disable_ipv6");
            let hit = || wanted.iter().filter(|l| all || *l == line).map(String::as_str);
            if hit().any(|l| reverts.get(l).is_some_and(|times| *times >= 4)) {
                reverts.clear();
                agent.end(Signal::TERM);
                (agent, repairs) = (settled(&node), 0);
            }
            hit().for_each(|l| *reverts.entry(l).or_default() += 1);
            let held = harm.contains(" ; ").then_some(&agent);
            repairs = harmed_and_journaled(&node, held, line, &harm, repairs);
            is_right(&node, &harm, &wanted, &sysctls);
        }
    }
    // The device below goes, with all that stands on it, and comes back.
    node.host.ip("link del eth0");
    node.finding("iface-missing");
    node.host.ip(&format!("link add eth0 type veth peer name eth0 netns {}", node.other.pid()));
    node.host.ip("addr add 10.168.0.2/24 dev eth0");
    node.host.ip("addr add fd00:168::2/64 dev eth0 nodad");
    node.host.ip("link set eth0 up");
    is_right(&node, "the underlay's end", &wanted, &sysctls);
    assert_eq!(node.twill_json("plan")["steps"], json!([]));
    eventually("nothing is left to say", || {
        let status = node.status();
        if status["findings"] == json!([]) { Ok(()) } else { Err(status.to_string()) }
    });
}

/// Does it, while `held` stands still, and finds its repair in the journal; gives the journal's length.
fn harmed_and_journaled(node: &Node, held: Option<&Daemon>, line: &str, harm: &str, repairs: u64) -> u64 {
    held.iter().for_each(|agent| agent.hold());
    harm.split(" ; ").for_each(|command| drop(node.host.run(command)));
    held.iter().for_each(|agent| agent.signal(Signal::CONT));
    let name = line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    eventually(&format!("the repair of {name} after `{harm}` is journaled"), || {
        let journal = node.status()["repairs"].take();
        let total = journal["total"].as_u64().unwrap();
        let fresh = journal["recent"].as_array().unwrap().iter().rev().take((total - repairs) as usize);
        // A foreign address is named by itself.
        let told = |r: &Value| word(&r["object"]).starts_with(&name) || harm.starts_with("ip addr add");
        if fresh.clone().any(told) { Ok(total) } else { Err((journal, node.log("agent.log"))) }
    })
}

/// Waits until what stands there is what Twill wants, no more and no less.
fn is_right(node: &Node, after: &str, wanted: &BTreeSet<String>, sysctls: &[String]) {
    eventually(&format!("after {after} all is right again"), || {
        let live = picture(node, sysctls);
        let differ: Vec<_> = live.symmetric_difference(wanted).cloned().collect();
        if differ.is_empty() { Ok(()) } else { Err((differ, node.log("agent.log"))) }
    });
}
