//! Two tunnels on real TUN devices and sockets, IPv4 and IPv6 inside and outside, with peers that the test gives.
//!
//! ```text
//!   this namespace: flannel0 10.1.1.1, fd00:1::1 ─ tunnel ─ eth0 10.168.0.1, fd01::1
//!   another one:    flannel0 10.1.2.1, fd00:2::1 ─ tunnel ─ eth1 10.168.0.2, fd01::2
//! ```
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods, reason = "a test")]

#[path = "../../kernel/tests/common/mod.rs"]
mod common;

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::process::Command;

use twill_core::backend::{TunnelPeer, TunnelSpec};
use twill_kernel::netns::Netns;
use twill_kernel::tun::{Offloads, TunDevice};
use twill_kernel::udp::UdpSocket;
use twill_tunnel::Tunnel;
use twill_tunnel::peers::Peers;

use common::{in_namespace_with_tun as in_namespace, run};

/// Opens device and socket of end `n` in the calling thread's namespace and starts the pumps.
fn start(n: u8, outer: [&str; 2], offloads: Offloads) -> Tunnel {
    let mtu = if outer[0].contains(':') { 1452 } else { 1472 };
    let tun = TunDevice::open("flannel0", offloads).unwrap();
    for line in [
        format!("ip link set flannel0 mtu {mtu} up"),
        format!("ip addr add 10.1.{n}.1/16 dev flannel0"),
        format!("ip addr add fd00:{n}::1/16 dev flannel0 nodad"),
    ] {
        run(&line);
    }
    let own: IpAddr = outer[usize::from(n) - 1].parse().unwrap();
    let local = SocketAddr::new(own, 8285);
    let other = 3 - n;
    let subnets = vec![format!("10.1.{other}.0/24").parse().unwrap(), format!("fd00:{other}::/64").parse().unwrap()];
    let host = outer[usize::from(other) - 1].parse().unwrap();
    let peers = Peers::new([TunnelPeer { name: format!("10.1.{other}.0-24"), host, subnets }], 8285);
    let udp = UdpSocket::bind(local).unwrap();
    let udp = if offloads == Offloads::NONE { udp.without_offloads().unwrap() } else { udp };
    let spec = TunnelSpec { device: "flannel0".parse().unwrap(), mtu: mtu.try_into().unwrap(), local };
    Tunnel::start(spec, tun, udp, peers, || {}).unwrap()
}

/// Bytes that count up cross in both directions over one connection.
fn stream(from: &Netns, to: &Netns, address: &str) {
    const BYTES: usize = 20_000_000;
    let listener = to.run(|| TcpListener::bind((address.parse::<IpAddr>().unwrap(), 0)).unwrap()).unwrap();
    let at = listener.local_addr().unwrap();
    let near = from.run(|| TcpStream::connect(at).unwrap()).unwrap();
    let (far, _) = listener.accept().unwrap();
    let bytes: Vec<u8> = (0..BYTES).map(|n| (n / 7 % 251) as u8).collect();
    std::thread::scope(|scope| {
        for mut end in [&near, &far] {
            let bytes = &bytes;
            scope.spawn(move || {
                end.write_all(bytes).unwrap();
                end.shutdown(Shutdown::Write).unwrap();
            });
            scope.spawn(move || {
                let mut got = Vec::with_capacity(BYTES);
                end.read_to_end(&mut got).unwrap();
                assert!(got == *bytes, "every byte, in order");
            });
        }
    });
}

