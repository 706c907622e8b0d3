//! Who writes into whose memory.

/// One engine that writes into another's memory. The order matters: the way back is another pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    /// The engine that writes.
    pub(crate) writer: usize,
    /// The engine that is written into.
    pub(crate) receiver: usize,
    /// Which of the writer's descriptors does it, from 0.
    pub(crate) descriptor: u32,
    /// Which of the receiver's mailboxes it writes, from 0.
    pub(crate) mailbox: u32,
}

/// The most receivers that one engine writes to.
pub(crate) const MAX_RECEIVERS: usize = 4;

/// The pairs of a machine of `engines` engines, ordered by writer and descriptor: each engine
/// writes to both of its neighbours on a ring, to the one opposite, and to one that is elsewhere
/// for each.
pub(crate) fn pairs(engines: usize) -> Vec<Pair> {
    let mut mailboxes = vec![0; engines];
    let mut pairs = Vec::with_capacity(engines * MAX_RECEIVERS);
    for writer in 0..engines {
        let steps = [writer + 1, writer + engines - 1, writer + engines / 2, 3 * writer + 1];
        let mut receivers: Vec<usize> = Vec::with_capacity(MAX_RECEIVERS);
        for receiver in steps.map(|step| step % engines) {
            if receiver != writer && !receivers.contains(&receiver) {
                receivers.push(receiver);
            }
        }
        for (descriptor, receiver) in (0..).zip(receivers) {
            let Some(mailbox) = mailboxes.get_mut(receiver) else { continue };
            pairs.push(Pair { writer, receiver, descriptor, mailbox: *mailbox });
            *mailbox += 1;
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn every_ordered_pair_of_neighbours_is_there_and_some_across() {
        for engines in 2..=256 {
            let pairs = pairs(engines);
            let has = |writer, receiver| {
                pairs.iter().any(|p| (p.writer, p.receiver) == (writer, receiver))
            };
            for engine in 0..engines {
                let next = (engine + 1) % engines;
                assert!(has(engine, next) && has(next, engine), "{engines} engines, {engine}");
                assert!(engines < 4 || has(engine, (engine + engines / 2) % engines));
            }
        }
    }

    #[test]
    fn no_engine_writes_to_itself_or_twice_to_the_same_one() {
        for engines in 2..=256 {
            let pairs = pairs(engines);
            let unique: HashSet<_> = pairs.iter().map(|p| (p.writer, p.receiver)).collect();
            assert_eq!(unique.len(), pairs.len(), "{engines} engines");
            assert!(pairs.iter().all(|p| p.writer != p.receiver));
        }
    }

    #[test]
    fn no_two_pairs_share_a_descriptor_or_a_mailbox_and_none_is_left_out() {
        for engines in 2..=256 {
            let pairs = pairs(engines);
            for engine in 0..engines {
                let mut descriptors: Vec<_> =
                    pairs.iter().filter(|p| p.writer == engine).map(|p| p.descriptor).collect();
                let mut mailboxes: Vec<_> =
                    pairs.iter().filter(|p| p.receiver == engine).map(|p| p.mailbox).collect();
                descriptors.sort_unstable();
                mailboxes.sort_unstable();
                assert!((0..).zip(&descriptors).all(|(expected, found)| expected == *found));
                assert!((0..).zip(&mailboxes).all(|(expected, found)| expected == *found));
                assert!(descriptors.len() <= MAX_RECEIVERS);
                assert!(mailboxes.len() <= 6, "{engines} engines: {}", mailboxes.len());
            }
        }
    }
}
