//! Properties of the watchdog, without a clock.

use super::*;
use proptest::prelude::*;

const TICK: Duration = Duration::from_millis(100);
const LIMITS: Limits =
    Limits { stall: Some(Duration::from_secs(2)), silence: Some(Duration::from_secs(1)) };

fn beat(progress: u64, pending: bool) -> Heartbeat {
    Heartbeat { sequence: 0, progress, pending, dropped_logs: 0 }
}

#[test]
fn a_silent_device_hangs_after_the_limit_and_not_before() {
    let mut pulse = Pulse::default();
    for _ in 0..9 {
        assert_eq!(pulse.tick(TICK, true, &LIMITS), None);
    }
    assert_eq!(pulse.tick(TICK, true, &LIMITS), Some(Hang::Control { silent: TICK * 10 }));
}

#[test]
fn a_device_with_work_and_no_progress_hangs() {
    let mut pulse = Pulse::default();
    let verdicts: Vec<_> = (0..30)
        .map(|_| {
            pulse.heartbeat(&beat(7, true));
            pulse.tick(TICK, true, &LIMITS)
        })
        .collect();
    assert!(verdicts[..19].iter().all(Option::is_none), "{verdicts:?}");
    assert_eq!(verdicts[19], Some(Hang::Data { standing: TICK * 20 }));
}

#[test]
fn one_sign_of_life_is_no_proof_that_progress_stands_still() {
    let limits = Limits { stall: Some(TICK), silence: None };
    let mut pulse = Pulse::default();
    pulse.heartbeat(&beat(7, true));
    for _ in 0..100 {
        assert_eq!(pulse.tick(TICK, true, &limits), None);
    }
    pulse.heartbeat(&beat(8, true));
    assert_eq!(pulse.tick(TICK, true, &limits), None);
    pulse.heartbeat(&beat(8, true));
    assert!(matches!(pulse.tick(TICK, true, &limits), Some(Hang::Data { .. })));
}

#[test]
fn a_coordinator_that_slept_counts_two_intervals_at_most() {
    let start = Instant::now();
    let mut ticks = Ticks::new(TICK, start);
    assert_eq!(ticks.tick(start + TICK), TICK);
    assert_eq!(ticks.tick(start + Duration::from_secs(3600)), TICK * 2);
}

#[test]
fn zero_limits_and_no_signs_of_life_switch_it_off() {
    let (zero, second) = (Duration::ZERO, Duration::from_secs(1));
    assert!(Limits::new(zero, zero, second).interval().is_none());
    assert!(Limits::new(second, second, zero).interval().is_none());
    let slow = Limits::new(zero, second, second * 5);
    assert_eq!(slow.silence, Some(second * 10));
}

#[derive(Clone, Copy, Debug)]
enum Does {
    Idles,
    Works,
    Stops,
}

proptest! {
    /// Whoever speaks in time, and works or has nothing to do or is stopped, never hangs.
    #[test]
    fn a_device_that_keeps_its_promises_never_hangs(
        rounds in prop::collection::vec(
            (
                prop_oneof![Just(Does::Idles), Just(Does::Works), Just(Does::Stops)],
                0_u32..9,
            ),
            1..200,
        ),
    ) {
        let (mut pulse, mut progress) = (Pulse::default(), 0);
        for (does, silent) in rounds {
            let (pending, runs) = match does {
                Does::Idles => (false, true),
                Does::Works => (true, true),
                Does::Stops => (true, false),
            };
            progress += u64::from(pending && runs);
            pulse.heartbeat(&beat(progress, pending));
            for _ in 0..silent {
                prop_assert_eq!(pulse.tick(TICK, runs, &LIMITS), None);
            }
        }
    }

    /// Whatever was before: silence, or work without progress, is found within its limit and a tick.
    #[test]
    fn whoever_begins_to_hang_is_found(
        before in prop::collection::vec((any::<bool>(), 0_u64..3, any::<bool>()), 0..50),
        speaks in any::<bool>(),
    ) {
        let mut pulse = Pulse::default();
        for (pending, progress, runs) in before {
            pulse.heartbeat(&beat(progress, pending));
            pulse.tick(TICK, runs, &LIMITS);
        }
        pulse.heartbeat(&beat(9, true));
        let limit = if speaks { 20 } else { 10 };
        let mut found = None;
        for tick in 1..=limit + 1 {
            if speaks {
                pulse.heartbeat(&beat(9, true));
            }
            found = pulse.tick(TICK, true, &LIMITS).map(|hang| (tick, hang));
            if found.is_some() {
                break;
            }
        }
        let (tick, hang) = found.ok_or_else(|| TestCaseError::fail("not found"))?;
        prop_assert!(tick >= limit);
        prop_assert_eq!(matches!(hang, Hang::Data { .. }), speaks);
    }
}
