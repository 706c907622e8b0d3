//! What comes from device processes: packets, and their ends.

use super::join::Stage;
use super::slips::Slip;
use super::state::{Allowance, Device, Standing, State};
use super::supervision::Recovery;
use crate::device::{Message as DeviceActorMessage, ProcessEvent};
use crate::error::{GreetingError, ProtocolError};
use crate::events::MachineEvent;
use crate::process::Exit;
use crate::words;
use standstill_protocol::channel::{Received, RecvError, close_at_once};
use standstill_protocol::message::{DeviceEvent, DeviceMessage, Phase};
use standstill_protocol::transition::{
    Answer, Event, HeldReason, Loss, MachineState, ParticipantId,
};

/// How many packets of one socket are read before the others have their turn.
const PACKETS: usize = 64;
/// How many rounds over the ready sockets one message of the actor may take.
const ROUNDS: usize = 16;

impl State {
    /// Reads what there is to read, in turns, so that one that floods delays nobody for long.
    pub(super) fn readable(&mut self) {
        if self.read_ready() {
            if !self.slips.is(Slip::ForgetsToWatch) {
                self.poll.drained();
            }
        } else {
            // Others may have something to say to this actor; then it goes on.
            let _ = self.myself.cast(super::Message::Readable);
        }
    }

    /// False if there is more to read than there was time for.
    pub(super) fn read_ready(&mut self) -> bool {
        for round in 0..ROUNDS {
            let ready = self.poll.ready();
            if ready.is_empty() {
                return true;
            }
            // Nearly always one answer is all that there is, and asking for a second one is a system
            // call for each device: the poll says if there is more. Whoever has a long queue all the
            // same is read in larger steps.
            let packets = if round < ROUNDS / 2 { 1 } else { PACKETS };
            for id in ready {
                self.drain(id, packets);
            }
        }
        false
    }

    /// Reads up to that many packets of a device process.
    fn drain(&mut self, id: ParticipantId, packets: usize) {
        for _ in 0..packets {
            let Some(device) = self.device(id) else { return };
            let Some(channel) = &device.channel else { return };
            let received = match channel.try_recv() {
                Ok(None) => return,
                Ok(Some(received)) => Ok(received),
                Err(error) => Err(error),
            };
            let result = match received {
                Ok(received) if !device.allowance.came() => {
                    received.fds.into_iter().for_each(close_at_once);
                    Err(ProtocolError::Flood(Allowance::LIMIT))
                }
                Ok(received) => self.received(id, received),
                Err(RecvError::Disconnected) => {
                    self.disconnected(id);
                    return;
                }
                Err(error) => Err(ProtocolError::Packet(error)),
            };
            if let Err(error) = result {
                self.broke_protocol(id, error);
                return;
            }
        }
    }

