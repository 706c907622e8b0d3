//! A thread has events beside those of its rings, and one of them may go on while the frontend starts a
//! ring: nothing is taken out of the ring before it is clear where it goes on.

use super::guest::{Guest, Memory};
use super::{Fifo, failure};
use crate::child::{Device, until};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::Path;

/// A device whose second ring is started, and which is in the middle of such an event until the result is
/// dropped.
fn in_the_middle(device: &Device) -> (Guest, OwnedFd) {
    let fifo = Fifo::of(device);
    let own = device.socket().with_extension("sock.own");
    let mut guest = Guest::connect(&device.socket(), Memory::new(2));
    guest.start_ring(1, 0);
    guest.settle(1);
    (guest, event(&own, &fifo))
}

fn event(own: &Path, fifo: &Fifo) -> OwnedFd {
    until("the device has events of its own", || own.exists());
    File::options().write(true).open(own).unwrap().write_all(&[0]).unwrap();
    fifo.request()
}

/// A ring of two requests is started in the middle of such an event, as if one of them had been taken
/// out of it by another process.
fn start_in_the_middle(device: &Device, base: u16) -> Guest {
    let (mut guest, event) = in_the_middle(device);
    guest.memory.push(0);
    guest.memory.push(0);
    guest.start_ring(0, base);
    drop(event);
    guest
}

#[test]
fn who_has_permits_gets_none_for_a_ring_that_was_not_looked_at() {
    let device = Device::welcomed("vhost later own queues:2 in-order");
    let mut guest = start_in_the_middle(&device, 1);
    guest.wait_used(0, 2);
    let numbers = [guest.memory.number(0, 0), guest.memory.number(0, 1)];
    assert_eq!(numbers, [0, 1], "each was served once, in order");
    guest.push(0);
    guest.wait_used(0, 3);
    assert_eq!(guest.stop_ring(0), 3);
    device.shut_down();
}

#[test]
fn a_ring_that_was_used_in_the_middle_of_an_event_goes_on() {
    let device = Device::welcomed("vhost own queues:2 in-order");
    let mut guest = start_in_the_middle(&device, 0);
    guest.wait_used(0, 2);
    guest.push(0);
    guest.wait_used(0, 3);
    assert_eq!(guest.stop_ring(0), 3);
    device.shut_down();
}

#[test]
fn a_ring_that_was_used_where_it_does_not_go_on_is_not_served_and_that_is_told() {
    let device = Device::welcomed("vhost own queues:2 in-order");
    let mut guest = start_in_the_middle(&device, 1);
    let text = failure(&device);
    assert!(text.contains("before that was seen"), "{text}");
    guest.push(0);
    guest.settle(0);
    assert_eq!(guest.memory.used(0), 1, "nothing is done again");
    // Once the frontend has stopped it, it can be started anew.
    guest.stop_ring(0);
    guest.start_ring(0, 1);
    // A driver would say that the second request is answered twice.
    until("all are done", || guest.memory.used(0) == 3);
    device.shut_down();
}

/// Between the last two messages that start a ring, the rings of a library are ready for whoever looks.
#[test]
fn a_ring_that_is_used_before_it_is_enabled_begins_where_it_goes_on() {
    let device = Device::welcomed("vhost own queues:2 in-order");
    let fifo = Fifo::of(&device);
    let own = device.socket().with_extension("sock.own");
    let mut guest = Guest::connect(&device.socket(), Memory::new(2));
    guest.start_ring(1, 0);
    guest.memory.push(0);
    guest.memory.push(0);
    guest.set_up_ring(0, 1);
    drop(event(&own, &fifo));
    guest.settle(1);
    guest.enable_ring(0);
    guest.wait_used(0, 2);
    let numbers = [guest.memory.number(0, 0), guest.memory.number(0, 1)];
    assert_eq!(numbers, [0, 1], "each was served once, in order");
    assert_eq!(guest.stop_ring(0), 2);
    device.shut_down();
}
