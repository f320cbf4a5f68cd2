//! The twin of a network namespace: a map and [`effect`].

use std::time::Duration;

use twill_core::host::HostState;
use twill_core::reconcile::{Changes, Op, Outcome, Plan, Scope, effect};

use crate::{Kernel, KernelError};

/// A network namespace in memory.
#[derive(Debug, Default)]
pub struct MemoryKernel {
    state: HostState,
    pending: Changes,
}

impl MemoryKernel {
    /// Does something behind the reconciler's back.
    pub fn meddle(&mut self, op: &Op) {
        effect(&mut self.state, op);
        self.pending.dirty.insert(op.object().key());
        self.pending.all = true;
    }
}

impl Kernel for MemoryKernel {
    fn mirror(&self) -> &HostState {
        &self.state
    }

    fn read(&mut self, _scope: Scope<'_>) -> Result<(), KernelError> {
        Ok(())
    }

    fn apply(&mut self, plan: &Plan) -> Outcome {
        plan.steps.iter().for_each(|step| effect(&mut self.state, &step.op));
        Outcome { steps: plan.steps.iter().map(|_| Ok(())).collect() }
    }

    fn changes(&mut self, _timeout: Option<Duration>) -> Result<Changes, KernelError> {
        Ok(std::mem::take(&mut self.pending))
    }
}
