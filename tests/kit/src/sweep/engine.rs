//! Runs one plan on one machine, and writes down what is seen.

mod error;
mod piloted;
mod standstill;

pub use error::RunError;

use self::piloted::Kept;
use super::Times;
use super::arms::{self, Arms, Moments};
use super::deadlines::{deadlines, short_deadlines};
use super::hooks::Hooks;
use super::nature;
use super::observation::{Act, Ended, Event, Observation, Step, survivors};
use super::subject::{Bench, Rig, Subject};
use crate::Processes;
use crate::plan::{Plan, Policy};
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{
    DeviceStanding, DeviceStatus, Events, LossPolicy, Machine, MachineBuilder, MachineError,
    MachineEvent, OnFailure, RestartPolicy, StartError, Status,
};
use standstill_protocol::transition::MachineState;
use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than any call takes that ends at all.
pub(super) const HANG: Duration = Duration::from_secs(240);
/// How often something is looked at that nobody tells.
const INTERVAL: Duration = Duration::from_millis(3);
/// How often a resume is tried: several faults may come one after another.
const RESUMES: u32 = 4;
/// How long device processes may take to end by themselves.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// Runs a plan on a machine of that subject.
///
/// If the future is dropped, the machine ends with it.
///
/// # Errors
///
/// [`RunError`], if it cannot be run to its end. Whatever faults do to the machine is no error, it is
/// what is observed.
pub async fn run(
    subject: Arc<dyn Subject>,
    plan: &Plan,
    times: &Times,
) -> Result<Observation, RunError> {
    plan.check()?;
    let (mut run, first) = match Run::start(subject, plan, times).await? {
        Begun::Runs(run, first) => (run, first),
        Begun::Failed(seen) => return Ok(seen),
    };
    for round in first..=plan.rounds + 1 {
        if !run.round(round).await? {
            break;
        }
    }
    run.end().await
}

/// What the start of a machine has come to.
enum Begun<'a> {
    /// It is at work, and this is its next round.
    Runs(Box<Run<'a>>, u32),
    Failed(Observation),
}

/// A machine at work.
struct Run<'a> {
    plan: &'a Plan,
    times: &'a Times,
    machine: Machine,
    bench: Bench,
    arms: Arms,
    hooks: Hooks,
    events: Events,
    names: Vec<String>,
    /// The incarnation of each device that is known to the rig.
    incarnations: Vec<u64>,
    /// Lost, and neither removed nor back.
    gone: BTreeSet<usize>,
    removed: BTreeSet<usize>,
    /// Names of those that are not started again any more.
    given_up: BTreeSet<String>,
    /// What the rig has yet to be told.
    to_remove: BTreeSet<usize>,
    to_restore: BTreeSet<usize>,
    processes: Vec<Processes>,
    /// Faults that have fired between the step before and this one.
    fired_before: BTreeSet<usize>,
    seen: Observation,
    /// Of a machine that was taken over; dropped after the machine.
    _kept: Option<Kept>,
}

impl<'a> Run<'a> {
    /// A machine of which this is the status, without hooks, and of which nothing was seen yet.
    fn of(
        plan: &'a Plan,
        times: &'a Times,
        (machine, events): (Machine, Events),
        status: &Status,
        bench: Bench,
        arms: Arms,
    ) -> Self {
        Self {
            plan,
            times,
            machine,
            bench,
            arms,
            hooks: Hooks::default(),
            events,
            names: status.devices.iter().map(|device| device.name.clone()).collect(),
            incarnations: status.devices.iter().map(|device| device.incarnation).collect(),
            gone: BTreeSet::new(),
            removed: BTreeSet::new(),
            given_up: BTreeSet::new(),
            to_remove: BTreeSet::new(),
            to_restore: BTreeSet::new(),
            processes: vec![Processes::of(status)],
            fired_before: BTreeSet::new(),
            seen: Observation::default(),
            _kept: None,
        }
    }

