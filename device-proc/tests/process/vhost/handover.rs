//! A disk that one device process hands over to another: its image is locked only while a ring is
//! started.

use super::disk::{Image, read, was_read, write};
use super::guest::{Guest, Memory};
use crate::child::{Device, until, wait, welcome};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, OrphanPolicy, Phase, Welcome,
};
use standstill_protocol::migration::MigrationState as S;
use std::fs::{File, TryLockError};
use std::io::Read;
use std::os::fd::AsFd;
use vhost::vhost_user::VhostUserFrontend;

impl Image {
    /// For a device that has the image locked only while a ring is started; its own name.
    fn shared(&self, name: &str, more: &str) -> String {
        let proof = self.path.with_extension(name);
        self.script(&format!("proof:{} {more}", proof.display()))
    }

    fn is_locked(&self) -> bool {
        is_locked(File::options().write(true).open(&self.path).unwrap())
    }

    /// Whether the file is locked that stands for a device.
    fn is_alive(&self, name: &str) -> bool {
        is_locked(File::open(self.path.with_extension(name)).unwrap())
    }
}

#[expect(clippy::needless_pass_by_value, reason = "closing it unlocks it")]
fn is_locked(file: File) -> bool {
    match file.try_lock() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(error)) => panic!("{error}"),
    }
}

/// Writes five sectors, from the first on.
fn push_writes(guest: &mut Guest, content: u8) {
    for sector in 0..5 {
        guest.push_block(0, &write(sector, content));
    }
}

#[test]
fn a_disk_goes_from_one_process_to_another_and_back_with_requests_in_its_ring() {
    for more in ["", "direct", "delay:20", "without-io-uring"] {
        let image = Image::new();
        let (first, second) = (image.shared("first", more), image.shared("second", more));
        let first = Device::welcomed(&first);
        let mut guest = Guest::connect(&first.socket(), Memory::new(1));
        assert!(!image.is_locked() && image.is_alive("first"));
        guest.start_ring(0, 0);
        let mut done = 0;
        // The second one is there all the time, as in a migration.
        let second = Device::welcomed(&second);
        for (round, (from, to)) in
            (1..).zip([(&first, &second), (&second, &first), (&first, &second)])
        {
            push_writes(&mut guest, round);
            guest.wait_used(0, done + 5);
            done += 5;
            assert!(image.is_locked());
            // What comes now stays in the ring, and is done by the other one.
            from.pause(10 * u64::from(round));
            push_writes(&mut guest, 100 + round);
            guest.settle(0);
            assert_eq!(guest.stop_ring(0), done);
            assert!(!image.is_locked(), "{more}: the last ring is stopped");
            let memory = guest.disconnect().copy();
            from.resume(10 * u64::from(round) + 1);

            guest = Guest::connect(&to.socket(), memory);
            guest.start_ring(0, done);
            guest.wait_used(0, done + 5);
            assert_eq!(image.block(4), [100 + round; 512], "{more}");
            done += 5;
            guest.push_block(0, &read(0));
            guest.wait_used(0, done + 1);
            assert_eq!(guest.memory.block(0, done.into()), was_read(100 + round), "{more}");
            done += 1;
        }
        assert!(image.is_alive("first") && image.is_alive("second"));
        drop(guest);
        until("the lock goes with the frontend", || !image.is_locked());
        first.shut_down();
        second.shut_down();
    }
}

/// What it does meanwhile with all that comes.
#[test]
fn who_waits_for_the_image_answers_at_once_and_goes_on_by_itself() {
    let image = Image::new();
    let first = Device::welcomed(&image.shared("first", ""));
    let mut holder = Guest::start(&first.socket(), 1);
    push_writes(&mut holder, 1);
    holder.wait_used(0, 5);

    let (second, _) = Device::start(&image.shared("second", ""));
    let welcome = Welcome { heartbeat_ns: 1_000_000, ..welcome(OrphanPolicy::Exit) };
    second.send(&CoordinatorMessage::Welcome(welcome));
    second.channel.set_version(1);
    let mut guest = Guest::start(&second.socket(), 1);
    push_writes(&mut guest, 2);
    guest.settle(0);
    assert_eq!((guest.memory.used(0), image.block(0)), (0, [1; 512]));
    // Those that were on the way may have been sent before it had anything to do.
    for _ in 0..20 {
        let beat = loop {
            if let DeviceMessage::Heartbeat(beat) = second.next() {
                break beat;
            }
        };
        assert!(!beat.pending, "it does not hang");
    }
    // The machine stops and starts, in band and out of band.
    second.pause(1);
    assert_eq!(guest.stop_ring(0), 0);
    guest.start_ring(0, 0);
    second.resume(2);
    second.go(3, Phase::Reset, S::Running);
    assert_eq!(guest.stop_ring(0), 0);
    guest.start_ring(0, 0);
    guest.ask(VhostUserFrontend::reset_device).unwrap();
    guest.start_again();
    guest.settle(0);
    assert_eq!((guest.memory.used(0), image.block(0)), (0, [1; 512]));

    assert_eq!(holder.stop_ring(0), 5);
    // Nobody kicks it.
    guest.wait_used(0, 5);
    assert_eq!(image.block(4), [2; 512]);
    guest.ask(VhostUserFrontend::reset_device).unwrap();
    assert!(!image.is_locked(), "a reset stops all rings");
    first.shut_down();
    second.shut_down();
}

