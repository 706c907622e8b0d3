//! What runs in the guest: a driver of copy engines in user space.
//!
//! It finds the engines by their PCI ids in sysfs, maps their BARs and a huge page whose physical address
//! it knows, has them copy, and checks each byte. It says what it does on the console, a line for each
//! round, by which the test outside goes.

use rustix::fs::MemfdFlags;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::device_proc::devices::copy_engine::{
    DESCRIPTOR_SIZE, Descriptor, FLAG_SEQUENCE, FLAG_STAMP, IDENTITY,
};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// A huge page: in one piece also where it is physically.
pub(crate) const HUGE_PAGE: usize = 2 << 20;
/// Where things are in a huge page: the ring, the sequence number of an engine that goes round and
/// round, what is copied, and where to.
const RING: u64 = 0;
pub(crate) const SEQUENCE: u64 = 0x1000;
const SOURCE: u64 = 0x1_0000;
const DESTINATION: u64 = 0x10_0000;
/// How much one descriptor copies in bytes, and how many there are in a round.
const BLOCK: u64 = 4 << 10;
const BLOCKS: u64 = 8;
/// How much the engine copies that goes round and round, in bytes: some tens of microseconds.
const LONG_BLOCK: u32 = 512 << 10;
/// How much of the memory BAR is written and read in a round, in bytes.
const SHOWN: u64 = 256;
/// Longer than an engine takes for a round, also if it stands meanwhile.
const PATIENCE: Duration = Duration::from_secs(120);

/// The command register of a PCI device, and in it: it answers to memory accesses, it may do DMA.
const COMMAND: u64 = 4;
const MEMORY_SPACE: u16 = 1 << 1;
const BUS_MASTER: u16 = 1 << 2;

/// What the guest is to do: a [`Role`].
pub(crate) const VARIABLE: &str = "STANDSTILL_TEST_DRIVER";

/// What the driver does; see [`drive`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Drives all engines, round by round.
    Rounds,
    /// The same, and before each round it has the engine find that it may do no DMA.
    BusMaster,
}

impl Role {
    /// What [`VARIABLE`] is.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Rounds => "rounds",
            Self::BusMaster => "bus-master",
        }
    }

    /// What the variable says.
    pub(crate) fn of_guest() -> Option<Self> {
        let word = std::env::var(VARIABLE).ok()?;
        [Self::Rounds, Self::BusMaster].into_iter().find(|role| role.word() == word)
    }
}

/// Drives all engines: the last of them goes round and round if there are several, the others copy round by
/// round.
#[expect(clippy::print_stdout, reason = "the test outside goes by what is on the console")]
pub(crate) fn drive(role: Role) {
    let mut engines: Vec<_> = found().iter().map(|path| Engine::open(path)).collect();
    for engine in &engines {
        let Engine { name, physical, .. } = engine;
        engine.write_u64(PROBE_IOVA, *physical);
        engine.write_u64(PROBE_LEN, HUGE_PAGE as u64);
        let probe = engine.read(PROBE_RESULT);
        println!("\nengine {name} has RAM at {physical:#x} and sees it as {probe}");
    }
    println!("engines: {}", engines.len());
    let runner = if engines.len() > 1 { engines.pop() } else { None };
    if let Some(runner) = &runner {
        runner.go_round_and_round();
    }
    for round in 1.. {
        for engine in &engines {
            if role == Role::BusMaster {
                engine.finds_no_memory();
            }
            engine.round(round);
        }
        println!("round {round} is checked");
    }
}

/// The folders of all engines in sysfs, in the order of their addresses.
fn found() -> Vec<PathBuf> {
    let number = |path: &Path, file: &str| {
        let text = fs::read_to_string(path.join(file)).unwrap();
        u16::from_str_radix(text.trim().trim_start_matches("0x"), 16).unwrap()
    };
    let devices = fs::read_dir("/sys/bus/pci/devices").unwrap();
    let mut paths: Vec<_> = devices.map(|device| device.unwrap().path()).collect();
    let identity = (IDENTITY.vendor, IDENTITY.device);
    paths.retain(|path| (number(path, "vendor"), number(path, "device")) == identity);
    paths.sort();
    paths
}

