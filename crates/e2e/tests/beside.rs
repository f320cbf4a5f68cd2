//! Beside the firewalls of others: what Debian's iptables and firewalld leave in nftables, before and after the agent starts.

use rustix::process::Signal;
use twill_e2e::foreign::Foreign;
use twill_e2e::net::{Bed, Host};
use twill_e2e::site::{Site, ruleset};
use twill_e2e::{eventually, installed};

fn site(programs: &[&str]) -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !["etcdctl", "nft", "tcpdump"].iter().chain(programs).all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Site::new(bed, dir.path()), dir))
}

/// A peer's packets pass to the container and back, and keep their source.
fn passes(site: &Site) {
    let inside = site.arrives("flannel.1", "10.1.40.0");
    assert!(inside.contains("IP 10.1.15.2 > 10.1.40.0: ICMP echo request"), "{inside}");
}

/// Waits until `iptables-nft -S CHAIN` begins with our accepts, printed as any other rule.
fn accepts(host: &Host, chain: &str, there: bool) {
    let ours = ["-s 10.1.0.0/16", "-d 10.1.0.0/16"]
        .map(|end| format!("-A {chain} {end} -m comment --comment twill -j ACCEPT"));
    eventually(&format!("our accepts in {chain}: {there}"), || {
        let text = host.run(&format!("iptables-nft -S {chain}"));
        let rules: Vec<&str> = text.lines().filter(|line| line.starts_with("-A")).collect();
        let good = if there { rules.len() >= 2 && rules[..2] == ours } else { !text.contains("twill") };
        if good { Ok(()) } else { Err(text) }
    });
}

#[test]
fn iptables_that_drops_gets_our_accepts_repaired_and_removed() {
    let Some((site, _dir)) = site(&["iptables-nft"]) else { return };
    let host = &site.node.host;
    // Before the agent: a policy that drops.
    host.run("iptables-nft -P FORWARD DROP");
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    accepts(host, "FORWARD", true);
    passes(&site);
    // While it runs: somebody flushes, somebody inserts before us.
    host.run("iptables-nft -F FORWARD");
    accepts(host, "FORWARD", true);
    host.run("iptables-nft -I FORWARD -j DROP");
    accepts(host, "FORWARD", true);
    passes(&site);
    // Docker comes: its own place for others is used, and the base chain left to it.
    host.run("iptables-nft -N DOCKER-USER");
    host.run("iptables-nft -A DOCKER-USER -j RETURN");
    host.run("iptables-nft -I FORWARD -j DOCKER-USER");
    accepts(host, "DOCKER-USER", true);
    accepts(host, "FORWARD", false);
    passes(&site);
    // What drops before it, or without it, is not answered from there.
    host.run("iptables-nft -N empty");
    host.run("iptables-nft -N guard");
    host.run("iptables-nft -A guard -d 10.1.0.0/16 -j REJECT");
    // The last two end at the policy.
    for rule in ["-s 10.1.0.0/16 -j DROP", "-j guard", "-d 10.1.0.0/16 -j RETURN", "-g empty"] {
        host.run(&format!("iptables-nft -I FORWARD {rule}"));
        accepts(host, "FORWARD", true);
        accepts(host, "DOCKER-USER", false);
        passes(&site);
        host.run(&format!("iptables-nft -D FORWARD {rule}"));
        accepts(host, "DOCKER-USER", true);
        accepts(host, "FORWARD", false);
    }
    host.run("iptables-nft -I FORWARD -i docker0 -j DOCKER-USER");
    host.run("iptables-nft -D FORWARD -j DOCKER-USER");
    accepts(host, "FORWARD", true);
    passes(&site);
    host.run("iptables-nft -I FORWARD -j DOCKER-USER");
    host.run("iptables-nft -D FORWARD -i docker0 -j DOCKER-USER");
    accepts(host, "DOCKER-USER", true);
    accepts(host, "FORWARD", false);
    assert_eq!(site.node.twill_json("plan")["steps"], serde_json::json!([]));
    // A firewall that drops nothing needs nothing.
    host.run("iptables-nft -F FORWARD");
    host.run("iptables-nft -P FORWARD ACCEPT");
    accepts(host, "DOCKER-USER", false);
    host.run("iptables-nft -A FORWARD -j REJECT");
    accepts(host, "FORWARD", true);
    assert_eq!(agent.end(Signal::TERM), Some(0));
    assert_eq!(site.node.twill("clean").0, Some(0));
    accepts(host, "FORWARD", false);
}

