//! What an earlier coordinator has left behind, and whether it is taken over.

use super::directory::{CONTROL, added_device};
use super::{Attach, RunError};
use crate::machine_file::{Beginning, DeviceEntry, MachineFile, Places, Problems};
use standstill::coordinator::control_directory::{LeftBehind, left_behind};
use std::path::Path;

/// How a machine begins.
pub(super) enum Plan {
    /// All devices of its file are started.
    Start,
    /// These are there.
    TakeOver(Vec<DeviceEntry>),
}

impl Plan {
    pub(super) fn beginning(&self) -> Beginning {
        match self {
            Self::Start => Beginning::Start,
            Self::TakeOver(_) => Beginning::TakeOver,
        }
    }
}

/// Looks at what is left, and decides. Changes nothing.
pub(super) fn plan(
    file: &MachineFile,
    runtime: &Path,
    attach: Option<Attach>,
) -> Result<Plan, RunError> {
    // What cannot be used stands only in the way of a take-over; a start says why by itself.
    let left = match (left_behind(&file.folder.join(CONTROL)), attach) {
        (Ok(left), _) => left,
        (Err(_), None) => None,
        (Err(error), Some(_)) => return Err(error.into()),
    };
    let machine = file.name.clone();
    let left = match (left, attach) {
        (Some(left), Some(Attach::Always)) => left,
        (Some(left), Some(Attach::IfLeft)) if !left.alive.is_empty() => left,
        (Some(left), None) if !left.alive.is_empty() => {
            return Err(RunError::LeftBehind { machine, alive: left.alive });
        }
        (None, Some(Attach::Always)) => return Err(RunError::NothingLeft { machine }),
        _ => return Ok(Plan::Start),
    };
    devices(&left, file, runtime).map(Plan::TakeOver)
}

/// The devices to take over: those that are recorded. Devices of the file that are not there were
/// removed, or are new; they can be added later.
fn devices(
    left: &LeftBehind,
    file: &MachineFile,
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
            devices.push(added(&device.name, file, runtime)?);
        }
    }
    Ok(devices)
}

/// A device that was added while the machine ran.
fn added(name: &str, file: &MachineFile, runtime: &Path) -> Result<DeviceEntry, RunError> {
    let undescribed = || RunError::Undescribed { device: name.to_owned() };
    let added = added_device(&file.folder, name).ok_or_else(undescribed)?;
    let mut problems = Problems::new(format!("added device {name:?}"), added.toml.clone());
    let places = Places { file: added.directory, runtime: runtime.to_owned() };
    let device = file.read_device(&added.toml, &places, &mut problems);
    match device.filter(|device| problems.is_empty() && device.name.value == name) {
        Some(device) => Ok(device),
        None if problems.is_empty() => Err(undescribed()),
        None => Err(RunError::File(Box::new(problems))),
    }
}
