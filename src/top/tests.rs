//! What a machine looks like, and what keys do.

use super::app::{Action, App, Input, Note, Todo};
use super::draw::draw;
use crate::operator::client::Told;
use crate::operator::message::{EventLine, StatusReply};
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{Event, KeyCode, KeyEvent, KeyModifiers};
use serde_json::{Value, json};
use std::time::Duration;

const MS: u64 = 1_000_000;

fn device(name: &str, standing: &str, state: Option<&str>, progress: u64) -> Value {
    json!({
        "name": name, "pid": 4711, "incarnation": 1, "standing": standing,
        "kind": "copy-engine 0.1.0", "state": state, "progress": progress, "lost": null,
        "dropped_logs": { "by_device": 0, "by_coordinator": 0 },
    })
}

fn status(machine: &str, operation: Option<&str>, devices: &[Value]) -> Input {
    let reply: StatusReply = serde_json::from_value(json!({
        "name": "vm0", "machine": machine, "operation": operation, "devices": devices,
        "since": "2026-01-01T00:00:00.000Z", "pid": 4700, "orphan": "keep", "last": null,
    }))
    .unwrap();
    Input::Status(Box::new(reply))
}

fn command(phase: &str, sent_ns: u64, answered_ns: Option<u64>, undo: bool) -> Value {
    json!({
        "epoch": 3 + u64::from(undo), "phase": phase, "target": "STOP", "undo": undo,
        "sent_ns": sent_ns, "answered_ns": answered_ns, "reached": null, "refused": null,
        "refused_in": null, "hook_ns": 0, "drain_ns": 0, "evidence_ns": 0,
    })
}

/// A pause that one did not answer; it was undone.
fn failed() -> Input {
    let participant = |name: &str, commands: Vec<Value>| {
        json!({
            "name": name, "incarnation": 1, "pid": 4711, "before": "RUNNING", "after": null,
            "commands": commands, "fenced": null, "fence_ns": null, "proven_ns": null,
            "proof": null,
        })
    };
    let participants = [
        participant(
            "engine0",
            vec![
                command("PrepareStop", 0, Some(2 * MS), false),
                command("Start", 9 * MS, Some(10 * MS), true),
            ],
        ),
        participant("engine1", vec![command("PrepareStop", 0, None, false)]),
    ];
    let report = json!({
        "operation": "pause", "outcome": "Degraded", "machine": "running", "term": 1, "epoch": 4,
        "began_unix_ns": 0, "total_ns": 10 * MS, "downtime_ns": null,
        "participants": participants, "hooks": [],
        "failures": ["device \"engine1\" is lost: no answer within the deadline"],
    });
    event(json!({ "kind": "transition", "report": report }), "pause ended in Degraded")
}

fn event(mut event: Value, text: &str) -> Input {
    event["number"] = 1.into();
    event["time"] = "2026-01-31T12:34:56.789Z".into();
    event["text"] = text.into();
    let line: EventLine = serde_json::from_value(event).unwrap();
    Input::Event(Told::Event(Box::new(line)))
}

fn key(code: KeyCode) -> Input {
    Input::Terminal(Event::Key(KeyEvent::new(code, KeyModifiers::NONE)))
}

fn press(app: &mut App, character: char) -> Todo {
    app.handle(key(KeyCode::Char(character)), Duration::ZERO)
}

/// An app that has seen these, a second apart.
fn app(inputs: Vec<Input>) -> App {
    let mut app = App::new("vm0".to_owned());
    for (second, input) in (0..).zip(inputs) {
        assert_eq!(app.handle(input, Duration::from_secs(second)), Todo::Nothing);
    }
    app
}

/// The lines of the picture, without blanks at their ends.
fn picture(app: &App, (width, height): (u16, u16)) -> Vec<String> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| draw(frame, app)).unwrap();
    let buffer = terminal.backend().buffer().clone();
    let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..height).map(|y| line(y).trim_end().to_owned()).collect()
}

