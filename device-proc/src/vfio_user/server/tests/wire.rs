//! What is answered to each command, and to what is none.

use super::client::{
    Answer, Client, POSTED, REGION_READ, REGION_WRITE, VERSION, access, message, version,
    write_body,
};
use super::windows::{eventfds, map_body, raised, ram};
use crate::fields;
use crate::vfio_user::rig::{COUNT, Deed, MEMORY, MEMORY_SIZE, READ_ONLY, REGISTERS, Rig};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

const DMA_MAP: u16 = 2;
const GET_INFO: u16 = 4;
const GET_REGION_INFO: u16 = 5;
const GET_REGION_IO_FDS: u16 = 6;
const GET_IRQ_INFO: u16 = 7;
const SET_IRQS: u16 = 8;
const RESET: u16 = 13;
const WRITE_MULTI: u16 = 15;
const FEATURE: u16 = 16;

const EINVAL: u32 = 22;

pub(super) fn greeted() -> (Rig, Client) {
    let rig = Rig::new();
    let client = Client::greeted(rig.connect());
    (rig, client)
}

fn words(bytes: &[u8]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_ne_bytes(*word)).collect()
}

#[test]
fn versions_are_agreed_on_within_the_limits_of_the_client() {
    let qemu = concat!(
        r#"{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"#,
        r#""max_data_xfer_size":1048576,"migration":{"max_bitmap_size":268435456,"#,
        r#""pgsize":4096},"write_multiple":true}}"#
    );
    for json in [qemu, "{}", r#"{"capabilities":{}}"#, r#"{"unknown":1,"capabilities":{"x":[]}}"#] {
        let rig = Rig::new();
        let mut client = Client::raw(rig.connect());
        let mut body = version(json);
        body[2] = 0;
        let reply = client.call(VERSION, &body).unwrap();
        assert!(reply.len() <= body.len().max(64), "{}", String::from_utf8_lossy(&reply));
        assert_eq!(reply[..4], [0, 0, 0, 0]);
        assert_eq!(reply.last(), Some(&0));
        let data: serde_json::Value = serde_json::from_slice(&reply[4..reply.len() - 1]).unwrap();
        let capabilities = &data["capabilities"];
        assert!(capabilities["max_msg_fds"].as_u64().is_none_or(|fds| fds <= 16));
        assert_eq!(capabilities["write_multiple"], serde_json::Value::Null);
        assert_eq!(client.call(VERSION, &body), Err(EINVAL), "twice");
        assert!(client.read(7, 0).is_ok());
        drop(client);
    }
}

