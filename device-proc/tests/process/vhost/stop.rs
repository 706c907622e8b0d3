//! Stops by the coordinator, by the frontend, and by both.

use super::guest::{Guest, Memory};
use super::{Fifo, declare};
use crate::child::{Device, command, until};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use standstill_protocol::message::{Command, CoordinatorMessage, PeerDma, Phase, RefusalKind};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[test]
fn it_says_of_itself_what_is_true() {
    let (_device, hello) = Device::start("vhost");
    let capabilities = hello.capabilities;
    assert_eq!(hello.kind, "rng");
    assert_eq!(capabilities.migration, MigrationFlags::STOP_COPY_P2P);
    assert_eq!(capabilities.peer_dma, PeerDma::Possible);
    assert!(!capabilities.dirty_tracking && capabilities.progress);
}

#[test]
fn requests_wait_in_their_ring_while_it_is_stopped() {
    for script in ["vhost", "vhost later"] {
        let device = Device::welcomed(script);
        let mut guest = Guest::start(&device.socket(), 1);
        for round in 0..10 {
            let before = 2 * u16::try_from(round).unwrap();
            device.go(4 * round + 1, Phase::PrepareStop, S::RunningP2p);
            guest.push(0);
            guest.settle(0);
            device.go(4 * round + 1, Phase::Stop, S::Stop);
            guest.push(0);
            guest.settle(0);
            device.go(4 * round + 2, Phase::PrepareStart, S::RunningP2p);
            guest.settle(0);
            assert_eq!(guest.memory.used(0), before, "{script}");
            device.go(4 * round + 2, Phase::Start, S::Running);
            guest.wait_used(0, before + 2);
        }
        assert_eq!(guest.memory.number(0, 19), 19, "{script}: each once");
    }
}

/// The kick was taken by the device while it could do nothing about it, and none comes again.
#[test]
fn an_undo_finds_what_came_meanwhile() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::start(&device.socket(), 1);
    for round in 1..=10_u16 {
        let epoch = 2 * u64::from(round);
        device.go(epoch, Phase::PrepareStop, S::RunningP2p);
        guest.push(0);
        guest.settle(0);
        device.abort(epoch);
        device.go(epoch + 1, Phase::Start, S::Running);
        guest.wait_used(0, round);
    }
}

#[test]
fn the_first_phase_waits_for_what_may_reach_peers_and_not_for_ram() {
    for script in ["vhost hold", "vhost later hold"] {
        for is_ram in [false, true] {
            let device = Device::welcomed(script);
            let fifo = Fifo::of(&device);
            let mut guest = Guest::start(&device.socket(), 1);
            if is_ram {
                declare(&device, guest.memory.file());
            }
            guest.push(0);
            let request = fifo.request();
            device.command(1, Phase::PrepareStop, S::RunningP2p);
            if is_ram {
                assert_eq!(device.reached().state, S::RunningP2p);
                device.command(1, Phase::Stop, S::Stop);
            }
            // Not before it is done; and the control side does not wait.
            let status = device.query(1);
            let waits_for = if is_ram { S::Stop } else { S::RunningP2p };
            assert_eq!(status.moving_to, Some(waits_for), "{script} {is_ram}");
            drop(request);
            assert_eq!(device.reached().state, waits_for);
            assert_eq!(guest.memory.used(0), 1);
            assert!(guest.was_signalled(0));
            guest.push(0);
            if !is_ram {
                device.go(1, Phase::Stop, S::Stop);
            }
            device.go(2, Phase::PrepareStart, S::RunningP2p);
            device.command(2, Phase::Start, S::Running);
            drop(fifo.request());
            assert_eq!(device.reached().state, S::Running);
            guest.wait_used(0, 2);
        }
    }
}

/// A guest that always has another request keeps a backend without permits from coming to the end of
/// an event.
#[test]
fn a_busy_guest_does_not_prolong_a_stop() {
    for script in ["vhost", "vhost later"] {
        let device = Device::welcomed(script);
        let mut guest = Guest::start(&device.socket(), 1);
        let is_over = Arc::new(AtomicBool::new(false));
        let busy = {
            let is_over = Arc::clone(&is_over);
            std::thread::spawn(move || {
                let mut pushed = 0_u16;
                while !is_over.load(Ordering::Relaxed) {
                    if pushed.wrapping_sub(guest.memory.used(0)) < 8 {
                        guest.push(0);
                        pushed = pushed.wrapping_add(1);
                    } else {
                        std::thread::yield_now();
                    }
                }
                guest.wait_used(0, pushed);
            })
        };
        for round in 0..100 {
            device.pause(2 * round + 1);
            device.resume(2 * round + 2);
        }
        is_over.store(true, Ordering::Relaxed);
        busy.join().unwrap();
        device.shut_down();
    }
}

#[test]
fn a_start_needs_no_fd() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.settle(0);
    device.pause(1);
    guest.push(0);
    guest.settle(0);
    let process = Pid::from_child(&device.process);
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    prlimit(Some(process), Resource::Nofile, none).unwrap();
    device.resume(2);
    guest.wait_used(0, 1);
}

/// A ring whose turn is over in the middle of an event is not ready for a while; whoever enables it then has
/// its kicks all the same.
#[test]
fn a_ring_that_is_enabled_in_the_middle_of_a_stop_has_its_kicks() {
    let device = Device::welcomed("vhost hold queues:2 threads");
    let fifo = Fifo::of(&device);
    let mut guest = Guest::start(&device.socket(), 2);
    guest.settle(1);
    declare(&device, guest.memory.file());
    guest.push(0);
    let request = fifo.request();
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    device.query(1);
    guest.frontend.enable_ring(1, false).unwrap();
    guest.frontend.enable_ring(1, true).unwrap();
    drop(request);
    device.go(1, Phase::Stop, S::Stop);
    device.resume(2);
    guest.push(1);
    drop(fifo.request());
    guest.wait_used(1, 1);
}

