//! Of several faults, only one that has happened by then explains anything.

use super::*;

const REFUSES: Action = Action::Refuse(16);

/// What is found of a plan of these two faults of devices 0 and 1, by these events.
fn found_of(plan: &Plan, events: Vec<Event>) -> Vec<Violation> {
    let mut fired = vec![false; plan.faults.len()];
    for step in events.iter().filter_map(|event| match event {
        Event::Step(step) => Some(step),
        _ => None,
    }) {
        for &at in step.fired.iter().chain(&step.fired_before) {
            fired[at] = true;
        }
    }
    judge().violations(plan, &Observation { events, fired, ..Observation::default() })
}

fn with(mut event: Event, fired_before: &[usize], fired: &[usize]) -> Event {
    if let Event::Step(step) = &mut event {
        step.fired_before = fired_before.iter().copied().collect();
        step.fired = fired.iter().copied().collect();
    }
    event
}

fn pause(round: u32, ended: Ended, machine: MachineState, fired: &[usize]) -> Event {
    with(step(round, Act::Pause, ended, machine), &[], fired)
}

fn degraded(device: usize) -> Ended {
    Ended::Degraded { fenced: BTreeSet::from([device]) }
}

/// Device 0 does this when it is told to stop, and device 1 that.
fn two(first: Action, second: Action) -> Plan {
    let at = |action| Fault::new(Point::Receipt(Phase::Stop), action);
    Plan::new(3).rounds(2).fault(0, at(first)).fault(1, at(second))
}

fn unexplained(violations: &[Violation]) -> bool {
    violations.iter().any(|violation| matches!(violation, Violation::Unexplained { .. }))
}

#[test]
fn a_refusal_explains_the_step_in_which_it_has_come_and_no_other() {
    use MachineState::Running;
    let plan = two(REFUSES, Action::DelayMs(5));
    let rolled_back = |round, fired: &[usize]| pause(round, Ended::RolledBack, Running, fired);
    let [again, resume] = done(2);
    let events = vec![rolled_back(1, &[0, 1]), again, resume];
    assert_eq!(found_of(&plan, events), []);
    // It has not come yet.
    let [_, resume] = done(2);
    let second = pause(2, Ended::Done, MachineState::Stopped, &[]);
    let events = vec![rolled_back(1, &[1]), second, resume];
    assert!(unexplained(&found_of(&plan, events)));
    // It is over.
    let events = vec![rolled_back(1, &[0, 1]), rolled_back(2, &[])];
    assert!(unexplained(&found_of(&plan, events)));
}

#[test]
fn a_device_that_hangs_explains_what_comes_until_it_is_lost() {
    use MachineState::{Running, Stopped};
    let hangs = Fault::new(Point::AfterAck(Phase::Stop), Action::Stop);
    let slow = Fault::new(Point::Receipt(Phase::Stop), Action::DelayMs(5));
    let plan = Plan::new(3).rounds(3).fault(0, hangs).fault(1, slow);
    let resume = |round| step(round, Act::Resume, degraded(0), Stopped);
    let [first, _] = done(1);
    let [_, last] = done(1);
    let events = vec![with(first, &[], &[0, 1]), resume(1), last];
    assert_eq!(found_of(&plan, events.clone()), []);
    // Whoever is fenced a second time is another process, which has done nothing wrong.
    let again = vec![pause(2, degraded(0), Running, &[])];
    let violations = found_of(&plan, [events, again].concat());
    assert!(unexplained(&violations), "{violations:?}");
    assert!(violations.contains(&Violation::Innocent { round: 2, device: 0 }), "{violations:?}");
}

#[test]
fn somebody_who_was_fenced_must_have_had_his_fault_by_then() {
    use MachineState::Running;
    let plan = two(Action::Abort, Action::Abort);
    let [second, resume] = done(2);
    let of = |device, fired: &[usize]| {
        let first = pause(1, degraded(device), Running, fired);
        found_of(&plan, vec![first, with(second.clone(), &[], &[]), resume.clone()])
    };
    assert!(!unexplained(&of(0, &[0])));
    let violations = of(1, &[0]);
    assert!(violations.contains(&Violation::Innocent { round: 1, device: 1 }), "{violations:?}");
    assert!(unexplained(&of(1, &[])));
}

#[test]
fn a_pause_is_never_refused_because_a_declaration_is() {
    let memory = Fault::new(Point::Memory, Action::NoAck);
    let plan = Plan::new(3).fault(0, memory).fault(1, Fault::new(Point::Memory, Action::TwoAcks));
    let refused = || Ended::Refused("no".into());
    let declared = with(step(1, Act::Declare, refused(), MachineState::Running), &[], &[0, 1]);
    let events = vec![declared.clone(), done(1)[0].clone(), done(1)[1].clone()];
    assert!(!unexplained(&found_of(&plan, events)));
    let pause = step(1, Act::Pause, refused(), MachineState::Running);
    assert!(unexplained(&found_of(&plan, vec![declared, pause])));
}

#[test]
fn who_only_holds_an_answer_back_or_does_no_harm_is_innocent() {
    let lost = |plan: &Plan, device| {
        let mut seen = death().1;
        let ended = Ended::Degraded { fenced: BTreeSet::from([1, device]) };
        seen.events[0] = pause(1, ended, MachineState::Running, &[0, 1]);
        seen.fired = vec![true, true];
        judge().violations(plan, &seen)
    };
    let innocent = [Violation::Innocent { round: 1, device: 2 }];
    let dies = fault(Point::AfterAck(Phase::Stop), Action::Abort);
    let held = dies.outside(2, Moment::Answer(Phase::Stop), OutsideAction::Hold);
    assert_eq!(lost(&held, 2), innocent);
    for action in [Action::DelayMs(5), Action::MessageFlood(10)] {
        let harmless = death().0.fault(2, Fault::new(Point::Receipt(Phase::Stop), action));
        assert_eq!(lost(&harmless, 2), innocent, "{action:?}");
    }
    // One whose coordinator's loss came with a packet of his.
    let seen = happened(
        [0],
        Observation {
            events: vec![step(1, Act::TakeOver, degraded(1), MachineState::Running)],
            fired: vec![true],
            ..Observation::default()
        },
    );
    let (answer, kill) = (Moment::Answer(Phase::PrepareStop), OutsideAction::KillCoordinator);
    let violations = judge().violations(&Plan::new(3).outside(1, answer, kill), &seen);
    assert!(violations.contains(&Violation::Innocent { round: 1, device: 1 }), "{violations:?}");
}

#[test]
fn who_refuses_on_the_way_back_is_fenced_and_not_innocent() {
    let refuses = |phase| Fault::new(Point::Receipt(phase), REFUSES);
    let plan = Plan::new(3).policy(Policy::StayStopped);
    let plan = plan.fault(0, refuses(Phase::PrepareStop)).fault(1, refuses(Phase::Stop));
    let undone = pause(1, degraded(1), MachineState::Stopped, &[0, 1]);
    let [_, resume] = done(1);
    assert_eq!(found_of(&plan, vec![undone, resume]), []);
}
