//! Two tunnels on real TUN devices and sockets, IPv4 and IPv6 inside and outside, with peers that the test gives.
//!
//! ```text
//!   this namespace: flannel0 10.1.1.1, fd00:1::1 ─ tunnel ─ eth0 10.168.0.1, fd01::1
//!   another one:    flannel0 10.1.2.1, fd00:2::1 ─ tunnel ─ eth1 10.168.0.2, fd01::2
//! ```
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout, clippy::disallowed_methods, reason = "a test")]

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

/// Runs `body` in a fresh network namespace: this test binary once more, inside `unshare`. Says `SKIP` where the system grants none.
fn in_namespace(test: &str, body: impl FnOnce()) {
    if std::env::var_os("TWILL_TEST_NAMESPACE").is_some() {
        return body();
    }
    let user: &[&str] = if rustix::process::geteuid().is_root() { &[] } else { &["--user", "--map-root-user"] };
    let proof = Command::new("unshare").args(user).args(["--net", "ip", "link", "set", "lo", "up"]).output().unwrap();
    if !proof.status.success() {
        return println!("SKIP: no network namespace: {}", String::from_utf8_lossy(&proof.stderr));
    }
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        return println!("SKIP: no TUN device may be made: open /dev/net/tun: {error}");
    }
    let mut again = Command::new("unshare");
    again.args(user).arg("--net").arg(std::env::current_exe().unwrap()).args(["--exact", test, "--nocapture"]);
    let done = again.env("TWILL_TEST_NAMESPACE", "1").output().unwrap();
    let said = [done.stdout, done.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(done.status.success(), "{}", said.join("\n"));
}

fn run(line: &str) {
    let mut words = line.split_whitespace();
    let out = Command::new(words.next().unwrap()).args(words).output().unwrap();
    let said = [out.stdout, out.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(out.status.success(), "{line}: {}", said.join("\n"));
}

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
        there.run(|| other.iter().for_each(|words| run(&format!("ip {words}")))).unwrap();
        let all = Offloads::ALL;
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
            assert!(near.stop().is_some() && far.stop().is_some(), "the descriptors come back");
        }
    });
}
