//! Machines whose coordinator is lost, hangs, or comes back: it is a process of its own, and this one takes
//! the machine over then, as its owner would.
//!
//! ```text
//! rounds before the fault, and up to it    a pilot's      (kept device processes)
//! the take-over, and all that follows      this process's
//! ```

use super::{Begun, INTERVAL, Run, RunError, cannot, late, within};
use crate::pilot::{Course, CourseDevice, Pilot, SUPERSEDED, Signal};
use crate::plan::{Cause, Injection, Moment, OutsideAction, Plan};
use crate::process;
use crate::sweep::Times;
use crate::sweep::arms::{Arms, PATIENCE};
use crate::sweep::deadlines::deadlines;
use crate::sweep::nature::{NOT_ALONE, hits_the_coordinator, leads_to_query};
use crate::sweep::observation::{Act, Ended, Event, Observation, Step};
use crate::sweep::subject::{Bench, Rig};
use standstill_coordinator::record::MachineRecord;
use standstill_coordinator::{DeviceSpec, TakenOver};
use standstill_protocol::message::Phase;
use standstill_protocol::transition::MachineState;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The fault of a coordinator, if it is the only one of its plan, or leads to the only other one: its round,
/// its moment and what it is.
fn only_fault(plan: &Plan) -> Option<(u32, Moment, OutsideAction)> {
    let (own, others): (Vec<_>, Vec<&Injection>) =
        plan.faults.iter().partition(|fault| hits_the_coordinator(&fault.cause));
    match (&own[..], &others[..], &plan.hooks[..]) {
        ([own], [], []) => of(own),
        ([own], [other], []) if leads_to_query(own, other) => of(own),
        _ => None,
    }
}

fn of(fault: &Injection) -> Option<(u32, Moment, OutsideAction)> {
    match &fault.cause {
        Cause::Outside(outside) => Some((fault.round, outside.moment, outside.action)),
        Cause::Inside(_) => None,
    }
}

/// The control directory of a machine that is kept. Whatever a run comes to, no device lives on.
pub(super) struct Kept {
    folder: TempDir,
}

impl Kept {
    fn new() -> Result<Self, RunError> {
        let folder = tempfile::Builder::new().prefix("kept-").tempdir();
        let what = "make a folder for a machine that is kept";
        Ok(Self { folder: folder.map_err(|source| RunError::System { what, source })? })
    }

    fn directory(&self) -> PathBuf {
        self.folder.path().join("vm")
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // A machine that was shut down has left no record.
        let Ok(text) = std::fs::read(self.directory().join("machine.json")) else { return };
        let Ok(record) = serde_json::from_slice::<MachineRecord>(&text) else { return };
        for device in record.devices {
            // One that has ended by itself needs nothing.
            let _ = process::kill_recorded(device.process);
        }
    }
}

/// A machine whose coordinator is a process of its own.
struct Piloted<'a> {
    plan: &'a Plan,
    times: &'a Times,
    pilot: Pilot,
    bench: Bench,
    arms: Arms,
    course: Course,
    seen: Observation,
    /// The last of them: the coordinator has to be gone first.
    kept: Kept,
}

impl<'a> Run<'a> {
    /// A machine that was taken over from a coordinator that has done what the plan says; and the next
    /// round. `specs` are the devices of the rig.
    pub(super) async fn taken_over(
        rig: Box<dyn Rig>,
        specs: Vec<DeviceSpec>,
        plan: &'a Plan,
        times: &'a Times,
    ) -> Result<Begun<'a>, RunError> {
        let Some((round, moment, action)) = only_fault(plan) else {
            return Err(RunError::Pilot(NOT_ALONE.into()));
        };
        let mut machine = Piloted::start(rig, specs, plan, times).await?;
        for round in 1..round {
            machine.ask(round, Act::Pause).await?;
            machine.ask(round, Act::Resume).await?;
        }
        machine.arms.arm_relays(round)?;
        let comes_back = match action {
            OutsideAction::StopCoordinatorMs(0) => true,
            OutsideAction::StopCoordinatorMs(ms) => {
                machine.hangs_for(round, moment, Duration::from_millis(ms.into())).await?;
                false
            }
            _ => false,
        };
        if comes_back || action == OutsideAction::KillCoordinator {
            let signal = if comes_back { Signal::STOP } else { Signal::KILL };
            machine.is_lost(round, moment, signal).await?;
        }
        let run = machine.take_over(round, comes_back).await?;
        Ok(Begun::Runs(Box::new(run), round + 1))
    }
}

