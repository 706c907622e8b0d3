//! Carrying out what a master wants, arc by arc, until there is an answer.

use super::{
    Arc, ClientRequest, Effect, ExitReason, Job, Lifecycle, Master, Stage, Stale, Task,
    holds_stream,
};
use crate::message::{Command, DeviceEvent, Epoch, Phase, Refusal, RefusalKind};
use crate::migration::{Activity, MigrationState, Next, next_state};
use crate::mutation::Mutation;

impl Lifecycle {
    /// Begins what waits; the coordinator goes first.
    pub(super) fn take_next(&mut self, out: &mut Vec<Effect>) {
        if let Some(command) = self.next_command.take() {
            self.begin_command(command, out);
        } else if let Some(request) = self.next_client.take() {
            self.begin_client(request, out);
        }
    }

    pub(super) fn begin_command(&mut self, command: Command, out: &mut Vec<Effect>) {
        out.push(Effect::Begin(command));
        self.job = Some(Job { task: Task::Command(command, Stage::Walk), overtaken: false });
        match command.phase {
            Phase::PrepareStop | Phase::Stop | Phase::PrepareStart | Phase::Start => {
                let now = self.state().activity();
                let wanted = command.target.activity();
                let fits = match command.phase {
                    // An answer to one of these two promises quiet.
                    Phase::PrepareStop => wanted <= now && wanted <= Activity::NoPeer,
                    Phase::Stop => wanted == Activity::Stopped,
                    _ => wanted >= now,
                };
                if command.phase == Phase::PrepareStop && now == Activity::Stopped {
                    // Quieter than it was asked to be; nothing is opened for a stop.
                    match self.state() {
                        MigrationState::Error => {
                            self.walk(Master::Coordinator, command.target, out);
                        }
                        _ => self.reached(out),
                    }
                } else if fits {
                    self.walk(Master::Coordinator, command.target, out);
                } else {
                    let text = format!(
                        "{} cannot lead from {} to {}",
                        command.phase,
                        self.state(),
                        command.target
                    );
                    self.refuse(Refusal { kind: RefusalKind::NoWay, text }, out);
                }
            }
            Phase::Save | Phase::Load if !self.flags.stop_copy() => {
                let text = "this device's state can neither be saved nor loaded".into();
                self.refuse(Refusal { kind: RefusalKind::Unsupported, text }, out);
            }
            Phase::Load => self.walk(Master::Coordinator, MigrationState::Resuming, out),
            Phase::Save if self.state().is_saving() && self.state() == command.target => {
                out.push(Effect::WriteStream);
            }
            Phase::Save => {
                let text = format!(
                    "Save needs {} and a saving state, the device is in {}",
                    command.target,
                    self.state()
                );
                self.refuse(Refusal { kind: RefusalKind::NoWay, text }, out);
            }
            Phase::Reset => out.push(Effect::Reset),
        }
    }

    pub(super) fn begin_client(&mut self, request: ClientRequest, out: &mut Vec<Effect>) {
        self.job = Some(Job { task: Task::Client(request), overtaken: false });
        match request {
            ClientRequest::SetState(state) => self.walk(Master::Client, state, out),
            ClientRequest::Reset => match self.client_reset_refusal() {
                None => out.push(Effect::Reset),
                Some(refusal) => self.refuse(refusal, out),
            },
        }
    }

    /// `DEVICE_RESET` is for running devices, and for the way out of what the client itself began.
    pub(super) fn client_reset_refusal(&self) -> Option<Refusal> {
        use MigrationState as S;
        let refused = |who: &str, state: S| {
            Some(Refusal {
                kind: RefusalKind::Busy,
                text: format!("DEVICE_RESET is not possible while the {who} holds {state}"),
            })
        };
        match (self.coordinator, self.client) {
            (S::Stop | S::StopCopy | S::Error | S::Resuming, _) => {
                refused("coordinator", self.coordinator)
            }
            (_, S::Stop | S::StopCopy) => refused("client", self.client),
            _ => None,
        }
    }

