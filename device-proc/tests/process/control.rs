//! Phases, queries, aborts, and what is dropped.

use crate::child::{Device, command};
use crate::client::Client;
use crate::probe::LET_GO;
use standstill_protocol::message::{
    Command, CoordinatorMessage, DeviceMessage, Epoch, MemoryDeclaration, Phase, RefusalKind, Term,
};
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::AsFd;

#[test]
fn four_phases_are_answered_with_term_epoch_and_state() {
    let device = Device::welcomed("");
    for round in 0..3 {
        let prepared = device.go(2 * round + 1, Phase::PrepareStop, S::RunningP2p);
        assert_eq!(prepared.evidence.counters.len(), 1, "PrepareStopped");
        let stopped = device.go(2 * round + 1, Phase::Stop, S::Stop);
        assert_eq!(stopped.evidence.counters.len(), 2, "StopArrived and Stopped");
        let started = device.go(2 * round + 2, Phase::PrepareStart, S::RunningP2p);
        assert_eq!(started.evidence.counters.len(), 1, "StartArrived");
        let running = device.go(2 * round + 2, Phase::Start, S::Running);
        assert!(running.evidence.counters.is_empty());
        assert!(running.timings.total_ns > 0);
    }
    device.shut_down();
}

#[test]
fn a_query_is_answered_while_a_hook_waits() {
    let device = Device::welcomed("hold:prepare_stop");
    let mut client = Client::connect(&device.socket());
    device.command(1, Phase::PrepareStop, S::RunningP2p);
    let status = device.query(1);
    assert_eq!((status.state, status.moving_to), (S::Running, Some(S::RunningP2p)));
    client.write_u32(0, LET_GO, 1).unwrap();
    assert_eq!(device.reached().state, S::RunningP2p);
    assert_eq!(device.query(1).moving_to, None);
}

#[test]
fn an_abort_ends_a_hook_that_waits_without_an_answer() {
    let device = Device::welcomed("hold:prepare_stop");
    device.command(1, Phase::PrepareStop, S::RunningP2p);
    device.abort(1);
    crate::child::until("the hook is given up", || device.query(2).moving_to.is_none());
    assert_eq!(device.query(3).state, S::Running);
    // What belongs to the epoch that was given up is dropped: only the next one is answered.
    device.command(1, Phase::Stop, S::Stop);
    device.command(2, Phase::Start, S::Running);
    assert_eq!(device.reached().epoch, Epoch(2));
}

#[test]
fn a_later_command_overtakes_a_hook_that_waits() {
    let device = Device::welcomed("hold:stop");
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.command(1, Phase::Stop, S::Stop);
    let started = {
        device.command(2, Phase::Start, S::Running);
        device.reached()
    };
    assert_eq!((started.epoch, started.state), (Epoch(2), S::Running));
}

#[test]
fn a_hook_that_uses_up_its_budget_is_refused_by_name() {
    let device = Device::welcomed("hold:prepare_stop");
    let late = Command { budget_ns: 1_000_000, ..command(1, Phase::PrepareStop, S::RunningP2p) };
    device.send(&CoordinatorMessage::Command(late));
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::Running, RefusalKind::Device));
    let text = &refused.refusal.text;
    assert!(text.starts_with("prepare_stop did not end within"), "{text}");
}

#[test]
fn a_hook_that_fails_is_refused_and_the_device_is_where_it_was() {
    let device = Device::welcomed("fail:stop");
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.command(1, Phase::Stop, S::Stop);
    let refused = device.refused();
    assert_eq!((refused.state, refused.phase), (S::RunningP2p, Phase::Stop));
    assert_eq!(refused.refusal.text, "stop: as the script says");
    device.go(2, Phase::Start, S::Running);
    let mut client = Client::connect(&device.socket());
    client.write_u32(0, 0, 5).unwrap();
}

#[test]
fn stale_terms_and_epochs_are_dropped() {
    let device = Device::welcomed("");
    device.go(5, Phase::PrepareStop, S::RunningP2p);
    let foreign = Command { term: Term(2), ..command(6, Phase::Stop, S::Stop) };
    device.send(&CoordinatorMessage::Command(foreign));
    let lower = Command { term: Term(0), ..command(6, Phase::Stop, S::Stop) };
    device.send(&CoordinatorMessage::Command(lower));
    device.command(4, Phase::Stop, S::Stop);
    device.command(5, Phase::PrepareStop, S::RunningP2p);
    assert_eq!(device.query(5).state, S::RunningP2p);
    device.go(5, Phase::Stop, S::Stop);
}

#[test]
fn a_lease_brings_the_device_back_by_itself() {
    let device = Device::welcomed("");
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    let leased = Command { lease_ns: 1_000_000, ..command(1, Phase::Stop, S::Stop) };
    device.send(&CoordinatorMessage::Command(leased));
    assert_eq!(device.reached().state, S::Stop);
    match device.next() {
        DeviceMessage::Event(event) => {
            let expected = standstill_protocol::message::DeviceEvent::LeaseExpired(S::RunningP2p);
            assert_eq!(event, expected);
        }
        other => panic!("expected an event, got {other:?}"),
    }
    device.go(2, Phase::Start, S::Running);
}

#[test]
fn a_memory_declaration_is_answered_when_it_is_in_force() {
    let device = Device::welcomed("");
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(1 << 20).unwrap();
    let declaration =
        MemoryDeclaration { term: Term(1), sequence: 9, ram_fds: 2, dirty_page_size: 0 };
    device.send_with(&CoordinatorMessage::Memory(declaration), &[ram.as_fd(), ram.as_fd()]);
    match device.answer() {
        DeviceMessage::MemoryAccepted(accepted) => assert_eq!(accepted.sequence, 9),
        other => panic!("expected MemoryAccepted, got {other:?}"),
    }
}
