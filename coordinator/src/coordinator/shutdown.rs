//! The end of a machine: every process is asked to end, and killed if it does not.

use super::state::{Ending, EndingReply, Standing, State};
use super::{Exits, Message, Reply};
use crate::device::Message as DeviceMessage;
use crate::error::{GreetingError, MachineError, StartError};
use crate::events::TARGET;
use crate::report::nanos;
use standstill_protocol::message::{CoordinatorMessage, Shutdown};
use standstill_protocol::transition::ParticipantId;
use std::time::Duration;

impl State {
    /// The owner wants the machine to end.
    pub(super) fn shutdown(&mut self, grace: Duration, reply: Reply<Exits>) {
        let term = self.term.0;
        tracing::info!(target: TARGET, machine = self.name, term, ?grace, "the machine is shut down");
        // Who ends may leave without its last marks.
        self.tracking.iter().for_each(|tracking| tracking.end());
        let message =
            CoordinatorMessage::Shutdown(Shutdown { term: self.term, grace_ns: nanos(grace) });
        for device in self.devices.iter() {
            let welcomed = matches!(device.standing, Standing::Ready | Standing::Joining);
            if let Some(channel) = device.channel.as_ref().filter(|_| welcomed) {
                // One that cannot be told is killed after the grace.
                let _ = channel.try_send(&message, &[]);
            }
        }
        self.end(grace, EndingReply::Owner(reply));
    }

    /// The machine did not start: everything that was started ends at once.
    pub(super) fn end_after(&mut self, reply: EndingReply) {
        self.end(Duration::ZERO, reply);
    }

    fn end(&mut self, grace: Duration, reply: EndingReply) {
        if self.ending.is_some() {
            // The first one has it; the second one learns that the machine is gone, and can only
            // make it go sooner.
            for device in self.devices.iter().filter(|device| !device.gone) {
                device.tell(DeviceMessage::Expect(grace));
            }
            return;
        }
        // Whoever waits for a transition learns that the machine is gone.
        self.active = None;
        self.queue.clear();
        for device in self.devices.iter() {
            let message = if grace.is_zero() || device.standing == Standing::Greeting {
                DeviceMessage::Kill
            } else {
                DeviceMessage::Expect(grace)
            };
            device.tell(message);
        }
        let deadline =
            self.after(grace.saturating_add(self.deadlines.fence), || Message::ShutdownExpired);
        self.ending = Some(Ending { reply, deadline });
        self.maybe_ended();
    }

    /// A process ended and its last words were read.
    pub(super) fn process_gone(&mut self, id: ParticipantId) {
        if let Some(device) = self.device(id) {
            device.gone = true;
            self.unsettled = true;
        }
        self.maybe_ended();
    }

    pub(super) fn shutdown_expired(&mut self) {
        self.ended();
    }

    pub(super) fn maybe_ended(&mut self) {
        if self.ending.is_some()
            && self.spawning == 0
            && self.devices.iter().all(|device| device.gone)
        {
            self.ended();
        }
    }

    pub(super) fn ended(&mut self) {
        let Some(Ending { reply, deadline }) = self.ending.take() else { return };
        deadline.abort();
        self.leave_directory();
        self.over = true;
        match reply {
            EndingReply::Owner(reply) => {
                let exits = self.devices.iter();
                let exits = exits.map(|device| (device.spec.name.clone(), device.exit)).collect();
                let _ = reply.send(match self.superseded {
                    Some(term) => Err(MachineError::Superseded { term }),
                    None => Ok(exits),
                });
            }
            EndingReply::Starter(reply, id, error) => {
                let _ = reply.send(Err(self.greeting_error(id, error)));
            }
            EndingReply::Planner(reply, error) => drop(reply.send(Err(error))),
        }
        self.myself.stop();
    }

    /// By now it is known how the process ended and what it wrote last.
    pub(super) fn greeting_error(&mut self, id: ParticipantId, error: GreetingError) -> StartError {
        let Some(device) = self.device(id) else {
            return StartError::Description(error.to_string());
        };
        let source = match (error, device.exit) {
            // The end of the socket comes before the end of the process. (It was killed for
            // closing its socket if it had not ended by itself.)
            (GreetingError::Disconnected, Some(exit)) if !exit.is_kill() => {
                GreetingError::Exited(exit)
            }
            (error, _) => error,
        };
        let (device, stderr) = (device.spec.name.clone(), device.tail.lines());
        StartError::Greeting { device, source, stderr }
    }
}
