//! What an arc of the migration states does to the device.
//!
//! Three levels of activity make two steps in each direction:
//!
//! | step | in order |
//! |---|---|
//! | `Full` to `NoPeer` | hook `prepare_stop`; gate closes for peers and drains |
//! | `NoPeer` to `Stopped` | what was sent before takes effect; register accesses close and drain; hook `stop`; gate closes and drains; interrupts freeze |
//! | `Stopped` to `NoPeer` | gate opens for RAM; hook `prepare_start`; interrupts thaw; accesses open; what was kept takes effect |
//! | `NoPeer` to `Full` | gate opens for peers; hook `start` |
//!
//! A longer way is these steps one after another. What fails undoes, in reverse, what the way has
//! done so far: then the device is where it was. A hook that returned an error has undone itself
//! (its contract); one that was cut off has not, so its opposite is called. Undoing has
//! [`UNDO_BUDGET`] of its own; where it fails, everything is closed and the device is unusable.

use super::budget::{Budget, GivenUp};
use super::parts::Parts;
use crate::device::{Device, DeviceError};
use crate::gate::Scope;
use standstill_protocol::message::{Refusal, RefusalKind};
use standstill_protocol::migration::Activity;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long each thing that is called to undo another may take.
pub(super) const UNDO_BUDGET: Duration = Duration::from_secs(1);

/// Where the time went.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    pub(super) hook: Duration,
    pub(super) drain: Duration,
}

impl Spent {
    pub(super) fn add(&mut self, other: Self) {
        self.hook += other.hook;
        self.drain += other.drain;
    }
}

/// An arc was not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ArcFailure {
    pub(super) refusal: Refusal,
    /// True if the device is where it was, false if it is unusable.
    pub(super) restored: bool,
}

/// How an arc ended, and what it took.
#[derive(Debug)]
pub(crate) struct ArcOutcome {
    pub(super) result: Result<(), ArcFailure>,
    pub(super) spent: Spent,
}

/// Brings the device from one level of activity to another. With `lease` a stop holds the data
/// socket until the start.
pub(super) async fn change_activity<D: Device>(
    parts: Arc<Parts<D>>,
    from: Activity,
    to: Activity,
    lease: bool,
    budget: Budget,
) -> ArcOutcome {
    let mut way = Way { lease, ..Way::begin(&parts) };
    let mut at = from;
    while at != to {
        let next = one_level(at, to);
        let Err(failure) = way.step(at, next, &budget).await else {
            at = next;
            continue;
        };
        let mut restored = failure.restored;
        while restored && at != from {
            let back = one_level(at, from);
            restored = way.step(at, back, &Budget::grace(UNDO_BUDGET)).await.is_ok();
            at = back;
        }
        if !restored {
            parts.force_stop();
        }
        let failure = ArcFailure { refusal: failure.refusal, restored };
        return ArcOutcome { result: Err(failure), spent: way.spent };
    }
    ArcOutcome { result: Ok(()), spent: way.spent }
}

/// The next level on the way.
fn one_level(at: Activity, to: Activity) -> Activity {
    match (at, to) {
        (Activity::Full, Activity::NoPeer | Activity::Stopped)
        | (Activity::Stopped, Activity::NoPeer | Activity::Full) => Activity::NoPeer,
        (Activity::NoPeer, _)
        | (Activity::Full, Activity::Full)
        | (Activity::Stopped, Activity::Stopped) => to,
    }
}

/// A hook of the device.
#[derive(Clone, Copy)]
enum Hook {
    PrepareStop,
    Stop,
    PrepareStart,
    Start,
}

impl Hook {
    fn name(self) -> &'static str {
        match self {
            Self::PrepareStop => "prepare_stop",
            Self::Stop => "stop",
            Self::PrepareStart => "prepare_start",
            Self::Start => "start",
        }
    }

    /// What undoes it.
    fn opposite(self) -> Self {
        match self {
            Self::PrepareStop => Self::Start,
            Self::Stop => Self::PrepareStart,
            Self::PrepareStart => Self::Stop,
            Self::Start => Self::PrepareStop,
        }
    }
}

