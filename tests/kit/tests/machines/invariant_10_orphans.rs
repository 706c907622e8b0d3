//! What becomes of devices without a coordinator, and of those that a take-over cannot reach.

use crate::fixture::{LONG, assert_machine};
use crate::left_behind::{Left, NAMES, Process, owner_goes_on};
use rustix::process::Signal;
use standstill_coordinator::control_directory::ControlDirectoryError;
use standstill_coordinator::record::{DeviceRecord, FileRecord, MachineRecord};
use standstill_coordinator::{
    HookSpec, MachineBuilder, MachineEvent, Outcome, Presence, Slot, StartError, TakeOverError,
    TakenOver,
};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HeldReason, Loss, MachineState};
use standstill_testkit::{
    Call, Gate, Packet, Script, Step, TracedHook, TracedLocal, Trigger, What, chain, within,
};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use uuid::Uuid;

/// Changes the record, as nobody should.
fn edit(directory: &Path, change: impl FnOnce(&mut MachineRecord)) {
    let path = directory.join("machine.json");
    let mut record = MachineRecord::parse(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut record);
    std::fs::write(&path, record.to_bytes().unwrap()).unwrap();
}

/// A machine whose `d1` is what the script says, left behind by a coordinator that was killed.
async fn left_with(d1: Script) -> Left {
    let left = Left::new(|| [Script::honest(), d1, Script::honest()]);
    left.pilot().await.kill();
    left
}

