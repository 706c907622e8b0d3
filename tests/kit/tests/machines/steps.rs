//! A transition in four calls: what holds after each, and what becomes of one that is given up.

use crate::fixture::{
    LONG, SHORT, assert_all_in, assert_machine, builder, fenced, honest, report_of, start, three,
};
use crate::supervised::{events_until, signal};
use rustix::process::Signal;
use standstill_coordinator::error::MachineError;
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{HookSpec, Machine, MachineEvent, Operation, Outcome, Slot, Stopped};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Call, Gate, Script, Step, Trace, TracedHook, What, within};
use std::sync::Arc;
use std::time::Duration;

const NAMES: [&str; 2] = ["d0", "d1"];

/// Two honest devices.
async fn two(trace: &Trace) -> Machine {
    start(builder().devices(NAMES.map(|name| honest(name, trace)))).await
}

/// An honest device, and one that is held where it is told that phase for the first time.
async fn two_of_which_one_is_held(trace: &Trace, phase: Phase, gate: &Gate) -> Machine {
    let slow = Script::honest().on_nth(phase, 1, [Step::hold(gate), Step::Ack]);
    let devices = [honest("d0", trace), slow.device("d1", trace).unwrap()];
    start(builder().devices(devices)).await
}

async fn told(trace: &Trace, phase: Phase) {
    let both = |_: &[_]| trace.received(phase).len() == 2;
    trace.wait_for(&format!("both to be told {phase}"), both).await;
}

/// The report of the next transition that ends.
async fn next_report(events: &mut standstill_coordinator::Events) -> Arc<TransitionReport> {
    let ended = |event: &MachineEvent| matches!(event, MachineEvent::Transition(_));
    let seen = events_until(events, "the end of the transition", ended).await;
    match seen.into_iter().next_back() {
        Some(MachineEvent::Transition(report)) => report,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn each_join_holds_what_it_says_and_nothing_is_told_before_its_launch() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let machine = two_of_which_one_is_held(&trace, Phase::PrepareStop, &gate).await;

    // The launch does not wait: somebody is held.
    let preparing = machine.launch_prepare_stop(LONG).unwrap();
    told(&trace, Phase::PrepareStop).await;
    gate.open();
    let quiet = within(LONG, "the first phase", preparing.join()).await.unwrap();
    assert_eq!(trace.reached(Phase::PrepareStop).len(), 2);
    let status = machine.status().await.unwrap();
    assert_eq!((status.machine, status.operation), (MachineState::Running, Some(Operation::Pause)));
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());
    let stopped = within(LONG, "the second phase", quiet.launch_stop().join()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    assert_all_in(&machine, &trace, &NAMES, MigrationState::Stop).await;

    let preparing = stopped.launch_prepare_start(LONG).unwrap();
    let accepting = within(LONG, "the first phase", preparing.join()).await.unwrap();
    assert_eq!(trace.reached(Phase::PrepareStart).len(), 2);
    assert!(trace.received(Phase::Start).is_empty(), "{}", trace.text());
    let report = within(LONG, "the second phase", accepting.launch_start().join()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    assert!(report.downtime_ns.is_some());
    assert_all_in(&machine, &trace, &NAMES, MigrationState::Running).await;
}

/// The mirror: after all hooks between the phases on stop, before them on start.
#[tokio::test]
async fn the_gap_is_the_innermost_place_of_a_stop_and_of_a_start() {
    let trace = Trace::new().unwrap();
    let hook = TracedHook::new("between", &trace).unwrap();
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .hook(HookSpec::new("between", Slot::Between).rank(7), hook),
    )
    .await;
    let returned =
        |call| trace.entries().iter().filter(|entry| entry.what == What::Returned(call)).count();
    let quiet = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap();
    assert_eq!(returned(Call::Stop), 1, "{}", trace.text());
    let stopped = quiet.launch_stop().join().await.unwrap();
    let hooks: Vec<_> = stopped.report().hooks.iter().map(|hook| hook.name.clone()).collect();
    assert_eq!(hooks, ["between", "gap"]);
    let accepting = stopped.launch_prepare_start(LONG).unwrap().join().await.unwrap();
    assert_eq!(returned(Call::Start), 0, "{}", trace.text());
    let report = accepting.launch_start().join().await.unwrap();
    assert_eq!(returned(Call::Start), 1, "{}", trace.text());
    let hooks: Vec<_> = report.hooks.iter().map(|hook| hook.name.clone()).collect();
    assert_eq!(hooks, ["gap", "between"]);
}

/// Dropped in a phase or between the phases, in both directions.
#[tokio::test]
async fn a_handle_that_is_dropped_gives_the_transition_up() {
    for phase in [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start] {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        let machine = two_of_which_one_is_held(&trace, phase, &gate).await;
        let starts = matches!(phase, Phase::PrepareStart | Phase::Start);
        if starts {
            within(LONG, "the pause before", machine.pause()).await.unwrap().leave_stopped();
        }
        let mut events = machine.events();
        match phase {
            Phase::PrepareStop => {
                let handle = machine.launch_prepare_stop(LONG).unwrap();
                told(&trace, phase).await;
                drop(handle);
            }
            Phase::Stop => {
                let quiet = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap();
                let handle = quiet.launch_stop();
                told(&trace, phase).await;
                drop(handle);
            }
            Phase::PrepareStart => {
                let handle = machine.launch_prepare_start(LONG).unwrap();
                told(&trace, phase).await;
                drop(handle);
            }
            _ => {
                let ready = machine.launch_prepare_start(LONG).unwrap().join().await.unwrap();
                let handle = ready.launch_start();
                told(&trace, phase).await;
                drop(handle);
            }
        }
        let report = next_report(&mut events).await;
        assert_eq!(report.outcome, Outcome::RolledBack, "{phase}: {report}");
        assert!(report.to_string().contains("the owner gave it up"), "{report}");
        let (machine_state, state) = crate::fixture::undone(phase);
        assert_machine(&machine, machine_state).await;
        assert_all_in(&machine, &trace, &NAMES, state).await;
        drop(gate);
    }
}

#[tokio::test]
async fn between_the_phases_a_dropped_handle_and_one_that_gives_up_roll_back() {
    let trace = Trace::new().unwrap();
    let machine = two(&trace).await;
    let mut events = machine.events();
    drop(machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap());
    let report = next_report(&mut events).await;
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    assert_machine(&machine, MachineState::Running).await;

    let quiet = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap();
    let report = within(SHORT, "the undo", quiet.give_up()).await.unwrap();
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    assert_all_in(&machine, &trace, &NAMES, MigrationState::Running).await;
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());

    machine.pause().await.unwrap().leave_stopped();
    let accepting = machine.launch_prepare_start(LONG).unwrap().join().await.unwrap();
    let report = within(SHORT, "the undo", accepting.give_up()).await.unwrap();
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    assert_machine(&machine, MachineState::Stopped).await;
    assert_all_in(&machine, &trace, &NAMES, MigrationState::Stop).await;
}

