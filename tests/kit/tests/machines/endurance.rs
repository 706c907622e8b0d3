//! Many rounds leave nothing behind.

use crate::fixture::{LONG, SHORT, builder, honest, start};
use standstill_coordinator::Outcome;
use standstill_protocol::message::Phase;
use standstill_testkit::{Packet, Processes, Script, Step, Trace, Trigger, within};
use std::process::{Command, Output};
use std::time::Duration;

/// Open file descriptors are a matter of a whole process, and other tests may share this one: the
/// test with this name runs in a process of its own.
fn alone(test: &str) -> Option<Output> {
    const MARK: &str = "STANDSTILL_TESTKIT_ALONE";
    if std::env::var_os(MARK).is_some() {
        return None;
    }
    let program = std::env::current_exe().unwrap();
    let arguments = [test, "--exact", "--nocapture"];
    Some(Command::new(program).args(arguments).env(MARK, "1").output().unwrap())
}

fn succeeded(output: &Output) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}:\n{stdout}\n{stderr}", output.status);
    assert!(stdout.contains("1 passed"), "the test was not found:\n{stdout}");
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn block_on(future: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future);
}

/// Waits until there are as many open fds as before: actors end on their own time.
async fn as_before(before: usize) {
    let settled = async {
        while open_fds() > before {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(Duration::from_secs(10), settled).await.is_err() {
        let fds = std::fs::read_dir("/proc/self/fd").unwrap();
        let names = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
        panic!("{before} fds before, now {:#?}", names.collect::<Vec<_>>());
    }
}

#[test]
fn three_hundred_rounds_of_sixteen_devices_leak_no_file_descriptor() {
    if let Some(output) =
        alone("endurance::three_hundred_rounds_of_sixteen_devices_leak_no_file_descriptor")
    {
        return succeeded(&output);
    }
    block_on(async {
        let trace = Trace::new().unwrap();
        let devices = (0..16).map(|n| honest(&format!("d{n}"), &trace));
        let machine = start(builder().devices(devices)).await;
        let processes = Processes::of(&machine.status().await.unwrap());
        // One round first: whatever is made on first use is there then.
        machine.pause().await.unwrap().resume().await.unwrap();
        let before = open_fds();
        for round in 0..300 {
            let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
            assert_eq!(stopped.report().outcome, Outcome::Done, "round {round}");
            assert_eq!(stopped.report().strays, 0, "round {round}");
            let report = within(LONG, "resume", stopped.resume()).await.unwrap();
            assert_eq!(report.outcome, Outcome::Done, "round {round}");
        }
        assert_eq!(open_fds(), before);
        assert_eq!(trace.reached(Phase::Stop).len(), 16 * 301);
        within(LONG, "shutdown", machine.shutdown()).await.unwrap();
        processes.assert_gone_within(Duration::ZERO).await;
    });
}

/// Machines that come and go in every way that there is.
#[test]
fn machines_that_end_leak_no_file_descriptor() {
    if let Some(output) = alone("endurance::machines_that_end_leak_no_file_descriptor") {
        return succeeded(&output);
    }
    block_on(async {
        let mut before = None;
        for round in 0..12 {
            let trace = Trace::new().unwrap();
            let good = || builder().devices(["d0", "d1"].map(|name| honest(name, &trace)));
            match round % 4 {
                0 => {
                    let machine = start(good()).await;
                    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
                }
                1 => drop(start(good()).await),
                2 => {
                    let bad = Script::honest().on(Trigger::Hello, [Step::Send(Packet::ManyFds)]);
                    let machine = good().device(bad.device("bad", &trace).unwrap());
                    within(SHORT, "start", machine.start()).await.unwrap_err();
                }
                _ => {
                    let bad = Script::honest().on(Phase::Stop, [Step::Send(Packet::ManyFds)]);
                    let machine = start(good().device(bad.device("bad", &trace).unwrap())).await;
                    machine.pause().await.unwrap_err();
                    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
                }
            }
            Processes::of_trace(&trace).assert_gone_within(Duration::from_secs(3)).await;
            drop(trace);
            match before {
                // The first of each kind may make what stays.
                None if round == 3 => before = Some(open_fds()),
                None => {}
                Some(before) => as_before(before).await,
            }
        }
    });
}
