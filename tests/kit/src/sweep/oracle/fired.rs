//! Has each fault happened? And if one has that leaves a step no way to be Done, was it not?

use super::{Judge, Violation, has_not_started, in_words};
use crate::plan::{Cause, HookFault, Injection, Outside, OutsideAction, Plan, Policy};
use crate::sweep::Times;
use crate::sweep::expected::Seen;
use crate::sweep::nature::{self, Nature, Place, nature};
use crate::sweep::observation::{Act, Ended, Event, Observation, Step};
use crate::sweep::principal::{HookNature, Principal, hook_nature, principals};
use crate::trace::Call;
use standstill_protocol::fault::{Action, Fault, Forgery};
use standstill_protocol::transition::MachineState;
use std::collections::BTreeSet;

impl Judge {
    /// Every fault that has not happened proves nothing. With several faults one may keep another from
    /// happening: it is none's fault if its device was lost or hung before, or if the machine never
    /// came to where it was to happen.
    pub(super) fn fired(&self, plan: &Plan, seen: &Observation, found: &mut Vec<Violation>) {
        let has = |at: usize| seen.fired.get(at).copied().unwrap_or(false);
        let principals = principals(plan);
        let numbered = || plan.faults.iter().enumerate();
        let own = |fault| principals.contains(&Principal::Device(fault));
        let any =
            numbered().any(|(at, fault)| own(fault) && has(at)) || !seen.hooks_fired.is_empty();
        let excuses = any && principals.len() > 1;
        for (at, fault) in numbered().filter(|(at, _)| !has(*at)) {
            if !excuses || comes_to(plan, at, fault, seen, &self.times) {
                found.push(Violation::Unfired(fault.clone()));
            }
        }
        for (_, hook) in (0..).zip(&plan.hooks).filter(|(at, _)| !seen.hooks_fired.contains(at)) {
            if !excuses || has_been_called(hook, seen) {
                found.push(Violation::UnfiredHook(*hook));
            }
        }
    }

    /// A fault that has happened in that step, of several, by which it cannot be Done. `at` is the
    /// step's place among the events.
    pub(super) fn not_done(
        &self,
        plan: &Plan,
        seen: &Observation,
        at: usize,
        step: &Step,
    ) -> Option<Injection> {
        let of = |numbers: &BTreeSet<usize>| -> Vec<&Injection> {
            numbers.iter().filter_map(|&number| plan.faults.get(number)).collect()
        };
        let (earlier, within) = (of(&step.fired_before), of(&step.fired));
        let before = seen.events.get(..at).unwrap_or_default();
        let since = before.rsplit(|event| matches!(event, Event::Step(_))).next();
        let lost_since = |fault: &Injection| {
            let lost = |event: &Event| matches!(event, Event::Lost { device, .. } if *device == usize::from(fault.device));
            since.unwrap_or_default().iter().any(lost)
        };
        let mended = |fault: &Injection| {
            let others = || earlier.iter().chain(&within).filter(|other| **other != fault);
            others().any(|other| other.device == fault.device && mends(&other.cause))
        };
        let excludes = |fault: &&Injection| {
            let Ok((place, courses)) = self.courses(plan, Principal::Device(fault)) else {
                return false;
            };
            let Some((index, at_once)) = word_of(place, step.act) else { return false };
            let its_own = if at_once { &within } else { &earlier };
            if !its_own.contains(fault) {
                return false;
            }
            let done = |word: Option<&Seen>| matches!(word, None | Some(Seen::Done | Seen::Lost));
            !courses.iter().any(|course| done(course.seen.get(index)))
        };
        let mut faults = earlier.iter().chain(&within).copied();
        faults.find(|fault| !lost_since(fault) && !mended(fault) && excludes(fault)).cloned()
    }

