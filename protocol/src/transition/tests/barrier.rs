//! The barrier itself: who is told what when, which answers count, and deadlines.

use super::*;
use MigrationState as S;

fn pause_two() -> Script {
    Script::begin(machine(Operation::Pause, &[S::Running, S::Running]))
}

#[test]
fn the_second_phase_is_told_when_the_last_has_reached_the_first() {
    let states = [S::Running; 5];
    let mut script = Script::begin(machine(Operation::Pause, &states));
    assert_eq!(script.sent().len(), 5, "everybody is told before anybody answers");
    for number in [3, 0, 4, 1] {
        script.reach(number);
        assert_eq!(script.sent(), []);
    }
    script.reach(2);
    assert_eq!(script.sent().len(), 5);
    assert!(script.sent().iter().all(|(_, phase, _)| *phase == Phase::Stop));
}

#[test]
fn nothing_happens_before_the_beginning_and_there_is_one_beginning() {
    let mut script = Script::prepare(machine(Operation::Pause, &[S::Running]));
    let early = [Event::Cancel, Event::Fenced(id(0)), Event::Expired(Timer::Undo)];
    for event in early {
        assert_eq!(script.step(event), []);
    }
    assert_eq!(script.step(Event::Begin).len(), 2, "one command and its timer");
    assert_eq!(script.step(Event::Begin), []);
    script.reach_all();
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop)]);
}

#[test]
fn an_answer_counts_only_with_the_term_epoch_phase_and_sender_that_were_asked() {
    let mut script = pause_two();
    let right = Event::Answer {
        from: id(0),
        term: TERM,
        epoch: EPOCH,
        phase: Phase::PrepareStop,
        state: S::RunningP2p,
        answer: Answer::Reached,
    };
    let Event::Answer { from, term, epoch, phase, state, answer } = right else { unreachable!() };
    let status = Answer::Status { moving_to: None };
    let wrong = [
        Event::Answer { from, term: Term(2), epoch, phase, state, answer },
        Event::Answer { from, term: Term(4), epoch, phase, state, answer },
        Event::Answer { from, term, epoch: Epoch(9), phase, state, answer },
        Event::Answer { from, term, epoch: Epoch(11), phase, state, answer },
        Event::Answer { from, term, epoch, phase: Phase::Stop, state: S::Stop, answer },
        Event::Answer { from: id(9), term, epoch, phase, state, answer },
        Event::Answer { from, term, epoch, phase, state, answer: status },
    ];
    for (event, strays) in wrong.into_iter().zip(1..) {
        assert_eq!(script.step(event), [], "{event:?}");
        assert_eq!(script.transition.strays(), strays);
        assert_eq!(script.transition.awaited().count(), 2);
    }
    script.step(right);
    assert_eq!(script.transition.awaited().collect::<Vec<_>>(), [id(1)]);
    script.step(right);
    assert_eq!(script.transition.strays(), 8, "a duplicate");
    script.reach(1);
    assert_eq!(script.sent().len(), 2);
    script.step(right);
    assert_eq!(script.transition.strays(), 9, "an answer of the first phase in the second");
}

#[test]
fn an_answer_that_names_another_state_than_the_target_is_a_breach_of_the_protocol() {
    let mut script = pause_two();
    let effects = script.answer(0, S::Running, Answer::Reached);
    assert!(effects.contains(&Effect::Fence(id(0), Loss::Protocol)), "{effects:?}");
    assert_eq!(script.transition.state(id(0)), None);
}

#[test]
fn one_that_is_quieter_than_a_prepare_stop_asks_for_counts_as_ready() {
    let mut script = pause_two();
    script.answer(0, S::Stop, Answer::Reached);
    script.reach(1);
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
}

#[test]
fn each_participant_has_the_deadline_of_its_own() {
    let slow = Member { first_ns: 900, ..member(1, S::Running) };
    let members = vec![member(0, S::Running), slow, optional(member(2, S::Running))];
    let mut script = Script::begin(plan(Operation::Pause, members));
    let timer = |budget| Timer::Phase(EPOCH, Phase::PrepareStop, budget);
    for budget in [FIRST_NS, 900] {
        assert!(script.effects.contains(&Effect::Arm(timer(budget), budget)));
    }
    script.reach(0);
    let effects = script.expire(timer(FIRST_NS));
    assert_eq!(
        effects,
        [Effect::Fence(id(2), Loss::Timeout), Effect::Arm(Timer::Fence(id(2)), FENCE_NS)],
        "the slow one has time left"
    );
    script.fenced(2);
    script.reach(1);
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
}

