//! Whose turn it is on a busy processor.
//!
//! Programs that send fill the device's queue before a thread of the tunnel has its turn, and what waits there grows out of the caches.
//! So while streams pass in bulk the tunnel's threads go before programs, as a packet's way through the kernel does. They do not while
//! small packets pass: who sends those would be interrupted for each of them (docs/decisions/0014).

use rustix::process::{getpriority_process, setpriority_process};

use crate::Shared;
use crate::load::{Look, MUCH, SOON};

/// How much less nice (nice(7)).
const AHEAD: i32 = 10;

/// The calling thread's.
pub(crate) struct Priority {
    /// Its own niceness; `None`: it may not be changed here.
    usual: Option<i32>,
    is_ahead: bool,
    look: Look,
}

impl Priority {
    pub(crate) fn new(shared: &Shared) -> Self {
        Self { usual: getpriority_process(None).ok(), is_ahead: false, look: Look::new(shared) }
    }

    /// Follows what passes.
    pub(crate) fn follow(&mut self, shared: &Shared) {
        let Some(load) = self.look.after(SOON, shared) else { return };
        let much = if self.is_ahead { MUCH / 4 } else { MUCH };
        if (load.bulk > much) != self.is_ahead {
            self.go_ahead(!self.is_ahead);
        }
    }

    fn go_ahead(&mut self, is_ahead: bool) {
        let Some(usual) = self.usual else { return };
        match setpriority_process(None, usual - if is_ahead { AHEAD } else { 0 }) {
            Ok(()) => self.is_ahead = is_ahead,
            // Without CAP_SYS_NICE.
            Err(_) => self.usual = None,
        }
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if self.is_ahead {
            self.go_ahead(false);
        }
    }
}
