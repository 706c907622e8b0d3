//! Two coordinators of one machine: the higher term has it, and the other one harms nobody.

use crate::fixture::{LONG, honest, report_of, start};
use crate::left_behind::{Left, NAMES, owner_goes_on};
use crate::supervised::events_until;
use standstill_coordinator::error::MachineError;
use standstill_coordinator::{MachineBuilder, MachineEvent, Outcome, TakeOverError, TakenOver};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HeldReason, Loss, MachineState};
use standstill_testkit::pilot::{SUPERSEDED, Signal};
use standstill_testkit::{Gate, Packet, Script, Step, Trace, within};
use std::time::Duration;

/// Its deadlines have run out while it was stopped, so it wants to fence before it has read that it
/// is superseded.
#[tokio::test]
async fn a_coordinator_that_slept_through_its_deadlines_fences_nobody() {
    let gate = Gate::closed().unwrap();
    let mut left = Left::new(|| {
        [0; 3]
            .map(|_| Script::honest().on_nth(Phase::PrepareStop, 1, [Step::hold(&gate), Step::Ack]))
    });
    // Long enough to be stopped in, short enough to wait for.
    left.course.phase = Duration::from_secs(4);
    let mut pilot = left.pilot().await;
    pilot.tell("pause");
    left.trace
        .wait_for("all to be told", |_| left.trace.received(Phase::PrepareStop).len() == 3)
        .await;
    pilot.freeze().await;
    left.course.phase = LONG;
    let processes = NAMES.map(|name| left.process(name));
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    // Nothing but time makes a deadline run out.
    tokio::time::sleep(Duration::from_secs(5)).await;
    pilot.signal(Signal::CONT);
    assert_eq!(pilot.hear("superseded").await, "superseded 2");
    assert_eq!(pilot.ended().await.code(), Some(i32::from(SUPERSEDED)));
    for process in &processes {
        assert!(process.lives().await, "{}", left.trace.text());
    }
    drop(gate);
    owner_goes_on(&machine, false).await;
    left.assert_no_stale();
    left.end(machine).await;
}

#[tokio::test]
async fn a_living_coordinator_learns_that_it_is_superseded_and_can_do_nothing_any_more() {
    let left = Left::honest();
    let old = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let mut events = old.events();
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    let superseded = async {
        loop {
            if let MachineEvent::Superseded { term } = events.recv().await.unwrap() {
                return term.0;
            }
        }
    };
    assert_eq!(within(LONG, "the event", superseded).await, 2);
    let refusals = [
        old.pause().await.map(drop).unwrap_err(),
        old.resume().await.map(drop).unwrap_err(),
        old.accept_hold().await.unwrap_err(),
        old.declare_ram(std::fs::File::open("/dev/zero").unwrap()).await.unwrap_err(),
    ];
    for error in refusals {
        assert!(matches!(&error, MachineError::Superseded { term } if term.0 == 2), "{error}");
    }
    assert_eq!(old.status().await.unwrap().machine, MachineState::Held);
    let error = old.shutdown().await.unwrap_err();
    assert!(matches!(error, MachineError::Superseded { .. }), "{error}");
    drop(old);
    left.assert_all(&machine, &NAMES, MigrationState::Running).await;
    owner_goes_on(&machine, false).await;
    left.assert_no_stale();
    left.end(machine).await;
}

/// No device can tell it: all that it sees is that they end.
#[tokio::test]
async fn a_coordinator_does_nothing_about_devices_that_its_successor_has_fenced() {
    let mut left = Left::honest();
    let old = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let mut events = old.events();
    for name in NAMES {
        left.process(name).signal(Signal::STOP);
    }
    left.course.other = Duration::from_secs(3);
    let TakenOver { machine, report } = left.take_over().await;
    match &report.outcome {
        Outcome::Degraded { fenced, .. } => assert_eq!(fenced.len(), 3, "{report}"),
        _ => panic!("{report}"),
    }
    match within(LONG, "the event", events.recv()).await.unwrap() {
        MachineEvent::Superseded { term } => assert_eq!(term.0, 2),
        other => panic!("it did something about it: {other:?}"),
    }
    drop(old);
    left.end(machine).await;
}