    /// Takes the next arc towards `target`, or ends the walk.
    pub(super) fn walk(&mut self, master: Master, target: MigrationState, out: &mut Vec<Effect>) {
        let from = self.position(master);
        match next_state(self.flags, from, target) {
            Ok(Next::Already) => self.walk_ended(out),
            Ok(Next::Arc(to)) => {
                let other = match master {
                    Master::Coordinator => self.client,
                    Master::Client => self.coordinator,
                };
                if holds_stream(to) && holds_stream(other) {
                    let text = format!("{to} is not possible while the other side holds {other}");
                    self.refuse(Refusal { kind: RefusalKind::Busy, text }, out);
                    return;
                }
                out.push(Effect::Arc(Arc {
                    master,
                    from,
                    to,
                    before: from.activity().min(other.activity()),
                    after: to.activity().min(other.activity()),
                }));
                if self.broken.is(Mutation::AnswersBeforeTheArc)
                    && let Some(Task::Command(command, _)) = self.job.as_ref().map(|job| job.task)
                {
                    out.push(Effect::Reached(command, to));
                }
            }
            Err(no_way) => {
                let refusal = Refusal { kind: RefusalKind::NoWay, text: no_way.to_string() };
                self.refuse(refusal, out);
            }
        }
    }

    pub(super) fn walk_ended(&mut self, out: &mut Vec<Effect>) {
        let Some(job) = &mut self.job else { return };
        match &mut job.task {
            Task::Command(command, stage) if command.phase == Phase::Load => match stage {
                Stage::Walk => {
                    *stage = Stage::Stream;
                    out.push(Effect::ReadStream);
                }
                Stage::Stream | Stage::Commit => self.reached(out),
            },
            Task::Command(..) | Task::Client(_) | Task::Lease => self.reached(out),
        }
    }

    pub(super) fn arc_ended(&mut self, result: Result<(), (Refusal, bool)>, out: &mut Vec<Effect>) {
        let Some((master, target)) = self.walking() else {
            out.push(Effect::Dropped(Stale::Unasked));
            return;
        };
        let from = self.position(master);
        match result {
            Ok(()) => {
                if let Ok(Next::Arc(to)) = next_state(self.flags, from, target) {
                    self.set_position(master, to);
                    if from == MigrationState::StopCopy {
                        self.handed_over = false;
                    }
                }
                if self.is_overtaken() {
                    self.keep_promised_lease(out);
                    self.tell_of_lease(out);
                    self.end_job(out);
                } else {
                    self.walk(master, target, out);
                }
            }
            Err((refusal, restored)) => {
                if !restored {
                    self.set_position(master, MigrationState::Error);
                }
                if self.is_overtaken() {
                    self.end_job(out);
                } else {
                    self.refuse(refusal, out);
                }
            }
        }
    }

    /// An overtaken Stop that has stopped the device all the same, with nothing to follow it, must
    /// not leave the client without its data socket for longer than was meant.
    fn keep_promised_lease(&mut self, out: &mut Vec<Effect>) {
        let Some(Job { task: Task::Command(command, _), .. }) = self.job else { return };
        let stopped = self.coordinator.activity() == Activity::Stopped;
        if command.lease_ns > 0 && stopped && self.next_command.is_none() {
            self.lease = Some(command.epoch);
            out.push(Effect::ArmLease(command.lease_ns, command.epoch));
        }
    }

    /// What overtakes the end of a lease may be given up itself, and is not answered then: nobody
    /// would know that the device has left where it stood.
    fn tell_of_lease(&self, out: &mut Vec<Effect>) {
        if matches!(self.job, Some(Job { task: Task::Lease, .. })) {
            out.push(Effect::Notify(DeviceEvent::LeaseExpired(self.state())));
        }
    }

    /// Whose position is being moved, and where to, if an arc is being taken.
    pub(super) fn walking(&self) -> Option<(Master, MigrationState)> {
        match self.job.as_ref()?.task {
            Task::Command(command, stage) => match (command.phase, stage) {
                (Phase::Save | Phase::Reset, _) | (Phase::Load, Stage::Stream) => None,
                (Phase::Load, Stage::Walk) => Some((Master::Coordinator, MigrationState::Resuming)),
                (Phase::Load, Stage::Commit) => Some((Master::Coordinator, MigrationState::Stop)),
                _ => Some((Master::Coordinator, command.target)),
            },
            Task::Client(ClientRequest::SetState(state)) => Some((Master::Client, state)),
            Task::Client(ClientRequest::Reset) => None,
            Task::Lease => Some((Master::Coordinator, self.lease_target())),
        }
    }

