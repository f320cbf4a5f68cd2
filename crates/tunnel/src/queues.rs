//! What the kernel dropped before the pumps saw it: the device's queue and the socket's are bounded, and overflow while the pumps do not
//! keep up. The kernel counts both from the making of either; these count from the tunnel's start.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use twill_kernel::udp::UdpSocket;
use twill_kernel::{tun, udp};

use crate::counters::{Cause, Snapshot};

#[derive(Debug, Default)]
pub(crate) struct Queues {
    device: String,
    /// Not here any more once the tunnel ends: the port is then free.
    socket: Mutex<Option<OwnedFd>>,
    before: [u64; 2],
}

impl Queues {
    /// Those of a device in the calling thread's namespace and of a socket.
    pub(crate) fn new(device: &str, socket: &UdpSocket) -> Self {
        let socket = socket.as_fd().try_clone_to_owned().ok();
        let new = Self { device: device.to_owned(), socket: Mutex::new(socket), before: [0; 2] };
        let before = new.now();
        Self { before, ..new }
    }

    fn now(&self) -> [u64; 2] {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let socket = socket.as_ref().and_then(|socket| udp::queue_drops(socket).ok());
        [tun::queue_drops(&self.device).unwrap_or(0), socket.unwrap_or(0)]
    }

    /// Adds what overflowed.
    pub(crate) fn add_to(&self, snapshot: &mut Snapshot) {
        let [device, socket] = self.now();
        // A device that was made anew counts anew.
        snapshot.add_drops(Cause::DeviceFull, device.saturating_sub(self.before[0]));
        snapshot.add_drops(Cause::SocketFull, socket.saturating_sub(self.before[1]));
    }

    /// Lets go of the socket.
    pub(crate) fn close(&self) {
        *self.socket.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
