//! The hooks of a machine while its plan is run: one for each place where the plan has a fault.

use super::Times;
use super::engine::RunError;
use super::principal::{HookNature, hook_nature};
use crate::outside::{FaultyHook, HookFaults};
use crate::plan::Plan;
use crate::trace::Trace;
use standstill_coordinator::MachineBuilder;
use std::collections::BTreeSet;

/// What is known of the faults of hooks. Calls that do not return end when this is dropped.
#[derive(Default)]
pub(super) struct Hooks {
    hooks: Vec<HookFaults>,
    /// The faults that were written down with the step in which they have fired.
    told: BTreeSet<usize>,
    /// Hooks write to it.
    _trace: Option<Trace>,
}

impl Hooks {
    /// Adds the hooks of a plan to its machine. One that will hang has a short deadline.
    pub(super) fn add(
        plan: &Plan,
        times: &Times,
        mut builder: MachineBuilder,
    ) -> Result<(MachineBuilder, Self), RunError> {
        if plan.hooks.is_empty() {
            return Ok((builder, Self::default()));
        }
        let failed = |source| RunError::System { what: "make hooks", source };
        let trace = Trace::new().map_err(failed)?;
        let mut hooks = Vec::new();
        for (spec, hook, faults) in FaultyHook::of(&plan.hooks, &trace).map_err(failed)? {
            let mut own = plan.hooks.iter().filter(|fault| fault.place == faults.place());
            let hangs = own.any(|fault| hook_nature(fault, times) == HookNature::Hangs);
            let deadline = if hangs { times.short } else { times.long };
            builder = builder.hook(spec.deadline(deadline), hook);
            hooks.push(faults);
        }
        Ok((builder, Self { hooks, told: BTreeSet::new(), _trace: Some(trace) }))
    }

    /// The faults that have happened since this was asked last, by their number in the plan.
    pub(super) fn newly_fired(&mut self) -> BTreeSet<usize> {
        let new: BTreeSet<_> = self.fired().difference(&self.told).copied().collect();
        self.told.extend(&new);
        new
    }

    /// All that have happened.
    pub(super) fn fired(&self) -> BTreeSet<usize> {
        let fired = self.hooks.iter().flat_map(HookFaults::fired);
        fired.filter_map(|fired| usize::try_from(fired.index).ok()).collect()
    }
}
