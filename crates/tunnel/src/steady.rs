//! In the steady state no packet costs an allocation: counted by the test's global allocator, for each thread.
#![allow(clippy::disallowed_methods, reason = "the test sets its devices up with ip(8), from outside the product")]

use std::cell::Cell;
use std::io::{IoSlice, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket as PlainSocket};
use std::process::Command;

use allocation_counter::measure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use twill_core::backend::TunnelPeer;
use twill_kernel::icmp::MemoryIcmp;
use twill_kernel::netns::Netns;
use twill_kernel::tun::HEADER;
use twill_kernel::udp::{Incoming, Outgoing, SLOT};
use twill_packet::offload::Vnet;

use super::*;
use crate::tests::{packet, shared, super_packet};

fn told(n: u8, host: [u8; 4]) -> TunnelPeer {
    TunnelPeer {
        name: n.to_string(),
        host: IpAddr::from(host),
        subnets: vec![format!("10.1.{n}.0/24").parse().unwrap()],
    }
}

fn end(own: u8, peer: u8) -> Shared {
    let counters = Counters::default();
    let peers = Peers::new([told(peer, [127, 0, 0, peer])], 8285).counted(&counters);
    let local = SocketAddr::from(([127, 0, 0, own], 8285));
    shared(local, counters, peers, Offloads::ALL)
}

/// A device and a wire whose queues hold the same again and again, and that remember only how much passed.
struct Loops {
    from_kernel: Vec<Vec<u8>>,
    from_wire: Vec<Vec<u8>>,
    next: Cell<usize>,
    passed: Cell<usize>,
}

impl Tun for Loops {
    fn read(&self, header: &mut [u8; HEADER], packet: &mut [u8]) -> io::Result<usize> {
        let bytes = self.from_kernel.get(self.next.get()).ok_or(io::ErrorKind::WouldBlock)?;
        self.next.set(self.next.get() + 1);
        header.copy_from_slice(&bytes[..HEADER]);
        packet[..bytes.len() - HEADER].copy_from_slice(&bytes[HEADER..]);
        Ok(bytes.len() - HEADER)
    }

    fn write(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        self.passed.set(self.passed.get() + parts.len());
        Ok(())
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }
}

impl Udp for Loops {
    fn send(&self, _: &[u8], batch: &[Outgoing], _: &mut dyn FnMut(usize, io::Error)) -> usize {
        self.passed.set(self.passed.get() + batch.iter().map(Outgoing::count).sum::<usize>());
        1
    }

    fn send_cuttable(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize {
        self.send(buffer, batch, failed)
    }

    fn recv(&self, buffer: &mut [u8], out: &mut Vec<Incoming>) -> io::Result<()> {
        let start = self.next.get().min(self.from_wire.len());
        let messages = self.from_wire[start..].iter().zip(buffer.chunks_exact_mut(SLOT)).enumerate();
        for (index, (bytes, slot)) in messages {
            slot[..bytes.len()].copy_from_slice(bytes);
            let from = SocketAddr::from(([127, 0, 0, 2], 8285));
            out.push(Incoming {
                from,
                start: index * SLOT,
                len: bytes.len(),
                segment: bytes.len().min(1472),
                cut: false,
            });
            self.next.set(self.next.get() + 1);
        }
        if out.is_empty() { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }

    fn path_mtu(&self, _: IpAddr) -> Option<usize> {
        None
    }

    fn segments(&self) -> bool {
        true
    }
}

/// As the device gives it: the vnet header in front.
fn from_device(from: u8, to: u8, len: usize) -> Vec<u8> {
    let (vnet, packet) = super_packet(from, to, len, 1432);
    [&vnet.emit()[..], &packet].concat()
}

fn small(from: u8, to: u8, port: u8) -> Vec<u8> {
    packet(from, to, 17, &[&[0xf0, port, 0, 9, 0, 72, 0, 0][..], &[0x5a; 64]].concat())
}

/// Runs the rounds that a queue lasts, once to warm up and then counted; gives what passed in the counted ones.
fn rounds(loops: &Loops, mut round: impl FnMut() -> Result<bool, Lost>) -> usize {
    let mut all = || {
        loops.next.set(0);
        while round().unwrap() {}
    };
    all();
    loops.passed.set(0);
    let info = measure(|| (0..50).for_each(|_| all()));
    assert_eq!(info.count_total, 0, "{info:?} while {} passed", loops.passed.get());
    loops.passed.get()
}

#[test]
fn no_packet_costs_an_allocation() {
    let plain = |packet: Vec<u8>| [&Vnet::default().emit()[..], &packet].concat();
    // Bulk, small ones of many flows, one for nobody, one that is no packet at all.
    let mut from_kernel = vec![from_device(1, 2, 60_000), from_device(1, 2, 65_000)];
    from_kernel.extend((0..100).map(|port| plain(small(1, 2, port))));
    from_kernel.extend([plain(small(1, 77, 1)), plain(vec![0x45; 7])]);
    let loops = Loops { from_kernel, from_wire: Vec::new(), next: Cell::new(0), passed: Cell::new(0) };
    let state = end(1, 2);
    let mut out = Out::new();
    let passed = rounds(&loops, || out.round(&state, (&loops, &loops, None::<&MemoryIcmp>), usize::MAX));
    assert!(passed >= 50 * (42 + 46 + 100), "{passed}");

    // Nor the first time: as many messages as one round can make, each too unlike the one before it to go with it.
    let mut from_kernel: Vec<_> = (0..63).map(|n| plain(packet(1, 2, 17, &vec![0x5a; 20 + n]))).collect();
    from_kernel.push(from_device(1, 2, 65_000));
    let most = Loops { from_kernel, ..loops };
    most.next.set(0);
    let mut fresh = Out::new();
    let info = measure(|| {
        fresh.round(&state, (&most, &most, None::<&MemoryIcmp>), usize::MAX).unwrap();
    });
    assert_eq!(info.count_total, 0, "{info:?}");

    // The same from the wire: what a peer would have cut, and what is dropped.
    let mut cut = Vec::new();
    let bulk = from_device(2, 1, 60_000);
    twill_packet::offload::segment(&Vnet::parse(&bulk).unwrap(), &bulk[HEADER..], &mut cut).unwrap();
    let mut from_wire = vec![cut];
    from_wire.extend((0..100).map(|port| small(2, 1, port)));
    from_wire.extend([small(77, 1, 1), vec![0x45; 7]]);
    let loops = Loops { from_kernel: Vec::new(), from_wire, next: Cell::new(0), passed: Cell::new(0) };
    let mut into = Into::new(merge(Offloads::ALL));
    for many in [false, true] {
        into.many = many;
        let passed = rounds(&loops, || into.round(&state, &loops, &loops));
        assert!(passed >= 50 * (42 + 100), "{passed}");
    }
}

/// Runs a pump on the calling thread until the end, and gives its allocations while `counted`.
fn pump(fd: BorrowedFd<'_>, counted: &AtomicBool, end: &AtomicBool, mut round: impl FnMut() -> bool) -> u64 {
    let mut all = 0;
    while !end.load(Ordering::Acquire) {
        let counts = counted.load(Ordering::Acquire);
        let info = measure(|| {
            let wait = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&wait));
            while round() {}
        });
        all += if counts { info.count_total } else { 0 };
    }
    all
}