/// Two devices at work, one of which then is lost in a pause.
fn seen() -> App {
    let two = |machine, operation, progress: u64, standing: &str| {
        let state = if standing == "ready" { Some("RUNNING") } else { None };
        let mut lost = device("engine1", standing, state, progress / 2);
        if standing != "ready" {
            lost["lost"] = "no answer within the deadline".into();
        }
        status(machine, operation, &[device("engine0", "ready", Some("RUNNING"), progress), lost])
    };
    app(vec![
        two("running", None, 0, "ready"),
        two("running", None, 1000, "ready"),
        two("running", Some("pause"), 3500, "ready"),
        event(
            json!({ "kind": "transition-began", "operation": "pause", "epoch": 3 }),
            "pause begins",
        ),
        failed(),
        two("running", None, 1_003_500, "restarting"),
    ])
}

#[test]
fn a_machine_and_what_has_happened_to_it_are_one_picture() {
    let expected = [
        " vm0 running  1 of 2 devices ready  run by 4700, devices keep",
        "DEVICE  STANDING   STATE        PID      STARTS WORK/s",
        "engine0 ready      RUNNING      4711     1      333k     ▁▁█          copy-engine 0.1.0",
        "engine1 restarting -            4711     1      167k     ▁▁█          no answer within the deadline",
        "",
        "",
        "",
        "",
        "",
        " last: pause Degraded in 10.00 ms ──────────────────────────────────────────────────────────────────",
        " PrepareStop        10.00 ms  ████████████████████████████████████████████████████  missing: engine1",
        " undo Start          1.00 ms                                                ██████  last: engine0",
        " device \"engine1\" is lost: no answer within the deadline",
        " events (UTC) ──────────────────────────────────────────────────────────────────────────────────────",
        " 12:34:56.789  pause begins",
        " 12:34:56.789  pause ended in Degraded",
        " q quit   p pause   r resume   s sort   S reverse   ↑↓ scroll",
    ];
    assert_eq!(picture(&seen(), (100, 17)), expected);
}

#[test]
fn what_is_under_way_or_not_answered_is_said_on_top() {
    let mut app = app(vec![status("stopped", Some("resume"), &[])]);
    assert!(picture(&app, (80, 10))[0].starts_with(" vm0 stopped (resume …)  0 of 0 devices"));
    app.handle(Input::Lost("no machine runs at /run/x".to_owned()), Duration::ZERO);
    let said = " vm0 no answer, trying again: no machine runs at /run/x";
    assert_eq!(picture(&app, (120, 10))[0], said);
    app.handle(status("running", None, &[]), Duration::ZERO);
    assert!(!picture(&app, (120, 10))[0].contains("trying"));
}

#[test]
fn every_size_of_a_screen_has_a_picture() {
    let app = seen();
    for width in [1, 2, 7, 20, 47, 48, 49, 80, 130] {
        for height in 1..40 {
            picture(&app, (width, height));
        }
    }
    let low = picture(&app, (80, 5));
    assert!(low[1].starts_with("DEVICE") && low[3].starts_with("engine1"), "{low:#?}");
    assert!(low[4].starts_with(" q quit"));
}

#[test]
fn a_pause_is_asked_for_only_if_it_is_meant() {
    let mut app = app(vec![status("running", None, &[])]);
    assert_eq!(press(&mut app, 'p'), Todo::Nothing);
    assert_eq!(picture(&app, (40, 5))[4], " pause vm0? y/n");
    assert_eq!(press(&mut app, 'n'), Todo::Nothing);
    assert_eq!(app.note, Note::Keys);
    // A no is a no, whatever the key means elsewhere.
    press(&mut app, 'r');
    assert_eq!(press(&mut app, 'q'), Todo::Nothing);
    press(&mut app, 'p');
    assert_eq!(press(&mut app, 'y'), Todo::Ask(Action::Pause));
    // One thing at a time.
    assert_eq!(press(&mut app, 'r'), Todo::Nothing);
    assert_eq!(app.note, Note::Asked(Action::Pause));
    let why = "it is busy\nand more".to_owned();
    app.handle(Input::Answer(Action::Pause, Err(why)), Duration::ZERO);
    assert_eq!(picture(&app, (40, 5))[4], " pause: it is busy");
    press(&mut app, 'r');
    assert_eq!(app.handle(key(KeyCode::Enter), Duration::ZERO), Todo::Ask(Action::Resume));
    app.handle(Input::Answer(Action::Resume, Ok(())), Duration::ZERO);
    assert_eq!(picture(&app, (40, 5))[4], " resume: done");
}

