//! The engine's thread: fetch a descriptor, execute it, go on to the next.
//!
//! It knows nothing of stops and starts. Only the gate holds it: in
//! [`Dma::access`](crate::memory::Dma::access), where it waits without a lock. All that it
//! changes (memory, counters, interrupts) it changes under a permit, so when the gate is closed
//! and drained, nothing of the device changes any more.

#![forbid(unsafe_code)]

use super::descriptor::{
    BadDescriptor, DESCRIPTOR_SIZE, Descriptor, FLAG_INTERRUPT, FLAG_SEQUENCE, FLAG_STAMP,
};
use super::registers::ErrorCode;
use super::state::{Sequence, State};
use crate::device::Handles;
use crate::memory::{Access, DmaError, Span};
use rustix::process::setpriority_process;
use rustix::thread::gettid;
use rustix::time::{ClockId, clock_gettime};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use thiserror::Error;

/// Nice value of the thread.
const NICE: i32 = 10;
/// After so many descriptors the CPU time is read again, …
const CLOCK_DESCRIPTORS: u32 = 64;
/// … or after so many bytes.
const CLOCK_BYTES: u64 = 1 << 20;

/// What the thread and the register handlers have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) handles: Handles,
    pub(super) vectors: u16,
    current: Mutex<Current>,
    /// Woken when there may be work.
    work: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct Current {
    pub(super) state: State,
    /// Changes when what was fetched from the ring is void.
    generation: u64,
    ended: bool,
}

/// One descriptor that is to be executed.
#[derive(Clone, Copy, Debug)]
struct Job {
    generation: u64,
    iova: u64,
    /// Whether it is the first one of the ring.
    first: bool,
}