impl<'a> Piloted<'a> {
    /// A machine that works.
    async fn start(
        rig: Box<dyn Rig>,
        specs: Vec<DeviceSpec>,
        plan: &'a Plan,
        times: &'a Times,
    ) -> Result<Self, RunError> {
        let (kept, mut arms) = (Kept::new()?, Arms::new(plan, times)?);
        let mut programs = Vec::new();
        for (number, spec) in (0..).zip(specs) {
            programs.push(CourseDevice::from(&arms.wrap(number, spec)?));
        }
        let course = Course {
            directory: Some(kept.directory()),
            devices: Vec::new(),
            programs,
            phase: times.long,
            other: times.long,
            policy: plan.policy,
        };
        let what = "start a coordinator";
        let pilot = Pilot::begin(&course, None);
        let pilot = pilot.map_err(|source| RunError::System { what, source })?;
        let ram = rig.ram();
        let ram = ram.map_err(|source| RunError::Rig { what: "have guest RAM", source })?;
        let (bench, seen) = (Bench::new(rig), Observation::default());
        let mut machine = Self { plan, times, pilot, bench, arms, course, seen, kept };
        machine.pilot.try_hear("started").await?;
        if let Some(ram) = ram {
            machine.declare(&ram).await?;
        }
        machine.bench.with("connect to the devices", |rig| rig.connect()).await?;
        machine.traffic(0).await?;
        Ok(machine)
    }

    /// The coordinator has no fd of this process, but it can open the same file.
    async fn declare(&mut self, ram: &OwnedFd) -> Result<(), RunError> {
        let path = format!("/proc/{}/fd/{}", std::process::id(), ram.as_raw_fd());
        self.pilot.try_tell(&format!("ram {path}"))?;
        let answer = self.pilot.try_hear("ram").await?;
        if answer == "ram Done" { Ok(()) } else { Err(RunError::Pilot(answer.into())) }
    }

    async fn traffic(&mut self, round: u32) -> Result<(), RunError> {
        let all: BTreeSet<_> = (0..usize::from(self.plan.devices)).collect();
        let idle = self.bench.with("see them work", move |rig| rig.traffic(&all)).await?;
        self.seen.idle.extend(idle.into_iter().map(|what| (round, what)));
        Ok(())
    }

    /// Asks the coordinator for something, and writes down how that ended.
    async fn ask(&mut self, round: u32, act: Act) -> Result<(), RunError> {
        let began = Instant::now();
        self.pilot.try_tell(order(act))?;
        self.answer(round, act, began).await
    }

    async fn answer(&mut self, round: u32, act: Act, began: Instant) -> Result<(), RunError> {
        let line = self.pilot.try_hear(order(act)).await?;
        let ended = match line.strip_prefix(order(act)).map(str::trim) {
            Some("Done") => Ended::Done,
            _ => Ended::Refused(line),
        };
        let machine = match act {
            Act::Pause => MachineState::Stopped,
            _ => MachineState::Running,
        };
        let step = Step {
            round,
            act,
            ended,
            machine,
            survivors: Vec::new(),
            fired_before: BTreeSet::new(),
            fired: self.arms.newly_fired(),
            hooks_fired: BTreeSet::new(),
            took: began.elapsed(),
        };
        self.seen.events.push(Event::Step(step));
        Ok(())
    }

    /// The coordinator hangs for a while, and goes on.
    async fn hangs_for(
        &mut self,
        round: u32,
        moment: Moment,
        time: Duration,
    ) -> Result<(), RunError> {
        for (act, own) in [(Act::Pause, Moment::Running), (Act::Resume, Moment::Stopped)] {
            if moment == own {
                self.pilot.try_signal(Signal::STOP)?;
                tokio::time::sleep(time).await;
                self.pilot.try_signal(Signal::CONT)?;
                self.arms.coordinator_has_it();
            }
            self.ask(round, act).await?;
        }
        self.traffic(round).await?;
        self.pilot.try_tell("leave")?;
        self.pilot.try_ended().await?;
        Ok(())
    }

