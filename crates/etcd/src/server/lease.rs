//! Leases: who expires when. Pure: `now` is the time since the server's start.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::mvcc::Refused;

/// etcd's limit on a TTL, in seconds (`lease.MaxLeaseTTL`).
const LONGEST: i64 = 9_000_000_000;
/// etcd's shortest TTL with its default election timeout, in seconds (`lease.minLeaseTTL`).
const SHORTEST: i64 = 2;

/// One lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// Seconds that were granted.
    pub ttl: i64,
    /// When it ends, unless it is kept alive.
    pub ends: Duration,
}

/// All leases.
#[derive(Debug, Default)]
pub struct Leases {
    by_id: BTreeMap<i64, Lease>,
    by_end: BTreeSet<(Duration, i64)>,
}

impl Leases {
    /// Grants `ttl` seconds to `id`; gives the seconds that it really has.
    pub fn grant(&mut self, id: i64, ttl: i64, now: Duration) -> Result<i64, Refused> {
        if ttl > LONGEST {
            return Err(Refused::LeaseTooLong);
        }
        if self.by_id.contains_key(&id) {
            return Err(Refused::LeaseExists);
        }
        let ttl = ttl.max(SHORTEST);
        let ends = now + Duration::from_secs(ttl as u64);
        self.by_id.insert(id, Lease { ttl, ends });
        self.by_end.insert((ends, id));
        Ok(ttl)
    }

    /// Ends a lease; false: there is none.
    pub fn revoke(&mut self, id: i64) -> bool {
        let Some(lease) = self.by_id.remove(&id) else { return false };
        self.by_end.remove(&(lease.ends, id));
        true
    }

    /// Starts the TTL anew; gives it, or `None` where there is no such lease.
    pub fn keep_alive(&mut self, id: i64, now: Duration) -> Option<i64> {
        let lease = self.by_id.get_mut(&id)?;
        self.by_end.remove(&(lease.ends, id));
        lease.ends = now + Duration::from_secs(lease.ttl as u64);
        self.by_end.insert((lease.ends, id));
        Some(lease.ttl)
    }

    /// A lease.
    pub fn get(&self, id: i64) -> Option<&Lease> {
        self.by_id.get(&id)
    }

    /// All ids.
    pub fn ids(&self) -> impl Iterator<Item = i64> + '_ {
        self.by_id.keys().copied()
    }

    /// When the next one ends.
    pub fn next_end(&self) -> Option<Duration> {
        self.by_end.first().map(|(ends, _)| *ends)
    }

    /// A lease that has ended by now.
    pub fn ended(&self, now: Duration) -> Option<i64> {
        self.by_end.first().filter(|(ends, _)| *ends <= now).map(|(_, id)| *id)
    }
}