#[tokio::test]
async fn a_pause_that_is_under_way_when_the_machine_is_taken_over_ends_held() {
    let gate = Gate::closed().unwrap();
    let left = Left::new(|| {
        let holds = Script::honest().on_nth(Phase::PrepareStop, 1, [Step::hold(&gate), Step::Ack]);
        [Script::honest(), holds, Script::honest()]
    });
    let old = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let pause = {
        let old = old.clone();
        tokio::spawn(async move { old.pause().await.map(drop) })
    };
    left.trace
        .wait_for("two to answer", |_| left.trace.reached(Phase::PrepareStop).len() == 2)
        .await;
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    let error = within(LONG, "pause", pause).await.unwrap().unwrap_err();
    match &report_of(&error).outcome {
        Outcome::Held { reasons, .. } => assert!(reasons.contains(&HeldReason::Superseded)),
        other => panic!("{other:?}"),
    }
    drop(gate);
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

/// Nobody has reached STOP, and whoever has the gap can launch nothing any more.
#[tokio::test]
async fn a_machine_that_is_taken_over_in_the_gap_runs_and_the_late_launch_is_told_so() {
    let left = Left::honest();
    let old = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let preparing = old.launch_prepare_stop(LONG).unwrap();
    let quiet = within(LONG, "the first phase", preparing.join()).await.unwrap();
    let mut events = old.events();
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    let superseded = |event: &MachineEvent| matches!(event, MachineEvent::Superseded { .. });
    events_until(&mut events, "the old one to know", superseded).await;
    let error = within(LONG, "the late launch", quiet.launch_stop().join()).await.unwrap_err();
    match &report_of(&error).outcome {
        Outcome::Held { reasons, .. } => assert_eq!(reasons[..], [HeldReason::Superseded]),
        other => panic!("{other:?}"),
    }
    left.assert_all(&machine, &NAMES, MigrationState::Running).await;
    assert!(left.trace.received(Phase::Stop).is_empty(), "{}", left.trace.text());
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

#[tokio::test]
async fn a_machine_is_taken_over_again_and_again() {
    let left = Left::honest();
    left.pilot().await.kill();
    let mut machines = Vec::new();
    for term in 2..6 {
        let TakenOver { machine, report } = left.take_over().await;
        assert_eq!((&report.outcome, report.term.0), (&Outcome::Done, term), "{report}");
        machines.push(machine);
    }
    let last = machines.pop().unwrap();
    owner_goes_on(&last, false).await;
    for machine in machines {
        let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
        assert!(matches!(error, MachineError::Superseded { .. }), "{error}");
    }
    left.end(last).await;
}

/// Whatever the two do to each other, one has the machine at the end and no device is harmed.
#[tokio::test]
async fn of_two_that_take_over_at_the_same_time_one_has_the_machine() {
    for _ in 0..10 {
        let left = Left::honest();
        left.pilot().await.kill();
        let processes = NAMES.map(|name| left.process(name));
        let take_over = || {
            let builder = left.course.builder().unwrap();
            tokio::spawn(async move { builder.take_over().await })
        };
        let (one, other) = (take_over(), take_over());
        let results =
            [within(LONG, "one", one).await.unwrap(), within(LONG, "other", other).await.unwrap()];
        let mut taken = Vec::new();
        for result in results {
            match result {
                Ok(TakenOver { machine, report }) => taken.push((report.term, machine)),
                Err(TakeOverError::Superseded { .. }) => {}
                Err(error) => {
                    panic!("{}\n{}", standstill_testkit::chain(&error), left.trace.text())
                }
            }
        }
        taken.sort_by_key(|(term, _)| *term);
        let (_, machine) = taken.pop().unwrap_or_else(|| panic!("{}", left.trace.text()));
        owner_goes_on(&machine, false).await;
        for (_, loser) in taken {
            let error = loser.pause().await.unwrap_err();
            assert!(matches!(error, MachineError::Superseded { .. }), "{error}");
        }
        for process in &processes {
            assert!(process.lives().await, "{}", left.trace.text());
        }
        left.end(machine).await;
    }
}

/// A device that could make a coordinator give up would have every other one in its hand.
#[tokio::test]
async fn a_device_that_only_claims_to_be_taken_over_is_fenced() {
    let liar = || Script::honest().on(Phase::PrepareStop, [Step::Send(Packet::Superseded)]);
    let trace = Trace::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    for keep in [false, true] {
        let mut builder = MachineBuilder::new("vm")
            .device(honest("d0", &trace))
            .device(liar().device("d1", &trace).unwrap());
        if keep {
            builder = builder.keep(folder.path().join("vm"));
        }
        let machine = start(builder).await;
        let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
        match &report_of(&error).outcome {
            Outcome::Degraded { fenced, .. } => assert_eq!(fenced[0].1, Loss::Protocol, "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(error.to_string().contains("another coordinator has it"), "{error}");
        machine.shutdown().await.unwrap();
    }
}
