//! Doing wrong what this process was told to: only in builds with the feature `fault-injection`.
//!
//! [`arm`] takes faults, the runtime says at each [`Point`] that it has [reached](reach) or [passes](pass) it, and
//! whoever is there then dies, hangs or waits in that call, or is told what else to do wrong. The
//! points themselves are in the code that they belong to, each under `#[cfg]`, so that a build
//! without the feature has nothing of it.
//!
//! What is armed belongs to the process: there is one device in it.

#![forbid(unsafe_code)]

mod armory;
mod journal;
pub(crate) mod wire;

pub(crate) use armory::ArmError;

use crate::log;
use armory::{Armory, Hit};
use journal::Journal;
use nix::sys::signal::{Signal, raise};
use standstill_protocol::fault::{Action, Armament, Fault, Point, VARIABLE};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

static ARMORY: Mutex<Armory> = Mutex::new(Armory::new());

/// At which kinds of points something is armed: DMA and register accesses look no further.
static KINDS: AtomicU32 = AtomicU32::new(0);

fn armory() -> MutexGuard<'static, Armory> {
    ARMORY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Arms these faults, in addition to all before. Each that fires is written to the journal first.
///
/// # Errors
///
/// [`ArmError`]; nothing more is armed then.
pub(crate) fn arm(faults: &[Fault], journal: OwnedFd) -> Result<(), ArmError> {
    let journal = Journal::new(journal).map_err(ArmError::Journal)?;
    let mut armory = armory();
    // Whoever reads in the journal that they are armed may send at once what is to find them so. A thread that
    // gets there before all is written down has to see that it must wait for the armory.
    let new = faults.iter().fold(0, |kinds, fault| kinds | armory::kind(fault.point));
    KINDS.store(armory.kinds() | new, Ordering::Release);
    let added = armory.add(faults, journal);
    KINDS.store(armory.kinds(), Ordering::Release);
    added
}

/// Arms what the environment says, if it says anything.
///
/// # Errors
///
/// If it cannot be understood or done.
pub(crate) fn arm_from_environment() -> io::Result<()> {
    let Some(text) = std::env::var_os(VARIABLE) else { return Ok(()) };
    let Armament { journal, faults } = serde_json::from_slice(text.as_encoded_bytes())?;
    let journal = journal::append_to(&journal)?;
    arm(&faults, journal).map_err(io::Error::other)
}

/// The process is at this point. What kills, stops, hangs or delays it is done here, on this
/// thread; what is left is the caller's to do. One comes after the other: what follows one that hangs has not
/// happened, and what is before it has.
pub(crate) fn reach(point: Point) -> impl Iterator<Item = Action> {
    let hits = if KINDS.load(Ordering::Acquire) & armory::kind(point) == 0 {
        Vec::new()
    } else {
        let mut armory = armory();
        let hits = armory.reach(point);
        KINDS.store(armory.kinds(), Ordering::Release);
        hits
    };
    hits.into_iter().filter_map(|hit| act(&hit))
}

/// The process is at a point at which nothing is left to the caller.
pub(crate) fn pass(point: Point) {
    reach(point).for_each(drop);
}

/// Does what a thread can do by itself; gives back what it cannot.
fn act(hit: &Hit) -> Option<Action> {
    tracing::warn!(fault = %hit.fault, "fault injected");
    if let Err(error) = hit.journal.write(hit.line) {
        tracing::error!(error = log::with_causes(&error), "the journal of injected faults");
    }
    match hit.fault.action {
        Action::Exit(status) => std::process::exit(i32::from(status)),
        Action::Abort => std::process::abort(),
        Action::Segv => loop {
            // The first one is taken by the handler for stack overflows, which gives up its place.
            let _ = raise(Signal::SIGSEGV);
        },
        Action::Stop => {
            let _ = raise(Signal::SIGSTOP);
            None
        }
        Action::Spin => loop {
            std::thread::yield_now();
        },
        Action::DelayMs(milliseconds) => {
            delay(Duration::from_millis(milliseconds.into()));
            None
        }
        action => Some(action),
    }
}

#[expect(clippy::disallowed_methods, reason = "to be late is what is asked for")]
fn delay(time: Duration) {
    std::thread::sleep(time);
}
