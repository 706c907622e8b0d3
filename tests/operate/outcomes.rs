//! Transitions that do not end as they should: what is said, and with which exit code.

use crate::fixture::{Place, send, two_engines};
use rustix::process::Signal;
use serde_json::json;
use std::io::Write;

#[test]
fn status_and_events_answer_while_a_device_hangs_in_a_pause() {
    let place = Place::new();
    let _running =
        place.run(&two_engines("[deadlines]\nfirst-phase = \"60s\"\nsilence = \"0s\"\n"));
    let mut events = place.connect();
    events.send(1, "events", &json!({ "follow": true }));
    let hung = place.device("engine1");
    send(&hung, Signal::STOP);
    let mut pausing = place.connect();
    pausing.send(7, "pause", &json!({}));
    assert_eq!(events.answer(1)["event"]["kind"], "transition-began");
    let status = place.json(&["status"]);
    assert_eq!(status["operation"], "pause", "{status}");
    // On the connection of the pause, too, which is not answered yet.
    pausing.send(8, "status", &json!({}));
    assert_eq!(pausing.line().unwrap()["id"], 8);
    let said = place.expect(1, &["resume"]);
    assert!(said.contains("a pause is under way") && said.contains("standstill cancel"), "{said}");
    send(&hung, Signal::CONT);
    let paused = pausing.line().unwrap();
    assert_eq!((&paused["id"], &paused["ok"]["report"]["outcome"]), (&7.into(), &"Done".into()));
    assert_eq!(events.answer(1)["event"]["kind"], "transition");
}

#[test]
fn a_pause_that_is_given_up_is_undone() {
    let place = Place::new();
    let text = two_engines("").replacen("memory", "slow-prepare = \"2s\"\nmemory", 1);
    let _running = place.run(&text);
    let mut pausing = place.connect();
    pausing.send(1, "pause", &json!({}));
    place.status_until("pausing", |status| status["operation"] == "pause");
    assert!(place.expect(0, &["cancel"]).contains("given up"));
    let paused = pausing.answer(1);
    assert_eq!(paused["error"]["report"]["report"]["outcome"], "RolledBack", "{paused}");
    assert!(paused["error"]["message"].as_str().unwrap().contains("the owner gave it up"));
    assert_eq!(place.json(&["status"])["machine"], "running");
    assert!(place.expect(0, &["cancel"]).contains("nothing was under way"));
}

#[test]
fn a_device_that_is_lost_in_a_pause_makes_it_degraded() {
    let place = Place::new();
    let _running = place.run(&two_engines("[deadlines]\nfirst-phase = \"3s\"\n"));
    send(&place.device("engine1"), Signal::STOP);
    let said = place.expect(3, &["pause"]);
    assert!(said.contains("pause: Degraded"), "{said}");
    assert!(said.contains("no answer within the deadline"), "{said}");
    let said = place.expect(0, &["report"]);
    assert!(said.contains("pause: Degraded"), "{said}");
    // The survivor runs, and the machine does not stop without what it must have.
    let status = place.json(&["status"]);
    assert_eq!(status["machine"], "running", "{status}");
    assert_eq!(status["devices"][1]["standing"], "fenced", "{status}");
    place.expect(0, &["restart", "engine1"]);
    place.expect(0, &["pause"]);
}

#[test]
fn a_device_that_is_killed_comes_back_by_its_policy() {
    let place = Place::new();
    let _running = place.run(&two_engines("on-loss = \"restart\""));
    send(&place.device("engine1"), Signal::KILL);
    let status = place.status_until("restarted", |status| {
        status["devices"][1]["incarnation"] == 2 && status["devices"][1]["standing"] == "ready"
    });
    assert_eq!(status["devices"][1]["state"], "RUNNING");
    let events = place.expect(0, &["events"]);
    for part in ["engine1 (1) is lost", "is fenced", "is started again", "engine1 (2) has joined"] {
        assert!(events.contains(part), "{part}: {events}");
    }
}

#[test]
fn a_hook_that_fails_rolls_the_pause_back_and_says_why() {
    let place = Place::new();
    let hook = r#"hook = [{ name = "vcpus", slot = "before", stop = ["sh", "-c", "echo no such VM >&2; exit 3"] }]"#;
    let _running = place.run(&two_engines(hook));
    let said = place.expect(4, &["pause"]);
    assert!(said.contains("pause: RolledBack"), "{said}");
    assert!(said.contains("hook \"vcpus\" refused") && said.contains("no such VM"), "{said}");
    assert_eq!(place.json(&["status"])["machine"], "running");
    let error = place.ask(&["pause", "--json"]);
    let error: serde_json::Value = serde_json::from_slice(&error.stdout).unwrap();
    assert_eq!(error["error"]["report"]["report"]["outcome"], "RolledBack", "{error}");
}

#[test]
fn a_hook_that_hangs_holds_the_machine_until_it_returns() {
    let place = Place::new();
    let fifo = place.path("go");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let hook = format!(
        "hook = [{{ name = \"vcpus\", slot = \"after\", stop = [\"cat\", {fifo:?}], deadline = \"300ms\" }}]\n\
         [deadlines]\nundo = \"2s\"\n"
    );
    let _running = place.run(&two_engines(&hook));
    let said = place.expect(5, &["pause"]);
    assert!(said.contains("pause: Held") && said.contains("has not returned"), "{said}");
    let status = place.json(&["status"]);
    assert_eq!(status["machine"], "held");
    assert_eq!(status["held"][0], "hook \"vcpus\" has not returned");
    // The command ends when somebody has written.
    std::fs::File::options().write(true).open(&fifo).unwrap().write_all(b"go").unwrap();
    place.status_until("stopped", |status| {
        status["machine"] == "stopped" && status["held"].as_array().is_some_and(Vec::is_empty)
    });
}

#[test]
fn commands_run_in_their_slots_and_know_why() {
    let place = Place::new();
    let log = place.path("log");
    let command = format!(
        "[\"sh\", \"-c\", \"echo $STANDSTILL_HOOK $STANDSTILL_MOMENT >> {}\"]",
        log.display()
    );
    let hook = |name: &str, slot: &str| {
        format!("{{ name = \"{name}\", slot = \"{slot}\", stop = {command}, start = {command} }}")
    };
    let hooks = format!("hook = [{}, {}]", hook("disks", "after"), hook("vcpus", "before"));
    let _running = place.run(&two_engines(&hooks));
    place.expect(0, &["pause"]);
    place.expect(0, &["resume"]);
    let order = "vcpus stop\ndisks stop\ndisks start\nvcpus start\n";
    assert_eq!(std::fs::read_to_string(log).unwrap(), order);
}
