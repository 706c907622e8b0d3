//! The ordinary life of a machine.

use crate::fixture::{Place, gone, send, two_engines};
use rustix::process::Signal;
use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;
use std::time::Duration;

#[test]
fn a_machine_is_started_paused_resumed_and_shut_down() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let status = place.expect(0, &["status"]);
    assert!(status.contains("machine vm0: running"), "{status}");
    assert!(status.contains("engine1") && status.contains("RUNNING"), "{status}");

    let pause = place.expect(0, &["pause"]);
    assert!(pause.starts_with("pause: Done in "), "{pause}");
    assert_eq!(place.json(&["status"])["machine"], "stopped");
    let resume = place.json(&["resume"]);
    assert_eq!((&resume["number"], &resume["report"]["outcome"]), (&2.into(), &"Done".into()));
    assert!(resume["report"]["downtime_ns"].as_u64().unwrap() > 0);

    let status = place.json(&["status"]);
    assert_eq!(status["machine"], "running");
    assert_eq!(
        (&status["last"]["operation"], &status["last"]["number"]),
        (&"resume".into(), &2.into())
    );
    assert_eq!(status["orphan"], "keep");

    let report = place.expect(0, &["report", "--last", "2"]);
    let [first, second] = [report.find("pause: Done"), report.find("resume: Done")];
    assert!(first.unwrap() < second.unwrap(), "{report}");
    let events = place.expect(0, &["events"]);
    assert!(events.contains("pause begins") && events.contains("resume ended in Done"), "{events}");

    let devices = [place.device("engine0"), place.device("engine1")];
    let said = place.expect(0, &["shutdown"]);
    assert!(said.contains("engine0 exited with status 0"), "{said}");
    let ended = running.ends();
    assert_eq!(ended.status.code(), Some(0), "{}", ended.stderr);
    assert!(ended.stdout.contains("engine1 exited with status 0"), "{}", ended.stdout);
    assert!(devices.iter().all(|device| gone(device, Duration::ZERO)));
    assert_eq!(std::fs::read_dir(place.runtime()).unwrap().count(), 0);
}

