//! The runner of real guests: what is in a guest, what a test hears of it, and that nothing is left.

use rustix::process::Pid;
use serde_json::json;
use standstill_testkit::Processes;
use standstill_testkit::qemu::{CACHE_VARIABLE, GuestError, Qemu, QmpError, WITHOUT_VARIABLE};
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Longer than a guest takes for anything on a busy machine.
const LONG: Duration = Duration::from_secs(120);

/// What the test below does in the guest.
const VARIABLE: &str = "STANDSTILL_TEST_IN_GUEST";

#[test]
fn a_guest_has_its_modules_files_and_programs_and_does_what_it_is_told() {
    if std::env::var_os(VARIABLE).is_some() {
        println!("\nthe program runs in {}", std::fs::read_to_string("/etc/name").unwrap());
        return;
    }
    let Some(qemu) = Qemu::for_tests() else { return };
    let guest = qemu
        .guest()
        .memory(192 << 20)
        .module("virtio_blk")
        .file("/etc/name", "a guest", 0o644)
        .program("/usr/bin/probe", std::env::current_exe().unwrap())
        .init(&format!(
            "ls /sys/bus/virtio/drivers
             free -m | grep Mem
             echo ready; read name; echo \"hello $name\"
             {VARIABLE}=1 probe --exact a_guest_has_its_modules_files_and_programs_and_does_what_it_is_told --nocapture"
        ))
        .start()
        .unwrap();
    let console = guest.console();
    console.wait_for("virtio_blk", LONG).unwrap();
    let memory = console.wait_for("Mem:", LONG).unwrap();
    let megabytes: u64 = memory.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((120..192).contains(&megabytes), "{memory}");

    console.wait_for("ready", LONG).unwrap();
    guest.stop().unwrap();
    guest.qmp().wait_for("STOP", LONG).unwrap();
    assert_eq!(guest.qmp().execute("query-status", &json!({})).unwrap()["status"], "paused");
    console.write("world").unwrap();
    let error = console.wait_for("hello", Duration::from_millis(300)).unwrap_err();
    assert!(matches!(error, GuestError::Late { .. }), "its processors stand: {error}");
    guest.go_on().unwrap();
    console.wait_for("hello world", LONG).unwrap();
    console.wait_for("the program runs in a guest", LONG).unwrap();
    assert!(guest.wait(LONG).unwrap().success(), "the guest has turned itself off");
    assert!(guest.transcript().contains("the program runs in a guest"));
    let error = guest.qmp().execute("cont", &json!({})).unwrap_err();
    assert!(matches!(error, QmpError::Ended { .. } | QmpError::GivenUp(_)), "{error}");
}

#[test]
fn a_guest_that_is_reset_begins_again_and_one_that_is_dropped_is_gone() {
    let Some(qemu) = Qemu::for_tests() else { return };
    let guest = qemu.guest().init("echo up; read line").start().unwrap();
    guest.console().wait_for("up", LONG).unwrap();
    guest.reset().unwrap();
    guest.console().wait_for("up", LONG).unwrap();
    let mut processes = Processes::none();
    processes.add("QEMU", guest.process());
    assert_eq!(processes.left(), ["QEMU"]);
    drop(guest);
    assert_eq!(processes.left(), [""; 0]);
}

#[test]
fn a_qemu_that_does_not_start_says_why() {
    let Some(qemu) = Qemu::for_tests() else { return };
    let error = qemu.guest().device(&json!({ "driver": "flux-capacitor" })).start().unwrap_err();
    assert!(error.to_string().contains("flux-capacitor"), "{error}");
    let error = qemu.guest().module("flux").start().unwrap_err();
    assert!(matches!(error, GuestError::Module(_)), "{error}");
}

/// Runs a test of this program again, with a variable.
#[expect(clippy::unwrap_used, reason = "a test fails by panicking")]
fn again(test: &str, variable: (&str, &str)) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env(variable.0, variable.1);
    command
}

#[test]
fn qemu_ends_with_a_test_program_that_is_killed() {
    const MARK: &str = "QEMU has pid ";
    let inside = std::env::var_os(VARIABLE).is_some();
    let Some(qemu) = Qemu::for_tests() else { return };
    if inside {
        let guest = qemu.guest().init("read line").start().unwrap();
        println!("\n{MARK}{}", guest.process().as_raw_pid());
        std::thread::park();
    }
    let test = "qemu_ends_with_a_test_program_that_is_killed";
    let mut program = again(test, (VARIABLE, "1")).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(program.stdout.take().unwrap()).lines().map_while(Result::ok);
    let pid = lines.find_map(|line| line.strip_prefix(MARK)?.parse().ok()).unwrap();
    let mut processes = Processes::none();
    processes.add("QEMU", Pid::from_raw(pid).unwrap());
    assert_eq!(processes.left(), ["QEMU"]);
    program.kill().unwrap();
    program.wait().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(processes.assert_gone_within(LONG));
}

#[test]
fn a_test_is_left_out_only_when_it_is_said_and_says_so_itself() {
    let test = "a_qemu_that_does_not_start_says_why";
    let left_out = again(test, (WITHOUT_VARIABLE, "1")).output().unwrap();
    let said = String::from_utf8(left_out.stderr).unwrap();
    assert!(left_out.status.success(), "{said}");
    assert!(said.contains(&format!("LEFT OUT, since {WITHOUT_VARIABLE}=1: {test}")), "{said}");

    // There is no room for what would be fetched.
    let fails = again(test, (CACHE_VARIABLE, "/proc/nowhere"));
    let fails = { fails }.env_remove(WITHOUT_VARIABLE).output().unwrap();
    let said = String::from_utf8(fails.stderr).unwrap();
    assert!(!fails.status.success(), "{said}");
    let says = ["/proc/nowhere", "STANDSTILL_TESTS_WITHOUT_QEMU=1 leaves"];
    assert!(says.iter().all(|text| said.contains(text)), "{said}");
}
