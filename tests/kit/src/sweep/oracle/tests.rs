//! Every check holds for an honest run, and each can fail by itself.

mod explained;
mod liars;

use super::*;
use crate::plan::{HookAction, Moment, Outside, OutsideAction, Place as HookPlace, Policy};
use crate::sweep::observation::Survivor;
use crate::trace::Call;
use standstill_protocol::message::Phase;

fn judge() -> Judge {
    Judge { expected: Expected::ours().unwrap(), times: Times::default(), knows_liars: true }
}

fn step(round: u32, act: Act, ended: Ended, machine: MachineState) -> Event {
    let state = match machine {
        MachineState::Running => MigrationState::Running,
        MachineState::Stopped | MachineState::Held | MachineState::LeaseExpired => {
            MigrationState::Stop
        }
    };
    let gone = match &ended {
        Ended::Degraded { fenced } => fenced.clone(),
        _ => BTreeSet::new(),
    };
    let survivor = |device| Survivor { device, status: Some(state), answered: Some(state) };
    let survivors = (0..3).filter(|device| !gone.contains(device)).map(survivor).collect();
    let none = BTreeSet::new;
    let (fired_before, fired, hooks_fired) = (none(), none(), none());
    let took = Duration::from_millis(5);
    Event::Step(Step {
        round,
        act,
        ended,
        machine,
        survivors,
        fired_before,
        fired,
        hooks_fired,
        took,
    })
}

fn done(round: u32) -> [Event; 2] {
    [
        step(round, Act::Pause, Ended::Done, MachineState::Stopped),
        step(round, Act::Resume, Ended::Done, MachineState::Running),
    ]
}

fn fault(point: Point, action: Action) -> Plan {
    Plan::new(3).fault(1, Fault::new(point, action))
}

/// The same, with those faults in the first step.
fn happened<const N: usize>(faults: [usize; N], mut seen: Observation) -> Observation {
    first(&mut seen).fired = BTreeSet::from(faults);
    seen
}

/// Device 1 dies when it is told to stop, and is fenced; the machine runs on without it.
fn death() -> (Plan, Observation) {
    let degraded = Ended::Degraded { fenced: BTreeSet::from([1]) };
    let mut events = vec![step(1, Act::Pause, degraded, MachineState::Running)];
    events.extend(done(2));
    let plan = fault(Point::Receipt(Phase::Stop), Action::Abort);
    (plan, happened([0], Observation { events, fired: vec![true], ..Observation::default() }))
}

/// Device 1 goes on writing after its answer.
fn lie() -> (Plan, Observation) {
    let plan = fault(Point::BeforeAck(Phase::Stop), Action::KeepDma);
    let late = vec![(1, "engine1 wrote".to_owned())];
    let events = [done(1), done(2)].concat();
    (plan, happened([0], Observation { events, fired: vec![true], late, ..Observation::default() }))
}

/// What is found if one thing is not as it was.
fn found(spoil: impl FnOnce(&mut Plan, &mut Observation)) -> Vec<Violation> {
    let (mut plan, mut seen) = death();
    spoil(&mut plan, &mut seen);
    judge().violations(&plan, &seen)
}

fn first(seen: &mut Observation) -> &mut Step {
    match &mut seen.events[0] {
        Event::Step(step) => step,
        _ => panic!("not a step"),
    }
}

#[test]
fn what_the_table_says_is_no_violation() {
    assert_eq!(found(|_, _| {}), []);
    let (plan, seen) = lie();
    assert_eq!(judge().violations(&plan, &seen), []);
    let seen = Observation { events: [done(1), done(2)].concat(), ..Observation::default() };
    assert_eq!(judge().violations(&Plan::new(3), &seen), []);
}

#[test]
fn another_outcome_is_found() {
    let violations = found(|_, seen| first(seen).ended = Ended::RolledBack);
    assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
    let text = violations[0].to_string();
    assert_eq!(text, "expected Degraded running, found RolledBack");
    // The same, later.
    let violations = found(|_, seen| {
        seen.events[2] = step(2, Act::Resume, Ended::RolledBack, MachineState::Stopped);
    });
    assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
    // Under another policy it would be right to stop.
    let violations = found(|plan, _| plan.policy = Policy::StayStopped);
    assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
}

