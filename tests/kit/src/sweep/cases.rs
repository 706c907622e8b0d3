//! Every fault, in every phase, on every device: plans of one fault each.

use super::Times;
use super::expected::Expected;
use super::nature::{self, Nature, nature};
use super::principal::Principal;
use crate::plan::{
    Cause, HookAction, HookFault, Injection, Limit, Moment, Outside, OutsideAction, Place, Plan,
    Policy, Resource,
};
use crate::trace::Call;
use standstill_protocol::fault::{Action, Fault, Forgery, Packet, Point};
use standstill_protocol::message::Phase;
use std::ops::Range;

/// The phases of a pause and a resume.
pub const PHASES: [Phase; 4] = [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start];

/// How much longer than the deadline a delay is that is too long.
const TOO_LONG: u32 = 20;
/// EBUSY.
const REFUSAL: i32 = 16;
/// More messages than anybody may send in a second.
const FLOOD: u32 = 3000;

/// Everything that a device process can do wrong.
fn actions(times: &Times) -> Vec<Action> {
    let short = u32::try_from(times.short.as_millis()).unwrap_or(u32::MAX);
    let forgeries = [
        Forgery::LowerTerm,
        Forgery::HigherTerm,
        Forgery::EarlierEpoch,
        Forgery::LaterEpoch,
        Forgery::Phase,
        Forgery::State,
        Forgery::Declaration,
    ];
    let packets = [Packet::Garbage, Packet::Empty, Packet::Truncated, Packet::Oversized];
    [
        Action::Exit(1),
        Action::Abort,
        Action::Segv,
        Action::Stop,
        Action::Spin,
        Action::DelayMs(20),
        Action::DelayMs(short.saturating_mul(TOO_LONG)),
        Action::NoAck,
        Action::TwoAcks,
        Action::Refuse(REFUSAL),
        Action::FdFlood(2),
        Action::MessageFlood(10),
        Action::MessageFlood(FLOOD),
        Action::Disconnect,
        Action::KeepDma,
    ]
    .into_iter()
    .chain(forgeries.map(Action::Forge))
    .chain(packets.map(Action::Send))
    .collect()
}

/// Everything that a device process can do wrong while its machine is paused and resumed.
#[must_use]
pub fn inside(times: &Times) -> Vec<Cause> {
    let points = PHASES
        .into_iter()
        .flat_map(|phase| [Point::Receipt(phase), Point::BeforeAck(phase), Point::AfterAck(phase)])
        .chain([Point::Mmio, Point::Dma, Point::DmaInFlight, Point::Memory, Point::Shutdown])
        .chain([Point::Hello]);
    let actions = actions(times);
    points
        .flat_map(|point| actions.iter().map(move |&action| Fault::new(point, action)))
        .filter(Fault::is_possible)
        // Who greets twice is found out before the machine has started, or at any time after it: that has a test
        // of its own, in which others have still to greet.
        .filter(|fault| (fault.point, fault.action) != (Point::Hello, Action::TwoAcks))
        .map(Cause::Inside)
        .collect()
}

/// Everything that can be done to any device process while its machine is paused and resumed.
#[must_use]
pub fn outside(times: &Times) -> Vec<Cause> {
    let moments = [Moment::Running, Moment::Stopped].into_iter().chain(
        PHASES.into_iter().flat_map(|phase| [Moment::Command(phase), Moment::Answer(phase)]),
    );
    let short = u32::try_from(times.short.as_millis()).unwrap_or(u32::MAX);
    let actions = [
        OutsideAction::Kill,
        OutsideAction::StopMs(0),
        OutsideAction::StopMs(20),
        OutsideAction::DelayMs(20),
        OutsideAction::DelayMs(short.saturating_mul(TOO_LONG)),
        OutsideAction::Drop,
        OutsideAction::Duplicate,
        OutsideAction::Corrupt,
        OutsideAction::Split,
        OutsideAction::Merge,
        OutsideAction::Swap,
        OutsideAction::Cut,
    ];
    let possible = |moment, action| Cause::Outside(Outside { moment, action });
    moments
        .flat_map(|moment| actions.iter().map(move |&action| possible(moment, action)))
        .filter(|cause| cause.impossible().is_none())
        .collect()
}

