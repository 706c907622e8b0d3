//! A device that sends something else than its answer, or ends, is fenced; the others go on.

use crate::fixture::{
    LONG, PHASES, SHORT, assert_all_in, assert_machine, assert_usable, builder, deadlines, fenced,
    honest, report_of, start, three, undone, until,
};
use standstill_coordinator::Outcome;
use standstill_protocol::message::Phase;
use standstill_protocol::transition::{Loss, MachineState};
use standstill_testkit::{Forgery, Packet, Processes, Script, Step, Trace, within};

/// Everything in every phase: the outcome, whose fault it was, and what is said about it.
async fn breaks(steps: Vec<Step>, losses: &[Loss], says: &[&str]) {
    for phase in PHASES {
        let trace = Trace::new().unwrap();
        let script = Script::honest().on(phase, steps.clone());
        // No deadline is near: it is what was seen that counts, not the time.
        let machine = start(
            builder()
                .device(honest("d0", &trace))
                .device(script.device("d1", &trace).unwrap())
                .device(honest("d2", &trace)),
        )
        .await;
        let processes = Processes::of(&machine.status().await.unwrap());
        let (expected, state) = undone(phase);
        let error = until(&machine, phase).await.unwrap_err();
        let report = report_of(&error);
        let case = format!("{steps:?} in {phase}: {error}\n{report}");
        match &report.outcome {
            Outcome::Degraded { machine, fenced } => {
                assert_eq!(*machine, expected, "{case}");
                assert!(losses.contains(&fenced[0].1), "{case}");
            }
            _ => panic!("{case}"),
        }
        assert_eq!(fenced(report), ["d1"], "{case}");
        let text = error.to_string();
        assert!(text.contains("device \"d1\" is lost"), "{case}");
        assert!(text.contains(&format!("in {phase} ")), "{case}");
        assert!(says.iter().any(|what| text.contains(what)), "{case}");
        assert_machine(&machine, expected).await;
        assert_all_in(&machine, &trace, &["d0", "d2"], state).await;
        assert_eq!(processes.left(), ["d0", "d2"], "{case}");
        assert_usable(&machine).await;
    }
}

async fn breaks_protocol(steps: Vec<Step>, says: &str) {
    breaks(steps, &[Loss::Protocol], &[says]).await;
}

#[tokio::test]
async fn garbage_instead_of_an_answer() {
    breaks_protocol(vec![Step::Send(Packet::Garbage)], "packet begins with [a5, a5, a5, a5]").await;
}

#[tokio::test]
async fn an_oversized_packet_instead_of_an_answer() {
    breaks_protocol(vec![Step::Send(Packet::Oversized)], "packet of 4097 bytes").await;
}

#[tokio::test]
async fn an_empty_packet_instead_of_an_answer() {
    breaks_protocol(vec![Step::Send(Packet::Empty)], "empty packet").await;
}

#[tokio::test]
async fn a_truncated_answer() {
    breaks_protocol(vec![Step::Send(Packet::Truncated)], "too early").await;
}

#[tokio::test]
async fn an_answer_that_tells_another_state() {
    breaks_protocol(vec![Step::Send(Packet::Forged(Forgery::State))], "instead of").await;
}

#[tokio::test]
async fn too_many_file_descriptors() {
    // A kernel of 6.16 or later does not let them through: the device fails to send, and ends.
    let losses = [Loss::Protocol, Loss::Exited, Loss::Disconnected];
    let says = ["file descriptors", "process ended", "channel was closed"];
    breaks(vec![Step::Send(Packet::ManyFds)], &losses, &says).await;
}

#[tokio::test]
async fn a_flood_of_signs_of_life() {
    breaks_protocol(vec![Step::Flood(3000), Step::Ack], "1000 messages in a second").await;
}

#[tokio::test]
async fn an_end_of_the_process_before_the_answer() {
    let losses = [Loss::Exited, Loss::Disconnected];
    let says = ["process ended", "channel was closed"];
    breaks(vec![Step::Exit(3)], &losses, &says).await;
    breaks(vec![Step::Crash], &losses, &says).await;
}

