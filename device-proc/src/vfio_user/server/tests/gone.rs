//! Clients that go in the middle of something: what they had sent counts, and the next one is served.

use super::client::{Client, POSTED, access, message, write_body};
use super::edge::{until, wrote};
use super::requests::{reading, request};
use crate::fields;
use crate::memory::{DmaError, MessageError, Span};
use crate::vfio_user::rig::{COUNT, Deed, MEMORY, REGISTERS, Rig, SLOW};
use std::io::Read;

const DMA_MAP: u16 = 2;
const DMA_UNMAP: u16 = 3;
const REGION_READ: u16 = 9;
const DMA_READ: u16 = 11;
const REGION_WRITE: u16 = 10;
const RESET: u16 = 13;

#[test]
fn posted_writes_behind_a_command_take_effect_although_nobody_reads_its_reply() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    rig.device().hold();
    client.send(&message(1, REGION_READ, 0, &access(REGISTERS, SLOW, 4)), &[]);
    rig.device().until_held();
    let mut bytes = Vec::new();
    for value in 0..3_u32 {
        bytes.extend(message(2, REGION_READ, 0, &access(REGISTERS, COUNT, 4)));
        let body = write_body(REGISTERS, 0, &value.to_le_bytes());
        bytes.extend(message(3, REGION_WRITE, POSTED, &body));
    }
    bytes.extend(message(4, RESET, 0, &[]));
    client.send(&bytes, &[]);
    drop(client);
    rig.device().let_through();
    let mut client = Client::greeted(rig.connect());
    assert_eq!(client.read(REGISTERS, COUNT), Ok(3));
    assert_eq!(wrote(&rig), [0, 1, 2]);
    assert_eq!(rig.device().deeds().last(), Some(&Deed::Reset));
    drop(client);
}

#[test]
fn what_was_read_while_a_command_waits_takes_effect_although_the_client_goes_meanwhile() {
    let rig = Rig::new();
    let mut client = Client::greeted(rig.connect());
    for iova in [0x1_0000_u64, 0x2_0000] {
        client.call(DMA_MAP, &fields!(32_u32, 3_u32, 0_u64, iova, 0x1_0000_u64)).unwrap();
    }
    let dma = rig.device().handles.dma.clone();
    let used = dma.access(&[Span::read(0x1_0000, 8)]).unwrap();
    let read = reading(&rig, 0x2_0000, 8);
    request(&mut client, DMA_READ);
    let unmap = fields!(24_u32, 0_u32, 0x1_0000_u64, 0x1_0000_u64);
    client.send(&message(1, DMA_UNMAP, 0, &unmap), &[]);
    until("the window is being unmapped", || dma.classify(0x1_0000, 8).is_none());
    (0..3).for_each(|value| client.post_write(REGISTERS, 0, value));
    drop(client);
    // Told while the command still waits.
    let source = MessageError::Gone;
    assert_eq!(read.join().unwrap(), Err(DmaError::Message { iova: 0x2_0000, len: 8, source }));
    drop(used);
    let mut client = Client::greeted(rig.connect());
    assert_eq!(client.read(REGISTERS, COUNT), Ok(3));
    assert_eq!(rig.parts.memory.windows(), 0);
    drop(client);
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_reply_leaves_the_server_to_the_next() {
    let rig = Rig::new();
    for _ in 0..5 {
        let mut client = Client::greeted(rig.connect());
        let long = access(MEMORY, 0, 64 << 10);
        (0..64).for_each(|id| client.send(&message(id, REGION_READ, 0, &long), &[]));
        client.stream.read_exact(&mut [0; 100]).unwrap();
        drop(client);
    }
    let mut client = Client::greeted(rig.connect());
    assert_eq!(client.read(REGISTERS, COUNT), Ok(0));
    drop(client);
}
