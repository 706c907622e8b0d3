//! The machine that faults are tried on: the copy engines of the demonstration, and its oracle.

use crate::engines::machine::{Blueprint, Vmm};
use crate::engines::oracle::{self, Proof, Sight};
use crate::engines::pairs::Pair;
use standstill::coordinator::report::{ParticipantReport, TransitionReport};
use standstill::coordinator::{DeviceSpec, Operation};
use standstill::protocol::message::Phase;
use standstill::protocol::transition::MachineState;
use standstill_testkit::sweep::{Access, Look, Rig, RigError, Subject};
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::time::Duration;

/// What one descriptor copies, in bytes: little, since many machines are at work on few CPUs.
const BLOCK: u32 = 4096;
/// What an engine rests between two rounds of its ring.
const REST: Duration = Duration::from_millis(2);
/// How long it is waited until every pair has written.
const PATIENCE: Duration = Duration::from_secs(60);

/// Machines of copy engines.
#[derive(Clone, Copy, Debug)]
pub(super) struct Engines;

impl Engines {
    /// So many engines, whose guest RAM has room for so many bytes more.
    pub(super) fn with_room(engines: u16, room: u64) -> Result<EnginesRig, RigError> {
        let blueprint = Blueprint::with_room(engines.into(), BLOCK, room)?.rest(REST);
        Ok(EnginesRig {
            at: At::Paper(blueprint),
            wrote: Vec::new(),
            sights: Vec::new(),
            interrupts: Vec::new(),
        })
    }
}

impl Subject for Engines {
    fn rig(&self, devices: u16) -> Result<Box<dyn Rig>, RigError> {
        Ok(Box::new(Self::with_room(devices, 0)?))
    }
}

/// The VMM's side of a machine of copy engines.
pub(super) struct EnginesRig {
    at: At,
    /// Pairs that have written since the machine was last put together: only of those it is known what
    /// the receiver should have.
    wrote: Vec<Pair>,
    /// What was seen of the last standstill.
    sights: Vec<Sight>,
    /// Interrupts of each engine between the first look and the last.
    interrupts: Vec<u64>,
}

/// How far the machine is.
enum At {
    /// Described.
    Paper(Blueprint),
    /// At work.
    Work(Vmm),
    /// Something has failed on the way.
    Nowhere,
}

impl EnginesRig {
    /// Where in guest RAM the room is, in bytes. Before anything is started.
    pub(super) fn room(&self) -> Result<u64, RigError> {
        match &self.at {
            At::Paper(blueprint) => Ok(blueprint.room()),
            At::Work(_) | At::Nowhere => Err("the engines are at work already".into()),
        }
    }

    fn vmm(&mut self) -> Result<&mut Vmm, RigError> {
        match &mut self.at {
            At::Work(vmm) => Ok(vmm),
            At::Paper(_) | At::Nowhere => Err("the engines are not connected".into()),
        }
    }
}

impl Rig for EnginesRig {
    fn devices(&self) -> Result<Vec<DeviceSpec>, RigError> {
        match &self.at {
            At::Paper(blueprint) => Ok(blueprint.devices()?),
            At::Work(_) | At::Nowhere => Err("the engines are at work already".into()),
        }
    }

    fn ram(&self) -> Result<Option<OwnedFd>, RigError> {
        let ram = match &self.at {
            At::Paper(blueprint) => blueprint.ram(),
            At::Work(vmm) => vmm.ram(),
            At::Nowhere => return Err("there is no machine".into()),
        };
        Ok(Some(ram.try_clone_fd()?))
    }

    fn connect(&mut self) -> Result<(), RigError> {
        if let At::Paper(blueprint) = std::mem::replace(&mut self.at, At::Nowhere) {
            self.at = At::Work(blueprint.connect(|| {})?);
        }
        Ok(())
    }

    fn remove(&mut self, device: usize) -> Result<(), RigError> {
        self.vmm()?.remove(device);
        Ok(())
    }

    fn restore(&mut self, device: usize) -> Result<(), RigError> {
        Ok(self.vmm()?.restore(device)?)
    }

    fn go_on(&mut self, devices: &BTreeSet<usize>) -> Result<(), RigError> {
        Ok(self.vmm()?.go_on(devices, PATIENCE)?)
    }

    fn traffic(&mut self, devices: &BTreeSet<usize>) -> Result<Vec<String>, RigError> {
        let vmm = self.vmm()?;
        let since = vmm.mailboxes()?;
        let silent = vmm.wait_for_traffic(
            &since,
            |pair| vmm.has(pair) && devices.contains(&pair.writer),
            PATIENCE,
        )?;
        let wrote = vmm.pairs().iter().copied().filter(|pair| {
            vmm.has(pair) && devices.contains(&pair.writer) && !silent.contains(pair)
        });
        self.wrote = wrote.collect();
        let idle = |pair: &Pair| {
            format!("engine{} does not write to engine{} any more", pair.writer, pair.receiver)
        };
        Ok(silent.iter().map(idle).collect())
    }

