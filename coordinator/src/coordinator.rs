//! The coordinator actor: owns the machine and every control socket, and runs transitions.
//!
//! It never waits for another process: requests, packets, process ends, hook returns and deadlines
//! are messages, and each is handled at once. The decisions are those of the pure
//! [`Transition`]; here is the I/O around it.

#[cfg(feature = "fault-injection")]
mod arm;
mod greeting;
mod incarnation;
mod incoming;
mod join;
mod keep;
mod lease;
mod memory;
mod outcome;
mod owner;
mod plan;
mod removal;
mod roster;
#[cfg(test)]
mod schedules;
#[cfg(any(test, fuzzing))]
pub(crate) mod script;
mod shutdown;
mod slips;
mod start;
mod state;
mod superseded;
mod supervision;
mod take_over;
mod tracking;
mod transition;
mod watch;

use crate::description::DeviceSpec;
use crate::device::ProcessEvent;
use crate::dirty::{DirtyOptions, DirtyTracking, Registry};
use crate::error::{MachineError, StartError};
use crate::events::MachineEvent;
use crate::mailbox::Mailbox;
use crate::participant::LocalAnswer;
use crate::process::Exit;
use crate::status::Status;
use ractor::{Actor, ActorProcessingErr, ActorRef, SupervisionEvent};
use standstill_protocol::transition::{HeldReason, MachineState, Operation, ParticipantId, Timer};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

use incarnation::Spawned;
pub(crate) use owner::{Gap, Owner, Step, Ticket};
use slips::Slip;
pub(crate) use start::start;
use state::{Standing, State};
use supervision::Recovery;
pub(crate) use take_over::take_over;

/// How ended device processes are told: by name, `None` where no end was seen.
pub(crate) type Exits = Vec<(String, Option<Exit>)>;
/// Where an owner waits for an answer.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, MachineError>>;

/// What an owner asks of a machine.
#[derive(Debug)]
pub(crate) enum Request {
    /// Move it.
    Transition(Operation, Owner),
    /// Say where it is.
    Status(oneshot::Sender<Status>),
    /// Declare a file to be RAM.
    DeclareRam(OwnedFd, Reply<()>),
    /// Have the devices mark what they write to RAM.
    StartDirtyTracking(DirtyOptions, Reply<DirtyTracking>),
    /// End that.
    StopDirtyTracking(Arc<Registry>, Option<Reply<()>>),
    /// Add a device.
    AddDevice(Box<DeviceSpec>, Reply<()>),
    /// Remove the device of that name.
    RemoveDevice(String, Reply<Option<Exit>>),
    /// Start the lost device of that name again.
    RestartDevice(String, Reply<()>),
    /// Give up what is under way.
    Cancel(oneshot::Sender<()>),
    /// Take what is not proven as it is.
    AcceptHold(Reply<()>),
    /// End every process.
    Shutdown(Duration, Reply<Exits>),
    /// Tell a device what to do wrong.
    #[cfg(feature = "fault-injection")]
    Arm(crate::fault::ArmRequest),
}

/// What the actor handles.
#[derive(Debug)]
pub(crate) enum Message {
    /// The owner asks.
    Request(Request),
    /// The owner of a transition goes on with it, or gives it up.
    Step(Ticket, Step),
    /// Some control socket can be read.
    Readable,
    /// A device process ended, or is proven gone.
    Process(ParticipantId, ProcessEvent),
    /// A local device or a hook returned.
    Local(LocalAnswer),
    /// A deadline of the transition with that number.
    Expired(u64, Timer),
    /// The deadline of the greetings.
    HelloExpired,
    /// The deadline for welcomed devices to show that they outlive this coordinator.
    SettlingExpired,
    /// The deadline of a memory declaration or revocation, for those who have that long.
    MemoryExpired(u64, Duration),
    /// The deadline of a shutdown.
    ShutdownExpired,
    /// For the device whose last incarnation was the first, the process of the second was started,
    /// or could not be.
    Spawned(ParticipantId, ParticipantId, Result<Spawned, Box<StartError>>),
    /// A process that nobody wanted is gone.
    Discarded,
    /// The backoff of a restart is over.
    RestartDue(ParticipantId),
    /// The deadline of a new incarnation's greeting.
    JoinExpired(ParticipantId),
    /// The grace of a fence outside any transition.
    FenceExpired(ParticipantId),
    /// It is time to look for devices that hang.
    Tick,
}

pub(crate) struct CoordinatorActor;

impl Actor for CoordinatorActor {
    type Msg = Message;
    type State = State;
    type Arguments = start::Prepared;

    async fn pre_start(
        &self,
        myself: ActorRef<Message>,
        prepared: start::Prepared,
    ) -> Result<State, ActorProcessingErr> {
        Ok(prepared.into_state(Mailbox::Actor(myself)).await?)
    }

