//! DMA by messages to a client, and what else goes on meanwhile.

use super::client::{Answer, Client, access, message};
use crate::fields;
use crate::memory::{Dma, DmaError, MessageError, Span};
use crate::vfio_user::rig::{COUNT, Deed, REGISTERS, Rig};
use rustix::io::Errno;
use standstill_protocol::migration::MigrationState as S;
use std::thread::JoinHandle;
use std::time::Duration;

const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const REGION_READ: u16 = 9;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
const RESET: u16 = 13;
const FEATURE: u16 = 16;

/// A client with 64 KiB at 0x10000 that can be reached by messages alone.
fn with_window() -> (Rig, Client) {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    client.call(DMA_MAP, &fields!(32_u32, 3_u32, 0_u64, 0x1_0000_u64, 0x1_0000_u64)).unwrap();
    (rig, client)
}

fn dma(rig: &Rig) -> Dma {
    rig.device().handles.dma.clone()
}

pub(super) fn reading(
    rig: &Rig,
    iova: u64,
    length: usize,
) -> JoinHandle<Result<Vec<u8>, DmaError>> {
    let dma = dma(rig);
    std::thread::spawn(move || {
        let mut data = vec![0; length];
        let access = dma.access(&[Span::read(iova, length as u64)])?;
        access.read(0, 0, &mut data).map(|()| data)
    })
}

fn writing(rig: &Rig, iova: u64, data: &'static [u8]) -> JoinHandle<Result<(), DmaError>> {
    let dma = dma(rig);
    std::thread::spawn(move || {
        dma.access(&[Span::write(iova, data.len() as u64)])?.write(0, 0, data)
    })
}

/// The next message, which is a request: its id and its body.
pub(super) fn request(client: &mut Client, command: u16) -> (u16, Vec<u8>) {
    let Answer { id, command: asked, flags, body, .. } = client.receive();
    assert_eq!((asked, flags), (command, 0));
    (id, body)
}

fn reply(client: &mut Client, id: u16, command: u16, body: &[u8]) {
    client.send(&message(id, command, 1, body), &[]);
}

fn answer_read(client: &mut Client, id: u16, asked: &[u8], byte: u8) {
    let count = u64::from_ne_bytes(asked[8..16].try_into().unwrap());
    let mut body = asked.to_vec();
    body.resize(16 + usize::try_from(count).unwrap(), byte);
    reply(client, id, DMA_READ, &body);
}

#[test]
fn a_device_reads_and_writes_what_the_client_has_no_fd_of() {
    let (rig, mut client) = with_window();
    let read = reading(&rig, 0x1_0010, 8);
    let (id, asked) = request(&mut client, DMA_READ);
    assert_eq!(asked, fields!(0x1_0010_u64, 8_u64));
    assert!(client.read(REGISTERS, COUNT).is_ok(), "other things go on between");
    answer_read(&mut client, id, &asked, 7);
    assert_eq!(read.join().unwrap(), Ok(vec![7; 8]));

    let write = writing(&rig, 0x1_0020, b"abcd");
    let (id, asked) = request(&mut client, DMA_WRITE);
    let mut expected = fields!(0x1_0020_u64, 4_u64);
    expected.extend(b"abcd");
    assert_eq!(asked, expected);
    reply(&mut client, id, DMA_WRITE, &asked[..16]);
    assert_eq!(write.join().unwrap(), Ok(()));
    drop(client);
}

#[test]
fn several_requests_are_in_flight_and_answered_in_any_order() {
    let (rig, mut client) = with_window();
    let reads: Vec<_> = (1..9_u8).map(|at| reading(&rig, 0x1_0000 + u64::from(at), 1)).collect();
    let mut asked: Vec<_> = (0..reads.len()).map(|_| request(&mut client, DMA_READ)).collect();
    asked.reverse();
    for (id, body) in asked {
        let byte = body[0];
        answer_read(&mut client, id, &body, byte);
    }
    for (read, at) in reads.into_iter().zip(1..) {
        assert_eq!(read.join().unwrap(), Ok(vec![at]));
    }
    drop(client);
}

