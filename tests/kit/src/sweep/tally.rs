//! What came of many plans: counted by fault, phase and outcome.

use super::Times;
use super::batch::{Tried, shrunk};
use super::expected::{Course, Expected, Seen, trim};
use super::nature::{self, HELLO, HELLO_AGAIN, HELLO_EACH_TIME, Place, QUERY};
use super::observation::Event;
use super::oracle::{self, Judge};
use super::principal::{HOOK_ON_START, HOOK_ON_STOP, Principal, principals};
use super::subject::Subject;
use crate::plan::Policy;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What came of many plans.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// How many plans were tried.
    pub plans: u64,
    /// How many rounds of pause and resume there were, as far as plans were run.
    pub rounds: u64,
    /// How many faults have happened.
    pub faults_fired: u64,
    /// How often a pause, a resume or a declaration ended how.
    pub outcomes: BTreeMap<Seen, u64>,
    /// Of plans of one fault: what came of it.
    cells: BTreeMap<Cell, BTreeMap<String, u64>>,
    phases: BTreeMap<&'static str, BTreeMap<Seen, Ends>>,
    failures: Vec<Tried>,
}

/// The least time in which it makes sense to look for a smaller plan: some machines can be tried in it.
const LEAST: Duration = Duration::from_secs(10);

/// How often something ended in one way, and with which faults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    /// How often.
    pub count: u64,
    /// Words of the faults.
    pub faults: BTreeSet<&'static str>,
}

/// One fault at one place, under one policy.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cell {
    policy: Policy,
    row: &'static str,
    word: &'static str,
    column: &'static str,
}

/// The columns of the tables of [`Tally::to_markdown`].
const COLUMNS: [&[&str]; 5] = [
    &["PrepareStop", "Stop", "PrepareStart", "Start"],
    &["running", "stopped", "mmio", "dma", "dma-in-flight", "memory", "shutdown"],
    &[HELLO],
    &[QUERY],
    &[HOOK_ON_STOP, HOOK_ON_START],
];

/// What there is under the policy `restart` only.
const AGAIN: [&[&str]; 1] = [&[HELLO_AGAIN, HELLO_EACH_TIME]];

impl Tally {
    /// Counts one more.
    pub fn add(&mut self, tried: Tried, times: &Times) {
        self.plans += 1;
        self.faults_fired += tried.seen.fired.iter().filter(|fired| **fired).count() as u64;
        self.faults_fired += tried.seen.hooks_fired.len() as u64;
        let mut rounds = BTreeSet::new();
        for event in &tried.seen.events {
            let word = match event {
                Event::Step(step) => {
                    rounds.insert(step.round);
                    oracle::in_words(step)
                }
                Event::Lost { .. } => Seen::Lost,
                Event::GivenUp { .. } => Seen::GivenUp,
                Event::NotStarted { .. } => Seen::NotStarted,
            };
            *self.outcomes.entry(word).or_default() += 1;
        }
        self.rounds += rounds.len() as u64;
        let devices = tried.plan.faults.iter().zip(&tried.seen.fired).filter(|(_, fired)| **fired);
        let devices = devices.map(|(fault, _)| Principal::Device(fault));
        let hooks = tried.seen.hooks_fired.iter().filter_map(|&at| tried.plan.hooks.get(at));
        for fault in devices.chain(hooks.map(Principal::Hook)) {
            if let Some(place) = fault.place() {
                let seen = oracle::from_its_act(fault.round(), place, &tried.seen);
                let phase = self.phases.entry(place.column).or_default();
                let ends = phase.entry(seen.first().copied().unwrap_or(Seen::Done)).or_default();
                ends.count += 1;
                ends.faults.insert(fault.word(times));
            }
        }
        if let [fault] = principals(&tried.plan)[..]
            && let Some(place) = fault.place()
            && !tried.seen.events.is_empty()
        {
            let word = fault.word(times);
            let mut seen = oracle::from_its_act(fault.round(), place, &tried.seen);
            trim(&mut seen);
            let course = Course { seen, late: !tried.seen.late.is_empty() };
            let cell =
                Cell { policy: tried.plan.policy, row: place.row, word, column: place.column };
            *self.cells.entry(cell).or_default().entry(course.to_string()).or_default() += 1;
        }
        if !tried.violations.is_empty() {
            self.failures.push(tried);
        }
    }

    /// The plans that failed.
    #[must_use]
    pub fn failures(&self) -> &[Tried] {
        &self.failures
    }

    /// Looks for smaller plans in the place of those that have failed, as long as there is time: first for one of
    /// each kind of violation, then for the others, in their order. Each has an equal part of the time that
    /// is left for its like, and what it does not use the next ones have. `done` is told of each.
    pub async fn shrink(
        &mut self,
        subject: &Arc<dyn Subject>,
        judge: &Judge,
        limit: Duration,
        mut done: impl FnMut(&Tried),
    ) {
        let end = Instant::now() + limit;
        let (first, others) = self.by_kind();
        for numbers in [first, others] {
            for (at, &number) in numbers.iter().enumerate() {
                let Some(failed) = self.failures.get_mut(number) else { continue };
                let left = end.saturating_duration_since(Instant::now());
                let like_it = u32::try_from(numbers.len() - at).unwrap_or(u32::MAX);
                let own = (left / like_it).max(LEAST).min(left);
                if failed.smallest.is_none() && !own.is_zero() {
                    failed.smallest = Some(shrunk(Arc::clone(subject), failed, judge, own).await);
                }
                done(failed);
            }
        }
    }

