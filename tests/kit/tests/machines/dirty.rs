//! Devices that mark what they write to RAM: who cannot is named, and what nobody can know counts as
//! written.

use crate::fixture::{LONG, SHORT, builder, deadlines, honest, start};
use crate::left_behind::{Left, Process};
use crate::supervised::{device, events_until, restarted, signal, until_joined};
use rustix::process::Signal;
use standstill_coordinator::dirty::{DirtyError, DirtyOptions, DirtyTracking, Untracked};
use standstill_coordinator::error::{MachineError, StartError};
use standstill_coordinator::{Machine, MachineEvent, TakenOver};
use standstill_protocol::message::Phase;
use standstill_testkit::{Gate, Script, Step, Trace, Trigger, What, within};
use std::fs::File;

const PAGE: u64 = 4096;
const PAGES: u64 = 100;
const OPTIONS: fn() -> DirtyOptions = || DirtyOptions::new(PAGE);

fn ram() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    file
}

async fn declare(machine: &Machine, ram: &File) {
    within(LONG, "declare_ram", machine.declare_ram(ram)).await.unwrap();
}

async fn track(machine: &Machine, options: DirtyOptions) -> Result<DirtyTracking, MachineError> {
    within(LONG, "the start of tracking", machine.start_dirty_tracking(options)).await
}

/// Nothing is marked, since these devices write nothing; all pages are dirty because of whom?
fn presumed(tracking: &mut DirtyTracking) -> Vec<String> {
    let report = tracking.collect().unwrap();
    let expected = if report.presumed.is_empty() { 0 } else { PAGES * report.files.len() as u64 };
    assert_eq!(report.dirty_pages(), expected);
    report.presumed
}

const NOBODY: [&str; 0] = [];

#[tokio::test]
async fn a_device_that_cannot_tell_what_it_writes_is_named_and_nothing_is_tracked() {
    let trace = Trace::new().unwrap();
    let foreign = Script::honest().without_dirty_tracking().device("foreign", &trace).unwrap();
    let machine = start(builder().device(honest("d0", &trace)).device(foreign)).await;
    declare(&machine, &ram()).await;
    let error = track(&machine, OPTIONS()).await.unwrap_err();
    let MachineError::Dirty(DirtyError::Untracked(devices)) = &error else { panic!("{error}") };
    assert_eq!(devices, &["foreign"]);
    assert!(error.to_string().contains("\"foreign\""), "{error}");

    // Or all of RAM counts as written, each time.
    let mut tracking = track(&machine, OPTIONS().untracked(Untracked::AllDirty)).await.unwrap();
    for _ in 0..2 {
        assert_eq!(presumed(&mut tracking), ["foreign"]);
    }
    within(LONG, "removal", machine.remove_device("foreign")).await.unwrap();
    assert_eq!(presumed(&mut tracking), ["foreign"], "what it wrote last");
    assert_eq!(presumed(&mut tracking), NOBODY);
}

#[tokio::test]
async fn a_newcomer_that_cannot_tell_what_it_writes_comes_in_only_where_that_is_allowed() {
    let trace = Trace::new().unwrap();
    let foreign = || Script::honest().without_dirty_tracking().device("foreign", &trace).unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let ram = ram();
    declare(&machine, &ram).await;
    let tracking = track(&machine, OPTIONS()).await.unwrap();
    let error = within(LONG, "add", machine.add_device(foreign())).await.unwrap_err();
    let MachineError::NotStarted(error) = &error else { panic!("{error}") };
    assert!(matches!(&**error, StartError::Untracked { device } if device == "foreign"), "{error}");
    within(LONG, "stop", tracking.stop()).await.unwrap();

    let mut tracking = track(&machine, OPTIONS().untracked(Untracked::AllDirty)).await.unwrap();
    assert_eq!(presumed(&mut tracking), NOBODY);
    within(LONG, "add", machine.add_device(foreign())).await.unwrap();
    assert_eq!(presumed(&mut tracking), ["foreign"]);
    assert_eq!(presumed(&mut tracking), ["foreign"]);
}