/// Nothing more of a resource, for a device that is at work and for one that stands. What comes of that is known
/// of devices that need none of it in a transition, as those of our runtime. Memory is not among them: when a
/// process asks for more is a matter of its allocator.
#[must_use]
pub fn limits() -> Vec<Cause> {
    let resources =
        [Resource::Files, Resource::Processes, Resource::FileSize, Resource::LockedMemory];
    let of = |moment| {
        let limit = |resource| OutsideAction::Limit(Limit { resource, value: 0 });
        let outside = move |resource| Outside { moment, action: limit(resource) };
        resources.into_iter().map(outside).map(Cause::Outside)
    };
    [Moment::Running, Moment::Stopped].into_iter().flat_map(of).collect()
}

/// Everything that can happen to a coordinator while its machine is paused and resumed.
#[must_use]
pub fn coordinators() -> Vec<Cause> {
    let moments = [Moment::Running, Moment::Stopped].into_iter().chain(
        PHASES.into_iter().flat_map(|phase| [Moment::Command(phase), Moment::Answer(phase)]),
    );
    let actions = [
        OutsideAction::KillCoordinator,
        OutsideAction::StopCoordinatorMs(0),
        OutsideAction::StopCoordinatorMs(20),
    ];
    let of =
        |moment| actions.into_iter().map(move |action| Cause::Outside(Outside { moment, action }));
    moments.flat_map(of).collect()
}

/// Machines whose coordinator is lost, hangs or comes back, at every moment: at a packet of each of those
/// devices, or of the next one at the next moment. What comes of it is the same under every policy.
#[must_use]
pub fn sweep_of_coordinators(devices: u16, victims: &Victims) -> Vec<Plan> {
    let plans = |(at, cause): (usize, &Cause)| {
        // Three to each moment.
        let moment = u16::try_from(at / 3).unwrap_or(0);
        let plan = |device| Plan::new(devices).inject(first(device, cause));
        victims.of(moment, devices).map(plan).collect::<Vec<_>>()
    };
    coordinators().iter().enumerate().flat_map(plans).collect()
}

/// Everything that a device process can do wrong when the coordinator that takes its machine over asks it where
/// it is.
#[must_use]
pub fn queries(times: &Times) -> Vec<Cause> {
    let query = |action| Fault::new(Point::Query, action);
    let faults = actions(times).into_iter().map(query).filter(Fault::is_possible);
    faults.map(Cause::Inside).collect()
}

/// Machines whose coordinator is lost while they run, and of which one device does wrong when it is asked: each
/// of those devices in a plan of its own, or the next one in the next plan. What comes of it is the same under
/// every policy.
#[must_use]
pub fn sweep_of_queries(devices: u16, victims: &Victims, times: &Times) -> Vec<Plan> {
    let plans = |(at, cause): (u16, &Cause)| {
        let (moment, action) = (Moment::Running, OutsideAction::KillCoordinator);
        let plan = |device| {
            Plan::new(devices).outside(device, moment, action).inject(first(device, cause))
        };
        victims.of(at, devices).map(plan).collect::<Vec<_>>()
    };
    (0..).zip(&queries(times)).flat_map(plans).collect()
}

/// A fault of a device in the first round.
fn first(device: u16, cause: &Cause) -> Injection {
    Injection { device, round: 1, cause: cause.clone() }
}

/// Those at a Hello.
pub(super) fn hellos(causes: &[Cause]) -> Vec<Fault> {
    let hello = |cause: &Cause| match cause {
        Cause::Inside(fault) if fault.point == Point::Hello => Some(*fault),
        Cause::Inside(_) | Cause::Outside(_) => None,
    };
    causes.iter().filter_map(hello).collect()
}

