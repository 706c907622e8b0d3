//! Random schedules of all that can happen to a device: every request is done exactly once.

use super::guest::{Guest, Memory, SIZE};
use crate::child::Device;
use fastrand::Rng;
use standstill_protocol::message::Phase;
use standstill_protocol::migration::MigrationState as S;

const QUEUES: usize = 2;

/// Where the coordinator has brought the device, and the frontend its rings.
struct Schedule {
    device: Device,
    /// `None` only while it changes.
    guest: Option<Guest>,
    epoch: u64,
    state: S,
    is_ring_started: [bool; QUEUES],
    pushed: [u16; QUEUES],
}

impl Schedule {
    fn new(script: &str) -> Self {
        let device = Device::welcomed(script);
        let guest = Some(Guest::start(&device.socket(), QUEUES));
        let is_ring_started = [true; QUEUES];
        Self { device, guest, epoch: 0, state: S::Running, is_ring_started, pushed: [0; QUEUES] }
    }

    fn guest(&mut self) -> &mut Guest {
        self.guest.as_mut().unwrap()
    }

    /// One step of the coordinator, forwards or back.
    fn go(&mut self, stops: bool) {
        self.epoch += 1;
        let (phase, target) = match (self.state, stops) {
            (S::Running, true) => (Phase::PrepareStop, S::RunningP2p),
            (S::RunningP2p, true) => (Phase::Stop, S::Stop),
            (S::Stop, false) => (Phase::PrepareStart, S::RunningP2p),
            (S::RunningP2p, false) => (Phase::Start, S::Running),
            _ => return,
        };
        self.device.go(self.epoch, phase, target);
        self.state = target;
    }

    /// A stop that is given up while it goes on, or after it.
    fn give_up(&mut self) {
        if self.state == S::Running {
            self.epoch += 1;
            self.device.command(self.epoch, Phase::PrepareStop, S::RunningP2p);
            self.device.abort(self.epoch);
            self.epoch += 1;
            self.device.command(self.epoch, Phase::Start, S::Running);
            while self.device.reached().state != S::Running {}
        }
    }

    fn push(&mut self, queue: usize) {
        let used = self.guest().memory.used(queue);
        if self.pushed[queue].wrapping_sub(used) < SIZE {
            self.guest().push(queue);
            self.pushed[queue] += 1;
        }
    }

    fn toggle(&mut self, queue: usize) {
        let is_started = self.is_ring_started[queue];
        let guest = self.guest();
        if is_started {
            let base = guest.stop_ring(queue);
            assert_eq!(
                base,
                guest.memory.used(queue),
                "nothing is in flight in a ring that is stopped"
            );
        } else {
            guest.start_ring(queue, guest.memory.used(queue));
        }
        self.is_ring_started[queue] = !is_started;
    }

    fn reconnect(&mut self) {
        let memory: Memory = self.guest.take().unwrap().disconnect();
        self.guest = Some(Guest::connect(&self.device.socket(), memory));
        self.is_ring_started = [false; QUEUES];
    }

    fn step(&mut self, choices: &mut Rng) {
        let queue = choices.usize(..QUEUES);
        match choices.u8(..20) {
            0..=9 => self.push(queue),
            10..=12 => self.go(true),
            13..=15 => self.go(false),
            16 => self.give_up(),
            17 | 18 => self.toggle(queue),
            _ => self.reconnect(),
        }
    }

    /// All runs again: then all is done.
    fn finish(mut self, seed: u64) {
        while self.state != S::Running {
            self.go(false);
        }
        for queue in 0..QUEUES {
            if !self.is_ring_started[queue] {
                self.toggle(queue);
            }
        }
        let pushed = self.pushed;
        (0..QUEUES).for_each(|queue| self.guest().wait_used(queue, pushed[queue]));
        // Each request has the next number: none is there twice, and none is left out.
        let mut numbers: Vec<_> =
            (0..QUEUES).flat_map(|queue| self.guest().memory.numbers(queue)).collect();
        numbers.sort_unstable();
        let all: u32 = pushed.iter().copied().map(u32::from).sum();
        assert!(numbers.into_iter().eq(0..all), "seed {seed}");
        self.device.shut_down();
    }
}

#[test]
fn every_request_is_done_exactly_once_whatever_comes_between() {
    for (seed, script) in [
        "vhost queues:2 in-order",
        "vhost later queues:2 threads in-order",
        "vhost queues:2 threads",
    ]
    .into_iter()
    .cycle()
    .take(12)
    .enumerate()
    {
        let seed = seed as u64;
        let mut choices = Rng::with_seed(seed);
        let mut schedule = Schedule::new(script);
        for _ in 0..150 {
            schedule.step(&mut choices);
        }
        schedule.finish(seed);
    }
}
