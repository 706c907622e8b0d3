//! A backend and all that the runtime keeps for it.

#![forbid(unsafe_code)]

use super::claim::{Claim, Claimed};
use super::config::Kept;
use super::offer::{OF_THE_CONNECTION, Offer};
use super::pop_gate::{Hold, PopGate};
use super::rings::{Look, Rings, Started};
use super::state::{Saved, StateError};
use super::{Backend, Memory, SavesState};
use crate::actor::Message;
use crate::memory::MemoryMap;
use ractor::ActorRef;
use standstill_protocol::message::FileIdentity;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use thiserror::Error;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion};

/// What its author says of a backend.
pub(super) struct Facts<B> {
    /// It passes the gate by itself, request by request.
    pub(super) holds_permits: bool,
    pub(super) completes_in_order: bool,
    /// How long requests in flight may take to end.
    pub(super) drain_deadline: Duration,
    /// Queues whose entries wait for the world.
    pub(super) receives: Vec<usize>,
    pub(super) state: Option<SavesState<B>>,
}

/// A backend and all that the runtime keeps for it.
pub(super) struct Core<B: Backend> {
    pub(super) backend: B,
    pub(super) facts: Facts<B>,
    pub(super) pops: PopGate,
    pub(super) offer: Offer,
    /// The queues that each thread serves.
    pub(super) workers: Vec<Vec<usize>>,
    pub(super) rings: Rings<B>,
    /// What it has to itself while a ring is started.
    pub(super) claimed: Option<Claimed>,
    /// The frontend's memory, and the files behind it.
    memory: Mutex<Option<Memory<B>>>,
    table: Mutex<Vec<Option<FileIdentity>>>,
    /// The virtio features that the driver has accepted.
    accepted: AtomicU64,
    pub(super) kept: Mutex<Kept>,
    /// Events that were handled.
    pub(super) events: AtomicU64,
    pub(super) frontend_is_there: AtomicBool,
    /// Whom to tell that the device cannot go on.
    pub(super) actor: OnceLock<ActorRef<Message>>,
}

