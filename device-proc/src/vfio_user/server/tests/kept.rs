//! More posted writes to a stopped device than are kept: whoever can start it is heard, and the next
//! client is served.

use super::client::{Client, POSTED, access, message, write_body};
use super::edge::{NO_LEASE, nothing_comes, wrote};
use super::migration::{get, save, set, write};
use crate::fields;
use crate::vfio_user::rig::{COUNT, MEMORY, MEMORY_SIZE, REGISTERS, Rig};
use standstill_protocol::message::{DeviceMessage, Phase};
use standstill_protocol::migration::MigrationState as S;
use std::net::Shutdown;
use std::time::Duration;

const REGION_READ: u16 = 9;
const RESET: u16 = 13;
const REGION_WRITE_MULTI: u16 = 15;
/// As many writes as are kept of a client that is there.
const MOST: u32 = 1024;

fn post(client: &mut Client, values: std::ops::Range<u32>) {
    values.for_each(|value| client.post_write(REGISTERS, 0, value));
}

/// One message with that many writes.
fn post_multi(client: &mut Client, count: u32) {
    let mut body = fields!(u64::from(count));
    for value in 0..count {
        body.extend(fields!(0_u64, REGISTERS, 4_u32, u64::from(value)));
    }
    client.post(REGION_WRITE_MULTI, &body);
}

/// One message with as many bytes as are kept.
fn post_long(client: &mut Client) {
    let data = vec![0x5a; usize::try_from(MEMORY_SIZE).unwrap()];
    client.post(super::client::REGION_WRITE, &write_body(MEMORY, 0, &data));
}

/// Fills what is kept up to its bound, in each of the ways that there are.
const FILLS: [fn(&mut Client); 3] =
    [|client| post(client, 0..MOST), |client| post_multi(client, MOST), post_long];

/// What was posted has taken effect, once.
fn assert_filled(client: &mut Client, rig: &Rig, way: usize) {
    let all: Vec<_> = if way < 2 { (0..u64::from(MOST)).collect() } else { Vec::new() };
    client.read(REGISTERS, COUNT).unwrap();
    assert_eq!(wrote(rig), all);
    let memory = if way < 2 { 0 } else { 0x5a5a_5a5a };
    assert_eq!(client.read(MEMORY, MEMORY_SIZE - 4), Ok(memory));
}

/// Brings the device to a state in which it is stopped, in band. What can be loaded is returned.
fn stop_in_band(client: &mut Client, state: S) -> Vec<u8> {
    set(client, S::StopCopy).unwrap();
    let saved = save(client, 1 << 20);
    match state {
        S::StopCopy => {
            set(client, S::Stop).unwrap();
            set(client, S::StopCopy).unwrap();
        }
        S::Error => {
            set(client, S::Resuming).unwrap();
            // It may be found bad now, or at the end.
            let _ = write(client, b"no state");
            set(client, S::Stop).expect_err("a bad state");
        }
        state => set(client, state).unwrap(),
    }
    assert_eq!(get(client), state);
    saved
}

/// The way back to RUNNING, in band.
fn start_in_band(client: &mut Client, state: S, saved: &[u8]) {
    match state {
        S::Error => client.call(RESET, &[]).map(|_| ()).unwrap(),
        S::Resuming => {
            write(client, saved).unwrap();
            set(client, S::Running).unwrap();
        }
        S::StopCopy => {
            assert!(!save(client, 1 << 20).is_empty());
            set(client, S::Running).unwrap();
        }
        _ => set(client, S::Running).unwrap(),
    }
    assert_eq!(get(client), S::Running);
}

#[test]
fn a_client_that_has_stopped_its_device_and_fills_what_is_kept_can_start_it() {
    for state in [S::Stop, S::StopCopy, S::Resuming, S::Error] {
        for (way, fill) in FILLS.into_iter().enumerate() {
            let rig = Rig::new();
            let mut client = Client::greeted(rig.connect());
            let saved = stop_in_band(&mut client, state);
            fill(&mut client);
            start_in_band(&mut client, state, &saved);
            if state == S::Error {
                // A reset voids it.
                client.read(REGISTERS, COUNT).unwrap();
                assert!(wrote(&rig).is_empty());
            } else {
                assert_filled(&mut client, &rig, way);
            }
            drop(client);
        }
    }
}

#[test]
fn one_that_posts_more_loses_its_connection_and_the_next_can_start_it() {
    for state in [S::Stop, S::StopCopy, S::Resuming, S::Error] {
        for (way, fill) in FILLS.into_iter().enumerate() {
            let rig = Rig::new();
            let mut client = Client::greeted(rig.connect());
            let saved = stop_in_band(&mut client, state);
            fill(&mut client);
            client.read(7, 0).expect("it is served");
            post(&mut client, 7777..7778);
            client.assert_closed();

            let mut client = Client::greeted(rig.connect());
            assert_eq!(get(&mut client), state);
            start_in_band(&mut client, state, &saved);
            if state != S::Error {
                assert_filled(&mut client, &rig, way);
            }
            client.write(REGISTERS, 0, 8888).unwrap();
            assert_eq!(wrote(&rig).last(), Some(&8888));
            assert!(!wrote(&rig).contains(&7777), "what was refused has no effect");
            drop(client);
        }
    }
}