    /// The numbers of failures with a kind of violation that none before has, and of the others.
    fn by_kind(&self) -> (Vec<usize>, Vec<usize>) {
        let mut kinds = Vec::new();
        (0..self.failures.len()).partition(|&number| {
            let violations = self.failures.get(number).map(|failed| &failed.violations);
            let own = violations.into_iter().flatten().map(std::mem::discriminant);
            let new: Vec<_> = own.filter(|kind| !kinds.contains(kind)).collect();
            let is_first = !new.is_empty();
            kinds.extend(new);
            is_first
        })
    }

    /// How many things were not as they must be.
    #[must_use]
    pub fn violations(&self) -> u64 {
        self.failures.iter().map(|tried| tried.violations.len() as u64).sum()
    }

    /// Adds what another one has counted.
    pub fn merge(&mut self, other: Self) {
        self.plans += other.plans;
        self.rounds += other.rounds;
        self.faults_fired += other.faults_fired;
        for (word, count) in other.outcomes {
            *self.outcomes.entry(word).or_default() += count;
        }
        for (cell, courses) in other.cells {
            let own = self.cells.entry(cell).or_default();
            for (course, count) in courses {
                *own.entry(course).or_default() += count;
            }
        }
        for (phase, ends) in other.phases {
            let own = self.phases.entry(phase).or_default();
            for (seen, Ends { count, faults }) in ends {
                let own = own.entry(seen).or_default();
                own.count += count;
                own.faults.extend(faults);
            }
        }
        self.failures.extend(other.failures);
    }

    /// By phase, how a pause or resume ended in which faults have happened, how often, and which faults.
    #[must_use]
    pub fn by_phase(&self) -> &BTreeMap<&'static str, BTreeMap<Seen, Ends>> {
        &self.phases
    }

    /// What came of each fault, as tables: by policy, with faults of which the same came in one line.
    /// Where something else is possible by the table, that follows in brackets; and where
    /// the kernel decides, what is to come under the other one. Of `restart` only that is told which
    /// other policies have not: it is `rollback` and what comes after.
    #[must_use]
    pub fn to_markdown(&self, expected: &Expected) -> String {
        let mut text = String::new();
        let policies: BTreeSet<_> = self.cells.keys().map(|cell| cell.policy).collect();
        for policy in policies {
            text.push_str(&format!("\n## {policy}\n"));
            let all: &[&[&str]] = if policy == Policy::Restart { &AGAIN } else { &COLUMNS };
            for columns in all {
                self.table(policy, columns, expected, &mut text);
            }
        }
        text
    }

    fn table(&self, policy: Policy, columns: &[&str], expected: &Expected, text: &mut String) {
        let own = |cell: &&Cell| cell.policy == policy && columns.contains(&cell.column);
        let rows = self.cells.keys().filter(own).flat_map(|cell| {
            let place = Place { row: cell.row, column: cell.column };
            let known = |word: &&str| expected.courses(policy, word, place).is_some();
            let other = nature::on_another_kernel(cell.word).filter(known);
            std::iter::once(cell.word).chain(other).map(|word| (cell.row, word))
        });
        let rows: BTreeSet<_> = rows.collect();
        // Faults of which the same came at the same place are one line.
        let mut lines: BTreeMap<(&str, Vec<String>), Vec<&str>> = BTreeMap::new();
        for (row, word) in rows {
            let field = |column: &&str| {
                let of = |word| {
                    self.cells.iter().find(move |(cell, _)| {
                        (cell.policy, cell.row, cell.word, cell.column)
                            == (policy, row, word, *column)
                    })
                };
                let other = || nature::on_another_kernel(word).and_then(of);
                let Some((cell, courses)) = of(word).or_else(other) else {
                    return "-".to_owned();
                };
                let place = Place { row: cell.row, column: cell.column };
                let possible = expected.courses(policy, word, place).unwrap_or_default();
                let possible: Vec<_> = possible.iter().map(ToString::to_string).collect();
                let seen: Vec<_> = courses.keys().cloned().collect();
                // Of the word of another kernel nothing was seen.
                if cell.word != word {
                    return possible.join(" or ");
                }
                let others = possible.iter().filter(|course| !seen.contains(course));
                let others = others.map(|course| format!(" (or {course})"));
                std::iter::once(seen.join(" or ")).chain(others).collect()
            };
            lines.entry((row, columns.iter().map(field).collect())).or_default().push(word);
        }
        if lines.is_empty() {
            return;
        }
        text.push_str(&format!("\n| fault | where | {} |\n", columns.join(" | ")));
        text.push_str(&format!("|---|---|{}\n", "---|".repeat(columns.len())));
        for ((row, fields), words) in lines {
            let row = if row == "-" { "" } else { row };
            text.push_str(&format!("| {} | {row} | {} |\n", words.join(", "), fields.join(" | ")));
        }
    }
}

impl fmt::Display for Tally {
    /// How many there were, how they ended, and every plan that failed, or a smaller one that does, as TOML.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { plans, rounds, faults_fired, failures, .. } = self;
        writeln!(f, "{plans} plans, {rounds} rounds, {faults_fired} faults have happened")?;
        for (word, count) in &self.outcomes {
            writeln!(f, "  {word:<18} {count}")?;
        }
        for tried in failures {
            writeln!(f, "\nfailed:")?;
            for violation in &tried.violations {
                writeln!(f, "  {violation}")?;
            }
            match tried.smallest.as_ref().unwrap_or(&tried.plan).to_toml() {
                Ok(toml) => write!(f, "\n{toml}")?,
                Err(error) => writeln!(f, "{error}")?,
            }
        }
        if failures.is_empty() { write!(f, "everything was as it must be") } else { Ok(()) }
    }
}
