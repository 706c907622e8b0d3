//! A machine of both transports: engines that write into each other's memory, and the disk of a guest in
//! QEMU, stopped and started as one under their work.

use crate::disk_driver;
use crate::machine::{ENGINES, Guest, LONG};
use standstill::coordinator::DeviceSpec;
use standstill::coordinator::report::{CommandReport, TransitionReport};
use standstill::protocol::message::{CounterKind, Evidence, Phase};
use standstill_testkit::qemu::Qemu;
use std::fs::File;

/// How often the machine is stopped and started.
const PAUSES: usize = 200;

/// Size of the disk in bytes: all of it is looked at each time.
const DISK: u64 = 4 << 20;
const QUEUES: u16 = 2;

/// Not a test: what runs in the guest.
#[test]
fn driver_in_the_guest() {
    if let Ok(disk) = std::env::var(disk_driver::VARIABLE) {
        disk_driver::drive(&disk);
    }
}

/// What each device has sent with its answer in that phase.
fn evidence(report: &TransitionReport, phase: Phase) -> Vec<Evidence> {
    let of = |commands: &Vec<CommandReport>| {
        let command = commands.iter().find(|command| command.phase == phase);
        command.and_then(CommandReport::evidence).unwrap().clone()
    };
    report.participants.iter().map(|participant| of(&participant.commands)).collect()
}

fn counter(evidence: &Evidence, kind: CounterKind, index: usize) -> Option<u64> {
    let mut counters = evidence.counters.iter();
    counters.find(|c| c.kind == kind && c.index as usize == index).map(|c| c.value)
}

/// Checks that of each ordered pair of engines the last write before the writer was quiet is what the
/// receiver has found when it stopped and when it began to start, and what is there in between.
fn assert_nothing_came_late(
    quiet: &[Evidence],
    stopped: &[Evidence],
    leaving: &[Evidence],
    mailboxes: &[[u64; ENGINES]; ENGINES],
) {
    for receiver in 0..ENGINES {
        for writer in (0..ENGINES).filter(|&writer| writer != receiver) {
            // An engine has a descriptor for each peer.
            let descriptor = if receiver < writer { receiver } else { receiver - 1 };
            let received =
                |of: &[Evidence]| counter(&of[receiver], CounterKind::Received, writer).unwrap();
            let written = counter(&quiet[writer], CounterKind::Written, descriptor).unwrap();
            let found = [received(stopped), mailboxes[writer][receiver], received(leaving)];
            assert_eq!(found, [written; 3], "engine{writer} into engine{receiver}");
        }
    }
}

#[test]
fn engines_and_a_disk_in_use_are_stopped_and_started_as_one_two_hundred_times() {
    let Some(qemu) = Qemu::for_tests() else { return };
    let mut guest = Guest::new("mixed");
    let folder = guest.description.folder.clone();
    let (image, socket) = (folder.join("image"), folder.join("disk.sock"));
    File::create_new(&image).unwrap().set_len(DISK).unwrap();
    let disk = DeviceSpec::new("disk0", env!("CARGO_BIN_EXE_standstill"))
        .args(["device", "vhost-user-blk", "--delay=20ms", "--file"])
        .arg(&image)
        .arg("--socket")
        .arg(&socket)
        .arg(format!("--queues={QUEUES}"));
    // The disk comes last.
    let machine = guest.description.builder().device(disk).start_blocking().unwrap();
    let script = format!(
        "{}=/dev/vda RUST_BACKTRACE=0 driver --exact mixed::driver_in_the_guest --nocapture",
        disk_driver::VARIABLE
    );
    let vm = qemu
        .guest()
        .processors(u32::from(QUEUES))
        .vhost_user_blk("disk0", &socket, QUEUES)
        .program("/bin/driver", std::env::current_exe().unwrap())
        .init(&script)
        .start()
        .unwrap();
    machine.declare_ram(vm.memory()).unwrap();
    machine.declare_ram(&guest.ram).unwrap();
    guest.set_to_work();
    vm.console().wait_for(" writes are checked", LONG).unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut with_requests = 0;
    for pause in 1..=PAUSES {
        runtime.block_on(guest.assert_writing(&[0, 1, 2]));
        let standing = machine.pause().unwrap();
        let before = (guest.sight(), std::fs::read(&image).unwrap());
        let mailboxes = guest.mailboxes();
        let quiet = evidence(standing.report(), Phase::PrepareStop);
        let stopped = evidence(standing.report(), Phase::Stop);
        for (engine, seen) in stopped.iter().take(ENGINES).zip(&before.0) {
            assert_eq!(engine.memory_hash, Some(*seen), "pause {pause}");
        }
        let in_flight: u64 = (0..QUEUES)
            .map(|queue| counter(&quiet[ENGINES], CounterKind::InFlight, queue.into()).unwrap())
            .sum();
        with_requests += usize::from(in_flight > 0);
        // Some time for whoever would be late.
        machine.status().unwrap();
        let after = (guest.sight(), std::fs::read(&image).unwrap());
        assert!(before == after, "pause {pause}: something changes while all stands");
        let report = standing.resume().unwrap();
        let leaving = evidence(&report, Phase::PrepareStart);
        assert_nothing_came_late(&quiet, &stopped, &leaving, &mailboxes);
        if pause % 20 == 0 {
            vm.console().catch_up();
            for _ in 0..2 {
                vm.console().wait_for(" writes are checked", LONG).unwrap();
            }
        }
    }
    println!("{with_requests} of {PAUSES} pauses met requests of the disk");
    assert!(with_requests > PAUSES / 2);
    vm.console().write("check").unwrap();
    vm.console().wait_for("all blocks are right", LONG).unwrap();
    vm.end().unwrap();
    machine.shutdown().unwrap();
}
