//! Plays schedules on a device process.

use super::super::guest::{Guest, Memory};
use super::work::{Kind, Work};
use crate::child::{Device, wait};
use fastrand::Rng;
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, MemoryDeclaration, Phase, Term,
};
use standstill_protocol::migration::MigrationState as S;
use standstill_testkit::vhost_user::EVENT_IDX;
use std::os::fd::AsFd;

/// How many guests one device process is told of: a file that is RAM stays RAM.
const MOST_FILES: u64 = 50;

/// What was seen, over all schedules.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Times that a ring had something in it when a device was started that was stopped.
    pub(crate) waited: u64,
    /// Times that something was in flight when a stop came.
    pub(crate) late: u64,
}

/// Where the coordinator has brought the device, and the frontend its rings.
pub(crate) struct Player<'a> {
    kind: &'a Kind,
    device: Device,
    epoch: u64,
    declared: u64,
    state: S,
    next_number: u32,
    seen: Seen,
}

/// One schedule.
struct Schedule<'p, 'a> {
    player: &'p mut Player<'a>,
    work: Work<'a>,
    choices: Rng,
    /// `None` only while it changes.
    guest: Option<Guest>,
    is_ring_started: Vec<bool>,
    /// Where each ring was started, if that was at its available index.
    said: Vec<Option<u16>>,
    /// Features that the driver takes.
    takes: u64,
    is_ram: bool,
    /// Used rings and image as they were when the device stood.
    still: Option<(Vec<u16>, Vec<u8>)>,
}

impl<'a> Player<'a> {
    pub(crate) fn new(kind: &'a Kind) -> Self {
        let device = Device::welcomed(kind.script());
        let (epoch, declared, next_number) = (0, 0, 0);
        let (state, seen) = (S::Running, Seen::default());
        Self { kind, device, epoch, declared, state, next_number, seen }
    }

    /// Plays one schedule, to its good end: all is answered, and the device runs.
    pub(crate) fn play(&mut self, seed: u64, steps: usize) {
        let mut choices = Rng::with_seed(seed);
        let queues = self.kind.queues();
        // A disk knows what to do with it; the others do not.
        let takes = if self.kind.can_be_killed() && choices.bool() { EVENT_IDX } else { 0 };
        let is_ram = choices.bool();
        let memory = Memory::new(queues);
        if self.declared == MOST_FILES {
            self.renew();
        }
        if is_ram {
            self.declare(&memory);
        }
        let guest = Guest::connect_with(&self.device.socket(), memory, takes);
        let mut schedule = Schedule {
            work: Work::new(self.kind),
            player: self,
            choices,
            guest: Some(guest),
            is_ring_started: vec![false; queues],
            said: vec![None; queues],
            takes,
            is_ram,
            still: None,
        };
        (0..queues).for_each(|queue| schedule.toggle(queue));
        for _ in 0..steps {
            schedule.step();
        }
        schedule.finish();
    }

    /// Another process, which runs.
    fn renew(&mut self) {
        self.device = Device::welcomed(self.kind.script());
        (self.epoch, self.state) = (0, S::Running);
        (self.declared, self.next_number) = (0, 0);
    }

    /// Declares that guest's memory RAM.
    fn declare(&mut self, memory: &Memory) {
        self.declared += 1;
        let declaration = MemoryDeclaration {
            term: Term(1),
            sequence: self.declared,
            ram_fds: 1,
            dirty_page_size: 0,
        };
        let message = CoordinatorMessage::Memory(declaration);
        self.device.send_with(&message, &[memory.file().as_fd()]);
        assert!(matches!(self.device.answer(), DeviceMessage::MemoryAccepted(_)));
    }

    pub(crate) fn end(self) -> Seen {
        self.device.shut_down();
        self.seen
    }
}

