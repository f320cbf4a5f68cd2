//! Who runs the two directions.
//!
//! While little passes, one thread carries both: what is answered at once (an echo, an acknowledgement) then wakes nobody else, and a
//! waking costs more than the packet. While much passes, or a send waits for room in a full queue, a second thread carries wire → device.
//! Why, and what was measured: docs/decisions/0012-one-thread-carries-a-tunnel-until-much-passes.md.
//!
//! ```text
//!   carrier: device → wire, wire → device ──(much passes)──▶ helper: wire → device
//!                                         ◀──(little again)──
//! ```

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use twill_kernel::icmp::IcmpSockets;
use twill_kernel::tun::TunDevice;
use twill_kernel::udp::UdpSocket;

use crate::counters::add;
use crate::into::Into;
use crate::load::{Load, Look, MUCH, SOON};
use crate::out::Out;
use crate::priority::Priority;
use crate::{Lost, Shared};

/// Little: less than that in so long a time.
const LITTLE: u64 = MUCH;
const QUIET: Duration = Duration::from_millis(100);
/// Times that a thread lets others run and looks again before it sleeps, while much passes: to be woken costs more.
const LOOKS: u32 = 3;

/// What both threads need.
pub(crate) struct Ground {
    pub(crate) shared: Arc<Shared>,
    pub(crate) tun: Arc<TunDevice>,
    pub(crate) udp: Arc<UdpSocket>,
}

/// The thread that is always there.
pub(crate) struct Carrier {
    ground: Ground,
    icmp: Option<IcmpSockets>,
    out: Out,
    /// Not here while the helper has it.
    into: Option<Into>,
    hand: Sender<Into>,
    back: Receiver<Into>,
    /// Readable once the helper has given its part back.
    returned: Arc<OwnedFd>,
}

/// The thread that waits for work.
pub(crate) struct Helper {
    ground: Ground,
    hand: Receiver<Into>,
    back: Sender<Into>,
    returned: Arc<OwnedFd>,
}

/// Both, for a tunnel of these ends; either ends with the tunnel or its device.
pub(crate) fn pair(
    grounds: [Ground; 2],
    icmp: Option<IcmpSockets>,
    (out, into): (Out, Into),
) -> std::io::Result<(Carrier, Helper)> {
    let [ground, helped] = grounds;
    let (hand, handed) = channel();
    let (give, back) = channel();
    let returned = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
    let helper = Helper { ground: helped, hand: handed, back: give, returned: Arc::clone(&returned) };
    Ok((Carrier { ground, icmp, out, into: Some(into), hand, back, returned }, helper))
}

impl Carrier {
    /// Carries until the tunnel ends. Its end ends the helper.
    pub(crate) fn run(mut self) {
        if self.carry() == Err(Lost) {
            self.ground.shared.lose();
        }
    }

    fn carry(&mut self) -> Result<(), Lost> {
        let mut look = Look::new(&self.ground.shared);
        let mut priority = Priority::new(&self.ground.shared);
        while let Some((mut out, mut into)) = self.wait() {
            // The first packet after a wait does not wait for others.
            let (mut looks, mut most) = (0, 1);
            loop {
                if self.ground.shared.is_stopped() {
                    return Ok(());
                }
                let (moved, more) = self.round((out, most), into)?;
                most = usize::MAX;
                let shared = &self.ground.shared;
                if self.into.is_none() {
                    self.take_back();
                } else if shared.is_stuck() || look.after(SOON, shared).is_some_and(|load| load.work > MUCH) {
                    self.hand_over();
                }
                self.follow(&mut priority);
                if moved {
                    looks = 0;
                }
                if !more {
                    if self.into.is_some() || looks == LOOKS {
                        break;
                    }
                    looks += 1;
                    std::thread::yield_now();
                }
                (out, into) = (true, true);
            }
        }
        Ok(())
    }

