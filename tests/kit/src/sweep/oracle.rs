//! Was everything as it must be? Pure checks of what was seen of one run.
//!
//! - the outcome is the one that the [table](Expected) says for the fault; with several faults, one that
//!   some of them explain;
//! - all that survive are in one state, by the machine's status and by their own last answers;
//! - each fault has fired, unless another one kept its device or the machine from getting there: one
//!   that has not proves nothing;
//! - nothing was written while the machine stood still, except by a liar, of whom it must be found;
//! - everybody who is not faulty goes on working;
//! - every call kept the deadlines in force, and a small grace;
//! - no process is left.

mod accepts;
mod explained;
mod fired;
#[cfg(test)]
mod tests;

use super::Times;
use super::deadlines::HELLOS;
use super::expected::{Course, Expected, Seen, trim};
use super::nature::{self, AFTER_LAST_ACK, LAST_ANSWER, Nature, Place, nature};
use super::observation::{Act, Ended, Event, Observation, Step, Survivor};
use super::principal::{
    HOOK_ON_START, HOOK_ON_STOP, HookNature, Principal, hook_nature, principals,
};
use crate::plan::{Cause, HookAction, HookFault, Injection, Plan, Policy};
use standstill_protocol::fault::{Action, Fault, Point};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// Something was not as it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// The plan could not be run to its end.
    Unfinished(String),
    /// The table does not say what comes of this fault.
    NotInTheTable(String),
    /// Something else came of the fault than the table says.
    Outcome {
        /// What the table says.
        expected: Vec<Course>,
        /// What was seen.
        found: Course,
    },
    /// No fault of the plan explains how this ended.
    Unexplained {
        /// In which round.
        round: u32,
        /// What was asked.
        act: Act,
        /// How it ended.
        ended: Ended,
    },
    /// A device without any fault was fenced, or lost.
    Innocent {
        /// In which round.
        round: u32,
        /// Which device.
        device: usize,
    },
    /// A device that counts is not where the machine is.
    Scattered {
        /// In which round.
        round: u32,
        /// After what.
        act: Act,
        /// Where the machine is.
        machine: MachineState,
        /// Which device.
        device: usize,
        /// Where the status says that it is.
        status: Option<MigrationState>,
        /// Where its own last answer says that it is.
        answered: Option<MigrationState>,
    },
    /// A fault has not happened: what was seen proves nothing.
    Unfired(Injection),
    /// The same of a fault of a hook.
    UnfiredHook(HookFault),
    /// Something moved while the machine stood still.
    Late {
        /// In which round.
        round: u32,
        /// What.
        what: String,
    },
    /// A liar wrote while the machine stood still, and nothing noticed.
    Blind {
        /// In which round.
        round: u32,
    },
    /// Something does not work any more although the machine runs.
    Idle {
        /// After which round.
        round: u32,
        /// What.
        what: String,
    },
    /// A call took longer than it may.
    Slow {
        /// In which round.
        round: u32,
        /// What was asked.
        act: Act,
        /// How long it took.
        took: Duration,
        /// How long it may take.
        limit: Duration,
    },
    /// A process was left.
    Left(String),
}

/// What runs are judged by.
#[derive(Clone, Debug)]
pub struct Judge {
    /// What is to come of each fault.
    pub expected: Expected,
    /// How long things may take.
    pub times: Times,
    /// Whether a liar is known to be one: then it must be found to write late, else it is as bad as
    /// anybody who does.
    pub knows_liars: bool,
}

impl Judge {
    /// Checks everything about one run.
    #[must_use]
    pub fn violations(&self, plan: &Plan, seen: &Observation) -> Vec<Violation> {
        let mut found = Vec::new();
        self.outcomes(plan, seen, &mut found);
        for step in steps(seen) {
            one_state(step, &mut found);
            self.in_time(plan, step, &mut found);
        }
        self.innocents(plan, seen, &mut found);
        self.fired(plan, seen, &mut found);
        self.late(plan, seen, &mut found);
        let idle = seen.idle.iter().map(|(round, what)| (*round, what.clone()));
        found.extend(idle.map(|(round, what)| Violation::Idle { round, what }));
        found.extend(seen.left.iter().cloned().map(Violation::Left));
        found
    }

