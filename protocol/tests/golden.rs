//! The vectors of `docs/protocol.md` against the codec, byte by byte.
//!
//! The bytes are read out of the document itself: it is the contract, and this test holds the code
//! to it. A message that is missing there, or a vector that no message here belongs to, fails.

use standstill_protocol::codec::{DecodeError, HEADER, MAX_PACKET, Message, decode, encode};
#[cfg(feature = "fault-injection")]
use standstill_protocol::fault::{Action, Fault, Forgery, Point};
use standstill_protocol::message::*;
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use std::collections::BTreeMap;
use std::fmt::Debug;
use uuid::Uuid;

const DOCUMENT: &str = include_str!("../../docs/protocol.md");
/// Before and after the vectors in the document.
const BEGIN: &str = "<!-- vectors -->";
const END: &str = "<!-- end of vectors -->";

const VERSION: u16 = 1;
const MACHINE: Uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
const TERM: Term = Term(3);
const EPOCH: Epoch = Epoch(0x1122);
const FILE: FileIdentity = FileIdentity { device: 0x801, inode: 0x0009_8765 };

/// The document's vectors by name. Each begins with a line `name:`; its other lines are an offset
/// and up to 16 bytes.
fn document() -> BTreeMap<&'static str, Vec<u8>> {
    let vectors = DOCUMENT.split_once(BEGIN).expect("a beginning of the vectors").1;
    let vectors = vectors.split_once(END).expect("an end of the vectors").0;
    let mut found: BTreeMap<&str, Vec<u8>> = BTreeMap::new();
    let mut current = None;
    for line in vectors.lines().filter(|line| !line.is_empty() && !line.starts_with("```")) {
        if let Some(name) = line.strip_suffix(':') {
            assert!(found.insert(name, Vec::new()).is_none(), "{name} is there twice");
            current = Some(name);
            continue;
        }
        let name = current.expect("a name before the first bytes");
        let bytes = found.get_mut(name).expect("inserted above");
        let (offset, hex) = line.trim().split_once("  ").expect("an offset, then bytes");
        assert_eq!(usize::from_str_radix(offset, 16), Ok(bytes.len()), "offset in {name}");
        for byte in hex.split_whitespace() {
            assert_eq!(byte.len(), 2, "{byte} in {name}");
            bytes.push(u8::from_str_radix(byte, 16).expect("a byte in hex"));
        }
    }
    found
}

fn coordinator_messages() -> Vec<(&'static str, CoordinatorMessage)> {
    use CoordinatorMessage as M;
    let command = |phase, target, lease_ns| {
        M::Command(Command {
            term: TERM,
            epoch: EPOCH,
            phase,
            target,
            budget_ns: 2_000_000_000,
            lease_ns,
        })
    };
    vec![
        (
            "Welcome",
            M::Welcome(Welcome {
                version: 1,
                machine: MACHINE,
                name: "disk0".into(),
                incarnation: 2,
                term: TERM,
                epoch: EPOCH,
                heartbeat_ns: 250_000_000,
                orphan: OrphanPolicy::Keep,
                listener: true,
                log: false,
            }),
        ),
        (
            "Reject",
            M::Reject(Reject {
                versions: VersionRange { min: 1, max: 1 },
                reason: "no common version".into(),
            }),
        ),
        ("Command PrepareStop", command(Phase::PrepareStop, MigrationState::RunningP2p, 0)),
        ("Command Stop", command(Phase::Stop, MigrationState::StopCopy, 4_000_000_000)),
        ("Command PrepareStart", command(Phase::PrepareStart, MigrationState::RunningP2p, 0)),
        ("Command Start", command(Phase::Start, MigrationState::Running, 0)),
        ("Command Save", command(Phase::Save, MigrationState::StopCopy, 0)),
        ("Command Load", command(Phase::Load, MigrationState::Stop, 0)),
        ("Command Reset", command(Phase::Reset, MigrationState::Error, 0)),
        ("Abort", M::Abort(Abort { term: TERM, epoch: EPOCH })),
        ("Query", M::Query(Query { term: TERM, epoch: EPOCH })),
        (
            "Memory",
            M::Memory(MemoryDeclaration {
                term: TERM,
                sequence: 1,
                ram_fds: 2,
                dirty_page_size: 0,
            }),
        ),
        (
            "Memory with bitmaps",
            M::Memory(MemoryDeclaration {
                term: TERM,
                sequence: 1,
                ram_fds: 2,
                dirty_page_size: 4096,
            }),
        ),
        ("Shutdown", M::Shutdown(Shutdown { term: TERM, grace_ns: 1_000_000_000 })),
        ("Revoke", M::Revoke(Revocation { term: TERM, sequence: 2, files: vec![FILE] })),
        ("Untrack", M::Untrack(Untrack { term: TERM })),
        #[cfg(feature = "fault-injection")]
        ("Arm", M::Arm(Arm { term: TERM, faults: faults() })),
    ]
}