/// Why a descriptor was not executed.
#[derive(Clone, Copy, Debug, Error)]
enum Fault {
    #[error("the descriptor cannot be read: {0}")]
    Ring(DmaError),
    #[error("bad descriptor: {0}")]
    Descriptor(#[from] BadDescriptor),
    #[error(transparent)]
    Dma(#[from] DmaError),
}

impl Fault {
    fn code(self) -> ErrorCode {
        match self {
            Self::Ring(_) => ErrorCode::Ring,
            Self::Dma(DmaError::Forbidden { .. }) => ErrorCode::Forbidden,
            Self::Dma(
                DmaError::NoMemory { .. } | DmaError::InHandler { .. } | DmaError::Message { .. },
            ) => ErrorCode::NoMemory,
            Self::Dma(DmaError::Unmapped { .. } | DmaError::Closed) => ErrorCode::Unmapped,
            Self::Descriptor(_)
            | Self::Dma(DmaError::TooManySpans { .. } | DmaError::OutsideSpan { .. }) => {
                ErrorCode::Descriptor
            }
        }
    }
}

impl Shared {
    pub(super) fn new(handles: Handles, vectors: u16) -> Self {
        Self { handles, vectors, current: Mutex::default(), work: Condvar::new() }
    }

    /// The state, for as long as it takes to look at it. Never held while waiting for anything.
    pub(super) fn lock(&self) -> MutexGuard<'_, Current> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the state, makes void what was fetched if the ring is another now, and wakes the
    /// thread if there is work. A change that fails must have changed nothing.
    pub(super) fn change<E>(
        &self,
        change: impl FnOnce(&mut State) -> Result<Ring, E>,
    ) -> Result<(), E> {
        let mut current = self.lock();
        if change(&mut current.state)? == Ring::Another {
            current.generation += 1;
        }
        if current.state.has_work() {
            self.work.notify_one();
        }
        Ok(())
    }

    /// Lets the thread end as soon as it waits for nothing else.
    pub(super) fn end(&self) {
        let mut current = self.lock();
        current.ended = true;
        current.generation += 1;
        self.work.notify_one();
    }

    /// Does nothing for that long, or until the end.
    fn rest(&self, time: Duration) {
        let current = self.lock();
        // Poisoned or not: nothing is read.
        drop(self.work.wait_timeout_while(current, time, |current| !current.ended));
    }

    /// Waits for a descriptor to execute; `None` at the end.
    fn next_job(&self) -> Option<Job> {
        let mut current = self.lock();
        loop {
            if current.ended {
                return None;
            }
            if current.state.has_work() {
                let iova = current.state.descriptor_iova();
                let first = current.state.head == 0;
                return Some(Job { generation: current.generation, iova, first });
            }
            current = self.work.wait(current).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Index and next sequence number of the descriptor that is to be executed; `None` if the job is void or the driver has stopped the engine.
    fn begin(&self, job: Job) -> Option<(usize, u64)> {
        let current = self.lock();
        if current.generation != job.generation || !current.state.run {
            return None;
        }
        let index = current.state.head as usize;
        let sequences = &current.state.sequences;
        let executed = sequences.get(index).map_or(0, |sequence| sequence.executed);
        Some((index, executed.wrapping_add(1)))
    }
}

/// Whether a change has made another ring of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ring {
    Same,
    Another,
}

/// What only the thread knows.
pub(super) struct Engine {
    shared: Arc<Shared>,
    rest: Duration,
    cpu_ns: u64,
    clock_descriptors: u32,
    clock_bytes: u64,
}

impl Engine {
    pub(super) fn new(shared: Arc<Shared>, rest: Duration) -> Self {
        Self { shared, rest, cpu_ns: 0, clock_descriptors: 0, clock_bytes: 0 }
    }

    /// The thread's life.
    pub(super) fn run(mut self) {
        let shared = Arc::clone(&self.shared);
        self.cpu_ns = thread_cpu_ns();
        yield_to_control();
        while let Some(job) = shared.next_job() {
            if job.first && !self.rest.is_zero() {
                // Nothing is held meanwhile, and a job that is void by then is seen to be.
                shared.rest(self.rest);
            }
            if let Err(fault) = self.execute(&shared, job) {
                halt(&shared, job, fault);
            }
        }
    }

    fn execute(&mut self, shared: &Shared, job: Job) -> Result<(), Fault> {
        let descriptor = fetch(shared, job.iova).map_err(Fault::Ring)?;
        descriptor.check(shared.vectors)?;
        let len = u64::from(descriptor.len);
        let spans = [
            Span::read(descriptor.source, len),
            Span::write(descriptor.destination, len),
            Span::write(descriptor.sequence_iova, 8),
        ];
        let used = if descriptor.has(FLAG_SEQUENCE) { &spans[..] } else { &spans[..2] };
        let access = shared.handles.dma.access(used)?;
        // Only now: while it waited, anything can have happened.
        let Some((index, sequence)) = shared.begin(job) else {
            return Ok(());
        };
        transfer(&access, &descriptor, sequence)?;
        self.complete(shared, job, &descriptor, index, sequence);
        if descriptor.has(FLAG_INTERRUPT) {
            // Under the permit: a stop that has waited for it finds the interrupt raised or latched.
            shared.handles.interrupts.raise(u16::try_from(descriptor.vector).unwrap_or(u16::MAX));
        }
        drop(access);
        Ok(())
    }

    /// Counts what was done; the caller holds the permit.
    fn complete(
        &mut self,
        shared: &Shared,
        job: Job,
        descriptor: &Descriptor,
        index: usize,
        sequence: u64,
    ) {
        let mut current = shared.lock();
        let same_ring = current.generation == job.generation;
        let state = &mut current.state;
        state.bytes = state.bytes.wrapping_add(u64::from(descriptor.len));
        state.descriptors = state.descriptors.wrapping_add(1);
        if state.sequences.len() <= index {
            state.sequences.resize(index + 1, Sequence::default());
        }
        if let Some(entry) = state.sequences.get_mut(index) {
            entry.executed = sequence;
            if descriptor.has(FLAG_SEQUENCE) {
                entry.stored = sequence;
            }
        }
        if same_ring {
            state.head = (state.head + 1) % state.ring_entries.max(1);
        }
        self.clock_descriptors += 1;
        self.clock_bytes += u64::from(descriptor.len);
        let due = self.clock_descriptors >= CLOCK_DESCRIPTORS
            || self.clock_bytes >= CLOCK_BYTES
            || !state.has_work();
        if due {
            let now = thread_cpu_ns();
            state.busy_ns = state.busy_ns.wrapping_add(now.saturating_sub(self.cpu_ns));
            self.cpu_ns = now;
            self.clock_descriptors = 0;
            self.clock_bytes = 0;
        }
    }
}

fn fetch(shared: &Shared, iova: u64) -> Result<Descriptor, DmaError> {
    let mut bytes = [0; 64];
    shared.handles.dma.access(&[Span::read(iova, DESCRIPTOR_SIZE)])?.read(0, 0, &mut bytes)?;
    Ok(Descriptor::from_bytes(&bytes))
}

fn transfer(access: &Access<'_>, descriptor: &Descriptor, sequence: u64) -> Result<(), DmaError> {
    access.copy(0, 1)?;
    if descriptor.has(FLAG_STAMP) {
        access.write(1, 0, &sequence.to_le_bytes())?;
    }
    if descriptor.has(FLAG_SEQUENCE) {
        access.store_u64(2, 0, sequence)?;
    }
    Ok(())
}

/// Stops at a descriptor that cannot be executed. This, too, needs leave to change the state.
fn halt(shared: &Shared, job: Job, fault: Fault) {
    // Without spans it cannot fail, it only waits.
    let permit = shared.handles.dma.access(&[]);
    let mut current = shared.lock();
    if current.generation == job.generation && current.state.run {
        current.state.run = false;
        current.state.error = fault.code() as u8;
        tracing::info!(%fault, head = current.state.head, "copy engine halted");
    }
    drop(current);
    drop(permit);
}

/// Lowers the calling thread's priority: where there are more engines than CPUs, a command would
/// otherwise wait until each of them has had its turn.
fn yield_to_control() {
    if let Err(error) = setpriority_process(Some(gettid()), NICE) {
        tracing::debug!(%error, "the engine keeps its priority");
    }
}

/// CPU time of the calling thread in nanoseconds.
fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds)
}

#[cfg(test)]
mod tests;
