//! How much passes, and in how many streams: whether one thread is enough goes by it, whose turn it is, and how much is taken at once.

use std::ops::{AddAssign, BitOrAssign, Sub};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use twill_packet::offload::Inner;

use crate::Shared;

/// Much: so much [work](Load::work) in so short a time.
pub(crate) const MUCH: u64 = 1 << 20;
pub(crate) const SOON: Duration = Duration::from_millis(10);

/// What was carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Load {
    /// How much it cost, in bytes: each packet costs about as much as copying half a kilobyte.
    pub(crate) work: u64,
    /// Bytes that came in large pieces, as those of streams do.
    pub(crate) bulk: u64,
}

impl Load {
    /// Bytes of a large piece, on average.
    const LARGE: usize = 8 << 10;

    pub(crate) fn of(packets: usize, bytes: usize) -> Self {
        let is_bulk = bytes >= packets * Self::LARGE;
        Self { work: (packets * 512 + bytes) as u64, bulk: if is_bulk { bytes as u64 } else { 0 } }
    }
}

/// The same, added by several threads.
#[derive(Debug, Default)]
pub(crate) struct Carried {
    work: AtomicU64,
    bulk: AtomicU64,
}

impl Carried {
    pub(crate) fn add(&self, load: Load) {
        self.work.fetch_add(load.work, Ordering::Relaxed);
        self.bulk.fetch_add(load.bulk, Ordering::Relaxed);
    }

    pub(crate) fn so_far(&self) -> Load {
        Load { work: self.work.load(Ordering::Relaxed), bulk: self.bulk.load(Ordering::Relaxed) }
    }
}

impl AddAssign for Load {
    fn add_assign(&mut self, more: Self) {
        self.work += more.work;
        self.bulk += more.bulk;
    }
}

impl Sub for Load {
    type Output = Self;

    fn sub(self, less: Self) -> Self {
        Self { work: self.work - less.work, bulk: self.bulk - less.bulk }
    }
}

/// What passed since the last look.
pub(crate) struct Look {
    at: Instant,
    so_far: Load,
}

impl Look {
    pub(crate) fn new(shared: &Shared) -> Self {
        Self { at: Instant::now(), so_far: shared.carried.so_far() }
    }

    /// What passed in so long a time, on average, once that time went by.
    pub(crate) fn after(&mut self, time: Duration, shared: &Shared) -> Option<Load> {
        let times = (self.at.elapsed().as_nanos() / time.as_nanos()) as u64;
        if times == 0 {
            return None;
        }
        let before = std::mem::replace(self, Self::new(shared));
        let Load { work, bulk } = self.so_far - before.so_far;
        Some(Load { work: work / times, bulk: bulk / times })
    }
}

/// Flows that were seen, as far as so many bits tell them apart by their ports.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Flows(u64);

impl Flows {
    pub(crate) fn saw(&mut self, packet: &[u8], inner: &Inner) {
        // What has no readable ports is no stream.
        if inner.transport.is_some()
            && let Some(&ports) = packet[inner.header..].first_chunk()
        {
            // Multiplied by 2^32 / φ, neighbours are far apart in the uppermost bits (Knuth, TAOCP 6.4).
            self.0 |= 1 << (u32::from_be_bytes(ports).wrapping_mul(0x9e37_79b9) >> 26);
        }
    }

    /// How many at least.
    pub(crate) fn count(self) -> u32 {
        self.0.count_ones()
    }

    /// What was seen since the last time.
    pub(crate) fn take(&mut self) -> Self {
        std::mem::take(self)
    }
}

impl BitOrAssign for Flows {
    fn bitor_assign(&mut self, more: Self) {
        self.0 |= more.0;
    }
}
