//! Can something be said of what comes of a plan?

use super::Judge;
use crate::plan::{Cause, Injection, Plan, PlanError};
use crate::sweep::nature::{
    HELLO, HELLO_AGAIN, HELLO_EACH_TIME, NOT_ALONE, Nature, hits_the_coordinator, leads_to_query,
    nature, place,
};
use crate::sweep::principal::{Principal, principals};
use standstill_protocol::fault::{Fault, Point};

impl Judge {
    /// Whether something can be said of every fault of a plan.
    ///
    /// # Errors
    ///
    /// [`PlanError::Impossible`] names the first of which the table says nothing, or that it cannot be
    /// under this policy; a fault at a Hello that does not come; one of a coordinator that is not alone.
    pub fn accepts(&self, plan: &Plan) -> Result<(), PlanError> {
        let principals = principals(plan);
        let devices = (1..).zip(plan.faults.iter().map(Principal::Device));
        let all = devices.chain((1..).zip(plan.hooks.iter().map(Principal::Hook)));
        for (number, fault) in all.filter(|(_, fault)| principals.contains(fault)) {
            let Some(why) = self.objection(plan, fault) else { continue };
            let what = match fault {
                Principal::Device(injection) => injection.cause.to_string(),
                Principal::Hook(hook) => hook.to_string(),
            };
            return Err(PlanError::Impossible { fault: number, what, why });
        }
        Ok(())
    }

    /// Why nothing can be said of a fault.
    fn objection(&self, plan: &Plan, fault: Principal<'_>) -> Option<&'static str> {
        if fault.place().is_none() {
            return Some("pausing and resuming a machine never gets there");
        }
        match self.courses(plan, fault) {
            Err(_) => return Some("the table of expected outcomes says nothing of it"),
            Ok((_, courses)) if courses.is_empty() => {
                return Some("the table of expected outcomes says that there is no such thing");
            }
            Ok(_) => {}
        }
        let own = |fault: &Injection| hits_the_coordinator(&fault.cause);
        if plan.faults.iter().any(own) && principals(plan).len() > 1 {
            return Some(NOT_ALONE);
        }
        if let Principal::Device(injection) = fault
            && let Cause::Inside(Fault { point: Point::Query, nth, .. }) = injection.cause
        {
            let asked = plan.faults.iter().any(|other| leads_to_query(other, injection));
            return match nth {
                _ if !asked => Some("no coordinator is lost in that round while the machine runs"),
                0 | 1 => None,
                _ => Some("a take-over asks once"),
            };
        }
        match fault {
            Principal::Device(injection) => self.objection_at_hello(plan, injection),
            Principal::Hook(_) => None,
        }
    }

    /// Why a fault does not come to the Hello at which it is to come, if that is its place.
    fn objection_at_hello(&self, plan: &Plan, fault: &Injection) -> Option<&'static str> {
        let column = place(fault)?.column;
        if ![HELLO, HELLO_AGAIN, HELLO_EACH_TIME].contains(&column) {
            return None;
        }
        let others = || plan.faults.iter().filter(|other| !std::ptr::eq(*other, fault));
        let mut own = others().filter(|other| other.device == fault.device);
        let hello = |other: &Injection| {
            matches!(&other.cause, Cause::Inside(Fault { point: Point::Hello, .. }))
        };
        if others()
            .any(|other| hello(other) && (other.device, other.round) == (fault.device, fault.round))
        {
            return Some("something else happens at that Hello already");
        }
        if matches!(&fault.cause, Cause::Inside(Fault { nth: 2.., .. })) {
            return Some("a process greets once");
        }
        let ends = |other: &Injection| {
            !hello(other)
                && other.round <= fault.round
                && nature(&other.cause, &self.times) != Nature::Lives
        };
        let again = column == HELLO || own.any(ends);
        (!again).then_some("no other fault of the plan makes that device greet again")
    }
}