impl Schedule<'_, '_> {
    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().unwrap()
    }

    fn queues(&self) -> usize {
        self.is_ring_started.len()
    }

    fn step(&mut self) {
        let queue = self.choices.usize(..self.queues());
        match self.choices.u8(..32) {
            0..=13 => self.push(queue),
            14..=18 => self.go(true),
            19..=23 => self.go(false),
            24 | 25 => self.give_up(),
            26 | 27 => self.toggle(queue),
            28 => self.blink(queue),
            29 | 30 => self.reconnect(),
            _ => self.kill(),
        }
    }

    /// Some requests, of which the device is told as a driver does it.
    fn push(&mut self, queue: usize) {
        let guest = self.guest.as_mut().unwrap();
        for _ in 0..self.choices.u8(1..4) {
            self.work.push(guest, queue, &mut self.choices);
        }
        guest.notify(queue);
    }

    /// What others do at the same time.
    fn meanwhile(&mut self) {
        for _ in 0..self.choices.u8(..3) {
            let queue = self.choices.usize(..self.queues());
            match self.choices.u8(..8) {
                0 => self.toggle(queue),
                1 => self.blink(queue),
                _ => self.push(queue),
            }
        }
    }

    /// One step of the coordinator, forwards or back.
    fn go(&mut self, stops: bool) {
        let (phase, target) = match (self.player.state, stops) {
            (S::Running, true) => (Phase::PrepareStop, S::RunningP2p),
            (S::RunningP2p, true) => (Phase::Stop, S::Stop),
            (S::Stop, false) => (Phase::PrepareStart, S::RunningP2p),
            (S::RunningP2p, false) => (Phase::Start, S::Running),
            _ => return,
        };
        if phase == Phase::Start {
            self.starts();
        }
        let used = self.used();
        self.player.epoch += 1;
        self.player.device.command(self.player.epoch, phase, target);
        self.meanwhile();
        assert_eq!(self.player.device.reached().state, target);
        self.player.state = target;
        if phase == Phase::PrepareStop && used != self.used() {
            self.player.seen.late += 1;
        }
        // What is in flight in RAM may end until the second step.
        let is_still = phase == Phase::Stop || phase == Phase::PrepareStop && !self.is_ram;
        if is_still && self.still.is_none() {
            self.still = Some((self.used(), self.player.kind.image()));
        }
    }

    /// The device is to start: until now nothing has moved.
    fn starts(&mut self) {
        let Some((used, image)) = self.still.take() else { return };
        let now = self.used();
        assert_eq!(now, used, "used rings have moved while the device was stopped");
        assert!(self.player.kind.image() == image, "the image has changed while it was stopped");
        let waits = |(queue, used): (usize, &u16)| self.work.pushed(queue) != *used;
        self.player.seen.waited += u64::from(now.iter().enumerate().any(waits));
    }

    fn used(&mut self) -> Vec<u16> {
        let queues = self.queues();
        let guest = self.guest();
        (0..queues).map(|queue| guest.memory.used(queue)).collect()
    }

    /// A stop that is given up while it goes on, or after it.
    fn give_up(&mut self) {
        if self.player.state != S::Running {
            return;
        }
        self.player.epoch += 1;
        let epoch = self.player.epoch;
        self.player.device.command(epoch, Phase::PrepareStop, S::RunningP2p);
        self.meanwhile();
        self.player.device.abort(epoch);
        self.meanwhile();
        self.player.epoch += 1;
        self.player.device.command(epoch + 1, Phase::Start, S::Running);
        while self.player.device.reached().state != S::Running {}
    }

    /// The frontend stops a ring, or starts it.
    fn toggle(&mut self, queue: usize) {
        let is_started = self.is_ring_started[queue];
        let from_avail = self.player.kind.is_in_order() && self.choices.bool();
        let pushed = self.work.pushed(queue);
        let guest = self.guest();
        if is_started {
            let base = guest.stop_ring(queue);
            let used = guest.memory.used(queue);
            // One that the device has not yet looked into is where the frontend has said.
            let is_said = Some(base) == self.said[queue];
            assert!(base == used || is_said, "{base} is not {used}: something is in flight");
        } else {
            let base = if from_avail { pushed } else { guest.memory.used(queue) };
            guest.start_ring(queue, base);
            self.said[queue] = from_avail.then_some(base);
        }
        self.is_ring_started[queue] = !is_started;
    }

    /// The frontend has the kicks of a ring not looked at, for a while.
    fn blink(&mut self, queue: usize) {
        if self.is_ring_started[queue] {
            self.guest().frontend.enable_ring(queue, false).unwrap();
            self.push(queue);
            self.guest().frontend.enable_ring(queue, true).unwrap();
        }
    }

    fn reconnect(&mut self) {
        let memory = self.guest.take().unwrap().disconnect();
        self.connect(memory);
    }

    fn connect(&mut self, memory: Memory) {
        let socket = self.player.device.socket();
        self.guest = Some(Guest::connect_with(&socket, memory, self.takes));
        self.is_ring_started.fill(false);
    }

    /// The process is killed, and another one is there, which runs.
    fn kill(&mut self) {
        let kind = self.player.kind;
        if !kind.can_be_killed() {
            return;
        }
        let process = &mut self.player.device.process;
        process.kill().unwrap();
        wait(process);
        let memory = self.guest.take().unwrap().disconnect();
        self.player.renew();
        self.still = None;
        if self.is_ram {
            self.player.declare(&memory);
        }
        self.connect(memory);
    }

    /// All runs again: then all is done.
    fn finish(mut self) {
        while self.player.state != S::Running {
            self.go(false);
        }
        for queue in 0..self.queues() {
            if !self.is_ring_started[queue] {
                self.toggle(queue);
            }
            let pushed = self.work.pushed(queue);
            self.guest().wait_used(queue, pushed);
        }
        let guest = self.guest.as_mut().unwrap();
        let next = self.work.check(guest, self.player.next_number);
        self.player.next_number = next;
    }
}
