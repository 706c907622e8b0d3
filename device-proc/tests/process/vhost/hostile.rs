//! Frontends that say what they like: at worst they lose their connection.

use super::guest::{Guest, Memory};
use crate::child::{Device, PATIENCE};
use fastrand::Rng;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState as S;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The numbers of the frontend's messages, with the lengths of their bodies in words of 8 bytes.
const MESSAGES: [(u32, usize); 31] = [
    (1, 0),  // GET_FEATURES
    (2, 1),  // SET_FEATURES
    (3, 0),  // SET_OWNER
    (4, 0),  // RESET_OWNER
    (5, 5),  // SET_MEM_TABLE of one region
    (6, 2),  // SET_LOG_BASE
    (7, 0),  // SET_LOG_FD
    (8, 1),  // SET_VRING_NUM
    (9, 5),  // SET_VRING_ADDR
    (10, 1), // SET_VRING_BASE
    (11, 1), // GET_VRING_BASE
    (12, 1), // SET_VRING_KICK
    (13, 1), // SET_VRING_CALL
    (14, 1), // SET_VRING_ERR
    (15, 0), // GET_PROTOCOL_FEATURES
    (16, 1), // SET_PROTOCOL_FEATURES
    (17, 0), // GET_QUEUE_NUM
    (18, 1), // SET_VRING_ENABLE
    (20, 1), // NET_SET_MTU
    (21, 0), // SET_BACKEND_REQ_FD
    (24, 3), // GET_CONFIG
    (25, 3), // SET_CONFIG
    (31, 2), // GET_INFLIGHT_FD
    (34, 0), // RESET_DEVICE
    (36, 0), // GET_MAX_MEM_SLOTS
    (37, 5), // ADD_MEM_REG
    (38, 5), // REM_MEM_REG
    (39, 1), // SET_STATUS
    (42, 1), // SET_DEVICE_STATE_FD
    (43, 0), // CHECK_DEVICE_STATE
    (99, 1), // none
];

/// Two numbers of 32 bits, or one of 64, as they could stand in a message.
fn word(random: &mut Rng) -> u64 {
    match random.u8(..8) {
        0..=2 => random.u64(..3) | random.u64(..3) << 32,
        3 => random.u64(..3) | 16 << 32,
        4 => 0x1000 * random.u64(..16),
        5 => 1 << 32 | 1 << 30 | random.u64(..2) << 26,
        6 => u64::MAX - random.u64(..0x2000),
        _ => random.u64(..),
    }
}

/// A message that is right in its form, and has anything in it; whether a file belongs to it.
fn message(random: &mut Rng, address: u64) -> (Vec<u8>, bool) {
    let (request, words) = MESSAGES[random.usize(..MESSAGES.len())];
    let mut body: Vec<_> = (0..words).map(|_| word(random)).collect();
    if words == 5 && random.u8(..4) > 0 {
        // As it could be: for one region, or a ring.
        let at = address + 0x1000 * random.u64(..4);
        let region = [1, 0x1000 * random.u64(..64), 0x1000, address, 0];
        body = if request == 9 { vec![random.u64(..2), at, at, at, 0] } else { region.to_vec() };
    }
    let body: Vec<u8> = body.into_iter().flat_map(u64::to_le_bytes).collect();
    let flags = 1 | u32::from(random.bool()) << 3;
    let header = [request, flags, u32::try_from(body.len()).unwrap()];
    let bytes = header.into_iter().flat_map(u32::to_le_bytes).chain(body).collect();
    let has_file = matches!(request, 5 | 6 | 7 | 12 | 13 | 14 | 21 | 37 | 42);
    (bytes, has_file != (random.u8(..10) == 0))
}

/// Sends it, with a file or without; false once nobody reads any more.
fn send(stream: &UnixStream, bytes: &[u8], file: Option<&OwnedFd>) -> bool {
    let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    sendmsg(stream, &[IoSlice::new(bytes)], &mut control, flags).is_ok()
}

/// Some of it as a frontend that has just connected, some as one that was served.
fn misbehave(device: &Device, seed: u64) {
    let mut random = Rng::with_seed(seed);
    let guest = match seed % 3 {
        0 => Guest::connect(&device.socket(), Memory::new(2)),
        _ => Guest::start(&device.socket(), 2),
    };
    let address = guest.memory.address();
    for _ in 0..random.usize(..12) {
        if random.u8(..4) == 0 {
            guest.memory.scribble(&mut random);
            (0..2).for_each(|queue| guest.kick(queue));
        }
        let memory = memfd_create("hostile", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&memory, 0x10000).unwrap();
        let eventfd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let (bytes, has_file) = message(&mut random, address);
        let file = if matches!(bytes[0], 12..=14) { &eventfd } else { &memory };
        if !send(guest.stream(), &bytes, has_file.then_some(file)) {
            break;
        }
    }
    // Some go on to the end of what they had to say, others break off.
    if random.bool() {
        let mut stream = guest.stream();
        stream.shutdown(Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // It may have been cut off with something unread.
        let _ = stream.read_to_end(&mut Vec::new());
    }
}

#[test]
fn a_device_outlives_whatever_is_sent_to_it() {
    for script in ["vhost queues:2 in-order", "vhost later queues:2 threads"] {
        let device = Device::welcomed(script);
        for seed in 0..100 {
            misbehave(&device, seed);
        }
        device.pause(1);
        // Whatever its backend has found in the rings: it begins anew.
        device.go(2, Phase::PrepareStart, S::RunningP2p);
        device.go(2, Phase::Start, S::Running);
        device.go(3, Phase::Reset, S::Running);
        let mut guest = Guest::start(&device.socket(), 2);
        guest.push(1);
        guest.wait_used(1, 1);
        device.shut_down();
    }
}
