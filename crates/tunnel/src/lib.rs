//! The tunnel of the udp backend: plain threads between a TUN device and a UDP socket.
//!
//! ```text
//!   kernel ──▶ flannel0 ──read──▶ out: whose subnet? ──▶ send ──▶ UDP 8285 of that host
//!   kernel ◀── flannel0 ◀─write── into: a peer's? its own inner source? ◀── receive ◀── UDP 8285
//! ```
//! - [`peers`]: who stands for which inner addresses, looked up by longest prefix and replaced as a whole
//! - [`counters`]: what passed, for each peer, and what was dropped, by cause
//! - `queues`: what the kernel dropped before the pumps saw it
//! - `out`, `into`: the two directions; `threads`: who runs them; `load`: how much passes;
//!   `priority`: before whom they go, on a busy processor
//!
//! The payload is the bare inner packet, as flannel has it. TTL is never touched: the two hosts' kernels have done so.

pub mod counters;
mod into;
mod load;
mod out;
pub mod peers;
mod priority;
mod queues;
#[cfg(test)]
mod steady;
#[cfg(test)]
mod tests;
mod threads;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use twill_core::backend::TunnelSpec;
use twill_kernel::icmp::IcmpSockets;
use twill_kernel::tun::{Offloads, Tun, TunDevice};
use twill_kernel::udp::{Udp, UdpSocket};
use twill_packet::offload::Merge;

use crate::counters::{Counters, Snapshot};
use crate::into::Into;
use crate::load::Carried;
use crate::out::Out;
use crate::peers::Peers;
use crate::queues::Queues;
use crate::threads::Ground;

/// A running tunnel. Dropped, it ends and closes its descriptors; the device stays where it is persistent.
#[derive(Debug)]
pub struct Tunnel {
    shared: Arc<Shared>,
    ends: Option<Ends>,
    threads: Vec<JoinHandle<()>>,
}

/// The descriptors that a tunnel reads and writes.
#[derive(Debug)]
struct Ends {
    tun: Arc<TunDevice>,
    udp: Arc<UdpSocket>,
}

/// Reads a tunnel's counters, from any thread, and holds none of its descriptors.
#[derive(Debug, Clone)]
pub struct Gauge(Arc<Shared>);

/// What this kernel grants the tunnel; each absence costs speed, none an ability (but the last).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Means {
    /// The device hands over and takes TCP super-packets over IPv4.
    pub tso4: bool,
    /// The same over IPv6.
    pub tso6: bool,
    /// The same of UDP.
    pub uso: bool,
    /// Many datagrams go into one send (UDP_SEGMENT).
    pub udp_segment: bool,
    /// Many datagrams come out of one receive (UDP_GRO).
    pub udp_gro: bool,
    /// Senders are told of what goes no further (needs CAP_NET_RAW).
    pub icmp: bool,
}

impl std::fmt::Display for Means {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let all = [
            (self.tso4, "tso4"),
            (self.tso6, "tso6"),
            (self.uso, "uso"),
            (self.udp_segment, "udp-segment"),
            (self.udp_gro, "udp-gro"),
            (self.icmp, "icmp"),
        ];
        let names =
            |on: bool| all.iter().filter(|(has, _)| *has == on).map(|(_, name)| *name).collect::<Vec<_>>().join(" ");
        let (has, lacks) = (names(true), names(false));
        f.write_str(if has.is_empty() { "none" } else { &has })?;
        if lacks.is_empty() { Ok(()) } else { write!(f, " (without {lacks})") }
    }
}

/// The device was deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lost;

/// What the pumps and the handle share.
pub(crate) struct Shared {
    spec: TunnelSpec,
    pub(crate) counters: Counters,
    tun: Offloads,
    merges: bool,
    answers: bool,
    queues: Queues,
    segments: AtomicBool,
    peers: Mutex<Arc<Peers>>,
    /// Counts replacements: a pump takes the new peers where its number is not this one.
    version: AtomicU64,
    /// Readable once the pumps are to end.
    stop: OwnedFd,
    /// By both directions.
    pub(crate) carried: Carried,
    /// The last round of sends took long: it waited for room in a queue.
    stuck: AtomicBool,
    stopped: AtomicBool,
    /// Set by a pump that found its device gone.
    lost: AtomicBool,
    on_loss: Box<dyn Fn() + Send + Sync>,
}

