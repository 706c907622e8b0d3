//! What becomes of devices by themselves: lost ones are restarted, new ones join, whoever is to
//! leave leaves, and requests that had to wait have their turn.
//!
//! All of it is done one step at a time, and only while no transition is under way: after each
//! message the actor looks for steps that are due ([`State::settle`]).

use super::incarnation::{self, Spawned};
use super::join::{Failure, Join, Stage};
use super::removal::{LeaveStage, Leaving};
use super::slips::Slip;
use super::state::{Device, Purpose, Standing, State};
use super::{Message, Reply, Request};
use crate::clock;
use crate::device::Message as DeviceActorMessage;
use crate::error::{MachineError, StartError};
use crate::events::MachineEvent;
use crate::mailbox::Alarm;
use crate::policy::LossPolicy;
use crate::restarts::{Attempt, Restarts};
use crate::watchdog::Pulse;
use standstill_protocol::transition::{Loss, MachineState, Operation, ParticipantId};
use std::io;

/// How many requests may wait for their turn.
const QUEUE: usize = 64;

/// What is done about a device beside its transitions. It goes along with the device from one
/// incarnation to the next.
#[derive(Default)]
pub(super) struct Care {
    pub(super) recovery: Recovery,
    pub(super) restarts: Restarts,
    /// The present incarnation is new, and is being brought to the machine's state.
    pub(super) join: Option<Join>,
    /// Why the present incarnation did not join.
    pub(super) failure: Option<Failure>,
    /// Who waits for it to join.
    pub(super) owner: Option<Reply<()>>,
    /// It was added to the running machine and has never counted yet.
    pub(super) added: bool,
    /// The next restart is not charged: the device was made to wait and would not.
    pub(super) uncharged: bool,
    pub(super) leaving: Option<Leaving>,
    pub(super) pulse: Pulse,
}

/// How far the restart of a fenced device is.
#[derive(Debug, Default)]
pub(super) enum Recovery {
    /// Nothing was decided yet; its policy decides.
    #[default]
    Undecided,
    /// Its backoff runs.
    Waiting(Alarm),
    /// It is due.
    Due,
    /// Peers' windows onto the dead incarnation's memory are being revoked.
    Revoking,
    /// They are.
    Revoked,
    /// The process of the incarnation with that number is being started.
    Spawning(ParticipantId),
    /// It is not restarted.
    GivenUp,
    /// It is not restarted: the owner has taken its fence as it is, without a proof.
    Unproven,
}

impl Recovery {
    /// True if another incarnation is to come.
    pub(super) fn is_under_way(&self) -> bool {
        !matches!(self, Self::Undecided | Self::GivenUp | Self::Unproven)
    }
}

/// A step that is due for a device.
enum Duty {
    /// Its policy is to be asked.
    Decide,
    Revoke,
    Spawn,
    Welcome,
    /// It is in STOP and knows the RAM: now it goes where the machine is.
    Follow,
    /// The attempt to bring it in has failed, and nothing of it is left.
    GiveIn,
    Leave,
    RevokeForEver,
    Forget,
}

impl State {
    /// Takes all steps that are due.
    pub(super) fn settle(&mut self) {
        while self.unsettled
            && self.active.is_none()
            && self.starting.is_none()
            && self.ending.is_none()
            && self.superseded.is_none()
            && !self.over
        {
            let forgets = self.slips.is(Slip::ForgetsTheQueue);
            if !forgets && let Some(request) = self.queue.pop_front() {
                self.request(request);
                continue;
            }
            if let Some(local) = self.locals.iter().find(|local| local.hung && local.returned) {
                self.bring_back(local.id);
                continue;
            }
            let due = |device: &Device| self.duty(device).map(|duty| (device.id, duty));
            let Some((id, duty)) = self.devices.iter().find_map(due) else {
                self.unsettled = false;
                return;
            };
            match duty {
                Duty::Decide => self.decide(id),
                Duty::Revoke => self.revoke(id),
                Duty::Spawn => self.spawn(id),
                Duty::Welcome => self.welcome_newcomer(id),
                Duty::Follow => self.follow(id),
                Duty::GiveIn => self.give_in(id),
                Duty::Leave => self.leave(id),
                Duty::RevokeForEver => self.revoke(id),
                Duty::Forget => self.forget(id),
            }
        }
    }