    pub(super) fn stream_ended(&mut self, result: Result<(), Refusal>, out: &mut Vec<Effect>) {
        let overtaken = self.is_overtaken();
        let Some(Job { task: Task::Command(command, stage), .. }) = &mut self.job else {
            out.push(Effect::Dropped(Stale::Unasked));
            return;
        };
        match (command.phase, *stage, result) {
            (Phase::Save, _, result) => {
                let whole = result.is_ok() && self.coordinator == MigrationState::StopCopy;
                self.handed_over |= whole;
                match result {
                    _ if overtaken => self.end_job(out),
                    Ok(()) => self.reached(out),
                    Err(refusal) => self.refuse(refusal, out),
                }
            }
            (Phase::Load, Stage::Stream, Ok(())) if !overtaken => {
                *stage = Stage::Commit;
                self.walk(Master::Coordinator, MigrationState::Stop, out);
            }
            (Phase::Load, Stage::Stream, result) => {
                // Half a state is no state: unusable until it is reset.
                self.coordinator = MigrationState::Error;
                match result {
                    Err(refusal) if !overtaken => self.refuse(refusal, out),
                    _ => self.end_job(out),
                }
            }
            _ => out.push(Effect::Dropped(Stale::Unasked)),
        }
    }

    pub(super) fn reset_ended(&mut self, result: Result<(), Refusal>, out: &mut Vec<Effect>) {
        use MigrationState as S;
        let master = match self.job.as_ref().map(|job| job.task) {
            Some(Task::Command(command, _)) if command.phase == Phase::Reset => Master::Coordinator,
            Some(Task::Client(ClientRequest::Reset)) => Master::Client,
            _ => {
                out.push(Effect::Dropped(Stale::Unasked));
                return;
            }
        };
        match result {
            Ok(()) => {
                self.handed_over = false;
                if matches!(self.client, S::Error | S::Resuming) {
                    self.client = S::Running;
                }
                if master == Master::Coordinator && self.coordinator.activity() == Activity::Stopped
                {
                    self.coordinator = S::Stop;
                }
                if self.is_overtaken() { self.end_job(out) } else { self.reached(out) }
            }
            Err(refusal) => {
                self.set_position(master, S::Error);
                if self.is_overtaken() { self.end_job(out) } else { self.refuse(refusal, out) }
            }
        }
    }

    pub(super) fn lease_target(&self) -> MigrationState {
        if self.flags.p2p() { MigrationState::RunningP2p } else { MigrationState::Running }
    }

    pub(super) fn lease_expired(&mut self, epoch: Epoch, out: &mut Vec<Effect>) {
        if self.lease != Some(epoch) {
            out.push(Effect::Dropped(Stale::Epoch));
            return;
        }
        if self.job.is_some() {
            self.lease_due = true;
            return;
        }
        self.lease = None;
        self.lease_due = false;
        if self.handed_over {
            out.push(Effect::Exit(ExitReason::HandedOver));
            return;
        }
        self.job = Some(Job { task: Task::Lease, overtaken: false });
        self.walk(Master::Coordinator, self.lease_target(), out);
    }

    pub(super) fn is_overtaken(&self) -> bool {
        self.job.as_ref().is_some_and(|job| job.overtaken)
    }

    /// The job ends well.
    pub(super) fn reached(&mut self, out: &mut Vec<Effect>) {
        match self.job.as_ref().map(|job| job.task) {
            Some(Task::Command(command, _)) => {
                let state = self.state();
                out.push(Effect::Reached(command, state));
                if command.phase == Phase::Stop && command.lease_ns > 0 {
                    self.lease = Some(command.epoch);
                    out.push(Effect::ArmLease(command.lease_ns, command.epoch));
                }
            }
            Some(Task::Client(request)) => {
                let state = self.client_state();
                out.push(Effect::ClientAnswer(Ok(state)));
                if matches!(request, ClientRequest::SetState(_)) {
                    out.push(Effect::Notify(DeviceEvent::ClientState(state)));
                }
            }
            Some(Task::Lease) => self.tell_of_lease(out),
            None => {}
        }
        self.end_job(out);
    }

    /// The job ends badly.
    pub(super) fn refuse(&mut self, refusal: Refusal, out: &mut Vec<Effect>) {
        match self.job.as_ref().map(|job| job.task) {
            Some(Task::Command(command, _)) => {
                let elsewhere = self.broken.is(Mutation::RefusesFromElsewhere);
                let state = if elsewhere { command.target } else { self.state() };
                out.push(Effect::Refused(command, state, refusal));
            }
            Some(Task::Client(_)) => out.push(Effect::ClientAnswer(Err(refusal))),
            Some(Task::Lease) => {
                let text = format!("the lease ran out, but: {refusal}");
                out.push(Effect::Notify(DeviceEvent::Failed(text)));
            }
            None => {}
        }
        self.end_job(out);
    }

    pub(super) fn end_job(&mut self, out: &mut Vec<Effect>) {
        self.job = None;
        match self.lease {
            Some(epoch) if self.lease_due => self.lease_expired(epoch, out),
            _ => self.take_next(out),
        }
    }
}
