//! Many plans, several at the same time.

use super::cases::{self, Policies, Victims};
use super::engine::run;
use super::expected::{Expected, TableError};
use super::observation::Observation;
use super::oracle::{Judge, Violation};
use super::seeded::Seeded;
use super::subject::Subject;
use super::tally::Tally;
use super::{Times, shrink};
use crate::plan::Plan;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How many machines are at work at the same time: most of them wait for a deadline.
const AT_ONCE: usize = 8;
/// Where the place of the victim makes the least difference, it is another one each time.
const IN_TURN: Victims = Victims::InTurn { from: 0 };
/// How long it is looked for smaller plans in the place of those that have failed, unless said otherwise.
const SHRINKING: Duration = Duration::from_secs(60);

/// One plan, and what came of it.
#[derive(Clone, Debug)]
pub struct Tried {
    /// The plan.
    pub plan: Plan,
    /// What was seen; nothing if it could not be run to its end.
    pub seen: Observation,
    /// What was not as it must be.
    pub violations: Vec<Violation>,
    /// A smaller plan that fails in the same way, or the same plan if there is none; `None` if nobody has
    /// looked for it.
    pub smallest: Option<Plan>,
}

impl Tried {
    /// Whether calls took too long, and nothing else was wrong.
    fn is_only_slow(&self) -> bool {
        let slow = |violation: &Violation| matches!(violation, Violation::Slow { .. });
        !self.violations.is_empty() && self.violations.iter().all(slow)
    }
}

/// Many plans that are tried.
#[derive(Clone, Debug)]
pub struct Sweep {
    plans: Vec<Plan>,
    drawn: Option<Drawn>,
    judge: Judge,
    at_once: usize,
    shrinking: Duration,
}

/// Random plans that are drawn one after another.
#[derive(Clone, Debug)]
struct Drawn {
    from: Seeded,
    /// How many rounds are left.
    rounds: u32,
}

impl Iterator for Drawn {
    type Item = Plan;

    fn next(&mut self) -> Option<Plan> {
        if self.rounds == 0 {
            return None;
        }
        let plan = self.from.plan();
        self.rounds = self.rounds.saturating_sub(plan.rounds.saturating_add(1));
        Some(plan)
    }
}

impl Sweep {
    /// These plans, judged by the table of this project.
    ///
    /// # Errors
    ///
    /// If that table cannot be read.
    pub fn new(plans: impl IntoIterator<Item = Plan>) -> Result<Self, TableError> {
        let judge =
            Judge { expected: Expected::ours()?, times: Times::default(), knows_liars: true };
        let plans = plans.into_iter().collect();
        Ok(Self { plans, drawn: None, judge, at_once: AT_ONCE, shrinking: SHRINKING })
    }