#[tokio::test]
async fn tracking_ends_when_it_is_stopped_or_dropped_and_can_begin_again() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().devices(["d0", "d1"].map(|name| honest(name, &trace)))).await;
    declare(&machine, &ram()).await;
    let tracking = track(&machine, OPTIONS()).await.unwrap();
    let error = track(&machine, OPTIONS()).await.unwrap_err();
    assert!(matches!(error, MachineError::Dirty(DirtyError::AlreadyOn)), "{error}");
    within(LONG, "stop", tracking.stop()).await.unwrap();
    drop(track(&machine, OPTIONS()).await.unwrap());
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    assert_eq!(presumed(&mut tracking), NOBODY);
    let ends = || trace.entries().iter().filter(|e| e.what == What::Untracked).count();
    trace.wait_for("both to be told twice", |_| ends() == 4).await;
    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
    assert!(matches!(tracking.collect(), Err(DirtyError::Ended)));
}

#[tokio::test]
async fn bad_pages_and_bad_ram_are_refused() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    for page_size in [0, 1000, 2048, 1 << 31] {
        let error = track(&machine, DirtyOptions::new(page_size)).await.unwrap_err();
        assert!(matches!(error, MachineError::Dirty(DirtyError::Layout(_))), "{error}");
    }
    // Without RAM there is nothing to tell yet.
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    assert_eq!(tracking.collect().unwrap().files, []);
    let empty = tempfile::tempfile().unwrap();
    let error = within(LONG, "declare", machine.declare_ram(&empty)).await.unwrap_err();
    assert!(matches!(error, MachineError::Dirty(DirtyError::Layout(_))), "{error}");
    declare(&machine, &ram()).await;
    assert_eq!(tracking.collect().unwrap().files.len(), 1);
}

#[tokio::test]
async fn more_ram_than_fits_in_one_message_is_tracked_and_what_comes_later_too() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(restarted(Script::honest(), "d0", &trace))).await;
    let files: Vec<_> = (0..21).map(|_| ram()).collect();
    for file in &files[..20] {
        declare(&machine, file).await;
    }
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    declare(&machine, &files[20]).await;
    let report = tracking.collect().unwrap();
    assert_eq!(report.files.len(), 21);
    for (file, dirty) in files.iter().zip(&report.files) {
        assert_eq!(report.of(file).unwrap(), Some(dirty), "in the order of declaration");
    }
    // The next process is told all of it, too.
    let mut events = machine.events();
    signal(&machine, "d0", Signal::KILL).await;
    until_joined(&mut events, "d0").await;
    assert_eq!(presumed(&mut tracking), ["d0"]);
    assert_eq!(presumed(&mut tracking), NOBODY);
}

#[tokio::test]
async fn a_device_that_is_lost_may_have_written_everything() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().devices(["d0", "d1"].map(|name| honest(name, &trace)))).await;
    declare(&machine, &ram()).await;
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    let mut events = machine.events();
    signal(&machine, "d0", Signal::KILL).await;
    let gone = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    events_until(&mut events, "the fence", gone).await;
    assert_eq!(presumed(&mut tracking), ["d0"]);
    assert_eq!(presumed(&mut tracking), NOBODY);

    // One that stood still has written nothing since its marks were complete.
    within(LONG, "removal", machine.remove_device("d0")).await.unwrap();
    within(LONG, "pause", machine.pause()).await.unwrap().leave_stopped();
    signal(&machine, "d1", Signal::KILL).await;
    events_until(&mut events, "the fence", gone).await;
    assert_eq!(presumed(&mut tracking), NOBODY);
}