/// Takes a machine over whose `d1` is lost, and checks that the others run on.
async fn d1_is_fenced(mut left: Left, hello: Duration, loss: Loss, why: &str) {
    left.course.other = hello;
    let process = left.process("d1");
    let TakenOver { machine, report } = left.take_over().await;
    let text = format!("{report}\n{}", left.trace.text());
    match &report.outcome {
        Outcome::Degraded { machine: MachineState::Running, fenced } => {
            let fenced: Vec<_> =
                fenced.iter().map(|(id, loss)| (report.names.participant(*id), *loss)).collect();
            assert_eq!(fenced, [("d1".to_owned(), loss)], "{text}");
        }
        _ => panic!("{text}"),
    }
    assert!(text.contains(why), "{text}\ndoes not say {why:?}");
    assert!(process.ends_within(LONG).await, "{text}");
    left.assert_all(&machine, &["d0", "d2"], MigrationState::Running).await;
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

#[tokio::test]
async fn devices_of_the_policy_exit_end_with_their_coordinator() {
    let mut left = Left::honest();
    left.course.directory = None;
    let pilot = left.pilot().await;
    let processes = NAMES.map(|name| left.process(name));
    pilot.kill();
    for process in processes {
        assert!(process.ends_within(LONG).await);
    }
}

#[tokio::test]
async fn a_machine_that_is_dropped_without_shutdown_leaves_its_devices_unharmed() {
    let left = Left::honest();
    let machine = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    machine.pause().await.unwrap().leave_stopped();
    let processes = NAMES.map(|name| left.process(name));
    let mut events = machine.events();
    drop(machine);
    // The stream ends with the coordinator.
    while events.recv().await.is_some() {}
    let TakenOver { machine, report } = left.take_over().await;
    let held = Outcome::Held { reasons: vec![HeldReason::TakenOverStopped], fenced: vec![] };
    assert_eq!(report.outcome, held, "{report}");
    for process in &processes {
        assert!(process.lives().await);
    }
    owner_goes_on(&machine, true).await;
    left.end(machine).await;
    for process in &processes {
        assert!(process.ends_within(LONG).await);
    }
}

#[tokio::test]
async fn a_coordinator_that_leaves_in_good_order_leaves_a_machine_that_runs() {
    let left = Left::honest();
    let mut pilot = left.pilot().await;
    pilot.tell("leave");
    assert!(pilot.ended().await.success());
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

#[tokio::test]
async fn a_device_that_has_died_meanwhile_is_fenced() {
    let left = left_with(Script::honest()).await;
    let process = left.process("d1");
    process.signal(Signal::KILL);
    assert!(process.ends_within(LONG).await);
    d1_is_fenced(left, LONG, Loss::Disconnected, "nobody can be reached").await;
}

#[tokio::test]
async fn a_device_that_hangs_is_fenced() {
    let left = left_with(Script::honest()).await;
    left.process("d1").signal(Signal::STOP);
    d1_is_fenced(left, Duration::from_secs(3), Loss::Timeout, "did not say Hello in time").await;
}

#[tokio::test]
async fn a_device_that_says_garbage_is_fenced() {
    let script = Script::honest().on_nth(Trigger::Hello, 2, [Step::Send(Packet::Garbage)]);
    d1_is_fenced(left_with(script).await, LONG, Loss::Protocol, "broke the protocol").await;
}

#[tokio::test]
async fn a_device_that_is_silent_is_fenced() {
    let script = Script::honest().on_nth(Trigger::Hello, 2, []);
    d1_is_fenced(
        left_with(script).await,
        Duration::from_secs(3),
        Loss::Timeout,
        "did not say Hello",
    )
    .await;
}

#[tokio::test]
async fn a_device_that_says_garbage_after_the_welcome_is_fenced() {
    let script = Script::honest().on_nth(Trigger::Welcome, 2, [Step::Send(Packet::Garbage)]);
    d1_is_fenced(left_with(script).await, LONG, Loss::Protocol, "d1").await;
}

/// Somebody else's process behind the path of a device.
#[tokio::test]
async fn a_device_under_another_user_is_no_device() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let left = Left::honest();
    // As another user it must reach its trace.
    let trace = left.trace.path();
    let everybody = |path: &Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    everybody(trace, 0o666);
    everybody(trace.parent().unwrap(), 0o711);
    let script = serde_json::to_string(&left.course.devices[1]).unwrap();
    let rogue = standstill_testkit::script::rogue_device().unwrap();
    let mut builder = MachineBuilder::new("vm").keep(left.directory());
    for (name, device) in NAMES.into_iter().zip(&left.course.devices) {
        builder = builder.device(match name {
            "d1" => standstill_coordinator::DeviceSpec::new("d1", "setpriv")
                .args(["--reuid=65534", "--clear-groups"])
                .arg(&rogue)
                .arg(&script),
            _ => device.spec().unwrap(),
        });
    }
    let machine = within(LONG, "start", builder.start()).await.unwrap();
    let mut events = machine.events();
    drop(machine);
    while events.recv().await.is_some() {}
    d1_is_fenced(left, LONG, Loss::Disconnected, "user 65534 listens in its place").await;
}

#[tokio::test]
async fn a_device_of_another_machine_is_left_alone() {
    let left = left_with(Script::honest()).await;
    let mut uuid = Uuid::nil();
    edit(&left.directory(), |record| uuid = std::mem::replace(&mut record.uuid, Uuid::new_v4()));
    let error = left.course.builder().unwrap().take_over().await.unwrap_err();
    match &error {
        TakeOverError::ForeignMachine { found, .. } => assert_eq!(*found, Some(uuid), "{error}"),
        _ => panic!("{}", chain(&error)),
    }
    // Nothing was told to anybody: with the right record all is well.
    edit(&left.directory(), |record| record.uuid = uuid);
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

#[tokio::test]
async fn a_description_that_does_not_fit_is_refused_before_anything_is_done() {
    let left = Left::honest();
    let mut pilot = left.pilot().await;
    let take_over = |change: fn(&mut standstill_testkit::Course), name: &str| {
        let mut course = left.course.clone();
        change(&mut course);
        let builder = MachineBuilder::new(name).keep(course.directory.clone().unwrap());
        let specs = course.devices.iter().map(|script| script.spec().unwrap());
        builder.devices(specs).take_over()
    };
    let error = take_over(|course| drop(course.devices.pop()), "vm").await.unwrap_err();
    assert!(matches!(&error, TakeOverError::Undescribed { device } if device == "d2"), "{error}");
    let more = |course: &mut standstill_testkit::Course| {
        let mut more = course.devices[0].clone();
        more.name = "d3".into();
        course.devices.push(more);
    };
    let error = take_over(more, "vm").await.unwrap_err();
    assert!(matches!(&error, TakeOverError::Unrecorded { device } if device == "d3"), "{error}");
    let error = take_over(|_| {}, "other").await.unwrap_err();
    assert!(matches!(&error, TakeOverError::Machine { found, .. } if found == "vm"), "{error}");
    let error = MachineBuilder::new("vm").take_over().await.unwrap_err();
    assert!(matches!(error, TakeOverError::NoControlDirectory), "{error}");
    // The coordinator still has its machine.
    pilot.tell("pause");
    pilot.hear("pause Done").await;
    pilot.tell("shutdown");
    pilot.hear("ended").await;
    let error = left.course.builder().unwrap().take_over().await.unwrap_err();
    let no_record =
        |error: &ControlDirectoryError| matches!(error, ControlDirectoryError::NoRecord { .. });
    assert!(matches!(&error, TakeOverError::ControlDirectory(e) if no_record(e)), "{error}");
}

#[tokio::test]
async fn a_record_that_is_cut_off_is_named_and_nobody_is_harmed() {
    let left = left_with(Script::honest()).await;
    let path = left.directory().join("machine.json");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let error = left.course.builder().unwrap().take_over().await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("machine.json is no usable record"), "{text}");
    assert!(text.contains("not the JSON of a machine record"), "{text}");
    std::fs::write(&path, &whole).unwrap();
    let TakenOver { machine, .. } = left.take_over().await;
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

/// Its processes are gone, whatever their numbers are now.
#[tokio::test]
async fn a_record_from_before_the_last_boot_is_recognized() {
    let left = left_with(Script::honest()).await;
    let mut boot = Uuid::nil();
    edit(&left.directory(), |record| boot = std::mem::replace(&mut record.boot, Uuid::new_v4()));
    let error = left.course.builder().unwrap().take_over().await.unwrap_err();
    let other_boot = |error: &ControlDirectoryError| matches!(error, ControlDirectoryError::OtherBoot { machine, .. } if machine == "vm");
    assert!(matches!(&error, TakeOverError::ControlDirectory(e) if other_boot(e)), "{error}");
    edit(&left.directory(), |record| record.boot = boot);
    let TakenOver { machine, .. } = left.take_over().await;
    left.end(machine).await;
}

#[tokio::test]
async fn a_directory_in_which_a_machine_lives_is_not_used_for_another_one() {
    let left = left_with(Script::honest()).await;
    let error = left.course.builder().unwrap().start().await.unwrap_err();
    let in_use = |error: &ControlDirectoryError| matches!(error, ControlDirectoryError::InUse { machine, .. } if machine == "vm");
    assert!(matches!(&error, StartError::ControlDirectory(e) if in_use(e)), "{}", chain(&error));
    let TakenOver { machine, .. } = left.take_over().await;
    left.end(machine).await;
    // Once it has ended, there is room for the next.
    let machine = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

#[tokio::test]
async fn a_device_whose_name_is_no_file_name_cannot_be_kept() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a/b", "..", "."] {
        let script = Script::honest();
        let spec = script.device(name, &standstill_testkit::Trace::new().unwrap()).unwrap();
        let builder = MachineBuilder::new("vm").keep(folder.path().join("vm")).device(spec);
        let error = builder.start().await.unwrap_err();
        let text = chain(&error);
        let named =
            |error: &ControlDirectoryError| matches!(error, ControlDirectoryError::SocketName(_));
        assert!(matches!(&error, StartError::ControlDirectory(e) if named(e)), "{text}");
        assert!(text.contains(&format!("{name:?}")), "{text}");
    }
}

#[tokio::test]
async fn a_kept_machine_that_does_not_start_leaves_nothing_behind() {
    let left = Left::new(|| {
        let bad = Script::honest().on(Trigger::Hello, [Step::Exit(3)]);
        [Script::honest(), bad, Script::honest()]
    });
    let builder = left.course.builder().unwrap().presence(Presence::Required);
    let error = builder.start().await.unwrap_err();
    assert!(matches!(&error, StartError::Greeting { device, .. } if device == "d1"), "{error}");
    let files: Vec<_> = std::fs::read_dir(left.directory()).unwrap().collect();
    assert!(files.is_empty(), "{files:?}");
}

/// The fence of a device that cannot be asked needs the locks of the files that were recorded.
#[tokio::test]
async fn a_lost_device_is_fenced_by_the_locks_of_its_recorded_files() {
    for (found_again, expected_held) in [(true, false), (false, true)] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.img");
        std::fs::write(&path, "disk").unwrap();
        // The rogue device takes no lock itself: whoever holds it, holds the fence up.
        let lock = std::fs::File::open(&path).unwrap();
        let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        rustix::fs::flock(&lock, exclusive).unwrap();
        let mut left = left_with(Script::honest().backing_file(&path)).await;
        let mut recorded = Vec::new();
        edit(&left.directory(), |record| {
            recorded = record.device("d1").unwrap().backing_files.clone();
        });
        let [FileRecord { path: Some(recorded), .. }] = recorded.as_slice() else {
            panic!("{recorded:?}")
        };
        assert_eq!(Path::new(recorded), path);
        let process = left.process("d1");
        process.signal(Signal::KILL);
        assert!(process.ends_within(LONG).await);
        drop(lock);
        if !found_again {
            // Another file has its name now: its locks say nothing.
            std::fs::rename(&path, folder.path().join("moved.img")).unwrap();
            std::fs::write(&path, "another").unwrap();
        }
        left.course.other = Duration::from_secs(4);
        let TakenOver { machine, report } = left.take_over().await;
        let text = format!("{report}\n{}", left.trace.text());
        match &report.outcome {
            Outcome::Degraded { machine: MachineState::Running, .. } => {
                assert!(!expected_held, "{text}");
            }
            Outcome::Held { reasons, .. } => {
                assert!(expected_held, "{text}");
                let unproven = |reason: &HeldReason| matches!(reason, HeldReason::FenceUnproven(_));
                assert!(matches!(reasons.as_slice(), [one] if unproven(one)), "{text}");
                left.assert_all(&machine, &["d0", "d2"], MigrationState::Stop).await;
            }
            _ => panic!("{text}"),
        }
        if expected_held {
            machine.accept_hold().await.unwrap();
            machine.resume().await.unwrap();
        }
        owner_goes_on(&machine, false).await;
        left.end(machine).await;
    }
}

