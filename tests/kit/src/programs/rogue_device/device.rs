//! The device process: an event loop around a real [`Lifecycle`], and the steps of the script.

use super::Error;
use super::orphan::Orphan;
use super::packet::{heartbeat, send_message, send_packet};
use crate::gate::GateWatch;
use crate::trace::{Entry, TraceWriter};
use crate::{Pulse, Script, Step, Trigger, What};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, getpid, kill_process};
use standstill_protocol::channel::{DeviceEnd, RecvError};
use standstill_protocol::lifecycle::{Effect, Event, Lifecycle, Stale};
use standstill_protocol::message::{
    Capabilities, Command, CoordinatorMessage, DeviceEvent, DeviceMessage, Epoch, Evidence, Hello,
    MemoryAccepted, Reached, Refusal, RefusalKind, Refused, Timings, Welcome,
};
use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

/// How often a device without a coordinator looks whether its test is over.
const LOOK: Duration = Duration::from_millis(500);

/// What the steps that are being done are an answer to.
#[derive(Clone, Copy, Debug)]
enum Cause {
    Hello,
    Welcome,
    Command(Command),
    Memory(u64),
    Shutdown,
}

impl Cause {
    fn trigger(self) -> Trigger {
        match self {
            Self::Hello => Trigger::Hello,
            Self::Welcome => Trigger::Welcome,
            Self::Command(command) => Trigger::Phase(command.phase),
            Self::Memory(_) => Trigger::Memory,
            Self::Shutdown => Trigger::Shutdown,
        }
    }
}

/// What the next step waits for.
enum Wait {
    Until(Instant),
    Gate(GateWatch),
}

/// Steps that are being done.
struct Performance {
    cause: Cause,
    steps: VecDeque<Step>,
    wait: Option<Wait>,
}

/// The device process.
pub(super) struct RogueDevice {
    script: Script,
    /// `None` once it was closed on purpose.
    channel: Option<DeviceEnd>,
    lifecycle: Lifecycle,
    /// When the lease of which stop runs out.
    lease: Option<(Instant, Epoch)>,
    orphan: Orphan,
    trace: Option<TraceWriter>,
    /// What an arc that was begun waits for.
    lingering: Option<GateWatch>,
    seen: HashMap<Trigger, u32>,
    performances: VecDeque<Performance>,
    heartbeat: Option<(Duration, Instant)>,
    heartbeats: u64,
    pulse: Pulse,
    /// The how-manieth process of this device this is, from 1.
    incarnation: u32,
    /// The status to end with.
    end: Option<u8>,
}

/// Writes many lines to standard error.
fn shout(lines: u32, length: u32) -> Result<(), Error> {
    let list = "1,".repeat(usize::try_from(length)?.saturating_sub(10) / 2);
    let line = format!("{{\"a\":[{list}1]}}\n");
    let mut stderr = std::io::stderr().lock();
    for _ in 0..lines {
        stderr.write_all(line.as_bytes())?;
    }
    Ok(())
}

/// How many processes of that name have begun by a trace.
fn began(trace: &Path, name: &str) -> Result<u32, Error> {
    let mut count = 0;
    for line in std::fs::read_to_string(trace)?.lines() {
        // Others may be writing their line just now.
        let Ok(entry) = serde_json::from_str::<Entry>(line) else { continue };
        count += u32::from(entry.who == name && matches!(entry.what, What::Began { .. }));
    }
    Ok(count)
}

impl RogueDevice {
    pub(super) fn new(script: Script, channel: DeviceEnd) -> Result<Self, Error> {
        let open = |path| TraceWriter::open(path, script.name.clone());
        let trace = script.trace.as_deref().map(open).transpose()?;
        let began = script.trace.as_deref().map_or(Ok(0), |path| began(path, &script.name))?;
        let incarnation = began + 1;
        Ok(Self {
            lifecycle: Lifecycle::new(script.migration),
            lease: None,
            orphan: Orphan::default(),
            script,
            channel: Some(channel),
            trace,
            lingering: None,
            seen: HashMap::new(),
            performances: VecDeque::new(),
            heartbeat: None,
            heartbeats: 0,
            pulse: Pulse::Idle,
            incarnation,
            end: None,
        })
    }

    /// Runs until the end; the exit status.
    pub(super) fn run(mut self) -> Result<u8, Error> {
        self.trace(What::Began { pid: std::process::id() });
        self.perform(Cause::Hello);
        loop {
            self.go_on()?;
            if let Some(status) = self.end {
                return Ok(status);
            }
            self.wait()?;
            self.receive()?;
            self.meet_others()?;
            self.beat()?;
            self.keep_lease()?;
        }
    }

    fn trace(&self, what: What) {
        if let Some(trace) = &self.trace {
            trace.write(what);
        }
    }