/// One engine, mapped.
struct Engine {
    name: String,
    config: File,
    registers: MmapRegion,
    memory: MmapRegion,
    page: MmapRegion,
    /// Where the page is for the engine.
    physical: u64,
}

impl Engine {
    fn open(path: &Path) -> Self {
        fs::write(path.join("enable"), "1").unwrap();
        let config = File::options().read(true).write(true).open(path.join("config")).unwrap();
        let bar = |number: u32| {
            let path = path.join(format!("resource{number}"));
            let file = File::options().read(true).write(true).open(path).unwrap();
            let size = usize::try_from(file.metadata().unwrap().len()).unwrap();
            MmapRegion::from_file(FileOffset::new(file, 0), size).unwrap()
        };
        let (page, physical) = huge_page();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let (registers, memory) = (bar(REGISTER_BAR), bar(MEMORY_BAR));
        let engine = Self { name, config, registers, memory, page, physical };
        engine.set_bus_master(true);
        assert_eq!(engine.read(ID), ID_VALUE, "{}", engine.name);
        assert_eq!(engine.read(MEMORY_SIZE), u32::try_from(engine.memory.size()).unwrap());
        engine
    }

    /// Lets it do DMA, or not; it answers in any case.
    fn set_bus_master(&self, on: bool) {
        let mut command = [0; 2];
        self.config.read_exact_at(&mut command, COMMAND).unwrap();
        let command = (u16::from_le_bytes(command) | MEMORY_SPACE) & !BUS_MASTER;
        let command = if on { command | BUS_MASTER } else { command };
        self.config.write_all_at(&command.to_le_bytes(), COMMAND).unwrap();
    }

    /// Gives it a descriptor while it may do no DMA: it halts, and says that it cannot read its ring.
    fn finds_no_memory(&self) {
        self.set_bus_master(false);
        self.prepare(2);
        self.write(CONTROL, CONTROL_RUN);
        self.write(DOORBELL, 1);
        let end = Instant::now() + PATIENCE;
        while self.read(STATUS) & STATUS_HALTED == 0 {
            assert!(Instant::now() < end, "{} does not halt", self.name);
        }
        let code = self.read(STATUS) >> STATUS_ERROR_SHIFT;
        assert_eq!(code, ErrorCode::Ring as u32, "{}", self.name);
        self.set_bus_master(true);
    }

    fn read(&self, register: u64) -> u32 {
        self.registers.get_ref::<u32>(usize::try_from(register).unwrap()).unwrap().load()
    }

    fn write(&self, register: u64, value: u32) {
        self.registers.get_ref::<u32>(usize::try_from(register).unwrap()).unwrap().store(value);
    }

    /// In two halves, as a driver may that has 32-bit accesses only.
    fn write_u64(&self, register: u64, value: u64) {
        self.write(register, u32::try_from(value & u64::from(u32::MAX)).unwrap());
        self.write(register + 4, u32::try_from(value >> 32).unwrap());
    }

    fn put(&self, index: u64, descriptor: &Descriptor) {
        let offset = usize::try_from(RING + index * DESCRIPTOR_SIZE).unwrap();
        let slice = self.page.as_volatile_slice();
        slice.write_slice(&descriptor.to_bytes(), offset).unwrap();
    }

    fn fill(&self, offset: u64, bytes: &[u8]) {
        let slice = self.page.as_volatile_slice();
        slice.write_slice(bytes, usize::try_from(offset).unwrap()).unwrap();
    }

    /// Sets the ring up.
    fn prepare(&self, entries: u64) {
        self.write(CONTROL, 0);
        self.write_u64(RING_BASE, self.physical + RING);
        self.write(RING_ENTRIES, u32::try_from(entries).unwrap());
    }

