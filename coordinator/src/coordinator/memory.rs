//! Which memory is RAM, and which memory is gone.

use super::join::Stage;
use super::removal::LeaveStage;
use super::state::{Declaration, Declared, Standing, State};
use super::supervision::Recovery;
use super::{Message, Reply};
use crate::error::MachineError;
use standstill_protocol::message::{
    CoordinatorMessage, FileIdentity, MAX_FILES, MemoryDeclaration, Revocation,
};
use standstill_protocol::transition::{Loss, ParticipantId};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};

impl State {
    pub(super) fn declare_ram(&mut self, ram: OwnedFd, reply: Reply<()>) {
        let identity = match rustix::fs::fstat(&ram) {
            Ok(status) => FileIdentity { device: status.st_dev, inode: status.st_ino },
            Err(errno) => {
                return drop(reply.send(Err(MachineError::Fd { source: errno.into() })));
            }
        };
        let sequence = self.next_declaration;
        self.next_declaration += 1;
        let message =
            CoordinatorMessage::Memory(MemoryDeclaration { term: self.term, sequence, ram_fds: 1 });
        let mut waiting = BTreeSet::new();
        let mut failed = None;
        for device in self.devices.iter_mut() {
            let joining = device.care.join.as_ref().map(|join| &join.stage);
            let told = match device.standing {
                Standing::Ready => true,
                // Who comes later is told about all of it.
                Standing::Joining => !matches!(joining, Some(Stage::Stopping)),
                _ => false,
            };
            let Some(channel) = device.channel.as_ref().filter(|_| told) else { continue };
            device.allowance.asked();
            if let Err(error) = channel.try_send(&message, &[ram.as_fd()]) {
                failed = Some((device.spec.name.clone(), error.to_string()));
                break;
            }
            waiting.insert(device.id);
        }
        // Kept for those who come later; and nobody else's file can get its identity meanwhile.
        if !self.ram.iter().any(|(known, _)| *known == identity) {
            self.ram.push((identity, ram));
        }
        if let Some((device, why)) = failed {
            return drop(reply.send(Err(MachineError::Memory { device, why })));
        }
        self.await_memory(sequence, waiting, Declared::By(reply));
    }

    /// Waits until all of these have answered.
    pub(super) fn await_memory(
        &mut self,
        sequence: u64,
        waiting: BTreeSet<ParticipantId>,
        purpose: Declared,
    ) {
        if waiting.is_empty() {
            return self.in_force(purpose);
        }
        let deadline = self.memory_deadline(sequence);
        self.declarations.insert(sequence, Declaration { waiting, purpose, deadline });
    }

    /// Has the windows of all others onto a dead process's memory revoked.
    pub(super) fn revoke(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        match &mut device.care.leaving {
            Some(leaving) => leaving.stage = LeaveStage::Revoking,
            None => device.care.recovery = Recovery::Revoking,
        }
        let mut files = device.hello.as_ref().map_or_else(Vec::new, |hello| hello.memory.clone());
        // What a living device has too is not gone, whoever has claimed it.
        for peer in self.devices.iter() {
            if let (Standing::Ready | Standing::Joining, Some(hello)) =
                (&peer.standing, &peer.hello)
            {
                files.retain(|file| !hello.memory.contains(file));
            }
        }
        files.truncate(MAX_FILES);
        let mut waiting = BTreeSet::new();
        let sequence = self.next_declaration;
        if !files.is_empty() {
            self.next_declaration += 1;
            let message =
                CoordinatorMessage::Revoke(Revocation { term: self.term, sequence, files });
            for peer in self.devices.iter_mut() {
                let welcomed = matches!(peer.standing, Standing::Ready | Standing::Joining);
                let Some(channel) = peer.channel.as_ref().filter(|_| welcomed) else { continue };
                peer.allowance.asked();
                if let Err(error) = channel.try_send(&message, &[]) {
                    // It does not read: the deadline decides. Its end is seen at the socket.
                    tracing::warn!(device = peer.spec.name, %error, "cannot be told of a revocation");
                }
                waiting.insert(peer.id);
            }
        }
        self.await_memory(sequence, waiting, Declared::Gone(id));
    }

