//! Memory is declared to everybody or the owner hears who has not accepted it.

use crate::fixture::{LONG, SHORT, assert_usable, builder, deadlines, honest, start};
use crate::supervised::{restarted, signal, until_joined};
use rustix::process::Signal;
use standstill_coordinator::error::MachineError;
use standstill_protocol::message::MAX_RAM_FILES;
use standstill_testkit::{Processes, Script, Step, Trace, Trigger, What, within};

#[tokio::test]
async fn a_declaration_is_in_force_everywhere_when_the_call_returns() {
    let trace = Trace::new().unwrap();
    let machine =
        start(builder().devices(["d0", "d1", "d2"].map(|name| honest(name, &trace)))).await;
    let ram = tempfile::tempfile().unwrap();
    for sequence in 1..=3 {
        within(LONG, "declare_ram", machine.declare_ram(&ram)).await.unwrap();
        let is = |what| matches!(what, What::Memory { sequence: s } if s == sequence);
        let told = trace.entries().into_iter().filter(|entry| is(entry.what)).count();
        assert_eq!(told, 3, "{}", trace.text());
    }
}

#[tokio::test]
async fn a_device_that_never_answers_is_named_within_the_deadline() {
    let trace = Trace::new().unwrap();
    let deaf = Script::honest().on_nth(Trigger::Memory, 1, []);
    let mut short = deadlines();
    short.memory = SHORT;
    let machine = start(
        builder()
            .deadlines(short)
            .device(honest("d0", &trace))
            .device(deaf.device("deaf", &trace).unwrap()),
    )
    .await;
    let ram = tempfile::tempfile().unwrap();
    let error = within(SHORT, "declare_ram", machine.declare_ram(&ram)).await.unwrap_err();
    match &error {
        MachineError::Memory { device, why } => {
            assert_eq!(device, "deaf");
            assert!(why.contains("600ms"), "{why}");
        }
        other => panic!("{other}"),
    }
    // It is no reason to fence: it may be asked again.
    within(LONG, "declare_ram", machine.declare_ram(&ram)).await.unwrap();
    assert_usable(&machine).await;
}

#[tokio::test]
async fn a_device_that_ends_instead_is_named_at_once() {
    for step in [Step::Exit(1), Step::Crash, Step::Disconnect] {
        let trace = Trace::new().unwrap();
        let dies = Script::honest().on(Trigger::Memory, [step]);
        let machine = start(
            builder().device(honest("d0", &trace)).device(dies.device("dies", &trace).unwrap()),
        )
        .await;
        let processes = Processes::of(&machine.status().await.unwrap()).only(&["dies"]);
        let ram = tempfile::tempfile().unwrap();
        // Long before its deadline.
        let error = within(SHORT, "declare_ram", machine.declare_ram(&ram)).await.unwrap_err();
        assert!(matches!(&error, MachineError::Memory { device, .. } if device == "dies"));
        processes.assert_gone_within(LONG).await;
    }
}

/// Devices accept 64 files and no more, so that nobody would accept the next one who comes later.
#[tokio::test]
async fn a_file_too_many_is_refused_and_told_nobody() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().device(honest("d0", &trace))).await;
    let files: Vec<_> = (0..MAX_RAM_FILES).map(|_| tempfile::tempfile().unwrap()).collect();
    for file in &files {
        within(LONG, "declare_ram", machine.declare_ram(file)).await.unwrap();
    }
    let told = || trace.entries().iter().filter(|e| matches!(e.what, What::Memory { .. })).count();
    let before = told();
    let more = tempfile::tempfile().unwrap();
    let error = within(LONG, "declare_ram", machine.declare_ram(&more)).await.unwrap_err();
    assert!(matches!(error, MachineError::TooMuchRam { most: MAX_RAM_FILES }), "{error}");
    assert_eq!(told(), before, "{}", trace.text());
    // What is declared already is no more.
    within(LONG, "declare_ram", machine.declare_ram(&files[0])).await.unwrap();
    assert_usable(&machine).await;
}

#[tokio::test]
async fn what_no_device_has_accepted_is_not_declared_to_those_that_come_later() {
    let trace = Trace::new().unwrap();
    // Nor does the next process accept anything that is declared to it.
    let deaf = Script::honest().on(Trigger::Memory, []);
    let mut short = deadlines();
    short.memory = SHORT;
    let machine = start(builder().deadlines(short).device(restarted(deaf, "deaf", &trace))).await;
    let ram = tempfile::tempfile().unwrap();
    let error = within(SHORT, "declare_ram", machine.declare_ram(&ram)).await.unwrap_err();
    assert!(matches!(&error, MachineError::Memory { device, .. } if device == "deaf"), "{error}");
    let mut events = machine.events();
    signal(&machine, "deaf", Signal::KILL).await;
    let (seen, incarnation) = until_joined(&mut events, "deaf").await;
    assert_eq!(incarnation, 2, "{seen:?}");
    assert_usable(&machine).await;
}

#[tokio::test]
async fn declarations_may_overlap() {
    let trace = Trace::new().unwrap();
    let slow = Script::honest().on_nth(
        Trigger::Memory,
        1,
        [Step::Delay(std::time::Duration::from_millis(50)), Step::Ack],
    );
    let machine =
        start(builder().device(honest("d0", &trace)).device(slow.device("slow", &trace).unwrap()))
            .await;
    let ram = tempfile::tempfile().unwrap();
    let (one, other) = tokio::join!(machine.declare_ram(&ram), machine.declare_ram(&ram));
    one.unwrap();
    other.unwrap();
}
