//! Clients that read slowly: they get all of their replies, and keep no device from stopping.

use super::client::{Client, access, message};
use super::edge::{LEASE, NO_LEASE, until, wrote};
use crate::fields;
use crate::vfio_user::rig::{COUNT, MEMORY, REGISTERS, Rig};
use rustix::net::{RecvFlags, recv};
use standstill_protocol::migration::{MigrationFlags, MigrationState as S};
use std::io::Read;
use std::sync::atomic::Ordering;
use std::thread;

const REGION_READ: u16 = 9;
const FEATURE: u16 = 16;
const DATA_READ: u16 = 17;
/// More replies than fit into a socket, by far.
const READS: u16 = 64;
const LONG: u32 = 64 << 10;

/// What is in the memory that is read.
fn pattern() -> Vec<u8> {
    (0..LONG).flat_map(|at| (at / 4).to_ne_bytes()).step_by(4).take(64 << 10).collect()
}

/// Asks for more than fits into the socket, and reads nothing; posts writes behind it.
fn ask_for_much(rig: &Rig, client: &mut Client) {
    let memory = rig.parts.bar_memory[2].as_ref().unwrap();
    assert_eq!(rustix::io::pwrite(memory, &pattern(), 0), Ok(64 << 10));
    for id in 0..READS {
        client.send(&message(id, REGION_READ, 0, &access(MEMORY, 0, LONG)), &[]);
    }
    (0..10).for_each(|value| client.post_write(REGISTERS, 0, value));
}

fn read_much(client: &mut Client) {
    let pattern = pattern();
    for id in 0..READS {
        let answer = client.receive();
        assert_eq!(answer.id, id);
        assert!(answer.result().is_ok_and(|body| body[16..] == pattern));
    }
}

#[test]
fn a_client_that_does_not_read_while_its_device_stops_is_served_on() {
    for lease in [NO_LEASE, LEASE] {
        let rig = Rig::new();
        let mut client = Client::greeted(rig.connect());
        ask_for_much(&rig, &mut client);
        rig.stop(2, lease);
        assert!(wrote(&rig).is_empty(), "what is behind the replies waits for them");
        rig.start(3);
        read_much(&mut client);
        assert_eq!(client.read(REGISTERS, COUNT), Ok(10));
        assert_eq!(wrote(&rig), (0..10).collect::<Vec<_>>(), "once each");
        drop(client);
    }
}

#[test]
fn a_lease_that_comes_while_a_reply_waits_for_room_holds_what_is_behind_it() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    ask_for_much(&rig, &mut client);
    rig.stop(2, LEASE);
    // What had been asked before the stop is answered by and by, and nothing of it is refused.
    let reading = thread::spawn(move || {
        read_much(&mut client);
        client
    });
    rig.start(3);
    let mut client = reading.join().unwrap();
    assert_eq!(client.read(REGISTERS, COUNT), Ok(10));
    drop(client);
}

#[test]
fn what_is_behind_a_slow_reply_is_kept_while_the_device_is_stopped() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    ask_for_much(&rig, &mut client);
    rig.stop(2, NO_LEASE);
    for id in 0..READS {
        let answer = client.receive();
        assert_eq!(answer.id, id, "answered or refused, but not lost");
    }
    assert!(client.read(7, 0).is_ok());
    assert!(wrote(&rig).is_empty());
    rig.start(3);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(10));
    drop(client);
}

#[test]
fn a_reply_is_sent_in_one_piece() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    for _ in 0..20 {
        client.send(&message(1, REGION_READ, 0, &access(7, 0, 4)), &[]);
        let mut buffer = vec![0; 64 << 10];
        let (length, _) = recv(&client.stream, &mut buffer[..], RecvFlags::empty()).unwrap();
        assert_eq!(length, 16 + 16 + 4);
    }
    drop(client);
}

#[test]
fn reads_of_a_state_that_does_not_come_keep_no_device_from_stopping() {
    let rig = Rig::with_flags(MigrationFlags::ALL);
    let mut client = Client::greeted(rig.connect());
    let body = fields!(16_u32, 2_u32 | 1 << 17, S::PreCopy.value(), u32::MAX);
    client.call(FEATURE, &body).unwrap();
    rig.device().saves_slowly.store(true, Ordering::SeqCst);
    rig.device().hold();
    // Each of them waits for a while where nothing waits for it: all together for longer than the
    // stop's budget.
    let reads = 150;
    for id in 0..reads {
        client.send(&message(id, DATA_READ, 0, &fields!(8 + 100_u32, 100_u32)), &[]);
    }
    rig.device().until_held();
    rig.stop(2, NO_LEASE);
    rig.device().let_through();
    for id in 0..reads {
        let answer = client.receive();
        assert_eq!(answer.id, id);
        assert_eq!(answer.result().map(|body| body.len()), Ok(108));
    }
    rig.start(3);
    drop(client);
}

#[test]
fn a_client_that_reads_a_piece_at_a_time_gets_all_of_its_reply() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let body = fields!(16_u32, 2_u32 | 1 << 17, S::StopCopy.value(), u32::MAX);
    client.call(FEATURE, &body).unwrap();
    // As long as was asked for, which is several times what fits into the socket.
    let size = 1_u32 << 20;
    client.send(&message(1, DATA_READ, 0, &fields!(8 + size, size)), &[]);
    let mut reply = vec![0; 16 + 8 + (1 << 20)];
    let (first, rest) = reply.split_at_mut(600 << 10);
    for piece in first.chunks_mut(200 << 10) {
        // From here on nobody but this client can bring it further. How long it is waited for is
        // tested where it is sent.
        until("the reply waits for room", || rig.parts.edge.is_quiet());
        client.stream.read_exact(piece).unwrap();
    }
    client.stream.read_exact(rest).unwrap();
    assert_eq!(reply[..2], 1_u16.to_ne_bytes());
    assert!(client.read(7, 0).is_ok());
    drop(client);
}
