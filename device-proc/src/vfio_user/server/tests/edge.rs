//! What was sent before a stop takes effect before it, what comes after it later, and all of it
//! once.

use super::client::{Client, REGION_WRITE, message, write_body};
use crate::vfio_user::rig::{COUNT, Deed, MEMORY, PATIENCE, REGISTERS, Rig};
use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use standstill_protocol::message::{DeviceMessage, Phase, RefusalKind};
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::OwnedFd;
use std::time::Duration;

pub(super) const NO_LEASE: Duration = Duration::ZERO;
/// Longer than any test.
pub(super) const LEASE: Duration = Duration::from_secs(60);

pub(super) fn wrote(rig: &Rig) -> Vec<u64> {
    let deeds = rig.device().deeds();
    let values = deeds.iter().filter_map(|deed| match deed {
        Deed::Wrote(_, value) => Some(*value),
        _ => None,
    });
    values.collect()
}

/// What was noted before the last stop.
fn wrote_before_the_stop(rig: &Rig) -> usize {
    let deeds = rig.device().deeds();
    let stop = deeds.iter().rposition(|deed| *deed == Deed::Stopped).unwrap();
    deeds[..stop].iter().filter(|deed| matches!(deed, Deed::Wrote(..))).count()
}

/// Whether the client gets nothing for a moment.
pub(super) fn nothing_comes(client: &Client) -> bool {
    let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
    poll(&mut [PollFd::new(&client.stream, PollFlags::IN)], Some(&moment)) == Ok(0)
}

#[test]
fn a_posted_write_that_is_not_read_yet_takes_effect_before_the_stop() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    for epoch in 1..40 {
        let count = usize::try_from(epoch).unwrap() * 7;
        for value in 0..7 {
            client.post_write(REGISTERS, 0, value);
        }
        rig.stop(2 * epoch, NO_LEASE);
        assert_eq!(wrote_before_the_stop(&rig), count, "round {epoch}");
        rig.start(2 * epoch + 1);
    }
    drop(client);
}

#[test]
fn posted_writes_while_stopped_are_kept_in_order_and_config_space_is_served() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    for value in 0..10 {
        client.post_write(REGISTERS, 0, value);
    }
    client.post_write(MEMORY, 8, 0xabcd);
    assert_eq!(client.read(7, 0), Ok(0x0002_0001));
    assert_eq!(client.write(REGISTERS, 0, 99), Err(22));
    assert_eq!(client.read(REGISTERS, COUNT), Err(22), "reads change something");
    rig.device().reads_change.store(false, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(0));
    assert_eq!(client.read(MEMORY, 8), Ok(0));
    rig.start(3);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(10), "before anything that comes later");
    assert_eq!(client.read(MEMORY, 8), Ok(0xabcd));
    assert_eq!(wrote(&rig), (0..10).collect::<Vec<_>>());
    drop(client);
}

#[test]
fn what_was_kept_takes_effect_without_any_other_message() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    client.post_write(REGISTERS, 0, 5);
    client.read(7, 0).expect("the write was read before");
    rig.start(3);
    rig.stop(4, NO_LEASE);
    assert_eq!(wrote_before_the_stop(&rig), 1, "the next stop comes after it");
    rig.start(5);
    drop(client);
}

#[test]
fn beyond_their_bound_posted_writes_stay_in_the_socket_and_nothing_is_lost() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    let posts = 20_000_u32;
    let post = |value: u32| {
        let body = write_body(REGISTERS, 0, &value.to_le_bytes());
        message(0, REGION_WRITE, super::client::POSTED, &body)
    };
    let mut sent = 0;
    while sent < posts && has_room(&client) {
        client.send(&post(sent), &[]);
        sent += 1;
    }
    assert!(sent > 1024 && sent < posts / 2, "{sent} writes were taken before the start");
    rig.start(3);
    (sent..posts).for_each(|value| client.send(&post(value), &[]));
    assert_eq!(client.read(REGISTERS, COUNT), Ok(posts));
    assert_eq!(wrote(&rig), (0..u64::from(posts)).collect::<Vec<_>>());
    drop(client);
}

/// Whether one more short message fits into the socket now, or soon.
fn has_room(client: &Client) -> bool {
    let soon = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
    poll(&mut [PollFd::new(&client.stream, PollFlags::OUT)], Some(&soon)) == Ok(1)
}

