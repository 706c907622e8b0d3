//! Every example runs, and says what it is to show; the two that are promised to be short are.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs::read_to_string;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// How long one may take; long, since tests run on busy machines.
const PATIENCE: Duration = Duration::from_secs(120);

/// The examples that play the VMM. `scratch_device` is run by `own_binary`.
const VMMS: [&str; 10] = [
    "embed",
    "embed_blocking",
    "failures",
    "foreign_backend",
    "foreign_device",
    "launch_join",
    "local_device",
    "own_binary",
    "vcpus",
    "vhost_user_backend",
];

/// Where cargo has put an example: beside the folder of this test's program.
fn program(example: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let program = test.ancestors().nth(2).unwrap().join("examples").join(example);
    assert!(
        program.is_file(),
        "{} is missing: build it with `cargo build --examples`, in the profile of this test \
         (`cargo test` does)",
        program.display()
    );
    program
}

/// Runs an example to its good end; what it has printed.
fn run(example: &str) -> String {
    run_with(example, &[])
}

fn run_with(example: &str, arguments: &[&str]) -> String {
    let child = Command::new(program(example))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = rustix::process::Pid::from_child(&child);
    let (done, output) = mpsc::channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    let Ok(output) = output.recv_timeout(PATIENCE) else {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        panic!("{example} has not ended after {PATIENCE:?}");
    };
    let output = output.unwrap();
    let [text, errors] =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert!(output.status.success(), "{example}: {}\n{text}\n{errors}", output.status);
    text
}

/// Checks that these are said, in this order.
fn says(example: &str, words: &[&str]) {
    let text = run(example);
    let mut rest = text.as_str();
    for word in words {
        match rest.split_once(word) {
            Some((_, after)) => rest = after,
            None => panic!("{example} does not say {word:?} where it should:\n{text}"),
        }
    }
}

/// Lines that are neither blank nor nothing but a comment, of a file that rustfmt has formatted:
/// `use`, attributes, `main` and closing braces count.
fn lines(example: &str) -> usize {
    let path = format!("{}/examples/{example}.rs", env!("CARGO_MANIFEST_DIR"));
    let text = read_to_string(path).unwrap();
    let code = |line: &&str| !line.trim().is_empty() && !line.trim().starts_with("//");
    text.lines().filter(code).count()
}

#[test]
fn there_is_no_example_that_is_not_run() {
    let folder = format!("{}/examples", env!("CARGO_MANIFEST_DIR"));
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let there: BTreeSet<_> = files
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let run = VMMS.iter().chain(&["scratch_device"]).map(ToString::to_string).collect();
    assert_eq!(there, run);
}

#[test]
fn a_vmm_has_thirty_lines_a_sweep_forty_and_a_device_that_can_migrate_fifty() {
    assert!(lines("embed") <= 30, "embed has {} lines", lines("embed"));
    assert!(lines("foreign_device") < 40, "foreign_device has {}", lines("foreign_device"));
    assert!(lines("scratch_device") <= 50, "scratch_device has {}", lines("scratch_device"));
}

#[test]
fn embed_pauses_and_resumes() {
    says("embed", &["pause: Done", "engine0", "→ STOP", "resume: Done", "→ RUNNING"]);
}

#[test]
fn embed_blocking_pauses_vcpus_first_and_resumes_them_last() {
    says("embed_blocking", &["vCPUs pause", "pause: Done", "resume: Done", "vCPUs resume"]);
}

#[test]
fn failures_are_reported() {
    let words = ["engine0 (1) is fenced", "engine0 (2) has joined", "pause: Degraded", "engine1"];
    says("failures", &words);
}

#[test]
fn launch_and_join_go_through_the_event_loop() {
    let words = [
        "told to be quiet",
        "event: pause begins",
        "no device writes",
        "pause: Done",
        "every device accepts",
        "resume: Done",
    ];
    says("launch_join", &words);
}

#[test]
fn a_local_device_takes_part_in_both_phases() {
    let words = ["pause: Done", "0000:3b:00.0", "→ RUNNING_P2P", "→ STOP", "resume: Done"];
    says("local_device", &words);
}

#[test]
fn a_device_with_a_program_of_its_own_is_started_and_ends() {
    let words = ["scratch1 is scratch", "resume: Done", "scratch0: exited with status 0"];
    says("own_binary", &words);
}

#[test]
fn a_backend_of_another_server_is_paused_and_goes_on_where_it_was() {
    let words = [
        "gpio0 is gpio",
        "the crate's client reads 0 0 1 0 and sees 1 interrupt",
        "pause: Done",
        "refused: Invalid argument",
        "resume: Done",
        "our client reads 0 1 0 0 and sees 1 interrupt",
    ];
    says("foreign_backend", &words);
}

#[test]
fn a_backend_of_the_vhost_user_crate_is_paused_and_its_request_waits() {
    let words = [
        "numbers0 is numbers",
        "the guest gets 0 1 2",
        "pause: Done",
        "1 request waits",
        "resume: Done",
        "the guest gets 3 4 5",
    ];
    says("vhost_user_backend", &words);
}

/// A part of the sweep; `standstill chaos --sweep` and the kit's own tests do it whole.
#[test]
fn a_foreign_device_goes_through_the_sweep() {
    let text = run_with("foreign_device", &["12"]);
    for words in ["faults have happened", "Done", "Degraded running", "Degraded stopped"] {
        assert!(text.contains(words), "{words:?} is not in\n{text}");
    }
}

#[test]
fn vcpus_stand_while_the_machine_stands() {
    let text = run("vcpus");
    let at = |what: &str| -> u64 {
        let (_, rest) = text.split_once(what).unwrap_or_else(|| panic!("{text}"));
        rest.lines().next().unwrap().parse().unwrap_or_else(|_| panic!("{text}"))
    };
    let stands = at("vCPUs stand at instruction ");
    assert!(stands > 0);
    assert_eq!(stands, at("vCPUs go on from instruction "), "{text}");
    assert!(text.contains("resume: Done"), "{text}");
}
