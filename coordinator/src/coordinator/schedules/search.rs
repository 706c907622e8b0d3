//! Plays schedules: random ones by a seed, the end of each, and the shortest one that still fails.

use super::super::script::packets::Ask;
use super::super::slips::Slips;
use super::super::state::Standing;
use super::action::{Action, Case};
use super::world::World;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

/// More steps than any end of a machine takes.
const PATIENCE: usize = 20_000;
/// More time than any call of the owner takes that waits behind others.
const LONGEST: Duration = Duration::from_secs(3600);

/// What came of one schedule.
pub(super) struct Run {
    pub(super) case: Case,
    pub(super) actions: Vec<Action>,
    pub(super) wrong: Option<String>,
    pub(super) reached: BTreeSet<String>,
    pub(super) trace: Vec<String>,
}

/// Plays the schedule of a seed.
pub(super) fn random(seed: u64, slips: Slips) -> std::io::Result<Run> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let case = Case::any(&mut rng);
    let mut world = World::new(&case, slips, false)?;
    let mut actions = Vec::with_capacity(case.steps);
    for _ in 0..case.steps {
        let possible = world.actions();
        let total: u32 = possible.iter().map(|(weight, _)| weight).sum();
        if total == 0 || world.wrong.is_some() || world.is_ended() {
            break;
        }
        let mut left = rng.u32(0..total);
        let chosen = possible.iter().find(|(weight, _)| {
            let hit = left < *weight;
            left = left.saturating_sub(*weight);
            hit
        });
        let Some(&(_, action)) = chosen else { break };
        let action = match action {
            Action::Again(i, _) => Action::Again(i, rng.usize(0..64)),
            Action::Stray(i, _) => Action::Stray(i, rng.usize(0..64)),
            action => action,
        };
        world.take(action);
        actions.push(action);
    }
    Ok(end(world, actions))
}

/// Plays these actions; those that are not possible as things are, are left out.
pub(super) fn replay(
    case: &Case,
    given: &[Action],
    slips: Slips,
    tells: bool,
) -> std::io::Result<Run> {
    let mut world = World::new(case, slips, tells)?;
    let mut actions = Vec::with_capacity(given.len());
    for &action in given {
        if world.wrong.is_some() || world.is_ended() {
            break;
        }
        if world.is_possible(action) {
            world.take(action);
            actions.push(action);
        }
    }
    Ok(end(world, actions))
}

fn end(mut world: World, actions: Vec<Action>) -> Run {
    drain(&mut world);
    Run {
        case: world.case.clone(),
        actions,
        wrong: world.wrong.take(),
        reached: std::mem::take(&mut world.reached),
        trace: world.trace.take().unwrap_or_default(),
    }
}

/// What a failure is, without whom it has hit and when: another one may lie behind it, and only the
/// words are the same from one schedule to the next.
fn kind(wrong: &str) -> String {
    let mut depth = 0_usize;
    let mut words = String::new();
    for letter in wrong.chars() {
        match letter {
            '(' | '[' | '{' => depth += 1,
            ')' | ']' | '}' => depth = depth.saturating_sub(1),
            letter if depth == 0 && !letter.is_ascii_digit() => words.push(letter),
            _ => {}
        }
    }
    words
}

/// Leaves out what the failure does not need; what is left fails in the same way.
pub(super) fn shrink(mut run: Run, slips: Slips) -> std::io::Result<Run> {
    let same = run.wrong.as_deref().map(kind);
    let mut size = run.actions.len().div_ceil(2).max(1);
    loop {
        let mut shorter = false;
        let mut at = 0;
        while at < run.actions.len() {
            let mut fewer = run.actions.clone();
            fewer.drain(at..(at + size).min(fewer.len()));
            let again = replay(&run.case, &fewer, slips, false)?;
            if again.wrong.as_deref().map(kind) == same && again.actions.len() < run.actions.len() {
                run = again;
                shorter = true;
            } else {
                at += size;
            }
        }
        if size == 1 && !shorter {
            break;
        }
        size = size.div_ceil(2).max(1);
    }
    let (case, actions) = (run.case.clone(), run.actions.clone());
    replay(&case, &actions, slips, true)
}

