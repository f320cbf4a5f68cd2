//! What flannel left in the firewall is taken over: nothing leaves without the node's address meanwhile, and of flannel's nothing stays.
//!
//! ```text
//!   container 10.1.15.2, fd00:1:0:f::2 ─ cni0 ─ node ─ eth0 10.168.0.2, fd00:168::2 ───── eth0 10.168.0.3, fd00:168::3 ─ other
//! ```
//! The rules are those of flannel's two traffic managers, for both families, beside a stranger's; and what the real flannel leaves.

use std::process::{Child, Stdio};

use rustix::process::Signal;
use serde_json::json;
use twill_e2e::capture::Capture;
use twill_e2e::flannel::flanneld;
use twill_e2e::net::{Bed, Host};
use twill_e2e::site::{Site, ruleset};
use twill_e2e::{eventually, installed};

const DUAL: &str =
    r#"{"Network":"10.1.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:1::/48","Backend":{"Type":"vxlan"}}"#;

/// A family in the words of its programs: network, own subnet, groups, what answers outside, the container's own address.
const FAMILIES: [[&str; 6]; 2] = [
    ["", "10.1.0.0/16", "10.1.15.0/24", "224.0.0.0/4", "10.168.0.3", "10.1.15.2"],
    ["6", "fd00:1::/48", "fd00:1:0:f::/64", "ff00::/8", "fd00:168::3", "fd00:1:0:f::2"],
];

/// Flannel's chains beside rules of somebody else, as `iptables-restore` takes them.
const CHAINS: &str = r#"*nat
:POSTROUTING ACCEPT [0:0]
:FLANNEL-POSTRTG - [0:0]
-A POSTROUTING -s STRANGER -j MASQUERADE
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s OWN -d NETWORK -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NETWORK -d OWN -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s NETWORK -d OWN -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NETWORK ! -d GROUPS -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s NETWORK -d NETWORK -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
COMMIT
*filter
:FORWARD DROP [0:0]
:FLANNEL-FWD - [0:0]
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FORWARD -s STRANGER -j ACCEPT
-A FLANNEL-FWD -s NETWORK -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d NETWORK -m comment --comment "flanneld forward" -j ACCEPT
COMMIT
"#;

/// What flannel before 0.20 left in POSTROUTING and FORWARD themselves, the newer ones with comments; and rules of the same shape for
/// somebody else's network.
const BARE: &str = "*nat
:POSTROUTING ACCEPT [0:0]
-A POSTROUTING -s STRANGER ! -d GROUPS -j MASQUERADE
-A POSTROUTING -s NETWORK -d NETWORK COMMENT -j RETURN
-A POSTROUTING -s NETWORK ! -d GROUPS COMMENT -j MASQUERADE --random-fully
-A POSTROUTING ! -s NETWORK -d OWN COMMENT -j RETURN
-A POSTROUTING ! -s NETWORK -d NETWORK COMMENT -j MASQUERADE --random-fully
-A POSTROUTING -s NETWORK -d OWN -j ACCEPT
COMMIT
*filter
-A FORWARD -s NETWORK -j ACCEPT
-A FORWARD -d NETWORK -j ACCEPT
COMMIT
";

/// What flannel wrote for container runtimes: by this its subnets are known as this node's.
const SUBNET_ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.15.1/24\nFLANNEL_IPV6_NETWORK=fd00:1::/48\n\
    FLANNEL_IPV6_SUBNET=fd00:1:0:f::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// Flannel's own tables of nftables.
const TABLES: &str = "table IPV flannel-IPVNAME {
  chain postrtg {
    type nat hook postrouting priority srcnat; policy accept;
    meta mark 0x4000 return
    IPV saddr OWN IPV daddr NETWORK return
    IPV saddr NETWORK IPV daddr OWN return
    IPV saddr != OWN IPV daddr NETWORK return
    IPV saddr NETWORK IPV daddr != GROUPS masquerade fully-random
    IPV saddr != NETWORK IPV daddr NETWORK masquerade fully-random
  }
  chain forward {
    type filter hook forward priority filter; policy accept;
    IPV saddr NETWORK accept
    IPV daddr NETWORK accept
  }
}
";

