//! The way out of the network: what leaves is masqueraded, what stays is not, and nobody takes that away for long.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use twill_e2e::net::{Bed, Host};
use twill_e2e::overlay::Overlay;
use twill_e2e::site::{Site, announced, ruleset};
use twill_e2e::{eventually, grants, installed};

/// A site, or `None` where this machine grants none (which was said); its folder goes last.
fn site() -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !["conntrack", "etcdctl", "nft", "tcpdump"].iter().all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Site::new(bed, dir.path()), dir))
}

/// As [`site`], with both families on the wire and in the network.
fn both_families() -> Option<(Site, tempfile::TempDir)> {
    let (site, dir) = site()?;
    site.speak_ipv6();
    site.node.put(
        "config",
        r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#,
    );
    Some((site, dir))
}

fn handles(host: &Host) -> String {
    host.run("nft -a list table inet twill")
        .lines()
        .filter(|l| l.contains("handle"))
        .map(|l| l.rsplit(' ').next().unwrap())
        .collect()
}

#[test]
fn what_leaves_is_masqueraded_and_what_stays_is_not() {
    let Some((site, _dir)) = site() else { return };
    let _agent = site.node.agent("--subnet 10.1.15.0/24 --ip-masq");
    site.plug();
    let env = std::fs::read_to_string(site.node.file("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_IPMASQ=true"), "{env}");
    site.peer();
    let out = site.arrives("eth0", "10.168.0.3");
    assert!(out.contains("IP 10.168.0.2 > 10.168.0.3: ICMP echo request"), "{out}");
    let inside = site.arrives("flannel.1", "10.1.40.0");
    assert!(inside.contains("IP 10.1.15.2 > 10.1.40.0: ICMP echo request"), "{inside}");
    // What is inside the tunnel is a connection; the tunnel's own datagrams are none, sent or heard.
    let tracked = site.node.host.run("conntrack -L");
    assert!(tracked.contains("src=10.1.15.2 dst=10.1.40.0"), "{tracked}");
    assert!(!tracked.contains("dport=8472"), "{tracked}");
    for chain in ["sent", "heard"] {
        let rules = site.node.host.run(&format!("nft list chain inet twill {chain}"));
        let untracked = |line: &str| line.ends_with(" notrack") && !line.contains("counter packets 0 ");
        assert!(rules.lines().any(untracked), "{rules}");
    }
    assert_eq!(site.node.twill_json("plan")["steps"], serde_json::json!([]));
}

#[test]
fn without_ip_masq_the_containers_address_is_seen() {
    let Some((site, _dir)) = site() else { return };
    let _agent = site.node.agent("--subnet 10.1.15.0/24 --ip-masq=false");
    site.plug();
    let env = std::fs::read_to_string(site.node.file("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_IPMASQ=false"), "{env}");
    site.node.other.ip("route add 10.1.15.0/24 via 10.168.0.2");
    let out = site.arrives("eth0", "10.168.0.3");
    assert!(out.contains("IP 10.1.15.2 > 10.168.0.3: ICMP echo request"), "{out}");
}