#[tokio::test]
async fn a_gap_that_takes_too_long_is_rolled_back_and_the_late_launch_is_told_so() {
    let trace = Trace::new().unwrap();
    let machine = two(&trace).await;
    let mut events = machine.events();
    let gap = Duration::from_millis(20);
    let quiet = machine.launch_prepare_stop(gap).unwrap().join().await.unwrap();
    let report = next_report(&mut events).await;
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    let text = "hook \"gap\" refused (the second phase was not launched within 20ms)";
    assert!(report.to_string().contains(text), "{report}");
    let error = within(SHORT, "the join", quiet.launch_stop().join()).await.unwrap_err();
    assert!(Arc::ptr_eq(report_of(&error), &report));
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());
    assert_all_in(&machine, &trace, &NAMES, MigrationState::Running).await;
}

#[tokio::test]
async fn a_device_that_dies_in_the_gap_is_dealt_with_at_once() {
    let trace = Trace::new().unwrap();
    let machine = two(&trace).await;
    let mut events = machine.events();
    let quiet = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap();
    signal(&machine, "d1", Signal::KILL).await;
    // The owner still has its gap, and nobody waits for it.
    let report = next_report(&mut events).await;
    assert_eq!(fenced(&report), ["d1"], "{report}");
    assert_eq!(report.machine, MachineState::Running);
    let error = within(SHORT, "the join", quiet.launch_stop().join()).await.unwrap_err();
    assert!(Arc::ptr_eq(report_of(&error), &report));
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());
}

#[tokio::test]
async fn a_second_phase_that_fails_after_the_gap_is_undone_without_the_owner() {
    let trace = Trace::new().unwrap();
    let rogue = Script::honest().on_nth(Phase::Stop, 1, [Step::Refuse("not now".into())]);
    let machine = start(three(&trace, Phase::Stop, rogue)).await;
    let quiet = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap();
    let error = within(SHORT, "the stop", quiet.launch_stop().join()).await.unwrap_err();
    assert_eq!(report_of(&error).outcome, Outcome::RolledBack, "{error}");
    assert!(error.to_string().contains("not now"), "{error}");
    assert_machine(&machine, MachineState::Running).await;
}

