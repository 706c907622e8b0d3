//! `standstill pause --lease`: what is asked for, what is refused, and what is shown when it has run out.

use crate::fixture::{Place, two_engines};
use serde_json::{Value, json};

#[test]
fn a_pause_with_a_lease_ends_by_itself_and_status_says_so() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    let mut events = place.connect();
    events.send(1, "events", &json!({ "follow": true }));
    let mut lease = 300;
    // On a busy machine it may run out before both have stopped: then with a longer one.
    let paused: Value = loop {
        let argument = format!("{lease}ms");
        let said = place.ask(&["pause", "--lease", &argument, "--json"]);
        if said.status.success() {
            break serde_json::from_slice(&said.stdout).unwrap();
        }
        lease *= 2;
        assert!(lease < 5000, "{said:?}");
    };
    assert_eq!(paused["report"]["outcome"], "Done", "{paused}");
    let mut expired = 0;
    while expired < 2 {
        let event = events.answer(1);
        let event = &event["event"];
        // Those of a pause that was undone count for nothing.
        if event["kind"] == "transition-began" {
            expired = 0;
        }
        if event["kind"] == "lease-expired" {
            assert_eq!(event["state"], "RUNNING_P2P", "{event}");
            expired += 1;
        }
    }
    let status = place.json(&["status"]);
    assert_eq!(status["machine"], "lease-expired", "{status}");
    assert_eq!(status["devices"][0]["state"], "RUNNING_P2P", "{status}");
    let said = place.expect(0, &["status"]);
    assert!(said.contains("devices have left STOP"), "{said}");
    place.expect(0, &["pause"]);
    assert_eq!(place.json(&["status"])["machine"], "stopped");
    place.expect(0, &["resume"]);
    assert_eq!(place.json(&["status"])["machine"], "running");
}

#[test]
fn a_lease_that_no_vmm_lives_with_is_refused_before_anything_is_done() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    for (lease, why) in [
        ("5s", "a lease of 5s is too long: it must be shorter than 5s"),
        ("1000000years", "too long"),
        ("0s", "no time at all"),
    ] {
        let said = place.ask(&["pause", "--lease", lease]);
        let text = String::from_utf8(said.stderr).unwrap();
        assert!(!said.status.success() && text.contains(why), "{lease}: {text}");
    }
    let mut raw = place.connect();
    raw.send(1, "pause", &json!({ "lease-ns": 5_000_000_000_u64 }));
    let refused = raw.answer(1);
    assert_eq!(refused["error"]["code"], "bad-request", "{refused}");
    assert_eq!(place.json(&["status"])["machine"], "running");
    assert_eq!(place.json(&["status"])["last"], Value::Null);
}