#[test]
fn what_the_client_refuses_or_answers_wrongly_is_an_error_of_the_device() {
    let (rig, mut client) = with_window();
    let failed = |iova: u64, source: MessageError| Err(DmaError::Message { iova, len: 8, source });
    let read = reading(&rig, 0x1_0000, 8);
    let (id, _) = request(&mut client, DMA_READ);
    client.send(
        &{
            let mut refused = message(id, DMA_READ, 0x21, &[]);
            refused[12..16].copy_from_slice(&19_u32.to_ne_bytes());
            refused
        },
        &[],
    );
    assert_eq!(read.join().unwrap(), failed(0x1_0000, MessageError::Refused(Errno::NODEV)));
    for wrong in [
        vec![],
        fields!(0x1_0000_u64, 8_u64),
        fields!(0x1_0000_u64, 8_u64, 1_u32),
        fields!(0x1_0008_u64, 8_u64, 1_u64),
        fields!(0x1_0000_u64, u64::MAX, 1_u64),
    ] {
        let read = reading(&rig, 0x1_0000, 8);
        let (id, _) = request(&mut client, DMA_READ);
        reply(&mut client, id.wrapping_add(1), DMA_READ, &fields!(0x1_0000_u64, 8_u64, 1_u64));
        reply(&mut client, id, DMA_WRITE, &fields!(0x1_0000_u64, 8_u64));
        reply(&mut client, id, DMA_READ, &wrong);
        let answer = read.join().unwrap();
        assert_eq!(answer, failed(0x1_0000, MessageError::Refused(Errno::PROTO)), "{wrong:?}");
    }
    drop(client);
}

#[test]
fn a_late_reply_is_not_taken_for_another() {
    let (rig, mut client) = with_window();
    let read = reading(&rig, 0x1_0000, 8);
    let (late, asked) = request(&mut client, DMA_READ);
    let source = MessageError::TimedOut;
    assert_eq!(read.join().unwrap(), Err(DmaError::Message { iova: 0x1_0000, len: 8, source }));
    let read = reading(&rig, 0x1_0000, 8);
    let (id, again) = request(&mut client, DMA_READ);
    assert_ne!(id, late);
    answer_read(&mut client, late, &asked, 1);
    answer_read(&mut client, id, &again, 2);
    assert_eq!(read.join().unwrap(), Ok(vec![2; 8]));
    drop(client);
}

#[test]
fn a_client_that_goes_leaves_nobody_waiting() {
    let (rig, mut client) = with_window();
    let read = reading(&rig, 0x1_0000, 8);
    request(&mut client, DMA_READ);
    drop(client);
    let source = MessageError::Gone;
    assert_eq!(read.join().unwrap(), Err(DmaError::Message { iova: 0x1_0000, len: 8, source }));
    let mut client = Client::greeted(rig.connect());
    assert!(client.read(REGISTERS, COUNT).is_ok());
    drop(client);
}

#[test]
fn an_unmapping_and_a_reset_wait_for_no_reply_of_a_client_that_waits_for_them() {
    let (rig, mut client) = with_window();
    let failed = |source: MessageError| Err(DmaError::Message { iova: 0x1_0000, len: 8, source });
    for unmap in
        [fields!(24_u32, 0_u32, 0x1_0000_u64, 0x1_0000_u64), fields!(24_u32, 2_u32, 0_u64, 0_u64)]
    {
        let read = reading(&rig, 0x1_0000, 8);
        let (late, asked) = request(&mut client, DMA_READ);
        client.send(&message(50, DMA_UNMAP, 0, &unmap), &[]);
        client.send(&message(51, REGION_READ, 0, &access(REGISTERS, COUNT, 4)), &[]);
        let answers = [client.receive(), client.receive()].map(|answer| (answer.id, answer.flags));
        assert_eq!(answers, [(50, 1), (51, 1)], "in order");
        assert_eq!(read.join().unwrap(), failed(MessageError::Unmapping));
        assert_eq!(rig.parts.memory.windows(), 0);
        answer_read(&mut client, late, &asked, 3);
        let map = fields!(32_u32, 3_u32, 0_u64, 0x1_0000_u64, 0x1_0000_u64);
        client.call(DMA_MAP, &map).unwrap();
    }
    let read = reading(&rig, 0x1_0000, 8);
    let (late, asked) = request(&mut client, DMA_READ);
    assert_eq!(client.call(RESET, &[]), Ok(vec![]));
    assert_eq!(read.join().unwrap(), failed(MessageError::Resetting));
    answer_read(&mut client, late, &asked, 4);
    let read = reading(&rig, 0x1_0000, 8);
    let (id, asked) = request(&mut client, DMA_READ);
    answer_read(&mut client, id, &asked, 5);
    assert_eq!(read.join().unwrap(), Ok(vec![5; 8]), "as before");
    drop(client);
}

fn set_state(state: S) -> Vec<u8> {
    fields!(16_u32, 2_u32 | 1 << 17, state.value(), u32::MAX)
}

