//! What a device has to itself while a ring of it is started, such as the lock of its image.
//!
//! Somebody else may have it when a ring is started: in a migration the device at the other end has it
//! until its own rings have come to their end. Then nothing is popped ([`Hold::Unclaimed`]) and all else
//! goes on: the frontend is answered, the machine stops and starts, the ring can be stopped again. A
//! thread asks again and again, and kicks the rings when it has got it.
//!
//! It is given back when the last ring was stopped and nothing is in flight. So whoever has it is alone
//! with what it stands for, also beside a process that was killed, if the kernel keeps it for what is in
//! flight.

#![forbid(unsafe_code)]

use super::Backend;
use super::core::Core;
use super::pop_gate::{Hold, PopGate};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// The thread asks again after this long, then after twice as long: the guest waits as well.
const FIRST_REST: Duration = Duration::from_micros(500);
const LONGEST_REST: Duration = Duration::from_millis(10);

/// How something is claimed that only one process can have.
pub(crate) trait Claim: Send + Sync + 'static {
    /// Takes it if nobody else has it now. Never waits.
    fn try_take(&self) -> io::Result<bool>;

    /// Gives it back; nothing is in flight.
    fn give_back(&self);

    /// What it is and who has it, as far as that is known, for the log.
    fn describe(&self) -> String;
}

/// What is decided without doing anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// Nobody wants it.
    #[default]
    Free,
    /// A ring is started, and somebody else has it.
    Waits,
    Held,
}

/// What follows from a ring that was started or stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Nothing,
    Take,
    GiveBack,
}

impl Standing {
    /// A ring was started, and maybe stopped again before this is looked at.
    fn started(self, any_started: bool) -> Step {
        if self == Self::Free && any_started { Step::Take } else { Step::Nothing }
    }

    /// It was tried to be taken.
    fn tried(&mut self, is_taken: bool) {
        *self = if is_taken { Self::Held } else { Self::Waits };
    }

    /// A ring was stopped, and nothing of it is in flight.
    fn stopped(&mut self, any_started: bool) -> Step {
        if any_started {
            return Step::Nothing;
        }
        match std::mem::take(self) {
            Self::Held => Step::GiveBack,
            Self::Free | Self::Waits => Step::Nothing,
        }
    }
}

/// A claim and how it stands.
pub(super) struct Claimed {
    claim: Box<dyn Claim>,
    standing: Mutex<Standing>,
    /// Wakes the thread that asks again.
    waits: Condvar,
}

impl Claimed {
    /// Closes the gate until it is had.
    pub(super) fn new(claim: Box<dyn Claim>, pops: &PopGate) -> Self {
        pops.hold(Hold::Unclaimed);
        Self { claim, standing: Mutex::default(), waits: Condvar::new() }
    }

    /// A ring was started. Called by the thread that serves it, which has nothing in flight. Returns why
    /// it cannot be had, if that is not that another one has it.
    fn started(&self, pops: &PopGate, any_started: impl Fn() -> bool) -> Option<String> {
        let mut standing = self.standing();
        if standing.started(any_started()) != Step::Take {
            return None;
        }
        let taken = self.claim.try_take();
        standing.tried(matches!(taken, Ok(true)));
        let why = match taken {
            Ok(true) => {
                pops.release(Hold::Unclaimed);
                return None;
            }
            Ok(false) => {
                let what = self.claim.describe();
                tracing::warn!(what, "requests wait until it is free");
                None
            }
            Err(error) => {
                let what = self.claim.describe();
                tracing::error!(what, %error, "requests wait until it can be had");
                Some(format!("{what}: {error}"))
            }
        };
        self.waits.notify_one();
        why
    }

    /// A ring was stopped, and nothing of it is in flight. Not called by a thread that serves rings.
    fn stopped(&self, pops: &PopGate, any_started: impl Fn() -> bool) {
        let mut standing = self.standing();
        if standing.stopped(any_started()) == Step::GiveBack {
            pops.hold(Hold::Unclaimed);
            // At most somebody is on the way to find a ring that is stopped.
            let _ = pops.drained_within(Duration::MAX);
            self.claim.give_back();
        }
    }

    /// Returns when it was had after a wait, and how long that was.
    fn wait(&self, pops: &PopGate) -> Duration {
        let mut standing = self.standing();
        loop {
            while *standing != Standing::Waits {
                standing = self.waits.wait(standing).unwrap_or_else(PoisonError::into_inner);
            }
            let (begin, mut rest) = (Instant::now(), FIRST_REST);
            while *standing == Standing::Waits {
                if matches!(self.claim.try_take(), Ok(true)) {
                    standing.tried(true);
                    pops.release(Hold::Unclaimed);
                    return begin.elapsed();
                }
                let waited = self.waits.wait_timeout(standing, rest);
                standing = waited.unwrap_or_else(PoisonError::into_inner).0;
                rest = (rest * 2).min(LONGEST_REST);
            }
            tracing::info!("the rings have stopped before it was free");
        }
    }

    fn standing(&self) -> MutexGuard<'_, Standing> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B: Backend> Core<B> {
    /// A ring was started: what the device needs to itself is taken, or waited for elsewhere.
    pub(super) fn claim(&self) {
        let Some(claimed) = &self.claimed else { return };
        if let Some(text) = claimed.started(&self.pops, || self.rings.any_started()) {
            self.tell(text);
        }
    }

    /// Rings were stopped, and nothing of them is in flight: what nobody needs any more is given back.
    pub(super) fn give_back(&self) {
        if let Some(claimed) = &self.claimed {
            claimed.stopped(&self.pops, || self.rings.any_started());
        }
    }
}

