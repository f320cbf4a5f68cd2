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
    let command = fix.split(';').next().unwrap().replace("iptables ", "iptables-nft ");
    host.run(&command);
    eventually("the finding ends with the rule", || {
        let status = site.node.status();
        let left = status["findings"].to_string().contains("dropped-before-forward");
        if left { Err(status) } else { Ok(()) }
    });
    passes(&site);
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
    let _firewalld = Foreign::Firewalld.start(host, dir.path());
    accepted();
    passes(&site);
    // The agent starts beside a firewalld that is there, and finds its rules as it left them.
    assert_eq!(agent.end(Signal::TERM), Some(0));
    let before = ruleset(host);
    let _agent = site.node.agent("");
    accepted();
    assert_eq!(ruleset(host), before);
}

#[test]
fn legacy_iptables_that_drops_is_named_with_the_commands_that_let_pass() {
    let Some((site, _dir)) = site(&["iptables-legacy"]) else { return };
    let host = &site.node.host;
    let policy = host.try_run("iptables-legacy -P FORWARD DROP");
    if !policy.status.success() {
        // A kernel without ip_tables says so itself.
        let said = String::from_utf8_lossy(&policy.stderr).into_owned();
        assert!(said.contains("does not exist") || said.contains("not supported"), "{said}");
        return println!("SKIP: this kernel has no legacy iptables: {said}");
    }
    let _agent = site.node.agent("--subnet 10.1.15.0/24");
    let finding = site.node.finding("legacy-drops-forward");
    for command in finding["fix"].as_str().unwrap().split(';') {
        host.run(command);
    }
    site.plug();
    site.peer();
    eventually("the finding ends with the rules", || {
        let status = site.node.status();
        let left = status["findings"].to_string().contains("legacy-drops-forward");
        if left { Err(status) } else { Ok(()) }
    });
    passes(&site);
}
