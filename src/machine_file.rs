//! Machine files: what a machine is made of, in TOML; `docs/machine-file.md` has every key.
//!
//! - [`read`](MachineFile::read) takes a text apart and notes *everything* that is wrong with it
//!   ([`Problems`]), without looking at anything else than the text;
//! - [`checks`] looks at what the file speaks of: programs, sockets, files;
//! - [`build`] makes a [`MachineBuilder`](standstill::coordinator::MachineBuilder) of it.

mod build;
pub(crate) mod checks;
mod device;
mod diagnostic;
pub(crate) mod fields;
pub(crate) mod hook;
mod names;
mod qmp;
#[cfg(test)]
mod tests;

pub(crate) use checks::Beginning;
pub(crate) use device::DeviceEntry;
pub(crate) use diagnostic::Problems;
pub(crate) use hook::HookEntry;
pub(crate) use qmp::QmpEntry;

use device::RestartKeys;
use diagnostic::Problem;
use fields::{Fields, Placed};
use names::Names;
use standstill::coordinator::{Deadlines, LossPolicy, OnFailure, Presence, RestartPolicy};
use std::cell::RefCell;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::de::{DeTable, DeValue};

/// The keys of a machine file.
pub(crate) const MACHINE_KEYS: [&str; 12] = [
    "name",
    "heartbeat",
    "orphan",
    "on-failure",
    "on-loss",
    "presence",
    "restart",
    "deadlines",
    "device",
    "ram",
    "hook",
    "qmp",
];
/// The keys of its `[deadlines]`.
pub(crate) const DEADLINE_KEYS: [&str; 9] =
    ["hello", "first-phase", "second-phase", "undo", "fence", "memory", "stall", "silence", "qmp"];
/// The keys of a `[[ram]]`.
pub(crate) const RAM_KEYS: [&str; 1] = ["path"];

/// The words for what is done when a device is lost.
const ON_LOSS: [(&str, OnLossWord); 3] = [
    ("fail", OnLossWord::Fail),
    ("restart", OnLossWord::Restart),
    ("continue-without", OnLossWord::ContinueWithout),
];
/// The words for whether a machine may run without a device.
const PRESENCE: [(&str, Presence); 2] =
    [("required", Presence::Required), ("optional", Presence::Optional)];

#[derive(Clone, Copy)]
enum OnLossWord {
    Fail,
    Restart,
    ContinueWithout,
}

impl OnLossWord {
    fn policy(self, restart: RestartPolicy) -> LossPolicy {
        match self {
            Self::Fail => LossPolicy::Fail,
            Self::Restart => LossPolicy::Restart(restart),
            Self::ContinueWithout => LossPolicy::ContinueWithout,
        }
    }
}

/// What becomes of the devices when their coordinator dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Orphan {
    /// They stay as they are and wait for another one.
    Keep,
    /// They end.
    Exit,
}

impl Orphan {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Keep => "keep",
            Self::Exit => "exit",
        }
    }
}

/// Where the relative paths of a machine file begin.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// Programs, hooks' commands and RAM: the folder of the file.
    pub(crate) file: PathBuf,
    /// Data sockets: the machine's folder below this one.
    pub(crate) runtime: PathBuf,
}

/// A machine as its file describes it.
#[derive(Clone, Debug)]
pub(crate) struct MachineFile {
    pub(crate) name: String,
    /// The machine's folder, in which relative sockets are.
    pub(crate) folder: PathBuf,
    heartbeat: Option<Duration>,
    pub(crate) orphan: Orphan,
    on_failure: OnFailure,
    defaults: Defaults,
    deadlines: Deadlines,
    pub(crate) devices: Vec<DeviceEntry>,
    pub(crate) ram: Vec<Placed<PathBuf>>,
    hooks: Vec<HookEntry>,
    pub(crate) qmp: Option<QmpEntry>,
}

/// What counts for devices that say nothing of their own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Defaults {
    on_loss: Option<LossPolicy>,
    presence: Option<Presence>,
    restart: RestartPolicy,
}

impl MachineFile {
    /// Takes the text apart. What is wrong with it goes to `problems`; if anything is, what is
    /// returned is no machine that could be started.
    pub(crate) fn read(text: &str, places: &Places, problems: &mut Problems) -> Self {
        let noted = RefCell::new(problems.clone());
        let (table, errors) = DeTable::parse_recoverable(text);
        note_syntax(&errors, text, &noted);
        let root = Fields::new(table.get_ref(), 0..0, "a machine file", &noted);
        root.only(&MACHINE_KEYS);
        let file = Self::from_fields(&root, places);
        *problems = noted.into_inner();
        file
    }

