//! Plans drawn from a seed: the same seed gives the same plans.

use super::Times;
use super::cases;
use super::expected::Expected;
use super::nature::{self, Nature, nature};
use super::oracle::Judge;
use crate::plan::{Cause, HookFault, Injection, Plan, Policy};
use fastrand::Rng;
use standstill_protocol::fault::{Action, Fault, Point};

/// Draws plans with several faults, on several devices, in several rounds.
#[derive(Clone, Debug)]
pub struct Seeded {
    rng: Rng,
    devices: u16,
    rounds: u32,
    pools: Vec<(Policy, Vec<Cause>, Vec<HookFault>)>,
    hellos: Vec<Fault>,
    judge: Judge,
}

const POLICIES: [Policy; 4] =
    [Policy::Rollback, Policy::StayStopped, Policy::ContinueWithout, Policy::Restart];
/// The most faults of devices in one plan.
const MOST: u16 = 4;
/// One plan of so many has faults of hooks too, and at most so many of them.
const WITH_HOOKS: u16 = 4;
const MOST_OF_HOOKS: u16 = 2;
/// How often it is drawn again if something comes of which nothing can be said: a fault at a Hello, and the
/// device does not greet again.
const DRAWS: u32 = 1000;
/// One plan of so many has a fault of its coordinator, and no other.
const WITH_COORDINATOR: u16 = 16;

impl Seeded {
    /// Plans of machines of that many devices (2 at least) and at most that many rounds each, of these
    /// faults of devices, and of any of hooks and coordinators. Liars are left out: what they do is wrong by any measure.
    /// Those at a Hello come when a device greets again.
    #[must_use]
    pub fn new(
        seed: u64,
        devices: u16,
        rounds: u32,
        causes: &[Cause],
        expected: &Expected,
        times: &Times,
    ) -> Self {
        let left_out = |cause: &Cause| {
            matches!(cause, Cause::Inside(f)
                if f.action == Action::KeepDma || f.point == Point::Hello)
        };
        let pool = |policy| {
            let possible = |cause: &&Cause| {
                let word = nature::word(cause, times);
                let place =
                    nature::place(&Injection { device: 0, round: 1, cause: (*cause).clone() });
                let courses = place.and_then(|place| expected.courses(policy, word, place));
                courses.is_some_and(|courses| !courses.is_empty()) && !left_out(cause)
            };
            let hooks = cases::hooks_under(policy, &cases::hooks(), expected, times);
            (policy, causes.iter().filter(possible).cloned().collect::<Vec<_>>(), hooks)
        };
        let pools = POLICIES.map(pool).into_iter().filter(|(_, pool, _)| !pool.is_empty());
        let pools = pools.collect();
        let quick = |fault: &Fault| nature(&Cause::Inside(*fault), times) != Nature::Silent;
        let hellos = cases::hellos(causes).into_iter().filter(quick).collect();
        Self {
            rng: Rng::with_seed(seed),
            devices: devices.max(2),
            rounds: rounds.max(1),
            pools,
            hellos,
            judge: Judge { expected: expected.clone(), times: *times, knows_liars: false },
        }
    }

    /// The next plan. At least one device of it has no fault, so that something is left of the machine; and
    /// something can be said of each of its faults ([`Judge::accepts`]).
    pub fn plan(&mut self) -> Plan {
        for _ in 0..DRAWS {
            let plan = self.draw();
            if self.judge.accepts(&plan).is_ok() {
                return plan;
            }
        }
        // A table by which hardly anything can be.
        Plan::new(self.devices)
    }

    fn draw(&mut self) -> Plan {
        let Self { rng, devices, rounds, pools, hellos, judge: _ } = self;
        let rounds = rng.u32(1..=*rounds);
        let Some((policy, pool, hooks)) = rng.choice(&*pools) else {
            return Plan::new(*devices).rounds(rounds);
        };
        let mut plan = Plan::new(*devices).rounds(rounds).policy(*policy);
        if rng.u16(0..WITH_COORDINATOR) == 0
            && let Some(cause) = rng.choice(cases::coordinators())
        {
            let (device, round) = (rng.u16(0..*devices), rng.u32(1..=rounds));
            return plan.inject(Injection { device, round, cause });
        }
        let mut victims: Vec<_> = (0..*devices).collect();
        rng.shuffle(&mut victims);
        victims.truncate(usize::from(*devices - 1));
        for _ in 0..rng.u16(1..=MOST) {
            let (Some(&device), Some(cause)) = (rng.choice(&victims), rng.choice(pool)) else {
                break;
            };
            let (round, cause) = (rng.u32(1..=rounds), cause.clone());
            plan = plan.inject(Injection { device, round, cause });
        }
        if *policy == Policy::Restart
            && rounds > 1
            && let (Some(&device), Some(&fault)) = (rng.choice(&victims), rng.choice(&*hellos))
        {
            let (round, cause) = (rng.u32(2..=rounds), Cause::Inside(fault));
            plan = plan.inject(Injection { device, round, cause });
        }
        if rng.u16(0..WITH_HOOKS) == 0 {
            for _ in 0..rng.u16(1..=MOST_OF_HOOKS) {
                let Some(&hook) = rng.choice(hooks) else { break };
                let hook = HookFault { round: rng.u32(1..=rounds), ..hook };
                if !plan.hooks.iter().any(|other| hook.is_of_the_call_of(other)) {
                    plan.hooks.push(hook);
                }
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn plans(seed: u64) -> Vec<Plan> {
        let (expected, times) = (Expected::ours().unwrap(), Times::default());
        let causes = [cases::inside(&times), cases::outside(&times)].concat();
        let mut seeded = Seeded::new(seed, 3, 4, &causes, &expected, &times);
        (0..200).map(|_| seeded.plan()).collect()
    }

    #[test]
    fn a_seed_gives_the_same_plans_and_another_one_others() {
        assert_eq!(plans(7), plans(7));
        assert_ne!(plans(7), plans(8));
    }

    #[test]
    fn every_plan_can_be_run_and_leaves_somebody_alone() {
        let (expected, times) = (Expected::ours().unwrap(), Times::default());
        let judge = Judge { expected, times, knows_liars: false };
        for plan in (1..=20).flat_map(plans) {
            plan.check().unwrap();
            judge.accepts(&plan).unwrap();
            let victims: BTreeSet<_> = plan.faults.iter().map(|fault| fault.device).collect();
            assert!((1..3).contains(&victims.len()), "{plan:?}");
        }
    }

    #[test]
    fn plans_differ_in_everything() {
        let plans = plans(1);
        let several = plans.iter().filter(|plan| plan.faults.len() > 1);
        assert!(several.count() > 50);
        let policies: BTreeSet<_> = plans.iter().map(|plan| plan.policy).collect();
        assert_eq!(policies.len(), POLICIES.len());
        assert!(plans.iter().any(|plan| plan.rounds == 4));
        let greets_again = |plan: &&Plan| {
            plan.faults.iter().any(
                |fault| matches!(&fault.cause, Cause::Inside(fault) if fault.point == Point::Hello),
            )
        };
        assert!(plans.iter().filter(greets_again).count() > 3);
        assert!(plans.iter().filter(|plan| !plan.hooks.is_empty()).count() > 20);
        let coordinator = |plan: &&Plan| {
            plan.faults.iter().any(|fault| nature::hits_the_coordinator(&fault.cause))
        };
        assert!(plans.iter().filter(coordinator).count() > 3);
        assert!(plans.iter().filter(coordinator).all(|plan| plan.faults.len() == 1));
    }
}