    /// Whose turn it is, and how much is taken at once.
    fn follow(&mut self, priority: &mut Priority) {
        let mut flows = self.out.flows.take();
        if let Some(into) = &mut self.into {
            flows |= into.flows.take();
        }
        let many = priority.follow(&self.ground.shared, flows);
        self.out.many = many;
        if let Some(into) = &mut self.into {
            into.many = many;
        }
    }

    /// A round of each direction that may have something. Whether anything moved, and whether there may be more.
    fn round(&mut self, (out, most): (bool, usize), into: bool) -> Result<(bool, bool), Lost> {
        let Ground { shared, tun, udp } = &self.ground;
        let (mut load, mut more) = (Load::default(), false);
        if into && let Some(pump) = &mut self.into {
            let before = pump.load;
            more |= pump.round(shared, &**tun, &**udp)?;
            load += pump.load - before;
        }
        // What was handed to the kernel may have its answer by now.
        if out || load.work > 0 {
            let (before, start) = (self.out.load, Instant::now());
            more |= self.out.round(shared, (&**tun, &**udp, self.icmp.as_ref()), most)?;
            shared.set_stuck(start.elapsed() > SOON);
            load += self.out.load - before;
        }
        shared.carried.add(load);
        Ok((load.work > 0, more))
    }

    /// Whether device and socket can be read; `None` when the tunnel is to end.
    fn wait(&mut self) -> Option<(bool, bool)> {
        let Ground { shared, tun, udp } = &self.ground;
        let other = if self.into.is_some() { udp.as_fd() } else { self.returned.as_fd() };
        let mut fds = [tun.as_fd(), other, shared.stop.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        add(&shared.counters.calls.waits, 1);
        shared.set_stuck(false);
        // An interrupted wait is one that found nothing.
        let _ = poll(&mut fds, None);
        let [from_tun, from_other, _] = fds.map(|fd| !fd.revents().is_empty());
        if shared.is_stopped() {
            return None;
        }
        if from_other && self.into.is_none() {
            let _ = rustix::io::read(&*self.returned, &mut [0; 8]);
            self.take_back();
        }
        Some((from_tun, from_other && self.into.is_some()))
    }

    /// What the helper has given back, if it has. There may be no wait for long.
    fn take_back(&mut self) {
        self.into = self.back.try_recv().ok();
    }

    fn hand_over(&mut self) {
        if let Some(into) = self.into.take() {
            // A helper that has ended, with its device, leaves both here.
            self.into = self.hand.send(into).err().map(|unsent| unsent.0);
        }
    }
}

impl Helper {
    /// Helps until the carrier ends.
    pub(crate) fn run(self) {
        while let Ok(mut into) = self.hand.recv() {
            if self.help(&mut into) == Err(Lost) {
                return self.ground.shared.lose();
            }
            if self.back.send(into).is_err() {
                return;
            }
            let _ = rustix::io::write(&*self.returned, &1u64.to_ne_bytes());
        }
    }

    /// Carries wire → device until little passes, or the tunnel ends.
    fn help(&self, into: &mut Into) -> Result<(), Lost> {
        let Ground { shared, tun, udp } = &self.ground;
        let mut look = Look::new(shared);
        let mut priority = Priority::new(shared);
        let mut looks = 0;
        let quiet = Timespec { tv_sec: 0, tv_nsec: QUIET.as_nanos() as i64 };
        while !shared.is_stopped() {
            let before = into.load;
            let more = into.round(shared, &**tun, &**udp)?;
            if into.load != before {
                shared.carried.add(into.load - before);
                looks = 0;
            }
            into.many = priority.follow(shared, into.flows.take());
            if look.after(QUIET, shared).is_some_and(|load| load.work < LITTLE) && !shared.is_stuck() {
                break;
            }
            if more {
                continue;
            }
            if looks < LOOKS {
                looks += 1;
                std::thread::yield_now();
                continue;
            }
            let mut fds = [udp.as_fd(), shared.stop.as_fd()].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            add(&shared.counters.calls.waits, 1);
            let _ = poll(&mut fds, Some(&quiet));
        }
        Ok(())
    }
}
