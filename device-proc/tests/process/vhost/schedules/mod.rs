//! Random schedules of all that can happen to a device: every request is done exactly once, and nothing
//! moves while the device is stopped.
//!
//! A schedule is drawn from its seed. `STANDSTILL_SEED=7 STANDSTILL_SCHEDULES=1` plays that one alone.

mod player;
mod work;

use player::Player;
use work::Kind;

/// How many schedules there are of each device unless said otherwise.
const SCHEDULES: u64 = 150;
/// How many steps each has.
const STEPS: usize = 40;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|number| number.parse().unwrap())
}

/// Says which schedule it was, if it fails.
struct Named<'a>(&'a str, u64);

impl Drop for Named<'_> {
    #[expect(clippy::print_stderr, reason = "it is part of how the test fails")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self(script, seed) = self;
            eprintln!("that was STANDSTILL_SEED={seed} STANDSTILL_SCHEDULES=1 of {script:?}");
        }
    }
}

/// Plays schedules, one after another, on one device process as long as it lives.
fn play(kind: &Kind) {
    let first = number("STANDSTILL_SEED").unwrap_or(0);
    let count = number("STANDSTILL_SCHEDULES").unwrap_or(SCHEDULES);
    let mut player = Player::new(kind);
    for seed in first..first + count {
        let _named = Named(kind.script(), seed);
        player.play(seed, STEPS);
    }
    let seen = player.end();
    // Whatever a step is to be good for has come.
    assert!(
        count < SCHEDULES || seen.waited > 0,
        "no request has waited for a device that was stopped"
    );
    assert!(count < SCHEDULES || seen.late > 0, "no request was in flight when a stop came");
}

#[test]
fn of_a_backend_behind_a_lock() {
    play(&Kind::numbers("vhost queues:2 in-order"));
}

#[test]
fn of_a_backend_behind_a_lock_with_threads() {
    play(&Kind::numbers("vhost queues:3 threads"));
}

#[test]
fn of_a_backend_that_completes_later() {
    play(&Kind::numbers("vhost later queues:2 in-order"));
}

#[test]
fn of_a_backend_that_completes_later_with_threads() {
    play(&Kind::numbers("vhost later queues:3 threads"));
}

#[test]
fn of_a_disk() {
    play(&Kind::disk("queues:2"));
}

#[test]
fn of_a_disk_past_the_page_cache() {
    play(&Kind::disk("queues:2 direct"));
}

#[test]
fn of_a_disk_that_is_slow() {
    play(&Kind::disk("queues:2 delay:1"));
}

#[test]
fn of_a_disk_without_io_uring() {
    play(&Kind::disk("queues:2 without-io-uring"));
}
