//! Random machines, random faults, random order: see [`super::world`] for what is checked on the
//! way, and [`ends`] for the outcomes.

use super::super::*;
use super::world::{Faults, World};
use crate::message::{Epoch, PeerDma, Term};
use crate::migration::{Activity, MigrationFlags, MigrationState};
use proptest::prelude::*;

/// Everything that is chosen about a run before it begins.
#[derive(Clone, Debug)]
struct Case {
    plan: Plan,
    unprovable: Vec<bool>,
    faults: Faults,
    choices: Vec<u32>,
    /// Lost before the beginning.
    early: Option<usize>,
    /// The coordinator dies after that many actions and another takes over.
    cut: Option<usize>,
}

fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(default),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

fn flags() -> impl Strategy<Value = MigrationFlags> {
    prop_oneof![
        6 => Just(MigrationFlags::ALL),
        2 => Just(MigrationFlags::STOP_COPY_P2P),
        1 => Just(MigrationFlags::STOP_COPY),
        1 => Just(MigrationFlags::STOP_COPY_PRE_COPY),
    ]
}

/// Mostly where such an operation finds everybody, sometimes anywhere that it accepts.
fn found(operation: Operation) -> BoxedStrategy<MigrationState> {
    use MigrationState as S;
    let usual = match operation {
        Operation::Pause | Operation::SwitchOver | Operation::TakeOver => S::Running,
        Operation::Resume | Operation::Load => S::Stop,
    };
    let all: Vec<_> = MigrationState::ALL
        .into_iter()
        .filter(|state| matches!(row(operation, *state), Row::Take { .. }))
        .collect();
    prop_oneof![4 => Just(usual), 1 => proptest::sample::select(all)].boxed()
}

fn member(operation: Operation, processes: bool) -> impl Strategy<Value = Member> {
    let kind = if processes { 0u32 } else { 1 };
    (flags(), found(operation), 0u32..8, 0u32..4, 1u64..4, 1u64..4, 0u64..2).prop_map(
        move |(flags, state, local, optional, first, second, lease_ns)| Member {
            id: ParticipantId(0),
            kind: if local < kind { MemberKind::Local } else { MemberKind::Process },
            state: if flags.has(state) { state } else { MigrationState::Stop },
            flags,
            peer_dma: if flags.p2p() { PeerDma::Possible } else { PeerDma::RamOnly },
            one_phase_allowed: false,
            on_loss: if optional == 0 { OnLoss::ContinueWithout } else { OnLoss::Fail },
            first_ns: first * 100,
            second_ns: second * 100,
            lease_ns,
        },
    )
}

fn hooks(stopped: bool) -> impl Strategy<Value = Vec<Hook>> {
    let slot = || proptest::sample::select(vec![Slot::Before, Slot::Between, Slot::After]);
    proptest::collection::vec((slot(), slot(), -1i32..2, 0u32..9), 0..3).prop_map(move |hooks| {
        hooks
            .into_iter()
            .zip(0u32..)
            .map(|((stop, start, rank, odd), id)| Hook {
                id: HookId(id),
                stop,
                start,
                stop_rank: rank,
                start_rank: -rank,
                budget_ns: 150,
                stopped: stopped != (odd == 0),
            })
            .collect()
    })
}

fn faults() -> impl Strategy<Value = Faults> {
    let none = Just(Faults { stray: 1, ..Faults::default() });
    let some = (0u32..3, 0u32..2, 0u32..3, 0u32..3, 0u32..2, 0u32..20, 0u32..3, 0u32..4).prop_map(
        |(crash, hang, fail, time, cancel, supersede, client, lease)| Faults {
            crash,
            hang,
            fail,
            time,
            cancel,
            client,
            lease,
            stray: 2,
            supersede: u32::from(supersede == 0),
        },
    );
    prop_oneof![1 => none, 3 => some]
}

fn case() -> impl Strategy<Value = Case> {
    use Operation as O;
    let operation = proptest::sample::select(vec![
        (O::Pause, false),
        (O::Pause, false),
        (O::SwitchOver, false),
        (O::Resume, false),
        (O::Load, false),
        (O::Pause, true),
        (O::SwitchOver, true),
        (O::Resume, true),
        (O::Load, true),
    ]);
    operation.prop_flat_map(|(operation, cut)| {
        let members = proptest::collection::vec(member(operation, cut), 1..6);
        let machine = (members, hooks(operation == O::Resume), any::<bool>(), any::<bool>());
        let unprovable = proptest::collection::vec(proptest::bool::weighted(0.15), 6);
        let choices = proptest::collection::vec(any::<u32>(), 0..120);
        let rest = (unprovable, faults(), choices, 0usize..40, 0usize..60);
        (machine, rest).prop_map(move |(machine, (unprovable, faults, choices, early, at))| {
            let (mut members, hooks, stay, tight) = machine;
            for (member, id) in members.iter_mut().zip(0..) {
                member.id = ParticipantId(id);
            }
            let on_failure = if stay { OnFailure::StayStopped } else { OnFailure::Rollback };
            let fence_ns = 300;
            let mut plan = Plan {
                operation,
                term: Term(3),
                epoch: Epoch(10),
                members,
                hooks,
                phases: Phases::Two,
                on_failure,
                undo_ns: 400,
                fence_ns,
            };
            if !tight {
                plan.undo_ns = ample(&plan);
            }
            let early = (early < 5).then_some(early);
            Case { plan, unprovable, faults, choices, early, cut: cut.then_some(at) }
        })
    })
}

