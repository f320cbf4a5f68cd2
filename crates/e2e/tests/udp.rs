//! The udp backend on real TUN devices and sockets, looked at from outside with `ip`, `tcpdump` and a stock `etcdctl`.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use rustix::process::Signal;
use serde_json::json;
use twill_e2e::installed;
use twill_e2e::net::Bed;
use twill_e2e::overlay::Overlay;

/// Two running nodes, or `None` where this machine grants none (which was said).
fn running() -> Option<(Overlay, tempfile::TempDir)> {
    let bed = Bed::new()?;
    if !installed("etcdctl") {
        return None;
    }
    // A distribution lets everybody open it; a machine that does not lets nobody but root have a TUN device.
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        println!("SKIP: no TUN device may be made: open /dev/net/tun: {error}");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    Some((Overlay::running(bed, dir.path()), dir))
}

#[test]
fn containers_on_two_hosts_reach_each_other_by_bare_packets_in_udp_8285() {
    let Some((mut net, _dir)) = running() else { return };
    // The kernel's objects: one address with the network's length, whose route the kernel makes.
    let host = &net.site(1).host;
    let link = &host.json("-d link show flannel0")[0];
    assert_eq!((&link["linkinfo"]["info_kind"], &link["mtu"]), (&json!("tun"), &json!(1472)));
    let route = host.run("ip route show dev flannel0");
    assert_eq!(route.trim(), "100.96.0.0/16 proto kernel scope link src 100.96.1.0");
    // The lease is flannel's: no type, no data; our identity comes last.
    let lease = net.lease(1);
    assert!(lease.starts_with(r#"{"PublicIP":"10.168.0.2","PublicIPv6":null,"Twill":{"node":""#), "{lease}");
    let env = std::fs::read_to_string(net.site(1).file("subnet.env")).unwrap();
    assert_eq!(
        env,
        "FLANNEL_NETWORK=100.96.0.0/16\nFLANNEL_SUBNET=100.96.1.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    );
    // On the wire: the inner packet is the payload.
    if installed("tcpdump") {
        let mut dump = host.command("tcpdump");
        dump.args(["-i", "eth0", "-c", "2", "-x", "-nn", "--immediate-mode", "udp", "port", "8285"]);
        let mut dump = dump.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(dump.stderr.take().unwrap()).lines();
        assert!(said.any(|line| line.unwrap().contains("listening on")), "tcpdump listens");
        net.site(1).container.run("ping -c 1 -W 5 -s 1000 100.96.2.2");
        let out = dump.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(text.contains("10.168.0.2.8285 > 10.168.0.3.8285: UDP, length 1028"), "{text}");
        // IPv4 header of the payload, at byte 28: version 4, 1028 bytes, TTL 63 (one router so far), ICMP, both containers.
        let hex: String =
            text.lines().skip(1).take(4).flat_map(|l| l.split(':').nth(1)).flat_map(|l| l.split_whitespace()).collect();
        let inner = &hex[56..96];
        assert!(
            inner.starts_with("45000404") && &inner[16..20] == "3f01" && inner.ends_with("6460010264600202"),
            "{inner}"
        );
    }
    let status = net.site(1).status();
    assert_eq!((&status["backend"], &status["peers"]), (&json!("udp"), &json!(1)));
    assert_eq!(status["tunnel"]["local"], "10.168.0.2:8285");
    assert!(status["tunnel"]["sent"]["packets"].as_u64().unwrap() >= 3, "{status}");
    // `clean` leaves no TUN, so that flanneld gets flannel0.
    assert_eq!(net.site_mut(1).stop(Signal::TERM), Some(0));
    let (code, out) = net.site(1).twill("clean");
    assert_eq!(code, Some(0), "{out:?}");
    let links = net.site(1).host.json("link show");
    assert!(links.as_array().unwrap().iter().all(|link| link["ifname"] != "flannel0"), "{links}");
    assert!(net.site(1).host.run("ip route show").contains("10.168.0.0/24"));
}
