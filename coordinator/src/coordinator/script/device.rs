//! A device process that a test plays: the real [`Lifecycle`] at the real end of a control channel.

use standstill_protocol::channel::{DeviceEnd, RecvError};
use standstill_protocol::lifecycle::{Arc, Effect, Event, Lifecycle};
use standstill_protocol::message::{
    Capabilities, Command, CoordinatorMessage, DeviceMessage, Epoch, Evidence, FileIdentity,
    Heartbeat, Hello, MemoryAccepted, PeerDma, Phase, Reached, Refusal, RefusalKind, Refused, Term,
    Timings, VERSIONS,
};
use standstill_protocol::migration::{Activity, MigrationFlags, MigrationState};
use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use uuid::Uuid;

/// Something that came over the control channel and was not read yet.
#[derive(Clone, Debug)]
pub(in super::super) enum Down {
    Message(CoordinatorMessage),
    /// There will be no more.
    End,
}

/// What the device has answered to a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) struct Answered {
    pub(in super::super) epoch: Epoch,
    pub(in super::super) phase: Phase,
    pub(in super::super) reached: bool,
    pub(in super::super) state: MigrationState,
}

/// A device process.
#[derive(Debug)]
pub(in super::super) struct Device {
    pub(in super::super) name: String,
    /// `None` once it is closed here.
    end: Option<DeviceEnd>,
    pub(in super::super) lifecycle: Lifecycle,
    pub(in super::super) down: VecDeque<Down>,
    /// Every message that it has read.
    pub(in super::super) read: Vec<CoordinatorMessage>,
    /// The arc that it is taking.
    pub(in super::super) arc: Option<Arc>,
    /// What it carries out.
    command: Option<Command>,
    /// What it may physically do: where its last finished arc led.
    pub(in super::super) does: Activity,
    /// The most that it may do by its last answer, until it is started.
    pub(in super::super) promised: Activity,
    pub(in super::super) answers: Vec<Answered>,
    /// The lease that runs.
    #[cfg_attr(
        not(any(test, fuzzing)),
        expect(dead_code, reason = "only schedules let leases run out")
    )]
    pub(in super::super) lease: Option<Epoch>,
    /// Where it stood when its lease ran out, until the coordinator says that it knows. It hears of that
    /// before any answer that comes later.
    #[cfg_attr(
        not(any(test, fuzzing)),
        expect(dead_code, reason = "only schedules let leases run out")
    )]
    pub(in super::super) stood: Option<MigrationState>,
    /// It has ended by itself.
    pub(in super::super) ended: bool,
    /// What a rule of its own was broken by.
    pub(in super::super) wrong: Option<String>,
    /// The files of its memory BARs.
    memory: Vec<FileIdentity>,
    heartbeats: u64,
}

impl Device {
    /// A process that has not said anything yet; the fd is its standard input.
    pub(super) fn new(name: &str, stdin: OwnedFd) -> io::Result<Self> {
        let end = DeviceEnd::from_fd(stdin).map_err(io::Error::other)?;
        Ok(Self {
            name: name.to_owned(),
            end: Some(end),
            lifecycle: Lifecycle::new(MigrationFlags::ALL),
            down: VecDeque::new(),
            read: Vec::new(),
            arc: None,
            command: None,
            does: Activity::Full,
            promised: Activity::Full,
            answers: Vec::new(),
            lease: None,
            stood: None,
            ended: false,
            wrong: None,
            memory: Vec::new(),
            heartbeats: 0,
        })
    }

    /// It is connected.
    #[cfg(test)]
    pub(in super::super) fn is_open(&self) -> bool {
        self.end.is_some()
    }

    /// Its end of the control channel.
    pub(super) fn end(&self) -> Option<&DeviceEnd> {
        self.end.as_ref()
    }

    /// Its process is gone, and with it all that it has open.
    pub(in super::super) fn close(&mut self) {
        self.end = None;
        self.down.clear();
    }

    /// The most that it may be doing now; an arc counts with both its ends.
    pub(in super::super) fn may_do(&self) -> Activity {
        self.arc.map_or(self.does, |arc| self.does.max(arc.after))
    }