    fn received(
        &mut self,
        id: ParticipantId,
        received: Received<DeviceMessage>,
    ) -> Result<(), ProtocolError> {
        let Received { message, fds } = received;
        let present = self.term;
        let Some(device) = self.device(id) else { return Ok(()) };
        device.care.pulse.heard();
        let greeting = device.standing == Standing::Greeting;
        let greeted =
            device.care.join.as_ref().is_some_and(|join| matches!(join.stage, Stage::Greeted(..)));
        let unexpected = |what, expected| Err(ProtocolError::Unexpected { what, expected });
        match message {
            DeviceMessage::Hello(hello) if greeting && !greeted => {
                self.hello(id, words::hello(hello), fds);
            }
            DeviceMessage::Hello(_) => {
                fds.into_iter().for_each(close_at_once);
                return unexpected("a second Hello", "an answer");
            }
            _ if greeted => return unexpected("something", "nothing before its Welcome"),
            _ if greeting => return unexpected("something else", "a Hello"),
            DeviceMessage::Reached(reached) => {
                let event = Event::Answer {
                    from: id,
                    term: reached.term,
                    epoch: reached.epoch,
                    phase: reached.phase,
                    state: reached.state,
                    answer: Answer::Reached,
                };
                if reached.term == present {
                    self.lease_answered(id, reached.epoch, reached.phase, reached.state);
                }
                if let Some(active) = &mut self.active
                    && reached.term == self.term
                {
                    active.recorder.reached(id, reached);
                }
                self.feed(event);
            }
            DeviceMessage::Refused(refused) => {
                let event = Event::Answer {
                    from: id,
                    term: refused.term,
                    epoch: refused.epoch,
                    phase: refused.phase,
                    state: refused.state,
                    answer: Answer::Refused,
                };
                if refused.term == present {
                    self.lease_answered(id, refused.epoch, refused.phase, refused.state);
                }
                if let Some(active) = &mut self.active
                    && refused.term == self.term
                {
                    active.recorder.refused(id, words::refused(refused));
                }
                self.feed(event);
            }
            DeviceMessage::Status(status) => {
                self.settled(id);
                let answer = Answer::Status { moving_to: status.moving_to };
                // A status belongs to no phase; the transition does not look at it.
                let phase = Phase::PrepareStop;
                let (term, epoch, state) = (status.term, status.epoch, status.state);
                self.feed(Event::Answer { from: id, term, epoch, phase, state, answer });
            }
            DeviceMessage::MemoryAccepted(accepted) => {
                self.memory_accepted(id, accepted.sequence);
            }
            DeviceMessage::Heartbeat(heartbeat) => {
                device.progress = heartbeat.progress;
                device.dropped_logs = heartbeat.dropped_logs;
                device.care.pulse.heartbeat(&heartbeat);
            }
            DeviceMessage::Event(DeviceEvent::Superseded(term)) => {
                return self.device_superseded(term);
            }
            DeviceMessage::Event(DeviceEvent::LeaseExpired(state)) => {
                return self.lease_expired(id, state);
            }
            DeviceMessage::Event(event) => self.tell_event(id, words::event(event)),
        }
        Ok(())
    }

    /// What a device tells, and nothing is decided by.
    pub(super) fn tell_event(&mut self, id: ParticipantId, event: DeviceEvent) {
        let Some(device) = self.device(id) else { return };
        let Some(left_out) = device.tellings.tell() else { return };
        let device = device.spec.name.clone();
        if left_out > 0 {
            tracing::warn!(device, left_out, "it tells too much: events are left out");
        }
        self.emit(MachineEvent::Device { device, event });
    }

    fn broke_protocol(&mut self, id: ParticipantId, error: ProtocolError) {
        let Some(device) = self.device(id) else { return };
        tracing::warn!(
            device = device.spec.name,
            error = &error as &dyn std::error::Error,
            "broke the protocol"
        );
        if device.standing == Standing::Greeting {
            self.close(id);
            self.greeting_failed(id, GreetingError::Protocol(error));
        } else {
            self.lost(id, Loss::Protocol, error.to_string());
        }
    }

    /// Everything that it had sent was read, and there will be no more.
    fn disconnected(&mut self, id: ParticipantId) {
        self.close(id);
        let Some(device) = self.device(id) else { return };
        match device.standing {
            Standing::Greeting => self.greeting_failed(id, GreetingError::Disconnected),
            Standing::Ready | Standing::Joining => {
                self.lost(id, Loss::Disconnected, Loss::Disconnected.to_string());
            }
            Standing::Lost(..) | Standing::Fenced(_) | Standing::Leaving => {}
        }
    }

    pub(super) fn close(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        let takes_fds = device.standing == Standing::Greeting;
        let Some(channel) = device.channel.take() else { return };
        self.poll.remove(&channel);
        if takes_fds {
            self.poll.close_apart(channel);
        }
    }

    /// A device process does not count any more.
    pub(super) fn lost(&mut self, id: ParticipantId, why: Loss, text: String) {
        let member =
            self.active.as_ref().is_some_and(|active| active.transition.state(id).is_some());
        let counts =
            |device: &mut Device| matches!(device.standing, Standing::Ready | Standing::Joining);
        let counted = self.device(id).is_some_and(counts);
        let heedless = self.slips.is(Slip::KillsWhatIsAnothers);
        if !counted || self.ending.is_some() || !heedless && self.is_superseded() {
            self.close(id);
            return;
        }
        // A record that cannot be read forbids it: the machine may be another one's.
        let may_kill = heedless || self.custody().is_none_or(|custody| custody.check().is_ok());
        let Some(device) = self.device(id) else { return };
        if !matches!(why, Loss::Exited | Loss::Disconnected)
            && may_kill
            && let Some(process) = &device.process
        {
            // Before it can see the end of its channel: its exit is to tell of the fence that
            // follows, not of an orphan that has ended by itself.
            process.kill();
        }
        self.close(id);
        let Some(device) = self.device(id) else { return };
        device.standing = Standing::Lost(why, text.clone());
        self.unsettled = true;
        self.memory_lost(id, &text);
        if self.starting.is_some() {
            // Nobody would miss it: the others' greetings are all that is waited for.
            self.greeting_failed(id, GreetingError::Lost(text));
        } else if member {
            self.tell_loss(id, why, &text);
            self.feed(Event::Lost(id, why));
        } else {
            self.fence_outside(id, why, &text);
        }
    }

