//! A coordinator is killed while its engines run, half way through a pause, and after one; another
//! one takes them over.

use crate::driver::Engine;
use crate::machine::{ENGINES, Guest, LONG, Processes};
use standstill::coordinator::{Machine, MachineError, Outcome, TakenOver};
use standstill::protocol::message::{CoordinatorMessage, DeviceEvent, DeviceMessage, OrphanPolicy};
use standstill::protocol::message::{Term, Welcome};
use standstill::protocol::migration::MigrationState::{self as S, Running, RunningP2p, Stop};
use standstill::protocol::transition::{HeldReason, MachineState};
use standstill_testkit::log;

/// How long a device that is slow takes: time enough to find it half way on a busy machine.
const SLOW: u64 = 6000;

async fn take_over(guest: &Guest) -> TakenOver {
    let builder = guest.description.builder().keep(guest.description.directory());
    tokio::time::timeout(4 * LONG, builder.take_over()).await.unwrap().unwrap()
}

/// All engines count and are there, as the machine and as they themselves say.
async fn assert_all_in(guest: &Guest, machine: &Machine, state: S) {
    let status = machine.status().await.unwrap();
    let states: Vec<_> = status.devices.iter().map(|device| device.state).collect();
    assert_eq!(states, [Some(state); ENGINES]);
    assert_eq!(guest.states(), [state; ENGINES]);
}

/// The lines of each engine come to the coordinator that has it now.
async fn assert_logs_arrive(guest: &Guest) {
    for number in 0..ENGINES {
        let device = guest.description.device(number);
        log::wait_for(&[&device, "taken over by another coordinator"]).await;
        // One that comes too late: refused, and a reason for another line.
        let (hello, channel) = guest.hello(number);
        assert_eq!(hello.term, Term(2));
        let late = Welcome {
            version: 1,
            machine: hello.machine.unwrap(),
            name: device.clone(),
            incarnation: 1,
            term: Term(2),
            epoch: hello.epoch,
            heartbeat_ns: 0,
            orphan: OrphanPolicy::Keep,
            listener: false,
            log: false,
        };
        channel.send(&CoordinatorMessage::Welcome(late), &[], LONG).unwrap();
        channel.set_version(1);
        let answer = channel.recv(LONG).unwrap().message;
        let superseded = DeviceMessage::Event(DeviceEvent::Superseded(Term(2)));
        assert_eq!(answer, superseded);
        log::wait_for(&[&device, "a take-over without a higher term"]).await;
    }
}

/// The owner accepts a hold, resumes, pauses and resumes; then the machine is ended.
async fn owner_goes_on(mut guest: Guest, machine: Machine, processes: Processes) {
    if machine.status().await.unwrap().machine == MachineState::Held {
        let before = guest.sight();
        let refused = machine.resume().await.unwrap_err();
        assert!(matches!(refused, MachineError::State { .. }), "{refused}");
        machine.accept_hold().await.unwrap();
        assert_eq!(guest.sight(), before, "nothing moves before the owner resumes");
        let report = machine.resume().await.unwrap();
        assert_eq!(report.outcome, Outcome::Done, "{report}");
    }
    assert_all_in(&guest, &machine, Running).await;
    guest.assert_writing(&[0, 1, 2]).await;
    let stopped = machine.pause().await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    // What each of them has hashed before its answer is what is there.
    let sight = guest.sight();
    for (participant, &seen) in stopped.report().participants.iter().zip(&sight) {
        let evidence = participant.commands.last().unwrap().evidence().unwrap();
        assert_eq!(evidence.memory_hash, Some(seen), "{}", participant.name);
    }
    assert_all_in(&guest, &machine, Stop).await;
    assert_eq!(guest.sight(), sight);
    let report = stopped.resume().await.unwrap();
    assert_eq!(report.outcome, Outcome::Done, "{report}");
    guest.assert_writing(&[0, 1, 2]).await;
    assert_logs_arrive(&guest).await;
    // Their clients never had to connect again.
    guest.engines.iter_mut().for_each(Engine::assert_serves);
    assert!(processes.all_live());
    let ended = machine.shutdown().await.unwrap();
    assert_eq!(ended.len(), ENGINES, "{ended:?}");
    processes.assert_all_end();
    guest.assert_directory_empty();
}

fn held() -> Outcome {
    Outcome::Held { reasons: vec![HeldReason::TakenOverStopped], fenced: vec![] }
}

