//! Machines whose processes outlive their coordinator: the record of one that has the machine, of
//! one that takes it over, and devices that were left behind.

use super::super::keep::Kept;
use super::super::script::{Down, Script, ScriptedActor, process};
use super::super::slips::Slips;
use super::super::start::Beginning;
use super::super::take_over::{Contact, Found, Unreachable};
use super::action::Case;
use super::unit::Unit;
use super::world::KILLED;
use crate::control_directory::ControlDirectory;
use crate::custody::Custody;
use crate::description::{DeviceSpec, MachineBuilder};
use crate::identity::{boot_id, identity};
use crate::machine::Machine;
use crate::record::{DeviceRecord, MachineRecord, RECORD_VERSION};
use rustix::pipe::{PipeFlags, pipe_with};
use standstill_protocol::message::{Command, CoordinatorMessage, Epoch, Phase, Term, VERSIONS};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::Loss;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::TempDir;
use uuid::Uuid;

const MACHINE: Uuid = Uuid::from_u128(1);
/// An epoch of the coordinator that was there before.
const BEFORE: Epoch = Epoch(900);

/// A folder in memory, if the system has such.
pub(super) fn directory() -> io::Result<TempDir> {
    let memory = Path::new("/dev/shm");
    let mut builder = tempfile::Builder::new();
    let builder = builder.prefix("schedule");
    if memory.is_dir() { builder.tempdir_in(memory) } else { builder.tempdir() }
}

fn path(folder: &TempDir) -> PathBuf {
    folder.path().join("vm")
}

/// The machine's record, as the coordinator of that term has written it.
pub(super) fn kept(folder: &TempDir, specs: &[DeviceSpec], term: Term) -> io::Result<Kept> {
    let directory = ControlDirectory::create(&path(folder)).map_err(io::Error::other)?;
    let myself = identity(std::process::id())?;
    let devices = specs.iter().map(|spec| DeviceRecord {
        name: spec.name.clone(),
        incarnation: 1,
        process: myself,
        backing_files: Vec::new(),
    });
    let record = MachineRecord {
        version: RECORD_VERSION,
        boot: boot_id()?,
        machine: "vm".to_owned(),
        uuid: MACHINE,
        term: term.0,
        coordinator: myself,
        devices: devices.collect(),
    };
    let written = directory.lock().and_then(|lock| lock.write(&record));
    written.map_err(io::Error::other)?;
    let custody = Custody::new(directory, MACHINE, term);
    if term > Term(1) {
        custody.keep();
    }
    Ok(Kept { custody: Arc::new(custody), record })
}

/// Another coordinator writes itself down.
pub(super) fn raise(folder: &TempDir) -> io::Result<()> {
    let directory = ControlDirectory::create(&path(folder)).map_err(io::Error::other)?;
    let raised = || {
        let lock = directory.lock()?;
        let mut record = directory.read_existing()?;
        record.term += 1;
        lock.write(&record)
    };
    raised().map_err(io::Error::other)
}

/// A handle of the machine.
pub(super) fn machine(actor: &ScriptedActor) -> Option<Machine> {
    let state = actor.state.as_ref()?;
    Some(Machine::new(state.myself.clone(), &state.events))
}

/// A machine of which an earlier coordinator has left the devices behind, at some moment of a pause.
pub(super) fn taken_over(
    case: &Case,
    builder: MachineBuilder,
    kept: Option<Kept>,
    script: &Script,
    slips: Slips,
) -> io::Result<(ScriptedActor, Vec<Unit>)> {
    let mut units = Vec::new();
    let mut all_found = Vec::new();
    // Nobody was told to stop before all had prepared for it.
    let furthest = case.devices.iter().map(|kind| kind.found.0).max().unwrap_or_default();
    for (number, kind) in case.devices.iter().enumerate() {
        let ((ours, child), mut device) = process(script, number, &format!("d{number}"))?;
        device.lifecycle = slips.lifecycle(device.lifecycle);
        device.welcome(Term(1));
        let steps = if furthest > 2 { kind.found.0.max(2) } else { kind.found.0 };
        let command = |phase, target| {
            let (budget_ns, lease_ns) = (0, 0);
            let command =
                Command { term: Term(1), epoch: BEFORE, phase, target, budget_ns, lease_ns };
            Down::Message(CoordinatorMessage::Command(command))
        };
        for step in 1..=steps {
            match step {
                1 => {
                    let prepare = command(Phase::PrepareStop, MigrationState::RunningP2p);
                    device.down.push_back(prepare);
                    device.read();
                }
                3 => {
                    device.down.push_back(command(Phase::Stop, MigrationState::Stop));
                    device.read();
                }
                _ => device.end_arc(None),
            }
        }
        let hello = device.hello(Some(MACHINE));
        let mut unit = Unit::new(device, kind.unprovable);
        unit.greeted = true;
        unit.counted = true;
        let contact = if kind.found.1 {
            unit.ends(KILLED);
            Err(Unreachable::new(Loss::Exited, "it has ended"))
        } else {
            let (_, log) = pipe_with(PipeFlags::CLOEXEC)?;
            Ok(Contact::new(ours, hello, VERSIONS.max, log))
        };
        let (files, unprovable) = (Vec::new(), None);
        all_found.push(Some(Found { process: child, incarnation: 1, contact, files, unprovable }));
        units.push(unit);
    }
    let beginning = Beginning::TakenOver(all_found);
    Ok((ScriptedActor::begin(builder, kept, script, beginning)?, units))
}