#[test]
fn what_happens_before_the_fault_must_be_done() {
    let violations = found(|plan, seen| {
        *plan = fault(Point::Receipt(Phase::Start), Action::Abort);
        let degraded = Ended::Degraded { fenced: BTreeSet::from([1]) };
        seen.events = vec![
            step(1, Act::Pause, Ended::Stopped, MachineState::Stopped),
            step(1, Act::Resume, degraded, MachineState::Stopped),
        ];
        if let Event::Step(resume) = &mut seen.events[1] {
            resume.fired = BTreeSet::from([0]);
        }
    });
    assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
}

#[test]
fn a_machine_without_faults_must_be_done() {
    let held = step(1, Act::Pause, Ended::Held, MachineState::Held);
    let seen = Observation { events: vec![held], ..Observation::default() };
    let violations = judge().violations(&Plan::new(3), &seen);
    assert!(matches!(violations[..], [Violation::Unexplained { .. }]), "{violations:?}");
}

#[test]
fn a_fault_that_the_table_does_not_know_is_told() {
    let violations = found(|plan, _| *plan = fault(Point::Saving, Action::Abort));
    assert!(matches!(violations[..], [Violation::NotInTheTable(_)]), "{violations:?}");
}

#[test]
fn an_innocent_who_is_fenced_or_lost_is_found() {
    let violations = found(|_, seen| {
        first(seen).ended = Ended::Degraded { fenced: BTreeSet::from([1, 2]) };
    });
    assert_eq!(violations, [Violation::Innocent { round: 1, device: 2 }]);
    let violations = found(|_, seen| seen.events.push(Event::Lost { round: 2, device: 0 }));
    assert!(violations.contains(&Violation::Innocent { round: 2, device: 0 }), "{violations:?}");
}

#[test]
fn a_survivor_elsewhere_is_found_by_the_status_and_by_its_own_words() {
    type Spoil = fn(&mut Survivor);
    let spoils: [Spoil; 3] = [
        |survivor| survivor.status = Some(MigrationState::Stop),
        |survivor| survivor.status = None,
        |survivor| survivor.answered = Some(MigrationState::RunningP2p),
    ];
    for spoil in spoils {
        let violations = found(|_, seen| spoil(&mut first(seen).survivors[1]));
        assert!(
            matches!(violations[..], [Violation::Scattered { round: 1, device: 2, .. }]),
            "{violations:?}"
        );
    }
}

#[test]
fn a_fault_that_has_not_happened_is_found() {
    for fired in [vec![false], vec![]] {
        let violations = found(|_, seen| seen.fired = fired);
        assert!(matches!(violations[..], [Violation::Unfired(_)]), "{violations:?}");
    }
}

#[test]
fn of_several_faults_one_may_keep_the_others_from_happening_and_not_all() {
    // Device 1 is lost in the first round, by the first fault.
    let two = |device, round, second, fired| {
        found(|plan, seen| {
            let cause = Cause::Inside(Fault::new(second, Action::Abort));
            *plan = plan.clone().rounds(2).inject(Injection { device, round, cause });
            seen.fired = fired;
            first(seen).fired = BTreeSet::from([0]);
        })
    };
    let unfired = |violations: Vec<Violation>| {
        let own = violations.iter().filter(|v| matches!(v, Violation::Unfired(_)));
        own.count()
    };
    for point in [Point::Receipt(Phase::Start), Point::Shutdown, Point::Mmio, Point::Memory] {
        for round in [1, 2] {
            assert_eq!(two(1, round, point, vec![true, false]), [], "{point:?} {round}");
        }
        assert_eq!(unfired(two(1, 1, point, vec![false, false])), 2, "{point:?}");
    }
    // Nothing has kept device 2 from it, in the resume of the second round at the latest.
    for point in [Point::Receipt(Phase::Start), Point::AfterAck(Phase::Stop), Point::Shutdown] {
        assert_eq!(unfired(two(2, 1, point, vec![true, false])), 1, "{point:?}");
    }
    // Of one and the same device, what comes first has to happen; what comes later need not.
    assert_eq!(two(1, 1, Point::BeforeAck(Phase::Stop), vec![true, false]), []);
    // There was no declaration, and no resume in the first round.
    assert_eq!(two(2, 1, Point::Memory, vec![true, false]), []);
    let stopped = |seen: &Observation| {
        unfired({
            let (mut plan, _) = death();
            plan = plan.outside(2, Moment::Stopped, OutsideAction::Kill);
            judge().violations(&plan, seen)
        })
    };
    let (_, mut seen) = death();
    seen.fired = vec![true, false];
    assert_eq!(stopped(&seen), 0);
    first(&mut seen).machine = MachineState::Stopped;
    assert_eq!(stopped(&seen), 1);
}

