//! Reports become lanes with the evidence's time left out; every picture is well-formed and shows
//! what it should.

use super::*;
use standstill::coordinator::report::{CommandReport, Names, ParticipantReport};
use standstill::coordinator::{Operation, Outcome};
use standstill::protocol::message::{Epoch, Evidence, Term, Timings};
use standstill::protocol::migration::MigrationState;
use standstill::protocol::transition::{MachineState, ParticipantId};
use std::time::SystemTime;
use svg::parser::Event;

fn command(phase: Phase, sent_ns: u64, answered_ns: u64, evidence_ns: u64) -> CommandReport {
    let gross = answered_ns - sent_ns;
    let hook_ns = (gross - evidence_ns) / 2;
    CommandReport {
        epoch: Epoch(1),
        phase,
        target: MigrationState::Stop,
        undo: false,
        sent_ns,
        answered_ns: Some(answered_ns),
        answer: CommandAnswer::Reached {
            state: MigrationState::Stop,
            timings: Timings { total_ns: gross, hook_ns, drain_ns: 0, evidence_ns },
            evidence: Evidence::default(),
        },
    }
}

fn report(devices: Vec<Vec<CommandReport>>) -> TransitionReport {
    let participants = (0..)
        .zip(devices)
        .map(|(number, commands)| ParticipantReport {
            id: ParticipantId(number),
            name: format!("engine{number}"),
            incarnation: 1,
            pid: Some(number + 1),
            before: MigrationState::Running,
            after: Some(MigrationState::Stop),
            commands,
            fence: None,
        })
        .collect();
    TransitionReport {
        operation: Operation::Pause,
        outcome: Outcome::Done,
        machine: MachineState::Stopped,
        term: Term(1),
        first_epoch: Epoch(1),
        last_epoch: Epoch(1),
        began: SystemTime::UNIX_EPOCH,
        total_ns: 1,
        downtime_ns: None,
        participants,
        hooks: Vec::new(),
        failures: Vec::new(),
        strays: 0,
        names: Names::default(),
    }
}

fn pause(devices: u64) -> TransitionReport {
    let lane = |device: u64| {
        let late = device * 3_000;
        vec![
            command(Phase::PrepareStop, 1_000 + device, 90_000 + late, 0),
            command(Phase::Stop, 400_000, 490_000 + late, 40_000),
        ]
    };
    report((0..devices).map(lane).collect())
}

fn resume(devices: u64) -> TransitionReport {
    let lane = |_| {
        vec![
            command(Phase::PrepareStart, 500, 60_000, 0),
            command(Phase::Start, 61_000, 120_000, 0),
        ]
    };
    report((0..devices).map(lane).collect())
}

/// Reads the picture as a parser does; returns its texts. Panics if it is not well-formed.
fn texts(timeline: &Timeline) -> Vec<String> {
    let picture = draw(timeline).to_string();
    let mut open = Vec::new();
    let mut texts = Vec::new();
    for event in svg::read(&picture).unwrap() {
        match event {
            Event::Tag(name, svg::node::element::tag::Type::Start, _) => open.push(name),
            Event::Tag(name, svg::node::element::tag::Type::End, _) => {
                assert_eq!(open.pop(), Some(name));
            }
            Event::Text(text) => texts.push(text.to_owned()),
            Event::Error(error) => panic!("{error}"),
            _ => {}
        }
    }
    assert!(open.is_empty(), "not closed: {open:?}");
    assert!(!picture.contains("NaN") && !picture.contains("inf"), "a number is none");
    texts
}

fn says(texts: &[String], words: &str) -> bool {
    texts.iter().any(|text| text.contains(words))
}

