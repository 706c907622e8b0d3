//! An engine is killed and started again, and its peers' windows onto what is gone are revoked.

use crate::driver::{Engine, MEMORY};
use crate::machine::{ENGINES, Guest, LONG, pid, until};
use rustix::process::{Signal, kill_process};
use standstill::coordinator::{Events, MachineEvent, Outcome};
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::protocol::migration::MigrationState;

/// Waits until the engine counts again; where it is then.
pub(crate) async fn joined(events: &mut Events, name: &str) -> (MigrationState, u64) {
    loop {
        let event = tokio::time::timeout(LONG, events.recv()).await.unwrap().unwrap();
        if let MachineEvent::DeviceJoined { device, state, incarnation, .. } = event {
            assert_eq!(device, name, "nobody else was restarted");
            return (state, incarnation);
        }
    }
}

/// Kills the second of three engines at work, and sets the machine to work again as a VMM has to.
async fn killed_and_set_up_again(name: &str, stopped: bool) {
    let mut guest = Guest::new(name);
    let machine = guest.description.builder().start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    guest.set_to_work();
    guest.assert_writing(&[0, 1, 2]).await;
    if stopped {
        machine.pause().await.unwrap().leave_stopped();
    }
    let before = guest.sight();
    let mut events = machine.events();
    kill_process(pid(&machine, 1).await, Signal::KILL).unwrap();
    let (state, incarnation) = joined(&mut events, &guest.description.device(1)).await;
    let expected = if stopped { MigrationState::Stop } else { MigrationState::Running };
    assert_eq!((state, incarnation), (expected, 2));
    if stopped {
        assert_eq!(guest.sight(), before, "nobody who was stopped has moved");
        let report = machine.resume().await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
    }

    // Its peers have their windows onto it no more, and halt where they would have used them.
    for peer in [0, 2] {
        let engine = &mut guest.engines[peer];
        assert_eq!(engine.probe(Guest::bar(1), MEMORY), PROBE_UNMAPPED);
        until("it has halted", || engine.read(STATUS) & STATUS_HALTED != 0).await;
        assert_eq!(engine.read(STATUS) >> STATUS_ERROR_SHIFT & 0xff, ErrorCode::Unmapped as u32);
    }
    for (peer, other) in [(0, 2), (2, 0)] {
        assert_eq!(guest.engines[peer].probe(Guest::bar(other), MEMORY), PROBE_PEER);
    }

    // The new one is as after power-on, but knows what is RAM.
    guest.engines[1] = Engine::connect(&guest.description.socket(1));
    let engine = &mut guest.engines[1];
    assert_eq!([CONTROL, STATUS, RING_ENTRIES].map(|register| engine.read(register)), [0; 3]);
    assert_eq!(engine.probe(Guest::bar(0), MEMORY), PROBE_UNMAPPED);
    assert!((0..ENGINES).all(|writer| guest.written(writer, 1) == 0));
    guest.wire(1);
    for peer in [0, 2] {
        guest.map_peer(peer, 1);
        assert_eq!(guest.engines[peer].probe(Guest::bar(1), MEMORY), PROBE_PEER);
    }
    for number in 0..ENGINES {
        guest.start(number);
    }
    guest.assert_writing(&[0, 1, 2]).await;

    // It takes part in what follows as all others do.
    let stopped = machine.pause().await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    assert_eq!(stopped.report().participants.len(), ENGINES);
    for (participant, seen) in stopped.report().participants.iter().zip(guest.sight()) {
        let evidence = participant.commands.last().unwrap().evidence().unwrap();
        assert_eq!(evidence.memory_hash, Some(seen), "{}", participant.name);
    }
    stopped.resume().await.unwrap();
    guest.assert_writing(&[0, 1, 2]).await;
    machine.shutdown().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_is_killed_at_work_is_restarted_and_its_peers_lose_their_windows() {
    killed_and_set_up_again("running", false).await;
}

#[tokio::test]
async fn an_engine_that_is_killed_while_the_machine_stands_is_restarted_in_stop() {
    killed_and_set_up_again("standing", true).await;
}