#[test]
fn several_writes_in_one_message_are_offered_to_whoever_asks_but_qemu() {
    let rig = Rig::new();
    for (minor, offered) in [(0, false), (1, true), (2, true)] {
        let mut client = Client::raw(rig.connect());
        let mut body = version(r#"{"capabilities":{"write_multiple":true}}"#);
        body[2] = minor;
        let reply = client.call(VERSION, &body).unwrap();
        let is_offered = String::from_utf8_lossy(&reply).contains(r#""write_multiple":true"#);
        assert_eq!(is_offered, offered, "0.{minor}");
        drop(client);
    }
}

#[test]
fn a_version_without_json_is_legal() {
    let rig = Rig::new();
    let mut client = Client::raw(rig.connect());
    assert_eq!(client.call(VERSION, &[0, 0, 1, 0]).unwrap()[..4], [0, 0, 1, 0]);
    assert!(client.read(7, 0).is_ok());
    drop(client);
}

#[test]
fn a_version_that_cannot_be_is_refused_and_closes_the_connection() {
    let rig = Rig::new();
    let bodies = [
        vec![],
        vec![0, 0],
        fields!(1_u16, 0_u16),
        b"\0\0\0\0{}".to_vec(),
        version("{"),
        version(r#"{"capabilities":7}"#),
        version(r#"{"capabilities":{"max_msg_fds":"many"}}"#),
        version(r#"{"capabilities":{"max_msg_fds":-1}}"#),
        version(r#"{"capabilities":{"max_msg_fds":1025}}"#),
        version(r#"{"capabilities":{"pgsizes":2048}}"#),
    ];
    for body in bodies {
        let mut client = Client::raw(rig.connect());
        assert_eq!(client.call(VERSION, &body), Err(EINVAL), "{body:?}");
        client.assert_closed();
    }
}

#[test]
fn nothing_comes_before_the_version() {
    let rig = Rig::new();
    let mut client = Client::raw(rig.connect());
    for command in (0..20).filter(|command| *command != VERSION) {
        assert_eq!(client.call(command, &[0; 32]), Err(EINVAL), "{command}");
    }
    client.post_write(REGISTERS, 0, 1);
    client.call(VERSION, &version("{}")).unwrap();
    assert_eq!(client.read(REGISTERS, COUNT), Ok(0));
    drop(client);
}

#[test]
fn unknown_commands_are_refused_and_the_next_one_is_found() {
    let (_rig, mut client) = greeted();
    for command in [0, 11, 12, 14, 19, 20, 0x7fff, 0xffff] {
        for length in [0, 1, 16, 4096] {
            assert_eq!(client.call(command, &vec![0xff; length]), Err(EINVAL), "{command}");
        }
        client.post(command, &[7; 100]);
        assert!(client.read(7, 0).is_ok());
    }
    drop(client);
}

#[test]
fn sizes_that_cannot_be_are_answered_and_close_the_connection() {
    let rig = Rig::new();
    for size in [0_u32, 1, 15, (1 << 20) + (64 << 10) + 1, 0x7fff_ffff, u32::MAX] {
        let mut client = Client::greeted(rig.connect());
        let header = fields!(9_u16, REGION_READ, size, 0_u32, 0_u32);
        client.send(&header, &[]);
        let answer = client.receive();
        assert_eq!((answer.id, answer.result()), (9, Err(EINVAL)), "{size:#x}");
        client.assert_closed();
    }
}

#[test]
fn types_that_do_not_exist_are_refused_and_replies_are_nothing() {
    let (_rig, mut client) = greeted();
    for kind in 2..16 {
        client.send(&message(3, REGION_READ, kind, &access(7, 0, 4)), &[]);
        assert_eq!(client.receive().result(), Err(EINVAL), "{kind}");
    }
    for flags in [1, 0x21, 0x11] {
        client.send(&message(3, REGION_READ, flags, &access(7, 0, 4)), &[]);
    }
    assert!(client.read(7, 0).is_ok(), "with one answer");
    drop(client);
}

#[test]
fn a_truncated_message_ends_the_connection_when_the_client_goes() {
    let rig = Rig::new();
    for length in 1..32 {
        let mut client = Client::greeted(rig.connect());
        client.send(&message(1, REGION_READ, 0, &access(7, 0, 4))[..length], &[]);
        drop(client);
    }
    let mut client = Client::greeted(rig.connect());
    assert!(client.read(7, 0).is_ok());
    drop(client);
}

#[test]
fn how_messages_are_cut_makes_no_difference() {
    let (rig, mut client) = greeted();
    let mut bytes = Vec::new();
    for value in 0..40_u32 {
        let body = write_body(REGISTERS, 0, &value.to_le_bytes());
        bytes.extend(message(1, REGION_WRITE, POSTED, &body));
    }
    bytes.extend(message(2, REGION_READ, 0, &access(REGISTERS, COUNT, 4)));
    for cut in [1, 7, 16, 17, 36, 100, bytes.len()] {
        bytes.chunks(cut).for_each(|piece| client.send(piece, &[]));
        assert!(client.receive().result().is_ok());
    }
    assert_eq!(client.read(REGISTERS, COUNT), Ok(40 * 7));
    let expected: Vec<_> =
        (0..7).flat_map(|_| (0..40).map(|value| Deed::Wrote(0, value))).collect();
    assert_eq!(rig.device().deeds(), expected);
    drop(client);
}

#[test]
fn who_wants_no_reply_gets_none_and_order_is_kept() {
    let (rig, mut client) = greeted();
    client.post(REGION_READ, &access(7, 0, 4));
    client.post(REGION_READ, &access(7, 0, 0xffff_ffff));
    client.post(GET_INFO, &[]);
    client.post(99, &[]);
    client.post_write(REGISTERS, READ_ONLY, 1);
    client.post_write(REGISTERS, 0, 2);
    client.post(RESET, &[]);
    client.post_write(REGISTERS, 0, 3);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(2));
    assert_eq!(rig.device().deeds(), [Deed::Wrote(0, 2), Deed::Reset, Deed::Wrote(0, 3)]);
    drop(client);
}

#[test]
fn the_device_describes_itself() {
    let (_rig, mut client) = greeted();
    let info = client.call(GET_INFO, &fields!(16_u32, 0_u32, 0_u32, 0_u32)).unwrap();
    assert_eq!(words(&info), [16, 3, 9, 5]);
    assert_eq!(client.call(GET_INFO, &fields!(15_u32, 0_u32, 0_u32, 0_u32)), Err(EINVAL));
    assert_eq!(client.call(GET_INFO, &[0; 8]), Err(EINVAL));

    for (index, count) in [(0, 1), (1, 0), (2, 4), (3, 1), (4, 1)] {
        let query = |argsz: u32, index: u32| fields!(argsz, 0_u32, index, 0_u32);
        let info = client.call(GET_IRQ_INFO, &query(16, index)).unwrap();
        let flags = if index == 0 { 7 } else { 1 };
        assert_eq!(words(&info), [16, flags, index, count]);
        assert_eq!(client.call(GET_IRQ_INFO, &query(15, index)), Err(EINVAL));
    }
    let none = fields!(16_u32, 0_u32, 5_u32, 0_u32);
    assert_eq!(client.call(GET_IRQ_INFO, &none), Err(EINVAL));
    drop(client);
}

fn region_query(argsz: u32, index: u32) -> Vec<u8> {
    fields!(argsz, 0_u32, index, 0_u32, 0_u64, 0_u64)
}

#[test]
fn regions_are_asked_for_in_two_steps_and_the_fd_comes_with_the_second() {
    let (_rig, mut client) = greeted();
    for (index, size) in
        [(0, 4096_u64), (1, 0), (3, 0), (4, 0), (5, 4096), (6, 0), (7, 256), (8, 0)]
    {
        let info = client.call(GET_REGION_INFO, &region_query(32, index)).unwrap();
        let flags = if size == 0 { 0 } else { 3 };
        assert_eq!(words(&info)[..4], [32, flags, index, 0]);
        assert_eq!(info[16..24], size.to_ne_bytes());
    }
    let first = client.call(GET_REGION_INFO, &region_query(32, MEMORY)).unwrap();
    assert_eq!(words(&first)[..4], [64, 7, MEMORY, 0], "no capabilities, but how large they are");
    for argsz in [33, 63] {
        assert_eq!(client.call(GET_REGION_INFO, &region_query(argsz, MEMORY)).unwrap(), first);
    }
    client.send(&message(1, GET_REGION_INFO, 0, &region_query(64, MEMORY)), &[]);
    let (whole, fds) = client.receive_with_fds();
    let whole = whole.result().unwrap();
    assert_eq!(words(&whole)[..4], [64, 15, MEMORY, 32]);
    assert_eq!(words(&whole[32..48]), [0x1_0001, 0, 1, 0]);
    assert_eq!(whole[48..], fields!(0_u64, MEMORY_SIZE));
    assert_eq!(fds.len(), 1);
    File::from(fds.into_iter().next().unwrap()).write_all_at(&[1, 2, 3, 4], 8).unwrap();
    assert_eq!(client.read(MEMORY, 8), Ok(0x0403_0201));

    assert_eq!(client.call(GET_REGION_INFO, &region_query(31, 0)), Err(EINVAL));
    assert_eq!(client.call(GET_REGION_INFO, &region_query(32, 9)), Err(EINVAL));
    assert_eq!(client.call(GET_REGION_INFO, &region_query(32, u32::MAX)), Err(EINVAL));
    assert_eq!(client.call(GET_REGION_INFO, &[0; 16]), Err(EINVAL));
    drop(client);
}

#[test]
fn doorbells_come_all_or_none() {
    let (_rig, mut client) = greeted();
    let query =
        |argsz: u32, flags: u32, index: u32, count: u32| fields!(argsz, flags, index, count);
    for argsz in [16, 100, 111] {
        let reply = client.call(GET_REGION_IO_FDS, &query(argsz, 0, REGISTERS, 0)).unwrap();
        assert_eq!(words(&reply), [112, 0, 0, 2]);
    }
    client.send(&message(1, GET_REGION_IO_FDS, 0, &query(112, 0, REGISTERS, 0)), &[]);
    let (reply, fds) = client.receive_with_fds();
    let reply = reply.result().unwrap();
    assert_eq!((reply.len(), fds.len()), (112, 2));
    let entries: Vec<_> = reply[16..].chunks(48).map(words).collect();
    assert_eq!(entries[0][..8], [0x100, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(entries[1][..8], [0x108, 0, 4, 0, 1, 0, 1, 0], "of one value");
    assert!(entries[1][8] == 7 || entries[1][10] == 7, "which is 7");
    for index in [MEMORY, 7] {
        let reply = client.call(GET_REGION_IO_FDS, &query(16, 0, index, 0)).unwrap();
        assert_eq!(words(&reply), [16, 0, index, 0]);
    }
    for wrong in [
        query(15, 0, 0, 0),
        query((1 << 20) + 1, 0, 0, 0),
        query(16, 1, 0, 0),
        query(16, 0, 0, 1),
        query(16, 0, 1, 0),
        query(16, 0, 9, 0),
        vec![0; 8],
    ] {
        assert_eq!(client.call(GET_REGION_IO_FDS, &wrong), Err(EINVAL), "{wrong:?}");
    }
    drop(client);
    let rig = Rig::new();
    let mut client = Client::raw(rig.connect());
    client.call(VERSION, &version("{}")).unwrap();
    let refused = client.call(GET_REGION_IO_FDS, &query(112, 0, REGISTERS, 0));
    assert_eq!(refused, Err(28), "a client that takes one fd only");
    drop(client);
}

#[test]
fn accesses_outside_a_region_or_with_another_length_are_refused_before_anything_is_done() {
    let (rig, mut client) = greeted();
    for (region, offset, count) in [
        (REGISTERS, 4096, 4),
        (REGISTERS, 4094, 4),
        (REGISTERS, u64::MAX, 4),
        (REGISTERS, u64::MAX - 3, 4),
        (REGISTERS, 0, 3),
        (REGISTERS, 0, 16),
        (1, 0, 4),
        (MEMORY, 0, 0x4000_0000),
        (MEMORY, 0, u32::MAX),
        (MEMORY, 1, 1 << 16),
        (6, 0, 4),
        (7, 254, 4),
        (8, 0, 4),
        (9, 0, 4),
        (u32::MAX, 0, 4),
    ] {
        let reply = client.call(REGION_READ, &access(region, offset, count));
        assert_eq!(reply, Err(EINVAL), "{count} of {region} at {offset:#x}");
        let length = usize::try_from(count).unwrap().min(1 << 16);
        let mut body = access(region, offset, count);
        body.resize(16 + length, 0);
        assert_eq!(client.call(REGION_WRITE, &body), Err(EINVAL), "{region} at {offset:#x}");
    }
    for length in [0, 1, 3, 5, 4096] {
        let mut body = access(REGISTERS, 0, 4);
        body.resize(16 + length, 0);
        assert_eq!(client.call(REGION_WRITE, &body), Err(EINVAL), "{length} bytes for 4");
    }
    assert_eq!(client.call(REGION_READ, &[0; 15]), Err(EINVAL));
    assert_eq!(
        client.call(REGION_READ, &access(MEMORY, 0, 1 << 16)).unwrap().len(),
        (1 << 16) + 16
    );
    assert_eq!(client.call(REGION_READ, &access(REGISTERS, 0, 0)).unwrap().len(), 16, "nothing");
    assert_eq!(client.call(REGION_WRITE, &access(REGISTERS, 0, 0)).unwrap().len(), 16);
    assert_eq!(client.write(REGISTERS, READ_ONLY, 1), Err(EINVAL), "by the device");
    assert_eq!(rig.device().deeds(), []);
    drop(client);
}

#[test]
fn no_transfer_is_longer_than_was_agreed() {
    let rig = Rig::new();
    let mut client = Client::raw(rig.connect());
    let body = version(r#"{"capabilities":{"max_data_xfer_size":1024}}"#);
    client.call(VERSION, &body).unwrap();
    assert!(client.call(REGION_READ, &access(MEMORY, 0, 1024)).is_ok());
    assert_eq!(client.call(REGION_READ, &access(MEMORY, 0, 1025)), Err(EINVAL));
    assert!(client.call(REGION_WRITE, &write_body(MEMORY, 0, &[1; 1024])).is_ok());
    assert_eq!(client.call(REGION_WRITE, &write_body(MEMORY, 0, &[1; 1025])), Err(EINVAL));
    drop(client);
}

#[test]
fn several_small_writes_are_done_in_order_up_to_the_first_that_is_refused() {
    let (rig, mut client) = greeted();
    let entry = |offset: u64, value: u32| fields!(offset, REGISTERS, 4_u32, value, 0_u32);
    let body = |entries: &[(u64, u32)]| {
        let mut body = fields!(entries.len() as u64);
        entries.iter().for_each(|(offset, value)| body.extend(entry(*offset, *value)));
        body
    };
    assert_eq!(client.call(WRITE_MULTI, &body(&[(0, 1), (8, 2)])), Ok(fields!(2_u64)));
    let stops = body(&[(0, 3), (READ_ONLY, 4), (0, 5)]);
    assert_eq!(client.call(WRITE_MULTI, &stops), Ok(fields!(1_u64)));
    assert_eq!(client.call(WRITE_MULTI, &body(&[(READ_ONLY, 4)])), Err(EINVAL));
    client.post(WRITE_MULTI, &body(&[(0, 6), (0, 7)]));
    assert_eq!(client.call(WRITE_MULTI, &body(&[])), Ok(fields!(0_u64)));
    let mut long = body(&[(0, 1)]);
    long[20] = 9;
    assert_eq!(client.call(WRITE_MULTI, &long), Err(EINVAL), "more than 8 bytes");
    long.truncate(30);
    assert_eq!(client.call(WRITE_MULTI, &long), Err(EINVAL), "not whole");
    assert_eq!(client.call(WRITE_MULTI, &fields!(u64::MAX)), Err(EINVAL));
    let wrote = [(0, 1), (8, 2), (0, 3), (0, 6), (0, 7)].map(|(at, value)| Deed::Wrote(at, value));
    assert_eq!(rig.device().deeds(), wrote);

    rig.stop(2, std::time::Duration::ZERO);
    assert_eq!(client.call(WRITE_MULTI, &body(&[(0, 8)])), Err(EINVAL), "stopped");
    client.post(WRITE_MULTI, &body(&[(0, 9), (0, 10)]));
    client.read(7, 0).unwrap();
    rig.start(3);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(7));
    drop(client);
}

#[test]
fn a_client_may_go_and_another_come_and_finds_the_device_as_it_was() {
    let rig = Rig::new();
    let [eventfd] = eventfds();
    let mut first = Client::greeted(rig.connect());
    first.write(REGISTERS, 0, 1).unwrap();
    first.call_with(DMA_MAP, &map_body(3, 0, 0, 0x1000), &[ram(4096).as_fd()]).unwrap();
    let irqs = fields!(20_u32, 36_u32, 2_u32, 0_u32, 1_u32);
    first.call_with(SET_IRQS, &irqs, &[eventfd.as_fd()]).unwrap();
    drop(first);
    let mut second = Client::greeted(rig.connect());
    assert_eq!(second.read(REGISTERS, COUNT), Ok(1));
    assert_eq!(rig.parts.memory.windows(), 0, "its windows have gone with it");
    rig.device().handles.interrupts.raise(0);
    assert!(!raised(&eventfd), "and its eventfds");
    drop(second);
}

#[test]
fn a_reset_reaches_the_device_and_is_refused_while_it_is_stopped() {
    let (rig, mut client) = greeted();
    assert_eq!(client.call(RESET, &[]), Ok(vec![]));
    assert_eq!(client.call(RESET, &[1, 2, 3]), Ok(vec![]), "a body is ignored");
    rig.stop(2, std::time::Duration::ZERO);
    assert_eq!(client.call(RESET, &[]), Err(EINVAL));
    rig.start(3);
    assert_eq!(client.call(RESET, &[]), Ok(vec![]));
    let resets = rig.device().deeds().iter().filter(|deed| **deed == Deed::Reset).count();
    assert_eq!(resets, 3);
    drop(client);
}

#[test]
fn features_that_do_not_exist_are_refused() {
    let (_rig, mut client) = greeted();
    let get = |feature: u32| fields!(16_u32, feature | 1 << 16, 0_u64);
    for feature in [0, 3, 4, 5, 10, 11, 12, 13, 14, 0xffff] {
        assert_eq!(client.call(FEATURE, &get(feature)), Err(EINVAL), "{feature}");
    }
    assert_eq!(client.call(FEATURE, &[0; 7]), Err(EINVAL));
    drop(client);
}

#[test]
fn an_answer_is_one_reply_for_each_of_many_commands_in_flight() {
    let (_rig, mut client) = greeted();
    for id in 0..500_u16 {
        let offset = u64::from(id) * 4;
        client.send(&message(id, REGION_READ, 0, &access(REGISTERS, 0x200 + offset, 4)), &[]);
    }
    for id in 0..500_u16 {
        let Answer { id: answered, body, .. } = client.receive();
        assert_eq!(answered, id);
        assert_eq!(words(&body[16..]), [0x200 + u32::from(id) * 4]);
    }
    drop(client);
}
