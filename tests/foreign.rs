//! Device programs that the test kit knows nothing of, driven by their author's own client: one that goes
//! on with its DMA after it has said that it stands is found in guest RAM.

#![cfg(feature = "fault-injection")]

use standstill::coordinator::DeviceSpec;
use standstill::device_proc::devices::copy_engine::registers::*;
use standstill::device_proc::devices::copy_engine::{Descriptor, FLAG_STAMP};
use standstill::protocol::fault::{Action, Fault, Point};
use standstill::protocol::message::Phase;
use standstill_testkit::plan::Plan;
use standstill_testkit::sweep::{
    DevicePrograms, Driven, Expected, Judge, RigError, Sweep, Times, Violation,
};
use std::os::unix::fs::FileExt;
use std::time::Duration;

/// The part of guest RAM that is one device's: its ring, and where it writes.
const SHARE: u64 = 8192;
const PAGE: u64 = 4096;

fn programs() -> DevicePrograms {
    let describe = |number: u16, socket: &std::path::Path| {
        DeviceSpec::new(format!("engine{number}"), env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "copy-engine", "--memory=16384", "--rest=1ms", "--socket"])
            .arg(socket)
    };
    DevicePrograms::new(describe).register(REGISTER_BAR, ID).traffic(at_work)
}

/// Sets an engine to work that is not: it writes a number to guest RAM that grows.
fn at_work(Driven { device, client, ram }: Driven<'_>) -> Result<(), RigError> {
    let mut status = [0; 4];
    client.region_read(REGISTER_BAR, STATUS, &mut status)?;
    if u32::from_le_bytes(status) == STATUS_BUSY {
        return Ok(());
    }
    let ring = u64::from(device) * SHARE;
    let descriptor = Descriptor {
        source: ring,
        destination: ring + PAGE,
        len: 64,
        flags: FLAG_STAMP,
        ..Descriptor::default()
    };
    ram.write_all_at(&descriptor.to_bytes(), ring)?;
    client.region_write(REGISTER_BAR, RING_BASE, &ring.to_le_bytes())?;
    client.region_write(REGISTER_BAR, RING_ENTRIES, &1_u32.to_le_bytes())?;
    let run = CONTROL_RUN | CONTROL_LOOP;
    Ok(client.region_write(REGISTER_BAR, CONTROL, &run.to_le_bytes())?)
}

#[tokio::test]
async fn a_foreign_device_that_goes_on_with_its_dma_is_found_in_guest_ram() {
    // Whoever lies is told like anybody who writes late.
    let expected = Expected::ours().unwrap();
    let judge = Judge { expected, times: Times::default(), knows_liars: false };
    let lie = |point| Plan::new(3).fault(1, Fault::new(point, Action::KeepDma));
    let liars = [lie(Point::BeforeAck(Phase::PrepareStop)), lie(Point::AfterAck(Phase::Stop))];
    let honest = Plan::new(3).rounds(2);
    let plans = liars.iter().chain([&honest]).cloned();
    // Long enough on CPUs that have much to do.
    let sweep = Sweep::new(plans).unwrap().judge(judge).shrinking(Duration::from_secs(3600));
    let tally = sweep.run(programs()).await;
    assert_eq!(tally.plans, 3);
    for plan in &liars {
        let failed = tally.failures().iter().find(|failed| failed.plan == *plan).unwrap();
        let in_ram = |violation: &Violation| matches!(violation, Violation::Late { what, .. } if what.contains("guest RAM"));
        assert!(failed.violations.iter().any(in_ram), "{plan:?}: {:?}", failed.violations);
        // One of the three does nothing for it.
        let smallest = failed.smallest.as_ref().unwrap();
        assert_eq!((smallest.devices, smallest.faults.len()), (2, 1), "{smallest:?}");
    }
    assert!(tally.failures().iter().all(|failed| failed.plan != honest), "{tally}");
}
