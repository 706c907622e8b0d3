//! Invariant 9: a device process, whatever it sends, costs its coordinator no more than
//! [`MOST_PER_DEVICE`] of the heap, no file descriptor and no thread; and the others go on.

use crate::alone::alone;
use crate::fixture::{LONG, assert_usable, builder, honest, remove_lost, start};
use crate::memory::{live, peak};
use crate::process::{open_fds, settled, threads};
use standstill_coordinator::{DeviceStanding, DeviceStatus, Machine};
use standstill_protocol::channel::CoordinatorEnd;
use standstill_protocol::message::Phase;
use standstill_testkit::{Forgery, Packet, Script, Step, Trace, Trigger, within};
use std::time::Duration;

/// What one hostile device may cost at any time, in bytes of the heap.
const MOST_PER_DEVICE: usize = 64 * 1024;
/// How many of a kind there are in one machine.
const HOSTILE: usize = 4;

/// What may be left of it afterwards, in bytes of the heap: its events, which nobody has read, and the
/// end of its log.
const MOST_LEFT: isize = 32 * 1024;

/// What becomes of a device of one kind.
#[derive(Clone, Copy)]
enum Fate {
    /// It is paused with the others.
    There,
    /// It is there, and the pause is undone.
    Refuses,
    /// It is fenced, for one of these reasons.
    Fenced(&'static [&'static str]),
}

/// Everything that is told of one kind.
struct Kind {
    name: &'static str,
    fate: Fate,
    /// What it does when it is told `PrepareStop` for the second time.
    steps: Vec<Step>,
}

fn kind(name: &'static str, fate: Fate, steps: impl IntoIterator<Item = Step>) -> Kind {
    Kind { name, fate, steps: steps.into_iter().collect() }
}

/// It is fenced since its process has ended, whichever end of it was seen first.
const ENDS: Fate = Fate::Fenced(&["process ended", "channel was closed"]);

/// What becomes of one that sends fds: a kernel of 6.16 or later does not let them through, and so
/// the device fails to send, and ends.
fn with_fds() -> Fate {
    let (channel, _other) = CoordinatorEnd::pair().unwrap();
    if channel.refuse_fds().is_ok() { ENDS } else { Fate::Fenced(&["file descriptors"]) }
}

fn kinds() -> Vec<Kind> {
    let send = Step::Send;
    let many = |packet, count| std::iter::repeat_n(send(packet), count);
    let trickle = [Step::Flood(20), Step::Delay(Duration::from_millis(50))];
    let answer = || std::iter::once(Step::Ack);
    let there = Fate::There;
    let breaks = Fate::Fenced;
    vec![
        kind("honest", there, answer()),
        kind("no message", breaks(&["packet begins with"]), [send(Packet::Garbage)]),
        kind("an empty packet", breaks(&["empty packet"]), [send(Packet::Empty)]),
        kind("a packet that is too long", breaks(&["packet of 4097 bytes"]), {
            [send(Packet::Oversized)]
        }),
        kind("a packet that is too short", breaks(&["too early"]), [send(Packet::Truncated)]),
        kind("20 fds with a message, 200 times", with_fds(), many(Packet::ManyFds, 200)),
        kind("100,000 messages at once", breaks(&["1000 messages in a second"]), {
            [Step::Flood(100_000)].into_iter().chain(answer())
        }),
        // No more than are allowed in one second: the coordinator may not read for as long.
        kind("800 messages in 2 s", there, {
            trickle.into_iter().cycle().take(80).chain(answer())
        }),
        kind("500 events with texts", there, many(Packet::Complaint, 500).chain(answer())),
        kind(
            "a Hello with a list of 2^60",
            breaks(&["undecodable at byte"]),
            many(Packet::HugeHello, 2),
        ),
        kind("900 answers to other epochs", there, {
            many(Packet::Forged(Forgery::LaterEpoch), 900).chain(answer())
        }),
        kind("answers with all counters", there, many(Packet::FullAck, 500)),
        kind("the longest refusal", Fate::Refuses, [Step::Refuse("\u{1b}".repeat(512))]),
        kind("another coordinator has it, it says", breaks(&["which is not so"]), {
            [send(Packet::Superseded)]
        }),
        kind("20,000 lines of log", there, {
            [Step::Shout { lines: 20_000, length: 40 }].into_iter().chain(answer())
        }),
        kind("200 lines of log of 9000 bytes", there, {
            [Step::Shout { lines: 200, length: 9000 }].into_iter().chain(answer())
        }),
        kind("it ends", ENDS, [Step::Crash]),
    ]
}

/// What one kind has cost at most, in all, and left behind at the end.
struct Cost {
    peak: usize,
    left: isize,
    fds: isize,
    threads: isize,
}