    fn from_fields(root: &Fields<'_>, places: &Places) -> Self {
        let placed_name = root.needed_text("name");
        let name = placed_name.as_ref().map(|name| name.value.clone()).unwrap_or_default();
        let runtime = places.runtime.join(&name);
        let orphan = root.choice("orphan", &[("keep", Orphan::Keep), ("exit", Orphan::Exit)]);
        let orphan = orphan.unwrap_or(Orphan::Keep);
        let on_failure = root.choice(
            "on-failure",
            &[("rollback", OnFailure::Rollback), ("stay-stopped", OnFailure::StayStopped)],
        );
        let restart = RestartKeys::read(root).over(RestartPolicy::default());
        let defaults = Defaults {
            on_loss: root.choice("on-loss", &ON_LOSS).map(|word| word.policy(restart)),
            presence: root.choice("presence", &PRESENCE),
            restart,
        };
        let places = Places { file: places.file.clone(), runtime: runtime.clone() };
        let mut names = Names::new(&runtime, orphan);
        if let Some(name) = &placed_name {
            names::check_file_name("machine", name, root);
            names.machine(name, root);
        }
        let devices: Vec<_> = root
            .tables("device", "a device")
            .iter()
            .map(|fields| DeviceEntry::from_fields(fields, &defaults, &places))
            .collect();
        for device in &devices {
            names.device(device, root);
        }
        let hooks: Vec<_> = root
            .tables("hook", "a hook")
            .iter()
            .map(|fields| HookEntry::from_fields(fields, &places))
            .collect();
        let qmp = QmpEntry::from_fields(root, &runtime);
        names.hooks(&hooks, qmp.as_ref(), root);
        let ram = root.tables("ram", "a ram").into_iter().filter_map(|fields| {
            fields.only(&RAM_KEYS);
            let path = fields.needed_text("path")?;
            Some(Placed { value: places.file.join(path.value), span: path.span })
        });
        Self {
            heartbeat: root.duration("heartbeat"),
            orphan,
            on_failure: on_failure.unwrap_or(OnFailure::Rollback),
            defaults,
            deadlines: deadlines(root),
            devices,
            ram: ram.collect(),
            hooks,
            qmp,
            folder: runtime,
            name,
        }
    }

    /// Takes the text of one device apart, as `standstill add` has it: the keys of a `[[device]]`,
    /// with or without that header.
    pub(crate) fn read_device(
        &self,
        text: &str,
        places: &Places,
        problems: &mut Problems,
    ) -> Option<DeviceEntry> {
        let noted = RefCell::new(problems.clone());
        let (table, errors) = DeTable::parse_recoverable(text);
        note_syntax(&errors, text, &noted);
        let runtime = places.runtime.join(&self.name);
        let places = Places { file: places.file.clone(), runtime: runtime.clone() };
        let root = Fields::new(table.get_ref(), 0..0, "a device", &noted);
        let has_header = matches!(
            table.get_ref().get("device").map(toml::Spanned::get_ref),
            Some(DeValue::Array(_))
        );
        let device = if has_header {
            root.only(&["device"]);
            let devices = root.tables("device", "a device");
            if devices.len() > 1 {
                let message = "one device is added at a time";
                root.note(Problem::new(message, devices[1].span.clone()));
            }
            devices.first().map(|f| DeviceEntry::from_fields(f, &self.defaults, &places))
        } else {
            Some(DeviceEntry::from_fields(&root, &self.defaults, &places))
        };
        let mut names = Names::new(&runtime, self.orphan);
        if let Some(device) = &device {
            names.device(device, &root);
        }
        *problems = noted.into_inner();
        device
    }
}

/// Notes what is no TOML.
fn note_syntax(errors: &[toml::de::Error], text: &str, noted: &RefCell<Problems>) {
    for error in errors {
        let span: Range<usize> = error.span().unwrap_or(text.len()..text.len());
        let message = error.message().lines().next().unwrap_or("no TOML").to_owned();
        noted.borrow_mut().add(Problem::new(message, span).label("this is no TOML"));
    }
}

fn deadlines(root: &Fields<'_>) -> Deadlines {
    let mut deadlines = Deadlines::default();
    let Some(fields) = root.table("deadlines", "the table of deadlines") else { return deadlines };
    fields.only(&DEADLINE_KEYS);
    let slots = [
        ("hello", &mut deadlines.hello),
        ("first-phase", &mut deadlines.first_phase),
        ("second-phase", &mut deadlines.second_phase),
        ("undo", &mut deadlines.undo),
        ("fence", &mut deadlines.fence),
        ("memory", &mut deadlines.memory),
        ("stall", &mut deadlines.stall),
        ("silence", &mut deadlines.silence),
    ];
    for (key, slot) in slots {
        // Only the last two may be switched off.
        let duration = match key {
            "stall" | "silence" => fields.duration(key),
            _ => fields.deadline(key),
        };
        if let Some(duration) = duration {
            *slot = duration;
        }
    }
    deadlines
}

/// The folder of a file, as an absolute path.
pub(crate) fn folder_of(file: &Path) -> PathBuf {
    let absolute = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    absolute.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned)
}