#[tokio::test]
async fn a_closed_channel_of_a_living_process() {
    breaks(vec![Step::Disconnect], &[Loss::Disconnected], &["channel was closed"]).await;
}

/// How the process ended is in the report, whichever of its ends was seen first.
#[tokio::test]
async fn the_report_tells_how_the_process_ended() {
    let trace = Trace::new().unwrap();
    let script = Script::honest().on(Phase::Stop, [Step::Exit(3)]);
    let machine = start(three(&trace, Phase::Stop, script)).await;
    let error = until(&machine, Phase::Stop).await.unwrap_err();
    let report = report_of(&error).to_string();
    assert!(report.contains("exited with status 3"), "{report}");
}

/// An answer that was sent before the end counts: the barrier needs no more of that device. The
/// loss is found in the phase that follows.
#[tokio::test]
async fn an_end_after_the_answer_is_a_loss_all_the_same() {
    for phase in [Phase::PrepareStop, Phase::PrepareStart] {
        let trace = Trace::new().unwrap();
        let script = Script::honest().on(phase, [Step::Ack, Step::Exit(0)]);
        let machine = start(three(&trace, phase, script)).await;
        let (expected, state) = undone(phase);
        let error = until(&machine, phase).await.unwrap_err();
        let report = report_of(&error);
        assert!(matches!(report.outcome, Outcome::Degraded { machine, .. } if machine == expected));
        assert_eq!(fenced(report), ["d1"], "{report}");
        assert_all_in(&machine, &trace, &["d0", "d2"], state).await;
    }
}

/// Whichever is seen first, the end of the process or the answer in the socket.
#[tokio::test]
async fn an_answer_that_was_sent_before_the_end_counts() {
    for _ in 0..20 {
        let trace = Trace::new().unwrap();
        let script = Script::honest().on(Phase::Stop, [Step::Ack, Step::Exit(0)]);
        let machine = start(builder().device(script.device("d0", &trace).unwrap())).await;
        let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
        assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
        stopped.leave_stopped();
    }
}

/// What was acked was acked: the pause is done, or the loss came in time to undo it.
#[tokio::test]
async fn an_end_after_the_last_answer_is_found_by_the_next_call_at_the_latest() {
    let trace = Trace::new().unwrap();
    let script = Script::honest().on(Phase::Stop, [Step::Ack, Step::Exit(0)]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(script.device("d1", &trace).unwrap()))
            .await;
    match within(LONG, "pause", machine.pause()).await {
        Ok(stopped) => {
            stopped.leave_stopped();
            // Without d1, or undone for its sake; never with it.
            let _ = within(LONG, "resume", machine.resume()).await;
        }
        Err(error) => assert_eq!(fenced(report_of(&error)), ["d1"], "{error}"),
    }
    let status = machine.status().await.unwrap();
    assert!(status.devices[1].lost.is_some(), "{status:?}");
    assert_ne!(status.machine, MachineState::Held);
}

/// A flood is cut off, and does not delay the others' answers beyond the deadline.
#[tokio::test]
async fn floods_of_several_devices_delay_nobody() {
    let trace = Trace::new().unwrap();
    let flood = Script::honest().on(Phase::PrepareStop, [Step::Flood(100_000), Step::Ack]);
    let floods = ["f0", "f1", "f2"].map(|name| flood.clone().device(name, &trace).unwrap());
    let honest = ["d0", "d1"].map(|name| honest(name, &trace));
    let machine = start(builder().deadlines(deadlines()).devices(floods).devices(honest)).await;
    let error = within(SHORT, "pause", machine.pause()).await.unwrap_err();
    assert_eq!(fenced(report_of(&error)), ["f0", "f1", "f2"], "{error}");
    let running = standstill_protocol::migration::MigrationState::Running;
    assert_all_in(&machine, &trace, &["d0", "d1"], running).await;
    assert_usable(&machine).await;
}
