//! What the loss of a device means for its machine.

use crate::description::DeviceSpec;
use crate::error::StartError;
use standstill_protocol::transition::OnLoss;
use std::time::Duration;

/// Why QEMU's vfio-user client stands against a restart; for
/// [`DeviceSpec::client_cannot_reconnect`](crate::DeviceSpec::client_cannot_reconnect).
pub const QEMU_VFIO_USER: &str = "QEMU's vfio-user client does not reconnect: its requests fail \
     from the death of its server on, and it aborts at the next change of the memory map";

/// What is done when a device is lost.
///
/// However it is lost, it is fenced first, and nothing else is done before the fence is proven.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LossPolicy {
    /// Nothing. A transition that is under way is undone; the owner decides what comes next.
    Fail,
    /// A transition that is under way is undone if the device is [`Presence::Required`]. Then the
    /// device's program is started again.
    Restart(RestartPolicy),
    /// A transition that is under way goes on without the device, and so does the machine.
    ContinueWithout,
}

/// Whether a machine may run without a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    /// It may not: a start of the machine fails without it, and a resume is refused while it is
    /// missing, unless its policy is [`LossPolicy::ContinueWithout`].
    Required,
    /// It may: a device that does not start or greet does not fail the start of the machine, and
    /// its loss does not fail a transition unless its policy is [`LossPolicy::Fail`].
    Optional,
}

/// How often, and how soon, a lost device is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartPolicy {
    /// The most restarts within any `window`; 0 for none. Failed attempts count.
    pub budget: u32,
    /// The time over which they are counted.
    pub window: Duration,
    /// The wait before the first restart in a window; twice as long before each one after it …
    pub first_backoff: Duration,
    /// … but not longer than this.
    pub longest_backoff: Duration,
}

impl Default for RestartPolicy {
    /// 5 restarts in 60 s; 10 ms before the first one, at most 1 s before the others.
    fn default() -> Self {
        Self {
            budget: 5,
            window: Duration::from_secs(60),
            first_backoff: Duration::from_millis(10),
            longest_backoff: Duration::from_secs(1),
        }
    }
}

/// What counts for devices that say nothing of their own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policies {
    pub(crate) on_loss: Option<LossPolicy>,
    pub(crate) presence: Presence,
}

impl Policies {
    /// What counts for this device.
    pub(crate) fn resolve(&self, spec: &DeviceSpec) -> (LossPolicy, Presence) {
        let presence = spec.presence.unwrap_or(self.presence);
        let by_presence = match presence {
            Presence::Required => LossPolicy::Fail,
            Presence::Optional => LossPolicy::ContinueWithout,
        };
        let policy = match (spec.on_loss, spec.presence) {
            (Some(policy), _) => policy,
            // What a device says of itself counts for more than what is said of all.
            (None, Some(Presence::Optional)) => LossPolicy::ContinueWithout,
            (None, _) => self.on_loss.unwrap_or(by_presence),
        };
        (policy, presence)
    }

    /// What the loss of this device means for a transition.
    pub(crate) fn in_transition(&self, spec: &DeviceSpec) -> OnLoss {
        match self.resolve(spec) {
            (LossPolicy::ContinueWithout, _) | (LossPolicy::Restart(_), Presence::Optional) => {
                OnLoss::ContinueWithout
            }
            (LossPolicy::Fail, _) | (LossPolicy::Restart(_), Presence::Required) => OnLoss::Fail,
        }
    }

    /// Whether a machine may be resumed without this device.
    pub(crate) fn may_be_missing(&self, spec: &DeviceSpec) -> bool {
        let (policy, presence) = self.resolve(spec);
        presence == Presence::Optional || policy == LossPolicy::ContinueWithout
    }

    /// Whether the policy is possible.
    pub(crate) fn check(&self, spec: &DeviceSpec) -> Result<(), StartError> {
        match (self.resolve(spec).0, &spec.no_reconnect) {
            (LossPolicy::Restart(_), Some(reason)) => Err(StartError::RestartRefused {
                device: spec.name.clone(),
                reason: reason.clone(),
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_device_says_of_itself_counts_for_more_than_what_is_said_of_all() {
        let restart = LossPolicy::Restart(RestartPolicy::default());
        let (fail, without) = (LossPolicy::Fail, LossPolicy::ContinueWithout);
        let plain = || DeviceSpec::new("d", "/d");
        let (needed, optional) = (Presence::Required, Presence::Optional);
        let cases = [
            (None, needed, plain(), fail, OnLoss::Fail, false),
            (None, optional, plain(), without, OnLoss::ContinueWithout, true),
            (Some(restart), needed, plain(), restart, OnLoss::Fail, false),
            (Some(restart), optional, plain(), restart, OnLoss::ContinueWithout, true),
            (Some(restart), needed, plain().optional(), without, OnLoss::ContinueWithout, true),
            (None, needed, plain().optional().on_loss(fail), fail, OnLoss::Fail, true),
            (
                None,
                needed,
                plain().optional().on_loss(restart),
                restart,
                OnLoss::ContinueWithout,
                true,
            ),
            (None, needed, plain().on_loss(without), without, OnLoss::ContinueWithout, true),
            (
                None,
                optional,
                plain().presence(needed).on_loss(restart),
                restart,
                OnLoss::Fail,
                false,
            ),
        ];
        for (on_loss, presence, spec, policy, in_transition, may_be_missing) in cases {
            let policies = Policies { on_loss, presence };
            let case = format!("{policies:?} {spec:?}");
            assert_eq!(policies.resolve(&spec).0, policy, "{case}");
            assert_eq!(policies.in_transition(&spec), in_transition, "{case}");
            assert_eq!(policies.may_be_missing(&spec), may_be_missing, "{case}");
        }
    }

    #[test]
    fn restart_is_refused_where_the_client_cannot_reconnect() {
        let policies = Policies { on_loss: None, presence: Presence::Required };
        let spec = DeviceSpec::new("d", "/d").client_cannot_reconnect(QEMU_VFIO_USER);
        assert!(policies.check(&spec).is_ok());
        let spec = spec.on_loss(LossPolicy::Restart(RestartPolicy::default()));
        let error = policies.check(&spec).unwrap_err().to_string();
        assert!(error.contains("\"d\"") && error.contains("QEMU's vfio-user client"), "{error}");
    }
}