    fn outcomes(&self, plan: &Plan, seen: &Observation, found: &mut Vec<Violation>) {
        match principals(plan)[..] {
            [] => everything_is_done(seen, found),
            [fault] => self.one_fault(plan, fault, seen, found),
            ref faults => self.several(plan, faults, seen, found),
        }
    }

    /// What the table says of a fault: every course that is possible.
    fn courses(
        &self,
        plan: &Plan,
        fault: Principal<'_>,
    ) -> Result<(Place, Vec<Course>), Violation> {
        let missing = || Violation::NotInTheTable(format!("{fault} under {}", plan.policy));
        let word = fault.word(&self.times);
        let place = fault.place().ok_or_else(missing)?;
        let at = |place| self.expected.courses(plan.policy, word, place).map(<[Course]>::to_vec);
        let mut courses = at(place).ok_or_else(missing)?;
        if let Principal::Device(fault) = fault
            && !nature::others_are_held(fault, &plan.faults)
        {
            let last = |row| at(Place { row, ..place });
            match place.row {
                "after-ack" => courses.extend(last(AFTER_LAST_ACK).ok_or_else(missing)?),
                // Only where that makes a difference.
                "answer" => courses.extend(last(LAST_ANSWER).unwrap_or_default()),
                _ => {}
            }
        }
        Ok((place, courses))
    }

    fn one_fault(
        &self,
        plan: &Plan,
        fault: Principal<'_>,
        seen: &Observation,
        found: &mut Vec<Violation>,
    ) {
        match self.courses(plan, fault) {
            Ok((place, courses)) => {
                let late = seen.late.iter().any(|(round, _)| *round == fault.round());
                let course = Course { seen: from_its_act(fault.round(), place, seen), late };
                // What is late, or should be and is not, is told by itself.
                if !courses.iter().any(|known| known.seen == course.seen) {
                    found.push(Violation::Outcome { expected: courses, found: course });
                }
            }
            Err(violation) => found.push(violation),
        }
    }