/// What it writes to is what was recorded, whatever it says now: the fence needs those locks.
#[tokio::test]
async fn a_device_that_hides_a_backing_file_from_a_take_over_is_fenced_with_its_lock() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let lock = || {
        let file = std::fs::File::create(&path).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        file
    };
    let hidden = lock();
    let mut left = left_with(Script::honest().backing_file(&path)).await;
    // It will declare another file, which is locked as well.
    std::fs::rename(&path, folder.path().join("moved.img")).unwrap();
    let _shown = lock();
    edit(&left.directory(), |record| {
        let device = record.devices.iter_mut().find(|device| device.name == "d1").unwrap();
        let moved = folder.path().join("moved.img").to_str().unwrap().to_owned();
        device.backing_files[0].path = Some(moved);
    });
    left.course.other = Duration::from_secs(4);
    let process = left.process("d1");
    let TakenOver { machine, report } = left.take_over().await;
    let text = format!("{report}\n{}", left.trace.text());
    assert!(text.contains("does not declare its backing file"), "{text}");
    let Outcome::Held { reasons, .. } = &report.outcome else { panic!("{text}") };
    assert!(matches!(reasons.as_slice(), [HeldReason::FenceUnproven(_)]), "{text}");
    assert!(process.ends_within(LONG).await, "{text}");
    let mut events = machine.events();
    drop(hidden);
    let ended =
        async { while !matches!(events.recv().await.unwrap(), MachineEvent::HoldEnded { .. }) {} };
    within(LONG, "the hold to end", ended).await;
    within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    within(LONG, "resume", machine.resume()).await.unwrap();
    left.end(machine).await;
}

