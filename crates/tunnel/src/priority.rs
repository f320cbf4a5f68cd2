//! Whose turn it is on a busy processor.
//!
//! Programs that send fill the device's queue before a thread of the tunnel has its turn, and what waits there grows out of the caches.
//! So while streams pass in bulk the tunnel's threads go before programs, as a packet's way through the kernel does; and further before
//! them the more programs there are, each of which is to have its share. They do not while small packets pass: who sends those would be
//! interrupted for each of them (docs/decisions/0014).

use rustix::process::{getpriority_process, setpriority_process};

use crate::Shared;
use crate::load::{Flows, Look, MUCH, SOON};

/// From so many streams on they are many.
const MANY: u32 = 16;

/// How far the tunnel's threads go before programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rank {
    Usual,
    /// Streams pass in bulk.
    Ahead,
    /// Many do.
    First,
}

impl Rank {
    /// By what passed [`SOON`].
    fn follow(self, bulk: u64, flows: Flows) -> Self {
        // Who went ahead does so for a while longer.
        let much = if self == Self::Usual { MUCH } else { MUCH / 4 };
        let many = if self == Self::First { MANY / 2 } else { MANY };
        match (bulk > much, flows.count() >= many) {
            (false, _) => Self::Usual,
            (true, false) => Self::Ahead,
            (true, true) => Self::First,
        }
    }

    /// How much less nice (nice(7)).
    const fn ahead(self) -> i32 {
        match self {
            Self::Usual => 0,
            Self::Ahead => 10,
            Self::First => 20,
        }
    }
}

/// The calling thread's.
pub(crate) struct Priority {
    /// Its own niceness; `None`: it may not be changed here.
    usual: Option<i32>,
    rank: Rank,
    flows: Flows,
    look: Look,
}

impl Priority {
    pub(crate) fn new(shared: &Shared) -> Self {
        let (usual, flows) = (getpriority_process(None).ok(), Flows::default());
        Self { usual, rank: Rank::Usual, flows, look: Look::new(shared) }
    }

    /// Follows what passes, of which this thread saw these flows; tells whether many streams do.
    pub(crate) fn follow(&mut self, shared: &Shared, flows: Flows) -> bool {
        self.flows |= flows;
        if let Some(load) = self.look.after(SOON, shared) {
            let rank = self.rank.follow(load.bulk, self.flows.take());
            self.take(rank);
        }
        self.rank == Rank::First
    }

    fn take(&mut self, rank: Rank) {
        let before = std::mem::replace(&mut self.rank, rank);
        if rank != before
            && let Some(usual) = self.usual
            // Without CAP_SYS_NICE nobody goes ahead.
            && setpriority_process(None, usual - rank.ahead()).is_err()
        {
            self.usual = None;
        }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        self.take(Rank::Usual);
    }
}

#[cfg(test)]
mod tests {
    use twill_packet::offload::Inner;

    use super::*;
    use crate::tests::packet;

    /// So many connections between the same two hosts, from ports side by side.
    fn flows(number: u8) -> Flows {
        let mut flows = Flows::default();
        for port in 0..number {
            // As a datagram: a TCP header would say how long it is.
            let packet = packet(1, 2, 17, &[0xc0, port, 0x13, 0x88, 0, 8, 0, 0]);
            flows.saw(&packet, &Inner::check(&packet).unwrap());
        }
        flows
    }

    #[test]
    fn the_tunnel_goes_ahead_of_bulk_and_further_ahead_of_many_streams() {
        let (small, bulk) = (MUCH / 8, 2 * MUCH);
        assert_eq!(Rank::Usual.follow(small, flows(64)), Rank::Usual);
        for few in [1, 4, 8] {
            assert_eq!(flows(few).count(), u32::from(few));
            assert_eq!(Rank::Usual.follow(bulk, flows(few)), Rank::Ahead);
        }
        assert_eq!(Rank::Ahead.follow(bulk, flows(64)), Rank::First);
        assert_eq!(Rank::First.follow(bulk, flows(10)), Rank::First, "for a while longer");
        assert_eq!(Rank::First.follow(bulk, flows(4)), Rank::Ahead);
        assert_eq!(Rank::First.follow(MUCH / 2, flows(10)), Rank::First);
        assert_eq!(Rank::First.follow(small, flows(64)), Rank::Usual);
    }
}
