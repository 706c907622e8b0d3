//! What one device process sends, whatever it is, into the coordinator actor: for a fuzz target.
//!
//! A machine has two devices. `honest` is a device as it should be, and does at once what it is
//! told. `hostile` sends what it is given. Both have real control sockets; nothing runs by itself,
//! and no process or thread is started, so a run takes well under a millisecond and comes out the
//! same each time.
//!
//! ```ignore
//! use standstill_coordinator::packets::{Ask, Step, run};
//!
//! let steps = [
//!     Step::Greet,                                // or the bytes of a Hello as a Packet
//!     Step::Ask(Ask::Pause),                      // the owner pauses the machine
//!     Step::Packet { bytes: &input, fds: 2 },     // any bytes, with that many fds
//!     Step::Alarm,                                // the next deadline passes
//! ];
//! run(steps);
//! ```
//!
//! [`run`] panics when something is wrong: a call of the owner that is not answered, a device beside
//! the hostile one that comes to harm, or a coordinator that does not end.

use super::super::Message;
pub use super::calls::Ask;
use super::calls::Call;
use super::{Asked, Device, Script, ScriptedActor, Started, process};
use crate::description::{DeviceSpec, MachineBuilder};
use crate::device::{Message as ToProcess, ProcessEvent};
use crate::events::MachineEvent;
use crate::machine::Machine;
use crate::process::Exit;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use standstill_protocol::message::{DeviceMessage, Term};
use standstill_protocol::transition::ParticipantId;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use tokio::sync::broadcast;

/// One thing that happens.
#[derive(Clone, Debug)]
pub enum Step<'a> {
    /// The hostile device says Hello as a device should.
    Greet,
    /// It sends these bytes as one packet, with that many file descriptors: memfds and `/dev/null`
    /// by turns.
    Packet {
        /// The packet.
        bytes: &'a [u8],
        /// How many fds go with it; the kernel takes 253 at most.
        fds: u8,
    },
    /// It sends that message, in good form; without fds.
    Message(DeviceMessage),
    /// It does what it was told so far, as a device should.
    Obey,
    /// It closes its end of the control channel.
    Close,
    /// Its process ends.
    Exit,
    /// The owner asks for something. Device 0 is the hostile one, 1 the honest one.
    Ask(Ask),
    /// The next deadline passes.
    Alarm,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ran {
    /// How many messages the actor has handled.
    pub messages: usize,
    /// How often the hostile device was fenced.
    pub fenced: usize,
}

const HOSTILE: &str = "hostile";
const HONEST: &str = "honest";
/// More messages than any end of a machine takes.
const PATIENCE: usize = 20_000;

/// Plays the steps, then lets the machine come to its end.
///
/// # Panics
///
/// If something is wrong; see the module's documentation. Also if the system has no more fds.
pub fn run<'a>(steps: impl IntoIterator<Item = Step<'a>>) -> Ran {
    let mut world = World::new();
    for step in steps {
        world.take(step);
        world.settle();
    }
    world.finish()
}

/// One process: the device, and what its actor knows.
struct Process {
    device: Device,
    incarnation: Option<ParticipantId>,
    alive: bool,
    obeys: bool,
}

struct World {
    actor: ScriptedActor,
    script: Script,
    started: Started,
    machine: Option<Machine>,
    processes: Vec<Process>,
    events: broadcast::Receiver<MachineEvent>,
    calls: Vec<Call>,
    /// The owner has asked for the end of the honest device.
    honest_may_go: bool,
    ran: Ran,
}

impl World {
    fn new() -> Self {
        let builder = MachineBuilder::new("fuzzed")
            .device(DeviceSpec::new(HOSTILE, "scripted").optional())
            .device(DeviceSpec::new(HONEST, "scripted"));
        let events = builder.events.subscribe();
        let script = Script::new();
        let begun = ScriptedActor::start(builder, None, &script);
        let (actor, devices, started) = begun.expect("sockets for two devices");
        let process = |device: Device| {
            let obeys = device.name == HONEST;
            Process { device, incarnation: None, alive: true, obeys }
        };
        let processes = devices.into_iter().map(process).collect();
        let mut world = Self {
            actor,
            script,
            started,
            machine: None,
            processes,
            events,
            calls: Vec::new(),
            honest_may_go: false,
            ran: Ran::default(),
        };
        world.greet(1);
        world.settle();
        world
    }

