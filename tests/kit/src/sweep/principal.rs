//! The faults of a plan that something is to come of: those of devices and those of hooks.

use super::Times;
use super::nature::{self, Place};
use crate::plan::{HookAction, HookFault, Injection, Plan};
use crate::trace::Call;
use std::fmt;

/// A fault of which the table says what comes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Principal<'p> {
    /// Of a device, or of what goes to it and comes from it.
    Device(&'p Injection),
    /// Of a hook.
    Hook(&'p HookFault),
}

/// What a fault does to its hook, as the coordinator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HookNature {
    /// The call fails.
    Fails,
    /// The call has not returned at its deadline.
    Hangs,
    /// It returns in time.
    Slow,
}

impl Principal<'_> {
    /// Its word in the table of outcomes.
    pub(super) fn word(self, times: &Times) -> &'static str {
        match self {
            Self::Device(injection) => nature::word(&injection.cause, times),
            Self::Hook(fault) => match hook_nature(fault, times) {
                HookNature::Fails => "hook-fails",
                HookNature::Hangs => "hook-hangs",
                HookNature::Slow => "hook-slow",
            },
        }
    }

    /// Where it stands in the table; `None` if pausing and resuming a machine never gets there.
    pub(super) fn place(self) -> Option<Place> {
        match self {
            Self::Device(injection) => nature::place(injection),
            Self::Hook(fault) => {
                let row = match fault.place {
                    crate::plan::Place::Before => "before",
                    crate::plan::Place::Between => "between",
                    crate::plan::Place::After => "after",
                };
                let column = match fault.call {
                    Call::Stop => HOOK_ON_STOP,
                    Call::Start => HOOK_ON_START,
                };
                Some(Place { row, column })
            }
        }
    }

    /// The round from which on it comes.
    pub(super) fn round(self) -> u32 {
        match self {
            Self::Device(injection) => injection.round,
            Self::Hook(fault) => fault.round,
        }
    }
}

/// The column of a hook's call on a stop.
pub(super) const HOOK_ON_STOP: &str = "hook on stop";
/// The column of a hook's call on a start.
pub(super) const HOOK_ON_START: &str = "hook on start";

/// What a fault does to its hook.
pub(super) fn hook_nature(fault: &HookFault, times: &Times) -> HookNature {
    match fault.action {
        HookAction::Fail => HookNature::Fails,
        HookAction::StickMs(0) => HookNature::Hangs,
        HookAction::StickMs(ms) if u128::from(ms) >= times.short.as_millis() => HookNature::Hangs,
        HookAction::StickMs(_) => HookNature::Slow,
    }
}

/// The faults without those that only help another one to come where it is to: that hold an answer back
/// meanwhile, end a process so that the next one greets, or a coordinator so that another one asks.
pub(super) fn principals(plan: &Plan) -> Vec<Principal<'_>> {
    let helps = |injection: &Injection| {
        let helps = |other| {
            nature::holds_others_back(injection, other)
                || nature::leads_to_hello(injection, other)
                || nature::leads_to_query(injection, other)
        };
        plan.faults.iter().any(helps)
    };
    let devices = plan.faults.iter().filter(|injection| !helps(injection)).map(Principal::Device);
    devices.chain(plan.hooks.iter().map(Principal::Hook)).collect()
}

impl fmt::Display for Principal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Device(injection) => injection.fmt(f),
            Self::Hook(fault) => fault.fmt(f),
        }
    }
}
