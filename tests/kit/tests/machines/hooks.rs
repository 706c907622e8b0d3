//! Hooks run at their places, in their order on stop and in the mirrored order on start; local
//! devices take part in both phases beside the processes.

use crate::fixture::{
    LONG, PHASES, assert_all_in, assert_machine, builder, honest, report_of, start,
};
use standstill_coordinator::{HookSpec, MachineBuilder, Outcome, Slot, Stopped};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::MachineState;
use standstill_testkit::{Call, Gate, Script, Step, Trace, TracedHook, TracedLocal, What, within};

const SLOTS: [Slot; 3] = [Slot::Before, Slot::Between, Slot::After];
const DEVICES: usize = 2;

fn name(slot: Slot, rank: i32) -> String {
    format!("{slot:?}{rank}")
}

/// Two hooks for each slot, added in the wrong order.
fn with_hooks(trace: &Trace, make: impl Fn(&str, TracedHook) -> TracedHook) -> MachineBuilder {
    let devices = ["d0", "d1"].map(|name| honest(name, trace));
    let places = SLOTS.iter().rev().flat_map(|&slot| [2, 1].map(|rank| (slot, rank)));
    places.fold(builder().devices(devices), |builder, (slot, rank)| {
        let name = name(slot, rank);
        let hook = make(&name, TracedHook::new(&name, trace).unwrap());
        builder.hook(HookSpec::new(name, slot).rank(rank), hook)
    })
}

/// The trace in words: hooks by name, a phase when the last of the devices has done it. Every
/// hook must have returned before the next thing begins.
fn order(trace: &Trace) -> Vec<String> {
    let mut words = Vec::new();
    let mut running: Option<String> = None;
    let (mut told, mut reached) = (0, 0);
    for entry in trace.entries() {
        match entry.what {
            What::Called(call) => {
                assert_eq!(running, None, "two hooks at once:\n{}", trace.text());
                assert_eq!(told, reached, "a hook within a phase:\n{}", trace.text());
                running = Some(entry.who.clone());
                let sign = if call == Call::Stop { '-' } else { '+' };
                words.push(format!("{sign}{}", entry.who));
            }
            What::Returned(_) => assert_eq!(running.take(), Some(entry.who)),
            What::Received { .. } => {
                assert_eq!(running, None, "a phase within a hook:\n{}", trace.text());
                told += 1;
            }
            What::Reached { phase, .. } => {
                reached += 1;
                if reached == DEVICES {
                    words.push(phase.to_string());
                    (told, reached) = (0, 0);
                }
            }
            _ => {}
        }
    }
    words
}

const STOP: [&str; 8] =
    ["-Before1", "-Before2", "PrepareStop", "-Between1", "-Between2", "Stop", "-After1", "-After2"];
const START: [&str; 8] = [
    "+After2",
    "+After1",
    "PrepareStart",
    "+Between2",
    "+Between1",
    "Start",
    "+Before2",
    "+Before1",
];

#[tokio::test]
async fn the_order_on_start_mirrors_the_order_on_stop() {
    let trace = Trace::new().unwrap();
    let machine = start(with_hooks(&trace, |_, hook| hook)).await;
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(order(&trace), STOP, "{}", trace.text());
    within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(order(&trace), [STOP, START].concat(), "{}", trace.text());
}

#[tokio::test]
async fn the_start_may_have_an_order_of_its_own() {
    let trace = Trace::new().unwrap();
    let hook = |name| TracedHook::new(name, &trace).unwrap();
    let machine = start(
        builder()
            .devices(["d0", "d1"].map(|name| honest(name, &trace)))
            .hook(HookSpec::new("one", Slot::Before).rank(1).start_rank(1), hook("one"))
            .hook(HookSpec::new("two", Slot::Before).rank(2).start_rank(2), hook("two"))
            .hook(HookSpec::new("late", Slot::After).start_slot(Slot::After), hook("late")),
    )
    .await;
    machine.pause().await.unwrap().resume().await.unwrap();
    // "late" has rank 0 on start, before the others.
    let expected = [
        "-one",
        "-two",
        "PrepareStop",
        "Stop",
        "-late",
        "PrepareStart",
        "Start",
        "+late",
        "+one",
        "+two",
    ];
    assert_eq!(order(&trace), expected, "{}", trace.text());
}

