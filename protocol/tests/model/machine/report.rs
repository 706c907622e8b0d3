//! What a check has found, for a person.

use super::action::Action;
use super::rule::Rule;
use super::symmetry;
use super::world::{Checked, World};
use stateright::{Checker, HasDiscoveries, Model, Path};
use std::collections::BTreeSet;
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

/// Checks depth first, with devices that are alike, on all processors: for what is too large else.
pub(crate) fn check_symmetric(model: Checked) -> (impl Checker<Checked>, Cost) {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let checker =
        model.checker().symmetry_fn(symmetry::representative).threads(threads).spawn_dfs().join();
    let cost = cost_of(&checker, begun);
    (checker, cost)
}

/// Checks until that rule breaks: by one of the shortest traces that break it and no other before.
pub(crate) fn find(model: Checked, rule: Rule) -> impl Checker<Checked> {
    let until = HasDiscoveries::AnyOf(BTreeSet::from([rule.name()]));
    model.checker().finish_when(until).spawn_bfs().join()
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
