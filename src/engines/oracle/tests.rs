//! Every check holds for an honest round, and each can fail by itself.

use super::*;
use crate::engines::pairs::pairs;

const ENGINES: usize = 4;

/// The parts of a round, to be spoiled one at a time.
struct Parts {
    pairs: Vec<Pair>,
    proofs: Vec<Proof>,
    after_stop: Sight,
    before_start: Sight,
    interrupts: Vec<u64>,
}

impl Parts {
    /// A round in which everything stood still.
    fn honest() -> Self {
        let pairs = pairs(ENGINES);
        // A number of its own for each pair, so that a mix-up shows.
        let sequence = |pair: &Pair| 100 * pair.writer as u64 + u64::from(pair.descriptor) + 1;
        let proofs = (0..ENGINES)
            .map(|device| {
                let written = pairs.iter().filter(|p| p.writer == device).map(|p| Counter {
                    kind: CounterKind::Written,
                    index: p.descriptor,
                    value: sequence(p),
                });
                let received = pairs.iter().filter(|p| p.receiver == device).map(|p| Counter {
                    kind: CounterKind::Received,
                    index: p.mailbox,
                    value: sequence(p),
                });
                let raised = [Counter { kind: CounterKind::Interrupts, index: 0, value: 9 }];
                let counters: Vec<_> = written.chain(received).chain(raised).collect();
                let evidence = Evidence { memory_hash: Some(device as u64 + 50), counters };
                Proof { quiet: evidence.clone(), stopped: evidence.clone(), leaving: evidence }
            })
            .collect();
        let sight = Sight {
            mailboxes: pairs.iter().map(sequence).collect(),
            memory: (50..).take(ENGINES).collect(),
            ram: 7,
        };
        Self {
            pairs,
            proofs,
            after_stop: sight.clone(),
            before_start: sight,
            interrupts: vec![0; ENGINES],
        }
    }

    fn check(&self) -> Verdict {
        self.check_of(&self.proofs.iter().cloned().map(Some).collect::<Vec<_>>())
    }

    fn check_of(&self, proofs: &[Option<Proof>]) -> Verdict {
        check(&Round {
            pairs: &self.pairs,
            proofs,
            after_stop: &self.after_stop,
            before_start: &self.before_start,
            interrupts: &self.interrupts,
        })
    }
}

/// Makes one thing of a round wrong.
type Spoil = fn(&mut Parts, Pair);

fn late_after(spoil: impl FnOnce(&mut Parts)) -> Vec<LateWrite> {
    let mut parts = Parts::honest();
    spoil(&mut parts);
    parts.check().late
}

fn add_one(evidence: &mut Evidence, kind: CounterKind, index: u32) {
    let counter =
        evidence.counters.iter_mut().find(|c| (c.kind, c.index) == (kind, index)).unwrap();
    counter.value += 1;
}

#[test]
fn an_honest_round_passes_every_check() {
    let parts = Parts::honest();
    let verdict = parts.check();
    assert_eq!(verdict.late, []);
    // Per pair four places and the writer's own counter, per device two hashes, the eventfd and
    // one interrupt counter, and RAM.
    assert_eq!(verdict.checks, (parts.pairs.len() * 5 + ENGINES * 4 + 1) as u64);
}

#[test]
fn a_writer_that_wrote_after_it_was_quiet_is_seen_at_every_place() {
    // It says 101; everybody finds 102.
    let late = late_after(|parts| {
        let pair = parts.pairs[0];
        for proof in &mut parts.proofs {
            if let Some(counter) = proof
                .quiet
                .counters
                .iter_mut()
                .find(|c| c.kind == CounterKind::Written && c.index == pair.descriptor)
            {
                counter.value -= 1;
            }
        }
    });
    let places = late.iter().filter(|l| matches!(l, LateWrite::Mailbox { .. })).count();
    assert_eq!((late.len(), places), (4 * ENGINES, 4 * ENGINES));
}

#[test]
fn a_mailbox_that_differs_is_seen_at_each_place_by_itself() {
    let pair = pairs(ENGINES)[0];
    let cases: [(Place, Spoil); 4] = [
        (Place::ReceiverStopping, |parts, pair| {
            let evidence = &mut parts.proofs[pair.receiver].stopped;
            add_one(evidence, CounterKind::Received, pair.mailbox);
        }),
        (Place::VmmAfterStop, |parts, _| parts.after_stop.mailboxes[0] += 1),
        (Place::VmmBeforeStart, |parts, _| parts.before_start.mailboxes[0] += 1),
        (Place::ReceiverLeaving, |parts, pair| {
            let evidence = &mut parts.proofs[pair.receiver].leaving;
            add_one(evidence, CounterKind::Received, pair.mailbox);
        }),
    ];
    for (expected, spoil) in cases {
        match late_after(|parts| spoil(parts, pair))[..] {
            [LateWrite::Mailbox { pair: found, place, .. }] => {
                assert_eq!((found, place), (pair, expected));
            }
            ref other => panic!("{expected:?}: {other:?}"),
        }
    }
}

