//! Test machines: signals, limits and hooks, each with the outcome that `docs/failures.md` promises.

use crate::fixture::report_of;
use standstill_coordinator::{Outcome, Slot};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HeldReason, Loss, MachineState};
use standstill_testkit::machine::{LONG, SHORT};
use standstill_testkit::plan::{
    HookAction, HookFault, Moment, OutsideAction, Place, Plan, PlanError, Policy,
};
use standstill_testkit::{Call, Script, TestMachine, TestMachineBuilder, Trace, What, within};

fn three() -> TestMachineBuilder {
    let builder = TestMachine::builder().unwrap();
    ["d0", "d1", "d2"].iter().fold(builder, |all, name| all.scripted(name, Script::honest()))
}

async fn assert_in(machine: &TestMachine, names: &[&str], state: MigrationState) {
    for device in machine.status().await.unwrap().devices {
        let expected = names.contains(&device.name.as_str()).then_some(state);
        assert_eq!(device.state, expected, "{}\n{}", device.name, machine.trace().text());
    }
}

#[tokio::test]
async fn a_machine_has_what_a_test_needs_and_leaves_nothing() {
    let machine = three()
        .relay("d2")
        .hook("vcpus", Slot::Before)
        .local("gpu")
        .ram(1 << 16)
        .start()
        .await
        .unwrap();
    let folder = machine.folder().to_owned();
    assert!(machine.socket("d0").starts_with(&folder));
    assert_eq!(machine.memory().metadata().unwrap().len(), 1 << 16);
    let declared = |entry: &standstill_testkit::Entry| matches!(entry.what, What::Memory { .. });
    assert_eq!(machine.trace().entries().into_iter().filter(declared).count(), 3);
    machine.pause().await.unwrap().resume().await.unwrap();
    let called = |call| {
        let is = |entry: &standstill_testkit::Entry| entry.what == What::Called(call);
        machine.trace().entries().iter().filter(|entry| is(entry)).count()
    };
    assert_eq!((called(Call::Stop), called(Call::Start)), (1, 1));
    assert_eq!(machine.trace().last_state("gpu"), Some(MigrationState::Running));
    machine.end().await;
    assert!(!folder.exists());
}

#[tokio::test]
async fn a_machine_that_is_dropped_leaves_nothing_either() {
    let machine = three().relays().start().await.unwrap();
    let mut processes = machine.processes().await;
    for name in ["d0", "d1", "d2"] {
        processes.add(name, machine.process(name).await);
    }
    assert_eq!(processes.left().len(), 6);
    drop(machine);
    processes.assert_gone_within(LONG).await;
}

#[tokio::test]
async fn a_device_that_is_stopped_is_fenced_at_its_deadline_and_one_that_goes_on_in_time_is_not() {
    for relayed in [false, true] {
        let builder = three().impatient("d1");
        let builder = if relayed { builder.relay("d1") } else { builder };
        let machine = builder.start().await.unwrap();
        machine.stop("d1").await;
        let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
        let report = report_of(&error);
        match &report.outcome {
            Outcome::Degraded { machine: MachineState::Running, fenced } => {
                assert_eq!(fenced[0].1, Loss::Timeout, "{report}");
            }
            _ => panic!("{report}"),
        }
        assert_in(&machine, &["d0", "d2"], MigrationState::Running).await;
        machine.end().await;
    }
    let machine = three().start().await.unwrap();
    machine.stop("d1").await;
    let pause = machine.launch_prepare_stop(LONG).unwrap();
    machine.go_on("d1").await;
    let stopped = pause.join().await.unwrap().launch_stop().join().await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    stopped.resume().await.unwrap();
    machine.end().await;
}

/// What each policy makes of a device that is killed with its answer to `Stop` on its way.
#[tokio::test]
async fn each_policy_does_what_it_says_about_a_device_that_is_killed_in_a_pause() {
    let cases = [
        (Policy::Rollback, MachineState::Running, MigrationState::Running),
        (Policy::StayStopped, MachineState::Stopped, MigrationState::Stop),
        (Policy::ContinueWithout, MachineState::Stopped, MigrationState::Stop),
    ];
    for (policy, expected, state) in cases {
        let machine = three().relay("d1").policy(policy).start().await.unwrap();
        let relay = machine.relay("d1").clone();
        relay.arm(Moment::Command(Phase::Stop), 1, OutsideAction::Kill).unwrap();
        let paused = within(LONG, "pause", machine.pause()).await;
        let report = match paused {
            Ok(stopped) => {
                let report = std::sync::Arc::clone(stopped.report());
                stopped.leave_stopped();
                report
            }
            Err(error) => std::sync::Arc::clone(report_of(&error)),
        };
        match &report.outcome {
            Outcome::Degraded { machine, fenced } => {
                assert_eq!((*machine, fenced.len()), (expected, 1), "{policy}: {report}");
            }
            _ => panic!("{policy}: {report}"),
        }
        assert_eq!(relay.fired().unwrap().len(), 1);
        assert_in(&machine, &["d0", "d2"], state).await;
        machine.end().await;
    }
}

