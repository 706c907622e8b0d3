//! Round trips of arbitrary messages, and arbitrary bytes.

#![forbid(unsafe_code)]

use super::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

fn text(limit: usize) -> impl Strategy<Value = String> {
    // Some characters take several bytes: cut back to the limit, which counts bytes.
    vec(any::<char>(), 0..=limit).prop_map(move |characters| {
        let mut text: String = characters.into_iter().collect();
        while text.len() > limit {
            text.pop();
        }
        text
    })
}

fn state() -> impl Strategy<Value = MigrationState> {
    select(MigrationState::ALL.to_vec())
}

fn phase() -> impl Strategy<Value = Phase> {
    use Phase::*;
    select(vec![PrepareStop, Stop, PrepareStart, Start, Save, Load, Reset])
}

fn term() -> impl Strategy<Value = Term> {
    any::<u64>().prop_map(Term)
}

fn epoch() -> impl Strategy<Value = Epoch> {
    any::<u64>().prop_map(Epoch)
}

fn machine() -> impl Strategy<Value = Uuid> {
    any::<u128>().prop_map(Uuid::from_u128)
}

fn versions() -> impl Strategy<Value = VersionRange> {
    (1..=u16::MAX, 1..=u16::MAX).prop_map(|(a, b)| VersionRange { min: a.min(b), max: a.max(b) })
}

fn coordinator_message() -> impl Strategy<Value = CoordinatorMessage> {
    #[cfg(feature = "fault-injection")]
    return prop_oneof![8 => usual_message(), 1 => arm()];
    #[cfg(not(feature = "fault-injection"))]
    usual_message()
}

#[cfg(feature = "fault-injection")]
fn arm() -> impl Strategy<Value = CoordinatorMessage> {
    use crate::fault::{Action, Fault, Forgery, MAX_FAULTS, Packet, Point};
    let point = prop_oneof![
        select(vec![Point::Hello, Point::Query, Point::Memory, Point::Shutdown, Point::Dma]),
        select(vec![Point::Saving, Point::Loading, Point::Mmio, Point::DmaInFlight]),
        phase().prop_map(Point::Receipt),
        phase().prop_map(Point::BeforeAck),
        phase().prop_map(Point::AfterAck),
    ];
    let action = prop_oneof![
        select(vec![Action::Abort, Action::Segv, Action::Stop, Action::Spin, Action::NoAck]),
        select(vec![Action::TwoAcks, Action::Disconnect, Action::KeepDma]),
        any::<u8>().prop_map(Action::Exit),
        any::<i32>().prop_map(Action::Refuse),
        any::<u32>().prop_map(Action::DelayMs),
        any::<u32>().prop_map(Action::FdFlood),
        any::<u32>().prop_map(Action::MessageFlood),
        select(vec![Forgery::LowerTerm, Forgery::State, Forgery::Declaration])
            .prop_map(Action::Forge),
        select(vec![Packet::Garbage, Packet::Empty, Packet::Oversized]).prop_map(Action::Send),
    ];
    let fault = (point, action, any::<u32>())
        .prop_map(|(point, action, nth)| Fault::new(point, action).nth(nth))
        .prop_filter("it can be done there", Fault::is_possible);
    (term(), vec(fault, 1..=MAX_FAULTS))
        .prop_map(|(term, faults)| CoordinatorMessage::Arm(Arm { term, faults }))
}

fn usual_message() -> impl Strategy<Value = CoordinatorMessage> {
    use CoordinatorMessage as M;
    prop_oneof![
        (
            (1..=u16::MAX, machine(), text(MAX_NAME), any::<u64>()),
            (term(), epoch(), any::<u64>()),
            select(vec![OrphanPolicy::Exit, OrphanPolicy::Keep]),
            any::<[bool; 2]>(),
        )
            .prop_map(
                |(
                    (version, machine, name, incarnation),
                    (term, epoch, heartbeat_ns),
                    orphan,
                    [listener, log],
                )| {
                    M::Welcome(Welcome {
                        version,
                        machine,
                        name,
                        incarnation,
                        term,
                        epoch,
                        heartbeat_ns,
                        orphan,
                        listener,
                        log,
                    })
                }
            ),
        (versions(), text(MAX_TEXT))
            .prop_map(|(versions, reason)| M::Reject(Reject { versions, reason })),
        (term(), epoch(), phase(), state(), any::<u64>(), any::<u64>()).prop_map(
            |(term, epoch, phase, target, budget_ns, lease)| {
                let lease_ns = if phase == Phase::Stop { lease } else { 0 };
                M::Command(Command { term, epoch, phase, target, budget_ns, lease_ns })
            }
        ),
        (term(), epoch()).prop_map(|(term, epoch)| M::Abort(Abort { term, epoch })),
        (term(), epoch()).prop_map(|(term, epoch)| M::Query(Query { term, epoch })),
        (term(), any::<u64>(), 1..=16_u8).prop_map(|(term, sequence, ram_fds)| M::Memory(
            MemoryDeclaration { term, sequence, ram_fds, dirty_page_size: 0 }
        )),
        (term(), any::<u64>(), 1..=8_u8, 12..=30_u32).prop_map(
            |(term, sequence, ram_fds, shift)| {
                let dirty_page_size = 1 << shift;
                M::Memory(MemoryDeclaration { term, sequence, ram_fds, dirty_page_size })
            }
        ),
        term().prop_map(|term| M::Untrack(Untrack { term })),
        (term(), any::<u64>())
            .prop_map(|(term, grace_ns)| M::Shutdown(Shutdown { term, grace_ns })),
        (term(), any::<u64>(), vec(file(), 1..=MAX_FILES)).prop_map(|(term, sequence, files)| {
            M::Revoke(Revocation { term, sequence, files })
        }),
    ]
}