    /// Whether a step that is Done in a plan of several faults can be.
    pub(super) fn may_be_done(&self, plan: &Plan, seen: &Observation, step: &Step) -> bool {
        let same = |event: &Event| matches!(event, Event::Step(other) if std::ptr::eq(other, step));
        let at = seen.events.iter().position(same).unwrap_or(0);
        in_words(step) != Seen::Done
            || (!self.excludes_done(plan, step) && self.not_done(plan, seen, at, step).is_none())
    }

    /// Whether a hook has failed or hung in that step, wherever in it.
    pub(super) fn excludes_done(&self, plan: &Plan, step: &Step) -> bool {
        let slow = |fault| hook_nature(fault, &self.times) == HookNature::Slow;
        hooks(plan, step).any(|fault| !slow(fault))
    }

    /// Whether a step of several faults can end in Held: a hook has hung in it; or one has failed on the
    /// way back from what another fault has led to.
    pub(super) fn may_be_held(&self, plan: &Plan, seen: &Observation, step: &Step) -> bool {
        let back = match (step.act, plan.policy) {
            (Act::Pause, Policy::StayStopped) | (Act::Resume, _) => Call::Stop,
            (Act::Pause, _) => Call::Start,
            (Act::Declare | Act::TakeOver, _) => return false,
        };
        let holds = |fault: &HookFault| match hook_nature(fault, &self.times) {
            HookNature::Hangs => true,
            HookNature::Fails => fault.call == back && has_another_reason(seen, step),
            HookNature::Slow => false,
        };
        hooks(plan, step).any(holds)
    }
}

/// The faults of hooks that have fired in that step.
fn hooks<'p>(plan: &'p Plan, step: &Step) -> impl Iterator<Item = &'p HookFault> {
    let fired = step.hooks_fired.clone();
    fired.into_iter().filter_map(|number| plan.hooks.get(number))
}

/// Whether another fault has fired by the end of that step than one of a hook in it.
fn has_another_reason(seen: &Observation, step: &Step) -> bool {
    if step.hooks_fired.len() > 1 {
        return true;
    }
    for event in &seen.events {
        let Event::Step(earlier) = event else { continue };
        if !earlier.fired_before.is_empty() || !earlier.fired.is_empty() {
            return true;
        }
        if std::ptr::eq(earlier, step) {
            break;
        }
    }
    false
}

/// Whether a hook was called as often as it takes: once at least in all that is Done.
fn has_been_called(fault: &HookFault, seen: &Observation) -> bool {
    let act = match fault.call {
        Call::Stop => Act::Pause,
        Call::Start => Act::Resume,
    };
    let done = |event: &&Event| matches!(event, Event::Step(step) if step.act == act && step.ended == Ended::Done);
    seen.events.iter().filter(done).count() as u64 >= u64::from(fault.round)
}

/// Which word of a fault's course is about a step, and whether of one that has happened in it, or
/// between the step before and it.
fn word_of(place: Place, act: Act) -> Option<(usize, bool)> {
    match (place.column, act) {
        ("memory", Act::Declare)
        | ("PrepareStop" | "Stop", Act::Pause)
        | ("PrepareStart" | "Start", Act::Resume) => Some((0, true)),
        ("running" | "mmio" | "dma" | "dma-in-flight", Act::Pause) => Some((0, false)),
        // The pause was before it.
        ("stopped", Act::Resume) => Some((1, false)),
        _ => None,
    }
}

/// Whether an answer that counts may come from the device all the same, with another fault beside it:
/// a second one, or one in which two forgeries cancel each other.
fn mends(cause: &Cause) -> bool {
    match cause {
        Cause::Inside(Fault { action: Action::Forge(forgery), .. }) => {
            !matches!(forgery, Forgery::State | Forgery::Declaration)
        }
        Cause::Inside(Fault { action: Action::TwoAcks, .. })
        | Cause::Outside(Outside { action: OutsideAction::Duplicate, .. }) => true,
        Cause::Inside(_) | Cause::Outside(_) => false,
    }
}