    pub(super) fn process_event(&mut self, id: ParticipantId, event: ProcessEvent) {
        match event {
            ProcessEvent::Exited(exit) => {
                // Its last answers count: they were sent before it ended.
                if !self.slips.is(Slip::ForgetsLastAnswers) {
                    self.drain(id, usize::MAX);
                }
                // Whoever took the machine over may have ended it.
                if self.is_superseded() {
                    return;
                }
                self.exited(id, exit);
                let Some(device) = self.device(id) else { return };
                match device.standing {
                    Standing::Greeting => {
                        self.close(id);
                        self.greeting_failed(id, GreetingError::Exited(exit));
                    }
                    Standing::Leaving => device.tell(DeviceActorMessage::Fence),
                    _ => self.lost(id, Loss::Exited, format!("its process ended: {exit}")),
                }
            }
            ProcessEvent::Fenced { exit, locks } => self.fenced(id, exit, locks),
            ProcessEvent::Gone => self.process_gone(id),
            ProcessEvent::Superseded(term) => self.superseded(term),
        }
    }

    /// A process ended; whoever listens is told once.
    fn exited(&mut self, id: ParticipantId, exit: Exit) {
        let Some(device) = self.device(id) else { return };
        if device.exit.replace(exit).is_none() {
            let (device, incarnation) = (device.spec.name.clone(), device.incarnation);
            self.emit(MachineEvent::DeviceExited { device, incarnation, exit });
        }
    }

    fn fenced(&mut self, id: ParticipantId, exit: Exit, locks: usize) {
        // The fence may have seen it first.
        self.exited(id, exit);
        let Some(device) = self.devices.get_mut(id) else { return };
        if let Some(tracking) = &self.tracking {
            tracking.gone(id, device.standing == Standing::Leaving);
        }
        let why = match std::mem::replace(&mut device.standing, Standing::Greeting) {
            Standing::Lost(_, why) | Standing::Fenced(why) => why,
            Standing::Leaving => "it was removed".to_owned(),
            Standing::Greeting | Standing::Joining | Standing::Ready => Loss::Exited.to_string(),
        };
        device.standing = Standing::Fenced(why);
        if matches!(device.care.recovery, Recovery::Unproven) {
            device.care.recovery = Recovery::Undecided;
        }
        let (name, incarnation) = (device.spec.name.clone(), device.incarnation);
        self.unsettled = true;
        if let Some(active) = &mut self.active {
            let proof = match locks {
                0 => exit.to_string(),
                _ => format!("{exit}, {locks} backing files unlocked"),
            };
            active.recorder.fenced(id, proof);
        }
        self.emit(MachineEvent::DeviceFenced { device: name, incarnation, exit, locks });
        self.feed(Event::Fenced(id));
        self.proven(|reason| *reason == HeldReason::FenceUnproven(id));
    }

    /// What was not proven is proven now; when all is, a held machine counts as stopped.
    pub(super) fn proven(&mut self, which: impl Fn(&HeldReason) -> bool) {
        // A transition of the owner says at its end what is left; that of a newcomer does not.
        let decided_later = self.active.as_ref().is_some_and(|a| !a.purpose.is_internal());
        if self.machine == MachineState::Held && !decided_later {
            self.held.retain(|reason| !which(reason));
            if self.held.is_empty() {
                self.machine = MachineState::Stopped;
                self.emit(MachineEvent::HoldEnded { by_owner: false });
                self.unsettled = true;
            }
        }
    }
}
