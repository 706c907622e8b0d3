//! A driver for the tests: rings in shared memory, filled by hand.

use super::super::{BlockConfig, Memory, VhostUserBlk, Vring};
use crate::vhost_user::PopGate;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::time::Timespec;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use tempfile::TempDir;
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;

/// Size of the disks of the tests in bytes.
pub(super) const DISK: u64 = 4 << 20;
/// Guest memory: two regions that touch, so that a buffer can lie in both.
const REGION: usize = 1 << 20;
/// Each queue has this much of it; the first part is its rings, the rest is for the test.
const OF_QUEUE: u64 = 0x4_0000;
/// Where the memory for the test begins.
const FREE: u64 = 0x8000;
/// Where tables of indirect descriptors are.
const TABLES: u64 = 0x6000;
/// Descriptors of a ring.
pub(super) const SIZE: u16 = 64;
/// Nothing here takes so long.
pub(super) const LONG: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// Disks of all kinds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Cached,
    CachedWithoutRing,
    Direct,
    DirectWithoutRing,
}

impl Kind {
    pub(super) const ALL: [Self; 4] =
        [Self::Cached, Self::CachedWithoutRing, Self::Direct, Self::DirectWithoutRing];

    fn apply(self, config: &mut BlockConfig) {
        config.direct = matches!(self, Self::Direct | Self::DirectWithoutRing);
        config.without_io_uring = matches!(self, Self::CachedWithoutRing | Self::DirectWithoutRing);
    }
}

/// A device and its image.
pub(super) struct Machine {
    pub(super) device: Arc<VhostUserBlk>,
    pub(super) pops: PopGate,
    pub(super) memory: GuestMemoryAtomic<Memory>,
    pub(super) image: File,
    folder: TempDir,
}

impl Machine {
    pub(super) fn new(kind: Kind, change: impl FnOnce(&mut BlockConfig)) -> Self {
        // Beside the test program: where temporary files usually are there may be no direct I/O.
        let here = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = folder.path().join("disk");
        let image = File::create_new(&path).unwrap();
        image.set_len(DISK).unwrap();
        let image_to_look_at = File::options().read(true).write(true).open(&path).unwrap();
        let mut config = BlockConfig::new(path);
        kind.apply(&mut config);
        change(&mut config);
        let pops = PopGate::new(config.queues.into());
        let device = Arc::new(VhostUserBlk::build(&config, &pops).unwrap());
        let rings = device.completions().unwrap();
        let with_ring = !config.without_io_uring;
        assert!(rings.iter().all(|ring| ring.is_some() == with_ring), "a kernel with io_uring");
        let memory = memory();
        device.update_memory(memory.clone()).unwrap();
        // As a driver that flushes.
        device.acked_features(device.features());
        Self { device, pops, memory, image: image_to_look_at, folder }
    }

    /// A second file beside the image.
    pub(super) fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    pub(super) fn driver(&self, queue: u16) -> Driver {
        Driver::new(Arc::clone(&self.device), self.memory.clone(), queue)
    }
}

fn memory() -> GuestMemoryAtomic<Memory> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = Arc::new(File::from(rustix::fs::memfd_create("guest", flags).unwrap()));
    file.set_len(2 * REGION as u64).unwrap();
    let region = |number: usize| {
        let begin = (number * REGION) as u64;
        let file = FileOffset::from_arc(Arc::clone(&file), begin);
        (GuestAddress(begin), REGION, Some(file))
    };
    let regions = [region(0), region(1)];
    GuestMemoryAtomic::new(Memory::from_ranges_with_files(regions).unwrap())
}

/// Of one queue.
pub(super) struct Driver {
    device: Arc<VhostUserBlk>,
    pub(super) memory: GuestMemoryAtomic<Memory>,
    pub(super) vring: Vring,
    queue: u16,
    call: OwnedFd,
    completions: Option<OwnedFd>,
    available: u16,
    used: u16,
    next_descriptor: u16,
    next_table: u64,
}

/// A piece of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) at: u64,
    pub(super) len: u32,
    pub(super) writable: bool,
}

pub(super) const fn readable(at: u64, len: u32) -> Piece {
    Piece { at, len, writable: false }
}

pub(super) const fn writable(at: u64, len: u32) -> Piece {
    Piece { at, len, writable: true }
}

impl Driver {
    fn new(device: Arc<VhostUserBlk>, memory: GuestMemoryAtomic<Memory>, queue: u16) -> Self {
        let vring = Vring::new(memory.clone(), SIZE).unwrap();
        let base = u64::from(queue) * OF_QUEUE;
        vring.set_queue_size(SIZE);
        vring.set_queue_info(base, base + 0x2000, base + 0x3000).unwrap();
        let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        vring.set_call(Some(call.try_clone().unwrap().into()));
        vring.set_queue_ready(true);
        vring.set_enabled(true);
        let completions = device.completions().unwrap().remove(queue.into());
        let (available, used, next_descriptor, next_table) = (0, 0, 0, TABLES);
        Self {
            device,
            memory,
            vring,
            queue,
            call,
            completions,
            available,
            used,
            next_descriptor,
            next_table,
        }
    }

    fn base(&self) -> u64 {
        u64::from(self.queue) * OF_QUEUE
    }

    /// Memory that is the test's, `offset` bytes behind its beginning.
    pub(super) fn free(&self, offset: u64) -> u64 {
        self.base() + FREE + offset
    }

    pub(super) fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(super) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn put_word(&self, at: u64, word: u16) {
        self.put(at, &word.to_le_bytes());
    }

