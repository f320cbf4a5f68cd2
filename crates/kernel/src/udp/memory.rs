//! The twin: sockets without a kernel, joined by a network that a test holds in its hand.

use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use super::{Incoming, Outgoing, SLOT, Udp};

/// One datagram on the wire.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Datagram {
    /// Where from, or where to.
    pub address: SocketAddr,
    /// Its payload.
    pub bytes: Vec<u8>,
}

/// A socket whose wire is two queues.
#[derive(Debug)]
pub struct MemoryUdp {
    merges: bool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    sent: VecDeque<Datagram>,
    arrived: VecDeque<Datagram>,
    path_mtu: Option<usize>,
    broken: Option<i32>,
}

impl MemoryUdp {
    /// With or without receiving several datagrams at once.
    pub fn new(merges: bool) -> Self {
        Self { merges, state: Mutex::default() }
    }

    /// The oldest datagram that was sent.
    pub fn take(&self) -> Option<Datagram> {
        self.state().sent.pop_front()
    }

    /// A datagram arrives.
    pub fn arrive(&self, from: SocketAddr, bytes: &[u8]) {
        self.state().arrived.push_back(Datagram { address: from, bytes: bytes.to_vec() });
    }

    /// From now on no larger IP packet passes.
    pub fn set_path_mtu(&self, mtu: Option<usize>) {
        self.state().path_mtu = mtu;
    }

    /// From now on each call fails with this error number; `None` mends it.
    pub fn fail(&self, errno: Option<i32>) {
        self.state().broken = errno;
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Udp for MemoryUdp {
    fn send(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize {
        let mut state = self.state();
        for (number, message) in batch.iter().enumerate() {
            let bytes = &buffer[message.start..message.start + message.len];
            if let Some(errno) = state.broken {
                failed(number, io::Error::from_raw_os_error(errno));
                continue;
            }
            let outer = if message.to.is_ipv4() { 28 } else { 48 };
            if state.path_mtu.is_some_and(|mtu| message.segment.min(message.len) + outer > mtu) {
                failed(number, io::Error::from_raw_os_error(libc::EMSGSIZE));
                break;
            }
            let single = bytes.is_empty().then_some(bytes);
            for part in single.into_iter().chain(bytes.chunks(message.segment.max(1))) {
                state.sent.push_back(Datagram { address: message.to, bytes: part.to_vec() });
            }
        }
        1
    }

    fn send_cuttable(&self, buffer: &[u8], batch: &[Outgoing], failed: &mut dyn FnMut(usize, io::Error)) -> usize {
        let mtu = self.state().path_mtu.take();
        let calls = self.send(buffer, batch, failed);
        self.state().path_mtu = mtu;
        calls
    }

    fn recv(&self, buffer: &mut [u8], out: &mut Vec<Incoming>) -> io::Result<()> {
        let mut state = self.state();
        if let Some(errno) = state.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let before = out.len();
        for (index, slot) in buffer.chunks_exact_mut(SLOT).enumerate() {
            let Some(first) = state.arrived.pop_front() else { break };
            let cut = first.bytes.len() > SLOT;
            let segment = first.bytes.len().min(SLOT);
            slot[..segment].copy_from_slice(&first.bytes[..segment]);
            let mut len = segment;
            // As the kernel's GRO: equal ones of one sender, and one shorter at the end.
            while self.merges && segment > 0 && len % segment == 0 {
                let fits = |d: &Datagram| {
                    d.address == first.address && (1..=segment).contains(&d.bytes.len()) && len + d.bytes.len() <= SLOT
                };
                let Some(next) = state.arrived.pop_front_if(|d| fits(d)) else { break };
                slot[len..len + next.bytes.len()].copy_from_slice(&next.bytes);
                len += next.bytes.len();
            }
            out.push(Incoming { from: first.address, start: index * SLOT, len, segment: segment.max(1), cut });
        }
        if out.len() == before { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(()) }
    }

    fn path_mtu(&self, _to: IpAddr) -> Option<usize> {
        self.state().path_mtu
    }

    fn segments(&self) -> bool {
        true
    }
}
