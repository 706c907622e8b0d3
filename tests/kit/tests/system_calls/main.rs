//! The list of system calls that a coordinator makes is what it makes: nothing else, and all of it.
#![cfg(target_arch = "x86_64")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod tracer;

use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::system_calls::{Phase, SYSTEM_CALLS, SystemCall, Thread};
use standstill_testkit::script::rogue_device;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs::read_to_string;
use std::process::{Command, Stdio};
use tempfile::TempDir;
use tracer::{Seen, trace};

/// Where the program has its files. Of a machine that it has left behind, nothing is left.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &str {
        self.0.path().to_str().unwrap()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // There is none unless the program has failed.
        let Ok(record) = read_to_string(self.0.path().join("vm/machine.json")) else { return };
        let record: serde_json::Value = serde_json::from_str(&record).unwrap_or_default();
        let devices = record["devices"].as_array().into_iter().flatten();
        for pid in devices.filter_map(|device| device["process"]["pid"].as_i64()) {
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
            // One that has ended is not reused so soon.
            let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
        }
    }
}

/// By their number in the program `embedder`, from 1.
const PHASES: [Phase; 7] = [
    Phase::Start,
    Phase::Running,
    Phase::Transition,
    Phase::Loss,
    Phase::Membership,
    Phase::Shutdown,
    Phase::TakeOver,
];

/// What was done when it was made, and before that; `None` for nothing of the coordinator's.
fn phases(seen: &Seen) -> [Option<Phase>; 2] {
    [seen.phase, seen.before].map(|number| {
        let number = usize::try_from(number).unwrap().checked_sub(1)?;
        Some(PHASES[number])
    })
}

/// The threads whose list allows it.
fn threads(flavour: &str, seen: &Seen) -> &'static [Thread] {
    match (seen.thread.as_str(), flavour) {
        ("standstill-spaw", _) => &[Thread::Spawn],
        ("embedder", "blocking") => &[Thread::Caller],
        (_, "blocking") => &[Thread::Machine],
        // The caller's thread and the machine's are one.
        _ => &[Thread::Machine, Thread::Caller],
    }
}

fn name(number: i64) -> String {
    let listed = SYSTEM_CALLS.iter().find(|call| call.number == number);
    if let Some(call) = listed {
        return call.name.to_owned();
    }
    // The C toolchain's own list, where it is.
    let header = read_to_string("/usr/include/x86_64-linux-gnu/asm/unistd_64.h");
    let ending = format!(" {number}");
    let header = header.unwrap_or_default();
    let line = header.lines().find(|line| line.ends_with(&ending));
    let name = line.and_then(|line| line.strip_prefix("#define __NR_"));
    name.and_then(|line| line.split(' ').next()).unwrap_or("unknown").to_owned()
}

#[test]
fn a_machine_makes_the_system_calls_that_are_listed_and_no_others() {
    let program = rogue_device().unwrap().with_file_name("embedder");
    assert!(program.is_file(), "{} is missing: build the bins of this package", program.display());
    let mut unlisted = BTreeSet::new();
    let mut made = BTreeSet::new();
    for flavour in ["blocking", "async"] {
        let folder = Folder::new();
        for seen in trace(&program, &[flavour, folder.path()]) {
            let threads = threads(flavour, &seen);
            let phases = phases(&seen);
            let allows = |call: &&SystemCall| {
                call.number == seen.number
                    && threads.contains(&call.thread)
                    && phases.iter().flatten().any(|phase| call.phases.contains(phase))
            };
            match SYSTEM_CALLS.iter().find(allows) {
                Some(call) if flavour == "blocking" => _ = made.insert((call.name, call.thread)),
                Some(_) => {}
                None => {
                    let Seen { number, thread, .. } = seen;
                    let name = name(number);
                    unlisted.insert(format!("{name} ({number}) by {thread} in {phases:?}"));
                }
            }
        }
    }
    assert!(unlisted.is_empty(), "made, but not listed: {unlisted:#?}");
    let unmade: Vec<_> = SYSTEM_CALLS
        .iter()
        .filter(|call| !call.sometimes && !made.contains(&(call.name, call.thread)))
        .map(|call| format!("{} by {:?}", call.name, call.thread))
        .collect();
    assert!(unmade.is_empty(), "listed, and not `sometimes`, but not made: {unmade:#?}");
}

/// Device processes are started by a thread without a filter, and are none of its business.
#[test]
fn a_machine_that_is_sealed_into_the_list_does_everything() {
    let program = rogue_device().unwrap().with_file_name("embedder");
    let folder = Folder::new();
    let mut embedder = Command::new(program);
    embedder.args(["sealed", folder.path()]).stdin(Stdio::null());
    let output = embedder.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{errors}", output.status);
}

#[test]
fn each_is_listed_once_for_each_kind_of_threads() {
    let mut seen = BTreeSet::new();
    for call in SYSTEM_CALLS {
        assert!(seen.insert((call.number, call.thread)), "{} is there twice", call.name);
        assert!(!call.phases.is_empty() && !call.purpose.is_empty(), "{}", call.name);
    }
}

/// The table of one kind of threads, as the page has it.
fn table(thread: Thread) -> String {
    let mut text = "| system call | when | what for |\n|---|---|---|\n".to_owned();
    let mut calls: Vec<_> = SYSTEM_CALLS.iter().filter(|call| call.thread == thread).collect();
    calls.sort_by_key(|call| (call.sometimes, call.name));
    for call in calls {
        let phases = if call.phases.len() == PHASES.len() {
            "always".to_owned()
        } else {
            let word = |phase: &Phase| match phase {
                Phase::Start => "start",
                Phase::Running => "running",
                Phase::Transition => "transition",
                Phase::Loss => "loss",
                Phase::Membership => "membership",
                Phase::Shutdown => "shutdown",
                Phase::TakeOver => "take-over",
            };
            call.phases.iter().map(word).collect::<Vec<_>>().join(", ")
        };
        let sometimes = if call.sometimes { " *" } else { "" };
        writeln!(text, "| `{}`{sometimes} | {phases} | {} |", call.name, call.purpose).unwrap();
    }
    text
}

#[test]
fn the_page_has_the_same_list() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/system-calls.md");
    let page = read_to_string(page).unwrap();
    for (thread, mark) in
        [(Thread::Caller, "caller"), (Thread::Machine, "machine"), (Thread::Spawn, "spawn")]
    {
        let (begin, end) = (format!("<!-- {mark}: begin -->"), format!("<!-- {mark}: end -->"));
        let between = page.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end));
        let (found, _) = between.unwrap_or_else(|| panic!("no {begin} … {end}"));
        let expected = table(thread);
        assert_eq!(found.trim(), expected.trim(), "the page should have:\n{expected}");
    }
}