#[tokio::test]
async fn engines_whose_coordinator_is_killed_while_they_run_run_on() {
    log::keep();
    let mut guest = Guest::new("run");
    let coordinator = guest.coordinator();
    let processes = guest.processes();
    guest.set_to_work();
    guest.assert_writing(&[0, 1, 2]).await;
    coordinator.kill();
    guest.engines.iter_mut().for_each(Engine::assert_serves);
    guest.assert_writing(&[0, 1, 2]).await;
    assert_eq!(guest.states(), [Running; ENGINES]);

    let TakenOver { machine, report } = take_over(&guest).await;
    assert_eq!((&report.outcome, report.machine), (&Outcome::Done, MachineState::Running));
    let commands = report.participants.iter().flat_map(|participant| &participant.commands);
    assert_eq!(commands.count(), 0, "nobody is moved: {report}");
    guest.assert_writing(&[0, 1, 2]).await;
    owner_goes_on(guest, machine, processes).await;
}

#[tokio::test]
async fn engines_whose_coordinator_is_killed_in_the_first_phase_go_back_to_running() {
    log::keep();
    let mut guest = Guest::new("prepare");
    guest.description.slow_prepare = SLOW;
    let mut coordinator = guest.coordinator();
    let processes = guest.processes();
    guest.set_to_work();
    guest.assert_writing(&[0, 1, 2]).await;
    coordinator.tell("pause");
    // The second one is on its way.
    guest.until_in([RunningP2p, Running, RunningP2p]).await;
    coordinator.kill();

    // Each stays where it is: two are quiet and still answer, one writes to them.
    let quiet = || [(0, 1), (0, 2), (2, 0), (2, 1)].map(|(w, r)| guest.written(w, r));
    let before = quiet();
    guest.assert_writing(&[1]).await;
    assert_eq!(guest.states(), [RunningP2p, Running, RunningP2p]);
    assert_eq!(quiet(), before);
    guest.engines.iter_mut().for_each(Engine::assert_serves);
    guest.engines[0].read(standstill::device_proc::devices::copy_engine::registers::ID);

    let TakenOver { machine, report } = take_over(&guest).await;
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    assert_eq!(report.machine, MachineState::Running);
    owner_goes_on(guest, machine, processes).await;
}

/// Its pause is half way when it is stopped, and another coordinator's when it goes on.
#[tokio::test]
async fn a_coordinator_that_sleeps_and_wakes_up_moves_no_engine_any_more() {
    log::keep();
    let mut guest = Guest::new("sleep");
    guest.description.slow_prepare = SLOW;
    let mut coordinator = guest.coordinator();
    let processes = guest.processes();
    guest.set_to_work();
    guest.assert_writing(&[0, 1, 2]).await;
    coordinator.tell("pause");
    guest.until_in([RunningP2p, Running, RunningP2p]).await;
    coordinator.freeze();

    let TakenOver { machine, report } = take_over(&guest).await;
    assert_eq!(report.outcome, Outcome::RolledBack, "{report}");
    coordinator.wake();
    coordinator.hear("the machine is not mine: Held { reasons: [Superseded], fenced: [] }");
    assert!(processes.all_live());
    assert_all_in(&guest, &machine, Running).await;
    guest.assert_writing(&[0, 1, 2]).await;
    coordinator.kill();
    owner_goes_on(guest, machine, processes).await;
}

#[tokio::test]
async fn engines_whose_coordinator_is_killed_in_the_second_phase_are_held_in_stop() {
    log::keep();
    let mut guest = Guest::new("stop");
    guest.description.slow_stop = SLOW;
    let mut coordinator = guest.coordinator();
    let processes = guest.processes();
    guest.set_to_work();
    guest.assert_writing(&[0, 1, 2]).await;
    coordinator.tell("pause");
    guest.until_in([Stop, RunningP2p, Stop]).await;
    coordinator.kill();

    let before = guest.sight();
    guest.engines.iter_mut().for_each(Engine::assert_serves);
    assert_eq!(guest.states(), [Stop, RunningP2p, Stop], "half way, and it stays there");
    let TakenOver { machine, report } = take_over(&guest).await;
    assert_eq!((&report.outcome, report.machine), (&held(), MachineState::Held), "{report}");
    assert_all_in(&guest, &machine, Stop).await;
    assert_eq!(guest.sight(), before, "all were quiet before");
    owner_goes_on(guest, machine, processes).await;
}

#[tokio::test]
async fn engines_whose_coordinator_is_killed_after_a_pause_stay_in_stop() {
    log::keep();
    let mut guest = Guest::new("stopped");
    let mut coordinator = guest.coordinator();
    let processes = guest.processes();
    guest.set_to_work();
    guest.assert_writing(&[0, 1, 2]).await;
    coordinator.tell("pause");
    coordinator.hear("the machine stands");
    let before = guest.sight();
    coordinator.kill();
    guest.engines.iter_mut().for_each(Engine::assert_serves);
    assert_eq!(guest.states(), [Stop; ENGINES]);

    let TakenOver { machine, report } = take_over(&guest).await;
    assert_eq!((&report.outcome, report.machine), (&held(), MachineState::Held), "{report}");
    assert_all_in(&guest, &machine, Stop).await;
    assert_eq!(guest.sight(), before);
    owner_goes_on(guest, machine, processes).await;
}