fn file() -> impl Strategy<Value = FileIdentity> {
    any::<[u64; 2]>().prop_map(|[device, inode]| FileIdentity { device, inode })
}

fn evidence() -> impl Strategy<Value = Evidence> {
    use CounterKind::*;
    let counter =
        (select(vec![Written, Received, Interrupts, InFlight]), any::<u32>(), any::<u64>())
            .prop_map(|(kind, index, value)| Counter { kind, index, value });
    (option::of(any::<u64>()), vec(counter, 0..=MAX_COUNTERS))
        .prop_map(|(memory_hash, counters)| Evidence { memory_hash, counters })
}

fn refusal() -> impl Strategy<Value = Refusal> {
    use RefusalKind::*;
    (select(vec![NoWay, Busy, Device, Drain, Stream, Unsupported]), text(MAX_TEXT))
        .prop_map(|(kind, text)| Refusal { kind, text })
}

fn any_hello() -> impl Strategy<Value = Hello> {
    let capabilities = (
        select(vec![0_u64, 1, 2, 3, 5, 7]),
        select(vec![PeerDma::Possible, PeerDma::RamOnly]),
        any::<[bool; 3]>(),
    )
        .prop_map(|(flags, peer_dma, [progress, dirty_tracking, fault_injection])| Capabilities {
            migration: MigrationFlags::new(flags).expect("a legal set"),
            peer_dma,
            progress,
            dirty_tracking,
            fault_injection,
        });
    (
        (versions(), text(MAX_NAME), text(MAX_NAME), capabilities),
        (option::of(machine()), term(), epoch(), state(), 0..=16_u8),
        vec(file(), 0..=MAX_FILES),
    )
        .prop_map(
            |(
                (versions, kind, program_version, capabilities),
                (machine, term, epoch, state, backing_files),
                memory,
            )| Hello {
                versions,
                kind,
                program_version,
                capabilities,
                machine,
                term,
                epoch,
                state,
                backing_files,
                memory,
            },
        )
}

fn device_message() -> impl Strategy<Value = DeviceMessage> {
    use DeviceMessage as M;
    prop_oneof![
        any_hello().prop_map(M::Hello),
        (term(), epoch(), phase(), state(), any::<[u64; 4]>(), evidence()).prop_map(
            |(term, epoch, phase, state, [total_ns, hook_ns, drain_ns, evidence_ns], evidence)| {
                let timings = Timings { total_ns, hook_ns, drain_ns, evidence_ns };
                M::Reached(Reached { term, epoch, phase, state, timings, evidence })
            }
        ),
        (term(), epoch(), phase(), state(), refusal()).prop_map(
            |(term, epoch, phase, state, refusal)| {
                M::Refused(Refused { term, epoch, phase, state, refusal })
            }
        ),
        (term(), epoch(), state(), state(), option::of(state())).prop_map(
            |(term, epoch, state, client_state, moving_to)| {
                M::Status(Status { term, epoch, state, client_state, moving_to })
            }
        ),
        any::<u64>().prop_map(|sequence| M::MemoryAccepted(MemoryAccepted { sequence })),
        (any::<[u64; 3]>(), any::<bool>()).prop_map(
            |([sequence, progress, dropped_logs], pending)| {
                M::Heartbeat(Heartbeat { sequence, progress, pending, dropped_logs })
            }
        ),
        prop_oneof![
            Just(DeviceEvent::ClientConnected),
            Just(DeviceEvent::ClientDisconnected),
            state().prop_map(DeviceEvent::ClientState),
            state().prop_map(DeviceEvent::LeaseExpired),
            text(MAX_TEXT).prop_map(DeviceEvent::Failed),
            term().prop_map(DeviceEvent::Superseded),
        ]
        .prop_map(M::Event),
    ]
}

proptest! {
    #[test]
    fn coordinator_messages_round_trip(message in coordinator_message()) {
        let bytes = packet(&message);
        prop_assert_eq!(decode::<CoordinatorMessage>(&bytes, VERSION).unwrap(), message);
    }

    #[test]
    fn device_messages_round_trip(message in device_message()) {
        let bytes = packet(&message);
        prop_assert_eq!(decode::<DeviceMessage>(&bytes, VERSION).unwrap(), message);
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..MAX_PACKET + 16)) {
        let _ = decode::<CoordinatorMessage>(&bytes, VERSION);
        let _ = decode::<DeviceMessage>(&bytes, VERSION);
    }

    /// What decodes at all encodes to the same bytes: no two packets mean the same message.
    #[test]
    fn arbitrary_payloads_decode_to_themselves_or_not_at_all(
        tag in 0..10_u32,
        version in 0..2_u16,
        rest in vec(select(vec![0_u8, 0, 0, 0, 1, 2, 3, 7, 0xff]), 0..160),
    ) {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend([0, 0]);
        bytes.extend(tag.to_le_bytes());
        bytes.extend(rest);
        if let Ok(message) = decode::<CoordinatorMessage>(&bytes, VERSION) {
            prop_assert_eq!(&packet(&message), &bytes);
        }
        if let Ok(message) = decode::<DeviceMessage>(&bytes, VERSION) {
            prop_assert_eq!(&packet(&message), &bytes);
        }
    }
}
