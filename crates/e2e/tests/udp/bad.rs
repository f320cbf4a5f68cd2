//! What a peer, or whoever has taken its place, may send: nothing of it stops the tunnel, and all of it is counted.

use super::*;

/// Sends payloads from node 2's address, and not its tunnel's port, to node 1's tunnel.
fn throw(net: &Overlay, payloads: &[String]) {
    net.site(2).host.run(&format!("{WIRE} packet 10.168.0.3:5555 10.168.0.2:8285 {}", payloads.join(" ")));
}

/// Waits until a node has counted one more packet dropped by a cause.
fn counted(site: &Site, cause: &str, before: u64) {
    eventually(&format!("{cause} is counted"), || {
        let now = site.dropped(cause);
        if now > before { Ok(()) } else { Err((now, site.status().to_string())) }
    });
}

/// The header's checksum, after a change.
fn summed(packet: &mut [u8]) {
    let header = usize::from(packet[0] & 15) * 4;
    packet[10..12].copy_from_slice(&[0, 0]);
    let sum: u32 = packet[..header].chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    packet[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
}

const PEER: [u8; 4] = [100, 96, 2, 2];
const OURS: [u8; 4] = [100, 96, 1, 2];

#[test]
fn odd_packets_pass_or_end_as_ip_says_and_each_peer_has_its_own_count() {
    let Some((net, dir)) = running().filter(|_| installed("tcpdump")) else { return };
    let (one, two) = (net.site(1), net.site(2));
    let seen = dir.path().join("seen");
    let mut dump = Capture::start(&one.container, "eth0", &["-nn", "-vv"], None, "udp");
    let (mut lines, mut file) = (dump.output(), std::fs::File::create(&seen).unwrap());
    std::thread::spawn(move || std::io::copy(&mut lines, &mut file));
    // TTL 0: nobody may send it.
    throw(&net, &[inner(PEER, OURS, |p| (p[8] = 0, summed(p)).1)]);
    counted(one, "no-hops", 0);
    // TTL 1: ends in the next router, which is no fault of the tunnel's.
    throw(&net, &[inner(PEER, OURS, |p| (p[8] = 1, summed(p)).1)]);
    // Options (no operation, four times), both fragments of one datagram, and a wrong inner UDP checksum: all of it is for the receiver.
    let options = inner(PEER, OURS, |p| {
        p.splice(20..20, [1, 1, 1, 1]);
        (p[0], p[3]) = (0x46, 33);
        summed(p);
    });
    let first = inner(PEER, OURS, |p| {
        (p[3], p[6]) = (28, 0x20);
        p[25] = 16;
        p.truncate(28);
        summed(p);
    });
    let second = inner(PEER, OURS, |p| {
        (p[3], p[7]) = (28, 1);
        p.truncate(28);
        summed(p);
    });
    let wrong = inner(PEER, OURS, |p| p[26..28].copy_from_slice(&[0x12, 0x34]));
    throw(&net, &[options, first, second, wrong]);
    eventually("they come out of the tunnel", || {
        let text = std::fs::read_to_string(&seen).unwrap();
        let all = ["options (NOP,NOP,NOP,NOP)", "offset 0, flags [+]", "offset 8, flags [none]", "bad udp cksum"];
        let all = all.iter().all(|word| text.contains(word));
        if all { Ok(()) } else { Err((text, one.status().to_string())) }
    });
    // IP in IP: a datagram to the tunnel itself, inside. It comes from no peer's address.
    let before = one.dropped("not-a-peer");
    let nested = inner(PEER, [10, 168, 0, 2], |p| {
        p[22..24].copy_from_slice(&8285u16.to_be_bytes());
        summed(p);
    });
    throw(&net, &[nested]);
    counted(one, "not-a-peer", before);
    // And with the peer's own outer address inside, which is no inner address of anybody.
    throw(&net, &[inner([10, 168, 0, 3], [10, 168, 0, 2], |_| {})]);
    counted(one, "wrong-source", 0);
    // A peer that sends to itself gets it back, once, and drops it.
    throw(&net, &[inner(PEER, PEER, |_| {})]);
    counted(two, "wrong-source", 0);
    assert_eq!(two.dropped("wrong-source"), 1);
    // Whose it was stands with the peer, in both forms.
    let (_, top) = one.twill("top --count 1 -o json");
    let top: serde_json::Value = serde_json::from_str(&top.unwrap()).unwrap();
    let drops = top["peers"][0]["drops"].as_array().unwrap();
    let of = |cause: &str| drops.iter().find(|drop| drop["cause"] == cause).map(|drop| drop["packets"].clone());
    assert_eq!((of("no-hops"), of("wrong-source"), of("not-a-peer")), (Some(json!(1)), Some(json!(1)), None), "{top}");
    let shown = one.twill("top --count 1").1.unwrap();
    let row = shown.lines().find(|line| line.starts_with("100.96.2.0-24")).unwrap();
    assert!(row.contains("wrong-source 1, no-hops 1"), "{shown}");
    net.await_both_ways();
}

/// Resident memory of a node's agent, in kB.
fn memory(site: &Site) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", site.agent_pid().unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

#[test]
fn a_flood_of_broken_datagrams_from_a_peers_address_takes_no_memory_and_good_ones_go_on() {
    let Some((net, _dir)) = running() else { return };
    let (one, two) = (net.site(1), net.site(2));
    let broken = [
        ("not-ip", inner(PEER, OURS, |p| p[0] = 0x55)),
        ("wrong-source", inner([8, 8, 8, 8], OURS, |_| {})),
        ("bad-length", inner(PEER, OURS, |p| p.extend([0; 1400]))),
    ];
    transfer(&two.container, &one.container, "100.96.1.2:7000", "stream", &["5000000"]);
    let mut before = 0;
    for (cause, payload) in &broken {
        let mut flood = two.host.command(WIRE);
        flood.args(["flood", "10.168.0.3:9999", "10.168.0.2:8285", payload]);
        let (_flood, _lines) = until_ready(flood, "ready");
        // The first of them warm what is grown once.
        counted(one, cause, 1000);
        before = before.max(memory(one));
        transfer(&two.container, &one.container, "100.96.1.2:7000", "stream", &["3000000"]);
        transfer(&one.container, &two.container, "100.96.2.2:7000", "stream", &["3000000"]);
        counted(one, cause, 50_000);
    }
    let after = memory(one);
    assert!(after < before + 4096, "{before} kB, then {after} kB");
    net.await_both_ways();
}

#[test]
fn what_overflows_the_queues_of_an_agent_that_does_not_keep_up_is_counted() {
    let Some((net, _dir)) = running() else { return };
    let (one, two) = (net.site(1), net.site(2));
    let stand_still = |signal| {
        let pid = rustix::process::Pid::from_raw(one.agent_pid().unwrap().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    for cause in ["socket-full", "device-full"] {
        assert_eq!(one.dropped(cause), 0, "{}", one.status());
    }
    stand_still(Signal::STOP);
    let payload = inner(PEER, OURS, |_| {});
    let flood = |from: &Host, own: &str, to: &str| {
        let mut flood = from.command(WIRE);
        flood.args(["flood", own, to, &payload]);
        until_ready(flood, "ready")
    };
    {
        let _wire = flood(&two.host, "10.168.0.3:9999", "10.168.0.2:8285");
        let _device = flood(&one.container, "100.96.1.2:9999", "100.96.2.2:9");
        eventually("both queues overflow", || {
            let sockets = one.host.run("cat /proc/net/udp");
            let drops =
                sockets.lines().find(|line| line.contains("0200A80A:205D")).and_then(|l| l.split_whitespace().last());
            let link = &one.host.json("-s link show flannel0")[0]["stats64"]["tx"]["dropped"];
            let both = drops.is_some_and(|drops| drops != "0") && *link != 0;
            if both { Ok(()) } else { Err((sockets.clone(), link.to_string())) }
        });
    }
    stand_still(Signal::CONT);
    for cause in ["socket-full", "device-full"] {
        assert!(one.dropped(cause) > 0, "{cause}: {}", one.status());
    }
    net.await_both_ways();
}

/// What the lab asks of an agent: to repair nothing for a while.
fn post(site: &Site, what: &str) {
    let mut stream = std::os::unix::net::UnixStream::connect(site.file("run/twill.sock")).unwrap();
    let request = format!("POST /v1/{what} HTTP/1.1\r\nHost: twill\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    std::io::Write::write_all(&mut stream, request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[test]
fn jumbo_packets_into_a_small_device_are_answered_with_its_mtu() {
    let Some((net, _dir)) = running() else { return };
    let (one, two) = (net.site(1), net.site(2));
    for site in [one, two] {
        site.host.ip("link set eth0 mtu 9000");
        eventually("the device has followed the underlay", || {
            let link = &site.host.json("link show flannel0")[0];
            if link["mtu"] == 8972 { Ok(()) } else { Err((link.to_string(), site.log())) }
        });
    }
    // Only node 2's container gets larger; node 1 keeps a device smaller than what comes.
    two.host.ip("link set docker0 mtu 8972");
    two.container.ip("link set eth0 mtu 8972");
    post(one, "hold");
    one.host.ip("link set flannel0 mtu 1000");
    // The pumps begin anew with the device's size: the first one may find none.
    eventually("who forbids cutting is told", || {
        let out = two.container.try_run("ping -n -c 1 -W 1 -M do -s 8000 100.96.1.2");
        let said = String::from_utf8(out.stdout).unwrap();
        if said.contains("Frag needed and DF set (mtu = 1472)") { Ok(()) } else { Err((said, one.log(), two.log())) }
    });
    // What may be cut arrives, and its answer too, which the small device makes node 1 cut.
    for size in [900, 1400, 8000, 60_000] {
        let out = two.container.try_run(&format!("ping -n -c 1 -W 5 -M dont -s {size} 100.96.1.2"));
        assert!(out.status.success(), "{size}: {}", String::from_utf8_lossy(&out.stdout));
    }
    transfer(&two.container, &one.container, "100.96.1.2:7000", "stream", &["3000000"]);
    transfer(&one.container, &two.container, "100.96.2.2:7000", "stream", &["3000000"]);
    post(one, "release");
    net.await_both_ways();
}

#[test]
fn a_lease_whose_host_is_inside_the_network_loops_nothing() {
    let Some((net, _dir)) = running() else { return };
    let one = net.site(1);
    // A host in its own subnet, one in a good peer's, and one in ours.
    let leases = [("100.96.7.0-24", "100.96.7.7"), ("100.96.8.0-24", "100.96.2.2"), ("100.96.9.0-24", "100.96.1.2")];
    for (name, host) in leases {
        let key = format!("/coreos.com/network/subnets/{name}");
        assert!(net.etcdctl(&["put", &key, &format!(r#"{{"PublicIP":"{host}"}}"#)]).status.success());
    }
    eventually("each is named", || {
        let status = one.status();
        let findings = status["findings"].as_array().cloned().unwrap_or_default();
        let named = |(name, _): &(&str, &str)| {
            let object = format!("lease {name}");
            findings.iter().any(|finding| finding["object"] == object && finding["code"] == "bad-lease-value")
        };
        if leases.iter().all(named) { Ok(()) } else { Err(status.to_string()) }
    });
    let sent = || one.status()["tunnel"]["sent"]["packets"].as_u64().unwrap();
    let before = (one.dropped("no-peer"), sent());
    for subnet in [7, 8, 9] {
        let out = one.container.try_run(&format!("ping -n -c 1 -W 5 100.96.{subnet}.2"));
        let said = String::from_utf8(out.stdout).unwrap();
        assert!(said.contains("Destination Net Unreachable"), "{said}");
    }
    // The kernel's own neighbour discovery may end there as well.
    assert!(one.dropped("no-peer") >= before.0 + 3, "{}", one.status());
    assert_eq!(sent(), before.1, "{}", one.status());
    net.await_both_ways();
}