/// Machines of which a device is lost and greets again: with each of those faults that come at a Hello, in
/// its first process that was started again; and in every one, if that does not take until a deadline
/// each time. It is each of those devices, or the next one with the next fault.
#[must_use]
pub fn sweep_of_restarts(
    causes: &[Cause],
    devices: u16,
    victims: &Victims,
    times: &Times,
) -> Vec<Plan> {
    let mut plans = Vec::new();
    for (at, fault) in (0..).zip(hellos(causes)) {
        let ends = nature(&Cause::Inside(fault), times) == Nature::Ends;
        let each = ends.then_some(fault.nth(0));
        for fault in std::iter::once(fault).chain(each) {
            for device in victims.of(at, devices) {
                let round = 2;
                let plan = Plan::new(devices).rounds(round).policy(Policy::Restart);
                let kill = Outside { moment: Moment::Running, action: OutsideAction::Kill };
                let plan = plan.inject(Injection { device, round, cause: Cause::Outside(kill) });
                plans.push(plan.inject(Injection { device, round, cause: Cause::Inside(fault) }));
            }
        }
    }
    plans
}

/// Everything that a hook can do wrong, at each place, in its first call on a stop and on a start.
#[must_use]
pub fn hooks() -> Vec<HookFault> {
    let actions = [HookAction::Fail, HookAction::StickMs(0), HookAction::StickMs(20)];
    let mut all = Vec::new();
    for place in [Place::Before, Place::Between, Place::After] {
        for call in [Call::Stop, Call::Start] {
            all.extend(actions.map(|action| HookFault { round: 1, place, call, action }));
        }
    }
    all
}

/// Machines of which one hook does something wrong: every fault of a hook, under every policy; of
/// `restart`, which differs only in what becomes of devices, every tenth.
#[must_use]
pub fn sweep_of_hooks(devices: u16, expected: &Expected, times: &Times) -> Vec<Plan> {
    let of = |policy| {
        hooks_under(policy, &hooks(), expected, times).into_iter().map(move |hook| {
            let mut plan = Plan::new(devices).policy(policy);
            plan.hooks.push(hook);
            plan
        })
    };
    let policies = [Policy::Rollback, Policy::StayStopped, Policy::ContinueWithout];
    policies.into_iter().flat_map(of).chain(of(Policy::Restart).step_by(10)).collect()
}

/// Those that the table does not say cannot be.
pub(super) fn hooks_under(
    policy: Policy,
    hooks: &[HookFault],
    expected: &Expected,
    times: &Times,
) -> Vec<HookFault> {
    let possible = |fault: &&HookFault| {
        let fault = Principal::Hook(fault);
        let courses = |place| expected.courses(policy, fault.word(times), place);
        fault.place().and_then(courses).is_none_or(|courses| !courses.is_empty())
    };
    hooks.iter().filter(possible).copied().collect()
}

/// A plan of that one fault. A fault after an answer, of which it matters whether others have still to
/// answer, is made to come before they have: another answer is held back until the device is lost.
#[must_use]
pub fn plan(cause: &Cause, device: u16, devices: u16, policy: Policy, times: &Times) -> Plan {
    let plan = Plan::new(devices).policy(policy).inject(first(device, cause));
    let phase = match cause {
        Cause::Inside(Fault { point: Point::AfterAck(phase), .. })
        | Cause::Outside(Outside { moment: Moment::Answer(phase), action: OutsideAction::Kill }) => {
            *phase
        }
        _ => return plan,
    };
    if devices < 2 || nature(cause, times) != Nature::Ends {
        return plan;
    }
    plan.outside((device + 1) % devices, Moment::Answer(phase), OutsideAction::Hold)
}

/// Under which policies each fault of each device is tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policies {
    /// One device under `rollback`, the next one under `stay-stopped`, the next one under
    /// `continue-without`. Every tenth is tried under `restart` too, which differs from `rollback` in what
    /// comes after.
    #[default]
    InTurn,
    /// Each device under each policy.
    All,
}

const ALL: [Policy; 4] =
    [Policy::Rollback, Policy::StayStopped, Policy::ContinueWithout, Policy::Restart];