    fn duty(&self, device: &Device) -> Option<Duty> {
        let Care { recovery, join, leaving, owner, .. } = &device.care;
        let fenced = matches!(device.standing, Standing::Fenced(_));
        if let Some(leaving) = leaving {
            return match leaving.stage {
                LeaveStage::Asked if !matches!(recovery, Recovery::Spawning(_)) => {
                    Some(Duty::Leave)
                }
                LeaveStage::Ending if fenced => Some(Duty::RevokeForEver),
                LeaveStage::Revoked => Some(Duty::Forget),
                _ => None,
            };
        }
        match join.as_ref().map(|join| &join.stage) {
            // Whoever waits is told what it wrote last.
            Some(_) if fenced => (owner.is_none() || device.gone).then_some(Duty::GiveIn),
            Some(Stage::Greeted(..)) if device.standing == Standing::Greeting => {
                Some(Duty::Welcome)
            }
            Some(Stage::Stopped) if device.standing == Standing::Joining => Some(Duty::Follow),
            Some(_) => None,
            None if !fenced => None,
            None => match recovery {
                Recovery::Undecided => match self.policy_of(device) {
                    LossPolicy::Restart(_) => Some(Duty::Decide),
                    LossPolicy::Fail | LossPolicy::ContinueWithout => None,
                },
                Recovery::Due => Some(Duty::Revoke),
                Recovery::Revoked => Some(Duty::Spawn),
                _ => None,
            },
        }
    }

    /// A local device that was left out has answered. What it has said is about a transition that is
    /// over; so it is asked anew, by itself, and counts when it is where the machine is.
    fn bring_back(&mut self, id: ParticipantId) {
        let Some(local) = self.local(id) else { return };
        local.returned = false;
        let operation = match self.machine {
            MachineState::Running => Operation::Resume,
            MachineState::Stopped | MachineState::Held | MachineState::LeaseExpired => {
                Operation::Pause
            }
        };
        self.begin_internal(id, operation, Purpose::Join(id));
    }

    pub(super) fn policy_of(&self, device: &Device) -> LossPolicy {
        self.policies.resolve(&device.spec).0
    }

    /// A request that is not possible now waits for its turn; others are given back.
    pub(super) fn in_turn(&mut self, request: Request) -> Option<Request> {
        let Some(active) = &self.active else { return Some(request) };
        let waits = match &request {
            Request::Status(_)
            | Request::DeclareRam(..)
            | Request::StartDirtyTracking(..)
            | Request::StopDirtyTracking(..)
            | Request::Cancel(_)
            | Request::Shutdown(..) => false,
            #[cfg(feature = "fault-injection")]
            Request::Arm(_) => false,
            Request::AddDevice(..) | Request::RemoveDevice(..) | Request::RestartDevice(..) => true,
            Request::Transition(..) | Request::AcceptHold(_) => active.purpose.is_internal(),
        };
        if !waits {
            return Some(request);
        }
        if self.queue.len() >= QUEUE {
            request.refuse(MachineError::Busy(QUEUE));
        } else {
            self.queue.push_back(request);
            self.unsettled = true;
        }
        None
    }

    /// The owner gives up what has not had its turn yet.
    pub(super) fn cancel_queued(&mut self) {
        for request in std::mem::take(&mut self.queue) {
            match request {
                Request::Transition(operation, owner) => {
                    let _ = owner.reply.send(Err(MachineError::Cancelled { operation }));
                }
                other => self.queue.push_back(other),
            }
        }
    }

