//! What the firewalls of others drop where no accept of ours can be: each rule really loses packets, is named, and the command that is
//! named with it mends it.

use std::io::Write;
use std::process::Stdio;

use rustix::process::{Pid, Signal};
use serde_json::{Value, json};
use twill_e2e::net::{Bed, Host};
use twill_e2e::site::Site;
use twill_e2e::{eventually, grants, installed};

fn site(programs: &[&str]) -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !["etcdctl", "nft", "tcpdump"].iter().chain(programs).all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Site::new(bed, dir.path()), dir))
}

/// True when a container of a peer reaches ours: by the protocol that is named.
fn reaches(site: &Site, what: &str) -> bool {
    let (other, ours) = (&site.node.other, &site.container);
    match what {
        "all" => other.try_run("ping -c 1 -W 1 -I 10.1.40.0 10.1.15.2").status.success(),
        "all6" => other.try_run("ping -c 1 -W 1 -I fd00:1:0:28:: fd00:1:0:f::2").status.success(),
        "beyond" => ours.try_run("ping -c 1 -W 1 10.168.0.3").status.success(),
        "out" => ours.try_run("ping -c 1 -W 1 10.1.40.0").status.success(),
        port => {
            let mut listener =
                ours.command("busybox").args(["nc", "-l", "-p", port]).stdin(Stdio::null()).spawn().unwrap();
            eventually("somebody listens", || {
                let text = ours.run("ss -Hltn");
                if text.contains(&format!(":{port} ")) { Ok(()) } else { Err(text) }
            });
            let out = other.try_run(&format!("timeout 2 busybox nc -w 1 10.1.15.2 {port}"));
            let _ = rustix::process::kill_process(Pid::from_child(&listener), Signal::KILL);
            listener.wait().unwrap();
            out.status.success()
        }
    }
}

fn findings(site: &Site) -> Vec<Value> {
    site.node.status()["findings"].as_array().unwrap().clone()
}

/// Types the command of each finding until none is left; gives them all.
fn mend(site: &Site, host: &Host) -> Vec<Value> {
    let mut all = eventually("something is found", || {
        let now = findings(site);
        if now.is_empty() { Err(site.node.log("agent.log")) } else { Ok(now) }
    });
    for finding in &all.clone() {
        host.feed("sh", finding["fix"].as_str().unwrap());
    }
    // One command may uncover what another rule does.
    for _ in 0..3 {
        let left = eventually("the findings change", || {
            let now = findings(site);
            if now.iter().all(|finding| !all.contains(finding)) { Ok(now) } else { Err(now) }
        });
        for finding in &left {
            host.feed("sh", finding["fix"].as_str().unwrap());
        }
        if left.is_empty() {
            return all;
        }
        all.extend(left);
    }
    panic!("{all:#?}");
}

/// A ruleset that loses what is named, the code, and words that the finding has.
struct Case<'a> {
    rules: &'a str,
    lost: &'static str,
    code: &'static str,
    words: &'static str,
}

const fn case(rules: &'static str, lost: &'static str, code: &'static str, words: &'static str) -> Case<'static> {
    Case { rules, lost, code, words }
}

fn all_are_told(site: &Site, load: &dyn Fn(&str), unload: &dyn Fn(), cases: &[Case<'_>]) {
    let passes = |what: &'static str| {
        eventually(&format!("{what} passes"), || if reaches(site, what) { Ok(()) } else { Err(findings(site)) });
    };
    for Case { rules, lost, code, words } in cases {
        println!("{rules}");
        load(rules);
        eventually("it is lost", || if reaches(site, lost) { Err(()) } else { Ok(()) });
        let told = mend(site, &site.node.host);
        let right = |finding: &&Value| {
            finding["code"] == *code && format!("{} {}", finding["object"], finding["evidence"]).contains(words)
        };
        assert!(told.iter().any(|finding| right(&finding)), "{rules}: {told:#?}");
        passes(lost);
        passes("all");
        unload();
        eventually("nothing is found", || {
            let now = findings(site);
            if now.is_empty() { Ok(()) } else { Err(now) }
        });
    }
}

