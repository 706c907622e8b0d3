use super::*;
use rig::{DISK, Driver, Kind, Machine, Piece, SIZE, pattern, readable, writable};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::thread;
use vhost_user_backend::VringT;
use virtio_bindings::virtio_blk::*;
use virtio_queue::QueueT;

mod daemon;
mod rig;
mod rings;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn on_disk(machine: &Machine, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    // What was written directly is not in a page cache of before: it is read after each write.
    machine.image.read_exact_at(&mut bytes, at).unwrap();
    bytes
}

/// Pieces of these lengths, one behind the other with gaps of so many bytes.
fn scattered(begin: u64, lengths: &[u32], gap: u64, piece: fn(u64, u32) -> Piece) -> Vec<Piece> {
    let mut at = begin;
    lengths
        .iter()
        .map(|len| {
            let this = piece(at, *len);
            at += u64::from(*len) + gap;
            this
        })
        .collect()
}

fn put_pieces(driver: &Driver, pieces: &[Piece], bytes: &[u8]) {
    let mut rest = bytes;
    for piece in pieces {
        let (now, later) = rest.split_at(piece.len as usize);
        driver.put(piece.at, now);
        rest = later;
    }
}

fn get_pieces(driver: &Driver, pieces: &[Piece]) -> Vec<u8> {
    pieces.iter().flat_map(|piece| driver.get(piece.at, piece.len as usize)).collect()
}

#[test]
fn what_is_written_is_read_however_it_is_cut() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        let mut driver = machine.driver(0);
        // Aligned for direct I/O, and not; in one piece, and in many; across two regions of memory.
        let free = driver.free(0x1000);
        let cuts: [(&[u32], u64, u64); 6] = [
            (&[4096], free, 0),
            (&[512, 1024, 2560], free, 0x1000),
            (&[4096], free + 1, 0),
            (&[1, 511, 3584], free + 0x200, 3),
            (&[128; 32], free, 17),
            (&[12288], (1 << 20) - 4096, 0),
        ];
        for (seed, (lengths, begin, gap)) in (1..).zip(cuts) {
            let len = lengths.iter().sum::<u32>() as usize;
            let data = pattern(seed, len);
            let sector = 32 * seed;
            let pieces = scattered(begin, lengths, gap, readable);
            put_pieces(&driver, &pieces, &data);
            assert_eq!(driver.request(VIRTIO_BLK_T_OUT, sector, &pieces), OK);
            assert_eq!(on_disk(&machine, sector * 512, len), data, "{kind:?} {lengths:?}");

            put_pieces(&driver, &pieces, &vec![0xee; len]);
            let pieces = scattered(begin, lengths, gap, writable);
            assert_eq!(driver.request(VIRTIO_BLK_T_IN, sector, &pieces), OK);
            assert!(get_pieces(&driver, &pieces) == data, "{kind:?} {lengths:?}");
        }
        assert_eq!(machine.pops.in_flight(), 0);
    }
}

#[test]
fn what_is_longer_than_a_bounce_buffer_is_moved_in_pieces() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        let mut driver = machine.driver(0);
        // Not aligned, in two regions of memory; more than two buffers, and no multiple of one.
        let (at, lengths) = ((1 << 20) - 0x4_0001, [300 << 10, 1, 511, 399 << 10]);
        let len = lengths.iter().sum::<u32>() as usize;
        let data = pattern(9, len);
        let pieces = scattered(at, &lengths, 3, readable);
        put_pieces(&driver, &pieces, &data);
        assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 2048, &pieces), OK);
        assert!(on_disk(&machine, 2048 * 512, len) == data, "{kind:?}");
        put_pieces(&driver, &pieces, &vec![0xee; len]);
        let pieces = scattered(at, &lengths, 3, writable);
        assert_eq!(driver.request(VIRTIO_BLK_T_IN, 2048, &pieces), OK);
        assert!(get_pieces(&driver, &pieces) == data, "{kind:?}");
        assert_eq!(driver.get(at - 1, 1), [0], "{kind:?}");
    }
}

