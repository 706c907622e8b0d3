//! One simulated participant: a device process with its real lifecycle, or a local device.

use super::super::super::*;
use crate::lifecycle::{self, Effect as Work, Lifecycle, Master};
use crate::message::{
    Command, DeviceEvent, Epoch, OrphanPolicy, Phase, Refusal, RefusalKind, Term,
};
use crate::migration::{Activity, MigrationState, Next, next_state};
use std::collections::VecDeque;

/// One participant of the simulated machine.
#[derive(Clone, Debug)]
pub(in super::super) struct Node {
    pub(in super::super) member: Member,
    pub(super) device: Device,
    /// From the coordinator, not yet read.
    pub(super) down: VecDeque<lifecycle::Event>,
    /// To the coordinator, not yet read.
    pub(super) up: VecDeque<Event>,
    pub(super) life: Life,
    pub(super) fence: Fence,
    /// A fence of it can be proven.
    pub(super) provable: bool,
    pub(super) read: Vec<Command>,
    /// The lease that runs.
    pub(super) lease: Option<Epoch>,
    /// Where it stood when its lease ran out, until the coordinator hears of that.
    pub(super) stood: Option<MigrationState>,
}

#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there are a handful of them")]
pub(super) enum Device {
    Process { lifecycle: Lifecycle, work: Option<Work> },
    Local { state: MigrationState, calls: VecDeque<Command> },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    Hung,
    Dead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fence {
    None,
    Asked,
    Proven,
}

/// A device that was brought to a state by an earlier transition of `term`.
fn device_in(member: &Member, term: Term) -> (Device, Option<Epoch>) {
    if member.kind == MemberKind::Local {
        return (Device::Local { state: member.state, calls: VecDeque::new() }, None);
    }
    let mut lifecycle = Lifecycle::new(member.flags);
    let orphan = OrphanPolicy::Keep;
    lifecycle.step(lifecycle::Event::Welcome { term, epoch: Epoch(0), orphan });
    let phase = match member.state.activity() {
        Activity::Full => Phase::Start,
        Activity::NoPeer => Phase::PrepareStop,
        Activity::Stopped => Phase::Stop,
    };
    let (epoch, target, budget_ns) = (Epoch(1), member.state, 0);
    let lease_ns = if phase == Phase::Stop { member.lease_ns } else { 0 };
    let command = Command { term, epoch, phase, target, budget_ns, lease_ns };
    let mut effects = lifecycle.step(lifecycle::Event::Command(command));
    while effects.iter().any(|effect| matches!(effect, Work::Arc(_))) {
        effects = lifecycle.step(lifecycle::Event::ArcDone);
    }
    assert_eq!(lifecycle.state(), member.state);
    let lease = lifecycle.has_lease().then_some(epoch);
    (Device::Process { lifecycle, work: None }, lease)
}

impl Node {
    pub(super) fn new(member: Member, term: Term, provable: bool) -> Self {
        let (device, lease) = device_in(&member, term);
        Self {
            member,
            device,
            down: VecDeque::new(),
            up: VecDeque::new(),
            life: Life::Alive,
            fence: Fence::None,
            provable,
            read: Vec::new(),
            lease,
            stood: None,
        }
    }

    pub(super) fn state(&self) -> MigrationState {
        match &self.device {
            Device::Process { lifecycle, .. } => lifecycle.state(),
            Device::Local { state, .. } => *state,
        }
    }

    /// The most that it may be doing; an arc that is being taken counts with both its ends.
    pub(super) fn activity(&self) -> Activity {
        match &self.device {
            Device::Process { lifecycle, work: Some(Work::Arc(arc)) } => {
                lifecycle.activity().max(arc.after)
            }
            Device::Process { lifecycle, .. } => lifecycle.activity(),
            Device::Local { state, .. } => state.activity(),
        }
    }

    pub(super) fn moves(&self) -> bool {
        self.life == Life::Alive && self.fence == Fence::None
    }

    pub(super) fn has_work(&self) -> bool {
        match &self.device {
            Device::Process { work, .. } => work.is_some(),
            Device::Local { calls, .. } => !calls.is_empty(),
        }
    }

