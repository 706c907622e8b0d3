//! The kit's frontend and driver as these tests use them: whatever fails there fails the test.

use crate::child::{PATIENCE, until};
use fastrand::Rng;
use standstill_testkit::vhost_user::{
    Base, BlockAnswer, BlockRequest, BlockStatus, Completion, DirtyLog, Frontend, FrontendOptions,
    Part, RequestId, RingLayout, VhostUserError,
};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vm_memory::{Bytes, GuestAddress};

/// Descriptors of each ring.
const SIZE: u16 = 16;
/// Size of the buffer of each, in bytes.
const BUFFER: u32 = 4096;

/// The memory of a guest, with its rings: what stays when device and frontend go.
pub(crate) struct Memory {
    guest: standstill_testkit::vhost_user::Guest,
    /// All answers so far, by queue and by the place of their request in the order of pushing.
    answers: Vec<Vec<Option<Completion>>>,
}

impl Memory {
    pub(crate) fn new(queues: usize) -> Self {
        let layout = RingLayout { descriptors: SIZE, buffer: BUFFER };
        let guest = standstill_testkit::vhost_user::Guest::with_layout(queues, layout).unwrap();
        Self { guest, answers: vec![Vec::new(); queues] }
    }

    /// A copy, as a migration makes one.
    pub(crate) fn copy(&self) -> Self {
        Self { guest: self.guest.copy().unwrap(), answers: self.answers.clone() }
    }

    pub(crate) fn file(&self) -> &File {
        self.guest.file()
    }

    /// Puts one more request into a ring: 64 bytes, for the device to write. Answers are taken first, so
    /// that there is room.
    pub(crate) fn push(&mut self, queue: usize) {
        self.take(queue);
        self.guest.push(queue, &[Part::Writable(64)]).unwrap();
    }

    /// Puts one more request of a block device into a ring.
    pub(crate) fn push_block(&mut self, queue: usize, request: &BlockRequest) {
        self.take(queue);
        self.guest.push_block(queue, request).unwrap();
    }

    /// How many descriptors are free.
    pub(crate) fn room(&mut self, queue: usize) -> usize {
        self.take(queue);
        self.guest.room(queue).unwrap()
    }

    /// Whether a request is answered, by its place in the order of pushing.
    pub(crate) fn is_answered(&mut self, queue: usize, request: usize) -> bool {
        self.take(queue);
        self.answers[queue].get(request).is_some_and(Option::is_some)
    }

    fn take(&mut self, queue: usize) {
        let answers = self.guest.take_answers(queue).unwrap();
        self.keep(answers);
    }

    fn keep(&mut self, answers: Vec<Completion>) {
        for answer in answers {
            let RequestId { queue, number } = answer.request;
            let number = usize::try_from(number).unwrap();
            let all = &mut self.answers[queue];
            if all.len() <= number {
                all.resize(number + 1, None);
            }
            assert_eq!(all[number].replace(answer), None, "each is answered once");
        }
    }

    /// The answer to a request, by its place in the order of pushing.
    fn answer(&mut self, queue: usize, request: usize) -> Completion {
        self.take(queue);
        let answer = self.answers[queue].get(request).cloned().flatten();
        answer.unwrap_or_else(|| panic!("request {request} of queue {queue} is not answered"))
    }

    /// The number in the buffer of a request.
    pub(crate) fn number(&mut self, queue: usize, request: usize) -> u32 {
        let answer = self.answer(queue, request);
        u32::from_le_bytes(answer.data[0][..4].try_into().unwrap())
    }

    /// The numbers of all requests that were answered.
    pub(crate) fn numbers(&mut self, queue: usize) -> Vec<u32> {
        let all = self.answers[queue].len();
        (0..all).map(|request| self.number(queue, request)).collect()
    }

    /// How a request of a block device has ended, and what it has read.
    pub(crate) fn block(&mut self, queue: usize, request: usize) -> (BlockStatus, Vec<u8>) {
        let answer = BlockAnswer::of(self.answer(queue, request)).unwrap();
        (answer.status, answer.data)
    }

    /// As if the device had used a ring that far.
    pub(crate) fn set_used(&self, queue: usize, used: u16) {
        let at = GuestAddress(self.guest.place(queue).unwrap().used + 2);
        self.guest.memory().store(used, at, Ordering::Release).unwrap();
    }

    /// How far the device has used a ring.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        self.guest.used(queue).unwrap()
    }

    /// Writes anything to some place of the rings.
    pub(crate) fn scribble(&self, random: &mut Rng) {
        let place = self.guest.place(random.usize(..self.guest.queues())).unwrap();
        let parts = [place.descriptors, place.avail, place.used, place.buffers];
        let at = GuestAddress(parts[random.usize(..4)] + random.u64(..64));
        self.guest.memory().write_slice(&random.u32(..).to_le_bytes(), at).unwrap();
    }

    /// Where the memory is, as frontends say it.
    pub(crate) fn address(&self) -> u64 {
        use vm_memory::GuestMemoryBackend;
        self.guest.memory().get_host_address(GuestAddress(0)).unwrap() as u64
    }
}

