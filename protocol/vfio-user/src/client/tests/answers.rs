//! Answers: refusals, and what cannot be.

use super::*;
use crate::wire::{DMA_READABLE, DmaMap, IrqInfo, SparseArea};
use std::fs::File;

type Call = fn(&Client) -> Result<(), ClientError>;

/// One call of each command that can be refused.
const CALLS: [(Command, Call); 13] = [
    (Command::GetInfo, |client| client.device_info().map(drop)),
    (Command::GetRegionInfo, |client| client.region_info(0).map(drop)),
    (Command::GetRegionIoFds, |client| client.region_io_fds(0).map(drop)),
    (Command::GetIrqInfo, |client| client.irq_info(0).map(drop)),
    (Command::SetIrqs, |client| client.irq_disable(0)),
    (Command::RegionRead, |client| read_4(client).map(drop)),
    (Command::RegionWrite, |client| client.region_write(0, 0, &[1, 2])),
    (Command::DmaMap, |client| {
        client.dma_map(&DmaMap { flags: DMA_READABLE, offset: 0, iova: 0, size: 4096 }, None)
    }),
    (Command::DmaUnmap, |client| client.dma_unmap(0, 4096)),
    (Command::Reset, Client::reset),
    (Command::DeviceFeature, |client| client.migration_flags().map(drop)),
    (Command::DeviceFeature, |client| client.migration_state().map(drop)),
    (Command::RegionWriteMulti, |client| {
        let write = crate::wire::SmallWrite::new(0, 0, &[1]).expect("1 byte");
        client.region_write_multi(&[write])
    }),
];

#[test]
fn a_refusal_of_any_command_is_told_with_and_without_a_body() {
    let bodies = [&[][..], &[0; 16], &[0xff; 200]];
    let errors = [(22, Errno::EINVAL), (0, Errno::EIO), (u32::MAX, Errno::EIO)];
    let script = |peer: &mut Peer| {
        for (command, _) in CALLS {
            for body in bodies {
                for (error, _) in errors {
                    let (header, _, _) = peer.expect(command);
                    peer.refuse(&header, error, body);
                }
            }
        }
    };
    session(script, |client| {
        for (command, call) in CALLS {
            for _ in bodies {
                for (_, expected) in errors {
                    let error = call(&client).expect_err("refused");
                    let ClientError::Refused { command: told, errno } = error else {
                        panic!("{command}: {error:?}");
                    };
                    assert_eq!((told, errno), (command, expected));
                }
            }
        }
    });
}

#[test]
fn an_answer_that_is_too_short_is_told_and_the_next_call_goes_on() {
    let with_body: Vec<_> = CALLS
        .into_iter()
        .filter(|(command, _)| {
            let without = [Command::SetIrqs, Command::DmaMap, Command::DmaUnmap, Command::Reset];
            !without.contains(command)
        })
        .collect();
    let count = with_body.len();
    let script = move |peer: &mut Peer| {
        for _ in 0..count {
            for size in [0, 1, 7] {
                let (header, _, _) = peer.hear();
                peer.answer(&header, &[0; 7][..size]);
            }
        }
        peer.serve_read(5);
    };
    session(script, |client| {
        for (command, call) in with_body {
            for _ in 0..3 {
                let error = call(&client).expect_err("too short");
                assert!(matches!(error, ClientError::Reply { .. }), "{command}: {error:?}");
            }
        }
        assert_eq!(read_4(&client).expect("read"), [5; 4]);
    });
}

#[test]
fn an_answer_to_another_access_is_no_answer() {
    let good = RegionAccess { offset: 0x10, region: 0, count: 4 };
    let wrong = [
        (RegionAccess { offset: 0x14, ..good }, 4),
        (RegionAccess { region: 1, ..good }, 4),
        (RegionAccess { count: 3, ..good }, 3),
        (RegionAccess { count: 5, ..good }, 5),
        (good, 3),
        (good, 5),
        (RegionAccess { count: u32::MAX, ..good }, 4),
    ];
    let script = |peer: &mut Peer| {
        for (access, size) in wrong {
            let (header, _, _) = peer.expect(Command::RegionRead);
            let mut body = Vec::new();
            access.encode(&mut body);
            body.resize(16 + size, 0);
            peer.answer(&header, &body);
        }
    };
    session(script, |client| {
        for (access, size) in wrong {
            let error = read_4(&client).expect_err("another access");
            assert!(matches!(error, ClientError::Reply { .. }), "{access:?} {size}: {error:?}");
        }
    });
}

