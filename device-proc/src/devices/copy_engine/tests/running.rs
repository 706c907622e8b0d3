//! The engine at work, at the gate, and at errors.

use super::*;
use standstill_protocol::message::MAX_COUNTERS;

#[test]
fn a_ring_is_executed_once() {
    let machine = Machine::new();
    machine.ram.write(0x8000, &[7; 4096]).expect("inside");
    let loud = Descriptor { flags: FLAG_INTERRUPT, vector: 3, ..copy(TARGET, RAM + 0x9000, 100) };
    machine.start(CONTROL_RUN, &[copy(RAM + 0x8000, TARGET, 4096), to_peer(), loud]);
    machine.wait_idle();
    assert_eq!(machine.read_u32(HEAD), 3);
    assert_eq!(machine.read_u64(DESCRIPTORS), 3);
    assert_eq!(machine.read_u64(BYTES), 4096 + 4096 + 100);
    assert!(machine.read_u64(BUSY_NS) > 0);
    assert_eq!(machine.peer.load_u64(0x1000), Ok(1), "stamped");
    assert_eq!(machine.peer.load_u64(0x1008), Ok(0x0707_0707_0707_0707), "copied");
    assert_eq!(machine.peer.load_u64(8), Ok(1), "sequence stored");
    assert_eq!(machine.ram.load_u64(0x9000), Ok(1), "copied back");
    assert_eq!(machine.ram.load_u64(0x9060).expect("inside") >> 32, 0, "not one byte more");
    assert_eq!(machine.device.progress(), Some(Progress { done: 3, pending: false }));
}

#[tokio::test]
async fn closed_for_peers_the_engine_stands_still_and_goes_on_afterwards() {
    let machine = Machine::new();
    machine.start(CONTROL_RUN | CONTROL_LOOP, &[to_peer(), copy(RAM, RAM + 0x4_0000, 64)]);
    machine.wait_progress(100);
    // Everything at or before the peer descriptor is done; it waits there for ever.
    machine.close(Scope::Peer).await;
    wait_until("at the peer descriptor", || machine.read_u32(HEAD) == 0);
    let before = machine.frozen_things();
    let_others_run();
    assert_eq!(machine.frozen_things(), before);
    assert_eq!(machine.gate().in_flight(Scope::All), 0);
    assert!(!machine.device.progress().expect("it has a thread").pending, "held by the gate");
    machine.gate().open(Scope::All);
    assert!(machine.device.progress().expect("it has a thread").pending, "it goes on for ever");
    machine.wait_progress(100);
}

#[tokio::test]
async fn closed_for_peers_copies_within_ram_go_on() {
    let machine = Machine::new();
    machine.start(CONTROL_RUN | CONTROL_LOOP, &[copy(RAM + 0x8000, RAM + 0x9000, 4096)]);
    machine.close(Scope::Peer).await;
    machine.wait_progress(100);
    machine.close(Scope::All).await;
    let before = machine.frozen_things();
    let_others_run();
    assert_eq!(machine.frozen_things(), before);
}

#[tokio::test]
async fn at_every_close_what_it_says_to_have_written_is_what_the_peer_has() {
    let machine = Machine::new();
    let loud = Descriptor { flags: to_peer().flags | FLAG_INTERRUPT, vector: 1, ..to_peer() };
    let second = Descriptor {
        sequence_iova: MAILBOX + 8,
        destination: TARGET + 0x8000,
        len: 0x1_0000,
        ..to_peer()
    };
    machine.start(CONTROL_RUN | CONTROL_LOOP, &[loud, second]);
    for round in 0..200 {
        machine.wait_progress(3);
        let scope = if round % 2 == 0 { Scope::Peer } else { Scope::All };
        machine.close(scope).await;
        let evidence = machine.device.evidence(Moment::PrepareStopped);
        let written = values(&evidence.counters, CounterKind::Written);
        let of = |place: u64| machine.peer.load_u64(place).expect("inside");
        let stamps = [(0, of(TARGET - PEER)), (1, of(TARGET + 0x8000 - PEER))];
        assert_eq!(written, [(0, of(8)), (1, of(16))]);
        assert_eq!(written, stamps);
        assert_eq!(machine.read_u64(DESCRIPTORS), of(8) + of(16));
        machine.gate().open(Scope::All);
    }
}

