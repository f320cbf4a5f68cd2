//! What the store said last, kept on disk: an agent that starts while the store is away goes by it. By a cache no lease is taken or kept
//! alive, and nothing that stands is withdrawn (docs/decisions/0018).
//!
//! ```text
//!   good listing, watch ──touch──▶ (a while) ──▶ cache.json ──▶ next start, store away: device, address, peers, files
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until, timeout};
use twill_core::alloc::Choice;
use twill_core::backend::{Cx, Rule};
use twill_core::config::NetworkConfig;
use twill_core::iface;
use twill_core::lease_set::{LeaseName, LeaseSet};
use twill_core::state_file::{StoreCache, StoreSource};
use twill_kernel::{files, process};
use twill_store::{RawConfig, StoreError};

use super::Session;
use crate::output::ago;

/// Changes that come together are written together.
const QUIET: Duration = Duration::from_millis(500);
/// The file is written no more often.
const EVERY: Duration = Duration::from_secs(5);
/// A store that does not answer for so long at the start is away, where a cache can stand in for it.
const PATIENCE: Duration = Duration::from_secs(1);
/// Largest file that is read.
const MOST_BYTES: u64 = 64 << 20;

/// Where the cache is.
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("cache.json")
}

/// The file, and what was made of it.
pub(super) struct Cache {
    file: PathBuf,
    /// The store's network config that is in force.
    config: Option<String>,
    /// When the file is to be written, and when it last was.
    due: Option<Instant>,
    last: Option<Instant>,
    writing: Option<JoinHandle<io::Result<()>>>,
    looked_for: bool,
    held: Option<Held>,
}

/// What is gone by.
struct Held {
    config: NetworkConfig,
    at: u64,
    leases: usize,
    /// The own lease, and what it was established with.
    own: Option<(LeaseName, Cx)>,
}

impl Cache {
    pub(super) fn new(state_dir: &Path) -> Self {
        let file = path(state_dir);
        Self { file, config: None, due: None, last: None, writing: None, looked_for: false, held: None }
    }

    /// The store has said this network config.
    pub(super) fn follow(&mut self, config: RawConfig) {
        let config = String::from_utf8(config.value).ok();
        if self.config != config {
            self.config = config;
            self.touch();
        }
    }

    /// What is to be kept has changed.
    pub(super) fn touch(&mut self) {
        let earliest = self.last.map(|last| last + EVERY);
        self.due.get_or_insert_with(|| (Instant::now() + QUIET).max(earliest.unwrap_or_else(Instant::now)));
    }

    /// Waits for the moment to write (`None`), or for the end of a write.
    pub(super) async fn turn(&mut self) -> Option<io::Result<()>> {
        if let Some(writing) = &mut self.writing {
            let done = writing.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            self.writing = None;
            return Some(done);
        }
        match self.due {
            Some(due) => sleep_until(due).await,
            None => std::future::pending().await,
        }
        None
    }

    /// The file, where there is one, or there is to be one soon.
    pub(super) fn announced(&self) -> Option<PathBuf> {
        (self.due.is_some() || self.writing.is_some() || self.file.exists()).then(|| self.file.clone())
    }

    /// Removes the file, for good.
    pub(super) async fn forget(&mut self) {
        self.due = None;
        if let Some(writing) = self.writing.take() {
            let _ = writing.await;
        }
        // Where there is none it need not go.
        let _ = std::fs::remove_file(&self.file);
    }

    /// The own lease that was gone by, once.
    pub(super) fn take_own(&mut self) -> Option<LeaseName> {
        Some(self.held.take()?.own?.0)
    }
}

/// Keeping it.
impl Session {
    pub(super) fn on_cache(&mut self, told: Option<io::Result<()>>) {
        let file = self.cache.file.display().to_string();
        match told {
            None => self.keep_listing(),
            Some(Ok(())) => self.unfind("cache-unwritable"),
            Some(Err(error)) => {
                self.cache.touch();
                // One that is older than what the kernel has would be worse than none.
                let _ = std::fs::remove_file(&self.cache.file);
                let (error, fix) = (error.to_string(), "make the folder writable, or name another with --state-dir");
                if !self.has_found("cache-unwritable", &error) {
                    tracing::warn!(code = "cache-unwritable", file, hint = fix, "{error}");
                }
                self.find("cache-unwritable", &file, &error, fix);
            }
        }
    }

    /// The store went away: what is not written yet is all that the next start would have.
    pub(super) async fn keep_what_changed(&mut self) {
        if self.cache.due.is_none() {
            return;
        }
        if let Some(writing) = self.cache.writing.take() {
            let _ = writing.await;
        }
        self.keep_listing();
    }

    /// Writes the listing, beside everything else. One that is not believed is not kept.
    fn keep_listing(&mut self) {
        self.cache.due = None;
        let (Some(config), Some((store, _)), true) = (&self.cache.config, self.seen, self.withheld.is_empty()) else {
            return;
        };
        let listing = StoreCache::new(self.source(), store, now(), config, self.leases.raw());
        let file = self.cache.file.clone();
        self.cache.last = Some(Instant::now());
        self.cache.writing = Some(tokio::task::spawn_blocking(move || {
            let bytes = listing.to_json()?;
            drop(listing);
            let written = files::write_atomic(&file, &bytes, 0o600);
            drop(bytes);
            process::trim_heap();
            // What an agent has left that was killed while it wrote.
            files::left_beside(&file)?.iter().for_each(|left| drop(std::fs::remove_file(left)));
            written
        }));
    }

