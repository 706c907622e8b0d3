//! Backends of the `vhost-user-backend` crate in device processes, as a coordinator and a frontend see
//! them.

mod device;
pub(crate) mod disk;
#[cfg(feature = "fault-injection")]
mod faults;
mod first_look;
mod guest;
mod handover;
mod hostile;
mod schedules;
mod state;
mod stop;

pub(crate) use device::{SCRIPT, run};

use crate::child::{Device, until, wait, welcome};
use guest::{Guest, Memory};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat, open};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceEvent, DeviceMessage, Heartbeat, MemoryDeclaration, OrphanPolicy,
    Phase, Term, Welcome,
};
use standstill_protocol::migration::MigrationState as S;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use vhost::vhost_user::VhostUserProtocolFeatures as Protocol;

/// Where requests wait, in a device that holds them.
struct Fifo(PathBuf);

impl Fifo {
    fn of(device: &Device) -> Self {
        let fifo = Self(device.socket().with_extension("sock.fifo"));
        fifo.renew();
        fifo
    }

    /// Each request has a fifo of its own, so that none takes what another one is given.
    fn renew(&self) {
        let next = self.0.with_extension("next");
        mknodat(CWD, &next, FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::fs::rename(next, &self.0).unwrap();
    }

    /// Returns when a request waits; it goes on when the result is dropped.
    fn request(&self) -> OwnedFd {
        let mut opened = None;
        // It can be opened once somebody reads it.
        until("a request waits", || {
            opened = open(&self.0, OFlags::WRONLY | OFlags::NONBLOCK, Mode::empty()).ok();
            opened.is_some()
        });
        self.renew();
        opened.unwrap()
    }
}

/// The next event that says that the device, or a part of it, does not work.
fn failure(device: &Device) -> String {
    loop {
        if let DeviceMessage::Event(DeviceEvent::Failed(why)) = device.next() {
            return why;
        }
    }
}

fn declare(device: &Device, ram: &File) {
    let declaration =
        MemoryDeclaration { term: Term(1), sequence: 1, ram_fds: 1, dirty_page_size: 0 };
    device.send_with(&CoordinatorMessage::Memory(declaration), &[ram.as_fd()]);
    assert!(matches!(device.answer(), DeviceMessage::MemoryAccepted(_)));
}

#[test]
fn requests_are_served_by_all_queues_and_threads() {
    for script in ["vhost queues:3", "vhost queues:3 threads", "vhost later queues:3 threads"] {
        let device = Device::welcomed(script);
        let mut guest = Guest::start(&device.socket(), 3);
        for round in 1..=20 {
            (0..3).for_each(|queue| guest.push(queue));
            (0..3).for_each(|queue| guest.wait_used(queue, round));
        }
        let last = (0..3).map(|queue| guest.memory.number(queue, 19)).max();
        assert_eq!(last, Some(59), "{script}: each request has a number of its own");
        device.shut_down();
    }
}

#[test]
fn a_frontend_that_goes_and_comes_again_at_once_is_answered() {
    let device = Device::welcomed("vhost");
    let mut memory = Memory::new(1);
    for _ in 0..300 {
        memory = Guest::connect(&device.socket(), memory).disconnect();
    }
    device.shut_down();
}

#[test]
fn what_cannot_be_served_is_not_offered() {
    let offered = |script| {
        let device = Device::welcomed(script);
        Guest::connect(&device.socket(), Memory::new(1)).offered()
    };
    let (features, protocol) = offered("vhost");
    assert_eq!(features, 1 << 32 | 1 << 30 | 1 << 29 | 1 << 26, "{features:#x}");
    let ours = Protocol::CONFIGURE_MEM_SLOTS | Protocol::RESET_DEVICE | Protocol::DEVICE_STATE;
    let theirs = Protocol::CONFIG | Protocol::MQ | Protocol::LOG_SHMFD;
    // The crate answers for the last one.
    assert_eq!(protocol, ours | theirs | Protocol::REPLY_ACK);
    let (features, protocol) = offered("vhost later");
    assert_eq!(features, 1 << 32 | 1 << 30 | 1 << 29);
    assert_eq!(protocol, ours | Protocol::REPLY_ACK);
}

#[test]
fn the_guest_is_signalled_once_when_a_ring_is_started_and_when_the_device_is() {
    let device = Device::welcomed("vhost");
    let guest = Guest::start(&device.socket(), 1);
    until("the first signal", || guest.was_signalled(0));
    guest.settle(0);
    assert!(!guest.was_signalled(0));
    device.pause(1);
    guest.settle(0);
    assert!(!guest.was_signalled(0), "it is stopped");
    device.resume(2);
    until("a signal after the start", || guest.was_signalled(0));
}

#[test]
fn an_error_of_the_backend_is_told_and_the_process_lives() {
    let device = Device::welcomed("vhost fail");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push(0);
    assert_eq!(failure(&device), "handle_event of thread 0: as the script says");
    guest.settle(0);
    assert_eq!(guest.config(), b"01234567", "it answers");
    device.pause(1);
    device.resume(2);
    guest.push(0);
    guest.settle(0);
    assert_eq!(guest.memory.used(0), 0, "it does not run any more");
    device.go(3, Phase::Reset, S::Running);
    guest.wait_used(0, 1);
    assert_eq!(guest.stop_ring(0), 2, "the first one was taken by the backend, and lost");
    device.shut_down();
}

#[test]
fn heartbeats_tell_what_it_is_at() {
    let (device, _) = Device::start("vhost later hold");
    let welcome = Welcome { heartbeat_ns: 1_000_000, ..welcome(OrphanPolicy::Exit) };
    device.send(&CoordinatorMessage::Welcome(welcome));
    device.channel.set_version(1);
    let beat = |what: &str, is_so: &dyn Fn(&Heartbeat) -> bool| {
        let mut found = None;
        until(what, || {
            if let DeviceMessage::Heartbeat(beat) = device.next() {
                found = Some(beat).filter(is_so);
            }
            found.is_some()
        });
        found.unwrap().progress
    };
    let fifo = Fifo::of(&device);
    let mut guest = Guest::start(&device.socket(), 1);
    guest.settle(0);
    let before = beat("nothing is to be done", &|beat| !beat.pending);
    guest.push(0);
    let request = fifo.request();
    beat("a request is in flight", &|beat| beat.pending);
    drop(request);
    let after = beat("it is done", &|beat| !beat.pending);
    assert!(after > before);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    guest.push(0);
    device.go(1, Phase::Stop, S::Stop);
    beat("a device that is stopped has nothing to do", &|beat| !beat.pending);
}

#[test]
fn what_it_writes_is_logged() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::start(&device.socket(), 1);
    let log = guest.log_dirty();
    guest.push(0);
    guest.wait_used(0, 1);
    // Its used ring and the buffer; descriptors and available ring are only read.
    assert_eq!(log.pages().unwrap(), [2, 3]);
}