#[test]
fn a_drop_before_the_forward_chain_is_named_with_the_command_that_ends_it() {
    let Some((site, _dir)) = site(&["iptables-nft"]) else { return };
    let host = &site.node.host;
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    // As docker from version 28 guards a container that has no port published to all.
    host.run("iptables-nft -t raw -A PREROUTING -d 10.1.15.2/32 ! -i docker0 -j DROP");
    let finding = site.node.finding("dropped-before-forward");
    let fix = finding["fix"].as_str().unwrap();
    host.feed("sh", fix);
    eventually("the finding ends with the rule", || {
        let status = site.node.status();
        let left = status["findings"].to_string().contains("dropped-before-forward");
        if left { Err(status) } else { Ok(()) }
    });
    passes(&site);
}

#[test]
fn a_drop_behind_a_map_is_answered_and_named() {
    let Some((site, _dir)) = site(&[]) else { return };
    let host = &site.node.host;
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    // As docker from version 29 does it with nftables: what each bridge may hear is behind a map of devices.
    host.feed(
        "nft -f -",
        "table ip docker-bridges {
           map filter-forward-in-jumps { type ifname : verdict; elements = { \"cni0\" : jump filter-forward-in__cni0 } }
           chain filter-FORWARD {
             type filter hook forward priority filter; policy accept;
             oifname vmap @filter-forward-in-jumps
           }
           chain filter-forward-in__cni0 { counter drop; }
         }
         table inet plain {
           chain guard {
             type filter hook forward priority 10; policy accept;
             ip saddr vmap { 10.1.15.2 : drop, 192.0.2.1 : accept }
           }
         }",
    );
    eventually("our accepts stand before both", || {
        let text = host.run("nft list ruleset");
        let count = text.matches("ip saddr 10.1.0.0/16 counter").count();
        if text.matches("comment \"twill\"").count() >= 4 && count >= 2 { Ok(()) } else { Err(text) }
    });
    passes(&site);
    assert_eq!(site.node.twill_json("plan")["steps"], serde_json::json!([]));
    // The map leads nowhere any more: nothing drops, and nothing of ours is needed there.
    host.run("nft flush map ip docker-bridges filter-forward-in-jumps");
    eventually("our accepts go", || {
        let text = host.run("nft list table ip docker-bridges");
        if text.contains("twill") { Err(text) } else { Ok(()) }
    });
    // Before the forward chain: a map behind a jump, and a whole network. What comes from elsewhere is none of ours.
    host.feed(
        "nft -f -",
        "table inet early {
           chain before {
             type filter hook prerouting priority raw; policy accept;
             iifname \"eth0\" ip saddr 10.1.0.0/16 drop
             ip daddr 198.51.100.0/24 drop
             jump more
           }
           chain more {
             ip daddr vmap { 10.1.15.0/24 : drop, 10.2.0.0/16 : accept }
             ip saddr 10.0.0.0/8 drop
           }
         }",
    );
    let findings = eventually("both are named", || {
        let status = site.node.status();
        let all = status["findings"].as_array().unwrap().clone();
        if all.len() == 2 { Ok(all) } else { Err(status) }
    });
    // The second one drops the underlay's packets, too.
    for (rule, code) in [("ip daddr vmap", "dropped-before-forward"), ("ip saddr 10.0.0.0/8", "tunnel-dropped")] {
        let told = |finding: &&serde_json::Value| finding["evidence"].as_str().unwrap().contains(rule);
        let finding = findings.iter().find(told).unwrap_or_else(|| panic!("{findings:?}"));
        assert_eq!((&finding["code"], &finding["object"]), (&code.into(), &"chain inet early more".into()));
        host.feed("sh", finding["fix"].as_str().unwrap());
    }
    let silent = || {
        eventually("the findings end with the rules", || {
            let status = site.node.status();
            if status["findings"] == serde_json::json!([]) { Ok(()) } else { Err(status) }
        });
    };
    silent();
    passes(&site);
    // Whatever comes in, by a policy or a rule.
    for rules in ["policy drop; iifname { eth0, cni0, lo } accept", "policy accept; iifname \"flannel.1\" counter drop"]
    {
        host.feed(
            "nft -f -",
            &format!(
                "table ip shut {{\nchain before {{\ntype filter hook prerouting priority -250; {rules};\n}}\n}}\n"
            ),
        );
        let finding = site.node.finding("dropped-before-forward");
        assert_eq!(finding["object"], "chain ip shut before", "{finding}");
        host.feed("sh", finding["fix"].as_str().unwrap());
        silent();
        passes(&site);
        host.run("nft delete table ip shut");
    }
    agent.end(Signal::TERM);
    assert_eq!(site.node.twill("clean").0, Some(0));
    assert!(!host.run("nft list ruleset").contains("twill"));
}