#[test]
fn the_client_is_heard_although_the_coordinator_holds_the_device_too() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    set(&mut client, S::Stop).unwrap();
    rig.stop(2, NO_LEASE);
    post(&mut client, 0..MOST);
    set(&mut client, S::Running).unwrap();
    assert_eq!(client.write(REGISTERS, 0, 1), Err(22), "the coordinator has not started it");
    // From here on the coordinator alone does.
    post(&mut client, MOST..MOST + 1);
    client.send(&message(1, REGION_READ, 0, &access(REGISTERS, COUNT, 4)), &[]);
    assert!(nothing_comes(&client));
    rig.start(3);
    assert_eq!(client.receive().result().unwrap()[16..], (MOST + 1).to_ne_bytes());
    drop(client);
}

#[test]
fn the_first_write_beyond_the_bound_waits_for_the_coordinator_with_all_behind_it() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    post(&mut client, 0..MOST);
    assert!(client.read(7, 0).is_ok(), "up to the bound all else is served");
    post(&mut client, MOST..MOST + 1);
    client.send(&message(1, REGION_READ, 0, &access(REGISTERS, COUNT, 4)), &[]);
    // While the device is stopped, this read is refused: so its answer says when it was taken.
    assert!(nothing_comes(&client));
    rig.start(3);
    assert_eq!(client.receive().result().unwrap()[16..], (MOST + 1).to_ne_bytes());
    assert_eq!(wrote(&rig), (0..=u64::from(MOST)).collect::<Vec<_>>());
    drop(client);
}

#[test]
fn whoever_comes_after_a_client_that_has_filled_it_and_gone_is_served_before_the_start() {
    for (way, fill) in FILLS.into_iter().enumerate() {
        let rig = Rig::new();
        let mut client = Client::greeted(rig.connect());
        rig.stop(2, NO_LEASE);
        fill(&mut client);
        post(&mut client, 9000..9100);
        drop(client);
        let mut client = Client::greeted(rig.connect());
        assert!(client.read(7, 0).is_ok());
        assert_eq!(client.write(REGISTERS, 0, 1), Err(22));
        // There is no room for a write of this one.
        post(&mut client, 9100..9101);
        client.send(&message(1, REGION_READ, 0, &access(7, 0, 4)), &[]);
        assert!(nothing_comes(&client));
        rig.start(3);
        client.receive().result().unwrap();
        let first: u64 = if way < 2 { MOST.into() } else { 0 };
        let all: Vec<_> = (0..first).chain(9000..9101).collect();
        client.read(REGISTERS, COUNT).unwrap();
        assert_eq!(wrote(&rig), all, "once each, in their order");
        drop(client);
    }
}

#[test]
fn one_that_only_says_that_it_sends_no_more_gets_its_answers_before_the_start() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    post(&mut client, 0..MOST + 10);
    client.send(&message(1, REGION_READ, 0, &access(7, 0, 4)), &[]);
    client.stream.shutdown(Shutdown::Write).unwrap();
    client.receive().result().unwrap();
    client.assert_closed();
    rig.start(3);
    let mut client = Client::greeted(rig.connect());
    assert_eq!(client.read(REGISTERS, COUNT), Ok(MOST + 10));
    drop(client);
}

#[test]
fn clients_that_come_and_go_do_not_pile_up_writes_without_bound() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    let (writes, clients) = (4000, 8);
    for _ in 0..clients {
        post_multi(&mut client, writes);
        drop(client);
        client = Client::greeted(rig.connect());
    }
    assert!(client.read(7, 0).is_ok(), "the next one is served");
    rig.start(3);
    let kept = client.read(REGISTERS, COUNT).unwrap();
    assert!(kept >= writes && kept < clients * writes, "{kept} writes were kept");
    assert_eq!(kept % writes, 0, "a message is kept as a whole");
    drop(client);
}

#[test]
fn what_is_void_takes_no_room() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    post(&mut client, 0..MOST);
    client.read(7, 0).unwrap();
    rig.command(3, Phase::Reset, S::Stop, Duration::ZERO);
    assert!(matches!(rig.answer(), DeviceMessage::Reached(_)));
    post(&mut client, 0..MOST);
    assert!(client.read(7, 0).is_ok());
    rig.start(4);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(MOST));
    drop(client);
}

#[test]
fn a_posted_write_elsewhere_waits_too_and_a_read_does_not() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.stop(2, NO_LEASE);
    post(&mut client, 0..MOST);
    // With a reply: refused as ever.
    assert_eq!(client.write(REGISTERS, 0, 1), Err(22));
    client.write(7, 4, 0).expect("configuration space");
    let config = write_body(7, 4, &[2, 0]);
    client.send(&message(1, super::client::REGION_WRITE, POSTED, &config), &[]);
    client.send(&message(2, REGION_READ, 0, &access(7, 4, 4)), &[]);
    assert!(nothing_comes(&client));
    rig.start(3);
    let command = client.receive().result().unwrap();
    assert_eq!(command[16] & 2, 2);
    drop(client);
}