/// Waits until nothing but a drop that is put there for it is told: what else there is, was looked at.
fn nothing_else_is_told(site: &Site, what: &str) {
    let host = &site.node.host;
    let seen = "table inet seen { chain c { type filter hook prerouting priority -400; ip daddr 10.1.15.77 drop; }\n}";
    host.feed("nft -f -", seen);
    eventually("the one finding is there", || {
        let now = findings(site);
        if now.len() == 1 && now[0]["object"] == "chain inet seen c" { Ok(()) } else { Err((what.to_owned(), now)) }
    });
    host.run("nft delete table inet seen");
}

#[test]
fn whatever_drops_in_nftables_is_told_and_mended() {
    let Some((site, _dir)) = site(&["busybox", "ss"]) else { return };
    let host = &site.node.host;
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    let (early, late, shut, part) = ("dropped-before-forward", "dropped-after-forward", "tunnel-dropped", "may-drop");
    let load = |rules: &str| {
        // `HOOK KIND PRIORITY POLICY | RULES | OTHER CHAINS`.
        let words: Vec<&str> = rules.split('|').collect();
        let [hook, kind, priority, policy] = words[0].split_whitespace().collect::<Vec<_>>()[..] else { panic!() };
        let body = words[1].replace(';', "\n");
        host.feed(
            "nft -f -",
            &format!(
                "table inet bad {{\n{}\nchain base {{\ntype {kind} hook {hook} priority {priority}; policy {policy};\n{body}\n}}\n}}\n",
                words.get(2).unwrap_or(&"")
            ),
        );
    };
    let cases = [
        case("prerouting filter -300 accept| ip daddr { 10.1.15.2, 192.0.2.1 } drop", "all", early, "base"),
        case("prerouting filter -150 accept| iifname \"flannel*\" drop", "all", early, "flannel.1"),
        case("prerouting filter -150 accept| ip saddr 10.1.2.0-10.1.250.9 counter drop", "all", early, "base"),
        case("prerouting filter -300 accept| ct state invalid drop", "all", early, "ct state"),
        case(
            "prerouting filter -150 accept| meta l4proto { tcp, udp, icmp } iifname flannel.1 drop",
            "all",
            early,
            "meta l4proto",
        ),
        case(
            "prerouting filter -150 accept| iifname . ip daddr { \"flannel.1\" . 10.1.0.0/16 } drop",
            "all",
            early,
            "iifname . ip daddr",
        ),
        case(
            "prerouting filter -150 accept| ct state vmap { new : jump inner, established : accept }| chain inner { ip daddr 10.1.15.2 goto last; }\nchain last { fib saddr type unicast drop; }",
            "all",
            early,
            "last",
        ),
        case(
            "prerouting filter -150 accept| ip saddr . meta l4proto @who drop| set who { type ipv4_addr . inet_proto; flags interval; elements = { 10.1.0.0/16 . 1-17 } }",
            "all",
            early,
            "ip saddr . meta l4proto @who",
        ),
        case(
            "prerouting filter -150 accept| ip saddr != @mine ip daddr 10.1.15.0/24 drop| set mine { type ipv4_addr; flags interval; elements = { 10.1.15.0/24, 192.0.2.0/24 } }",
            "all",
            early,
            "!= @mine",
        ),
        case("prerouting nat -100 drop| ip saddr 192.0.2.1 accept", "all", early, "policy"),
        case("postrouting filter 0 accept| oifname \"cni0\" ct state new drop", "all", late, "oifname"),
        case("postrouting filter -150 drop| oifname eth0 accept", "all", late, "policy"),
        case("postrouting nat 100 drop|", "all", late, "policy"),
        case(
            "input filter 0 drop| ct state established,related accept; tcp dport 2379 accept; iif lo accept",
            "all",
            shut,
            "policy",
        ),
        case("input filter 0 accept| udp dport 8000-9000 ip saddr 10.168.0.0/24 reject", "all", shut, "th dport"),
        case("output filter 0 accept| meta l4proto udp th dport { 4789, 8472 } drop", "out", shut, "th dport"),
        case("prerouting filter -150 accept| iifname eth0 udp dport 8472 drop", "all", shut, "th dport"),
        case("output route -150 accept| udp dport 8472 drop", "out", shut, "th dport"),
        case("output route -150 drop| udp dport != 8472 accept", "out", shut, "policy"),
        case("postrouting nat 90 accept| oifname cni0 drop", "all", late, "oifname"),
        case("prerouting nat -90 accept| jump inner| chain inner { ip daddr 10.1.15.2 drop; }", "all", early, "inner"),
        case("prerouting filter -150 accept| iif flannel.1 drop", "all", early, "iif"),
        case("postrouting filter 0 accept| oif { lo, cni0 } drop", "all", late, "oif"),
        case("prerouting filter -150 accept| iif . ip daddr { flannel.1 . 10.1.15.2 } drop", "all", early, "iif . ip"),
        case("prerouting filter -150 accept| tcp dport 8080 drop", "8080", part, "th dport 8080"),
        case("postrouting filter 0 accept| ip daddr 10.1.15.2 tcp dport { 22, 8080 } drop", "8080", part, "th dport"),
        case("prerouting filter -150 accept| meta mark set 7; meta mark 7 drop", "all", part, "meta mark"),
        case("prerouting filter -150 accept| iifname flannel.1 limit rate over 1/day drop", "all", part, "limit"),
    ];
    all_are_told(&site, &load, &|| drop(host.run("nft delete table inet bad")), &cases);
    // What is nobody's loss is not told.
    for rules in [
        "prerouting filter -150 accept| ct state invalid drop; fib saddr . iif oif missing drop; ip saddr 192.0.2.0/24 drop",
        "prerouting filter -190 accept| iifname eth0 fib saddr . iif oif missing drop; tcp flags & 0x3 == 0x3 drop",
        "prerouting filter -300 accept| iifname docker0 drop; ip daddr 172.17.0.2 iifname != docker0 drop; iifname eth0 ip saddr 10.1.0.0/16 drop",
        "prerouting filter -150 accept| ip frag-off & 0x1fff != 0 drop; tcp option maxseg size 1-500 drop; meta pkttype broadcast drop",
        "input filter 0 drop| ct state { established, related } accept; ct state invalid drop; udp dport 8472 accept; tcp dport 2379 accept; iif lo accept",
        "input filter 0 drop| iif lo accept; iif eth0 accept",
        "prerouting filter -200 drop| iif { lo, eth0, cni0, flannel.1 } accept",
        "prerouting nat -90 accept| iif eth0 tcp dport 2222 drop; ip saddr 192.0.2.0/24 drop",
        "postrouting filter 0 accept| oifname eth0 ip saddr 10.1.0.0/16 drop; ip daddr 192.0.2.0/24 drop",
        "output filter 0 drop| ct state established,related accept; ct state new accept; ct state untracked accept",
        "prerouting filter -150 accept| ip saddr . tcp dport vmap { 192.0.2.1 . 80 : drop }; ip saddr @bad drop| set bad { type ipv4_addr; flags interval; elements = { 198.51.100.0/24, 203.0.113.1 } }",
    ] {
        load(rules);
        eventually("it passes", || if reaches(&site, "all") { Ok(()) } else { Err(findings(&site)) });
        nothing_else_is_told(&site, rules);
        host.run("nft delete table inet bad");
    }
}

