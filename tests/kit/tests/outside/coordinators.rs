//! Coordinators that are lost, that hang and that come back, at exactly one packet; whether they do
//! harm then.

use crate::fixture::honest;
use rustix::process::{Pid, kill_process};
use standstill_coordinator::{Outcome, TakenOver};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{HeldReason, MachineState};
use standstill_testkit::machine::LONG;
use standstill_testkit::outside::{Relay, RelayError};
use standstill_testkit::pilot::{SUPERSEDED, Signal};
use standstill_testkit::plan::{Moment, OutsideAction, Policy};
use standstill_testkit::{Course, CourseDevice, Pilot, Script, TestMachine, Trace, What, within};
use tempfile::TempDir;

const NAMES: [&str; 3] = ["d0", "d1", "d2"];

/// A machine of three devices that outlive their coordinator, `d1` behind a relay.
struct Kept {
    trace: Trace,
    relay: Relay,
    course: Course,
    _folder: TempDir,
}

impl Kept {
    fn new() -> Self {
        let (trace, relay) = (Trace::new().unwrap(), Relay::new().unwrap());
        let folder = tempfile::tempdir().unwrap();
        let device = |name: &&str| {
            let device = honest(name, &trace);
            let device = if *name == "d1" { relay.wrap(device).unwrap() } else { device };
            CourseDevice::from(&device)
        };
        let course = Course {
            directory: Some(folder.path().join("vm")),
            devices: Vec::new(),
            programs: NAMES.iter().map(device).collect(),
            phase: LONG,
            other: LONG,
            policy: Policy::Rollback,
        };
        Self { trace, relay, course, _folder: folder }
    }

    async fn take_over(&self) -> TakenOver {
        let builder = self.course.builder().unwrap();
        within(LONG, "take-over", builder.take_over()).await.unwrap()
    }

    /// What the devices said last is what the machine says of them.
    async fn assert_all_in(&self, taken: &TakenOver, state: MigrationState) {
        for device in taken.machine.status().await.unwrap().devices {
            let text = format!("{}: {}\n{}", device.name, taken.report, self.trace.text());
            assert_eq!(device.state, Some(state), "{text}");
            let last = self.trace.last_state(&device.name);
            assert_eq!(last.unwrap_or(MigrationState::Running), state, "{text}");
        }
    }

    /// The owner goes on with the machine, and ends it.
    async fn goes_on(self, TakenOver { machine, report }: TakenOver) {
        if report.machine == MachineState::Held {
            machine.accept_hold().await.unwrap();
            within(LONG, "resume", machine.resume()).await.unwrap();
        }
        let stopped = within(LONG, "pause", machine.pause()).await.unwrap();
        within(LONG, "resume", stopped.resume()).await.unwrap();
        within(LONG, "shutdown", machine.shutdown()).await.unwrap();
        let stale = |what| matches!(what, What::Stale { .. });
        let entries = self.trace.entries();
        assert!(!entries.iter().any(|entry| stale(entry.what)), "{}", self.trace.text());
    }
}

/// Whatever a test comes to, no device lives on.
impl Drop for Kept {
    fn drop(&mut self) {
        for entry in self.trace.entries() {
            let What::Began { pid } = entry.what else { continue };
            // It is the device still: its script has the path of the trace.
            let its = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let path = self.trace.path().to_string_lossy().into_owned();
            if String::from_utf8_lossy(&its).contains(&path) {
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
                // It may end by itself just now.
                let _ = pid.map(|pid| kill_process(pid, Signal::KILL));
            }
        }
    }
}

/// Brings a machine to that moment: of a pause, or of the resume after one.
async fn until(pilot: &mut Pilot, moment: Moment) {
    let (Moment::Command(phase) | Moment::Answer(phase)) = moment else { panic!("{moment:?}") };
    pilot.tell("pause");
    if matches!(phase, Phase::PrepareStart | Phase::Start) {
        pilot.hear("pause Done").await;
        pilot.tell("resume");
    }
}

