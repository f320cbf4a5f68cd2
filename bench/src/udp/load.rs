//! Traffic between two hosts, and what it cost: the generators of the udp matrix, the same for every path.
//!
//! The processors' time is the whole machine's, because a packet's work is done wherever the kernel likes: nothing else may run.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use twill_e2e::net::{Host, enter};

/// Before a sample counts.
const WARM: Duration = Duration::from_millis(500);
/// What a sample counts.
const WINDOW: Duration = Duration::from_millis(1500);
/// Bytes of one write, as iperf3 has it.
const WRITE: usize = 128 << 10;

/// From where to where.
#[derive(Clone, Copy)]
pub(crate) struct Way<'a> {
    pub(crate) from: &'a Host,
    pub(crate) to: &'a Host,
    pub(crate) address: Ipv4Addr,
}

/// One sample of bulk data.
pub(crate) struct Bulk {
    /// Received bits each second, in thousand millions.
    pub(crate) gbits: f64,
    /// Processor time for each megabyte received, in microseconds.
    pub(crate) cpu: f64,
}

/// One sample of packets.
pub(crate) struct Packets {
    /// Thousands each second that the sender's kernel took.
    pub(crate) offered: f64,
    /// Thousands each second that the receiver got.
    pub(crate) received: f64,
    /// Part of the sent ones that never came, in percent.
    pub(crate) loss: f64,
    /// Processor time for each packet received, in microseconds.
    pub(crate) cpu: f64,
}

/// Runs on a thread that stands in the host's network; what is opened there stays there.
pub(crate) fn on<T: Send>(host: &Host, act: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/proc/{}/ns/net", host.pid())).unwrap();
    let inside = || {
        enter(&namespace);
        act()
    };
    std::thread::scope(|scope| scope.spawn(inside).join().unwrap())
}

/// TCP as fast as it goes: all streams are there before the first one sends.
pub(crate) fn tcp(way: Way<'_>, streams: usize) -> Bulk {
    let all = Streams::listen(way);
    let pairs: Vec<_> = (0..streams).map(|_| all.connect()).collect();
    all.measure(pairs.into_iter(), WINDOW)
}

/// The same where each stream sends as soon as it is there, beside those before it; and for longer.
pub(crate) fn tcp_one_after_the_other(way: Way<'_>, streams: usize) -> Bulk {
    let all = Streams::listen(way);
    all.measure((0..streams).map(|_| all.connect()), 2 * WINDOW)
}

struct Streams<'a> {
    way: Way<'a>,
    listener: TcpListener,
    received: AtomicU64,
    end: AtomicBool,
}

impl<'a> Streams<'a> {
    fn listen(way: Way<'a>) -> Self {
        let listener = on(way.to, || TcpListener::bind((way.address, 0)).unwrap());
        Self { way, listener, received: AtomicU64::new(0), end: AtomicBool::new(false) }
    }

    /// Sender and receiver.
    fn connect(&self) -> (TcpStream, TcpStream) {
        let address = self.listener.local_addr().unwrap();
        let connect = || TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
        (on(self.way.from, connect), self.listener.accept().unwrap().0)
    }

    /// What is received in so long a time.
    fn measure(&self, pairs: impl Iterator<Item = (TcpStream, TcpStream)>, window: Duration) -> Bulk {
        std::thread::scope(|scope| {
            let mut senders = Vec::new();
            for (from, to) in pairs {
                senders.push(from.try_clone().unwrap());
                scope.spawn(move || send_all(&from, &self.end));
                scope.spawn(move || receive_all(&to, &self.received));
            }
            std::thread::sleep(WARM);
            let (before, meter) = (self.received.load(Ordering::Relaxed), Meter::start());
            std::thread::sleep(window);
            let (seconds, busy) = meter.stop();
            let bytes = (self.received.load(Ordering::Relaxed) - before) as f64;
            self.end.store(true, Ordering::Relaxed);
            // What waits for room is cut off.
            senders.iter().for_each(|from| drop(from.shutdown(Shutdown::Both)));
            Bulk { gbits: bytes * 8.0 / seconds / 1e9, cpu: busy / bytes * 1e12 }
        })
    }
}

fn send_all(mut from: &TcpStream, end: &AtomicBool) {
    let bytes = vec![0x5a; WRITE];
    while !end.load(Ordering::Relaxed) && from.write(&bytes).is_ok() {}
}

fn receive_all(mut to: &TcpStream, received: &AtomicU64) {
    let mut bytes = vec![0; WRITE];
    while let Ok(len @ 1..) = to.read(&mut bytes) {
        received.fetch_add(len as u64, Ordering::Relaxed);
    }
}

