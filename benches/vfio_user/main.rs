//! What an access to a register over vfio-user costs: a read of 4 bytes, there and back, beside a
//! bare ping-pong of as many bytes and beside the server of the `vfio_user` crate.
//!
//! ```text
//! cargo bench --bench vfio_user [-- --rounds 40 --reads 2000 --apart]
//! ```
//!
//! Each server is a process of its own, the device behind it a register that reads as its offset.
//! Two clients are used with each: ours, and one as bare as can be (one send, and receives until all
//! of the reply is there). All run on one CPU, as a vCPU that waits for its device and the device do
//! where the scheduler is good to them; `--apart` leaves it to the scheduler, and what is measured
//! then is above all how long it takes to wake another CPU. A harness of its own: the pairs take
//! turns, round by round, so that all meet the same machine; a ratio is the median of the rounds'
//! ratios.

#![expect(clippy::print_stdout, reason = "a benchmark prints what it has measured")]

#[path = "../harness/mod.rs"]
mod harness;
#[path = "../program/mod.rs"]
mod program;
mod servers;

use harness::Times;
use program::{Failure, end, option};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
use serde_json::json;
use servers::{Server, ServerKind};
use standstill::vfio_user::client::Client;
use standstill::vfio_user::wire::{
    Capabilities, Command, HEADER_SIZE, Header, RegionAccess, Version,
};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tempfile::TempDir;

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
    if !arguments.iter().any(|argument| argument == "--apart") {
        // The servers inherit it.
        let mut cpu = CpuSet::new();
        cpu.set(sched_getcpu());
        sched_setaffinity(None, &cpu)?;
    }
    let mut contestants = Vec::new();
    for (server, client) in [
        (ServerKind::PingPong, ClientKind::Bare),
        (ServerKind::Ours, ClientKind::Bare),
        (ServerKind::Crate, ClientKind::Bare),
        (ServerKind::Ours, ClientKind::Ours),
        (ServerKind::Crate, ClientKind::Ours),
    ] {
        contestants.push(Contestant::start(server, client)?);
    }
    for contestant in &contestants {
        contestant.round(reads)?;
    }
    for _ in 0..rounds {
        for contestant in &mut contestants {
            let took = contestant.round(reads)?;
            contestant.rounds.push(took / reads);
        }
    }
    let [floor, bare_ours, bare_crate, ours, crates] = contestants.as_slice() else {
        return Err("five pairs of a client and a server".into());
    };
    println!("A read of 4 bytes, in \u{b5}s: median (p99) of {rounds} rounds of {reads} reads.\n");
    println!("| server | client | a read | \u{f7} ping-pong | \u{f7} the crate's server |");
    println!("|---|---|---|---|---|");
    let mut all = Vec::new();
    for (contestant, same) in [
        (floor, bare_crate),
        (bare_ours, bare_crate),
        (bare_crate, bare_crate),
        (ours, crates),
        (crates, crates),
    ] {
        println!(
            "| {} | {} | {} | {:.2} | {:.2} |",
            contestant.server.kind.name(),
            contestant.client.name(),
            contestant.microseconds(),
            contestant.ratio(floor),
            contestant.ratio(same)
        );
        all.push(json!({
            "server": contestant.server.kind.name(),
            "client": contestant.client.name(),
            "read_ms": Times::from(contestant.rounds.clone()).json(),
            "to_floor": contestant.ratio(floor),
            "to_crate": contestant.ratio(same),
        }));
    }
    println!("\n{}", serde_json::Value::Array(all));
    println!(
        "\nboth of ours \u{f7} ping-pong: {:.2}; our server \u{f7} the crate's, with our client: {:.2}, \
         with a bare one: {:.2}",
        ours.ratio(floor),
        ours.ratio(crates),
        bare_ours.ratio(bare_crate)
    );
    Ok(())
}

/// Which client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ClientKind {
    /// One send, and receives until all is there.
    Bare,
    /// That of this project.
    Ours,
}

/// A client, connected.
enum Connected {
    /// With the request that it sends.
    Bare(UnixStream, Vec<u8>),
    Ours(Client),
}

impl Connected {
    fn name(&self) -> &'static str {
        match self {
            Self::Bare(..) => "bare",
            Self::Ours(_) => "ours",
        }
    }

    /// Reads the register so often; the value that was there last.
    fn read(&self, reads: u32) -> Result<[u8; 4], Failure> {
        let mut value = [0; 4];
        match self {
            Self::Bare(socket, request) => {
                let length = request.len() + value.len();
                let mut reply = [0; 64];
                for _ in 0..reads {
                    send(socket, request, SendFlags::NOSIGNAL)?;
                    let mut there = 0;
                    while there < length {
                        let room = reply.get_mut(there..).unwrap_or_default();
                        match recv(socket, room, RecvFlags::empty())? {
                            (0, _) => return Err("the server has gone".into()),
                            (count, _) => there += count,
                        }
                    }
                }
                value.copy_from_slice(reply.get(length - 4..length).unwrap_or_default());
            }
            Self::Ours(client) => {
                for _ in 0..reads {
                    client.region_read(0, OFFSET, &mut value)?;
                }
            }
        }
        Ok(value)
    }
}

/// A server, the connection to it, and how long a read took in each round.
struct Contestant {
    server: Server,
    client: Connected,
    rounds: Vec<Duration>,
    /// Of the socket.
    _folder: TempDir,
}

impl Contestant {
    fn start(server: ServerKind, client: ClientKind) -> Result<Self, Failure> {
        let folder = tempfile::tempdir()?;
        let (server, socket) = Server::start(server, folder.path())?;
        let client = match client {
            ClientKind::Ours => Connected::Ours(Client::builder().start(socket)?),
            ClientKind::Bare => {
                if server.kind != ServerKind::PingPong {
                    greet(&socket)?;
                }
                let mut request = Vec::new();
                let access = RegionAccess { offset: OFFSET, region: 0, count: 4 };
                let header = Header::command(1, Command::RegionRead);
                header.encode_message(&mut request, 0, |body| access.encode(body));
                Connected::Bare(socket, request)
            }
        };
        Ok(Self { server, client, rounds: Vec::new(), _folder: folder })
    }

    fn round(&self, reads: u32) -> Result<Duration, Failure> {
        let began = Instant::now();
        let value = self.client.read(reads)?;
        let took = began.elapsed();
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

/// Exchanges versions.
fn greet(mut socket: &UnixStream) -> Result<(), Failure> {
    let version = Version::new(Capabilities { max_msg_fds: Some(16), ..Default::default() });
    let mut message = Vec::new();
    let header = Header::command(0, Command::Version);
    header.encode_message(&mut message, 0, |body| version.encode(body));
    socket.write_all(&message)?;
    let mut header = [0; HEADER_SIZE];
    socket.read_exact(&mut header)?;
    let body = Header::decode(&header).and_then(|header| header.body_size());
    socket.read_exact(&mut vec![0; body.ok_or("a reply of no size")?])?;
    Ok(())
}