impl Tunnel {
    /// Starts the pumps. `tun` and `udp` are open in the node's namespace; nobody else reads them from here on. `on_loss` is called from
    /// a pump's thread when the device was deleted: [`Tunnel::is_alive`] is then false, and the tunnel is to be started anew.
    pub fn start(
        spec: TunnelSpec,
        tun: TunDevice,
        udp: UdpSocket,
        peers: Peers,
        on_loss: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Tunnel> {
        // Nobody is told then, and `Means` says so.
        let icmp = IcmpSockets::open().ok();
        let counters = Counters::default();
        let shared = Arc::new(Shared {
            queues: Queues::new(spec.device.as_str(), &udp),
            spec,
            peers: Mutex::new(Arc::new(peers.counted(&counters))),
            counters,
            tun: tun.offloads(),
            merges: udp.merges(),
            answers: icmp.is_some(),
            segments: AtomicBool::new(udp.segments()),
            version: AtomicU64::new(1),
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            carried: Carried::default(),
            stuck: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            lost: AtomicBool::new(false),
            on_loss: Box::new(on_loss),
        });
        let ends = Ends { tun: Arc::new(tun), udp: Arc::new(udp) };
        let mut tunnel = Tunnel { shared: Arc::clone(&shared), ends: None, threads: Vec::with_capacity(2) };
        let grounds = [(); 2].map(|()| Ground {
            shared: Arc::clone(&shared),
            tun: Arc::clone(&ends.tun),
            udp: Arc::clone(&ends.udp),
        });
        let pumps = (Out::new(), Into::new(merge(ends.tun.offloads())));
        let (carrier, helper) = threads::pair(grounds, icmp, pumps)?;
        tunnel.thread("tunnel", move || carrier.run())?;
        tunnel.thread("tunnel-helper", move || helper.run())?;
        tunnel.ends = Some(ends);
        Ok(tunnel)
    }

    fn thread(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.threads.push(std::thread::Builder::new().name(name.to_owned()).spawn(run)?);
        Ok(())
    }

    /// What it was started with.
    pub fn spec(&self) -> &TunnelSpec {
        &self.shared.spec
    }

    /// Replaces all peers at once: each packet sees the old ones or the new ones. The counters of a peer that stays go on.
    pub fn replace_peers(&self, peers: Peers) {
        {
            // Whoever reads the counters meanwhile finds no peer twice, or missing.
            let mut current = self.shared.peers();
            *current = Arc::new(peers.counted(&self.shared.counters));
        }
        self.shared.version.fetch_add(1, Ordering::Release);
    }

    /// A handle on its counters.
    pub fn gauge(&self) -> Gauge {
        Gauge(Arc::clone(&self.shared))
    }

    /// False once the device was deleted under it.
    pub fn is_alive(&self) -> bool {
        !self.shared.lost.load(Ordering::Acquire)
    }

    /// True once somebody renamed the device, or moved it out of the calling thread's namespace: whoever wants it makes another.
    pub fn is_displaced(&self) -> bool {
        let name = self.shared.spec.device.as_str();
        self.ends.as_ref().is_some_and(|ends| ends.tun.is_here(name).is_ok_and(|here| !here))
    }

    /// The device's and the socket's descriptor, for somebody who keeps them.
    pub fn descriptors(&self) -> Option<(BorrowedFd<'_>, BorrowedFd<'_>)> {
        self.ends.as_ref().map(|ends| (ends.tun.as_fd(), ends.udp.as_fd()))
    }

    /// Ends, and the device with its last descriptor, whatever it is called and wherever it is.
    pub fn remove(self) -> io::Result<()> {
        let ends = self.stop();
        ends.map_or(Ok(()), |(tun, _)| tun.set_persistent(false))
    }

    /// Ends the pumps, waits for them, and gives the descriptors back: nobody reads them any more.
    pub fn stop(mut self) -> Option<(TunDevice, UdpSocket)> {
        self.join();
        let Ends { tun, udp } = self.ends.take()?;
        Some((Arc::into_inner(tun)?, Arc::into_inner(udp)?))
    }

    fn join(&mut self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.queues.close();
        // A full counter is readable as well.
        let _ = rustix::io::write(&self.shared.stop, &1u64.to_ne_bytes());
        for thread in self.threads.drain(..) {
            // A pump that panicked has ended too.
            let _ = thread.join();
        }
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.join();
    }
}

impl Shared {
    pub(crate) fn current(&self) -> Arc<Peers> {
        Arc::clone(&self.peers())
    }

