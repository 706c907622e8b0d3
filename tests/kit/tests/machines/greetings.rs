//! One device that does not greet as it should is one machine that does not start, and leaves
//! nothing behind.

use crate::fixture::{LONG, SHORT, builder, deadlines, honest};
use standstill_coordinator::StartError;
use standstill_coordinator::error::GreetingError;
use standstill_protocol::message::Phase;
use standstill_testkit::{Gate, Packet, Processes, Script, Step, Trace, Trigger, chain, within};
use std::time::Duration;

/// Starts a machine of which one device greets as the script says; gives the error and its text.
async fn start_fails(script: Script, hello: Duration) -> (GreetingError, String) {
    let trace = Trace::new().unwrap();
    let mut short = deadlines();
    short.hello = hello;
    let machine = builder()
        .deadlines(short)
        .device(honest("d0", &trace))
        .device(script.device("bad", &trace).unwrap())
        .device(honest("d2", &trace));
    let error = within(hello, "start", machine.start()).await.unwrap_err();
    let text = chain(&error);
    let processes = Processes::of_trace(&trace);
    processes.assert_gone_within(Duration::ZERO).await;
    match error {
        StartError::Greeting { device, source, .. } => {
            assert_eq!(device, "bad", "{text}");
            assert!(text.contains("\"bad\""), "{text}");
            (source, text)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_device_that_never_says_hello() {
    let hello = Duration::from_secs(2);
    let (error, text) = start_fails(Script::honest().on(Trigger::Hello, []), hello).await;
    assert!(matches!(error, GreetingError::Silent(time) if time == hello), "{text}");
}

#[tokio::test]
async fn a_device_that_is_stopped_by_a_signal_before_it_says_hello() {
    let script = Script::honest().on(Trigger::Hello, [Step::Freeze, Step::Ack]);
    let (error, text) = start_fails(script, Duration::from_secs(2)).await;
    assert!(matches!(error, GreetingError::Silent(_)), "{text}");
}

#[tokio::test]
async fn a_device_that_exits_at_once_says_why() {
    let script = Script::honest().on(
        Trigger::Hello,
        [
            Step::Say("no such disk: /dev/nothing".into()),
            Step::Say("giving up".into()),
            Step::Exit(3),
        ],
    );
    let (error, text) = start_fails(script, LONG).await;
    assert!(matches!(error, GreetingError::Exited(_)), "{text}");
    for what in ["exited with status 3", "no such disk: /dev/nothing", "giving up"] {
        assert!(text.contains(what), "{text}");
    }
}

#[tokio::test]
async fn a_device_that_crashes_at_once() {
    let (error, text) = start_fails(Script::honest().on(Trigger::Hello, [Step::Crash]), LONG).await;
    assert!(matches!(error, GreetingError::Exited(_)), "{text}");
    assert!(text.contains("SIGABRT"), "{text}");
}

#[tokio::test]
async fn a_device_that_closes_its_channel_and_lives_on() {
    let script = Script::honest().on(Trigger::Hello, [Step::Disconnect]);
    let (error, text) = start_fails(script, LONG).await;
    assert!(matches!(error, GreetingError::Disconnected), "{text}");
}

#[tokio::test]
async fn a_device_of_another_version() {
    let (error, text) = start_fails(Script::honest().versions(7, 9), LONG).await;
    assert!(matches!(error, GreetingError::Version { .. }), "{text}");
    assert!(text.contains("speaks protocol version 7 to 9, this coordinator speaks 1"), "{text}");
}

#[tokio::test]
async fn a_device_that_sends_something_else() {
    let cases = [
        (Packet::Garbage, "packet begins with [a5, a5, a5, a5]"),
        (Packet::Empty, "empty packet"),
        (Packet::Oversized, "packet of 4097 bytes"),
        (Packet::ManyFds, "file descriptors"),
    ];
    for (packet, says) in cases {
        let script = Script::honest().on(Trigger::Hello, [Step::Send(packet)]);
        let (error, text) = start_fails(script, LONG).await;
        assert!(matches!(error, GreetingError::Protocol(_)), "{text}");
        assert!(text.contains(says), "{packet:?}: {text}");
    }
}

#[tokio::test]
async fn a_device_that_sends_another_message_first() {
    let script = Script::honest().on(Trigger::Hello, [Step::Flood(1), Step::Ack]);
    let (error, text) = start_fails(script, LONG).await;
    assert!(matches!(error, GreetingError::Protocol(_)), "{text}");
}

/// The second Hello is no greeting any more: while others have still to greet, the machine does
/// not start; afterwards the device is lost.
#[tokio::test]
async fn a_device_that_says_hello_twice() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let late = Script::honest().on(Trigger::Hello, [Step::hold(&gate), Step::Ack]);
    let twice = Script::honest().on(Trigger::Hello, [Step::Ack, Step::Ack]);
    let machine = builder()
        .device(twice.device("bad", &trace).unwrap())
        .device(late.device("late", &trace).unwrap());
    let error = within(SHORT, "start", machine.start()).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("\"bad\"") && text.contains("a second Hello"), "{text}");
    Processes::of_trace(&trace).assert_gone_within(Duration::ZERO).await;
}

/// It has greeted, but is gone before the last one has.
#[tokio::test]
async fn a_device_that_ends_while_others_still_greet() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let late = Script::honest().on(Trigger::Hello, [Step::hold(&gate), Step::Ack]);
    let short = Script::honest().on(Trigger::Welcome, [Step::Say("bye".into()), Step::Exit(4)]);
    let machine = builder()
        .device(short.device("bad", &trace).unwrap())
        .device(late.device("late", &trace).unwrap());
    let error = within(SHORT, "start", machine.start()).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("\"bad\"") && text.contains("bye"), "{text}");
    Processes::of_trace(&trace).assert_gone_within(Duration::ZERO).await;
}

