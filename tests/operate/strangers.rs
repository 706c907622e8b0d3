//! The commands against something at the operator socket that is no `standstill run`.

use crate::fixture::Place;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const GREETING: &str = r#"{"protocol":1,"program":"stranger 1","machine":"vm0","pid":1}"#;

/// Says those lines to the first client: one at once, and one for each line that it says.
fn stranger(place: &Place, lines: &[&str]) -> JoinHandle<()> {
    let listener = UnixListener::bind(place.path("s")).unwrap();
    let lines: Vec<_> = lines.iter().map(|line| format!("{line}\n")).collect();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut requests = BufReader::new(stream.try_clone().unwrap()).lines();
        for line in lines {
            // The client may have had enough.
            if stream.write_all(line.as_bytes()).is_err() || requests.next().is_none() {
                return;
            }
        }
    })
}

#[track_caller]
fn says(code: i32, lines: &[&str], part: &str) {
    let place = Place::new();
    let stranger = stranger(&place, lines);
    let said = place.expect(code, &["status", "--socket", "s"]);
    assert!(said.contains(part), "{part}: {said}");
    stranger.join().unwrap();
}

#[test]
fn another_version_is_told_with_what_to_do() {
    says(
        1,
        &[r#"{"protocol":2,"program":"standstill 9","machine":"vm0","pid":1}"#],
        "speaks version 2",
    );
    says(
        1,
        &[r#"{"protocol":2,"program":"standstill 9","machine":"vm0","pid":1}"#],
        "--keep-devices",
    );
}

#[test]
fn what_is_not_understood_is_told() {
    says(1, &["HTTP/1.1 400 Bad Request"], "not understood");
    says(1, &[GREETING, "{}"], "not understood");
    says(1, &[GREETING, r#"{"id":1,"ok":{"name":1}}"#], "not understood");
    says(1, &[GREETING, r#"{"id":1,"lost":1}"#], "not understood");
}

#[test]
fn an_end_in_the_middle_is_told() {
    says(6, &[], "has closed the connection");
    says(6, &[GREETING], "has closed the connection");
}

#[test]
fn an_error_without_number_is_everybodys() {
    says(
        1,
        &[GREETING, r#"{"id":null,"error":{"code":"refused","message":"go away"}}"#],
        "go away",
    );
}

#[test]
fn answers_to_others_are_passed_over() {
    says(
        1,
        &[
            GREETING,
            "{\"id\":99,\"ok\":{}}\n{\"id\":1,\"error\":{\"code\":\"busy\",\"message\":\"full\"}}",
        ],
        "full",
    );
}

#[test]
fn one_that_says_nothing_is_not_waited_for_for_ever() {
    let place = Place::new();
    let _listener = UnixListener::bind(place.path("s")).unwrap();
    let said = place.expect(6, &["status", "--socket", "s"]);
    assert!(said.contains("does not answer"), "{said}");
}