#[test]
fn a_strangers_table_whose_name_begins_like_ours_is_answered_and_named() {
    let Some((site, _dir)) = site(&[]) else { return };
    let host = &site.node.host;
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    host.feed(
        "nft -f -",
        "table inet twill-guard {
           chain forward { type filter hook forward priority filter; policy drop; }
           chain before {
             type filter hook prerouting priority raw; policy accept;
             ip daddr 10.1.0.0/16 iifname \"flannel.1\" drop
           }
         }",
    );
    let finding = site.node.finding("dropped-before-forward");
    assert_eq!(finding["object"], "chain inet twill-guard before", "{finding}");
    host.run("nft flush chain inet twill-guard before");
    passes(&site);
}

#[test]
fn what_somebody_saves_and_loads_again_is_still_known_as_ours() {
    let Some((site, _dir)) = site(&["iptables-nft-save", "iptables-nft-restore"]) else { return };
    let host = &site.node.host;
    host.run("iptables-nft -P FORWARD DROP");
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    accepts(host, "FORWARD", true);
    // As netfilter-persistent and a service of nftables do, with everything at once.
    let shown = ruleset(host);
    host.feed("nft -f -", &format!("flush ruleset\n{}", host.run("nft list ruleset")));
    let now = || {
        let now = ruleset(host);
        if now == shown { Ok(()) } else { Err((now, site.node.log("agent.log"))) }
    };
    eventually("the ruleset is as it was", now);
    let saved = host.run("iptables-nft-save");
    host.feed("iptables-nft-restore", &saved);
    accepts(host, "FORWARD", true);
    let twice = |text: String| text.matches("--comment twill").count();
    eventually("nothing of ours stands twice", || {
        let text = host.run("iptables-nft -S FORWARD");
        if twice(text.clone()) == 2 { Ok(()) } else { Err(text) }
    });
    passes(&site);
    agent.end(Signal::TERM);
    assert_eq!(site.node.twill("clean").0, Some(0));
    accepts(host, "FORWARD", false);
}