/// A budget that no undo and no hold uses up: each hook twice, four phases, each fence.
fn ample(plan: &Plan) -> u64 {
    let hooks: u64 = plan.hooks.iter().map(|hook| hook.budget_ns).sum();
    2 * hooks + 4 * 300 + plan.members.len() as u64 * plan.fence_ns + 1
}

fn run(case: Case) -> World {
    let mut world = World::new(case.plan, &case.unprovable);
    if let Some(index) = case.early {
        world.lose_early(index);
    }
    world.begin();
    let mut choices = case.choices.into_iter();
    if let Some(cut) = case.cut {
        for choice in choices.by_ref().take(cut) {
            world.act(choice, &case.faults);
        }
        world = world.taken_over();
        world.begin();
    }
    for choice in choices {
        world.act(choice, &case.faults);
    }
    world.drain();
    world
}

/// True if they were neither all running nor all stopped at the beginning.
fn half<'m>(members: impl Iterator<Item = &'m Member>) -> bool {
    let activities: std::collections::BTreeSet<_> =
        members.map(|member| member.state.activity()).collect();
    activities.len() > 1 || activities.contains(&Activity::NoPeer)
}

/// Where a participant is to be when a transition was undone without it being fenced.
fn undone_fits(world: &World, member: &Member, state: MigrationState) -> bool {
    use MigrationState as S;
    let was = member.state;
    let stops = state.activity() == Activity::Stopped && state != S::Error;
    // Some of those who were in several states may have been fenced since then.
    let stopped = matches!(
        world.outcome,
        Some(Outcome::Stopped | Outcome::Degraded { machine: MachineState::Stopped, .. })
    );
    if stopped && half(world.plan.members.iter()) && stops && (state == S::Stop || state == was) {
        return true;
    }
    match world.plan.operation {
        Operation::TakeOver => state.activity() == Activity::Full,
        Operation::Resume if was.activity() != Activity::Stopped => state == was,
        Operation::Resume => state == S::Stop || (state == was && was == S::StopCopy),
        Operation::Load if !world.was_told() => state == was,
        Operation::Load => state == S::Stop,
        Operation::Pause | Operation::SwitchOver => match world.plan.on_failure {
            OnFailure::StayStopped => stops && (state == S::Stop || state == was),
            OnFailure::Rollback => match was {
                S::PreCopy if world.second_phase() => state == S::Running,
                S::PreCopyP2p if world.second_phase() => state == S::RunningP2p,
                _ => state == was,
            },
        },
    }
}

fn done_fits(world: &World, member: &Member, state: MigrationState) -> bool {
    match (world.plan.operation, row(world.plan.operation, member.state)) {
        (Operation::TakeOver, _) => state.activity() == Activity::Full,
        (_, Row::Take { second, .. }) => state == second,
        (_, Row::Refuse(_)) => false,
    }
}

