//! In which order, how often, and when.

use super::rig::{DELAY, Driver, Kind, LONG, Machine, Piece, SIZE, pattern, readable, writable};
use super::{OK, UNSUPPORTED};
use proptest::prelude::*;
use std::thread;
use std::time::Duration;
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};

/// The three pieces of the request with this number, whose data has 512 bytes.
fn pieces(driver: &Driver, number: u64, kind: u32, sector: u64) -> [Piece; 3] {
    let at = driver.free(0x1000 + number * 0x400);
    let header = driver.header(at, kind, sector);
    driver.put(at + 16, &[0xff]);
    let data = if kind == VIRTIO_BLK_T_OUT { readable } else { writable };
    [header, data(at + 0x200, 512), writable(at + 16, 1)]
}

fn status(driver: &Driver, number: u64) -> u8 {
    driver.get(driver.free(0x1000 + number * 0x400 + 16), 1)[0]
}

fn add(driver: &mut Driver, number: u64, kind: u32, sector: u64) -> u16 {
    let pieces = pieces(driver, number, kind, sector);
    driver.add(&pieces)
}

/// A chain that has no room for an answer, so it is over as soon as it is seen.
fn add_unanswerable(driver: &mut Driver) -> u16 {
    let at = driver.free(0x800);
    driver.add(&[readable(at, 16)])
}

#[test]
fn answers_come_in_the_order_of_the_ring_whatever_is_slow() {
    let machine = Machine::new(Kind::Cached, |config| config.delay = DELAY);
    let mut driver = machine.driver(0);
    let slow = add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
    let quick = add_unanswerable(&mut driver);
    driver.kick().unwrap();
    assert_eq!(driver.take_used(), [], "the quick one is over, and waits for the slow one");
    assert_eq!((machine.pops.in_flight(), driver.take_signals()), (2, 0));
    driver.complete_some();
    assert_eq!(driver.take_used(), [(slow, 513), (quick, 0)]);
    assert_eq!((status(&driver, 0), machine.pops.in_flight()), (OK, 0));
    assert_eq!(driver.take_signals(), 1, "one for both");
}

#[test]
fn a_delay_is_kept_and_delays_do_not_add_up() {
    for kind in [Kind::Cached, Kind::Direct] {
        let machine = Machine::new(kind, |config| config.delay = DELAY);
        let mut driver = machine.driver(0);
        let begin = std::time::Instant::now();
        let heads: Vec<_> =
            (0..16).map(|number| add(&mut driver, number, VIRTIO_BLK_T_IN, number)).collect();
        let used = driver.run(16);
        assert_eq!(used.iter().map(|(head, _)| *head).collect::<Vec<_>>(), heads);
        let took = begin.elapsed();
        assert!(took >= DELAY && took < 16 * DELAY, "{took:?}");
    }
    let machine = Machine::new(Kind::CachedWithoutRing, |config| config.delay = DELAY);
    let mut driver = machine.driver(0);
    let begin = std::time::Instant::now();
    for number in 0..2 {
        add(&mut driver, number, VIRTIO_BLK_T_FLUSH, 0);
    }
    driver.run(2);
    assert!(begin.elapsed() >= 2 * DELAY, "one after the other");
}

#[test]
fn a_closed_gate_leaves_everything_in_the_ring() {
    for kind in Kind::ALL {
        let machine = Machine::new(kind, |_| {});
        let mut driver = machine.driver(0);
        machine.pops.close();
        let heads: Vec<_> =
            (0..8).map(|number| add(&mut driver, number, VIRTIO_BLK_T_IN, number)).collect();
        for _ in 0..3 {
            driver.kick().unwrap();
        }
        assert_eq!((driver.take_used(), driver.take_signals()), (vec![], 0));
        assert_eq!((driver.vring.queue_next_avail(), machine.pops.in_flight()), (0, 0));
        machine.pops.open();
        let used: Vec<_> = driver.run(8).iter().map(|(head, _)| *head).collect();
        assert_eq!(used, heads, "{kind:?}: each once");
        assert!((0..8).all(|number| status(&driver, number) == OK));
        driver.kick().unwrap();
        assert_eq!(driver.take_used(), []);
    }
}

