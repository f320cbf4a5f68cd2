//! An underlay that loses, doubles and reorders: a program between real devices of both hosts.
//!
//! ```text
//!   node1 10.168.0.2 ─ eth1 ─ shim1 "10.168.0.3" ─ wire relay ══ unix sockets ══ wire relay ─ shim2 "10.168.0.2" ─ eth1 ─ node2 10.168.0.3
//! ```
//! Each host reaches the other's UDP port 8285 through its shim, which has the other's address, and everything else directly.

use super::*;

/// Puts a shim before each node's tunnel.
fn shims(bed: &Bed, net: &Overlay) -> [Host; 2] {
    [1u8, 2].map(|number| {
        let host = &net.site(number).host;
        let (own, other) = (number + 1, 4 - number);
        let shim = bed.host(&format!("shim{number}"));
        bed.wire(host, "eth1", &shim, "eth0");
        for line in [
            "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.eth0.rp_filter=0 net.ipv4.conf.eth1.rp_filter=0",
            &format!("ip route add 10.168.0.{other} dev eth1 src 10.168.0.{own} table 100"),
            "ip rule add ipproto udp dport 8285 lookup 100",
        ] {
            host.run(line);
        }
        shim.ip(&format!("addr add 10.168.0.{other}/32 dev eth0"));
        shim.ip(&format!("route add 10.168.0.{own} dev eth0"));
        shim
    })
}

/// Starts both relays, which do so much harm.
fn relays(shims: &[Host; 2], dir: &Path, harm: &str) -> [Ends; 2] {
    let path = |number: usize| dir.join(format!("relay{number}-{harm}")).to_string_lossy().into_owned();
    [0usize, 1].map(|at| {
        let (own, other) = (at + 2, 3 - at);
        let (near, far) = (format!("10.168.0.{other}:8285"), format!("10.168.0.{own}:8285"));
        let mut relay = shims[at].command(WIRE);
        relay.args(["relay", &near, &far, &path(at), &path(1 - at), harm]);
        until_ready(relay, "ready").0
    })
}

#[test]
fn over_a_wire_that_loses_doubles_and_reorders_every_byte_arrives() {
    let Some((bed, dir)) = place() else { return };
    let (net, shims) = Overlay::running_on(bed, dir.path(), "", shims);
    let (one, two) = (net.site(1), net.site(2));
    {
        let _relays = relays(&shims, dir.path(), "loss,double,reorder");
        net.await_both_ways();
        transfer(&one.container, &two.container, "100.96.2.2:7000", "stream", &["5000000"]);
        transfer(&two.container, &one.container, "100.96.1.2:7000", "stream", &["5000000"]);
    }
    // Only lossy: datagrams that arrive are in order.
    let _relays = relays(&shims, dir.path(), "loss");
    net.await_both_ways();
    transfer(&one.container, &two.container, "100.96.2.2:7001", "datagrams", &["1", "1500"]);
    transfer(&two.container, &one.container, "100.96.1.2:7001", "datagrams", &["1", "1500"]);
    for site in [one, two] {
        let drops = site.status()["tunnel"]["drops"].as_array().cloned().unwrap();
        let bad = drops.iter().filter(|drop| drop["cause"] != "no-peer" && drop["cause"] != "send-failed");
        assert_eq!(bad.count(), 0, "{drops:?}");
    }
}

/// More than the underlay takes, in super-packets.
const FLOOD: &str = r#"
import socket, sys
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.setsockopt(socket.IPPROTO_UDP, 103, 1400)
print("ready", flush=True)
while True: out.sendto(bytes(44 * 1400), (sys.argv[1], 9))
"#;

#[test]
fn a_full_queue_to_the_underlay_holds_up_nothing_that_comes_in() {
    let Some((net, _dir)) = running().filter(|_| installed("tc") && installed("python3")) else { return };
    let (one, two) = (net.site(1), net.site(2));
    // Deeper than the socket's own queue: a send waits.
    let slow = one.host.try_run("tc qdisc add dev eth0 root tbf rate 2mbit burst 64k limit 500000000");
    if !slow.status.success() {
        println!("SKIP: no slow underlay: {}", String::from_utf8_lossy(&slow.stderr));
        return;
    }
    let mut flood = one.container.command("python3");
    flood.args(["-c", FLOOD, "100.96.2.2"]);
    let (_flood, _lines) = until_ready(flood, "ready");
    let mut last = 0;
    let waiting = || {
        let text = one.host.run("tc -s qdisc show dev eth0");
        let bytes = text.split("backlog ").nth(1).and_then(|rest| rest.split('b').next()?.parse::<u64>().ok());
        let before = std::mem::replace(&mut last, bytes.unwrap_or(0));
        if before > 16 << 20 && last <= before { Ok(()) } else { Err(text) }
    };
    eventually("sends wait", waiting);
    let received = || one.status()["tunnel"]["received"]["packets"].as_u64().unwrap();
    let before = received();
    // One by one: a handful would be taken together.
    eventually("they come in meanwhile", || {
        two.container.run(&format!("{WIRE} packet 100.96.2.2:5555 100.96.1.2:9 58"));
        let now = received();
        if now >= before + 100 { Ok(()) } else { Err((before, now)) }
    });
}