#[test]
fn a_wait_for_the_image_can_be_given_up() {
    let image = Image::new();
    let first = Device::welcomed(&image.shared("first", ""));
    let mut holder = Guest::start(&first.socket(), 1);
    holder.settle(0);
    let second = Device::welcomed(&image.shared("second", ""));
    // The frontend stops its ring, or goes.
    let mut guest = Guest::start(&second.socket(), 1);
    guest.push_block(0, &write(0, 2));
    guest.settle(0);
    assert_eq!(guest.stop_ring(0), 0);
    drop(guest);
    let mut guest = Guest::start(&second.socket(), 1);
    guest.push_block(0, &write(0, 2));
    guest.settle(0);
    drop(guest);
    // The process ends.
    let third = Device::welcomed(&image.shared("third", ""));
    let mut guest = Guest::start(&third.socket(), 1);
    guest.push_block(0, &write(0, 3));
    guest.settle(0);
    third.shut_down();
    assert_eq!(holder.stop_ring(0), 0);
    // As long as anybody who still wanted it would take.
    let again = Guest::start(&second.socket(), 1);
    again.settle(0);
    drop(again);
    until("the lock goes with the frontend", || !image.is_locked());
    assert_eq!(image.block(0), [0; 512]);
    second.shut_down();
}

#[test]
fn who_follows_a_killed_device_waits_for_the_image_and_does_what_was_in_flight() {
    for more in ["", "direct"] {
        let image = Image::new();
        let mut first = Device::welcomed(&image.shared("first", &format!("delay:60000 {more}")));
        let mut guest = Guest::start(&first.socket(), 1);
        push_writes(&mut guest, 7);
        guest.settle(0);
        let second = Device::welcomed(&image.shared("second", more));
        let mut next = Guest::connect(&second.socket(), guest.memory.copy());
        next.start_ring(0, 0);
        next.settle(0);
        assert_eq!((next.memory.used(0), image.block(0)), (0, [0; 512]));
        first.process.kill().unwrap();
        wait(&mut first.process);
        next.wait_used(0, 5);
        assert_eq!(image.block(4), [7; 512], "{more}");
        until("nothing of the first one is left", || !image.is_alive("first"));
        // And itself, while somebody else has the image.
        let first = Device::welcomed(&image.shared("first", more));
        let guest = Guest::connect(&first.socket(), guest.disconnect());
        drop(guest);
        first.shut_down();
        second.shut_down();
    }
}

#[test]
fn a_wait_for_the_image_is_told_once_with_who_has_it() {
    let image = Image::new();
    let first = Device::welcomed(&image.shared("first", ""));
    let mut holder = Guest::start(&first.socket(), 1);
    holder.settle(0);
    let (mut log, end) = std::io::pipe().unwrap();
    let second = Device::kept(&image.shared("second", ""), Some(end.as_fd()));
    drop(end);
    let mut guest = Guest::start(&second.socket(), 1);
    guest.push_block(0, &write(0, 2));
    guest.settle(0);
    guest.settle(0);
    holder.stop_ring(0);
    guest.wait_used(0, 1);
    second.shut_down();
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    let told: Vec<_> =
        text.lines().filter(|line| line.contains("requests wait until it is free")).collect();
    assert_eq!(told.len(), 1, "{text}");
    assert!(told[0].contains(&format!("{} is locked by ", image.path.display())), "{}", told[0]);
    assert!(text.contains("it is free: requests go on"), "{text}");
}
