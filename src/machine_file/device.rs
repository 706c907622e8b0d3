//! A `[[device]]` of a machine file.

use super::diagnostic::Problem;
use super::fields::{Fields, Placed};
use super::names::check_file_name;
use super::{Defaults, ON_LOSS, PRESENCE, Places};
use standstill::coordinator::{DeviceSpec, LossPolicy, Presence, QEMU_VFIO_USER, RestartPolicy};
use standstill::device_proc::devices::vhost_user_blk::{MAX_QUEUES, MAX_SERIAL};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

/// The keys that every device may have.
pub(crate) const DEVICE_KEYS: [&str; 13] = [
    "name",
    "kind",
    "program",
    "args",
    "env",
    "socket",
    "on-loss",
    "restart",
    "presence",
    "one-phase",
    "client",
    "first-phase",
    "second-phase",
];
/// The keys of the kind `copy-engine` besides.
pub(crate) const COPY_ENGINE_KEYS: [&str; 3] = ["memory", "slow-prepare", "slow-stop"];
/// The keys of the kind `vhost-user-blk` besides.
pub(crate) const DISK_KEYS: [&str; 6] = ["file", "queues", "read-only", "direct", "serial", "lock"];
/// The keys of a `restart`.
pub(crate) const RESTART_KEYS: [&str; 4] = ["budget", "window", "first-backoff", "longest-backoff"];

/// The kinds that this program has.
const KINDS: [(&str, Kind); 2] =
    [("copy-engine", Kind::CopyEngine), ("vhost-user-blk", Kind::VhostUserBlk)];
/// The smallest and the largest memory of a copy engine.
const COPY_ENGINE_MEMORY: std::ops::RangeInclusive<u64> = 4096..=4 << 30;

/// How many queues a disk can have.
const DISK_QUEUES: std::ops::RangeInclusive<u32> = 1..=MAX_QUEUES as u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    CopyEngine,
    VhostUserBlk,
}

impl Kind {
    /// The keys of this kind alone.
    fn keys(self) -> &'static [&'static str] {
        match self {
            Self::CopyEngine => &COPY_ENGINE_KEYS,
            Self::VhostUserBlk => &DISK_KEYS,
        }
    }
}

/// The other end of a device's data socket.
#[derive(Clone, Copy)]
enum Client {
    Qemu,
    CannotReconnect,
    Reconnects,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// This program again, as a device of that kind with those arguments.
    BuiltIn(Vec<String>),
    /// Another program.
    Other(Placed<PathBuf>),
}

/// One device.
#[derive(Clone, Debug)]
pub(crate) struct DeviceEntry {
    pub(crate) name: Placed<String>,
    pub(crate) program: Option<Program>,
    args: Vec<String>,
    env: BTreeMap<String, String>,
    pub(crate) socket: Option<Placed<PathBuf>>,
    on_loss: Option<LossPolicy>,
    presence: Option<Presence>,
    one_phase: bool,
    no_reconnect: Option<&'static str>,
    deadlines: Option<(Duration, Duration)>,
}