/// Every fault, in every phase, on every device.
#[must_use]
pub fn sweep(
    causes: &[Cause],
    devices: u16,
    policies: Policies,
    expected: &Expected,
    times: &Times,
) -> Vec<Plan> {
    if policies == Policies::All {
        let each = Victims::Each;
        let of = |policy| plans(causes, devices, policy, &each, expected, times);
        return ALL.into_iter().flat_map(of).collect();
    }
    let of =
        |policy, from| plans(causes, devices, policy, &Victims::InTurn { from }, expected, times);
    let mut all = of(Policy::Rollback, 0);
    all.extend(of(Policy::StayStopped, 1));
    all.extend(of(Policy::ContinueWithout, 2));
    all.extend(of(Policy::Restart, 0).into_iter().step_by(10));
    all
}

/// Every fault, in every phase, on one device: under one of the policies `rollback`, `stay-stopped` and
/// `continue-without` in turn, every tenth under `restart` too; or under each policy.
#[must_use]
pub fn sweep_of_one(
    victim: u16,
    causes: &[Cause],
    devices: u16,
    policies: Policies,
    expected: &Expected,
    times: &Times,
) -> Vec<Plan> {
    let of = |policy, causes: &[Cause]| {
        plans(causes, devices, policy, &Victims::Only(victim), expected, times)
    };
    if policies == Policies::All {
        return ALL.into_iter().flat_map(|policy| of(policy, causes)).collect();
    }
    let every =
        |from: usize, step| -> Vec<_> { causes.iter().skip(from).step_by(step).cloned().collect() };
    let mut all = of(Policy::Rollback, &every(0, 3));
    all.extend(of(Policy::StayStopped, &every(1, 3)));
    all.extend(of(Policy::ContinueWithout, &every(2, 3)));
    all.extend(of(Policy::Restart, &every(0, 10)));
    all
}

/// A plan of each fault that the table says can be.
#[must_use]
pub fn plans(
    causes: &[Cause],
    devices: u16,
    policy: Policy,
    victims: &Victims,
    expected: &Expected,
    times: &Times,
) -> Vec<Plan> {
    let possible = |cause: &&Cause| {
        let word = nature::word(cause, times);
        let place = nature::place(&first(0, cause));
        // What the table says nothing of is run, and told.
        place.and_then(|place| expected.courses(policy, word, place)).is_none_or(|c| !c.is_empty())
    };
    let mut plans = Vec::new();
    for (at, cause) in (0_u16..).zip(causes.iter().filter(possible)) {
        let victims = victims.of(at, devices);
        plans.extend(victims.map(|victim| plan(cause, victim, devices, policy, times)));
    }
    plans
}

/// Which devices have the fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victims {
    /// One after another, in a plan for each.
    Each,
    /// That one in all plans.
    Only(u16),
    /// One in each plan, the next one in the next.
    InTurn {
        /// Which in the first plan.
        from: u16,
    },
}

