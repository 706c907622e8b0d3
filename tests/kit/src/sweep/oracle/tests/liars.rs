//! A liar is found wherever its machine stands.

use super::*;

/// Device 1 lies when it is told to stop the second time: in the undo of a resume that device 0 refuses. The
/// resume ends like this, in that round, and these bytes are seen late.
fn undone(
    round: u32,
    ended: Ended,
    machine: MachineState,
    late: Vec<(u32, String)>,
) -> Vec<Violation> {
    let refuses = Fault::new(Point::Receipt(Phase::Start), Action::Refuse(16));
    let lies = Fault::new(Point::BeforeAck(Phase::Stop), Action::KeepDma).nth(2);
    let plan = Plan::new(3).rounds(2).fault(0, refuses).fault(1, lies);
    let [pause, resume] = done(round);
    let mut failed = step(round, Act::Resume, ended, machine);
    if let Event::Step(step) = &mut failed {
        step.fired = BTreeSet::from([0, 1]);
    }
    let before = done(1).into_iter().take(2 * (round as usize - 1));
    let events = before.chain([pause, failed, resume]).collect();
    let seen = Observation { events, fired: vec![true, true], late, ..Observation::default() };
    judge().violations(&plan, &seen)
}

#[test]
fn one_that_lies_in_an_undo_is_found_while_the_machine_stands_after_it() {
    let late = |round| vec![(round, "guest RAM changed".to_owned())];
    for round in [1, 2] {
        let stands = |late| undone(round, Ended::RolledBack, MachineState::Stopped, late);
        assert_eq!(stands(late(round)), [], "round {round}");
        assert_eq!(stands(Vec::new()), [Violation::Blind { round }]);
    }
    // It is the round in which it lies that counts, not the one from which it could.
    let elsewhere = undone(2, Ended::RolledBack, MachineState::Stopped, late(1));
    assert!(elsewhere.iter().any(|violation| matches!(violation, Violation::Late { .. })));
}

#[test]
fn one_that_is_fenced_or_runs_again_shows_nothing() {
    let fenced = Ended::Degraded { fenced: BTreeSet::from([1]) };
    let blind = |violations: Vec<Violation>| violations.contains(&Violation::Blind { round: 1 });
    assert!(!blind(undone(1, fenced, MachineState::Stopped, Vec::new())));
    assert!(!blind(undone(1, Ended::Done, MachineState::Running, Vec::new())));
    assert!(blind(undone(1, Ended::Held, MachineState::Held, Vec::new())));
}
