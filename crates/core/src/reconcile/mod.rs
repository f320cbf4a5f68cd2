//! From what is wanted and what is there to an ordered list of steps that a person can read.
//!
//! ```text
//!            want: Desired ──┐
//!                            ├─ plan ─▶ Plan = [Step] ─ kernel::apply ─▶ Outcome
//!  have: HostState (mirror) ─┘                effect = the kernel's answer, cascades included
//! ```

mod claim;
mod display;
mod effect;
mod heal;
mod journal;
mod plan;
mod shadow;
mod taken;
mod wanted;

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::host::{HostState, Key, Object};

pub use claim::Claim;
pub use effect::effect;
pub use heal::Healer;
pub use journal::{Journal, Repair};
pub use plan::plan;
pub use shadow::shadowed;
pub use taken::{taken_tables, taken_tunnels};
pub use wanted::Wanted;

/// What the node should look like.
#[derive(Debug, Clone, Default)]
pub struct Desired {
    /// Every object that Twill wants.
    pub host: HostState,
    /// What is Twill's to change and to remove.
    pub claim: Claim,
}

/// Which keys a plan or a read looks at.
#[derive(Debug, Clone, Copy)]
pub enum Scope<'a> {
    /// Everything.
    All,
    /// These keys alone.
    Keys(&'a BTreeSet<Key>),
}

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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Why {
    /// Wanted, and not there.
    Missing,
    /// There, with other fields.
    Differs,
    /// There, with fields that need a re-creation.
    CannotChangeInPlace,
    /// It stands there under another name.
    Renamed,
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

/// Something that a person should know: what, the evidence, and the way out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable kebab-case code.
    pub code: String,
    /// What it is about, as one line.
    pub object: String,
    /// The fact that shows it.
    pub evidence: String,
    /// What to do.
    pub fix: String,
}

impl Op {
    /// The object as it will be, or as it was when it goes.
    pub fn object(&self) -> &Object {
        match self {
            Op::Create(object) | Op::Delete(object) => object,
            Op::Update { to, .. } | Op::Recreate { to, .. } => to,
        }
    }

    /// `create`, `update`, `recreate` or `delete`.
    pub fn verb(&self) -> &'static str {
        match self {
            Op::Create(_) => "create",
            Op::Update { .. } => "update",
            Op::Recreate { .. } => "recreate",
            Op::Delete(_) => "delete",
        }
    }
}
