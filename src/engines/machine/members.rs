//! Engines that are lost and come back while the others are at work.

use super::super::engine::{Access, Class, Engine};
use super::super::pairs::Pair;
use super::{Blueprint, Vmm, VmmError, of, room_at, socket};
use standstill::device_proc::memory::SharedMemory;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How often an engine is looked at that may have halted.
const GO_ON: Duration = Duration::from_millis(20);

impl Blueprint {
    /// Lets each engine rest that long whenever it has gone round its ring, so that the CPUs are left to
    /// others.
    pub(crate) fn rest(mut self, rest: Duration) -> Self {
        self.rest = rest;
        self
    }

    /// Where the room in guest RAM is, in bytes.
    pub(crate) fn room(&self) -> u64 {
        room_at(&self.layout)
    }
}

impl Vmm {
    /// Forgets an engine: from [`go_on`](Self::go_on) on the others write to guest RAM what they wrote to
    /// it.
    pub(crate) fn remove(&mut self, number: usize) {
        if let Some(gone) = self.gone.get_mut(number) {
            *gone = true;
        }
    }

    /// A new client of an engine whose process was started again. From [`go_on`](Self::go_on) on it is one
    /// like the others.
    pub(crate) fn restore(&mut self, number: usize) -> Result<(), VmmError> {
        let socket = socket(&self.folder, number);
        let engine = Engine::connect(&socket, self.layout.memory_size()).map_err(of(number))?;
        if let Some(old) = self.engines.get_mut(number) {
            *old = engine;
        }
        self.fresh.insert(number);
        Ok(())
    }

    /// Maps everything into those whose processes were started again, and their memory into those that
    /// are working. Only when all have their new memory: a window onto the old one would stay.
    fn wire_fresh(&mut self, working: &BTreeSet<usize>) -> Result<(), VmmError> {
        let fresh = std::mem::take(&mut self.fresh);
        for &number in &fresh {
            self.wire(number)?;
            let range = self.layout.memory(number);
            for &peer in working.difference(&fresh) {
                if let Ok([engine, other]) = self.engines.get_disjoint_mut([peer, number]) {
                    engine.map(range, other.memory(), Class::Peer).map_err(of(peer))?;
                }
            }
        }
        fresh.into_iter().try_for_each(|number| self.start(number))
    }

    /// Sets engines to work again that have come upon a window that led nowhere: with a descriptor that
    /// they had fetched before, they can do so for a moment after their ring is another. Waits until each
    /// has gone on, for at most that time.
    pub(crate) fn go_on(
        &mut self,
        working: &BTreeSet<usize>,
        patience: Duration,
    ) -> Result<(), VmmError> {
        self.wire_fresh(working)?;
        let present = |number: &usize| !self.gone.get(*number).copied().unwrap_or(true);
        let mut halted: BTreeSet<_> = working.iter().copied().filter(present).collect();
        for &number in &halted {
            self.write_ring(number)?;
        }
        let deadline = Instant::now() + patience;
        // The number of the last round that was seen, and how many there were.
        let mut rounds: BTreeMap<usize, (u64, u32)> = BTreeMap::new();
        while !halted.is_empty() && Instant::now() < deadline {
            for number in std::mem::take(&mut halted) {
                let written = self.ram.load_u64(self.layout.ring_sequence_offset(number))?;
                let (last, seen) = rounds.entry(number).or_insert((written, 0));
                if std::mem::replace(last, written) != written {
                    *seen += 1;
                }
                // What was fetched before is done by the end of the second round.
                if *seen >= 2 {
                    continue;
                }
                halted.insert(number);
                let Some(engine) = self.engines.get_mut(number) else { continue };
                engine.go_on().map_err(of(number))?;
            }
            let waiting: Vec<_> = halted.iter().copied().collect();
            self.wait_for_interrupt(&waiting, GO_ON)?;
        }
        Ok(())
    }

    /// Guest RAM.
    pub(crate) fn ram(&self) -> &SharedMemory {
        &self.ram
    }

    /// Whether a pair is still one.
    pub(crate) fn has(&self, pair: &Pair) -> bool {
        let is_gone = |engine: usize| self.gone.get(engine).copied().unwrap_or(true);
        !is_gone(pair.writer) && !is_gone(pair.receiver)
    }

    /// An access to a register of an engine, which may be made on another thread.
    pub(crate) fn access(&self, number: usize) -> Option<Access> {
        self.engines.get(number).map(Engine::access)
    }
}