#[test]
fn nobody_can_connect_before_it_is_welcomed() {
    let (device, _) = Device::start("vhost");
    assert!(!device.socket().exists());
    device.send(&CoordinatorMessage::Welcome(welcome(OrphanPolicy::Exit)));
    device.channel.set_version(1);
    Guest::start(&device.socket(), 1);
}

#[test]
fn frontends_come_and_go_one_at_a_time() {
    for script in ["vhost in-order", "vhost later in-order"] {
        let device = Device::welcomed(script);
        let mut memory = Memory::new(1);
        for round in 0..20_u16 {
            let mut guest = Guest::connect(&device.socket(), memory);
            assert!(!device.socket().exists(), "nobody would answer another one");
            guest.start_ring(0, 5 * round);
            for _ in 0..5 {
                guest.push(0);
            }
            guest.wait_used(0, 5 * round + 5);
            memory = guest.disconnect();
        }
        assert_eq!(memory.number(0, 99), 99);
        device.shut_down();
    }
}

#[test]
fn what_a_frontend_has_left_is_done_before_the_next_one_is_accepted() {
    for script in ["vhost hold", "vhost later hold"] {
        let device = Device::welcomed(script);
        let fifo = Fifo::of(&device);
        let mut guest = Guest::start(&device.socket(), 1);
        guest.push(0);
        let request = fifo.request();
        let memory = guest.disconnect();
        assert!(!device.socket().exists());
        drop(request);
        let mut guest = Guest::connect(&device.socket(), memory);
        assert_eq!(guest.memory.used(0), 1);
        guest.start_ring(0, 1);
        guest.push(0);
        drop(fifo.request());
        guest.wait_used(0, 2);
        assert_eq!(guest.memory.number(0, 1), 1);
    }
}

