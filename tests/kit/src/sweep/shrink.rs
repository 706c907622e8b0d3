//! Makes a plan that fails smaller: fewer faults, rounds and devices, and everything earlier.

use crate::plan::{Cause, Plan};

/// The most plans that are tried on the way.
const MOST: usize = 200;

/// The smallest plan that still fails: nothing can be left out of it or made earlier. `fails` says
/// whether a plan fails; it is asked at most some hundred times.
pub async fn shrink(plan: Plan, mut fails: impl AsyncFnMut(&Plan) -> bool) -> Plan {
    let mut smallest = plan;
    let mut tries = 0;
    'smaller: loop {
        for candidate in smaller(&smallest) {
            tries += 1;
            if tries > MOST {
                return smallest;
            }
            if fails(&candidate).await {
                smallest = candidate;
                continue 'smaller;
            }
        }
        return smallest;
    }
}

/// Plans that are smaller by one thing, those that save most first.
fn smaller(plan: &Plan) -> Vec<Plan> {
    let mut candidates = Vec::new();
    let mut add = |candidate: Plan| {
        if candidate != *plan && candidate.check().is_ok() && !candidates.contains(&candidate) {
            candidates.push(candidate);
        }
    };
    // Half of the faults, then one.
    let half = plan.faults.len() / 2;
    if half > 0 {
        add(Plan { faults: plan.faults[..half].to_vec(), ..plan.clone() });
        add(Plan { faults: plan.faults[half..].to_vec(), ..plan.clone() });
    }
    for at in 0..plan.faults.len() {
        let mut faults = plan.faults.clone();
        faults.remove(at);
        add(Plan { faults, ..plan.clone() });
    }
    for at in 0..plan.hooks.len() {
        let mut hooks = plan.hooks.clone();
        hooks.remove(at);
        add(Plan { hooks, ..plan.clone() });
    }
    // No round after the last fault, and all faults in the first.
    let of_hooks = plan.hooks.iter().map(|hook| hook.round);
    let last = plan.faults.iter().map(|fault| fault.round).chain(of_hooks).max().unwrap_or(1);
    add(Plan { rounds: last, ..plan.clone() });
    let (mut faults, mut hooks) = (plan.faults.clone(), plan.hooks.clone());
    faults.iter_mut().for_each(|fault| fault.round = 1);
    hooks.iter_mut().for_each(|hook| hook.round = 1);
    add(Plan { rounds: 1, faults, hooks, ..plan.clone() });
    for at in 0..plan.faults.len() {
        let mut faults = plan.faults.clone();
        if let Some(fault) = faults.get_mut(at) {
            fault.round = fault.round.saturating_sub(1).max(1);
        }
        add(Plan { faults, ..plan.clone() });
    }
    for at in 0..plan.hooks.len() {
        let mut hooks = plan.hooks.clone();
        if let Some(hook) = hooks.get_mut(at) {
            hook.round = hook.round.saturating_sub(1).max(1);
        }
        add(Plan { hooks, ..plan.clone() });
    }
    // Without a device that has no fault, as long as two are left.
    for device in (0..plan.devices).rev().filter(|_| plan.devices > 2) {
        if plan.faults.iter().all(|fault| fault.device != device) {
            add(without(plan, device));
        }
    }
    // The first time.
    for at in 0..plan.faults.len() {
        let mut faults = plan.faults.clone();
        if let Some(Cause::Inside(fault)) = faults.get_mut(at).map(|fault| &mut fault.cause) {
            fault.nth = fault.nth.saturating_sub(1).max(1);
        }
        add(Plan { faults, ..plan.clone() });
    }
    candidates
}

/// The same without a device; those behind it move up.
fn without(plan: &Plan, device: u16) -> Plan {
    let mut plan = Plan { devices: plan.devices - 1, ..plan.clone() };
    for fault in plan.faults.iter_mut().filter(|fault| fault.device > device) {
        fault.device -= 1;
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Injection, Policy};
    use standstill_protocol::fault::{Action, Fault, Point};
    use standstill_protocol::message::Phase;

    fn inject(plan: Plan, device: u16, round: u32, fault: Fault) -> Plan {
        plan.inject(Injection { device, round, cause: Cause::Inside(fault) })
    }

    fn acks(action: Action) -> Fault {
        Fault::new(Point::BeforeAck(Phase::Stop), action)
    }

    fn has(plan: &Plan, action: Action) -> bool {
        plan.faults
            .iter()
            .any(|fault| matches!(&fault.cause, Cause::Inside(f) if f.action == action))
    }

    /// A plan of five devices, six rounds and four faults.
    fn large() -> Plan {
        let plan = Plan::new(5).rounds(6).policy(Policy::StayStopped);
        let plan = inject(plan, 1, 2, acks(Action::TwoAcks));
        let plan = inject(plan, 4, 5, acks(Action::KeepDma).nth(3));
        let plan = inject(plan, 2, 1, acks(Action::DelayMs(5)));
        inject(plan, 1, 6, acks(Action::Abort))
    }

    #[tokio::test]
    async fn one_fault_that_is_enough_is_all_that_is_left() {
        let plan = shrink(large(), async |plan| has(plan, Action::KeepDma)).await;
        let expected = Plan::new(2).policy(Policy::StayStopped);
        // Whichever device is left, it is the first time in the first round.
        assert_eq!((plan.devices, plan.rounds, plan.faults.len()), (2, 1, 1), "{plan:?}");
        let device = plan.faults[0].device;
        assert_eq!(plan, expected.fault(device, acks(Action::KeepDma)));
    }

    #[tokio::test]
    async fn two_faults_that_need_each_other_stay() {
        let both = async |plan: &Plan| has(plan, Action::KeepDma) && has(plan, Action::Abort);
        let plan = shrink(large(), both).await;
        assert_eq!((plan.devices, plan.rounds, plan.faults.len()), (2, 1, 2), "{plan:?}");
    }

    #[tokio::test]
    async fn a_plan_of_which_nothing_can_be_left_out_stays() {
        let plan = large();
        assert_eq!(shrink(plan.clone(), async |_| false).await, plan);
        let rounds = async |plan: &Plan| plan.rounds >= 3 && plan.faults.is_empty();
        let plan = shrink(Plan::new(2).rounds(3), rounds).await;
        assert_eq!(plan, Plan::new(2).rounds(3));
    }
}
