//! A `[[hook]]` of a machine file: commands that run when the machine stops and starts.

use super::Places;
use super::diagnostic::Problem;
use super::fields::{Fields, Placed};
use standstill::coordinator::{HookSpec, Slot};
use std::path::PathBuf;
use std::time::Duration;

/// The keys of a hook.
pub(crate) const HOOK_KEYS: [&str; 8] =
    ["name", "stop", "start", "slot", "start-slot", "rank", "start-rank", "deadline"];

const SLOTS: [(&str, Slot); 3] =
    [("before", Slot::Before), ("between", Slot::Between), ("after", Slot::After)];

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) program: Placed<PathBuf>,
    pub(crate) args: Vec<String>,
}

/// One hook.
#[derive(Clone, Debug)]
pub(crate) struct HookEntry {
    pub(crate) name: Placed<String>,
    pub(crate) stop: Option<Command>,
    pub(crate) start: Option<Command>,
    slot: Slot,
    start_slot: Option<Slot>,
    rank: i32,
    start_rank: Option<i32>,
    deadline: Option<Duration>,
}

impl HookEntry {
    pub(super) fn from_fields(fields: &Fields<'_>, places: &Places) -> Self {
        fields.only(&HOOK_KEYS);
        let name = fields.needed_text("name");
        let stop = command(fields, "stop", places);
        let start = command(fields, "start", places);
        if fields.key("stop").is_none() && fields.key("start").is_none() {
            let message = "a hook needs a command: `stop`, `start` or both";
            fields.note(Problem::new(message, fields.span.clone()));
        }
        if fields.key("slot").is_none() {
            let message = "a hook needs a `slot`: \"before\", \"between\" or \"after\" the phases";
            fields.note(Problem::new(message, fields.span.clone()));
        }
        Self {
            name: name.unwrap_or(Placed { value: String::new(), span: fields.span.clone() }),
            stop,
            start,
            slot: fields.choice("slot", &SLOTS).unwrap_or(Slot::Before),
            start_slot: fields.choice("start-slot", &SLOTS),
            rank: fields.number("rank").unwrap_or(0),
            start_rank: fields.number("start-rank"),
            deadline: fields.deadline("deadline"),
        }
    }

    /// Where and when it runs.
    pub(crate) fn spec(&self) -> HookSpec {
        let mut spec = HookSpec::new(&self.name.value, self.slot).rank(self.rank);
        if let Some(slot) = self.start_slot {
            spec = spec.start_slot(slot);
        }
        if let Some(rank) = self.start_rank {
            spec = spec.start_rank(rank);
        }
        match self.deadline {
            Some(deadline) => spec.deadline(deadline),
            None => spec,
        }
    }
}

fn command(fields: &Fields<'_>, key: &str, places: &Places) -> Option<Command> {
    let mut words = fields.texts(key)?.into_iter();
    let Some(program) = words.next() else {
        let place = fields.key(key).unwrap_or_default();
        fields.note(Problem::new(format!("`{key}` must have a program in it"), place));
        return None;
    };
    let path = PathBuf::from(&program.value);
    let path = if program.value.contains('/') { places.file.join(path) } else { path };
    Some(Command {
        program: Placed { value: path, span: program.span },
        args: words.map(|word| word.value).collect(),
    })
}