#[test]
fn indirect_descriptors_and_the_end_of_the_disk() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        let mut driver = machine.driver(0);
        let last = DISK / 512 - 2;
        machine.image.write_all_at(&pattern(7, 1024), last * 512).unwrap();
        machine.image.sync_all().unwrap();
        let (data, status) = (driver.free(0x2000), driver.free(16));
        let header = driver.header(driver.free(0), VIRTIO_BLK_T_IN, last);
        let head = driver.add_indirect(&[header, writable(data, 1024), writable(status, 1)]);
        assert_eq!(driver.run(1), [(head, 1025)]);
        assert_eq!((driver.get(status, 1), driver.get(data, 1024)), (vec![OK], pattern(7, 1024)));
        assert_eq!(driver.request(VIRTIO_BLK_T_IN, last + 1, &[writable(data, 1024)]), IO_ERROR);
    }
}

#[test]
fn flush_and_serial_number() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |config| config.serial = "standstill-0001".into());
        let mut driver = machine.driver(0);
        assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        let at = driver.free(0x1000);
        driver.put(at, &[0xee; 32]);
        assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, &[writable(at, 20)]), OK);
        assert_eq!(driver.get(at, 21), b"standstill-0001\0\0\0\0\0\xee");
        driver.put(at, &[0xee; 32]);
        assert_eq!(
            driver.request(VIRTIO_BLK_T_GET_ID, 0, &[writable(at, 5), writable(at + 8, 3)]),
            OK
        );
        assert_eq!(driver.get(at, 12), b"stand\xee\xee\xeesti\xee");
        assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, &[]), OK);
    }
}

#[test]
fn ranges_are_zeroed_and_discarded() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        let mut driver = machine.driver(0);
        let old = pattern(3, 1 << 20);
        let mut expected = old.clone();
        machine.image.write_all_at(&old, 0).unwrap();
        machine.image.sync_all().unwrap();
        let blocks = machine.image.metadata().unwrap().blocks();

        let ranges = |list: &[(u64, u32, u32)]| -> Vec<u8> {
            let bytes = list.iter().flat_map(|(sector, sectors, flags)| {
                let mut bytes = sector.to_le_bytes().to_vec();
                bytes.extend(sectors.to_le_bytes());
                bytes.extend(flags.to_le_bytes());
                bytes
            });
            bytes.collect()
        };
        let at = driver.free(0x1000);
        // With blocks kept, and with blocks given back; the range in two buffers.
        for range in [(8, 8, 0), (1024, 1024, 1), (3, 1, 0)] {
            driver.put(at, &ranges(&[range]));
            let data = [readable(at, 10), readable(at + 10, 6)];
            assert_eq!(driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &data), OK, "{kind:?}");
        }
        for sectors in [8..16, 1024..2048, 3..4] {
            expected[sectors.start * 512..sectors.end * 512].fill(0);
        }
        assert!(on_disk(&machine, 0, 1 << 20) == expected, "{kind:?}");
        assert!(
            machine.image.metadata().unwrap().blocks() < blocks,
            "{kind:?}: nothing given back"
        );

        let discarded = ranges(&[(64, 64, 0), (256, 8, 0), (264, 8, 0)]);
        driver.put(at, &discarded);
        let data = [readable(at, 20), readable(at + 20, 28)];
        assert_eq!(driver.request(VIRTIO_BLK_T_DISCARD, 0, &data), OK, "{kind:?}");
        for sectors in [64..128, 256..272] {
            expected[sectors.start * 512..sectors.end * 512].fill(0);
        }
        assert!(on_disk(&machine, 0, 1 << 20) == expected, "{kind:?}");
        assert_eq!(machine.image.metadata().unwrap().len(), DISK);

        for (request, range, status) in [
            (VIRTIO_BLK_T_DISCARD, (0, 8, 1), UNSUPPORTED),
            (VIRTIO_BLK_T_WRITE_ZEROES, (0, 8, 2), UNSUPPORTED),
            (VIRTIO_BLK_T_WRITE_ZEROES, (DISK / 512, 8, 0), IO_ERROR),
        ] {
            driver.put(at, &ranges(&[range]));
            assert_eq!(driver.request(request, 0, &[readable(at, 16)]), status);
        }
        assert!(on_disk(&machine, 0, 1 << 20) == expected, "{kind:?}");
    }
}

#[test]
fn a_read_only_disk_is_read_and_not_written() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |config| config.read_only = true);
        let mut driver = machine.driver(0);
        machine.image.write_all_at(&pattern(5, 512), 0).unwrap();
        machine.image.sync_all().unwrap();
        let at = driver.free(0x1000);
        driver.put(at, &[0xee; 512]);
        for request in [VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(driver.request(request, 0, &[readable(at, 512)]), IO_ERROR);
        }
        assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
        assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, &[writable(at, 512)]), OK);
        assert_eq!(driver.get(at, 512), pattern(5, 512));
        assert_eq!(on_disk(&machine, 0, 512), pattern(5, 512));
    }
}

