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
    for scenario in [
        faults("faults 2", 2, 2),
        Scenario { on_failure: OnFailure::StayStopped, ..faults("stay 2", 2, 2) },
        Scenario { hook: true, last_is_optional: true, ..faults("hook opt 2", 2, 2) },
        Scenario { operations: &[Operation::SwitchOver, Operation::Resume], from: MigrationState::PreCopy, ..faults("switch 2", 2, 2) },
        after("after 1", 2, 1),
        after("after 2", 2, 2),
        beside("beside 1", 2, 1),
        faults("faults 1", 3, 1),
        after("after 0", 3, 0),
        after("after 1", 3, 1),
        beside("beside 0", 3, 0),
        faults("faults 2", 3, 2),
        faults("faults 3", 2, 3),
    ] {
        let name = format!("{} n{}", scenario.name, scenario.devices);
        if only.as_ref().is_none_or(|only| *only == name) {
            passes(Scenario{faults: if scenario.faults.total==0 {Faults::default()} else {scenario.faults}, ..scenario});
        }
    }
}