#[tokio::test]
async fn a_coordinator_that_is_lost_at_any_packet_leaves_a_machine_that_runs_or_is_held() {
    use Moment::{Answer, Command};
    let (running, held) = (MachineState::Running, MachineState::Held);
    let cases = [
        (Command(Phase::PrepareStop), running),
        (Answer(Phase::PrepareStop), running),
        // It is delivered, and carried out.
        (Command(Phase::Stop), held),
        (Answer(Phase::Stop), held),
        // Those of the others may be on their way still; this one has not moved.
        (Answer(Phase::Start), running),
    ];
    for (moment, expected) in cases {
        let kept = Kept::new();
        kept.relay.arm(moment, 1, OutsideAction::KillCoordinator).unwrap();
        let mut pilot = Pilot::start(&kept.course).await.unwrap();
        until(&mut pilot, moment).await;
        let status = pilot.ended().await;
        assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9), "{moment:?}");
        assert_eq!(kept.relay.fired().unwrap().len(), 1, "{moment:?}");
        let taken = kept.take_over().await;
        let text = format!("{moment:?}: {}\n{}", taken.report, kept.trace.text());
        assert_eq!(taken.report.machine, expected, "{text}");
        match &taken.report.outcome {
            Outcome::Held { reasons, fenced } => {
                assert_eq!(
                    (reasons.as_slice(), fenced.len()),
                    (&[HeldReason::TakenOverStopped][..], 0)
                );
                kept.assert_all_in(&taken, MigrationState::Stop).await;
            }
            Outcome::Done | Outcome::RolledBack => {
                kept.assert_all_in(&taken, MigrationState::Running).await;
            }
            _ => panic!("{text}"),
        }
        kept.goes_on(taken).await;
    }
}

#[tokio::test]
async fn a_coordinator_that_comes_back_after_a_take_over_learns_of_it_and_does_no_harm() {
    for moment in [Moment::Answer(Phase::PrepareStop), Moment::Answer(Phase::Start)] {
        let kept = Kept::new();
        kept.relay.arm(moment, 1, OutsideAction::StopCoordinatorMs(0)).unwrap();
        let mut pilot = Pilot::start(&kept.course).await.unwrap();
        until(&mut pilot, moment).await;
        kept.relay.until_fired(0).await;
        let taken = kept.take_over().await;
        assert_eq!(taken.report.machine, MachineState::Running, "{}", taken.report);
        pilot.signal(Signal::CONT);
        assert_eq!(pilot.hear("superseded").await, "superseded 2");
        assert_eq!(pilot.ended().await.code(), Some(i32::from(SUPERSEDED)));
        kept.assert_all_in(&taken, MigrationState::Running).await;
        kept.goes_on(taken).await;
    }
}

#[tokio::test]
async fn a_coordinator_that_hangs_for_a_while_goes_on_as_if_nothing_had_been() {
    let kept = Kept::new();
    let stop = Moment::Command(Phase::Stop);
    kept.relay.arm(stop, 1, OutsideAction::StopCoordinatorMs(200)).unwrap();
    let mut pilot = Pilot::start(&kept.course).await.unwrap();
    pilot.tell("pause");
    pilot.hear("pause Done").await;
    assert_eq!(kept.relay.fired().unwrap().len(), 1);
    pilot.tell("resume");
    pilot.hear("resume Done").await;
    pilot.tell("shutdown");
    assert!(pilot.ended().await.success());
}

#[tokio::test]
async fn a_coordinator_that_hangs_goes_on_also_if_the_device_has_ended_meanwhile() {
    let kept = Kept::new();
    let stop = Moment::Command(Phase::Stop);
    kept.relay.arm(stop, 1, OutsideAction::StopCoordinatorMs(500)).unwrap();
    kept.relay.arm(stop, 1, OutsideAction::Kill).unwrap();
    let mut pilot = Pilot::start(&kept.course).await.unwrap();
    pilot.tell("pause");
    pilot.hear("pause").await;
    assert_eq!(kept.relay.fired().unwrap().len(), 2);
    pilot.tell("shutdown");
    assert!(pilot.ended().await.success());
}

#[tokio::test]
async fn a_test_that_is_the_coordinator_itself_is_not_killed_by_its_own_relay() {
    let machine = TestMachine::builder()
        .unwrap()
        .scripted("d0", Script::honest())
        .relay("d0")
        .start()
        .await
        .unwrap();
    let prepare = Moment::Command(Phase::PrepareStop);
    let refused = machine.relay("d0").arm(prepare, 1, OutsideAction::KillCoordinator);
    assert!(matches!(refused, Err(RelayError::Oneself { .. })), "{refused:?}");
    machine.pause().await.unwrap().resume().await.unwrap();
    machine.end().await;

    // It learns so only when it has started.
    let (trace, relay) = (Trace::new().unwrap(), Relay::new().unwrap());
    relay.arm(prepare, 1, OutsideAction::KillCoordinator).unwrap();
    let machine = TestMachine::builder().unwrap();
    let spec = relay.wrap(honest("d0", &trace)).unwrap();
    let machine = machine.describe(|builder| builder.device(spec)).start().await.unwrap();
    let error = machine.pause().await.unwrap_err();
    assert!(error.to_string().contains("d0"), "{error}");
    machine.end().await;
}
