//! The backend as the lifecycle sees it.

#![forbid(unsafe_code)]

use super::Backend;
use super::core::Core;
use super::pop_gate::Hold;
use crate::device::{AccessError, Device, DeviceError, Moment, Progress};
use crate::memory::MemoryMap;
use standstill_protocol::message::{Counter, CounterKind, Evidence, MAX_COUNTERS};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long requests in flight may take to end before a reset that the coordinator asks for.
const RESET_DRAIN: Duration = Duration::from_secs(4);

/// What a hook leaves of its budget to say why it has failed.
const WORDS: Duration = Duration::from_millis(10);

/// The backend as the lifecycle sees it.
///
/// | hook | |
/// |---|---|
/// | `prepare_stop` | nothing is popped any more; where the frontend's memory is not all declared to be RAM, what is in flight is waited for |
/// | `stop` | what is in flight is waited for |
/// | `prepare_start` | nothing |
/// | `start` | what waited is written to the configuration space, pops go on, every started ring is kicked |
pub(crate) struct VhostUserDevice<B: Backend> {
    core: Arc<Core<B>>,
    /// Knows what is RAM.
    memory: MemoryMap,
    /// By queue, how many requests were in flight when the first step of the last stop came.
    at_stop: Vec<AtomicU64>,
}

impl<B: Backend> VhostUserDevice<B> {
    pub(super) fn new(core: Arc<Core<B>>, memory: MemoryMap) -> Self {
        let at_stop = (0..core.pops.queues()).map(|_| AtomicU64::new(0)).collect();
        Self { core, memory, at_stop }
    }

    /// Takes care that what is in flight comes to its end, however much waits behind it.
    fn begin_rest(&self) {
        let core = &self.core;
        core.pops.hold(Hold::Stopped);
        for (queue, count) in self.at_stop.iter().enumerate() {
            count.store(core.pops.in_flight_of(queue), Ordering::Relaxed);
        }
        let rest = core.rings.begin_rest();
        if core.facts.holds_permits || core.pops.in_flight() == 0 {
            return;
        }
        let core = Arc::clone(core);
        // Nobody waits for it: what is waited for is what is in flight.
        tokio::task::spawn_blocking(move || core.rings.close(rest));
    }

    /// Waits until nothing is in flight.
    async fn drain(&self, budget: Duration) -> Result<(), DeviceError> {
        let core = &self.core;
        // Usually there is nothing to wait for, and then no timer is needed. The hook itself is to say
        // what it waits for, and not to be cut off.
        let budget = budget.saturating_sub(WORDS.min(budget / 4));
        let is_drained = core.pops.in_flight() == 0
            || tokio::time::timeout(budget, core.pops.drained()).await.is_ok();
        if !is_drained {
            let in_flight = core.pops.in_flight();
            let text = format!("{in_flight} requests still in flight after {budget:?}");
            return Err(DeviceError::new(text));
        }
        core.rings.end_rest();
        core.rings.open();
        Ok(())
    }

    /// Opens the gate, and sees to it that all that waits in the rings is found.
    fn go_on(&self) {
        let core = &self.core;
        core.rings.want_signals();
        core.rings.end_rest();
        if core.pops.in_flight() == 0 {
            // Nobody is in the middle of an event, so these do not wait; after the release they might.
            core.rings.open();
            let kicks = core.rings.kicks();
            let kicked = kicks.queues();
            // If it is closed for another reason, the end of that kicks the rings.
            if core.pops.release(Hold::Stopped) {
                kicks.give();
                if core.rings.kicks_missed(&kicked) {
                    let core = Arc::clone(core);
                    tokio::task::spawn_blocking(move || core.rings.kick_all());
                }
            }
            return;
        }
        let is_open = core.pops.release(Hold::Stopped);
        let core = Arc::clone(core);
        tokio::task::spawn_blocking(move || {
            core.rings.open();
            if is_open {
                core.rings.kick_all();
            }
        });
    }
}

impl<B: Backend> Device for VhostUserDevice<B> {
    /// There are no regions.
    fn region_read(&self, _: u32, offset: u64, data: &mut [u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn region_write(&self, _: u32, offset: u64, data: &[u8]) -> Result<(), AccessError> {
        Err(AccessError::NoRegister { offset, width: data.len() })
    }

    fn reset(&self) -> Result<(), DeviceError> {
        let core = &self.core;
        core.pops.hold(Hold::Resetting);
        if !core.pops.drained_within(RESET_DRAIN) {
            let text =
                format!("{} requests still in flight after {RESET_DRAIN:?}", core.pops.in_flight());
            core.fail(text.clone());
            core.pops.release(Hold::Resetting);
            return Err(DeviceError::new(text));
        }
        core.backend.reset_device();
        core.kept().clear();
        core.rings.expect_nothing();
        core.rings.want_signals();
        core.pops.release(Hold::Failed);
        if core.pops.release(Hold::Resetting) {
            core.rings.kick_all();
        }
        Ok(())
    }

    async fn prepare_stop(&self, budget: Duration) -> Result<(), DeviceError> {
        self.begin_rest();
        let ram_only = self.core.reaches_ram_only(&self.memory);
        let in_flight = self.core.pops.in_flight();
        tracing::debug!(in_flight, ram_only, "nothing more is popped");
        if ram_only {
            return Ok(());
        }
        self.drain(budget).await.inspect_err(|_| self.go_on())
    }

    async fn stop(&self, budget: Duration) -> Result<(), DeviceError> {
        self.drain(budget).await
    }

    async fn start(&self, _: Duration) -> Result<(), DeviceError> {
        self.core.write_kept();
        self.go_on();
        Ok(())
    }

    fn save(&self, to: &mut dyn Write) -> Result<(), DeviceError> {
        self.core.save(to).map_err(DeviceError::new)
    }

    fn load(&self, from: &mut dyn Read) -> Result<(), DeviceError> {
        self.core.load(from).map_err(DeviceError::new)
    }

    /// What the stop has to wait for.
    fn evidence(&self, moment: Moment) -> Evidence {
        if moment != Moment::PrepareStopped {
            return Evidence::default();
        }
        let counter = |(queue, count): (u32, &AtomicU64)| Counter {
            kind: CounterKind::InFlight,
            index: queue,
            value: count.load(Ordering::Relaxed),
        };
        let counters = (0..).zip(&self.at_stop).map(counter).take(MAX_COUNTERS).collect();
        Evidence { memory_hash: None, counters }
    }

    /// There is work where a driver has put something into a ring whose used index has not come so far,
    /// taken out already or not.
    fn progress(&self) -> Option<Progress> {
        let core = &self.core;
        let is_watched = |queue| !core.facts.receives.contains(&queue);
        let mut progress = core.rings.progress(is_watched);
        progress.done = progress.done.wrapping_add(core.events.load(Ordering::Relaxed));
        progress.pending &= !core.pops.is_held(Hold::Stopped);
        // Who waits for somebody else does not hang.
        progress.pending &= !core.pops.is_held(Hold::Unclaimed);
        progress.pending &= core.frontend_is_there.load(Ordering::Relaxed);
        Some(progress)
    }
}
