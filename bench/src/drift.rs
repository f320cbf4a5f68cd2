//! Drift with a hundred peers: from the start of the program that alters an object to the first look that finds all as it was.
//!
//! Looking takes six runs of `ip`, `bridge` and `nft`, so every figure is some ten milliseconds above what it stands for.

use std::path::Path;
use std::time::{Duration, Instant};

use twill_e2e::net::Host;

use crate::peers::Rig;
use crate::report::Report;

const PICTURE: &str = "((ip -o -d link show dev flannel.1; ip -o addr show dev flannel.1) | sed 's/^[0-9]*: //'; \
    ip -N route show; ip neigh show dev flannel.1; bridge fdb show dev flannel.1; cat /proc/sys/net/ipv4/ip_forward; \
    (nft list ruleset; nft list chain ip filter FORWARD 2>/dev/null | sed -n 's/^/first: /;4p') | sed 's/packets [0-9]* bytes [0-9]* //') \
    | grep -v -e inet6 -e 203.0.113.1 | sort";

/// What is altered, and how; `{n}` is another peer each time.
const ON_PEERS: [(&str, &str); 7] = [
    ("route deleted", "ip route del 10.0.{n}.0/24"),
    ("route with another next hop", "ip route replace 10.0.{n}.0/24 via 10.0.200.0 dev flannel.1 onlink"),
    ("neighbour deleted", "ip neigh del 10.0.{n}.0 dev flannel.1"),
    ("neighbour with another MAC", "ip neigh replace 10.0.{n}.0 dev flannel.1 lladdr 02:ff:00:00:00:01 nud permanent"),
    ("forwarding entry deleted", "bridge fdb del 02:00:00:00:00:{x} dev flannel.1 dst 192.168.1.{h} self"),
    (
        "forwarding entry with another host",
        "bridge fdb replace 02:00:00:00:00:{x} dev flannel.1 dst 192.168.9.9 self permanent",
    ),
    ("neighbour no longer permanent", "ip neigh change 10.0.{n}.0 dev flannel.1 nud stale"),
];
const ON_THE_DEVICE: [(&str, &str); 8] = [
    ("device deleted", "ip link del flannel.1"),
    ("device down", "ip link set flannel.1 down"),
    ("MTU", "ip link set flannel.1 mtu 1300"),
    ("MAC", "ip link set flannel.1 address 02:ff:00:00:00:02"),
    ("learning", "ip link set flannel.1 type vxlan learning"),
    ("address deleted", "ip addr del 10.255.0.0/32 dev flannel.1"),
    ("all routes of the device flushed", "ip route flush dev flannel.1"),
    ("sysctl ip_forward", "echo 0 > /proc/sys/net/ipv4/ip_forward"),
];

/// The firewall: ours alone, then our rules in the chain of somebody else, which drops.
const OURS: [(&str, &str); 4] = [
    ("ruleset flushed", "nft flush ruleset"),
    ("own table deleted", "nft delete table inet twill"),
    ("masquerade chain flushed", "nft flush chain inet twill leaving"),
    ("foreign rule in an own chain", "nft insert rule inet twill forward drop"),
];
const FOREIGN: &str =
    "nft add table ip filter; nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'";
const IN_FOREIGN: [(&str, &str); 2] = [
    ("own rules flushed from a foreign chain", "nft flush chain ip filter FORWARD"),
    ("foreign rule before ours in a foreign chain", "nft insert rule ip filter FORWARD ip saddr 203.0.113.1 drop"),
];

/// A hundred peers, every kind of drift.
pub(crate) fn run(twill: &Path, report: &mut Report) {
    let rig = Rig::new(twill, 100);
    let agent = rig.agent(twill);
    rig.wait_for(100);
    // Fewer than five repairs of the device in ten seconds.
    let calm = Duration::from_millis(2600);
    std::thread::sleep(calm);
    let right = picture(&rig.host);
    assert_eq!(right.matches("via 10.0.").count(), 100, "{right}");
    let mut all = Vec::new();
    // Other peers each time: the fight rule would hold back the fifth repair of one object.
    for (nth, (what, how)) in (0..).zip(ON_PEERS) {
        let once = |n: u32| {
            let how = how.replace("{n}", &n.to_string());
            repaired(&rig.host, &how.replace("{x}", &format!("{n:02x}")).replace("{h}", &(n + 1).to_string()), &right)
        };
        let samples: Vec<f64> = (1 + nth * 14..=14 + nth * 14).map(once).collect();
        report.max_at_most(&format!("100 peers, {what}, until repaired, longest of 14 (ms)"), &samples, 200.0);
        all.extend(samples);
    }
    let mut often = |what: &str, how: &str, right: &str, undo: &str| {
        let once = |_| {
            std::thread::sleep(calm);
            let took = repaired(&rig.host, how, right);
            sh(&rig.host, undo);
            took
        };
        let samples: Vec<f64> = (0..5).map(once).collect();
        report.max_at_most(&format!("100 peers, {what}, until repaired, longest of 5 (ms)"), &samples, 200.0);
        all.extend(samples);
    };
    for (what, how) in ON_THE_DEVICE.into_iter().chain(OURS) {
        often(what, how, &right, "true");
    }
    sh(&rig.host, FOREIGN);
    std::thread::sleep(calm);
    let right = picture(&rig.host);
    assert_eq!(right.matches("comment \"twill\"").count(), 4, "{right}");
    let [flushed, inserted] = IN_FOREIGN;
    often(flushed.0, flushed.1, &right, "true");
    // The stranger's rule stays, behind ours: it is taken away before the next sample.
    let undo = "nft -a list chain ip filter FORWARD | sed -n 's/.*203.*handle //p' | xargs nft delete rule ip filter FORWARD handle";
    often(inserted.0, inserted.1, &right, undo);
    report.max_at_most("100 peers, any drift, until repaired, longest (ms)", &all, 200.0);
    rig.clear(agent);
}

fn picture(host: &Host) -> String {
    let out = host.command("sh").args(["-c", PICTURE]).output().unwrap();
    String::from_utf8(out.stdout).unwrap()
}

fn sh(host: &Host, line: &str) {
    let out = host.command("sh").args(["-c", line]).output().unwrap();
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
}

fn repaired(host: &Host, how: &str, right: &str) -> f64 {
    let start = Instant::now();
    sh(host, how);
    while picture(host) != right {
        assert!(start.elapsed() < Duration::from_secs(20), "{how}: not repaired\n{right}\n{}", picture(host));
    }
    start.elapsed().as_secs_f64() * 1e3
}