#[test]
fn the_reset_flag_says_what_it_says() {
    let script = |peer: &mut Peer| {
        for flags in [0, 1, 2, 3] {
            let (header, body, _) = peer.expect(Command::GetInfo);
            assert_eq!(body, words(&[16, 0, 0, 0]));
            peer.answer(&header, &words(&[16, flags, 9, 5]));
        }
    };
    session(script, |client| {
        for flags in 0..4 {
            let info = client.device_info().expect("an answer");
            assert_eq!(info.is_resettable(), flags & 1 != 0);
            assert_eq!(info.is_pci(), flags & 2 != 0);
        }
    });
}

#[test]
fn more_regions_or_interrupts_than_can_be_are_refused() {
    let counts = [(u32::MAX, 5), (9, u32::MAX), (MAX_INDEXES + 1, 0)];
    let script = |peer: &mut Peer| {
        for (regions, irqs) in counts {
            let (header, _, _) = peer.expect(Command::GetInfo);
            peer.answer(&header, &words(&[16, 3, regions, irqs]));
        }
    };
    session(script, |client| {
        for _ in counts {
            assert!(matches!(client.device_info(), Err(ClientError::Reply { .. })));
        }
    });
}

#[test]
fn a_region_is_asked_for_twice_and_comes_with_its_fd() {
    let info = RegionInfo {
        flags: 7,
        index: 2,
        size: 0x4000,
        offset: 0x1000,
        sparse: Some(vec![SparseArea { offset: 0x1000, size: 0x2000 }]),
        msix_mappable: false,
    };
    let script = |peer: &mut Peer| {
        for (argsz, whole) in [(32, false), (64, true)] {
            let (header, body, _) = peer.expect(Command::GetRegionInfo);
            let query = Query::decode_region(&body).expect("a question");
            assert_eq!(query, Query { argsz, index: 2 });
            let mut answer = Vec::new();
            assert_eq!(info.encode(argsz, &mut answer), whole);
            let file = File::open("/dev/null").expect("a file");
            let fds = [file.as_fd()];
            peer.say(&header.reply(), &answer, if whole { &fds } else { &[] });
        }
    };
    let region = session(script, |client| client.region_info(2).expect("a region"));
    assert_eq!(region.info, info);
    assert!(region.fd.is_some());
}

/// Answers each question for a region with these words, and an fd for each.
fn region_answers(answers: &[(Vec<u32>, usize)]) -> Result<Region, ClientError> {
    let script = |peer: &mut Peer| {
        for (answer, fds) in answers {
            let (header, _, _) = peer.expect(Command::GetRegionInfo);
            let file = File::open("/dev/null").expect("a file");
            peer.say(&header.reply(), &words(answer), &vec![file.as_fd(); *fds]);
        }
    };
    session(script, |client| client.region_info(0))
}

#[test]
fn a_region_that_never_comes_whole_is_refused() {
    let small = |argsz| (vec![argsz, 7, 0, 0, 0x1000, 0, 0, 0], 0);
    for answers in [vec![small(64), small(64)], vec![small(64), small(4096)], vec![small(u32::MAX)]]
    {
        let region = region_answers(&answers);
        assert!(matches!(region, Err(ClientError::Reply { .. })), "{region:?}");
    }
}

/// The crate `vfio_user` panics then.
#[test]
fn a_second_answer_without_the_capabilities_is_a_region_without_them() {
    let answer = |argsz| (vec![argsz, 7, 0, 0, 0x1000, 0, 0, 0], 0);
    let region = region_answers(&[answer(64), answer(32)]).expect("a region");
    assert_eq!(region.info.sparse, None);
    let (mut words, fds) = answer(64);
    words.resize(16, 0);
    let region = region_answers(&[answer(64), (words, fds)]).expect("a region");
    assert_eq!(region.info.sparse, None);
}

#[test]
fn a_region_that_cannot_be_is_refused() {
    for (answer, fds) in [
        // Another region.
        (vec![32, 7, 1, 0, 0x1000, 0, 0, 0], 0),
        // Two fds.
        (vec![32, 7, 0, 0, 0x1000, 0, 0, 0], 2),
        // Capabilities in a circle.
        (vec![40, 15, 0, 32, 0x1000, 0, 0, 0, 0x1_0063, 32], 0),
        // An area outside.
        (vec![64, 15, 0, 32, 0x1000, 0, 0, 0, 0x1_0001, 0, 1, 0, 0x1000, 0, 1, 0], 0),
    ] {
        let region = region_answers(&[(answer, fds)]);
        assert!(matches!(region, Err(ClientError::Reply { .. })), "{region:?}");
    }
}

#[test]
fn an_index_that_was_not_asked_for_is_no_answer() {
    let script = |peer: &mut Peer| {
        for index in [3, 2] {
            let (header, _, _) = peer.expect(Command::GetIrqInfo);
            peer.answer(&header, &words(&[16, 1, index, 4]));
        }
    };
    session(script, |client| {
        assert!(matches!(client.irq_info(2), Err(ClientError::Reply { .. })));
        assert_eq!(
            client.irq_info(2).expect("an answer"),
            IrqInfo { flags: 1, index: 2, count: 4 }
        );
    });
}

