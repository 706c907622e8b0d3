//! What an access to a register over vfio-user costs: a read of 4 bytes, there and back, beside a
//! bare ping-pong of as many bytes and beside the server of the `vfio_user` crate.
//!
//! ```text
//! cargo bench --bench vfio_user [-- --rounds 40 --reads 2000]
//! ```
//!
//! Each server is a process of its own, the device behind it a register that reads as its offset.
//! The client is the same for all, and as bare as it can be: one send, and receives until all of the
//! reply is there. A harness of its own: the servers take turns, round by round, so that all meet
//! the same machine; a ratio is the median of the rounds' ratios.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../harness/mod.rs"]
mod harness;
#[path = "../program/mod.rs"]
mod program;
mod servers;

use harness::Times;
use program::{Failure, end, option};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use serde_json::json;
use servers::{Server, ServerKind};
use standstill::vfio_user::wire::{
    Capabilities, Command, HEADER_SIZE, Header, RegionAccess, Version,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Of the register that is read.
const OFFSET: u64 = 0x40;

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let done = match arguments.as_slice() {
        [kind, socket] => match ServerKind::from_argument(kind) {
            Some(kind) => kind.serve(socket.as_ref()),
            None => measure(&arguments),
        },
        _ => measure(&arguments),
    };
    end(done)
}

fn measure(arguments: &[String]) -> Result<(), Failure> {
    let rounds: usize = option(arguments, "--rounds").unwrap_or("40").parse()?;
    let reads: u32 = option(arguments, "--reads").unwrap_or("2000").parse()?;
    let folder = tempfile::tempdir()?;
    let servers = ServerKind::ALL.map(|kind| Server::start(kind, folder.path()));
    let [floor, ours, theirs] = servers;
    let mut contestants = [floor?, ours?, theirs?].map(Contestant::new);
    for contestant in &mut contestants {
        contestant.greet()?;
        contestant.round(reads)?;
    }
    for _ in 0..rounds {
        for contestant in &mut contestants {
            let took = contestant.round(reads)?;
            contestant.rounds.push(took / reads);
        }
    }
    let [floor, ours, theirs] = &contestants;
    println!("A read of 4 bytes, in ms: median (p99) of {rounds} rounds of {reads} reads.\n");
    println!("| server | a read | ÷ ping-pong | ÷ the crate's |");
    println!("|---|---|---|---|");
    for contestant in &contestants {
        println!(
            "| {} | {} µs | {:.2} | {:.2} |",
            contestant.server.kind.name(),
            contestant.microseconds(),
            contestant.ratio(floor),
            contestant.ratio(theirs)
        );
    }
    let all: Vec<_> = contestants
        .iter()
        .map(|contestant| {
            json!({
                "server": contestant.server.kind.name(),
                "read_ms": Times::from(contestant.rounds.clone()).json(),
                "to_floor": contestant.ratio(floor),
                "to_crate": contestant.ratio(theirs),
            })
        })
        .collect();
    println!("\n{}", serde_json::Value::Array(all));
    println!(
        "\nours ÷ ping-pong: {:.2}; ours ÷ the crate's: {:.2}",
        ours.ratio(floor),
        ours.ratio(theirs)
    );
    Ok(())
}

/// A server, the connection to it, and how long a read took in each round.
struct Contestant {
    server: Server,
    client: UnixStream,
    request: Vec<u8>,
    rounds: Vec<Duration>,
}

impl Contestant {
    fn new((server, client): (Server, UnixStream)) -> Self {
        let mut request = Vec::new();
        let access = RegionAccess { offset: OFFSET, region: 0, count: 4 };
        let header = Header::command(1, Command::RegionRead);
        header.encode_message(&mut request, 0, |body| access.encode(body));
        Self { server, client, request, rounds: Vec::new() }
    }

    /// Exchanges versions, where there are any.
    fn greet(&mut self) -> Result<(), Failure> {
        if self.server.kind == ServerKind::PingPong {
            return Ok(());
        }
        let version = Version::new(Capabilities { max_msg_fds: Some(16), ..Default::default() });
        let mut message = Vec::new();
        let header = Header::command(0, Command::Version);
        header.encode_message(&mut message, 0, |body| version.encode(body));
        self.client.write_all(&message)?;
        let mut header = [0; HEADER_SIZE];
        self.client.read_exact(&mut header)?;
        let body = Header::decode(&header).and_then(|header| header.body_size());
        self.client.read_exact(&mut vec![0; body.ok_or("a reply of no size")?])?;
        Ok(())
    }

    fn round(&mut self, reads: u32) -> Result<Duration, Failure> {
        let length = self.request.len() + 4;
        let mut reply = [0; 64];
        let began = Instant::now();
        for _ in 0..reads {
            send(&self.client, &self.request, SendFlags::NOSIGNAL)?;
            let mut there = 0;
            while there < length {
                let room = reply.get_mut(there..).unwrap_or_default();
                match recv(&self.client, room, RecvFlags::empty())? {
                    (0, _) => return Err("the server has gone".into()),
                    (count, _) => there += count,
                }
            }
        }
        let took = began.elapsed();
        let value = reply.get(length - 4..length).unwrap_or_default();
        let offset = u32::try_from(OFFSET)?;
        if self.server.kind != ServerKind::PingPong && value != offset.to_le_bytes() {
            return Err(format!("{}: {value:x?} was read", self.server.kind.name()).into());
        }
        Ok(took)
    }

    fn microseconds(&self) -> String {
        let times = Times::from(self.rounds.clone());
        format!("{:.2} ({:.2})", times.median() * 1e3, times.quantile(0.99) * 1e3)
    }

    /// The median of the rounds' ratios.
    fn ratio(&self, to: &Self) -> f64 {
        let pairs = self.rounds.iter().zip(&to.rounds);
        let mut ratios: Vec<_> =
            pairs.map(|(own, other)| own.as_secs_f64() / other.as_secs_f64()).collect();
        ratios.sort_by(f64::total_cmp);
        ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN)
    }
}