#[test]
fn whatever_drops_in_legacy_iptables_is_told_and_mended() {
    let Some((site, _dir)) = site(&["iptables-legacy", "iptables-legacy-restore", "busybox", "ss"]) else { return };
    let host = &site.node.host;
    let out = host.try_run("iptables-legacy -w -S");
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("does not exist") || said.contains("not supported"), "{said}");
        return println!("SKIP: this kernel has no legacy iptables: {said}");
    }
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    let (early, late, shut, part) = ("dropped-before-forward", "dropped-after-forward", "tunnel-dropped", "may-drop");
    let forward = "legacy-drops-forward";
    // `TABLE: RULES`, one after the other.
    let load = |rules: &str| {
        let (table, rules) = rules.split_once(": ").unwrap();
        for rule in rules.split("; ") {
            host.feed("sh", &format!("iptables-legacy -w -t {table} {rule}"));
        }
    };
    let unload = || {
        for table in ["raw", "mangle", "filter", "security"] {
            for line in ["-F", "-X"] {
                host.run(&format!("iptables-legacy -w -t {table} {line}"));
            }
            for chain in ["FORWARD", "PREROUTING", "POSTROUTING", "INPUT"] {
                host.try_run(&format!("iptables-legacy -w -t {table} -P {chain} ACCEPT"));
            }
        }
    };
    let cases = [
        case(
            "raw: -A PREROUTING -p tcp --dport 1 -j ACCEPT; -A PREROUTING -d 10.1.15.2 -m comment --comment 'it is \"mine\"' -j DROP",
            "all",
            early,
            "mine",
        ),
        case(
            "raw: -N inner; -N last; -A inner -s 10.1.0.0/16 -g last; -A inner -j ACCEPT; -A last -j DROP; -A PREROUTING -i flannel+ -j inner",
            "all",
            early,
            "last",
        ),
        case(
            "raw: -N inner; -A inner -s 192.0.2.0/24 -j RETURN; -A inner -d 10.1.15.0/24 -j DROP; -A PREROUTING ! -i eth0 -j inner",
            "all",
            early,
            "inner",
        ),
        case("raw: -A PREROUTING -m conntrack --ctstate INVALID -i flannel.1 -j DROP", "all", early, "conntrack"),
        case("mangle: -A FORWARD -i flannel.1 -j DROP", "all", forward, "mangle"),
        case("mangle: -A FORWARD ! -p tcp -j DROP", "all", part, "l4proto"),
        case("mangle: -A POSTROUTING -o cni0 -m conntrack --ctstate NEW -j DROP", "all", late, "conntrack"),
        case("mangle: -P POSTROUTING DROP", "all", shut, "policy"),
        case(
            "filter: -A FORWARD -s 10.1.0.0/16 -d 10.1.0.0/16 -j ACCEPT; -P FORWARD DROP",
            "beyond",
            forward,
            "beyond",
        ),
        case("mangle: -A FORWARD -s 10.1.0.0/16 -j ACCEPT; -A FORWARD -j DROP", "beyond", forward, "comes back"),
        case("security: -A FORWARD -d 10.1.0.0/16 -j DROP", "all", forward, "security"),
        case(
            "filter: -A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT; -A FORWARD -o cni+ -j REJECT",
            "all",
            forward,
            "FORWARD",
        ),
        case("filter: -A FORWARD -p tcp --dport 8000:9000 -m comment --comment web -j DROP", "8080", part, "web"),
        case("filter: -A FORWARD -p tcp -m multiport --dports 22,8080 -j DROP", "8080", part, "multiport"),
        case(
            "filter: -A FORWARD -m string --algo bm --string abcdef -j ACCEPT; -A FORWARD -m string --algo bm ! --string abcdef -j DROP",
            "all",
            part,
            "string",
        ),
        case("filter: -A INPUT -p udp --dport 8472 -j DROP", "all", shut, "-m udp"),
        case(
            "filter: -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT; -A INPUT -p tcp -j ACCEPT; -A INPUT -i lo -j ACCEPT; -P INPUT DROP",
            "all",
            shut,
            "policy",
        ),
    ];
    all_are_told(&site, &load, &unload, &cases);
    for rules in [
        "filter: -A FORWARD -m conntrack --ctstate INVALID -j DROP; -A FORWARD -i docker0 -o docker1 -j DROP; -A FORWARD -s 192.0.2.0/24 -j DROP",
        "raw: -A PREROUTING -m rpfilter --invert -j DROP; -A PREROUTING -d 172.17.0.2 ! -i docker0 -j DROP; -A PREROUTING -i eth+ -s 10.1.0.0/16 -j DROP",
        "mangle: -A PREROUTING -m addrtype --dst-type BROADCAST -j DROP; -A PREROUTING -p tcp --tcp-flags FIN,SYN FIN,SYN -j DROP; -A PREROUTING -f -j DROP",
        "filter: -A FORWARD -s 10.1.0.0/16 -o eth0 -p tcp -j DROP; -A FORWARD -s 10.1.15.0/24 ! -d 10.1.0.0/16 -j DROP",
        "filter: -A FORWARD -m mark --mark 0x8000/0x8000 -j DROP; -A FORWARD -p tcp --tcp-option 5 -j DROP",
    ] {
        load(rules);
        // Legacy iptables is read in its own time.
        load("raw: -I PREROUTING -d 10.1.15.77 -j DROP");
        eventually("the one finding is there", || {
            let now = findings(&site);
            let one = now.len() == 1 && now[0]["fix"] == json!("iptables-legacy -w -t raw -D PREROUTING 1");
            if one { Ok(()) } else { Err((rules, now)) }
        });
        assert!(reaches(&site, "all"));
        unload();
    }
}