    fn access(&mut self, device: usize) -> Option<Access> {
        let access = self.vmm().ok()?.access(device)?;
        Some(Box::new(move || Ok(access()?)))
    }

    fn look(&mut self, moment: Look) -> Result<(), RigError> {
        let first = moment == Look::AfterStop;
        let vmm = self.vmm()?;
        // What the eventfds have counted by the first look is none of the standstill's.
        let before = if first { vmm.take_interrupts()? } else { Vec::new() };
        let sight = vmm.look()?;
        let interrupts = if first { vec![0; before.len()] } else { vmm.take_interrupts()? };
        if first {
            self.sights.clear();
        }
        self.sights.push(sight);
        self.interrupts = interrupts;
        Ok(())
    }

    fn late_writes(
        &mut self,
        stopped: Option<&TransitionReport>,
        resume: Option<&TransitionReport>,
    ) -> Result<Vec<String>, RigError> {
        let sights = std::mem::take(&mut self.sights);
        let (Some(after_stop), Some(before_start)) = (sights.first(), sights.last()) else {
            return Err("nobody has looked at the memory".into());
        };
        let (pause, resume) = match (stopped, resume) {
            (Some(pause), Some(resume))
                if pause.operation == Operation::Pause
                    && resume.machine == MachineState::Running =>
            {
                (pause, resume)
            }
            // Not everybody has shown what he had when he was quiet, or when he left STOP: what is seen
            // counts, and what is shown.
            (stopped, resume) => {
                let mut late = moved(after_stop, before_start, &self.interrupts);
                if let (Some(stopped), Some(resume)) = (stopped, resume) {
                    late.extend(standstill_testkit::sweep::moved(stopped, resume));
                }
                return Ok(late);
            }
        };
        let all = self.vmm()?.pairs().to_vec();
        let (pairs, at): (Vec<_>, Vec<_>) =
            all.into_iter().zip(0..).filter(|(pair, _)| self.wrote.contains(pair)).unzip();
        // What was seen is in the order of all pairs.
        let of_pairs = |sight: &Sight| Sight {
            mailboxes: at.iter().filter_map(|&n: &usize| sight.mailboxes.get(n).copied()).collect(),
            ..sight.clone()
        };
        let (after_stop, before_start) = (&of_pairs(after_stop), &of_pairs(before_start));
        let proofs: Vec<_> =
            (0..after_stop.memory.len()).map(|engine| proof(engine, pause, resume)).collect();
        let verdict = oracle::check(&oracle::Round {
            pairs: &pairs,
            proofs: &proofs,
            after_stop,
            before_start,
            interrupts: &self.interrupts,
        });
        Ok(verdict.late.iter().map(ToString::to_string).collect())
    }
}

/// What moved between two looks at a machine that stands.
fn moved(before: &Sight, after: &Sight, interrupts: &[u64]) -> Vec<String> {
    let mut moved = Vec::new();
    for (engine, (before, after)) in before.memory.iter().zip(&after.memory).enumerate() {
        if before != after {
            moved.push(format!("the memory of engine{engine} changed while it was stopped"));
        }
    }
    if before.ram != after.ram {
        moved.push("guest RAM changed while every engine was stopped".to_owned());
    }
    for (engine, count) in interrupts.iter().enumerate().filter(|(_, count)| **count > 0) {
        moved.push(format!("engine{engine} raised {count} interrupts while it was stopped"));
    }
    moved
}

/// What an engine showed, if it took part in both.
fn proof(engine: usize, pause: &TransitionReport, resume: &TransitionReport) -> Option<Proof> {
    let name = format!("engine{engine}");
    let own = |report: &TransitionReport| -> Option<ParticipantReport> {
        let mut own = report.participants.iter().filter(|own| own.fence.is_none());
        own.find(|own| own.name == name).cloned()
    };
    let (stopped, started) = (own(pause)?, own(resume)?);
    if stopped.incarnation != started.incarnation {
        return None;
    }
    let evidence = |of: &ParticipantReport, phase| {
        of.command(phase).and_then(|command| command.evidence()).cloned().unwrap_or_default()
    };
    Some(Proof {
        quiet: evidence(&stopped, Phase::PrepareStop),
        stopped: evidence(&stopped, Phase::Stop),
        leaving: evidence(&started, Phase::PrepareStart),
    })
}