#[tokio::test]
async fn a_stop_waits_for_a_transaction_half_way() {
    let machine = Machine::new();
    let dma = machine.map.dma();
    let half_way = dma.access(&[crate::memory::Span::write(TARGET, 8)]).expect("open");
    let budget = Duration::from_millis(5);
    let failed = machine.gate().close(Scope::Peer, budget).await.expect_err("in flight");
    assert_eq!(failed.in_flight, 1);
    // The stop has failed, so the device goes on.
    machine.start(CONTROL_RUN | CONTROL_LOOP, &[to_peer()]);
    machine.wait_progress(10);
    drop(half_way);
    machine.close(Scope::Peer).await;
}

#[tokio::test]
async fn an_interrupt_belongs_to_its_transaction() {
    let machine = Machine::new();
    let loud = Descriptor { flags: FLAG_INTERRUPT, vector: 2, ..copy(RAM, TARGET, 8) };
    machine.interrupts.freeze().await;
    machine.start(CONTROL_RUN, &[loud]);
    machine.wait_idle();
    machine.close(Scope::All).await;
    assert_eq!(machine.interrupts.latched().msix, [2], "it is there when the gate has drained");
    assert_eq!(machine.read_u64(INTERRUPTS), 0);
}

#[tokio::test]
async fn while_stopped_not_even_an_error_changes_anything() {
    let machine = Machine::new();
    machine.start(CONTROL_RUN | CONTROL_LOOP, &[copy(RAM + 0x8000, RAM + 0x9000, 64)]);
    machine.wait_progress(10);
    machine.close(Scope::All).await;
    let before = machine.frozen_things();
    machine.map.unmap(RAM, SIZE, LONG).expect("nobody holds it");
    let_others_run();
    assert_eq!(machine.frozen_things(), before);
    machine.gate().open(Scope::All);
    wait_until("halted", || machine.read_u32(STATUS) & STATUS_HALTED != 0);
}

#[test]
fn a_bad_descriptor_halts_the_engine_until_it_is_set_running_again() {
    let good = copy(RAM + 0x8000, TARGET, 64);
    let no_alignment = Descriptor { flags: FLAG_SEQUENCE, sequence_iova: MAILBOX + 4, ..good };
    let rows = [
        (copy(RAM, TARGET, 0), ErrorCode::Descriptor),
        (copy(RAM, TARGET, MAX_COPY + 1), ErrorCode::Descriptor),
        (copy(RAM, TARGET, u32::MAX), ErrorCode::Descriptor),
        (Descriptor { flags: 8, ..good }, ErrorCode::Descriptor),
        (Descriptor { flags: FLAG_STAMP, len: 7, ..good }, ErrorCode::Descriptor),
        (Descriptor { flags: FLAG_INTERRUPT, vector: 4, ..good }, ErrorCode::Descriptor),
        (no_alignment, ErrorCode::Descriptor),
        (copy(0x1000, TARGET, 64), ErrorCode::Unmapped),
        (copy(RAM, TARGET, MAX_COPY), ErrorCode::Unmapped),
        (copy(RAM, u64::MAX, 64), ErrorCode::Unmapped),
        (copy(u64::MAX - 63, TARGET, 64), ErrorCode::Unmapped),
        (copy(RAM, 0x5000_0000, 64), ErrorCode::Forbidden),
        (copy(RAM, 0x6000_0000, 64), ErrorCode::NoMemory),
    ];
    let machine = Machine::new();
    let read_only =
        WindowSpec { iova: 0x5000_0000, size: 4096, offset: 0, readable: true, writable: false };
    let fd = machine.peer.try_clone_fd().expect("fd");
    machine.map.map(read_only, Some(fd)).expect("mapped");
    let no_file = WindowSpec { iova: 0x6000_0000, writable: true, ..read_only };
    machine.map.map(no_file, None).expect("recorded");
    for (bad, code) in rows {
        machine.start(CONTROL_RUN, &[good, bad, good]);
        wait_until("halted", || machine.read_u32(STATUS) & STATUS_HALTED != 0);
        let status = machine.read_u32(STATUS);
        assert_eq!(status, STATUS_HALTED | ((code as u32) << STATUS_ERROR_SHIFT), "{bad:?}");
        assert_eq!(machine.read_u32(HEAD), 1);
        assert_eq!(machine.read_u32(CONTROL), 0);
        machine.put(1, good);
        machine.write_u32(CONTROL, CONTROL_RUN);
        machine.wait_idle();
        assert_eq!(machine.read_u32(STATUS), 0);
        assert_eq!(machine.read_u32(HEAD), 3);
        machine.write_u32(CONTROL, 0);
    }
    // And where the ring itself cannot be read.
    machine.write_u64(RING_BASE, 0x7000_0000);
    machine.write_u32(CONTROL, CONTROL_RUN | CONTROL_LOOP);
    wait_until("halted", || machine.read_u32(STATUS) & STATUS_HALTED != 0);
    assert_eq!(machine.read_u32(STATUS) >> STATUS_ERROR_SHIFT, ErrorCode::Ring as u32);
}

