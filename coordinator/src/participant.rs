//! Participants inside the VMM: local devices and hooks.
//!
//! Both run on threads of their own, so that one that blocks (a kernel VFIO device whose state
//! change takes its time) holds nobody up. Neither can be fenced: one that hangs makes the
//! transition end in *Held*. One that panics is one that never returns.

use standstill_protocol::message::{Command, PeerDma, Phase};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_protocol::transition::{HookId, HookMoment, ParticipantId};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

/// Any error of a local device or hook; its text is reported.
pub type LocalError = Box<dyn std::error::Error + Send + Sync>;

/// A device inside the VMM that takes part in both phases: an in-process device, or a kernel VFIO
/// device.
pub trait LocalDevice: Send + 'static {
    /// Its migration states; asked once.
    fn migration(&self) -> MigrationFlags;

    /// Whether DMA between it and its peers is possible; asked once.
    fn peer_dma(&self) -> PeerDma {
        PeerDma::Possible
    }

    /// Moves the device to that state, through every state on the way, and returns when it is
    /// there. May block; the command's budget says for how long at most.
    ///
    /// # Errors
    ///
    /// The device is in the state that the second part says.
    fn set_state(
        &mut self,
        target: MigrationState,
        command: &Command,
    ) -> Result<(), (LocalError, MigrationState)>;
}

/// Something of the VMM that must stop and start at a fixed place: vCPUs, timers, a block layer.
pub trait Hook: Send + 'static {
    /// The machine stops. May block.
    ///
    /// # Errors
    ///
    /// Things are as before the call; the transition is undone.
    fn stop(&mut self) -> Result<(), LocalError>;

    /// The machine starts. May block.
    ///
    /// # Errors
    ///
    /// As [`stop`](Self::stop).
    fn start(&mut self) -> Result<(), LocalError>;
}

/// What comes back from the thread of a local device or hook.
#[derive(Debug)]
pub(crate) enum LocalAnswer {
    /// A local device carried a command out, or says where it is and why it has not.
    Device(ParticipantId, Command, Result<(), (String, MigrationState)>),
    /// A hook returned.
    Hook(HookId, HookMoment, Result<(), String>),
}

/// The thread of a local device or hook. It ends when this is dropped and the call has returned.
#[derive(Debug)]
pub(crate) struct LocalThread<T> {
    calls: Sender<(u64, T)>,
    /// Grows with each hold.
    holds: Arc<AtomicU64>,
}

impl<T> LocalThread<T> {
    /// False if the thread is gone.
    pub(crate) fn call(&self, call: T) -> bool {
        self.calls.send((self.holds.load(Ordering::Acquire), call)).is_ok()
    }

    /// A hold begins: whatever leads back to running and was not begun yet is void. A local device
    /// that hangs and returns must not carry out what an undo told it meanwhile.
    pub(crate) fn hold(&self) {
        self.holds.fetch_add(1, Ordering::AcqRel);
    }
}

/// What a test takes in the place of a thread: the calls, each with the number of holds by then, and
/// that number.
#[cfg(test)]
pub(crate) type ScriptedCalls<T> = (Receiver<(u64, T)>, Arc<AtomicU64>);

#[cfg(test)]
impl<T> LocalThread<T> {
    /// One whose calls a test takes.
    pub(crate) fn scripted() -> (Self, ScriptedCalls<T>) {
        let (calls, receiver) = channel();
        let holds = Arc::new(AtomicU64::new(0));
        (Self { calls, holds: Arc::clone(&holds) }, (receiver, holds))
    }
}

/// Starts the thread of a local device.
pub(crate) fn local_device(
    id: ParticipantId,
    name: &str,
    mut device: Box<dyn LocalDevice>,
    answer: impl Fn(LocalAnswer) + Send + 'static,
) -> io::Result<LocalThread<Command>> {
    spawn(name, move |calls: Receiver<(u64, Command)>, holds| {
        for (told_at, command) in calls {
            let starts = matches!(command.phase, Phase::PrepareStart | Phase::Start);
            if starts && told_at != holds.load(Ordering::Acquire) {
                continue;
            }
            let result = device
                .set_state(command.target, &command)
                .map_err(|(error, state)| (error.to_string(), state));
            answer(LocalAnswer::Device(id, command, result));
        }
    })
}

/// Starts the thread of a hook.
pub(crate) fn hook(
    id: HookId,
    name: &str,
    mut hook: Box<dyn Hook>,
    answer: impl Fn(LocalAnswer) + Send + 'static,
) -> io::Result<LocalThread<HookMoment>> {
    spawn(name, move |calls: Receiver<(u64, HookMoment)>, _| {
        // One that hangs is told nothing more, so nothing of it can be void.
        for (_, moment) in calls {
            let result = match moment {
                HookMoment::Stop => hook.stop(),
                HookMoment::Start => hook.start(),
            };
            answer(LocalAnswer::Hook(id, moment, result.map_err(|error| error.to_string())));
        }
    })
}

fn spawn<T: Send + 'static>(
    name: &str,
    body: impl FnOnce(Receiver<(u64, T)>, Arc<AtomicU64>) + Send + 'static,
) -> io::Result<LocalThread<T>> {
    let (calls, receiver) = channel();
    let holds = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&holds);
    // The kernel keeps 15 bytes of a thread's name.
    let name: String = name.chars().take(15).collect();
    thread::Builder::new().name(name).spawn(move || body(receiver, seen))?;
    Ok(LocalThread { calls, holds })
}
