//! A coordinator actor whose mailbox a test empties.

use super::super::incarnation::{Child, Starter};
use super::super::keep::Kept;
use super::super::start::{Beginning, Prepared};
use super::super::state::State;
use super::super::{Message, Spawned};
use super::{Device, Script};
use crate::description::{DeviceSpec, MachineBuilder};
use crate::error::StartError;
use crate::machine::Machine;
use crate::mailbox::Mailbox;
use standstill_protocol::channel::CoordinatorEnd;
use std::io;
use std::task::{Context, Poll, Waker};
use tokio::sync::oneshot;

/// Where whoever starts a machine waits for it.
pub(in super::super) type Started = oneshot::Receiver<Result<Machine, StartError>>;

/// The coordinator actor, without anybody who runs it.
pub(in super::super) struct ScriptedActor {
    /// `None` once it has ended.
    pub(in super::super) state: Option<State>,
    pub(in super::super) script: Script,
    /// A `Readable` is on its way, or nobody has said yet that all was read.
    told_readable: bool,
}

/// A new process with that number, and the device that it runs.
pub(in super::super) fn process(
    script: &Script,
    number: usize,
    name: &str,
) -> io::Result<(Spawned, Device)> {
    let (ours, theirs) = CoordinatorEnd::pair()?;
    let device = Device::new(name, theirs)?;
    Ok(((ours, Child::Scripted(script.process(number))), device))
}

impl ScriptedActor {
    /// The actor of a machine whose processes were just started.
    pub(in super::super) fn start(
        builder: MachineBuilder,
        kept: Option<Kept>,
        script: &Script,
    ) -> io::Result<(Self, Vec<Device>, Started)> {
        let mut devices = Vec::with_capacity(builder.devices.len());
        let mut processes = Vec::with_capacity(builder.devices.len());
        for (number, DeviceSpec { name, .. }) in builder.devices.iter().enumerate() {
            let (spawned, device) = process(script, number, name)?;
            processes.push(Ok(spawned));
            devices.push(device);
        }
        let (reply, started) = oneshot::channel();
        let beginning = Beginning::Started(processes, reply);
        Ok((Self::begin(builder, kept, script, beginning)?, devices, started))
    }

    /// The actor of a machine.
    pub(in super::super) fn begin(
        builder: MachineBuilder,
        kept: Option<Kept>,
        script: &Script,
        beginning: Beginning,
    ) -> io::Result<Self> {
        let starter = Starter::Script(script.clone());
        let events = builder.events.clone();
        let prepared = Prepared { builder, starter, kept, events, beginning };
        let state = at_once(prepared.into_state(Mailbox::Script(script.clone())));
        let state = state.unwrap_or_else(|| Err(io::Error::other("it waits for something")))?;
        Ok(Self { state: Some(state), script: script.clone(), told_readable: false })
    }

    /// Whether the task that watches the sockets has something to say.
    pub(in super::super) fn is_readable(&mut self) -> bool {
        let Some(state) = &self.state else { return false };
        self.told_readable &= !state.poll.was_drained();
        !self.told_readable && !state.poll.ready().is_empty()
    }

    /// There is something to read, the actor was told, and has gone on without reading it all.
    #[cfg(test)]
    pub(in super::super) fn is_forgotten(&self) -> bool {
        let Some(state) = &self.state else { return false };
        self.told_readable && self.script.mails() == 0 && !state.poll.ready().is_empty()
    }

    /// Has it say so.
    pub(in super::super) fn watch(&mut self) {
        if self.is_readable() {
            self.told_readable = self.script.cast(Message::Readable).is_ok();
        }
    }

    /// Has the actor handle the next message that waits, which may be looked at before; false if
    /// none waits.
    pub(in super::super) fn handle(&mut self, look: impl FnOnce(&Message)) -> bool {
        let Some(message) = self.script.mail() else { return false };
        look(&message);
        if let Some(state) = &mut self.state {
            // Nothing of it waits: what may block is the script's.
            at_once(state.handle(message));
        }
        if self.script.is_stopped() {
            self.end();
        }
        true
    }

    /// The actor ends; what waits in its mailbox is dropped.
    pub(in super::super) fn end(&mut self) {
        self.script.stop();
        drop(self.state.take());
        while self.script.mail().is_some() {}
    }
}

impl Drop for ScriptedActor {
    fn drop(&mut self) {
        self.end();
        self.script.forget();
    }
}

/// What comes of a future that does not wait; `None` if it does.
pub(in super::super) fn at_once<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => Some(value),
        Poll::Pending => None,
    }
}