#[cfg(feature = "fault-injection")]
fn faults() -> Vec<Fault> {
    let ack = Point::BeforeAck(Phase::Stop);
    vec![
        Fault::new(ack, Action::Forge(Forgery::LowerTerm)).nth(2),
        Fault::new(Point::Receipt(Phase::PrepareStop), Action::Refuse(5)),
        Fault::new(Point::DmaInFlight, Action::DelayMs(1000)).nth(0),
        Fault::new(Point::Shutdown, Action::Exit(7)),
    ]
}

fn device_messages() -> Vec<(&'static str, DeviceMessage)> {
    use DeviceMessage as M;
    let hello = Hello {
        versions: VersionRange { min: 1, max: 1 },
        kind: "copy-engine".into(),
        program_version: "0.1.0".into(),
        capabilities: Capabilities {
            migration: MigrationFlags::STOP_COPY_P2P,
            peer_dma: PeerDma::Possible,
            progress: true,
            dirty_tracking: true,
            fault_injection: false,
        },
        machine: None,
        term: Term(0),
        epoch: Epoch(0),
        state: MigrationState::Running,
        backing_files: 0,
        memory: Vec::new(),
    };
    let reached = Reached {
        term: TERM,
        epoch: EPOCH,
        phase: Phase::PrepareStop,
        state: MigrationState::RunningP2p,
        timings: Timings { total_ns: 90_000, hook_ns: 20_000, drain_ns: 50_000, evidence_ns: 0 },
        evidence: Evidence::default(),
    };
    let evidence = Evidence {
        memory_hash: Some(0x0123_4567_89ab_cdef),
        counters: vec![
            Counter { kind: CounterKind::Written, index: 0, value: 1000 },
            Counter { kind: CounterKind::Received, index: 1, value: 999 },
            Counter { kind: CounterKind::Interrupts, index: 2, value: 7 },
        ],
    };
    let status = Status {
        term: TERM,
        epoch: EPOCH,
        state: MigrationState::Stop,
        client_state: MigrationState::Running,
        moving_to: None,
    };
    let refusal = Refusal { kind: RefusalKind::Drain, text: "2 requests in flight".into() };
    vec![
        ("Hello of a new process", M::Hello(hello.clone())),
        (
            "Hello of a process that was welcomed before",
            M::Hello(Hello {
                capabilities: Capabilities {
                    migration: MigrationFlags::ALL,
                    peer_dma: PeerDma::RamOnly,
                    progress: false,
                    dirty_tracking: false,
                    fault_injection: true,
                },
                machine: Some(MACHINE),
                term: TERM,
                epoch: EPOCH,
                state: MigrationState::PreCopyP2p,
                backing_files: 1,
                memory: vec![FILE],
                ..hello
            }),
        ),
        ("Reached without evidence", M::Reached(reached.clone())),
        (
            "Reached with evidence",
            M::Reached(Reached {
                phase: Phase::Stop,
                state: MigrationState::Stop,
                evidence,
                ..reached
            }),
        ),
        (
            "Refused",
            M::Refused(Refused {
                term: TERM,
                epoch: EPOCH,
                phase: Phase::PrepareStop,
                state: MigrationState::Running,
                refusal,
            }),
        ),
        ("Status at rest", M::Status(status)),
        (
            "Status in the middle of a command",
            M::Status(Status { moving_to: Some(MigrationState::Resuming), ..status }),
        ),
        ("MemoryAccepted", M::MemoryAccepted(MemoryAccepted { sequence: 1 })),
        (
            "Heartbeat",
            M::Heartbeat(Heartbeat { sequence: 5, progress: 4096, pending: true, dropped_logs: 1 }),
        ),
        ("Event ClientConnected", M::Event(DeviceEvent::ClientConnected)),
        ("Event ClientDisconnected", M::Event(DeviceEvent::ClientDisconnected)),
        ("Event ClientState", M::Event(DeviceEvent::ClientState(MigrationState::Stop))),
        ("Event LeaseExpired", M::Event(DeviceEvent::LeaseExpired(MigrationState::RunningP2p))),
        ("Event Failed", M::Event(DeviceEvent::Failed("backing file is gone".into()))),
        ("Event Superseded", M::Event(DeviceEvent::Superseded(TERM))),
    ]
}

