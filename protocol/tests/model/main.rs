//! Both pure machines, checked together: every order of events within the stated bounds.
//!
//! See `docs/verification.md`. The figures are printed in any case; four devices, and what else takes
//! minutes, are checked only where the environment variable `STANDSTILL_MODEL_FOUR` is set.

#![forbid(unsafe_code)]
#![expect(
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking and prints what it found"
)]

mod configurations;
mod machine;

use machine::report::{self, Cost};
use machine::rule::{Antecedent, Rule};
use machine::scenario::{Faults, Scenario, Successor};
use machine::world::Checked;
use standstill_protocol::transition::Phases;
use stateright::Checker;
use std::io::Write as _;

/// Nothing breaks, and what the scenario must reach is reached.
fn passes(checker: &impl Checker<Checked>, cost: &Cost) {
    let model = checker.model();
    // Past the capture of test output: the figures are for whoever runs the tests.
    let line = report::line(model, cost);
    writeln!(std::io::stdout(), "{line}").expect("standard output");
    println!("{} reaches {:?}", model.scenario.name, model.reached());
    let discoveries = checker.discoveries();
    let mut broken: Vec<_> =
        discoveries.into_iter().filter(|(name, _)| name.starts_with("inv")).collect();
    broken.sort_by_key(|(_, path)| path.clone().into_vec().len());
    if let Some((name, path)) = broken.into_iter().next() {
        panic!("{name} does not hold:\n{}", report::trace(model, path));
    }
    checker.assert_properties();
}

fn exhaustively(scenarios: Vec<Scenario>) {
    for scenario in scenarios {
        let (checker, cost) = report::check(Checked::new(scenario));
        passes(&checker, &cost);
    }
}

#[test]
fn one_and_two_devices() {
    exhaustively(configurations::one_and_two());
}

#[test]
fn three_devices() {
    exhaustively(configurations::three());
}

#[test]
fn four_devices_if_asked_for() {
    if std::env::var_os("STANDSTILL_MODEL_FOUR").is_none() {
        println!("not asked for");
        return;
    }
    for scenario in configurations::four() {
        let (checker, cost) = report::check_symmetric(Checked::new(scenario));
        passes(&checker, &cost);
    }
}

/// An antecedent that no configuration asks for could be missed by all of them.
#[test]
fn every_antecedent_is_asked_for() {
    let scenarios = [configurations::one_and_two(), configurations::three()].concat();
    let asked = |a: &Antecedent| scenarios.iter().any(|scenario| scenario.reaches.contains(a));
    let missing: Vec<_> = Antecedent::ALL.iter().filter(|a| !asked(a)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// A check that takes devices to be alike must not overlook what one that does not finds.
#[test]
fn symmetry_finds_the_same_with_fewer_states() {
    let faults = Faults { refusals: 1, crashes: 1, timeouts: 1, total: 1, ..Faults::default() };
    let scenario = Scenario { faults, ..Scenario::new("symmetry", 3) };
    let (all, cost) = report::check(Checked::new(scenario.clone()));
    let (alike, fewer) = report::check_symmetric(Checked::new(scenario.clone()));
    assert_eq!(all.model().reached(), alike.model().reached());
    assert!(fewer.unique * 2 < cost.unique, "{fewer:?} {cost:?}");
    let broken = Scenario { phases: Phases::SecondOnly, ..scenario };
    let (alike, _) = report::check_symmetric(Checked::new(broken));
    assert!(alike.discoveries().keys().any(|name| name.starts_with("invariant 1")));
}

/// What the first phase is for: without it the model finds the writer beside the stopped one.
#[test]
fn without_the_first_phase_the_barrier_breaks() {
    for successor in [Successor::None, Successor::AfterDeath] {
        let scenario = Scenario { successor, phases: Phases::SecondOnly, ..Scenario::new("", 2) };
        let checker = report::find(Checked::new(scenario), Rule::NoWriterBesideAStopped);
        let broken: Vec<_> = checker.discoveries().into_keys().collect();
        assert!(broken.iter().any(|name| name.starts_with("invariant 1")), "{broken:?}");
    }
}