fn hook(place: Place, call: Call, action: HookAction) -> HookFault {
    HookFault { round: 1, place, call, action }
}

#[tokio::test]
async fn a_hook_that_fails_undoes_the_transition_and_the_next_one_is_as_ever() {
    for place in [Place::Before, Place::Between, Place::After] {
        let faults = [hook(place, Call::Stop, HookAction::Fail)];
        let machine = three().hook_faults(&faults).start().await.unwrap();
        let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
        let report = report_of(&error);
        assert_eq!(report.outcome, Outcome::RolledBack, "{place:?}: {report}");
        assert!(report.to_string().contains("fails as the plan says"), "{report}");
        assert_eq!(machine.hook_faults()[0].fired().len(), 1);
        assert_in(&machine, &["d0", "d1", "d2"], MigrationState::Running).await;
        machine.pause().await.unwrap().resume().await.unwrap();
        assert_eq!(machine.hook_faults()[0].fired().len(), 1);
        machine.end().await;
    }
}

#[tokio::test]
async fn a_hook_that_does_not_return_holds_the_machine_and_one_that_is_slow_does_not() {
    for (place, call) in [(Place::Before, Call::Stop), (Place::After, Call::Start)] {
        let faults = [hook(place, call, HookAction::StickMs(0))];
        let machine = three().hook_faults(&faults).start().await.unwrap();
        let error = match within(LONG, "pause", machine.pause()).await {
            Err(error) => error,
            Ok(stopped) => within(LONG, "resume", stopped.resume()).await.unwrap_err(),
        };
        let report = report_of(&error);
        match &report.outcome {
            Outcome::Held { reasons, .. } => {
                let hangs = |reason: &HeldReason| matches!(reason, HeldReason::HookHung(_));
                assert!(reasons.iter().any(hangs), "{report}");
            }
            _ => panic!("{place:?} {call:?}: {report}"),
        }
        assert_eq!(machine.hook_faults().iter().map(|hook| hook.fired().len()).sum::<usize>(), 1);
        assert_eq!(machine.status().await.unwrap().machine, MachineState::Held);
        assert_in(&machine, &["d0", "d1", "d2"], MigrationState::Stop).await;
        machine.end().await;
    }
    let slow = u32::try_from(SHORT.as_millis() / 10).unwrap();
    let faults = [hook(Place::Between, Call::Stop, HookAction::StickMs(slow))];
    let machine = three().hook_faults(&faults).start().await.unwrap();
    machine.pause().await.unwrap().resume().await.unwrap();
    assert_eq!(machine.hook_faults()[0].fired().len(), 1);
    machine.end().await;
}

#[test]
fn a_plan_names_hooks_by_words() {
    let text = "devices = 1\nrounds = 2\n[[hook]]\nround = 2\nplace = \"before\"\ncall = \"stop\"\n\
                action = { stick-ms = 5 }\n";
    let plan = Plan::from_toml(text).unwrap();
    let expected =
        HookFault { round: 2, ..hook(Place::Before, Call::Stop, HookAction::StickMs(5)) };
    assert_eq!(plan.hooks, [expected]);
    let error = Plan::from_toml(&text.replace("round = 2", "round = 3")).unwrap_err();
    assert!(matches!(error, PlanError::Round { round: 3, rounds: 2, .. }), "{error}");
}

#[tokio::test]
async fn what_is_wrong_with_a_description_is_told_at_the_start() {
    let builder = TestMachine::builder().unwrap();
    let missing = builder.device("d0", "/no/such/program", |spec, socket| spec.arg(socket));
    let error = standstill_testkit::chain(&missing.relay("d0").start().await.unwrap_err());
    assert!(error.contains("d0"), "{error}");
    let trace = Trace::new().unwrap();
    let twice =
        three().describe(|builder| builder.device(Script::honest().device("d0", &trace).unwrap()));
    let error = standstill_testkit::chain(&twice.start().await.unwrap_err());
    assert!(error.contains("d0"), "{error}");
}