#[test]
fn it_ends_by_key_and_by_signal() {
    let mut app = app(Vec::new());
    assert_eq!(press(&mut app, 'q'), Todo::Quit);
    assert_eq!(app.handle(Input::Quit, Duration::ZERO), Todo::Quit);
    let control_c = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    press(&mut app, 'p');
    assert_eq!(app.handle(Input::Terminal(Event::Key(control_c)), Duration::ZERO), Todo::Quit);
}

#[test]
fn devices_are_sorted_and_scrolled() {
    let of = |seconds: u64| {
        let work = |name: &str, rate: u64, standing: &str| {
            device(name, standing, Some("RUNNING"), rate * seconds)
        };
        let devices = [work("c", 5, "ready"), work("a", 9, "lost"), work("b", 7, "ready")];
        status("running", None, &devices)
    };
    let mut app = app(vec![of(0), of(1)]);
    let names = |app: &App| {
        let devices = app.devices();
        devices.iter().map(|device| device.name.as_str()).collect::<String>()
    };
    let mut orders = vec![names(&app)];
    for _ in 0..4 {
        press(&mut app, 's');
        orders.push(names(&app));
    }
    // As the machine has them, by name, those that are not well first, by work, and so on.
    assert_eq!(orders, ["cab", "abc", "acb", "abc", "cab"]);
    press(&mut app, 'S');
    assert_eq!(names(&app), "bac");

    app.handle(key(KeyCode::Down), Duration::ZERO);
    // There are three lines for the devices, of which one is the heading.
    assert!(picture(&app, (60, 5))[2].starts_with('a'));
    app.handle(key(KeyCode::PageDown), Duration::ZERO);
    assert!(picture(&app, (60, 5))[3].starts_with('c'), "the last one is the last line");
    app.handle(key(KeyCode::Home), Duration::ZERO);
    assert!(picture(&app, (60, 5))[2].starts_with('b'));
}

#[test]
fn the_rate_of_a_device_begins_anew_with_its_process() {
    let at = |incarnation: u64, progress: u64| {
        let mut one = device("d", "ready", Some("RUNNING"), progress);
        one["incarnation"] = incarnation.into();
        status("running", None, &[one])
    };
    let mut app = app(vec![at(1, 100), at(1, 400)]);
    assert_eq!(app.rates["d"].now(), Some(300));
    app.handle(at(2, 50), Duration::from_secs(2));
    assert_eq!(app.rates["d"].now(), None);
    app.handle(at(2, 60), Duration::from_secs(3));
    assert_eq!(app.rates["d"].now(), Some(10));
    // One that says less than before has told nonsense, and panics nobody.
    app.handle(at(2, 0), Duration::from_secs(4));
    assert_eq!(app.rates["d"].now(), None);
    app.handle(status("running", None, &[]), Duration::from_secs(5));
    assert!(app.rates.is_empty());
}

#[test]
fn what_devices_say_moves_no_cursor() {
    let text = "d says \u{1b}[2J\u{7} Failed";
    let app = app(vec![event(json!({ "kind": "hold-began", "device": "d" }), text)]);
    let lines = picture(&app, (60, 14));
    assert!(lines.iter().any(|line| line.contains("d says [2J Failed")), "{lines:#?}");
}