    /// What it is and can, as it is now.
    pub(in super::super) fn hello(&self, machine: Option<Uuid>) -> Hello {
        Hello {
            versions: VERSIONS,
            kind: "scripted".to_owned(),
            program_version: "1".to_owned(),
            capabilities: Capabilities {
                migration: MigrationFlags::ALL,
                peer_dma: PeerDma::Possible,
                progress: false,
                dirty_tracking: false,
                fault_injection: false,
            },
            machine,
            term: self.lifecycle.term(),
            epoch: self.lifecycle.epoch(),
            state: self.lifecycle.state(),
            backing_files: 0,
            memory: self.memory.clone(),
        }
    }

    /// Says Hello.
    pub(in super::super) fn greet(&mut self, file: u64) {
        self.memory = vec![FileIdentity { device: 1, inode: file }];
        let hello = self.hello(None);
        self.send(&DeviceMessage::Hello(hello));
    }

    /// Sends a message, if the coordinator still hears it.
    pub(in super::super) fn send(&self, message: &DeviceMessage) {
        if let Some(end) = &self.end {
            // One that does not read any more is one that has closed its end.
            let _ = end.try_send(message, &[]);
        }
    }

    /// Gives a sign of life.
    pub(in super::super) fn heartbeat(&mut self) {
        self.heartbeats += 1;
        let sequence = self.heartbeats;
        let beat = Heartbeat { sequence, progress: 0, pending: false, dropped_logs: 0 };
        self.send(&DeviceMessage::Heartbeat(beat));
    }

    /// Takes what has come over the control channel; it is read later. Returns how much it was.
    pub(in super::super) fn collect(&mut self) -> usize {
        let Some(end) = &self.end else { return 0 };
        let before = self.down.len();
        loop {
            match end.try_recv() {
                Ok(None) => break,
                Ok(Some(received)) => {
                    if let CoordinatorMessage::Welcome(welcome) = &received.message {
                        end.set_version(welcome.version);
                    }
                    self.down.push_back(Down::Message(received.message));
                }
                Err(error) => {
                    if !matches!(error, RecvError::Disconnected) {
                        self.wrong = Some(format!("it cannot read what it was sent: {error}"));
                    }
                    self.down.push_back(Down::End);
                    self.end = None;
                    break;
                }
            }
        }
        self.down.len() - before
    }

    /// Reads the next message. Returns what it was.
    pub(in super::super) fn read(&mut self) -> Option<Down> {
        let down = self.down.pop_front()?;
        match &down {
            Down::End => self.step(Event::Disconnected),
            Down::Message(message) => {
                self.read.push(message.clone());
                let changed = self.hear(message);
                if term_of(message).is_some_and(|term| term < self.lifecycle.term()) && changed {
                    self.wrong = Some(format!("it obeys a lower term: {message:?}"));
                }
            }
        }
        Some(down)
    }

    /// A message that it has read comes once more.
    #[cfg(test)]
    pub(in super::super) fn read_again(&mut self, which: usize) {
        let Some(message) = self.read.get(which % self.read.len().max(1)).cloned() else { return };
        // A query is answered as often as it comes; memory is not the lifecycle's.
        let counts = matches!(
            message,
            CoordinatorMessage::Welcome(_)
                | CoordinatorMessage::Command(_)
                | CoordinatorMessage::Abort(_)
        );
        if counts && self.hear(&message) {
            self.wrong = Some(format!("a message that comes again changes something: {message:?}"));
        }
    }

    /// True if it was more than dropped.
    fn hear(&mut self, message: &CoordinatorMessage) -> bool {
        let before = self.lifecycle.clone();
        let event = match message {
            CoordinatorMessage::Welcome(welcome) => {
                Event::Welcome { term: welcome.term, epoch: welcome.epoch, orphan: welcome.orphan }
            }
            CoordinatorMessage::Command(command) => Event::Command(*command),
            CoordinatorMessage::Abort(abort) => Event::Abort(*abort),
            CoordinatorMessage::Query(query) => Event::Query(*query),
            CoordinatorMessage::Shutdown(shutdown) => Event::Shutdown(shutdown.term),
            CoordinatorMessage::Memory(memory) => {
                let sequence = memory.sequence;
                self.send(&DeviceMessage::MemoryAccepted(MemoryAccepted { sequence }));
                return false;
            }
            CoordinatorMessage::Revoke(revocation) => {
                let sequence = revocation.sequence;
                self.send(&DeviceMessage::MemoryAccepted(MemoryAccepted { sequence }));
                return false;
            }
            _ => return false,
        };
        self.step(event);
        before != self.lifecycle
    }