impl DeviceEntry {
    pub(super) fn from_fields(fields: &Fields<'_>, defaults: &Defaults, places: &Places) -> Self {
        let name =
            fields.needed_text("name").inspect(|name| check_file_name("device", name, fields));
        let name = name.unwrap_or(Placed { value: String::new(), span: fields.span.clone() });
        let socket = fields
            .text("socket")
            .map(|socket| Placed { value: places.runtime.join(socket.value), span: socket.span });
        let kind = fields.choice("kind", &KINDS);
        let program = program(fields, kind, &name, socket.as_ref(), places);
        let restart = RestartKeys::read(fields);
        let on_loss = fields.choice("on-loss", &ON_LOSS);
        let policy = restart.over(defaults.restart);
        let on_loss = on_loss.map(|word| word.policy(policy));
        if let (Some(place), None) = (&restart.place, on_loss.filter(is_restart)) {
            let inherited = on_loss.is_none() && defaults.on_loss.is_some_and(|l| is_restart(&l));
            if !inherited {
                let message = "`restart` has no effect without `on-loss = \"restart\"`";
                fields.note(Problem::new(message, place.clone()));
            }
        }
        // What the machine says of all, with this device's own budget.
        let own = restart.place.is_some() && on_loss.is_none();
        let on_loss =
            if own { defaults.on_loss.map(|_| LossPolicy::Restart(policy)) } else { on_loss };
        let no_reconnect = client(fields, on_loss.or(defaults.on_loss));
        let args = fields.texts("args").unwrap_or_default();
        let args = args.into_iter().map(|arg| with_socket(&arg.value, socket.as_ref()));
        Self {
            args: args.collect(),
            env: fields.variables("env"),
            program,
            on_loss,
            presence: fields.choice("presence", &PRESENCE),
            one_phase: fields.choice("one-phase", &[("allow", true), ("refuse", false)])
                == Some(true),
            no_reconnect,
            deadlines: deadlines(fields),
            socket,
            name,
        }
    }

    /// As the coordinator starts it.
    pub(crate) fn spec(&self) -> std::io::Result<DeviceSpec> {
        let name = self.name.value.clone();
        let mut spec = match &self.program {
            Some(Program::Other(program)) => DeviceSpec::new(name, &program.value),
            Some(Program::BuiltIn(args)) => DeviceSpec::new(name, own_program()?).args(args),
            None => DeviceSpec::new(name, ""),
        };
        spec = spec.args(&self.args);
        for (name, value) in &self.env {
            spec = spec.env(name, value);
        }
        for name in crate::run::notify::VARIABLES {
            if !self.env.contains_key(name) {
                spec = spec.env_remove(name);
            }
        }
        if let Some(policy) = self.on_loss {
            spec = spec.on_loss(policy);
        }
        if let Some(presence) = self.presence {
            spec = spec.presence(presence);
        }
        if self.one_phase {
            spec = spec.allow_one_phase();
        }
        if let Some(reason) = self.no_reconnect {
            spec = spec.client_cannot_reconnect(reason);
        }
        if let Some((first, second)) = self.deadlines {
            spec = spec.deadlines(first, second);
        }
        Ok(spec)
    }

    /// Whether the machine may start without it.
    pub(crate) fn is_optional(&self, defaults: &Defaults) -> bool {
        self.presence.or(defaults.presence) == Some(Presence::Optional)
    }
}

/// This program. Asked once: after an upgrade the running program has no path any more, and devices
/// that are started then are of the new version.
fn own_program() -> std::io::Result<&'static Path> {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let program = std::env::current_exe()?;
    Ok(PROGRAM.get_or_init(|| program))
}

fn is_restart(policy: &LossPolicy) -> bool {
    matches!(policy, LossPolicy::Restart(_))
}