    /// A machine that is connected and works.
    async fn start(
        subject: Arc<dyn Subject>,
        plan: &'a Plan,
        times: &'a Times,
    ) -> Result<Begun<'a>, RunError> {
        let failed = |what| move |source| RunError::Rig { what, source };
        let devices = plan.devices;
        let made = tokio::task::spawn_blocking(move || subject.rig(devices)).await;
        let what = "make a machine";
        let rig: Box<dyn Rig> =
            made.map_err(|error| failed(what)(error.into()))?.map_err(failed(what))?;
        let specs = rig.devices().map_err(failed("describe the devices"))?;
        if plan.faults.iter().any(|fault| nature::hits_the_coordinator(&fault.cause)) {
            return Run::taken_over(rig, specs, plan, times).await;
        }
        let ram = rig.ram().map_err(failed("have guest RAM"))?;
        let mut arms = Arms::new(plan, times)?;
        let mut builder = MachineBuilder::new("faults")
            .deadlines(deadlines(plan, times))
            .heartbeat(times.heartbeat)
            .on_failure(match plan.policy {
                Policy::StayStopped => OnFailure::StayStopped,
                Policy::Rollback | Policy::ContinueWithout | Policy::Restart => OnFailure::Rollback,
            })
            .on_loss(match plan.policy {
                Policy::Rollback | Policy::StayStopped => LossPolicy::Fail,
                Policy::ContinueWithout => LossPolicy::ContinueWithout,
                Policy::Restart => LossPolicy::Restart(RestartPolicy::default()),
            });
        let described: Vec<_> = specs.iter().map(|spec| spec.name().to_owned()).collect();
        for (number, spec) in (0..).zip(specs) {
            let (first, second) = short_deadlines(plan, number, times);
            let given = |short| if short { times.short } else { times.long };
            let spec = arms.wrap(number, spec)?;
            builder = builder.device(spec.deadlines(given(first), given(second)));
        }
        let (builder, hooks) = Hooks::add(plan, times, builder)?;
        let events = builder.events();
        let machine = match within("start the machine", builder.start()).await? {
            Ok(machine) => machine,
            Err(error) => return not_started(error, &described, &mut arms, times).await,
        };
        let what = "ask for the status";
        let status = within(what, machine.status()).await?.map_err(cannot(what))?;
        if let Some(ram) = &ram {
            let what = "declare guest RAM";
            let declared = within(what, machine.declare_ram(ram.as_fd())).await?;
            declared.map_err(cannot(what))?;
        }
        let mut run = Self {
            hooks,
            ..Self::of(plan, times, (machine, events), &status, Bench::new(rig), arms)
        };
        run.behind_relays(None)?;
        run.bench.with("connect to the devices", |rig| rig.connect()).await?;
        run.traffic(0).await?;
        Ok(Begun::Runs(Box::new(run), 1))
    }

    /// One round; false if there can be no other.
    async fn round(&mut self, round: u32) -> Result<bool, RunError> {
        self.arms.arm(&self.machine, &self.names, round).await?;
        if self.arms.declares(round) {
            let declared = self.bench.with("have guest RAM", |rig| rig.ram()).await?;
            if let Some(ram) = declared {
                self.declare(round, ram).await?;
            }
        }
        self.at(Moments::Running, round).await?;
        for device in self.arms.accesses(round) {
            let access =
                self.bench.with("reach a register", move |rig| Ok(rig.access(device))).await?;
            if let Some(access) = access {
                // It ends with the device at the latest; nobody waits for it.
                std::thread::spawn(access);
            }
        }
        self.arms.wait_for_threads().await;
        self.settle(round, None).await?;
        self.recover(round).await?;
        self.back_to_work(round).await?;

        let pause = self.step(round, Act::Pause).await?;
        let mut last = pause;
        if matches!(self.machine().await?, MachineState::Stopped | MachineState::LeaseExpired) {
            last = self.stand_and_resume(round, last).await?;
        }
        match self.machine().await? {
            MachineState::Running => {}
            // Nothing starts one that is held, which the step says.
            MachineState::Held => {
                self.stand_held(round, last).await?;
                return Ok(false);
            }
            MachineState::Stopped | MachineState::LeaseExpired => {
                self.seen.idle.push((round, "the machine does not run again".to_owned()));
                return Ok(false);
            }
        }
        self.recover(round).await?;
        self.back_to_work(round).await?;
        Ok(true)
    }

    async fn at(&mut self, moment: Moments, round: u32) -> Result<(), RunError> {
        let status = self.status().await?;
        self.arms.at(moment, round, &status, &self.names).await
    }

    /// Asks the machine for a transition and writes down how it ended.
    async fn step(
        &mut self,
        round: u32,
        act: Act,
    ) -> Result<Option<Arc<TransitionReport>>, RunError> {
        self.fired_before = self.arms.newly_fired();
        let began = Instant::now();
        let call = async {
            match act {
                Act::Resume => self.machine.resume().await,
                Act::Pause | Act::Declare | Act::TakeOver => {
                    self.machine.pause().await.map(|stopped| {
                        let report = Arc::clone(stopped.report());
                        stopped.leave_stopped();
                        report
                    })
                }
            }
        };
        let call = within(format!("the {act} of round {round}"), call);
        let held = held_back(&self.machine, &mut self.arms, &self.names, &self.incarnations);
        let ended = tokio::select! {
            biased;
            ended = call => ended?,
            failed = held => return Err(failed),
        };
        let took = began.elapsed();
        let report = match &ended {
            Ok(report) | Err(MachineError::Transition(report)) => Some(Arc::clone(report)),
            Err(_) => None,
        };
        self.wrote(round, act, Ended::of(&ended, &self.names), report.as_deref(), took).await?;
        Ok(report)
    }

    async fn declare(&mut self, round: u32, ram: std::os::fd::OwnedFd) -> Result<(), RunError> {
        self.fired_before = self.arms.newly_fired();
        let began = Instant::now();
        let call = within("declare guest RAM", self.machine.declare_ram(ram)).await?;
        let ended = match call {
            Ok(()) => Ended::Done,
            Err(error) => Ended::Refused(crate::chain(&error)),
        };
        let took = began.elapsed();
        self.wrote(round, Act::Declare, ended, None, took).await
    }

    /// Writes a step down, with all that it has led to.
    async fn wrote(
        &mut self,
        round: u32,
        act: Act,
        ended: Ended,
        report: Option<&TransitionReport>,
        took: Duration,
    ) -> Result<(), RunError> {
        if let Ended::Degraded { fenced } = &ended {
            self.gone.extend(fenced);
        }
        let at = self.seen.events.len();
        let status = self.settle(round, report).await?;
        let survivors = survivors(&status, report, &self.names);
        let machine = status.machine;
        let fired = self.arms.newly_fired();
        let hooks_fired = self.hooks.newly_fired();
        let fired_before = std::mem::take(&mut self.fired_before);
        let step =
            Step { round, act, ended, machine, survivors, fired_before, fired, hooks_fired, took };
        // What was lost by it comes after it.
        self.seen.events.insert(at, Event::Step(step));
        Ok(())
    }

    /// Waits until all that must follow from faults that have happened has happened, and writes down
    /// who was lost.
    async fn settle(
        &mut self,
        round: u32,
        report: Option<&TransitionReport>,
    ) -> Result<Status, RunError> {
        let end = Instant::now() + self.times.long;
        loop {
            self.arms.read();
            let status = self.status().await?;
            let lost: BTreeSet<_> = (0..self.names.len())
                .filter(|&device| !self.removed.contains(&device) && self.is_lost(device, &status))
                .collect();
            let away = &lost | &self.removed;
            let waits_for = self.arms.waits_for(&away, report, &self.names).or_else(|| {
                let unproven = |&device: &usize| {
                    of_name(&status, self.names.get(device))
                        .is_some_and(|device| device.standing == DeviceStanding::Lost)
                };
                lost.iter()
                    .copied()
                    .find(unproven)
                    .map(|device| format!("device {device} is fenced"))
            });
            let Some(what) = waits_for else {
                for device in lost {
                    if self.gone.insert(device) {
                        self.seen.events.push(Event::Lost { round, device });
                    }
                }
                return Ok(status);
            };
            if Instant::now() > end {
                return Err(late(what, self.times.long));
            }
            tokio::time::sleep(INTERVAL).await;
        }
    }

    /// Device processes behind relays, or that one: they have to end, too.
    fn behind_relays(&mut self, only: Option<usize>) -> Result<(), RunError> {
        let mut behind = Processes::default();
        for (device, process) in self.arms.behind_relays()? {
            if only.is_none_or(|only| only == device) {
                behind.add(&format!("device {device} behind its relay"), process);
            }
        }
        self.processes.push(behind);
        Ok(())
    }

    fn is_lost(&self, device: usize, status: &Status) -> bool {
        is_lost(device, status, &self.names, &self.incarnations)
    }

    /// What an owner does about devices that are lost: removes them, or waits until they are back. That
    /// may show who else is lost: one who does not confirm that windows are revoked.
    async fn recover(&mut self, round: u32) -> Result<(), RunError> {
        while !self.gone.is_empty() {
            for device in std::mem::take(&mut self.gone) {
                self.recover_from(round, device).await?;
            }
            self.settle(round, None).await?;
        }
        Ok(())
    }

    async fn remove(&mut self, device: usize, name: &str) -> Result<(), RunError> {
        let what = "remove a lost device";
        let removed = within(what, self.machine.remove_device(name)).await?;
        removed.map_err(cannot(what))?;
        self.arms.is_gone(device);
        self.removed.insert(device);
        self.to_remove.insert(device);
        Ok(())
    }

    /// Whether all attempts to start a device again have failed.
    fn is_given_up(&mut self, name: &str) -> bool {
        while let Some(event) = self.events.try_recv() {
            if let MachineEvent::DeviceRestartsExhausted { device, .. } = event {
                self.given_up.insert(device);
            }
        }
        self.given_up.contains(name)
    }

    async fn recover_from(&mut self, round: u32, device: usize) -> Result<(), RunError> {
        let Some(name) = self.names.get(device).cloned() else { return Ok(()) };
        if self.plan.policy != Policy::Restart {
            return self.remove(device, &name).await;
        }
        let end = Instant::now() + self.times.long;
        let incarnation = loop {
            if self.is_given_up(&name) {
                self.seen.events.push(Event::GivenUp { round, device });
                return self.remove(device, &name).await;
            }
            let status = self.status().await?;
            match of_name(&status, Some(&name)) {
                Some(now) if now.standing == DeviceStanding::Ready => {
                    self.processes.push(Processes::of(&status).only(&[&name]));
                    self.behind_relays(Some(device))?;
                    break now.incarnation;
                }
                _ if Instant::now() > end => {
                    return Err(late(format!("{name} is started again"), self.times.long));
                }
                _ => tokio::time::sleep(INTERVAL).await,
            }
        };
        if let Some(known) = self.incarnations.get_mut(device) {
            *known = incarnation;
        }
        self.arms.is_new(device);
        self.to_restore.insert(device);
        Ok(())
    }

    /// Lets the rig go on without whom it has lost, or with whom is back, and sees that all work. Of a
    /// machine that runs.
    async fn back_to_work(&mut self, round: u32) -> Result<(), RunError> {
        self.arms.read();
        let work = self.at_work();
        let removed = std::mem::take(&mut self.to_remove);
        let restored = std::mem::take(&mut self.to_restore);
        let changed = !removed.is_empty() || !restored.is_empty();
        for device in removed {
            self.bench.with("forget a device", move |rig| rig.remove(device)).await?;
        }
        for device in restored {
            self.bench.with("connect to a new device", move |rig| rig.restore(device)).await?;
        }
        if changed {
            self.bench.with("set devices to work again", move |rig| rig.go_on(&work)).await?;
        }
        self.traffic(round).await
    }

    /// The devices that can be expected to work.
    fn at_work(&self) -> BTreeSet<usize> {
        let here = |device: &usize| !self.removed.contains(device) && self.arms.works(*device);
        (0..self.names.len()).filter(here).collect()
    }

    async fn traffic(&mut self, round: u32) -> Result<(), RunError> {
        self.arms.read();
        let devices = self.at_work();
        let idle = self.bench.with("see them work", move |rig| rig.traffic(&devices)).await?;
        self.seen.idle.extend(idle.into_iter().map(|what| (round, what)));
        Ok(())
    }

    async fn status(&mut self) -> Result<Status, RunError> {
        let what = "ask for the status";
        within(what, self.machine.status()).await?.map_err(cannot(what))
    }

    async fn machine(&mut self) -> Result<MachineState, RunError> {
        Ok(self.status().await?.machine)
    }

    /// Ends the machine; nothing may be left of it.
    async fn end(mut self) -> Result<Observation, RunError> {
        self.seen.hooks_fired = self.hooks.fired();
        // One that hangs would not let the machine end.
        self.hooks = Hooks::default();
        let what = "shut the machine down";
        within(what, self.machine.shutdown_within(SHUTDOWN)).await?.map_err(cannot(what))?;
        drop(self.machine);
        let end = Instant::now() + self.times.end;
        let left = |processes: &[Processes]| {
            let names = processes.iter().flat_map(Processes::left);
            names.map(str::to_owned).collect::<Vec<_>>()
        };
        while !left(&self.processes).is_empty() && Instant::now() < end {
            tokio::time::sleep(INTERVAL).await;
        }
        self.seen.left = left(&self.processes);
        self.seen.fired = self.arms.fired();
        Ok(self.seen)
    }
}

