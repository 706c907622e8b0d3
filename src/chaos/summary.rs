//! What came of all plans: a table for a person, one JSON object for a program.

use serde::Serialize;
use standstill_testkit::plan::Plan;
use standstill_testkit::sweep::resources::Resources;
use standstill_testkit::sweep::{Ends, Expected, Tally, Tried};
use std::collections::BTreeMap;
use std::fmt;

/// What stands before the tables of `--markdown`.
const PAGE: &str = "\
# What becomes of a machine when a device fails

What happened on a machine of three copy engines at work, in which one of them did wrong, on each of
them in turn. `standstill chaos --sweep --markdown docs/faults.md` makes this page; a test makes it anew
and compares it with this one, and what it says with [the table](../tests/expected-outcomes) that was
written by hand beforehand. Of *fd-flood* and *fd-flood-refused* (by a kernel of 6.16 or later) it is
the one of this kernel that has happened; of the other one the table says it. A disk over vhost-user in
the place of one of the engines (`--disk`) comes to the same, by the same table.

- *Done*: a pause has stopped the machine, a resume has started it.
- *RolledBack*: nobody was fenced; all are where they were.
- *Stopped*: nobody was fenced; all are stopped.
- *Degraded running*, *Degraded stopped*: the faulty device, and nobody else, was fenced; all others run,
  or are stopped.
- *Held*: something is not proven; all are stopped, and nothing starts before it is proven, or the owner
  decides.
- *given up*: all attempts to start it again that its policy has have failed.
- *not started*: the machine has not started, and nothing is left of it.
- *lost*: outside of any transition the faulty device was lost, and fenced.
- *refused*: a declaration of RAM was not accepted; it may be declared again.
- *late*: bytes were written while the machine stood still.

What comes after a comma came next; whatever is not said was *Done*. Where two things are possible, nobody
outside can decide which one comes first, and the table says why: what has come is said, and in brackets
what could have come and has not. A cell with \"-\" cannot be. *receipt*, *before-ack* and *after-ack* are
points in the device process: it has read the command, would answer, has answered while others have not; *command* and *answer*: the packet is on its way. A hook is *before*,
*between* or *after* the phases of a stop, and in the mirrored place of a start. With the policy
`restart` it is as with `rollback`, and the device comes back; its *hello again* is the one after that
loss, in one process or *each time*. Of *kill-coordinator*, *stop-coordinator* (it comes back when another
one has the machine) and *short-stop-coordinator* it is said, under `rollback` alone, since no policy plays
a part, how the [take-over](take-over.md) ends; and so of faults at its *query*. The words of the faults are those of
[fault injection](fault-injection.md).
";

/// What came of all plans. Its fields are the keys of the JSON object.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Summary {
    /// Whether everything was as it must be.
    ok: bool,
    /// Where random plans were drawn from; none if there are none.
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
    #[serde(skip)]
    expected: Expected,
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
    pub(super) fn new(failed: &Tried, disk: bool) -> Self {
        Self {
            violations: failed.violations.iter().map(ToString::to_string).collect(),
            plan: as_text(&failed.plan, disk),
            smallest: failed.smallest.as_ref().map(|plan| as_text(plan, disk)),
        }
    }
}

/// A plan as TOML, with the command that runs it.
pub(super) fn as_text(plan: &Plan, disk: bool) -> String {
    let disk = if disk { " --disk" } else { "" };
    let plan = plan.to_toml().unwrap_or_else(|error| format!("# {error}\n"));
    format!("# standstill chaos{disk} --plan FILE\n{plan}")
}

impl Summary {
    pub(super) fn new(
        seed: Option<u64>,
        tally: Tally,
        failures: Vec<Failure>,
        expected: Expected,
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
            expected,
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
        format!("{PAGE}{}", self.tally.to_markdown(&self.expected))
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
                None => writeln!(f, "by this plan, which was not made smaller:\n\n{plan}")?,
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
