//! Which memory is RAM, and which memory is gone.

use super::join::Stage;
use super::removal::LeaveStage;
use super::state::{Alarms, Declaration, Declared, Device, Standing, State, Waiting};
use super::supervision::Recovery;
use super::{Message, Reply};
use crate::dirty::{self, DirtyError, DirtyTracking};
use crate::error::MachineError;
use standstill_protocol::channel::SendError;
use standstill_protocol::message::{
    CoordinatorMessage, FileIdentity, MAX_FDS, MAX_FILES, MAX_RAM_FILES, MemoryDeclaration,
    Revocation,
};
use standstill_protocol::transition::{Loss, ParticipantId};
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

impl State {
    pub(super) fn declare_ram(&mut self, ram: OwnedFd, reply: Reply<()>) {
        let file = match dirty::identity(&ram) {
            Ok((file, _)) => file,
            Err(source) => return drop(reply.send(Err(MachineError::Fd { source }))),
        };
        let known = self.ram.iter().position(|(known, _)| *known == file);
        // What no device accepts would keep every later one from coming in.
        if known.is_none() && self.ram.len() >= MAX_RAM_FILES {
            return drop(reply.send(Err(MachineError::TooMuchRam { most: MAX_RAM_FILES })));
        }
        if let Some(Err(error)) = self.tracking.as_ref().map(|tracking| tracking.add_file(&ram)) {
            return drop(reply.send(Err(error.into())));
        }
        // Kept for those who come later; and nobody else's file can get its identity meanwhile.
        let at = known.unwrap_or(self.ram.len());
        if known.is_none() {
            self.ram.push((file, ram));
        }
        let purpose = |reply| Declared::By { reply, new: known.is_none().then_some(file) };
        match self.declare_to_all(at..at + 1) {
            Ok((sequence, waiting)) => self.await_memory(sequence, waiting, purpose(reply)),
            Err(error) => drop(reply.send(Err(error))),
        }
    }

    /// Declares some of the RAM to everybody who is to know. Returns how many answers are due from
    /// whom.
    pub(super) fn declare_to_all(
        &mut self,
        ram: Range<usize>,
    ) -> Result<(u64, Waiting), MachineError> {
        let sequence = self.next_declaration();
        let told = |device: &&Device| match device.standing {
            Standing::Ready => true,
            // Who comes later is told about all of it.
            Standing::Joining => {
                let stage = device.care.join.as_ref().map(|join| &join.stage);
                !matches!(stage, Some(Stage::Stopping))
            }
            _ => false,
        };
        let ids: Vec<_> = self.devices.iter().filter(told).map(|device| device.id).collect();
        let mut waiting = Waiting::new();
        for id in ids {
            let answers = self.declare_to(id, ram.clone(), sequence).map_err(|why| {
                let device = self.names.participant(id);
                MachineError::Memory { device, why }
            })?;
            if answers > 0 {
                waiting.insert(id, answers);
            }
        }
        Ok((sequence, waiting))
    }

    pub(super) fn next_declaration(&mut self) -> u64 {
        let sequence = self.next_declaration;
        self.next_declaration += 1;
        sequence
    }

    /// Declares some of the RAM to a device, in as many messages as it takes, with bitmaps if it is
    /// to mark what it writes. Returns how many answers are due.
    pub(super) fn declare_to(
        &mut self,
        id: ParticipantId,
        ram: Range<usize>,
        sequence: u64,
    ) -> Result<usize, String> {
        let Some(device) = self.devices.get_mut(id) else { return Ok(0) };
        let Some(channel) = &device.channel else { return Ok(0) };
        let tracking = self.tracking.as_ref().filter(|_| device.tracks());
        let dirty_page_size = tracking.map_or(0, |tracking| tracking.options.page_size);
        let files = self.ram.get(ram).unwrap_or_default();
        let mut answers = 0;
        for chunk in files.chunks(if tracking.is_some() { MAX_FDS / 2 } else { MAX_FDS }) {
            let bitmaps = tracking.map(|tracking| {
                chunk.iter().map(|(file, _)| tracking.add_bitmap(id, *file)).collect()
            });
            let bitmaps: Vec<_> = bitmaps
                .transpose()
                .map_err(|error: DirtyError| error.to_string())?
                .unwrap_or_default();
            let mut fds: Vec<_> = chunk.iter().map(|(_, fd)| fd.as_fd()).collect();
            fds.extend(bitmaps.iter().map(|bitmap| bitmap.as_fd()));
            let message = CoordinatorMessage::Memory(MemoryDeclaration {
                term: self.term,
                sequence,
                ram_fds: u8::try_from(chunk.len()).unwrap_or(u8::MAX),
                dirty_page_size,
            });
            device.allowance.asked();
            match channel.try_send(&message, &fds) {
                // Its end is still to be read, and decides for whoever waits.
                Ok(()) | Err(SendError::Disconnected) => answers += 1,
                Err(error) => return Err(error.to_string()),
            }
        }
        Ok(answers)
    }

    /// Waits until all of these have answered.
    pub(super) fn await_memory(&mut self, sequence: u64, waiting: Waiting, purpose: Declared) {
        if waiting.is_empty() {
            return self.in_force(purpose);
        }
        let budgets: BTreeSet<_> =
            waiting.keys().map(|&id| self.memory_budget(id, &purpose)).collect();
        let expires = |budget| self.after(budget, move || Message::MemoryExpired(sequence, budget));
        let deadlines = Alarms(budgets.into_iter().map(expires).collect());
        let declaration = Declaration { waiting, purpose, deadlines, accepted: false };
        self.declarations.insert(sequence, declaration);
    }

