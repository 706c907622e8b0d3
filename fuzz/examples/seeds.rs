//! Writes the inputs that each corpus begins with: every message of the protocol, what the pages of
//! the documentation show, and conversations that lead deep into a device process.
//!
//! `cargo run --manifest-path fuzz/Cargo.toml --release --example seeds`, from anywhere.

#[path = "seeds/vfio_user.rs"]
mod vfio_user;
#[path = "seeds/vhost_user_blk.rs"]
mod vhost_user_blk;

use standstill_fuzz::track::{Fds, Script, Steps};
use standstill_protocol::codec::{HEADER, MAX_PACKET, Message, encode};
use standstill_protocol::message::*;
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::fs;
use std::io;
use std::path::Path;

const PROTOCOL: &str = include_str!("../../docs/protocol.md");
const MACHINE_FILE: &str = include_str!("../../docs/machine-file.md");
const MACHINE_TESTS: &str = include_str!("../../src/machine_file/tests.rs");
const MACHINE: &str = include_str!("../../examples/machine.toml");
const OPERATOR_SOCKET: &str = include_str!("../../docs/operator-socket.md");

fn main() -> io::Result<()> {
    write("codec", codec())?;
    write("coordinator", coordinator())?;
    write("device", device())?;
    write("machine_file", machine_file())?;
    write("operator_socket", operator_socket())?;
    write("vfio_user_client", vfio_user::client())?;
    write("vfio_user_server", vfio_user::server())?;
    write("vhost_user_blk", vhost_user_blk::requests())?;
    write("state_stream", state_stream())
}

type Seeds = Vec<(String, Vec<u8>)>;

fn write(target: &str, seeds: Seeds) -> io::Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&folder)?;
    for (name, seed) in seeds {
        let name = format!("seed-{}", name.replace(' ', "-").to_lowercase());
        fs::write(folder.join(name), seed)?;
    }
    Ok(())
}

/// The vectors of the page that describes the bytes: a line `name:`, then lines of an offset and up
/// to 16 bytes.
fn codec() -> Seeds {
    let vectors = PROTOCOL.split("<!-- vectors -->").nth(1).unwrap_or_default();
    let vectors = vectors.split("<!-- end of vectors -->").next().unwrap_or_default();
    let mut seeds: Seeds = Vec::new();
    for line in vectors.lines() {
        if let Some(name) = line.strip_suffix(':') {
            // Of a device or of a coordinator; the version of the page's messages is 1.
            let of_device =
                ["Hello", "Reached", "Refused", "Status", "MemoryAccepted", "Heartbeat", "Event"];
            let kind = u8::from(of_device.iter().any(|message| name.starts_with(message)));
            seeds.push((name.to_owned(), vec![0x10 | kind]));
        } else if let (Some((_, bytes)), Some((_, seed))) =
            (line.trim().split_once("  "), seeds.last_mut())
        {
            let bytes = bytes.split_whitespace();
            seed.extend(bytes.filter_map(|byte| u8::from_str_radix(byte, 16).ok()));
        }
    }
    assert!(seeds.len() > 20, "the page has vectors");
    seeds
}

fn payload(message: &impl Message) -> Vec<u8> {
    let mut buffer = [0; MAX_PACKET];
    let length = encode(message, 1, &mut buffer).expect("a message within its limits");
    buffer[HEADER..length].to_vec()
}

/// The first term of the targets.
const TERM: Term = Term(3);
const NONE: Fds = Fds { count: 0, first: 0 };

fn command(epoch: u64, phase: Phase, target: MigrationState, lease_ns: u64) -> Vec<u8> {
    let (term, epoch, budget_ns) = (TERM, Epoch(epoch), 1_000_000_000);
    let command = Command { term, epoch, phase, target, budget_ns, lease_ns };
    payload(&CoordinatorMessage::Command(command))
}

