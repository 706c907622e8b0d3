//! Every row of the undo table that a machine's owner can reach by pause and resume: what the
//! devices are told, in which epochs and in which order, read from their trace.

use crate::fixture::{
    assert_all_in, assert_machine, assert_usable, builder, fenced, honest, report_of, start, until,
};
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{MachineError, OnFailure, Operation, Outcome};
use standstill_protocol::message::{Epoch, Phase};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{MachineState, UNDO, UndoRow};
use standstill_testkit::{Script, Step, Trace, What};
use std::sync::Arc;

const DEVICES: [&str; 3] = ["d0", "d1", "d2"];

/// What a device is told.
type Told = (Epoch, Phase, MigrationState);

/// The phase in which `d1` fails.
fn fails_in(row: &UndoRow) -> Phase {
    match (row.operation, row.second_phase) {
        (Operation::Resume, false) => Phase::PrepareStart,
        (Operation::Resume, true) => Phase::Start,
        (_, false) => Phase::PrepareStop,
        (_, true) => Phase::Stop,
    }
}

/// Where a phase leads in a machine of which nobody saves or loads anything.
fn target(phase: Phase) -> MigrationState {
    match phase {
        Phase::PrepareStop | Phase::PrepareStart => MigrationState::RunningP2p,
        Phase::Start => MigrationState::Running,
        _ => MigrationState::Stop,
    }
}

/// What the failed transition and its undo tell everybody, by the table.
fn by_the_table(row: &UndoRow, first: Epoch) -> Vec<Told> {
    let (one, two) = match row.operation {
        Operation::Resume => (Phase::PrepareStart, Phase::Start),
        _ => (Phase::PrepareStop, Phase::Stop),
    };
    let mut epoch = first;
    let mut told = vec![(epoch, one, target(one))];
    if row.second_phase {
        told.push((epoch, two, target(two)));
    }
    epoch = epoch.next();
    for step in row.steps {
        match step.phase() {
            Some(phase) => told.push((epoch, phase, target(phase))),
            None => epoch = epoch.next(),
        }
    }
    told
}

/// What a device was told from that epoch on.
fn told(trace: &Trace, who: &str, first: Epoch) -> Vec<Told> {
    let received = |what| match what {
        What::Received { phase, epoch, target } if epoch >= first => Some((epoch, phase, target)),
        _ => None,
    };
    let entries = trace.entries().into_iter();
    entries.filter(|entry| entry.who == who).filter_map(|entry| received(entry.what)).collect()
}

/// Checks that nobody was told a step of the undo before all of these had carried out the one
/// before.
fn assert_barriers(trace: &Trace, undo: &[Told], survivors: &[&str]) {
    let entries = trace.entries();
    for pair in undo.windows(2) {
        let ((epoch, phase, state), (next_epoch, next, _)) = (pair[0], pair[1]);
        let done = What::Reached { phase, epoch, state };
        let reached: Vec<_> = entries.iter().filter(|entry| entry.what == done).collect();
        for who in survivors {
            let has = reached.iter().any(|entry| entry.who == *who);
            assert!(has, "{who} has not done {phase}:\n{}", trace.text());
        }
        let last = reached.iter().map(|entry| entry.at_ns).max().unwrap();
        let is_next = |what: &What| {
            matches!(what, What::Received { phase, epoch, .. }
                if (*phase, *epoch) == (next, next_epoch))
        };
        let early = entries.iter().find(|entry| is_next(&entry.what) && entry.at_ns < last);
        assert!(early.is_none(), "{early:?} before all had done {phase}:\n{}", trace.text());
    }
}

/// The report of a transition of that phase, however it ended.
async fn report(machine: &standstill_coordinator::Machine, phase: Phase) -> Arc<TransitionReport> {
    match until(machine, phase).await {
        Ok(report) => report,
        Err(error @ MachineError::Transition(_)) => Arc::clone(report_of(&error)),
        Err(error) => panic!("{error}"),
    }
}

