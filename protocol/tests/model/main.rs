//! Both pure machines, checked together: every order of events within the stated bounds.
//!
//! See `docs/verification.md`. The table is printed with `--nocapture`.

#![forbid(unsafe_code)]

mod machine;

use machine::report;
use machine::scenario::{Faults, Scenario, Successor};
use machine::world::Checked;
use stateright::Checker;

fn passes(scenario: Scenario) {
    let (checker, cost) = report::check(Checked::new(scenario));
    let model = checker.model();
    println!("{}", report::line(model, &cost));
    println!("reached: {:?}", model.reached());
    for (name, path) in checker.discoveries() {
        if name.starts_with("invariant") {
            panic!("{name}\n{}", report::trace(model, path));
        }
    }
    checker.assert_properties();
}

#[test]
fn two_devices_without_faults() {
    passes(Scenario::new("nothing fails", 2));
}

#[test]
fn two_devices_that_fail() {
    let faults = Faults { crashes: 1, refusals: 1, errors: 1, timeouts: 1, unproven: 1, repeats: 0 };
    passes(Scenario { faults, ..Scenario::new("every fault once", 2) });
}

#[test]
fn two_devices_after_death() {
    passes(Scenario { successor: Successor::AfterDeath, ..Scenario::new("take-over", 2) });
}

#[test]
fn two_devices_beside() {
    passes(Scenario { successor: Successor::BesideTheFirst, ..Scenario::new("take-over beside", 2) });
}