/// What kind of program it is; notes what does not go together.
fn program(
    fields: &Fields<'_>,
    kind: Option<Kind>,
    name: &Placed<String>,
    socket: Option<&Placed<PathBuf>>,
    places: &Places,
) -> Option<Program> {
    let kind_place = fields.key("kind");
    let other = fields.text("program");
    match (&kind_place, fields.key("program")) {
        (Some(kind), Some(program)) => fields.note(
            Problem::new("a device has a `kind` or a `program`, not both", program)
                .other(kind.clone(), "its kind"),
        ),
        (None, None) => fields.note(
            Problem::new(
                format!("device {:?} needs a `kind` or a `program`", name.value),
                name.span.clone(),
            )
            .help("kind = \"copy-engine\", or program = \"/usr/bin/my-device\""),
        ),
        _ => {}
    }
    // Of a kind that is misspelt nobody knows the keys.
    if kind_place.is_none() || kind.is_some() {
        let label = if kind.is_some() { "not with this `kind`" } else { "not with a `program`" };
        for (word, other) in KINDS.iter().filter(|(_, other)| kind != Some(*other)) {
            for key in other.keys() {
                if let Some(place) = fields.key(key) {
                    let message = format!("`{key}` is for devices of kind {word:?}");
                    fields.note(Problem::new(message, place).label(label));
                }
            }
        }
    }
    if let Some(place) = fields.key("args").filter(|_| kind_place.is_some()) {
        let message = "`args` are for devices with a `program`";
        fields.note(Problem::new(message, place).label("not with a `kind`"));
    }
    let of_kinds = KINDS.iter().flat_map(|(_, kind)| kind.keys());
    let known: Vec<_> = DEVICE_KEYS.iter().chain(of_kinds).copied().collect();
    fields.only(&known);
    match (kind, other) {
        (Some(Kind::CopyEngine), _) => Some(Program::BuiltIn(copy_engine(fields, name, socket))),
        (Some(Kind::VhostUserBlk), _) => Some(Program::BuiltIn(disk(fields, name, socket, places))),
        (None, Some(program)) => {
            let path = PathBuf::from(&program.value);
            // A bare name is looked up in PATH.
            let path = if program.value.contains('/') { places.file.join(path) } else { path };
            Some(Program::Other(Placed { value: path, span: program.span }))
        }
        (None, None) => None,
    }
}

/// The arguments of `standstill` that every device of this program has; notes that it has no socket, and
/// what that is for.
fn built_in(
    kind: &str,
    label: &'static str,
    fields: &Fields<'_>,
    name: &Placed<String>,
    socket: Option<&Placed<PathBuf>>,
) -> Vec<String> {
    if socket.is_none() && fields.key("socket").is_none() {
        let message = format!("device {:?} needs a `socket`", name.value);
        fields.note(
            Problem::new(message, name.span.clone())
                .label(label)
                .help("a relative path is below the machine's runtime directory"),
        );
    }
    let mut args = vec!["device".to_owned(), kind.to_owned()];
    if let Some(socket) = socket {
        // Its path came from a text.
        args.push(format!("--socket={}", socket.value.display()));
    }
    args
}

/// The arguments of `standstill`.
fn disk(
    fields: &Fields<'_>,
    name: &Placed<String>,
    socket: Option<&Placed<PathBuf>>,
    places: &Places,
) -> Vec<String> {
    let label = "a disk serves a vhost-user frontend there";
    let mut args = built_in("vhost-user-blk", label, fields, name, socket);
    match fields.text("file") {
        Some(file) => args.push(format!("--file={}", places.file.join(file.value).display())),
        None if fields.key("file").is_none() => {
            let message = format!("device {:?} needs a `file`", name.value);
            let problem = Problem::new(message, name.span.clone());
            fields.note(problem.help("a relative path begins at the folder of the machine file"));
        }
        None => {}
    }
    if let Some(queues) = fields.number::<u32>("queues") {
        if !DISK_QUEUES.contains(&queues) {
            let place = fields.key("queues").unwrap_or_default();
            let problem = Problem::new("a disk cannot have so many `queues`", place);
            fields.note(problem.label("expected 1 to 64"));
        }
        args.push(format!("--queues={queues}"));
    }
    for key in ["read-only", "direct"] {
        if fields.choice(key, &[("yes", true), ("no", false)]) == Some(true) {
            args.push(format!("--{key}"));
        }
    }
    if let Some(serial) = fields.text("serial") {
        if serial.value.len() > MAX_SERIAL {
            let problem = Problem::new("`serial` of a disk is too long", serial.span);
            fields.note(problem.label("expected at most 20 bytes"));
        }
        args.push(format!("--serial={}", serial.value));
    }
    if let Some(lock) = fields.choice("lock", &[("process", "process"), ("rings", "rings")]) {
        args.push(format!("--lock={lock}"));
    }
    args
}