#[test]
fn the_evidence_fits_each_moment_and_a_message() {
    let machine = Machine::with(CopyEngineConfig { vectors: 16, ..CopyEngineConfig::default() });
    let many = vec![to_peer(); 40];
    machine.start(CONTROL_RUN, &many);
    machine.wait_idle();
    machine.device.memory.store_u64(8, 11).expect("inside");
    machine.device.memory.store_u64(15 * 8, 22).expect("inside");
    machine.device.memory.store_u64(16 * 8, 33).expect("inside");

    let prepared = machine.device.evidence(Moment::PrepareStopped);
    let first: Vec<_> = (0..32).map(|index| (index, 1)).collect();
    assert_eq!(values(&prepared.counters, CounterKind::Written), first);
    assert_eq!(prepared.memory_hash, None);
    for moment in [Moment::StopArrived, Moment::StartArrived] {
        let arrived = machine.device.evidence(moment);
        assert_eq!(values(&arrived.counters, CounterKind::Received), [(1, 11), (15, 22)]);
    }
    let stopped = machine.device.evidence(Moment::Stopped);
    assert_eq!(stopped.memory_hash, Some(machine.device.memory.hash()));
    assert_eq!(values(&stopped.counters, CounterKind::Written), first);
    assert_eq!(values(&stopped.counters, CounterKind::Interrupts).len(), 16);
    assert!(stopped.counters.len() <= MAX_COUNTERS);
}

#[tokio::test]
async fn the_delays_of_hooks_are_exact() {
    let slow = Duration::from_millis(3);
    let config = CopyEngineConfig {
        slow_prepare: slow,
        slow_stop: slow,
        slow_prepare_start: slow,
        slow_start: slow,
        ..CopyEngineConfig::default()
    };
    let machine = Machine::with(config);
    let mut shortest = [LONG; 4];
    for _ in 0..10 {
        let device = &machine.device;
        shortest = [
            shortest[0].min(time_of(device.prepare_stop(LONG)).await),
            shortest[1].min(time_of(device.stop(LONG)).await),
            shortest[2].min(time_of(device.prepare_start(LONG)).await),
            shortest[3].min(time_of(device.start(LONG)).await),
        ];
    }
    for time in shortest {
        assert!(time >= slow, "{shortest:?}");
        // Timers of whole milliseconds would be late by more than this.
        assert!(time < slow + Duration::from_micros(700), "{shortest:?}");
    }
}

async fn time_of(hook: impl Future<Output = Result<(), DeviceError>>) -> Duration {
    let begin = Instant::now();
    hook.await.expect("hook");
    begin.elapsed()
}