#[test]
fn fds_for_writes_are_asked_for_twice() {
    use crate::wire::{IoFd, IoFdKind, IoFds, IoFdsQuery, Stride};
    let kind = IoFdKind::IoEventFd { flags: 0, datamatch: 0 };
    let entries = vec![IoFd { offset: 0x10, size: 4, fd_index: 0, kind }; 3];
    let io_fds = IoFds { index: 2, entries };
    for stride in [Stride::Specification, Stride::Libvfio] {
        let script = |peer: &mut Peer| {
            for whole in [false, true] {
                let (header, body, _) = peer.expect(Command::GetRegionIoFds);
                let query = IoFdsQuery::decode(&body).expect("a question");
                let mut answer = Vec::new();
                assert_eq!(io_fds.encode(query.argsz, stride, &mut answer), whole);
                let file = File::open("/dev/null").expect("a file");
                let fds = [file.as_fd()];
                peer.say(&header.reply(), &answer, if whole { &fds } else { &[] });
            }
        };
        let (answered, fds) = session(script, |client| client.region_io_fds(2).expect("fds"));
        assert_eq!((answered, fds.len()), (io_fds.clone(), 1));
    }
}

#[test]
fn what_shows_that_the_stream_is_wrong_ends_it_for_all() {
    let header = |size, command, flags| {
        let mut bytes = Vec::new();
        Header { id: 0, command, size, flags, error: 0 }.encode(&mut bytes);
        bytes
    };
    type IsIt = fn(&EndError) -> bool;
    let framing: IsIt = |end| matches!(end, EndError::Receive(_));
    for (bytes, is_it) in [
        // Sizes that cannot be, a type that does not exist, garbage, a message cut short.
        (header(15, 13, 1), framing),
        (header(u32::MAX, 13, 1), framing),
        (header(16, 13, 2), framing),
        (vec![0xff; 100], framing),
        (header(100, 13, 1), framing),
        // Answers to nothing.
        (header(16, 9, 1), |end| matches!(end, EndError::WrongCommand { command: 9, .. })),
        ([&[9, 9], &header(16, 13, 1)[2..]].concat(), |end| {
            matches!(end, EndError::StrayReply { .. })
        }),
    ] {
        session_of_bytes(&bytes, |client| {
            let error = client.reset().expect_err("no answer");
            assert!(matches!(&error, ClientError::Ended(end) if is_it(end)), "{error:?}");
            is_at_its_end(&client, is_it);
        });
    }
}

#[test]
fn the_end_of_the_server_is_the_end() {
    let script = |peer: &mut Peer| {
        peer.hear();
    };
    session(script, |client| {
        let error = client.reset().expect_err("no answer");
        assert!(error.is_end(), "{error:?}");
        is_at_its_end(&client, |end| {
            matches!(end, EndError::Receive(crate::connection::ReceiveError::Closed))
        });
    });
}

#[test]
fn fds_without_end_are_the_end() {
    let script = |peer: &mut Peer| {
        let (header, _, _) = peer.hear();
        let file = File::open("/dev/null").expect("a file");
        peer.say(&header.reply(), &[], &vec![file.as_fd(); 100]);
        peer.expect_end();
    };
    session(script, |client| {
        let error = client.reset().expect_err("fds");
        assert!(error.is_end(), "{error:?}");
    });
}

#[test]
fn an_answer_after_its_deadline_is_dropped() {
    let (late, is_late) = mpsc::channel();
    let script = move |peer: &mut Peer| {
        let (header, body, _) = peer.expect(Command::RegionRead);
        is_late.recv().expect("told");
        peer.answer(&header, &read_answer(&body, 1));
        peer.serve_read(2);
    };
    session(script, |client| {
        let error = read_4(&client.with_timeout(Duration::from_millis(5))).expect_err("too late");
        assert!(matches!(error, ClientError::Deadline { command: Command::RegionRead }));
        late.send(()).expect("heard");
        // Not the first answer.
        assert_eq!(read_4(&client).expect("read"), [2; 4]);
    });
}

#[test]
fn requests_without_answers_are_bounded() {
    let script = |peer: &mut Peer| {
        while peer.receiver.receive(Peer::deadline()).is_ok() {}
    };
    session(script, |client| {
        let impatient = client.with_timeout(Duration::ZERO);
        let error = loop {
            match impatient.reset().expect_err("no answer") {
                ClientError::Deadline { .. } => {}
                error => break error,
            }
        };
        assert!(matches!(error, ClientError::Busy { pending: 1024, .. }), "{error:?}");
    });
}