    /// The number of the hostile device's present process.
    fn hostile(&self) -> usize {
        let last = self.processes.iter().rposition(|process| process.device.name == HOSTILE);
        last.unwrap_or_default()
    }

    fn greet(&mut self, number: usize) {
        let file = u64::try_from(number).unwrap_or_default();
        self.processes[number].device.greet(file);
    }

    fn take(&mut self, step: Step<'_>) {
        let number = self.hostile();
        match step {
            Step::Greet => self.greet(number),
            Step::Packet { bytes, fds } => self.send(number, bytes, fds),
            Step::Message(message) => self.processes[number].device.send(&message),
            Step::Obey => self.obey(number),
            Step::Close => self.processes[number].device.close(),
            Step::Exit => self.kill(number, Exit::Code(1)),
            Step::Ask(ask) => self.ask(ask),
            Step::Alarm => drop(self.time_passes()),
        }
        self.actor.watch();
    }

    fn ask(&mut self, ask: Ask) {
        let Some(machine) = &self.machine else { return };
        if matches!(ask, Ask::GoOn | Ask::GiveUp) {
            return self.calls.iter().for_each(|call| call.decide(ask == Ask::GoOn));
        }
        let name = match ask {
            Ask::Restart(device) | Ask::Remove(device) if device % 2 == 0 => HOSTILE,
            Ask::Add => HOSTILE,
            _ => HONEST,
        };
        self.honest_may_go |= matches!(ask, Ask::Remove(_)) && name == HONEST;
        self.honest_may_go |= ask == Ask::Shutdown;
        self.calls.push(Call::new(machine, ask, name.to_owned()));
    }

