//! Engines write into guest RAM while it is copied: the copy follows what they have marked, and is
//! the same whenever the machine stands still, through restarts and newcomers.

use crate::driver::Engine;
use crate::machine::{LONG, deadlines, pid, until};
use rustix::process::{Signal, kill_process};
use standstill::coordinator::{
    DeviceSpec, DirtyOptions, DirtyReport, DirtyTracking, LossPolicy, Machine, MachineBuilder,
    MachineEvent, Outcome, RestartPolicy,
};
use standstill::device_proc::devices::copy_engine::registers::{STATUS, STATUS_BUSY};
use standstill::device_proc::devices::copy_engine::{
    DESCRIPTOR_SIZE, Descriptor, FLAG_SEQUENCE, FLAG_STAMP,
};
use standstill::device_proc::memory::SharedMemory;
use std::path::PathBuf;
use tempfile::TempDir;

const PAGE: u64 = 4096;
const RAM: u64 = 1 << 32;
/// What an engine has in guest RAM: its ring, what it copies from, and where it writes.
const RING: u64 = 0;
const SOURCE: u64 = PAGE;
const SOURCE_PAGES: u64 = 4;
const TARGET: u64 = SOURCE + SOURCE_PAGES * PAGE;
const TARGET_PAGES: u64 = 200;
const SLOT: u64 = TARGET + TARGET_PAGES * PAGE;
const ENTRIES: u64 = 8;
/// Engines that there are in the end.
const ENGINES: u64 = 4;
const ROUNDS: usize = 50;

/// The guest's RAM, its copy elsewhere, and its engines.
struct Guest {
    folder: TempDir,
    ram: SharedMemory,
    copy: Vec<u8>,
    engines: Vec<Engine>,
    random: u64,
}

impl Guest {
    fn new() -> Self {
        let ram = SharedMemory::create("ram", ENGINES * SLOT).unwrap();
        let size = usize::try_from(ram.size()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        Self { folder, ram, copy: vec![0; size], engines: Vec::new(), random: 1 }
    }

    fn socket(&self, number: u64) -> PathBuf {
        self.folder.path().join(format!("engine{number}.sock"))
    }

    fn device(&self, number: u64) -> DeviceSpec {
        DeviceSpec::new(format!("engine{number}"), env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "copy-engine", "--memory=65536", "--socket"])
            .arg(self.socket(number))
            .on_loss(LossPolicy::Restart(RestartPolicy::default()))
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.random >> 33) % below
    }

    /// Connects to the present process of an engine and sets it to work.
    fn set_to_work(&mut self, number: u64) {
        let mut engine = Engine::connect(&self.socket(number));
        engine.map(RAM, &self.ram);
        let at = usize::try_from(number).unwrap();
        match self.engines.get_mut(at) {
            Some(last) => *last = engine,
            None => self.engines.push(engine),
        }
        let ring = self.write_slot(number);
        self.engines[at].start(RAM + number * SLOT + RING, &ring);
    }

    /// Writes an engine's ring and what it copies. These are the guest's own writes: nobody marks
    /// them but itself.
    fn write_slot(&mut self, number: u64) -> Vec<Descriptor> {
        let slot = number * SLOT;
        let words: Vec<_> = (0..SOURCE_PAGES * PAGE / 8).map(|_| self.random(u64::MAX)).collect();
        let source: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.ram.write(slot + SOURCE, &source).unwrap();
        let ring: Vec<_> = (0..ENTRIES)
            .map(|_| {
                let len = 8 + self.random(SOURCE_PAGES * PAGE - 8);
                let target = self.random(TARGET_PAGES * PAGE - len - PAGE) / 8 * 8;
                let sequence = self.random((TARGET_PAGES * PAGE) / 8 - 1) * 8;
                Descriptor {
                    source: RAM + slot + SOURCE,
                    destination: RAM + slot + TARGET + target,
                    len: u32::try_from(len).unwrap(),
                    flags: FLAG_SEQUENCE | FLAG_STAMP,
                    sequence_iova: RAM + slot + TARGET + sequence,
                    vector: 0,
                }
            })
            .collect();
        let bytes: Vec<_> = ring.iter().flat_map(Descriptor::to_bytes).collect();
        assert_eq!(bytes.len() as u64, ENTRIES * DESCRIPTOR_SIZE);
        self.ram.write(slot + RING, &bytes).unwrap();
        self.copy_range(slot..slot + TARGET);
        ring
    }

    fn copy_range(&mut self, range: std::ops::Range<u64>) {
        let (from, to) = (range.start, range.end);
        let [begin, end] = [from, to].map(|at| usize::try_from(at).unwrap());
        self.ram.read(from, &mut self.copy[begin..end]).unwrap();
    }

    /// Copies what was written.
    fn follow(&mut self, tracking: &mut DirtyTracking) -> DirtyReport {
        let report = tracking.collect().unwrap();
        for range in report.of(&self.ram).unwrap().unwrap().ranges() {
            self.copy_range(range);
        }
        report
    }

    /// The machine stands: the rest is copied, and the copy is the same, page by page.
    fn assert_same(&mut self, tracking: &mut DirtyTracking, when: &str) -> DirtyReport {
        let report = self.follow(tracking);
        let mut page = vec![0; usize::try_from(PAGE).unwrap()];
        for number in 0..self.ram.size() / PAGE {
            self.ram.read(number * PAGE, &mut page).unwrap();
            let at = usize::try_from(number * PAGE).unwrap();
            let same = page == self.copy[at..at + page.len()];
            assert!(same, "{when}: page {number} has changed without a mark");
        }
        report
    }

    /// Every engine has work, and does it.
    fn assert_busy(&mut self) {
        for (number, engine) in self.engines.iter_mut().enumerate() {
            assert_eq!(engine.read(STATUS), STATUS_BUSY, "engine{number}");
        }
    }
}