/// A device in the middle of an arc when its coordinator dies: what counts is where it is going.
#[tokio::test]
async fn a_device_on_its_way_to_stop_counts_as_stopped_and_one_on_its_way_to_p2p_does_not() {
    for phase in [Phase::PrepareStop, Phase::Stop] {
        let gate = Gate::closed().unwrap();
        let left = Left::new(|| {
            let lingers = Script::honest().on_nth(phase, 1, [Step::Linger(gate.key())]);
            // In the second phase nobody else may be in STOP.
            let holds = || match phase {
                Phase::Stop => Script::honest().on_nth(phase, 1, []),
                _ => Script::honest(),
            };
            [holds(), lingers, holds()]
        });
        let mut pilot = left.pilot().await;
        pilot.tell("pause");
        left.trace.wait_for("all to be told", |_| left.trace.received(phase).len() == 3).await;
        pilot.kill();
        let take_over = left.course.builder().unwrap().take_over();
        let taken = tokio::spawn(take_over);
        let next = match phase {
            Phase::Stop => Phase::PrepareStop,
            _ => Phase::Start,
        };
        let told_again = |_: &[_]| {
            let told = left.trace.received(next);
            let told = told.iter().filter(|entry| entry.who == "d1").count();
            told == if phase == Phase::Stop { 2 } else { 1 }
        };
        left.trace.wait_for("d1 to be told again", told_again).await;
        gate.open();
        let TakenOver { machine, report } =
            within(LONG, "take-over", taken).await.unwrap().unwrap();
        let held = Outcome::Held { reasons: vec![HeldReason::TakenOverStopped], fenced: vec![] };
        let (expected, state) = match phase {
            Phase::Stop => (held, MigrationState::Stop),
            _ => (Outcome::RolledBack, MigrationState::Running),
        };
        assert_eq!(
            report.outcome,
            expected,
            "{report}
{}",
            left.trace.text()
        );
        left.assert_all(&machine, &NAMES, state).await;
        owner_goes_on(&machine, phase == Phase::Stop).await;
        left.end(machine).await;
    }
}