/// Bulk in both directions and small datagrams.
fn traffic(from: &Netns, to: &Netns) {
    let listener = to.run(|| TcpListener::bind("10.1.2.1:0").unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let stream = from.run(|| TcpStream::connect(address).unwrap()).unwrap();
    let other = listener.accept().unwrap().0;
    std::thread::scope(|scope| {
        for (mut from, mut to) in [(&stream, &other), (&other, &stream)] {
            scope.spawn(move || from.write_all(&vec![0x5a; 5_000_000]).unwrap());
            scope.spawn(move || to.read_exact(&mut vec![0; 5_000_000]).unwrap());
        }
    });
    let socket = from.run(|| PlainSocket::bind("10.1.1.1:0").unwrap()).unwrap();
    for _ in 0..500 {
        socket.send_to(&[0x5a; 64], address).unwrap();
    }
}

#[test]
fn no_packet_costs_an_allocation_on_real_devices() {
    let Ok(wire) = Netns::create() else {
        println!("SKIP: no network namespace may be made");
        return;
    };
    let spaces = [Netns::create().unwrap(), Netns::create().unwrap()];
    let ip = |space: &Netns, line: &str| {
        let out = space.run(|| Command::new("ip").args(line.split(' ')).output().unwrap()).unwrap();
        assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    };
    ip(&wire, "link set lo up");
    let ends = [1u8, 2].map(|own| {
        let space = &spaces[usize::from(own) - 1];
        let tun = space.run(|| TunDevice::open("flannel0", Offloads::ALL)).unwrap().expect("a TUN device as root");
        ip(space, &format!("addr add 10.1.{own}.1/16 dev flannel0"));
        ip(space, "link set flannel0 mtu 1472 up");
        let state = end(own, 3 - own);
        let udp = wire.run(|| UdpSocket::bind(state.spec.local)).unwrap().unwrap();
        (state, tun, udp)
    });
    let (counted, end) = (AtomicBool::new(false), AtomicBool::new(false));
    let (counted, end) = (&counted, &end);
    let allocations: Vec<u64> = std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (state, tun, udp) in &ends {
            threads.push(scope.spawn(move || {
                let mut out = Out::new();
                let mut round = || out.round(state, (tun, udp, None::<&MemoryIcmp>), usize::MAX).unwrap();
                pump(tun.as_fd(), counted, end, &mut round)
            }));
            threads.push(scope.spawn(move || {
                let mut into = Into::new(merge(tun.offloads()));
                pump(udp.as_fd(), counted, end, || into.round(state, tun, udp).unwrap())
            }));
        }
        traffic(&spaces[0], &spaces[1]);
        counted.store(true, Ordering::Release);
        traffic(&spaces[0], &spaces[1]);
        end.store(true, Ordering::Release);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let counters = ends[0].0.counters.snapshot(ends[0].0.current().snapshots());
    let (sent, received) = (counters.peers[0].sent, counters.peers[0].received);
    assert!(sent.packets > 7000 && received.packets > 5000, "{counters:?}");
    assert_eq!(allocations, [0; 4], "out and into of both ends, {counters:?}");
}
