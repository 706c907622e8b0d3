//! A phase is sent to all before any answer is waited for.

use crate::fixture::{LONG, PHASES, builder, start};
use standstill_testkit::{Gate, Script, Step, Trace, within};

const DEVICES: usize = 8;

/// Each device holds its answer until every device was told: a coordinator that waited for one
/// before it told the next would wait for ever.
#[tokio::test]
async fn in_every_phase_all_are_told_before_anybody_has_answered() {
    let trace = Trace::new().unwrap();
    let gates = PHASES.map(|phase| (phase, Gate::closed().unwrap()));
    let script = gates.iter().fold(Script::honest(), |script, (phase, gate)| {
        script.on(*phase, [Step::hold(gate), Step::Ack])
    });
    let devices = (0..DEVICES).map(|n| script.clone().device(&format!("d{n}"), &trace).unwrap());
    let machine = start(builder().devices(devices)).await;
    let round = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await?.resume().await })
    };
    for (phase, gate) in gates {
        let told = |_: &[_]| trace.received(phase).len() == DEVICES;
        trace.wait_for(&format!("all to be told {phase}"), told).await;
        assert!(trace.reached(phase).is_empty(), "who has answered?\n{}", trace.text());
        gate.open();
    }
    within(LONG, "the round", round).await.unwrap().unwrap();
    for phase in PHASES {
        let last_told = trace.received(phase).iter().map(|entry| entry.at_ns).max().unwrap();
        let first_ack = trace.reached(phase).iter().map(|entry| entry.at_ns).min().unwrap();
        assert!(last_told <= first_ack, "{phase}:\n{}", trace.text());
    }
}
