//! Machines of real copy engines (`standstill device copy-engine`), wired to each other by vfio-user
//! clients as a VMM wires them, that lose their coordinator or a device, or have one that hangs.
//!
//! The coordinator that is lost is this test program again, in a process of its own.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a panic is how a test fails")]

mod client;
mod dirty;
mod disk;
#[path = "../qemu_block/driver.rs"]
mod disk_driver;
mod driver;
mod hang;
mod limits;
mod machine;
mod mixed;
mod restart;
mod take_over;
mod tracer;
mod wire;

/// Not a test: the coordinator that is lost. Without its variable it is empty.
#[test]
fn first_coordinator() {
    if let Ok(description) = std::env::var(machine::DESCRIPTION_VARIABLE) {
        machine::be_a_coordinator(&description);
    }
}
