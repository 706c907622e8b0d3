//! The block device in a device process.
//!
//! The script is words: `file:PATH`, `queues:NUMBER`, `serial:TEXT`, `delay:MILLISECONDS`, `direct`,
//! `without-io-uring`; `proof:PATH` has the image locked only while a ring is started; with `refused` a filter
//! refuses all that `io_uring` needs.

use super::guest::Guest;
use crate::child::{Device, command, until, wait};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};
use standstill_device_proc::ServeOptions;
use standstill_device_proc::devices::vhost_user_blk::{BlockConfig, Lock, VhostUserBlk};
use standstill_device_proc::serve::ServeError;
use standstill_device_proc::vhost_user::serve_vhost_user;
use standstill_protocol::message::{CoordinatorMessage, PeerDma, Phase};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use standstill_testkit::vhost_user::{BlockRequest, BlockStatus};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

pub(crate) const SCRIPT: &str = "disk";

/// Runs as a device process, until that is to end.
pub(crate) fn run(socket: &str, script: &[&str]) -> Result<(), ServeError> {
    let word = |key: &str| script.iter().find_map(|word| word.strip_prefix(key));
    let delay = word("delay:").map_or(0, |number| number.parse().unwrap());
    let config = BlockConfig {
        queues: word("queues:").map_or(1, |number| number.parse().unwrap()),
        direct: script.contains(&"direct"),
        serial: word("serial:").unwrap_or_default().to_owned(),
        delay: Duration::from_millis(delay),
        without_io_uring: script.contains(&"without-io-uring"),
        lock: word("proof:").map_or(Lock::Process, |path| Lock::Rings { proof: path.into() }),
        ..BlockConfig::new(word("file:").unwrap())
    };
    if script.contains(&"refused") {
        refuse_io_uring();
    }
    serve_vhost_user(ServeOptions::new(socket), || VhostUserBlk::device(&config))
}

/// As container runtimes do.
fn refuse_io_uring() {
    let calls = [libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register];
    let rules = calls.map(|call| (call, Vec::new())).into();
    let refused = SeccompAction::Errno(libc::EPERM.cast_unsigned());
    let machine = std::env::consts::ARCH.try_into().unwrap();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, machine).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    seccompiler::apply_filter(&program).unwrap();
}

/// An image, where direct I/O is possible.
pub(crate) struct Image {
    pub(super) path: PathBuf,
    _folder: TempDir,
}

impl Image {
    /// One of 64 KiB.
    pub(super) fn new() -> Self {
        Self::of(64 << 10)
    }