#[test]
fn only_what_is_read_through_the_page_cache_is_shared() {
    let cached = Machine::new(Kind::Cached, |config| config.read_only = true);
    assert!(cached.device.backing_file().unwrap().is_none());
    let (path, proof) = (cached.path("disk"), cached.path("proof"));
    let mut config = BlockConfig { read_only: true, ..BlockConfig::new(&path) };
    let pops = PopGate::new(1);
    let second = VhostUserBlk::build(&config, &pops).unwrap();
    // Who writes takes the lock for itself alone, and cannot have it.
    let writer = File::options().write(true).open(&path).unwrap();
    assert!(matches!(writer.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
    drop((second, cached.device));
    writer.try_lock().unwrap();
    assert!(matches!(
        VhostUserBlk::build(&config, &pops),
        Err(BlockError::Image(ImageError::File { what: "lock it", .. }))
    ));
    config.direct = true;
    assert!(VhostUserBlk::build(&config, &pops).unwrap().backing_file().unwrap().is_some());
    config = BlockConfig::new(&path);
    assert!(VhostUserBlk::build(&config, &pops).unwrap().backing_file().unwrap().is_some());
    writer.unlock().unwrap();
    // Where there is nothing to hand over, no file stands for the process.
    let lock = Lock::Rings { proof: proof.clone() };
    config = BlockConfig { read_only: true, lock: lock.clone(), ..config };
    assert!(VhostUserBlk::build(&config, &pops).unwrap().backing_file().unwrap().is_none());
    assert!(!proof.exists());
    config = BlockConfig { read_only: false, ..config };
    let shared = VhostUserBlk::build(&config, &pops).unwrap().backing_file().unwrap().unwrap();
    let facts = File::from(shared).metadata().unwrap();
    assert_eq!(facts.ino(), proof.metadata().unwrap().ino());
}

#[test]
fn the_file_that_proves_an_end_is_locked_as_long_as_the_kernel_may_work() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let proof = File::create_new(machine.path("proof")).unwrap();
    proof.lock().unwrap();
    let image = Arc::new(machine.image.try_clone().unwrap());
    let ring = Ring::new(image, Duration::ZERO, Some(&proof)).unwrap();
    drop(proof);
    let other = File::open(machine.path("proof")).unwrap();
    assert!(matches!(other.try_lock(), Err(std::fs::TryLockError::WouldBlock)));
    drop(ring);
    other.lock().unwrap();
}

#[test]
fn a_disk_that_cannot_be_is_not_made() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let pops = PopGate::new(1);
    let build = |config: &BlockConfig| VhostUserBlk::build(config, &pops).unwrap_err();
    let good = BlockConfig::new(machine.path("disk"));
    for queues in [0, MAX_QUEUES + 1] {
        let error = build(&BlockConfig { queues, ..good.clone() });
        assert!(matches!(error, BlockError::Queues(found) if found == queues));
    }
    for serial in ["123456789012345678901", "a\0b"] {
        let error = build(&BlockConfig { serial: serial.into(), ..good.clone() });
        assert!(matches!(error, BlockError::Serial(_)), "{error}");
    }
    for (name, size) in [("empty", 0), ("odd", 513)] {
        std::fs::write(machine.path(name), vec![0; size]).unwrap();
        let error = build(&BlockConfig::new(machine.path(name)));
        assert!(matches!(error, BlockError::Image(ImageError::Size { .. })), "{error}");
    }
    let error = build(&BlockConfig::new(machine.path("none")));
    assert!(matches!(error, BlockError::Image(ImageError::File { .. })), "{error}");
}

