//! VERSION: what a server may answer, and what not.

use super::*;
use crate::connection::tests::trickle;
use std::sync::atomic::{AtomicBool, Ordering};

/// A client whose VERSION is answered by a script.
fn start(script: impl FnOnce(&mut Peer, &Header) + Send) -> Result<Client, ConnectError> {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(theirs);
            let (header, _, _) = peer.expect(Command::Version);
            script(&mut peer, &header);
        });
        Client::builder().timeout(PATIENCE).start(ours)
    })
}

fn start_with(body: &[u8]) -> Result<Client, ConnectError> {
    start(|peer, header| peer.answer(header, body))
}

fn version(major: u16, minor: u16, json: &str) -> Vec<u8> {
    [&major.to_ne_bytes(), &minor.to_ne_bytes(), json.as_bytes()].concat()
}

#[test]
fn an_answer_without_json_means_the_defaults() {
    for json in ["", "{}\0", "{\"capabilities\":{}}\0"] {
        let client = start_with(&version(0, 1, json)).expect("legal");
        assert_eq!(client.version(), (0, 1));
        assert_eq!(client.max_data_xfer_size(), 1 << 20);
        assert_eq!(client.server().max_msg_fds(), 1);
    }
}

#[test]
fn an_answer_with_an_empty_migration_object_is_taken() {
    assert!(start_with(&version(0, 0, "{\"capabilities\":{\"migration\":{}}}\0")).is_ok());
}

#[test]
fn the_lower_limit_counts() {
    let json = "{\"capabilities\":{\"max_data_xfer_size\":1024,\"max_msg_fds\":8}}\0";
    let client = start_with(&version(0, 0, json)).expect("legal");
    assert_eq!((client.max_data_xfer_size(), client.server().max_msg_fds()), (1024, 8));
    let json = "{\"capabilities\":{\"max_data_xfer_size\":1000000000}}\0";
    let client = start_with(&version(0, 0, json)).expect("legal");
    assert_eq!(client.max_data_xfer_size(), 1 << 20);
}

#[test]
fn an_answer_that_cannot_be_is_refused() {
    for size in 0..4 {
        assert!(matches!(start_with(&[0; 4][..size]), Err(ConnectError::Answer(_))), "{size}");
    }
    for json in ["{}", "nonsense\0", "{\"capabilities\":{\"max_msg_fds\":\"8\"}}\0"] {
        let answer = start_with(&version(0, 0, json));
        assert!(matches!(answer, Err(ConnectError::Answer(_))), "{answer:?}");
    }
}

#[test]
fn a_server_that_takes_no_data_is_refused() {
    let answer = start_with(&version(0, 0, "{\"capabilities\":{\"max_data_xfer_size\":0}}\0"));
    assert!(matches!(answer, Err(ConnectError::NoData)), "{answer:?}");
}

#[test]
fn another_version_is_refused() {
    for (major, minor) in [(1, 0), (0, MINOR + 1), (u16::MAX, u16::MAX)] {
        let answer = start_with(&version(major, minor, ""));
        assert!(matches!(answer, Err(ConnectError::Version { .. })), "{answer:?}");
    }
}

#[test]
fn a_refusal_is_told() {
    for (error, expected) in [(22, Errno::EINVAL), (0, Errno::EIO)] {
        let answer = start(|peer, header| peer.refuse(header, error, &[]));
        assert!(matches!(answer, Err(ConnectError::Refused(errno)) if errno == expected));
    }
}

#[test]
fn something_else_than_the_answer_is_refused() {
    let others: [fn(&Header) -> Header; 4] = [
        |header| Header { id: header.id + 1, ..header.reply() },
        |header| Header { command: 9, ..header.reply() },
        |header| *header,
        |_| Header::command(0, Command::DmaRead),
    ];
    for other in others {
        let answer = start(|peer, header| peer.say(&other(header), &version(0, 0, ""), &[]));
        assert!(matches!(answer, Err(ConnectError::NotTheAnswer { .. })), "{answer:?}");
    }
}

#[test]
fn a_server_that_says_nothing_is_not_waited_for() {
    let (ours, _theirs) = UnixStream::pair().expect("a socket pair");
    let answer = Client::builder().timeout(Duration::from_millis(5)).start(ours);
    assert!(matches!(answer, Err(ConnectError::Receive(_))), "{answer:?}");
}

#[test]
fn a_server_that_goes_away_is_told() {
    let answer = start(|_, _| ());
    assert!(matches!(answer, Err(ConnectError::Receive(_))), "{answer:?}");
    let missing = Client::builder().connect("/nonexistent/socket");
    assert!(matches!(missing, Err(ConnectError::Io(_))), "{missing:?}");
}

#[test]
fn fds_that_come_with_the_answer_are_closed() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let client = start(move |peer, header| {
        peer.say(&header.reply(), &version(0, 0, ""), &[writer.as_fd()]);
    });
    client.expect("legal");
    // Nobody has the other end any more.
    use std::io::Read;
    assert_eq!({ reader }.read(&mut [0]).expect("the end"), 0);
}

#[test]
fn what_was_not_offered_cannot_be_agreed_to() {
    let twin = r#"{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}"#;
    let refused = start_with(&version(0, 1, &format!("{twin}\0")));
    assert!(matches!(refused, Err(ConnectError::NotOffered("a twin socket"))), "{refused:?}");
    // Said to be impossible it is no agreement.
    let none = r#"{"capabilities":{"twin_socket":{"supported":false}}}"#;
    assert!(start_with(&version(0, 1, &format!("{none}\0"))).is_ok());

    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let refused = thread::scope(|scope| {
        scope.spawn(move || {
            let mut peer = Peer::new(theirs);
            let (header, _, _) = peer.expect(Command::Version);
            let multiple = r#"{"capabilities":{"write_multiple":true}}"#;
            peer.answer(&header, &version(0, 1, &format!("{multiple}\0")));
        });
        Client::builder().capabilities(Capabilities::default()).timeout(PATIENCE).start(ours)
    });
    assert!(matches!(refused, Err(ConnectError::NotOffered(_))), "{refused:?}");
}

#[test]
fn an_answer_that_comes_byte_by_byte_is_not_waited_for_longer_than_another() {
    let (ours, theirs) = UnixStream::pair().expect("a socket pair");
    let other_end = OwnedFd::from(ours.try_clone().expect("another fd"));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let (header, _, _) =
                Peer::new(theirs.try_clone().expect("a socket")).expect(Command::Version);
            let mut long = Vec::new();
            header.reply().encode_message(&mut long, 1 << 20, |_| ());
            trickle(theirs, &other_end, &long, &stop);
        });
        let error = Client::builder().timeout(Duration::from_millis(200)).start(ours);
        stop.store(true, Ordering::Relaxed);
        let error = error.map(|_| ()).expect_err("no answer in time");
        let ConnectError::Receive(source) = &error else { panic!("{error:?}") };
        assert!(matches!(source, crate::connection::ReceiveError::Deadline), "{error:?}");
    });
}
