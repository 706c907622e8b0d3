//! A machine that stands: is anything written meanwhile?
//!
//! It is asked of every time that a machine stands, however it has come to that: by a pause, by a resume that
//! was undone, by a transition that ended in *Held*.

use super::{RESUMES, Run, RunError};
use crate::plan::Policy;
use crate::sweep::arms::Moments;
use crate::sweep::observation::Act;
use crate::sweep::subject::{Look, Rig};
use standstill_coordinator::report::TransitionReport;
use standstill_protocol::transition::MachineState;
use std::sync::Arc;
use std::time::Duration;

/// How long a machine is left alone between two looks at its memory: something that is written late
/// is written by then. A liar has longer: it has to be found, however busy the CPUs are.
const STILL: Duration = Duration::from_millis(10);
const STILL_FOR_A_LIAR: Duration = Duration::from_millis(500);

/// How a machine has come to stand, or was started again; `None` if there is no report of it.
type Report = Option<Arc<TransitionReport>>;

impl Run<'_> {
    /// A machine that a pause has left stopped: it is looked at and resumed, until it is not stopped any
    /// more. What the last resume has come to.
    pub(super) async fn stand_and_resume(
        &mut self,
        round: u32,
        pause: Report,
    ) -> Result<Report, RunError> {
        let mut stopped = pause;
        for attempt in 0..RESUMES {
            self.look(Look::AfterStop).await?;
            if attempt == 0 {
                self.at(Moments::Stopped, round).await?;
                self.settle(round, None).await?;
            }
            if attempt > 0 || self.plan.policy != Policy::ContinueWithout {
                self.recover(round).await?;
            }
            self.leave_alone().await;
            self.look(Look::BeforeStart).await?;
            let resume = self.step(round, Act::Resume).await?;
            self.compare(round, stopped.as_ref(), resume.as_ref()).await?;
            // A resume that was not even begun has moved nobody.
            stopped = resume.or(stopped);
            if self.machine().await? != MachineState::Stopped {
                break;
            }
        }
        Ok(stopped)
    }

    /// A machine that is held since that transition: all that can be is stopped, and nobody resumes it.
    pub(super) async fn stand_held(&mut self, round: u32, since: Report) -> Result<(), RunError> {
        self.stand().await?;
        self.compare(round, since.as_ref(), None).await
    }

    /// Looks at a machine that stands, leaves it alone, and looks again.
    pub(super) async fn stand(&mut self) -> Result<(), RunError> {
        self.look(Look::AfterStop).await?;
        self.leave_alone().await;
        self.look(Look::BeforeStart).await
    }

    /// Writes down what has moved between the two looks, and by what devices have shown before and after.
    pub(super) async fn compare(
        &mut self,
        round: u32,
        stopped: Option<&Arc<TransitionReport>>,
        resume: Option<&Arc<TransitionReport>>,
    ) -> Result<(), RunError> {
        let (stopped, resume) = (stopped.cloned(), resume.cloned());
        let judge = move |rig: &mut dyn Rig| rig.late_writes(stopped.as_deref(), resume.as_deref());
        let late = self.bench.with("compare what was seen", judge).await?;
        self.seen.late.extend(late.into_iter().map(|what| (round, what)));
        Ok(())
    }

    async fn look(&mut self, moment: Look) -> Result<(), RunError> {
        self.bench.with("look at memory", move |rig| rig.look(moment)).await
    }

    async fn leave_alone(&mut self) {
        let still = if self.arms.lies() { STILL_FOR_A_LIAR } else { STILL };
        tokio::time::sleep(still).await;
    }
}