/// What goes no further is answered in both families: no peer stands for it, or the path to `peer` is narrower than the device.
fn answers(peer: &str) {
    let said = |line: &str| {
        let mut words = line.split_whitespace();
        let out = Command::new(words.next().unwrap()).args(words).output().unwrap();
        assert!(!out.status.success(), "{line}");
        String::from_utf8(out.stdout).unwrap()
    };
    for (nobody, word) in
        [("10.1.77.7", "Destination Net Unreachable"), ("fd00:77::7", "Destination unreachable: No route")]
    {
        let text = said(&format!("ping -n -c 1 -W 5 {nobody}"));
        assert!(text.contains(word), "{text}");
    }
    let (family, host) = if peer.contains(':') { ("-6", "128") } else { ("-4", "32") };
    let (dev, mtu) = ("eth0", 1400);
    run(&format!("ip {family} route replace {peer}/{host} dev {dev} mtu lock {mtu}"));
    let inner = mtu - if family == "-6" { 48 } else { 28 };
    let v4 = said("ping -n -c 1 -W 5 -M do -s 1400 10.1.2.1");
    assert!(v4.contains(&format!("Frag needed and DF set (mtu = {inner})")), "{v4}");
    let v6 = said("ping -n -c 1 -W 5 -M do -s 1380 fd00:2::1");
    assert!(v6.contains(&format!("Packet too big: mtu={inner}")), "{v6}");
    // Narrower than IPv6 allows: 1280 bytes pass all the same, for no IPv6 sender makes smaller ones.
    run(&format!("ip {family} route replace {peer}/{host} dev {dev} mtu lock 1290"));
    let v6 = said("ping -n -c 1 -W 5 -M do -s 1240 fd00:2::1");
    assert!(v6.contains("Packet too big: mtu=1280"), "{v6}");
    run("ping -n -c 1 -W 5 -M do -s 1232 fd00:2::1");
    let v4 = said("ping -n -c 1 -W 5 -M do -s 1260 10.1.2.1");
    assert!(v4.contains(&format!("Frag needed and DF set (mtu = {})", inner - 110)), "{v4}");
    run(&format!("ip {family} route del {peer}/{host} dev {dev}"));
    // No way to the peer's host.
    run(&format!("ip {family} route add unreachable {peer}/{host} metric 1"));
    for (other, word) in
        [("10.1.2.1", "Destination Net Unreachable"), ("fd00:2::1", "Destination unreachable: No route")]
    {
        let text = said(&format!("ping -n -c 1 -W 5 {other}"));
        assert!(text.contains(word), "{text}");
    }
    run(&format!("ip {family} route del unreachable {peer}/{host} metric 1"));
}

/// Whether a thread that helps has run for more than its start takes (proc_pid_schedstat(5)).
fn helper_worked() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
    let helpers = threads.filter(|t| read(t.path().join("comm")).trim() == "tunnel-helper");
    let nanoseconds = |t: std::fs::DirEntry| {
        read(t.path().join("schedstat")).split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0u64)
    };
    helpers.map(nanoseconds).any(|ns| ns > 5_000_000)
}

#[test]
fn both_families_cross_inside_both_families() {
    in_namespace("both_families_cross_inside_both_families", || {
        let (here, there) = (Netns::current().unwrap(), Netns::create().unwrap());
        let path = format!("/proc/{}/fd/{}", std::process::id(), there.as_fd().as_raw_fd());
        for line in [
            "ip link set lo up",
            &format!("ip link add eth0 type veth peer name eth1 netns {path}"),
            "ip addr add 10.168.0.1/24 dev eth0",
            "ip addr add fd01::1/64 dev eth0 nodad",
            "ip link set eth0 up",
        ] {
            run(line);
        }
        let other = [
            "addr add 10.168.0.2/24 dev eth1",
            "addr add fd01::2/64 dev eth1 nodad",
            "link set eth1 up",
            "link set lo up",
        ];
        there.run(|| other.iter().for_each(|words| drop(run(&format!("ip {words}"))))).unwrap();
        let all = Offloads::ALL;
        let mut helped = false;
        for (outer, offloads) in [
            (["10.168.0.1", "10.168.0.2"], [all, all]),
            (["fd01::1", "fd01::2"], [all, all]),
            (["fd01::1", "fd01::2"], [Offloads::NONE, all]),
        ] {
            let near = start(1, outer, offloads[0]);
            let far = there.run(|| start(2, outer, offloads[1])).unwrap();
            for address in ["10.1.2.1", "fd00:2::1"] {
                stream(&here, &there, address);
                for size in [0, 56, 1400, 1500, 9000, 60_000] {
                    run(&format!("ping -n -c 1 -W 5 -s {size} {address}"));
                }
            }
            let (means, counters) = (near.gauge().means(), near.gauge().counters());
            let sent = counters.peers[0].sent;
            assert!(sent.bytes > 40_000_000, "{sent:?}");
            if means.tso4 && means.tso6 {
                assert!(sent.packets > 2 * sent.super_packets, "{sent:?}");
            }
            assert_eq!(counters.drops.iter().filter(|drop| drop.packets > 20).count(), 0, "{:?}", counters.drops);
            answers(outer[1]);
            helped |= (0..20).any(|_| {
                let worked = helped || helper_worked();
                if !worked {
                    stream(&here, &there, "10.1.2.1");
                }
                worked
            });
            assert!(near.stop().is_some() && far.stop().is_some(), "the descriptors come back");
        }
        // Only bulk wakes it, and a machine that has much else to do carries none for a while.
        assert!(helped, "both directions at once are more than one thread's");
    });
}
