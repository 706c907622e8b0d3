//! Each fault of the machines and of the actor, built in: the schedules find it.

use super::super::slips::{Slip, Slips};
use super::{SCHEDULES, search};
use standstill_protocol::mutation::Mutation;
use std::time::Instant;

/// How many schedules may pass before a fault is found. All of them are part of the ordinary test run,
/// which shows that nothing is found in them without a fault.
const PATIENCE: u64 = SCHEDULES;

/// A list of faults, each with parts of what is said when it is found. One that is neither in the list
/// nor left out does not compile.
macro_rules! faults {
    ($list:ident: $kind:ident $(but $($left_out:ident),+)?; $($fault:ident => [$($says:literal),+],)+) => {
        const $list: &[($kind, &[&str])] = &[$(($kind::$fault, &[$($says),+])),+];
        const _: fn($kind) = |fault| match fault {
            $($kind::$fault => {})+
            $($($kind::$left_out => {})+)?
        };
    };
}

// The actor drops a transition together with its outcome, so nothing of it can act any more. A hold that
// runs out of its time is so rare that what comes after it has a schedule of its own.
faults! { MACHINES: Mutation but ActsAfterTheEnd, GoesBackToAHalf;
    CountsOneAnswerLess => ["is told before device"],
    TakesSilenceForAnAck => ["ends in Done: device", "and does NoPeer"],
    GoesOnBesideAFence => ["is not proven"],
    TakesUnprovenForProven => ["is said to be fenced, and is not"],
    TakesAnswersOfOtherEpochs => ["is told before device"],
    GoesOnAfterARefusal => ["is told before device"],
    ForgetsTheLast => ["is not told"],
    UndoForgetsTheLast => ["ends in Degraded", "and does NoPeer"],
    UndoesNothing => ["ends in Stopped: device", "and does Full"],
    UndoesAnUndo => ["of a transition that began at"],
    UndoesTheSecondPhaseAsTheFirst => ["which is stopped"],
    ArmsNoPhaseTimer => ["nothing comes of it any more"],
    HidesWhoWasFenced => ["and it does not say so"],
    CallsAnUndoDone => ["ends in Done: hook"],
    TakesWhoLeftStopForStopped => ["ends in Done: device"],
    HoldsWithoutStopping => ["ends in Held", "and does Full"],
    StartsWhatWasStopped => ["a take-over starts what was stopped"],
    GoesOnAfterAFailedHook => ["ends in Done: hook"],
    ObeysEveryTerm => ["it obeys a lower term"],
    ObeysEveryEpoch => ["comes again"],
    WelcomesEveryTerm => ["comes again"],
    KeepsTheOldCommand => ["it answers a lower term"],
    AnswersBeforeTheArc => ["and has promised"],
    RefusesFromElsewhere => ["it answers to"],
    LeavesStopOnAbort => ["has promised Stopped"],
}

faults! { ACTOR: Slip;
    DecidesBeforeReading => ["is lost for its silence"],
    ForgetsLastAnswers => ["the last answer of"],
    ForgetsToWatch => ["nobody says so any more"],
    ForgetsTheOwner => ["is never answered"],
    ForgetsTheQueue => ["nothing comes of it any more"],
    FencesNobodyOutside => ["nobody has killed it"],
    CountsNewcomersAtOnce => ["which is stopped"],
    KillsWhatIsAnothers => ["and is killed"],
    AnswersForLocals => ["ends in Done: a local device is in"],
}

/// Plays schedules until one fails with that fault, and says why; false if none does. What it is made
/// shorter to says the same.
fn find(name: &str, slips: Slips, says: &[&str]) -> bool {
    let began = Instant::now();
    for seed in 0..PATIENCE {
        let run = search::random(seed, slips).expect("sockets for a schedule");
        let fits = |wrong: &Option<String>| {
            wrong.as_ref().is_some_and(|wrong| says.iter().all(|part| wrong.contains(part)))
        };
        if !fits(&run.wrong) {
            continue;
        }
        let (wrong, before) = (run.wrong.clone().unwrap_or_default(), run.actions.len());
        println!("{name}: seed {seed}, {:.1?}: {wrong}", began.elapsed());
        let shrunk = search::shrink(run, slips).expect("sockets for a schedule");
        println!("  {} of {before} actions: {:?}", shrunk.actions.len(), shrunk.wrong);
        assert!(fits(&shrunk.wrong), "{name}: {:?} instead of {wrong}", shrunk.wrong);
        return true;
    }
    println!("{name}: not found in {:.1?}", began.elapsed());
    false
}

#[test]
fn each_fault_of_the_machines_is_found() {
    let missed = MACHINES.iter().filter(|&&(mutation, says)| {
        let slips = Slips { mutation: Some(mutation), slip: None };
        !find(&format!("{mutation:?}"), slips, says)
    });
    let missed: Vec<_> = missed.collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}

#[test]
fn an_undo_that_goes_back_to_a_half_machine_is_found() {
    let (case, actions) = super::half_expired();
    let slips = Slips { mutation: Some(Mutation::GoesBackToAHalf), slip: None };
    let run = search::replay(&case, &actions, slips, true).expect("sockets for a schedule");
    let wrong = run.wrong.as_deref().unwrap_or_default();
    assert!(wrong.contains("neither all running nor all stopped"), "{}", search::tell(0, &run));
}

#[test]
fn each_fault_of_the_actor_is_found() {
    let missed = ACTOR.iter().filter(|&&(slip, says)| {
        let slips = Slips { mutation: None, slip: Some(slip) };
        !find(&format!("{slip:?}"), slips, says)
    });
    let missed: Vec<_> = missed.collect();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
