//! `standstill chaos` as a user runs it: every fault comes to what the table says, random ones to what can
//! be, a liar is found and made small, and nothing is left however it ends.

#![cfg(feature = "fault-injection")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::io::Read;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn chaos(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_standstill")).arg("chaos").args(args).output().unwrap()
}

/// The last line of standard output as JSON, and the exit code.
fn json(args: &[&str]) -> (Value, Option<i32>) {
    let output = chaos(&[args, &["--json"]].concat());
    let stdout = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("no output; {errors}"));
    let value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {last}; {errors}"));
    (value, output.status.code())
}

/// Several faults at once, from a seed; and then every fault in every phase on every device. One test,
/// since each takes what there is of CPUs.
#[test]
fn invariants_5_6_and_8_whatever_fails_comes_to_what_is_written_and_nothing_is_left() {
    let (result, code) = json(&["--seed", "1", "--rounds", "20"]);
    assert_eq!(code, Some(0), "{result:#}");
    assert!(result["rounds"].as_u64().unwrap() >= 15, "{result:#}");
    assert_eq!((&result["violations"], &result["seed"]), (&0.into(), &1.into()));
    assert!(result["faults_fired"].as_u64().unwrap() >= 8, "{result:#}");

    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("faults.md");
    let (result, code) =
        json(&["--sweep", "--at-once", "24", "--markdown", page.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{result:#}");
    let plans = result["plans"].as_u64().unwrap();
    assert!(plans > 900, "{result:#}");
    assert!(result["faults_fired"].as_u64().unwrap() >= plans, "{result:#}");
    assert_eq!((&result["fds_left"], &result["threads_left"]), (&0.into(), &0.into()));
    for outcome in ["Done", "RolledBack", "Stopped", "Degraded running", "Degraded stopped", "lost"]
    {
        assert!(result["outcomes"][outcome].as_u64().unwrap_or(0) > 0, "{outcome}: {result:#}");
    }

    let written = include_str!("../docs/faults.md");
    let found = std::fs::read_to_string(&page).unwrap();
    let differs = written.lines().zip(found.lines()).find(|(written, found)| written != found);
    assert_eq!(differs, None, "docs/faults.md is not what happened");
    assert_eq!(
        written.lines().count(),
        found.lines().count(),
        "docs/faults.md is not what happened"
    );
}

/// One who goes on writing after he has said that he stands, and others who do no harm.
const LIAR: &str = r#"
devices = 4
rounds = 3
policy = "stay-stopped"

[[fault]]
device = 0
inside = { point = { before-ack = "PrepareStop" }, action = { delay-ms = 5 } }

[[fault]]
device = 2
round = 2
inside = { point = { before-ack = "Stop" }, action = "keep-dma" }

[[fault]]
device = 3
round = 1
inside = { point = { before-ack = "Start" }, action = "two-acks" }
"#;

#[test]
fn the_liar_is_found_by_its_late_writes_and_is_all_that_is_left_of_its_plan() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("liar.toml");
    std::fs::write(&plan, LIAR).unwrap();
    let (result, code) = json(&["--plan", plan.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{result:#}");
    let failure = &result["failures"][0];
    let found = failure["violations"].to_string();
    assert!(found.contains("engine2") && found.contains("round 2"), "{result:#}");

    let smallest = failure["smallest"].as_str().unwrap();
    let small = standstill_testkit::plan::Plan::from_toml(smallest).unwrap();
    assert_eq!((small.faults.len(), small.rounds, small.devices), (1, 1, 2), "{smallest}");
    assert!(smallest.contains("keep-dma"), "{smallest}");
    // It is the same failure.
    std::fs::write(&plan, smallest).unwrap();
    let (result, code) = json(&["--plan", plan.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{result:#}");
}

#[test]
fn a_summary_for_people_says_what_came_of_what() {
    let output = chaos(&["--seed", "3", "--rounds", "6"]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}\n{}", String::from_utf8_lossy(&output.stderr));
    for words in ["phase", "outcome", "faults have happened (seed 3)", "OK: everything"] {
        assert!(stdout.contains(words), "{words:?} is not in\n{stdout}");
    }
}

#[test]
fn what_is_no_plan_is_told_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("bad.toml");
    std::fs::write(&plan, LIAR.replace("keep-dma", "keep-dna")).unwrap();
    let output = chaos(&["--plan", plan.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    for words in ["bad.toml", "line 13", "keep-dna", "did you mean `keep-dma`?"] {
        assert!(errors.contains(words), "{words:?} is not in\n{errors}");
    }
}

#[test]
fn after_sigint_no_process_is_left() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_standstill"))
        .args(["chaos", "--rounds", "100000"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let group = || -> Vec<u32> {
        let text = |task: std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("children")).unwrap_or_default()
        };
        let tasks = std::fs::read_dir(format!("/proc/{}/task", command.id()));
        let tasks = tasks.into_iter().flatten().map_while(Result::ok);
        let all: Vec<_> = tasks.map(text).collect();
        all.iter().flat_map(|t| t.split_whitespace()).filter_map(|pid| pid.parse().ok()).collect()
    };
    let end = Instant::now() + Duration::from_secs(60);
    let devices = loop {
        let devices = group();
        if devices.len() >= 6 {
            break devices;
        }
        assert!(Instant::now() < end, "no devices");
        std::thread::park_timeout(Duration::from_millis(5));
    };
    kill_process(Pid::from_child(&command), Signal::INT).unwrap();
    let status = command.wait().unwrap();
    let mut errors = String::new();
    command.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert_eq!(status.code(), Some(130), "{errors}");
    let end = Instant::now() + Duration::from_secs(10);
    let lives = |pid: &&u32| std::path::Path::new(&format!("/proc/{pid}/exe")).read_link().is_ok();
    while devices.iter().any(|pid| lives(&pid)) {
        assert!(Instant::now() < end, "devices are left behind");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}