fn packet<M: Message>(message: &M) -> Vec<u8> {
    let mut buffer = [0; MAX_PACKET];
    let length = encode(message, VERSION, &mut buffer).expect("a message within its limits");
    buffer[..length].to_vec()
}

/// The vector as the document writes it, for the message of a failing assertion.
fn written(name: &str, bytes: &[u8]) -> String {
    let lines = bytes.chunks(16).enumerate().map(|(line, bytes)| {
        let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        format!("  {:04x}  {}\n", line * 16, hex.join(" "))
    });
    format!("{name}:\n{}", lines.collect::<String>())
}

/// Compares both ways and takes the vector out, so that what remains belongs to nothing.
fn check<M: Message + PartialEq + Debug>(
    messages: &[(&'static str, M)],
    document: &mut BTreeMap<&'static str, Vec<u8>>,
) {
    for (name, message) in messages {
        let encoded = packet(message);
        let bytes = document.remove(name).unwrap_or_default();
        assert!(
            encoded == bytes,
            "docs/protocol.md and the codec differ; document:\n{}codec:\n{}",
            written(name, &bytes),
            written(name, &encoded)
        );
        let decoded = decode::<M>(&bytes, VERSION).expect(name);
        assert_eq!(&decoded, message, "{name}");
    }
}

#[test]
fn every_vector_of_the_document_is_what_the_codec_makes_and_reads() {
    let mut document = document();
    check(&coordinator_messages(), &mut document);
    check(&device_messages(), &mut document);
    if !cfg!(feature = "fault-injection") {
        let arm = document.remove("Arm").expect("a vector of Arm");
        let error = decode::<CoordinatorMessage>(&arm, VERSION).expect_err("an unknown tag");
        assert!(matches!(error, DecodeError::Payload { offset: 12, .. }), "{error:?}");
    }
    assert!(document.is_empty(), "no message here for {:?}", document.keys());
}

#[test]
fn every_message_has_a_vector_and_its_documented_tag() {
    // A variant that is added to a message does not compile here without its tag.
    fn coordinator_tag(message: &CoordinatorMessage) -> u32 {
        match message {
            CoordinatorMessage::Welcome(_) => 0,
            CoordinatorMessage::Reject(_) => 1,
            CoordinatorMessage::Command(_) => 2,
            CoordinatorMessage::Abort(_) => 3,
            CoordinatorMessage::Query(_) => 4,
            CoordinatorMessage::Memory(_) => 5,
            CoordinatorMessage::Shutdown(_) => 6,
            CoordinatorMessage::Revoke(_) => 7,
            CoordinatorMessage::Untrack(_) => 8,
            #[cfg(feature = "fault-injection")]
            CoordinatorMessage::Arm(_) => 9,
        }
    }
    fn device_tag(message: &DeviceMessage) -> u32 {
        match message {
            DeviceMessage::Hello(_) => 0,
            DeviceMessage::Reached(_) => 1,
            DeviceMessage::Refused(_) => 2,
            DeviceMessage::Status(_) => 3,
            DeviceMessage::MemoryAccepted(_) => 4,
            DeviceMessage::Heartbeat(_) => 5,
            DeviceMessage::Event(_) => 6,
        }
    }
    fn tags<M: Message>(messages: Vec<(&str, M)>, tag: fn(&M) -> u32) -> Vec<u32> {
        let mut tags = Vec::new();
        for (name, message) in messages {
            let bytes = packet(&message);
            assert_eq!(bytes[HEADER..HEADER + 4], tag(&message).to_le_bytes(), "tag of {name}");
            tags.push(tag(&message));
        }
        tags.sort_unstable();
        tags.dedup();
        tags
    }
    let last = if cfg!(feature = "fault-injection") { 9 } else { 8 };
    let all: Vec<u32> = (0..=last).collect();
    assert_eq!(tags(coordinator_messages(), coordinator_tag), all);
    assert_eq!(tags(device_messages(), device_tag), [0, 1, 2, 3, 4, 5, 6]);
}

/// The least size of a field whose size is written as `4`, `8 + n`, `1 or 9` or `…`.
fn least(size: &str) -> usize {
    let digits = size.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    if size == "…" { 0 } else { digits.parse().expect("a size begins with a number") }
}

/// The rows of the first table after a heading, cut into cells.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let section = DOCUMENT.split_once(&format!("\n{heading}\n")).expect(heading).1;
    let rows = section.lines().skip_while(|line| !line.starts_with('|'));
    rows.take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|row| row.trim_matches('|').split('|').map(str::trim).collect())
        .collect()
}

