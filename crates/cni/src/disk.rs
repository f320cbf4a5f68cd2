//! ADD waits for the disk while it goes on.

use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use twill_kernel::files::{self, Unsynced};

/// How long ADD waits without sleeping: a processor that was put to sleep takes longer to come back than the disk.
const AWAKE: Duration = Duration::from_millis(1);

/// A thread that waits for the disk, change by change; it ends by itself.
#[derive(Debug)]
pub(crate) struct Disk {
    changes: Sender<Unsynced>,
    synced: Receiver<(io::Result<()>, Vec<Unsynced>)>,
}

impl Disk {
    /// Begins with this change.
    pub(crate) fn begin(first: Unsynced) -> Self {
        let (changes, changed) = channel();
        let (tell, synced) = channel();
        thread::spawn(move || {
            let (mut done, mut held) = (Ok(()), Vec::new());
            let mut next = Some(first);
            while let Some(change) = next {
                let at = held.len();
                held.push(change);
                // What has come meanwhile is waited for along with it.
                held.extend(changed.try_iter());
                done = done.and(files::sync_all(&held[at..]));
                next = changed.recv().ok();
            }
            tell.send((done, held))
        });
        Self { changes, synced }
    }

    /// Another change.
    pub(crate) fn add(&self, change: Unsynced) {
        // The thread says below that it has ended.
        let _ = self.changes.send(change);
    }

    /// Waits until they are all there. What comes with it is locked for as long as it is held.
    pub(crate) fn wait(self) -> (io::Result<()>, Vec<Unsynced>) {
        drop(self.changes);
        let until = Instant::now() + AWAKE;
        while Instant::now() < until {
            match self.synced.try_recv() {
                Err(TryRecvError::Empty) => thread::yield_now(),
                Err(TryRecvError::Disconnected) => break,
                Ok(told) => return told,
            }
        }
        self.synced.recv().unwrap_or_else(|error| (Err(io::Error::other(error)), Vec::new()))
    }
}