async fn pause(machine: &Machine) -> bool {
    match within(LONG, "pause", machine.pause()).await {
        Ok(stopped) => {
            stopped.leave_stopped();
            true
        }
        Err(_) => false,
    }
}

async fn cost(kind: &Kind) -> Cost {
    let trace = Trace::new().unwrap();
    let script = Script::honest().on_nth(Phase::PrepareStop, 2, kind.steps.clone());
    let hostile = (0..HOSTILE).map(|n| script.clone().device(&format!("h{n}"), &trace).unwrap());
    let machine = start(builder().device(honest("d0", &trace)).devices(hostile)).await;
    // Events that nobody reads are kept.
    let unread = machine.events();
    // One round first: whatever is made on first use is there then.
    assert!(pause(&machine).await, "{}: an honest pause", kind.name);
    within(LONG, "resume", machine.resume()).await.unwrap();

    let (fds, before, was) = (open_fds(), threads(), live());
    peak();
    let paused = pause(&machine).await;
    let devices = machine.status().await.unwrap().devices;
    assert_eq!(paused, matches!(kind.fate, Fate::There), "{}: {devices:?}", kind.name);
    let ready = |device: &DeviceStatus| device.standing == DeviceStanding::Ready;
    let (honest_one, hostile_ones) = devices.split_first().unwrap();
    assert!(ready(honest_one), "{}: {honest_one:?}", kind.name);
    assert_eq!(hostile_ones.len(), HOSTILE);
    for device in hostile_ones {
        let fits = match (kind.fate, &device.lost) {
            (Fate::There | Fate::Refuses, _) => ready(device),
            (Fate::Fenced(whys), Some(lost)) => {
                device.standing == DeviceStanding::Fenced
                    && whys.iter().any(|why| lost.contains(why))
            }
            (Fate::Fenced(_), None) => false,
        };
        assert!(fits, "{}: {device:?}", kind.name);
    }
    let peak = peak() - was;
    remove_lost(&machine).await;
    settled(fds, before).await;
    let left = live().cast_signed() - was.cast_signed();
    let cost = Cost {
        peak,
        left,
        fds: open_fds().cast_signed() - fds.cast_signed(),
        threads: threads().cast_signed() - before.cast_signed(),
    };
    assert_usable(&machine).await;
    drop(unread);
    within(LONG, "shutdown", machine.shutdown()).await.unwrap();
    cost
}

#[test]
fn invariant_9_a_hostile_device_costs_its_coordinator_less_than_64_kib() {
    alone("hostile::invariant_9_a_hostile_device_costs_its_coordinator_less_than_64_kib", async {
        println!("| each of {HOSTILE} devices sends | most | left | fds | threads |");
        println!("|---|---|---|---|---|");
        for kind in kinds() {
            let Cost { peak, left, fds, threads } = cost(&kind).await;
            let (name, each) = (kind.name, peak / HOSTILE);
            let left = left / HOSTILE.cast_signed();
            println!("| {name} | {each} | {left} | {fds:+} | {threads:+} |");
            assert!(each <= MOST_PER_DEVICE, "{name}: {each} bytes of the heap each");
            assert!(left <= MOST_LEFT, "{name}: {left} bytes of the heap each are left");
            assert!(fds <= 0 && threads <= 0, "{name}: {fds} fds, {threads} threads");
        }
    });
}

/// One that is hostile from its first packet on.
#[test]
fn invariant_9_a_hostile_greeting_costs_its_coordinator_less_than_64_kib() {
    alone(
        "hostile::invariant_9_a_hostile_greeting_costs_its_coordinator_less_than_64_kib",
        async {
            for packet in [
                Packet::Garbage,
                Packet::Empty,
                Packet::Oversized,
                Packet::ManyFds,
                Packet::HugeHello,
                Packet::Complaint,
                Packet::Superseded,
            ] {
                let trace = Trace::new().unwrap();
                let machine = start(builder().device(honest("d0", &trace))).await;
                assert!(pause(&machine).await);
                within(LONG, "resume", machine.resume()).await.unwrap();
                let bad = || {
                    let script = Script::honest().on(Trigger::Hello, vec![Step::Send(packet); 300]);
                    script.device("bad", &trace).unwrap()
                };
                // The first one may make what stays.
                within(LONG, "the first", machine.add_device(bad())).await.unwrap_err();
                remove_lost(&machine).await;
                let (fds, before, was) = (open_fds(), threads(), live());
                peak();
                within(LONG, "the second", machine.add_device(bad())).await.unwrap_err();
                let most = peak() - was;
                assert!(most <= MOST_PER_DEVICE, "{packet:?}: {most} bytes of the heap");
                remove_lost(&machine).await;
                settled(fds, before).await;
                assert!(pause(&machine).await, "{packet:?}");
                within(LONG, "shutdown", machine.shutdown()).await.unwrap();
            }
        },
    );
}