/// Hooks and local devices are those of the program that takes over.
#[tokio::test]
async fn hooks_and_local_devices_of_the_new_coordinator_are_stopped_with_a_machine_that_is_held() {
    let gate = Gate::closed().unwrap();
    let left = Left::new(|| {
        let holds = Script::honest().on_nth(Phase::Stop, 1, [Step::hold(&gate), Step::Ack]);
        [Script::honest(), holds, Script::honest()]
    });
    let mut pilot = left.pilot().await;
    pilot.tell("pause");
    left.trace.wait_for("two to stop", |_| left.trace.reached(Phase::Stop).len() == 2).await;
    pilot.kill();
    let builder = left
        .course
        .builder()
        .unwrap()
        .hook(HookSpec::new("vcpus", Slot::Before), TracedHook::new("vcpus", &left.trace).unwrap())
        .local_device("local", TracedLocal::new("local", &left.trace).unwrap());
    let taken = within(LONG, "take-over", builder.take_over()).await.unwrap();
    let TakenOver { machine, report } = taken;
    let held = Outcome::Held { reasons: vec![HeldReason::TakenOverStopped], fenced: vec![] };
    assert_eq!(report.outcome, held, "{report}");
    drop(gate);
    let all = ["d0", "d1", "d2", "local"];
    left.assert_all(&machine, &all, MigrationState::Stop).await;
    let called = |call| {
        let entries = left.trace.entries();
        entries.iter().filter(|entry| entry.what == What::Called(call)).count()
    };
    assert_eq!((called(Call::Stop), called(Call::Start)), (1, 0), "{}", left.trace.text());
    assert_machine(&machine, MachineState::Held).await;
    owner_goes_on(&machine, true).await;
    left.assert_all(&machine, &all, MigrationState::Running).await;
    left.end(machine).await;
}

/// Devices that come and go later are kept like the first ones.
#[tokio::test]
async fn devices_that_were_restarted_added_and_removed_are_in_the_record() {
    let mut left = Left::honest();
    let machine = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let names = || {
        let path = left.directory().join("machine.json");
        let record = MachineRecord::parse(&std::fs::read(path).unwrap()).unwrap();
        let entry = |device: &DeviceRecord| (device.name.clone(), device.incarnation);
        let mut devices: Vec<_> = record.devices.iter().map(entry).collect();
        devices.sort();
        let mut sockets: Vec<_> = std::fs::read_dir(left.directory())
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".sock"))
            .collect();
        sockets.sort();
        (devices, sockets)
    };
    let mut events = machine.events();
    left.process("d0").signal(Signal::KILL);
    let fenced = async {
        while !matches!(events.recv().await.unwrap(), MachineEvent::DeviceFenced { .. }) {}
    };
    within(LONG, "fence", fenced).await;
    within(LONG, "restart", machine.restart_device("d0")).await.unwrap();
    within(LONG, "removal", machine.remove_device("d1")).await.unwrap();
    let added = Script::honest().named("d3", &left.trace);
    within(LONG, "addition", machine.add_device(added.spec().unwrap())).await.unwrap();
    let (devices, sockets) = names();
    let expected = [("d0", 2), ("d2", 1), ("d3", 1)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(devices, expected);
    assert_eq!(sockets, ["d0.sock", "d2.sock", "d3.sock"]);
    drop(machine);
    while events.recv().await.is_some() {}
    left.course.devices.remove(1);
    left.course.devices.push(added);
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    let status = machine.status().await.unwrap();
    let incarnations: Vec<_> = status.devices.iter().map(|device| device.incarnation).collect();
    assert_eq!(incarnations, [2, 1, 1]);
    owner_goes_on(&machine, false).await;
    left.end(machine).await;
}