    /// What can be done to device programs of any kind from outside while their machine is paused and resumed
    /// ([`cases::outside`]), as [`cases::sweep`] gives it, and faults of hooks and of coordinators beside them:
    /// machines of three. It has no limits, of which it depends on the program what comes.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_outside() -> Result<Self, TableError> {
        Self::of(&cases::outside(&Times::default()))
    }

    /// As [`from_outside`](Self::from_outside), and everything that the device processes can be told to
    /// do wrong: their programs must have been built with the feature `fault-injection`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    #[cfg(feature = "fault-injection")]
    pub fn everything() -> Result<Self, TableError> {
        let times = Times::default();
        let mut sweep = Self::of(&[cases::inside(&times), cases::outside(&times)].concat())?;
        sweep.plans.extend(cases::sweep_of_queries(3, &IN_TURN, &times));
        Ok(sweep)
    }

    fn of(causes: &[crate::plan::Cause]) -> Result<Self, TableError> {
        let mut sweep = Self::new([])?;
        let Judge { expected, times, .. } = &sweep.judge;
        // Those that wait longest come first.
        sweep.plans = cases::sweep_of_restarts(causes, 3, &IN_TURN, times);
        sweep.plans.extend(cases::sweep(causes, 3, Policies::InTurn, expected, times));
        sweep.plans.extend(cases::sweep_of_hooks(3, expected, times));
        sweep.plans.extend(cases::sweep_of_coordinators(3, &IN_TURN));
        Ok(sweep)
    }

    /// How many machines are at work at the same time, from 1.
    #[must_use]
    pub fn at_once(mut self, at_once: usize) -> Self {
        self.at_once = at_once.max(1);
        self
    }

    /// And then plans that are drawn from there, until they have so many rounds: a plan has one without faults
    /// after its own, to see that all is well again. None is drawn before a machine can be started for it.
    #[must_use]
    pub fn and_random(mut self, from: Seeded, rounds: u32) -> Self {
        self.drawn = Some(Drawn { from, rounds });
        self
    }

    /// How long it is looked for smaller plans in the place of those that have failed, all in all; see
    /// [`Tally::shrink`]. A minute, if nothing is said.
    #[must_use]
    pub fn shrinking(mut self, limit: Duration) -> Self {
        self.shrinking = limit;
        self
    }

    /// By what it is judged.
    #[must_use]
    pub fn judge(mut self, judge: Judge) -> Self {
        self.judge = judge;
        self
    }

    /// Only those plans, and those that are drawn.
    #[must_use]
    pub fn only(mut self, wanted: impl Fn(&Plan) -> bool) -> Self {
        self.plans.retain(wanted);
        self
    }

    /// How many plans there are, without those that are drawn.
    #[must_use]
    pub fn len(&self) -> usize {
        self.plans.len()
    }

    /// True if there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.plans.is_empty()
    }

    /// Tries all of them.
    pub async fn run(self, subject: impl Subject + 'static) -> Tally {
        self.run_with(Arc::new(subject), |_| {}).await
    }

    /// Tries all of them; `ended` is told of each. Then it looks for smaller plans in the place of those that
    /// have failed.
    ///
    /// A plan of which calls took too long, and nothing else was wrong, is tried once more when no other
    /// machine is at work, and what comes then counts: CPUs that have too much to do are no fault of the
    /// machine's.
    ///
    /// If the future is dropped, all machines end.
    pub async fn run_with(self, subject: Arc<dyn Subject>, mut ended: impl FnMut(&Tried)) -> Tally {
        let mut tally = Tally::default();
        let mut plans = self.plans.into_iter().chain(self.drawn.into_iter().flatten());
        let judge = Arc::new(self.judge);
        let mut under_way = JoinSet::new();
        let mut slow = Vec::new();
        loop {
            while under_way.len() < self.at_once {
                let Some(plan) = plans.next() else { break };
                let (subject, judge) = (Arc::clone(&subject), Arc::clone(&judge));
                under_way.spawn(async move { attempt(subject, plan, &judge).await });
            }
            let Some(tried) = under_way.join_next().await else { break };
            match tried {
                Ok(tried) if tried.is_only_slow() => slow.push(tried.plan),
                Ok(tried) => {
                    ended(&tried);
                    tally.add(tried, &judge.times);
                }
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                // Nobody cancels them while this is here.
                Err(_) => {}
            }
        }
        for plan in slow {
            let tried = attempt(Arc::clone(&subject), plan, &judge).await;
            ended(&tried);
            tally.add(tried, &judge.times);
        }
        tally.shrink(&subject, &judge, self.shrinking, |_| {}).await;
        tally
    }
}

/// Runs a plan and judges it.
pub async fn attempt(subject: Arc<dyn Subject>, plan: Plan, judge: &Judge) -> Tried {
    match run(subject, &plan, &judge.times).await {
        Ok(seen) => {
            let violations = judge.violations(&plan, &seen);
            Tried { plan, seen, violations, smallest: None }
        }
        Err(error) => {
            let violations = vec![Violation::Unfinished(crate::chain(&error))];
            Tried { plan, seen: Observation::default(), violations, smallest: None }
        }
    }
}

/// The smallest plan that was found within that time which fails in the same way as this one: with a
/// violation of the same kind.
pub async fn shrunk(
    subject: Arc<dyn Subject>,
    failed: &Tried,
    judge: &Judge,
    limit: Duration,
) -> Plan {
    let end = Instant::now() + limit;
    let kinds: Vec<_> = failed.violations.iter().map(std::mem::discriminant).collect();
    let fails = async |plan: &Plan| {
        // A smaller one is to be of use to somebody.
        if Instant::now() >= end || judge.accepts(plan).is_err() {
            return false;
        }
        let attempt = attempt(Arc::clone(&subject), plan.clone(), judge);
        // Nobody knows what would have come of one that is not tried to its end.
        let Ok(tried) = tokio::time::timeout_at(end, attempt).await else { return false };
        tried.violations.iter().any(|violation| kinds.contains(&std::mem::discriminant(violation)))
    };
    shrink::shrink(failed.plan.clone(), fails).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_plans_are_drawn_until_they_have_their_rounds_and_none_before_it_is_asked_for() {
        let (expected, times) = (Expected::ours().unwrap(), Times::default());
        let seeded = Seeded::new(7, 3, 3, &cases::outside(&times), &expected, &times);
        // Nobody would wait for all of these, or have room for them.
        let many = Drawn { from: seeded.clone(), rounds: u32::MAX };
        assert_eq!(many.take(2).count(), 2);
        let plans: Vec<_> = Drawn { from: seeded, rounds: 20 }.collect();
        let rounds = |plans: &[Plan]| plans.iter().map(|plan| plan.rounds + 1).sum::<u32>();
        assert!((20..24).contains(&rounds(&plans)), "{plans:?}");
        assert!(rounds(&plans[..plans.len() - 1]) < 20, "{plans:?}");
    }
}
