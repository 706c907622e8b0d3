//! What was agreed is kept to.

use super::*;
use crate::wire::irq::{ACTION_TRIGGER, DATA_EVENTFD};
use crate::wire::{SetIrqs, SmallWrite, WireError, WriteMulti};
use std::fs::File;

/// A client whose server can do only so much.
fn small<R>(script: impl FnOnce(&mut Peer) + Send, run: impl FnOnce(Client) -> R) -> R {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(theirs);
            peer.welcome(&Capabilities {
                max_msg_fds: Some(2),
                max_data_xfer_size: Some(100),
                write_multiple: Some(false),
                ..capabilities()
            });
            script(&mut peer);
        });
        run(Client::builder().timeout(PATIENCE).start(ours).expect("a client"))
    })
}

#[test]
fn long_accesses_are_cut() {
    let script = |peer: &mut Peer| {
        for (byte, offset, count) in [(1, 0x10, 100), (2, 0x74, 100), (3, 0xd8, 50)] {
            let (header, body, _) = peer.expect(Command::RegionRead);
            let access = RegionAccess::decode_plain(&body, 100).expect("an access");
            assert_eq!(access, RegionAccess { offset, region: 1, count });
            peer.answer(&header, &read_answer(&body, byte));
        }
        for _ in 0..2 {
            let mut written = Vec::new();
            for (offset, count) in [(0x10, 100), (0x74, 100), (0xd8, 50)] {
                let (header, body, _) = peer.expect(Command::RegionWrite);
                let (access, data) = RegionAccess::decode_with_data(&body, 100).expect("an access");
                assert_eq!(access, RegionAccess { offset, region: 1, count });
                written.extend_from_slice(data);
                if header.wants_reply() {
                    peer.answer(&header, &body[..16]);
                }
            }
            assert_eq!(written, (0..250).collect::<Vec<u8>>());
        }
    };
    small(script, |client| {
        let mut data = vec![0; 250];
        client.region_read(1, 0x10, &mut data).expect("read");
        assert_eq!(data, [vec![1; 100], vec![2; 100], vec![3; 50]].concat());
        let data: Vec<u8> = (0..250).collect();
        client.region_write(1, 0x10, &data).expect("written");
        client.region_write_posted(1, 0x10, &data).expect("sent");
    });
}

#[test]
fn nothing_to_read_or_write_is_no_message() {
    small(Peer::expect_end, |client| {
        client.region_read(0, 0, &mut []).expect("nothing");
        client.region_write(0, 0, &[]).expect("nothing");
    });
}

#[test]
fn fds_are_installed_as_the_server_takes_them() {
    let script = |peer: &mut Peer| {
        for (start, count) in [(3, 2), (5, 2), (7, 1)] {
            let (header, body, fds) = peer.expect(Command::SetIrqs);
            let (request, data) = SetIrqs::decode(&body).expect("a request");
            let flags = DATA_EVENTFD | ACTION_TRIGGER;
            assert_eq!(request, SetIrqs { argsz: 20, flags, index: 2, start, count });
            assert_eq!((data.len(), fds.len()), (0, usize::try_from(count).expect("small")));
            peer.answer(&header, &[]);
        }
    };
    small(script, |client| {
        let file = File::open("/dev/null").expect("a file");
        client.irq_install(2, 3, &[file.as_fd(); 5]).expect("installed");
    });
}

#[test]
fn each_request_for_interrupts_is_what_the_specification_says() {
    type Call = fn(&Client) -> Result<(), ClientError>;
    let calls: [(Call, [u32; 5]); 5] = [
        (|client| client.irq_disable(2), [20, 1 | 32, 2, 0, 0]),
        (|client| client.irq_remove(2, 1, 3), [20, 4 | 32, 2, 1, 3]),
        (|client| client.irq_trigger(2, 1, 3), [20, 1 | 32, 2, 1, 3]),
        (|client| client.irq_mask(0, 0, 1), [20, 1 | 8, 0, 0, 1]),
        (|client| client.irq_unmask(0, 0, 1), [20, 1 | 16, 0, 0, 1]),
    ];
    let script = |peer: &mut Peer| {
        for (_, expected) in calls {
            let (header, body, _) = peer.expect(Command::SetIrqs);
            assert_eq!(body, words(&expected));
            peer.answer(&header, &[]);
        }
        let (header, body, _) = peer.expect(Command::SetIrqs);
        assert_eq!(body, [words(&[23, 2 | 32, 2, 0, 3]), vec![1, 0, 1]].concat());
        peer.answer(&header, &[]);
    };
    session(script, |client| {
        for (call, _) in calls {
            call(&client).expect("done");
        }
        let request = SetIrqs { argsz: 0, flags: 2 | 32, index: 2, start: 0, count: 3 };
        client.set_irqs(&request, &[1, 0, 1], &[]).expect("done");
    });
}

#[test]
fn several_writes_in_one_message_are_made_only_where_that_is_agreed() {
    let write = SmallWrite::new(0, 0x10, &[1, 2, 3, 4]).expect("4 bytes");
    small(Peer::expect_end, |client| {
        let error = client.region_write_multi(&[write]).expect_err("not agreed");
        let ClientError::Request { source: WireError::UnknownCommand { number: 15 }, .. } = error
        else {
            panic!("{error:?}");
        };
    });
    let script = |peer: &mut Peer| {
        for done in [2_u64, 1] {
            let (header, body, _) = peer.expect(Command::RegionWriteMulti);
            let writes: Vec<_> = WriteMulti::decode(&body).expect("writes").writes().collect();
            assert_eq!(writes, [write; 2]);
            peer.answer(&header, &done.to_ne_bytes());
        }
        let (header, _, _) = peer.expect(Command::RegionWriteMulti);
        assert_eq!(header.kind(), Some(Kind::Posted));
    };
    session(script, |client| {
        client.region_write_multi(&[write; 2]).expect("both");
        let error = client.region_write_multi(&[write; 2]).expect_err("one");
        assert!(matches!(error, ClientError::Reply { .. }), "{error:?}");
        client.region_write_multi_posted(&[write; 2]).expect("sent");
        let error = client.region_write_multi(&[write; 2000]).expect_err("too many");
        assert!(matches!(error, ClientError::Request { .. }), "{error:?}");
    });
}

#[test]
fn posted_writes_come_before_what_follows_them() {
    let script = |peer: &mut Peer| {
        for byte in 0..100 {
            let (header, body, _) = peer.expect(Command::RegionWrite);
            assert_eq!((header.kind(), body[16]), (Some(Kind::Posted), byte));
        }
        peer.serve_read(1);
    };
    session(script, |client| {
        for byte in 0..100 {
            client.region_write_posted(0, 0, &[byte]).expect("sent");
        }
        assert_eq!(read_4(&client).expect("read"), [1; 4]);
    });
}

#[test]
fn a_server_that_does_not_read_is_not_waited_for_too_long() {
    let (done, is_done) = mpsc::channel::<()>();
    session(
        move |_| is_done.recv().expect("told"),
        |client| {
            let impatient = client.with_timeout(Duration::from_millis(1));
            let error = loop {
                match impatient.region_write_posted(0, 0, &[0; 64]) {
                    Ok(()) => {}
                    Err(error) => break error,
                }
            };
            assert!(matches!(error, ClientError::Deadline { .. }), "{error:?}");
            done.send(()).expect("heard");
        },
    );
}