    /// The coordinator ends, or stands, at that moment.
    async fn is_lost(
        &mut self,
        round: u32,
        moment: Moment,
        signal: Signal,
    ) -> Result<(), RunError> {
        let starts = |phase| matches!(phase, Phase::PrepareStart | Phase::Start);
        let asked = match moment {
            Moment::Command(phase) | Moment::Answer(phase) if starts(phase) => {
                self.ask(round, Act::Pause).await?;
                Some(Act::Resume)
            }
            Moment::Command(_) | Moment::Answer(_) => Some(Act::Pause),
            Moment::Stopped => {
                self.ask(round, Act::Pause).await?;
                None
            }
            Moment::Running | Moment::Packet(_) => None,
        };
        match asked {
            Some(act) => {
                self.pilot.try_tell(order(act))?;
                self.until_it_has_it().await?;
            }
            None => {
                self.pilot.try_signal(signal)?;
                self.arms.coordinator_has_it();
            }
        }
        if signal == Signal::KILL {
            self.pilot.try_ended().await?;
        }
        Ok(())
    }

    /// Waits until a relay has done it to the coordinator.
    async fn until_it_has_it(&mut self) -> Result<(), RunError> {
        let end = Instant::now() + PATIENCE;
        while !self.arms.has_fired() {
            if Instant::now() > end {
                return Err(late("a signal for the coordinator".to_owned(), PATIENCE));
            }
            tokio::time::sleep(INTERVAL).await;
        }
        Ok(())
    }

    /// Takes the machine over; the owner goes on with it.
    async fn take_over(mut self, round: u32, comes_back: bool) -> Result<Run<'a>, RunError> {
        let failed = |error: crate::script::RogueError| RunError::Pilot(error.into());
        let builder = self.course.builder().map_err(failed)?;
        let builder = builder.deadlines(deadlines(self.plan, self.times));
        let builder = builder.heartbeat(self.times.heartbeat);
        let events = builder.events();
        let began = Instant::now();
        let TakenOver { machine, report } =
            within("take the machine over", builder.take_over()).await??;
        let took = began.elapsed();
        if comes_back {
            self.learns_of_it().await?;
        }
        let what = "ask for the status";
        let status = within(what, machine.status()).await?.map_err(cannot(what))?;
        let Self { plan, times, bench, arms, seen, kept, pilot, .. } = self;
        drop(pilot);
        let mut run = Run {
            seen,
            _kept: Some(kept),
            ..Run::of(plan, times, (machine, events), &status, bench, arms)
        };
        run.behind_relays(None)?;
        let ended = Ended::of(&Ok(Arc::clone(&report)), &run.names);
        run.wrote(round, Act::TakeOver, ended, Some(&report), took).await?;
        if report.machine == MachineState::Held {
            run.stand().await?;
            let what = "accept that the machine is held";
            let accepted = within(what, run.machine.accept_hold()).await?;
            accepted.map_err(cannot(what))?;
            let resume = run.step(round, Act::Resume).await?;
            run.compare(round, Some(&report), resume.as_ref()).await?;
        }
        run.recover(round).await?;
        run.back_to_work(round).await?;
        Ok(run)
    }

    /// The coordinator goes on, and finds that another one has its machine.
    async fn learns_of_it(&mut self) -> Result<(), RunError> {
        self.pilot.try_signal(Signal::CONT)?;
        self.pilot.try_hear("superseded").await?;
        let status = self.pilot.try_ended().await?;
        if status.code() == Some(i32::from(SUPERSEDED)) {
            return Ok(());
        }
        let what = format!("a coordinator that was superseded has ended with {status}");
        Err(RunError::Pilot(what.into()))
    }
}

/// What a pilot is told, and how its answer begins.
fn order(act: Act) -> &'static str {
    match act {
        Act::Resume => "resume",
        Act::Pause | Act::Declare | Act::TakeOver => "pause",
    }
}
