//! How long a stop takes that comes while requests are under way, beside what they needed anyway.
//!
//! Requests are begun a little later than they are taken out of the ring, so that all of them are
//! under way when the stop comes and none has ended. Times begin when the stop is asked for. *Last one
//! ended* is when the driver saw the last answer; *without a stop* is how long as many requests take
//! from then on that nobody stops.

use super::driver::{Driver, Load, Order};
use super::exports::{self, Ours};
use super::program::Failure;
use crate::harness::Times;
use serde_json::{Value, json};
use standstill_testkit::vhost_user::in_flight;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

/// How many requests there are.
const REQUESTS: usize = 128;

/// How long after the requests a stop is asked for: the device has taken them all by then.
const BEFORE: Duration = Duration::from_millis(2);

/// How often it is asked whether the machine stands still; requests that end are seen at once.
const INTERVAL: Duration = Duration::from_micros(200);

/// Stops and starts a disk that often with each kind of requests under way.
pub(super) fn measure(folder: &Path, size: u64, rounds: usize) -> Result<(), Failure> {
    let image = exports::image(folder, "ours.img", size)?;
    println!("{rounds} stops with {REQUESTS} requests each; ms: median (p99)\n");
    println!(
        "| requests | under way at the stop | last one ended | stopped | stopped ÷ ended \
         | without a stop |"
    );
    println!("|---|---|---|---|---|---|");
    let read = |length| Load { writes: false, order: Order::Random, length, depth: REQUESTS };
    let kinds = [
        ("4 KiB, O_DIRECT", read(4096), "--delay=4ms"),
        ("128 KiB, O_DIRECT", read(128 << 10), "--delay=4ms"),
        ("4 KiB, O_DIRECT, 20 ms longer", read(4096), "--delay=20ms"),
    ];
    let mut all = Vec::new();
    for (name, load, delay) in kinds {
        let ours = Ours::start(folder, &image, true, &[delay])?;
        exports::wait_for(&ours.socket)?;
        let mut driver = Driver::connect(&ours.socket, size, REQUESTS, load.length)?;
        let (mut under_way, mut ended, mut stopped) = (Vec::new(), Vec::new(), Vec::new());
        let (mut ratios, mut undisturbed) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let begin = Instant::now();
            driver.begin(load)?;
            undisturbed.push(driver.end(REQUESTS)? - begin - BEFORE);
            let round = stop(&ours, &mut driver, load)?;
            under_way.push(round.under_way);
            ended.push(round.ended);
            stopped.push(round.stopped);
            ratios.push(round.stopped.as_secs_f64() / round.ended.as_secs_f64());
        }
        under_way.sort_unstable();
        ratios.sort_unstable_by(f64::total_cmp);
        let (ended, stopped) = (Times::from(ended), Times::from(stopped));
        let (under_way, ratio) = (under_way[under_way.len() / 2], ratios[ratios.len() / 2]);
        let undisturbed = Times::from(undisturbed);
        println!("| {name} | {under_way} | {ended} | {stopped} | {ratio:.2} | {undisturbed} |");
        all.push(json!({
            "requests": name,
            "under_way": under_way,
            "ended_ms": ended.json(),
            "stopped_ms": stopped.json(),
            "ratio": ratio,
            "undisturbed_ms": undisturbed.median(),
        }));
        drop(driver);
        ours.machine.shutdown()?;
    }
    println!("\n{}", Value::Array(all));
    Ok(())
}

/// One stop; times since it was asked for.
struct Round {
    /// Requests that the device had when it was told.
    under_way: u64,
    /// When the last of them had ended.
    ended: Duration,
    /// When the machine stood still.
    stopped: Duration,
}

fn stop(ours: &Ours, driver: &mut Driver, load: Load) -> Result<Round, Failure> {
    let (go, wait) = sync_channel::<()>(0);
    let stands = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let stands = &stands;
        let stopping = scope.spawn(move || {
            let stopped = wait.recv().map_err(Failure::from).and_then(|()| {
                let begin = Instant::now();
                let stopped = ours.machine.pause()?;
                Ok((begin, Instant::now(), stopped))
            });
            stands.store(true, Ordering::Release);
            stopped
        });
        driver.begin(load)?;
        rest(BEFORE);
        go.send(())?;
        let mut left = REQUESTS;
        let mut last = Instant::now();
        while !stands.load(Ordering::Acquire) {
            let ended = driver.look(INTERVAL)?;
            left -= ended;
            if ended > 0 {
                last = Instant::now();
            }
        }
        let (begin, end, stopped) = match stopping.join() {
            Ok(stopped) => stopped?,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        // It may have answered the driver and the coordinator at the same moment.
        let ended = driver.look(Duration::ZERO)?;
        left -= ended;
        if ended > 0 {
            last = Instant::now();
        }
        let under_way = in_flight(stopped.report());
        stopped.resume()?;
        driver.end(left)?;
        let ended = last.saturating_duration_since(begin);
        Ok(Round { under_way, ended, stopped: end - begin })
    })
}

#[expect(clippy::disallowed_methods, reason = "the time until the stop")]
fn rest(time: Duration) {
    std::thread::sleep(time);
}
