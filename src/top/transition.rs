//! The last pause or resume, as a picture of one line for each phase.

use standstill::coordinator::report::{JsonParticipant, JsonReport};

/// One transition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) operation: String,
    pub(super) outcome: String,
    pub(super) total_ns: u64,
    pub(super) downtime_ns: Option<u64>,
    pub(super) phases: Vec<Phase>,
    /// What went wrong first.
    pub(super) failure: Option<String>,
}

/// One phase of one epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Phase {
    pub(super) name: String,
    pub(super) undo: bool,
    epoch: u64,
    pub(super) from_ns: u64,
    /// Its last answer; the end of the transition if one is missing.
    pub(super) to_ns: u64,
    /// Who answered last or not at all.
    pub(super) last: String,
    pub(super) all_answered: bool,
}

impl From<&JsonReport> for Shown {
    fn from(report: &JsonReport) -> Self {
        let mut phases: Vec<Phase> = Vec::new();
        for one in &report.participants {
            add(one, report.total_ns, &mut phases);
        }
        phases.sort_by_key(|phase| phase.from_ns);
        Self {
            operation: report.operation.clone(),
            outcome: report.outcome.clone(),
            total_ns: report.total_ns,
            downtime_ns: report.downtime_ns,
            phases,
            failure: report.failures.first().cloned(),
        }
    }
}

fn add(one: &JsonParticipant, total_ns: u64, phases: &mut Vec<Phase>) {
    for command in &one.commands {
        let answered = command.answered_ns.unwrap_or(total_ns);
        let known = phases
            .iter_mut()
            .find(|phase| (phase.epoch, &phase.name) == (command.epoch, &command.phase));
        match known {
            Some(phase) => {
                phase.from_ns = phase.from_ns.min(command.sent_ns);
                if answered > phase.to_ns {
                    phase.to_ns = answered;
                    phase.last.clone_from(&one.name);
                }
                phase.all_answered &= command.answered_ns.is_some();
            }
            None => phases.push(Phase {
                name: command.phase.clone(),
                undo: command.undo,
                epoch: command.epoch,
                from_ns: command.sent_ns,
                to_ns: answered,
                last: one.name.clone(),
                all_answered: command.answered_ns.is_some(),
            }),
        }
    }
}

/// Where a phase lies in its transition: a bar of that width, in eighths of a character.
pub(super) fn bar(phase: &Phase, total_ns: u64, width: u16) -> String {
    let cells = u64::from(width) * 8;
    let place = |ns: u64| {
        let eighths = u128::from(ns.min(total_ns)) * u128::from(cells);
        u64::try_from(eighths / u128::from(total_ns.max(1))).unwrap_or(cells)
    };
    // At least a trace of it is seen.
    let from = place(phase.from_ns).min(cells.saturating_sub(1));
    let to = place(phase.to_ns).max(from + 1);
    let mut text = " ".repeat(usize::try_from(from / 8).unwrap_or_default());
    // A part of a cell can be filled from its left only: the first one is filled as a whole.
    let mut cell = from / 8;
    while cell * 8 < to {
        let filled = (to - cell * 8).min(8);
        text.push(
            ['▏', '▎', '▍', '▌', '▋', '▊', '▉', '█'][usize::try_from(filled - 1).unwrap_or(7)],
        );
        cell += 1;
    }
    text
}