    /// Copies the same block for ever, with a number that grows.
    fn go_round_and_round(&self) {
        self.put(
            0,
            &Descriptor {
                source: self.physical + SOURCE,
                destination: self.physical + DESTINATION,
                len: LONG_BLOCK,
                flags: FLAG_SEQUENCE | FLAG_STAMP,
                sequence_iova: self.physical + SEQUENCE,
                vector: 0,
            },
        );
        self.prepare(1);
        self.write(CONTROL, CONTROL_RUN | CONTROL_LOOP);
    }

    /// Has it copy blocks, each to another place, and checks all that it has copied; and that its
    /// memory BAR is memory.
    fn round(&self, round: u64) {
        let data = pattern(round, BLOCKS * BLOCK);
        self.fill(SOURCE, &data);
        self.fill(DESTINATION, &vec![0; data.len()]);
        for block in 0..BLOCKS {
            let descriptor = Descriptor {
                source: self.physical + SOURCE + block * BLOCK,
                // The other way round.
                destination: self.physical + DESTINATION + (BLOCKS - 1 - block) * BLOCK,
                len: u32::try_from(BLOCK).unwrap(),
                ..Descriptor::default()
            };
            self.put(block, &descriptor);
        }
        self.prepare(BLOCKS + 1);
        self.write(CONTROL, CONTROL_RUN);
        self.write(DOORBELL, u32::try_from(BLOCKS).unwrap());
        self.show(&data[..usize::try_from(SHOWN).unwrap()]);
        let end = Instant::now() + PATIENCE;
        loop {
            let status = self.read(STATUS);
            assert_eq!(status & STATUS_HALTED, 0, "{} has halted: {status:#x}", self.name);
            if status & STATUS_BUSY == 0 {
                break;
            }
            assert!(Instant::now() < end, "{}: round {round} has no end: {status:#x}", self.name);
        }
        assert_eq!(u64::from(self.read(HEAD)), BLOCKS, "{}", self.name);
        let mut copied = vec![0; data.len()];
        let slice = self.page.as_volatile_slice();
        slice.read_slice(&mut copied, usize::try_from(DESTINATION).unwrap()).unwrap();
        let size = usize::try_from(BLOCK).unwrap();
        for (number, (block, expected)) in
            copied.chunks(size).rev().zip(data.chunks(size)).enumerate()
        {
            assert!(block == expected, "{}: round {round}, block {number} is wrong", self.name);
        }
    }

    fn show(&self, data: &[u8]) {
        let memory = self.memory.as_volatile_slice();
        memory.write_slice(data, 0).unwrap();
        let mut seen = vec![0; data.len()];
        memory.read_slice(&mut seen, 0).unwrap();
        assert!(seen == data, "{}: its memory BAR does not hold what is written to it", self.name);
    }
}

/// Bytes that are others in each round and at each place.
fn pattern(round: u64, len: u64) -> Vec<u8> {
    (0..len / 8)
        .flat_map(|word| {
            let mixed = (round << 32 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (mixed ^ mixed >> 29).to_le_bytes()
        })
        .collect()
}

/// A huge page, and its physical address. The kernel does not move it.
fn huge_page() -> (MmapRegion, u64) {
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = File::from(rustix::fs::memfd_create("copied", flags).unwrap());
    file.set_len(HUGE_PAGE as u64).unwrap();
    let page: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0), HUGE_PAGE).unwrap();
    page.as_volatile_slice().write_slice(&[0], 0).unwrap();
    // One entry of 8 bytes for each page of 4 KiB; see the kernel's pagemap.rst.
    let entry = page.as_ptr() as u64 / 4096 * 8;
    let mut bytes = [0; 8];
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut bytes, entry).unwrap();
    let entry = u64::from_le_bytes(bytes);
    assert!(entry >> 63 == 1, "the huge page is not there: {entry:#x}");
    (page, (entry & ((1 << 55) - 1)) * 4096)
}
