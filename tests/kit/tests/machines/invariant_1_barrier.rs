//! Nobody is told the second phase before everybody has answered the first.

use crate::fixture::{LONG, builder, honest, start};
use standstill_coordinator::Stopped;
use standstill_protocol::message::Phase;
use standstill_testkit::{Gate, Script, Step, Trace, TracedLocal, within};
use std::time::Duration;

/// How long the barrier is watched while it must hold.
const WATCHED: Duration = Duration::from_millis(150);

const NAMES: [&str; 4] = ["d0", "d1", "d2", "slow"];

async fn barrier_holds(first: Phase, second: Phase) {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let slow = Script::honest().on(first, [Step::hold(&gate), Step::Ack]);
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(honest("d1", &trace))
            .device(slow.device("slow", &trace).unwrap())
            .device(honest("d2", &trace)),
    )
    .await;
    if first == Phase::PrepareStart {
        machine.pause().await.unwrap().leave_stopped();
    }
    let call = {
        let machine = machine.clone();
        tokio::spawn(async move {
            match first {
                Phase::PrepareStop => machine.pause().await.map(Stopped::leave_stopped),
                _ => machine.resume().await.map(drop),
            }
        })
    };
    trace
        .wait_for("all to be told and all but one to have answered", |_| {
            trace.received(first).len() == NAMES.len() && trace.reached(first).len() == 3
        })
        .await;
    tokio::time::sleep(WATCHED).await;
    assert!(trace.received(second).is_empty(), "too early:\n{}", trace.text());
    gate.open();
    within(LONG, "the call", call).await.unwrap().unwrap();

    let acks = trace.reached(first);
    let commands = trace.received(second);
    assert_eq!((acks.len(), commands.len()), (NAMES.len(), NAMES.len()), "{}", trace.text());
    let last_ack = acks.iter().map(|ack| ack.at_ns).max().unwrap();
    for command in &commands {
        assert!(command.at_ns >= last_ack, "{command:?} is too early:\n{}", trace.text());
    }
}

#[tokio::test]
async fn nobody_is_told_stop_before_the_slowest_prepare_stop_ack() {
    barrier_holds(Phase::PrepareStop, Phase::Stop).await;
}

#[tokio::test]
async fn nobody_is_told_start_before_the_slowest_prepare_start_ack() {
    barrier_holds(Phase::PrepareStart, Phase::Start).await;
}

#[tokio::test]
async fn a_local_device_holds_the_barrier_as_a_process_does() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let key = gate.key();
    let local = TracedLocal::new("local", &trace).unwrap().doing(move |phase| match phase {
        Phase::PrepareStop => Ok(key.wait()?),
        _ => Ok(()),
    });
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(honest("d1", &trace))
            .local_device("local", local),
    )
    .await;
    let pause = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await.map(Stopped::leave_stopped) })
    };
    trace
        .wait_for("both processes' answers", |_| trace.reached(Phase::PrepareStop).len() == 2)
        .await;
    tokio::time::sleep(WATCHED).await;
    assert!(trace.received(Phase::Stop).is_empty(), "too early:\n{}", trace.text());
    gate.open();
    within(LONG, "pause", pause).await.unwrap().unwrap();
    let last_ack = trace.reached(Phase::PrepareStop).iter().map(|ack| ack.at_ns).max().unwrap();
    let stops = trace.received(Phase::Stop);
    assert_eq!(stops.len(), 3);
    assert!(stops.iter().all(|stop| stop.at_ns >= last_ack), "{}", trace.text());
}

#[tokio::test]
async fn without_a_first_phase_nobody_is_told_one() {
    let trace = Trace::new().unwrap();
    let devices = ["d0", "d1"].map(|name| honest(name, &trace));
    let machine = start(builder().without_first_phase().devices(devices)).await;
    machine.pause().await.unwrap().resume().await.unwrap();
    assert!(trace.received(Phase::PrepareStop).is_empty(), "{}", trace.text());
    assert_eq!(trace.received(Phase::Stop).len(), 2, "{}", trace.text());
}
