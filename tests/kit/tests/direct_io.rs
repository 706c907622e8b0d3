//! The proof of a fence waits for writes that outlive their process, and nothing changes after it.
//!
//! A program of its own, so that no other test uses the disk meanwhile.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic is how a test fails")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open, statfs};
use standstill_coordinator::process::{
    BackingFile, DeviceProcess, Exit, Fence, FenceProgress, ProcessSpec, Spawner,
};
use standstill_protocol::channel::prefer_short_waits;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// What the writer keeps in flight: all of the file.
const BLOCKS: usize = 64;
const BLOCK_BYTES: usize = 1 << 20;
/// The unit in which the file is read; small enough for a stack.
const CHUNK: usize = 1 << 17;
/// How often a writer is killed at least …
const LEAST_ATTEMPTS: usize = 2;
/// … and at most, until one of them has left writes behind that were seen to change the file.
const MOST_ATTEMPTS: usize = 40;
/// How long nothing may change after a proof. Writes of killed processes were seen to reach the
/// disk for up to 131 ms.
const OBSERVED: Duration = Duration::from_millis(400);
/// Longer than anything here takes, on a busy machine too.
const LONG: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
struct Chunk([u8; CHUNK]);

#[derive(Clone, PartialEq, Eq)]
#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// All of the file, read past the page cache.
#[derive(PartialEq, Eq)]
struct Contents(Vec<Box<Chunk>>);

impl Contents {
    fn read(file: &File) -> Self {
        let chunks = 0..BLOCKS * BLOCK_BYTES / CHUNK;
        Self(chunks.map(|number| read_chunk(file, number)).collect())
    }

    /// The number of the first chunk that is another one now.
    fn first_change(&self, file: &File) -> Option<usize> {
        let mut chunks = self.0.iter().enumerate();
        chunks.find(|(number, chunk)| read_chunk(file, *number) != **chunk).map(|(at, _)| at)
    }

    /// What the writer put at the beginning of that block's last page.
    fn stamp(&self, block: usize) -> u64 {
        let at = (block + 1) * BLOCK_BYTES - 4096;
        stamp(&self.0[at / CHUNK].0[at % CHUNK..])
    }
}

fn read_chunk(file: &File, number: usize) -> Box<Chunk> {
    let mut chunk = Box::new(Chunk([0; CHUNK]));
    file.read_exact_at(&mut chunk.0, (number * CHUNK) as u64).unwrap();
    chunk
}

fn read_stamp(file: &File, block: usize) -> u64 {
    let mut page = Page([0; 4096]);
    file.read_exact_at(&mut page.0, ((block + 1) * BLOCK_BYTES - 4096) as u64).unwrap();
    stamp(&page.0)
}

