//! A runtime directory on a disk that is full, or becomes it.

use crate::fixture::{PATIENCE, Place, two_engines};
use rustix::process::{Signal, kill_process};
use serde_json::Value;
use standstill_testkit::outside::SmallDisk;
use std::process::{Command, Output};
use std::time::Instant;

/// A machine whose runtime directory only its own processes see.
struct Elsewhere {
    place: Place,
    disk: SmallDisk,
}

impl Elsewhere {
    fn new(bytes: u64) -> Self {
        let place = Place::new();
        std::fs::create_dir(place.runtime()).unwrap();
        let disk = SmallDisk::new(place.runtime(), bytes);
        Self { place, disk }
    }

    fn run(&self, lines: &str) -> Command {
        let file = self.place.write("vm0.toml", &two_engines(lines));
        self.disk.command(&self.place.command(&["run", file.to_str().unwrap()]))
    }
}

#[test]
fn a_machine_whose_runtime_directory_is_full_does_not_start_and_says_why() {
    let elsewhere = Elsewhere::new(4096);
    elsewhere.place.write("vm0.toml", &two_engines(""));
    // The disk is full before the program begins.
    let full = elsewhere.place.runtime().join("full");
    let script = format!("head -c 4096 /dev/zero > {}; exec \"$@\"", full.display());
    let inner = elsewhere.place.command(&["run", "vm0.toml"]);
    let mut shell = Command::new("sh");
    shell.args(["-c", &script, "sh"]).arg(inner.get_program()).args(inner.get_args());
    for (name, value) in inner.get_envs() {
        value.map(|value| shell.env(name, value));
    }
    shell.current_dir(elsewhere.place.folder.path());
    let output = elsewhere.disk.command(&shell).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("No space left on device"), "{text}");
    assert!(text.contains("machine.json"), "it does not say which file: {text}");
}

#[test]
fn a_runtime_directory_that_fills_up_hinders_no_pause_and_a_restart_only_until_it_is_freed() {
    let elsewhere = Elsewhere::new(64 << 10);
    let mut running = elsewhere.place.spawn(elsewhere.run("on-loss = \"restart\"\n"));
    running.is_up();
    let pid = running.pid();
    // Operators come by the machine's own view of its files.
    let runtime = format!("/proc/{}/root{}", pid.as_raw_pid(), elsewhere.place.runtime().display());
    let ask = |args: &[&str]| -> Output {
        let mut command = elsewhere.place.command(args);
        command.env("STANDSTILL_RUNTIME_DIR", &runtime).output().unwrap()
    };
    let expect = |args: &[&str]| {
        let output = ask(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
    };
    let engine1 = || -> Value {
        let status: Value = serde_json::from_slice(&ask(&["status", "--json"]).stdout).unwrap();
        status["devices"][1].clone()
    };
    let until = |what: &str, is_so: &dyn Fn(&Value) -> bool| {
        let end = Instant::now() + PATIENCE;
        loop {
            let device = engine1();
            if is_so(&device) {
                return device;
            }
            assert!(Instant::now() < end, "never {what}: {device}");
        }
    };
    elsewhere.disk.fill(pid).unwrap();
    for _ in 0..2 {
        expect(&["pause"]);
        expect(&["resume"]);
    }
    let before = engine1();
    let lost = i32::try_from(before["pid"].as_u64().unwrap()).unwrap();
    kill_process(rustix::process::Pid::from_raw(lost).unwrap(), Signal::KILL).unwrap();
    // It is fenced, but cannot come back: what a later coordinator must know is written down first.
    let gone = until("given up", &|device| device["standing"] == "fenced");
    assert!(gone.to_string().contains("No space left"), "it does not say why: {gone}");
    elsewhere.disk.free(pid).unwrap();
    expect(&["restart", "engine1"]);
    let back = until("back", &|device| device["standing"] == "ready");
    assert!(back["incarnation"].as_u64() > before["incarnation"].as_u64(), "{back}");
    expect(&["pause"]);
    expect(&["resume"]);
    expect(&["shutdown"]);
    assert!(running.ends().status.success());
}