#[test]
fn colours_are_for_terminals() {
    let place = Place::new();
    let _running = place.run(&two_engines(""));
    assert!(!place.expect(0, &["status"]).contains('\x1b'));
    let shown = |variables: &[(&str, &str)]| {
        let output = place.command(&["status"]).envs(variables.iter().copied()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(shown(&[("CLICOLOR_FORCE", "1")]).contains("\x1b["));
    assert!(!shown(&[("CLICOLOR_FORCE", "0"), ("NO_COLOR", "1")]).contains('\x1b'));
}

#[test]
fn what_is_not_running_is_said_with_what_to_do() {
    let place = Place::new();
    let said = place.expect(6, &["status"]);
    assert!(said.contains("no machine runs in") && said.contains("standstill run"), "{said}");
    let said = place.expect(6, &["pause", "--machine", "vm0"]);
    assert!(said.contains("no machine \"vm0\""), "{said}");
    let said = place.expect(6, &["status", "--socket", "/nowhere/operator.sock"]);
    assert!(said.contains("no machine runs at /nowhere/operator.sock"), "{said}");
    let _running = place.run(&two_engines(""));
    let said = place.expect(6, &["status", "--machine", "vm1"]);
    assert!(said.contains("did you mean \"vm0\"?"), "{said}");
}

#[test]
fn with_two_machines_it_must_be_said_which_one() {
    let place = Place::new();
    let _first = place.run(&two_engines(""));
    let file = place.write("vm1.toml", &two_engines("").replace("vm0", "vm1"));
    let mut second = place.begin(&[file.to_str().unwrap()]);
    second.is_up();
    let said = place.expect(2, &["status"]);
    assert!(said.contains("vm0, vm1") && said.contains("--machine NAME"), "{said}");
    assert!(place.expect(0, &["status", "-m", "vm1"]).contains("machine vm1"));
    place.expect(0, &["shutdown", "-m", "vm1"]);
    assert!(second.ends().status.success());
    assert!(place.expect(0, &["status"]).contains("machine vm0"));
    // One that was killed is not meant while another one runs.
    let mut third = place.begin(&[file.to_str().unwrap()]);
    third.is_up();
    let devices = [place.device_of("vm1", "engine0"), place.device_of("vm1", "engine1")];
    third.kill();
    assert!(place.expect(0, &["status"]).contains("machine vm0"));
    for device in devices {
        send(&device, Signal::KILL);
    }
}

#[test]
fn a_machine_is_run_by_one_process() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let file = place.path("vm0.toml");
    let said = place.expect(1, &["run", file.to_str().unwrap()]);
    let pid = running.pid().as_raw_nonzero();
    assert!(said.contains(&format!("is run by another process ({pid})")), "{said}");
    assert!(said.contains("standstill run --attach"), "{said}");
    // Nothing was lost by it.
    assert_eq!(place.json(&["status"])["machine"], "running");
    place.expect(0, &["pause"]);
}

#[test]
fn events_are_followed_until_the_machine_ends() {
    let place = Place::new();
    let running = place.run(&two_engines(""));
    let mut client = place.connect();
    client.send(1, "events", &serde_json::json!({ "follow": true }));
    place.expect(0, &["pause"]);
    let began = client.answer(1);
    assert_eq!(began["event"]["kind"], "transition-began", "{began}");
    let ended = client.answer(1);
    assert_eq!(ended["event"]["report"]["outcome"], "Done", "{ended}");
    assert_eq!(ended["event"]["number"].as_u64(), began["event"]["number"].as_u64().map(|n| n + 1));
    // The command shows the last one, and then what comes.
    let mut following = place.command(&["events", "--follow", "-n", "1"]);
    let mut following = following.stdout(Stdio::piped()).spawn().unwrap();
    let mut shown = BufReader::new(following.stdout.take().unwrap());
    let mut line = String::new();
    shown.read_line(&mut line).unwrap();
    assert!(line.contains("pause ended in Done"), "{line}");
    running.signal(Signal::TERM);
    let mut last = client.answer(1);
    while last.get("event").is_some() {
        last = client.answer(1);
    }
    assert_eq!(last["end"], "the machine has ended");
    assert!(running.ends().status.success());
    let mut rest = String::new();
    shown.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("engine0 (1) exited with status 0"), "{rest}");
    assert_eq!(following.wait().unwrap().code(), Some(0));
}

#[test]
fn guest_ram_is_declared_from_the_file_and_later() {
    let place = Place::new();
    place.write("ram", "guest memory");
    let ram = format!("ram = [{{ path = {:?} }}]", place.path("ram"));
    let _running = place.run(&two_engines(&ram));
    let other = place.write("other", "more of it");
    assert!(place.expect(0, &["declare-ram", "other"]).contains("is guest RAM"));
    std::fs::remove_file(other).unwrap();
    let said = place.expect(1, &["declare-ram", "other"]);
    assert!(said.contains("No such file"), "{said}");
    let said = place.expect(1, &["declare-ram", "/dev/null"]);
    assert!(said.contains("no regular file"), "{said}");
}

#[test]
fn what_a_launcher_has_left_open_does_not_reach_devices() {
    let place = Place::new();
    let file = place.write("vm0.toml", &two_engines(""));
    let secret = place.write("secret", "not for devices");
    let run = place.command(&["run", file.to_str().unwrap()]);
    let mut launcher = std::process::Command::new("sh");
    launcher
        .args(["-c", "exec 9< \"$0\"; exec \"$@\""])
        .arg(&secret)
        .arg(run.get_program())
        .args(run.get_args())
        .envs(run.get_envs().filter_map(|(name, value)| Some((name, value?))))
        .current_dir(place.folder.path())
        .stdin(Stdio::null());
    let mut running = place.spawn(launcher);
    running.is_up();
    let has = |pid: u64| {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let mut targets = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        targets.any(|target| target == secret)
    };
    assert!(has(u64::try_from(running.pid().as_raw_pid()).unwrap()), "the test shows nothing");
    assert!(!has(place.pid_of("engine0")));
}
