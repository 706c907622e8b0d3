//! Which faults explain how a step has ended, and who was lost?
//!
//! With several faults in a plan, only one that has happened by then explains anything: in the step, since
//! the step before, or earlier if its device has been as it has left it ever since.

use super::{Judge, Violation, in_words, steps};
use crate::plan::{Cause, Injection, Plan};
use crate::sweep::expected::Seen;
use crate::sweep::nature::{self, Nature, nature};
use crate::sweep::observation::{Act, Ended, Event, Observation, Step};
use crate::sweep::principal::Principal;
use standstill_protocol::fault::{Action, Fault, Point};
use std::collections::BTreeSet;

impl Judge {
    /// Whether a fault that was at work explains how this step has ended. `at` is its place among the
    /// events.
    pub(super) fn explains(&self, plan: &Plan, seen: &Observation, at: usize, step: &Step) -> bool {
        let faults = self.at_work(plan, seen, at);
        let devices = faults.iter().map(|&fault| Principal::Device(fault));
        let hooks = step.hooks_fired.iter().filter_map(|&number| plan.hooks.get(number));
        let all: Vec<_> = devices.chain(hooks.map(Principal::Hook)).collect();
        let comes_to = |word: Seen| {
            let knows = |fault: &Principal<'_>| self.words(plan, *fault).contains(&word);
            all.iter().any(knows)
        };
        let fences = || faults.iter().any(|fault| self.may_fence(plan, fault));
        match in_words(step) {
            Seen::Done => self.may_be_done(plan, seen, step),
            // Where all others are says the policy, whichever the fault.
            word @ (Seen::DegradedRunning | Seen::DegradedStopped) => {
                self.degraded(plan, step) == Some(word) && fences()
            }
            // Whoever is lost meanwhile accepts no declaration.
            Seen::Refused => step.act == Act::Declare && (comes_to(Seen::Refused) || fences()),
            word @ (Seen::RolledBack | Seen::Stopped) => comes_to(word),
            Seen::Held => self.may_be_held(plan, seen, step),
            // No step ends so.
            Seen::Lost | Seen::GivenUp | Seen::NotStarted => false,
        }
    }

    /// Everything that the table says may come of a fault; nothing if it does not say.
    fn words(&self, plan: &Plan, fault: Principal<'_>) -> Vec<Seen> {
        let courses = self.courses(plan, fault).map(|(_, courses)| courses).unwrap_or_default();
        courses.into_iter().flat_map(|course| course.seen).collect()
    }

    /// Whether a device can be lost by this fault: as the table says; by what it is, where the table says
    /// nothing; and if it refuses on the way back from what something else has led to.
    fn may_fence(&self, plan: &Plan, fault: &Injection) -> bool {
        let principal = Principal::Device(fault);
        let lost = |word: &Seen| {
            matches!(
                word,
                Seen::DegradedRunning
                    | Seen::DegradedStopped
                    | Seen::Lost
                    | Seen::GivenUp
                    | Seen::NotStarted
            )
        };
        let refuses = matches!(fault.cause, Cause::Inside(Fault { action: Action::Refuse(_), .. }));
        if refuses && plan.faults.len() + plan.hooks.len() > 1 {
            return true;
        }
        match self.courses(plan, principal) {
            Ok(_) => self.words(plan, principal).iter().any(lost),
            Err(_) => nature(&fault.cause, &self.times) != Nature::Lives,
        }
    }

    /// The faults of devices that have something to do with an event: those that have happened in that step
    /// or since the step before, and those whose device has not gone on as ever since an earlier one.
    pub(super) fn at_work<'p>(
        &self,
        plan: &'p Plan,
        seen: &Observation,
        at: usize,
    ) -> Vec<&'p Injection> {
        let now = fired_at(seen, at);
        let before = |number: usize| {
            let earlier = (0..at).rev();
            let mut earlier = earlier.filter(|&at| {
                matches!(seen.events.get(at), Some(Event::Step(step))
                    if step.fired.contains(&number) || step.fired_before.contains(&number))
            });
            earlier.next()
        };
        let lasts = |number: usize, fault: &Injection| {
            let lost = |event: &Event| gone(event).contains(&usize::from(fault.device));
            let since = before(number).and_then(|from| seen.events.get(from..at));
            // Whoever is lost comes back as another process, if at all.
            since.is_some_and(|since| !since.iter().any(lost))
                && !nature::goes_on(&fault.cause, &self.times)
        };
        let numbered = plan.faults.iter().enumerate();
        let at_work = numbered
            .filter(|(number, fault)| now.contains(number) || lasts(*number, fault))
            .map(|(_, fault)| fault);
        at_work.collect()
    }

    /// Whoever is lost or fenced must have a fault by then by which that can be.
    pub(super) fn innocents(&self, plan: &Plan, seen: &Observation, found: &mut Vec<Violation>) {
        for (at, event) in seen.events.iter().enumerate() {
            let is_guilty = |device: usize| {
                let of_it = |fault: &&Injection| usize::from(fault.device) == device;
                match event {
                    // Only who fails each time has no attempt left.
                    Event::GivenUp { .. } => plan.faults.iter().filter(of_it).any(fails_each_time),
                    _ => {
                        let mut own = self.at_work(plan, seen, at).into_iter().filter(of_it);
                        own.any(|fault| self.may_fence(plan, fault))
                    }
                }
            };
            let round = match event {
                Event::Step(step) => step.round,
                Event::Lost { round, .. } | Event::GivenUp { round, .. } => *round,
                Event::NotStarted { .. } => 1,
            };
            let innocent = gone(event).into_iter().filter(|device| !is_guilty(*device));
            found.extend(innocent.map(|device| Violation::Innocent { round, device }));
        }
    }
}

/// The faults that have happened in that step, or between the steps before and after it; between two steps if
/// it is none.
fn fired_at(seen: &Observation, at: usize) -> BTreeSet<usize> {
    if let Some(Event::Step(step)) = seen.events.get(at) {
        return &step.fired | &step.fired_before;
    }
    // What has happened between two steps is written down with the second one; with the first one if it was
    // waited for there.
    let all = |(number, fired): (usize, &bool)| fired.then_some(number);
    let step = |event: &Event| match event {
        Event::Step(step) => Some(step.clone()),
        Event::Lost { .. } | Event::GivenUp { .. } | Event::NotStarted { .. } => None,
    };
    let (earlier, later) = seen.events.split_at(at.min(seen.events.len()));
    let mut fired = match later.iter().find_map(step) {
        Some(next) => next.fired_before,
        None => {
            let told: BTreeSet<_> =
                steps(seen).flat_map(|step| &step.fired | &step.fired_before).collect();
            let all: BTreeSet<_> = seen.fired.iter().enumerate().filter_map(all).collect();
            &all - &told
        }
    };
    if let Some(last) = earlier.iter().rev().find_map(step) {
        fired.extend(last.fired);
    }
    fired
}

/// The devices that are lost by then and were not before.
fn gone(event: &Event) -> BTreeSet<usize> {
    match event {
        Event::Step(Step { ended: Ended::Degraded { fenced }, .. }) => fenced.clone(),
        Event::Step(_) => BTreeSet::new(),
        Event::Lost { device, .. }
        | Event::GivenUp { device, .. }
        | Event::NotStarted { device, .. } => BTreeSet::from([*device]),
    }
}

/// Whether none of the processes of a device greets as it should.
fn fails_each_time(fault: &Injection) -> bool {
    matches!(&fault.cause, Cause::Inside(fault) if fault.point == Point::Hello && fault.nth == 0)
}