#[test]
fn what_iptables_of_nftables_drops_is_told_and_mended() {
    let Some((site, _dir)) = site(&["iptables-nft", "busybox", "ss"]) else { return };
    let host = &site.node.host;
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    let load = |rules: &str| host.feed("sh", rules);
    let unload = || {
        for table in ["raw", "mangle"] {
            host.try_run(&format!("nft delete table ip {table}"));
        }
    };
    let cases = [
        (
            "iptables-nft -t raw -A PREROUTING -d 10.1.15.2 -m comment --comment \"it's\" -j DROP",
            "all",
            "dropped-before-forward",
            "it's",
        ),
        (
            "iptables-nft -t mangle -P PREROUTING DROP; iptables-nft -t mangle -A PREROUTING -i cni0 -j ACCEPT; iptables-nft -t mangle -A PREROUTING -i eth0 -j ACCEPT",
            "all",
            "dropped-before-forward",
            "policy",
        ),
        (
            "iptables-nft -t mangle -A POSTROUTING -m conntrack --ctstate NEW -o cni+ -j DROP",
            "all",
            "dropped-after-forward",
            "conntrack",
        ),
        ("iptables-nft -t mangle -A OUTPUT -p udp --dport 8472 -j DROP", "out", "tunnel-dropped", "8472"),
        (
            "iptables-nft -t mangle -A PREROUTING -p tcp -m multiport --dports 22,8000:8080 -j DROP",
            "8080",
            "may-drop",
            "multiport",
        ),
    ];
    let cases = cases.map(|(rules, lost, code, words)| Case { rules, lost, code, words });
    all_are_told(&site, &load, &unload, &cases);
}

