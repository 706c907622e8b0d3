//! What was agreed on with the version counts for what comes later.

use super::client::*;
use super::migration::set;
use crate::fields;
use crate::memory::{DmaError, Span};
use crate::vfio_user::rig::*;
use standstill_protocol::migration::MigrationState as S;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const GET_INFO: u16 = 4;
const GET_REGION_INFO: u16 = 5;
const GET_IRQ_INFO: u16 = 7;
const SET_IRQS: u16 = 8;
const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;
const FEATURE: u16 = 16;
const MIG_DATA_READ: u16 = 17;
const MIG_DATA_WRITE: u16 = 18;
const EINVAL: u32 = 22;

/// A client that takes so many bytes in one transfer.
fn with_limit(rig: &Rig, bytes: u32) -> Client {
    let mut client = Client::raw(rig.connect());
    let json = format!(r#"{{"capabilities":{{"max_data_xfer_size":{bytes}}}}}"#);
    client.call(VERSION, &version(&json)).unwrap();
    client
}

/// 64 KiB at 0x10000, without an fd.
fn map(client: &mut Client) {
    client.call(DMA_MAP, &fields!(32_u32, 3_u32, 0_u64, 0x1_0000_u64, 0x1_0000_u64)).unwrap();
}

#[test]
fn no_dma_by_message_is_longer_than_the_client_takes() {
    let rig = Rig::new();
    let mut client = with_limit(&rig, 1024);
    map(&mut client);
    let dma = rig.device().handles.dma.clone();
    let done = std::thread::spawn(move || {
        let mut data = vec![0; 4096];
        let access = dma.access(&[Span::read_write(0x1_0100, 4096)])?;
        access.read(0, 0, &mut data)?;
        access.write(0, 0, &data)?;
        Ok::<_, DmaError>(data)
    });
    let mut asked = [0, 0];
    while asked != [4096, 4096] {
        let Answer { id, command, body, .. } = client.receive();
        let iova = u64::from_ne_bytes(body[..8].try_into().unwrap());
        let count = u64::from_ne_bytes(body[8..16].try_into().unwrap());
        assert!(count <= 1024, "{count} bytes");
        let (so_far, mut reply) = match command {
            DMA_READ => {
                (&mut asked[0], [&body[..16], &vec![0; usize::try_from(count).unwrap()]].concat())
            }
            DMA_WRITE => (&mut asked[1], body[..16].to_vec()),
            other => panic!("{other}"),
        };
        assert_eq!(iova, 0x1_0100 + *so_far, "in order");
        *so_far += count;
        if command == DMA_READ {
            reply[16..].fill(iova.to_ne_bytes()[1]);
        } else {
            assert!(body[16..].iter().all(|byte| *byte == iova.to_ne_bytes()[1]));
        }
        client.send(&message(id, command, 1, &reply), &[]);
    }
    assert_eq!(done.join().unwrap().map(|data| data.len()), Ok(4096));
    drop(client);
}

#[test]
fn a_handler_that_wants_dma_by_message_is_refused_and_nothing_is_sent() {
    let rig = Rig::new();
    let mut client = with_limit(&rig, 1 << 20);
    map(&mut client);
    client.write(REGISTERS, READS_BY_MESSAGE, 0x1_0000).unwrap();
    let ended = rig.device().read_by_message.lock().unwrap().take().unwrap();
    let Err(DmaError::InHandler { .. }) = ended else {
        panic!("{ended:?}");
    };
    // The next thing that comes is the reply to this.
    assert!(client.read(REGISTERS, COUNT).is_ok());
    drop(client);
}

#[test]
fn no_piece_of_a_state_is_longer_than_was_agreed() {
    let rig = Rig::new();
    let mut client = with_limit(&rig, 4096);
    set(&mut client, S::StopCopy).unwrap();
    assert_eq!(client.call(MIG_DATA_READ, &fields!(8_u32 + 4097, 4097_u32)), Err(EINVAL));
    assert!(client.call(MIG_DATA_READ, &fields!(8_u32 + 4096, 4096_u32)).is_ok());
    set(&mut client, S::Resuming).unwrap();
    let piece = |size: u32| {
        let mut body = fields!(8 + size, size);
        body.resize(usize::try_from(8 + size).unwrap(), 0);
        body
    };
    assert_eq!(client.call(MIG_DATA_WRITE, &piece(4097)), Err(EINVAL));
    let behind = [piece(16), vec![0]].concat();
    assert_eq!(
        client.call(MIG_DATA_WRITE, &behind),
        Ok(vec![]),
        "what is behind it does not count"
    );
    drop(client);
}

#[test]
fn no_second_socket_is_given_to_whoever_asks_for_one() {
    let rig = Rig::new();
    let mut client = Client::raw(rig.connect());
    let json = r#"{"capabilities":{"twin_socket":{"supported":true}}}"#;
    client.send(&message(1, VERSION, 0, &version(json)), &[]);
    let (answer, fds) = client.receive_with_fds();
    assert!(fds.is_empty());
    let json = String::from_utf8(answer.result().unwrap()[4..].to_vec()).unwrap();
    assert!(!json.contains("twin_socket"), "{json}");
    drop(client);
}

#[test]
fn the_page_size_of_a_log_is_what_can_be_had() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    for (wanted, had) in [(512_u64, 4096_u64), (4096, 4096), (1 << 16, 1 << 16), (1 << 40, 1 << 30)]
    {
        let body = fields!(24_u32, 6_u32 | 1 << 17, wanted, 0_u32, 0_u32);
        let reply = client.call(FEATURE, &body).unwrap();
        assert_eq!(reply[8..16], had.to_ne_bytes(), "{wanted}");
        client.call(FEATURE, &fields!(8_u32, 7_u32 | 1 << 17)).unwrap();
    }
    drop(client);
}

#[test]
fn a_stopped_device_answers_all_questions() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    let ram = tempfile::tempfile().unwrap();
    ram.set_len(1 << 16).unwrap();
    let ram = OwnedFd::from(ram);
    rig.stop(2, Duration::ZERO);
    for state in [S::Running, S::Stop, S::StopCopy, S::Stop] {
        set(&mut client, state).unwrap();
        client.call(GET_INFO, &fields!(16_u32, 0_u32, 0_u32, 0_u32)).unwrap();
        client.call(GET_REGION_INFO, &fields!(32_u32, 0_u32, 2_u32, 0_u32, 0_u64, 0_u64)).unwrap();
        client.call(GET_IRQ_INFO, &fields!(16_u32, 0_u32, 2_u32, 0_u32)).unwrap();
        // Eventfds of no vector: none any more.
        client.call(SET_IRQS, &fields!(20_u32, 1_u32 | 1 << 5, 2_u32, 0_u32, 0_u32)).unwrap();
        let window = fields!(32_u32, 3_u32, 0_u64, 0x1_0000_u64, 1_u64 << 16);
        client.call_with(DMA_MAP, &window, &[ram.as_fd()]).unwrap();
        client.call(DMA_UNMAP, &fields!(24_u32, 0_u32, 0x1_0000_u64, 1_u64 << 16)).unwrap();
    }
    drop(client);
}