#[test]
fn who_ends_while_the_machine_stands_need_not_have_a_fault_of_that_time() {
    let kills = Plan::new(3).outside(1, Moment::Stopped, OutsideAction::Kill);
    let two = kills.fault(1, Fault::new(Point::Mmio, Action::Abort));
    let [pause, mut resume] = done(1);
    let unfired = |resume: &Event| {
        let events = vec![pause.clone(), Event::Lost { round: 1, device: 1 }, resume.clone()];
        let seen = Observation { events, fired: vec![false, true], ..Observation::default() };
        judge().violations(&two, &seen).contains(&Violation::Unfired(two.faults[0].clone()))
    };
    assert!(unfired(&resume));
    if let Event::Step(step) = &mut resume {
        step.fired_before = BTreeSet::from([1]);
    }
    assert!(!unfired(&resume));
}

#[test]
fn a_device_that_is_back_has_its_later_faults() {
    let unfired = |policy| {
        let violations = found(|plan, seen| {
            let cause = Cause::Inside(Fault::new(Point::Receipt(Phase::Stop), Action::Abort));
            *plan = plan.clone().policy(policy).rounds(2);
            *plan = plan.clone().inject(Injection { device: 1, round: 2, cause });
            seen.fired = vec![true, false];
            first(seen).fired = BTreeSet::from([0]);
        });
        violations.iter().any(|violation| matches!(violation, Violation::Unfired(_)))
    };
    assert!(unfired(Policy::Restart));
    assert!(!unfired(Policy::Rollback));
}

#[test]
fn with_several_faults_none_is_done_in_which_one_was_silent_or_refused() {
    let pause = |action, policy| {
        found(|plan, seen| {
            let fault = Fault::new(Point::Receipt(Phase::Stop), action);
            *plan = Plan::new(3).policy(policy).fault(1, fault);
            *plan = plan.clone().fault(2, Fault::new(Point::Mmio, Action::DelayMs(1)));
            seen.fired = vec![true, true];
            seen.events = [done(1), done(2)].concat();
            first(seen).fired = BTreeSet::from([0, 1]);
        })
    };
    for action in [Action::NoAck, Action::Spin, Action::Abort, Action::Refuse(5)] {
        for policy in [Policy::Rollback, Policy::StayStopped, Policy::ContinueWithout] {
            let violations = pause(action, policy);
            assert!(
                matches!(violations[..], [Violation::Unexplained { ended: Ended::Done, .. }]),
                "{action:?} {policy}: {violations:?}"
            );
        }
    }
    assert_eq!(pause(Action::DelayMs(5), Policy::Rollback), []);
    // It is started again, and has its fault on the way into the machine: that is none of the pause.
    let between = found(|plan, seen| {
        *plan = Plan::new(3).policy(Policy::Restart);
        for action in [OutsideAction::Merge, OutsideAction::Corrupt] {
            *plan = plan.clone().outside(1, Moment::Answer(Phase::Stop), action);
        }
        seen.fired = vec![true, true];
        if let Event::Step(pause) = &mut seen.events[1] {
            pause.fired_before = BTreeSet::from([0]);
        }
    });
    assert_eq!(between, []);
    // A device that stands before the pause cannot take part in it; one that is lost before, need not.
    let stands = |lost: bool| {
        found(|plan, seen| {
            *plan = Plan::new(3).outside(1, Moment::Running, OutsideAction::StopMs(0));
            *plan = plan.clone().outside(1, Moment::Running, OutsideAction::Kill);
            seen.fired = vec![true, true];
            seen.events = [done(1), done(2)].concat();
            first(seen).fired_before = BTreeSet::from([0, 1]);
            if lost {
                seen.events.insert(0, Event::Lost { round: 1, device: 1 });
            }
        })
    };
    assert!(matches!(stands(false)[..], [Violation::Unexplained { .. }]));
    assert_eq!(stands(true), []);
}

