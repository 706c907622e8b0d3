//! Pauses with a lease: what a machine is when it has run out, and what leads out of that.

use crate::fixture::{LONG, assert_all_in, assert_machine, builder, honest, report_of, start};
use standstill_coordinator::error::MachineError;
use standstill_coordinator::{Events, Machine, MachineEvent, OnFailure, Outcome, Stopped};
use standstill_protocol::message::{DeviceEvent, Phase};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{FailureKind, MachineState};
use standstill_testkit::{Gate, Script, Step, Trace, within};
use std::time::Duration;

/// A lease that runs out while a test waits for it.
const LEASE: Duration = Duration::from_millis(300);

/// Pauses with a lease. On a busy machine it may run out before all have stopped; then with a longer one.
async fn leased(machine: &Machine) -> Stopped {
    let mut lease = LEASE;
    loop {
        match within(LONG, "pause", machine.pause_leased(lease)).await {
            Ok(stopped) => return stopped,
            Err(MachineError::Transition(report)) => {
                assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
                lease *= 2;
            }
            Err(error) => panic!("{error}"),
        }
    }
}

/// Waits until the lease of that device has run out.
async fn expired(events: &mut Events, name: &str) {
    let expiry = DeviceEvent::LeaseExpired(MigrationState::RunningP2p);
    let seen = async {
        loop {
            match events.recv().await.unwrap() {
                MachineEvent::Device { device, event } if device == name && event == expiry => {
                    return;
                }
                _ => {}
            }
        }
    };
    within(LONG, "the end of a lease", seen).await;
}

/// Two devices whose leases have run out, and the guard of the pause.
async fn two_expired(trace: &Trace) -> (Machine, Stopped) {
    let machine = start(builder().devices(["d0", "d1"].map(|name| honest(name, trace)))).await;
    let stopped = leased(&machine).await;
    // Those of a pause that was undone are not told any more.
    let mut events = machine.events();
    for device in ["d0", "d1"] {
        let state = || async {
            let status = machine.status().await.unwrap();
            let device = status.devices.into_iter().find(|one| one.name == device).unwrap();
            device.state
        };
        if state().await == Some(MigrationState::Stop) {
            expired(&mut events, device).await;
        }
        assert_eq!(state().await, Some(MigrationState::RunningP2p));
    }
    (machine, stopped)
}

#[tokio::test]
async fn a_machine_whose_lease_has_run_out_says_so_and_is_resumed_by_its_guard() {
    let trace = Trace::new().unwrap();
    let (machine, stopped) = two_expired(&trace).await;
    let status = machine.status().await.unwrap();
    assert_eq!((status.machine, status.stands), (MachineState::LeaseExpired, false));
    assert!(!stopped.stands().await.unwrap());
    let report = within(LONG, "resume", stopped.resume()).await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    assert_machine(&machine, MachineState::Running).await;
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_pause_stops_again_what_has_left_stop() {
    let trace = Trace::new().unwrap();
    let (machine, expired) = two_expired(&trace).await;
    let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    expired.leave_stopped();
    assert!(stopped.stands().await.unwrap());
    assert_machine(&machine, MachineState::Stopped).await;
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Stop).await;
    stopped.resume().await.unwrap();
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_lease_that_is_ended_by_the_start_does_not_run_out() {
    let trace = Trace::new().unwrap();
    let machine = start(builder().devices(["d0", "d1"].map(|name| honest(name, &trace)))).await;
    for _ in 0..2 {
        let stopped = within(LONG, "pause", machine.pause_leased(LONG * 2)).await.unwrap();
        assert!(stopped.stands().await.unwrap());
        assert_machine(&machine, MachineState::Stopped).await;
        stopped.resume().await.unwrap();
    }
    assert_all_in(&machine, &trace, &["d0", "d1"], MigrationState::Running).await;
}

#[tokio::test]
async fn a_pause_that_takes_longer_than_its_first_lease_is_undone_and_nobody_is_lost() {
    for (policy, outcome, machine_is, device_is) in [
        (OnFailure::Rollback, Outcome::RolledBack, MachineState::Running, MigrationState::Running),
        (OnFailure::StayStopped, Outcome::Stopped, MachineState::Stopped, MigrationState::Stop),
    ] {
        let trace = Trace::new().unwrap();
        let gate = Gate::closed().unwrap();
        let slow = Script::honest().on_nth(Phase::Stop, 1, [Step::hold(&gate), Step::Ack]);
        let machine = start(
            builder()
                .on_failure(policy)
                .device(honest("d0", &trace))
                .device(slow.device("slow", &trace).unwrap()),
        )
        .await;
        let report = match within(LONG, "pause", machine.pause_leased(LEASE)).await {
            Ok(stopped) => {
                let report = stopped.report().clone();
                stopped.leave_stopped();
                report
            }
            Err(error) => report_of(&error).clone(),
        };
        assert_eq!(report.outcome, outcome, "{report}");
        assert_eq!(report.failures[0].kind, FailureKind::LeaseExpired, "{report}");
        let lines = report.failure_lines().join("\n");
        assert!(lines.starts_with("device \"d0\" has left STOP: its lease ran out"), "{lines}");
        assert_machine(&machine, machine_is).await;
        assert_all_in(&machine, &trace, &["d0", "slow"], device_is).await;
    }
}