/// Starts the thread that waits for what somebody else has, until the process ends.
pub(super) fn start<B: Backend>(core: &Arc<Core<B>>) -> io::Result<()> {
    if core.claimed.is_none() {
        return Ok(());
    }
    let core = Arc::clone(core);
    Builder::new().name("claim".into()).spawn(move || {
        while let Some(claimed) = &core.claimed {
            let waited = claimed.wait(&core.pops);
            tracing::info!(?waited, "it is free: requests go on");
            // If the gate is closed for another reason, the end of that kicks them.
            core.rings.kick_all();
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// Something that another one has or not.
    #[derive(Clone, Default)]
    struct Thing(Arc<Has>);

    #[derive(Default)]
    struct Has {
        other: AtomicBool,
        device: AtomicBool,
        broken: AtomicBool,
    }

    impl Thing {
        fn is_other(&self) -> bool {
            self.0.other.load(Ordering::SeqCst)
        }

        fn set_other(&self, has: bool) {
            assert!(!has || !self.is_device(), "two of them have it");
            self.0.other.store(has, Ordering::SeqCst);
        }

        fn is_device(&self) -> bool {
            self.0.device.load(Ordering::SeqCst)
        }
    }

    impl Claim for Thing {
        fn try_take(&self) -> io::Result<bool> {
            if self.0.broken.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::Other.into());
            }
            let is_free = !self.is_other();
            if is_free {
                assert!(!self.0.device.swap(true, Ordering::SeqCst), "it is taken twice");
            }
            Ok(is_free)
        }

        fn give_back(&self) {
            assert!(self.0.device.swap(false, Ordering::SeqCst), "nothing to give back");
        }

        fn describe(&self) -> String {
            "a thing".into()
        }
    }

    fn claimed(thing: &Thing, pops: &PopGate) -> Claimed {
        Claimed::new(Box::new(thing.clone()), pops)
    }

    #[test]
    fn it_is_had_from_the_first_ring_to_the_last() {
        let (thing, pops) = (Thing::default(), PopGate::new(2));
        let claimed = claimed(&thing, &pops);
        assert!(pops.enter(0).is_none(), "nothing is popped without it");
        claimed.started(&pops, || true);
        assert!(thing.is_device() && pops.enter(0).is_some());
        claimed.started(&pops, || true);
        claimed.stopped(&pops, || true);
        assert!(thing.is_device() && pops.enter(1).is_some(), "another ring is started");
        claimed.stopped(&pops, || false);
        assert!(!thing.is_device() && pops.enter(0).is_none());
        claimed.stopped(&pops, || false);
        // Stopped again by the frontend before the ring's thread came here.
        claimed.started(&pops, || false);
        assert!(!thing.is_device());
    }

    #[test]
    fn it_is_not_given_back_while_somebody_is_on_the_way_to_a_ring() {
        let (thing, pops) = (Thing::default(), PopGate::new(1));
        let claimed = claimed(&thing, &pops);
        claimed.started(&pops, || true);
        let popped = pops.enter(0).unwrap();
        std::thread::scope(|scope| {
            let stopping = scope.spawn(|| claimed.stopped(&pops, || false));
            while !pops.is_closed() {
                std::thread::yield_now();
            }
            assert!(thing.is_device());
            drop(popped);
            stopping.join().unwrap();
        });
        assert!(!thing.is_device());
    }

    #[test]
    fn what_another_one_has_is_waited_for_and_the_wait_can_be_given_up() {
        for broken in [false, true] {
            let (thing, pops) = (Thing::default(), PopGate::new(1));
            let claimed = claimed(&thing, &pops);
            thing.set_other(!broken);
            thing.0.broken.store(broken, Ordering::SeqCst);
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| claimed.wait(&pops));
                claimed.started(&pops, || true);
                claimed.stopped(&pops, || false);
                claimed.started(&pops, || true);
                assert!(pops.is_held(Hold::Unclaimed) && !thing.is_device());
                thing.set_other(false);
                thing.0.broken.store(false, Ordering::SeqCst);
                waiting.join().unwrap();
            });
            assert!(thing.is_device() && pops.enter(0).is_some());
        }
    }

    #[derive(Clone, Copy, Debug)]
    enum Event {
        Starts(usize),
        Stops(usize),
        AsksAgain,
        OtherTakes,
        OtherLeaves,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0..3_usize).prop_map(Event::Starts),
            (0..3_usize).prop_map(Event::Stops),
            Just(Event::AsksAgain),
            Just(Event::OtherTakes),
            Just(Event::OtherLeaves),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order.
        #[test]
        fn it_is_had_only_by_one_and_only_while_a_ring_is_started(
            events in prop::collection::vec(event(), 0..40),
        ) {
            let mut standing = Standing::default();
            let (mut started, mut other, mut device) = ([false; 3], false, false);
            for event in events {
                match event {
                    Event::Starts(ring) => {
                        started[ring] = true;
                        if standing.started(true) == Step::Take {
                            device = !other;
                            standing.tried(device);
                        }
                    }
                    Event::Stops(ring) => {
                        started[ring] = false;
                        if standing.stopped(started.contains(&true)) == Step::GiveBack {
                            prop_assert!(device);
                            device = false;
                        }
                    }
                    Event::AsksAgain if standing == Standing::Waits => {
                        device = !other;
                        standing.tried(device);
                    }
                    Event::AsksAgain => {}
                    Event::OtherTakes => other |= !device,
                    Event::OtherLeaves => other = false,
                }
                prop_assert!(!(device && other));
                prop_assert_eq!(device, standing == Standing::Held);
                let wanted = started.contains(&true);
                prop_assert_eq!(wanted, standing != Standing::Free);
            }
        }
    }
}