#[test]
fn what_the_table_says_nothing_of_is_refused() {
    let refused = |plan: &Plan| judge().accepts(plan).unwrap_err().to_string();
    for point in [Point::Saving, Point::Loading] {
        let text = refused(&fault(point, Action::Abort));
        assert!(text.contains("never gets there"), "{text}");
    }
    let damage = OutsideAction::CorruptAt(9);
    let text = refused(&Plan::new(3).outside(1, Moment::Command(Phase::Stop), damage));
    assert!(text.contains("corrupted at byte 9") && text.contains("says nothing"), "{text}");
    let coordinator = Plan::new(3).outside(1, Moment::Running, OutsideAction::KillCoordinator);
    judge().accepts(&coordinator).unwrap();
    let too = coordinator.clone().outside(2, Moment::Stopped, OutsideAction::Kill);
    let text = refused(&too);
    assert!(text.contains("SIGKILL for the coordinator") && text.contains("together"), "{text}");
    let too = coordinator.hook(HookPlace::After, Call::Stop, HookAction::Fail);
    assert!(refused(&too).contains("together"));
    // A query comes in a take-over alone.
    let query = fault(Point::Query, Action::Abort);
    assert!(refused(&query).contains("no coordinator is lost"));
    let (running, kill) = (Moment::Running, OutsideAction::KillCoordinator);
    judge().accepts(&query.clone().outside(2, running, kill)).unwrap();
    assert!(refused(&query.outside(2, Moment::Stopped, kill)).contains("together"));
    let forever = OutsideAction::StopCoordinatorMs(60_000);
    let late = Plan::new(3).outside(1, Moment::Answer(Phase::Stop), forever);
    assert!(refused(&late).contains("says nothing"));
    judge().accepts(&death().0).unwrap();
    judge().accepts(&lie().0).unwrap();
}

/// Device 1 ends at its Hello, in that round.
fn at_hello(plan: Plan, round: u32, nth: u32) -> Plan {
    let fault = Fault::new(Point::Hello, Action::Exit(1)).nth(nth);
    plan.rounds(2).inject(Injection { device: 1, round, cause: Cause::Inside(fault) })
}

/// A machine that does not start for a device's sake.
fn not_started(device: usize) -> Observation {
    let why = "it has ended".to_owned();
    let events = vec![Event::NotStarted { device, why }];
    Observation { events, fired: vec![true], ..Observation::default() }
}

#[test]
fn a_machine_starts_unless_somebody_has_not_greeted_as_he_should() {
    let (alone, seen) = (at_hello(Plan::new(3), 1, 1), not_started(1));
    assert_eq!(judge().violations(&alone, &seen), []);
    let violations = judge().violations(&alone, &not_started(2));
    assert_eq!(violations, [Violation::Innocent { round: 1, device: 2 }]);
    // With a second fault, which does not happen: what comes of the first one stays.
    let two = alone.fault(2, Fault::new(Point::Receipt(Phase::Stop), Action::Abort));
    assert_eq!(judge().violations(&two, &seen), []);
    let other = |violation: &Violation| matches!(violation, Violation::Outcome { .. });
    let started = Observation {
        events: [done(1), done(2)].concat(),
        fired: vec![true, false],
        ..Observation::default()
    };
    assert!(judge().violations(&two, &started).iter().any(other));
    let nobodys = Observation { fired: vec![false, true], ..seen };
    assert!(judge().violations(&two, &nobodys).iter().any(other));
    // It has started without the fault.
    let without = Observation { fired: vec![false, true], ..started };
    let violations = judge().violations(&two, &without);
    assert!(violations.contains(&Violation::Unfired(two.faults[0].clone())), "{violations:?}");
}

