//! Names and paths that must not be there twice, or cannot be used.

use super::device::DeviceEntry;
use super::diagnostic::Problem;
use super::fields::{Fields, Placed};
use super::{HookEntry, Orphan, QmpEntry};
use crate::run::directory::{CONTROL, OPERATOR_SOCKET};
use standstill::coordinator::record::MAX_SOCKET_PATH;
use standstill::protocol::message::MAX_NAME;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Notes a name that cannot be the name of a file.
pub(crate) fn check_file_name(what: &str, name: &Placed<String>, fields: &Fields<'_>) {
    let Placed { value, span } = name;
    let why = if value.is_empty() || value.len() > MAX_NAME {
        format!("has {} bytes", value.len())
    } else if value.starts_with('.') {
        "begins with a dot".to_owned()
    } else if let Some(bad) = value.chars().find(|c| *c == '/' || c.is_control()) {
        format!("has {bad:?} in it")
    } else {
        return;
    };
    let message = format!("{value:?} cannot be the name of a {what}");
    fields.note(Problem::new(message, span.clone()).label(why).help(format!(
        "it is part of a file's name: 1 to {MAX_NAME} bytes, no '/', no leading dot"
    )));
}

/// The names and sockets of one machine.
pub(super) struct Names<'a> {
    /// The machine's folder.
    runtime: &'a Path,
    orphan: Orphan,
    devices: BTreeMap<String, Range<usize>>,
    sockets: BTreeMap<PathBuf, Range<usize>>,
}

impl<'a> Names<'a> {
    pub(super) fn new(runtime: &'a Path, orphan: Orphan) -> Self {
        Self { runtime, orphan, devices: BTreeMap::new(), sockets: BTreeMap::new() }
    }

    /// Notes an operator socket that cannot be.
    pub(super) fn machine(&self, name: &Placed<String>, root: &Fields<'_>) {
        let socket = self.runtime.join(OPERATOR_SOCKET);
        check_length(&socket, "operator socket of this machine", &name.span, root);
    }

    /// Notes what a device has in common with an earlier one, and sockets that cannot be.
    pub(super) fn device(&mut self, device: &DeviceEntry, root: &Fields<'_>) {
        let Placed { value: name, span } = &device.name;
        if !name.is_empty() {
            if let Some(first) = self.devices.get(name) {
                let problem = Problem::new(format!("two devices are named {name:?}"), span.clone());
                root.note(problem.label("again").other(first.clone(), "first here"));
            } else {
                self.devices.insert(name.clone(), span.clone());
            }
            if self.orphan == Orphan::Keep {
                let control = self.runtime.join(CONTROL).join(format!("{name}.sock"));
                check_length(&control, "control socket of this device", span, root);
            }
        }
        let Some(Placed { value: path, span }) = &device.socket else { return };
        check_length(path, "socket", span, root);
        if let Some(first) = self.sockets.get(path) {
            let message = format!("two devices have the socket {}", path.display());
            let problem = Problem::new(message, span.clone());
            root.note(problem.label("again").other(first.clone(), "first here"));
        } else if *path == self.runtime.join(OPERATOR_SOCKET) {
            let message = format!("{} is the operator socket of the machine", path.display());
            root.note(Problem::new(message, span.clone()));
        } else {
            self.sockets.insert(path.clone(), span.clone());
        }
    }

    /// Notes hooks of the same name; the VM is one, too, and has a socket that nobody else has.
    pub(super) fn hooks(&self, hooks: &[HookEntry], qmp: Option<&QmpEntry>, root: &Fields<'_>) {
        let mut seen: BTreeMap<&str, Range<usize>> = BTreeMap::new();
        if let Some(QmpEntry { path: Placed { value: path, span }, .. }) = qmp {
            seen.insert(QmpEntry::HOOK, span.clone());
            check_length(path, "QMP socket", span, root);
            let taken = |whose: &str| {
                Problem::new(format!("{} is the {whose}", path.display()), span.clone())
                    .label("QEMU serves QMP at a socket of its own")
            };
            if let Some(first) = self.sockets.get(path) {
                root.note(taken("data socket of a device").other(first.clone(), "here"));
            } else if *path == self.runtime.join(OPERATOR_SOCKET) {
                root.note(taken("operator socket of the machine"));
            }
        }
        for HookEntry { name: Placed { value, span }, .. } in hooks {
            match seen.get(value.as_str()) {
                Some(first) if !value.is_empty() => {
                    let problem =
                        Problem::new(format!("two hooks are named {value:?}"), span.clone());
                    root.note(problem.label("again").other(first.clone(), "first here"));
                }
                _ => drop(seen.insert(value, span.clone())),
            }
        }
    }
}

fn check_length(path: &Path, what: &str, span: &Range<usize>, root: &Fields<'_>) {
    let length = path.as_os_str().len();
    if length > MAX_SOCKET_PATH {
        let message = format!("the path of the {what} is too long for a Unix socket");
        let label = format!("{length} bytes, at most {MAX_SOCKET_PATH} are possible");
        root.note(
            Problem::new(message, span.clone())
                .label(label)
                .help(format!("it is {}", path.display())),
        );
    }
}