#[tokio::test]
async fn hooks_of_equal_rank_run_at_the_same_time() {
    let trace = Trace::new().unwrap();
    let gate = Gate::closed().unwrap();
    let hook = |name| {
        let key = gate.key();
        TracedHook::new(name, &trace).unwrap().doing(move |_| Ok(key.wait()?))
    };
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .hook(HookSpec::new("one", Slot::Before), hook("one"))
            .hook(HookSpec::new("other", Slot::Before), hook("other")),
    )
    .await;
    let pause = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await.map(Stopped::leave_stopped) })
    };
    let called = |entries: &[standstill_testkit::Entry]| {
        entries.iter().filter(|entry| matches!(entry.what, What::Called(_))).count() == 2
    };
    trace.wait_for("both hooks to be called", called).await;
    assert!(trace.received(Phase::PrepareStop).is_empty(), "{}", trace.text());
    gate.open();
    within(LONG, "pause", pause).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_hook_that_fails_on_stop_is_undone_and_only_what_had_stopped_is_started() {
    for slot in SLOTS {
        let trace = Trace::new().unwrap();
        let bad = name(slot, 2);
        let machine =
            start(with_hooks(
                &trace,
                |name, hook| {
                    if name == bad { hook.failing(Call::Stop) } else { hook }
                },
            ))
            .await;
        let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
        let report = report_of(&error);
        assert_eq!(report.outcome, Outcome::RolledBack, "{slot:?}: {report}");
        let text = error.to_string();
        assert!(text.contains(&format!("hook {bad:?} refused")), "{text}");
        assert!(text.contains("Stop fails as it was told"), "{text}");
        assert_machine(&machine, MachineState::Running).await;
        assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;

        // Stopped up to and with the bad one, which is as before: it is not started.
        let bad_word = format!("-{bad}");
        let at = STOP.iter().position(|word| *word == bad_word).unwrap();
        let hook_words = order(&trace);
        let hooks = |sign: char| -> Vec<String> {
            let words = hook_words.iter().filter(|word| word.starts_with(sign));
            words.map(|word| word[1..].to_owned()).collect()
        };
        let stopped: Vec<_> = STOP[..=at].iter().filter(|w| w.starts_with('-')).collect();
        assert_eq!(hooks('-'), stopped.iter().map(|w| &w[1..]).collect::<Vec<_>>());
        let mirrored: Vec<_> = stopped.iter().rev().skip(1).map(|word| &word[1..]).collect();
        assert_eq!(hooks('+'), mirrored, "{slot:?}:\n{}", trace.text());
    }
}

#[tokio::test]
async fn a_hook_that_fails_on_start_leaves_the_machine_stopped() {
    for slot in SLOTS {
        let trace = Trace::new().unwrap();
        let bad = name(slot, 1);
        let machine =
            start(with_hooks(
                &trace,
                |name, hook| {
                    if name == bad { hook.failing(Call::Start) } else { hook }
                },
            ))
            .await;
        machine.pause().await.unwrap().leave_stopped();
        let error = within(LONG, "resume", machine.resume()).await.unwrap_err();
        let report = report_of(&error);
        assert_eq!(report.outcome, Outcome::RolledBack, "{slot:?}: {report}");
        assert!(error.to_string().contains(&format!("hook {bad:?} refused")), "{error}");
        assert_machine(&machine, MachineState::Stopped).await;
        assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
        // Whatever was started was stopped again: every hook was stopped last.
        for hook in SLOTS.iter().flat_map(|&slot| [1, 2].map(|rank| name(slot, rank))) {
            let calls: Vec<_> = trace
                .entries()
                .into_iter()
                .filter(|entry| entry.who == hook && matches!(entry.what, What::Called(_)))
                .map(|entry| entry.what)
                .collect();
            let stands = match calls.last() {
                Some(What::Called(Call::Stop)) => true,
                // Its start failed: things are as before the call.
                Some(What::Called(Call::Start)) => hook == bad,
                _ => false,
            };
            assert!(stands, "{hook} runs, {bad} failed:\n{}", trace.text());
        }
    }
}