    fn get_word(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at, 2).try_into().unwrap())
    }

    fn put_descriptor(&self, table: u64, index: u16, piece: Piece, flags: u32, next: u16) {
        let write = if piece.writable { VRING_DESC_F_WRITE } else { 0 };
        let flags = u16::try_from(flags | write).unwrap();
        let mut bytes = piece.at.to_le_bytes().to_vec();
        bytes.extend(piece.len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + u64::from(index) * 16, &bytes);
    }

    /// Puts a chain into the table and returns its head. Descriptors are used in turn: no test has
    /// more than a ring of them under way.
    fn chain(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (index, piece) in pieces.iter().enumerate() {
            let this = self.next_descriptor;
            self.next_descriptor = (this + 1) % SIZE;
            let flags = if index + 1 < pieces.len() { VRING_DESC_F_NEXT } else { 0 };
            self.put_descriptor(self.base(), this, *piece, flags, self.next_descriptor);
        }
        head
    }

    /// As [`chain`](Self::chain), in a table of its own.
    fn indirect_chain(&mut self, pieces: &[Piece]) -> u16 {
        let table = self.base() + self.next_table;
        self.next_table += 0x400;
        for (index, piece) in (0..).zip(pieces) {
            let last = usize::from(index) + 1 == pieces.len();
            let flags = if last { 0 } else { VRING_DESC_F_NEXT };
            self.put_descriptor(table, index, *piece, flags, index + 1);
        }
        let head = self.next_descriptor;
        self.next_descriptor = (head + 1) % SIZE;
        let len = 16 * u32::try_from(pieces.len()).unwrap();
        self.put_descriptor(self.base(), head, readable(table, len), VRING_DESC_F_INDIRECT, 0);
        head
    }

    /// Makes a chain available.
    pub(super) fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.chain(pieces);
        self.make_available(head);
        head
    }

    pub(super) fn add_indirect(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.indirect_chain(pieces);
        self.make_available(head);
        head
    }

    pub(super) fn make_available(&mut self, head: u16) {
        self.put_word(self.base() + 0x2004 + u64::from(self.available % SIZE) * 2, head);
        self.set_available(self.available.wrapping_add(1));
    }

    /// Says that so many were made available.
    pub(super) fn set_available(&mut self, available: u16) {
        self.available = available;
        self.put_word(self.base() + 0x2002, available);
    }

    /// Signals are wanted when so many were used.
    pub(super) fn set_used_event(&self, used: u16) {
        self.put_word(self.base() + 0x2004 + u64::from(SIZE) * 2, used);
    }

    /// A signal is wanted when the next one was used.
    pub(super) fn want_next_signal(&self) {
        self.set_used_event(self.used);
    }

    /// When the device wants to be kicked: once so many are available.
    pub(super) fn avail_event(&self) -> u16 {
        self.get_word(self.base() + 0x3004 + u64::from(SIZE) * 8)
    }

    /// The head and the length of each chain that was used since the last call.
    pub(super) fn take_used(&mut self) -> Vec<(u16, u32)> {
        let used = self.get_word(self.base() + 0x3002);
        let mut taken = Vec::new();
        while self.used != used {
            let at = self.base() + 0x3004 + u64::from(self.used % SIZE) * 8;
            let word = |at| u32::from_le_bytes(self.get(at, 4).try_into().unwrap());
            taken.push((u16::try_from(word(at)).unwrap(), word(at + 4)));
            self.used = self.used.wrapping_add(1);
        }
        taken
    }

    /// How often the device has signalled since the last call.
    pub(super) fn take_signals(&self) -> u64 {
        let mut count = [0; 8];
        match rustix::io::read(&self.call, &mut count) {
            Ok(_) => u64::from_ne_bytes(count),
            Err(_) => 0,
        }
    }

    /// What a kick does.
    pub(super) fn kick(&self) -> io::Result<()> {
        let vrings = std::slice::from_ref(&self.vring);
        self.device.handle_event(0, EventSet::IN, vrings, self.queue.into())
    }

    /// Waits for the kernel to finish something, and has the device look at it.
    pub(super) fn complete_some(&self) {
        let completions = self.completions.as_ref().expect("a device with io_uring");
        let mut fds = [PollFd::new(completions, PollFlags::IN)];
        let mut polled = poll(&mut fds, Some(&LONG));
        // By a signal for another test of this process.
        while polled == Err(Errno::INTR) {
            polled = poll(&mut fds, Some(&LONG));
        }
        assert_eq!(polled, Ok(1), "nothing has finished");
        self.kick().unwrap();
    }

    /// Kicks, and waits until so many were used.
    pub(super) fn run(&mut self, count: usize) -> Vec<(u16, u32)> {
        self.kick().unwrap();
        let mut used = self.take_used();
        while used.len() < count {
            self.complete_some();
            used.extend(self.take_used());
        }
        assert_eq!(used.len(), count);
        used
    }

    /// Puts a header into memory and returns the piece.
    pub(super) fn header(&self, at: u64, kind: u32, sector: u64) -> Piece {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        self.put(at, &bytes);
        readable(at, 16)
    }

    /// A request by itself: returns its status. `pieces` are its data.
    pub(super) fn request(&mut self, kind: u32, sector: u64, pieces: &[Piece]) -> u8 {
        let (header, status) = (self.free(0), self.free(16));
        let mut all = vec![self.header(header, kind, sector)];
        all.extend(pieces);
        all.push(writable(status, 1));
        self.put(status, &[0xff]);
        let head = self.add(&all);
        let written: u32 = all.iter().filter(|piece| piece.writable).map(|piece| piece.len).sum();
        assert_eq!(self.run(1), [(head, written)]);
        self.get(status, 1)[0]
    }
}

/// Bytes that are different everywhere.
pub(super) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len.div_ceil(8)).flat_map(|_| next()).take(len).collect()
}

/// How long requests are delayed that must not be done before the test has looked.
pub(super) const DELAY: Duration = Duration::from_millis(500);