#[test]
fn a_fault_at_a_hello_that_does_not_come_is_refused() {
    let refused = |plan: &Plan| judge().accepts(plan).unwrap_err().to_string();
    let restart = || Plan::new(3).policy(Policy::Restart);
    let dies = |plan: Plan| plan.outside(1, Moment::Running, OutsideAction::Kill);
    judge().accepts(&at_hello(dies(restart()), 2, 0)).unwrap();
    assert!(refused(&at_hello(restart(), 2, 1)).contains("greet again"));
    assert!(refused(&at_hello(dies(Plan::new(3)), 2, 1)).contains("no such thing"));
    let twice = at_hello(at_hello(Plan::new(3), 1, 1), 1, 1);
    assert!(refused(&twice).contains("at that Hello already"));
    assert!(refused(&at_hello(Plan::new(3), 1, 2)).contains("greets once"));
}

/// The coordinator is killed with the answer to `Stop` on its way, and the take-over ends like this.
fn lost_coordinator(ended: Ended, machine: MachineState) -> Vec<Violation> {
    let answer = Moment::Answer(Phase::Stop);
    let plan = Plan::new(3).outside(1, answer, OutsideAction::KillCoordinator);
    let mut events = vec![step(1, Act::TakeOver, ended, machine)];
    if machine == MachineState::Held {
        events.push(step(1, Act::Resume, Ended::Done, MachineState::Running));
    }
    events.extend(done(2));
    judge().violations(&plan, &Observation { events, fired: vec![true], ..Observation::default() })
}

#[test]
fn a_machine_that_had_stopped_is_held_when_it_is_taken_over() {
    use MachineState::{Held, Running};
    assert_eq!(lost_coordinator(Ended::Held, Held), []);
    for (ended, machine) in [(Ended::Done, Running), (Ended::RolledBack, Running)] {
        let violations = lost_coordinator(ended, machine);
        assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
    }
    let lost = Ended::Degraded { fenced: BTreeSet::from([2]) };
    let violations = lost_coordinator(lost, Held);
    assert!(violations.contains(&Violation::Innocent { round: 1, device: 2 }), "{violations:?}");
}

#[test]
fn who_only_holds_others_back_must_do_so() {
    let (answer, hold) = (Moment::Answer(Phase::Stop), OutsideAction::Hold);
    let two = |fired| {
        found(|plan, seen| {
            *plan = fault(Point::AfterAck(Phase::Stop), Action::Abort);
            *plan = plan.clone().outside(2, answer, hold);
            seen.fired = fired;
        })
    };
    assert_eq!(two(vec![true, true]), []);
    assert!(matches!(two(vec![true, false])[..], [Violation::Unfired(_)]));
    // One that holds nothing back for anybody is nothing that the table knows.
    let alone = Plan::new(3).outside(2, answer, hold);
    assert!(judge().accepts(&alone).unwrap_err().to_string().contains("packet held back"));
    judge().accepts(&death().0.outside(2, answer, hold)).unwrap_err();
    // Without it, the death may come after the last answer; with it, not.
    let abort = Cause::Inside(Fault::new(Point::AfterAck(Phase::Stop), Action::Abort));
    let kill = Cause::Outside(Outside { moment: answer, action: OutsideAction::Kill });
    for cause in [abort, kill] {
        let lost = |plan: &mut Plan, seen: &mut Observation| {
            plan.faults[0].cause = cause.clone();
            let [pause, resume] = done(1);
            seen.events = vec![pause, Event::Lost { round: 1, device: 1 }, resume];
            first(seen).fired = BTreeSet::from([0]);
        };
        assert_eq!(found(lost), []);
        let violations = found(|plan, seen| {
            lost(plan, seen);
            *plan = plan.clone().outside(2, answer, hold);
            judge().accepts(plan).unwrap();
            seen.fired = vec![true, true];
        });
        assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
    }
}

