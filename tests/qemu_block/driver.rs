//! What runs in the guest: it writes a disk in parts, reads it back, and knows what should be there.
//!
//! Each block says its number and its generation, all over, and the driver remembers the generation of
//! each: a block that is lost, old, torn or another one is found at the next read of it. Several threads
//! do so, each with blocks of its own, past the page cache, so that a request of each of them is in flight
//! at most times. A line on standard input has all threads check all blocks.
//!
//! Some of what is read is kept where nothing but the disk ever writes, and is looked at later: a migration
//! that does not know what the device has written brings something older.

use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{Seek, SeekFrom, stdin};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use vm_memory::{
    MmapRegion, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice, WriteVolatile,
};

/// That it is to do so, and on which disk.
pub(crate) const VARIABLE: &str = "STANDSTILL_TEST_DISK";

/// Size of a block in bytes.
const BLOCK: usize = 4096;
/// How many blocks one request has at most.
const MOST: usize = 8;
/// How many blocks each thread keeps.
const KEPT: usize = 32;
/// How many threads there are.
const THREADS: usize = 8;
/// A thread flushes after that many writes.
const FLUSH: u64 = 50;
/// How many operations there are between two lines on the console.
const LINE: u64 = 20;

/// Writes and reads for ever; panics on the first error, and on the first byte that is wrong.
#[expect(clippy::print_stdout, reason = "the test outside goes by what is on the console")]
pub(crate) fn drive(disk: &str) {
    let size = open(disk).seek(SeekFrom::End(0)).unwrap();
    let blocks = usize::try_from(size).unwrap() / BLOCK;
    println!("\ndisk: {blocks} blocks");
    let (count, failed) = (Count::default(), Mutex::new(()));
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (count, failed) = (&count, &failed);
            let share = blocks / THREADS;
            scope.spawn(move || {
                let part = Part::new(open(disk), thread * share, share);
                if let Err(error) = part.work(thread as u64, count) {
                    // One at a time, and nobody says more after it.
                    let _one = failed.lock().unwrap();
                    println!("\nthe disk has failed: {error}");
                    std::process::exit(1);
                }
            });
        }
        // One line for each that is asked, in one that has no end.
        for _ in stdin().lines() {
            count.asked.fetch_add(1, Ordering::Relaxed);
        }
    });
}

/// What all threads count together.
#[derive(Default)]
struct Count {
    /// Writes that are checked.
    writes: AtomicU64,
    /// How often all blocks were to be checked, and how many threads have done so.
    asked: AtomicUsize,
    checked: AtomicUsize,
}

/// The blocks of one thread.
struct Part {
    file: File,
    first: usize,
    generations: Vec<u64>,
    /// Aligned to a page, as what goes past the page cache has to be.
    buffer: MmapRegion,
    /// What is kept: memory that this program only reads, and which block of this part is there, of which
    /// generation.
    kept: MmapRegion,
    kept_blocks: [Option<(usize, u64)>; KEPT],
}

impl Part {
    fn new(file: File, first: usize, blocks: usize) -> Self {
        let memory = |blocks| MmapRegion::new(blocks * BLOCK).unwrap();
        let (buffer, kept) = (memory(MOST), memory(KEPT));
        let (generations, kept_blocks) = (vec![0; blocks], [None; KEPT]);
        Self { file, first, generations, buffer, kept, kept_blocks }
    }

    #[expect(clippy::print_stdout, reason = "the test outside goes by what is on the console")]
    fn work(mut self, seed: u64, count_of_all: &Count) -> Result<(), String> {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut checked = 0;
        for round in 1.. {
            let count = random.usize(1..=MOST);
            let at = random.usize(0..=self.generations.len() - count);
            self.write(at, count)?;
            if round % FLUSH == 0 {
                self.file.sync_data().map_err(|error| format!("a flush: {error}"))?;
            }
            self.check(at, count)?;
            // And something that was written before, if it was.
            self.check(random.usize(0..=self.generations.len() - count), count)?;
            let slot = random.usize(0..KEPT);
            self.check_kept(slot)?;
            self.keep(slot, at)?;
            let done = count_of_all.writes.fetch_add(1, Ordering::Relaxed) + 1;
            if done.is_multiple_of(LINE) {
                println!("disk: {done} writes are checked");
            }
            if checked < count_of_all.asked.load(Ordering::Relaxed) {
                checked += 1;
                let all = self.generations.len();
                (0..all).step_by(MOST).try_for_each(|at| self.check(at, MOST.min(all - at)))?;
                (0..KEPT).try_for_each(|slot| self.check_kept(slot))?;
                let threads = count_of_all.checked.fetch_add(1, Ordering::Relaxed) + 1;
                if threads.is_multiple_of(THREADS) {
                    println!("disk: all blocks are right");
                }
            }
        }
        Ok(())
    }