/// A way that is being taken.
struct Way<'a, D> {
    parts: &'a Parts<D>,
    /// Whether a stop holds the data socket.
    lease: bool,
    spent: Spent,
    /// When the last of its parts ended and the present one began: the clock is read once for both.
    since: Instant,
}

impl<'a, D> Way<'a, D> {
    fn begin(parts: &'a Parts<D>) -> Self {
        Self { parts, lease: false, spent: Spent::default(), since: Instant::now() }
    }

    /// The time since the last call of this, or since the beginning.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.since, now)
    }
}

impl<D: Device> Way<'_, D> {
    async fn step(
        &mut self,
        from: Activity,
        to: Activity,
        budget: &Budget,
    ) -> Result<(), ArcFailure> {
        match (from, to) {
            (Activity::Full, _) => self.rest_from_peers(budget).await,
            (Activity::NoPeer, Activity::Stopped) => self.stop(budget).await,
            (Activity::Stopped, _) => self.wake(budget).await,
            (Activity::NoPeer, _) => self.wake_for_peers(budget).await,
        }
    }

    async fn rest_from_peers(&mut self, budget: &Budget) -> Result<(), ArcFailure> {
        self.hook(Hook::PrepareStop, budget).await?;
        let Err(refusal) = self.close_gate(Scope::Peer, budget).await else {
            return Ok(());
        };
        let restored = self.undo(Hook::PrepareStop).await;
        Err(ArcFailure { refusal, restored })
    }

    async fn stop(&mut self, budget: &Budget) -> Result<(), ArcFailure> {
        if self.lease {
            // Before anybody looks whether something is there: what comes after that waits.
            self.parts.edge.hold();
        }
        let closed = match self.drain_edge(budget).await {
            Ok(()) => self.close_accesses(budget).await,
            refused => refused,
        };
        if let Err(refusal) = closed {
            self.parts.edge.started();
            return Err(ArcFailure { refusal, restored: true });
        }
        let failure = match self.hook(Hook::Stop, budget).await {
            Err(failure) => failure,
            Ok(()) => match self.close_gate(Scope::All, budget).await {
                Ok(()) => match self.freeze_interrupts(budget).await {
                    Ok(()) => return Ok(()),
                    Err(refusal) => {
                        self.parts.gate.open(Scope::Ram);
                        let restored = self.undo(Hook::Stop).await;
                        if restored {
                            self.parts.interrupts.thaw();
                        }
                        ArcFailure { refusal, restored }
                    }
                },
                Err(refusal) => ArcFailure { refusal, restored: self.undo(Hook::Stop).await },
            },
        };
        if failure.restored {
            self.open_accesses();
        }
        Err(failure)
    }

    async fn wake(&mut self, budget: &Budget) -> Result<(), ArcFailure> {
        self.parts.gate.open(Scope::Ram);
        if let Err(mut failure) = self.hook(Hook::PrepareStart, budget).await {
            let closed = self.close_gate(Scope::All, &Budget::grace(UNDO_BUDGET)).await;
            failure.restored &= closed.is_ok();
            return Err(failure);
        }
        self.parts.interrupts.thaw();
        self.open_accesses();
        Ok(())
    }

    async fn wake_for_peers(&mut self, budget: &Budget) -> Result<(), ArcFailure> {
        self.parts.gate.open(Scope::All);
        if let Err(mut failure) = self.hook(Hook::Start, budget).await {
            let closed = self.close_gate(Scope::Peer, &Budget::grace(UNDO_BUDGET)).await;
            failure.restored &= closed.is_ok();
            return Err(failure);
        }
        Ok(())
    }

    /// Calls a hook. If it is cut off, its opposite is called.
    async fn hook(&mut self, hook: Hook, budget: &Budget) -> Result<(), ArcFailure> {
        let whole = budget.left_at(self.since);
        match self.call(hook, budget).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                let refusal = device_refusal(format!("{}: {error}", hook.name()));
                Err(ArcFailure { refusal, restored: true })
            }
            Err(given_up) => {
                let name = hook.name();
                let refusal = device_refusal(match given_up {
                    GivenUp::Late => format!("{name} did not end within {whole:?}"),
                    GivenUp::Overtaken => format!("{name} was overtaken by a later command"),
                });
                Err(ArcFailure { refusal, restored: self.undo(hook).await })
            }
        }
    }

    /// Calls the opposite of a hook; false if that failed.
    async fn undo(&mut self, hook: Hook) -> bool {
        let opposite = hook.opposite();
        match self.call(opposite, &Budget::grace(UNDO_BUDGET)).await {
            Ok(Ok(())) => true,
            Ok(Err(error)) => {
                tracing::error!(hook = opposite.name(), %error, "undoing {} failed", hook.name());
                false
            }
            Err(_) => {
                tracing::error!(
                    hook = opposite.name(),
                    "undoing {} did not end within {UNDO_BUDGET:?}",
                    hook.name()
                );
                false
            }
        }
    }

    async fn call(
        &mut self,
        hook: Hook,
        budget: &Budget,
    ) -> Result<Result<(), DeviceError>, GivenUp> {
        let (device, left) = (&self.parts.device, budget.left_at(self.since));
        let ended = match hook {
            Hook::PrepareStop => budget.bound(device.prepare_stop(left)).await,
            Hook::Stop => budget.bound(device.stop(left)).await,
            Hook::PrepareStart => budget.bound(device.prepare_start(left)).await,
            Hook::Start => budget.bound(device.start(left)).await,
        };
        let lap = self.lap();
        self.spent.hook += lap;
        ended
    }

    async fn close_gate(&mut self, scope: Scope, budget: &Budget) -> Result<(), Refusal> {
        let left = budget.left_at(self.since);
        // Dropped half-way, the gate opens again what it had closed.
        let closed = budget.unless_overtaken(self.parts.gate.close(scope, left)).await;
        let lap = self.lap();
        self.spent.drain += lap;
        match closed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(timeout)) => Err(drain_refusal(timeout.to_string())),
            Err(_) => {
                Err(drain_refusal(format!("draining {scope} was overtaken by a later command")))
            }
        }
    }

    /// Whoever raises one writes to an eventfd of the client's, which can make that wait.
    async fn freeze_interrupts(&mut self, budget: &Budget) -> Result<(), Refusal> {
        let whole = budget.left_at(self.since);
        let frozen = budget.bound(self.parts.interrupts.freeze()).await;
        let lap = self.lap();
        self.spent.drain += lap;
        frozen.map_err(|given_up| {
            drain_refusal(match given_up {
                GivenUp::Late => format!("an interrupt is still being raised after {whole:?}"),
                GivenUp::Overtaken => "freezing interrupts was overtaken by a later command".into(),
            })
        })
    }

    fn open_accesses(&self) {
        self.parts.accesses.open();
        self.parts.edge.started();
    }

    /// What the client had sent before this takes effect.
    async fn drain_edge(&mut self, budget: &Budget) -> Result<(), Refusal> {
        let edge = &self.parts.edge;
        // Usually it is, and there is nothing to wait for.
        if edge.is_quiet() {
            return Ok(());
        }
        let whole = budget.left_at(self.since);
        let hurry = self.parts.client_stream.hurry();
        let drained = budget.bound(Box::pin(edge.drain())).await;
        drop(hurry);
        let lap = self.lap();
        self.spent.drain += lap;
        drained.map_err(|given_up| self.accesses_refusal(given_up, whole))
    }

    async fn close_accesses(&mut self, budget: &Budget) -> Result<(), Refusal> {
        let whole = budget.left_at(self.since);
        let accesses = &self.parts.accesses;
        accesses.close();
        let drained = budget.bound(accesses.drained()).await;
        let lap = self.lap();
        self.spent.drain += lap;
        let Err(given_up) = drained else {
            return Ok(());
        };
        let refusal = self.accesses_refusal(given_up, whole);
        accesses.open();
        Err(refusal)
    }

    fn accesses_refusal(&self, given_up: GivenUp, whole: Duration) -> Refusal {
        drain_refusal(match (given_up, self.parts.accesses.in_flight()) {
            (GivenUp::Late, 0) => {
                format!("what the client had sent was not carried out within {whole:?}")
            }
            (GivenUp::Late, in_flight) => {
                format!("{in_flight} register accesses still in flight after {whole:?}")
            }
            (GivenUp::Overtaken, _) => "register accesses: overtaken by a later command".into(),
        })
    }
}

