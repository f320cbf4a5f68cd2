//! What is left of the goodput while somebody who is no peer sends 50,000 datagrams a second to the tunnel's port, against the same
//! flood to a port whose packets nftables drops.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::load::{self, Way, on, pace};
use super::nets::Nets;
use super::{of, ratios};
use crate::report::Report;

/// Datagrams of each millisecond.
const EACH_MS: u32 = 50;
/// A port that nobody listens on and nftables drops.
const DROPPED: u16 = 9999;

/// TCP towards the flooded node, undisturbed and under both floods.
pub(crate) fn run(nets: &Nets, rounds: usize, report: &mut Report) {
    let (one, two) = (nets.overlay.site(1), nets.overlay.site(2));
    two.host.ip("addr add 10.168.0.99/24 dev eth0");
    let table = format!(
        "add table ip bench; add chain ip bench in {{ type filter hook input priority filter; }}; add rule ip bench in udp dport {DROPPED} drop"
    );
    let way = Way { from: &two.container, to: &one.container, address: [100, 96, 1, 2].into() };
    let (mut calm, mut dropped, mut junk) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        calm.push(load::clean(|| load::tcp(way, 1)));
        assert!(one.host.command("nft").arg(&table).status().unwrap().success());
        dropped.push(load::clean(|| under(nets, DROPPED, || load::tcp(way, 1))));
        one.host.run("nft delete table ip bench");
        junk.push(load::clean(|| under(nets, 8285, || load::tcp(way, 1))));
    }
    two.host.ip("addr del 10.168.0.99/24 dev eth0");
    let gbits = |samples: &[load::Bulk]| of(samples, |s| s.gbits);
    report.note("TCP without a flood (Gbit/s)", &gbits(&calm));
    report.note("TCP while nftables drops a flood of 50,000/s (Gbit/s)", &gbits(&dropped));
    report.note("TCP under the same flood to the tunnel's port, from no peer (Gbit/s)", &gbits(&junk));
    report.at_least(
        "TCP under a flood to the tunnel against a dropped one (×)",
        &ratios(&gbits(&junk), &gbits(&dropped)),
        0.8,
    );
}

/// Runs while the flood goes on.
fn under<T>(nets: &Nets, port: u16, act: impl FnOnce() -> T) -> T {
    let socket = on(&nets.overlay.site(2).host, || {
        let socket = UdpSocket::bind("10.168.0.99:0").unwrap();
        socket.connect(("10.168.0.2", port)).unwrap();
        socket
    });
    let (sent, end) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| pace(&socket, EACH_MS, &sent, &end));
        let done = act();
        end.store(true, Ordering::Relaxed);
        done
    })
}