#[test]
fn with_several_faults_an_end_must_be_one_that_a_fault_explains() {
    let refuses = Fault::new(Point::Receipt(Phase::PrepareStop), Action::Refuse(5));
    let ended = |ended, machine| {
        found(|plan, seen| {
            *plan = plan.clone().fault(2, refuses);
            seen.fired = vec![true, true];
            seen.events[0] = step(1, Act::Pause, ended, machine);
            first(seen).fired = BTreeSet::from([0, 1]);
        })
    };
    let fenced = || Ended::Degraded { fenced: BTreeSet::from([1]) };
    assert_eq!(ended(Ended::RolledBack, MachineState::Running), []);
    assert_eq!(ended(fenced(), MachineState::Running), []);
    let declared = found(|plan, seen| {
        *plan = plan.clone().fault(2, refuses);
        seen.fired = vec![true, true];
        let refused = Ended::Refused("it is lost".into());
        seen.events.insert(0, step(1, Act::Declare, refused, MachineState::Running));
        first(seen).fired = BTreeSet::from([0]);
    });
    assert_eq!(declared, []);
    // A pause that is rolled back does not leave the others stopped.
    for violations in [
        ended(fenced(), MachineState::Stopped),
        ended(Ended::Stopped, MachineState::Stopped),
        ended(Ended::Held, MachineState::Held),
    ] {
        assert!(matches!(violations[..], [Violation::Unexplained { .. }]), "{violations:?}");
    }
}

#[test]
fn a_late_write_is_found_unless_its_liar_is_known() {
    let late = |_: &mut Plan, seen: &mut Observation| seen.late.push((2, "RAM changed".into()));
    assert!(matches!(found(late)[..], [Violation::Late { round: 2, .. }]));
    let (plan, seen) = lie();
    let unknown = Judge { knows_liars: false, ..judge() };
    let violations = unknown.violations(&plan, &seen);
    assert!(matches!(violations[..], [Violation::Late { round: 1, .. }]), "{violations:?}");
    // It lies in the first round, not in the second.
    let later = Observation { late: vec![(2, "engine1 wrote".into())], ..seen };
    let violations = judge().violations(&plan, &later);
    assert!(violations.contains(&Violation::Late { round: 2, what: "engine1 wrote".into() }));
}

#[test]
fn a_liar_that_nobody_notices_is_found() {
    let (plan, seen) = lie();
    let blind = Observation { late: Vec::new(), ..seen };
    for knows_liars in [true, false] {
        let violations = Judge { knows_liars, ..judge() }.violations(&plan, &blind);
        assert_eq!(violations, [Violation::Blind { round: 1 }]);
    }
}

#[test]
fn what_does_not_work_and_what_is_left_is_told() {
    let violations = found(|_, seen| seen.idle.push((1, "engine2 is idle".into())));
    assert_eq!(violations, [Violation::Idle { round: 1, what: "engine2 is idle".into() }]);
    let violations = found(|_, seen| seen.left.push("engine2".into()));
    assert_eq!(violations, [Violation::Left("engine2".into())]);
}

#[test]
fn a_call_that_is_slow_is_found_and_a_silent_device_gives_it_more_time() {
    let times = Times::default();
    let slow = |_: &mut Plan, seen: &mut Observation| {
        first(seen).took = times.grace + Duration::from_millis(1);
    };
    assert!(matches!(found(slow)[..], [Violation::Slow { act: Act::Pause, .. }]));
    let silent = |plan: &mut Plan, seen: &mut Observation| {
        slow(plan, seen);
        plan.faults[0].cause = Cause::Inside(Fault::new(Point::Receipt(Phase::Stop), Action::Spin));
    };
    assert_eq!(found(silent), []);
    let outside = |plan: &mut Plan, seen: &mut Observation| {
        slow(plan, seen);
        *plan = Plan::new(3).outside(1, Moment::Command(Phase::Stop), OutsideAction::Drop);
    };
    assert_eq!(found(outside), []);
}

/// A pause that ends like this in a machine with that fault of a hook, and with others, which has fired.
fn with_hook(plan: &Plan, ended: Ended, machine: MachineState) -> Vec<Violation> {
    let mut pause = step(1, Act::Pause, ended, machine);
    let Event::Step(first) = &mut pause else { panic!("not a step") };
    first.hooks_fired = (0..plan.hooks.len()).collect();
    first.fired = (0..plan.faults.len()).collect();
    let mut events = vec![pause];
    if machine == MachineState::Running {
        events.extend(done(2));
    }
    let (hooks_fired, fired) = ((0..plan.hooks.len()).collect(), vec![true; plan.faults.len()]);
    judge().violations(plan, &Observation { events, hooks_fired, fired, ..Observation::default() })
}