#[test]
fn the_time_for_evidence_is_left_out_of_its_phase_and_of_those_after_it() {
    let devices = vec![
        vec![
            command(Phase::PrepareStop, 1_000, 11_000, 6_000),
            command(Phase::Stop, 12_000, 15_000, 0),
        ],
        vec![command(Phase::PrepareStop, 1_000, 6_000, 0), command(Phase::Stop, 12_500, 14_000, 0)],
    ];
    let transition = Transition::new(&report(devices), &[Phase::PrepareStop, Phase::Stop]);
    // The slow one took 10 µs, 6 of them for evidence: the barrier is at the other's 6 µs, and
    // what came after it was 5 µs later than it would have been.
    let span = |phase, began_ns, ended_ns| PhaseSpan { phase, began_ns, ended_ns };
    let expected = [span(Phase::PrepareStop, 1_000, 6_000), span(Phase::Stop, 7_000, 10_000)];
    assert_eq!(transition.phases, expected);
    assert_eq!(transition.end_ns, 10_000);
    let step = transition.lanes[0].steps[0];
    assert_eq!((step.sent_ns, step.answered_ns), (1_000, 5_000));
}

#[test]
fn a_step_keeps_its_order_whatever_a_device_claims() {
    let mut wild = command(Phase::Stop, 1_000, 2_000, 0);
    if let CommandAnswer::Reached { timings, .. } = &mut wild.answer {
        *timings = Timings { hook_ns: u64::MAX, drain_ns: u64::MAX, ..Timings::default() };
    }
    let step = Step::new(&wild, 0).unwrap();
    let order =
        [step.sent_ns, step.began_ns, step.hook_ended_ns, step.reached_ns, step.answered_ns];
    assert!(order.is_sorted(), "{order:?}");
}

#[test]
fn pictures_of_every_size_are_well_formed_and_name_their_devices() {
    for devices in [1, 2, 8, 64, 256] {
        let timeline = Timeline::new(3, &pause(devices), &resume(devices), Vec::new());
        let texts = texts(&timeline);
        assert!(says(&texts, "engine0"), "{devices} devices");
        assert!(says(&texts, "all are quiet") && says(&texts, "all have stopped"));
        assert!(says(&texts, "all accept writes") && says(&texts, "all run"));
        assert!(says(&texts, "Round 3"));
    }
}

#[test]
fn a_round_without_first_phase_shows_the_missing_barrier_and_its_late_writes() {
    let lane = |device: u64| vec![command(Phase::Stop, 1_000, 100_000 + device * 9_000, 0)];
    let pause = report((0..4).map(lane).collect());
    let timeline = Timeline::new(1, &pause, &resume(4), vec![(3, 0), (2, 1)]);
    let texts = texts(&timeline);
    assert!(says(&texts, "no first barrier") && says(&texts, "late: a peer wrote"));
    assert!(!says(&texts, "all are quiet"));
    assert!(draw(&timeline).to_string().contains("url(#late)"));
}

#[test]
fn an_empty_report_draws_an_empty_picture() {
    let nothing = report(Vec::new());
    texts(&Timeline::new(1, &nothing, &nothing, Vec::new()));
}

#[test]
fn labels_of_phases_that_are_too_short_do_not_cover_each_other() {
    let lane = |_| {
        vec![
            command(Phase::PrepareStop, 0, 20_000_000, 0),
            command(Phase::Stop, 20_000_100, 20_001_000, 0),
        ]
    };
    let timeline = Timeline::new(1, &report((0..2).map(lane).collect()), &resume(2), Vec::new());
    let picture = draw(&timeline).to_string();
    let mut at: Vec<f64> = Vec::new();
    let mut x = None;
    for event in svg::read(&picture).unwrap() {
        match event {
            Event::Tag("text", _, attributes) => {
                x = attributes.get("x").and_then(|x| x.parse::<f64>().ok());
            }
            Event::Text(text) if text.starts_with("all ") => at.extend(x),
            _ => {}
        }
    }
    assert_eq!(at.len(), 4);
    assert!(at.windows(2).all(|pair| pair[1] - pair[0] > 120.0), "{at:?}");
}