fn device_refusal(text: String) -> Refusal {
    Refusal { kind: RefusalKind::Device, text }
}

fn drain_refusal(text: String) -> Refusal {
    Refusal { kind: RefusalKind::Drain, text }
}

/// Brings the device's contents to power-on state, and from one level of activity to another.
/// `to` is not lower than `from`. `is_saved` says that a state stream of the running device goes on,
/// and begins the device over.
pub(super) async fn reset<D: Device>(
    parts: Arc<Parts<D>>,
    from: Activity,
    to: Activity,
    is_saved: bool,
    budget: Budget,
) -> (Result<(), Refusal>, Spent) {
    let mut way = Way::begin(&parts);
    let result = way.reset(Arc::clone(&parts), from, to, is_saved, &budget).await;
    let spent = way.spent;
    if result.is_err() {
        parts.force_stop();
    }
    (result, spent)
}

impl<D: Device> Way<'_, D> {
    async fn reset(
        &mut self,
        parts: Arc<Parts<D>>,
        from: Activity,
        to: Activity,
        is_saved: bool,
        budget: &Budget,
    ) -> Result<(), Refusal> {
        if from != Activity::Stopped {
            self.close_accesses(budget).await?;
            self.close_gate(Scope::All, budget).await?;
        }
        let whole = budget.left_at(self.since);
        // It may block: on a thread of its own.
        let wanted = budget.clone();
        let reset = tokio::task::spawn_blocking(move || {
            let is_wanted = || !wanted.left().is_zero();
            // What an earlier load still does must not come after it.
            let loading = parts.loading.take(is_wanted);
            let _loading =
                loading.ok_or_else(|| DeviceError::new("a hook that loads has not returned"))?;
            // Nor must an earlier save find a part of what was before, and a part of what comes.
            let _saving = if is_saved {
                None
            } else {
                let saving = parts.saving.take(is_wanted);
                Some(saving.ok_or_else(|| DeviceError::new("a hook that saves has not returned"))?)
            };
            parts.device.reset()
        });
        let ended = budget.bound(reset).await;
        let lap = self.lap();
        self.spent.hook += lap;
        match ended {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => return Err(device_refusal(format!("reset: {error}"))),
            Ok(Err(join)) => return Err(device_refusal(format!("reset: {join}"))),
            Err(GivenUp::Late) => {
                return Err(device_refusal(format!("reset did not end within {whole:?}")));
            }
            Err(GivenUp::Overtaken) => {
                return Err(device_refusal("reset was overtaken by a later command".into()));
            }
        }
        self.parts.interrupts.reset();
        self.parts.edge.replaced();
        if from != Activity::Stopped {
            let scope = if from == Activity::Full { Scope::All } else { Scope::Ram };
            self.parts.gate.open(scope);
            self.open_accesses();
        }
        let mut at = from;
        while at < to {
            let next = one_level(at, to);
            self.step(at, next, budget).await.map_err(|failure| failure.refusal)?;
            at = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