    /// The arc that is being taken ends: well; or it fails, and the device is back where it began
    /// or in ERROR.
    pub(in super::super) fn end_arc(&mut self, failure: Option<bool>) {
        let Some(arc) = self.arc.take() else { return };
        match failure {
            None => {
                self.does = arc.after;
                self.step(Event::ArcDone);
            }
            Some(restored) => {
                if !restored {
                    self.does = Activity::Stopped;
                }
                let text = "as the test wants".to_owned();
                let refusal = Refusal { kind: RefusalKind::Device, text };
                self.step(Event::ArcFailed { refusal, restored });
            }
        }
    }

    /// Its lease runs out.
    #[cfg(test)]
    pub(in super::super) fn lease_expires(&mut self) {
        let Some(epoch) = self.lease.take() else { return };
        self.stood = Some(self.lifecycle.state());
        self.promised = Activity::NoPeer;
        // What a lease leads to is nobody's command.
        self.command = None;
        self.step(Event::LeaseExpired(epoch));
    }

    /// Where it is, as far as a coordinator can know.
    #[cfg(test)]
    pub(in super::super) fn known(&self) -> MigrationState {
        self.stood.unwrap_or(self.lifecycle.state())
    }

    /// Another coordinator has it.
    #[cfg(test)]
    pub(in super::super) fn welcome(&mut self, term: Term) {
        let orphan = standstill_protocol::message::OrphanPolicy::Keep;
        self.step(Event::Welcome { term, epoch: Epoch(0), orphan });
    }

    fn step(&mut self, event: Event) {
        for effect in self.lifecycle.step(event) {
            self.carry_out(effect);
        }
        if self.may_do() > self.promised {
            self.wrong =
                Some(format!("it does {:?} and has promised {:?}", self.may_do(), self.promised));
        }
    }

    fn carry_out(&mut self, effect: Effect) {
        match effect {
            Effect::ArmLease(_, epoch) => self.lease = Some(epoch),
            Effect::DisarmLease => self.lease = None,
            Effect::Begin(command) => {
                self.command = Some(command);
                if matches!(command.phase, Phase::PrepareStart | Phase::Start) {
                    self.promised = Activity::Full;
                }
            }
            Effect::Arc(arc) => {
                let foreign = |command: Command| command.term < self.lifecycle.term();
                if self.command.is_some_and(foreign) {
                    self.wrong = Some("it goes on with what a lower term wanted".to_owned());
                }
                self.arc = Some(arc);
            }
            Effect::Reached(command, state) => {
                self.promised = match command.phase {
                    Phase::PrepareStop => Activity::NoPeer.min(self.promised),
                    Phase::Stop => Activity::Stopped,
                    _ => self.promised,
                };
                self.answered(command, state, true);
                let Command { term, epoch, phase, .. } = command;
                let (timings, evidence) = (Timings::default(), Evidence::default());
                let reached = Reached { term, epoch, phase, state, timings, evidence };
                self.send(&DeviceMessage::Reached(reached));
            }
            Effect::Refused(command, state, refusal) => {
                self.answered(command, state, false);
                let Command { term, epoch, phase, .. } = command;
                self.send(&DeviceMessage::Refused(Refused { term, epoch, phase, state, refusal }));
            }
            Effect::Status(status) => self.send(&DeviceMessage::Status(status)),
            Effect::Notify(event) => self.send(&DeviceMessage::Event(event)),
            Effect::Exit(_) => self.ended = true,
            _ => {}
        }
    }

    fn answered(&mut self, command: Command, state: MigrationState, reached: bool) {
        let Command { term, epoch, phase, .. } = command;
        if term < self.lifecycle.term() {
            self.wrong = Some(format!("it answers a lower term: {command:?}"));
        }
        let is_there = state == MigrationState::Error || state.activity() == self.does;
        if self.arc.is_some() || !is_there {
            self.wrong = Some(format!(
                "it answers to {phase} that it is in {state}, and does {:?}",
                self.may_do()
            ));
        }
        self.command = None;
        self.answers.push(Answered { epoch, phase, reached, state });
    }
}

/// The term that a message names.
fn term_of(message: &CoordinatorMessage) -> Option<Term> {
    match message {
        CoordinatorMessage::Welcome(welcome) => Some(welcome.term),
        CoordinatorMessage::Command(command) => Some(command.term),
        CoordinatorMessage::Abort(abort) => Some(abort.term),
        _ => None,
    }
}