#[test]
fn each_family_is_judged_by_itself() {
    let Some((site, _dir)) = site(&["ip6tables-legacy"]) else { return };
    let host = &site.node.host;
    site.speak_ipv6();
    let config =
        r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;
    site.node.put("config", config);
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    site.peer();
    site.peer6();
    let load = |rules: &str| host.feed("sh", rules);
    let unload = || {
        host.try_run("nft delete table inet bad");
        host.try_run("nft delete table ip6 bad");
        for table in ["raw", "mangle"] {
            host.try_run(&format!("ip6tables-legacy -w -t {table} -F"));
        }
    };
    let nft =
        |family: &str, rules: &str| format!("nft 'table {family} bad {{ chain c {{ type filter hook {rules}; }}; }}'");
    let early = nft("inet", "prerouting priority -300; ip6 daddr { fd00:1:0:f::/64, 2001:db8::/32 } drop");
    let policy = nft(
        "ip6",
        "prerouting priority -150; policy drop; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept",
    );
    let port = nft("inet", "input priority 0; meta nfproto ipv6 udp dport 8472 drop");
    let cases = [
        (early.as_str(), "dropped-before-forward", "ip6 daddr"),
        (&policy, "tunnel-dropped", "policy"),
        (&port, "tunnel-dropped", "th dport"),
        (
            "ip6tables-legacy -w -t raw -A PREROUTING -d fd00:1:0:f::2 -m comment --comment x -j DROP",
            "dropped-before-forward",
            "ip6 daddr",
        ),
        (
            "ip6tables-legacy -w -t mangle -A POSTROUTING -p icmpv6 --icmpv6-type echo-request -o cni+ -j DROP",
            "may-drop",
            "icmp6",
        ),
    ];
    let cases = cases.map(|(rules, code, words)| Case { rules, lost: "all6", code, words });
    all_are_told(&site, &load, &unload, &cases);
}