#[test]
fn a_stop_that_is_given_up_leaves_the_device_running() {
    for script in ["vhost hold", "vhost later hold"] {
        let device = Device::welcomed(script);
        let fifo = Fifo::of(&device);
        let mut guest = Guest::start(&device.socket(), 1);
        (0..2).for_each(|_| guest.push(0));
        let request = fifo.request();
        device.command(1, Phase::PrepareStop, S::RunningP2p);
        device.abort(1);
        until("it was given up", || {
            let status = device.query(1);
            (status.state, status.moving_to) == (S::Running, None)
        });
        drop(request);
        drop(fifo.request());
        guest.wait_used(0, 2);
    }
}

#[test]
fn a_stop_that_is_late_leaves_the_device_running() {
    let device = Device::welcomed("vhost later hold");
    let fifo = Fifo::of(&device);
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push(0);
    let request = fifo.request();
    let command = command(1, Phase::PrepareStop, S::RunningP2p);
    let command = Command { budget_ns: 50_000_000, ..command };
    device.send(&CoordinatorMessage::Command(command));
    let refused = device.refused();
    assert_eq!((refused.state, refused.refusal.kind), (S::Running, RefusalKind::Device));
    assert!(refused.refusal.text.contains("1 requests still in flight"), "{refused:?}");
    drop(request);
    guest.push(0);
    drop(fifo.request());
    guest.wait_used(0, 2);
}

#[test]
fn the_frontend_stops_rings_before_a_stop_and_starts_them_after_it() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push(0);
    guest.wait_used(0, 1);
    assert_eq!(guest.stop_ring(0), 1);
    device.pause(1);
    device.resume(2);
    guest.memory.push(0);
    guest.start_ring(0, 1);
    guest.wait_used(0, 2);
}

#[test]
fn the_frontend_stops_and_starts_rings_of_a_device_that_is_stopped() {
    for script in ["vhost", "vhost later"] {
        let device = Device::welcomed(script);
        let mut guest = Guest::start(&device.socket(), 1);
        for round in 0..10_u16 {
            device.pause(u64::from(round) * 2 + 1);
            guest.push(0);
            assert_eq!(guest.stop_ring(0), round);
            guest.start_ring(0, round);
            guest.settle(0);
            assert_eq!(guest.memory.used(0), round, "it is stopped");
            device.resume(u64::from(round) * 2 + 2);
            guest.wait_used(0, round + 1);
        }
    }
}

#[test]
fn whoever_stops_first_the_other_one_has_to_start_it_too() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::start(&device.socket(), 1);
    // Band, coordinator, coordinator, band.
    assert_eq!(guest.stop_ring(0), 0);
    device.pause(1);
    device.resume(2);
    guest.memory.push(0);
    assert_eq!(guest.memory.used(0), 0, "the ring is stopped");
    guest.start_ring(0, 0);
    guest.wait_used(0, 1);
    // Coordinator, band, coordinator, band.
    device.pause(3);
    assert_eq!(guest.stop_ring(0), 1);
    device.resume(4);
    guest.memory.push(0);
    guest.start_ring(0, 1);
    guest.wait_used(0, 2);
}

#[test]
fn both_wait_for_what_is_in_flight() {
    for script in ["vhost hold", "vhost later hold"] {
        let device = Device::welcomed(script);
        let fifo = Fifo::of(&device);
        let mut guest = Guest::start(&device.socket(), 1);
        guest.push(0);
        let request = fifo.request();
        device.command(1, Phase::PrepareStop, S::RunningP2p);
        let stopping = std::thread::spawn(move || (guest.stop_ring(0), guest));
        assert_eq!(device.query(1).moving_to, Some(S::RunningP2p));
        assert!(!stopping.is_finished());
        drop(request);
        assert_eq!(device.reached().state, S::RunningP2p);
        let (base, guest) = stopping.join().unwrap();
        assert_eq!((base, guest.memory.used(0)), (1, 1), "{script}");
        assert!(guest.was_signalled(0), "before the frontend took its eventfd back");
        device.go(1, Phase::Stop, S::Stop);
    }
}

#[test]
fn what_is_written_to_the_configuration_space_of_a_stopped_device_waits() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.set_config(0, b"ab").unwrap();
    device.pause(1);
    guest.set_config(1, b"cd").unwrap();
    guest.set_config(2, b"e").unwrap();
    assert_eq!(guest.config(), b"ace34567", "who has written it, reads it");
    device.resume(2);
    assert_eq!(guest.config(), b"ace34567");
    guest.set_config(0, b"x").unwrap();
    assert_eq!(guest.config(), b"xce34567");
    // What cannot be written does not cost the connection.
    guest.set_config(7, b"yy").unwrap();
    assert_eq!(guest.config(), b"xce34567");
    device.shut_down();
}

#[test]
fn a_frontend_can_go_and_come_while_the_device_is_stopped() {
    let device = Device::welcomed("vhost in-order");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push(0);
    guest.wait_used(0, 1);
    device.pause(1);
    guest.push(0);
    let memory: Memory = guest.disconnect();
    let mut guest = Guest::connect(&device.socket(), memory);
    guest.start_ring(0, 1);
    guest.settle(0);
    assert_eq!(guest.memory.used(0), 1);
    device.resume(2);
    guest.wait_used(0, 2);
}
