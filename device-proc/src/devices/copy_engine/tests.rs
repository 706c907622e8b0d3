//! A machine with one copy engine, and what a driver does.

mod running;
mod visible;

use super::*;
use crate::gate::{Gate, Scope};
use crate::interrupt::Interrupts;
use crate::memory::{MemoryMap, WindowSpec};
use std::thread;
use std::time::Instant;

const LONG: Duration = Duration::from_secs(20);
const RAM: u64 = 0x10_0000;
const PEER: u64 = 0x1000_0000;
const SIZE: u64 = 1 << 20;
/// Where the ring is.
const RING: u64 = RAM;
/// Where sequence numbers go in the peer's memory, and where copies do.
const MAILBOX: u64 = PEER + 8;
const TARGET: u64 = PEER + 0x1000;

/// A device, its memory map, and the guest's RAM and a peer's memory as they are.
struct Machine {
    map: MemoryMap,
    interrupts: Interrupts,
    ram: SharedMemory,
    peer: SharedMemory,
    device: CopyEngine,
}

impl Machine {
    fn new() -> Self {
        Self::with(CopyEngineConfig::default())
    }

    fn with(config: CopyEngineConfig) -> Self {
        let map = MemoryMap::new(Arc::new(Gate::new()));
        let interrupts = Interrupts::new();
        let ram = SharedMemory::create("ram", SIZE).expect("ram");
        let peer = SharedMemory::create("peer", SIZE).expect("peer");
        map.declare_ram(ram.try_clone_fd().expect("fd")).expect("declared");
        for (iova, memory) in [(RAM, &ram), (PEER, &peer)] {
            let spec = WindowSpec { iova, size: SIZE, offset: 0, readable: true, writable: true };
            map.map(spec, Some(memory.try_clone_fd().expect("fd"))).expect("mapped");
        }
        let handles = Handles { dma: map.dma(), interrupts: interrupts.clone() };
        let (device, info) = CopyEngine::build(config, handles).expect("built");
        interrupts.set_counts(info.irqs());
        Self { map, interrupts, ram, peer, device }
    }

    fn gate(&self) -> &Gate {
        self.map.gate()
    }

    fn put(&self, index: u64, descriptor: Descriptor) {
        let offset = RING - RAM + index * DESCRIPTOR_SIZE;
        self.ram.write(offset, &descriptor.to_bytes()).expect("in RAM");
    }

    fn write_u32(&self, register: u64, value: u32) {
        self.try_write(register, &value.to_le_bytes()).expect("acceptable");
    }

    fn write_u64(&self, register: u64, value: u64) {
        self.try_write(register, &value.to_le_bytes()).expect("acceptable");
    }

    fn try_write(&self, register: u64, bytes: &[u8]) -> Result<(), AccessError> {
        self.device.region_write(REGISTER_BAR, register, bytes)
    }

    fn read_u32(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.region_read(REGISTER_BAR, register, &mut bytes).expect("readable");
        u32::from_le_bytes(bytes)
    }

    fn read_u64(&self, register: u64) -> u64 {
        let mut bytes = [0; 8];
        self.device.region_read(REGISTER_BAR, register, &mut bytes).expect("readable");
        u64::from_le_bytes(bytes)
    }

    /// Runs the ring with these descriptors.
    fn start(&self, control: u32, descriptors: &[Descriptor]) {
        let count = u32::try_from(descriptors.len()).expect("few");
        for (index, descriptor) in (0..).zip(descriptors) {
            self.put(index, *descriptor);
        }
        self.write_u64(RING_BASE, RING);
        // One more than there are, so that all of them can wait in it.
        let entries = if control & CONTROL_LOOP != 0 { count } else { count + 1 };
        self.write_u32(RING_ENTRIES, entries);
        self.write_u32(CONTROL, control);
        if control & CONTROL_LOOP == 0 {
            self.write_u32(DOORBELL, count);
        }
    }

    fn wait_idle(&self) {
        wait_until("idle", || self.read_u32(STATUS) & STATUS_BUSY == 0);
    }

    /// Waits until it has executed that many more descriptors.
    fn wait_progress(&self, more: u64) {
        let goal = self.read_u64(DESCRIPTORS) + more;
        wait_until("progress", || self.read_u64(DESCRIPTORS) >= goal);
    }

    async fn close(&self, scope: Scope) {
        self.gate().close(scope, LONG).await.expect("drained");
    }

    /// All that must not change while the device is stopped.
    fn frozen_things(&self) -> (Vec<u8>, u64, u64, u64) {
        let mut state = Vec::new();
        self.device.save(&mut state).expect("saved");
        (state, self.peer.hash(), self.ram.hash(), self.interrupts.raised())
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < LONG, "never: {what}");
        thread::yield_now();
    }
}

/// Gives the engine's thread every chance to do something.
fn let_others_run() {
    (0..500).for_each(|_| thread::yield_now());
}

fn copy(source: u64, destination: u64, len: u32) -> Descriptor {
    Descriptor { source, destination, len, ..Descriptor::default() }
}

fn to_peer() -> Descriptor {
    Descriptor {
        flags: FLAG_SEQUENCE | FLAG_STAMP,
        sequence_iova: MAILBOX,
        ..copy(RAM + 0x8000, TARGET, 4096)
    }
}

fn values(counters: &[Counter], kind: CounterKind) -> Vec<(u32, u64)> {
    let of_kind = counters.iter().filter(|counter| counter.kind == kind);
    of_kind.map(|counter| (counter.index, counter.value)).collect()
}
