//! A hostile length prefix costs no memory: every allocation of the decoder is counted.

use standstill_protocol::codec::{HEADER, MAX_PACKET, decode, encode};
use standstill_protocol::message::*;
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, counting what the calling thread asks for.
struct Counting;

thread_local! {
    static ALLOCATED: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: passes every call on to `System` unchanged; the counter is a thread-local without
// destructor and allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATED.set(ALLOCATED.get() + layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How many bytes a call asks the allocator for, in all.
fn allocated_by<R>(call: impl FnOnce() -> R) -> (R, usize) {
    let before = ALLOCATED.get();
    let result = call();
    (result, ALLOCATED.get() - before)
}

const LENGTHS: [u64; 8] =
    [65, 4096, 4097, 1 << 16, 1 << 32, i64::MAX as u64, u64::MAX - 8, u64::MAX];

fn packet(message: &DeviceMessage) -> Vec<u8> {
    let mut buffer = [0; MAX_PACKET];
    let length = encode(message, 1, &mut buffer).expect("a message within its limits");
    buffer[..length].to_vec()
}

/// Puts each hostile length at `at` and checks that it is refused within a few packets' memory.
fn refused_cheaply(good: &[u8], at: usize) {
    for length in LENGTHS {
        let mut bytes = good.to_vec();
        bytes[at..at + 8].copy_from_slice(&length.to_le_bytes());
        // With nothing behind it, and with a packet full of plausible bytes behind it.
        for filled in [bytes.len(), MAX_PACKET] {
            bytes.resize(filled, 0);
            let (result, allocated) = allocated_by(|| decode::<DeviceMessage>(&bytes, 1));
            assert!(result.is_err(), "length {length} at {at} was accepted");
            assert!(
                allocated <= 4 * MAX_PACKET,
                "length {length} at {at} made the decoder allocate {allocated} bytes"
            );
        }
    }
}

#[test]
fn a_hostile_length_of_a_text_is_refused_without_memory_for_it() {
    let refusal = Refusal { kind: RefusalKind::Busy, text: String::new() };
    let refused = DeviceMessage::Refused(Refused {
        term: Term(1),
        epoch: Epoch(1),
        phase: Phase::Stop,
        state: MigrationState::Stop,
        refusal,
    });
    let good = packet(&refused);
    refused_cheaply(&good, good.len() - 8);
}

#[test]
fn a_hostile_number_of_counters_is_refused_without_memory_for_them() {
    let reached = DeviceMessage::Reached(Reached {
        term: Term(1),
        epoch: Epoch(1),
        phase: Phase::Stop,
        state: MigrationState::Stop,
        timings: Timings::default(),
        evidence: Evidence::default(),
    });
    let good = packet(&reached);
    refused_cheaply(&good, good.len() - 8);
}

#[test]
fn a_hostile_length_in_a_hello_is_refused_without_memory_for_it() {
    let hello = DeviceMessage::Hello(Hello {
        versions: VERSIONS,
        kind: String::new(),
        program_version: String::new(),
        capabilities: Capabilities {
            migration: MigrationFlags::ALL,
            peer_dma: PeerDma::Possible,
            progress: false,
            dirty_tracking: false,
            fault_injection: false,
        },
        machine: Some(uuid::Uuid::nil()),
        term: Term(0),
        epoch: Epoch(0),
        state: MigrationState::Running,
        backing_files: 0,
        memory: Vec::new(),
    });
    let good = packet(&hello);
    let kind_at = HEADER + 4 + 4;
    // Two texts, the migration flags, peer DMA, three truths, and the tag of what is there.
    let machine_at = kind_at + 8 + 8 + 8 + 4 + 1 + 1 + 1 + 1;
    for at in [kind_at, kind_at + 8, machine_at] {
        refused_cheaply(&good, at);
    }
}

#[test]
fn a_command_is_encoded_and_decoded_without_an_allocation() {
    let command = CoordinatorMessage::Command(Command {
        term: Term(1),
        epoch: Epoch(1),
        phase: Phase::Stop,
        target: MigrationState::Stop,
        budget_ns: 1,
        lease_ns: 0,
    });
    let (same, allocated) = allocated_by(|| {
        let mut buffer = [0; MAX_PACKET];
        let length = encode(&command, 1, &mut buffer).unwrap();
        decode::<CoordinatorMessage>(&buffer[..length], 1).unwrap() == command
    });
    assert!(same);
    assert_eq!(allocated, 0);
}