/// What the tables say about a message: offsets that follow from the sizes, and the same size of
/// the smallest packet as the list of messages and the codec.
fn check_tables<M: Message>(direction: &str, smallest: &M) {
    let name = smallest.name();
    let listed = table(direction);
    let link = format!("[{name}](#{})", name.to_lowercase());
    let listed = listed.iter().find(|row| row[1] == link).expect("every message is listed");
    let mut end = HEADER + 4;
    let mut total = end;
    for row in table(&format!("### {name}")) {
        let (offset, size) = (row[0], row[1]);
        assert_eq!(offset.trim_start_matches('+').parse(), Ok(end), "{name}, {}", row[2]);
        // What follows a field of variable size counts from that one's end.
        end = if size.parse::<usize>().is_ok() { end + least(size) } else { 0 };
        total += least(size);
    }
    assert_eq!(total, packet(smallest).len(), "sizes of the fields of {name}");
    assert_eq!(least(listed[2]), total, "size of {name} in the list");
}

#[test]
fn the_tables_of_the_document_add_up_to_the_packets() {
    for (_, message) in coordinator_messages() {
        use CoordinatorMessage as M;
        let smallest = match message {
            M::Welcome(welcome) => M::Welcome(Welcome { name: String::new(), ..welcome }),
            M::Reject(reject) => M::Reject(Reject { reason: String::new(), ..reject }),
            // One file is the least that can be revoked, but the table counts from none.
            M::Revoke(_) => continue,
            // The same of a fault, whose size depends on what it is.
            #[cfg(feature = "fault-injection")]
            M::Arm(_) => continue,
            other => other,
        };
        check_tables("## Coordinator to device", &smallest);
    }
    for (_, message) in device_messages() {
        use DeviceMessage as M;
        let smallest = match message {
            M::Hello(hello) => M::Hello(Hello {
                kind: String::new(),
                program_version: String::new(),
                machine: None,
                memory: Vec::new(),
                ..hello
            }),
            M::Reached(reached) => M::Reached(Reached { evidence: Evidence::default(), ..reached }),
            M::Refused(refused) => {
                let refusal = Refusal { text: String::new(), ..refused.refusal };
                M::Refused(Refused { refusal, ..refused })
            }
            M::Status(status) => M::Status(Status { moving_to: None, ..status }),
            M::Event(_) => M::Event(DeviceEvent::ClientConnected),
            other => other,
        };
        check_tables("## Device to coordinator", &smallest);
    }
}

/// Decodes as both directions, under both modes: nothing of it may panic.
fn decode_all(bytes: &[u8]) {
    for version in [0, VERSION] {
        let _ = decode::<CoordinatorMessage>(bytes, version);
        let _ = decode::<DeviceMessage>(bytes, version);
    }
}

#[test]
fn no_vector_cut_short_is_a_message() {
    fn cut<M: Message + Debug>(name: &str, message: &M) {
        let bytes = packet(message);
        for length in 0..bytes.len() {
            decode_all(&bytes[..length]);
            let short = decode::<M>(&bytes[..length], VERSION);
            let expected = match length {
                0 => matches!(short, Err(DecodeError::Empty)),
                1..HEADER => matches!(short, Err(DecodeError::ShortHeader { .. })),
                _ => matches!(short, Err(DecodeError::Payload { .. })),
            };
            assert!(expected, "{name} cut to {length}: {short:?}");
        }
    }
    coordinator_messages().iter().for_each(|(name, message)| cut(name, message));
    device_messages().iter().for_each(|(name, message)| cut(name, message));
}

#[test]
fn a_vector_with_any_one_byte_changed_is_an_error_or_another_message() {
    fn corrupt<M: Message + PartialEq + Debug>(name: &str, message: &M) {
        let good = packet(message);
        for at in 0..good.len() {
            let mut bytes = good.clone();
            for value in 0..=u8::MAX {
                bytes[at] = value;
                decode_all(&bytes);
                if let Ok(decoded) = decode::<M>(&bytes, VERSION) {
                    assert!(at >= HEADER || value == good[at], "{name}: header byte {at}");
                    assert_eq!(decoded == *message, value == good[at], "{name}: byte {at}");
                }
            }
        }
    }
    coordinator_messages().iter().for_each(|(name, message)| corrupt(name, message));
    device_messages().iter().for_each(|(name, message)| corrupt(name, message));
}
