//! What the devices of the schedules are given to do, and what must come of it.

use super::super::disk::Image;
use super::super::guest::Guest;
use fastrand::Rng;
use standstill_testkit::vhost_user::{BlockRequest, BlockStatus};
use std::collections::BTreeMap;

/// How many blocks of a disk each queue has.
const BLOCKS: u64 = 8;
/// Size of a block: what direct I/O needs at most.
const BLOCK: usize = 4096;
/// The same in sectors.
const SECTORS: u32 = 8;

/// Which device it is.
pub(crate) struct Kind {
    script: String,
    /// The image, if it is a disk.
    image: Option<Image>,
}

impl Kind {
    pub(crate) fn numbers(script: &str) -> Self {
        Self { script: script.to_owned(), image: None }
    }

    pub(crate) fn disk(more: &str) -> Self {
        let image = Image::of(4 * BLOCKS * BLOCK as u64);
        Self { script: image.script(more), image: Some(image) }
    }

    pub(crate) fn script(&self) -> &str {
        &self.script
    }

    pub(crate) fn queues(&self) -> usize {
        let word = self.script.split_whitespace().find_map(|word| word.strip_prefix("queues:"));
        word.unwrap().parse().unwrap()
    }

    /// Whether what a dead one has left is done by the next one. (The numbers of the others are told by one
    /// process alone.)
    pub(crate) fn can_be_killed(&self) -> bool {
        self.image.is_some()
    }

    /// Whether a frontend may start a ring at its available index, as Cloud Hypervisor does.
    pub(crate) fn is_in_order(&self) -> bool {
        self.image.is_some() || self.script.contains("in-order")
    }

    /// What the device writes to besides guest memory.
    pub(crate) fn image(&self) -> Vec<u8> {
        self.image.as_ref().map(Image::bytes).unwrap_or_default()
    }
}

/// The requests of one schedule.
pub(crate) struct Work<'a> {
    kind: &'a Kind,
    /// By block of a disk: what is in it, and the request that is under way there.
    blocks: BTreeMap<u64, (u8, Option<Begun>)>,
    pushed: Vec<u16>,
}

/// A request of a disk that is not looked at yet.
struct Begun {
    queue: usize,
    request: usize,
    writes: Option<u8>,
    reads: bool,
}

impl<'a> Work<'a> {
    pub(crate) fn new(kind: &'a Kind) -> Self {
        let image = kind.image();
        let blocks = image.chunks(BLOCK).map(|block| (block[0], None));
        Self { kind, blocks: (0..).zip(blocks).collect(), pushed: vec![0; kind.queues()] }
    }

    pub(crate) fn pushed(&self, queue: usize) -> u16 {
        self.pushed[queue]
    }

    /// One more request, if there is room; the device is not told.
    pub(crate) fn push(&mut self, guest: &mut Guest, queue: usize, choices: &mut Rng) {
        if self.kind.image.is_none() {
            if guest.memory.room(queue) > 0 {
                guest.memory.push(queue);
                self.pushed[queue] += 1;
            }
            return;
        }
        // Requests for one block at the same time may be done in any order.
        self.look(guest);
        let block = queue as u64 * BLOCKS + choices.u64(..BLOCKS);
        let (byte, under_way) = self.blocks.get_mut(&block).unwrap();
        let sector = block * u64::from(SECTORS);
        let (request, writes, reads) = match choices.u8(..8) {
            0..=3 => {
                let byte = byte.wrapping_add(1);
                (BlockRequest::Write { sector, data: vec![byte; BLOCK] }, Some(byte), false)
            }
            4 => (
                BlockRequest::WriteZeroes { sector, sectors: SECTORS, unmap: false },
                Some(0),
                false,
            ),
            5 => (BlockRequest::Flush, None, false),
            _ => (BlockRequest::Read { sector, length: BLOCK }, None, true),
        };
        if under_way.is_some() || guest.memory.room(queue) < request.parts(BLOCK) {
            return;
        }
        guest.memory.push_block(queue, &request);
        let request = usize::from(self.pushed[queue]);
        *under_way = Some(Begun { queue, request, writes, reads });
        self.pushed[queue] += 1;
    }

    /// Looks at the answers that have come.
    fn look(&mut self, guest: &mut Guest) {
        for (block, (byte, under_way)) in &mut self.blocks {
            let begun =
                under_way.take_if(|begun| guest.memory.is_answered(begun.queue, begun.request));
            let Some(Begun { queue, request, writes, reads }) = begun else { continue };
            let (status, data) = guest.memory.block(queue, request);
            assert_eq!(status, BlockStatus::Ok, "request {request} of queue {queue}");
            assert!(!reads || data == [*byte; BLOCK], "block {block}: {} is not {byte}", data[0]);
            *byte = writes.unwrap_or(*byte);
        }
    }

    /// All is answered: everything was done, and once.
    pub(crate) fn check(&mut self, guest: &mut Guest, first_number: u32) -> u32 {
        if self.kind.image.is_some() {
            self.look(guest);
            assert!(self.blocks.values().all(|(_, under_way)| under_way.is_none()));
            let image = self.kind.image();
            for ((byte, _), (block, found)) in
                self.blocks.values().zip(image.chunks(BLOCK).enumerate())
            {
                assert!(found.iter().all(|found| found == byte), "block {block} of the image");
            }
            return first_number;
        }
        // Each request has the next number: none is there twice, and none is left out.
        let numbers = (0..self.pushed.len()).flat_map(|queue| guest.memory.numbers(queue));
        let mut numbers: Vec<_> = numbers.collect();
        numbers.sort_unstable();
        let next = first_number + self.pushed.iter().copied().map(u32::from).sum::<u32>();
        assert!(numbers.into_iter().eq(first_number..next));
        next
    }
}
