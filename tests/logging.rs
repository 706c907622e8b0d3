//! The log of the command, in which the lines of its device processes are.

use serde_json::Value;
use std::io::{self, Read};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Duration;

fn demo(filter: &str, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_standstill"));
    command.env("RUST_LOG", filter).args(["demo", "--devices", "2", "--json"]).args(args);
    command
}

/// The machine pauses and resumes all the same, and the command ends.
#[test]
fn a_standard_error_that_nobody_reads_holds_nothing_up() {
    let (unread, stderr) = io::pipe().unwrap();
    let mut process =
        demo("trace", &["--rounds", "50"]).stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
    let mut stdout = process.stdout.take().unwrap();
    let (send, ended) = channel();
    std::thread::spawn(move || {
        let mut text = String::new();
        let read = stdout.read_to_string(&mut text);
        send.send(read.map(|_| text))
    });
    let Ok(text) = ended.recv_timeout(Duration::from_secs(120)) else {
        process.kill().unwrap();
        panic!("the command hangs");
    };
    let summary: Value = serde_json::from_str(text.unwrap().lines().last().unwrap()).unwrap();
    assert_eq!((&summary["rounds"], &summary["late_writes"]), (&50.into(), &0.into()));
    assert!(process.wait().unwrap().success());
    // There was more to say than what the pipe takes: it is full.
    let full = rustix::io::ioctl_fionread(&unread).unwrap();
    assert!(full > 60 << 10, "{full} bytes");
}

#[test]
fn a_program_reads_one_stream_with_the_same_fields_everywhere() {
    let output = demo("info", &["--rounds", "2", "--log-format", "json"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let with = |field: &str, value: Value| {
        let found = lines.iter().filter(move |line| line["fields"][field] == value);
        found.collect::<Vec<_>>()
    };
    // The coordinator's own.
    let ended = with("message", "transition ended".into());
    assert_eq!(ended.len(), 4, "{text}");
    assert_eq!((&ended[0]["fields"]["term"], &ended[0]["fields"]["epoch"]), (&1.into(), &1.into()));
    // And each device's, with what it knew at its beginning and at its end.
    for device in ["engine0", "engine1"] {
        let lines = with("device", device.into());
        let said = |what: &str| {
            let begins = |line: &&&Value| {
                line["target"] == "standstill::device"
                    && line["fields"]["message"].as_str().unwrap().starts_with(what)
            };
            lines.iter().find(begins).unwrap_or_else(|| panic!("no {what:?} in {text}"))["fields"]
                .clone()
        };
        for (what, epoch) in [("welcomed", 0), ("the device process ends", 4)] {
            let fields = said(what);
            assert_eq!((&fields["term"], &fields["epoch"]), (&1.into(), &epoch.into()), "{fields}");
            assert_eq!(fields["incarnation"], 1);
            assert!(fields["origin"].as_str().unwrap().starts_with("standstill_device_proc"));
        }
    }
}

#[test]
fn a_filter_that_is_none_is_told() {
    let output = demo("standstill=loudest", &["--rounds", "1"]).output().unwrap();
    assert!(output.status.success());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("RUST_LOG is no filter"), "{text}");
}
