//! The backend as the crate's message loop sees it: what is between the frontend and the backend that
//! was given.

#![forbid(unsafe_code)]

use super::core::Core;
use super::device::VhostUserDevice;
use super::fail_stop::FailStop;
use super::pop_gate::{Hold, Popped};
use super::transfers::Transfers;
use super::{Backend, Memory};
use crate::actor::parts::Parts;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_queue::QueueT;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

/// A backend as the crate's message loop sees it. All clones are the same.
pub(super) struct Served<B: Backend>(Arc<Both<B>>);

struct Both<B: Backend> {
    core: Arc<Core<B>>,
    parts: Arc<Parts<VhostUserDevice<B>>>,
    transfers: Transfers,
    /// The crate leaves them open.
    exit_fds: Mutex<Vec<RawFd>>,
    /// Held from before a frontend is accepted until the socket is closed for all others.
    accepting: Mutex<()>,
}

impl<B: Backend> Clone for Served<B> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<B: Backend> Served<B> {
    pub(super) fn new(core: Arc<Core<B>>, parts: Arc<Parts<VhostUserDevice<B>>>) -> Self {
        Self(Arc::new(Both {
            core,
            parts,
            transfers: Transfers::default(),
            exit_fds: Mutex::default(),
            accepting: Mutex::default(),
        }))
    }

    /// As long as this is held, a frontend that is accepted is not told the features, without which it
    /// asks for nothing. So whoever has had an answer and goes, finds the socket closed when it comes
    /// again: in the queue of a listener that is about to close, its connection would be lost.
    pub(super) fn accepting(&self) -> MutexGuard<'_, ()> {
        self.0.accepting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn core(&self) -> &Core<B> {
        &self.0.core
    }

    /// Closes what the threads of a connection have left, after they have ended.
    pub(super) fn close_exit_fds(&self) {
        let fds = std::mem::take(&mut *self.exit_fds());
        for fd in fds {
            if let Err(error) = nix::unistd::close(fd) {
                tracing::debug!(%error, "an exit event of a connection that has ended");
            }
        }
    }

    fn exit_fds(&self) -> MutexGuard<'_, Vec<RawFd>> {
        self.0.exit_fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leave for a backend that has no permits of its own to do what an event asks of it, with any ring
    /// of its thread. Events of rings do not wait for it: what they told is found again.
    fn enter(&self, thread: usize, is_ring: bool) -> Option<Vec<Popped>> {
        let core = self.core();
        let queues = core.workers.get(thread)?;
        loop {
            let popped: Option<Vec<_>> =
                queues.iter().map(|queue| core.pops.enter(*queue)).collect();
            if popped.is_some() || is_ring || !core.pops.wait_open() {
                return popped;
            }
        }
    }

    /// Signals the guest if it may have missed a signal, unless the device is stopped.
    fn signal(&self, queue: usize, vring: &B::Vring) {
        let core = self.core();
        if !core.rings.is_signal_due(queue) {
            return;
        }
        let Some(_permit) = core.pops.enter(queue) else { return };
        if core.rings.take_signal(queue)
            && let Err(error) = vring.signal_used_queue()
        {
            tracing::warn!(%error, queue, "the guest is not signalled");
        }
    }

    /// Starts those rings of a thread that the frontend has started, and of which no event was seen yet;
    /// `late` if the backend may have seen them before.
    fn look_at_rings(&self, vrings: &[B::Vring], thread: usize, late: bool) {
        let core = self.core();
        for (index, vring) in vrings.iter().enumerate() {
            if let Some(queue) = core.queue(thread, index)
                && !core.rings.is_started(queue)
            {
                core.start_ring(queue, vring, late);
            }
        }
    }

    /// What an error means that a backend has returned.
    fn judge(&self, error: &io::Error, vrings: &[B::Vring], thread: usize) {
        // Whoever looks into a ring that is stopped is told so, and hands it on.
        let all_ready = vrings.iter().all(|vring| vring.get_ref().get_queue().ready());
        if self.core().facts.holds_permits || all_ready {
            self.core().fail(format!("handle_event of thread {thread}: {error}"));
        } else {
            tracing::warn!(%error, thread, "an event beside a ring that is stopped");
        }
    }
}

impl<B: Backend> VhostUserBackend for Served<B> {
    type Bitmap = B::Bitmap;
    type Vring = B::Vring;

    fn num_queues(&self) -> usize {
        self.core().backend.num_queues()
    }

    fn max_queue_size(&self) -> usize {
        self.core().backend.max_queue_size()
    }

    fn features(&self) -> u64 {
        drop(self.accepting());
        self.core().offer.features
    }