#[tokio::test]
async fn a_first_phase_that_fails_is_told_by_its_join() {
    let trace = Trace::new().unwrap();
    let rogue = Script::honest().on_nth(Phase::PrepareStop, 1, [Step::Refuse("not now".into())]);
    let machine = start(three(&trace, Phase::PrepareStop, rogue)).await;
    let preparing = machine.launch_prepare_stop(LONG).unwrap();
    let error = within(SHORT, "the join", preparing.join()).await.unwrap_err();
    assert_eq!(report_of(&error).outcome, Outcome::RolledBack, "{error}");
    // What is not possible is told there too.
    machine.pause().await.unwrap().leave_stopped();
    let quiet = machine.launch_prepare_start(LONG).unwrap();
    let error = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap_err();
    assert!(matches!(error, MachineError::State { operation: Operation::Pause, .. }), "{error}");
    drop(quiet);
}

/// By its ticket a handle means its own transition, and no later one.
#[tokio::test]
async fn a_handle_of_what_is_over_disturbs_nothing() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on_nth(Phase::PrepareStop, 2, [Step::hold(&gate), Step::Ack]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(slow.device("d1", &trace).unwrap()))
            .await;
    let mut events = machine.events();
    let gap = Duration::from_millis(1);
    let quiet = machine.launch_prepare_stop(gap).unwrap().join().await.unwrap();
    next_report(&mut events).await;
    let pause = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await.map(Stopped::leave_stopped) })
    };
    let both_again = |_: &[_]| trace.received(Phase::PrepareStop).len() == 4;
    trace.wait_for("both to be told again", both_again).await;
    drop(quiet);
    // Answered after the drop was heard.
    machine.status().await.unwrap();
    gate.open();
    within(LONG, "the pause", pause).await.unwrap().unwrap();
    assert_machine(&machine, MachineState::Stopped).await;
}

#[tokio::test]
async fn a_pause_that_takes_longer_than_its_callers_patience_is_undone() {
    for phase in [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start] {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        let machine = two_of_which_one_is_held(&trace, phase, &gate).await;
        let patience = Duration::from_millis(50);
        let error = if matches!(phase, Phase::PrepareStop | Phase::Stop) {
            within(SHORT, "the pause", machine.pause_timeout(patience)).await.unwrap_err()
        } else {
            machine.pause_timeout(LONG).await.unwrap().leave_stopped();
            within(SHORT, "the resume", machine.resume_timeout(patience)).await.unwrap_err()
        };
        let report = report_of(&error);
        assert_eq!(report.outcome, Outcome::RolledBack, "{phase}: {report}");
        assert!(Duration::from_nanos(report.total_ns) >= patience, "{report}");
        assert!(error.to_string().contains("the owner gave it up"), "{error}");
        let (machine_state, _) = crate::fixture::undone(phase);
        assert_machine(&machine, machine_state).await;
        drop(gate);
    }
}

/// While a device joins, transitions of the owner wait. Who gives up meanwhile has begun nothing.
#[tokio::test]
async fn what_waits_for_its_turn_can_be_given_up_too() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let machine = two(&trace).await;
    let newcomer = Script::honest().on(Phase::Start, [Step::hold(&gate), Step::Ack]);
    let newcomer = newcomer.device("new", &trace).unwrap();
    let joining = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.add_device(newcomer).await })
    };
    trace.wait_for("it to be told", |_| trace.received(Phase::Start).len() == 1).await;
    let patience = Duration::from_millis(20);
    let error = within(SHORT, "the pause", machine.pause_timeout(patience)).await.unwrap_err();
    let cancelled = |error: &MachineError| matches!(error, MachineError::Cancelled { .. });
    assert!(cancelled(&error), "{error}");
    let (dropped, given_up) =
        (machine.launch_prepare_stop(LONG).unwrap(), machine.launch_prepare_stop(LONG).unwrap());
    drop(dropped);
    let error = within(SHORT, "the end", given_up.give_up()).await.unwrap_err();
    assert!(cancelled(&error), "{error}");
    gate.open();
    within(LONG, "the newcomer", joining).await.unwrap().unwrap();
    assert!(trace.received(Phase::PrepareStop).iter().all(|entry| entry.who == "new"));
    machine.pause().await.unwrap().resume().await.unwrap();
}

#[tokio::test]
async fn handles_of_a_machine_that_is_gone_say_so() {
    let trace = Trace::new().unwrap();
    let machine = two(&trace).await;
    let quiet = machine.launch_prepare_stop(LONG).unwrap().join().await.unwrap();
    within(LONG, "the shutdown", machine.shutdown()).await.unwrap();
    let error = within(SHORT, "the join", quiet.launch_stop().join()).await.unwrap_err();
    assert!(matches!(error, MachineError::Gone), "{error}");
}
