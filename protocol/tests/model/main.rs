//! Both pure machines, checked together: every order of events within the stated bounds.
//!
//! See `docs/verification.md`. The table is printed with `--nocapture`.

#![forbid(unsafe_code)]

mod machine;

use machine::report;
use machine::scenario::{Faults, Scenario, Successor};
use machine::world::Checked;
use stateright::Checker;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{OnFailure, Operation};

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


fn every(total: u8) -> Faults {
    Faults { crashes: 1, refusals: 1, errors: 1, timeouts: 1, unproven: 1, repeats: 1, total }
}

#[test]
fn measure() {
    let only = std::env::var("ONLY").ok();
    let after = |name, devices, total| Scenario {
        successor: Successor::AfterDeath,
        faults: every(total),
        ..Scenario::new(name, devices)
    };
    let beside = |name, devices, total| Scenario {
        successor: Successor::BesideTheFirst,
        faults: every(total),
        ..Scenario::new(name, devices)
    };
    let faults = |name, devices, total| Scenario { faults: every(total), ..Scenario::new(name, devices) };
    let some = |total| Faults { crashes: 1, refusals: 1, timeouts: 1, unproven: 1, total, ..Faults::default() };
    for scenario in [
        after("after 1", 2, 1),
        Scenario { faults: some(2), ..after("after some 2", 2, 1) },
        beside("beside 1", 2, 1),
        Scenario { faults: some(1), ..beside("beside some 1", 2, 1) },
        faults("faults 1", 3, 1),
        after("after 0", 3, 0),
        Scenario { faults: some(1), ..after("after some 1", 3, 1) },
        beside("beside 0", 3, 0),
        Scenario { faults: some(2), ..faults("faults some 2", 3, 2) },
        faults("faults 3", 2, 3),
    ] {
        let name = format!("{} n{}", scenario.name, scenario.devices);
        if only.as_ref().is_none_or(|only| *only == name) {
            passes(Scenario{faults: if scenario.faults.total==0 {Faults::default()} else {scenario.faults}, ..scenario});
        }
    }
}
