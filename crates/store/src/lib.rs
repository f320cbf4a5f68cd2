//! Leases in a store, whichever it is: a real etcd, or the embedded server; one client for both.
//!
//! - [`EtcdStore`]: what agents do with the store, in terms of leases
//! - `endpoint`: where it is
//! - [`pem`]: what is wrong with a certificate or a key
//! - [`StoreError`]: what can go wrong, with stable codes

mod client;
mod endpoint;
mod error;
pub mod pem;

use twill_core::lease::RawLease;

pub use client::{EtcdStore, StoreConfig, WatchStream, raw_lease};
pub use error::StoreError;

/// Everything below `<prefix>/subnets/`, at one revision.
#[derive(Debug, Clone, Default)]
pub struct Listing {
    /// The store's revision of this listing: watch from the next one.
    pub revision: i64,
    /// The cluster that answered.
    pub cluster_id: u64,
    /// All entries, in key order.
    pub entries: Vec<RawLease>,
}

/// One thing that a watch tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WatchEvent {
    /// A lease was written.
    Put(RawLease),
    /// A lease is gone: deleted, or its etcd lease ended.
    Delete {
        /// The key's last part.
        name: String,
        /// Revision of the deletion.
        revision: i64,
    },
    /// The network config was written (`Some`) or deleted.
    Config(Option<RawConfig>),
}

/// The value of `<prefix>/config`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawConfig {
    /// The JSON, as it came.
    pub value: Vec<u8>,
    /// Revision of its last change.
    pub mod_rev: i64,
}

/// How a compare-and-swap ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Swap {
    /// Written.
    Done {
        /// The key's new modification revision; of a deletion the revision of it.
        revision: i64,
        /// The etcd lease it hangs on.
        etcd_lease: i64,
    },
    /// Somebody else was first: what stands there now, if anything.
    Lost(Option<RawLease>),
}
