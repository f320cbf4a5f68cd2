//! One agent for each state folder and for each network namespace: two on one host would write each other's lease, devices and
//! firewall for ever.
//!
//! Both are locks that end with the process; the second is the lock of the namespace's own file, so that it needs no common folder.

use std::path::Path;

use anyhow::Context;
use twill_kernel::files::Lock;
use twill_kernel::process;

use super::reconciler::Reconciler;
use super::settings::Settings;
use super::{NET_ADMIN, handover, missing_capabilities, refuse_beside_flannel};
use crate::output::Failure;
use crate::stores;

const NETWORK: &str = "/proc/self/ns/net";

/// Held for as long as the agent lives.
#[derive(Debug)]
pub(crate) struct Place {
    _state: Lock,
    _network: Option<Lock>,
}

/// The only agent here, or the next one, which has the tunnel running before the one before it has ended.
pub(crate) fn take(settings: &Settings, reconciler: &mut Reconciler) -> anyhow::Result<Place> {
    if let Some((_, failure)) = missing_capabilities().into_iter().find(|(name, _)| *name == NET_ADMIN) {
        return Err(failure.into());
    }
    let lock = settings.state_dir.join("agent.lock");
    let running = if settings.takeover { process::lock_holders(&lock) } else { Vec::new() };
    let handles: Vec<_> = running.iter().filter_map(|pid| process::handle(*pid)).collect();
    let before = if settings.takeover {
        // The running agent has the lock, or it has another folder: either way this one can be written and read.
        drop(try_state(settings)?);
        super::load_state(&settings.state_dir)?;
        if let Some(listen) = settings.serve_store {
            // Its own port comes free with it.
            stores::check_is_free(listen, &running)?;
        }
        handover::take(&settings.run_dir)?
    } else {
        None
    };
    let Some(handed) = before else {
        let place = Place { _state: state(settings)?, _network: network()? };
        refuse_beside_flannel()?;
        reconciler.restore(None);
        return Ok(place);
    };
    reconciler.restore(handed);
    let state = Lock::exclusive(&lock).with_context(|| format!("lock {}", lock.display()))?;
    let network = Lock::of(Path::new(NETWORK), true).with_context(|| format!("lock {NETWORK}"))?;
    // Its store's data and port may outlive its locks.
    handles.iter().for_each(process::await_end);
    Ok(Place { _state: state, _network: network })
}

/// The lock on the agent's state; `None`: another agent has it.
fn try_state(settings: &Settings) -> anyhow::Result<Option<Lock>> {
    let path = settings.state_dir.join("agent.lock");
    Lock::try_exclusive(&path).map_err(|e| {
        let message = format!("lock {}: {e}", path.display());
        let failure = Failure::new("state-unwritable", message);
        failure.hint("run as root, or name another folder with --state-dir").into()
    })
}

fn state(settings: &Settings) -> anyhow::Result<Lock> {
    try_state(settings)?.ok_or_else(|| {
        Failure::new("agent-running", "another agent runs on this state")
            .hint("stop it first: systemctl stop twill; or take its place without loss: twill agent --takeover")
            .into()
    })
}

/// The network namespace's lock; `None`: somebody without rights over it holds it, which is to keep nobody out.
pub(crate) fn network() -> anyhow::Result<Option<Lock>> {
    if let Some(lock) = Lock::of(Path::new(NETWORK), false).with_context(|| format!("lock {NETWORK}"))? {
        return Ok(Some(lock));
    }
    let holder = process::lock_holders(Path::new(NETWORK)).into_iter().next();
    if let Some(pid) = holder.filter(|pid| !process::is_trusted(*pid)) {
        tracing::warn!(pid, "a process of another user holds the lock of this network namespace: ignored");
        return Ok(None);
    }
    let (who, stop) = match holder {
        Some(pid) => {
            let state = process::open_file_named(pid, "agent.lock");
            let folder = state.as_deref().and_then(Path::parent);
            let state = folder.map_or_else(String::new, |folder| format!(", state in {}", folder.display()));
            (format!("pid {pid}{state}"), format!("kill {pid}"))
        }
        None => ("in another PID namespace".to_owned(), "systemctl stop twill".to_owned()),
    };
    Err(Failure::new("agent-running", format!("another agent ({who}) runs in this network namespace"))
        .hint(format!("one agent serves a host; stop that one first: {stop}"))
        .into())
}