#[test]
fn a_flushed_ruleset_comes_back_and_a_restart_touches_nothing() {
    let Some((site, _dir)) = site() else { return };
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    let host = &site.node.host;
    let (before, old) = (ruleset(host), handles(host));
    assert!(before.iter().any(|object| object["table"]["name"] == "twill"), "{before:?}");
    // A restart finds its table and leaves it: the same objects, by their handles.
    assert_eq!(agent.end(Signal::TERM), Some(0));
    assert_eq!(handles(host), old);
    let _agent = site.node.agent("");
    assert_eq!((ruleset(host), handles(host)), (before.clone(), old));
    for line in [
        "nft flush ruleset",
        "nft flush chain inet twill leaving",
        "nft insert rule inet twill forward drop",
        "nft add chain inet twill stranger",
        "nft add chain inet twill forward { policy drop ; }",
        "nft add table inet twill { flags dormant ; }",
        "nft add map inet twill stranger { type ipv4_addr : verdict ; }",
        "nft add set inet twill stranger { type inet_service ; }",
        "nft add counter inet twill stranger",
    ] {
        host.run(line);
        eventually(&format!("the table is back after `{line}`"), || {
            let now = ruleset(host);
            let dormant = host.try_run("nft list table inet twill").stdout.windows(7).any(|word| word == b"dormant");
            if now == before && !dormant { Ok(()) } else { Err((now, site.node.log("agent.log"))) }
        });
    }
    // Again and again: that somebody does so is said, and the way out still comes back.
    for _ in 0..8 {
        host.run("nft flush ruleset");
        eventually("the table is back once more", || {
            let now = ruleset(host);
            if now == before { Ok(()) } else { Err((now, site.node.log("agent.log"))) }
        });
    }
    assert!(site.node.finding("fought-over")["object"].as_str().unwrap().starts_with("table inet twill"));
    let out = site.arrives("eth0", "10.168.0.3");
    assert!(out.contains("IP 10.168.0.2 > 10.168.0.3"), "{out}");
    eventually("the journal tells", || {
        let status = site.node.status();
        let told = status["repairs"]["recent"].to_string().contains("table inet twill");
        if told { Ok(()) } else { Err(status) }
    });
}

#[test]
fn our_table_without_its_comment_is_known_by_what_is_in_it() {
    let Some((site, _dir)) = site() else { return };
    let host = &site.node.host;
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    let (before, text) = (ruleset(host), host.run("nft list table inet twill"));
    // As a program saves it that knows no comments of tables.
    let saved = text.replacen("comment \"twill\"\n", "\n", 1);
    assert_ne!(saved, text);
    host.feed("nft -f -", &format!("delete table inet twill\n{saved}"));
    eventually("it is ours again", || {
        let now = host.run("nft list table inet twill");
        let told = site.node.status()["findings"].to_string();
        if now.contains("comment \"twill\"") && ruleset(host) == before && told == "[]" {
            Ok(())
        } else {
            Err((now, told))
        }
    });
    // With a rule more it is somebody else's.
    host.feed("nft -f -", &format!("delete table inet twill\n{saved}\nadd rule inet twill forward drop"));
    site.node.finding("table-taken");
}

#[test]
fn a_strangers_table_of_our_name_is_left_alone_and_clean_removes_ours() {
    let Some((site, _dir)) = site() else { return };
    let host = &site.node.host;
    host.run("nft add table inet twill");
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    let finding = site.node.finding("table-taken");
    assert!(!finding["evidence"].as_str().unwrap().contains("may drop"), "{finding}");
    let env = std::fs::read_to_string(site.node.file("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_IPMASQ=false"), "{env}");
    assert_eq!(ruleset(host).len(), 1, "the stranger's table is as it was");
    site.peer();
    site.arrives("flannel.1", "10.1.40.0");
    assert_eq!(site.node.twill_json("plan")["steps"], serde_json::json!([]));
    // Also where it drops: an accept of ours stands in other tables, and not there.
    host.run("nft add chain inet twill theirs { type filter hook forward priority 0 ; policy drop ; }");
    host.feed("nft -f -", "table inet beside {\nchain theirs { type filter hook forward priority 0; policy drop; }\n}");
    let ours = |table: &str| host.run(&format!("nft list table inet {table}")).matches("comment \"twill\"").count();
    eventually(
        "two accepts beside it",
        || if ours("beside") == 2 { Ok(()) } else { Err(host.run("nft list ruleset")) },
    );
    let finding = eventually("what it drops is told", || {
        let finding = site.node.finding("table-taken");
        if finding["evidence"].as_str().unwrap().contains("its chain theirs may drop") {
            Ok(finding)
        } else {
            Err(finding)
        }
    });
    assert_eq!((ours("twill"), ours("beside")), (0, 2));
    host.run("nft delete table inet beside");
    host.feed("sh", finding["fix"].as_str().unwrap());
    eventually("ours takes the place", || {
        let now = ruleset(host);
        if now.iter().any(|o| o["chain"]["name"] == "leaving") { Ok(()) } else { Err(now) }
    });
    assert_eq!(agent.end(Signal::TERM), Some(0));
    host.run("nft add table ip stranger");
    let (code, said) = site.node.twill("clean");
    assert_eq!(code, Some(0), "{said:?}");
    let left = ruleset(host);
    assert!(left.len() == 1 && left[0]["table"]["name"] == "stranger", "{left:?}");
}

