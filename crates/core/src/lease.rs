//! Leases: who holds which subnet, as the store says.
//!
//! ```text
//! store entry ──parse──▶ Lease ──resolve──▶ Peer      (programmed)
//!      └─ LeaseFault (skipped)    └─ PeerFault (skipped, named in `status`)
//! ```

use std::net::IpAddr;

use crate::flannel::attrs;
pub use crate::flannel::attrs::LeaseAttrs;
use crate::net::{MacAddr, Prefix};
use crate::words::written_out;

/// One key below `<prefix>/subnets/`, as it came from the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawLease {
    /// What follows `<prefix>/subnets/`, e.g. `10.1.15.0-24`.
    pub name: String,
    /// The value's bytes.
    pub value: Vec<u8>,
    /// Store revision that created the key; the lower one wins a collision.
    pub create_rev: i64,
    /// Store revision that last changed the key: the compare value of every write.
    pub mod_rev: i64,
    /// The etcd lease that the key hangs on; 0: none (a reservation).
    pub etcd_lease: i64,
}

/// The subnets that a key names. At least one is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseKey {
    /// IPv4 subnet.
    pub v4: Option<Prefix>,
    /// IPv6 subnet.
    pub v6: Option<Prefix>,
}

impl LeaseKey {
    /// Its subnets, IPv4 first.
    pub fn subnets(&self) -> impl Iterator<Item = Prefix> + use<> {
        [self.v4, self.v6].into_iter().flatten()
    }
}

impl Lease {
    /// Reads a store entry.
    pub fn parse(raw: &RawLease) -> Result<Lease, PeerFault> {
        Self::read(&raw.name, &raw.value, (raw.create_rev, raw.mod_rev, raw.etcd_lease))
    }

    /// Reads a store entry in parts: name, value, and create revision, last revision, etcd lease.
    pub(crate) fn read(name: &str, value: &[u8], numbers: (i64, i64, i64)) -> Result<Lease, PeerFault> {
        let fault = |code, reason: String| PeerFault { name: name.to_owned(), code, reason };
        let key = name.parse().map_err(|e| fault("bad-lease-key", format!("its key: {e}")))?;
        let attrs = attrs::parse(value).map_err(|e| fault("bad-lease-value", e.to_string()))?;
        let (create_rev, mod_rev, etcd_lease) = numbers;
        Ok(Lease { key, attrs, create_rev, mod_rev, etcd_lease })
    }

    /// True when the holder says that it is at one of these addresses.
    pub fn is_at(&self, addresses: &[IpAddr]) -> bool {
        let told = [self.attrs.public_ip.map(IpAddr::V4), self.attrs.public_ipv6.map(IpAddr::V6)];
        told.into_iter().flatten().any(|ip| addresses.contains(&ip))
    }

    /// The MACs of the holder's tunnel devices, IPv4 first, as far as they can be read.
    pub fn vtep_macs(&self) -> [Option<MacAddr>; 2] {
        [&self.attrs.backend_data, &self.attrs.backend_v6_data].map(|data| {
            let fields = data.as_ref()?.as_object()?;
            fields.iter().rfind(|(key, _)| key.eq_ignore_ascii_case("VtepMAC"))?.1.as_str()?.parse().ok()
        })
    }

    /// A fault of this lease.
    pub fn fault(&self, code: &'static str, reason: impl Into<String>) -> PeerFault {
        PeerFault { name: self.key.to_string(), code, reason: reason.into() }
    }
}

/// A lease that could be read.
#[derive(Debug, Clone, PartialEq)]
pub struct Lease {
    /// Its subnets.
    pub key: LeaseKey,
    /// Its value.
    pub attrs: LeaseAttrs,
    /// As in [`RawLease`].
    pub create_rev: i64,
    /// As in [`RawLease`].
    pub mod_rev: i64,
    /// As in [`RawLease`].
    pub etcd_lease: i64,
}

/// Another node, ready to be programmed by a backend.
#[derive(Debug, Clone, PartialEq)]
pub struct Peer {
    /// Its lease.
    pub lease: Lease,
}

/// Why a peer is left out; named in `status`, never disturbs another peer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("lease {}: {}", written_out(name, &[]), written_out(reason, &[]))]
pub struct PeerFault {
    /// The store key's last part.
    pub name: String,
    /// Stable kebab-case code, e.g. `bad-lease-key`, `subnet-overlap`, `mac-clash`, `foreign-backend`.
    pub code: &'static str,
    /// What is wrong and what is allowed.
    pub reason: String,
}
