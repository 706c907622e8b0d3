//! A control directory on a disk that is full.

use rustix::process::Pid;
use standstill_coordinator::TakeOverError;
use standstill_testkit::machine::LONG;
use standstill_testkit::outside::{SmallDisk, signals};
use standstill_testkit::plan::Policy;
use standstill_testkit::{Course, Pilot, Script, Trace, What};
use std::process::Command;

/// Enough for the sockets and a record, and for one to be written beside another one.
const SMALL: u64 = 64 << 10;

struct Place {
    trace: Trace,
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { trace: Trace::new().unwrap(), folder: tempfile::tempdir().unwrap() }
    }

    fn disk(&self, bytes: u64) -> SmallDisk {
        SmallDisk::new(self.folder.path(), bytes)
    }

    fn course(&self) -> Course {
        Course {
            directory: Some(self.folder.path().join("vm")),
            devices: ["d0", "d1"].map(|name| Script::honest().named(name, &self.trace)).into(),
            programs: Vec::new(),
            phase: LONG,
            other: LONG,
            policy: Policy::Rollback,
        }
    }

    /// The last process of a device.
    fn device(&self, name: &str) -> Pid {
        let began = |entry: &standstill_testkit::Entry| match entry.what {
            What::Began { pid } if entry.who == name => Some(pid),
            _ => None,
        };
        let pid = self.trace.entries().iter().rev().find_map(began).unwrap();
        Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
    }
}

fn pid(pilot: &Pilot) -> Pid {
    Pid::from_raw(i32::try_from(pilot.pid()).unwrap()).unwrap()
}

#[tokio::test]
async fn a_machine_whose_record_cannot_be_written_does_not_start_and_leaves_nothing() {
    let place = Place::new();
    // Not one page is left beside the folder itself: a page is taken by what fills it.
    let disk = place.disk(4096);
    let full = place.folder.path().join("full");
    // A file of one page is all that there is room for.
    let mut shell = Command::new("sh");
    let script = format!("head -c 4096 /dev/zero > {} && exec \"$@\"", full.display());
    let mut course = place.course();
    course.programs.clear();
    let arguments = serde_json::to_string(&course).unwrap();
    let program = standstill_testkit::programs::Program::Pilot.file().unwrap();
    shell.args(["-c", &script, "sh"]).arg(program).arg(arguments);
    let output = disk.command(&shell).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("No space left on device") && text.contains("machine.json"), "{text}");
    // Its devices were not even started, or are gone.
    let began = standstill_testkit::Processes::of_trace(&place.trace);
    began.assert_gone_within(LONG).await;
}

/// The system lets nobody have a mount namespace.
#[test]
fn a_small_disk_that_cannot_be_had_is_told_as_the_reason() {
    let place = Place::new();
    let command = place.disk(SMALL).command(&Command::new("true"));
    let script = "echo 0 > /proc/sys/user/max_mnt_namespaces && exec \"$@\"";
    let mut none = Command::new("unshare");
    none.args(["--user", "--map-root-user", "sh", "-c", script, "sh"]);
    let output = none.arg(command.get_program()).args(command.get_args()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("a small disk needs a mount namespace"), "{text}");
}

/// Nothing is written in a pause: a full disk does not keep a machine from stopping, nor its devices
/// from being fenced.
#[tokio::test]
async fn a_disk_that_fills_up_hinders_neither_transitions_nor_fences() {
    let place = Place::new();
    let disk = place.disk(SMALL);
    let mut pilot = Pilot::begin(&place.course(), Some(&disk)).unwrap();
    pilot.hear("started").await;
    let process = pid(&pilot);
    assert!(disk.fill(process).unwrap() > 0);
    for _ in 0..2 {
        pilot.tell("pause");
        pilot.hear("pause Done").await;
        pilot.tell("resume");
        pilot.hear("resume Done").await;
    }
    // The one that is lost is optional.
    signals::kill(place.device("d1"));
    pilot.tell("pause");
    let line = pilot.hear("pause").await;
    assert!(line == "pause Done" || line == "pause Degraded", "{line}");
    pilot.tell("resume");
    pilot.hear("resume").await;
    disk.free(process).unwrap();
    pilot.tell("shutdown");
    assert!(pilot.ended().await.success());
}

/// The record is in another mount namespace: whoever comes without it finds nothing, and says so.
#[tokio::test]
async fn a_take_over_that_finds_no_record_says_so() {
    let place = Place::new();
    let mut pilot = Pilot::begin(&place.course(), Some(&place.disk(SMALL))).unwrap();
    pilot.hear("started").await;
    let taken = place.course().builder().unwrap().take_over().await;
    assert!(matches!(taken, Err(TakeOverError::ControlDirectory(_))), "{taken:?}");
    pilot.tell("shutdown");
    assert!(pilot.ended().await.success());
}
