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

/// How much one descriptor of the demonstration copies, in bytes: four blocks and the mailboxes are a
/// quarter of a MiB, all of which is hashed in each round.
pub(crate) const BLOCK: u32 = 60 << 10;
/// The MSI-X vector that an engine raises at the end of its ring.
pub(crate) const VECTOR: u32 = 0;

const PAGE: u64 = 4096;
const RAM_BASE: u64 = 1 << 32;
const BARS_BASE: u64 = 1 << 40;
const RAM_SEQUENCE: u64 = PAGE;
const RAM_SOURCE: u64 = RAM_SEQUENCE + PAGE;
const BAR_BLOCKS: u64 = PAGE;

const _: () = assert!(DESCRIPTOR_SIZE * 16 <= PAGE && MAILBOXES as u64 * 8 <= BAR_BLOCKS);

/// The addresses of a machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    engines: usize,
    memory_size: u64,
    block: u32,
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
    /// For so many engines that write into each other's memory like that, blocks of so many bytes.
    pub(crate) fn new(engines: usize, pairs: &[Pair], block: u32) -> Self {
        let mailboxes = pairs.iter().map(|pair| pair.mailbox + 1).max().unwrap_or(0);
        debug_assert!(mailboxes <= MAILBOXES, "{mailboxes} engines write to the same one");
        let memory_size =
            (BAR_BLOCKS + u64::from(mailboxes) * u64::from(block)).next_power_of_two();
        Self { engines, memory_size, block }
    }

    /// How much one descriptor copies, in bytes.
    pub(crate) fn block(&self) -> u32 {
        self.block
    }

    /// How much of guest RAM is for each engine: its ring, its sequence number, and two blocks.
    fn slot_size(&self) -> u64 {
        RAM_SOURCE + 2 * u64::from(self.block)
    }

    /// Size of each engine's memory BAR in bytes: a power of two.
    pub(crate) fn memory_size(&self) -> u64 {
        self.memory_size
    }

    /// Guest RAM.
    pub(crate) fn ram(&self) -> Range {
        Range { iova: RAM_BASE, size: self.engines as u64 * self.slot_size() }
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
        engine as u64 * self.slot_size()
    }

    /// Where the number of an engine's rounds of its ring lies in guest RAM, as an offset.
    #[cfg(feature = "fault-injection")]
    pub(crate) fn ring_sequence_offset(&self, engine: usize) -> u64 {
        self.ring_offset(engine) + RAM_SEQUENCE
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
        RAM_BASE + engine as u64 * self.slot_size()
    }

    /// What an engine does, over and over: a block and a sequence number into the memory of each
    /// engine that it writes to, then into guest RAM, then an interrupt. What would go to an engine that
    /// is gone goes to guest RAM, without a number.
    pub(crate) fn descriptors(
        &self,
        engine: usize,
        pairs: &[Pair],
        is_gone: impl Fn(usize) -> bool,
    ) -> Vec<Descriptor> {
        let slot = self.slot(engine);
        let copy = |destination, sequence_iova| Descriptor {
            source: slot + RAM_SOURCE,
            destination,
            len: self.block,
            flags: FLAG_SEQUENCE | FLAG_STAMP,
            sequence_iova,
            vector: VECTOR,
        };
        let destination = slot + RAM_SOURCE + u64::from(self.block);
        let to_ram = copy(destination, slot + RAM_SEQUENCE);
        let own = pairs.iter().filter(|pair| pair.writer == engine);
        let mut descriptors: Vec<_> = own
            .map(|pair| {
                if is_gone(pair.receiver) {
                    return Descriptor { flags: FLAG_STAMP, ..to_ram };
                }
                let memory = self.memory(pair.receiver).iova;
                let block = BAR_BLOCKS + u64::from(pair.mailbox) * u64::from(self.block);
                copy(memory + block, memory + Self::mailbox_offset(pair.mailbox))
            })
            .collect();
        descriptors.push(Descriptor { flags: to_ram.flags | FLAG_INTERRUPT, ..to_ram });
        debug_assert!(descriptors.len() <= MAX_ENTRIES as usize);
        descriptors
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::pairs::pairs;
    use std::collections::HashSet;

    fn contains(range: Range, iova: u64, len: u64) -> bool {
        range.iova <= iova && iova + len <= range.iova + range.size
    }

    #[test]
    fn every_descriptor_reads_ram_and_writes_its_receiver_or_ram() {
        for engines in [2, 3, 8, 64, 256] {
            let pairs = pairs(engines);
            let layout = Layout::new(engines, &pairs, BLOCK);
            for engine in 0..engines {
                let descriptors = layout.descriptors(engine, &pairs, |_| false);
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
        let layout = Layout::new(16, &pairs, BLOCK);
        let all: Vec<_> =
            (0..16).flat_map(|engine| layout.descriptors(engine, &pairs, |_| false)).collect();
        let blocks: HashSet<_> = all.iter().map(|d| d.destination / PAGE).collect();
        let numbers: HashSet<_> = all.iter().map(|d| d.sequence_iova).collect();
        assert_eq!((blocks.len(), numbers.len()), (all.len(), all.len()));
    }

    #[test]
    fn nothing_is_written_to_an_engine_that_is_gone_and_the_others_keep_their_places() {
        let pairs = pairs(4);
        let layout = Layout::new(4, &pairs, 4096);
        let gone = layout.memory(2);
        for engine in [0, 1, 3] {
            let before = layout.descriptors(engine, &pairs, |_| false);
            let after = layout.descriptors(engine, &pairs, |engine| engine == 2);
            assert_eq!(before.len(), after.len());
            for (before, after) in before.iter().zip(&after) {
                if contains(gone, before.destination, 1) {
                    assert!(contains(layout.ram(), after.destination, PAGE));
                    assert_eq!(after.flags & FLAG_SEQUENCE, 0);
                } else {
                    assert_eq!(before, after);
                }
            }
        }
    }

    #[test]
    fn windows_do_not_overlap() {
        let layout = Layout::new(256, &pairs(256), BLOCK);
        let ram = layout.ram();
        assert!(ram.iova + ram.size <= layout.memory(0).iova);
        for engine in 1..256 {
            let before = layout.memory(engine - 1);
            assert_eq!(before.iova + before.size, layout.memory(engine).iova);
        }
    }
}