    async fn handle(
        &self,
        _myself: ActorRef<Message>,
        message: Message,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        state.handle(message).await;
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        _myself: ActorRef<Message>,
        event: SupervisionEvent,
        state: &mut State,
    ) -> Result<(), ActorProcessingErr> {
        // The actor's state owned the process and has killed it when it was dropped. What is lost
        // is the proof, so the device stays unproven; its socket's end tells that it is lost.
        if let SupervisionEvent::ActorFailed(actor, error) = event {
            let device = state.device_of_actor(actor.get_id());
            tracing::error!(device, %error, "the actor of a device process failed");
        }
        Ok(())
    }
}

impl Message {
    /// True if something that a device should have sent is waited for no longer.
    fn is_deadline_of_an_answer(&self) -> bool {
        matches!(
            self,
            Self::Expired(..)
                | Self::HelloExpired
                | Self::SettlingExpired
                | Self::MemoryExpired(..)
                | Self::JoinExpired(_)
        )
    }
}

impl State {
    /// Does all that one message is for.
    async fn handle(&mut self, message: Message) {
        let late = self.slips.is(Slip::DecidesBeforeReading);
        if message.is_deadline_of_an_answer() && !late {
            // What has come by now counts: a device does not pay for a coordinator that was busy or
            // asleep. What comes later does not.
            self.read_ready();
        }
        match message {
            Message::Readable => self.readable(),
            Message::Request(request) => self.request(request),
            Message::Step(ticket, step) => self.step(ticket, step),
            Message::Process(id, event) => self.process_event(id, event),
            Message::Local(answer) => self.local_answer(answer),
            Message::Expired(transition, timer) => self.timer_expired(transition, timer),
            Message::HelloExpired => self.hello_expired(),
            Message::SettlingExpired => self.settling_expired(),
            Message::MemoryExpired(sequence, time) => self.memory_expired(sequence, time),
            Message::ShutdownExpired => self.shutdown_expired(),
            Message::Spawned(id, next, spawned) => self.spawned(id, next, spawned).await,
            Message::Discarded => self.discarded(),
            Message::RestartDue(id) => self.restart_due(id),
            Message::JoinExpired(id) => self.join_expired(id),
            Message::FenceExpired(id) => self.fence_expired(id),
            Message::Tick => self.tick(),
        }
        self.settle();
    }

    fn request(&mut self, request: Request) {
        let Some(request) = self.refuse_if_superseded(request) else { return };
        let Some(request) = self.in_turn(request) else { return };
        // Whoever asked may be gone: an answer that nobody hears is no error.
        match request {
            Request::Transition(operation, owner) => self.begin(operation, owner),
            Request::Status(reply) => drop(reply.send(self.status())),
            Request::DeclareRam(fd, reply) => self.declare_ram(fd, reply),
            Request::StartDirtyTracking(options, reply) => {
                self.start_dirty_tracking(options, reply);
            }
            Request::StopDirtyTracking(tracking, reply) => {
                self.stop_dirty_tracking(&tracking);
                let _ = reply.map(|reply| reply.send(Ok(())));
            }
            Request::AddDevice(spec, reply) => self.add_device(*spec, reply),
            Request::RemoveDevice(name, reply) => self.remove_device(&name, reply),
            Request::RestartDevice(name, reply) => self.restart_device(&name, reply),
            Request::Cancel(reply) => {
                self.cancel();
                let _ = reply.send(());
            }
            Request::AcceptHold(reply) => drop(reply.send(self.accept_hold())),
            Request::Shutdown(grace, reply) => self.shutdown(grace, reply),
            #[cfg(feature = "fault-injection")]
            Request::Arm(request) => self.arm(request),
        }
    }

    fn accept_hold(&mut self) -> Result<(), MachineError> {
        if self.machine != MachineState::Held || self.active.is_some() {
            return Err(MachineError::NotHeld(self.machine));
        }
        for reason in std::mem::take(&mut self.held) {
            match reason {
                HeldReason::FenceUnproven(id) => {
                    if let Some(device) = self.device(id)
                        && let Standing::Lost(_, why) = &device.standing
                    {
                        let why = format!("{why}; not proven gone, taken as it is by the owner");
                        device.standing = Standing::Fenced(why);
                        device.care.recovery = Recovery::Unproven;
                    }
                }
                HeldReason::LocalHung(id) => {
                    if let Some(local) = self.local(id) {
                        local.hung = true;
                    }
                }
                _ => {}
            }
        }
        self.machine = MachineState::Stopped;
        self.emit(MachineEvent::HoldEnded { by_owner: true });
        self.unsettled = true;
        Ok(())
    }
}
