//! `docs/transitions.md` has the tables that the code has.

use super::*;

const PAGE: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/transitions.md"));

/// The lines between two markers of the page.
fn between(name: &str) -> &'static str {
    let begin = format!("<!-- {name}: begin -->\n");
    let end = format!("<!-- {name}: end -->");
    let (_, after) = PAGE.split_once(&begin).expect("the table begins");
    after.split_once(&end).expect("the table ends").0.trim()
}

fn targets() -> String {
    use std::fmt::Write;
    let mut table = String::from("| operation | from | phase 1 | phase 2 |\n|---|---|---|---|\n");
    for operation in [Operation::Pause, Operation::SwitchOver, Operation::Load, Operation::Resume] {
        for state in MigrationState::ALL {
            match row(operation, state) {
                Row::Refuse(reason) => {
                    writeln!(table, "| {operation} | {state} | refused: {reason} | |")
                }
                // A load has no barrier: both are stations of the one phase `Load`.
                Row::Take { first, second } => {
                    writeln!(table, "| {operation} | {state} | {first} | {second} |")
                }
            }
            .expect("a string takes everything");
        }
    }
    table
}

fn undo() -> String {
    let mut table =
        String::from("| operation | policy | failed in | what is done |\n|---|---|---|---|\n");
    for row in &UNDO {
        let policy = match (row.operation, row.on_failure) {
            (Operation::Resume, _) => "either",
            (_, OnFailure::Rollback) => "rollback",
            (_, OnFailure::StayStopped) => "stay-stopped",
        };
        let failed = match (row.operation, row.second_phase) {
            (Operation::Load, _) => "load",
            (_, false) => "phase 1",
            (_, true) => "phase 2",
        };
        let mut steps = String::new();
        for step in row.steps {
            match step.phase() {
                Some(phase) if steps.is_empty() || steps.ends_with("; ") => {
                    steps.push_str(&phase.to_string());
                }
                Some(phase) => steps.push_str(&format!(", {phase}")),
                None => steps.push_str("; "),
            }
        }
        table.push_str(&format!("| {} | {policy} | {failed} | {steps} |\n", row.operation));
    }
    table
}

#[test]
fn the_page_has_the_table_of_targets_of_the_code() {
    assert_eq!(between("targets"), targets().trim(), "the code says:\n{}", targets());
}

#[test]
fn the_page_has_the_undo_table_of_the_code() {
    assert_eq!(between("undo"), undo().trim(), "the code says:\n{}", undo());
}

#[test]
fn the_page_names_every_outcome() {
    let fenced = Vec::new();
    let machine = MachineState::Running;
    let held = Outcome::Held { reasons: Vec::new(), fenced: Vec::new() };
    let degraded = Outcome::Degraded { machine, fenced };
    for outcome in [Outcome::Done, Outcome::RolledBack, Outcome::Stopped, degraded, held] {
        let name = outcome.name();
        assert!(PAGE.contains(&format!("**{name}**")), "{name} is missing");
    }
}