/// The arguments of `standstill`.
fn copy_engine(
    fields: &Fields<'_>,
    name: &Placed<String>,
    socket: Option<&Placed<PathBuf>>,
) -> Vec<String> {
    let label = "a copy engine serves a vfio-user client there";
    let mut args = built_in("copy-engine", label, fields, name, socket);
    if let Some(memory) = fields.size("memory") {
        if !COPY_ENGINE_MEMORY.contains(&memory.value) || !memory.value.is_power_of_two() {
            let problem =
                Problem::new("`memory` of a copy engine cannot have this size", memory.span);
            fields.note(problem.label("expected a power of two from 4KiB to 4GiB"));
        }
        args.push(format!("--memory={}", memory.value));
    }
    for key in ["slow-prepare", "slow-stop"] {
        if let Some(time) = fields.duration(key) {
            args.push(format!("--{key}={}", humantime::format_duration(time)));
        }
    }
    args
}

/// Why the client does not come back to a new process, if it does not.
fn client(fields: &Fields<'_>, on_loss: Option<LossPolicy>) -> Option<&'static str> {
    let choices = [
        ("qemu", Client::Qemu),
        ("cannot-reconnect", Client::CannotReconnect),
        ("reconnects", Client::Reconnects),
    ];
    let reason = match fields.choice("client", &choices)? {
        Client::Qemu => QEMU_VFIO_USER,
        Client::CannotReconnect => "the machine file says that its client cannot reconnect",
        Client::Reconnects => return None,
    };
    if on_loss.as_ref().is_some_and(is_restart) {
        let message = "a device whose client cannot reconnect cannot be restarted";
        let place = fields.key("client").unwrap_or_default();
        let mut problem = Problem::new(message, place).label(reason);
        if let Some(policy) = fields.key("on-loss") {
            problem = problem.other(policy, "restarted because of this");
        }
        fields.note(problem.help("use on-loss = \"fail\" or \"continue-without\" for it"));
    }
    Some(reason)
}

/// Both deadlines of a device, where it has one of its own.
fn deadlines(fields: &Fields<'_>) -> Option<(Duration, Duration)> {
    let both = [fields.deadline("first-phase"), fields.deadline("second-phase")];
    match both {
        [Some(first), Some(second)] => Some((first, second)),
        [None, None] => None,
        _ => {
            let (there, missing) = if both[0].is_some() {
                ("first-phase", "second-phase")
            } else {
                ("second-phase", "first-phase")
            };
            let place = fields.key(there).unwrap_or_default();
            let message = format!("`{there}` of a device needs a `{missing}` beside it");
            fields.note(Problem::new(message, place));
            None
        }
    }
}

/// An argument in which `{socket}` stands for the path of the data socket.
fn with_socket(arg: &str, socket: Option<&Placed<PathBuf>>) -> String {
    match socket {
        Some(socket) => arg.replace("{socket}", &socket.value.display().to_string()),
        None => arg.to_owned(),
    }
}

/// The keys of a `restart`, as far as they are there.
#[derive(Debug, Default)]
pub(super) struct RestartKeys {
    place: Option<std::ops::Range<usize>>,
    budget: Option<u32>,
    window: Option<Duration>,
    first_backoff: Option<Duration>,
    longest_backoff: Option<Duration>,
}

impl RestartKeys {
    pub(super) fn read(fields: &Fields<'_>) -> Self {
        let Some(restart) = fields.table("restart", "a restart") else { return Self::default() };
        restart.only(&RESTART_KEYS);
        Self {
            place: Some(restart.span.clone()),
            budget: restart.number("budget"),
            window: restart.duration("window"),
            first_backoff: restart.duration("first-backoff"),
            longest_backoff: restart.duration("longest-backoff"),
        }
    }

    /// What is not there is as in `policy`.
    pub(super) fn over(&self, policy: RestartPolicy) -> RestartPolicy {
        RestartPolicy {
            budget: self.budget.unwrap_or(policy.budget),
            window: self.window.unwrap_or(policy.window),
            first_backoff: self.first_backoff.unwrap_or(policy.first_backoff),
            longest_backoff: self.longest_backoff.unwrap_or(policy.longest_backoff),
        }
    }
}
