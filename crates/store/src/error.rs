//! What can go wrong with a store.

/// A store's error, for a person: what was done, to which endpoint, and why it failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No endpoint answers; waiting helps.
    #[error("{act}: no store answers at {endpoints}: {reason}")]
    Away {
        /// The act.
        act: &'static str,
        /// Where.
        endpoints: String,
        /// The last word.
        reason: String,
    },
    /// It answers, and refuses us.
    #[error("{act}: the store at {endpoints} refuses: {reason}")]
    Denied {
        /// The act.
        act: &'static str,
        /// Where.
        endpoints: String,
        /// Its word.
        reason: String,
    },
    /// The revisions that a watch asked for are gone; list again.
    #[error("watch the store: the revisions since {from} have been compacted")]
    Compacted {
        /// The revision that was asked for.
        from: i64,
    },
    /// An endpoint, certificate or key cannot be used.
    #[error("{what}: {reason}")]
    Config {
        /// Which setting.
        what: String,
        /// Why, and what is allowed.
        reason: String,
    },
}

impl StoreError {
    /// The stable code.
    pub const fn code(&self) -> &'static str {
        match self {
            StoreError::Away { .. } => "store-away",
            StoreError::Denied { .. } => "store-denied",
            StoreError::Compacted { .. } => "store-compacted",
            StoreError::Config { .. } => "store-config",
        }
    }

    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            StoreError::Away { endpoints, .. } if endpoints.contains("https:") => {
                "start it, or name another with --store; if it runs: --ca is who signed its certificate, --cert and --key are ours"
            }
            StoreError::Away { .. } => {
                "start it, or name another with --store http://ADDRESS:2379; a store with certificates has https://"
            }
            StoreError::Denied { .. } => "check --user, --password-file, --cert, --key and --ca",
            StoreError::Compacted { .. } => "list the leases again",
            StoreError::Config { .. } => "see twill agent --help",
        }
    }
}
