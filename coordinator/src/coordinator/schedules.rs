//! Random schedules of the coordinator actor.
//!
//! The shipped actor, with real control sockets; everything else around it is played: its mailbox,
//! its clock and alarms, processes and their fences, local devices, hooks, an owner who calls the
//! public API, another coordinator. At each step a seeded random choice says what happens next.
//! After each step it is checked what must always hold ([`oracle`]), and at the end that every call
//! was answered and nobody was left behind. `docs/verification.md` says what that covers.
//!
//! A schedule that fails is made shorter as long as it still fails, and printed with its seed.
//!
//! `STANDSTILL_SCHEDULES` is how many to play, `STANDSTILL_SEED` where to begin.

mod action;
mod ends;
mod inside;
mod kept;
#[cfg(feature = "mutations")]
mod mutations;
mod oracle;
mod search;
mod stray;
mod unit;
mod world;

use super::slips::Slips;
use std::collections::BTreeSet;
use std::time::Instant;

/// How many schedules are part of the ordinary test run.
const SCHEDULES: u64 = 10_000;
/// On how many threads.
const THREADS: u64 = 2;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// Plays a seed, and says what is wrong with it, if anything is.
fn play(seed: u64) -> Result<BTreeSet<String>, String> {
    let slips = Slips::default();
    let run = search::random(seed, slips).map_err(|error| format!("seed {seed}: {error}"))?;
    if run.wrong.is_none() {
        return Ok(run.reached);
    }
    let shrunk = search::shrink(run, slips).map_err(|error| format!("seed {seed}: {error}"))?;
    Err(search::tell(seed, &shrunk))
}

/// Plays every so manieth seed, and says what was reached, and what is wrong with the first seeds of
/// which something is.
fn play_all(seeds: impl Iterator<Item = u64>, failures: usize) -> (BTreeSet<String>, Vec<String>) {
    let (mut reached, mut wrong) = (BTreeSet::new(), Vec::new());
    for seed in seeds {
        match play(seed) {
            Ok(run) => reached.extend(run),
            Err(failure) => wrong.push(failure),
        }
        if wrong.len() >= failures {
            break;
        }
    }
    (reached, wrong)
}

