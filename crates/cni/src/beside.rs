//! A thread beside ADD's own: it looks at both namespaces while addresses are chosen, and waits for the disk while devices are made.
//!
//! A processor that was put to sleep takes longer to come back than either of these takes: both threads wait awake, for a while.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use twill_kernel::attach::{Before, Failed};
use twill_kernel::files::{self, Unsynced};

/// How long a thread waits without sleeping.
const AWAKE: Duration = Duration::from_millis(1);

/// The other thread.
#[derive(Debug)]
pub(crate) struct Beside {
    looked: Receiver<Result<Before, Failed>>,
    changes: SyncSender<Arc<Vec<Unsynced>>>,
    synced: Receiver<io::Result<()>>,
}

impl Beside {
    /// Starts it, in the caller's namespace, and has it look. Dropped, it ends by itself.
    pub(crate) fn start(look: impl FnOnce() -> Result<Before, Failed> + Send + 'static) -> Self {
        let (tell, looked) = sync_channel(1);
        let (changes, changed) = sync_channel(1);
        let (told, synced) = sync_channel(1);
        thread::spawn(move || {
            let _ = tell.send(look());
            if let Ok(changes) = hear::<Arc<Vec<Unsynced>>>(&changed) {
                let _ = told.send(files::sync_all(&changes));
            }
        });
        Self { looked, changes, synced }
    }

    /// Has it wait for the disk.
    pub(crate) fn sync(&self, changes: &Arc<Vec<Unsynced>>) {
        // One that has ended says so below.
        let _ = self.changes.send(Arc::clone(changes));
    }

    /// What it has seen.
    pub(crate) fn looked(&self) -> Result<Before, Failed> {
        hear(&self.looked).unwrap_or_else(|error| Err(error.into()))
    }

    /// How it went on the disk.
    pub(crate) fn synced(&self) -> io::Result<()> {
        hear(&self.synced).unwrap_or_else(Err)
    }
}

fn hear<T>(from: &Receiver<T>) -> io::Result<T> {
    let until = Instant::now() + AWAKE;
    while Instant::now() < until {
        match from.try_recv() {
            Err(TryRecvError::Empty) => thread::yield_now(),
            heard => return heard.map_err(io::Error::other),
        }
    }
    from.recv().map_err(io::Error::other)
}