#[test]
fn what_was_taken_before_the_gate_closed_is_finished() {
    let machine = Machine::new(Kind::Direct, |config| config.delay = DELAY);
    let mut driver = machine.driver(0);
    let before = add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
    driver.kick().unwrap();
    machine.pops.close();
    let after = add(&mut driver, 1, VIRTIO_BLK_T_IN, 1);
    driver.kick().unwrap();
    assert_eq!(machine.pops.in_flight(), 1);
    let drained = {
        let pops = machine.pops.clone();
        let limit = Duration::from_secs(LONG.tv_sec.unsigned_abs());
        thread::spawn(move || pops.drained_within(limit))
    };
    let mut used = Vec::new();
    while used.is_empty() {
        driver.complete_some();
        used = driver.take_used();
    }
    assert_eq!(used, [(before, 513)]);
    assert!(drained.join().unwrap());
    assert_eq!(driver.take_signals(), 1, "told before it counted as done");
    machine.pops.open();
    assert_eq!(driver.run(1), [(after, 513)]);
}

#[test]
fn a_ring_that_is_not_enabled_is_left_alone() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let mut driver = machine.driver(0);
    add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
    driver.vring.set_enabled(false);
    driver.kick().unwrap();
    assert_eq!(driver.take_used(), []);
    driver.vring.set_enabled(true);
    driver.run(1);
}

#[test]
fn signals_are_given_when_the_driver_wants_them() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let mut driver = machine.driver(0);
    driver.vring.set_queue_event_idx(true);
    // After the fourth of these.
    driver.set_used_event(3);
    let mut number = 0;
    let mut run = |driver: &mut Driver, count: u64| {
        for _ in 0..count {
            add(driver, number, VIRTIO_BLK_T_IN, 0);
            number += 1;
        }
        driver.run(usize::try_from(count).unwrap());
        driver.take_signals()
    };
    assert_eq!(run(&mut driver, 3), 0);
    assert_eq!(run(&mut driver, 1), 1);
    assert_eq!(run(&mut driver, 2), 0);
    driver.set_used_event(6);
    assert_eq!(run(&mut driver, 2), 1, "one for both");
    assert_eq!(driver.avail_event(), 8, "it wants to be kicked for the next one");
}

#[test]
fn a_driver_that_is_always_quicker_is_served_by_one_kick() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let mut driver = machine.driver(0);
    // More than one batch.
    let heads: Vec<_> =
        (0..20).map(|number| add(&mut driver, number, VIRTIO_BLK_T_IN, number)).collect();
    driver.kick().unwrap();
    let used: Vec<_> = driver.take_used().iter().map(|(head, _)| *head).collect();
    // What was not in the page cache comes later, and in order.
    assert_eq!(used, heads[..used.len()]);
    let rest = heads.len() - used.len();
    driver.run(rest);
}

/// `SET_VRING_ADDR` of a ring that runs: the crate reads the used index, and sets it when more is used.
#[test]
fn what_was_used_stays_used_when_an_older_index_is_set() {
    let machine = Machine::new(Kind::Cached, |_| {});
    let mut driver = machine.driver(0);
    for sector in 0..3 {
        add(&mut driver, sector, VIRTIO_BLK_T_IN, sector);
    }
    driver.run(3);
    driver.vring.set_queue_next_used(1);
    let head = add(&mut driver, 3, VIRTIO_BLK_T_IN, 3);
    let used: Vec<_> = driver.run(1).iter().map(|(head, _)| *head).collect();
    assert_eq!(used, [head]);
}