#[test]
fn everybody_who_is_late_is_fenced_in_one_undo() {
    let mut script = Script::begin(machine(Operation::Pause, &[S::Running; 4]));
    script.reach(2);
    script.expire(Timer::Phase(EPOCH, Phase::PrepareStop, FIRST_NS));
    let fences: Vec<_> = script
        .effects
        .iter()
        .filter_map(|effect| match effect {
            Effect::Fence(id, Loss::Timeout) => Some(id.0),
            _ => None,
        })
        .collect();
    assert_eq!(fences, [0, 1, 3]);
    let undos = |effect: &&Effect| matches!(effect, Effect::Arm(Timer::Undo, _));
    assert_eq!(script.effects.iter().filter(undos).count(), 1);
    for number in fences {
        assert_eq!(script.sent(), []);
        script.fenced(number);
    }
    assert_eq!(script.sent(), [(2, Phase::Start, S::Running)]);
}

#[test]
fn an_answer_at_the_deadline_counts_if_it_is_seen_first_and_else_not() {
    let timer = Timer::Phase(EPOCH, Phase::PrepareStop, FIRST_NS);
    let mut script = pause_two();
    script.reach(0);
    script.reach(1);
    assert!(script.effects.contains(&Effect::Disarm(timer)));
    assert_eq!(script.expire(timer), [], "the answers were first");

    let mut script = pause_two();
    script.reach(0);
    script.expire(timer);
    assert_eq!(script.reach(1), [], "the deadline was first");
    assert_eq!(script.transition.strays(), 1);
    assert!(script.transition.is_undoing());
}

#[test]
fn without_the_first_phase_everybody_is_told_to_stop_at_once() {
    let mut plan = machine(Operation::Pause, &[S::Running, S::Running]);
    plan.phases = Phases::SecondOnly;
    let mut script = Script::begin(plan);
    assert_eq!(script.sent(), [(0, Phase::Stop, S::Stop), (1, Phase::Stop, S::Stop)]);
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::Done));
    // A start keeps both.
    let mut plan = machine(Operation::Resume, &[S::Stop]);
    plan.phases = Phases::SecondOnly;
    assert_eq!(Script::begin(plan).sent(), [(0, Phase::PrepareStart, S::RunningP2p)]);
}

#[test]
fn a_lease_goes_with_the_stop_of_the_operation_and_with_no_other() {
    let leased = |number| Member { lease_ns: 77, ..member(number, S::Running) };
    let mut script = Script::begin(plan(Operation::Pause, vec![leased(0), leased(1)]));
    assert_eq!(script.asked[&id(0)].lease_ns, 0);
    script.reach_all();
    assert_eq!(script.asked[&id(0)].lease_ns, 77);
    script.refuse(1, S::RunningP2p);
    assert_eq!(script.asked[&id(0)].phase, Phase::Stop);
    assert_eq!(script.asked[&id(0)].epoch, EPOCH.next());
    assert_eq!(script.asked[&id(0)].lease_ns, 0, "the undo's stop is not for long");
}

#[test]
fn nothing_comes_after_the_end() {
    let mut script = pause_two();
    script.reach_all();
    script.reach_all();
    assert_eq!(script.outcome(), Some(&Outcome::Done));
    assert!(script.transition.is_over());
    let after = [
        Event::Begin,
        Event::Cancel,
        Event::Superseded,
        Event::Lost(id(0), Loss::Exited),
        Event::Fenced(id(0)),
        Event::Expired(Timer::Undo),
    ];
    for event in after {
        assert_eq!(script.step(event), []);
    }
}

#[test]
fn a_higher_term_ends_it_at_once() {
    let mut script = pause_two();
    script.step(Event::Superseded);
    assert_eq!(script.outcome(), Some(&held(&[HeldReason::Superseded])));
}