/// 64-byte datagrams: `each_ms` for each millisecond, or as many as the sender can.
pub(crate) fn udp(way: Way<'_>, each_ms: Option<u32>) -> Packets {
    let (from, to) = datagrams(way);
    let (sent, received, end) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| match each_ms {
            Some(number) => pace(&from, number, &sent, &end),
            None => blast(&from, &sent, &end),
        });
        let receiver = scope.spawn(|| count(&to, &received, &end));
        let now = || (sent.load(Ordering::Relaxed) as f64, received.load(Ordering::Relaxed) as f64);
        std::thread::sleep(WARM);
        let (before, meter) = (now(), Meter::start());
        std::thread::sleep(WINDOW);
        let (seconds, busy) = meter.stop();
        let after = now();
        end.store(true, Ordering::Relaxed);
        sender.join().unwrap();
        receiver.join().unwrap();
        let all = now();
        let (offered, received) = (after.0 - before.0, after.1 - before.1);
        Packets {
            offered: offered / seconds / 1e3,
            received: received / seconds / 1e3,
            loss: (1.0 - all.1 / all.0) * 100.0,
            cpu: busy / received.max(1.0) * 1e6,
        }
    })
}

/// A connected pair of sockets; a receive gives up when nothing came for a while.
pub(crate) fn datagrams(way: Way<'_>) -> (UdpSocket, UdpSocket) {
    let to = on(way.to, || UdpSocket::bind((way.address, 0)).unwrap());
    // The tunnel is measured, not how soon this program's receiver is woken.
    sockopt::set_socket_recv_buffer_size_force(&to, 8 << 20).unwrap();
    to.set_read_timeout(Some(Duration::from_millis(60))).unwrap();
    let address = to.local_addr().unwrap();
    let from = on(way.from, || UdpSocket::bind("0.0.0.0:0").unwrap());
    on(way.from, || from.connect(address)).unwrap();
    (from, to)
}

fn blast(from: &UdpSocket, sent: &AtomicU64, end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        if from.send(&[0x5a; 64]).is_ok() {
            sent.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Sends so many each millisecond, until told to end.
pub(crate) fn pace(from: &UdpSocket, each_ms: u32, sent: &AtomicU64, end: &AtomicBool) {
    let start = Instant::now();
    let mut slots = 0;
    while !end.load(Ordering::Relaxed) {
        for _ in 0..each_ms {
            if from.send(&[0x5a; 64]).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
        slots += 1;
        std::thread::sleep((start + Duration::from_millis(slots)).saturating_duration_since(Instant::now()));
    }
}

/// Counts until nothing more comes after the end: a gap before it is part of what is measured.
fn count(to: &UdpSocket, received: &AtomicU64, end: &AtomicBool) {
    let mut bytes = [0; 2048];
    loop {
        let ended = end.load(Ordering::Relaxed);
        match to.recv(&mut bytes) {
            Ok(_) => {
                received.fetch_add(1, Ordering::Relaxed);
            }
            Err(_) if ended => return,
            Err(_) => {}
        }
    }
}

/// Mean and least time until `ping` has its answer, in milliseconds.
pub(crate) fn ping(way: Way<'_>) -> (f64, f64) {
    let out = way.from.run(&format!("ping -n -q -i 0.002 -c 200 {}", way.address));
    let line = out.lines().find(|line| line.starts_with("rtt ")).unwrap_or_else(|| panic!("no answers: {out}"));
    let numbers = line.split(" = ").nth(1).unwrap();
    let mut numbers = numbers.split('/').map(|number| number.parse().unwrap_or(f64::NAN));
    let (least, mean) = (numbers.next().unwrap(), numbers.next().unwrap());
    (mean, least)
}

/// A sample during which no other program worked; after some tries, whatever there is.
pub(crate) fn clean<T>(mut sample: impl FnMut() -> T) -> T {
    let mut tries = 0;
    loop {
        let (start, before) = (Instant::now(), others());
        let value = sample();
        tries += 1;
        let busy = others().iter().map(|(pid, time)| time - before.get(pid).unwrap_or(&0).min(time)).sum::<u64>()
            as f64
            / 100.0
            / start.elapsed().as_secs_f64();
        if busy < 0.1 || tries == 3 {
            return value;
        }
        println!("again: other programs took {:.0} % of a processor", busy * 100.0);
    }
}

/// Jiffies of each process that is neither the kernel's nor ours.
fn others() -> HashMap<u32, u64> {
    let own = std::process::id();
    let mut found = HashMap::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let Ok(text) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((_, rest)) = text.rsplit_once(") ") else { continue };
        let fields: Vec<&str> = rest.split(' ').collect();
        let number = |at: usize| fields[at].parse::<u64>().unwrap_or(0);
        let parent = number(1);
        if pid != own && pid != 2 && parent != u64::from(own) && parent != 2 {
            found.insert(pid, number(11) + number(12) + number(13) + number(14));
        }
    }
    found
}

/// Counts what all processors together worked.
struct Meter {
    start: Instant,
    idle: f64,
}

impl Meter {
    fn start() -> Meter {
        Meter { start: Instant::now(), idle: idle() }
    }

    /// Seconds that went by, and seconds that processors worked in them.
    fn stop(self) -> (f64, f64) {
        let (seconds, idle) = (self.start.elapsed().as_secs_f64(), idle() - self.idle);
        let processors = std::thread::available_parallelism().unwrap().get() as f64;
        (seconds, (seconds * processors - idle).max(0.0))
    }
}

/// Seconds that processors were idle, since the machine started.
fn idle() -> f64 {
    let (idle, _) = crate::report::cpu();
    idle as f64 / 100.0
}