#[test]
fn memory_that_changed_after_the_stop_ack_is_seen() {
    let late = late_after(|parts| parts.proofs[2].stopped.memory_hash = Some(1));
    assert!(matches!(late[..], [LateWrite::MemoryAfterAck { device: 2, .. }]), "{late:?}");
}

#[test]
fn memory_that_changed_while_stopped_is_seen() {
    let late = late_after(|parts| parts.before_start.memory[1] += 1);
    assert!(matches!(late[..], [LateWrite::MemoryWhileStopped { device: 1, .. }]), "{late:?}");
}

#[test]
fn ram_that_changed_while_stopped_is_seen() {
    let late = late_after(|parts| parts.before_start.ram = 8);
    assert_eq!(late, [LateWrite::Ram { before: 7, after: 8 }]);
}

#[test]
fn an_interrupt_while_stopped_is_seen() {
    let late = late_after(|parts| parts.interrupts[3] = 1);
    assert_eq!(late, [LateWrite::Interrupt { device: 3, count: Some(1) }]);
}

#[test]
fn a_counter_that_moved_while_stopped_is_seen() {
    for kind in [CounterKind::Interrupts, CounterKind::Written] {
        let late = late_after(|parts| add_one(&mut parts.proofs[0].leaving, kind, 0));
        assert!(
            matches!(late[..], [LateWrite::Counter { device: 0, kind: found, index: 0, .. }] if found == kind),
            "{late:?}"
        );
    }
}

#[test]
fn missing_evidence_is_a_failed_check() {
    let pair = pairs(ENGINES)[0];
    let late = late_after(|parts| parts.proofs[pair.writer].quiet = Evidence::default());
    let of_writer = pairs(ENGINES).iter().filter(|p| p.writer == pair.writer).count();
    assert_eq!(late.len(), 4 * of_writer);

    let late = late_after(|parts| parts.proofs[0].stopped.memory_hash = None);
    assert!(matches!(late[..], [LateWrite::MemoryAfterAck { device_hash: None, .. }]), "{late:?}");

    let late = late_after(|parts| {
        parts.proofs.pop();
    });
    assert!(!late.is_empty());

    let late = late_after(|parts| parts.interrupts.clear());
    assert_eq!(late.len(), ENGINES);
}

#[test]
fn who_took_no_part_is_not_checked_and_all_others_are() {
    let parts = Parts::honest();
    let mut proofs: Vec<_> = parts.proofs.iter().cloned().map(Some).collect();
    proofs[2] = None;
    let verdict = parts.check_of(&proofs);
    assert_eq!(verdict.late, []);
    let left = parts.pairs.iter().filter(|p| p.writer != 2 && p.receiver != 2).count();
    // As above; the counters of those who are left are all their own.
    let written = parts.pairs.iter().filter(|p| p.writer != 2).count();
    assert_eq!(verdict.checks, (left * 4 + written + (ENGINES - 1) * 4 + 1) as u64);
    if let Some(proof) = &mut proofs[0] {
        proof.stopped.memory_hash = Some(1);
    }
    let late = parts.check_of(&proofs).late;
    assert!(matches!(late[..], [LateWrite::MemoryAfterAck { device: 0, .. }]), "{late:?}");
}

#[test]
fn a_missing_value_never_equals_another_missing_value() {
    let late = late_after(|parts| {
        for proof in &mut parts.proofs {
            *proof = Proof::default();
        }
        parts.after_stop = Sight { ram: 7, ..Sight::default() };
        parts.before_start = Sight { ram: 7, ..Sight::default() };
    });
    assert_eq!(late.len(), pairs(ENGINES).len() * 4 + ENGINES * 2);
}

#[test]
fn a_late_write_is_told_in_words_with_names_and_numbers() {
    let pair = Pair { writer: 3, receiver: 4, descriptor: 0, mailbox: 1 };
    let late =
        LateWrite::Mailbox { pair, place: Place::ReceiverLeaving, written: Some(81), found: None };
    assert_eq!(
        late.to_string(),
        "engine3 had written 81 to engine4 when it said that it is quiet, engine4 has nothing in \
         its mailbox when it left STOP"
    );
}