#[tokio::test]
async fn a_device_on_its_way_in_may_have_written_everything_until_it_marks() {
    let trace = Trace::new().unwrap();
    let gates = [0; 2].map(|_| Gate::closed().unwrap());
    let slow = Script::honest().on_nth(Phase::Stop, 1, [Step::hold(&gates[0]), Step::Ack]).on_nth(
        Trigger::Memory,
        1,
        [Step::hold(&gates[1]), Step::Ack],
    );
    let machine = start(builder().device(honest("d0", &trace))).await;
    declare(&machine, &ram()).await;
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    let [first, second] = gates;
    let slow = slow.device("slow", &trace).unwrap();
    let (added, ()) = tokio::join!(within(LONG, "add", machine.add_device(slow)), async {
        let told = |what: fn(&What) -> bool| {
            trace.entries().iter().any(|entry| entry.who == "slow" && what(&entry.what))
        };
        let stop = |what: &What| matches!(what, What::Received { phase: Phase::Stop, .. });
        trace.wait_for("its stop", |_| told(stop)).await;
        assert_eq!(presumed(&mut tracking), ["slow"]);
        drop(first);
        trace.wait_for("RAM", |_| told(|what| matches!(what, What::Memory { .. }))).await;
        assert_eq!(presumed(&mut tracking), ["slow"]);
        drop(second);
    });
    added.unwrap();
    assert_eq!(presumed(&mut tracking), NOBODY);
}

#[tokio::test]
async fn a_device_that_does_not_begin_to_mark_is_named_within_the_deadline() {
    let trace = Trace::new().unwrap();
    let deaf = Script::honest().on_nth(Trigger::Memory, 2, []);
    let mut short = deadlines();
    short.memory = SHORT;
    let machine = start(
        builder()
            .deadlines(short)
            .device(honest("d0", &trace))
            .device(deaf.device("deaf", &trace).unwrap()),
    )
    .await;
    declare(&machine, &ram()).await;
    let error = track(&machine, OPTIONS()).await.unwrap_err();
    assert!(matches!(&error, MachineError::Memory { device, .. } if device == "deaf"), "{error}");
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    assert_eq!(presumed(&mut tracking), NOBODY);
}

#[tokio::test]
async fn a_device_that_dies_instead_of_marking_does_not_keep_the_others_from_it() {
    let trace = Trace::new().unwrap();
    let dies = Script::honest().on_nth(Trigger::Memory, 2, [Step::Crash]);
    let machine =
        start(builder().device(honest("d0", &trace)).device(dies.device("dies", &trace).unwrap()))
            .await;
    let mut events = machine.events();
    declare(&machine, &ram()).await;
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    let gone = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    events_until(&mut events, "the fence", gone).await;
    assert_eq!(presumed(&mut tracking), ["dies"]);
    assert_eq!(presumed(&mut tracking), NOBODY);
}

/// Its end is not read yet when it is to be told: on this runtime's one thread, that is not before
/// this test waits for something.
#[tokio::test]
async fn a_device_whose_death_is_not_seen_yet_does_not_keep_the_others_from_it() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().devices(["dead", "d1"].map(|name| honest(name, &trace)))).await;
    declare(&machine, &ram()).await;
    let process = Process::new(device(&machine, "dead").await.pid.unwrap());
    process.signal(Signal::KILL);
    assert!(process.ends_within_blocking(LONG));
    let mut events = machine.events();
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    let gone = |event: &MachineEvent| matches!(event, MachineEvent::DeviceFenced { .. });
    events_until(&mut events, "the fence", gone).await;
    assert_eq!(presumed(&mut tracking), ["dead"]);
    assert_eq!(presumed(&mut tracking), NOBODY);
}

#[tokio::test]
async fn who_is_superseded_is_told_that_the_marks_are_gone() {
    let left = Left::honest();
    let old = within(LONG, "start", left.course.builder().unwrap().start()).await.unwrap();
    let ram = ram();
    declare(&old, &ram).await;
    let mut tracking = track(&old, OPTIONS()).await.unwrap();
    let mut events = old.events();
    let TakenOver { machine, .. } = left.take_over().await;
    let superseded = |event: &MachineEvent| matches!(event, MachineEvent::Superseded { .. });
    events_until(&mut events, "the old one to know", superseded).await;
    let error = tracking.collect().unwrap_err();
    assert!(matches!(error, DirtyError::Superseded(term) if term.0 == 2), "{error}");

    // The new one begins anew.
    declare(&machine, &ram).await;
    let mut tracking = track(&machine, OPTIONS()).await.unwrap();
    assert_eq!(presumed(&mut tracking), NOBODY);
    left.end(machine).await;
}
