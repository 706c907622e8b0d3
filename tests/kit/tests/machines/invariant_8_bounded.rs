//! Every call ends within its deadline and a constant grace, whatever hangs, and never half.

use crate::fixture::{
    LONG, PHASES, SHORT, assert_all_in, assert_machine, assert_usable, builder, deadlines, fenced,
    honest, report_of, start, three, undone, until,
};
use crate::left_behind::Left;
use crate::supervised::events_until;
use rustix::fs::{FlockOperation, flock};
use standstill_coordinator::error::MachineError;
use standstill_coordinator::{Deadlines, HookSpec, MachineEvent, OnFailure, Outcome, Slot};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HeldReason, Loss, MachineState};
use standstill_testkit::pilot::Signal;
use standstill_testkit::{
    Call, Gate, Processes, Script, Step, Trace, TracedHook, TracedLocal, within,
};
use std::time::Duration;

async fn times_out(phase: Phase, steps: Vec<Step>) {
    let trace = Trace::new().unwrap();
    let script = Script::honest().on(phase, steps);
    let machine = start(three(&trace, phase, script)).await;
    let processes = Processes::of(&machine.status().await.unwrap());
    let (expected, state) = undone(phase);

    let error = until(&machine, phase).await.unwrap_err();
    let report = report_of(&error);
    match &report.outcome {
        Outcome::Degraded { machine, fenced } => {
            assert_eq!((*machine, fenced[0].1), (expected, Loss::Timeout), "{report}");
        }
        _ => panic!("{phase}: {report}"),
    }
    assert_eq!(fenced(report), ["d1"], "{report}");
    let text = error.to_string();
    assert!(text.contains("\"d1\" is lost: no answer within the deadline"), "{text}");
    assert!(text.contains(&format!("in {phase} ")), "{text}");
    assert_machine(&machine, expected).await;
    assert_all_in(&machine, &trace, &["d0", "d2"], state).await;
    assert_eq!(processes.left(), ["d0", "d2"], "the fenced process is left");
    assert_usable(&machine).await;
}

#[tokio::test]
async fn a_device_that_is_stopped_by_a_signal_is_fenced_in_every_phase() {
    for phase in PHASES {
        times_out(phase, vec![Step::Freeze]).await;
    }
}

#[tokio::test]
async fn a_device_that_never_answers_is_fenced_in_every_phase() {
    for phase in PHASES {
        times_out(phase, vec![]).await;
    }
}

#[tokio::test]
async fn a_device_that_is_too_slow_is_fenced_though_its_answer_would_come() {
    times_out(Phase::Stop, vec![Step::Delay(LONG), Step::Ack]).await;
}

/// When it wakes up its deadlines have run out, but no device was late.
#[tokio::test]
async fn answers_that_came_while_the_coordinator_slept_through_its_deadline_count() {
    let gate = Gate::closed().unwrap();
    let mut left = Left::new(|| {
        [0; 3]
            .map(|_| Script::honest().on_nth(Phase::PrepareStop, 1, [Step::hold(&gate), Step::Ack]))
    });
    // Long enough to be stopped in, short enough to wait for.
    left.course.phase = Duration::from_secs(4);
    let mut pilot = left.pilot().await;
    pilot.tell("pause");
    let told = |_: &[_]| left.trace.received(Phase::PrepareStop).len() == 3;
    left.trace.wait_for("all to be told", told).await;
    pilot.freeze().await;
    gate.open();
    let answered = |_: &[_]| left.trace.reached(Phase::PrepareStop).len() == 3;
    left.trace.wait_for("all to answer", answered).await;
    // Nothing but time makes a deadline run out.
    tokio::time::sleep(Duration::from_secs(5)).await;
    pilot.signal(Signal::CONT);
    assert_eq!(pilot.hear("pause").await, "pause Done", "{}", left.trace.text());
    pilot.tell("shutdown");
    pilot.hear("ended").await;
}