    fn write(&mut self, at: usize, count: usize) -> Result<(), String> {
        let mut data = vec![0; count * BLOCK];
        for (index, block) in data.chunks_mut(BLOCK).enumerate() {
            self.generations[at + index] += 1;
            let words = expected(self.first + at + index, self.generations[at + index]);
            for (place, word) in block.chunks_mut(8).zip(words) {
                place.copy_from_slice(&word.to_le_bytes());
            }
        }
        let buffer = self.slice(count);
        buffer.copy_from(&data);
        let written = self.seek(at).and_then(|mut file| file.write_all_volatile(&buffer));
        written.map_err(|error| format!("a write of {count} blocks at {at}: {error}"))
    }

    /// The part of the buffer for so many blocks.
    fn slice(&self, count: usize) -> VolatileSlice<'_> {
        self.buffer.get_slice(0, count * BLOCK).unwrap()
    }

    /// The disk, at that block of this part.
    fn seek(&self, at: usize) -> Result<&File, VolatileMemoryError> {
        let mut file = &self.file;
        let offset = ((self.first + at) * BLOCK) as u64;
        file.seek(SeekFrom::Start(offset)).map_err(VolatileMemoryError::IOError)?;
        Ok(file)
    }

    fn check(&self, at: usize, count: usize) -> Result<(), String> {
        let buffer = self.slice(count);
        let read =
            self.seek(at).and_then(|mut file| file.read_exact_volatile(&mut self.slice(count)));
        read.map_err(|error| format!("a read of {count} blocks at {at}: {error}"))?;
        let mut data = vec![0; count * BLOCK];
        buffer.copy_to(&mut data);
        let mut blocks = data.chunks(BLOCK).enumerate();
        blocks.try_for_each(|(index, block)| {
            compare(block, self.first + at + index, self.generations[at + index])
        })
    }

    /// Reads a block to where it is kept.
    fn keep(&mut self, slot: usize, at: usize) -> Result<(), String> {
        let mut place = self.kept.get_slice(slot * BLOCK, BLOCK).unwrap();
        let read = self.seek(at).and_then(|mut file| file.read_exact_volatile(&mut place));
        read.map_err(|error| format!("a read of block {at}, to be kept: {error}"))?;
        self.kept_blocks[slot] = Some((at, self.generations[at]));
        Ok(())
    }

    fn check_kept(&self, slot: usize) -> Result<(), String> {
        let Some((at, generation)) = self.kept_blocks[slot] else { return Ok(()) };
        let mut block = vec![0; BLOCK];
        self.kept.get_slice(slot * BLOCK, BLOCK).unwrap().copy_to(&mut block);
        compare(&block, self.first + at, generation).map_err(|error| format!("kept since: {error}"))
    }
}

/// Whether that is the block of that number and generation; of one that was not written nothing is known.
fn compare(block: &[u8], number: usize, generation: u64) -> Result<(), String> {
    if generation == 0 {
        return Ok(());
    }
    let block = block.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let wrong =
        block.zip(expected(number, generation)).enumerate().find(|(_, (is, due))| is != due);
    wrong.map_or(Ok(()), |(place, (is, due))| {
        let text =
            format!("block {number} of generation {generation} has {is:#x} instead of {due:#x}");
        Err(format!("{text} at {place}"))
    })
}

fn open(disk: &str) -> File {
    let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    rustix::fs::open(disk, flags, Mode::empty()).unwrap().into()
}

/// What a block of that generation contains.
fn expected(block: usize, generation: u64) -> impl Iterator<Item = u64> {
    let seed = (block as u64) << 32 | generation;
    (0..BLOCK as u64 / 8).map(move |word| seed ^ word.wrapping_mul(0x9e37_79b9_7f4a_7c15))
}
