//! Newcomers at a bad time: in a held machine, beside each other, and over and over again.

use crate::fixture::{LONG, SHORT, assert_machine, builder, deadlines, honest, start};
use crate::supervised::{
    SOON, assert_nothing_left, assert_whole_and_end, events_until, restarted, signal, until_joined,
};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use standstill_coordinator::error::{MachineError, StartError};
use standstill_coordinator::{
    Deadlines, LossPolicy, Machine, MachineBuilder, MachineEvent, RestartPolicy,
};
use standstill_protocol::message::Phase;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Entry, Gate, Processes, Script, Step, Trace, Trigger, What, within};
use std::fs::File;
use std::time::Duration;
use tempfile::NamedTempFile;

/// A backing file, and a lock that holds every fence up that needs it.
fn locked() -> (NamedTempFile, File) {
    let file = NamedTempFile::new().unwrap();
    let lock = file.reopen().unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    (file, lock)
}

/// A machine that is held because nothing proves that `d1` is gone.
async fn held(builder: MachineBuilder, file: &NamedTempFile, trace: &Trace) -> Machine {
    let dies = Script::honest().backing_file(file.path()).on(Phase::PrepareStop, [Step::Exit(1)]);
    let limits = Deadlines { fence: SHORT, ..deadlines() };
    let builder = builder.deadlines(limits).device(dies.device("d1", trace).unwrap());
    let machine = start(builder).await;
    within(LONG, "pause", machine.pause()).await.unwrap_err();
    assert_machine(&machine, MachineState::Held).await;
    machine
}

fn told(who: &'static str, phase: Phase) -> impl Fn(&[Entry]) -> bool {
    move |entries| {
        let is = |e: &Entry| {
            e.who == who && matches!(e.what, What::Received { phase: p, .. } if p == phase)
        };
        entries.iter().any(is)
    }
}

fn fenced_is(name: &'static str) -> impl Fn(&MachineEvent) -> bool {
    move |event| matches!(event, MachineEvent::DeviceFenced { device, .. } if device == name)
}

fn hold_ended(event: &MachineEvent) -> bool {
    matches!(event, MachineEvent::HoldEnded { by_owner: false })
}

/// The proof is an event that comes once: whatever is under way then, it counts.
#[tokio::test]
async fn a_proof_that_comes_while_a_newcomer_joins_ends_the_hold() {
    let trace = Trace::new().unwrap();
    let (file, lock) = locked();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on_in(1, Phase::PrepareStop, [Step::Ack]).on_in(
        2,
        Phase::PrepareStop,
        [Step::hold(&gate), Step::Ack],
    );
    let machine = held(
        builder().device(honest("d0", &trace)).device(restarted(slow, "slow", &trace)),
        &file,
        &trace,
    )
    .await;
    let mut events = machine.events();
    signal(&machine, "slow", Signal::KILL).await;
    let joins = |entries: &[Entry]| {
        let second = entries.iter().rposition(|e| matches!(e.what, What::Began { .. })).unwrap();
        entries[second].who == "slow" && told("slow", Phase::PrepareStop)(&entries[second..])
    };
    trace.wait_for("the newcomer to be told to stop", joins).await;
    drop(lock);
    events_until(&mut events, "the proof", fenced_is("d1")).await;
    gate.open();
    let mut seen = until_joined(&mut events, "slow").await.0;
    if !seen.iter().any(hold_ended) {
        seen.extend(events_until(&mut events, "the hold to end", hold_ended).await);
    }
    assert_machine(&machine, MachineState::Stopped).await;
    within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    within(LONG, "resume", machine.resume()).await.unwrap();
    assert_whole_and_end(&machine, &trace, 2).await;
}

/// A newcomer that may run is one more reason for a hold that there is.
#[tokio::test]
async fn a_hold_waits_for_a_newcomer_that_cannot_be_proven_stopped() {
    let trace = Trace::new().unwrap();
    let ((file, lock), (other, other_lock)) = (locked(), locked());
    let greets = Gate::closed().unwrap();
    let frozen = Script::honest()
        .backing_file(other.path())
        .on_in(1, Phase::PrepareStop, [Step::Ack])
        .on_in(2, Trigger::Hello, [Step::hold(&greets), Step::Ack])
        .on_in(2, Phase::PrepareStop, [Step::Freeze]);
    // Its first process has the deadline too: it is not to run out.
    let patience = Duration::from_secs(5);
    let frozen = restarted(frozen, "frozen", &trace).deadlines(patience, LONG);
    let machine = held(builder().device(honest("d0", &trace)).device(frozen), &file, &trace).await;
    let mut events = machine.events();
    signal(&machine, "frozen", Signal::KILL).await;
    flock(&other_lock, FlockOperation::Unlock).unwrap();
    events_until(&mut events, "the first fence", fenced_is("frozen")).await;
    flock(&other_lock, FlockOperation::LockExclusive).unwrap();
    greets.open();
    let unproven =
        |event: &MachineEvent| matches!(event, MachineEvent::FenceUnproven { incarnation: 2, .. });
    events_until(&mut events, "the grace to end", unproven).await;
    drop(lock);
    events_until(&mut events, "the proof of the other", fenced_is("d1")).await;
    assert_machine(&machine, MachineState::Held).await;
    within(LONG, "resume", machine.resume()).await.unwrap_err();
    drop(other_lock);
    events_until(&mut events, "the hold to end", hold_ended).await;
    assert_nothing_left(&machine, &trace).await;
}

