//! A coordinator is lost at every message boundary of a pause and of a resume, dead or stopped for
//! a while; another one takes the machine over.
//!
//! A boundary is a number of acks, and whether the coordinator has read the last one (for none:
//! whether it has sent the first commands). After the third ack it sends the second phase.

use crate::left_behind::{Left, NAMES, owner_goes_on};
use standstill_coordinator::Outcome;
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::HeldReason;
use standstill_testkit::pilot::{SUPERSEDED, Signal};
use standstill_testkit::{Gate, Pilot, Script, Step};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    Pause,
    Resume,
}

impl Operation {
    fn name(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
        }
    }

    fn phases(self) -> [Phase; 2] {
        match self {
            Self::Pause => [Phase::PrepareStop, Phase::Stop],
            Self::Resume => [Phase::PrepareStart, Phase::Start],
        }
    }

    /// How a take-over must end after that many acks.
    fn expected(self, acks: usize) -> Outcome {
        let held = Outcome::Held { reasons: vec![HeldReason::TakenOverStopped], fenced: vec![] };
        match (self, acks) {
            // Nobody has moved yet, or everybody is there.
            (Self::Pause, 0) | (Self::Resume, 6) => Outcome::Done,
            (Self::Pause, 1..=3) | (Self::Resume, 3..=5) => Outcome::RolledBack,
            // Somebody is in STOP.
            _ => held,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Boundary {
    operation: Operation,
    acks: usize,
    read: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// SIGKILL.
    Killed,
    /// SIGSTOP, and SIGCONT after the take-over.
    Stopped,
}

/// A machine whose coordinator has come to that boundary, and the gates that hold its devices.
async fn bring_to(boundary: Boundary) -> (Left, Pilot, Vec<Option<Gate>>) {
    let Boundary { operation, acks, read } = boundary;
    let phases = operation.phases();
    let mut gates: Vec<_> = (0..6).map(|_| Some(Gate::closed().unwrap())).collect();
    let hold = |at: usize| [Step::hold(gates[at].as_ref().unwrap()), Step::Ack];
    let left = Left::new(|| {
        [0, 1, 2].map(|at| {
            Script::honest().on_nth(phases[0], 1, hold(at)).on_nth(phases[1], 1, hold(3 + at))
        })
    });
    let mut pilot = left.pilot().await;
    if operation == Operation::Resume {
        pilot.tell("pause");
        pilot.hear("pause Done").await;
    }
    let told = async |phase| {
        let all = |_: &[_]| left.trace.received(phase).len() == 3;
        left.trace.wait_for(&format!("{boundary:?}: all to be told {phase}"), all).await;
    };
    if (acks, read) == (0, false) {
        pilot.freeze().await;
        pilot.tell(operation.name());
    } else {
        pilot.tell(operation.name());
        told(phases[0]).await;
    }
    for ack in 0..acks {
        if ack == 3 {
            told(phases[1]).await;
        }
        if ack + 1 == acks && !read {
            pilot.freeze().await;
        }
        gates[ack] = None;
        let phase = phases[ack / 3];
        let reached = |_: &[_]| left.trace.reached(phase).len() == ack % 3 + 1;
        left.trace.wait_for(&format!("{boundary:?}: ack {ack}"), reached).await;
    }
    if read && acks == 3 {
        told(phases[1]).await;
    }
    if read && acks == 6 {
        pilot.hear(&format!("{} Done", operation.name())).await;
    }
    // Nobody stands at the gates of a phase that was never told.
    for (at, phase) in phases.into_iter().enumerate() {
        if left.trace.received(phase).is_empty() {
            gates[3 * at..][..3].fill_with(|| None);
        }
    }
    (left, pilot, gates)
}

async fn lost_at(boundary: Boundary, fate: Fate) {
    let case = format!("{boundary:?}, {fate:?}");
    let (left, pilot, gates) = bring_to(boundary).await;
    let mut stopped = None;
    match fate {
        Fate::Killed => pilot.kill(),
        Fate::Stopped => {
            pilot.freeze().await;
            stopped = Some(pilot);
        }
    }
    let before: Vec<_> = NAMES.iter().map(|name| left.process(name)).collect();

    let taken = left.take_over().await;
    let (machine, report) = (taken.machine, taken.report);
    let expected = boundary.operation.expected(boundary.acks);
    assert_eq!(report.outcome, expected, "{case}: {report}\n{}", left.trace.text());
    assert_eq!(report.term.0, 2, "{case}");
    let held = matches!(expected, Outcome::Held { .. });
    let state = if held { MigrationState::Stop } else { MigrationState::Running };
    left.assert_all(&machine, &NAMES, state).await;
    if held {
        left.assert_nothing_started();
    }
    drop(gates);

    if let Some(mut pilot) = stopped {
        // It finds that it is late: deadlines, answers, and another coordinator.
        pilot.signal(Signal::CONT);
        assert_eq!(pilot.hear("superseded").await, "superseded 2", "{case}");
        assert_eq!(pilot.ended().await.code(), Some(i32::from(SUPERSEDED)), "{case}");
        left.assert_all(&machine, &NAMES, state).await;
    }
    if held {
        left.assert_nothing_started();
    }
    owner_goes_on(&machine, held).await;
    left.assert_no_stale();
    for (process, name) in before.iter().zip(NAMES) {
        assert!(process.lives().await, "{case}: {name} has ended\n{}", left.trace.text());
    }
    left.end(machine).await;
}

async fn lost_at_every_boundary(operation: Operation, fate: Fate) {
    for acks in 0..=6 {
        for read in [false, true] {
            lost_at(Boundary { operation, acks, read }, fate).await;
        }
    }
}

#[tokio::test]
async fn a_coordinator_is_killed_at_every_boundary_of_a_pause() {
    lost_at_every_boundary(Operation::Pause, Fate::Killed).await;
}

#[tokio::test]
async fn a_coordinator_is_killed_at_every_boundary_of_a_resume() {
    lost_at_every_boundary(Operation::Resume, Fate::Killed).await;
}

#[tokio::test]
async fn a_coordinator_is_stopped_and_goes_on_at_every_boundary_of_a_pause() {
    lost_at_every_boundary(Operation::Pause, Fate::Stopped).await;
}

#[tokio::test]
async fn a_coordinator_is_stopped_and_goes_on_at_every_boundary_of_a_resume() {
    lost_at_every_boundary(Operation::Resume, Fate::Stopped).await;
}