/// A frontend, connected.
pub(crate) struct Guest {
    pub(crate) frontend: Frontend,
    pub(crate) memory: Memory,
}

impl Guest {
    /// Connects, and starts no ring yet.
    pub(crate) fn connect(socket: &Path, memory: Memory) -> Self {
        Self::connect_with(socket, memory, 0)
    }

    /// The same, for a driver that takes these features if they are offered.
    pub(crate) fn connect_with(socket: &Path, memory: Memory, takes: u64) -> Self {
        let options = FrontendOptions { takes, deadline: PATIENCE, ..FrontendOptions::default() };
        let frontend = Frontend::connect_with(socket, &memory.guest, &options).unwrap();
        Self { frontend, memory }
    }

    /// Connects and starts all rings, from the beginning.
    pub(crate) fn start(socket: &Path, queues: usize) -> Self {
        let mut guest = Self::connect(socket, Memory::new(queues));
        for queue in 0..queues {
            guest.start_ring(queue, 0);
        }
        guest
    }

    /// The connection itself, for what no frontend says.
    pub(crate) fn stream(&self) -> &UnixStream {
        self.frontend.stream()
    }

    /// One call of the crate's frontend, within the deadline.
    pub(crate) fn ask<T>(
        &mut self,
        call: impl FnOnce(&mut vhost::vhost_user::Frontend) -> Result<T, vhost::Error>,
    ) -> Result<T, VhostUserError> {
        self.frontend.call("a call of a test", call)
    }

    pub(crate) fn offered(&mut self) -> (u64, VhostUserProtocolFeatures) {
        let features = self.frontend.offered_features().unwrap();
        (features, self.frontend.offered_protocol_features().unwrap())
    }

    /// Starts a ring at an index.
    pub(crate) fn start_ring(&mut self, queue: usize, base: u16) {
        self.frontend.start_ring(&mut self.memory.guest, queue, Base::At(base)).unwrap();
    }

    /// The same in two halves: in between it is ready, and not enabled.
    pub(crate) fn set_up_ring(&mut self, queue: usize, base: u16) {
        self.frontend.set_up_ring(&mut self.memory.guest, queue, Base::At(base)).unwrap();
    }

    pub(crate) fn enable_ring(&mut self, queue: usize) {
        self.frontend.enable_ring(queue, true).unwrap();
    }

    /// Starts all rings where they are, after a reset.
    pub(crate) fn start_again(&mut self) {
        self.frontend.accept(self.frontend.accepted()).unwrap();
        self.frontend.start_rings(&mut self.memory.guest, Base::Used).unwrap();
    }

    /// Stops a ring; where it was.
    pub(crate) fn stop_ring(&mut self, queue: usize) -> u16 {
        self.frontend.stop_ring(queue).unwrap()
    }

    /// Has the pages logged that the device writes.
    pub(crate) fn log_dirty(&mut self) -> DirtyLog {
        let log = DirtyLog::new(&self.memory.guest).unwrap();
        self.frontend.log_dirty(&log).unwrap();
        log
    }

    pub(crate) fn config(&mut self) -> Vec<u8> {
        self.frontend.config(0, 8).unwrap()
    }

    pub(crate) fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), VhostUserError> {
        self.frontend.set_config(offset, data)
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.memory.guest.kick(queue).unwrap();
    }

    /// Kicks as a driver does: if the device wants it.
    pub(crate) fn notify(&mut self, queue: usize) {
        self.memory.guest.notify(queue).unwrap();
    }

    /// Puts one more request into a ring, and kicks.
    pub(crate) fn push(&mut self, queue: usize) {
        self.memory.push(queue);
        self.kick(queue);
    }

    /// As [`push`](Self::push), for a block device.
    pub(crate) fn push_block(&mut self, queue: usize, request: &BlockRequest) {
        self.memory.push_block(queue, request);
        self.kick(queue);
    }

    /// Waits, as a guest does, for signals until the device has used a ring that far.
    pub(crate) fn wait_used(&mut self, queue: usize, used: u16) {
        self.memory.take(queue);
        let pushed = self.memory.guest.avail(queue).unwrap();
        let outstanding = self.memory.guest.outstanding(queue).unwrap();
        let left = usize::from(pushed.wrapping_sub(used));
        let answers = self.memory.guest.wait(queue, outstanding.saturating_sub(left), PATIENCE);
        self.memory.keep(answers.unwrap());
        assert_eq!(self.memory.used(queue), used);
    }

    /// Returns once the device has seen all kicks of a ring so far, and has come back for another.
    pub(crate) fn settle(&self, queue: usize) {
        for _ in 0..2 {
            self.kick(queue);
            until("the kick is seen", || !self.memory.guest.has_kick(queue).unwrap());
        }
    }

    /// Whether the device has signalled since this was asked last.
    pub(crate) fn was_signalled(&self, queue: usize) -> bool {
        self.memory.guest.was_signalled(queue).unwrap()
    }

    /// The frontend goes; the guest's memory stays.
    pub(crate) fn disconnect(self) -> Memory {
        self.memory
    }
}