#[test]
fn a_hook_that_fails_undoes_and_one_that_hangs_holds() {
    use MachineState::{Held, Running};
    let plan = |action| Plan::new(3).hook(HookPlace::Between, Call::Stop, action);
    let (fails, hangs) = (HookAction::Fail, HookAction::StickMs(0));
    assert_eq!(with_hook(&plan(fails), Ended::RolledBack, Running), []);
    assert_eq!(with_hook(&plan(hangs), Ended::Held, Held), []);
    for (action, ended, machine) in [
        (fails, Ended::Held, Held),
        (hangs, Ended::RolledBack, Running),
        (fails, Ended::Done, Held),
    ] {
        let violations = with_hook(&plan(action), ended, machine);
        assert!(matches!(violations[..], [Violation::Outcome { .. }]), "{violations:?}");
    }
}

#[test]
fn a_hook_that_fails_on_the_way_back_holds_and_only_there() {
    use MachineState::{Held, Running};
    let fails = HookAction::Fail;
    let refuses = fault(Point::Receipt(Phase::Stop), Action::Refuse(16));
    let on = |call| refuses.clone().hook(HookPlace::Before, call, fails);
    assert_eq!(with_hook(&on(Call::Start), Ended::Held, Held), []);
    assert_eq!(with_hook(&on(Call::Stop), Ended::RolledBack, Running), []);
    // It is none of the calls of an undo that goes back.
    let violations = with_hook(&on(Call::Stop), Ended::Held, Held);
    assert!(matches!(violations[..], [Violation::Unexplained { .. }]), "{violations:?}");
    // Nor is it one if a device is lost while the hook is called.
    let dies = fault(Point::AfterAck(Phase::Stop), Action::Abort);
    let both = dies.hook(HookPlace::After, Call::Stop, fails);
    let violations = with_hook(&both, Ended::Held, Held);
    assert!(matches!(violations[..], [Violation::Unexplained { .. }]), "{violations:?}");
    // With nothing that fails before it there is no way back.
    let twice = Plan::new(3).hook(HookPlace::Before, Call::Start, fails);
    let slow = twice.hook(HookPlace::After, Call::Stop, HookAction::StickMs(1));
    let violations = with_hook(&slow, Ended::Done, Running);
    assert!(
        violations.iter().any(|v| matches!(v, Violation::Unexplained { .. })),
        "{violations:?}"
    );
}

#[test]
fn without_whom_a_machine_goes_on_it_goes_back_if_a_hook_fails_too() {
    let dies = fault(Point::Receipt(Phase::PrepareStop), Action::Abort);
    let plan = dies.policy(Policy::ContinueWithout);
    let both = plan.hook(HookPlace::Between, Call::Stop, HookAction::Fail);
    let degraded = || Ended::Degraded { fenced: BTreeSet::from([1]) };
    assert_eq!(with_hook(&both, degraded(), MachineState::Running), []);
    let violations = with_hook(&both, degraded(), MachineState::Stopped);
    assert!(matches!(violations[..], [Violation::Unexplained { .. }]), "{violations:?}");
}

#[test]
fn a_call_of_a_hook_does_one_thing() {
    let slow = Plan::new(3).hook(HookPlace::After, Call::Stop, HookAction::StickMs(1));
    assert!(slow.clone().hook(HookPlace::After, Call::Start, HookAction::Fail).check().is_ok());
    let error = slow.hook(HookPlace::After, Call::Stop, HookAction::Fail).check().unwrap_err();
    assert!(error.to_string().contains("happens in that call already"), "{error}");
}

#[test]
fn a_hook_that_was_not_called_is_told_if_it_must_have_been() {
    let plan = Plan::new(3).hook(HookPlace::Before, Call::Start, HookAction::StickMs(1));
    let events = [done(1), done(2)].concat();
    let seen = Observation { events, ..Observation::default() };
    let violations = judge().violations(&plan, &seen);
    assert!(matches!(violations[..], [Violation::UnfiredHook(_)]), "{violations:?}");
    // Another fault is no excuse if there were resumes.
    let two = plan.outside(1, Moment::Running, OutsideAction::StopMs(1));
    let violations = judge().violations(&two, &Observation { fired: vec![true], ..seen });
    assert!(matches!(violations[..], [Violation::UnfiredHook(_)]), "{violations:?}");
}
