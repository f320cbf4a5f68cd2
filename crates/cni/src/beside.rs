//! A thread beside the program's own: it takes addresses and waits for the disk while the other one looks at the kernel.
//!
//! It is started before the configuration is read, on another processor: a scheduler may leave it behind its maker, which then works half
//! a millisecond in the kernel without a break. And a processor that sleeps takes longer to come back than either of the two waits: both
//! wait awake, for a while.

use std::io;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use twill_kernel::process;

/// How long a thread waits without sleeping.
const AWAKE: Duration = Duration::from_millis(1);

type Work = Box<dyn FnOnce() + Send>;

/// The other thread; it ends when this is dropped and its work is done. `None`: there is none, and its work is done at once.
#[derive(Debug, Default)]
pub struct Beside(Option<Sender<Work>>);

impl Beside {
    /// Starts it, in the caller's namespace, where the machine has one to give.
    pub fn start() -> Self {
        let (give, work) = channel::<Work>();
        let started = thread::Builder::new().spawn(move || {
            // It is asked for one thing, and is gone before its asker is.
            if let Ok(work) = hear(&work) {
                work();
            }
        });
        if let Ok(thread) = &started {
            let _ = process::move_elsewhere(thread);
        }
        Self(started.is_ok().then_some(give))
    }

    /// Has it do something, once; where there is no other thread, it is done first.
    pub(crate) fn begin(&self, work: impl FnOnce() + Send + 'static) {
        match &self.0 {
            // A thread that has ended drops the work, and with it what somebody waits for.
            Some(give) => drop(give.send(Box::new(work))),
            None => work(),
        }
    }
}

/// Waits for what the other thread tells.
pub(crate) fn hear<T>(from: &Receiver<T>) -> io::Result<T> {
    let until = Instant::now() + AWAKE;
    while Instant::now() < until {
        match from.try_recv() {
            Err(TryRecvError::Empty) => thread::yield_now(),
            heard => return heard.map_err(io::Error::other),
        }
    }
    from.recv().map_err(io::Error::other)
}
