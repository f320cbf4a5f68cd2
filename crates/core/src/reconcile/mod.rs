//! From what is wanted and what is there to an ordered list of steps that a person can read.
//!
//! ```text
//!            want: Desired ──┐
//!                            ├─ plan ─▶ Plan = [Step] ─ kernel::apply ─▶ Outcome
//!  have: HostState (mirror) ─┘                effect = the kernel's answer, cascades included
//! ```

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::host::{HostState, Key, Object};
use crate::net::{LinkName, Prefix};

/// What the node should look like.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Every object that Twill wants.
    pub host: HostState,
    /// What is Twill's to change and to remove.
    pub claim: Claim,
}

/// What is ours. Everything else is looked at and left alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Claim {
    /// Our devices (the wanted one and those that the state file remembers), with all addresses, permanent neighbours
    /// and permanent forwarding entries on them.
    pub devices: BTreeSet<LinkName>,
    /// Routes with this protocol number, in any table.
    pub protocol: Option<u8>,
    /// Boot-protocol routes inside these networks on our devices: what flannel left.
    pub networks: Vec<Prefix>,
}

/// Which keys a plan or a read looks at.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// Everything.
    All,
    /// These keys alone.
    Keys(&'a BTreeSet<Key>),
}

/// What this kernel can do beyond Linux 6.1. Grows with the features that are probed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Caps {}

/// Steps in an order that can be applied one after the other.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
}

/// Position of a step in its plan.
pub type StepId = u32;

/// One change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What to do.
    pub op: Op,
    /// Steps that must have worked before this one makes sense.
    pub needs: Vec<StepId>,
    /// The reason, for the log and for `plan`.
    pub why: Why,
}

/// A change to one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    /// It is not there.
    Create(Object),
    /// It is there with other fields, and can change in place.
    Update {
        /// As found.
        from: Object,
        /// As wanted.
        to: Object,
    },
    /// It is there with fields that the kernel cannot change: delete and make anew.
    Recreate {
        /// As found.
        from: Object,
        /// As wanted.
        to: Object,
    },
    /// It is ours and not wanted.
    Delete(Object),
}

/// Why a step is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Wanted, and not there.
    Missing,
    /// There, with other fields.
    Differs,
    /// There, with fields that need a re-creation.
    CannotChangeInPlace,
    /// Ours, and nothing wants it.
    NotWanted,
    /// The kernel dropped or will drop it with an earlier step of this plan.
    Cascade,
}

/// What came of each step; as long as the plan.
#[derive(Debug, Default)]
pub struct Outcome {
    /// `Ok`: done. `Err`: the kernel's word. A skipped step says so.
    pub steps: Vec<Result<(), StepError>>,
}

/// Why a step was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The kernel refused.
    #[error("{text}")]
    Refused {
        /// Errno, positive.
        errno: i32,
        /// The kernel's extended acknowledgement, or errno's text.
        text: String,
    },
    /// A step that it needs had failed.
    #[error("skipped: step {0} failed")]
    Skipped(StepId),
}

/// What changed in the mirror since it was last asked.
#[derive(Debug, Default, Clone)]
pub struct Changes {
    /// Keys that may differ now.
    pub dirty: BTreeSet<Key>,
    /// Everything was read anew (start, overrun, audit): plan with [`Scope::All`].
    pub all: bool,
}

/// Wanted objects by the peer that wants them; the shape of incremental work.
pub type ByPeer = BTreeMap<String, Vec<Object>>;