    fn source(&self) -> StoreSource {
        StoreSource { endpoints: self.store.endpoints(), prefix: self.settings.store.prefix().to_owned() }
    }
}

/// Going by it.
impl Session {
    /// The store's network config. At the start nobody waits long for it, where there is a cache.
    pub(super) async fn ask_config(&self) -> Result<Option<RawConfig>, StoreError> {
        let asked = self.store.config();
        if self.seen.is_some() || !self.last_away.is_empty() || !self.cache.file.exists() {
            return asked.await;
        }
        timeout(PATIENCE, asked).await.unwrap_or_else(|_| {
            let (act, endpoints) = ("read the network config", self.store.endpoints());
            Err(StoreError::Away { act, endpoints, reason: format!("no answer within {PATIENCE:?}") })
        })
    }

    /// The store is away, and this agent has not come as far as a lease since its start: what the store said last is wanted.
    pub(super) async fn go_by_cache(&mut self) {
        if self.established {
            return;
        }
        self.look_for_cache();
        let Some(Held { config, at, leases, own }) = &self.cache.held else { return };
        let (config, at, leases, before) = (config.clone(), *at, *leases, own.clone());
        let host = self.host.borrow().clone();
        // What keeps the underlay from being chosen is said before the store is asked.
        let Ok(chosen) = iface::choose(&host, &self.settings.wishes) else { return };
        let mut network = match self.carry(&config, chosen.underlay, &host) {
            Ok(network) => network,
            Err(refusals) => {
                let why = refusals.first().map_or("", |refusal| &refusal.message);
                return self.show_cached(&format!("nothing is made or repaired by it: {why}"), at, leases);
            }
        };
        let Choice::Keep(own) = self.choose(&network, &config, 0) else { return self.leave_leases() };
        network.take(&own.key, Some(&own));
        let stands = Some((LeaseName::from(own.key.to_string()), network.cx.clone()));
        if before != stands {
            tracing::info!(subnet = %own.key, leases, "what the store said last holds until it answers");
            // Whoever is not in it may be known to the kernel alone.
            self.prune = false;
            self.establish(&network, &own).await;
            let all: Vec<LeaseName> = self.leases.names().chain(self.kept.keys()).cloned().collect();
            self.send_peers(&network, &own, all);
            self.cache.held = Some(Held { config, at, leases, own: stands });
        }
        self.stands_on = Some(Box::new((network, *own)));
        self.waits_no_more();
        self.set_state("running");
        self.show_cached("this node goes by it, takes no lease and withdraws nothing", at, leases);
    }

    /// What is to be gone by: what this agent has listed itself, or an earlier one.
    fn look_for_cache(&mut self) {
        if self.seen.is_some() {
            self.cache.held = self.cache.held.take().or_else(|| self.held_listing());
        } else if !std::mem::replace(&mut self.cache.looked_for, true) {
            match self.read_cache() {
                Ok(held) => self.cache.held = held,
                Err(reason) => self.leave_cache(&reason),
            }
        }
    }

    /// What the store said last, taken in as its listing would be; `None`: nothing is known of that.
    fn read_cache(&mut self) -> Result<Option<Held>, String> {
        let bytes = files::read_limited(&self.cache.file, MOST_BYTES).map_err(|error| error.to_string())?;
        let Some(bytes) = bytes else { return Ok(None) };
        let cache = StoreCache::parse(&bytes).map_err(|error| error.to_string())?;
        let config = cache.trusted(&self.source(), &self.state)?;
        self.leases.follow(Rule::new(&config).map_err(|refusal| refusal.message)?);
        let at = cache.at;
        self.leases.reset(cache.into_leases().collect());
        Ok(Some(Held { config, at, leases: self.leases.len(), own: None }))
    }

    /// The listing that was taken last.
    fn held_listing(&self) -> Option<Held> {
        let (config, _) = NetworkConfig::parse(self.cache.config.as_ref()?.as_bytes()).ok()?;
        Some(Held { config, at: now(), leases: self.leases.len(), own: None })
    }

    /// None of the leases is this node's, and none is to be taken.
    fn leave_leases(&mut self) {
        self.cache.held = None;
        if self.seen.is_none() {
            self.leases = LeaseSet::default();
            self.leave_cache("no lease in it is this node's");
        }
    }

    fn leave_cache(&self, reason: &str) {
        tracing::warn!(file = %self.cache.file.display(), "what the store said last is left aside: {reason}");
    }

    fn show_cached(&self, what: &str, at: u64, leases: usize) {
        let age =
            now().checked_sub(at).map_or_else(|| "at a time that this host's clock has yet to come to".into(), ago);
        let evidence = format!("the last listing that is known came {age}, with {leases} leases: {what}");
        self.find("listing-cached", "store", &evidence, "make the store answer (store-away): its word holds at once");
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
