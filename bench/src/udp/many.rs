//! Ten peers and ten thousand: the lookup alone, and a tunnel whose peers are replaced between the samples.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Instant;

use twill_core::backend::{TunnelPeer, TunnelSpec};
use twill_kernel::tun::{Offloads, TunDevice};
use twill_kernel::udp::UdpSocket;
use twill_tunnel::Tunnel;
use twill_tunnel::peers::Peers;

use super::load::{self, on};
use super::nets::{Net, Nets};
use super::{of, ratios};
use crate::report::Report;

const FEW: u32 = 10;
const MANY: u32 = 10_000;
const PORT: u16 = 9100;

/// Both.
pub(crate) fn run(nets: &Nets, rounds: usize, report: &mut Report) {
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        few.push(lookup(FEW));
        many.push(lookup(MANY));
    }
    report.note("10 peers, a lookup of one at random (ns)", &few);
    report.note("10000 peers, a lookup of one at random (ns)", &many);
    let tunnels = [0, 1].map(|n| start(nets, n));
    let (mut few, mut many) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let mut both = [(FEW, &mut few), (MANY, &mut many)];
        // Of two samples the second has some hundredths less, whosever it is.
        both.rotate_left(round % 2);
        for (number, samples) in both {
            for (n, tunnel) in tunnels.iter().enumerate() {
                tunnel.replace_peers(peers(number, n));
            }
            samples.push(load::clean(|| load::udp(nets.way(Net::Many), None)));
        }
    }
    let received = |samples: &[load::Packets]| of(samples, |s| s.received);
    report.note("10 peers, 64-byte UDP received (thousand/s)", &received(&few));
    report.note("10000 peers, 64-byte UDP received (thousand/s)", &received(&many));
    report.at_least(
        "10000 peers against 10, 64-byte UDP received (×)",
        &ratios(&received(&many), &received(&few)),
        0.95,
    );
}

fn subnet(n: u32) -> TunnelPeer {
    let net = Ipv4Addr::from(0x0b00_0000 + (n << 8));
    TunnelPeer {
        name: n.to_string(),
        host: Ipv4Addr::from(0xac10_0000 + n).into(),
        subnets: vec![format!("{net}/24").parse().unwrap()],
    }
}

/// The other host's subnet and `number - 1` more.
fn peers(number: u32, own: usize) -> Peers {
    let peer = 2 - own;
    let other = TunnelPeer {
        name: "other".into(),
        host: Ipv4Addr::from([10, 168, 0, 1 + peer as u8]).into(),
        subnets: vec![format!("10.5.{peer}.0/24").parse().unwrap()],
    };
    Peers::new((1..number).map(subnet).chain([other]), PORT)
}

fn start(nets: &Nets, own: usize) -> Tunnel {
    let host = nets.by_hand(own);
    let local = SocketAddr::from(([10, 168, 0, 2 + own as u8], PORT));
    let tunnel = on(host, || {
        let tun = TunDevice::open("many0", Offloads::ALL).unwrap();
        let udp = UdpSocket::bind(local).unwrap();
        let spec = TunnelSpec { device: "many0".parse().unwrap(), mtu: 1472.try_into().unwrap(), local };
        Tunnel::start(spec, tun, udp, peers(FEW, own), || {}).unwrap()
    });
    host.ip("link set many0 mtu 1472 up");
    host.ip(&format!("route add 10.5.{}.0/24 dev many0", 2 - own));
    tunnel
}

/// Nanoseconds for each of many lookups, all over the peers.
fn lookup(number: u32) -> f64 {
    let peers = Peers::new((1..=number).map(subnet), PORT);
    let mut random = 1u32;
    let mut address = || {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        IpAddr::from(Ipv4Addr::from(0x0b00_0000 + ((1 + (random >> 8) % number) << 8) + (random >> 24)))
    };
    let addresses: Vec<IpAddr> = (0..50_000).map(|_| address()).collect();
    let start = Instant::now();
    let found = addresses.iter().filter(|address| black_box(peers.of(**address)).is_some()).count();
    let took = start.elapsed().as_secs_f64();
    assert_eq!(found, addresses.len());
    took * 1e9 / found as f64
}
