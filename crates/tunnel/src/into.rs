//! Wire → device: only a peer's packets, only from inner addresses of its own, only whole ones; those of one flow merged.

use std::io::{ErrorKind, IoSlice};
use std::net::IpAddr;
use std::sync::Arc;

use twill_kernel::tun::Tun;
use twill_kernel::udp::{Incoming, SLOT, Udp};
use twill_packet::offload::{Coalescer, Inner, Item, Merge};

use crate::counters::{Cause, add};
use crate::load::{Flows, Load};
use crate::peers::{Peer, Peers};
use crate::{Lost, Shared, is_gone};

/// Messages in one receive, and while many streams pass. What other numbers gave, and what cannot be saved at all:
/// docs/decisions/0014-what-a-tunnel-in-user-space-cannot-get-below.md.
const MESSAGES: [usize; 2] = [4, 32];
/// Slices in one write; a super-packet of more pieces is copied together first.
const SLICES: usize = 128;

/// The pump's own memory.
pub(crate) struct Into {
    buffer: Vec<u8>,
    messages: Vec<Incoming>,
    coalescer: Coalescer,
    flat: Vec<u8>,
    peers: Arc<Peers>,
    version: u64,
    /// What was carried so far.
    pub(crate) load: Load,
    pub(crate) flows: Flows,
    /// Many streams pass.
    pub(crate) many: bool,
}

impl Into {
    pub(crate) fn new(merge: Merge) -> Self {
        Self {
            buffer: vec![0; MESSAGES[1] * SLOT],
            messages: Vec::with_capacity(MESSAGES[1]),
            coalescer: Coalescer::new(merge),
            flat: Vec::with_capacity(2 * SLOT),
            peers: Arc::default(),
            version: 0,
            load: Load::default(),
            flows: Flows::default(),
            many: false,
        }
    }

    /// Receives once and writes what came. True: there may be more.
    pub(crate) fn round(&mut self, shared: &Shared, tun: &impl Tun, udp: &impl Udp) -> Result<bool, Lost> {
        if let Some((version, peers)) = shared.newer(self.version) {
            (self.version, self.peers) = (version, peers);
        }
        self.messages.clear();
        add(&shared.counters.calls.udp_receives, 1);
        let most = MESSAGES[usize::from(self.many)];
        match udp.recv(&mut self.buffer[..most * SLOT], &mut self.messages) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) if error.kind() == ErrorKind::Interrupted => return Ok(true),
            // What an ICMP error left on the socket; the next call goes on.
            Err(_) => {
                shared.counters.drop(Cause::ReceiveFailed, 1, None);
                return Ok(false);
            }
        }
        self.load += Load::of(self.messages.len(), self.messages.iter().map(|message| message.len).sum());
        self.coalescer.clear();
        for at in 0..self.messages.len() {
            self.check(shared, self.messages[at]);
        }
        self.coalescer.finish(&mut self.buffer);
        self.write(shared, tun)?;
        // Fewer than asked for: the queue was empty.
        Ok(self.messages.len() == most)
    }

    /// Hands what may pass of one message to the coalescer.
    fn check(&mut self, shared: &Shared, message: Incoming) {
        let host = message.from.ip().to_canonical();
        let known = self.peers.at_host(host);
        let mut seen: Option<&Peer> = None;
        // What of this message came from `seen`, in packets and bytes: the counters are shared, and adding to them costs.
        let mut passed = (0, 0);
        let (mut at, end) = (message.start, message.start + message.len);
        loop {
            let part = at..end.min(at + message.segment);
            let next = part.end;
            let checked = if known.is_none() {
                Err(Cause::NotAPeer)
            } else if message.cut {
                Err(Cause::Cut)
            } else {
                Inner::check(&self.buffer[part.clone()]).map_err(Cause::from)
            };
            let found = checked.and_then(|inner| {
                if let Some(peer) = seen.filter(|peer| peer.holds(inner.src)) {
                    return Ok((inner, peer));
                }
                let peer = self.peers.of(inner.src).filter(|peer| peer.told.host == host).ok_or(Cause::WrongSource)?;
                if let Some(before) = seen {
                    before.counters.into.add(passed.0, passed.1, 0, 0);
                    passed = (0, 0);
                } else {
                    peer.counters.into.add(0, 0, 0, 1);
                    self.flows.saw(&self.buffer[part.clone()], &inner);
                }
                Ok((inner, peer))
            });
            match found {
                Ok((inner, peer)) => {
                    seen = Some(peer);
                    passed = (passed.0 + 1, passed.1 + part.len());
                    self.coalescer.push(&self.buffer, part, inner);
                }
                Err(cause) => shared.counters.drop(cause, 1, known.map(|peer| &*peer.counters)),
            }
            at = next;
            if at >= end {
                break;
            }
        }
        if let Some(peer) = seen {
            peer.counters.into.add(passed.0, passed.1, 0, 0);
            peer.counters.seen_now();
        }
    }

    fn write(&mut self, shared: &Shared, tun: &impl Tun) -> Result<(), Lost> {
        for item in self.coalescer.items() {
            let header = item.vnet.emit();
            add(&shared.counters.calls.tun_writes, 1);
            let written = if item.packets < SLICES {
                let mut slices = [IoSlice::new(&[]); SLICES];
                slices[0] = IoSlice::new(&header);
                let pieces = self.coalescer.pieces(item);
                for (slice, piece) in slices[1..].iter_mut().zip(pieces) {
                    *slice = IoSlice::new(&self.buffer[piece]);
                }
                tun.write(&slices[..=item.packets])
            } else {
                self.flat.clear();
                for piece in self.coalescer.pieces(item) {
                    self.flat.extend_from_slice(&self.buffer[piece]);
                }
                tun.write(&[IoSlice::new(&header), IoSlice::new(&self.flat)])
            };
            match written {
                Ok(()) => self.count(item),
                Err(error) if is_gone(&error) => return Err(Lost),
                Err(_) => {
                    let peer = self.peers.of(item.src()).map(|peer| &*peer.counters);
                    shared.counters.drop(Cause::DeviceRefused, item.packets, peer);
                }
            }
        }
        Ok(())
    }

    fn count(&self, item: &Item) {
        let src: IpAddr = item.src();
        if let Some(peer) = self.peers.of(src) {
            peer.counters.into.add(0, 0, 1, 0);
        }
    }
}
