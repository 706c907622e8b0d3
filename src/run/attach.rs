//! What an earlier coordinator has left behind, and whether it is taken over.

use super::directory::MachineDirectory;
use super::{Attach, RunError};
use crate::machine_file::{DeviceEntry, MachineFile, Places, Problems};
use standstill::coordinator::control_directory::{LeftBehind, left_behind};
use std::path::Path;

/// How a machine begins.
pub(super) enum Plan {
    /// All of its devices are started.
    Start,
    /// They are there.
    TakeOver(Box<LeftBehind>),
}

/// Looks at what is left, and decides.
pub(super) fn plan(
    machine: &str,
    control: &Path,
    attach: Option<Attach>,
) -> Result<Plan, RunError> {
    // What cannot be used stands only in the way of a take-over; a start says why by itself.
    let left = match (left_behind(control), attach) {
        (Ok(left), _) => left,
        (Err(_), None) => None,
        (Err(error), Some(_)) => return Err(error.into()),
    };
    let machine = machine.to_owned();
    match (left, attach) {
        (Some(left), Some(Attach::Always)) => Ok(Plan::TakeOver(Box::new(left))),
        (Some(left), attach) if !left.alive.is_empty() => match attach {
            Some(_) => Ok(Plan::TakeOver(Box::new(left))),
            None => Err(RunError::LeftBehind { machine, alive: left.alive }),
        },
        (None, Some(Attach::Always)) => Err(RunError::NothingLeft { machine }),
        _ => Ok(Plan::Start),
    }
}

/// The devices to take over: those that are recorded. Devices of the file that are not there were
/// removed, or are new; they can be added later.
pub(super) fn devices(
    left: &LeftBehind,
    file: &MachineFile,
    directory: &MachineDirectory,
    runtime: &Path,
) -> Result<Vec<DeviceEntry>, RunError> {
    let recorded = |name: &str| left.record.devices.iter().any(|device| device.name == name);
    let (mut devices, missing): (Vec<_>, Vec<_>) = file
        .devices
        .iter()
        .cloned()
        .partition(|device| recorded(&device.name.value) || file.is_optional(device));
    for DeviceEntry { name, .. } in missing {
        tracing::warn!(
            device = name.value,
            "in the machine file and not there: it was removed, or is new. `standstill add` adds it"
        );
    }
    for device in &left.record.devices {
        let known = devices.iter().any(|known| known.name.value == device.name);
        if !known {
            devices.push(added(&device.name, file, directory, runtime)?);
        }
    }
    Ok(devices)
}

/// A device that was added while the machine ran.
fn added(
    name: &str,
    file: &MachineFile,
    directory: &MachineDirectory,
    runtime: &Path,
) -> Result<DeviceEntry, RunError> {
    let undescribed = || RunError::Undescribed { device: name.to_owned() };
    let added = directory.added(name).ok_or_else(undescribed)?;
    let mut problems = Problems::new(format!("added device {name:?}"), added.toml.clone());
    let places = Places { file: added.directory, runtime: runtime.to_owned() };
    let device = file.read_device(&added.toml, &places, &mut problems);
    match device.filter(|device| problems.is_empty() && device.name.value == name) {
        Some(device) => Ok(device),
        None if problems.is_empty() => Err(undescribed()),
        None => Err(RunError::File(Box::new(problems))),
    }
}