#[test]
fn unused_addresses_excluded_networks_and_stolen_sources() {
    let Some((site, _dir)) = site() else { return };
    let host = &site.node.host;
    site.node.put("config", r#"{"Network":"10.1.0.0/16","NoMasqCIDRs":["10.168.0.0/30"],"Backend":{"Type":"vxlan"}}"#);
    let _agent = site.node.agent("--subnet 10.1.15.0/24 --clamp-mss");
    // No bridge yet: no address of the subnet leads anywhere, and none back to the default gateway.
    let route = host.json("route show 10.1.15.0/24");
    assert_eq!((&route[0]["type"], &route[0]["metric"]), (&"blackhole".into(), &4_294_967_295u32.into()), "{route}");
    site.plug();
    site.peer();
    assert_eq!(host.json("route get 10.1.15.2")[0]["dev"], "cni0", "the bridge's route is better");
    // 10.168.0.3 is excluded: it sees the container.
    site.node.other.ip("route add 10.1.15.2/32 via 10.168.0.2 dev eth0");
    let out = site.arrives("eth0", "10.168.0.3");
    assert!(out.contains("IP 10.1.15.2 > 10.168.0.3: ICMP echo request"), "{out}");
    site.node.other.ip("route del 10.1.15.2/32 via 10.168.0.2 dev eth0");
    // From the tunnel nobody comes with an address of ours, and no container goes into it with another node's.
    let dropped = |chain: &str, device: &str, before: u64| {
        let now = site.node.dropped(chain, &[device]);
        if now > before { Ok(now) } else { Err(host.run("nft list table inet twill")) }
    };
    site.node.other.ip("addr add 10.1.15.9/32 dev lo");
    let mut before = 0;
    for to in ["10.1.15.2", "10.1.15.0"] {
        before = eventually("a stolen source is dropped at the tunnel", || {
            site.node.other.try_run(&format!("ping -c 1 -W 1 -I 10.1.15.9 {to}"));
            dropped("heard", "iifname \"flannel.1\"", before)
        });
    }
    site.container.ip("addr add 10.1.77.7/32 dev eth0");
    eventually("a foreign source is dropped before the tunnel", || {
        site.container.try_run("ping -c 1 -W 1 -I 10.1.77.7 10.1.40.0");
        dropped("forward", "oifname \"flannel.1\"", 0)
    });
    let clamp = host.run("nft list chain inet twill clamp");
    assert!(clamp.contains("tcp option maxseg size set rt mtu"), "{clamp}");
    site.node.put("config", r#"{"Network":"10.1.0.0/16","NoMasqCIDRs":["10.168.0.1/30"],"Backend":{"Type":"vxlan"}}"#);
    let finding = site.node.finding("bad-config");
    assert!(finding["evidence"].as_str().unwrap().contains("NoMasqCIDRs"), "{finding}");
}

#[test]
fn a_kernel_without_nf_tables_is_named_and_the_network_goes_on() {
    let Some((site, _dir)) = site() else { return };
    if !installed("strace") {
        return;
    }
    let host = &site.node.host;
    // Without a config the agent waits, and its thread that owns the kernel has not looked for nftables yet.
    site.node.delete("config");
    let agent = site.node.agent_at_once("--subnet 10.1.15.0/24");
    site.node.finding("config-missing");
    let thread = std::fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap().find_map(|task| {
        let path = task.unwrap().path();
        let name = std::fs::read_to_string(path.join("comm")).unwrap();
        (name.trim() == "reconciler").then(|| path.file_name().unwrap().to_str().unwrap().to_owned())
    });
    // Every socket that this thread asks for is refused, with the word of a kernel that does not know NETLINK_NETFILTER.
    let mut command = host.command("strace");
    command.args(["-e", "inject=socket:error=EPROTONOSUPPORT", "-p", &thread.unwrap()]);
    let trace = std::fs::File::create(site.node.file("strace.log")).unwrap();
    let mut strace = command.stdin(Stdio::null()).stderr(trace).spawn().unwrap();
    eventually("strace is attached", || {
        let said = site.node.log("strace.log");
        if said.contains("attached") { Ok(()) } else { Err(said) }
    });
    site.node.put("config", twill_e2e::node::CONFIG);
    let finding = site.node.finding("nf-tables-missing");
    let words = |key: &str| finding[key].as_str().unwrap().to_owned();
    assert!(words("evidence").contains("Protocol not supported") && words("fix").contains("modprobe"), "{finding}");
    assert!(site.node.log("strace.log").contains("NETLINK_NETFILTER) = -1 EPROTONOSUPPORT"), "{finding}");
    site.plug();
    site.peer();
    let inside = site.arrives("flannel.1", "10.1.40.0");
    assert!(inside.contains("IP 10.1.15.2 > 10.1.40.0: ICMP echo request"), "{inside}");
    let env = std::fs::read_to_string(site.node.file("subnet.env")).unwrap();
    assert!(env.contains("FLANNEL_IPMASQ=false"), "{env}");
    // The module is loaded: the way out comes by itself.
    let _ = kill_process(Pid::from_child(&strace), Signal::TERM);
    strace.wait().unwrap();
    eventually("the table is there, and nothing is left to say", || {
        let status = site.node.status();
        let ours = ruleset(host).iter().any(|object| object["chain"]["name"] == "leaving");
        if ours && status["findings"] == serde_json::json!([]) {
            Ok(())
        } else {
            Err((status, site.node.log("agent.log")))
        }
    });
    let out = site.arrives("eth0", "10.168.0.3");
    assert!(out.contains("IP 10.168.0.2 > 10.168.0.3: ICMP echo request"), "{out}");
}

#[test]
fn no_program_is_started_for_the_firewall() {
    let Some((site, _dir)) = site() else { return };
    if !["strace", "iptables-nft"].iter().all(|program| installed(program)) {
        return;
    }
    let host = &site.node.host;
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    let before = ruleset(host);
    let mut command = host.command("strace");
    command.args(["-f", "-e", "trace=execve,execveat,sendto,sendmsg", "-p", &agent.pid().to_string()]);
    let trace = std::fs::File::create(site.node.file("strace.log")).unwrap();
    let mut strace = command.stdin(Stdio::null()).stderr(trace).spawn().unwrap();
    let said = || site.node.log("strace.log");
    eventually("strace is attached", || if said().contains("attached") { Ok(()) } else { Err(said()) });
    host.run("nft flush ruleset");
    eventually("the table is back", || if ruleset(host) == before { Ok(()) } else { Err(ruleset(host)) });
    host.run("iptables-nft -P FORWARD DROP");
    eventually("our accepts stand", || {
        let rules = host.run("iptables-nft -S FORWARD");
        if rules.matches("--comment twill").count() == 2 { Ok(()) } else { Err(rules) }
    });
    let _ = kill_process(Pid::from_child(&strace), Signal::TERM);
    strace.wait().unwrap();
    let said = said();
    assert!(said.contains("NFNL_SUBSYS_NFTABLES") && !said.contains("execve"), "{said}");
}

#[test]
fn a_syn_announces_what_the_tunnel_carries_where_that_is_asked_for() {
    let Some((site, _dir)) = both_families() else { return };
    if !installed("busybox") {
        return;
    }
    let agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    site.peer();
    site.peer6();
    // A peer whose devices are as large as its underlay, as some tools make them.
    site.node.other.ip("link set eth0 mtu 1600");
    for device in ["flannel.1", "flannel-v6.1"] {
        site.node.other.ip(&format!("link set {device} mtu 1500"));
    }
    let both = || {
        [("flannel.1", "10.1.40.0", "10.1.15.2"), ("flannel-v6.1", "fd00:1:0:28::", "fd00:1:0:f::2")].map(
            |(device, out, back)| {
                site.arrives(device, out);
                let there = announced(&site.container, out, &site.node.other, device);
                (there, announced(&site.node.other, back, &site.container, "eth0"))
            },
        )
    };
    let sizes = |v4: &str, v6: &str| [v4, v6].map(|size| (size.to_owned(), size.to_owned()));
    assert_eq!(both(), sizes("1460", "1440"), "the devices' own 1500, without headers");
    assert_eq!(agent.end(Signal::TERM), Some(0));
    let _agent = site.node.agent("--clamp-mss");
    assert_eq!(both(), sizes("1410", "1370"), "1450 - 40 and 1430 - 60, both ways");
}

#[test]
fn a_syn_announces_what_the_udp_tunnel_carries() {
    let Some(bed) = Bed::new() else { return };
    if !grants("udp") || !["busybox", "etcdctl", "nft", "tcpdump"].iter().all(|program| installed(program)) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut net = Overlay::running(bed, dir.path());
    for number in [1, 2] {
        let site = net.site(number);
        site.host.ip("link set docker0 mtu 1500");
        site.container.ip("link set eth0 mtu 1500");
    }
    let both = |net: &Overlay| {
        let (one, two) = (&net.site(1).container, &net.site(2).container);
        [announced(one, "100.96.2.2", two, "eth0"), announced(two, "100.96.1.2", one, "eth0")]
    };
    assert_eq!(both(&net), ["1460", "1460"], "the containers' own 1500 - 40");
    assert_eq!(net.site_mut(1).stop(Signal::TERM), Some(0));
    net.site_mut(1).start("--clamp-mss");
    net.await_both_ways();
    assert_eq!(both(&net), ["1432", "1432"], "1472 - 40, both ways, where one end alone asks for it");
}

#[test]
fn blackholes_of_others_for_the_own_subnet() {
    let Some((site, _dir)) = both_families() else { return };
    let host = &site.node.host;
    let families = [("-4", "10.1.15.0/24"), ("-6", "fd00:1:0:f::/64")];
    for (family, subnet) in families {
        // What flannel's --ip-blackhole-route leaves stands before the bridge's route, so that no container is reached.
        let metric = if family == "-4" { "" } else { "metric 10" };
        host.ip(&format!("{family} route add blackhole {subnet} {metric}"));
        // What somebody else wrote is his.
        host.ip(&format!("{family} route add blackhole {subnet} proto static metric 50"));
    }
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    for (family, subnet) in families {
        let mut routes = eventually("flannel's is gone", || {
            let routes = host.run(&format!("ip -N {family} route show {subnet}"));
            let lines: Vec<String> = routes.lines().map(|line| line.trim().to_owned()).collect();
            if lines.iter().any(|line| line.contains("proto 3 ")) || lines.len() != 3 { Err(routes) } else { Ok(lines) }
        });
        // IPv6's are shown in another order.
        routes.sort_by_key(|line| {
            line.split("metric ").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u32>().ok())
        });
        let of = |n: usize, words: [&str; 2]| assert!(words.iter().all(|word| routes[n].contains(word)), "{routes:?}");
        let bridge = usize::from(family == "-6");
        of(bridge, ["dev cni0", subnet]);
        of(1 - bridge, ["proto 4", "metric 50"]);
        of(2, ["proto 116", "metric 4294967295"]);
    }
    site.peer();
    site.peer6();
    site.arrives("flannel.1", "10.1.40.0");
    for fix in [
        "ip route del blackhole 10.1.15.0/24 proto static metric 50",
        "ip -6 route del blackhole fd00:1:0:f::/64 dev lo proto static metric 50",
    ] {
        let finding = eventually("it is named", || {
            let status = site.node.status();
            let found = status["findings"].as_array().unwrap().iter().find(|finding| finding["fix"] == fix).cloned();
            found.ok_or(status)
        });
        assert_eq!(finding["code"], "route-shadowed");
        host.run(fix);
    }
    site.arrives("flannel-v6.1", "fd00:1:0:28::");
    eventually("nothing is left to say", || {
        let status = site.node.status();
        if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status) }
    });
}
