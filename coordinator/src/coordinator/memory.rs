//! Which memory is RAM.

use super::Message;
use super::state::{Declaration, Standing, State};
use crate::error::MachineError;
use standstill_protocol::message::{CoordinatorMessage, MemoryDeclaration};
use standstill_protocol::transition::ParticipantId;
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use tokio::sync::oneshot;

impl State {
    pub(super) fn declare_ram(
        &mut self,
        ram: &OwnedFd,
        reply: oneshot::Sender<Result<(), MachineError>>,
    ) {
        let kept = match ram.try_clone() {
            Ok(kept) => kept,
            Err(source) => return drop(reply.send(Err(MachineError::Fd { source }))),
        };
        let sequence = self.next_declaration;
        self.next_declaration += 1;
        let message =
            CoordinatorMessage::Memory(MemoryDeclaration { term: self.term, sequence, ram_fds: 1 });
        let mut waiting = BTreeSet::new();
        for device in self.devices.iter_mut().filter(|d| d.standing == Standing::Ready) {
            let Some(channel) = &device.channel else { continue };
            device.allowance.asked();
            if let Err(error) = channel.try_send(&message, &[ram.as_fd()]) {
                let (device, why) = (device.spec.name.clone(), error.to_string());
                return drop(reply.send(Err(MachineError::Memory { device, why })));
            }
            waiting.insert(device.id);
        }
        if waiting.is_empty() {
            return drop(reply.send(Ok(())));
        }
        let deadline = self.after(self.deadlines.memory, move || Message::MemoryExpired(sequence));
        let declaration = Declaration { waiting, reply, deadline, _ram: kept };
        self.declarations.insert(sequence, declaration);
    }

    pub(super) fn memory_accepted(&mut self, id: ParticipantId, sequence: u64) {
        let Some(declaration) = self.declarations.get_mut(&sequence) else { return };
        declaration.waiting.remove(&id);
        if declaration.waiting.is_empty()
            && let Some(declaration) = self.declarations.remove(&sequence)
        {
            declaration.deadline.abort();
            let _ = declaration.reply.send(Ok(()));
        }
    }

    pub(super) fn memory_expired(&mut self, sequence: u64) {
        let why = format!("no answer within {:?}", self.deadlines.memory);
        if let Some(declaration) = self.declarations.remove(&sequence) {
            self.declaration_failed(declaration, &why);
        }
    }

    /// A device is lost: what waits for it fails.
    pub(super) fn memory_lost(&mut self, id: ParticipantId, why: &str) {
        let lost: Vec<_> = self
            .declarations
            .iter()
            .filter(|(_, declaration)| declaration.waiting.contains(&id))
            .map(|(&sequence, _)| sequence)
            .collect();
        for sequence in lost {
            if let Some(mut declaration) = self.declarations.remove(&sequence) {
                declaration.waiting = BTreeSet::from([id]);
                self.declaration_failed(declaration, why);
            }
        }
    }

    fn declaration_failed(&self, declaration: Declaration, why: &str) {
        declaration.deadline.abort();
        let device =
            declaration.waiting.first().map_or_else(String::new, |&id| self.names.participant(id));
        let error = MachineError::Memory { device, why: why.to_owned() };
        let _ = declaration.reply.send(Err(error));
    }
}