    /// Lets the lifecycle see an event and carries out what needs no time.
    pub(super) fn step(&mut self, event: lifecycle::Event) {
        let from = self.member.id;
        let Device::Process { lifecycle, work } = &mut self.device else {
            return;
        };
        for effect in lifecycle.step(event) {
            let (command, state, answer) = match effect {
                Work::Arc(_) | Work::ReadStream | Work::WriteStream | Work::Reset => {
                    assert!(work.is_none(), "a second thing to do before the first has ended");
                    *work = Some(effect);
                    continue;
                }
                Work::Reached(command, state) => (command, state, Answer::Reached),
                Work::Refused(command, state, _) => (command, state, Answer::Refused),
                Work::Status(status) => {
                    self.up.push_back(Event::Answer {
                        from,
                        term: status.term,
                        epoch: status.epoch,
                        phase: Phase::Stop,
                        state: status.state,
                        answer: Answer::Status { moving_to: status.moving_to },
                    });
                    continue;
                }
                Work::ArmLease(_, epoch) => {
                    self.lease = Some(epoch);
                    continue;
                }
                Work::DisarmLease => {
                    self.lease = None;
                    continue;
                }
                Work::Begin(_) => {
                    self.stood = None;
                    continue;
                }
                Work::Notify(DeviceEvent::LeaseExpired(state)) => {
                    self.up.push_back(Event::LeaseExpired(from, state));
                    continue;
                }
                _ => continue,
            };
            let Command { term, epoch, phase, .. } = command;
            self.up.push_back(Event::Answer { from, term, epoch, phase, state, answer });
        }
    }

    /// Its lease runs out.
    pub(super) fn lease_expires(&mut self) {
        if let Some(epoch) = self.lease.take() {
            self.stood = Some(self.state());
            self.step(lifecycle::Event::LeaseExpired(epoch));
        }
    }

    pub(super) fn work(&mut self, failure: Option<bool>) {
        let refusal = Refusal { kind: RefusalKind::Device, text: String::new() };
        let done = match &mut self.device {
            Device::Local { .. } => return self.call(failure),
            Device::Process { work, .. } => match (work.take(), failure) {
                (Some(Work::Arc(_)), None) => lifecycle::Event::ArcDone,
                (Some(Work::Arc(arc)), Some(restored)) => {
                    // The client's failures are its own affair; ERROR would be everybody's.
                    let restored = restored || arc.master == Master::Client;
                    lifecycle::Event::ArcFailed { refusal, restored }
                }
                (Some(Work::ReadStream | Work::WriteStream), None) => lifecycle::Event::StreamDone,
                (Some(Work::ReadStream | Work::WriteStream), _) => {
                    lifecycle::Event::StreamFailed(refusal)
                }
                (Some(Work::Reset), _) => lifecycle::Event::ResetDone,
                (_, _) => return,
            },
        };
        self.step(done);
    }

    /// A local device carries out one call from its beginning to its end.
    fn call(&mut self, failure: Option<bool>) {
        let flags = self.member.flags;
        let Device::Local { state, calls } = &mut self.device else {
            return;
        };
        let Some(command) = calls.pop_front() else {
            return;
        };
        let target = match command.phase {
            Phase::Load => MigrationState::Stop,
            Phase::Reset if state.activity() == Activity::Stopped => MigrationState::Stop,
            Phase::Reset => *state,
            _ => command.target,
        };
        let mut answer = Answer::Reached;
        let mut fails = failure;
        loop {
            if let Some(at_once) = fails.take() {
                answer = Answer::Refused;
                if at_once {
                    break;
                }
            }
            match next_state(flags, *state, target) {
                Ok(Next::Already) => break,
                Ok(Next::Arc(to)) => *state = to,
                Err(_) => {
                    answer = Answer::Refused;
                    break;
                }
            }
            if answer == Answer::Refused {
                break;
            }
        }
        let Command { term, epoch, phase, .. } = command;
        let state = *state;
        self.up.push_back(Event::Answer {
            from: self.member.id,
            term,
            epoch,
            phase,
            state,
            answer,
        });
    }
}
