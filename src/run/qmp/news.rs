//! What QEMU tells by events, for the log of an operator.

use std::time::{Duration, Instant};
use tracing::Level;

/// How many events are logged in one [`WINDOW`]; the others are counted.
const MOST: u32 = 20;
const WINDOW: Duration = Duration::from_secs(1);
/// How much of an event's data is shown, in characters.
const SHOWN: usize = 200;

/// Where the VM is to be when an event comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Now {
    /// The devices stand, or are about to.
    pub(super) stands: bool,
    /// A `stop` or `cont` of ours is under way.
    pub(super) ours: bool,
}

/// What an event is for an operator; `None` for one that says nothing about whether the VM runs, and
/// for all that a later QEMU may have.
pub(super) fn meaning(event: &str, now: Now) -> Option<(Level, &'static str)> {
    Some(match (event, now) {
        ("STOP", Now { ours: true, .. }) => (Level::DEBUG, "the VM stands"),
        ("STOP", _) => (Level::INFO, "somebody else has stopped the VM"),
        ("RESUME", Now { ours: true, .. }) => (Level::DEBUG, "the VM goes on"),
        ("RESUME", Now { stands: true, .. }) => {
            (Level::ERROR, "somebody else lets the VM go on while its devices stand")
        }
        ("RESUME", _) => (Level::INFO, "somebody else lets the VM go on"),
        ("RESET", Now { stands: true, .. }) => {
            (Level::WARN, "the VM is reset while its devices stand")
        }
        ("RESET", _) => (Level::INFO, "the VM is reset"),
        ("SHUTDOWN", _) => (Level::INFO, "the VM ends"),
        ("SUSPEND", _) => (Level::INFO, "the guest sleeps"),
        ("WAKEUP", _) => (Level::INFO, "the guest wakes"),
        ("GUEST_PANICKED", _) => (Level::WARN, "the guest has panicked"),
        ("WATCHDOG", _) => (Level::WARN, "the watchdog of the VM has run out"),
        ("BLOCK_IO_ERROR", _) => (Level::WARN, "a disk of the VM has failed"),
        _ => return None,
    })
}

/// The data of an event, for one line.
pub(super) fn shown(data: &serde_json::Value) -> String {
    let text = data.to_string();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Bounds what events can put into the log.
#[derive(Debug)]
pub(super) struct Bound {
    began: Instant,
    seen: u32,
}

impl Bound {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), seen: 0 }
    }

    /// Whether one more is logged; and how many were not, when it is told.
    pub(super) fn admits(&mut self, now: Instant) -> (bool, u32) {
        let mut left_out = 0;
        if now.duration_since(self.began) >= WINDOW {
            left_out = self.seen.saturating_sub(MOST);
            *self = Self { began: now, seen: 0 };
        }
        self.seen = self.seen.saturating_add(1);
        (self.seen <= MOST, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use qapi::Event;
    use qapi::qmp;

    const RUNS: Now = Now { stands: false, ours: false };

    #[test]
    fn the_events_that_count_are_known_to_qemu() {
        for name in [
            qmp::STOP::NAME,
            qmp::RESUME::NAME,
            qmp::RESET::NAME,
            qmp::SHUTDOWN::NAME,
            qmp::SUSPEND::NAME,
            qmp::WAKEUP::NAME,
            qmp::GUEST_PANICKED::NAME,
            qmp::WATCHDOG::NAME,
            qmp::BLOCK_IO_ERROR::NAME,
        ] {
            assert!(meaning(name, RUNS).is_some(), "{name}");
        }
        assert_eq!(meaning(qmp::RTC_CHANGE::NAME, RUNS), None);
        assert_eq!(meaning("NEW_FANGLED", RUNS), None);
    }

    #[test]
    fn a_vm_that_goes_on_over_stopped_devices_is_an_error_unless_it_is_our_own_doing() {
        let level = |stands, ours| meaning("RESUME", Now { stands, ours }).unwrap().0;
        assert_eq!(level(true, false), Level::ERROR);
        assert_eq!(level(true, true), Level::DEBUG);
        assert_eq!(level(false, false), Level::INFO);
    }

    #[test]
    fn a_flood_of_events_is_bounded_and_what_is_left_out_is_counted() {
        let mut bound = Bound::new();
        let now = bound.began;
        let admitted = (0..1000).filter(|_| bound.admits(now).0).count();
        assert_eq!(admitted, 20);
        assert_eq!(bound.admits(now + WINDOW), (true, 980));
        assert_eq!(bound.admits(now + WINDOW), (true, 0));
    }

    #[test]
    fn long_data_is_cut_between_characters() {
        let text = shown(&serde_json::json!("ä".repeat(1000)));
        assert_eq!(text.chars().count(), SHOWN + 1);
    }
}