/// The text with the words of a family.
fn of_family(text: &str, [six, network, own, groups, _, _]: [&str; 6]) -> String {
    let (name, stranger) = if six.is_empty() { ("ipv4", "172.17.0.0/16") } else { ("ipv6", "fd00:17::/64") };
    let ip = if six.is_empty() { "ip" } else { "ip6" };
    let words = [("IPVNAME", name), ("IPV", ip), ("OWN", own), ("NETWORK", network), ("GROUPS", groups)];
    words.iter().fold(text.replace("STRANGER", stranger), |text, (word, value)| text.replace(word, value))
}

/// A site with both families, whose container is there before the agent, as after a change from flannel.
fn site(programs: &[&str]) -> Option<(Site, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !["etcdctl", "nft", "tcpdump", "conntrack"].iter().chain(programs).all(|program| installed(program)) {
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let site = Site::new(bed, dir.path());
    site.node.put("config", DUAL);
    std::fs::write(site.node.file("subnet.env"), SUBNET_ENV).unwrap();
    site.speak_ipv6();
    site.plug();
    site.plug6();
    site.node.host.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
    Some((site, dir))
}

/// New connections from the container to the outside, one after the other, and what arrives there of them.
struct Stream {
    pings: Vec<Child>,
    capture: Option<Capture>,
}

impl Stream {
    fn start(site: &Site) -> Stream {
        let requests = "inbound and (icmp[0] == 8 or icmp6[0] == 128)";
        let capture = Capture::start(&site.node.other, "eth0", &[], None, requests);
        let once = |[_, _, _, _, to, _]: [&str; 6]| {
            let line = format!("while :; do ping -c 1 -W 1 {to} >/dev/null; done");
            site.container.command("sh").args(["-c", &line]).stdin(Stdio::null()).spawn().unwrap()
        };
        Stream { pings: FAMILIES.map(once).into(), capture: Some(capture) }
    }

    /// Ends it; gives what arrived.
    fn end(mut self) -> String {
        let capture = self.capture.take().unwrap();
        capture.stop();
        capture.text()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        for child in &mut self.pings {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Waits until a new connection of each family gets through, and sees that its address was changed once: for the node's own.
fn masqueraded_once(site: &Site) {
    for [six, _, _, _, to, from] in FAMILIES {
        site.arrives("eth0", to);
        let list = ["-L", "-f", if six.is_empty() { "ipv4" } else { "ipv6" }, "-s", from, "-d", to];
        let out = site.node.host.command("conntrack").args(list).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let back = if six.is_empty() { "dst=10.168.0.2 " } else { "dst=fd00:168::2 " };
        assert!(!text.is_empty() && text.lines().all(|line| line.contains(back)), "{text}");
    }
}

/// The agent starts where flannel's were left: what shows these words to be gone is `shown`.
fn taken_over(site: &Site, shown: impl Fn() -> String, flannels: &[&str], stays: &str) {
    masqueraded_once(site);
    let before = shown().to_lowercase();
    assert!(flannels.iter().all(|word| before.contains(word)), "{before}");
    let stream = Stream::start(site);
    let agent = site.node.agent_at_once("");
    eventually("nothing of flannel's is left, and what is somebody else's stays", || {
        let now = shown();
        let ours = ruleset(&site.node.host).iter().any(|object| object["chain"]["name"] == "leaving");
        let lower = now.to_lowercase();
        let gone = !flannels.iter().any(|word| lower.contains(word)) && now.contains(stays);
        if ours && gone { Ok(()) } else { Err((now, site.node.log("agent.log"))) }
    });
    masqueraded_once(site);
    let arrived = stream.end();
    assert!(arrived.lines().count() > 4, "{arrived}");
    let requests = arrived.lines().filter(|line| line.contains("echo request"));
    let bare: Vec<&str> = requests.filter(|l| !l.contains("10.168.0.2 >") && !l.contains("fd00:168::2 >")).collect();
    assert!(bare.is_empty(), "left with an address of the container's: {bare:#?}");
    assert_eq!(site.node.twill_json("plan")["steps"], json!([]));
    // A second start finds nothing to do.
    let rules = ruleset(&site.node.host);
    agent.end(Signal::TERM);
    let _agent = site.node.agent("");
    assert_eq!(ruleset(&site.node.host), rules);
}

#[test]
fn flannels_chains_in_iptables_nft() {
    let Some((site, _dir)) = site(&["iptables-nft", "ip6tables-nft"]) else { return };
    let host = &site.node.host;
    for family in FAMILIES {
        host.feed(&format!("ip{}tables-nft-restore --noflush", family[0]), &of_family(CHAINS, family));
    }
    let shown = || ["iptables-nft-save", "ip6tables-nft-save"].map(|program| host.run(program)).concat();
    taken_over(&site, shown, &["flannel"], "-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
    // The chain's policy drops, and flannel's accepts are gone: ours stand there.
    for (program, ends) in [("iptables-nft", "10.1.0.0/16"), ("ip6tables-nft", "fd00:1::/48")] {
        let forward = host.run(&format!("{program} -S FORWARD"));
        let ours = ["-s", "-d"].map(|end| format!("-A FORWARD {end} {ends} -m comment --comment twill -j ACCEPT"));
        assert!(ours.iter().all(|rule| forward.contains(rule)), "{forward}");
    }
}

#[test]
fn flannels_chains_in_legacy_iptables() {
    let Some((site, _dir)) = site(&["iptables-legacy", "ip6tables-legacy"]) else { return };
    let host = &site.node.host;
    let proof = host.try_run("iptables-legacy -t nat -S");
    if !proof.status.success() {
        let said = String::from_utf8_lossy(&proof.stderr).into_owned();
        assert!(said.contains("does not exist") || said.contains("not supported"), "{said}");
        return println!("SKIP: this kernel has no legacy iptables: {said}");
    }
    for family in FAMILIES {
        // A policy that drops is for a person to change: nothing of legacy iptables but flannel's chains is touched.
        let text = of_family(CHAINS, family).replace("FORWARD DROP", "FORWARD ACCEPT");
        host.feed(&format!("ip{}tables-legacy-restore -w --noflush", family[0]), &text);
    }
    let shown = || ["iptables-legacy-save", "ip6tables-legacy-save"].map(|program| host.run(program)).concat();
    taken_over(&site, shown, &["flannel"], "-A POSTROUTING -s 172.17.0.0/16 -j MASQUERADE");
    let filter = host.run("iptables-legacy -S");
    assert!(filter.contains("-A FORWARD -s 172.17.0.0/16 -j ACCEPT"), "{filter}");
}

/// Words of the rules that masquerade, as `iptables-save` prints them.
const BARE_WORDS: [&str; 6] = [
    "-s 10.1.0.0/16 ! -d",
    "! -s 10.1.0.0/16",
    "-s 10.1.0.0/16 -d 10.1.0.0/16",
    "-s fd00:1::/48 ! -d",
    "! -s fd00:1::/48",
    "-s fd00:1::/48 -d fd00:1::/48",
];

/// Rules without chains of their own, of one back end.
fn bare(back_end: &str) {
    for comment in ["", r#"-m comment --comment "flanneld masq""#] {
        let (restore, save) = (format!("tables-{back_end}-restore"), format!("tables-{back_end}-save"));
        let programs = ["ip", "ip6"].map(|family| format!("{family}{restore}"));
        let Some((site, _dir)) = site(&[&programs[0], &programs[1]]) else { return };
        let host = &site.node.host;
        if !host.try_run(&format!("iptables-{back_end} -t nat -S")).status.success() {
            return println!("SKIP: this kernel has no {back_end} iptables");
        }
        for (family, program) in FAMILIES.into_iter().zip(&programs) {
            let text = of_family(BARE, family).replace("COMMENT ", &format!("{comment} "));
            host.feed(&format!("{program} --noflush"), &text);
        }
        let shown = || ["ip", "ip6"].map(|family| host.run(&format!("{family}{save}"))).concat();
        taken_over(&site, shown, &BARE_WORDS, "-A POSTROUTING -s 172.17.0.0/16 ! -d 224.0.0.0/4 -j MASQUERADE");
        // What accepts is nobody's harm, and where legacy iptables drops it is needed.
        let left = shown();
        for rule in
            ["-A FORWARD -s 10.1.0.0/16 -j ACCEPT", "-A POSTROUTING -s fd00:1::/48 -d fd00:1:0:f::/64 -j ACCEPT"]
        {
            assert!(left.contains(rule), "{left}");
        }
    }
}

#[test]
fn rules_of_an_old_flannel_in_iptables_nft() {
    bare("nft");
}

#[test]
fn rules_of_an_old_flannel_in_legacy_iptables() {
    bare("legacy");
}

#[test]
fn flannels_accepts_stay_where_legacy_iptables_drops() {
    let Some((site, _dir)) = site(&["iptables-legacy-restore"]) else { return };
    let host = &site.node.host;
    if !host.try_run("iptables-legacy -t nat -S").status.success() {
        return println!("SKIP: this kernel has no legacy iptables");
    }
    for family in FAMILIES {
        host.feed(&format!("ip{}tables-legacy-restore -w --noflush", family[0]), &of_family(CHAINS, family));
    }
    let _agent = site.node.agent_at_once("");
    let filter = || ["iptables-legacy -S", "ip6tables-legacy -S"].map(|line| host.run(line));
    eventually("flannel's masquerade is gone", || {
        let text = ["iptables-legacy-save -t nat", "ip6tables-legacy-save -t nat"].map(|line| host.run(line)).concat();
        if text.contains("FLANNEL") { Err(text) } else { Ok(()) }
    });
    masqueraded_once(&site);
    assert!(
        filter()
            .iter()
            .all(|text| text.contains("-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD"))
    );
    let status = site.node.status();
    assert_eq!(status["findings"], json!([]), "what passes is no finding");
    // Nothing drops any more: the accepts are not needed.
    for program in ["iptables-legacy", "ip6tables-legacy"] {
        host.run(&format!("{program} -w -P FORWARD ACCEPT"));
    }
    let saved = || ["iptables-legacy-save", "ip6tables-legacy-save"].map(|program| host.run(program));
    let gone = |what: &str| {
        eventually(what, || {
            let text = saved();
            if text.iter().any(|text| text.contains("FLANNEL")) { Err(text) } else { Ok(()) }
        });
    };
    gone("they go");
    // A flannel has run beside the agent, and is gone.
    for family in FAMILIES {
        let text = of_family(CHAINS, family).replace("FORWARD DROP", "FORWARD ACCEPT");
        host.feed(&format!("ip{}tables-legacy-restore -w --noflush", family[0]), &text);
    }
    gone("what came while the agent runs goes as well");
    assert!(saved().iter().all(|text| text.contains("MASQUERADE")), "somebody else's rules stay: {:?}", saved());
}

#[test]
fn flannels_tables_in_nftables() {
    let Some((site, _dir)) = site(&[]) else { return };
    let host = &site.node.host;
    for family in FAMILIES {
        host.feed("nft -f -", &of_family(TABLES, family));
    }
    host.run("nft add table inet stranger");
    taken_over(&site, || host.run("nft list tables"), &["flannel"], "table inet stranger");
}

/// The real flannel has run on the site and is gone; `shown` shows what it left.
fn after_flannel(config: &str, programs: &[&str], shown: impl Fn(&Host) -> String) {
    let Some((site, dir)) = site(&[&["flanneld"], programs].concat()) else { return };
    site.node.put("config", config);
    let flannel = flanneld("flanneld", &site.node.host, "http://127.0.0.1:2379", dir.path(), "--ip-masq");
    eventually("flannel's rules stand", || {
        let rules = shown(&site.node.host);
        let there =
            rules.to_lowercase().matches(" masquerade").count() == 4 && rules.to_lowercase().contains("forward");
        if there { Ok(()) } else { Err((rules, site.node.log("flanneld.log"))) }
    });
    flannel.end(Signal::TERM);
    taken_over(&site, || shown(&site.node.host), &["flannel"], "");
}

#[test]
fn what_the_real_flannel_leaves_in_iptables() {
    let programs = ["iptables-nft-save", "ip6tables-nft-save"];
    after_flannel(DUAL, &programs, |host| programs.map(|program| host.run(program)).concat());
}

#[test]
fn what_the_real_flannel_leaves_in_nftables() {
    let config = DUAL.replace("\"Backend\"", "\"EnableNFTables\":true,\"Backend\"");
    let flannels = |host: &Host| {
        let table = |name| String::from_utf8(host.try_run(&format!("nft list table {name}")).stdout).unwrap();
        ["ip flannel-ipv4", "ip6 flannel-ipv6"].map(table).concat()
    };
    after_flannel(&config, &[], flannels);
}
