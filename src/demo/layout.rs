//! Where everything lies: guest RAM, the engines' memory BARs, and what is in them. All addresses
//! are IOVAs and the same for every engine.
//!
//! Guest RAM has a slot for each engine: its descriptor ring, the sequence number of its writes to
//! RAM, the block that it copies from, and the block in RAM that it copies to. The memory BAR of an
//! engine has its mailboxes first, then a block for each engine that writes to it.

use super::pairs::Pair;
use standstill::device_proc::devices::copy_engine::registers::{MAILBOXES, MAX_ENTRIES};
use standstill::device_proc::devices::copy_engine::{
    DESCRIPTOR_SIZE, Descriptor, FLAG_INTERRUPT, FLAG_SEQUENCE, FLAG_STAMP,
};

/// How much one descriptor copies, in bytes: four blocks and the mailboxes are a quarter of a MiB,
/// all of which is hashed in each round.
pub(crate) const BLOCK: u32 = 60 << 10;
/// The MSI-X vector that an engine raises at the end of its ring.
pub(crate) const VECTOR: u32 = 0;

const PAGE: u64 = 4096;
const RAM_BASE: u64 = 1 << 32;
const BARS_BASE: u64 = 1 << 40;
const RAM_SEQUENCE: u64 = PAGE;
const RAM_SOURCE: u64 = RAM_SEQUENCE + PAGE;
const RAM_DESTINATION: u64 = RAM_SOURCE + BLOCK as u64;
const RAM_SLOT: u64 = RAM_DESTINATION + BLOCK as u64;
const BAR_BLOCKS: u64 = PAGE;

const _: () = assert!(DESCRIPTOR_SIZE * 16 <= PAGE && MAILBOXES as u64 * 8 <= BAR_BLOCKS);

/// The addresses of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    engines: usize,
    memory_size: u64,
}

/// A contiguous piece of address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    /// The first IOVA.
    pub(crate) iova: u64,
    /// Length in bytes.
    pub(crate) size: u64,
}

impl Layout {
    /// For so many engines that write into each other's memory like that.
    pub(crate) fn new(engines: usize, pairs: &[Pair]) -> Self {
        let mailboxes = pairs.iter().map(|pair| pair.mailbox + 1).max().unwrap_or(0);
        debug_assert!(mailboxes <= MAILBOXES, "{mailboxes} engines write to the same one");
        let memory_size =
            (BAR_BLOCKS + u64::from(mailboxes) * u64::from(BLOCK)).next_power_of_two();
        Self { engines, memory_size }
    }

    /// Size of each engine's memory BAR in bytes: a power of two.
    pub(crate) fn memory_size(&self) -> u64 {
        self.memory_size
    }

    /// Guest RAM.
    pub(crate) fn ram(&self) -> Range {
        Range { iova: RAM_BASE, size: self.engines as u64 * RAM_SLOT }
    }

    /// The memory BAR of an engine.
    pub(crate) fn memory(&self, engine: usize) -> Range {
        Range { iova: BARS_BASE + engine as u64 * self.memory_size, size: self.memory_size }
    }

    /// IOVA of an engine's descriptor ring.
    pub(crate) fn ring(&self, engine: usize) -> u64 {
        self.slot(engine)
    }

    /// Where an engine's slot begins in guest RAM, as an offset.
    pub(crate) fn ring_offset(&self, engine: usize) -> u64 {
        engine as u64 * RAM_SLOT
    }

    /// Where the block that an engine copies from lies in guest RAM, as an offset.
    pub(crate) fn source_offset(&self, engine: usize) -> u64 {
        self.ring_offset(engine) + RAM_SOURCE
    }

    /// Where a mailbox lies in a memory BAR, as an offset.
    pub(crate) fn mailbox_offset(mailbox: u32) -> u64 {
        u64::from(mailbox) * 8
    }

    fn slot(&self, engine: usize) -> u64 {
        RAM_BASE + engine as u64 * RAM_SLOT
    }

    /// What an engine does, over and over: a block and a sequence number into the memory of each
    /// engine that it writes to, then into guest RAM, then an interrupt.
    pub(crate) fn descriptors(&self, engine: usize, pairs: &[Pair]) -> Vec<Descriptor> {
        let slot = self.slot(engine);
        let copy = |destination, sequence_iova| Descriptor {
            source: slot + RAM_SOURCE,
            destination,
            len: BLOCK,
            flags: FLAG_SEQUENCE | FLAG_STAMP,
            sequence_iova,
            vector: VECTOR,
        };
        let own = pairs.iter().filter(|pair| pair.writer == engine);
        let mut descriptors: Vec<_> = own
            .map(|pair| {
                let memory = self.memory(pair.receiver).iova;
                let block = BAR_BLOCKS + u64::from(pair.mailbox) * u64::from(BLOCK);
                copy(memory + block, memory + Self::mailbox_offset(pair.mailbox))
            })
            .collect();
        let to_ram = copy(slot + RAM_DESTINATION, slot + RAM_SEQUENCE);
        descriptors.push(Descriptor { flags: to_ram.flags | FLAG_INTERRUPT, ..to_ram });
        debug_assert!(descriptors.len() <= MAX_ENTRIES as usize);
        descriptors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::pairs::pairs;
    use std::collections::HashSet;

    fn contains(range: Range, iova: u64, len: u64) -> bool {
        range.iova <= iova && iova + len <= range.iova + range.size
    }

    #[test]
    fn every_descriptor_reads_ram_and_writes_its_receiver_or_ram() {
        for engines in [2, 3, 8, 64, 256] {
            let pairs = pairs(engines);
            let layout = Layout::new(engines, &pairs);
            for engine in 0..engines {
                let descriptors = layout.descriptors(engine, &pairs);
                let own: Vec<_> = pairs.iter().filter(|p| p.writer == engine).collect();
                assert_eq!(descriptors.len(), own.len() + 1);
                for (index, descriptor) in descriptors.iter().enumerate() {
                    let target =
                        own.get(index).map_or(layout.ram(), |pair| layout.memory(pair.receiver));
                    assert!(contains(layout.ram(), descriptor.source, BLOCK.into()));
                    assert!(contains(target, descriptor.destination, BLOCK.into()));
                    assert!(contains(target, descriptor.sequence_iova, 8));
                }
            }
        }
    }

    #[test]
    fn no_two_descriptors_write_the_same_place() {
        let pairs = pairs(16);
        let layout = Layout::new(16, &pairs);
        let all: Vec<_> = (0..16).flat_map(|engine| layout.descriptors(engine, &pairs)).collect();
        let blocks: HashSet<_> = all.iter().map(|d| d.destination / PAGE).collect();
        let numbers: HashSet<_> = all.iter().map(|d| d.sequence_iova).collect();
        assert_eq!((blocks.len(), numbers.len()), (all.len(), all.len()));
    }

    #[test]
    fn windows_do_not_overlap() {
        let layout = Layout::new(256, &pairs(256));
        let ram = layout.ram();
        assert!(ram.iova + ram.size <= layout.memory(0).iova);
        for engine in 1..256 {
            let before = layout.memory(engine - 1);
            assert_eq!(before.iova + before.size, layout.memory(engine).iova);
        }
    }
}