    fn decide(&mut self, id: ParticipantId) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let LossPolicy::Restart(policy) = self.policies.resolve(&device.spec).0 else { return };
        let name = device.spec.name.clone();
        let care = &mut device.care;
        let attempt = if std::mem::take(&mut care.uncharged) {
            Some(Attempt { number: care.restarts.count().max(1), after: policy.first_backoff })
        } else {
            care.restarts.charge(&policy, clock::now())
        };
        let Some(Attempt { number, after }) = attempt else {
            care.recovery = Recovery::GivenUp;
            let restarts = care.restarts.count();
            self.emit(MachineEvent::DeviceRestartsExhausted { device: name, restarts });
            return;
        };
        let timer = self.after(after, move || Message::RestartDue(id));
        if let Some(device) = self.device(id) {
            device.care.recovery = Recovery::Waiting(timer);
        }
        self.emit(MachineEvent::DeviceRestarting { device: name, attempt: number, after });
    }

    pub(super) fn restart_due(&mut self, id: ParticipantId) {
        let Some(device) = self.device(id) else { return };
        if matches!(device.care.recovery, Recovery::Waiting(_)) {
            device.care.recovery = Recovery::Due;
            self.unsettled = true;
        }
    }

    /// Starts the next incarnation's process, on a thread that may block.
    fn spawn(&mut self, id: ParticipantId) {
        let next = self.ids.next();
        let Some(device) = self.devices.get_mut(id) else { return };
        let Some(next) = next else {
            device.care.recovery = Recovery::GivenUp;
            return;
        };
        device.care.recovery = Recovery::Spawning(next);
        let spec = device.spec.clone();
        self.spawning += 1;
        self.starter.start(&self.myself, (id, next), spec);
    }

    /// The process of the next incarnation was started, or could not be.
    pub(super) async fn spawned(
        &mut self,
        id: ParticipantId,
        next: ParticipantId,
        spawned: Result<Spawned, Box<StartError>>,
    ) {
        self.spawning = self.spawning.saturating_sub(1);
        self.unsettled = true;
        let ending = self.ending.is_some() || self.superseded.is_some();
        let wanted = self.device(id).filter(|device| {
            matches!(device.care.recovery, Recovery::Spawning(expected) if expected == next)
        });
        let Some(device) = wanted else { return self.discard(spawned) };
        device.care.recovery = Recovery::Undecided;
        if ending || device.care.leaving.is_some() {
            return self.discard(spawned);
        }
        let (spec, number) = (device.spec.clone(), device.incarnation + 1);
        let device = match spawned {
            Ok(spawned) => self.incarnate(next, spec, number, spawned).await,
            Err(error) => Err(error),
        };
        match device {
            Ok(device) => self.reincarnate(id, device),
            Err(error) => {
                if let Some(device) = self.device(id) {
                    device.care.failure = Some(Failure::Start(error));
                    device.care.join = Some(Join { stage: Stage::Failed, began: clock::now() });
                }
            }
        }
    }

    async fn incarnate(
        &self,
        id: ParticipantId,
        spec: crate::description::DeviceSpec,
        incarnation: u64,
        spawned: Spawned,
    ) -> Result<Device, Box<StartError>> {
        let system = |source: io::Error| {
            Box::new(StartError::System { what: "watch a device process", source })
        };
        self.poll.add(id, &spawned.0).map_err(system)?;
        let custody = self.custody();
        let newcomer =
            incarnation::newcomer(&self.myself, id, spec, incarnation, spawned, custody).await;
        newcomer.map_err(system)
    }

    /// The next incarnation takes the place of the last one.
    fn reincarnate(&mut self, id: ParticipantId, mut device: Device) {
        let next = device.id;
        let deadline = self.after(self.deadlines.hello, move || Message::JoinExpired(next));
        let stage = Stage::Greeting(deadline);
        let Some(last) = self.devices.get_mut(id) else { return };
        device.care = std::mem::take(&mut last.care);
        device.care.join = Some(Join { stage, began: clock::now() });
        device.care.failure = None;
        device.care.pulse.reset();
        // What waited for the last one's end may still look at how that was.
        last.tell(DeviceActorMessage::Retire);
        self.names.participants.remove(&id);
        self.names.participants.insert(next, device.spec.name.clone());
        self.devices.replace(id, device);
    }

    /// A process that nobody wants any more. To drop it may take a moment.
    fn discard(&mut self, spawned: Result<Spawned, Box<StartError>>) {
        let Ok(spawned) = spawned else { return self.maybe_ended() };
        self.spawning += 1;
        incarnation::discard(&self.myself, spawned);
    }

    pub(super) fn discarded(&mut self) {
        self.spawning = self.spawning.saturating_sub(1);
        self.maybe_ended();
    }

    /// A device does not count any more, and no transition deals with it: it is fenced.
    pub(super) fn fence_outside(&mut self, id: ParticipantId, loss: Loss, text: &str) {
        self.tell_loss(id, loss, text);
        let forgets = self.slips.is(Slip::FencesNobodyOutside);
        let Some(device) = self.device(id) else { return };
        if !forgets {
            device.tell(DeviceActorMessage::Fence);
        }
        self.await_fence(id, self.deadlines.fence);
    }

    pub(super) fn await_fence(&mut self, id: ParticipantId, grace: std::time::Duration) {
        // One that is proven is not looked at any more when this comes.
        self.after(grace, move || Message::FenceExpired(id));
    }

    /// Tells who listens that a device is lost.
    pub(super) fn tell_loss(&mut self, id: ParticipantId, loss: Loss, text: &str) {
        let during = self
            .active
            .as_ref()
            .filter(|active| !active.purpose.is_internal() && active.recorder.knows(id))
            .map(|active| active.operation);
        let Some(device) = self.device(id) else { return };
        let (device, incarnation) = (device.spec.name.clone(), device.incarnation);
        let detail = text.to_owned();
        self.emit(MachineEvent::DeviceLost { device, incarnation, loss, detail, during });
    }

    pub(super) fn fence_expired(&mut self, id: ParticipantId) {
        if self.superseded.is_some() {
            return;
        }
        let Some(device) = self.device(id) else { return };
        if !matches!(device.standing, Standing::Lost(..) | Standing::Leaving) {
            return;
        }
        let (name, incarnation) = (device.spec.name.clone(), device.incarnation);
        if let Some(owner) = device.care.owner.take() {
            let _ = owner.send(Err(MachineError::Unproven { device: name.clone() }));
        }
        self.not_removed(id);
        self.emit(MachineEvent::FenceUnproven { device: name, incarnation });
    }
}

impl Request {
    /// Answers that it is not possible.
    pub(super) fn refuse(self, error: MachineError) {
        // Whoever asked may be gone.
        match self {
            Self::Transition(_, owner) => drop(owner.reply.send(Err(error))),
            Self::StartDirtyTracking(_, reply) => drop(reply.send(Err(error))),
            Self::StopDirtyTracking(_, reply) => drop(reply.map(|reply| reply.send(Err(error)))),
            Self::DeclareRam(_, reply) | Self::AcceptHold(reply) => drop(reply.send(Err(error))),
            Self::AddDevice(_, reply) | Self::RestartDevice(_, reply) => {
                drop(reply.send(Err(error)));
            }
            Self::RemoveDevice(_, reply) => drop(reply.send(Err(error))),
            Self::Shutdown(_, reply) => drop(reply.send(Err(error))),
            Self::Status(_) | Self::Cancel(_) => {}
            #[cfg(feature = "fault-injection")]
            Self::Arm(request) => drop(request.reply.send(Err(error.into()))),
        }
    }
}
