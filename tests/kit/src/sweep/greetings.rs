//! Faults at a device's Hello, and at the query of a take-over: they have to be in its process before anybody
//! can tell it anything, and where nobody can who has only just taken it over.
//!
//! Each device of such a plan is started by a shell, which finds in a folder what its process is armed
//! with, puts it [into the environment](standstill_protocol::fault::VARIABLE), and becomes the device.

use super::engine::RunError;
use crate::Processes;
use rustix::process::Pid;
use standstill_coordinator::DeviceSpec;
use standstill_protocol::fault::{Armament, Fault, JournalLine, Point, VARIABLE};
use std::io;
use std::path::PathBuf;
use tempfile::TempDir;

/// Writes down its process number, and takes the first order that is there for this device: one that is
/// for every process stays. `$0` is where the device's files are, and the rest is its program.
const SHELL: &str = r#"
echo $$ >> "$0/processes"
for order in "$0"/*.once "$0"/*.each; do
    [ -e "$order" ] || continue
    read -r VARIABLE < "$order"
    export VARIABLE
    case $order in *.once) mv "$order" "$order.taken";; esac
    break
done
exec "$@"
"#;

/// What is to happen at Hellos of a machine's devices, and what has. With nothing in it no device is
/// started in another way than ever.
#[derive(Default)]
pub(super) struct Greetings(Option<TempDir>);

impl Greetings {
    /// With orders for devices.
    pub(super) fn new() -> Result<Self, RunError> {
        let folder = tempfile::Builder::new().prefix("greetings-").tempdir();
        Ok(Self(Some(folder.map_err(failed)?)))
    }

    fn of(&self, device: usize) -> Option<PathBuf> {
        Some(self.0.as_ref()?.path().join(format!("device{device}")))
    }

    /// The same device, which takes orders.
    pub(super) fn wrap(&self, device: usize, spec: DeviceSpec) -> Result<DeviceSpec, RunError> {
        let Some(own) = self.of(device) else { return Ok(spec) };
        std::fs::create_dir_all(&own).map_err(failed)?;
        let shell = SHELL.replace("VARIABLE", VARIABLE);
        let program = spec.process().program().to_owned();
        let device = std::iter::once(program.into()).chain(spec.process().arguments().to_vec());
        let arguments = ["-c".into(), shell.into(), own.into()].into_iter().chain(device);
        let arguments: Vec<std::ffi::OsString> = arguments.collect();
        Ok(spec.launched_by(|process| process.replaced("/bin/sh", arguments)))
    }

    /// Arms the next process of a device, or every one from now on if the fault has no occurrence.
    /// `number` is that of the fault in its plan.
    pub(super) fn arm(&self, device: usize, number: usize, fault: Fault) -> Result<(), RunError> {
        let Some(own) = self.of(device) else { return Ok(()) };
        // Every device of a machine that is kept is asked once when that has started: the next query is the
        // take-over's.
        let nth = if fault.point == Point::Query { 2 } else { 1 };
        let faults = vec![Fault { nth, ..fault }];
        let armament = Armament { journal: journal(&own, number), faults };
        let text = serde_json::to_string(&armament).map_err(io::Error::other).map_err(failed)?;
        let kind = if fault.nth == 0 { "each" } else { "once" };
        let (path, new) = (own.join(format!("{number}.{kind}")), own.join("new"));
        std::fs::write(&new, text + "\n").map_err(failed)?;
        std::fs::rename(&new, &path).map_err(failed)
    }

    /// Whether that fault has happened.
    pub(super) fn fired(&self, device: usize, number: usize) -> bool {
        let text =
            self.of(device).and_then(|own| std::fs::read_to_string(journal(&own, number)).ok());
        let fired =
            |line: &str| matches!(JournalLine::parse(line), Some(JournalLine::Fired { .. }));
        text.is_some_and(|text| text.lines().any(fired))
    }

    /// The processes of that many devices that were ever started.
    pub(super) fn processes(&self, devices: usize) -> Processes {
        let mut all = Processes::none();
        for device in 0..devices {
            let own = self.of(device).map(|own| own.join("processes"));
            let text = own.and_then(|path| std::fs::read_to_string(path).ok()).unwrap_or_default();
            for pid in text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
                all.add(&format!("device {device}"), pid);
            }
        }
        all
    }
}

fn journal(own: &std::path::Path, number: usize) -> PathBuf {
    own.join(format!("{number}.journal"))
}

fn failed(source: io::Error) -> RunError {
    RunError::System { what: "arm a device at its start", source }
}
