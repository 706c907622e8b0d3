//! A device that refuses is in a known state: everybody goes back, nobody is fenced.

use crate::fixture::{
    LONG, PHASES, assert_all_in, assert_machine, builder, honest, report_of, start, undone, until,
};
use standstill_coordinator::report::{CommandAnswer, JsonReport};
use standstill_coordinator::{OnFailure, Outcome};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Processes, Script, Step, Trace, within};

const WHY: &str = "the disk is on fire";

fn refuses(phase: Phase) -> Script {
    Script::honest().on_nth(phase, 1, [Step::Refuse(WHY.into())])
}

#[tokio::test]
async fn a_refusal_in_any_phase_is_rolled_back_with_its_reason() {
    for phase in PHASES {
        let trace = Trace::new().unwrap();
        let machine = start(
            builder()
                .device(honest("d0", &trace))
                .device(refuses(phase).device("d1", &trace).unwrap())
                .device(honest("d2", &trace)),
        )
        .await;
        let processes = Processes::of(&machine.status().await.unwrap());
        let error = until(&machine, phase).await.unwrap_err();
        let report = report_of(&error);
        assert_eq!(report.outcome, Outcome::RolledBack, "{phase}: {report}");
        let text = error.to_string();
        for what in ["\"d1\" refused", WHY, &format!("in {phase} ")] {
            assert!(text.contains(what), "{phase}: {text}");
        }
        assert!(report.to_string().contains(WHY), "{report}");
        let answers = report.participants[1].commands.iter();
        let refusal = answers.filter(|command| {
            matches!(&command.answer, CommandAnswer::Refused { why, .. } if why.contains(WHY))
        });
        assert_eq!(refusal.map(|c| c.phase).collect::<Vec<_>>(), [phase], "{report}");

        let (expected, state) = undone(phase);
        assert_machine(&machine, expected).await;
        assert_all_in(&machine, &trace, &["d0", "d1", "d2"], state).await;
        assert_eq!(processes.left().len(), 3, "somebody was ended");
        // Once was enough: now it goes.
        within(LONG, "resume", machine.resume()).await.unwrap();
        let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
        assert_eq!(stopped.report().outcome, Outcome::Done);
        within(LONG, "resume", stopped.resume()).await.unwrap();
    }
}

/// From P2P there is no short way back once a peer may be in STOP.
#[tokio::test]
async fn a_refused_stop_is_undone_by_a_full_start_in_two_phases() {
    let trace = Trace::new().unwrap();
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(refuses(Phase::Stop).device("d1", &trace).unwrap()),
    )
    .await;
    machine.pause().await.unwrap_err();
    let restarted = trace.received(Phase::PrepareStart);
    let started = trace.received(Phase::Start);
    assert_eq!((restarted.len(), started.len()), (2, 2), "{}", trace.text());
    let last_ack = trace.reached(Phase::PrepareStart).iter().map(|e| e.at_ns).max().unwrap();
    assert!(started.iter().all(|start| start.at_ns >= last_ack), "{}", trace.text());
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
}

#[tokio::test]
async fn under_stay_stopped_a_refusal_leaves_everybody_stopped() {
    for phase in [Phase::PrepareStop, Phase::Stop] {
        let trace = Trace::new().unwrap();
        let machine = start(
            builder()
                .on_failure(OnFailure::StayStopped)
                .device(honest("d0", &trace))
                .device(refuses(phase).device("d1", &trace).unwrap()),
        )
        .await;
        let outcome = match until(&machine, phase).await {
            Ok(report) => report.outcome.clone(),
            Err(error) => report_of(&error).outcome.clone(),
        };
        assert_eq!(outcome, Outcome::Stopped, "{phase}");
        assert_machine(&machine, MachineState::Stopped).await;
        assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
        within(LONG, "resume", machine.resume()).await.unwrap();
        assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
    }
}

/// One that will not go back does not count any more.
#[tokio::test]
async fn a_refusal_in_the_undo_is_a_fence() {
    let trace = Trace::new().unwrap();
    let stubborn = Script::honest().on(Phase::Start, [Step::Refuse("I stay".into())]);
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .device(stubborn.device("stubborn", &trace).unwrap())
            .device(refuses(Phase::Stop).device("d2", &trace).unwrap()),
    )
    .await;
    let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    assert_eq!(crate::fixture::fenced(report), ["stubborn"], "{report}");
    assert_machine(&machine, MachineState::Running).await;
    assert_all_in(&machine, &trace, &["d0", "d2"], MigrationState::Running).await;
}

#[tokio::test]
async fn what_a_device_says_moves_no_cursor_and_makes_no_line_of_its_own() {
    const HOSTILE: &str = "\u{1b}[2J\u{9b}31mno\nd0 RUNNING\u{202e}";
    let trace = Trace::new().unwrap();
    let refuses = Script::honest().on_nth(Phase::Stop, 1, [Step::Refuse(HOSTILE.into())]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(refuses.device("d1", &trace).unwrap()))
            .await;
    let mut events = machine.events();
    let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    let json = JsonReport::from(&**report);
    let told = within(LONG, "an event", events.recv()).await.unwrap();
    let mut texts = vec![report.to_string(), error.to_string(), told.to_string()];
    texts.extend(json.failures);
    while let Some(event) = events.try_recv() {
        texts.push(event.to_string());
    }
    let escaped = HOSTILE.escape_default().to_string();
    assert!(texts.iter().any(|text| text.contains(&escaped)), "{texts:?}");
    for text in texts {
        let odd = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(odd) && !text.contains("no\nd0"), "{text:?}");
    }
}
