//! Stale, duplicate, foreign and lower-term answers change no decision.

use crate::fixture::{
    LONG, PHASES, SHORT, assert_all_in, assert_machine, assert_usable, builder, fenced, honest,
    report_of, start, three, undone, until,
};
use standstill_coordinator::Outcome;
use standstill_protocol::message::Phase;
use standstill_protocol::transition::{Loss, MachineState};
use standstill_testkit::{Forgery, Gate, Packet, Script, Step, Trace, within};
use std::time::Duration;

/// Every answer that must not count.
const FORGERIES: [Forgery; 5] = [
    Forgery::EarlierEpoch,
    Forgery::LaterEpoch,
    Forgery::LowerTerm,
    Forgery::HigherTerm,
    Forgery::Phase,
];

fn forged(forgery: Forgery) -> Step {
    Step::Send(Packet::Forged(forgery))
}

#[tokio::test]
async fn answers_that_do_not_count_are_strays_around_the_one_that_does() {
    let trace = Trace::new().unwrap();
    let steps = || {
        let foreign = FORGERIES.map(forged);
        // The last one repeats what was said: a duplicate.
        foreign.into_iter().chain([Step::Ack, forged(Forgery::Nothing)])
    };
    let script = PHASES.iter().fold(Script::honest(), |script, &phase| script.on(phase, steps()));
    let machine =
        start(builder().device(honest("d0", &trace)).device(script.device("d1", &trace).unwrap()))
            .await;
    for round in 0..3 {
        let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
        let report = stopped.report();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        // Both phases have five before the answer. The duplicate of the last phase comes when the
        // pause may be over.
        assert!(report.strays >= 10, "{} strays in round {round}", report.strays);
        let report = within(LONG, "resume", stopped.resume()).await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
        assert!(report.strays >= 10, "{} strays in round {round}", report.strays);
    }
    assert_machine(&machine, MachineState::Running).await;
}

/// The barrier stands although acks of other epochs, terms and phases have come.
#[tokio::test]
async fn answers_that_do_not_count_do_not_open_the_barrier() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let steps = FORGERIES.map(forged).into_iter().chain([
        Step::Say("forged".into()),
        Step::hold(&gate),
        Step::Ack,
    ]);
    let forger = Script::honest().on(Phase::PrepareStop, steps);
    let machine =
        start(builder().device(honest("d0", &trace)).device(forger.device("d1", &trace).unwrap()))
            .await;
    let pause = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await })
    };
    trace.wait_for("both to be told", |_| trace.received(Phase::PrepareStop).len() == 2).await;
    tokio::time::sleep(Duration::from_millis(150)).await;
    assert!(trace.received(Phase::Stop).is_empty(), "{}", trace.text());
    gate.open();
    let stopped = within(LONG, "pause", pause).await.unwrap().unwrap();
    assert_eq!(stopped.report().strays, 5);
    stopped.leave_stopped();
}

#[tokio::test]
async fn only_an_ack_that_does_not_count_is_no_ack() {
    for phase in PHASES {
        for forgery in FORGERIES {
            let trace = Trace::new().unwrap();
            let script = Script::honest().on(phase, [forged(forgery)]);
            let machine = start(three(&trace, phase, script)).await;
            let error = until(&machine, phase).await.unwrap_err();
            let report = report_of(&error);
            let case = format!("{forgery:?} in {phase}: {report}");
            let (running, state) = undone(phase);
            match &report.outcome {
                Outcome::Degraded { machine, fenced } => {
                    assert_eq!((*machine, fenced[0].1), (running, Loss::Timeout), "{case}");
                }
                _ => panic!("{case}"),
            }
            assert_eq!(fenced(report), ["d1"], "{case}");
            assert!(report.strays > 0, "{case}");
            assert!(report.total_ns >= u64::try_from(SHORT.as_nanos()).unwrap(), "{case}");
            assert!(error.to_string().contains("\"d1\""), "{error}");
            assert_all_in(&machine, &trace, &["d0", "d2"], state).await;
            assert_usable(&machine).await;
        }
    }
}

/// Epochs grow over the life of a machine, an undo has one of its own.
#[tokio::test]
async fn every_transition_has_an_epoch_of_its_own() {
    let trace = Trace::new().unwrap();
    let script = Script::honest().on_nth(Phase::Stop, 2, [Step::Refuse("once".into())]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(script.device("d1", &trace).unwrap()))
            .await;
    let stopped = machine.pause().await.unwrap();
    let mut last = stopped.report().last_epoch;
    assert_eq!(stopped.report().first_epoch, last);
    let report = stopped.resume().await.unwrap();
    assert!(report.first_epoch > last);
    last = report.last_epoch;
    let error = machine.pause().await.unwrap_err();
    let report = report_of(&error);
    assert!(report.first_epoch > last);
    assert!(report.last_epoch > report.first_epoch, "the undo has no epoch of its own");
    last = report.last_epoch;
    let stopped = machine.pause().await.unwrap();
    assert!(stopped.report().first_epoch > last);
    stopped.leave_stopped();
}
