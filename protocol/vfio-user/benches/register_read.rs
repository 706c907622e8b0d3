//! A 4-byte register read: the client with a server that does no more than answer, against a bare
//! ping-pong of the same bytes, in one run. Both ends are threads on one CPU.
//!
//! `cargo bench -p standstill-vfio-user --bench register_read`

#![expect(clippy::print_stdout, reason = "what it is for")]

use rustix::thread::{CpuSet, sched_setaffinity};
use standstill_vfio_user::client::Client;
use standstill_vfio_user::connection::connect;
use standstill_vfio_user::framing::FramingLimits;
use standstill_vfio_user::wire::{Command, Limits, Request};
use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

const READS: usize = 20_000;
const ROUNDS: usize = 9;
const LIMITS: Limits = Limits { max_data_xfer_size: 1 << 20 };

type Outcome<T> = Result<T, Box<dyn Error>>;

/// Sends 32 bytes, hears 36.
fn bare(reads: usize) -> Outcome<Vec<Duration>> {
    let (mut ours, mut theirs) = UnixStream::pair()?;
    let server = thread::spawn(move || {
        let (mut request, answer) = ([0; 64], [0; 36]);
        while matches!(theirs.read(&mut request), Ok(32)) {
            if theirs.write_all(&answer).is_err() {
                break;
            }
        }
    });
    let (request, mut answer) = ([0; 32], [0; 64]);
    let mut times = Vec::with_capacity(reads);
    for _ in 0..reads {
        let begin = Instant::now();
        ours.write_all(&request)?;
        let count = ours.read(&mut answer)?;
        times.push(begin.elapsed());
        assert_eq!(count, 36, "one piece");
    }
    drop(ours);
    server.join().map_err(|_| "the server panicked")?;
    Ok(times)
}

/// Answers as a server would that has nothing to do.
fn serve(socket: UnixStream) -> Outcome<()> {
    let limits = FramingLimits { max_message: LIMITS.max_message(), max_fds: 16 };
    let (mut receiver, mut sender) = connect(socket, limits)?;
    while let Ok(message) = receiver.receive(None) {
        let reply = message.header.reply();
        let request =
            Request::decode(message.header.command, message.body, message.fds.len(), LIMITS)?;
        match request {
            Request::RegionRead(access) => {
                sender.send(&reply, &[0; 4], &[], None, |body| access.encode(body))?;
            }
            Request::Version(_) => sender.send(&reply, message.body, &[], None, |_| ())?,
            other => return Err(format!("{} {other:?}", Command::RegionRead).into()),
        }
    }
    Ok(())
}

fn ours(reads: usize) -> Outcome<Vec<Duration>> {
    let (ours, theirs) = UnixStream::pair()?;
    let server = thread::spawn(move || serve(theirs).map_err(|error| error.to_string()));
    let client = Client::builder().start(ours)?;
    let mut register = [0; 4];
    let mut times = Vec::with_capacity(reads);
    for _ in 0..reads {
        let begin = Instant::now();
        client.region_read(0, 0x10, &mut register)?;
        times.push(begin.elapsed());
    }
    drop(client);
    server.join().map_err(|_| "the server panicked")??;
    Ok(times)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn main() -> Outcome<()> {
    let mut cpu = CpuSet::new();
    cpu.set(0);
    sched_setaffinity(None, &cpu)?;
    // `cargo test` runs this too, to see that it works.
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let (reads, rounds) = if is_bench { (READS, ROUNDS) } else { (50, 1) };
    let mut both = [Vec::new(), Vec::new()];
    for _ in 0..rounds {
        both[0].push(median(bare(reads)?));
        both[1].push(median(ours(reads)?));
    }
    let [bare, ours] = both.map(median);
    let ratio = ours.as_secs_f64() / bare.as_secs_f64();
    println!("bare ping-pong, 32 and 36 bytes   {:>6.2} us", bare.as_secs_f64() * 1e6);
    println!("region_read of 4 bytes            {:>6.2} us   {ratio:.3}", ours.as_secs_f64() * 1e6);
    Ok(())
}
