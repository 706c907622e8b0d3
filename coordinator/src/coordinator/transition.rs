//! Runs a transition: the effects of the pure machine are carried out, what comes of them is fed
//! back. What goes into one is in [`super::plan`], what its end means in [`super::outcome`].

use super::lease::Lease;
use super::owner::{GAP, GAP_NAME};
use super::slips::Slip;
use super::state::{Active, Purpose, Standing, State, Timers};
use super::{Message, Owner};
use crate::clock;
use crate::device::Message as DeviceActorMessage;
use crate::events::MachineEvent;
use crate::participant::LocalAnswer;
use crate::recorder::Recorder;
use crate::report::{ParticipantReport, nanos};
use crate::spans::Spans;
use standstill_protocol::channel::{Frame, SendError};
use standstill_protocol::message::{Command, CoordinatorMessage};
use standstill_protocol::migration::Activity;
use standstill_protocol::transition::{
    Answer, Effect, Event, HeldReason, HookId, HookMoment, Loss, Member, OnFailure, OnLoss,
    Operation, ParticipantId, Plan, Timer, Transition,
};
use std::collections::VecDeque;
use std::time::Duration;

impl State {
    /// The owner asks for a transition.
    pub(super) fn begin(&mut self, operation: Operation, owner: Owner) {
        match self.admit(operation, &owner) {
            Ok(transition) => {
                self.carry_on(operation, transition, Purpose::Owner(owner));
            }
            Err(error) => drop(owner.reply.send(Err(error))),
        }
    }

    /// A device is moved by itself, on its way into the machine or out of it.
    pub(super) fn begin_internal(
        &mut self,
        id: ParticipantId,
        operation: Operation,
        purpose: Purpose,
    ) {
        let device = self.devices.get(id).and_then(|device| self.member(device));
        let local = || {
            let local = self.locals.iter().find(|local| local.id == id)?;
            Some(self.local_member(local))
        };
        let Some(member) = device.or_else(local) else { return };
        let plan = Plan {
            operation,
            term: self.term,
            epoch: self.epoch.next(),
            members: vec![Member { on_loss: OnLoss::Fail, ..member }],
            hooks: Vec::new(),
            phases: self.phases,
            on_failure: OnFailure::Rollback,
            undo_ns: nanos(self.deadlines.undo),
            fence_ns: nanos(self.deadlines.fence),
        };
        match Transition::new(plan) {
            Ok(transition) => self.carry_on(operation, transition, purpose),
            Err(error) => {
                self.lost(id, Loss::Refused, error.to_string());
                if let Purpose::Leave(id) = purpose {
                    self.leaver_moved(id);
                }
            }
        }
    }

    fn carry_on(&mut self, operation: Operation, transition: Transition, purpose: Purpose) {
        let transition = self.slips.transition(transition);
        let began = clock::now();
        self.transitions += 1;
        let devices = self.devices.iter().map(|device| {
            let process = (device.incarnation, device.pid());
            ParticipantReport::new(device.id, device.spec.name.clone(), process, device.state)
        });
        let locals = self.locals.iter().map(|local| {
            ParticipantReport::new(local.id, local.name.clone(), (0, None), local.state)
        });
        let takes_part = |one: &ParticipantReport| transition.state(one.id).is_some();
        let mut names = self.names.clone();
        if matches!(&purpose, Purpose::Owner(owner) if owner.gap.is_some()) {
            names.hooks.insert(GAP, GAP_NAME.to_owned());
        }
        let recorder = Recorder::new(
            operation,
            (self.term, transition.epoch()),
            began,
            devices.chain(locals).filter(takes_part).collect(),
            names,
        );
        let epoch = transition.epoch();
        let device = purpose.device().map(|id| self.names.participant(id));
        self.active = Some(Active {
            number: self.transitions,
            operation,
            transition,
            recorder,
            spans: Spans::new(operation, (self.term, epoch), device.as_deref()),
            timers: Timers::default(),
            purpose,
        });
        if device.is_none() {
            self.emit(MachineEvent::TransitionBegan { operation, epoch });
        }
        let lost: Vec<_> = self
            .devices
            .iter()
            .filter_map(|device| match device.standing {
                Standing::Lost(loss, _) => Some(Event::Lost(device.id, loss)),
                _ => None,
            })
            .collect();
        // Those that are lost already are not told anything.
        for event in lost.into_iter().chain([Event::Begin]) {
            self.feed(event);
        }
    }