    /// Begins what is to be done about a message.
    fn perform(&mut self, cause: Cause) {
        let trigger = cause.trigger();
        let nth = self.seen.entry(trigger).or_default();
        *nth += 1;
        let steps = match self.script.steps(self.incarnation, trigger, *nth) {
            Some(steps) => steps.iter().cloned().collect(),
            None => VecDeque::from([Step::Ack]),
        };
        self.performances.push_back(Performance { cause, steps, wait: None });
    }

    /// A newer command or an abort: what was to be answered is answered no more.
    fn overtaken(&mut self) {
        self.performances.retain(|performance| !matches!(performance.cause, Cause::Command(_)));
    }

    /// Does every step that waits for nothing.
    fn go_on(&mut self) -> Result<(), Error> {
        while let Some(performance) = self.performances.front_mut() {
            match &performance.wait {
                Some(Wait::Until(end)) if Instant::now() < *end => return Ok(()),
                Some(Wait::Gate(_)) => return Ok(()),
                Some(Wait::Until(_)) | None => performance.wait = None,
            }
            let cause = performance.cause;
            match performance.steps.pop_front() {
                None => drop(self.performances.pop_front()),
                Some(Step::Delay(time)) => {
                    performance.wait = Some(Wait::Until(Instant::now() + time));
                }
                Some(Step::Hold(gate)) => performance.wait = gate.watch()?.map(Wait::Gate),
                Some(step) => self.step(cause, step)?,
            }
        }
        Ok(())
    }

    #[expect(clippy::print_stderr, reason = "the script says so")]
    fn step(&mut self, cause: Cause, step: Step) -> Result<(), Error> {
        match step {
            Step::Ack => self.acknowledge(cause, None)?,
            Step::Refuse(why) => self.acknowledge(cause, Some(why))?,
            Step::Send(packet) => {
                let command = match &cause {
                    Cause::Command(command) => Some(command),
                    _ => None,
                };
                if let Some(channel) = &self.channel {
                    send_packet(channel, packet, command)?;
                }
            }
            Step::Flood(count) => {
                for _ in 0..count {
                    self.heartbeats += 1;
                    self.send(&heartbeat(self.heartbeats, self.pulse))?;
                }
            }
            Step::Linger(gate) => {
                self.lingering = gate.watch()?;
                self.acknowledge(cause, None)?;
            }
            Step::Pulse(pulse) => self.pulse = pulse,
            Step::Freeze => kill_process(getpid(), Signal::STOP)?,
            Step::Exit(status) => std::process::exit(status),
            Step::Crash => std::process::abort(),
            Step::Disconnect => self.channel = None,
            Step::Say(line) => eprintln!("{line}"),
            Step::Shout { lines, length } => shout(lines, length)?,
            // The caller has done these.
            Step::Delay(_) | Step::Hold(_) => {}
        }
        Ok(())
    }

    fn send(&self, message: &DeviceMessage) -> Result<(), Error> {
        self.channel.as_ref().map_or(Ok(()), |channel| send_message(channel, message))
    }

    /// The honest answer, or a refusal in its place.
    fn acknowledge(&mut self, cause: Cause, refusal: Option<String>) -> Result<(), Error> {
        match cause {
            Cause::Hello => self.channel.as_ref().map_or(Ok(()), |channel| self.hello(channel)),
            Cause::Welcome => Ok(()),
            Cause::Memory(sequence) => {
                self.send(&DeviceMessage::MemoryAccepted(MemoryAccepted { sequence }))
            }
            Cause::Shutdown => {
                self.end = Some(0);
                Ok(())
            }
            Cause::Command(command) => self.feed(Event::Command(command), refusal),
        }
    }

    fn hello(&self, channel: &DeviceEnd) -> Result<(), Error> {
        let file = self.script.backing_file.as_deref().map(File::open).transpose()?;
        let hello = Hello {
            versions: self.script.versions,
            kind: "rogue".into(),
            program_version: env!("CARGO_PKG_VERSION").into(),
            capabilities: Capabilities {
                migration: self.script.migration,
                peer_dma: self.script.peer_dma,
                progress: self.script.progress,
                dirty_tracking: self.script.dirty_tracking,
                // It does what its script says.
                fault_injection: false,
            },
            machine: self.orphan.machine,
            term: self.lifecycle.term(),
            epoch: self.lifecycle.epoch(),
            state: self.lifecycle.state(),
            backing_files: u8::from(file.is_some()),
            memory: self.script.memory.clone(),
        };
        let fds: Vec<_> = file.iter().map(AsFd::as_fd).collect();
        Ok(channel.send(&DeviceMessage::Hello(hello), &fds, Duration::from_secs(10))?)
    }