/// The promise of each outcome, against where the devices really are.
fn ends(world: &World) {
    let left = world.left();
    let everybody = left.len() == world.nodes.len();
    let at_end = |fits: fn(&World, &Member, MigrationState) -> bool| {
        for (member, state) in &left {
            assert!(fits(world, member, *state), "{member:?} is in {state}: {:?}", world.outcome);
        }
    };
    let hooks_as_found = || {
        let pairs = world.plan.hooks.iter().zip(world.transition.hooks());
        pairs.into_iter().all(|(was, is)| was.stopped == is.stopped)
    };
    match world.outcome.as_ref().expect("an outcome") {
        Outcome::Done => {
            assert!(everybody && !world.any_fenced() && !world.was_undone(), "{left:?}");
            at_end(done_fits);
            let stopped = match world.plan.operation {
                Operation::Pause | Operation::SwitchOver => Some(true),
                Operation::Resume => Some(false),
                Operation::Load | Operation::TakeOver => None,
            };
            let mut hooks = world.transition.hooks().iter();
            assert!(hooks.all(|hook| stopped.is_none_or(|stopped| hook.stopped == stopped)));
        }
        Outcome::RolledBack => {
            assert!(everybody && !world.any_fenced() && world.was_undone());
            let takes_over = world.plan.operation == Operation::TakeOver;
            assert!(takes_over || !half(world.plan.members.iter()), "{left:?}");
            at_end(undone_fits);
            assert!(hooks_as_found());
        }
        Outcome::Stopped => {
            assert!(everybody && !world.any_fenced() && world.was_undone());
            at_end(undone_fits);
        }
        Outcome::Degraded { machine, fenced } => {
            assert!(!fenced.is_empty() && world.any_fenced() && !everybody);
            assert_eq!(fenced.len() + left.len(), world.nodes.len());
            at_end(if world.was_undone() { undone_fits } else { done_fits });
            let all = |activity| left.iter().all(|(_, state)| state.activity() == activity);
            match machine {
                MachineState::Running => assert!(all(Activity::Full), "{left:?}"),
                MachineState::Stopped => assert!(all(Activity::Stopped), "{left:?}"),
                MachineState::Held | MachineState::LeaseExpired => {
                    panic!("a degraded machine is neither held nor waits for its owner")
                }
            }
        }
        Outcome::Held { reasons, .. } => {
            assert!(!reasons.is_empty());
            let given_up = world.hold_expired() || reasons.contains(&HeldReason::Superseded);
            if !given_up {
                for (member, state) in &left {
                    assert_eq!(state.activity(), Activity::Stopped, "{member:?} is in {state}");
                }
            }
            if world.plan.undo_ns >= ample(&world.plan) {
                assert!(!world.hold_expired() && !reasons.contains(&HeldReason::UndoExpired));
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(6000))]

    #[test]
    fn whatever_happens_the_barrier_holds_and_there_is_one_outcome_that_is_true(case in case()) {
        let mut world = run(case);
        prop_assert_eq!(world.broken.clone(), None);
        ends(&world);
        // Nothing comes after the end; `World` panics if it does.
        for choice in 0..40 {
            world.act(choice * 7919, &Faults { stray: 5, cancel: 5, supersede: 1, ..Faults::default() });
        }
    }
}

/// The runs above prove nothing about what they never reach: each kind of end must be among them.
#[test]
fn the_random_runs_reach_every_outcome_of_every_operation() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut reached = std::collections::BTreeSet::new();
    for _ in 0..1500 {
        let case = case().new_tree(&mut runner).expect("a case").current();
        let world = run(case);
        let outcome = world.outcome.as_ref().expect("an outcome");
        reached.insert(format!("{} {}", world.plan.operation, outcome.name()));
        if let Outcome::Held { reasons, .. } = outcome {
            for reason in reasons {
                let reason = format!("{reason:?}");
                reached.insert(reason.split('(').next().unwrap_or_default().to_owned());
            }
        }
    }
    let mut expected = vec!["take-over Done".to_owned()];
    for operation in ["pause", "switch-over", "resume", "load", "take-over"] {
        expected.extend(["Degraded", "Held"].map(|outcome| format!("{operation} {outcome}")));
    }
    for operation in ["pause", "switch-over", "resume"] {
        let names = ["Done", "RolledBack", "Stopped"];
        expected.extend(names.map(|outcome| format!("{operation} {outcome}")));
    }
    expected.extend(["load Done", "load Stopped", "take-over RolledBack"].map(str::to_owned));
    let reasons = [
        "FenceUnproven",
        "LocalHung",
        "HookHung",
        "HookFailed",
        "UndoExpired",
        "TakenOverStopped",
        "Superseded",
    ];
    expected.extend(reasons.map(str::to_owned));
    let missing: Vec<_> = expected.iter().filter(|end| !reached.contains(*end)).collect();
    assert!(missing.is_empty(), "never reached: {missing:?}; reached: {reached:?}");
}

/// An oracle that never fails proves nothing: without the first phase it must.
#[test]
fn without_the_first_phase_a_peer_writes_into_a_stopped_one() {
    use super::{machine, plan};
    let members = machine(Operation::Pause, &[MigrationState::Running; 3]).members;
    let broken = |phases| {
        let runs = (0..100u32).filter(|run| {
            let plan = Plan { phases, ..plan(Operation::Pause, members.clone()) };
            let mut world = World::new(plan, &[false; 3]);
            world.begin();
            for step in 0..100 {
                world.act((run * 100 + step).wrapping_mul(2_654_435_761), &Faults::default());
            }
            world.drain();
            world.broken.is_some()
        });
        runs.count()
    };
    assert_eq!(broken(Phases::Two), 0);
    assert!(broken(Phases::SecondOnly) > 50);
}
