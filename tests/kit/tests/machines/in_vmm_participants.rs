//! Hooks and local devices that hang: nobody can fence them, so the machine is held; what can be
//! done without them is done meanwhile, and nothing starts until they have answered.

use crate::fixture::{
    LONG, PHASES, SHORT, assert_all_in, assert_machine, assert_usable, builder, deadlines, fenced,
    honest, remove_lost, report_of, start, until,
};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use standstill_coordinator::{
    HookSpec, Machine, MachineError, MachineEvent, Outcome, Slot, Stopped,
};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HeldReason, MachineState};
use standstill_testkit::{
    Call, Entry, Gate, Script, Step, Trace, TracedHook, TracedLocal, What, within,
};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

const SLOTS: [Slot; 3] = [Slot::Before, Slot::Between, Slot::After];

/// The process that a hook kills, once it is known.
type Victim = Arc<OnceLock<Pid>>;

async fn choose(victim: &Victim, machine: &Machine, name: &str) {
    let status = machine.status().await.unwrap();
    let device = status.devices.iter().find(|device| device.name == name).unwrap();
    let pid = Pid::from_raw(i32::try_from(device.pid.unwrap()).unwrap()).unwrap();
    victim.set(pid).unwrap();
}

/// A hook that hangs the first time that it is called for this, until the gate is open; a device
/// dies as soon as it does.
fn hangs(name: &str, trace: &Trace, gate: &Gate, hung: Call, victim: &Victim) -> TracedHook {
    let (key, victim, mut again) = (gate.key(), Arc::clone(victim), false);
    TracedHook::new(name, trace).unwrap().doing(move |call| {
        if call == hung && !std::mem::replace(&mut again, true) {
            let pid = victim.get().ok_or("nobody to kill")?;
            kill_process(*pid, Signal::KILL)?;
            key.wait()?;
        }
        Ok(())
    })
}

/// What the hook was called for and returned from.
fn calls(trace: &Trace, who: &str) -> Vec<What> {
    let is = |what: &What| matches!(what, What::Called(_) | What::Returned(_));
    let entries = trace.entries().into_iter();
    entries.filter(|e| e.who == who && is(&e.what)).map(|entry| entry.what).collect()
}

/// Checks that the machine is held and will neither start nor, while a hook hangs, stop.
async fn assert_refused(machine: &Machine, case: &str) {
    let held = |error: MachineError| match error {
        MachineError::State { machine, under_way, .. } => {
            assert_eq!((machine, under_way), (MachineState::Held, None), "{case}");
        }
        other => panic!("{case}: {other}"),
    };
    assert_machine(machine, MachineState::Held).await;
    held(within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err());
    held(within(Duration::ZERO, "pause", machine.pause()).await.unwrap_err());
}

