//! What faults are tried on: somebody's device programs, and a VMM's side for them.

use crate::sweep::engine::RunError;
use standstill_coordinator::DeviceSpec;
use standstill_coordinator::report::TransitionReport;
use std::collections::BTreeSet;
use std::error::Error;
use std::os::fd::OwnedFd;

/// Something on the VMM's side does not work.
pub type RigError = Box<dyn Error + Send + Sync>;

/// Makes the machines that faults are tried on: one for each plan.
pub trait Subject: Send + Sync {
    /// The VMM's side of a machine of that many devices. Nothing is started yet.
    ///
    /// # Errors
    ///
    /// If it cannot be made; the plan is not run then.
    fn rig(&self, devices: u16) -> Result<Box<dyn Rig>, RigError>;
}

/// When a rig looks at memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// After the last answer by which the machine has come to stand.
    AfterStop,
    /// Some time later, before the first command of the resume if there is one.
    BeforeStart,
}

/// An access to a register of a device, to be made on a thread of its own: it may hang.
pub type Access = Box<dyn FnOnce() -> Result<(), RigError> + Send>;

/// The VMM's side of one machine under test: its device programs, its clients, its memory.
///
/// Devices are numbered from 0, in the order of [`devices`](Self::devices). All calls may block; they
/// are made on a thread where that does no harm, one at a time. What is not there need not be written:
/// a rig of device programs that do nothing is only its `devices`.
pub trait Rig: Send {
    /// The device programs. Deadlines and policies are the engine's.
    ///
    /// # Errors
    ///
    /// If one cannot be described.
    fn devices(&self) -> Result<Vec<DeviceSpec>, RigError>;

    /// Guest RAM, which is declared to all devices; `None` if there is none.
    ///
    /// # Errors
    ///
    /// If its fd cannot be had.
    fn ram(&self) -> Result<Option<OwnedFd>, RigError> {
        Ok(None)
    }

    /// Connects to all devices and sets them to work. The machine runs.
    ///
    /// # Errors
    ///
    /// If a device cannot be driven.
    fn connect(&mut self) -> Result<(), RigError> {
        Ok(())
    }

    /// A device is gone for good: forgets it. [`go_on`](Self::go_on) follows.
    ///
    /// # Errors
    ///
    /// If that is not possible.
    fn remove(&mut self, device: usize) -> Result<(), RigError> {
        let _ = device;
        Ok(())
    }

    /// A device was started again, with nothing that its client had told it: connects to it. The machine
    /// runs; [`go_on`](Self::go_on) follows.
    ///
    /// # Errors
    ///
    /// If the device cannot be driven.
    fn restore(&mut self, device: usize) -> Result<(), RigError> {
        let _ = device;
        Ok(())
    }

    /// Sets these devices to work again, after all that were lost in a round have been removed or
    /// restored. Who is not among them may be silent. The machine runs.
    ///
    /// # Errors
    ///
    /// If a device cannot be driven.
    fn go_on(&mut self, devices: &BTreeSet<usize>) -> Result<(), RigError> {
        let _ = devices;
        Ok(())
    }

    /// Waits until each of these devices is seen to work; says what is not, after a time of its own. The
    /// machine runs.
    ///
    /// # Errors
    ///
    /// If it cannot be seen.
    fn traffic(&mut self, devices: &BTreeSet<usize>) -> Result<Vec<String>, RigError> {
        let _ = devices;
        Ok(Vec::new())
    }

    /// An access to a register of that device, for faults [in a register
    /// access](standstill_protocol::fault::Point::Mmio); `None` if there is none to be made.
    fn access(&mut self, device: usize) -> Option<Access> {
        let _ = device;
        None
    }

    /// Looks at all memory that devices can write, and keeps what it has seen for
    /// [`late_writes`](Self::late_writes). Called twice whenever the machine stands: what has
    /// changed in between was written too late. What was seen before the first look of a standstill is not
    /// needed any more.
    ///
    /// # Errors
    ///
    /// If it cannot be looked at.
    fn look(&mut self, moment: Look) -> Result<(), RigError> {
        let _ = moment;
        Ok(())
    }

    /// What has moved while the machine stood still, in words. `stopped` is how it came to stand: a pause, a
    /// resume that was undone, a take-over; `resume` is what came next, and need not have led to a machine
    /// that runs. Both have the evidence of the devices that took part; those that have shown nothing in one
    /// of them do not count. None where there is no report: of a machine that is held nobody asks more.
    ///
    /// # Errors
    ///
    /// If it cannot be said.
    fn late_writes(
        &mut self,
        stopped: Option<&TransitionReport>,
        resume: Option<&TransitionReport>,
    ) -> Result<Vec<String>, RigError> {
        let _ = (stopped, resume);
        Ok(Vec::new())
    }
}

/// A rig at work on a thread where blocking does no harm. After a call that failed or hung there is
/// none any more.
pub(super) struct Bench(Option<Box<dyn Rig>>);

impl Bench {
    pub(super) fn new(rig: Box<dyn Rig>) -> Self {
        Self(Some(rig))
    }

    /// Does something with the rig; `what` is said if it fails.
    pub(super) async fn with<T: Send + 'static>(
        &mut self,
        what: &'static str,
        work: impl FnOnce(&mut dyn Rig) -> Result<T, RigError> + Send + 'static,
    ) -> Result<T, RunError> {
        let failed = |source| RunError::Rig { what, source };
        let mut rig = self.0.take().ok_or_else(|| failed("an earlier call has failed".into()))?;
        let call = tokio::task::spawn_blocking(move || {
            let result = work(rig.as_mut());
            (rig, result)
        });
        let ended = tokio::time::timeout(super::engine::HANG, call).await;
        let (rig, result) = ended
            .map_err(|_| failed("it does not return".into()))?
            .map_err(|error| failed(error.into()))?;
        self.0 = Some(rig);
        result.map_err(failed)
    }
}