    pub(super) fn memory_accepted(&mut self, id: ParticipantId, sequence: u64) {
        let Some(declaration) = self.declarations.get_mut(&sequence) else { return };
        declaration.waiting.remove(&id);
        if declaration.waiting.is_empty()
            && let Some(declaration) = self.declarations.remove(&sequence)
        {
            declaration.deadline.abort();
            self.in_force(declaration.purpose);
        }
    }

    /// Everybody has answered.
    fn in_force(&mut self, purpose: Declared) {
        match purpose {
            Declared::By(reply) => drop(reply.send(Ok(()))),
            Declared::To(id) => self.newcomer_knows(id),
            Declared::Gone(id) => {
                let Some(device) = self.device(id) else { return };
                match &mut device.care.leaving {
                    // It may have been asked to leave meanwhile.
                    Some(leaving) if leaving.stage == LeaveStage::Revoking => {
                        leaving.stage = LeaveStage::Revoked;
                    }
                    Some(_) => {}
                    None => device.care.recovery = Recovery::Revoked,
                }
                self.unsettled = true;
            }
        }
    }

    pub(super) fn memory_expired(&mut self, sequence: u64) {
        let time = self.deadlines.memory;
        let Some(Declaration { waiting, purpose, .. }) = self.declarations.remove(&sequence) else {
            return;
        };
        match purpose {
            Declared::By(reply) => {
                self.not_declared(&waiting, reply, &format!("no answer within {time:?}"));
            }
            Declared::To(id) => {
                let text = format!("it did not accept a memory declaration within {time:?}");
                self.lost(id, Loss::Timeout, text);
            }
            // Whoever may still have a window onto what is gone does not go on.
            Declared::Gone(id) => {
                let gone = self.names.participant(id);
                for peer in waiting {
                    let text = format!(
                        "it did not confirm within {time:?} that its windows onto the memory of \
                         {gone:?} are revoked"
                    );
                    self.lost(peer, Loss::Timeout, text);
                }
                self.in_force(Declared::Gone(id));
            }
        }
    }

    /// A device is lost: the owner hears it who waits for it, and nobody else waits any more.
    pub(super) fn memory_lost(&mut self, id: ParticipantId, why: &str) {
        let lost: Vec<_> = self
            .declarations
            .iter()
            .filter(|(_, declaration)| declaration.waiting.contains(&id))
            .map(|(&sequence, _)| sequence)
            .collect();
        let joining = self.device(id).is_some_and(|device| device.care.join.is_some());
        for sequence in lost {
            let Some(mut declaration) = self.declarations.remove(&sequence) else { continue };
            match declaration.purpose {
                Declared::By(reply) if !joining => {
                    declaration.deadline.abort();
                    self.not_declared(&BTreeSet::from([id]), reply, why);
                }
                Declared::To(_) => declaration.deadline.abort(),
                // A newcomer does not count yet.
                Declared::By(_) | Declared::Gone(_) => {
                    declaration.waiting.remove(&id);
                    if declaration.waiting.is_empty() {
                        declaration.deadline.abort();
                        self.in_force(declaration.purpose);
                    } else {
                        self.declarations.insert(sequence, declaration);
                    }
                }
            }
        }
    }

    fn not_declared(&self, silent: &BTreeSet<ParticipantId>, reply: Reply<()>, why: &str) {
        let device = silent.first().map_or_else(String::new, |&id| self.names.participant(id));
        let _ = reply.send(Err(MachineError::Memory { device, why: why.to_owned() }));
    }

    /// Arms the deadline of a declaration.
    fn memory_deadline(&self, sequence: u64) -> tokio::task::AbortHandle {
        self.after(self.deadlines.memory, move || Message::MemoryExpired(sequence))
    }
}
