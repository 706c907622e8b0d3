//! The connection to the coordinator: how it begins, passes to the next one, and ends.

use super::introduction::Facts;
use super::outbox::{Outbox, OutboxError};
use super::reader::Reader;
use super::takeover::Listening;
use super::{ActorError, Message, State};
use crate::device::{Device, Progress};
use crate::log;
use standstill_protocol::channel::{DeviceEnd, SendError};
use standstill_protocol::lifecycle::Event;
use standstill_protocol::message::{
    DeviceEvent, DeviceMessage, Heartbeat, MAX_TEXT, OrphanPolicy, Welcome,
};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::task::AbortHandle;

/// A coordinator that has welcomed the device.
#[derive(Debug)]
pub(crate) struct Newcomer {
    /// With the version that was agreed on.
    pub(crate) channel: DeviceEnd,
    pub(crate) welcome: Welcome,
    /// What came with the `Welcome`.
    pub(crate) fds: Vec<OwnedFd>,
}

/// Which of the connections that a process has in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ConnectionId(u64);

/// The present connection. All that belongs to it ends when it is dropped; what its tasks have
/// told the actor by then carries an id that is no longer the present one.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) id: ConnectionId,
    outbox: Outbox,
    /// Something could not be sent, and the actor is told so.
    broken: bool,
    /// Its thread ends when this is dropped.
    _reader: Reader,
    heartbeat: Option<Heart>,
}

#[cfg(feature = "fault-injection")]
impl Control {
    /// The socket itself, for what is no message.
    pub(super) fn channel(&self) -> &DeviceEnd {
        self.outbox.channel()
    }
}

#[derive(Debug)]
struct Heart {
    interval: Duration,
    sequence: u64,
    next: AbortHandle,
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.next.abort();
    }
}

impl<D: Device> State<D> {
    /// What the next `Hello` says.
    pub(super) fn facts(&self) -> Facts {
        Facts {
            machine: self.machine,
            term: self.lifecycle.term(),
            epoch: self.lifecycle.epoch(),
            state: self.lifecycle.state(),
        }
    }

    /// A coordinator has accepted this device: it is the only one from now on.
    pub(super) fn join(&mut self, newcomer: Newcomer) -> Result<(), ActorError> {
        let Newcomer { channel, welcome, fds } = newcomer;
        let channel = Arc::new(channel);
        self.connections.0 += 1;
        let id = self.connections;
        let reader = Reader::start(Arc::clone(&channel), Weak::clone(&self.shared), id)
            .map_err(ActorError::Reader)?;
        let Welcome { machine, term, epoch, orphan, heartbeat_ns, listener, log, .. } = welcome;
        if self.machine.is_some() {
            // Not the first: the parent is not the coordinator any more, and its death means
            // nothing. Before it is told, since it may end at once. The thread is the one that has
            // asked for the signal, the process's first.
            if let Err(error) = rustix::process::set_parent_process_death_signal(None) {
                tracing::warn!(%error, "this process still ends with its parent");
            }
        }
        if let Some(old) = &self.control {
            let superseded = DeviceMessage::Event(DeviceEvent::Superseded(term));
            // It may not read any more, or be gone: nobody waits for it.
            let told = old.outbox.try_send(&superseded);
            tracing::debug!(?told, "the old coordinator");
        }
        // The old connection ends here, with all that is left in it. Nobody has its bitmaps any more.
        self.untrack();
        let myself = self.myself.clone();
        let outbox = Outbox::new(channel, move |error| {
            // If the actor is gone, so is the process.
            let _ = myself.cast(Message::SendFailed(id, error));
        });
        self.control =
            Some(Control { id, outbox, broken: false, _reader: reader, heartbeat: None });
        self.machine = Some(machine);
        self.orphan = orphan;
        // A command that was still to begin was the old coordinator's.
        self.arrival = None;
        let mut fds = fds.into_iter();
        let listener = if listener { fds.next() } else { None };
        if let Some(pipe) = if log { fds.next() } else { None } {
            attach_log(&pipe);
        }
        self.feed(Event::Welcome { term, epoch, orphan });
        if let Some(socket) = listener {
            self.listen(socket);
        }
        if heartbeat_ns > 0 {
            self.heartbeat_due(id, Duration::from_nanos(heartbeat_ns));
        }
        Ok(())
    }

    /// Later coordinators find the device at this socket, and no longer at another.
    fn listen(&mut self, socket: OwnedFd) {
        let Some(introduction) = &self.introduction else { return };
        match Listening::start(socket, Arc::clone(introduction), self.myself.clone()) {
            Ok(listening) => self.listening = Some(listening),
            // As useful as before to the present coordinator.
            Err(error) => {
                let error = log::with_causes(&error);
                tracing::error!(error, "no later coordinator will find this device");
            }
        }
    }