#[test]
fn firewalld_that_rejects_gets_our_accepts_whoever_starts_first() {
    let Some((site, dir)) = site(&["firewalld", "dbus-daemon"]) else { return };
    if !rustix::process::geteuid().is_root() {
        return println!("SKIP: firewalld needs root");
    }
    let host = &site.node.host;
    let accepted = || {
        eventually("our accepts stand before firewalld's reject", || {
            let out = host.try_run("nft list chain inet firewalld filter_FORWARD");
            let text = String::from_utf8_lossy(&out.stdout).into_owned();
            let rules: Vec<&str> = text.lines().map(str::trim).skip(3).take(2).collect();
            let good = rules.len() == 2
                && rules[0].starts_with("ip saddr 10.1.0.0/16 counter")
                && rules[0].ends_with(r#"accept comment "twill""#)
                && rules[1].starts_with("ip daddr 10.1.0.0/16 counter");
            if good { Ok(()) } else { Err((text, site.node.log("agent.log"))) }
        });
    };
    let agent = site.node.agent("--subnet 10.1.15.0/24");
    site.plug();
    site.peer();
    let firewalld = Foreign::Firewalld.start(host, dir.path());
    accepted();
    passes(&site);
    // It writes its tables anew.
    for how in ["--reload", "--complete-reload"] {
        firewalld.ask(host, &[how]);
        accepted();
        // A reload forgets what was not written down.
        firewalld.ask(host, &twill_e2e::foreign::OPEN);
        passes(&site);
    }
    // The agent starts beside a firewalld that is there, and finds its rules as it left them.
    assert_eq!(agent.end(Signal::TERM), Some(0));
    let before = ruleset(host);
    let _agent = site.node.agent("");
    accepted();
    assert_eq!(ruleset(host), before);
}

/// True where the kernel has legacy iptables; else says so as a skip.
fn has_legacy(host: &Host) -> bool {
    let out = host.try_run("iptables-legacy -S");
    if !out.status.success() {
        // A kernel without ip_tables says so itself.
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(said.contains("does not exist") || said.contains("not supported"), "{said}");
        println!("SKIP: this kernel has no legacy iptables: {said}");
    }
    out.status.success()
}

#[test]
fn legacy_iptables_that_drops_is_named_with_the_commands_that_let_pass() {
    let Some((site, _dir)) = site(&["iptables-legacy", "ip6tables-legacy"]) else { return };
    let host = &site.node.host;
    if !has_legacy(host) {
        return;
    }
    site.speak_ipv6();
    site.node.put(
        "config",
        r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#,
    );
    let _agent = site.node.agent("--subnet 10.1.15.0/24,fd00:1:0:f::/64");
    site.plug();
    site.plug6();
    site.peer();
    site.peer6();
    let both = || {
        passes(&site);
        let inside = site.arrives("flannel-v6.1", "fd00:1:0:28::");
        assert!(inside.contains("IP6 fd00:1:0:f::2 > fd00:1:0:28::: "), "{inside}");
    };
    both();
    // Before the forward chain, as docker from version 28 guards a container; in it, as docker's policy and a rule of a person do, with the
    // accepts of somebody who has put them behind.
    let findings = |code: &str, number: usize| {
        eventually(&format!("{number} findings of {code}"), || {
            let status = site.node.status();
            let all = status["findings"].as_array().unwrap().clone();
            let right = all.len() == number && all.iter().all(|finding| finding["code"] == code);
            if right { Ok(all) } else { Err(status.to_string()) }
        })
    };
    for (code, rules) in [
        (
            "dropped-before-forward",
            [
                "iptables-legacy -w -t raw -A PREROUTING -d 10.1.15.2/32 ! -i cni0 -j DROP",
                "ip6tables-legacy -w -t raw -A PREROUTING -d fd00:1:0:f::2/128 ! -i cni0 -j DROP",
            ],
        ),
        (
            "dropped-before-forward",
            [
                "iptables-legacy -w -t mangle -A PREROUTING -s 10.1.0.0/16 -j DROP",
                "ip6tables-legacy -w -t mangle -A PREROUTING -s fd00:1::/32 -j DROP",
            ],
        ),
        (
            "dropped-before-forward",
            [
                "iptables-legacy -w -t raw -A PREROUTING -i flannel.1 -j DROP",
                "ip6tables-legacy -w -t mangle -A PREROUTING -i flannel-v6.1 -j DROP",
            ],
        ),
        ("legacy-drops-forward", ["iptables-legacy -w -P FORWARD DROP", "ip6tables-legacy -w -A FORWARD -j REJECT"]),
        (
            "legacy-drops-forward",
            ["iptables-legacy -w -I FORWARD -d 10.1.15.0/24 -j DROP", "ip6tables-legacy -w -t mangle -P FORWARD DROP"],
        ),
    ] {
        // Elsewhere it is nobody's business.
        host.run("iptables-legacy -w -t raw -A PREROUTING -d 192.0.2.7/32 ! -i docker0 -j DROP");
        host.run("iptables-legacy -w -t raw -A PREROUTING -d 10.1.15.2/32 -i eth0 -j DROP");
        rules.iter().for_each(|rule| drop(host.run(rule)));
        let found = findings(code, 2);
        for fix in found.iter().map(|finding| finding["fix"].as_str().unwrap()) {
            host.feed("sh", fix);
        }
        findings(code, 0);
        both();
    }
}
