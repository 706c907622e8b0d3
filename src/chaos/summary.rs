//! What came of all plans: a table for a person, one JSON object for a program.

use serde::Serialize;
use standstill_testkit::plan::Plan;
use standstill_testkit::sweep::resources::Resources;
use standstill_testkit::sweep::{Ends, Tally, Tried};
use std::collections::BTreeMap;
use std::fmt;

/// What came of all plans. Its fields are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    /// Whether everything was as it must be.
    ok: bool,
    /// Where random plans were drawn from; nothing of a plan from a file.
    seed: Option<u64>,
    /// How many machines were tried.
    plans: u64,
    /// How often they were paused and resumed.
    rounds: u64,
    /// What was not as it must be, counted.
    violations: u64,
    /// How often a pause, a resume or a declaration ended how, or a device was lost outside of any.
    outcomes: BTreeMap<String, u64>,
    /// How many faults have happened.
    faults_fired: u64,
    /// Fds of this process that are left over after all machines have ended.
    fds_left: u64,
    /// Threads of it.
    threads_left: u64,
    /// Every plan that failed.
    failures: Vec<Failure>,
    #[serde(skip)]
    tally: Tally,
}

/// A plan that failed.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Failure {
    /// What was not as it must be.
    violations: Vec<String>,
    /// The plan, as TOML.
    plan: String,
    /// The smallest one that fails in the same way, as TOML; none if nobody has looked for it.
    smallest: Option<String>,
}

impl Failure {
    pub(super) fn new(failed: &Tried, smallest: Option<&Plan>) -> Self {
        let toml = |plan: &Plan| plan.to_toml().unwrap_or_else(|error| format!("# {error}"));
        Self {
            violations: failed.violations.iter().map(ToString::to_string).collect(),
            plan: toml(&failed.plan),
            smallest: smallest.map(toml),
        }
    }
}

impl Summary {
    pub(super) fn new(
        seed: Option<u64>,
        tally: Tally,
        failures: Vec<Failure>,
        before: Resources,
        after: Resources,
    ) -> Self {
        let fds_left = after.fds.saturating_sub(before.fds);
        let threads_left = after.threads.saturating_sub(before.threads);
        let violations = tally.violations() + u64::from(fds_left > 0) + u64::from(threads_left > 0);
        Self {
            ok: violations == 0,
            seed,
            plans: tally.plans,
            rounds: tally.rounds,
            violations,
            outcomes: tally.outcomes.iter().map(|(seen, n)| (seen.to_string(), *n)).collect(),
            faults_fired: tally.faults_fired,
            fds_left,
            threads_left,
            failures,
            tally,
        }
    }

    /// Whether everything was as it must be.
    pub(super) fn ok(&self) -> bool {
        self.ok
    }

    /// One line.
    pub(super) fn to_json(&self) -> String {
        // Names and numbers: nothing that could not be written.
        serde_json::to_string(self)
            .unwrap_or_else(|error| format!("{{\"error\":{:?}}}", error.to_string()))
    }

    /// What came of each fault, as tables.
    pub(super) fn to_markdown(&self) -> String {
        self.tally.to_markdown()
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<14} {:<17} {:>6}  of these faults", "phase", "outcome", "times")?;
        for (phase, ends) in self.tally.by_phase() {
            for (outcome, Ends { count, faults }) in ends {
                let faults: Vec<_> = faults.iter().copied().collect();
                writeln!(f, "{phase:<14} {outcome:<17} {count:>6}  {}", faults.join(" "))?;
            }
        }
        for Failure { violations, plan, smallest } in &self.failures {
            writeln!(f, "\nFAILED:")?;
            for violation in violations {
                writeln!(f, "  {violation}")?;
            }
            match smallest {
                Some(smallest) => writeln!(f, "this plan is enough for it:\n\n{smallest}")?,
                None => writeln!(f, "by this plan:\n\n{plan}")?,
            }
        }
        let Self { plans, rounds, faults_fired, violations, fds_left, threads_left, .. } = self;
        if *fds_left > 0 || *threads_left > 0 {
            writeln!(f, "\nFAILED: {fds_left} fds and {threads_left} threads are left over")?;
        }
        write!(f, "\n{plans} machines, {rounds} rounds, {faults_fired} faults have happened")?;
        if let Some(seed) = self.seed {
            write!(f, " (seed {seed})")?;
        }
        if self.ok {
            write!(f, "\nOK: everything was as it must be.")
        } else {
            write!(f, "\nFAILED: {violations} things were not as they must be.")
        }
    }
}
