//! Whatever comes on the operator socket, the machine runs on and everybody else is served.

use crate::fixture::{PATIENCE, Place, Raw, two_engines};
use serde_json::json;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

#[test]
fn what_is_no_request_is_answered_and_the_next_one_is_served() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut client = place.connect();
    assert_eq!(
        (&client.greeting["protocol"], &client.greeting["machine"]),
        (&1.into(), &"vm0".into())
    );
    for (line, part) in [
        (&b"hello\n"[..], "expected"),
        (b"\xff\xfe\x00\n", "no request"),
        (b"{}\n", "missing field"),
        (b"[[[[[[[[[[[[[[[[\n", "no request"),
        (b"{\"id\":1,\"request\":\"puase\"}\n", "did you mean \\\"pause\\\""),
        (b"{\"id\":1,\"request\":\"remove\",\"with\":{\"device\":7}}\n", "invalid type"),
        (
            b"{\"id\":1,\"request\":\"remove\",\"with\":{\"device\":\"../../x\"}}\n",
            "no device process",
        ),
        (b"{\"id\":1,\"request\":\"add\",\"with\":{\"toml\":\"[[\"}}\n", "bad-device"),
        (b"{\"id\":1,\"request\":\"declare-ram\",\"with\":{\"path\":\"x\"}}\n", "no absolute path"),
    ] {
        client.write(line);
        let answer = client.line().unwrap();
        assert!(answer["error"]["code"].is_string(), "{answer}");
        assert!(answer.to_string().contains(part), "{part}: {answer}");
    }
    // Empty lines are nothing.
    client.write(b"\n  \n{\"id\":9,\"request\":\"status\"}\n");
    assert_eq!(client.line().unwrap()["ok"]["machine"], "running");
}

#[test]
fn a_line_without_end_costs_the_connection_and_nothing_else() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut client = place.connect();
    let chunk = [b'x'; 4096];
    let mut written = 0;
    while written < 1 << 20 {
        match client.stream.write(&chunk) {
            Ok(bytes) => written += bytes,
            Err(_) => break,
        }
    }
    let answer = client.line();
    if let Some(answer) = &answer {
        assert!(answer.to_string().contains("65536 bytes"), "{answer}");
        assert!(client.line().is_none());
    }
    assert!(written < 1 << 20, "it read all of it");
    assert_eq!(place.json(&["status"])["machine"], "running");
}

#[test]
fn who_closes_its_end_still_gets_the_answer() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut client = place.connect();
    client.write(b"{\"id\":1,\"request\":\"pause\"}\n");
    client.stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(client.line().unwrap()["ok"]["report"]["outcome"], "Done");
    assert!(client.line().is_none());
}

#[test]
fn too_many_clients_are_sent_away_and_places_become_free() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let socket = place.runtime().join("vm0/operator.sock");
    let mut clients: Vec<_> = (0..32).map(|_| Raw::connect(&socket)).collect();
    let refused = Raw::connect(&socket).greeting;
    assert_eq!(refused["error"]["code"], "busy", "{refused}");
    let said = place.expect(1, &["status"]);
    assert!(said.contains("32 clients"), "{said}");
    // Those that are there are served.
    clients[31].write(b"{\"id\":1,\"request\":\"status\"}\n");
    assert_eq!(clients[31].line().unwrap()["id"], 1);
    drop(clients);
    let deadline = std::time::Instant::now() + PATIENCE;
    while !place.ask(&["status"]).status.success() {
        assert!(std::time::Instant::now() < deadline, "no place becomes free");
    }
}

#[test]
fn who_does_not_read_loses_events_and_is_told_how_many() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut slow = place.connect();
    slow.send(1, "events", &json!({ "follow": true }));
    let mut busy = place.connect();
    // Each pause and resume is two events with a report; 256 wait, and what the socket takes.
    for round in 0..700 {
        let request = if round % 2 == 0 { "pause" } else { "resume" };
        busy.send(round, request, &json!({}));
        assert_eq!(busy.answer(round)["ok"]["report"]["outcome"], "Done");
    }
    let (mut events, mut lost) = (0, 0);
    while events + lost < 1400 {
        let line = slow.line().unwrap();
        match line["lost"].as_u64() {
            Some(more) => lost += more,
            None => {
                assert!(line["event"]["number"].is_u64(), "{line}");
                events += 1;
            }
        }
    }
    assert!(lost > 0 && events >= 256, "{events} events, {lost} lost");
    assert_eq!(events + lost, 1400);
}

#[test]
fn who_never_reads_is_dropped() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut deaf = place.connect();
    // Answers that nobody reads, until no more is taken.
    deaf.stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let request = b"{\"id\":1,\"request\":\"status\"}\n";
    while deaf.stream.write_all(request).is_ok() {}
    assert_eq!(place.json(&["status"])["machine"], "running");
    let mut rest = Vec::new();
    // Its end is closed when the deadline of the write is over.
    wait_for_hangup(&deaf.stream);
    let _ = (&deaf.stream).read_to_end(&mut rest);
    assert!(!rest.is_empty());
    assert_eq!(place.json(&["status"])["machine"], "running");
}

fn wait_for_hangup(stream: &UnixStream) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(stream, PollFlags::empty())];
    let within = Timespec::try_from(PATIENCE).unwrap();
    assert_eq!(poll(&mut fds, Some(&within)).unwrap(), 1, "it is not dropped");
}

#[test]
fn a_device_with_thousands_of_mistakes_gets_a_short_answer() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut client = place.connect();
    let toml: String = (0..6000).map(|number| format!("k{number}=1\n")).collect();
    client.send(1, "add", &json!({ "toml": toml }));
    let answer = client.answer(1);
    assert_eq!(answer["error"]["code"], "bad-device");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.len() < 16 * 1024 && message.contains("more problems"), "{message}");
}
