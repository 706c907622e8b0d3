//! A device without P2P states is safe alone, or where its owner says so.

use crate::fixture::{LONG, builder, honest, start};
use standstill_coordinator::{Outcome, StartError};
use standstill_protocol::message::{PeerDma, Phase};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::PlanError;
use standstill_testkit::{Processes, Script, Trace, What, within};
use std::time::Duration;

fn phases_of(trace: &Trace, who: &str) -> Vec<Phase> {
    let received = |what| {
        if let What::Received { phase, .. } = what { Some(phase) } else { None }
    };
    let entries = trace.entries().into_iter();
    entries.filter(|entry| entry.who == who).filter_map(|entry| received(entry.what)).collect()
}

#[tokio::test]
async fn alone_it_stops_and_starts_in_one_phase() {
    let trace = Trace::new().unwrap();
    let script = Script::honest().without_p2p();
    let machine = start(builder().device(script.device("old", &trace).unwrap())).await;
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done);
    assert_eq!(trace.last_state("old"), Some(MigrationState::Stop));
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(trace.last_state("old"), Some(MigrationState::Running));
    assert_eq!(phases_of(&trace, "old"), [Phase::Stop, Phase::Start]);
}

#[tokio::test]
async fn with_peers_it_is_refused_by_name() {
    let trace = Trace::new().unwrap();
    let old = Script::honest().without_p2p().device("old", &trace).unwrap();
    let machine = builder().device(honest("d0", &trace)).device(old);
    let error = within(LONG, "start", machine.start()).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("\"old\"") && text.contains("one-phase"), "{text}");
    match error {
        StartError::Plan { device, source: PlanError::OnePhase { .. } } => {
            assert_eq!(device, "old");
        }
        other => panic!("{other:?}"),
    }
    Processes::of_trace(&trace).assert_gone_within(Duration::ZERO).await;
}

#[tokio::test]
async fn with_peers_it_is_told_no_first_phase_where_its_owner_allows_it() {
    let trace = Trace::new().unwrap();
    let old = Script::honest().without_p2p().device("old", &trace).unwrap().allow_one_phase();
    let machine = start(builder().device(honest("d0", &trace)).device(old)).await;
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done);
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(phases_of(&trace, "old"), [Phase::Stop, Phase::Start]);
    let both = [Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start];
    assert_eq!(phases_of(&trace, "d0"), both);
}

#[tokio::test]
async fn with_peers_it_is_safe_where_no_dma_goes_between_them() {
    let trace = Trace::new().unwrap();
    let mut script = Script::honest().without_p2p();
    script.peer_dma = PeerDma::RamOnly;
    let old = script.device("old", &trace).unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(old)).await;
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(phases_of(&trace, "old"), [Phase::Stop, Phase::Start]);
}
