//! Many threads on one connection.

use super::*;
use proptest::prelude::*;
use proptest::sample::Index;

/// Answers reads with a byte that their offset gives.
fn answer_read(peer: &mut Peer, (header, body, _): &Heard) {
    let access = RegionAccess::decode_plain(body, 64).expect("an access");
    peer.answer(header, &read_answer(body, access.offset.to_ne_bytes()[0]));
}

fn read_at(client: &Client, offset: u8) {
    let mut data = [0xff; 3];
    client.region_read(0, u64::from(offset), &mut data).expect("read");
    assert_eq!(data, [offset; 3]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    /// In whatever order a server answers, each caller gets its own answer.
    #[test]
    fn answers_find_their_callers(
        threads in 1..8_u8,
        calls in 1..20_u8,
        order in prop::collection::vec(any::<Index>(), 200),
    ) {
        let script = |peer: &mut Peer| {
            let mut open: Vec<Heard> = Vec::new();
            let mut left = usize::from(threads) * usize::from(calls);
            let mut order = order.iter().cycle();
            while left > 0 {
                // As many as are under way at a time, in some order.
                match peer.receiver.try_receive().expect("in step") {
                    Some(message) => open.push((message.header, message.body.to_vec(), vec![])),
                    None if open.is_empty() => open.push(peer.hear()),
                    None => {
                        let next = order.next().expect("a cycle").index(open.len());
                        answer_read(peer, &open.swap_remove(next));
                        left -= 1;
                    }
                }
            }
        };
        session(script, |client| {
            thread::scope(|scope| {
                for thread in 0..threads {
                    let client = &client;
                    scope.spawn(move || {
                        (0..calls).for_each(|call| read_at(client, thread * 20 + call));
                    });
                }
            });
        });
    }
}

/// One caller's answer waits for another caller's request: requests are under way together.
#[test]
fn requests_are_under_way_together() {
    let script = |peer: &mut Peer| {
        for _ in 0..50 {
            let mut heard: Vec<_> = (0..4).map(|_| peer.hear()).collect();
            heard.reverse();
            heard.iter().for_each(|heard| answer_read(peer, heard));
        }
    };
    session(script, |client| {
        thread::scope(|scope| {
            for thread in 0..4 {
                let client = &client;
                scope.spawn(move || (0..50).for_each(|_| read_at(client, thread)));
            }
        });
    });
}

/// Answers that come in one piece, some of them for callers that have not got to reading.
#[test]
fn answers_that_come_at_once_are_all_handed_over() {
    let script = |peer: &mut Peer| {
        for _ in 0..50 {
            let heard: Vec<_> = (0..4).map(|_| peer.hear()).collect();
            let mut bytes = Vec::new();
            for (header, body, _) in &heard {
                let access = RegionAccess::decode_plain(body, 64).expect("an access");
                let answer = read_answer(body, access.offset.to_ne_bytes()[0]);
                header.reply().encode_message(&mut bytes, 0, |out| out.extend(answer));
            }
            let socket = peer.receiver.as_fd().try_clone_to_owned().expect("a socket");
            std::io::Write::write_all(&mut UnixStream::from(socket), &bytes).expect("written");
        }
    };
    session(script, |client| {
        thread::scope(|scope| {
            for thread in 0..4 {
                let client = &client;
                scope.spawn(move || (0..50).for_each(|_| read_at(client, thread)));
            }
        });
    });
}

/// The thread that reads for all gives up; another one reads on.
#[test]
fn a_caller_that_gives_up_leaves_the_reading_to_another() {
    let (heard_both, both_are_heard) = mpsc::channel();
    let (given_up, is_given_up) = mpsc::channel();
    let script = move |peer: &mut Peer| {
        let first = peer.hear();
        let second = peer.hear();
        heard_both.send(()).expect("heard");
        is_given_up.recv().expect("told");
        answer_read(peer, &second);
        answer_read(peer, &first);
        let last = peer.hear();
        answer_read(peer, &last);
    };
    session(script, |client| {
        thread::scope(|scope| {
            let impatient = client.with_timeout(Duration::from_millis(200));
            let first = scope.spawn(move || impatient.region_read(0, 1, &mut [0]));
            let second = scope.spawn(|| read_at(&client, 2));
            both_are_heard.recv().expect("told");
            // Whichever of the two reads: the impatient one ends at its deadline.
            let error = first.join().expect("no panic").expect_err("given up");
            assert!(matches!(error, ClientError::Deadline { .. }), "{error:?}");
            given_up.send(()).expect("heard");
            second.join().expect("no panic");
        });
        read_at(&client, 3);
    });
}

#[test]
fn the_end_wakes_all_callers() {
    let script = |peer: &mut Peer| {
        (0..4).for_each(|_| drop(peer.hear()));
    };
    session(script, |client| {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let error = client.reset().expect_err("no answer");
                    assert!(error.is_end(), "{error:?}");
                });
            }
        });
    });
}