/// One row, under one policy, with one way to fail.
async fn run(row: &UndoRow, on_failure: OnFailure, failure: Step) {
    let phase = fails_in(row);
    let case = format!("{} {on_failure:?} {phase} {failure:?}", row.operation);
    let stays = matches!(failure, Step::Refuse(_));
    let trace = Trace::new().unwrap();
    let script = Script::honest().on_nth(phase, 1, [failure]);
    let machine = start(
        builder()
            .on_failure(on_failure)
            .device(honest("d0", &trace))
            .device(script.device("d1", &trace).unwrap())
            .device(honest("d2", &trace)),
    )
    .await;
    let report = report(&machine, phase).await;

    // A pause that is undone leads to where its policy says; a resume back to STOP.
    let (expected, state) = match (row.operation, on_failure) {
        (Operation::Pause, OnFailure::Rollback) => (MachineState::Running, MigrationState::Running),
        _ => (MachineState::Stopped, MigrationState::Stop),
    };
    let outcome = match (stays, on_failure) {
        (false, _) => "Degraded",
        (true, OnFailure::StayStopped) => "Stopped",
        (true, OnFailure::Rollback) => "RolledBack",
    };
    let ended = match &report.outcome {
        Outcome::RolledBack => "RolledBack",
        Outcome::Stopped => "Stopped",
        Outcome::Degraded { machine, .. } => {
            assert_eq!((*machine, fenced(&report)), (expected, vec!["d1".to_owned()]), "{case}");
            "Degraded"
        }
        _ => panic!("{case}: {report}"),
    };
    assert_eq!(ended, outcome, "{case}: {report}");

    let expected_told = by_the_table(row, report.first_epoch);
    let forward = 1 + usize::from(row.second_phase);
    // Who refuses is told all the same; who is gone is told nothing more.
    let survivors = if stays { &DEVICES[..] } else { &["d0", "d2"] };
    for who in survivors {
        let told = told(&trace, who, report.first_epoch);
        assert_eq!(told, expected_told, "{case}: {who}:\n{}", trace.text());
    }
    if !stays {
        let told = told(&trace, "d1", report.first_epoch);
        assert_eq!(told, expected_told[..forward], "{case}:\n{}", trace.text());
    }
    assert_barriers(&trace, &expected_told[forward..], survivors);
    let last = expected_told.last().unwrap().0;
    assert_eq!(report.last_epoch, last, "{case}: {report}");
    assert_machine(&machine, expected).await;
    assert_all_in(&machine, &trace, survivors, state).await;
    assert_usable(&machine).await;
}

/// One row, under each policy that leads to it, and with each way to fail.
async fn test_row(operation: Operation, on_failure: OnFailure, second_phase: bool) {
    let is = |row: &&UndoRow| {
        (row.operation, row.on_failure, row.second_phase) == (operation, on_failure, second_phase)
    };
    let row = UNDO.iter().find(is).unwrap();
    // A resume goes back to STOP under either policy.
    let policies: &[_] = match operation {
        Operation::Resume => &[OnFailure::Rollback, OnFailure::StayStopped],
        _ => &[on_failure],
    };
    for on_failure in policies {
        run(row, *on_failure, Step::Refuse("not now".into())).await;
        run(row, *on_failure, Step::Exit(1)).await;
    }
}

/// Makes a test of each row, and [`TESTED`] of all of them.
macro_rules! test_rows {
    ($($name:ident: $operation:ident, $on_failure:ident, $second_phase:literal;)+) => {
        $(
            #[tokio::test]
            async fn $name() {
                test_row(Operation::$operation, OnFailure::$on_failure, $second_phase).await;
            }
        )+

        /// The rows that have a test.
        const TESTED: &[(Operation, OnFailure, bool)] =
            &[$((Operation::$operation, OnFailure::$on_failure, $second_phase)),+];
    };
}

test_rows! {
    a_pause_that_fails_in_phase_1_and_is_rolled_back: Pause, Rollback, false;
    a_pause_that_fails_in_phase_2_and_is_rolled_back: Pause, Rollback, true;
    a_pause_that_fails_in_phase_1_and_stays_stopped: Pause, StayStopped, false;
    a_pause_that_fails_in_phase_2_and_stays_stopped: Pause, StayStopped, true;
    a_resume_that_fails_in_phase_1: Resume, Rollback, false;
    a_resume_that_fails_in_phase_2: Resume, Rollback, true;
}

#[test]
fn there_is_a_test_for_each_row_of_a_pause_and_a_resume() {
    let reached = |row: &&UndoRow| match row.operation {
        Operation::Pause | Operation::Resume => true,
        Operation::SwitchOver | Operation::Load | Operation::TakeOver => false,
    };
    let rows = UNDO.iter().filter(reached);
    let rows: Vec<_> = rows.map(|row| (row.operation, row.on_failure, row.second_phase)).collect();
    assert_eq!(TESTED, rows);
}