    /// Another coordinator has welcomed the device to its machine.
    pub(super) fn take_over(&mut self, newcomer: Newcomer) {
        let term = newcomer.welcome.term;
        let own = self.lifecycle.term();
        if term <= own {
            tracing::warn!(term = term.0, own = own.0, "a take-over without a higher term");
            let superseded = DeviceMessage::Event(DeviceEvent::Superseded(own));
            if let Err(error) = newcomer.channel.try_send(&superseded, &[]) {
                tracing::debug!(%error, "it is not told so");
            }
            return;
        }
        if let Err(error) = self.join(newcomer) {
            // The old connection stays.
            tracing::error!(error = log::with_causes(&error), "the take-over has failed");
            return;
        }
        tracing::info!(term = term.0, was = own.0, "taken over by another coordinator");
    }

    /// The coordinator is there, but cannot be spoken with any more.
    pub(super) fn lose(&mut self, error: ActorError) {
        match self.orphan {
            OrphanPolicy::Exit => self.end(Err(error)),
            OrphanPolicy::Keep => {
                let error = log::with_causes(&error);
                tracing::error!(error, "the coordinator counts as gone");
                self.disconnected();
            }
        }
    }

    /// The coordinator is gone.
    pub(super) fn disconnected(&mut self) {
        self.control = None;
        self.untrack();
        self.feed(Event::Disconnected);
    }

    /// Whether something belongs to the present connection.
    pub(super) fn is_present(&self, id: ConnectionId) -> bool {
        self.control.as_ref().is_some_and(|control| control.id == id)
    }

    /// Sends to the coordinator, if there is one; never lost, never waited for.
    pub(super) fn send(&mut self, message: DeviceMessage) {
        #[cfg(feature = "fault-injection")]
        self.send_or_spoil(message);
        #[cfg(not(feature = "fault-injection"))]
        self.deliver(message);
    }

    /// Tells what a client can cause as often as it likes; soon, and what is outdated not at all.
    pub(super) fn tell(&mut self, event: DeviceEvent) {
        match self.news.offer(event, Instant::now()) {
            Ok(event) => self.send(DeviceMessage::Event(event)),
            Err(Some(after)) => drop(self.cast_after(after, Message::NewsDue)),
            Err(None) => {}
        }
    }

    pub(super) fn news_due(&mut self) {
        let (told, again) = self.news.due(Instant::now());
        for event in told {
            self.send(DeviceMessage::Event(event));
        }
        if let Some(after) = again {
            drop(self.cast_after(after, Message::NewsDue));
        }
    }

    pub(super) fn deliver(&mut self, message: DeviceMessage) {
        let Some(control) = &mut self.control else {
            return;
        };
        match control.outbox.send(clipped(message)) {
            Ok(()) => {}
            // What it had sent before is still to be read; the end comes after it.
            Err(OutboxError::Send(SendError::Disconnected)) => {
                tracing::debug!("nobody is there to be told");
            }
            // Told once: the reading thread may be far ahead of the actor.
            Err(error) if !std::mem::replace(&mut control.broken, true) => {
                // If the actor is gone, so is the process.
                let _ = self.myself.cast(Message::SendFailed(control.id, error));
            }
            Err(_) => {}
        }
    }

    /// Sends a heartbeat, if nothing is in its way, and sees to the next one.
    pub(super) fn heartbeat_due(&mut self, id: ConnectionId, interval: Duration) {
        let next = self.cast_after(interval, Message::HeartbeatDue(id));
        let progress = self.parts.device.progress();
        let Some(control) = self.control.as_mut().filter(|control| control.id == id) else {
            return next.abort();
        };
        let mut sequence = control.heartbeat.as_ref().map_or(0, |heart| heart.sequence);
        let Progress { done, pending } = progress.unwrap_or_default();
        let dropped_logs = log::dropped();
        let beat = Heartbeat { sequence, progress: done, pending, dropped_logs };
        match control.outbox.try_send(&DeviceMessage::Heartbeat(beat)) {
            // One that is dropped leaves a gap in the sequence.
            Ok(_) => sequence += 1,
            Err(error) => tracing::debug!(%error, "heartbeat"),
        }
        control.heartbeat = Some(Heart { interval, sequence, next });
    }

    /// The interval of a connection's heartbeats.
    pub(super) fn heartbeat_interval(&self, id: ConnectionId) -> Option<Duration> {
        let control = self.control.as_ref().filter(|control| control.id == id)?;
        control.heartbeat.as_ref().map(|heart| heart.interval)
    }
}

/// Log lines go there from now on.
fn attach_log(pipe: &OwnedFd) {
    match log::attach(pipe) {
        Ok(()) => tracing::debug!("the log has a new pipe"),
        Err(error) => tracing::warn!(%error, "the log stays where it is"),
    }
}

/// The message with its texts cut to what may travel.
pub(super) fn clipped(mut message: DeviceMessage) -> DeviceMessage {
    match &mut message {
        DeviceMessage::Refused(refused) => clip(&mut refused.refusal.text),
        DeviceMessage::Event(DeviceEvent::Failed(text)) => clip(text),
        _ => {}
    }
    message
}

fn clip(text: &mut String) {
    if text.len() > MAX_TEXT {
        let end = (0..=MAX_TEXT).rev().find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
    }
}