#[tokio::test]
async fn all_that_hang_at_once_cost_one_deadline_and_one_undo() {
    let trace = Trace::new().unwrap();
    let frozen = |name| {
        let script = Script::honest().on(Phase::Stop, [Step::Freeze]);
        script.device(name, &trace).unwrap().deadlines(LONG, SHORT)
    };
    let devices = ["f0", "f1", "f2", "f3", "f4", "f5"].map(frozen);
    let machine = start(builder().devices(devices).device(honest("d0", &trace))).await;
    let processes = Processes::of(&machine.status().await.unwrap());
    let error = within(SHORT, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    assert_eq!(fenced(report), ["f0", "f1", "f2", "f3", "f4", "f5"], "{report}");
    // The failed epoch and the two of its undo.
    assert_eq!(report.last_epoch.0 - report.first_epoch.0, 2, "{report}");
    assert_eq!(processes.left(), ["d0"]);
    assert_all_in(&machine, &trace, &["d0"], MigrationState::Running).await;
}

/// The second failure comes in the undo of the first.
#[tokio::test]
async fn a_device_that_hangs_in_an_undo_is_fenced_too() {
    let trace = Trace::new().unwrap();
    let refuses = Script::honest().on_nth(Phase::Stop, 1, [Step::Refuse("not now".into())]);
    // Its first Stop is honest, that of the undo is not.
    let hangs = Script::honest().on_nth(Phase::Stop, 2, [Step::Freeze]);
    let machine = start(
        builder()
            .device(refuses.device("refuses", &trace).unwrap())
            .device(hangs.device("hangs", &trace).unwrap().deadlines(LONG, SHORT))
            .device(honest("d0", &trace)),
    )
    .await;
    let error = within(SHORT, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    assert_eq!(fenced(report), ["hangs"], "{report}");
    assert!(error.to_string().contains("not now"), "{error}");
    assert_machine(&machine, MachineState::Running).await;
    assert_all_in(&machine, &trace, &["refuses", "d0"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_hook_that_hangs_holds_the_machine_until_it_returns() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let key = gate.key();
    let hook = TracedHook::new("vcpus", &trace).unwrap().doing(move |call| match call {
        Call::Stop => Ok(key.wait()?),
        Call::Start => Ok(()),
    });
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(honest("d1", &trace))
            .hook(HookSpec::new("vcpus", Slot::Between).deadline(SHORT), hook),
    )
    .await;
    let error = within(SHORT, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    match &report.outcome {
        Outcome::Held { reasons, fenced } => {
            assert!(matches!(reasons[..], [HeldReason::HookHung(_)]), "{report}");
            assert!(fenced.is_empty(), "{report}");
        }
        _ => panic!("{report}"),
    }
    assert!(error.to_string().contains("\"vcpus\""), "{error}");
    assert_machine(&machine, MachineState::Held).await;
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
    // Nothing starts until the proof comes.
    let refused = within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err();
    assert!(refused.to_string().contains("held"), "{refused}");

    gate.open();
    let stopped = async {
        while machine.status().await.unwrap().machine == MachineState::Held {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within(LONG, "the proof", stopped).await;
    assert_machine(&machine, MachineState::Stopped).await;
    within(LONG, "resume", machine.resume()).await.unwrap();
    let calls = trace.entries().into_iter().filter(|entry| entry.who == "vcpus").count();
    assert_eq!(calls, 4, "stopped once, started once:\n{}", trace.text());
}

#[tokio::test]
async fn a_local_device_that_hangs_holds_the_machine_until_the_owner_decides() {
    for hung in PHASES {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        let key = gate.key();
        let local = TracedLocal::new("local", &trace)
            .unwrap()
            .doing(move |phase| if phase == hung { Ok(key.wait()?) } else { Ok(()) });
        let mut short = deadlines();
        // The deadlines of local devices are the machine's.
        (short.first_phase, short.second_phase) = match hung {
            Phase::PrepareStop | Phase::PrepareStart => (SHORT, LONG),
            _ => (LONG, SHORT),
        };
        let machine = start(
            builder()
                .deadlines(short)
                .device(honest("d0", &trace).deadlines(LONG, LONG))
                .device(honest("d1", &trace).deadlines(LONG, LONG))
                .local_device("local", local),
        )
        .await;
        let error = until(&machine, hung).await.unwrap_err();
        let report = report_of(&error);
        match &report.outcome {
            Outcome::Held { reasons, .. } => {
                assert!(matches!(reasons[..], [HeldReason::LocalHung(_)]), "{hung}: {report}");
            }
            _ => panic!("{hung}: {report}"),
        }
        assert!(error.to_string().contains("\"local\""), "{error}");
        assert_machine(&machine, MachineState::Held).await;
        assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
        within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err();
        machine.accept_hold().await.unwrap();
        assert_machine(&machine, MachineState::Stopped).await;
        machine.accept_hold().await.unwrap_err();
        gate.open();
    }
}

/// What cannot be proven within its grace makes the machine held, not the call late.
#[tokio::test]
async fn a_fence_without_proof_holds_the_machine_until_the_proof_comes() {
    for phase in PHASES {
        let trace = Trace::new().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        // Something that the dead process began still writes.
        let lock = file.reopen().unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let script = Script::honest().backing_file(file.path()).on(phase, [Step::Exit(1)]);
        let mut short = deadlines();
        short.fence = SHORT;
        let machine = start(
            builder()
                .deadlines(short)
                .device(honest("d0", &trace))
                .device(script.device("d1", &trace).unwrap()),
        )
        .await;
        let mut events = machine.events();
        let error = until(&machine, phase).await.unwrap_err();
        let report = report_of(&error);
        match &report.outcome {
            Outcome::Held { reasons, .. } => {
                assert!(matches!(reasons[..], [HeldReason::FenceUnproven(_)]), "{report}");
            }
            _ => panic!("{phase}: {report}"),
        }
        assert!(error.to_string().contains("nothing proves that device \"d1\" is gone"), "{error}");
        assert_machine(&machine, MachineState::Held).await;
        assert_all_in(&machine, &trace, &["d0"], MigrationState::Stop).await;
        within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err();

        drop(lock);
        loop {
            let event = within(LONG, "the proof", events.recv()).await.unwrap();
            if let MachineEvent::DeviceFenced { device, locks, .. } = event {
                assert_eq!((device.as_str(), locks), ("d1", 1));
                break;
            }
        }
        assert_machine(&machine, MachineState::Stopped).await;
        assert_usable(&machine).await;
    }
}

#[tokio::test]
async fn under_stay_stopped_a_hang_leaves_everybody_stopped() {
    let trace = Trace::new().unwrap();
    let frozen = Script::honest().on(Phase::PrepareStop, [Step::Freeze]);
    let machine = start(
        builder()
            .on_failure(OnFailure::StayStopped)
            .device(frozen.device("frozen", &trace).unwrap().deadlines(SHORT, LONG))
            .device(honest("d0", &trace)),
    )
    .await;
    let mut events = machine.events();
    let stopped = within(SHORT, "pause", machine.pause()).await.unwrap();
    assert_eq!(fenced(stopped.report()), ["frozen"], "{}", stopped.report());
    assert_machine(&machine, MachineState::Stopped).await;
    assert_all_in(&machine, &trace, &["d0"], MigrationState::Stop).await;
    loop {
        match within(LONG, "an event", events.recv()).await.unwrap() {
            MachineEvent::DeviceFenced { device, .. } => break assert_eq!(device, "frozen"),
            MachineEvent::Transition(report) => panic!("it ended before the proof: {report}"),
            _ => {}
        }
    }
    let error = within(LONG, "resume", stopped.resume()).await.unwrap_err();
    assert!(
        matches!(&error, MachineError::Missing { device, .. } if device == "frozen"),
        "{error}"
    );
    within(LONG, "removal", machine.remove_device("frozen")).await.unwrap();
    within(LONG, "resume", machine.resume()).await.unwrap();
}

/// A late error says that things are as before the call: the vCPUs run.
#[tokio::test]
async fn a_hook_that_fails_late_is_no_proof_that_anything_stopped() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let key = gate.key();
    let mut hung = false;
    let hook = TracedHook::new("vcpus", &trace).unwrap().doing(move |call| match call {
        Call::Stop if !std::mem::replace(&mut hung, true) => {
            key.wait()?;
            Err("the vCPUs would not stop".into())
        }
        _ => Ok(()),
    });
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .hook(HookSpec::new("vcpus", Slot::Before).deadline(SHORT), hook),
    )
    .await;
    within(SHORT, "pause", machine.pause()).await.unwrap_err();
    assert_machine(&machine, MachineState::Held).await;
    // While it hangs, stopping the rest once more proves nothing either.
    let refused = within(Duration::ZERO, "pause", machine.pause()).await.unwrap_err();
    assert!(refused.to_string().contains("held"), "{refused}");

    gate.open();
    // Once it has returned it can be called again; until then the pause is refused.
    let stopped = async {
        loop {
            if let Ok(stopped) = machine.pause().await {
                return stopped;
            }
            assert_machine(&machine, MachineState::Held).await;
            machine.resume().await.unwrap_err();
        }
    };
    let stopped = within(LONG, "the second pause", stopped).await;
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    assert_eq!(stopped.report().hooks.len(), 1, "it was called again: {}", stopped.report());
    within(LONG, "resume", stopped.resume()).await.unwrap();
}

/// The owner's decision holds: what was taken as it is does not hold the machine up again.
#[tokio::test]
async fn a_machine_goes_on_without_what_its_owner_has_given_up() {
    let trace = Trace::new().unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    let lock = file.reopen().unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let script = Script::honest().backing_file(file.path()).on(Phase::PrepareStop, [Step::Exit(1)]);
    let gate = Gate::closed().unwrap();
    let key = gate.key();
    let local = TracedLocal::new("local", &trace).unwrap().doing(move |phase| match phase {
        Phase::PrepareStop => Ok(key.wait()?),
        _ => Ok(()),
    });
    let mut short = deadlines();
    short.fence = SHORT;
    short.first_phase = SHORT;
    let machine = start(
        builder()
            .deadlines(short)
            .device(honest("d0", &trace).deadlines(LONG, LONG))
            .device(script.device("d1", &trace).unwrap())
            .local_device("local", local),
    )
    .await;
    within(LONG, "pause", machine.pause()).await.unwrap_err();
    assert_machine(&machine, MachineState::Held).await;
    let mut events = machine.events();
    machine.accept_hold().await.unwrap();
    let ended = |event: &MachineEvent| matches!(event, MachineEvent::HoldEnded { .. });
    let seen = events_until(&mut events, "the hold to end", ended).await;
    let by_owner = matches!(seen.last(), Some(MachineEvent::HoldEnded { by_owner: true }));
    assert!(by_owner, "{seen:?}");
    let status = machine.status().await.unwrap();
    let lost = status.devices.iter().find(|device| device.name == "d1").unwrap();
    assert!(lost.lost.as_ref().unwrap().contains("taken as it is"), "{status:?}");
    assert_usable(&machine).await;
    gate.open();
    drop(lock);
}

/// Its late answer is about a transition that is over: it is asked anew, by itself, and counts when it
/// is where the others are.
#[tokio::test]
async fn a_local_device_that_was_given_up_counts_again_where_the_machine_is() {
    for runs in [true, false] {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        let key = gate.key();
        let local = TracedLocal::new("local", &trace).unwrap().doing(move |phase| match phase {
            Phase::PrepareStop => Ok(key.wait()?),
            _ => Ok(()),
        });
        let short = Deadlines { first_phase: SHORT, ..deadlines() };
        let device = honest("d0", &trace).deadlines(LONG, LONG);
        let builder = builder().deadlines(short).device(device).local_device("local", local);
        let machine = start(builder).await;
        within(LONG, "pause", machine.pause()).await.unwrap_err();
        machine.accept_hold().await.unwrap();
        let is_local = |name: &str| name == "local";
        let status = machine.status().await.unwrap();
        let given_up = status.devices.iter().find(|device| is_local(&device.name)).unwrap();
        assert!(given_up.lost.as_ref().unwrap().contains("taken as it is"), "{status:?}");
        let report = within(LONG, "resume", machine.resume()).await.unwrap();
        assert!(!report.participants.iter().any(|one| is_local(&one.name)), "{report}");
        if !runs {
            within(LONG, "pause", machine.pause()).await.unwrap().leave_stopped();
        }

        gate.open();
        let last = if runs { Phase::Start } else { Phase::Stop };
        let is_back = |_: &[_]| trace.reached(last).iter().any(|entry| is_local(&entry.who));
        trace.wait_for("it is where the machine is", is_back).await;
        if runs {
            let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
            let report = stopped.report();
            assert!(report.participants.iter().any(|one| is_local(&one.name)), "{report}");
            stopped.leave_stopped();
        }
        let report = within(LONG, "resume", machine.resume()).await.unwrap();
        assert!(report.participants.iter().any(|one| is_local(&one.name)), "{report}");
        assert_all_in(&machine, &trace, &["d0", "local"], MigrationState::Running).await;
    }
}

#[tokio::test]
async fn the_event_stream_ends_with_the_machine() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let mut events = machine.events();
    machine.shutdown().await.unwrap();
    let end = async { while events.recv().await.is_some() {} };
    within(LONG, "the end of the events", end).await;
}