#[test]
fn what_was_kept_outlives_its_client_and_not_a_reset() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    client.post_write(REGISTERS, 0, 1);
    client.read(7, 0).unwrap();
    drop(client);
    let mut client = Client::greeted(rig.connect());
    rig.start(3);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(1));

    rig.stop(4, NO_LEASE);
    client.post_write(REGISTERS, 0, 2);
    client.read(7, 0).unwrap();
    rig.command(5, Phase::Reset, S::Stop, NO_LEASE);
    assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
    client.post_write(REGISTERS, 0, 3);
    client.read(7, 0).unwrap();
    rig.start(6);
    client.read(REGISTERS, COUNT).unwrap();
    assert_eq!(wrote(&rig), [1, 3]);
    drop(client);
}

#[test]
fn a_leased_stop_leaves_the_socket_alone_until_the_start() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    for epoch in 1..20 {
        client.post_write(REGISTERS, 0, 1);
        rig.stop(2 * epoch, LEASE);
        let before = u32::try_from(wrote_before_the_stop(&rig)).unwrap();
        client.post_write(REGISTERS, 0, 2);
        client.send(&message(1, 9, 0, &super::client::access(REGISTERS, COUNT, 4)), &[]);
        assert!(nothing_comes(&client), "configuration space and the others wait, too");
        assert_eq!(wrote(&rig).len(), usize::try_from(before).unwrap());
        rig.start(2 * epoch + 1);
        let count = client.receive().result().unwrap();
        assert_eq!(count[16..20], (before + 1).to_le_bytes());
    }
    drop(client);
}

#[test]
fn what_a_client_has_left_in_a_held_socket_takes_effect_after_the_start() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, LEASE);
    (0..3).for_each(|value| client.post_write(REGISTERS, 0, value));
    drop(client);
    rig.start(3);
    let mut client = Client::greeted(rig.connect());
    assert_eq!(client.read(REGISTERS, COUNT), Ok(3));
    drop(client);
}

#[test]
fn a_lease_that_runs_out_serves_again() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, Duration::from_millis(20));
    assert_eq!(client.write(REGISTERS, 0, 1), Ok(()), "answered when the lease has run out");
    assert_eq!(client.read(REGISTERS, COUNT), Ok(1));
    drop(client);
}

#[test]
fn a_second_stop_without_a_lease_ends_the_wait_of_the_client() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, LEASE);
    client.send(&message(1, 9, 0, &super::client::access(7, 0, 4)), &[]);
    rig.stop_again(3);
    assert!(client.receive().result().is_ok(), "configuration space is served while stopped");
    rig.start(4);
    drop(client);
}

#[test]
fn a_stop_that_fails_serves_again() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    for lease in [NO_LEASE, LEASE] {
        let epoch = if lease.is_zero() { 2 } else { 4 };
        rig.command(epoch, Phase::PrepareStop, S::RunningP2p, NO_LEASE);
        assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
        rig.device().fails_to_stop.store(true, std::sync::atomic::Ordering::SeqCst);
        rig.command(epoch, Phase::Stop, S::Stop, lease);
        let answer = rig.answer();
        let DeviceMessage::Refused(refused) = answer else { panic!("{answer:?}") };
        assert_eq!(refused.refusal.kind, RefusalKind::Device);
        client.write(REGISTERS, 0, 1).unwrap();
        rig.command(epoch + 1, Phase::Start, S::Running, NO_LEASE);
        assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
    }
    drop(client);
}

#[test]
fn a_client_that_reads_nothing_keeps_no_device_from_stopping() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let long = super::client::access(MEMORY, 0, 64 << 10);
    (0..64).for_each(|id| client.send(&message(id, 9, 0, &long), &[]));
    rig.stop(2, NO_LEASE);
    rig.start(3);
    drop(client);
    let mut client = Client::greeted(rig.connect());
    client.read(REGISTERS, COUNT).unwrap();
    drop(client);
}

#[test]
fn a_stop_in_the_middle_of_a_message_does_not_wait_for_its_end() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let post = message(1, REGION_WRITE, super::client::POSTED, &write_body(REGISTERS, 0, &[7; 4]));
    let (first, rest) = post.split_at(21);
    client.send(first, &[]);
    rig.stop(2, NO_LEASE);
    client.send(rest, &[]);
    client.read(7, 0).unwrap();
    assert!(wrote(&rig).is_empty());
    rig.start(3);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(1));
    drop(client);
}

/// The eventfds of the doorbells.
pub(super) fn bells(client: &mut Client) -> Vec<OwnedFd> {
    client.send(&message(1, 6, 0, &crate::fields!(4096_u32, 0_u32, REGISTERS, 0_u32)), &[]);
    let (answer, fds) = client.receive_with_fds();
    answer.result().unwrap();
    assert_eq!(fds.len(), 2);
    fds
}