impl Victims {
    /// Those of the plans of one fault. `at` is its number.
    fn of(&self, at: u16, devices: u16) -> Range<u16> {
        match *self {
            Self::Each => 0..devices,
            Self::Only(victim) => victim..victim + 1,
            Self::InTurn { from } => {
                let victim = at.wrapping_add(from) % devices.max(1);
                victim..victim + 1
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_of_every_fault_what_comes_of_it_or_that_it_cannot_be() {
        let (expected, times) = (Expected::ours().unwrap(), Times::default());
        for policy in ALL {
            let causes = [inside(&times), outside(&times), coordinators(), limits()].concat();
            let causes = [causes, queries(&times)].concat();
            for cause in &causes {
                let word = nature::word(cause, &times);
                let place = nature::place(&first(0, cause)).unwrap();
                let case = format!("{word} at {place:?} under {policy}");
                assert!(expected.courses(policy, word, place).is_some(), "{case}: {cause}");
            }
            for hook in hooks() {
                let fault = Principal::Hook(&hook);
                let (word, place) = (fault.word(&times), fault.place().unwrap());
                let case = format!("{word} at {place:?} under {policy}");
                assert!(expected.courses(policy, word, place).is_some(), "{case}: {hook}");
            }
        }
    }

    #[test]
    fn every_plan_can_be_run_and_there_is_one_for_every_device() {
        let (expected, times) = (Expected::ours().unwrap(), Times::default());
        let causes = [inside(&times), outside(&times)].concat();
        let all = plans(&causes, 3, Policy::Rollback, &Victims::Each, &expected, &times);
        assert!(all.iter().all(|plan| plan.check().is_ok()));
        for victim in 0..3 {
            let own = all.iter().filter(|plan| plan.faults[0].device == victim);
            assert_eq!(own.count() * 3, all.len());
        }
        let swept = sweep(&causes, 3, Policies::InTurn, &expected, &times);
        for cause in
            causes.iter().filter(|cause| all.iter().any(|plan| plan.faults[0].cause == **cause))
        {
            let own = swept.iter().filter(|plan| plan.faults[0].cause == *cause);
            let victims: std::collections::BTreeSet<_> = own.map(|p| p.faults[0].device).collect();
            assert_eq!(victims.len(), 3, "{cause}");
        }
        let full = sweep(&causes, 3, Policies::All, &expected, &times);
        for policy in ALL {
            let each = plans(&causes, 3, policy, &Victims::Each, &expected, &times);
            assert!(each.iter().all(|plan| full.contains(plan)), "{policy}");
        }
        let turns =
            plans(&causes, 3, Policy::Rollback, &Victims::InTurn { from: 1 }, &expected, &times);
        assert_eq!(turns.len() * 3, all.len());
    }

    #[test]
    fn a_sweep_of_one_device_has_every_fault_and_no_other_device() {
        let (expected, times) = (Expected::ours().unwrap(), Times::default());
        let causes = [inside(&times), outside(&times)].concat();
        let of = |policies| sweep_of_one(1, &causes, 3, policies, &expected, &times);
        let (in_turn, all) = (of(Policies::InTurn), of(Policies::All));
        assert!(all.iter().all(|plan| plan.faults[0].device == 1 && plan.check().is_ok()));
        let each = plans(&causes, 3, Policy::Rollback, &Victims::Each, &expected, &times);
        for plan in each {
            let same = |other: &&Plan| other.faults[0].cause == plan.faults[0].cause;
            assert_eq!(all.iter().filter(same).count(), 4, "{plan:?}");
            assert!(in_turn.iter().any(|other| same(&other)), "{plan:?}");
        }
    }

    #[test]
    fn each_device_is_the_victim_where_that_is_wanted_and_one_where_not() {
        let times = Times::default();
        let causes = inside(&times);
        let all = |victims: &Victims| {
            let restarts = sweep_of_restarts(&causes, 3, victims, &times);
            [restarts, sweep_of_queries(3, victims, &times), sweep_of_coordinators(3, victims)]
        };
        let victims = [Victims::InTurn { from: 0 }, Victims::Each, Victims::Only(2)];
        let [in_turn, each, only] = victims.map(|victims| all(&victims));
        for ((in_turn, each), only) in in_turn.iter().zip(&each).zip(&only) {
            assert_eq!((each.len(), only.len()), (3 * in_turn.len(), in_turn.len()));
            assert!(in_turn.iter().chain(only).all(|plan| each.contains(plan)));
            for victim in 0..3 {
                let own = |plan: &&Plan| plan.faults.iter().all(|fault| fault.device == victim);
                assert_eq!(each.iter().filter(own).count(), in_turn.len());
                assert!(in_turn.iter().any(|plan| own(&plan)));
            }
            assert!(only.iter().flat_map(|plan| &plan.faults).all(|fault| fault.device == 2));
        }
    }

    #[test]
    fn who_dies_after_an_answer_does_so_before_the_last_one() {
        let times = Times::default();
        let dies = Cause::Inside(Fault::new(Point::AfterAck(Phase::Stop), Action::Abort));
        let plan = plan(&dies, 2, 3, Policy::Rollback, &times);
        assert_eq!(plan.faults.len(), 2);
        assert!(nature::others_are_held(&plan.faults[0], &plan.faults));
        assert_eq!(plan.faults[1].device, 0);
    }
}
