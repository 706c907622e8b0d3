//! Stops the VM and lets it go on, and is not content with a guess.

use super::link::{CallError, Handle};
use super::memory::Memory;
use super::rules::{First, Next, Progress, Target, Vm, first, next};
use super::{Shared, TARGET};
use qapi::qmp::{self, RunState};
use standstill::coordinator::{Hook, LocalError};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long QEMU has for an answer that comes late anyway. Then another connection is tried.
const LATE_ANSWER: Duration = Duration::from_secs(2);
/// How soon a VM is looked at again that is not yet where it is to be.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// How soon a QEMU is called again that cannot be reached.
const CALL_AGAIN: Duration = Duration::from_millis(250);

/// The VM's processors, as a hook: stopped before the first device is told anything, running again
/// after the last device runs.
///
/// A call fails only while the VM is certainly as before. As soon as QEMU may have got a command, it ends
/// with what QEMU says of the VM, however long that takes; at the hook's deadline the machine is *Held*.
#[derive(Clone, Debug)]
pub(super) struct Processors {
    pub(super) link: Handle,
    pub(super) memory: Arc<Memory>,
    pub(super) shared: Arc<Shared>,
    /// How long QEMU has for all of a call: less than the hook, so that an error is one.
    pub(super) within: Duration,
}

impl Processors {
    fn state(&self, end: Instant) -> Result<RunState, CallError> {
        self.link.call(qmp::query_status {}, end).map(|info| info.status)
    }

    fn command(&self, target: Target, end: Instant) -> Result<(), CallError> {
        match target {
            Target::Stands => self.link.call(qmp::stop {}, end),
            Target::Runs => self.link.call(qmp::cont {}, end),
        }
        .map(drop)
    }

    /// Gives the command and returns when QEMU says where the VM is.
    fn bring(&self, mut target: Target, end: Instant) -> Result<(), LocalError> {
        let accepted = *self.shared.accepted();
        let (mut give, mut unanswered, mut too_late) = (true, false, false);
        loop {
            if *self.shared.accepted() != accepted {
                return Err("given up: the owner takes things as they are".into());
            }
            let late = Instant::now() >= end;
            let until = if late { Instant::now() + LATE_ANSWER } else { end };
            let mut refused = None;
            if std::mem::take(&mut give) {
                match self.command(target, until) {
                    Ok(()) => unanswered = false,
                    Err(CallError::NotSent(why)) if !unanswered => return Err(why.into()),
                    Err(CallError::NotSent(_)) => {}
                    Err(error @ CallError::Refused { .. }) => refused = Some(error),
                    Err(CallError::Unanswered(why)) => {
                        tracing::warn!(target: TARGET, "the VM may stand or run: {why}");
                        unanswered = true;
                    }
                }
            }
            let state = match self.state(until) {
                Ok(state) => state,
                Err(error) => {
                    tracing::debug!(target: TARGET, %error, "nobody says where the VM is");
                    unanswered = true;
                    self.shared.wait(accepted, CALL_AGAIN);
                    continue;
                }
            };
            let progress = Progress { late: Instant::now() >= end, unanswered };
            match next(target, state.into(), progress) {
                Next::Done if too_late => {
                    return Err("QEMU was too late; the VM is stopped again".into());
                }
                Next::Done => {
                    if target == Target::Runs && Vm::from(state) == Vm::Stuck {
                        left_standing(state);
                    }
                    return Ok(());
                }
                Next::Again | Next::Wait if refused.is_some() => {}
                step @ (Next::Again | Next::Wait) => {
                    give = step == Next::Again;
                    self.shared.wait(accepted, LOOK_AGAIN);
                    continue;
                }
                Next::TurnBack => {
                    tracing::warn!(target: TARGET, "the VM was let go on too late, and is stopped again");
                    (target, give, unanswered, too_late) = (Target::Stands, true, true, true);
                    continue;
                }
                Next::Fail => {}
            }
            let name = qapi::Enum::name(&state);
            return Err(match refused {
                Some(refused) => refused.into(),
                None => format!("the VM is {name} still").into(),
            });
        }
    }
}

fn left_standing(state: RunState) {
    let state = qapi::Enum::name(&state);
    tracing::warn!(target: TARGET, state, "the VM is not let go on: its state is not that of a VM that was paused");
}

fn busy(state: RunState) -> LocalError {
    let state = qapi::Enum::name(&state);
    format!("QEMU is busy with the VM ({state}) and may let it go on by itself").into()
}

impl Hook for Processors {
    fn stop(&mut self) -> Result<(), LocalError> {
        let _turn = self.shared.turn.lock();
        let end = Instant::now() + self.within;
        let state = self.state(end)?;
        match first(Target::Stands, state.into()) {
            First::Refuse => return Err(busy(state)),
            First::Leave => {
                let (state, ran) = (qapi::Enum::name(&state), self.memory.ran());
                tracing::info!(target: TARGET, state, ran, "the VM stands already");
            }
            First::Bring => {
                self.memory.set(true);
                self.shared.stands.store(true, Ordering::Release);
                let accepted = *self.shared.accepted();
                if let Err(error) = self.bring(Target::Stands, end) {
                    self.shared.stands.store(false, Ordering::Release);
                    // Of a call that was given up nobody knows.
                    if *self.shared.accepted() == accepted {
                        self.memory.set(false);
                    }
                    return Err(error);
                }
            }
        }
        self.shared.stands.store(true, Ordering::Release);
        Ok(())
    }

    fn start(&mut self) -> Result<(), LocalError> {
        let _turn = self.shared.turn.lock();
        self.go_on()
    }
}

impl Processors {
    /// Lets a VM go on that a pause has stopped which nobody has finished; not in the middle of another
    /// pause, in which it returns false.
    pub(super) fn go_on_unless_paused(&self) -> Result<bool, LocalError> {
        let _turn = self.shared.turn.lock();
        if self.shared.stands.load(Ordering::Acquire) {
            return Ok(false);
        }
        self.go_on().map(|()| true)
    }

    fn go_on(&self) -> Result<(), LocalError> {
        let end = Instant::now() + self.within;
        if self.memory.ran() {
            let state = self.state(end)?;
            match first(Target::Runs, state.into()) {
                First::Refuse => return Err(busy(state)),
                First::Leave => left_standing_or_running(state),
                First::Bring => self.bring(Target::Runs, end)?,
            }
            self.memory.set(false);
        } else {
            tracing::info!(target: TARGET, "the VM stood before the pause, and stays so");
        }
        self.shared.stands.store(false, Ordering::Release);
        Ok(())
    }
}

fn left_standing_or_running(state: RunState) {
    match state.into() {
        Vm::Runs => {
            tracing::warn!(target: TARGET, "the VM runs already: somebody else has let it go on");
        }
        _ => left_standing(state),
    }
}