#[test]
fn the_udp_tunnels_own_port_is_judged() {
    if !grants("udp") {
        return;
    }
    let Some((site, _dir)) = site(&[]) else { return };
    let host = &site.node.host;
    site.node.put("config", r#"{"Network":"10.1.0.0/16","Backend":{"Type":"udp"}}"#);
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.node.put("subnets/10.1.40.0-24", r#"{"PublicIP":"10.168.0.3","PublicIPv6":null}"#);
    host.feed(
        "nft -f -",
        "table inet bad { chain c { type filter hook input priority 0; udp dport 8000-9000 drop; }\n}",
    );
    let finding = site.node.finding("tunnel-dropped");
    assert_eq!(finding["object"], "chain inet bad c", "{finding}");
    host.feed("sh", finding["fix"].as_str().unwrap());
    eventually("the finding goes", || if findings(&site).is_empty() { Ok(()) } else { Err(findings(&site)) });
}

/// ufw's rules, the tunnel's and the store's ports open.
const UFW: &str = include_str!("judged/ufw.rules");

/// kube-proxy's and kubelet's rules in their mode iptables, with a service that has no endpoint.
const KUBE: &str = include_str!("judged/kube.rules");

#[test]
fn stock_rule_sets_are_no_alarm() {
    let Some((site, _dir)) = site(&["iptables-nft-restore", "iptables-legacy-restore"]) else { return };
    let host = &site.node.host;
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    for (name, text) in [("ufw", UFW), ("kube", KUBE)] {
        host.feed("iptables-nft-restore", text);
        eventually("it passes", || if reaches(&site, "all") { Ok(()) } else { Err(findings(&site)) });
        nothing_else_is_told(&site, name);
        host.run("nft delete table ip filter");
    }
    for table in ["nat", "mangle"] {
        host.run(&format!("nft delete table ip {table}"));
    }
    if !host.try_run("iptables-legacy -w -S").status.success() {
        return println!("SKIP: no legacy iptables: {:?}", host.try_run("iptables-legacy -w -S"));
    }
    host.feed("iptables-legacy-restore -w", KUBE);
    host.feed("sh", "iptables-legacy -w -t raw -A PREROUTING -d 10.1.15.77 -j DROP");
    eventually("the one finding is there", || {
        let now = findings(&site);
        if now.len() == 1 && now[0]["fix"] == "iptables-legacy -w -t raw -D PREROUTING 1" { Ok(()) } else { Err(now) }
    });
    host.feed("sh", "iptables-legacy -w -t raw -F");
    eventually("it goes", || if findings(&site).is_empty() { Ok(()) } else { Err(findings(&site)) });
    // ufw's policy is what drops, and nothing else is.
    host.feed("iptables-legacy-restore -w", UFW);
    let told = mend(&site, host);
    assert!(told.len() == 1 && told[0]["code"] == "legacy-drops-forward", "{told:#?}");
    assert!(reaches(&site, "all"));
}

#[test]
fn a_table_that_its_owner_alone_may_change_is_named_once_with_the_way_out() {
    let Some((site, _dir)) = site(&[]) else { return };
    let host = &site.node.host;
    let mut owner = host.command("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    let text = "add table inet owned { flags owner; }\n\
        add chain inet owned forward { type filter hook forward priority filter; policy drop; }\n";
    let mut stdin = owner.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    eventually("the table is there", || {
        let text = host.run("nft list ruleset");
        if text.contains("policy drop") { Ok(()) } else { Err(text) }
    });
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    let finding = site.node.finding("table-owned");
    assert_eq!(finding["object"], "table inet owned");
    assert!(finding["evidence"].as_str().unwrap().contains(&format!("nft (process {})", owner.id())), "{finding}");
    assert_eq!(findings(&site).len(), 1, "{:#?}", findings(&site));
    assert!(!site.node.log("agent.log").contains("Operation not permitted"));
    // All else goes on: other chains have their accepts, and what leaves is masqueraded.
    host.feed("nft -f -", "table inet other { chain f { type filter hook forward priority 5; policy drop; }\n}");
    eventually("our accepts stand in the other one", || {
        let text = host.run("nft list table inet other");
        if text.matches("twill").count() == 2 { Ok(()) } else { Err(text) }
    });
    assert!(!reaches(&site, "all"));
    host.feed("sh", finding["fix"].as_str().unwrap());
    owner.wait().unwrap();
    drop(stdin);
    eventually("the finding goes", || if findings(&site).is_empty() { Ok(()) } else { Err(findings(&site)) });
    eventually("packets pass", || if reaches(&site, "all") { Ok(()) } else { Err(host.run("nft list ruleset")) });
}
