//! What was repaired: the last repairs, so that healing never hides a cause.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::{Op, Step, Why};

/// How many repairs are kept.
const KEPT: usize = 256;

/// One repair: something that had been right was found altered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repair {
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// `create`, `update`, `recreate` or `delete`.
    pub op: String,
    /// The object as it is now, in one line.
    pub object: String,
    /// The object as it was found; `None`: it was not there.
    pub before: Option<String>,
    /// Why the step was taken.
    pub why: Why,
}

/// The last repairs, oldest first.
#[derive(Debug, Default)]
pub struct Journal {
    repairs: VecDeque<Repair>,
    total: u64,
}

impl Journal {
    /// Notes that `step` was done at `unix_ms`.
    pub fn note(&mut self, step: &Step, unix_ms: u64) {
        let before = match &step.op {
            Op::Create(_) => None,
            Op::Update { from, .. } | Op::Recreate { from, .. } => Some(from.to_string()),
            Op::Delete(object) => Some(object.to_string()),
        };
        if self.repairs.len() == KEPT {
            self.repairs.pop_front();
        }
        let (op, object) = (step.op.verb().to_owned(), step.op.object().to_string());
        self.repairs.push_back(Repair { unix_ms, op, object, before, why: step.why });
        self.total += 1;
    }

    /// The repairs that are kept, oldest first.
    pub fn repairs(&self) -> impl DoubleEndedIterator<Item = &Repair> {
        self.repairs.iter()
    }

    /// How many there ever were.
    pub fn total(&self) -> u64 {
        self.total
    }
}
