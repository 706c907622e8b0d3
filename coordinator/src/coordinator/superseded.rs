//! Another coordinator has the machine: whatever this one does from now on is nothing.

use super::Request;
use super::state::{Declared, State};
use crate::control_directory::ControlDirectoryError;
use crate::error::{MachineError, ProtocolError};
use crate::events::MachineEvent;
use standstill_protocol::message::Term;
use standstill_protocol::transition::{Event, HeldReason, MachineState};

impl State {
    /// True if another coordinator has the machine. Asked before anything is done about a loss: to
    /// one that was stopped for a while, devices that another one has look lost.
    pub(super) fn is_superseded(&mut self) -> bool {
        if self.superseded.is_none()
            && let Some(custody) = self.custody()
            && let Err(ControlDirectoryError::Superseded { found, .. }) = custody.check()
        {
            self.superseded(found);
        }
        self.superseded.is_some()
    }

    /// A device says that another coordinator has it. One that takes a machine over says so in the
    /// record first.
    pub(super) fn device_superseded(&mut self, term: Term) -> Result<(), ProtocolError> {
        let checked = self.custody().map(|custody| custody.check());
        match checked {
            None | Some(Ok(())) => return Err(ProtocolError::NotSuperseded(term)),
            Some(Err(ControlDirectoryError::Superseded { found, .. })) => self.superseded(found),
            // It cannot be found out; then nothing may be done to anybody.
            Some(Err(error)) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "the record cannot be read");
                self.superseded(term);
            }
        }
        Ok(())
    }

    /// Another coordinator has the machine: lets go of everything.
    pub(super) fn superseded(&mut self, term: Term) {
        if self.superseded.replace(term).is_some() {
            return;
        }
        if let Some(custody) = self.custody() {
            custody.supersede(term);
        }
        let ids: Vec<_> = self.devices.iter().map(|device| device.id).collect();
        for id in ids {
            self.close(id);
        }
        self.machine = MachineState::Held;
        self.held = vec![HeldReason::Superseded];
        if let Some(tracking) = self.tracking.take() {
            tracking.superseded(term);
        }
        let refused = || MachineError::Superseded { term };
        // Whoever asked may be gone.
        for (_, declaration) in std::mem::take(&mut self.declarations) {
            match declaration.purpose {
                Declared::By { reply, .. } => drop(reply.send(Err(refused()))),
                Declared::Tracking(_, reply) => drop(reply.send(Err(refused()))),
                Declared::To(_) | Declared::Gone(_) => {}
            }
        }
        for request in std::mem::take(&mut self.queue) {
            request.refuse(refused());
        }
        for device in self.devices.iter_mut() {
            if let Some(owner) = device.care.owner.take() {
                let _ = owner.send(Err(refused()));
            }
            let leaving = device.care.leaving.as_mut();
            if let Some(reply) = leaving.and_then(|leaving| leaving.reply.take()) {
                let _ = reply.send(Err(refused()));
            }
        }
        self.feed(Event::Superseded);
        self.emit(MachineEvent::Superseded { term });
        // There is nobody left here to end.
        self.ended();
    }

    /// What can still be asked of a machine that another coordinator has: where it was, and to end
    /// this handle of it.
    pub(super) fn refuse_if_superseded(&mut self, request: Request) -> Option<Request> {
        let Some(term) = self.superseded else { return Some(request) };
        if matches!(request, Request::Status(_) | Request::Cancel(_)) {
            return Some(request);
        }
        if matches!(request, Request::Shutdown(..)) {
            self.myself.stop();
        }
        request.refuse(MachineError::Superseded { term });
        None
    }
}