    pub(super) fn cancel(&mut self) {
        self.cancel_queued();
        if self.active.as_ref().is_some_and(|active| !active.purpose.is_internal()) {
            self.feed(Event::Cancel);
        }
    }

    pub(super) fn timer_expired(&mut self, number: u64, timer: Timer) {
        if self.active.as_ref().is_some_and(|active| active.number == number) {
            match timer {
                Timer::Hook(GAP, _) => self.gap_expired(),
                timer => self.feed(Event::Expired(timer)),
            }
        }
    }

    /// Feeds the transition that is under way, if one is, and carries out what it says.
    pub(super) fn feed(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(active) = &mut self.active else { return };
            let effects = active.transition.step(event);
            active.spans.follow(&active.transition);
            let _inside = active.spans.present().entered();
            let mut frame = None;
            for effect in effects {
                self.carry_out(effect, &mut frame, &mut events);
            }
            if self.active.as_ref().is_some_and(|active| active.transition.is_undoing()) {
                self.close_gap_for_undo(&mut events);
            }
        }
    }

    fn carry_out(
        &mut self,
        effect: Effect,
        frame: &mut Option<(Command, Frame<CoordinatorMessage>)>,
        events: &mut VecDeque<Event>,
    ) {
        match effect {
            Effect::Send(id, command) => self.send_command(id, command, frame, events),
            Effect::Abort(id, abort) => {
                self.send(id, &CoordinatorMessage::Abort(abort), events);
            }
            Effect::Query(id, query) => match self.local(id) {
                Some(local) => events.push_back(Event::Answer {
                    from: id,
                    term: query.term,
                    epoch: query.epoch,
                    phase: standstill_protocol::message::Phase::PrepareStop,
                    state: local.state,
                    answer: Answer::Status { moving_to: None },
                }),
                None => self.send(id, &CoordinatorMessage::Query(query), events),
            },
            Effect::Fence(id, why) => self.fence(id, why, events),
            Effect::RunHook(GAP, moment) => self.open_gap(moment, events),
            Effect::RunHook(id, moment) => self.run_hook(id, moment),
            Effect::Arm(timer, budget_ns) => {
                if timer == Timer::Hold {
                    self.locals.iter().for_each(|local| local.thread.hold());
                }
                let Some(number) = self.active.as_ref().map(|active| active.number) else { return };
                let handle = self.after(Duration::from_nanos(budget_ns), move || {
                    Message::Expired(number, timer)
                });
                if let Some(active) = &mut self.active {
                    active.timers.arm(timer, handle);
                }
            }
            Effect::Disarm(timer) => {
                if let Some(active) = &mut self.active {
                    active.timers.disarm(timer);
                }
            }
            Effect::Finish(outcome) => self.finish(outcome),
        }
    }

    fn send_command(
        &mut self,
        id: ParticipantId,
        command: Command,
        frame: &mut Option<(Command, Frame<CoordinatorMessage>)>,
        events: &mut VecDeque<Event>,
    ) {
        if let Some(active) = &mut self.active {
            let undo = active.transition.is_undoing();
            active.recorder.sent(id, &command, undo);
        }
        if let Some(local) = self.local(id) {
            // A thread that is gone answers as one that hangs: not at all.
            local.thread.call(command);
            if self.slips.is(Slip::AnswersForLocals) {
                let Command { term, epoch, phase, target: state, .. } = command;
                let answer = Answer::Reached;
                events.push_back(Event::Answer { from: id, term, epoch, phase, state, answer });
            }
            return;
        }
        let Some(device) = self.device(id) else { return };
        let Some(channel) = &device.channel else { return };
        device.allowance.asked();
        device.told = Some((command.epoch, command.phase));
        device.lease = Lease::given_by(&command).or(device.lease);
        // A broadcast is encoded once.
        let sent = match frame {
            Some((encoded, bytes)) if *encoded == command => channel.try_send_frame(bytes, &[]),
            _ => match Frame::new(&CoordinatorMessage::Command(command), channel.version()) {
                Ok(bytes) => {
                    let sent = channel.try_send_frame(&bytes, &[]);
                    *frame = Some((command, bytes));
                    sent
                }
                Err(error) => Err(SendError::Encode(error)),
            },
        };
        self.sent(id, sent, events);
    }

    fn send(
        &mut self,
        id: ParticipantId,
        message: &CoordinatorMessage,
        events: &mut VecDeque<Event>,
    ) {
        let Some(device) = self.device(id) else { return };
        let Some(channel) = &device.channel else { return };
        device.allowance.asked();
        let sent = channel.try_send(message, &[]);
        self.sent(id, sent, events);
    }

    fn sent(
        &mut self,
        id: ParticipantId,
        sent: Result<(), SendError>,
        events: &mut VecDeque<Event>,
    ) {
        let Err(error) = sent else { return };
        let device = self.names.participant(id);
        match error {
            // It does not read: its deadline decides.
            SendError::WouldBlock => tracing::warn!(device, "does not read its control channel"),
            error => {
                tracing::warn!(device, %error, "cannot be told");
                // What it said before its end is still to be read, and then its end is.
                if !matches!(error, SendError::Disconnected) {
                    events.push_back(Event::Lost(id, Loss::Disconnected));
                }
            }
        }
    }

    fn fence(&mut self, id: ParticipantId, why: Loss, events: &mut VecDeque<Event>) {
        let contradiction = match why {
            Loss::Protocol => self.active.as_ref().and_then(|a| a.recorder.contradiction(id)),
            _ => None,
        };
        let Some(device) = self.device(id) else { return };
        // What was seen says more than the kind of loss.
        let detail = match &device.standing {
            Standing::Lost(_, text) | Standing::Fenced(text) => text.clone(),
            _ => contradiction.unwrap_or(why.to_string()),
        };
        let counted = matches!(device.standing, Standing::Ready | Standing::Joining);
        if counted {
            self.tell_loss(id, why, &detail);
        }
        if let Some(active) = &mut self.active {
            active.recorder.fencing(id, why, detail.clone());
        }
        let Some(device) = self.device(id) else { return };
        match &device.standing {
            Standing::Fenced(_) => events.push_back(Event::Fenced(id)),
            _ => {
                device.standing = Standing::Lost(why, detail.clone());
                self.memory_lost(id, &detail);
                let Some(device) = self.device(id) else { return };
                // An actor that is gone cannot prove anything: the grace decides.
                device.tell(DeviceActorMessage::Fence);
            }
        }
    }

    fn run_hook(&mut self, id: HookId, moment: HookMoment) {
        if let Some(active) = &mut self.active {
            active.recorder.hook_called(id, moment);
        }
        if let Some(entry) = self.hooks.iter().find(|entry| entry.hook.id == id) {
            // As for local devices: a thread that is gone is one that hangs.
            entry.thread.call(moment);
        }
    }

    /// A local device or a hook returned.
    pub(super) fn local_answer(&mut self, answer: LocalAnswer) {
        match answer {
            LocalAnswer::Device(id, command, result) => {
                let (state, answer, why) = match result {
                    Ok(()) => (command.target, Answer::Reached, None),
                    Err((why, state)) => (state, Answer::Refused, Some(why)),
                };
                if let Some(local) = self.local(id) {
                    local.state = state;
                    // What is left out counts no sooner than it is where the others are.
                    let returned = local.hung;
                    local.returned = returned;
                    self.unsettled |= returned;
                }
                if let Some(active) = &mut self.active {
                    active.recorder.local(id, &command, state, why);
                }
                let Command { term, epoch, phase, .. } = command;
                self.feed(Event::Answer { from: id, term, epoch, phase, state, answer });
                // One that comes late and runs proves nothing.
                if state.activity() == Activity::Stopped {
                    self.proven(|reason| *reason == HeldReason::LocalHung(id));
                }
            }
            LocalAnswer::Hook(id, moment, result) => {
                let failed = result.is_err();
                if let Some(active) = &mut self.active {
                    active.recorder.hook_returned(id, moment, result.err());
                }
                self.feed(match failed {
                    false => Event::HookDone(id, moment),
                    true => Event::HookFailed(id, moment),
                });
                let Some(entry) = self.hooks.iter_mut().find(|entry| entry.hook.id == id) else {
                    return;
                };
                if std::mem::take(&mut entry.hung) {
                    // After an error things are as before the call.
                    entry.hook.stopped = (moment == HookMoment::Stop) != failed;
                    if entry.hook.stopped {
                        self.proven(|reason| *reason == HeldReason::HookHung(id));
                    } else {
                        self.returned_running(id);
                    }
                }
            }
        }
    }
}
