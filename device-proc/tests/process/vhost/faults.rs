//! Faults that are injected into such a device: what the kit can do with any device, it can do with it.

use super::guest::Guest;
use crate::child::{Device, wait};
use crate::faults::arm;
use standstill_protocol::fault::{Action, Fault, Point};
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState as S;
use std::os::unix::process::ExitStatusExt;

/// What an oracle has to notice: a device that says that it is stopped, and is not.
#[test]
fn a_device_that_keeps_its_dma_serves_rings_while_it_is_stopped() {
    for script in ["vhost", "vhost later"] {
        let device = Device::welcomed(script);
        let mut guest = Guest::start(&device.socket(), 1);
        let fault = Fault::new(Point::BeforeAck(Phase::Stop), Action::KeepDma);
        let mut journal = arm(&device, &[fault]);
        device.pause(1);
        journal.fired(0, 1);
        guest.push(0);
        guest.wait_used(0, 1);
        // The event in which it was served is over: nobody waits for that one.
        guest.settle(0);
        device.resume(2);
        device.pause(3);
        guest.push(0);
        guest.settle(0);
        assert_eq!(guest.memory.used(0), 1, "{script}: once, until it is started");
    }
}

#[test]
fn a_device_dies_at_a_pop_and_in_its_configuration_space() {
    for (point, pushes) in [(Point::Dma, true), (Point::DmaInFlight, true), (Point::Mmio, false)] {
        let mut device = Device::welcomed("vhost");
        let mut guest = Guest::start(&device.socket(), 1);
        guest.settle(0);
        let mut journal = arm(&device, &[Fault::new(point, Action::Abort)]);
        if pushes {
            guest.push(0);
        } else {
            guest.set_config(0, b"x").unwrap_err();
        }
        journal.fired(0, 1);
        assert_eq!(wait(&mut device.process).signal(), Some(6), "{point:?}");
        assert_eq!(guest.memory.used(0), 0);
    }
}

#[test]
fn a_stop_waits_for_a_request_that_hangs() {
    let device = Device::welcomed("vhost later");
    let mut guest = Guest::start(&device.socket(), 1);
    guest.settle(0);
    let fault = Fault::new(Point::DmaInFlight, Action::DelayMs(300));
    let mut journal = arm(&device, &[fault]);
    guest.push(0);
    journal.fired(0, 1);
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    assert_eq!(guest.memory.used(0), 1);
}
