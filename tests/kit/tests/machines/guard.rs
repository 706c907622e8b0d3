//! The handle of a machine and the guard of a stopped one.

use crate::fixture::{LONG, assert_all_in, assert_machine, builder, honest, report_of, start};
use standstill_coordinator::error::MachineError;
use standstill_coordinator::{Operation, Outcome, Stopped};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{
    Entry, Gate, Processes, Script, Step, Trace, TracedLocal, Trigger, What, within,
};
use std::time::Duration;

#[tokio::test]
async fn a_guard_that_is_dropped_leaves_the_machine_stopped() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().devices(["d0", "d1"].map(|name| honest(name, &trace)))).await;
    drop(machine.pause().await.unwrap());
    assert_machine(&machine, MachineState::Stopped).await;
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
    let report = within(LONG, "resume", machine.resume()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done);
    assert!(report.downtime_ns.unwrap() > 0);
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_second_pause_and_a_second_resume_change_nothing() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().devices(["d0", "d1"].map(|name| honest(name, &trace)))).await;
    machine.pause().await.unwrap().leave_stopped();
    let stopped = within(LONG, "the second pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done);
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
    stopped.resume().await.unwrap();
    let report = within(LONG, "the second resume", machine.resume()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done);
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
}

#[tokio::test]
async fn one_operation_at_a_time_while_status_answers() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on(Phase::PrepareStop, [Step::hold(&gate), Step::Ack]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(slow.device("slow", &trace).unwrap()))
            .await;
    let pause = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await.map(Stopped::leave_stopped) })
    };
    trace.wait_for("both to be told", |_| trace.received(Phase::PrepareStop).len() == 2).await;
    let refused = |error: MachineError, asked: Operation| match error {
        MachineError::State { operation, under_way: Some(Operation::Pause), .. } => {
            assert_eq!(operation, asked);
        }
        other => panic!("{other}"),
    };
    let now = Duration::ZERO;
    let error = within(now, "a second pause", machine.pause()).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "pause is not possible: the machine is running, and a pause is under way"
    );
    refused(error, Operation::Pause);
    let error = within(now, "a resume", machine.resume()).await.unwrap_err();
    refused(error, Operation::Resume);
    let status = within(now, "status", machine.status()).await.unwrap();
    assert_eq!(status.operation, Some(Operation::Pause));
    assert_eq!(status.machine, MachineState::Running);
    // Who asks for what cannot be does not disturb what is under way.
    gate.open();
    within(LONG, "pause", pause).await.unwrap().unwrap();
    assert_machine(&machine, MachineState::Stopped).await;
}

#[tokio::test]
async fn a_slow_pause_that_is_cancelled_is_rolled_back() {
    for phase in [Phase::PrepareStop, Phase::Stop] {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        // Slow once; the undo may use the same phase.
        let slow = Script::honest().on_nth(phase, 1, [Step::hold(&gate), Step::Ack]);
        let machine = start(
            builder().device(honest("d0", &trace)).device(slow.device("slow", &trace).unwrap()),
        )
        .await;
        let pause = {
            let machine = machine.clone();
            tokio::spawn(async move { machine.pause().await })
        };
        trace.wait_for("both to be told", |_| trace.received(phase).len() == 2).await;
        machine.cancel().await.unwrap();
        // The gate stays closed: an abort is heard in the middle of a command.
        let error = within(LONG, "pause", pause).await.unwrap().unwrap_err();
        let report = report_of(&error);
        assert_eq!(report.outcome, Outcome::RolledBack, "{phase}: {report}");
        assert!(error.to_string().contains("the owner gave it up"), "{error}");
        let aborted = What::Aborted { epoch: report.first_epoch };
        let heard = |entry: &Entry| entry.who == "slow" && entry.what == aborted;
        assert!(trace.entries().iter().any(heard), "{}", trace.text());
        assert_machine(&machine, MachineState::Running).await;
        assert_all_in(&machine, &trace, &["d0", "slow"], MigrationState::Running).await;
        drop(gate);
    }
}

#[tokio::test]
async fn a_cancel_without_anything_under_way_does_nothing() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    machine.cancel().await.unwrap();
    assert_machine(&machine, MachineState::Running).await;
    machine.pause().await.unwrap().resume().await.unwrap();
}