    /// Sends a packet as it is.
    fn send(&self, number: usize, bytes: &[u8], fds: u8) {
        let Some(end) = self.processes[number].device.end() else { return };
        let files: Vec<OwnedFd> = (0..fds).filter_map(|at| file(at % 2 == 0)).collect();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(256))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&files)) {
            return;
        }
        // A packet that the kernel does not take is one that was not sent.
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = sendmsg(end, &[IoSlice::new(bytes)], &mut control, flags);
    }

    /// The next deadline passes; false if there is none.
    fn time_passes(&mut self) -> bool {
        for process in self.processes.iter_mut().filter(|process| process.obeys) {
            // The handshake has no heartbeats.
            if process.device.lifecycle.term() > Term(0) {
                process.device.heartbeat();
            }
        }
        self.script.go_off()
    }

    /// A device does all that it was told.
    fn obey(&mut self, number: usize) {
        let device = &mut self.processes[number].device;
        while device.read().is_some() || device.arc.is_some() {
            device.end_arc(None);
        }
        if device.ended {
            self.kill(number, Exit::Code(0));
        }
    }

    /// A process ends.
    fn kill(&mut self, number: usize, exit: Exit) {
        let process = &mut self.processes[number];
        process.device.close();
        if std::mem::take(&mut process.alive)
            && let Some(id) = process.incarnation
        {
            let _ = self.script.cast(Message::Process(id, ProcessEvent::Exited(exit)));
            let _ = self.script.cast(Message::Process(id, ProcessEvent::Gone));
        }
    }

    /// Everything happens that nobody decides about.
    fn settle(&mut self) {
        loop {
            if let Ok(started) = self.started.try_recv() {
                self.machine = started.ok();
            }
            self.calls.retain_mut(|call| call.answer().is_none());
            self.check();
            self.serve();
            for number in 0..self.processes.len() {
                self.processes[number].device.collect();
                if self.processes[number].obeys {
                    self.obey(number);
                }
            }
            self.actor.watch();
            if !self.actor.handle(|_| {}) {
                return;
            }
            self.ran.messages += 1;
        }
    }

    /// What the coordinator has asked for.
    fn serve(&mut self) {
        let killed = || Exit::Signal { signal: 9, core_dumped: false };
        for asked in self.script.asked() {
            match asked {
                Asked::Begun(number, id) => self.processes[number].incarnation = Some(id),
                Asked::Told(number, ToProcess::Fence) => {
                    self.kill(number, killed());
                    if let Some(id) = self.processes[number].incarnation {
                        let fenced = ProcessEvent::Fenced { exit: killed(), locks: 0 };
                        let _ = self.script.cast(Message::Process(id, fenced));
                    }
                }
                Asked::Told(number, ToProcess::Kill) | Asked::Killed(number) => {
                    self.kill(number, killed());
                }
                Asked::Told(number, ToProcess::Expect(grace)) => {
                    self.script.kill_after(grace, number);
                }
                Asked::Told(..) | Asked::LetGo(_) => {}
                Asked::Start(id, next, name) => {
                    let number = self.processes.len();
                    let made = process(&self.script, number, &name);
                    let (spawned, device) = made.expect("sockets for a device");
                    let obeys = name == HONEST;
                    let process = Process { device, incarnation: None, alive: true, obeys };
                    self.processes.push(process);
                    if obeys {
                        self.greet(number);
                    }
                    let _ = self.script.cast(Message::Spawned(id, next, Ok(spawned)));
                }
            }
        }
    }

    fn check(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            let (lost, fenced) = match &event {
                MachineEvent::DeviceLost { device, .. } => (device == HONEST, false),
                MachineEvent::DeviceFenced { device, .. } => (false, device == HOSTILE),
                _ => (false, false),
            };
            self.ran.fenced += usize::from(fenced);
            assert!(!lost || self.honest_may_go, "the honest device comes to harm: {event:?}");
        }
        for process in &self.processes {
            let wrong = process.device.wrong.as_ref().filter(|_| process.obeys);
            assert!(wrong.is_none(), "the honest device was told what it must not be: {wrong:?}");
        }
        let queue = self.actor.state.as_ref().map_or(0, |state| state.queue.len());
        assert!(queue <= 64, "{queue} requests wait");
    }

    /// Time runs on: every call is answered, and then the machine ends.
    fn finish(mut self) -> Ran {
        self.settle();
        self.ask(Ask::GiveUp);
        self.until("every call is answered", |world| world.calls.is_empty());
        self.ask(Ask::Shutdown);
        if self.machine.is_some() {
            self.until("the machine ends", |world| world.actor.state.is_none());
        }
        self.until("the owner knows that it has ended", |world| world.calls.is_empty());
        self.ran
    }

    fn until(&mut self, what: &str, is: impl Fn(&Self) -> bool) {
        for _ in 0..PATIENCE {
            self.settle();
            if is(self) {
                return;
            }
            if !self.time_passes() {
                self.settle();
                break;
            }
        }
        let left: Vec<_> = self.calls.iter().map(|call| call.ask).collect();
        assert!(is(self), "it does not come to pass that {what}; asked and not answered: {left:?}");
    }
}

