//! Hooks that fail, and hooks that do not return.
//!
//! ```
//! use standstill_testkit::outside::FaultyHook;
//! use standstill_testkit::plan::{HookAction, HookFault, Place};
//! use standstill_testkit::{Call, Trace};
//!
//! let trace = Trace::new()?;
//! let fault = HookFault { round: 2, place: Place::Before, call: Call::Stop, action: HookAction::Fail };
//! let hooks = FaultyHook::of(&[fault], &trace)?;
//! for (spec, hook, _) in hooks {
//!     // `MachineBuilder::hook(spec, hook)`
//! #   let _ = (spec, hook);
//! }
//! # Ok::<_, std::io::Error>(())
//! ```

use super::Fired;
use crate::participant::TracedHook;
use crate::plan::{HookAction, HookFault, Place};
use crate::trace::{Call, Trace, now_ns};
use standstill_coordinator::{Hook, HookSpec, LocalError, Slot};
use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// What a test has of the hook in one place: what has fired; and the end of a call that has none
/// comes when this is dropped.
#[derive(Debug)]
pub struct HookFaults {
    place: Place,
    fired: Arc<Mutex<Vec<Fired>>>,
    _release: Sender<()>,
}

impl HookFaults {
    /// Where the hook is in a stop.
    #[must_use]
    pub fn place(&self) -> Place {
        self.place
    }

    /// What has happened so far. The index is that in the list of all faults.
    #[must_use]
    pub fn fired(&self) -> Vec<Fired> {
        self.fired.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A hook that does what faults say, and nothing else.
#[derive(Debug)]
pub struct FaultyHook(TracedHook);

impl FaultyHook {
    /// The hooks for a list of faults: one for each place that is in it, under the name of the place,
    /// with what tells of it. The `round` of a fault is the how-manieth call of its kind.
    ///
    /// # Errors
    ///
    /// If the trace cannot be opened.
    pub fn of(
        faults: &[HookFault],
        trace: &Trace,
    ) -> io::Result<Vec<(HookSpec, Self, HookFaults)>> {
        let places = [
            (Place::Before, Slot::Before, "before"),
            (Place::Between, Slot::Between, "between"),
            (Place::After, Slot::After, "after"),
        ];
        let mut hooks = Vec::new();
        for (place, slot, name) in places {
            let here = (0..).zip(faults).filter(|(_, fault)| fault.place == place);
            let here: Vec<(u32, HookFault)> = here.map(|(index, fault)| (index, *fault)).collect();
            if here.is_empty() {
                continue;
            }
            let (release, released) = channel();
            let fired = Arc::default();
            let faults = HookFaults { place, fired: Arc::clone(&fired), _release: release };
            let calls = Calls { faults: here, counts: [0, 0], fired, released };
            let hook = Self(TracedHook::new(name, trace)?.doing(calls.doing()));
            hooks.push((HookSpec::new(name, slot), hook, faults));
        }
        Ok(hooks)
    }
}

impl Hook for FaultyHook {
    fn stop(&mut self) -> Result<(), LocalError> {
        self.0.stop()
    }

    fn start(&mut self) -> Result<(), LocalError> {
        self.0.start()
    }
}

struct Calls {
    faults: Vec<(u32, HookFault)>,
    /// Of stops and of starts.
    counts: [u32; 2],
    fired: Arc<Mutex<Vec<Fired>>>,
    /// Its other end is gone when a test is over.
    released: Receiver<()>,
}

impl Calls {
    fn doing(mut self) -> impl FnMut(Call) -> Result<(), LocalError> + Send + 'static {
        move |call| self.called(call)
    }

    fn called(&mut self, call: Call) -> Result<(), LocalError> {
        let count = &mut self.counts[usize::from(call == Call::Start)];
        *count += 1;
        let occurrence = *count;
        let is_now = |fault: &HookFault| fault.call == call && fault.round == occurrence;
        let Some((index, fault)) = self.faults.iter().find(|(_, fault)| is_now(fault)) else {
            return Ok(());
        };
        let fired = Fired { index: *index, occurrence, at_ns: now_ns() };
        self.fired.lock().unwrap_or_else(PoisonError::into_inner).push(fired);
        match fault.action {
            HookAction::Fail => Err(format!("{call:?} fails as the plan says").into()),
            HookAction::StickMs(0) => match self.released.recv() {
                Ok(()) | Err(_) => Err("it hung as the plan says, and the test is over".into()),
            },
            HookAction::StickMs(ms) => {
                let time = Duration::from_millis(ms.into());
                match self.released.recv_timeout(time) {
                    Err(RecvTimeoutError::Timeout) => Ok(()),
                    Ok(()) | Err(RecvTimeoutError::Disconnected) => Err("the test is over".into()),
                }
            }
        }
    }
}