    /// With several faults each end must be one that the table gives to one that has happened by then, and
    /// none is Done in which something has happened that it excludes.
    fn several(
        &self,
        plan: &Plan,
        faults: &[Principal<'_>],
        seen: &Observation,
        found: &mut Vec<Violation>,
    ) {
        found.extend(faults.iter().filter_map(|fault| self.courses(plan, *fault).err()));
        self.not_started(plan, faults, seen, found);
        for (at, event) in seen.events.iter().enumerate() {
            let Event::Step(step) = event else { continue };
            if !self.explains(plan, seen, at, step) {
                let Step { round, act, ended, .. } = step.clone();
                found.push(Violation::Unexplained { round, act, ended });
            }
        }
    }

    /// A machine of several faults starts, unless one has happened by which it does not.
    fn not_started(
        &self,
        plan: &Plan,
        faults: &[Principal<'_>],
        seen: &Observation,
        found: &mut Vec<Violation>,
    ) {
        let prevents = |at: usize, fault: &Injection| {
            let fault = Principal::Device(fault);
            let courses = self.courses(plan, fault).map(|(_, courses)| courses).ok()?;
            let all = courses.iter().all(|course| course.seen == [Seen::NotStarted]);
            let fired = seen.fired.get(at).copied().unwrap_or(false);
            (all && fired && !courses.is_empty() && faults.contains(&fault)).then_some(courses)
        };
        let mut numbered = plan.faults.iter().enumerate();
        let prevented = numbered.find_map(|(at, fault)| prevents(at, fault));
        let course = |word: &[Seen]| Course { seen: word.to_vec(), late: false };
        let (expected, word) = match (prevented, has_not_started(seen)) {
            (Some(courses), false) => (courses, course(&[])),
            (None, true) => (vec![course(&[])], course(&[Seen::NotStarted])),
            (Some(_), true) | (None, false) => return,
        };
        found.push(Violation::Outcome { expected, found: word });
    }

    /// Where the survivors of a pause or resume are in which somebody was fenced: as after a death.
    fn degraded(&self, plan: &Plan, step: &Step) -> Option<Seen> {
        let column = match step.act {
            Act::Pause => "Stop",
            Act::Resume => "Start",
            Act::Declare | Act::TakeOver => return None,
        };
        let place = Place { row: "receipt", column };
        // A hook that fails undoes also what would go on without a device.
        let undone = plan.policy == Policy::ContinueWithout && self.excludes_done(plan, step);
        let policy = if undone { Policy::Rollback } else { plan.policy };
        let courses = self.expected.courses(policy, "exit", place)?;
        courses.first()?.seen.first().copied()
    }

    /// The longest that a step may take: what its faulty devices are given, in the transition and in
    /// its undo, and a grace for a busy machine.
    fn limit(&self, plan: &Plan, act: Act) -> Duration {
        let times = &self.times;
        let one = match act {
            Act::Declare => times.memory,
            Act::Pause | Act::Resume | Act::TakeOver => 4 * times.short,
        };
        let wait = |injection: &Injection| match (nature(&injection.cause, times), &injection.cause)
        {
            (Nature::Silent, Cause::Inside(Fault { point: Point::Query, .. })) => {
                HELLOS * times.short
            }
            (Nature::Silent, _) => one,
            (_, Cause::Inside(Fault { action: Action::DelayMs(ms), .. })) => {
                4 * Duration::from_millis((*ms).into())
            }
            _ => Duration::ZERO,
        };
        let call = |fault: &HookFault| match (hook_nature(fault, times), fault.action) {
            (HookNature::Hangs, _) => 4 * times.short,
            (_, HookAction::StickMs(ms)) => 4 * Duration::from_millis(ms.into()),
            (_, HookAction::Fail) => Duration::ZERO,
        };
        plan.faults.iter().map(wait).chain(plan.hooks.iter().map(call)).sum::<Duration>()
            + times.grace
    }

    fn in_time(&self, plan: &Plan, step: &Step, found: &mut Vec<Violation>) {
        let limit = self.limit(plan, step.act);
        if step.took > limit {
            let Step { round, act, took, .. } = *step;
            found.push(Violation::Slow { round, act, took, limit });
        }
    }

    fn late(&self, plan: &Plan, seen: &Observation, found: &mut Vec<Violation>) {
        let (liars, visible) = liars(plan, seen);
        for (round, what) in &seen.late {
            if !self.knows_liars || !liars.contains(round) {
                found.push(Violation::Late { round: *round, what: what.clone() });
            }
        }
        for round in visible {
            if !seen.late.iter().any(|(at, _)| *at == round) {
                found.push(Violation::Blind { round });
            }
        }
    }
}

/// Rounds in which a liar was at work, and those of them in which a machine has stood with it, which shows.
fn liars(plan: &Plan, seen: &Observation) -> (BTreeSet<u32>, BTreeSet<u32>) {
    let lies = |number: &usize| {
        let fault = plan.faults.get(*number);
        fault.filter(
            |fault| matches!(&fault.cause, Cause::Inside(fault) if fault.action == Action::KeepDma),
        )
    };
    let (mut all, mut visible) = (BTreeSet::new(), BTreeSet::new());
    let mut before: Option<&Step> = None;
    for step in steps(seen) {
        // What was not seen at once has happened at the end of the step before.
        let late = step.fired_before.iter().map(|number| (number, before.unwrap_or(step)));
        let fired = step.fired.iter().map(|number| (number, step)).chain(late);
        for (liar, step) in fired.filter_map(|(number, step)| Some((lies(number)?, step))) {
            all.insert(step.round);
            let counts = |survivor: &Survivor| survivor.device == usize::from(liar.device);
            // A pause that was undone shows nothing, nor does a liar that was fenced.
            if step.machine != MachineState::Running && step.survivors.iter().any(counts) {
                visible.insert(step.round);
            }
        }
        before = Some(step);
    }
    (all, visible)
}

fn steps(seen: &Observation) -> impl Iterator<Item = &Step> {
    seen.events.iter().filter_map(|event| match event {
        Event::Step(step) => Some(step),
        Event::Lost { .. } | Event::GivenUp { .. } | Event::NotStarted { .. } => None,
    })
}

fn has_not_started(seen: &Observation) -> bool {
    seen.events.iter().any(|event| matches!(event, Event::NotStarted { .. }))
}

/// A step in the words of the table.
#[must_use]
pub fn in_words(step: &Step) -> Seen {
    match (&step.ended, step.machine) {
        (Ended::Done, _) => Seen::Done,
        (Ended::RolledBack, _) => Seen::RolledBack,
        (Ended::Stopped, _) => Seen::Stopped,
        (Ended::Degraded { .. }, MachineState::Running) => Seen::DegradedRunning,
        (Ended::Degraded { .. }, MachineState::Stopped) => Seen::DegradedStopped,
        (Ended::Degraded { .. }, MachineState::Held | MachineState::LeaseExpired)
        | (Ended::Held, _) => Seen::Held,
        (Ended::Refused(_), _) => Seen::Refused,
    }
}

fn everything_is_done(seen: &Observation, found: &mut Vec<Violation>) {
    for step in steps(seen).filter(|step| step.ended != Ended::Done) {
        let Step { round, act, ended, .. } = step.clone();
        found.push(Violation::Unexplained { round, act, ended });
    }
}

/// What was seen from the act of the fault on; all that was before must be Done.
pub(super) fn from_its_act(round: u32, place: Place, observation: &Observation) -> Vec<Seen> {
    let act = match place.column {
        "PrepareStart" | "Start" | HOOK_ON_START => Some(Act::Resume),
        "memory" => Some(Act::Declare),
        "PrepareStop" | "Stop" | HOOK_ON_STOP => Some(Act::Pause),
        _ => None,
    };
    let mut seen = Vec::new();
    let mut begun = false;
    for event in &observation.events {
        let (at, word) = match event {
            Event::Step(step) => {
                begun |= step.round >= round && act.is_none_or(|act| act == step.act);
                (step.round, in_words(step))
            }
            Event::Lost { round: at, .. } => {
                begun |= *at >= round;
                (*at, Seen::Lost)
            }
            Event::GivenUp { round: at, .. } => (*at, Seen::GivenUp),
            Event::NotStarted { .. } => {
                begun = true;
                (round, Seen::NotStarted)
            }
        };
        let declares = matches!(event, Event::Step(step) if step.act == Act::Declare)
            && act != Some(Act::Declare);
        if (begun || word != Seen::Done) && !declares && (at >= round || word != Seen::Done) {
            seen.push(word);
        }
    }
    trim(&mut seen);
    seen
}

fn one_state(step: &Step, found: &mut Vec<Violation>) {
    let state = match step.machine {
        MachineState::Running => MigrationState::Running,
        // Nothing here gives a lease, so none may have run out.
        MachineState::Stopped | MachineState::Held | MachineState::LeaseExpired => {
            MigrationState::Stop
        }
    };
    for survivor in &step.survivors {
        let answered = survivor.answered.is_none_or(|answered| answered == state);
        if survivor.status != Some(state) || !answered {
            found.push(Violation::Scattered {
                round: step.round,
                act: step.act,
                machine: step.machine,
                device: survivor.device,
                status: survivor.status,
                answered: survivor.answered,
            });
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unfinished(why) => write!(f, "the plan could not be run: {why}"),
            Self::NotInTheTable(fault) => {
                write!(f, "the table does not say what comes of this: {fault}")
            }
            Self::Outcome { expected, found } => {
                let expected: Vec<_> = expected.iter().map(ToString::to_string).collect();
                write!(f, "expected {}, found {found}", expected.join(" or "))
            }
            Self::Unexplained { round, act, ended } => {
                write!(f, "round {round}: nothing explains that the {act} ended in {ended:?}")
            }
            Self::Innocent { round, device } => {
                write!(f, "round {round}: device {device} is lost, and was not faulty")
            }
            Self::Scattered { round, act, machine, device, status, answered } => {
                let state = |state: &Option<MigrationState>| {
                    state.map_or_else(|| "nothing".to_owned(), |state| state.to_string())
                };
                write!(
                    f,
                    "round {round}: after the {act} the machine is {machine}, and device {device} \
                     is in {} by the status, in {} by its last answer",
                    state(status),
                    state(answered)
                )
            }
            Self::Unfired(fault) => write!(f, "this fault has not happened: {fault}"),
            Self::UnfiredHook(fault) => write!(f, "this fault has not happened: {fault}"),
            Self::Late { round, what } => write!(f, "round {round}: {what}"),
            Self::Blind { round } => {
                write!(f, "round {round}: a device went on with its DMA, and nothing noticed")
            }
            Self::Idle { round, what } => write!(f, "after round {round}: {what}"),
            Self::Slow { round, act, took, limit } => {
                write!(f, "round {round}: the {act} took {took:?}, it may take {limit:?}")
            }
            Self::Left(process) => write!(f, "a process was left: {process}"),
        }
    }
}