fn stamp(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

/// What was seen of one killed writer.
#[derive(Debug)]
struct Seen {
    /// It was reaped, and its lock was not free yet.
    locked_after_exit: bool,
    /// How many blocks were read after the exit, and had other content at the proof.
    changed_after_exit: usize,
    #[expect(dead_code, reason = "for a person who reads the test's output")]
    exit_to_proof: Duration,
}

fn start_writer(path: &Path, proof: Option<&Path>) -> DeviceProcess {
    let spec = ProcessSpec::new(env!("CARGO_BIN_EXE_direct-writer"))
        .arg(path)
        .args([BLOCKS.to_string(), BLOCK_BYTES.to_string()])
        .args(proof);
    // It has no coordinator to talk to.
    let (_ours, theirs) = UnixStream::pair().unwrap();
    let mut process = Spawner::new().unwrap().spawn(&spec, theirs.into()).unwrap();
    let mut line = String::new();
    let stderr = File::from(process.take_stderr().unwrap());
    BufReader::new(stderr).read_line(&mut line).unwrap();
    assert_eq!(line.trim_end(), "ready", "this machine cannot run the test");
    process
}

/// Kills a writer, and watches the file from its exit to some time after the proof.
fn attempt(folder: &Path, lock: Locked) -> Seen {
    let path = tempfile::NamedTempFile::new_in(folder).unwrap().into_temp_path();
    // The space is there and was never written. So a read finds zeros until a write is done, and
    // need not queue up behind it in the disk.
    let space = File::options().write(true).open(&path).unwrap();
    fallocate(space, FallocateFlags::empty(), 0, (BLOCKS * BLOCK_BYTES) as u64).unwrap();
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let file = File::from(open(&*path, flags, Mode::empty()).unwrap());
    let proof = tempfile::NamedTempFile::new_in(folder).unwrap();
    let (proof_path, locked) = match lock {
        Locked::File => (None, &file),
        Locked::Proof => (Some(proof.path()), proof.as_file()),
    };
    let mut process = start_writer(&path, proof_path);
    let reopen = || BackingFile::reopen(locked.try_clone().unwrap().into()).unwrap();
    let (backing, witness) = (reopen(), reopen());
    assert!(witness.is_locked().unwrap(), "the writer holds no lock");

    let mut fence = Fence::begin(&process, vec![backing]);
    let mut fds = [PollFd::from_borrowed_fd(process.pidfd(), PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&Timespec::try_from(LONG).unwrap())).unwrap(), 1);
    let exited = Instant::now();
    // Asked apart from the fence, which is what is tested.
    let left_behind = witness.is_locked().unwrap();

    let mut after_exit: [Option<u64>; BLOCKS] = [None; BLOCKS];
    // Those that were begun last are done last.
    let mut blocks = (0..BLOCKS).rev().cycle();
    let mut locked_after_exit = false;
    let proof = loop {
        match fence.poll(&mut process) {
            FenceProgress::Proven(proof) => break proof,
            FenceProgress::WaitingForLocks { held } => {
                assert_eq!((held, fence.obstacle().is_none()), (1, true));
                // Reaped, as the fence says; so what follows changes after the exit.
                assert_eq!(process.exit(), Some(Exit::Signal { signal: 9, core_dumped: false }));
                locked_after_exit = true;
            }
            FenceProgress::WaitingForExit => panic!("not reaped: {:?}", fence.obstacle()),
        }
        assert!(exited.elapsed() < LONG, "the lock is never free");
        let block = blocks.next().unwrap();
        let stamp = read_stamp(&file, block);
        after_exit[block].get_or_insert(stamp);
    };
    let exit_to_proof = exited.elapsed();
    assert!(proof.exit().is_kill());
    assert_eq!(proof.locks(), 1);

    if !left_behind {
        // All was done when it ended; what follows would say nothing.
        return Seen { locked_after_exit, changed_after_exit: 0, exit_to_proof };
    }
    // No wait: the file is read over and over as long as the window lasts.
    let proven = Instant::now();
    let contents = Contents::read(&file);
    let mut times = 0;
    while times == 0 || proven.elapsed() < OBSERVED {
        let changed = contents.first_change(&file);
        assert_eq!(changed, None, "the file changed {:?} after the proof", proven.elapsed());
        times += 1;
    }
    let changed = |(block, stamp): (usize, Option<u64>)| {
        stamp.is_some_and(|stamp| stamp != contents.stamp(block))
    };
    let changed_after_exit = after_exit.into_iter().enumerate().filter(|b| changed(*b)).count();
    Seen { locked_after_exit, changed_after_exit, exit_to_proof }
}

/// What the writer has locked.
#[derive(Clone, Copy, Debug)]
enum Locked {
    /// What it writes.
    File,
    /// Another file, which is registered with its `io_uring`.
    Proof,
}

/// One after the other: they use the same disk.
#[test]
fn the_proof_of_a_fence_waits_for_direct_writes_in_flight_and_nothing_changes_after_it() {
    for lock in [Locked::File, Locked::Proof] {
        waits_for_writes_in_flight(lock);
    }
}

#[expect(clippy::print_stderr, reason = "for a person who reads the output of the test")]
fn waits_for_writes_in_flight(lock: Locked) {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    std::fs::create_dir_all(folder).unwrap();
    // Memory, where a direct write is done at once.
    const TMPFS: i64 = 0x0102_1994;
    assert_ne!(statfs(folder).unwrap().f_type, TMPFS, "{} is no disk", folder.display());

    // As in the writer: the time between an exit and its proof is short.
    let _ = prefer_short_waits();
    let mut locked_after_exit = false;
    let mut changed_after_exit = 0;
    for number in 1..=MOST_ATTEMPTS {
        let seen = attempt(folder, lock);
        eprintln!("{lock:?}, attempt {number}: {seen:?}");
        locked_after_exit |= seen.locked_after_exit;
        changed_after_exit += seen.changed_after_exit;
        if number >= LEAST_ATTEMPTS && locked_after_exit && changed_after_exit > 0 {
            return;
        }
    }
    assert!(
        locked_after_exit,
        "no writer was reaped while its lock was held, in {MOST_ATTEMPTS} attempts: all its writes \
         were done by then, so the test says nothing about writes in flight"
    );
    panic!(
        "locks outlived their processes, but nothing was seen to change between an exit and its \
         proof, in {MOST_ATTEMPTS} attempts"
    );
}