/// Something to send: an empty memfd, or `/dev/null`. `None` if there is no more of it.
fn file(memory: bool) -> Option<OwnedFd> {
    if memory {
        return memfd_create("file", MemfdFlags::CLOEXEC).ok();
    }
    std::fs::File::open("/dev/null").ok().map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use standstill_protocol::message::{DeviceEvent, Heartbeat, MAX_FDS, MemoryAccepted};
    use standstill_protocol::migration::MigrationState;

    fn heartbeat() -> Step<'static> {
        let (sequence, progress, pending, dropped_logs) = (1, 0, false, 0);
        let beat = Heartbeat { sequence, progress, pending, dropped_logs };
        Step::Message(DeviceMessage::Heartbeat(beat))
    }

    #[test]
    fn a_device_that_behaves_is_left_alone() {
        let pause = [Step::Greet, Step::Ask(Ask::Pause), Step::Obey, Step::Obey];
        let resume = [Step::Ask(Ask::Resume), Step::Obey, Step::Obey, heartbeat()];
        let ran = run(pause.into_iter().chain(resume));
        // It was not told to obey the shutdown: it is killed for that, which needs no proof.
        assert_eq!(ran.fenced, 0);
        assert!(ran.messages > 10, "{ran:?}");
    }

    #[test]
    fn a_device_that_sends_what_no_device_sends_is_fenced_and_the_other_one_is_not() {
        let too_many = u8::try_from(MAX_FDS + 1).unwrap();
        let packets: [(&[u8], u8); 6] =
            [(b"", 0), (b"x", 0), (b"x", 1), (b"", too_many), (&[0xff; 8192], 0), (&[0; 64], 200)];
        for asks in [&[][..], &[Ask::Pause], &[Ask::DeclareRam, Ask::Pause, Ask::Status]] {
            for (bytes, fds) in packets {
                let asked = asks.iter().map(|&ask| Step::Ask(ask));
                let hostile = [Step::Packet { bytes, fds }, Step::Alarm, Step::Ask(Ask::Resume)];
                let ran = run([Step::Greet].into_iter().chain(asked).chain(hostile));
                assert_eq!(ran.fenced, 1, "{bytes:?} with {fds} fds");
            }
        }
    }

    #[test]
    fn whatever_the_owner_asks_for_is_answered_whatever_the_device_does() {
        let asks = [
            Ask::Pause,
            Ask::Resume,
            Ask::PauseInSteps,
            Ask::ResumeInSteps,
            Ask::GoOn,
            Ask::GiveUp,
            Ask::Cancel,
            Ask::AcceptHold,
            Ask::Status,
            Ask::DeclareRam,
            Ask::Add,
            Ask::Restart(0),
            Ask::Remove(0),
            Ask::Remove(1),
            Ask::Shutdown,
        ];
        let does = [Step::Close, Step::Exit, Step::Obey, Step::Alarm, Step::Greet];
        for ask in asks {
            for does in &does {
                for before in [Step::Alarm, Step::Ask(Ask::Pause)] {
                    run([Step::Greet, before.clone(), Step::Obey, Step::Ask(ask), does.clone()]);
                    run([before, Step::Ask(ask), does.clone(), Step::Ask(ask)]);
                }
            }
        }
    }

    #[test]
    fn a_device_whose_lease_runs_out_and_has_none_is_fenced() {
        let expired = |state| Step::Message(DeviceMessage::Event(DeviceEvent::LeaseExpired(state)));
        let stopped = |ask| [Step::Greet, Step::Ask(ask), Step::Obey, Step::Obey];
        for (ask, state, fenced) in [
            (Ask::Pause, MigrationState::RunningP2p, 1),
            (Ask::PauseLeased, MigrationState::RunningP2p, 0),
            // No lease leads there from STOP.
            (Ask::PauseLeased, MigrationState::Running, 1),
            (Ask::PauseLeased, MigrationState::Error, 1),
            // It was told to run by the resume, and changes nothing.
            (Ask::Resume, MigrationState::RunningP2p, 0),
        ] {
            let steps = stopped(ask).into_iter().chain([expired(state), Step::Ask(Ask::Status)]);
            assert_eq!(run(steps).fenced, fenced, "{ask:?}, {state}");
        }
        let twice = [expired(MigrationState::RunningP2p), expired(MigrationState::RunningP2p)];
        let steps = stopped(Ask::PauseLeased).into_iter().chain(twice);
        assert_eq!(run(steps).fenced, 0, "it is not in STOP any more, so it tells nothing new");
    }

    #[test]
    fn a_device_that_floods_is_fenced_and_the_others_are_not() {
        let flood = (0..2000).map(|_| heartbeat());
        let steps = [Step::Greet, Step::Ask(Ask::Pause)].into_iter().chain(flood);
        assert_eq!(run(steps).fenced, 1);
        let accepted = DeviceMessage::MemoryAccepted(MemoryAccepted { sequence: 7 });
        let lies = (0..900).map(|_| Step::Message(accepted.clone()));
        assert_eq!(run([Step::Greet].into_iter().chain(lies)).fenced, 0);
    }
}