/// Dropping the future of a call is no cancel: the machine does not stand half.
#[tokio::test]
async fn a_pause_that_nobody_waits_for_goes_on() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on(Phase::PrepareStop, [Step::hold(&gate), Step::Ack]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(slow.device("slow", &trace).unwrap()))
            .await;
    tokio::select! {
        _ = machine.pause() => panic!("it cannot be done"),
        () = trace.wait_for("both to be told", |_| {
            trace.received(Phase::PrepareStop).len() == 2
        }) => {}
    }
    let mut events = machine.events();
    gate.open();
    within(LONG, "the end of the pause", events.recv()).await.unwrap();
    assert_machine(&machine, MachineState::Stopped).await;
    assert_all_in(&machine, &trace, &["d0", "slow"], MigrationState::Stop).await;
}

#[tokio::test]
async fn when_the_last_handle_is_dropped_the_processes_end() {
    let trace = Trace::new().unwrap();
    let frozen = Script::honest().on(Trigger::Memory, [Step::Freeze]);
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(frozen.device("frozen", &trace).unwrap())
            .local_device("local", TracedLocal::new("local", &trace).unwrap()),
    )
    .await;
    let processes = Processes::of(&machine.status().await.unwrap());
    let ram = tempfile::tempfile().unwrap();
    let declare = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.declare_ram(&ram).await })
    };
    let told = |entries: &[Entry]| {
        entries.iter().filter(|e| matches!(e.what, What::Memory { .. })).count() == 2
    };
    trace.wait_for("both to be told", told).await;
    declare.abort();
    let _ = declare.await;
    assert_eq!(processes.left().len(), 2);
    drop(machine);
    processes.assert_gone_within(Duration::from_secs(3)).await;
}

/// A stopped machine's processes end too, and its guard keeps it alive.
#[tokio::test]
async fn a_guard_is_a_handle() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let processes = Processes::of(&machine.status().await.unwrap());
    let stopped = machine.pause().await.unwrap();
    drop(machine);
    assert_eq!(processes.left(), ["d0"]);
    within(LONG, "resume", stopped.resume()).await.unwrap();
    // With the guard the last handle is gone.
    processes.assert_gone_within(Duration::from_secs(3)).await;
}

#[tokio::test]
async fn a_shutdown_tells_how_everybody_ended() {
    let trace = Trace::new().unwrap();
    let bad = Script::honest().on(Trigger::Shutdown, [Step::Exit(9)]);
    let deaf = Script::honest().on(Trigger::Shutdown, []);
    let machine = start(
        builder()
            .device(honest("good", &trace))
            .device(bad.device("bad", &trace).unwrap())
            .device(deaf.device("deaf", &trace).unwrap()),
    )
    .await;
    let processes = Processes::of(&machine.status().await.unwrap());
    let exits = within(Duration::from_secs(2), "shutdown", machine.shutdown()).await.unwrap();
    let names: Vec<_> = exits.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["good", "bad", "deaf"]);
    let exits: Vec<_> = exits.iter().map(|(_, exit)| exit.unwrap()).collect();
    assert!(exits[0].success(), "{exits:?}");
    assert_eq!(exits[1].to_string(), "exited with status 9");
    assert!(exits[2].is_kill(), "{exits:?}");
    processes.assert_gone_within(Duration::ZERO).await;
    for error in [
        machine.pause().await.unwrap_err(),
        machine.status().await.unwrap_err(),
        machine.shutdown().await.unwrap_err(),
    ] {
        assert!(matches!(error, MachineError::Gone), "{error}");
    }
}

#[tokio::test]
async fn a_shutdown_ends_a_pause_that_is_under_way() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on(Phase::PrepareStop, [Step::hold(&gate), Step::Ack]);
    let machine = start(builder().device(slow.device("slow", &trace).unwrap())).await;
    let processes = Processes::of(&machine.status().await.unwrap());
    let pause = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await.map(Stopped::leave_stopped) })
    };
    trace.wait_for("it to be told", |_| trace.received(Phase::PrepareStop).len() == 1).await;
    within(Duration::from_secs(2), "shutdown", machine.shutdown()).await.unwrap();
    let error = within(LONG, "pause", pause).await.unwrap().unwrap_err();
    assert!(matches!(error, MachineError::Gone), "{error}");
    processes.assert_gone_within(Duration::ZERO).await;
}

#[tokio::test]
async fn a_machine_without_devices_stops_and_starts() {
    let machine = start(builder()).await;
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done);
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert!(within(LONG, "shutdown", machine.shutdown()).await.unwrap().is_empty());
}