async fn pause_and_compare(
    guest: &mut Guest,
    machine: &Machine,
    tracking: &mut DirtyTracking,
    when: &str,
) -> DirtyReport {
    let stopped = machine.pause().await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    let report = guest.assert_same(tracking, when);
    // The guest gives its engines other work, so that other pages are written.
    for number in 0..guest.engines.len() as u64 {
        guest.write_slot(number);
    }
    assert_eq!(tracking.collect().unwrap().dirty_pages(), 0, "{when}: nobody writes");
    stopped.resume().await.unwrap();
    report
}

#[tokio::test]
async fn a_copy_of_ram_that_follows_the_marks_is_the_same_whenever_the_machine_stands() {
    let mut guest = Guest::new();
    let devices: Vec<_> = (0..ENGINES - 1).map(|number| guest.device(number)).collect();
    let builder = MachineBuilder::new("dirty").deadlines(deadlines()).devices(devices);
    let machine = builder.start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    for number in 0..ENGINES - 1 {
        guest.set_to_work(number);
    }
    // Under writes: what is written before it has begun is in the first copy.
    let mut tracking = machine.start_dirty_tracking(DirtyOptions::new(PAGE)).await.unwrap();
    guest.copy_range(0..ENGINES * SLOT);

    let all = guest.ram.size() / PAGE;
    for round in 0..ROUNDS {
        for _ in 0..20 {
            guest.follow(&mut tracking);
        }
        // They write on: there are marks that the last look has not seen.
        until("somebody writes", || guest.follow(&mut tracking).dirty_pages() > 0).await;
        let when = format!("round {round}");
        let report = pause_and_compare(&mut guest, &machine, &mut tracking, &when).await;
        assert_eq!(report.presumed, Vec::<String>::new(), "{when}");
        assert!(report.dirty_pages() < all, "{when}: everything is marked");
    }
    guest.assert_busy();

    // One is killed at work and comes back.
    let mut events = machine.events();
    kill_process(pid(&machine, 1).await, Signal::KILL).unwrap();
    let joined = async {
        while !matches!(events.recv().await.unwrap(), MachineEvent::DeviceJoined { .. }) {
            guest.follow(&mut tracking);
        }
    };
    tokio::time::timeout(LONG, joined).await.unwrap();
    guest.set_to_work(1);
    for round in 0..5 {
        let when = format!("round {round} after the restart");
        pause_and_compare(&mut guest, &machine, &mut tracking, &when).await;
    }
    guest.assert_busy();

    // Another one joins.
    machine.add_device(guest.device(ENGINES - 1)).await.unwrap();
    guest.set_to_work(ENGINES - 1);
    for round in 0..5 {
        let when = format!("round {round} after the addition");
        let report = pause_and_compare(&mut guest, &machine, &mut tracking, &when).await;
        assert_eq!(report.presumed, Vec::<String>::new(), "{when}");
    }
    guest.assert_busy();

    // And one leaves, with all its marks.
    machine.remove_device("engine0").await.unwrap();
    let report = pause_and_compare(&mut guest, &machine, &mut tracking, "after the removal").await;
    assert_eq!(report.presumed, Vec::<String>::new());
    tracking.stop().await.unwrap();
    machine.shutdown().await.unwrap();
}
