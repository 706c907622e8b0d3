//! One round as a picture: what each device did, and when. This file turns reports into lanes;
//! `drawing` draws them.
//!
//! The time for collecting evidence (hashes of all memory) is no part of a standstill and is left
//! out, so the times here are the net times of the summary.

mod drawing;

pub(crate) use drawing::draw;

use standstill::coordinator::report::{CommandAnswer, CommandReport, TransitionReport};
use standstill::protocol::message::Phase;

/// A round: a pause, and the resume that followed.
#[derive(Clone, Debug, Default)]
pub(crate) struct Timeline {
    /// Which round of the run it was, from 1.
    pub(crate) round: u32,
    /// The pause.
    pub(crate) pause: Transition,
    /// The resume.
    pub(crate) resume: Transition,
    /// Late writes as (writer, receiver), by number of the device.
    pub(crate) late: Vec<(usize, usize)>,
}

/// A pause or a resume.
#[derive(Clone, Debug, Default)]
pub(crate) struct Transition {
    /// Its phases, in order.
    pub(crate) phases: Vec<PhaseSpan>,
    /// What each device did.
    pub(crate) lanes: Vec<Lane>,
    /// The end of the last phase.
    pub(crate) end_ns: u64,
}

/// A phase of all devices, from the first message sent to the last answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PhaseSpan {
    /// Which.
    pub(crate) phase: Phase,
    /// When it began.
    pub(crate) began_ns: u64,
    /// When its barrier was passed.
    pub(crate) ended_ns: u64,
}

/// One device.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lane {
    /// Its name.
    pub(crate) name: String,
    /// What it did, one for each phase.
    pub(crate) steps: Vec<Step>,
}

/// What one device did in one phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Step {
    /// Which phase.
    pub(crate) phase: Phase,
    /// When the message was sent.
    pub(crate) sent_ns: u64,
    /// When the device began to work on it.
    pub(crate) began_ns: u64,
    /// When its hook had returned.
    pub(crate) hook_ended_ns: u64,
    /// When it was where it was told to go.
    pub(crate) reached_ns: u64,
    /// When the coordinator knew.
    pub(crate) answered_ns: u64,
}

impl Timeline {
    /// Of the reports of a round.
    pub(crate) fn new(
        round: u32,
        pause: &TransitionReport,
        resume: &TransitionReport,
        late: Vec<(usize, usize)>,
    ) -> Self {
        Self {
            round,
            pause: Transition::new(pause, &[Phase::PrepareStop, Phase::Stop]),
            resume: Transition::new(resume, &[Phase::PrepareStart, Phase::Start]),
            late,
        }
    }
}

impl Transition {
    fn new(report: &TransitionReport, phases: &[Phase]) -> Self {
        let commands = |phase: Phase| report.participants.iter().map(move |p| p.command(phase));
        let mut transition = Self::default();
        transition.lanes.extend(
            report.participants.iter().map(|p| Lane { name: p.name.clone(), steps: Vec::new() }),
        );
        // What evidence has delayed everything by so far.
        let mut delay = 0;
        for &phase in phases {
            let sent = commands(phase).flatten().map(|c| c.sent_ns).min();
            let answered = commands(phase).flatten().filter_map(|c| c.answered_ns).max();
            let (Some(sent), Some(answered)) = (sent, answered) else { continue };
            let began_ns = sent.saturating_sub(delay);
            let steps = commands(phase).map(|c| c.and_then(|c| Step::new(c, delay)));
            let mut ended_ns = began_ns;
            for (lane, step) in transition.lanes.iter_mut().zip(steps) {
                ended_ns = step.map_or(ended_ns, |step| ended_ns.max(step.answered_ns));
                lane.steps.extend(step);
            }
            transition.phases.push(PhaseSpan { phase, began_ns, ended_ns });
            transition.end_ns = ended_ns;
            delay = answered.saturating_sub(ended_ns);
        }
        transition
    }
}

impl Step {
    /// `None` if there was no answer. Where between sending and answer the device's own time lies
    /// is not known: half of the rest is taken for the way there.
    fn new(command: &CommandReport, delay: u64) -> Option<Self> {
        let CommandAnswer::Reached { timings, .. } = &command.answer else { return None };
        let sent_ns = command.sent_ns.saturating_sub(delay);
        let net = command.net_ns()?;
        let work = timings.hook_ns.saturating_add(timings.drain_ns).min(net);
        let began_ns = sent_ns + (net - work) / 2;
        Some(Self {
            phase: command.phase,
            sent_ns,
            began_ns,
            hook_ended_ns: began_ns + timings.hook_ns.min(work),
            reached_ns: began_ns + work,
            answered_ns: sent_ns + net,
        })
    }
}

/// Why a picture was not written.
#[derive(Debug, thiserror::Error)]
#[error("the timeline cannot be written to {path:?}")]
pub(crate) struct TimelineError {
    /// Where it was to go.
    pub(crate) path: std::path::PathBuf,
    /// Why it did not.
    pub(crate) source: std::io::Error,
}

#[cfg(test)]
pub(crate) mod tests;
