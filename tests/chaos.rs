//! `standstill chaos` as a user runs it: every fault comes to what the table says, random ones to what can
//! be, a liar is found and made small, and nothing is left however it ends.

#![cfg(feature = "fault-injection")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::process::{Child, Command, Output};
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
    // One seed: not every one comes to its end on CPUs with much to do (docs/verification.md).
    let (result, code) = json(&["--seed", "401", "--rounds", "30"]);
    assert_eq!(code, Some(0), "{result:#}");
    // A plan has three rounds at most, and one after them.
    assert!(result["plans"].as_u64().unwrap() >= 8, "{result:#}");
    assert_eq!((&result["violations"], &result["seed"]), (&0.into(), &401.into()));
    assert!(result["faults_fired"].as_u64().unwrap() > 0, "{result:#}");

    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("faults.md");
    let (result, code) =
        json(&["--sweep", "--at-once", "24", "--markdown", page.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{result:#}");
    let plans = result["plans"].as_u64().unwrap();
    assert!(plans > 900, "{result:#}");
    assert!(result["faults_fired"].as_u64().unwrap() >= plans, "{result:#}");
    assert_eq!((&result["fds_left"], &result["threads_left"]), (&0.into(), &0.into()));
    for outcome in [
        "Done",
        "RolledBack",
        "Stopped",
        "Degraded running",
        "Degraded stopped",
        "lost",
        "given up",
        "not started",
        "Held",
    ] {
        assert!(result["outcomes"][outcome].as_u64().unwrap_or(0) > 0, "{outcome}: {result:#}");
    }

    let found = Page::read(&std::fs::read_to_string(&page).unwrap());
    let written = Page::read(include_str!("../docs/faults.md"));
    assert_eq!(written.text, found.text, "docs/faults.md is not what happened");
    for (cell, found) in &found.cells {
        assert_eq!(written.cells.get(cell), Some(found), "docs/faults.md at {cell:?}");
    }
    assert_eq!(written.cells.len(), found.cells.len(), "docs/faults.md says more than happened");
}

/// `docs/faults.md`, or one like it.
struct Page {
    /// All but the tables.
    text: Vec<String>,
    /// By policy, fault, place and column: what has come and what could have. Which of several things comes is
    /// not the same each time.
    cells: BTreeMap<[String; 4], BTreeSet<String>>,
}

impl Page {
    fn read(text: &str) -> Self {
        let mut page = Self { text: Vec::new(), cells: BTreeMap::new() };
        let (mut policy, mut columns) = (String::new(), Vec::new());
        for line in text.lines() {
            let Some(row) = line.strip_prefix("| ").and_then(|row| row.strip_suffix(" |")) else {
                if let Some(heading) = line.strip_prefix("## ") {
                    heading.clone_into(&mut policy);
                }
                page.text.push(line.to_owned());
                continue;
            };
            let fields: Vec<_> = row.split('|').map(str::trim).collect();
            let [words, place, cells @ ..] = &fields[..] else { panic!("no row: {line}") };
            if *words == "fault" {
                columns = cells.iter().map(|&column| column.to_owned()).collect();
                continue;
            }
            assert_eq!(cells.len(), columns.len(), "{line}");
            for word in words.split(", ") {
                for (column, cell) in columns.iter().zip(cells) {
                    let cell = cell.replace(" (or ", " or ").replace(')', "");
                    let key = [policy.as_str(), word, place, column].map(str::to_owned);
                    let courses = cell.split(" or ").map(str::to_owned).collect();
                    assert_eq!(page.cells.insert(key, courses), None, "twice: {line}");
                }
            }
        }
        page
    }
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
    // Long enough on CPUs that have much to do.
    let (result, code) = json(&["--plan", plan.to_str().unwrap(), "--shrinking", "1h"]);
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

/// One whose gate is closed by the undo of a start, or by a hold, and who goes on writing.
const LIAR_AFTERWARDS: &str = r#"
devices = 3

[[fault]]
device = 1
inside = { point = { before-ack = "Stop" }, nth = NTH, action = "keep-dma" }

"#;

#[test]
fn a_liar_is_found_wherever_its_machine_stands() {
    let refuses = |phase| {
        format!(
            "[[fault]]\ndevice = 0\n\
             inside = {{ point = {{ receipt = \"{phase}\" }}, action = {{ refuse = 16 }} }}\n"
        )
    };
    let hangs = |call| {
        format!("[[hook]]\nplace = \"after\"\ncall = \"{call}\"\naction = {{ stick-ms = 0 }}\n")
    };
    for (nth, other, outcome) in [
        ("2", refuses("PrepareStart"), "RolledBack"),
        ("2", refuses("Start"), "RolledBack"),
        ("2", hangs("start"), "Held"),
        ("1", hangs("stop"), "Held"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let plan = folder.path().join("liar.toml");
        std::fs::write(&plan, LIAR_AFTERWARDS.replace("NTH", nth) + &other).unwrap();
        let (result, code) = json(&["--plan", plan.to_str().unwrap()]);
        assert_eq!(code, Some(1), "{other}{result:#}");
        assert_eq!(result["outcomes"][outcome], 1, "{other}{result:#}");
        let found = result["failures"][0]["violations"].to_string();
        assert!(found.contains("guest RAM changed"), "{other}{result:#}");
    }
}

/// A part of the sweep: as many faults as there is time for here.
#[test]
fn a_disk_at_work_that_fails_comes_to_what_is_written_and_its_requests_are_done_once() {
    let (result, code) = json(&["--disk", "--sweep", "--every", "7", "--at-once", "16"]);
    assert_eq!(code, Some(0), "{result:#}");
    let plans = result["plans"].as_u64().unwrap();
    assert!(plans > 60, "{result:#}");
    assert!(result["faults_fired"].as_u64().unwrap() >= plans, "{result:#}");
    assert_eq!((&result["fds_left"], &result["threads_left"]), (&0.into(), &0.into()));
}

#[test]
fn a_disk_that_goes_on_while_it_is_stopped_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("liar.toml");
    let text = "devices = 2\n[[fault]]\ndevice = 0\n\
                inside = { point = { before-ack = \"Stop\" }, action = \"keep-dma\" }\n";
    std::fs::write(&plan, text).unwrap();
    let (result, code) = json(&["--disk", "--plan", plan.to_str().unwrap()]);
    assert_eq!(code, Some(1), "{result:#}");
    let found = result["failures"][0]["violations"].to_string();
    assert!(found.contains("guest RAM changed"), "{result:#}");
    // What is printed says how it is run again, and that it is a plan for a disk.
    let smallest = result["failures"][0]["smallest"].as_str().unwrap();
    assert!(smallest.starts_with("# standstill chaos --disk --plan FILE\n"), "{result:#}");
}

#[test]
fn what_the_table_does_not_say_of_a_disk_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("disk.toml");
    let file = plan.to_str().unwrap();
    let text = |device| {
        format!(
            "devices = 2\n[[fault]]\ndevice = {device}\noutside = {{ moment = \"running\", \
             action = {{ limit = {{ resource = \"file-size\", value = 0 }} }} }}\n"
        )
    };
    std::fs::write(&plan, text(0)).unwrap();
    let output = chaos(&["--disk", "--plan", file]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    for words in ["limit of FileSize to 0", "nothing of a disk (device 0)"] {
        assert!(errors.contains(words), "{words:?} is not in\n{errors}");
    }
    // An engine among them writes to no file.
    std::fs::write(&plan, text(1)).unwrap();
    let (result, code) = json(&["--disk", "--plan", file]);
    assert_eq!(code, Some(0), "{result:#}");
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
    let json = chaos(&["--json", "--plan", plan.to_str().unwrap()]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    let told = json["error"].as_str().unwrap();
    for words in ["bad.toml", "line 13", "keep-dna", "did you mean `keep-dma`?"] {
        assert!(errors.contains(words), "{words:?} is not in\n{errors}");
        assert!(told.contains(words), "{words:?} is not in\n{told}");
    }
}

#[test]
fn what_no_outcome_is_known_of_is_refused_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("corrupt.toml");
    let text = "devices = 2\n[[fault]]\ndevice = 1\n\
                outside = { moment = { command = \"Stop\" }, action = { corrupt-at = 9 } }\n";
    std::fs::write(&plan, text).unwrap();
    let output = chaos(&["--plan", plan.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("packet corrupted at byte 9 with Stop on its way"), "{errors}");
}

/// A device that floods its coordinator and then hangs, and another one of which one packet is damaged and would
/// come twice.
const TWO_AT_ONCE: &str = r#"
devices = 3

[[fault]]
device = 0
inside = { point = { after-ack = "Stop" }, action = { message-flood = 3000 } }

[[fault]]
device = 0
inside = { point = { after-ack = "Stop" }, action = "spin" }

[[fault]]
device = 1
outside = { moment = { answer = "PrepareStop" }, action = "corrupt" }

[[fault]]
device = 1
outside = { moment = { answer = "PrepareStop" }, action = "duplicate" }
"#;

#[test]
fn of_two_faults_at_one_moment_none_keeps_the_other_from_happening() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("two.toml");
    for of in [0, 1] {
        let other = format!("device = {}\n", 1 - of);
        let faults = TWO_AT_ONCE.split("[[fault]]\n").filter(|fault| !fault.contains(&other));
        std::fs::write(&plan, faults.collect::<Vec<_>>().join("[[fault]]\n")).unwrap();
        let (result, code) = json(&["--plan", plan.to_str().unwrap()]);
        // The first one of each device is one by which it is lost.
        assert_eq!(code, Some(0), "{result:#}");
    }
}

/// A device that ends instead of greeting, and another one that would end later.
const NO_GREETING: &str = r#"
devices = 2

[[fault]]
device = 1
inside = { point = "hello", action = { exit = 1 } }

[[fault]]
device = 0
inside = { point = { receipt = "Stop" }, action = "abort" }
"#;

#[test]
fn a_machine_of_which_a_device_does_not_greet_does_not_start_and_nothing_is_left_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("greeting.toml");
    std::fs::write(&plan, NO_GREETING).unwrap();
    let (result, code) = json(&["--plan", plan.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{result:#}");
    assert_eq!(result["outcomes"], serde_json::json!({ "not started": 1 }), "{result:#}");
    assert_eq!(result["faults_fired"], 1, "{result:#}");

    // Nobody can say what comes of two things at once.
    let twice = NO_GREETING.replace("device = 0", "device = 1");
    let twice = twice.replace(r#"{ receipt = "Stop" }"#, r#""hello""#);
    std::fs::write(&plan, twice).unwrap();
    let output = chaos(&["--plan", plan.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("something else happens at that Hello already"), "{errors}");
}

/// The coordinator is killed in the second round, when a device has stopped.
const LOST_COORDINATOR: &str = r#"
devices = 2
rounds = 2

[[fault]]
device = 1
round = 2
outside = { moment = { answer = "Stop" }, action = "kill-coordinator" }
"#;

#[test]
fn a_machine_whose_coordinator_is_lost_is_held_and_goes_on_when_its_owner_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("coordinator.toml");
    std::fs::write(&plan, LOST_COORDINATOR).unwrap();
    let (result, code) = json(&["--plan", plan.to_str().unwrap()]);
    assert_eq!(code, Some(0), "{result:#}");
    // A pause and a resume, and those of the owner after the take-over.
    assert_eq!(result["outcomes"], serde_json::json!({ "Done": 5, "Held": 1 }), "{result:#}");
    assert_eq!(result["faults_fired"], 1, "{result:#}");

    let other =
        "[[fault]]\ndevice = 0\ninside = { point = { receipt = \"Stop\" }, action = \"abort\" }\n";
    std::fs::write(&plan, [LOST_COORDINATOR, other].concat()).unwrap();
    let output = chaos(&["--plan", plan.to_str().unwrap()]);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{errors}");
    assert!(errors.contains("together with others"), "{errors}");
}

/// Is killed if a test does not come to its end.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// All processes below that one: its children, also those behind relays, and theirs.
fn below(process: u32) -> Vec<u32> {
    let text = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("children")).unwrap_or_default()
    };
    let tasks = std::fs::read_dir(format!("/proc/{process}/task"));
    let texts: Vec<_> = tasks.into_iter().flatten().map_while(Result::ok).map(text).collect();
    let children = texts.iter().flat_map(|text| text.split_whitespace());
    let mut all: Vec<u32> = children.filter_map(|pid| pid.parse().ok()).collect();
    for child in all.clone() {
        all.extend(below(child));
    }
    all
}

/// Interrupts it as soon as its devices are at work: so many processes below it, and some below those. What
/// it has said: the JSON object, and its standard error.
fn interrupt(args: &[&str], processes: usize) -> (Value, String) {
    let temporary = tempfile::Builder::new().prefix("t").tempdir_in("/tmp").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (object, log) = (folder.path().join("stdout"), folder.path().join("stderr"));
    let mut command = Killed(
        Command::new(env!("CARGO_BIN_EXE_standstill"))
            .arg("chaos")
            .args(args)
            .arg("--json")
            .env("TMPDIR", temporary.path())
            .stdout(File::create(&object).unwrap())
            .stderr(File::create(&log).unwrap())
            .spawn()
            .unwrap(),
    );
    let end = Instant::now() + Duration::from_secs(60);
    let devices: Vec<_> = loop {
        let children = below(command.0.id());
        let grandchildren = children.iter().flat_map(|&child| below(child)).count();
        if children.len() >= processes && grandchildren > 0 {
            let pidfd = |&pid: &u32| {
                let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
                pidfd_open(pid, PidfdFlags::empty()).ok()
            };
            break children.iter().filter_map(pidfd).collect();
        }
        let errors = std::fs::read_to_string(&log).unwrap();
        assert!(Instant::now() < end, "no devices; {errors}");
        std::thread::park_timeout(Duration::from_millis(5));
    };
    kill_process(Pid::from_child(&command.0), Signal::INT).unwrap();
    let status = command.0.wait().unwrap();
    let errors = std::fs::read_to_string(&log).unwrap();
    assert_eq!(status.code(), Some(130), "{errors}");
    for device in &devices {
        let time = Timespec { tv_sec: 30, tv_nsec: 0 };
        let ended = poll(&mut [PollFd::new(device, PollFlags::IN)], Some(&time)).unwrap();
        assert_eq!(ended, 1, "a process is left behind");
    }
    let left = std::fs::read_dir(temporary.path()).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "{left:?}");
    (serde_json::from_slice(&std::fs::read(&object).unwrap()).unwrap(), errors)
}

#[test]
fn after_sigint_no_process_and_no_file_is_left() {
    // One of them is behind a relay: a grandchild.
    // Nobody would wait until plans of so many rounds are drawn.
    let (object, errors) = interrupt(&["--rounds", "10000000", "--seed", "5"], 6);
    assert_eq!((&object["seed"], &object["error"]), (&5.into(), &"ended by SIGINT".into()));
    assert!(errors.contains("random faults from seed 5"), "{errors}");
}

#[test]
fn after_sigint_no_device_is_left_that_would_outlive_its_coordinator() {
    let folder = tempfile::tempdir().unwrap();
    let plan = folder.path().join("coordinator.toml");
    let late = LOST_COORDINATOR.replace("round = 2", "round = 100000");
    let late = late.replace("rounds = 2", "rounds = 100000");
    std::fs::write(&plan, late).unwrap();
    // The machine without faults has two. Here it is the coordinator, a device, a relay, its guard and the
    // device behind it.
    let (object, _) = interrupt(&["--plan", plan.to_str().unwrap()], 5);
    assert_eq!(object["seed"], Value::Null);
}