#[tokio::test]
async fn a_program_that_is_not_there() {
    let trace = Trace::new().unwrap();
    let missing = standstill_coordinator::DeviceSpec::new("bad", "/nowhere/at/all");
    let machine = builder().device(honest("d0", &trace)).device(missing);
    let error = within(LONG, "start", machine.start()).await.unwrap_err();
    let text = chain(&error);
    assert!(text.contains("\"bad\"") && text.contains("/nowhere/at/all"), "{text}");
    Processes::of_trace(&trace).assert_gone_within(Duration::from_secs(2)).await;
}

#[tokio::test]
async fn names_that_cannot_be() {
    let trace = Trace::new().unwrap();
    for (names, says) in [
        (vec!["twin".to_owned(), "twin".to_owned()], "two devices are named \"twin\""),
        (vec![String::new()], "1 to 64 bytes"),
        (vec!["x".repeat(65)], "1 to 64 bytes"),
    ] {
        let devices = names.iter().map(|name| honest(name, &trace));
        let error = builder().devices(devices).start().await.unwrap_err();
        assert!(matches!(error, StartError::Description(_)), "{error:?}");
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(trace.entries().is_empty(), "something was started:\n{}", trace.text());
}

/// Two that are wrong: one error, nothing left.
#[tokio::test]
async fn several_devices_that_do_not_greet() {
    let trace = Trace::new().unwrap();
    let frozen = Script::honest().on(Trigger::Hello, [Step::Freeze]);
    let garbage = Script::honest().on(Trigger::Hello, [Step::Send(Packet::Garbage)]);
    let machine = builder()
        .device(frozen.device("frozen", &trace).unwrap())
        .device(garbage.device("garbage", &trace).unwrap())
        .device(honest("d0", &trace));
    let error = within(SHORT, "start", machine.start()).await.unwrap_err();
    assert!(chain(&error).contains("\"garbage\""), "{}", chain(&error));
    Processes::of_trace(&trace).assert_gone_within(Duration::ZERO).await;
    assert!(trace.received(Phase::PrepareStop).is_empty());
}

/// Whoever starts a machine may lose patience.
#[tokio::test]
async fn a_start_that_is_given_up_leaves_nothing_behind() {
    let trace = Trace::new().unwrap();
    let silent = Script::honest().on(Trigger::Hello, []);
    let mut short = deadlines();
    short.hello = Duration::from_secs(2);
    let machine = builder()
        .deadlines(short)
        .device(silent.device("silent", &trace).unwrap())
        .device(honest("d0", &trace));
    let began = |entries: &[_]| entries.len() >= 2;
    tokio::select! {
        _ = machine.start() => panic!("it cannot start"),
        () = trace.wait_for("both processes to begin", began) => {}
    }
    Processes::of_trace(&trace).assert_gone_within(Duration::from_secs(4)).await;
}