/// The first term and epoch of the target's machine, and who speaks in it.
fn coordinator() -> Seeds {
    use DeviceMessage as M;
    use MigrationState as S;
    let (term, phases) = (Term(1), [Phase::PrepareStop, Phase::Stop]);
    // What the owner asks for: the number of a call in the target's list.
    const PAUSE: u8 = 0;
    const RESUME: u8 = 1;
    const STATUS: u8 = 8;
    const DECLARE: u8 = 9;
    let begin = || Script::default().other(0, 0);
    let ask = |script: Script, what| script.other(5, what);
    let paused = |script: Script| ask(script, PAUSE).turns(0).turns(0);
    let reached = |epoch, phase, state| {
        let (timings, evidence) = (Timings::default(), Evidence::default());
        let epoch = Epoch(epoch);
        payload(&M::Reached(Reached { term, epoch, phase, state, timings, evidence }))
    };
    let refused = |text: String| {
        let refusal = Refusal { kind: RefusalKind::Device, text };
        let (epoch, phase, state) = (Epoch(1), phases[0], S::Running);
        payload(&M::Refused(Refused { term, epoch, phase, state, refusal }))
    };
    let status = {
        let (epoch, state, moving_to) = (Epoch(1), S::Running, None);
        payload(&M::Status(Status { term, epoch, state, client_state: state, moving_to }))
    };
    let beat = payload(&M::Heartbeat(Heartbeat {
        sequence: 1,
        progress: 1,
        pending: true,
        dropped_logs: 2,
    }));
    let event = |event| payload(&M::Event(event));
    let hello = with_header(
        &payload(&M::Hello(Hello {
            versions: VERSIONS,
            kind: "scripted".into(),
            program_version: "1".into(),
            capabilities: Capabilities {
                migration: MigrationFlags::ALL,
                peer_dma: PeerDma::Possible,
                progress: true,
                dirty_tracking: true,
                fault_injection: false,
            },
            machine: None,
            term: Term(0),
            epoch: Epoch(0),
            state: S::Running,
            backing_files: 1,
            memory: vec![FileIdentity { device: 1, inode: 2 }],
        })),
        0,
    );
    let accepted = payload(&M::MemoryAccepted(MemoryAccepted { sequence: 1 }));
    let answers = |script: Script| {
        script
            .message(&reached(1, phases[0], S::RunningP2p), NONE)
            .message(&reached(1, phases[1], S::Stop), NONE)
    };
    let seeds = [
        ("pause and resume", ask(paused(begin()), RESUME).turns(0).turns(0)),
        ("own answers", answers(ask(begin(), PAUSE))),
        ("answers twice", answers(answers(ask(begin(), PAUSE)))),
        ("answer too early", answers(begin())),
        ("another state", ask(begin(), PAUSE).message(&reached(1, phases[0], S::Stop), NONE)),
        ("another epoch", ask(begin(), PAUSE).message(&reached(9, phases[0], S::Stop), NONE)),
        ("refused", ask(begin(), PAUSE).message(&refused("no".into()), NONE).turns(0)),
        ("long refusal", ask(begin(), PAUSE).message(&refused("n".repeat(MAX_TEXT)), NONE)),
        ("silent", ask(begin(), PAUSE).turns(1).turns(1).turns(1)),
        ("status unasked", ask(begin().message(&status, NONE), STATUS)),
        ("memory", ask(begin(), DECLARE).message(&accepted, NONE)),
        ("memory unasked", begin().message(&accepted, NONE)),
        ("heartbeats", begin().message(&beat, NONE).turns(1).message(&beat, NONE)),
        ("flood", begin().message(&beat, NONE).other(4, 255)),
        ("flood in a pause", ask(begin(), PAUSE).message(&beat, NONE).other(4, 60).turns(0)),
        ("client state", begin().message(&event(DeviceEvent::ClientState(S::Stop)), NONE)),
        ("lease", begin().message(&event(DeviceEvent::LeaseExpired(S::RunningP2p)), NONE)),
        ("failed", begin().message(&event(DeviceEvent::Failed("\u{1b}[31m".into())), NONE)),
        ("superseded", begin().message(&event(DeviceEvent::Superseded(Term(2))), NONE).turns(1)),
        ("superseded by none", begin().message(&event(DeviceEvent::Superseded(Term(0))), NONE)),
        (
            "hello",
            ask(Script::default().packet(&hello, Fds { count: 1, first: 0 }), PAUSE).turns(0),
        ),
        ("hello with too few fds", Script::default().packet(&hello, NONE)),
        ("hello twice", begin().packet(&hello, Fds { count: 1, first: 0 })),
        ("no packet", begin().packet(b"", NONE)),
        ("no message", ask(begin(), PAUSE).packet(&[0xa5; 64], NONE).turns(1)),
        ("long packet", begin().packet(&[0; MAX_PACKET + 1], NONE)),
        ("fds", begin().message(&beat, Fds { count: 7, first: 0 })),
        ("closed", ask(paused(begin()).other(2, 0), RESUME).turns(1)),
        ("exit", ask(ask(begin(), PAUSE).other(3, 0), RESUME).turns(1).turns(1)),
        ("no hello", Script::default().turns(1).turns(1)),
        ("every call", (0..16).fold(begin(), |script, what| ask(script, what).turns(0))),
        ("restart", ask(begin().other(3, 0).turns(1), 11).other(0, 0).turns(0)),
    ];
    let whole = |(name, Script(seed)): (&str, Script)| (name.to_owned(), seed);
    seeds.map(whole).into()
}