/// Its second Hello, or its end, may be read together with its first one: that is not a device
/// that was made to wait.
#[tokio::test]
async fn a_device_that_fails_at_once_after_its_hello_is_charged_for_it() {
    let bad = [vec![Step::Ack, Step::Ack], vec![Step::Ack, Step::Disconnect]];
    for steps in bad {
        let trace = Trace::new().unwrap();
        let fails =
            Script::honest().on_in(1, Trigger::Hello, [Step::Ack]).on(Trigger::Hello, steps);
        let budget = RestartPolicy { budget: 6, ..SOON };
        let fails = fails.device("fails", &trace).unwrap().on_loss(LossPolicy::Restart(budget));
        let machine = start(builder().device(honest("d0", &trace)).device(fails)).await;
        let mut events = machine.events();
        signal(&machine, "fails", Signal::KILL).await;
        let exhausted =
            |event: &MachineEvent| matches!(event, MachineEvent::DeviceRestartsExhausted { .. });
        events_until(&mut events, "the budget to end", exhausted).await;
        assert_eq!(trace.incarnations("fails"), 7, "{}", trace.text());
        assert_nothing_left(&machine, &trace).await;
    }
}

#[tokio::test]
async fn two_newcomers_that_do_not_fit_together_do_not_both_come_in() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let alone = Script::honest().without_p2p().on(Trigger::Memory, [Step::hold(&gate), Step::Ack]);
    let machine = start(builder()).await;
    within(LONG, "declare_ram", machine.declare_ram(tempfile::tempfile().unwrap())).await.unwrap();
    let first = tokio::spawn({
        let (machine, spec) = (machine.clone(), alone.device("alone", &trace).unwrap());
        async move { machine.add_device(spec).await }
    });
    let asked = |entries: &[Entry]| entries.iter().any(|e| matches!(e.what, What::Memory { .. }));
    trace.wait_for("the first to be told of the RAM", asked).await;
    let error = within(LONG, "add", machine.add_device(honest("d1", &trace))).await.unwrap_err();
    assert!(
        matches!(&error, MachineError::NotStarted(e) if matches!(**e, StartError::Plan { .. })),
        "{error}"
    );
    gate.open();
    within(LONG, "add", first).await.unwrap().unwrap();
    assert_whole_and_end(&machine, &trace, 1).await;
}

/// The grace ends in the very moment in which it is killed: the proof of its end comes all the same.
#[tokio::test]
async fn a_device_whose_end_comes_too_late_for_its_removal_can_be_removed_then() {
    let trace = Trace::new().unwrap();
    let stays = Script::honest().on(Trigger::Shutdown, []).device("stays", &trace).unwrap();
    let limits = Deadlines { fence: Duration::from_nanos(1), ..deadlines() };
    let machine =
        start(builder().deadlines(limits).device(honest("d0", &trace)).device(stays)).await;
    let mut events = machine.events();
    match within(LONG, "removal", machine.remove_device("stays")).await {
        // The usual case.
        Err(MachineError::Unproven { .. }) => {
            events_until(&mut events, "the proof", fenced_is("stays")).await;
            within(LONG, "removal", machine.remove_device("stays")).await.unwrap();
        }
        other => drop(other.unwrap()),
    }
    assert_whole_and_end(&machine, &trace, 1).await;
}

/// Nothing is started that could not be found by a later coordinator, and nobody else suffers.
#[tokio::test]
async fn a_device_whose_name_cannot_name_its_socket_is_refused_before_it_starts() {
    let trace = Trace::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let machine = start(builder().keep(folder.path().join("vm")).device(restarted(
        Script::honest(),
        "d0",
        &trace,
    )))
    .await;
    for name in ["a/b", ".hidden"] {
        let error =
            within(LONG, "add", machine.add_device(honest(name, &trace))).await.unwrap_err();
        assert!(
            matches!(&error, MachineError::NotStarted(e) if matches!(**e, StartError::ControlDirectory(_))),
            "{error}"
        );
        assert_eq!(trace.incarnations(name), 0);
    }
    let mut events = machine.events();
    signal(&machine, "d0", Signal::KILL).await;
    until_joined(&mut events, "d0").await;
    assert_whole_and_end(&machine, &trace, 1).await;
}

/// What no later coordinator could find ends with the one that started it.
#[tokio::test]
async fn a_newcomer_that_was_not_welcomed_does_not_outlive_a_kept_machine() {
    let trace = Trace::new().unwrap();
    let folder = tempfile::tempdir().unwrap();
    // It would not notice the end of its coordinator.
    let frozen = Script::honest().on_in(2, Trigger::Hello, [Step::Freeze]);
    let device = restarted(frozen, "d0", &trace);
    let machine = start(builder().keep(folder.path().join("vm")).device(device)).await;
    signal(&machine, "d0", Signal::KILL).await;
    let second = |entries: &[Entry]| {
        entries.iter().filter(|e| matches!(e.what, What::Began { .. })).count() == 2
    };
    trace.wait_for("the second process", second).await;
    drop(machine);
    Processes::of_trace(&trace).assert_gone_within(LONG).await;
}