/// What the error says, and what was done to the ring.
type Breaks = (&'static str, fn(&mut Driver));

#[test]
fn rings_that_make_no_sense_are_not_served() {
    let breaks: [Breaks; 3] = [
        ("cannot be used", |driver| driver.set_available(SIZE + 2)),
        ("request 64 is available", |driver| driver.make_available(SIZE)),
        ("no memory", |driver| {
            // The index of the available ring is the last thing in memory.
            driver.vring.set_queue_info(0, (2 << 20) - 4, 0x3000).unwrap();
            driver.put((2 << 20) - 2, &[2, 0]);
        }),
    ];
    for (text, damage) in breaks {
        let machine = Machine::new(Kind::Cached, |_| {});
        let mut driver = machine.driver(0);
        add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
        driver.run(1);
        damage(&mut driver);
        let error = driver.kick().unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        // That was said, and it is over.
        driver.kick().unwrap();
        assert_eq!((driver.take_used(), machine.pops.in_flight()), (vec![], 0));
        // A ring that begins anew is another one.
        machine.device.stop_vring(0).unwrap();
        let mut driver = machine.driver(0);
        driver.put(0x2000, &[0; 4]);
        driver.put(0x3000, &[0; 4]);
        add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
        driver.run(1);
    }
}

#[test]
fn what_is_in_flight_is_finished_in_a_ring_that_broke() {
    let machine = Machine::new(Kind::Cached, |config| config.delay = DELAY);
    let mut driver = machine.driver(0);
    let head = add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
    driver.kick().unwrap();
    driver.make_available(SIZE);
    driver.kick().unwrap_err();
    driver.complete_some();
    assert_eq!((driver.take_used(), machine.pops.in_flight()), (vec![(head, 513)], 0));
}

#[test]
fn no_more_is_in_flight_than_fits_into_the_ring() {
    let machine = Machine::new(Kind::Cached, |config| config.delay = DELAY);
    let mut driver = machine.driver(0);
    let head = add(&mut driver, 0, VIRTIO_BLK_T_IN, 0);
    // The same one again and again, which no driver does.
    let mut made = 1;
    while made < 3 * SIZE {
        driver.make_available(head);
        made += 1;
        driver.kick().unwrap();
        assert!(machine.pops.in_flight() <= SIZE.into());
        if machine.pops.in_flight() == u64::from(SIZE) {
            break;
        }
    }
    driver.make_available(head);
    driver.kick().unwrap();
    assert!(machine.pops.in_flight() <= SIZE.into());
    let mut used = driver.take_used().len();
    while used < usize::from(made) + 1 {
        driver.complete_some();
        used += driver.take_used().len();
    }
    assert_eq!(machine.pops.in_flight(), 0);
}

/// What the property test does next.
#[derive(Clone, Copy, Debug)]
enum Move {
    /// Makes a request available: its kind, and where on the disk.
    Add(u32, u64),
    Kick,
    CloseGate,
    OpenGate,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let kind = prop_oneof![
        3 => Just(VIRTIO_BLK_T_IN), 3 => Just(VIRTIO_BLK_T_OUT), 1 => Just(VIRTIO_BLK_T_FLUSH), 1 => Just(99)
    ];
    let one = prop_oneof![
        6 => (kind, 0_u64..64).prop_map(|(kind, sector)| Move::Add(kind, sector)),
        3 => Just(Move::Kick),
        1 => Just(Move::CloseGate),
        1 => Just(Move::OpenGate),
    ];
    prop::collection::vec(one, 0..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Whatever comes when: each request is answered once, and in order.
    #[test]
    fn every_request_is_answered_once(
        kind in prop::sample::select(&Kind::ALL[..]),
        moves in moves(),
    ) {
        let machine = Machine::new(kind, |_| {});
        let mut driver = machine.driver(0);
        let (mut added, mut used) = (Vec::new(), Vec::new());
        for step in moves {
            match step {
                Move::Add(request, sector) => {
                    if added.len() - used.len() >= 20 {
                        continue;
                    }
                    let number = added.len() as u64 % 20;
                    let pieces = pieces(&driver, number, request, sector);
                    if request == VIRTIO_BLK_T_OUT {
                        driver.put(pieces[1].at, &pattern(sector, 512));
                    }
                    added.push((driver.add(&pieces), request));
                }
                Move::Kick => driver.kick().unwrap(),
                Move::CloseGate => machine.pops.close(),
                Move::OpenGate => {
                    machine.pops.open();
                    driver.kick().unwrap();
                }
            }
            used.extend(driver.take_used());
        }
        machine.pops.open();
        let left = added.len() - used.len();
        used.extend(driver.run(left));
        prop_assert_eq!(machine.pops.in_flight(), 0);
        let heads: Vec<_> = used.iter().map(|(head, _)| *head).collect();
        prop_assert_eq!(heads, added.iter().map(|(head, _)| *head).collect::<Vec<_>>());
        for number in 0..added.len().min(20) as u64 {
            let last = (0..added.len()).rev().find(|index| *index as u64 % 20 == number).unwrap();
            let expected = if added[last].1 == 99 { UNSUPPORTED } else { OK };
            prop_assert_eq!(status(&driver, number), expected);
        }
    }
}
