//! Many rounds leave nothing behind.

use crate::alone::alone;
use crate::fixture::{LONG, SHORT, builder, honest, start};
use crate::memory::live;
use crate::process::{names_of_fds, open_fds, settled, threads};
use standstill_coordinator::error::MachineError;
use standstill_coordinator::{Events, LossPolicy, Machine, MachineEvent, Outcome, RestartPolicy};
use standstill_protocol::message::Phase;
use standstill_testkit::{Packet, Processes, Script, Step, Trace, Trigger, within};
use std::time::Duration;

/// How many transitions are made, and how many come before the first look at the heap.
const TRANSITIONS: usize = 10_000;
const WARM: usize = 1000;
/// How many there are between two looks.
const STRETCH: usize = 500;
/// What the heap may grow by from the first to the last look, by the line through all of them. One
/// report that is kept, or an event for each loss, would be far more.
const MOST_DRIFT: f64 = 16.0 * 1024.0;
/// The transitions of its own that d1 refuses, and after so many d2 ends: every so manieth.
const REFUSES_EACH: u32 = 97;
const ENDS_EACH: u32 = 100;

/// Waits until there are as many open fds as before: actors end on their own time.
async fn as_before(before: usize) {
    let settled = async {
        while open_fds() > before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(LONG, settled).await.is_err() {
        panic!("{before} fds before, now {:#?}", names_of_fds());
    }
}

/// What was seen of all transitions.
#[derive(Debug, Default)]
struct Tally {
    transitions: usize,
    refused: usize,
    lost: usize,
}

/// Pauses and resumes; if that fails, for one of the two reasons that there are, goes on when the
/// machine is whole again.
async fn round(machine: &Machine, events: &mut Events, tally: &mut Tally) {
    tally.transitions += 1;
    match within(LONG, "pause", machine.pause()).await {
        Ok(stopped) => {
            let report = within(LONG, "resume", stopped.resume()).await.unwrap();
            assert_eq!(report.outcome, Outcome::Done, "{report}");
            tally.transitions += 1;
        }
        Err(MachineError::Transition(report)) => match &report.outcome {
            Outcome::RolledBack => tally.refused += 1,
            Outcome::Degraded { fenced, .. } if fenced.len() == 1 => {
                tally.lost += 1;
                let joined = async {
                    while !matches!(events.recv().await, Some(MachineEvent::DeviceJoined { .. })) {}
                };
                within(LONG, "the new process", joined).await;
            }
            _ => panic!("{report}"),
        },
        Err(error) => panic!("{error}"),
    }
    while events.try_recv().is_some() {}
}

/// By how much the line of least squares rises over all of these.
fn drift(looks: &[usize]) -> f64 {
    let count = looks.len() as f64;
    let middle = (count - 1.0) / 2.0;
    let mean = looks.iter().sum::<usize>() as f64 / count;
    let (mut rise, mut run) = (0.0, 0.0);
    for (at, look) in looks.iter().enumerate() {
        let x = at as f64 - middle;
        rise += x * (*look as f64 - mean);
        run += x * x;
    }
    rise / run * (count - 1.0)
}

#[test]
fn ten_thousand_transitions_with_refusals_and_losses_leave_nothing_behind() {
    alone(
        "endurance::ten_thousand_transitions_with_refusals_and_losses_leave_nothing_behind",
        async {
            let trace = Trace::new().unwrap();
            let soon = RestartPolicy {
                budget: u32::MAX,
                window: Duration::from_secs(3600),
                first_backoff: Duration::from_millis(1),
                longest_backoff: Duration::from_millis(1),
            };
            let rounds = u32::try_from(TRANSITIONS).unwrap();
            let refuses = (1..=rounds / REFUSES_EACH).fold(Script::honest(), |script, nth| {
                script.on_nth(Phase::PrepareStop, nth * REFUSES_EACH, [Step::Refuse("no".into())])
            });
            let ends = Script::honest().on_nth(Phase::Stop, ENDS_EACH, [Step::Exit(3)]);
            let devices = [
                honest("d0", &trace),
                refuses.device("d1", &trace).unwrap(),
                ends.device("d2", &trace).unwrap().on_loss(LossPolicy::Restart(soon)),
            ];
            let machine = start(builder().devices(devices)).await;
            let mut events = machine.events();
            let mut tally = Tally::default();
            while tally.transitions < WARM {
                round(&machine, &mut events, &mut tally).await;
            }
            // Nothing of a lost process is on its way out while this is looked at.
            let fds = loop {
                let (fds, lost) = (open_fds(), tally.lost);
                for _ in 0..5 {
                    round(&machine, &mut events, &mut tally).await;
                }
                if (open_fds(), tally.lost) == (fds, lost) {
                    break fds;
                }
            };
            // Of the runtime's threads that come and go there may be none just now, or one too many.
            let all_threads = threads();
            let mut looks = vec![live()];
            while tally.transitions < TRANSITIONS {
                let next = tally.transitions + STRETCH;
                while tally.transitions < next {
                    round(&machine, &mut events, &mut tally).await;
                }
                as_before(fds).await;
                looks.push(live());
            }
            settled(fds, all_threads).await;
            assert_eq!(open_fds(), fds);
            let drift = drift(&looks);
            println!(
                "{tally:?}; {fds} fds, {all_threads} threads, the heap drifts by {drift:.0} bytes"
            );
            println!("{looks:?}");
            assert!(drift.abs() <= MOST_DRIFT, "the heap drifts by {drift} bytes: {looks:?}");
            let least = TRANSITIONS / 2 / 100 - 10;
            assert!(tally.refused >= least && tally.lost >= least, "nothing goes wrong: {tally:?}");
            within(LONG, "shutdown", machine.shutdown()).await.unwrap();
            Processes::of_trace(&trace).assert_gone_within(Duration::ZERO).await;
        },
    );
}

/// Machines that come and go in every way that there is.
#[test]
fn machines_that_end_leak_no_file_descriptor() {
    alone("endurance::machines_that_end_leak_no_file_descriptor", async {
        let mut before = None;
        for round in 0..12 {
            let trace = Trace::new().unwrap();
            let good = || builder().devices(["d0", "d1"].map(|name| honest(name, &trace)));
            match round % 4 {
                0 => {
                    let machine = start(good()).await;
                    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
                }
                1 => drop(start(good()).await),
                2 => {
                    let bad = Script::honest().on(Trigger::Hello, [Step::Send(Packet::ManyFds)]);
                    let machine = good().device(bad.device("bad", &trace).unwrap());
                    within(SHORT, "start", machine.start()).await.unwrap_err();
                }
                _ => {
                    let bad = Script::honest().on(Phase::Stop, [Step::Send(Packet::ManyFds)]);
                    let machine = start(good().device(bad.device("bad", &trace).unwrap())).await;
                    machine.pause().await.unwrap_err();
                    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
                }
            }
            Processes::of_trace(&trace).assert_gone_within(Duration::from_secs(3)).await;
            drop(trace);
            match before {
                // The first of each kind may make what stays.
                None if round == 3 => before = Some(open_fds()),
                None => {}
                Some(before) => as_before(before).await,
            }
        }
    });
}