/// Whether a machine has come as often to where that fault was to happen as it takes, with the device
/// alive and well.
fn comes_to(plan: &Plan, at: usize, fault: &Injection, seen: &Observation, times: &Times) -> bool {
    let Some(place) = nature::place(fault) else { return false };
    if place.column == nature::HELLO {
        // Everybody has greeted before the machine has started.
        return !has_not_started(seen);
    }
    let device = usize::from(fault.device);
    let needed = match &fault.cause {
        Cause::Inside(inside) => inside.nth.max(1),
        Cause::Outside(_) => 1,
    };
    // Another fault by which the device is not what it was.
    let disables = |number: &usize| {
        let other = plan.faults.get(*number).filter(|other| other.device == fault.device);
        other.filter(|_| *number != at).filter(|other| {
            nature(&other.cause, times) != Nature::Lives || !nature::goes_on(&other.cause, times)
        })
    };
    let (mut reached, mut disabled) = (0, false);
    for (number, event) in seen.events.iter().enumerate() {
        let (round, lost) = match event {
            Event::Step(step) => {
                disabled |= step.fired_before.iter().any(|number| disables(number).is_some());
                let lost =
                    matches!(&step.ended, Ended::Degraded { fenced } if fenced.contains(&device));
                let before = |other: &Injection| !comes_later(other, place);
                let mut disabled_before =
                    disabled || step.fired.iter().filter_map(disables).any(before);
                if place.column == "stopped" {
                    // While the machine stands, which comes first of two is not known.
                    let mut later = seen.events.iter().skip(number + 1);
                    let next = later.find_map(|event| match event {
                        Event::Step(next) => Some(&next.fired_before),
                        _ => None,
                    });
                    disabled_before |=
                        next.into_iter().flatten().any(|other| disables(other).is_some());
                }
                if comes_in(place, fault.round, step) && !lost && !disabled_before {
                    reached += 1;
                }
                disabled |= step.fired.iter().any(|number| disables(number).is_some());
                (step.round, lost)
            }
            Event::Lost { round, device: lost } => (*round, *lost == device),
            Event::GivenUp { .. } => continue,
            Event::NotStarted { .. } => return false,
        };
        if lost && (plan.policy != Policy::Restart || round >= fault.round) {
            return reached >= needed;
        }
        // It is another process then.
        disabled &= !lost;
    }
    if place.column == "shutdown" && !disabled && !ends_held(seen) {
        reached += 1;
    }
    reached >= needed
}

/// Whether all of a machine has come to that place in that step, for a fault from that round on.
fn comes_in(place: Place, round: u32, step: &Step) -> bool {
    let done = step.ended == Ended::Done && step.round >= round;
    match (place.column, step.act) {
        ("PrepareStop" | "Stop" | "dma" | "dma-in-flight", Act::Pause)
        | ("PrepareStart" | "Start", Act::Resume)
        | ("memory", Act::Declare) => done,
        ("mmio", Act::Pause) => done && step.round == round,
        // What happens there is nothing that a device does.
        ("running", Act::Pause) => step.round == round,
        ("stopped", Act::Pause) => step.round == round && step.machine == MachineState::Stopped,
        _ => false,
    }
}

/// Whether a fault is certain to come after that place in one and the same step.
fn comes_later(fault: &Injection, place: Place) -> bool {
    let rank = |place: Place| {
        let column = match place.column {
            "PrepareStop" | "PrepareStart" => 0,
            "Stop" | "Start" => 1,
            _ => return None,
        };
        let row = match place.row {
            "command" => 0,
            "receipt" => 1,
            "before-ack" => 2,
            // What a device does after its answer may come before the answer is there.
            _ => 3,
        };
        Some((column, row))
    };
    match (nature::place(fault).and_then(rank), rank(place)) {
        (Some(own), Some(other)) => own > other,
        _ => false,
    }
}

fn ends_held(seen: &Observation) -> bool {
    let last = seen.events.iter().rev().find_map(|event| match event {
        Event::Step(step) => Some(step.machine),
        Event::Lost { .. } | Event::GivenUp { .. } | Event::NotStarted { .. } => None,
    });
    last == Some(MachineState::Held)
}
