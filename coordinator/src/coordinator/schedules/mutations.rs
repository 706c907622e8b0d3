//! Each fault of the machines and of the actor, built in: the schedules find it.
//!
//! [`Mutation::ActsAfterTheEnd`] is not among them: the actor drops a transition together with its
//! outcome, so nothing of it can act any more.

use super::super::slips::{Slip, Slips};
use super::search;
use standstill_protocol::mutation::Mutation;
use std::time::Instant;

/// How many schedules may pass before a fault is found.
const PATIENCE: u64 = 20_000;

/// A fault, and a part of what is said when it is found.
const MACHINES: [(Mutation, &str); 24] = [
    (Mutation::CountsOneAnswerLess, "is told before device"),
    (Mutation::TakesSilenceForAnAck, "ends in Done"),
    (Mutation::GoesOnBesideAFence, "is not proven"),
    (Mutation::TakesUnprovenForProven, "is said to be fenced, and is not"),
    (Mutation::TakesAnswersOfOtherEpochs, "is told before device"),
    (Mutation::GoesOnAfterARefusal, "is told before device"),
    (Mutation::ForgetsTheLast, "is not told"),
    (Mutation::UndoForgetsTheLast, "ends in"),
    (Mutation::UndoesNothing, "ends in"),
    (Mutation::UndoesAnUndo, "of a transition that began at"),
    (Mutation::UndoesTheSecondPhaseAsTheFirst, "which is stopped"),
    (Mutation::ArmsNoPhaseTimer, "nothing comes of it any more"),
    (Mutation::HidesWhoWasFenced, "and it does not say so"),
    (Mutation::CallsAnUndoDone, "ends in Done"),
    (Mutation::HoldsWithoutStopping, "ends in Held"),
    (Mutation::StartsWhatWasStopped, "a take-over starts what was stopped"),
    (Mutation::GoesOnAfterAFailedHook, "ends in Done: hook"),
    (Mutation::ObeysEveryTerm, "a lower term"),
    (Mutation::ObeysEveryEpoch, "comes again"),
    (Mutation::WelcomesEveryTerm, "comes again"),
    (Mutation::KeepsTheOldCommand, "a lower term"),
    (Mutation::AnswersBeforeTheArc, "and has promised"),
    (Mutation::RefusesFromElsewhere, "it answers to"),
    (Mutation::LeavesStopOnAbort, "has promised Stopped"),
];

const ACTOR: [(Slip, &str); 8] = [
    (Slip::DecidesBeforeReading, "is lost for its silence"),
    (Slip::ForgetsLastAnswers, "the last answer of"),
    (Slip::ForgetsToWatch, "nobody says so any more"),
    (Slip::ForgetsTheOwner, "is never answered"),
    (Slip::ForgetsTheQueue, "nothing comes of it any more"),
    (Slip::FencesNobodyOutside, "nobody has killed it"),
    (Slip::CountsNewcomersAtOnce, "which is stopped"),
    (Slip::KillsWhatIsAnothers, "and is killed"),
];

/// Plays schedules until one fails with that fault, and says why; false if none does.
fn find(name: &str, slips: Slips, says: &str) -> bool {
    let began = Instant::now();
    for seed in 0..PATIENCE {
        let run = search::random(seed, slips).expect("sockets for a schedule");
        let Some(wrong) = run.wrong.filter(|wrong| wrong.contains(says)) else { continue };
        println!("{name}: seed {seed}, {:.1?}: {wrong}", began.elapsed());
        return true;
    }
    println!("{name}: not found in {:.1?}", began.elapsed());
    false
}

#[test]
fn each_fault_of_the_machines_is_found() {
    let missed = MACHINES.into_iter().filter(|&(mutation, says)| {
        let slips = Slips { mutation: Some(mutation), slip: None };
        !find(&format!("{mutation:?}"), slips, says)
    });
    let missed: Vec<_> = missed.collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn each_fault_of_the_actor_is_found() {
    let missed = ACTOR.into_iter().filter(|&(slip, says)| {
        let slips = Slips { mutation: None, slip: Some(slip) };
        !find(&format!("{slip:?}"), slips, says)
    });
    let missed: Vec<_> = missed.collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