/// A frontend that restarts at what was popped last, as Cloud Hypervisor does, and one that restarts at
/// what was used last, as QEMU does.
#[test]
fn what_a_dead_device_had_popped_is_done_by_the_next_one() {
    for base in [3, 1] {
        let mut device = Device::welcomed("vhost later hold in-order");
        let fifo = Fifo::of(&device);
        let mut guest = Guest::start(&device.socket(), 1);
        (0..3).for_each(|_| guest.push(0));
        drop(fifo.request());
        guest.wait_used(0, 1);
        let _waits = fifo.request();
        device.process.kill().unwrap();
        wait(&mut device.process);
        let memory = guest.disconnect();
        let next = Device::welcomed("vhost later in-order");
        let mut guest = Guest::connect(&next.socket(), memory);
        guest.start_ring(0, base);
        guest.wait_used(0, 3);
        let numbers = [0, 1, 2].map(|request| guest.memory.number(0, request));
        assert_eq!(numbers, [0, 0, 1], "the first one was done by the first device");
    }
}

#[test]
fn a_ring_that_cannot_be_is_refused_and_told() {
    let device = Device::welcomed("vhost");
    let mut guest = Guest::connect(&device.socket(), Memory::new(1));
    guest.start_ring(0, 17);
    let why = failure(&device);
    assert!(why.starts_with("queue 0: the frontend starts its ring at index 17"), "{why}");
    guest.push(0);
    guest.settle(0);
    assert_eq!(guest.memory.used(0), 0);
    assert_eq!(guest.stop_ring(0), 17);
    guest.start_ring(0, 0);
    guest.wait_used(0, 1);
}

#[test]
fn a_reset_in_band_drains_and_the_driver_begins_anew() {
    let device = Device::welcomed("vhost later hold");
    let fifo = Fifo::of(&device);
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push(0);
    let request = fifo.request();
    let resetting = std::thread::spawn(move || {
        guest.frontend.reset().unwrap();
        guest
    });
    assert_eq!(device.query(0).epoch.0, 0, "the control side does not wait");
    assert!(!resetting.is_finished());
    drop(request);
    let mut guest = resetting.join().unwrap();
    assert_eq!(guest.memory.used(0), 1);
    guest.start_again();
    guest.push(0);
    drop(fifo.request());
    guest.wait_used(0, 2);
}

#[test]
fn a_device_that_cannot_drain_ends() {
    for script in ["vhost hold deadline:100", "vhost later hold deadline:100"] {
        let mut device = Device::welcomed(script);
        let fifo = Fifo::of(&device);
        let mut guest = Guest::start(&device.socket(), 1);
        guest.push(0);
        let _request = fifo.request();
        guest.frontend.stop_ring(0).unwrap_err();
        assert_eq!(wait(&mut device.process).signal(), Some(6), "{script}");
        assert_eq!(guest.memory.used(0), 0);
    }
}
