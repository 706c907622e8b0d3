//! The demonstration as a user runs it: it keeps its promise, and without the first phase it
//! notices.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::Value;
use std::process::{Command, Output};

fn demo(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_standstill")).arg("demo").args(args).output().unwrap()
}

/// The last line of standard output as JSON, and the exit code.
fn json(args: &[&str]) -> (Value, Option<i32>) {
    let output = demo(&[args, &["--json"]].concat());
    let stdout = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = stdout.lines().last().unwrap_or_else(|| panic!("no output; {errors}"));
    let value = serde_json::from_str(last).unwrap_or_else(|e| panic!("{e}: {last}; {errors}"));
    (value, output.status.code())
}

#[test]
fn invariants_1_and_2_a_machine_of_engines_stands_still_and_goes_on_twenty_times() {
    let (result, code) = json(&["--devices", "4", "--rounds", "20"]);
    assert_eq!(code, Some(0), "{result:#}");
    assert_eq!(result["devices"], 4);
    assert_eq!(result["rounds"], 20);
    assert_eq!(result["single_phase"], false);
    assert_eq!(result["late_writes"], 0, "{:#}", result["late_write_examples"]);
    assert_eq!(result["rounds_without_traffic"], 0);
    // Every engine wrote to every one of its receivers in every round.
    let pairs = result["pairs"].as_u64().unwrap();
    assert!(result["writes_total"].as_u64().unwrap() >= 20 * pairs);
    for times in ["pause_ns", "resume_ns", "hash_ns"] {
        let spread = |key: &str| result[times][key].as_u64().unwrap();
        assert!(spread("p50") > 0 && spread("p50") <= spread("p99"), "{times}");
        assert!(spread("p99") <= spread("max"), "{times}");
    }
    for device in result["per_device"].as_array().unwrap() {
        assert_eq!(device["state"], "RUNNING", "{device:#}");
        assert!(device["bytes_per_second"].as_u64().unwrap() > 0, "{device:#}");
    }
}

#[test]
fn the_oracle_fails_without_the_first_phase_the_checks_find_late_writes() {
    // Long enough for the other engines to get some CPU on a machine that has much else to do.
    let slow = ["--slow-prepare", "engine1=200ms", "--slow-prepare", "engine3=200ms"];
    let (result, code) =
        json(&[&["--devices", "4", "--rounds", "10", "--single-phase"], &slow[..]].concat());
    assert_eq!(result["single_phase"], true);
    assert_eq!(result["rounds_without_traffic"], 0);
    let rounds = result["rounds_with_late_writes"].as_u64().unwrap();
    assert!(rounds >= 9, "late writes in {rounds} rounds only: the checks prove nothing");
    assert_eq!(code, Some(0), "{result:#}");
}

#[test]
fn invariant_2_quiet_with_the_first_phase_devices_that_are_slow_write_nothing_late() {
    // What the demonstration does by itself without the first phase.
    let slow = ["--slow-prepare", "engine1=5ms", "--slow-prepare", "engine3=5ms"];
    let (result, code) = json(&[&["--devices", "4", "--rounds", "10"], &slow[..]].concat());
    assert_eq!(result["late_writes"], 0, "{:#}", result["late_write_examples"]);
    assert_eq!(code, Some(0), "{result:#}");
}

#[test]
fn invariant_4_concurrency_a_phase_takes_as_long_as_its_slowest_device_and_not_as_long_as_all() {
    let slow = ["--slow-prepare", "all=200ms", "--slow-stop", "engine1=200ms"];
    let (result, code) = json(&[&["--devices", "4", "--rounds", "3"], &slow[..]].concat());
    assert_eq!(code, Some(0), "{result:#}");
    let pause = result["pause_ns"]["p50"].as_u64().unwrap();
    // At the same time it is 400 ms, one after another a second.
    assert!((400_000_000..1_000_000_000).contains(&pause), "{pause} ns");
}

#[test]
fn the_timeline_is_a_picture_and_the_table_is_for_people() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("round.svg");
    let path = file.to_str().unwrap();
    let output = demo(&["--devices", "2", "--rounds", "2", "--timeline", path]);
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{stdout}");
    for words in ["engine0", "engine1", "late writes", "PrepareStop", "memcpy", "OK:"] {
        assert!(stdout.contains(words), "{words:?} is not in\n{stdout}");
    }
    let picture = std::fs::read_to_string(&file).unwrap();
    assert!(picture.starts_with("<svg") && picture.contains("all are quiet"));
}

#[test]
fn options_that_do_not_fit_are_told_with_what_to_do() {
    let output = demo(&["--devices", "2", "--slow-stop", "engine7=1ms"]);
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(errors.contains("there is no engine7") && errors.contains("--help"), "{errors}");
}
