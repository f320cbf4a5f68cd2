//! Leases in a store, whichever it is.

use twill_core::lease::RawLease;

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
#[derive(Debug, Clone)]
pub enum WatchEvent {
    /// A key was written.
    Put(RawLease),
    /// A key is gone (deleted, or its etcd lease ended).
    Delete {
        /// The key's last part.
        name: String,
        /// Revision of the deletion.
        revision: i64,
    },
    /// The network config was written (`Some`) or deleted.
    Config(Option<RawConfig>),
    /// All up to this revision has been told.
    Progress(i64),
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
#[derive(Debug, Clone)]
pub enum Swap {
    /// Written, at this revision.
    Done {
        /// The key's new modification revision.
        revision: i64,
        /// The etcd lease it hangs on.
        etcd_lease: i64,
    },
    /// Somebody else was first: what stands there now, if anything.
    Lost(Option<RawLease>),
}
