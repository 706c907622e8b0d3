//! A guest that drives copy engines, and what is seen of that from outside.

use crate::driver::{self, Role};
use crate::machine::{LONG, name};
use standstill_testkit::qemu::{Guest, GuestBuilder};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

/// A guest that drives the engines whose sockets are in that folder.
pub(crate) fn driven<'a>(
    mut guest: GuestBuilder<'a>,
    engines: usize,
    sockets: &Path,
    role: Role,
) -> GuestBuilder<'a> {
    for number in 0..engines {
        guest = guest.vfio_user(&name(number), &sockets.join(name(number)));
    }
    guest.program("/bin/driver", std::env::current_exe().unwrap()).init(&format!(
        "echo 4 > /proc/sys/vm/nr_hugepages
         {}={} RUST_BACKTRACE=0 driver --exact driver_in_the_guest --nocapture",
        driver::VARIABLE,
        role.word()
    ))
}

/// Waits until the driver in a guest has found all engines; gives the physical address of each one's
/// page.
pub(crate) fn driver_begins(guest: &Guest, engines: usize) -> Vec<u64> {
    let page = |_| {
        let line = guest.console().wait_for(" has RAM at ", LONG).unwrap();
        let address = line.split("at 0x").nth(1).unwrap().split(' ').next().unwrap();
        u64::from_str_radix(address, 16).unwrap()
    };
    let pages = (0..engines).map(page).collect();
    guest.console().wait_for(&format!("engines: {engines}"), LONG).unwrap();
    pages
}

/// Waits for a round that the driver begins after now.
pub(crate) fn rounds_go_on(guest: &Guest) {
    guest.console().catch_up();
    // The first one may have begun before.
    for _ in 0..2 {
        guest.console().wait_for(" is checked", LONG).unwrap();
    }
}

/// Waits until the engine with that page, which goes round and round, writes.
pub(crate) fn engine_writes(guest: &Guest, page: u64) {
    let sequence = || {
        let mut bytes = [0; 8];
        guest.memory().read_exact_at(&mut bytes, page + driver::SEQUENCE).unwrap();
        u64::from_le_bytes(bytes)
    };
    let before = sequence();
    let end = Instant::now() + LONG;
    while sequence() == before {
        assert!(Instant::now() < end, "the engine does not write: {before}");
        std::thread::yield_now();
    }
}

/// All that the engines can write into a guest's RAM.
pub(crate) fn pages(guest: &Guest, pages: &[u64]) -> Vec<Vec<u8>> {
    let page = |&address: &u64| {
        let mut bytes = vec![0; driver::HUGE_PAGE];
        guest.memory().read_exact_at(&mut bytes, address).unwrap();
        bytes
    };
    pages.iter().map(page).collect()
}