    fn peers(&self) -> MutexGuard<'_, Arc<Peers>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The peers with their number, where they are newer than `known`.
    pub(crate) fn newer(&self, known: u64) -> Option<(u64, Arc<Peers>)> {
        let version = self.version.load(Ordering::Acquire);
        (version != known).then(|| (version, self.current()))
    }

    /// A send may have found out that the underlay's device cannot cut.
    pub(crate) fn set_segments(&self, segments: bool) {
        if self.segments.load(Ordering::Relaxed) != segments {
            self.segments.store(segments, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_stuck(&self) -> bool {
        self.stuck.load(Ordering::Relaxed)
    }

    pub(crate) fn set_stuck(&self, stuck: bool) {
        if self.is_stuck() != stuck {
            self.stuck.store(stuck, Ordering::Relaxed);
        }
    }

    /// The tunnel is to end.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// The device is gone: says so once.
    pub(crate) fn lose(&self) {
        if !self.lost.swap(true, Ordering::AcqRel) {
            (self.on_loss)();
        }
    }
}

impl Gauge {
    /// What passed so far.
    pub fn counters(&self) -> Snapshot {
        let mut all = {
            let current = self.0.peers();
            self.0.counters.snapshot(current.snapshots())
        };
        self.0.queues.add_to(&mut all);
        all
    }

    /// What the kernel grants.
    pub fn means(&self) -> Means {
        let Offloads { tcp4, tcp6, udp, .. } = self.0.tun;
        Means {
            tso4: tcp4,
            tso6: tcp6,
            uso: udp,
            udp_segment: self.0.segments.load(Ordering::Relaxed),
            udp_gro: self.0.merges,
            icmp: self.0.answers,
        }
    }

    /// What it was started with.
    pub fn spec(&self) -> &TunnelSpec {
        &self.0.spec
    }
}

/// What a device takes uncut, in the words of the coalescer.
fn merge(offloads: Offloads) -> Merge {
    Merge { tcp4: offloads.tcp4, tcp6: offloads.tcp6, udp: offloads.udp }
}

/// The device was deleted: its descriptor stands for nothing any more (drivers/net/tun.c, `tun_get`).
fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::BADFD.raw_os_error())
}

/// ICMP errors that may still be sent: a burst, and one more for each millisecond, as the kernel bounds its own
/// (net.ipv4.icmp_msgs_per_sec, icmp_msgs_burst).
#[derive(Debug)]
struct Budget {
    left: u64,
    /// Until when what has been earned is counted.
    until: Instant,
}

impl Default for Budget {
    fn default() -> Self {
        Self { left: Self::BURST, until: Instant::now() }
    }
}

impl Budget {
    const BURST: u64 = 50;

    fn spend(&mut self) -> bool {
        let earned = self.until.elapsed().as_millis() as u64;
        self.until += Duration::from_millis(earned);
        self.left = Self::BURST.min(self.left + earned);
        let may = self.left > 0;
        self.left = self.left.saturating_sub(1);
        may
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("spec", &self.spec).finish_non_exhaustive()
    }
}