/// A failure, for a person.
pub(super) fn tell(seed: u64, run: &Run) -> String {
    let mut text = format!("seed {seed}: {}\n", run.wrong.as_deref().unwrap_or("nothing is wrong"));
    // A String takes whatever is written to it.
    let _ = writeln!(text, "{:#?}", run.case);
    let _ = writeln!(text, "{} actions, then whatever moves is let run:", run.actions.len());
    for line in &run.trace {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// Lets everything that still moves come to its end: every call of the owner is answered, and then
/// the machine is shut down.
fn drain(world: &mut World) {
    world.say(|| "no more faults".to_owned());
    world.calls.iter().for_each(|call| call.decide(false));
    world.observe();
    until(world, |world| {
        let busy = |state: &super::super::state::State| {
            state.active.is_some() || state.starting.is_some() || state.ending.is_some()
        };
        world.calls.is_empty() && !world.actor.state.as_ref().is_some_and(busy)
    });
    lost_are_fenced(world);
    if !world.reports.is_empty() {
        world.is_wrong(|| "nobody has got the report of a transition".to_owned());
    }
    if world.wrong.is_some() {
        return;
    }
    if world.machine.is_none() {
        return nobody_is_left(world);
    }
    world.say(|| "the machine is shut down".to_owned());
    world.take(Action::Ask(Ask::Shutdown));
    until(world, |world| world.calls.is_empty() && world.is_ended());
    nobody_is_left(world);
}

/// The machine has ended, and every process of it.
fn nobody_is_left(world: &mut World) {
    let left = world.units.iter().position(super::unit::Unit::is_alive);
    if let Some(i) = left.filter(|_| !world.superseded) {
        world.is_wrong(|| format!("the machine has ended, and device {i} lives on"));
    }
}

/// Nobody is left alive that does not count.
fn lost_are_fenced(world: &mut World) {
    let lost = |unit: &super::unit::Unit| {
        matches!(world.standing(unit), Some(Standing::Lost(..))) && unit.is_alive()
    };
    let lost = world.units.iter().position(lost);
    if let Some(i) = lost.filter(|_| !world.superseded) {
        world.is_wrong(|| format!("device {i} is lost, and nobody has killed it"));
    }
}

fn until(world: &mut World, is: impl Fn(&World) -> bool) {
    let began = world.script.now();
    for _ in 0..PATIENCE {
        if world.wrong.is_some() {
            return;
        }
        let next = world.actions().into_iter().map(|(_, action)| action).find(|action| {
            matches!(
                action,
                Action::Handle
                    | Action::Watch
                    | Action::Greet(_)
                    | Action::Read(_)
                    | Action::Arc(_)
                    | Action::SeeExit(_)
                    | Action::Gone(_)
                    | Action::Hook(_, true)
                    | Action::Local(_, true)
                    | Action::Spawn(true)
                    | Action::Welcomed(_)
            ) || matches!(action, Action::Prove(i) if !world.units[*i].unprovable)
        });
        if let Some(next) = next {
            world.take(next);
            continue;
        }
        if is(world) {
            return;
        }
        let before = world.script.now();
        let armed = world.script.alarms(|_| true);
        if armed == 0 || before.saturating_sub(began) > LONGEST {
            break;
        }
        world.take(Action::Tick);
    }
    let left: Vec<_> = world.calls.iter().map(|call| call.ask).collect();
    world.is_wrong(|| format!("nothing comes of it any more; not answered: {left:?}"));
}

#[test]
fn failures_of_one_kind_differ_in_numbers_and_details_alone() {
    let one = kind("device 1: it obeys a lower term: Command { term: Term(1), epoch: Epoch(7) }");
    let same = kind("device 0: it obeys a lower term: Command { term: Term(2), epoch: Epoch(12) }");
    assert_eq!(one, same);
    assert_ne!(one, kind("device 1: it answers a lower term: Command { term: Term(1) }"));
    let ended =
        kind("pause ends in Degraded { fenced: [(ParticipantId(1), Hung)] }: hook 0 stands: true");
    assert_ne!(ended, kind("pause ends in Done: hook 0 stands: true"));
}
