//! Engines that have too little of something while they work: what goes on, and what does not.

use crate::driver::Engine;
use crate::machine::{Guest, pid};
use standstill::coordinator::{Machine, Outcome};
use standstill::protocol::migration::MigrationState;
use standstill_testkit::plan::{Limit, Resource};

async fn pauses_and_resumes(guest: &Guest, machine: &Machine, what: &str) {
    for _ in 0..3 {
        guest.assert_writing(&[0, 1, 2]).await;
        let stopped = machine.pause().await.unwrap();
        assert_eq!(stopped.report().outcome, Outcome::Done, "{what}: {}", stopped.report());
        assert_eq!(stopped.report().participants.len(), 3, "{what}: {}", stopped.report());
        let sight = guest.sight();
        assert_eq!(guest.sight(), sight, "{what}");
        stopped.resume().await.unwrap();
    }
    guest.assert_writing(&[0, 1, 2]).await;
}

/// An engine at work needs nothing more to stop and to start: no file, no thread. Memory is not among it: when a
/// process that was just started asks for more is a matter of its allocator.
#[tokio::test]
async fn an_engine_that_gets_nothing_any_more_stops_and_starts_as_ever() {
    let limits = [
        (Resource::Files, 0),
        (Resource::Processes, 0),
        (Resource::FileSize, 0),
        (Resource::LockedMemory, 0),
    ];
    let mut guest = Guest::new("limits");
    let machine = guest.description.builder().start().await.unwrap();
    machine.declare_ram(&guest.ram).await.unwrap();
    guest.set_to_work();
    for (resource, value) in limits {
        let limit = Limit { resource, value };
        limit.impose(pid(&machine, 1).await).unwrap();
        pauses_and_resumes(&guest, &machine, &format!("{limit:?}")).await;
    }
    let status = machine.status().await.unwrap();
    assert!(status.devices.iter().all(|device| device.incarnation == 1), "{status:?}");
    machine.shutdown().await.unwrap();
}

/// What it is told together with fds it cannot take in: it is lost, and comes back as a new process.
#[tokio::test]
async fn an_engine_without_files_stops_and_starts_and_is_lost_when_ram_is_declared_to_it() {
    let guest = Guest::new("files");
    let machine = guest.description.builder().start().await.unwrap();
    // Fds come with its Welcome, which it may not have read yet. An answer says that it has.
    machine.pause().await.unwrap().resume().await.unwrap();
    Limit { resource: Resource::Files, value: 0 }.impose(pid(&machine, 1).await).unwrap();
    let stopped = machine.pause().await.unwrap();
    assert_eq!(stopped.report().outcome, Outcome::Done, "{}", stopped.report());
    stopped.resume().await.unwrap();
    let mut events = machine.events();
    let error = machine.declare_ram(&guest.ram).await.unwrap_err().to_string();
    assert!(error.contains("files-engine1"), "{error}");
    let lost = crate::restart::joined(&mut events, &guest.description.device(1)).await;
    assert_eq!(lost, (MigrationState::Running, 2));
    Engine::connect(&guest.description.socket(1));
    machine.shutdown().await.unwrap();
}