#[test]
fn whatever_comes_before_what_there_is_one_outcome_that_is_true_and_every_call_is_answered() {
    let first = number("STANDSTILL_SEED").unwrap_or(0);
    let count = number("STANDSTILL_SCHEDULES").unwrap_or(SCHEDULES);
    let failures = number("STANDSTILL_FAILURES").unwrap_or(1);
    let failures = usize::try_from(failures).unwrap();
    let began = Instant::now();
    let (mut reached, mut wrong) = (BTreeSet::new(), Vec::new());
    std::thread::scope(|scope| {
        let play = |thread| {
            let seeds = (first..first + count).filter(move |seed| seed % THREADS == thread);
            scope.spawn(move || play_all(seeds, failures))
        };
        let threads: Vec<_> = (0..THREADS).map(play).collect();
        for thread in threads {
            let (some, failed) = thread.join().unwrap();
            reached.extend(some);
            wrong.extend(failed);
        }
    });
    let seconds = began.elapsed().as_secs_f64();
    println!("{count} schedules in {seconds:.1} s; reached: {reached:?}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // They prove nothing about what they never reach.
    if count >= SCHEDULES {
        let missing: Vec<_> = REACHED.into_iter().filter(|end| !reached.contains(*end)).collect();
        assert!(missing.is_empty(), "never reached: {missing:?}");
    }
}

/// What must be among what the schedules reach.
const REACHED: [&str; 29] = [
    "pause Done",
    "pause RolledBack",
    "pause Stopped",
    "pause Degraded",
    "pause Held",
    "resume Done",
    "resume RolledBack",
    "resume Stopped",
    "resume Degraded",
    "resume Held",
    "take-over Done",
    "take-over RolledBack",
    "take-over Degraded",
    "take-over Held",
    "DeviceExited",
    "DeviceFenced",
    "DeviceHung",
    "DeviceJoined",
    "DeviceLost",
    "DeviceNotRestarted",
    "DeviceNotStarted",
    "DeviceRemoved",
    "DeviceRestarting",
    "DeviceRestartsExhausted",
    "FenceUnproven",
    "HoldBegan",
    "HoldEnded",
    "LeaseExpired",
    "Superseded",
];

/// Of three devices one is optional and says nothing, and one says Hello and nothing more.
#[test]
fn a_machine_does_not_wait_for_ever_for_one_that_does_not_show_that_it_outlives_its_coordinator() {
    let kind = action::Kind::default();
    let optional = action::Kind { optional: true, ..kind };
    let case = action::Case {
        devices: vec![kind, optional, kind],
        kept: true,
        faults: action::Faults { hang: 1, time: 1, ..action::Faults::default() },
        plain: true,
        ..action::Case::default()
    };
    let actions = [action::Action::Hang(1), action::Action::Greet(0), action::Action::Hang(0)];
    let run = search::replay(&case, &actions, Slips::default(), true).unwrap();
    assert_eq!(run.wrong, None, "{}", search::tell(0, &run));
}

/// Both Hellos are there and were not read when the time for them is over.
#[test]
fn whoever_is_asked_at_the_last_moment_whether_it_outlives_its_coordinator_has_time_to_answer() {
    use action::Action::{Greet, Handle, Tick};
    let optional = action::Kind { optional: true, ..action::Kind::default() };
    let case = action::Case {
        devices: vec![optional, optional],
        kept: true,
        faults: action::Faults { time: 1, ..action::Faults::default() },
        plain: true,
        ..action::Case::default()
    };
    let actions = [Greet(0), Greet(1), Tick, Handle];
    let run = search::replay(&case, &actions, Slips::default(), true).unwrap();
    assert_eq!(run.wrong, None, "{}", search::tell(0, &run));
    assert_eq!(run.actions, actions, "{}", search::tell(0, &run));
    assert!(!run.reached.contains("DeviceNotStarted"), "{}", search::tell(0, &run));
}

/// A pause of three devices, of which one dies and is not proven gone in time, and one hangs. The
/// coordinator is so late that the hold has run out of its time before the third one is told to stop:
/// that one is left in RUNNING_P2P. Then both proofs come, and the owner tries to pause again and gives
/// up.
fn half() -> (action::Case, Vec<action::Action>) {
    use super::script::packets::Ask;
    use action::Action::{Arc, Ask as Asks, Crash, Greet, Handle, Hang, Prove, Read, SeeExit};
    use action::Action::{Tick, Watch};
    let kind = action::Kind::default();
    let unprovable = action::Kind { unprovable: true, ..kind };
    let case = action::Case {
        devices: vec![kind, kind, unprovable],
        faults: action::Faults { crash: 1, hang: 1, time: 1, ..action::Faults::default() },
        ..action::Case::default()
    };
    let started = [Greet(0), Greet(1), Greet(2), Watch, Handle, Read(0), Read(1), Read(2)];
    let held = [Asks(Ask::Pause), Handle, Crash(2), SeeExit(2), Handle, Tick, Handle, Hang(1)];
    let late = [Read(0), Read(0), Read(0), Arc(0), Tick, Tick, Handle, Handle];
    let proven = [SeeExit(1), Handle, Prove(1), Handle, Prove(2), Handle];
    let again = [Asks(Ask::Pause), Handle, Asks(Ask::Cancel), Handle];
    (case, [&started[..], &held, &late, &proven, &again].concat())
}

#[test]
fn a_machine_that_a_hold_has_left_half_is_held_until_it_stands() {
    let (case, actions) = half();
    let run = search::replay(&case, &actions, Slips::default(), true).unwrap();
    assert_eq!(run.wrong, None, "{}", search::tell(0, &run));
    let ends = ["pause Held", "pause Stopped"];
    assert!(ends.iter().all(|end| run.reached.contains(*end)), "{}", search::tell(0, &run));
}

/// A pause with a lease, which runs out for one of two devices. Then a resume is given up.
fn half_expired() -> (action::Case, Vec<action::Action>) {
    use super::script::packets::Ask;
    use action::Action::{Arc, Ask as Asks, Expire, Greet, Handle, Read, Watch};
    let kind = action::Kind::default();
    let case = action::Case { devices: vec![kind, kind], ..action::Case::default() };
    let started = [Greet(0), Greet(1), Watch, Handle, Read(0), Read(1)];
    let phase = [Read(0), Read(1), Arc(0), Arc(1), Watch, Handle];
    let expired = [Expire(0), Arc(0), Watch, Handle, Asks(Ask::Status), Handle];
    let given_up = [Asks(Ask::Resume), Handle, Asks(Ask::Cancel), Handle];
    let pause = [Asks(Ask::PauseLeased), Handle];
    (case, [&started[..], &pause, &phase, &phase, &expired, &given_up].concat())
}

#[test]
fn a_resume_of_a_machine_whose_lease_has_run_out_for_some_stops_all_if_it_fails() {
    let (case, actions) = half_expired();
    let run = search::replay(&case, &actions, Slips::default(), true).unwrap();
    assert_eq!(run.wrong, None, "{}", search::tell(0, &run));
    let ends = ["pause Done", "LeaseExpired", "resume Stopped"];
    assert!(ends.iter().all(|end| run.reached.contains(*end)), "{}", search::tell(0, &run));
}

/// A pause with a lease, and then another one, which is given up while it waits for a fence; meanwhile the
/// lease runs out.
#[test]
fn a_machine_whose_lease_runs_out_while_a_pause_is_given_up_is_stopped_again() {
    use super::script::packets::Ask;
    use action::Action::{
        Arc, Ask as Asks, Crash, Expire, Gone, Greet, Handle, Prove, Read, SeeExit, Watch,
    };
    let kind = action::Kind::default();
    let case = action::Case {
        devices: vec![kind, kind],
        faults: action::Faults { crash: 1, time: 1, ..action::Faults::default() },
        ..action::Case::default()
    };
    let started = [Greet(0), Greet(1), Watch, Handle, Read(0), Read(1)];
    let pause = [Asks(Ask::PauseLeased), Handle];
    let phase = [Read(0), Read(1), Arc(0), Arc(1), Watch, Handle];
    // It is seen to have ended before the second pause has told anybody anything.
    let given_up =
        [Crash(1), SeeExit(1), Handle, Asks(Ask::Pause), Handle, Asks(Ask::Cancel), Handle];
    let expired = [Expire(0), Arc(0), Watch, Handle, Gone(1), Handle, Prove(1), Handle];
    let actions = [&started[..], &pause, &phase, &phase, &given_up, &expired].concat();
    let run = search::replay(&case, &actions, Slips::default(), true).unwrap();
    assert_eq!(run.wrong, None, "{}", search::tell(0, &run));
    let ends = ["pause Done", "LeaseExpired", "pause Degraded"];
    assert!(ends.iter().all(|end| run.reached.contains(*end)), "{}", search::tell(0, &run));
}

/// A pause is given up while its first hook is called, and that takes so long that undo and hold have run
/// out of their time before any device was told anything. Then the hook returns, and in the next pause
/// a device dies.
#[test]
fn a_machine_that_a_hold_has_left_running_is_not_started_by_a_pause_that_fails() {
    use super::script::packets::Ask;
    use action::Action::{
        Ask as Asks, Crash, Greet, Handle, Hook, Prove, Read, SeeExit, Tick, Watch,
    };
    use standstill_protocol::transition::Slot;
    let kind = action::Kind::default();
    let case = action::Case {
        devices: vec![kind, kind],
        hooks: vec![(Slot::Before, Slot::After)],
        hurried: true,
        faults: action::Faults { crash: 1, time: 1, ..action::Faults::default() },
        ..action::Case::default()
    };
    let started = [Greet(0), Greet(1), Watch, Handle, Read(0), Read(1)];
    let held = [Asks(Ask::Pause), Handle, Asks(Ask::Cancel), Handle, Tick, Handle, Tick, Handle];
    let again = [Hook(0, true), Handle, Asks(Ask::Pause), Handle, Crash(1), SeeExit(1), Handle];
    let actions = [&started[..], &held, &again, &[Prove(1), Handle]].concat();
    let run = search::replay(&case, &actions, Slips::default(), true).unwrap();
    assert_eq!(run.wrong, None, "{}", search::tell(0, &run));
    let ends = ["pause Held", "pause Degraded"];
    assert!(ends.iter().all(|end| run.reached.contains(*end)), "{}", search::tell(0, &run));
}