#[tokio::test]
async fn a_device_that_refuses_undoes_the_hooks_too() {
    let trace = Trace::new().unwrap();
    let hook = |name| TracedHook::new(name, &trace).unwrap();
    let refuses = Script::honest().on(Phase::Stop, [Step::Refuse("no".into())]);
    let machine = start(
        builder()
            .device(refuses.device("d0", &trace).unwrap())
            .hook(HookSpec::new("before", Slot::Before), hook("before"))
            .hook(HookSpec::new("between", Slot::Between), hook("between"))
            .hook(HookSpec::new("after", Slot::After), hook("after")),
    )
    .await;
    machine.pause().await.unwrap_err();
    let calls: Vec<_> = trace
        .entries()
        .into_iter()
        .filter_map(|entry| match entry.what {
            What::Called(call) => Some((entry.who, call)),
            _ => None,
        })
        .collect();
    let expected = [
        ("before", Call::Stop),
        ("between", Call::Stop),
        ("between", Call::Start),
        ("before", Call::Start),
    ];
    let expected = expected.map(|(name, call)| (name.to_owned(), call));
    assert_eq!(calls, expected, "{}", trace.text());
}

/// The local device answers only when the process was told, and the other way round: both are
/// told before either has answered, in every phase.
#[tokio::test]
async fn a_local_device_takes_part_in_both_phases_beside_the_processes() {
    let trace = Trace::new().unwrap();
    let gates = PHASES.map(|phase| (phase, Gate::closed().unwrap()));
    let script = gates.iter().fold(Script::honest(), |script, (phase, gate)| {
        script.on(*phase, [Step::hold(gate), Step::Ack])
    });
    let keys: Vec<_> = gates.iter().map(|(phase, gate)| (*phase, gate.key())).collect();
    let local = TracedLocal::new("local", &trace).unwrap().doing(move |phase| {
        match keys.iter().find(|(of, _)| *of == phase) {
            Some((_, key)) => Ok(key.wait()?),
            None => Err("not a phase".into()),
        }
    });
    let machine =
        start(builder().device(script.device("d0", &trace).unwrap()).local_device("local", local))
            .await;
    let round = {
        let machine = machine.clone();
        tokio::spawn(async move { machine.pause().await?.resume().await })
    };
    for (phase, gate) in gates {
        let told = |_: &[_]| trace.received(phase).len() == 2;
        trace.wait_for(&format!("both to be told {phase}"), told).await;
        assert!(trace.reached(phase).is_empty(), "{}", trace.text());
        gate.open();
    }
    let report = within(LONG, "the round", round).await.unwrap().unwrap();
    assert_eq!(report.participants.len(), 2);
    assert_all_in(&machine, &trace, &["d0", "local"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_local_device_that_refuses_is_rolled_back() {
    for refused in PHASES {
        let trace = Trace::new().unwrap();
        let mut times = 0;
        let local = TracedLocal::new("local", &trace).unwrap().doing(move |phase| {
            times += usize::from(phase == refused);
            if phase == refused && times == 1 { Err("kernel says EBUSY".into()) } else { Ok(()) }
        });
        let machine =
            start(builder().device(honest("d0", &trace)).local_device("local", local)).await;
        let error = crate::fixture::until(&machine, refused).await.unwrap_err();
        assert_eq!(report_of(&error).outcome, Outcome::RolledBack, "{refused}: {error}");
        let text = error.to_string();
        assert!(text.contains("\"local\" refused") && text.contains("EBUSY"), "{text}");
        let (expected, state) = crate::fixture::undone(refused);
        assert_machine(&machine, expected).await;
        assert_all_in(&machine, &trace, &["d0", "local"], state).await;
    }
}