    /// Lets later coordinators in, and follows one that has a higher term.
    fn meet_others(&mut self) -> Result<(), Error> {
        while let Some(candidate) = self.orphan.accept()? {
            let nth = self.seen.entry(Trigger::Hello).or_default();
            *nth += 1;
            let steps = self.script.steps(self.incarnation, Trigger::Hello, *nth);
            let steps = steps.map(<[Step]>::to_vec);
            for step in steps.unwrap_or_else(|| vec![Step::Ack]) {
                match step {
                    // It may be gone again, which is seen where it is read.
                    Step::Ack => drop(self.hello(&candidate)),
                    Step::Send(packet) => send_packet(&candidate, packet, None)?,
                    Step::Freeze => kill_process(getpid(), Signal::STOP)?,
                    Step::Exit(status) => std::process::exit(status),
                    other => {
                        return Err(format!("not possible in a second Hello: {other:?}").into());
                    }
                }
            }
            self.orphan.candidates.push(candidate);
        }
        for candidate in std::mem::take(&mut self.orphan.candidates) {
            match candidate.try_recv() {
                Ok(None) => self.orphan.candidates.push(candidate),
                Ok(Some(received)) => {
                    if let CoordinatorMessage::Welcome(welcome) = received.message {
                        self.change_coordinator(candidate, &welcome, received.fds)?;
                    }
                }
                // It has changed its mind, or is none.
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn change_coordinator(
        &mut self,
        candidate: DeviceEnd,
        welcome: &Welcome,
        fds: Vec<OwnedFd>,
    ) -> Result<(), Error> {
        candidate.set_version(welcome.version);
        if self.orphan.machine != Some(welcome.machine) {
            return Ok(());
        }
        let superseded = |term| DeviceMessage::Event(DeviceEvent::Superseded(term));
        let Welcome { term, epoch, orphan, .. } = *welcome;
        let effects = self.lifecycle.step(Event::Welcome { term, epoch, orphan });
        if effects.contains(&Effect::Dropped(Stale::Term)) {
            return send_message(&candidate, &superseded(self.lifecycle.term()));
        }
        self.trace(What::TakenOver { term: term.0 });
        self.overtaken();
        // What the earlier one has sent meanwhile is not even read.
        self.send(&superseded(term))?;
        self.channel = Some(candidate);
        self.welcome(welcome, fds)
    }

    /// What a Welcome says besides its term.
    fn welcome(&mut self, welcome: &Welcome, fds: Vec<OwnedFd>) -> Result<(), Error> {
        let interval = Duration::from_nanos(welcome.heartbeat_ns);
        self.heartbeat = (!interval.is_zero()).then(|| (interval, Instant::now() + interval));
        self.orphan.welcome(welcome, fds)?;
        self.perform(Cause::Welcome);
        Ok(())
    }

    /// Feeds the lifecycle and carries out what it says, every arc at once.
    fn feed(&mut self, event: Event, mut refusal: Option<String>) -> Result<(), Error> {
        let mut effects = VecDeque::from(self.lifecycle.step(event));
        while let Some(effect) = effects.pop_front() {
            let next = match effect {
                Effect::Arc(_) if self.lingering.is_some() => None,
                Effect::Arc(_) => Some(match refusal.take() {
                    None => Event::ArcDone,
                    Some(text) => {
                        let refusal = Refusal { kind: RefusalKind::Device, text };
                        Event::ArcFailed { refusal, restored: true }
                    }
                }),
                Effect::WriteStream | Effect::ReadStream => {
                    let text = "a rogue device has no state".into();
                    let refusal = Refusal { kind: RefusalKind::Unsupported, text };
                    Some(Event::StreamFailed(refusal))
                }
                Effect::Reset => Some(Event::ResetDone),
                Effect::Reached(Command { term, epoch, phase, .. }, state) => {
                    self.trace(What::Reached { phase, epoch, state });
                    let (timings, evidence) = (Timings::default(), Evidence::default());
                    let reached = Reached { term, epoch, phase, state, timings, evidence };
                    self.send(&DeviceMessage::Reached(reached))?;
                    None
                }
                Effect::Refused(Command { term, epoch, phase, .. }, state, refusal) => {
                    self.trace(What::Refused { phase, epoch, state });
                    let refused = Refused { term, epoch, phase, state, refusal };
                    self.send(&DeviceMessage::Refused(refused))?;
                    None
                }
                Effect::Status(status) => {
                    self.send(&DeviceMessage::Status(status))?;
                    None
                }
                Effect::Exit(_) => {
                    self.end = Some(0);
                    None
                }
                Effect::ArmLease(ns, epoch) => {
                    self.lease = Some((Instant::now() + Duration::from_nanos(ns), epoch));
                    None
                }
                Effect::DisarmLease => {
                    self.lease = None;
                    None
                }
                Effect::Notify(event) => {
                    self.send(&DeviceMessage::Event(event))?;
                    None
                }
                // Nothing takes time here, and there is no client.
                _ => None,
            };
            if let Some(event) = next {
                effects.extend(self.lifecycle.step(event));
            }
        }
        Ok(())
    }

    /// Waits for the channel, the gate or the time of the next step, or of the next sign of life.
    fn wait(&mut self) -> Result<(), Error> {
        let wait = self.performances.front().and_then(|performance| performance.wait.as_ref());
        let due = match wait {
            Some(Wait::Until(end)) => Some(*end),
            _ => None,
        };
        let next_look = self.channel.is_none().then(|| Instant::now() + LOOK);
        let lease = self.lease.map(|(end, _)| end);
        let others = [self.heartbeat.map(|(_, next)| next), next_look, lease];
        let due = due.into_iter().chain(others.into_iter().flatten()).min();
        let left = due.map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        let channel = self.channel.iter().map(|channel| (channel.as_fd(), PollFlags::IN));
        let gate = match wait {
            Some(Wait::Gate(gate)) => Some((gate.as_fd(), PollFlags::empty())),
            _ => None,
        };
        let others = self.orphan.fds().map(|fd| (fd, PollFlags::IN));
        let lingering = self.lingering.as_ref().map(|gate| (gate.as_fd(), PollFlags::empty()));
        let mut fds: Vec<_> = lingering
            .into_iter()
            .chain(channel)
            .chain(others)
            .chain(gate)
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let opened =
            gate.is_some() && fds.last().is_some_and(|fd| fd.revents().contains(PollFlags::HUP));
        let arrived = lingering.is_some() && fds[0].revents().contains(PollFlags::HUP);
        if opened && let Some(performance) = self.performances.front_mut() {
            performance.wait = None;
        }
        if arrived {
            self.lingering = None;
            self.feed(Event::ArcDone, None)?;
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<(), Error> {
        let Some(channel) = &self.channel else {
            // Whoever waits for another coordinator in vain: its test is over.
            let trace = self.script.trace.as_deref();
            if self.orphan.waits() && trace.is_some_and(|trace| !trace.exists()) {
                self.end = Some(0);
            }
            return Ok(());
        };
        let (message, fds) = match channel.try_recv() {
            Ok(None) => return Ok(()),
            Ok(Some(received)) => (received.message, received.fds),
            Err(RecvError::Disconnected) => {
                self.channel = None;
                if self.orphan.machine.is_none() {
                    self.end = Some(0);
                }
                return self.feed(Event::Disconnected, None);
            }
            Err(error) => return Err(error.into()),
        };
        match message {
            CoordinatorMessage::Welcome(welcome) => {
                channel.set_version(welcome.version);
                let (term, epoch, orphan) = (welcome.term, welcome.epoch, welcome.orphan);
                self.feed(Event::Welcome { term, epoch, orphan }, None)?;
                self.welcome(&welcome, fds)?;
            }
            CoordinatorMessage::Command(command) => {
                let Command { term, phase, epoch, target, .. } = command;
                if term != self.lifecycle.term() {
                    self.trace(What::Stale { term: term.0 });
                    return Ok(());
                }
                self.trace(What::Received { phase, epoch, target });
                self.overtaken();
                self.perform(Cause::Command(command));
            }
            CoordinatorMessage::Abort(abort) => {
                self.trace(What::Aborted { epoch: abort.epoch });
                self.overtaken();
                self.feed(Event::Abort(abort), None)?;
            }
            CoordinatorMessage::Query(query) => self.feed(Event::Query(query), None)?,
            CoordinatorMessage::Memory(memory) => {
                self.trace(What::Memory { sequence: memory.sequence });
                self.perform(Cause::Memory(memory.sequence));
            }
            CoordinatorMessage::Untrack(_) => self.trace(What::Untracked),
            CoordinatorMessage::Shutdown(_) => self.perform(Cause::Shutdown),
            CoordinatorMessage::Revoke(revocation) => {
                self.trace(What::Revoked { sequence: revocation.sequence });
                self.perform(Cause::Memory(revocation.sequence));
            }
            // It was rejected, or sent what it has not said that it takes.
            other => return Err(format!("nothing to go on with: {other:?}").into()),
        }
        Ok(())
    }

    fn beat(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        if let Some((interval, next)) = self.heartbeat
            && next <= now
        {
            self.heartbeat = Some((interval, now + interval));
            self.heartbeats += 1;
            self.send(&heartbeat(self.heartbeats, self.pulse))?;
        }
        Ok(())
    }

    fn keep_lease(&mut self) -> Result<(), Error> {
        match self.lease {
            Some((end, epoch)) if end <= Instant::now() => {
                self.lease = None;
                self.feed(Event::LeaseExpired(epoch), None)
            }
            _ => Ok(()),
        }
    }
}