/// A process that took a device's number is not the device.
#[tokio::test]
async fn another_process_with_the_number_of_a_lost_device_is_not_harmed() {
    let left = left_with(Script::honest()).await;
    let process = left.process("d1");
    process.signal(Signal::KILL);
    assert!(process.ends_within(LONG).await);
    let mut other =
        std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().unwrap();
    let watched = Process::new(other.id());
    // As if the number had been used again: the start time is another one.
    edit(&left.directory(), |record| {
        let device = record.devices.iter_mut().find(|device| device.name == "d1").unwrap();
        device.process.pid = other.id();
        device.process.start_time -= 1;
    });
    let TakenOver { machine, report } = left.take_over().await;
    assert!(matches!(report.outcome, Outcome::Degraded { .. }), "{report}");
    assert!(watched.lives().await, "it was killed in the place of the device");
    left.end(machine).await;
    drop(other.stdin.take());
    other.wait().unwrap();
}

/// Of two that take a machine over at once, each may have the device that the other one waits for.
#[tokio::test]
async fn who_waits_for_a_device_goes_when_another_one_has_a_higher_term() {
    let mut left = left_with(Script::honest().on_nth(Trigger::Hello, 2, [])).await;
    left.course.other = LONG * 10;
    let process = left.process("d1");
    let builder = left.course.builder().unwrap();
    let first = tokio::spawn(builder.take_over());
    let record = || std::fs::read(left.directory().join("machine.json")).unwrap();
    let claimed = async {
        while MachineRecord::parse(&record()).unwrap().term < 2 {
            tokio::task::yield_now().await;
        }
    };
    within(LONG, "its claim", claimed).await;
    edit(&left.directory(), |record| record.term = 3);
    let error = within(LONG, "its end", first).await.unwrap().unwrap_err();
    assert!(matches!(error, TakeOverError::Superseded { term } if term.0 == 3), "{error}");
    assert!(!process.ends_within(Duration::ZERO).await, "it was harmed");
}

/// Whoever cannot read the record does not know whether the device is its own.
#[tokio::test]
async fn nobody_is_killed_as_long_as_the_record_cannot_be_read() {
    let breaks = Script::honest().on(Trigger::Memory, [Step::Send(Packet::Garbage)]);
    let left = Left::new(|| [Script::honest(), breaks, Script::honest()]);
    let machine = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let process = left.process("d1");
    let path = left.directory().join("machine.json");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let mut events = machine.events();
    let ram = tempfile::tempfile().unwrap();
    within(LONG, "declare_ram", machine.declare_ram(&ram)).await.unwrap_err();
    let lost =
        async { while !matches!(events.recv().await.unwrap(), MachineEvent::DeviceLost { .. }) {} };
    within(LONG, "the loss", lost).await;
    assert!(!process.ends_within(Duration::from_millis(300)).await, "it was killed");
    std::fs::write(&path, &whole).unwrap();
    let fenced = async {
        while !matches!(events.recv().await.unwrap(), MachineEvent::DeviceFenced { .. }) {}
    };
    within(LONG, "the fence", fenced).await;
    left.end(machine).await;
}

#[tokio::test]
async fn a_deadline_that_no_clock_can_say_is_none() {
    let mut left = left_with(Script::honest()).await;
    left.course.other = Duration::MAX;
    let TakenOver { machine, report } = left.take_over().await;
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    left.end(machine).await;
}