/// A saved state was not taken over, or not made.
#[derive(Debug, Error)]
pub(super) enum TransferError {
    #[error(transparent)]
    Rings(#[from] StateError),
    #[error("the backend: {0}")]
    Backend(#[source] std::io::Error),
}

impl<B: Backend> Core<B> {
    pub(super) fn new(
        backend: B,
        facts: Facts<B>,
        pops: PopGate,
        offer: Offer,
        workers: Vec<Vec<usize>>,
        claim: Option<Box<dyn Claim>>,
    ) -> Self {
        let queues = backend.num_queues();
        let own_permits = facts.holds_permits.then(|| pops.clone());
        let claimed = claim.map(|claim| Claimed::new(claim, &pops));
        Self {
            backend,
            facts,
            pops,
            offer,
            workers,
            rings: Rings::new(queues, own_permits),
            claimed,
            memory: Mutex::default(),
            table: Mutex::default(),
            accepted: AtomicU64::new(0),
            kept: Mutex::default(),
            events: AtomicU64::new(0),
            frontend_is_there: AtomicBool::new(false),
            actor: OnceLock::new(),
        }
    }

    /// The backend cannot go on: nothing is popped any more, and the coordinator is told.
    pub(super) fn fail(&self, text: String) {
        if self.pops.is_held(Hold::Failed) {
            return;
        }
        self.pops.hold(Hold::Failed);
        tracing::error!(text, "the backend cannot go on: its rings stop");
        self.tell(text);
    }

    /// Tells the coordinator that something does not work any more.
    pub(super) fn tell(&self, text: String) {
        if let Some(actor) = self.actor.get() {
            // If the actor is gone, so is the process.
            let _ = actor.cast(Message::DeviceFailed(text));
        }
    }

    /// The queue that is the ring of that index within a thread.
    #[inline]
    pub(super) fn queue(&self, thread: usize, index: usize) -> Option<usize> {
        self.workers.get(thread)?.get(index).copied()
    }

    /// The first look at a ring since it was started, if it was; `late` if something may have been taken
    /// out of it. Whether it can be served now.
    #[cold]
    pub(super) fn start_ring(&self, queue: usize, vring: &B::Vring, late: bool) -> bool {
        let Some(memory) = self.memory().clone() else { return false };
        let look = Look { in_order: self.facts.completes_in_order, late };
        match self.rings.start(queue, vring, &memory, self.accepted(), look) {
            Started::NotReady => return false,
            Started::Yes(None) => tracing::debug!(queue, "the ring is started"),
            Started::Yes(Some(base)) => {
                tracing::info!(
                    queue,
                    base,
                    "the frontend starts a ring beyond its used index: what was popped and not done is \
                     done again"
                );
            }
            Started::Refused(error, is_news) => {
                if is_news {
                    tracing::error!(queue, %error, "the ring is not served");
                    self.tell(format!("queue {queue}: {error}"));
                }
                return false;
            }
        }
        self.claim();
        true
    }

    /// There are threads for a frontend, which wait by these, each for the kicks of its queues.
    pub(super) fn connected(&self, epolls: &[Arc<OwnedFd>]) {
        let waiter = |queue| {
            let served = |(thread, queues): (usize, &Vec<usize>)| {
                let number = queues.iter().position(|own| *own == queue)?;
                Some((Arc::clone(epolls.get(thread)?), number as u64))
            };
            self.workers.iter().enumerate().find_map(served)
        };
        self.rings.connected((0..self.backend.num_queues()).map_while(waiter).collect());
    }

    /// The frontend has another table of memory.
    pub(super) fn set_memory(&self, memory: &Memory<B>) {
        let file = |region: &_| {
            let offset = GuestMemoryRegion::file_offset(region)?;
            let facts = rustix::fs::fstat(offset.file()).ok()?;
            Some(FileIdentity { device: facts.st_dev, inode: facts.st_ino })
        };
        let mut table: Vec<_> = memory.memory().iter().map(file).collect();
        table.sort_unstable_by_key(|file| file.map(|file| (file.device, file.inode)));
        table.dedup();
        *self.table() = table;
        *self.memory() = Some(memory.clone());
    }

    /// The frontend has gone, and its memory with it.
    pub(super) fn forget_memory(&self) {
        self.table().clear();
        *self.memory() = None;
    }

    /// Whether all that the device can reach is RAM, as the coordinator has declared.
    pub(super) fn reaches_ram_only(&self, declared: &MemoryMap) -> bool {
        let table = self.table();
        table.iter().all(|file| file.is_some_and(|file| declared.is_declared(file)))
    }

    pub(super) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Acquire)
    }

    pub(super) fn set_accepted(&self, features: u64) {
        self.accepted.store(features & !OF_THE_CONNECTION, Ordering::Release);
    }

    /// Carries out what was written to the configuration space while the device was stopped.
    pub(super) fn write_kept(&self) {
        // Each by itself: the backend is called without a lock.
        loop {
            let next = self.kept().next();
            let Some((offset, data)) = next else { return };
            self.write_config(offset, &data);
        }
    }

    pub(super) fn write_config(&self, offset: u32, data: &[u8]) {
        if let Err(error) = self.backend.set_config(offset, data) {
            // The frontend would lose its connection, for what its guest has written.
            tracing::warn!(%error, offset, length = data.len(), "a write to the configuration space");
        }
    }

    pub(super) fn save(&self, to: &mut dyn Write) -> Result<(), TransferError> {
        Saved::new(self.accepted(), self.rings.save()).write(to)?;
        match &self.facts.state {
            Some(hooks) => (hooks.save)(&self.backend, to).map_err(TransferError::Backend),
            None => Ok(()),
        }
    }

    pub(super) fn load(&self, from: &mut dyn Read) -> Result<(), TransferError> {
        let saved = Saved::read(from)?;
        let max_size = u16::try_from(self.backend.max_queue_size()).unwrap_or(u16::MAX);
        saved.check(self.backend.num_queues(), max_size, self.offer.of_the_device())?;
        self.rings.check_started(&saved.rings, saved.accepted, self.accepted())?;
        if let Some(hooks) = &self.facts.state {
            (hooks.load)(&self.backend, from).map_err(TransferError::Backend)?;
        }
        self.kept().clear();
        self.rings.load(&saved.rings, saved.accepted);
        // Until a frontend says what its driver has accepted.
        self.set_accepted(saved.accepted);
        Ok(())
    }

    pub(super) fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory(&self) -> MutexGuard<'_, Option<Memory<B>>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, Vec<Option<FileIdentity>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
