//! Peers that break the protocol or die.

#![forbid(unsafe_code)]

use super::*;
use rustix::net::{Shutdown, send, shutdown};

/// A raw packet, past all checks of ours.
fn send_raw(to: &impl AsFd, packet: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut room = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(fds.len()))];
    let mut control = SendAncillaryBuffer::new(&mut room);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    sendmsg(to, &[IoSlice::new(packet)], &mut control, SendFlags::NOSIGNAL).unwrap();
}

fn packet<M: Message>(message: &M) -> Vec<u8> {
    Frame::new(message, 1).unwrap().as_bytes().to_vec()
}

#[test]
fn an_empty_packet_is_an_error_and_not_the_end() {
    let (coordinator, device) = connected();
    send(&device, &[], SendFlags::empty()).unwrap();
    device.try_send(&heartbeat(1), &[]).unwrap();
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Empty)));
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(1));
}

#[test]
fn an_empty_packet_before_a_dead_peers_last_message_hides_nothing() {
    let (coordinator, device) = connected();
    send(&device, &[], SendFlags::empty()).unwrap();
    device.try_send(&heartbeat(1), &[]).unwrap();
    drop(device);
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Empty)));
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(1));
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Disconnected)));
}

#[test]
fn fds_of_an_empty_packet_are_closed() {
    let (coordinator, device) = connected();
    let file = Marked::new("empty");
    send_raw(&device, &[], &[file.file.as_fd(); 3]);
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Empty)));
    assert_eq!(file.open_fds(), 1);
}

#[test]
fn an_oversized_packet_is_refused_with_its_length() {
    let (coordinator, device) = connected();
    for length in [MAX_PACKET + 1, 100_000] {
        let file = Marked::new("oversized");
        send_raw(&device, &vec![0; length], &[file.file.as_fd()]);
        let error = coordinator.try_recv().unwrap_err();
        assert!(matches!(error, RecvError::Oversized { length: l } if l == length), "{error}");
        assert_eq!(file.open_fds(), 1);
    }
    // Exactly the longest is not oversized, only nonsense.
    send_raw(&device, &[0; MAX_PACKET], &[]);
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Decode(_))));
}

#[test]
fn garbage_and_truncated_messages_are_refused_and_their_fds_closed() {
    let (coordinator, device) = connected();
    let file = Marked::new("garbage");
    let good = packet(&hello(1));
    for bad in [&b"garbage, and not even a header"[..], &good[..good.len() - 1], &good[..4]] {
        send_raw(&device, bad, &[file.file.as_fd()]);
        assert!(matches!(coordinator.try_recv(), Err(RecvError::Decode(_))));
        assert_eq!(file.open_fds(), 1);
    }
    // Each was refused whole: the next message is received.
    device.try_send(&heartbeat(1), &[]).unwrap();
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(1));
}

#[test]
fn more_or_fewer_fds_than_announced_are_refused_and_closed() {
    let (coordinator, device) = connected();
    let file = Marked::new("announced");
    let fd = file.file.as_fd();
    for (message, announced, sent) in
        [(hello(2), 2, 1), (hello(2), 2, 3), (hello(0), 0, 1), (heartbeat(1), 0, 16)]
    {
        send_raw(&device, &packet(&message), &vec![fd; sent]);
        let error = coordinator.try_recv().unwrap_err();
        let RecvError::Fds { announced: a, received, .. } = error else { panic!("{error:?}") };
        assert_eq!((a, received), (announced, sent));
        assert_eq!(file.open_fds(), 1);
    }
}

#[test]
fn more_fds_than_any_message_has_are_refused_and_leave_none_open() {
    let (coordinator, device) = connected();
    let file = Marked::new("flood");
    // 253 is what the kernel lets pass at once.
    for count in [MAX_FDS + 1, MAX_FDS + 2, 32, 253] {
        send_raw(&device, &packet(&hello(16)), &vec![file.file.as_fd(); count]);
        let error = coordinator.try_recv().unwrap_err();
        assert!(matches!(error, RecvError::FdsTruncated { .. }), "{count}: {error:?}");
        assert_eq!(file.open_fds(), 1, "after {count}");
    }
}

#[test]
fn a_dead_peers_queued_answer_is_received_before_the_end() {
    let (coordinator, device) = connected();
    device.try_send(&heartbeat(1), &[]).unwrap();
    device.try_send(&heartbeat(2), &[]).unwrap();
    drop(device);
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(1));
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(2));
    for _ in 0..2 {
        assert!(matches!(coordinator.try_recv(), Err(RecvError::Disconnected)));
    }
    let error = coordinator.try_send(&command(Phase::Stop, 1), &[]).unwrap_err();
    assert!(matches!(error, SendError::Disconnected));
}

#[test]
fn a_peer_that_dies_with_unread_messages_still_has_its_answers_received() {
    let (coordinator, device) = connected();
    coordinator.try_send(&command(Phase::Stop, 1), &[]).unwrap();
    device.try_send(&heartbeat(1), &[]).unwrap();
    // The kernel now gives ECONNRESET ahead of the queued message.
    drop(device);
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(1));
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Disconnected)));
}

#[test]
fn the_reset_of_that_case_is_real() {
    let (coordinator, device) = connected();
    coordinator.try_send(&command(Phase::Stop, 1), &[]).unwrap();
    device.try_send(&heartbeat(1), &[]).unwrap();
    drop(device);
    let first = rustix::net::recv(&coordinator, &mut [0_u8; 8], RecvFlags::DONTWAIT);
    assert_eq!(first.map(|_| ()), Err(Errno::CONNRESET));
}

#[test]
fn a_peer_that_only_shuts_its_writing_down_is_gone() {
    let (coordinator, device) = connected();
    device.try_send(&heartbeat(1), &[]).unwrap();
    shutdown(&device, Shutdown::Write).unwrap();
    assert_eq!(coordinator.try_recv().unwrap().unwrap().message, heartbeat(1));
    assert!(matches!(coordinator.try_recv(), Err(RecvError::Disconnected)));
}

#[test]
fn a_peer_that_never_reads_makes_sending_would_block() {
    let (coordinator, device) = connected();
    let frame = Frame::new(&command(Phase::Stop, 1), 1).unwrap();
    let mut sent = 0;
    let error = loop {
        match coordinator.try_send_frame(&frame, &[]) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 1_000_000, "a peer that never reads takes everything");
    };
    assert!(matches!(error, SendError::WouldBlock), "{error}");
    // Nothing of it is lost.
    for _ in 0..sent {
        assert!(device.try_recv().unwrap().is_some());
    }
    assert!(device.try_recv().unwrap().is_none());
    coordinator.try_send_frame(&frame, &[]).unwrap();
}