    fn acked_features(&self, features: u64) {
        self.core().set_accepted(features);
        self.core().backend.acked_features(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.core().offer.protocol
    }

    /// The rings are disabled already; what is in flight is not waited for by the crate.
    fn reset_device(&self) {
        let core = self.core();
        let deadline = core.facts.drain_deadline;
        let _deadline = FailStop::arm("draining for RESET_DEVICE".into(), deadline);
        core.pops.hold(Hold::Resetting);
        // There is always another moment, until the process ends.
        let _ = core.pops.drained_within(Duration::MAX);
        core.backend.reset_device();
        core.kept().clear();
        core.rings.reset();
        core.give_back();
        core.set_accepted(0);
        core.pops.release(Hold::Resetting);
    }

    fn set_event_idx(&self, enabled: bool) {
        self.core().backend.set_event_idx(enabled);
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        #[cfg(feature = "fault-injection")]
        crate::fault::pass(standstill_protocol::fault::Point::Mmio);
        let mut data = self.core().backend.get_config(offset, size);
        self.core().kept().overlay(offset, &mut data);
        data
    }

    fn set_config(&self, offset: u32, data: &[u8]) -> io::Result<()> {
        let core = self.core();
        let permit = self.0.parts.accesses.try_enter();
        // What a stop waits for, as for an access to a register.
        #[cfg(feature = "fault-injection")]
        crate::fault::pass(standstill_protocol::fault::Point::Mmio);
        match permit {
            Some(_permit) => {
                core.write_kept();
                core.write_config(offset, data);
            }
            None if core.kept().keep(offset, data) => {}
            None => {
                let text = "too many writes to the configuration space of a device that is stopped";
                tracing::warn!(text);
                return Err(io::Error::other(text));
            }
        }
        Ok(())
    }

    fn update_memory(&self, memory: Memory<B>) -> io::Result<()> {
        let core = self.core();
        core.set_memory(&memory);
        let ram_only = core.reaches_ram_only(&self.0.parts.memory);
        tracing::debug!(ram_only, "the frontend has set its memory");
        core.backend.update_memory(memory).inspect_err(|error| {
            tracing::error!(%error, "the backend does not take the memory of the frontend");
        })
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        self.core().backend.queues_per_thread()
    }

    /// A fresh one for each thread of each connection: without, threads could never be told to end.
    fn exit_event(&self, thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        match new_event_consumer_and_notifier(EventFlag::CLOEXEC) {
            Ok((consumer, notifier)) => {
                self.exit_fds().push(consumer.as_raw_fd());
                Some((consumer, notifier))
            }
            Err(error) => {
                tracing::error!(%error, thread, "no exit event");
                None
            }
        }
    }

    /// Never an error: the frontend would go on without an answer, and what is in flight would come
    /// into a ring that it has taken back.
    fn stop_vring(&self, queue_index: u32) -> io::Result<()> {
        let core = self.core();
        let deadline = core.facts.drain_deadline;
        let queue = usize::try_from(queue_index).unwrap_or(usize::MAX);
        let _deadline = FailStop::arm(format!("draining queue {queue}"), deadline);
        core.rings.stopped(queue);
        if let Err(error) = core.backend.stop_vring(queue_index) {
            tracing::warn!(%error, queue, "the backend's stop_vring: what is in flight is waited for");
        }
        // As above.
        let _ = core.pops.passed_within(queue, Duration::MAX);
        core.give_back();
        Ok(())
    }

    /// Never an error: the thread would end, and nobody be told.
    fn handle_event(
        &self,
        device_event: u16,
        evset: EventSet,
        vrings: &[B::Vring],
        thread: usize,
    ) -> io::Result<()> {
        let core = self.core();
        let ring = vrings.get(usize::from(device_event));
        let queue = core.queue(thread, device_event.into());
        if let (Some(vring), Some(queue)) = (ring, queue) {
            if !core.rings.is_started(queue) && !core.start_ring(queue, vring, false) {
                return Ok(());
            }
            self.signal(queue, vring);
        }
        // A backend may look into all rings of its thread, whatever event it is. Whoever has permits gets
        // none for rings that are not started.
        let holds_permits = core.facts.holds_permits;
        if !holds_permits {
            self.look_at_rings(vrings, thread, false);
        }
        // Held until it is clear what an error means: a ring may be stopped until then.
        let _popped = if holds_permits {
            None
        } else {
            let Some(popped) = self.enter(thread, ring.is_some()) else { return Ok(()) };
            Some(popped)
        };
        if let Err(error) = core.backend.handle_event(device_event, evset, vrings, thread) {
            self.judge(&error, vrings, thread);
        }
        if !holds_permits && ring.is_none() {
            // Those that were started in the middle of it. An event of a ring is taken to be for that ring:
            // most that are started meanwhile were not used, and go on where their own event says.
            self.look_at_rings(vrings, thread, true);
        }
        core.events.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn set_device_state_fd(
        &self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        file: File,
    ) -> io::Result<Option<File>> {
        let refused = |text: &str| {
            tracing::warn!(text, "the device's state is not transferred");
            io::Error::other(text.to_owned())
        };
        if !self.core().offer.protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE) {
            return Err(refused("this device's state can neither be saved nor loaded"));
        }
        if self.core().rings.any_started() {
            return Err(refused("not all rings are stopped"));
        }
        self.0.transfers.begin(&self.0.parts, direction, file).map_err(|text| refused(&text))?;
        Ok(None)
    }

    fn check_device_state(&self) -> io::Result<()> {
        self.0.transfers.wait().map_err(|text| {
            tracing::error!(text, "the device's state was not transferred");
            // The frontend learns that something is wrong, and nothing of what.
            self.core().tell(text.clone());
            io::Error::other(text)
        })
    }
}