pub(super) fn ring(bell: &OwnedFd) {
    rustix::io::write(bell, &1_u64.to_ne_bytes()).unwrap();
}

pub(super) fn rang(rig: &Rig) -> Vec<usize> {
    let deeds = rig.device().deeds();
    let rang = deeds.iter().filter_map(|deed| match deed {
        Deed::Rang(index) => Some(*index),
        _ => None,
    });
    rang.collect()
}

pub(super) fn until(what: &str, is_so: impl Fn() -> bool) {
    let begin = std::time::Instant::now();
    while !is_so() {
        assert!(begin.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn what_was_rung_before_a_stop_is_told_before_it_and_later_after_the_start() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let bells = bells(&mut client);
    for epoch in 1..40 {
        let before = rang(&rig).len();
        ring(&bells[1]);
        rig.stop(2 * epoch, if epoch % 2 == 0 { LEASE } else { NO_LEASE });
        assert_eq!(rang(&rig)[before..], [1], "round {epoch}");
        ring(&bells[0]);
        ring(&bells[0]);
        assert_eq!(rang(&rig).len(), before + 1, "round {epoch}");
        rig.start(2 * epoch + 1);
        until("it is told after the start", || rang(&rig).len() > before + 1);
        assert_eq!(rang(&rig)[before..], [1, 0], "two signals are one");
    }
    drop(client);
}

#[test]
fn what_a_client_has_rung_before_it_goes_counts() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let theirs = bells(&mut client);
    rig.stop(2, NO_LEASE);
    ring(&theirs[0]);
    drop(client);
    let mut client = Client::greeted(rig.connect());
    let ours = bells(&mut client);
    rig.start(3);
    until("the first client's", || rang(&rig) == [0]);
    ring(&ours[1]);
    until("the second client's", || rang(&rig) == [0, 1]);
    drop(client);
}

#[derive(Clone, Copy, Debug)]
enum Step {
    /// That many posted writes, in one piece or in several.
    Post(u8, bool),
    Stop(bool),
    Start,
    /// A message with a reply, which is one round trip.
    Read,
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1..12_u8, any::<bool>()).prop_map(|(count, whole)| Step::Post(count, whole)),
        2 => any::<bool>().prop_map(Step::Stop),
        3 => Just(Step::Start),
        2 => Just(Step::Read),
        1 => Just(Step::Reconnect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn each_posted_write_takes_effect_once_and_before_a_stop_that_comes_after_it(
        steps in proptest::collection::vec(step(), 1..40),
    ) {
        let rig = Rig::new();
        let mut client = Client::greeted(rig.connect());
        let (mut sent, mut epoch, mut stopped) = (0_u32, 1, None::<bool>);
        for step in steps {
            match step {
                Step::Post(count, whole) => {
                    let mut bytes = Vec::new();
                    for _ in 0..count {
                        let body = write_body(REGISTERS, 0, &sent.to_le_bytes());
                        bytes.extend(message(0, REGION_WRITE, super::client::POSTED, &body));
                        sent += 1;
                    }
                    let cut = if whole { bytes.len() } else { bytes.len() / 3 };
                    client.send(&bytes[..cut], &[]);
                    if cut < bytes.len() {
                        client.send(&bytes[cut..], &[]);
                    }
                }
                Step::Stop(leased) if stopped.is_none() => {
                    epoch += 1;
                    rig.stop(epoch, if leased { LEASE } else { NO_LEASE });
                    prop_assert_eq!(wrote_before_the_stop(&rig), sent as usize);
                    stopped = Some(leased);
                }
                Step::Start if stopped.is_some() => {
                    epoch += 1;
                    rig.start(epoch);
                    stopped = None;
                }
                Step::Read if stopped != Some(true) => {
                    prop_assert!(client.read(7, 0).is_ok());
                    if stopped.is_none() {
                        prop_assert_eq!(client.read(REGISTERS, COUNT), Ok(sent));
                    }
                }
                Step::Reconnect if stopped != Some(true) => {
                    drop(client);
                    client = Client::greeted(rig.connect());
                }
                Step::Stop(_) | Step::Start | Step::Read | Step::Reconnect => {}
            }
        }
        if stopped.is_some() {
            rig.start(epoch + 1);
        }
        prop_assert_eq!(client.read(REGISTERS, COUNT), Ok(sent));
        prop_assert_eq!(wrote(&rig), (0..u64::from(sent)).collect::<Vec<_>>());
        drop(client);
    }
}