fn device() -> Seeds {
    use CoordinatorMessage as M;
    use MigrationState as S;
    use Phase as P;
    let pause = |script: Script| {
        script
            .message(&command(17, P::PrepareStop, S::RunningP2p, 0), NONE)
            .message(&command(17, P::Stop, S::Stop, 0), NONE)
    };
    let resume = |script: Script| {
        script
            .message(&command(18, P::PrepareStart, S::RunningP2p, 0), NONE)
            .message(&command(18, P::Start, S::Running, 0), NONE)
    };
    // How it begins, then what its hooks do.
    let begin = |setup: u8, fates: u8| Script(vec![setup, fates]);
    let query = payload(&M::Query(Query { term: TERM, epoch: Epoch(17) }));
    let abort = payload(&M::Abort(Abort { term: TERM, epoch: Epoch(17) }));
    let memory = |sequence, ram_fds, dirty_page_size| {
        payload(&M::Memory(MemoryDeclaration { term: TERM, sequence, ram_fds, dirty_page_size }))
    };
    let files = vec![FileIdentity { device: 1, inode: 2 }];
    let revoke = payload(&M::Revoke(Revocation { term: TERM, sequence: 3, files }));
    let untrack = payload(&M::Untrack(Untrack { term: TERM }));
    let shutdown = payload(&M::Shutdown(Shutdown { term: TERM, grace_ns: 1_000_000 }));
    let reject = payload(&M::Reject(Reject { versions: VERSIONS, reason: "no".into() }));
    let one = |first| Fds { count: 1, first };
    let seeds = [
        ("pause and resume", resume(pause(begin(0, 0)))),
        ("pause with all flags", pause(begin(4, 0)).message(&query, NONE)),
        ("without p2p", pause(begin(2, 0))),
        ("hook fails", resume(pause(begin(4, 0b0000_1000))).message(&query, NONE)),
        ("hook hangs", pause(begin(4, 0b0000_1100)).other(3, 200).message(&abort, NONE)),
        ("abort", begin(4, 0).message(&abort, NONE).message(&query, NONE)),
        ("lease", {
            let stop = command(17, P::Stop, S::StopCopy, 1_000_000_000);
            let prepare = command(17, P::PrepareStop, S::RunningP2p, 0);
            begin(4, 0).message(&prepare, NONE).message(&stop, NONE).other(3, 150).turns(4)
        }),
        ("save and load", {
            pause(begin(4, 0))
                .message(&command(18, P::Stop, S::StopCopy, 0), NONE)
                .message(&command(19, P::Save, S::StopCopy, 0), one(2))
                .message(&command(20, P::Stop, S::Stop, 0), NONE)
                .message(&command(21, P::Load, S::Stop, 0), one(2))
                .turns(8)
        }),
        ("load rubbish", begin(4, 0).message(&command(17, P::Load, S::Stop, 0), one(3)).turns(8)),
        ("load without end", {
            begin(4, 0).message(&command(17, P::Load, S::Stop, 0), one(6)).turns(8)
        }),
        ("reset", begin(4, 0).message(&command(17, P::Reset, S::Running, 0), NONE).turns(4)),
        ("memory", {
            let twice = memory(2, 1, 4096);
            begin(4, 0)
                .message(&memory(1, 1, 0), one(0))
                .message(&twice, Fds { count: 2, first: 0 })
                .message(&revoke, NONE)
                .message(&untrack, NONE)
                .turns(8)
        }),
        ("memory of odd files", {
            begin(5, 0).message(&memory(1, 5, 0), Fds { count: 5, first: 3 }).turns(2)
        }),
        ("too few fds", begin(5, 0).message(&memory(1, 3, 0), one(0)).message(&query, NONE)),
        ("shutdown", begin(4, 0).message(&shutdown, NONE)),
        ("reject", begin(5, 0).packet(&with_header(&reject, 0), NONE).message(&query, NONE)),
        ("no packet", begin(4, 0).packet(b"", NONE).message(&query, NONE)),
        ("no message", begin(5, 0).packet(&[0xff; 64], NONE).message(&query, NONE)),
        ("long packet", begin(5, 0).packet(&[0; MAX_PACKET + 1], NONE)),
        ("many fds", begin(5, 0).message(&query, Fds { count: 7, first: 0 })),
        ("closed", pause(begin(5, 0)).other(0, 0).turns(4)),
        ("taken over", {
            let command = |phase| {
                let (target, budget_ns) = (S::RunningP2p, 1_000_000_000);
                let (term, epoch) = (Term(4), Epoch(17));
                let command = Command { term, epoch, phase, target, budget_ns, lease_ns: 0 };
                payload(&M::Command(command))
            };
            let there = pause(begin(13, 0)).other(1, 0b1110).turns(2);
            there.message(&command(P::PrepareStart), NONE).other(1, 0).other(3, 9)
        }),
        ("client stops", begin(4, 0).other(2, 1).message(&query, NONE).other(2, 2).turns(4)),
        ("client resets", pause(begin(4, 0)).other(2, 8).other(2, 4).turns(4)),
        ("listener", begin(0b0101_1101, 0).other(3, 100).turns(8)),
        ("twice", pause(pause(begin(4, 0)))),
    ];
    let checked = |(name, Script(seed)): (&str, Script)| {
        let (head, steps) = seed.split_at(2);
        let again = Script(head.to_owned()).steps(Steps(steps));
        assert_eq!(again.0, seed, "{name}: what is written is not what is read");
        (name.to_owned(), seed)
    };
    seeds.map(checked).into()
}