/// A machine that was not to start has not: it is seen that nothing of it is left.
async fn not_started<'a>(
    error: StartError,
    names: &[String],
    arms: &mut Arms,
    times: &Times,
) -> Result<Begun<'a>, RunError> {
    let StartError::Greeting { device: name, .. } = &error else { return Err(error.into()) };
    let Some(device) = names.iter().position(|known| known == name) else {
        return Err(error.into());
    };
    let processes = arms.started(names.len());
    let end = Instant::now() + times.end;
    while !processes.left().is_empty() && Instant::now() < end {
        tokio::time::sleep(INTERVAL).await;
    }
    let left = processes.left().into_iter().map(str::to_owned).collect();
    let events = vec![Event::NotStarted { device, why: crate::chain(&error) }];
    let fired = arms.fired();
    Ok(Begun::Failed(Observation { events, fired, left, ..Observation::default() }))
}

/// Lets answers go that are held back until others are lost, as those are; ends only if that fails.
async fn held_back(
    machine: &Machine,
    arms: &mut Arms,
    names: &[String],
    incarnations: &[u64],
) -> RunError {
    let end = Instant::now() + arms::PATIENCE;
    loop {
        if !arms.holds() {
            return std::future::pending().await;
        }
        let status = match machine.status().await {
            Ok(status) => status,
            Err(error) => return cannot("ask for the status")(error),
        };
        let is_lost = |device: usize| is_lost(device, &status, names, incarnations);
        // What does not come is judged by how the step ends.
        let too_late = Instant::now() > end;
        if let Err(error) = arms.let_go(|device| too_late || is_lost(device)) {
            return error;
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

fn is_lost(device: usize, status: &Status, names: &[String], incarnations: &[u64]) -> bool {
    of_name(status, names.get(device))
        .is_none_or(|now| now.lost.is_some() || incarnations.get(device) != Some(&now.incarnation))
}

fn of_name<'s>(status: &'s Status, name: Option<&String>) -> Option<&'s DeviceStatus> {
    status.devices.iter().find(|device| Some(&device.name) == name)
}

fn cannot(what: &'static str) -> impl FnOnce(MachineError) -> RunError {
    move |source| RunError::Machine { what, source }
}

/// What a call of the machine comes to; none may hang, whatever its devices do.
async fn within<T>(what: impl Into<String>, call: impl Future<Output = T>) -> Result<T, RunError> {
    let ended = tokio::time::timeout(HANG, call).await;
    ended.map_err(|_| late(format!("the end of this: {}", what.into()), HANG))
}

fn late(what: String, limit: Duration) -> RunError {
    RunError::Late { what, limit }
}