#[test]
fn a_stop_in_band_waits_for_the_replies_that_come_behind_it() {
    let (rig, mut client) = with_window();
    let read = reading(&rig, 0x1_0000, 8);
    let (id, asked) = request(&mut client, DMA_READ);
    let body = set_state(S::RunningP2p);
    client.send(&message(60, FEATURE, 0, &body), &[]);
    client.post_write(REGISTERS, 0, 1);
    answer_read(&mut client, id, &asked, 4);
    assert_eq!(client.receive().result(), Ok(body));
    assert_eq!(read.join().unwrap(), Ok(vec![4; 8]));

    // It waits at the gate until the start, and asks as soon as it is open.
    let read = reading(&rig, 0x1_0000, 8);
    client.send(&message(61, FEATURE, 0, &set_state(S::Running)), &[]);
    let mut both = [client.receive(), client.receive()];
    both.sort_by_key(|message| message.flags);
    let [asked, answer] = both;
    assert_eq!((asked.command, answer.id), (DMA_READ, 61));
    answer_read(&mut client, asked.id, &asked.body, 5);
    assert_eq!(read.join().unwrap(), Ok(vec![5; 8]));
    assert_eq!(rig.device().deeds(), [Deed::Wrote(0, 1), Deed::Started]);
    drop(client);
}

#[test]
fn the_first_step_of_a_stop_waits_for_what_was_asked() {
    let (rig, mut client) = with_window();
    let read = reading(&rig, 0x1_0000, 8);
    let (id, asked) = request(&mut client, DMA_READ);
    rig.command(2, standstill_protocol::message::Phase::PrepareStop, S::RunningP2p, Duration::ZERO);
    answer_read(&mut client, id, &asked, 5);
    assert!(matches!(rig.answer(), standstill_protocol::message::DeviceMessage::Reached(_)));
    assert_eq!(read.join().unwrap(), Ok(vec![5; 8]));
    drop(client);
}

#[test]
fn commands_that_come_meanwhile_keep_their_order_however_many() {
    let (rig, mut client) = with_window();
    let dma = dma(&rig);
    let used = dma.access(&[Span::read(0x1_0000, 8)]).unwrap();
    let unmap = fields!(24_u32, 0_u32, 0x1_0000_u64, 0x1_0000_u64);
    client.send(&message(1, DMA_UNMAP, 0, &unmap), &[]);
    for value in 0..600 {
        client.post_write(REGISTERS, 0, value);
    }
    client.send(&message(2, 99, 0, &[]), &[]);
    client.send(&message(3, REGION_READ, 7, &[]), &[]);
    drop(used);
    let answers = [client.receive(), client.receive(), client.receive()];
    assert_eq!(answers.map(|answer| (answer.id, answer.error)), [(1, 0), (2, 22), (3, 22)]);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(600));
    let expected: Vec<_> = (0..600).map(|value| Deed::Wrote(0, value)).collect();
    assert_eq!(rig.device().deeds(), expected);
    drop(client);
}

#[test]
fn beyond_what_waits_nothing_is_read_and_nothing_is_lost_but_a_late_reply() {
    let (rig, mut client) = with_window();
    let map = fields!(32_u32, 3_u32, 0_u64, 0x2_0000_u64, 0x1_0000_u64);
    client.call(DMA_MAP, &map).unwrap();
    let dma = dma(&rig);
    let used = dma.access(&[Span::read(0x1_0000, 8)]).unwrap();
    let read = reading(&rig, 0x2_0000, 8);
    let (id, asked) = request(&mut client, DMA_READ);
    let unmap = fields!(24_u32, 0_u32, 0x1_0000_u64, 0x1_0000_u64);
    client.send(&message(1, DMA_UNMAP, 0, &unmap), &[]);
    // One by one: each has a place of its own in the socket, which is small.
    let writer = client.stream.try_clone().unwrap();
    let writing = std::thread::spawn(move || {
        let mut client = Client::raw(writer);
        (0..1500).for_each(|value| client.post_write(REGISTERS, 0, value));
        answer_read(&mut client, id, &asked, 6);
    });
    let source = MessageError::TimedOut;
    assert_eq!(read.join().unwrap(), Err(DmaError::Message { iova: 0x2_0000, len: 8, source }));
    drop(used);
    writing.join().unwrap();
    assert_eq!(client.receive().id, 1);
    assert_eq!(client.read(REGISTERS, COUNT), Ok(1500));
    let expected: Vec<_> = (0..1500).map(|value| Deed::Wrote(0, value)).collect();
    assert_eq!(rig.device().deeds(), expected);
    drop(client);
}