async fn becomes_stopped(machine: &Machine) {
    let stopped = async {
        while machine.status().await.unwrap().machine == MachineState::Held {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    within(LONG, "the end of the hold", stopped).await;
    assert_machine(machine, MachineState::Stopped).await;
}

/// A pause as soon as it is possible: who has hung can be called again once it has returned.
async fn pause_when_possible(machine: &Machine) -> Stopped {
    let pause = async {
        loop {
            match machine.pause().await {
                Ok(stopped) => return stopped,
                Err(MachineError::State { .. }) => {
                    assert_machine(machine, MachineState::Held).await;
                    machine.resume().await.unwrap_err();
                }
                Err(other) => panic!("{other}"),
            }
        }
    };
    within(LONG, "a pause", pause).await
}

/// Does what the hook is called for; for a start, with a pause before.
async fn transition(machine: &Machine, call: Call) -> MachineError {
    let phase = if call == Call::Stop { Phase::Stop } else { Phase::Start };
    until(machine, phase).await.unwrap_err()
}

/// Checks that the transition was held by the hook alone, and that `d1` was fenced all the same.
fn assert_held_by_hook(error: &MachineError, case: &str) {
    let report = report_of(error);
    match &report.outcome {
        Outcome::Held { reasons, .. } => {
            assert!(matches!(reasons[..], [HeldReason::HookHung(_)]), "{case}: {report}");
        }
        _ => panic!("{case}: {report}"),
    }
    assert_eq!(fenced(report), ["d1"], "{case}: {report}");
    assert!(error.to_string().contains("hook \"vcpus\""), "{case}: {error}");
}

async fn a_device_dies_while_a_hook_hangs(call: Call, slot: Slot) {
    let case = format!("{call:?} {slot:?}");
    let trace = Trace::new().unwrap();
    let (gate, victim) = (Gate::closed().unwrap(), Victim::default());
    let hook = hangs("vcpus", &trace, &gate, call, &victim);
    let machine = start(
        builder()
            .devices(["d0", "d1", "d2"].map(|name| honest(name, &trace)))
            .hook(HookSpec::new("vcpus", slot).start_slot(slot).deadline(SHORT), hook),
    )
    .await;
    choose(&victim, &machine, "d1").await;
    let mut events = machine.events();
    let error = transition(&machine, call).await;
    assert_held_by_hook(&error, &case);

    // The fence was proven before the transition ended, and the hook hangs still.
    let mut proven = false;
    loop {
        match within(LONG, "the end", events.recv()).await.unwrap() {
            MachineEvent::DeviceFenced { device, .. } => {
                assert_eq!(device, "d1", "{case}");
                proven = true;
            }
            MachineEvent::Transition(report) => match report.outcome {
                // The pause before.
                Outcome::Done => assert_eq!(call, Call::Start, "{case}"),
                _ => break assert!(proven, "{case}: {report}"),
            },
            MachineEvent::DeviceLost { device, .. } | MachineEvent::DeviceExited { device, .. } => {
                assert_eq!(device, "d1", "{case}");
            }
            MachineEvent::TransitionBegan { .. } => {}
            other => panic!("{case}: {other:?}"),
        }
    }
    assert_eq!(calls(&trace, "vcpus").last(), Some(&What::Called(call)), "{case}");
    assert_all_in(&machine, &trace, &["d0", "d2"], MigrationState::Stop).await;
    assert_refused(&machine, &case).await;

    gate.open();
    if call == Call::Stop {
        // It has left things stopped: that was all that had to be proven.
        becomes_stopped(&machine).await;
    } else {
        // What it stands for runs now; it must be stopped before anything can start.
        pause_when_possible(&machine).await.leave_stopped();
        let stopped = [What::Called(Call::Stop), What::Returned(Call::Stop)];
        assert_eq!(calls(&trace, "vcpus")[4..], stopped, "{case}:\n{}", trace.text());
    }
    assert_all_in(&machine, &trace, &["d0", "d2"], MigrationState::Stop).await;
    remove_lost(&machine).await;
    within(LONG, "resume", machine.resume()).await.unwrap();
    let started = [What::Called(Call::Start), What::Returned(Call::Start)];
    assert!(calls(&trace, "vcpus").ends_with(&started), "{case}:\n{}", trace.text());
    assert_all_in(&machine, &trace, &["d0", "d2"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_fence_goes_on_while_a_hook_hangs_in_a_stop() {
    for slot in SLOTS {
        a_device_dies_while_a_hook_hangs(Call::Stop, slot).await;
    }
}

#[tokio::test]
async fn a_fence_goes_on_while_a_hook_hangs_in_a_start() {
    for slot in SLOTS {
        a_device_dies_while_a_hook_hangs(Call::Start, slot).await;
    }
}

#[tokio::test]
async fn a_machine_that_is_held_for_two_reasons_needs_both_proofs() {
    for fence_first in [true, false] {
        let trace = Trace::new().unwrap();
        let (gate, victim) = (Gate::closed().unwrap(), Victim::default());
        let hook = hangs("vcpus", &trace, &gate, Call::Stop, &victim);
        let file = tempfile::NamedTempFile::new().unwrap();
        let lock = file.reopen().unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let script = Script::honest().backing_file(file.path());
        let mut short = deadlines();
        short.fence = SHORT;
        let machine = start(
            builder()
                .deadlines(short)
                .device(honest("d0", &trace))
                .device(script.device("d1", &trace).unwrap())
                .hook(HookSpec::new("vcpus", Slot::Before).deadline(SHORT), hook),
        )
        .await;
        choose(&victim, &machine, "d1").await;
        let mut events = machine.events();
        let error = within(SHORT * 2, "pause", machine.pause()).await.unwrap_err();
        let report = report_of(&error);
        let Outcome::Held { reasons, .. } = &report.outcome else { panic!("{report}") };
        let hook = reasons.iter().any(|reason| matches!(reason, HeldReason::HookHung(_)));
        let fence = reasons.iter().any(|reason| matches!(reason, HeldReason::FenceUnproven(_)));
        assert_eq!((hook, fence, reasons.len()), (true, true, 2), "{report}");
        assert_refused(&machine, "both").await;

        if fence_first {
            drop(lock);
            loop {
                let event = within(LONG, "the proof", events.recv()).await.unwrap();
                if matches!(event, MachineEvent::DeviceFenced { .. }) {
                    break;
                }
            }
            assert_refused(&machine, "the hook hangs still").await;
            gate.open();
        } else {
            gate.open();
            let returned = |_: &[_]| calls(&trace, "vcpus").len() == 2;
            trace.wait_for("the hook to return", returned).await;
            assert_machine(&machine, MachineState::Held).await;
            within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err();
            drop(lock);
        }
        becomes_stopped(&machine).await;
        assert_usable(&machine).await;
    }
}

/// Nobody knows what it left behind: things may run or not.
#[tokio::test]
async fn a_hook_that_fails_in_an_undo_holds_the_machine_until_a_pause_succeeds() {
    for slot in [Slot::Before, Slot::Between] {
        let trace = Trace::new().unwrap();
        let mut failed = false;
        let hook = TracedHook::new("vcpus", &trace).unwrap().doing(move |call| {
            match call == Call::Start && !std::mem::replace(&mut failed, true) {
                true => Err("the vCPUs would not start".into()),
                false => Ok(()),
            }
        });
        let refuses = Script::honest().on_nth(Phase::Stop, 1, [Step::Refuse("not now".into())]);
        let machine = start(
            builder()
                .device(honest("d0", &trace))
                .device(refuses.device("d1", &trace).unwrap())
                .hook(HookSpec::new("vcpus", slot), hook),
        )
        .await;
        let error = within(LONG, "pause", machine.pause()).await.unwrap_err();
        let report = report_of(&error);
        let Outcome::Held { reasons, fenced } = &report.outcome else { panic!("{report}") };
        assert!(matches!(reasons[..], [HeldReason::HookFailed(_)]), "{slot:?}: {report}");
        assert!(fenced.is_empty(), "{slot:?}: {report}");
        let text = error.to_string();
        assert!(text.contains("the vCPUs would not start") && text.contains("not now"), "{text}");
        assert_machine(&machine, MachineState::Held).await;
        assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
        within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err();
        within(LONG, "pause", machine.pause()).await.unwrap().leave_stopped();
        assert_machine(&machine, MachineState::Stopped).await;
        assert_usable(&machine).await;
    }
}

/// One that answers after the hold proves as much as its state does.
#[tokio::test]
async fn a_local_device_that_answers_late_ends_the_hold_only_if_it_has_stopped() {
    for hung in PHASES {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        let (key, mut again) = (gate.key(), false);
        let local = TracedLocal::new("local", &trace).unwrap().doing(move |phase| {
            if phase == hung && !std::mem::replace(&mut again, true) {
                Ok(key.wait()?)
            } else {
                Ok(())
            }
        });
        let mut short = deadlines();
        // The deadlines of local devices are the machine's.
        (short.first_phase, short.second_phase) = (SHORT, SHORT);
        // A device dies at the same time: its fence goes on.
        let dies = Script::honest().on(hung, [Step::Exit(1)]).device("d1", &trace).unwrap();
        let machine = start(
            builder()
                .deadlines(short)
                .device(honest("d0", &trace).deadlines(LONG, LONG))
                .device(dies.deadlines(LONG, LONG))
                .local_device("local", local),
        )
        .await;
        let error = until(&machine, hung).await.unwrap_err();
        let report = report_of(&error);
        let Outcome::Held { reasons, .. } = &report.outcome else { panic!("{hung}: {report}") };
        assert!(matches!(reasons[..], [HeldReason::LocalHung(_)]), "{hung}: {report}");
        assert_eq!(fenced(report), ["d1"], "{hung}: {report}");
        assert!(error.to_string().contains("\"local\""), "{hung}: {error}");
        assert_machine(&machine, MachineState::Held).await;
        assert_all_in(&machine, &trace, &["d0"], MigrationState::Stop).await;
        within(Duration::ZERO, "resume", machine.resume()).await.unwrap_err();

        gate.open();
        let answered = |_: &[_]| trace.reached(hung).iter().any(|entry| entry.who == "local");
        trace.wait_for("its late answer", answered).await;
        if hung == Phase::Stop {
            becomes_stopped(&machine).await;
        } else {
            // The undo of a PrepareStop would start it; that was void when the hold began.
            pause_when_possible(&machine).await.leave_stopped();
            assert_machine(&machine, MachineState::Stopped).await;
        }
        let late = trace.reached(hung).iter().find(|e| e.who == "local").map(|e| e.at_ns);
        let starts = |entry: &&Entry| {
            let is = matches!(entry.what, What::Received { phase, .. }
                if matches!(phase, Phase::PrepareStart | Phase::Start));
            is && entry.who == "local" && Some(entry.at_ns) > late
        };
        let started = trace.entries().iter().find(starts).cloned();
        assert_eq!(started, None, "{hung}:\n{}", trace.text());
        assert_all_in(&machine, &trace, &["d0", "local"], MigrationState::Stop).await;
        assert_usable(&machine).await;
        assert_all_in(&machine, &trace, &["d0", "local"], MigrationState::Running).await;
    }
}

/// Its thread is gone: no answer will ever come, so only the owner can end the hold.
#[tokio::test]
async fn a_hook_that_panics_is_one_that_hangs() {
    let trace = Trace::new().unwrap();
    let hook = TracedHook::new("vcpus", &trace).unwrap().doing(|_| panic!("a bug in the VMM"));
    let machine = start(
        builder()
            .device(honest("d0", &trace))
            .hook(HookSpec::new("vcpus", Slot::Between).deadline(SHORT), hook),
    )
    .await;
    let error = within(SHORT, "pause", machine.pause()).await.unwrap_err();
    let report = report_of(&error);
    let Outcome::Held { reasons, .. } = &report.outcome else { panic!("{report}") };
    assert!(matches!(reasons[..], [HeldReason::HookHung(_)]), "{report}");
    assert_all_in(&machine, &trace, &["d0"], MigrationState::Stop).await;
    assert_refused(&machine, "panicked").await;
    machine.accept_hold().await.unwrap();
    assert_machine(&machine, MachineState::Stopped).await;
    assert_usable(&machine).await;
    assert_eq!(calls(&trace, "vcpus"), [What::Called(Call::Stop)], "it is asked no more");
}