fn with_header(payload: &[u8], version: u16) -> Vec<u8> {
    let mut packet = b"STST".to_vec();
    packet.extend(version.to_le_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}

/// The example, the long texts of the unit tests, and the blocks of TOML of the page.
fn machine_file() -> Seeds {
    let blocks = MACHINE_FILE.split("```toml\n").skip(1);
    let blocks = blocks.filter_map(|block| block.split("```").next());
    let everything =
        MACHINE_TESTS.split("r#\"").skip(1).filter_map(|text| text.split("\"#").next());
    let texts = std::iter::once(MACHINE).chain(everything).chain(blocks);
    let mut seeds: Seeds = Vec::new();
    for (at, text) in texts.enumerate() {
        seeds.push((format!("machine {at}"), [b"\0", text.as_bytes()].concat()));
        seeds.push((format!("device {at}"), [b"\x01", text.as_bytes()].concat()));
    }
    let device = "name = \"nic0\"\nprogram = \"bin/nic\"\nargs = [\"-s\", \"{socket}\"]\n\
                  socket = \"nic0.sock\"\nclient = \"qemu\"\non-loss = \"continue-without\"\n";
    seeds.push(("one device".into(), [b"\x01", device.as_bytes()].concat()));
    let twice = format!("name = \"vm0\"\n[[device]]\n{device}[[device]]\n{device}");
    seeds.push(("twice".into(), [b"\0", twice.as_bytes()].concat()));
    seeds
}

/// The requests of the page, one by one and all at once.
fn operator_socket() -> Seeds {
    let lines: Vec<_> =
        OPERATOR_SOCKET.lines().filter_map(|line| line.strip_prefix("→ ")).collect();
    assert!(lines.len() > 5, "the page has requests");
    let seed = |head: [u8; 4], text: &str| [&head[..], text.as_bytes()].concat();
    let mut seeds: Seeds = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        seeds.push((format!("request {at}"), seed([0, 255, 0, 0], &format!("{line}\n"))));
    }
    let all = format!("{}\n", lines.join("\n"));
    for (name, head) in [
        ("all", [0, 255, 0, 0]),
        ("in small pieces", [0, 3, 9, 1]),
        ("without reading", [3, 99, 3, 2]),
        ("at the end", [4, 40, 31, 0]),
    ] {
        seeds.push((name.into(), seed(head, &all)));
    }
    seeds.push(("unfinished".into(), seed([0, 9, 0, 0], all.trim_end())));
    let follow = "{\"id\":9,\"request\":\"events\",\"with\":{\"last\":3,\"follow\":true}}\n";
    seeds.push(("two streams".into(), seed([0, 50, 0, 0], &follow.repeat(2))));
    seeds.push(("end of a stream".into(), seed([4, 50, 0, 0], follow)));
    seeds.push(("no request".into(), seed([0, 7, 0, 0], "[]\n\n{\"id\":4}\n{\"id\":-1}\n")));
    seeds
}

/// Each kind of change, and some together; see `fuzz_targets/state_stream.rs`.
fn state_stream() -> Seeds {
    let honest = |name: &str, changes: &[&[u8]]| {
        (name.to_owned(), [&[1], changes.concat().as_slice()].concat())
    };
    vec![
        ("rubbish".to_owned(), b"\0STANDSTL\x02\0\0\0\0\0\0\0rubbish".to_vec()),
        honest("honest", &[]),
        honest("newer minor", &[&[0, 10, 1], &[6, 1, 0x80, 1, 0, 0, 0, 3, 1, 2, 3]]),
        honest("newer major", &[&[0, 8, 3]]),
        honest("without memory", &[&[1, 2]]),
        honest("memory again", &[&[6, 5, 0x12, 0, 0, 0, 1, 255]]),
        honest("device twice", &[&[2, 9]]),
        honest("another identity", &[&[5, 0, 4, 1, 0, 2, 0]]),
        honest("goes on", &[&[3, 9, 5, 2, 0, 0, 0], &[6, 10, 5, 0, 5, 0, 0, 1, 9]]),
        honest("early end", &[&[6, 3, 0xff, 0, 0, 0, 0, 0]]),
        honest("vectors", &[&[5, 8, 11, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]]),
    ]
}
