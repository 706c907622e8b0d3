//! A device leaves the machine.

use super::Reply;
use super::state::{Device, Purpose, Standing, State};
use super::supervision::{Care, Recovery};
use crate::description::DeviceSpec;
use crate::device::Message as DeviceActorMessage;
use crate::error::MachineError;
use crate::events::MachineEvent;
use crate::process::Exit;
use crate::report::nanos;
use standstill_protocol::message::{CoordinatorMessage, Shutdown};
use standstill_protocol::migration::Activity;
use standstill_protocol::transition::{Loss, MachineState, Operation, ParticipantId};
use std::time::Duration;

/// How long a device process that is removed may take to end by itself.
const GRACE: Duration = Duration::from_secs(2);

/// A device that is to leave.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) stage: LeaveStage,
    pub(super) reply: Option<Reply<Option<Exit>>>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LeaveStage {
    /// It was asked for.
    Asked,
    /// It is brought to STOP.
    Stopping,
    /// Its process ends, and the proof of it is waited for.
    Ending,
    /// Peers' windows onto its memory are being revoked.
    Revoking,
    /// They are.
    Revoked,
}

impl State {
    /// The owner wants a device no more.
    pub(super) fn remove_device(&mut self, name: &str, reply: Reply<Option<Exit>>) {
        let held = self.machine == MachineState::Held;
        let Some(device) = self.devices.iter_mut().find(|device| device.spec.name == name) else {
            let device = name.to_owned();
            return drop(reply.send(Err(MachineError::NoDevice { device })));
        };
        let why = if device.care.leaving.is_some() {
            Some("it is under way already")
        } else if held && !matches!(device.standing, Standing::Fenced(_)) {
            Some("the machine is held, and the device is not fenced")
        } else {
            None
        };
        if let Some(why) = why {
            let (device, why) = (name.to_owned(), why.to_owned());
            let error = MachineError::Device { what: "removing", device, why };
            return drop(reply.send(Err(error)));
        }
        device.care.leaving = Some(Leaving { stage: LeaveStage::Asked, reply: Some(reply) });
        self.unsettled = true;
    }

    fn set_leaving(&mut self, id: ParticipantId, stage: LeaveStage) {
        if let Some(leaving) = self.device(id).and_then(|device| device.care.leaving.as_mut()) {
            leaving.stage = stage;
            self.unsettled = true;
        }
    }

    /// The first step of it.
    pub(super) fn leave(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        if let Recovery::Waiting(timer) = &device.care.recovery {
            timer.abort();
        }
        device.care.recovery = Recovery::GivenUp;
        device.care.join = None;
        if let Some(owner) = device.care.owner.take() {
            let (device, why) = (device.spec.name.clone(), "it is being removed".to_owned());
            let _ = owner.send(Err(MachineError::Device { what: "restarting", device, why }));
        }
        match device.standing {
            Standing::Ready if device.state.activity() != Activity::Stopped => {
                self.set_leaving(id, LeaveStage::Stopping);
                self.begin_internal(id, Operation::Pause, Purpose::Leave(id));
            }
            Standing::Ready => self.leave_stopped(id),
            Standing::Greeting | Standing::Joining => self.leave_at_once(id),
            Standing::Lost(..) => {
                device.tell(DeviceActorMessage::Fence);
                self.set_leaving(id, LeaveStage::Ending);
                self.await_fence(id, self.deadlines.fence);
            }
            Standing::Fenced(_) | Standing::Leaving => self.set_leaving(id, LeaveStage::Ending),
        }
    }

    /// It was brought to STOP, or could not be.
    pub(super) fn leaver_moved(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        match device.standing {
            Standing::Ready if device.state.activity() == Activity::Stopped => {
                self.leave_stopped(id);
            }
            Standing::Ready => self.leave_at_once(id),
            _ => {
                self.set_leaving(id, LeaveStage::Ending);
                self.await_fence(id, self.deadlines.fence);
            }
        }
    }

    /// It stands still: its process is asked to end.
    fn leave_stopped(&mut self, id: ParticipantId) {
        let shutdown = Shutdown { term: self.term, grace_ns: nanos(GRACE) };
        let Some(device) = self.device(id) else { return };
        device.standing = Standing::Leaving;
        if let Some(channel) = &device.channel {
            // One that cannot be told is killed after the grace.
            let _ = channel.try_send(&CoordinatorMessage::Shutdown(shutdown), &[]);
        }
        device.tell(DeviceActorMessage::Expect(GRACE));
        self.memory_lost(id, "it is being removed");
        self.set_leaving(id, LeaveStage::Ending);
        self.await_fence(id, GRACE.saturating_add(self.deadlines.fence));
    }

    /// It cannot be brought to STOP, or has never counted: it is fenced.
    fn leave_at_once(&mut self, id: ParticipantId) {
        let text = "it is being removed";
        self.close(id);
        let Some(device) = self.device(id) else { return };
        device.standing = Standing::Lost(Loss::Refused, text.to_owned());
        self.memory_lost(id, text);
        self.set_leaving(id, LeaveStage::Ending);
        self.fence_outside(id, Loss::Refused, text);
    }

    /// Nothing proves that it is gone: it stays, lost.
    pub(super) fn not_removed(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        let Some(leaving) = device.care.leaving.take() else { return };
        if device.standing == Standing::Leaving {
            let text = "it was being removed and did not end".to_owned();
            device.standing = Standing::Lost(Loss::Timeout, text);
            // Its end may still come, and nobody else would ask for the proof of it.
            device.tell(DeviceActorMessage::Fence);
        }
        let device = device.spec.name.clone();
        if let Some(reply) = leaving.reply {
            let _ = reply.send(Err(MachineError::Unproven { device }));
        }
    }

    /// Nothing of it is left, and nobody has windows onto its memory.
    pub(super) fn forget(&mut self, id: ParticipantId) {
        let Some(device) = self.take_out(id) else { return };
        let (name, exit) = (device.spec.name, device.exit);
        if let Some(Leaving { reply: Some(reply), .. }) = device.care.leaving {
            // Whoever asked may be gone; the device is, too.
            let _ = reply.send(Ok(exit));
        }
        self.emit(MachineEvent::DeviceRemoved { device: name, exit });
    }

    /// Takes a device without process out of the machine.
    pub(super) fn take_out(&mut self, id: ParticipantId) -> Option<Device> {
        let device = self.devices.remove(id)?;
        device.tell(DeviceActorMessage::Retire);
        self.names.participants.remove(&id);
        self.forget_device(&device.spec.name);
        Some(device)
    }

    /// A device that is to be added has its place before it has a process.
    pub(super) fn place(&mut self, spec: DeviceSpec, reply: Reply<()>) {
        let Some(id) = self.ids.next() else {
            return drop(reply.send(Err(MachineError::Busy(usize::MAX))));
        };
        self.names.participants.insert(id, spec.name.clone());
        let mut device = Device::without_process(id, spec, "it is being added".to_owned());
        device.care =
            Care { recovery: Recovery::Due, owner: Some(reply), added: true, ..Care::default() };
        self.devices.push(device);
        self.unsettled = true;
    }
}
