//! A machine of `standstill run` with a VM: the processors of a real QEMU stop before the devices and go
//! on after them.

use crate::driver::Role;
use crate::machine::{LONG, name};
use crate::watched::{self, driver_begins, engine_writes, rounds_go_on};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use standstill_testkit::qemu::{Guest, Qemu};
use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::Instant;
use tempfile::TempDir;

/// How often the machine is paused and resumed.
const PAUSES: usize = 20;
/// How many engines it has.
const ENGINES: usize = 2;

/// A `standstill run` and a guest that drives its engines.
struct Operated {
    // First: QEMU must not see its devices die.
    guest: Guest,
    run: Child,
    folder: TempDir,
}

/// `standstill` with these arguments, in the folder of a machine.
fn standstill(folder: &TempDir, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_standstill"));
    command
        .args(arguments)
        .env("STANDSTILL_RUNTIME_DIR", folder.path())
        .env("RUST_LOG", "warn")
        .current_dir(folder.path())
        .stdin(Stdio::null());
    command
}

impl Operated {
    /// `None` if tests with QEMU are left out.
    fn start() -> Option<Self> {
        let qemu = Qemu::for_tests()?;
        let folder = tempfile::Builder::new().prefix("vm-").tempdir_in("/tmp").unwrap();
        // Whatever the machine running the test has else to do, only QEMU's own deadline is short.
        let mut text = String::from(
            "name = \"vm0\"\nqmp = \"qmp\"\norphan = \"exit\"\n\
             deadlines = { qmp = \"20s\", first-phase = \"60s\", second-phase = \"60s\" }\n",
        );
        for number in 0..ENGINES {
            let name = name(number);
            text.push_str(&format!(
                "[[device]]\nname = {name:?}\nkind = \"copy-engine\"\nsocket = {name:?}\n\
                 memory = \"64KiB\"\nclient = \"qemu\"\n"
            ));
        }
        std::fs::write(folder.path().join("vm0.toml"), text).unwrap();
        let mut run =
            standstill(&folder, &["run", "vm0.toml"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(run.stdout.take().unwrap());
        let mut line = String::new();
        while !line.contains("operators: ") {
            line.clear();
            assert_ne!(said.read_line(&mut line).unwrap(), 0, "it does not run: {:?}", run.wait());
        }
        let sockets = folder.path().join("vm0");
        let qmp = format!("unix:{},server=on,wait=off", sockets.join("qmp").display());
        let guest = watched::driven(qemu.guest(), ENGINES, &sockets, Role::Rounds)
            .option("-qmp", qmp)
            .start()
            .unwrap();
        let operated = Self { guest, run, folder };
        let ram: PathBuf =
            format!("/proc/{}/fd/{}", std::process::id(), operated.guest.memory().as_raw_fd())
                .into();
        operated.done(&["declare-ram", ram.to_str().unwrap()]);
        Some(operated)
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        standstill(&self.folder, arguments).output().unwrap()
    }

    /// What a command says that must succeed.
    #[track_caller]
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.ask(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Where the VM is, as `standstill status` knows it, once it does.
    fn vm_is(&self, state: &str) {
        let end = Instant::now() + LONG;
        loop {
            let status: Value = serde_json::from_str(&self.done(&["status", "--json"])).unwrap();
            if status["vm"]["state"] == state {
                return;
            }
            assert!(Instant::now() < end, "not {state}: {status}");
        }
    }

    /// Where it is, as QEMU says itself.
    fn state(&self) -> String {
        let status = self.guest.qmp().execute("query-status", &json!({})).unwrap();
        status["status"].as_str().unwrap().to_owned()
    }

    /// Ends all, in good order.
    fn end(mut self) {
        self.guest.qmp().execute("quit", &json!({})).unwrap();
        assert!(self.guest.wait(LONG).unwrap().success());
        self.done(&["shutdown"]);
        assert!(self.run.wait().unwrap().success());
    }
}

impl Drop for Operated {
    fn drop(&mut self) {
        // Only if a test has failed is anything left of it; its devices end with it.
        let _ = self.run.kill();
        let _ = self.run.wait();
    }
}

#[test]
fn an_operator_pauses_a_guest_and_its_engines_twenty_times() {
    let Some(vm) = Operated::start() else { return };
    let pages = driver_begins(&vm.guest, ENGINES);
    let runner = *pages.last().unwrap();
    for pause in 1..=PAUSES {
        rounds_go_on(&vm.guest);
        engine_writes(&vm.guest, runner);
        vm.done(&["pause"]);
        assert_eq!(vm.state(), "paused", "pause {pause}");
        let seen = watched::pages(&vm.guest, &pages);
        vm.vm_is("paused");
        assert!(
            watched::pages(&vm.guest, &pages) == seen,
            "pause {pause}: RAM changes while all stands"
        );
        vm.done(&["resume"]);
        assert_eq!(vm.state(), "running", "pause {pause}");
        engine_writes(&vm.guest, runner);
    }
    rounds_go_on(&vm.guest);
    // Stopped by its owner, it stays so.
    vm.guest.stop().unwrap();
    vm.done(&["pause"]);
    vm.done(&["resume"]);
    assert_eq!(vm.state(), "paused");
    engine_writes(&vm.guest, runner);
    vm.guest.go_on().unwrap();
    rounds_go_on(&vm.guest);
    vm.end();
}

#[test]
fn a_qemu_that_hangs_does_not_hang_a_pause_and_can_be_paused_when_it_is_back() {
    let Some(vm) = Operated::start() else { return };
    driver_begins(&vm.guest, ENGINES);
    rounds_go_on(&vm.guest);
    vm.vm_is("running");
    let qemu: Pid = vm.guest.process();
    kill_process(qemu, Signal::STOP).unwrap();
    let output = vm.ask(&["pause"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{output:?}");
    assert!(said.contains("no answer to query-status: QEMU hangs"), "{said}");
    let status: Value = serde_json::from_str(&vm.done(&["status", "--json"])).unwrap();
    assert_eq!(status["machine"], "running", "{status}");
    kill_process(qemu, Signal::CONT).unwrap();
    vm.vm_is("running");
    rounds_go_on(&vm.guest);
    vm.done(&["pause"]);
    assert_eq!(vm.state(), "paused");
    vm.done(&["resume"]);
    rounds_go_on(&vm.guest);
    vm.end();
}
