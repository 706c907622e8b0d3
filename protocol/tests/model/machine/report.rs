//! What a check has found, for a person.

use super::action::Action;
use super::world::{Checked, World};
use stateright::{Checker, Model, Path};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// What one check has cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) states: usize,
    pub(crate) unique: usize,
    pub(crate) depth: usize,
    pub(crate) time: Duration,
}

/// Checks breadth first, with one thread: the first trace that is found is one of the shortest.
pub(crate) fn check(model: Checked) -> (impl Checker<Checked>, Cost) {
    let begun = Instant::now();
    let checker = model.checker().spawn_bfs().join();
    let cost = cost_of(&checker, begun);
    (checker, cost)
}

pub(crate) fn cost_of(checker: &impl Checker<Checked>, begun: Instant) -> Cost {
    Cost {
        states: checker.state_count(),
        unique: checker.unique_state_count(),
        depth: checker.max_depth(),
        time: begun.elapsed(),
    }
}

pub(crate) fn line(model: &Checked, cost: &Cost) -> String {
    format!(
        "| {} | {} | {} | {} | {} | {:.1} s |",
        model.scenario.name,
        model.scenario.devices,
        cost.states,
        cost.unique,
        cost.depth,
        cost.time.as_secs_f64()
    )
}

/// A numbered list of what happens on a path.
pub(crate) fn trace(model: &Checked, path: Path<World, Action>) -> String {
    let mut text = String::new();
    let steps = path.into_vec();
    for (number, (world, action)) in steps.iter().enumerate() {
        let Some(action) = action else { continue };
        let mut log = Vec::new();
        model.take(world, *action, Some(&mut log));
        let _ = writeln!(text, "{:3}. {action}", number + 1);
        for line in log {
            let _ = writeln!(text, "       {line}");
        }
    }
    text
}