#[test]
fn a_driver_that_does_not_flush_has_its_writes_written_through() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let device = &machine.device;
    let features = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1_u64 << bit);
    let with = |bits: &[u32]| {
        device.acked_features(features(bits));
        device.is_write_through()
    };
    assert!(with(&[]));
    assert!(!with(&[VIRTIO_BLK_F_FLUSH]));
    // It cannot choose; and whatever is written changes nothing, and costs nobody the connection.
    assert_eq!(device.features() & features(&[VIRTIO_BLK_F_CONFIG_WCE]), 0);
    let before = device.get_config(0, 60);
    for (offset, bytes) in [(0, &[0; 8][..]), (32, &[0]), (32, &[7]), (u32::MAX, &[1, 2])] {
        device.set_config(offset, bytes).unwrap();
    }
    assert_eq!(device.get_config(0, 60), before);
    assert!(!device.is_write_through());
    device.reset_device();
    assert!(device.is_write_through(), "until the next driver has said what it can");

    // Written through, by each way.
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        machine.device.acked_features(0);
        let mut driver = machine.driver(0);
        let at = driver.free(0x1000);
        driver.put(at, &pattern(9, 4096));
        assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 8, &[readable(at, 4096)]), OK);
        assert_eq!(on_disk(&machine, 4096, 4096), pattern(9, 4096));
        driver.put(at, &[8, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(driver.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &[readable(at, 16)]), OK);
        assert_eq!(on_disk(&machine, 4096, 4096), [0; 4096]);
    }
}

#[test]
fn a_state_is_for_one_disk_and_for_no_other_one() {
    let machine = Machine::new(Kind::Cached, |config| config.serial = "one".into());
    let mut saved = Vec::new();
    machine.device.save(&mut saved).unwrap();

    let other = Machine::new(Kind::Cached, |config| config.serial = "other".into());
    let error = other.device.load(&mut &saved[..]).unwrap_err();
    assert!(error.to_string().contains("serial number \"one\", this one has \"other\""), "{error}");
    let same = Machine::new(Kind::DirectWithoutRing, |config| config.serial = "one".into());
    same.device.load(&mut &saved[..]).unwrap();
}

#[test]
fn what_a_frontend_asks_first() {
    let machine = Machine::new(Kind::Cached, |config| config.queues = 3);
    let device = &machine.device;
    assert_eq!(device.num_queues(), 3);
    assert_eq!(device.queues_per_thread(), [1, 2, 4]);
    assert_eq!(device.get_config(0, 57).len(), 57);
    assert_eq!(device.get_config(34, 2), [3, 0]);
    let features = device.features();
    for bit in [26, 28, 29, 30, 32, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_DISCARD] {
        assert!(features & 1 << bit != 0, "bit {bit}");
    }
    // Packed rings, and what changes addresses.
    for bit in [33, 34] {
        assert!(features & 1 << bit == 0, "bit {bit}");
    }
    let (a, b) = (device.exit_event(0).unwrap(), device.exit_event(0).unwrap());
    a.1.notify().unwrap();
    assert!(a.0.consume().is_ok() && b.0.consume().is_err(), "each has its own");
}

#[test]
fn queues_work_beside_each_other() {
    const QUEUES: u16 = 4;
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |config| config.queues = QUEUES);
        thread::scope(|scope| {
            for queue in 0..QUEUES {
                let mut driver = machine.driver(queue);
                scope.spawn(move || {
                    let begin = u64::from(queue) * (DISK / 512 / u64::from(QUEUES));
                    for round in 0..20 {
                        let seed = u64::from(queue) << 32 | round;
                        let at = driver.free(0x1000 + (round % 3) * 0x1100);
                        let sector = begin + round * 8;
                        driver.put(at, &pattern(seed, 4096));
                        assert_eq!(
                            driver.request(VIRTIO_BLK_T_OUT, sector, &[readable(at, 4096)]),
                            OK
                        );
                        driver.put(at, &[0xee; 4096]);
                        assert_eq!(
                            driver.request(VIRTIO_BLK_T_IN, sector, &[writable(at, 4096)]),
                            OK
                        );
                        assert!(driver.get(at, 4096) == pattern(seed, 4096));
                    }
                });
            }
        });
        assert_eq!(machine.pops.in_flight(), 0);
    }
}

/// An event for a queue that there is not, or before there is memory.
#[test]
fn events_without_a_meaning_do_nothing() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let driver = machine.driver(0);
    let event = |vrings: &[Vring], thread| {
        machine.device.handle_event(0, EventSet::IN, vrings, thread).unwrap();
    };
    event(&[], 0);
    event(std::slice::from_ref(&driver.vring), 9);
    driver.vring.set_queue_ready(false);
    driver.kick().unwrap();
    assert_eq!(driver.vring.get_ref().get_queue().next_avail(), 0);
    assert_eq!(SIZE, driver.vring.get_ref().get_queue().size());
}