    /// One of that many bytes.
    pub(crate) fn of(size: u64) -> Self {
        // Beside the test program: where temporary files usually are there may be no direct I/O.
        let here = std::env::current_exe().unwrap();
        let folder = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let path = folder.path().join("disk");
        File::create_new(&path).unwrap().set_len(size).unwrap();
        Self { path, _folder: folder }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub(crate) fn script(&self, more: &str) -> String {
        format!("disk file:{} {more}", self.path.display())
    }

    pub(super) fn block(&self, sector: u64) -> [u8; 512] {
        let mut block = [0; 512];
        File::open(&self.path).unwrap().read_exact_at(&mut block, sector * 512).unwrap();
        block
    }
}

/// One sector.
pub(super) fn read(sector: u64) -> BlockRequest {
    BlockRequest::Read { sector, length: 512 }
}

pub(super) fn write(sector: u64, byte: u8) -> BlockRequest {
    BlockRequest::Write { sector, data: vec![byte; 512] }
}

pub(super) fn was_read(byte: u8) -> (BlockStatus, Vec<u8>) {
    (BlockStatus::Ok, vec![byte; 512])
}

#[test]
fn it_says_of_itself_what_is_true() {
    let image = Image::new();
    let (_device, hello) = Device::start(&image.script(""));
    assert_eq!(hello.kind, "vhost-user-blk");
    assert_eq!(hello.capabilities.migration, MigrationFlags::STOP_COPY_P2P);
    assert_eq!(hello.capabilities.peer_dma, PeerDma::Possible);
    assert!(hello.capabilities.progress);
    // Its lock is the proof that a killed one writes no more.
    let other = File::options().write(true).open(&image.path).unwrap();
    assert!(matches!(other.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
}

#[test]
fn it_does_without_io_uring_where_that_is_refused() {
    for (more, has_rings) in [("", true), ("refused", false), ("refused direct", false)] {
        let image = Image::new();
        let device = Device::welcomed(&image.script(more));
        let mut guest = Guest::start(&device.socket(), 1);
        guest.push_block(0, &write(3, 7));
        // What is under way together is done in any order.
        guest.wait_used(0, 1);
        guest.push_block(0, &BlockRequest::Flush);
        // What is asked for at the same time may be done in any order.
        guest.wait_used(0, 2);
        guest.push_block(0, &read(3));
        guest.wait_used(0, 3);
        assert_eq!(guest.memory.block(0, 1).0, BlockStatus::Ok, "{more}");
        assert_eq!(guest.memory.block(0, 2), was_read(7), "{more}");
        let fds = std::fs::read_dir(format!("/proc/{}/fd", device.process.id())).unwrap();
        let mut fds = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        assert_eq!(fds.any(|fd| fd.as_os_str() == "anon_inode:[io_uring]"), has_rings, "{more}");
        device.shut_down();
    }
}

#[test]
fn what_is_in_flight_ends_before_a_stop_is_answered_and_the_rest_waits() {
    for more in ["delay:100", "delay:100 direct", "delay:10 without-io-uring"] {
        let image = Image::new();
        let device = Device::welcomed(&image.script(more));
        let mut guest = Guest::start(&device.socket(), 1);
        for round in 0..3_u8 {
            let (epoch, before) = (2 * u64::from(round) + 1, 4 * u16::from(round));
            for sector in 0..3 {
                guest.push_block(0, &write(sector, round + 1));
            }
            guest.settle(0);
            device.go(epoch, Phase::PrepareStop, S::RunningP2p);
            let used = guest.memory.used(0);
            device.go(epoch, Phase::Stop, S::Stop);
            assert_eq!(guest.memory.used(0), used, "{more}: the memory is not declared RAM");
            assert!(used == before || guest.was_signalled(0));
            // All that was taken out of the ring is done, and only that.
            for sector in 0..3 {
                let done = before + u16::try_from(sector).unwrap() < used;
                let expected = if done { round + 1 } else { round };
                assert_eq!(image.block(sector), [expected; 512], "{more}");
            }
            guest.push_block(0, &read(0));
            guest.settle(0);
            assert_eq!(guest.memory.used(0), used, "{more}");
            device.resume(epoch + 1);
            guest.wait_used(0, before + 4);
            assert_eq!(
                guest.memory.block(0, usize::from(before) + 3),
                was_read(round + 1),
                "{more}"
            );
        }
        device.shut_down();
    }
}

/// QEMU restarts a ring at the used index, Cloud Hypervisor at the index of what was not yet popped.
#[test]
fn who_follows_a_killed_device_does_what_was_in_flight() {
    for (more, base) in [("", 0), ("", 3), ("direct", 0), ("direct", 3)] {
        let image = Image::new();
        let mut device = Device::welcomed(&image.script(&format!("delay:60000 {more}")));
        let mut guest = Guest::start(&device.socket(), 1);
        for sector in 0..3 {
            guest.push_block(0, &write(sector, 7));
        }
        guest.settle(0);
        device.process.kill().unwrap();
        wait(&mut device.process);
        assert_eq!((guest.memory.used(0), image.block(0)), (0, [0; 512]));
        let memory = guest.disconnect();
        let next = Device::welcomed(&image.script(more));
        let mut guest = Guest::connect(&next.socket(), memory);
        guest.start_ring(0, base);
        guest.wait_used(0, 3);
        for sector in 0..3 {
            assert_eq!(image.block(sector), [7; 512], "{more} {base}");
        }
        guest.push_block(0, &read(2));
        guest.wait_used(0, 4);
        assert_eq!(guest.memory.block(0, 3), was_read(7));
    }
}

#[test]
fn of_a_guest_that_has_gone_no_memory_is_left() {
    let image = Image::new();
    let device = Device::welcomed(&image.script(""));
    let maps = format!("/proc/{}/maps", device.process.id());
    let has_memory = || std::fs::read_to_string(&maps).unwrap().contains("memfd:guest");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push_block(0, &write(0, 1));
    guest.wait_used(0, 1);
    assert!(has_memory());
    drop(guest);
    until("nothing of it is mapped", || !has_memory());
}

#[test]
fn a_saved_disk_is_loaded_by_the_same_one_and_by_no_other() {
    let image = Image::new();
    let device = Device::welcomed(&image.script("serial:first"));
    let mut guest = Guest::start(&device.socket(), 1);
    guest.push_block(0, &write(0, 1));
    guest.wait_used(0, 1);
    device.go(101, Phase::PrepareStop, S::RunningP2p);
    device.go(101, Phase::Stop, S::StopCopy);
    let mut file = tempfile::tempfile().unwrap();
    let save = CoordinatorMessage::Command(command(102, Phase::Save, S::StopCopy));
    device.send_with(&save, &[file.as_fd()]);
    assert_eq!(device.reached().state, S::StopCopy);
    let memory = guest.disconnect().copy();
    device.shut_down();

    let mut load = |image: &Path, serial: &str| {
        let device = Device::welcomed(&format!("disk file:{} serial:{serial}", image.display()));
        device.pause(1);
        file.seek(SeekFrom::Start(0)).unwrap();
        let load = CoordinatorMessage::Command(command(102, Phase::Load, S::Stop));
        device.send_with(&load, &[file.as_fd()]);
        device
    };
    let other = load(&image.path, "second").refused();
    let text = "with the serial number \"first\", this one has \"second\"";
    assert!(other.refusal.text.contains(text), "{other:?}");
    let small = Image::new();
    File::options().write(true).open(&small.path).unwrap().set_len(32 << 10).unwrap();
    let other = load(&small.path, "first").refused();
    assert!(other.refusal.text.contains("65536 bytes, this one has 32768"), "{other:?}");

    let device = load(&image.path, "first");
    assert_eq!(device.reached().state, S::Stop);
    let mut guest = Guest::connect(&device.socket(), memory);
    guest.start_ring(0, 1);
    guest.push_block(0, &read(0));
    device.resume(103);
    guest.wait_used(0, 2);
    assert_eq!(guest.memory.block(0, 1), was_read(1));
}