    /// How long a device has for its answer. To let go of a peer's memory is what a first phase asks
    /// for, so a device is not waited for any longer than there: another one may have to be back
    /// before the machine can go on.
    fn memory_budget(&self, id: ParticipantId, purpose: &Declared) -> Duration {
        let memory = self.deadlines.memory;
        match (purpose, self.devices.get(id)) {
            (Declared::Gone(_), Some(device)) => memory.min(self.first_phase(&device.spec)),
            _ => memory,
        }
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
        let mut waiting = Waiting::new();
        let sequence = self.next_declaration();
        if !files.is_empty() {
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
                waiting.insert(peer.id, 1);
            }
        }
        self.await_memory(sequence, waiting, Declared::Gone(id));
    }

    pub(super) fn memory_accepted(&mut self, id: ParticipantId, sequence: u64) {
        let Some(declaration) = self.declarations.get_mut(&sequence) else { return };
        let Some(due) = declaration.waiting.get_mut(&id) else { return };
        *due -= 1;
        if *due > 0 {
            return;
        }
        declaration.waiting.remove(&id);
        declaration.accepted = true;
        if let Declared::Tracking(tracking, _) = &declaration.purpose {
            tracking.relied_on(id);
        }
        if declaration.waiting.is_empty()
            && let Some(declaration) = self.declarations.remove(&sequence)
        {
            self.in_force(declaration.purpose);
        }
    }

    /// Everybody has answered.
    fn in_force(&mut self, purpose: Declared) {
        match purpose {
            Declared::By { reply, .. } => drop(reply.send(Ok(()))),
            Declared::To(id) => self.newcomer_knows(id),
            Declared::Tracking(tracking, reply) => {
                // Whoever has given up waiting drops it, and so ends it.
                let _ = reply.send(Ok(DirtyTracking::new(self.myself.clone(), tracking)));
            }
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

    /// Whoever has no more than this for the answer is late.
    pub(super) fn memory_expired(&mut self, sequence: u64, time: Duration) {
        let Some(declaration) = self.declarations.remove(&sequence) else { return };
        let Declaration { waiting, purpose, deadlines, accepted } = declaration;
        match purpose {
            Declared::By { reply, new } => {
                if let Some(file) = new.filter(|_| !accepted) {
                    self.forget_ram(file);
                }
                let error = self.not_declared(&waiting, &format!("no answer within {time:?}"));
                let _ = reply.send(Err(error));
            }
            Declared::Tracking(tracking, reply) => {
                let error = self.not_declared(&waiting, &format!("no answer within {time:?}"));
                self.stop_dirty_tracking(&tracking);
                let _ = reply.send(Err(error));
            }
            Declared::To(id) => {
                let text = format!("it did not accept a memory declaration within {time:?}");
                self.lost(id, Loss::Timeout, text);
            }
            // Whoever may still have a window onto what is gone does not go on.
            Declared::Gone(id) => {
                let gone = self.names.participant(id);
                let (late, waiting): (Waiting, Waiting) = waiting
                    .into_iter()
                    .partition(|&(peer, _)| self.memory_budget(peer, &purpose) <= time);
                let is_last = waiting.is_empty();
                if !is_last {
                    let purpose = Declared::Gone(id);
                    let rest = Declaration { waiting, purpose, deadlines, accepted };
                    self.declarations.insert(sequence, rest);
                }
                for peer in late.into_keys() {
                    let text = format!(
                        "it did not confirm within {time:?} that its windows onto the memory of \
                         {gone:?} are revoked"
                    );
                    self.lost(peer, Loss::Timeout, text);
                }
                if is_last {
                    self.in_force(Declared::Gone(id));
                }
            }
        }
    }

    /// A device is lost: the owner hears it who waits for it, and nobody else waits any more.
    pub(super) fn memory_lost(&mut self, id: ParticipantId, why: &str) {
        self.writer_lost(id);
        let lost: Vec<_> = self
            .declarations
            .iter()
            .filter(|(_, declaration)| declaration.waiting.contains_key(&id))
            .map(|(&sequence, _)| sequence)
            .collect();
        let joining = self.device(id).is_some_and(|device| device.care.join.is_some());
        for sequence in lost {
            let Some(mut declaration) = self.declarations.remove(&sequence) else { continue };
            match declaration.purpose {
                Declared::By { reply, .. } if !joining => {
                    let _ = reply.send(Err(self.not_declared(&Waiting::from([(id, 1)]), why)));
                }
                Declared::To(_) => {}
                // A newcomer does not count yet; what a lost device has written is known to nobody.
                Declared::By { .. } | Declared::Gone(_) | Declared::Tracking(..) => {
                    declaration.waiting.remove(&id);
                    if declaration.waiting.is_empty() {
                        self.in_force(declaration.purpose);
                    } else {
                        self.declarations.insert(sequence, declaration);
                    }
                }
            }
        }
    }

    /// A file that the owner has declared and nobody has accepted is none of the RAM: a device that
    /// comes later would not accept it either, and be lost for that.
    fn forget_ram(&mut self, file: FileIdentity) {
        self.ram.retain(|(known, _)| *known != file);
    }

    fn not_declared(&self, silent: &Waiting, why: &str) -> MachineError {
        let device =
            silent.keys().next().map_or_else(String::new, |&id| self.names.participant(id));
        MachineError::Memory { device, why: why.to_owned() }
    }
}
