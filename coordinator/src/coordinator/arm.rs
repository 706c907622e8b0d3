//! Telling a device process what to do wrong.

use super::state::State;
use crate::error::MachineError;
use crate::fault::{ArmError, ArmRequest};
use standstill_protocol::message::{Arm, CoordinatorMessage};
use std::os::fd::{AsFd, BorrowedFd};

impl State {
    /// Whatever is under way: it belongs to no transition.
    pub(super) fn arm(&mut self, request: ArmRequest) {
        let ArmRequest { device, faults, journal, reply } = request;
        let armed = self.send_arm(device, Arm { term: self.term, faults }, journal.as_fd());
        // Whoever asked may be gone.
        let _ = reply.send(armed);
    }

    fn send_arm(&self, name: String, arm: Arm, journal: BorrowedFd<'_>) -> Result<(), ArmError> {
        let Some(device) = self.devices.iter().find(|device| device.spec.name == name) else {
            return Err(MachineError::NoDevice { device: name }.into());
        };
        let (Some(channel), Some(hello)) = (&device.channel, &device.hello) else {
            return Err(ArmError::OutOfReach { device: name });
        };
        if !hello.capabilities.fault_injection {
            return Err(ArmError::NotBuiltForIt { device: name });
        }
        channel
            .try_send(&CoordinatorMessage::Arm(arm), &[journal])
            .map_err(|source| ArmError::Send { device: name, source })
    }
}
