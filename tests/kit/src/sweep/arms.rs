//! The faults of a plan while it is run: who does them, and whether they have happened.

use super::Times;
use super::engine::RunError;
use super::greetings::Greetings;
use super::nature::{self, Nature, nature};
use crate::Processes;
use crate::outside::Relay;
use crate::plan::{Cause, Moment, OutsideAction, Plan};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use standstill_coordinator::report::TransitionReport;
use standstill_coordinator::{DeviceSpec, Machine, Status};
use standstill_protocol::fault::{Action, Fault, Point};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// How long a device may take to say that it is armed, or to get where it always gets.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// A moment at which something is done from outside without a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moments {
    Running,
    Stopped,
}

/// The faults of a plan, in its order, and what is known of each.
pub(super) struct Arms {
    faults: Vec<Armed>,
    /// By device.
    relays: BTreeMap<usize, Relay>,
    greetings: Greetings,
    #[cfg(feature = "fault-injection")]
    journals: Vec<(standstill_coordinator::fault::Journal, Vec<usize>)>,
}

struct Armed {
    device: usize,
    round: u32,
    cause: Cause,
    nature: Nature,
    goes_on: bool,
    fired: bool,
    /// It was written down with the step in which it has fired.
    told: bool,
    /// Its device was told.
    armed: bool,
    /// Its device is another process by now.
    over: bool,
    /// Its number in the journal of the relay.
    order: Option<u32>,
    /// The devices that have to be lost before the answer is let go that it holds back.
    holds_for: BTreeSet<usize>,
}

impl Arms {
    pub(super) fn new(plan: &Plan, times: &Times) -> Result<Self, RunError> {
        let armed = |injection: &crate::plan::Injection| Armed {
            device: injection.device.into(),
            round: injection.round,
            cause: injection.cause.clone(),
            nature: nature(&injection.cause, times),
            goes_on: nature::goes_on(&injection.cause, times),
            fired: false,
            told: false,
            armed: false,
            over: false,
            order: None,
            holds_for: {
                let others = plan.faults.iter();
                let others = others.filter(|other| nature::holds_others_back(injection, other));
                others.map(|other| other.device.into()).collect()
            },
        };
        let faults: Vec<_> = plan.faults.iter().map(armed).collect();
        let greets = faults.iter().any(|fault| fault.in_environment().is_some());
        Ok(Self {
            faults,
            relays: BTreeMap::new(),
            greetings: if greets { Greetings::new()? } else { Greetings::default() },
            #[cfg(feature = "fault-injection")]
            journals: Vec::new(),
        })
    }

    /// Puts a relay before a device to whose packets something is to be done, and arms it for its Hello.
    pub(super) fn wrap(&mut self, device: u16, spec: DeviceSpec) -> Result<DeviceSpec, RunError> {
        let number = usize::from(device);
        let spec = self.relayed(number, spec)?;
        let spec = self.greetings.wrap(number, spec)?;
        self.arm_hellos(1, |fault| fault.device == number)?;
        Ok(spec)
    }

    /// Arms what comes at a Hello from that round on, for these faults; and what comes at a query, for which
    /// there is a coordinator only later that nobody can tell anything.
    fn arm_hellos(&mut self, round: u32, these: impl Fn(&Armed) -> bool) -> Result<(), RunError> {
        for (at, fault) in self.faults.iter_mut().enumerate() {
            if let Some(hello) = fault.in_environment()
                && (fault.round == round || hello.point == Point::Query)
                && (fault.armed, fault.over) == (false, false)
                && these(fault)
            {
                self.greetings.arm(fault.device, at, hello)?;
                fault.armed = true;
            }
        }
        Ok(())
    }

    /// The processes that were started, of a machine with faults at a Hello.
    pub(super) fn started(&self, devices: usize) -> Processes {
        self.greetings.processes(devices)
    }

    fn relayed(&mut self, number: usize, spec: DeviceSpec) -> Result<DeviceSpec, RunError> {
        if !self.faults.iter().any(|fault| fault.device == number && fault.moment().is_some()) {
            return Ok(spec);
        }
        let relay = Relay::new().map_err(failed(number))?;
        let spec = relay.wrap(spec).map_err(failed(number))?;
        self.relays.insert(number, relay);
        Ok(spec)
    }

    /// Tells relays and devices what is to go wrong from this round on.
    pub(super) async fn arm(
        &mut self,
        machine: &Machine,
        names: &[String],
        round: u32,
    ) -> Result<(), RunError> {
        self.arm_relays(round)?;
        self.arm_hellos(round, |_| true)?;
        self.arm_devices(machine, names, round).await
    }

    /// Tells relays what is to go wrong from this round on.
    pub(super) fn arm_relays(&mut self, round: u32) -> Result<(), RunError> {
        for fault in self.faults.iter_mut().filter(|fault| fault.round == round && !fault.over) {
            let Some((moment, action)) = fault.moment() else { continue };
            let Some(relay) = self.relays.get(&fault.device) else { continue };
            let order = relay.arm(moment, 1, action).map_err(failed(fault.device))?;
            if action == OutsideAction::Hold && fault.holds_for.is_empty() {
                relay.let_go(order).map_err(failed(fault.device))?;
            }
            (fault.order, fault.armed) = (Some(order), true);
        }
        Ok(())
    }

    /// The coordinator has got what it is to have.
    pub(super) fn coordinator_has_it(&mut self) {
        for fault in &mut self.faults {
            fault.fired |= nature::hits_the_coordinator(&fault.cause);
        }
    }

    /// Whether anything has happened.
    pub(super) fn has_fired(&mut self) -> bool {
        self.read();
        self.faults.iter().any(|fault| fault.fired)
    }

    #[cfg(feature = "fault-injection")]
    async fn arm_devices(
        &mut self,
        machine: &Machine,
        names: &[String],
        round: u32,
    ) -> Result<(), RunError> {
        self.read();
        for (number, name) in names.iter().enumerate() {
            // One that hangs already hears nothing, and does nothing more.
            if !self.works(number) {
                continue;
            }
            let mut told = Vec::new();
            let mut faults = Vec::new();
            for (at, fault) in self.faults.iter().enumerate() {
                let Cause::Inside(inside) = &fault.cause else { continue };
                let now = (fault.device, fault.round, fault.over) == (number, round, false);
                if now && fault.in_environment().is_none() {
                    told.push(at);
                    faults.push(*inside);
                }
            }
            if faults.is_empty() {
                continue;
            }
            let mut journal = machine.arm(name, &faults).await.map_err(failed(number))?;
            // Only then is it sure that the next thing that reaches it finds it armed, whichever way
            // that takes.
            let armed = tokio::time::timeout(PATIENCE, journal.next()).await;
            armed.map_err(failed(number))?.map_err(failed(number))?;
            for &at in &told {
                if let Some(fault) = self.faults.get_mut(at) {
                    fault.armed = true;
                }
            }
            self.journals.push((journal, told));
        }
        Ok(())
    }

    /// Tells the devices nothing: what is in them has no ears for it.
    #[cfg(not(feature = "fault-injection"))]
    #[expect(clippy::unused_async, reason = "as with the feature")]
    async fn arm_devices(
        &mut self,
        _machine: &Machine,
        _names: &[String],
        round: u32,
    ) -> Result<(), RunError> {
        let inside = |fault: &&Armed| matches!(fault.cause, Cause::Inside(_));
        match self.faults.iter().filter(inside).find(|fault| fault.round == round) {
            None => Ok(()),
            Some(fault) => Err(failed(fault.device)(
                "this program was built without the feature `fault-injection`",
            )),
        }
    }

    /// Reads what the devices say that they have done.
    pub(super) fn read(&mut self) {
        #[cfg(feature = "fault-injection")]
        for (journal, told) in &mut self.journals {
            use standstill_protocol::fault::JournalLine;
            // An end, or what is no line, is no proof of anything.
            while let Ok(Some(line)) = journal.try_next() {
                if let JournalLine::Fired { index, .. } = line
                    && let Some(&at) = told.get(index as usize)
                    && let Some(fault) = self.faults.get_mut(at)
                {
                    fault.fired = true;
                }
            }
        }
        for (at, fault) in self.faults.iter_mut().enumerate() {
            if fault.in_environment().is_some() && fault.armed {
                fault.fired |= self.greetings.fired(fault.device, at);
            }
        }
        for (device, relay) in &self.relays {
            let fired = relay.fired().unwrap_or_default();
            let own = self.faults.iter_mut().filter(|fault| fault.device == *device);
            for fault in own.filter(|fault| fault.order.is_some()) {
                fault.fired |= fired.iter().any(|fired| Some(fired.index) == fault.order);
            }
        }
    }

    /// Whether RAM is to be declared in that round, for a fault that comes with it.
    pub(super) fn declares(&self, round: u32) -> bool {
        self.faults.iter().any(|fault| {
            fault.round == round
                && matches!(&fault.cause, Cause::Inside(inside) if inside.point == Point::Memory)
        })
    }

    /// The devices that have a fault in a register access in that round.
    pub(super) fn accesses(&self, round: u32) -> BTreeSet<usize> {
        let accesses = |fault: &&Armed| {
            fault.round == round
                && matches!(&fault.cause, Cause::Inside(inside) if inside.point == Point::Mmio)
        };
        self.faults.iter().filter(accesses).map(|fault| fault.device).collect()
    }

    /// Waits until the faults of threads that are at work all the time have come, for a while.
    pub(super) async fn wait_for_threads(&mut self) {
        let end = Instant::now() + PATIENCE;
        let waits = |fault: &Armed| {
            let at_work = matches!(&fault.cause, Cause::Inside(inside)
                if inside.nth <= 1
                    && matches!(inside.point, Point::Mmio | Point::Dma | Point::DmaInFlight));
            fault.armed && !fault.over && !fault.fired && at_work
        };
        loop {
            self.read();
            if !self.faults.iter().any(waits) || Instant::now() > end {
                return;
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// Does from outside what is to be done at that moment.
    pub(super) async fn at(
        &mut self,
        moment: Moments,
        round: u32,
        status: &Status,
        names: &[String],
    ) -> Result<(), RunError> {
        for fault in self.faults.iter_mut().filter(|fault| fault.round == round && !fault.over) {
            let Cause::Outside(outside) = &fault.cause else { continue };
            let now = match outside.moment {
                Moment::Running => moment == Moments::Running,
                Moment::Stopped => moment == Moments::Stopped,
                Moment::Command(_) | Moment::Answer(_) | Moment::Packet(_) => false,
            };
            if !now {
                continue;
            }
            let name = names.get(fault.device);
            let device = status.devices.iter().find(|device| Some(&device.name) == name);
            let Some(known) = device.filter(|d| d.lost.is_none()).and_then(|d| d.pid) else {
                continue;
            };
            // The coordinator knows the relay.
            let behind = self.relays.get(&fault.device).map(Relay::device).transpose();
            let behind = behind.map_err(failed(fault.device))?.flatten();
            let known = i32::try_from(known).ok().and_then(Pid::from_raw);
            let process = behind.or(known).ok_or("its process has no id");
            let process = process.map_err(failed(fault.device))?;
            match do_to(process, outside.action).await {
                Ok(()) => fault.fired = true,
                // Another fault has ended it meanwhile. If none has, this one is told as one that has not
                // happened.
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(failed(fault.device)(error)),
            }
        }
        Ok(())
    }

    /// What has yet to come of faults that have happened, or will at once: the loss of a device that
    /// dies of one, and the fault after an answer that was given. `None` if nothing has.
    pub(super) fn waits_for(
        &self,
        lost: &BTreeSet<usize>,
        report: Option<&TransitionReport>,
        names: &[String],
    ) -> Option<String> {
        let mut open =
            self.faults.iter().filter(|fault| !fault.over && !lost.contains(&fault.device));
        open.find_map(|fault| {
            let Armed { device, cause, .. } = fault;
            if fault.fired && fault.nature == Nature::Ends {
                return Some(format!("device {device} is lost by this: {cause}"));
            }
            let Cause::Inside(inside) = cause else { return None };
            let Point::AfterAck(phase) = inside.point else { return None };
            let report = report?;
            let name = names.get(*device)?;
            let own = report.participants.iter().find(|own| own.name == *name)?;
            let acked = own.command(phase).is_some_and(|command| command.evidence().is_some());
            // One that hangs already does nothing more.
            let hangs = |other: &Armed| other.device == *device && other.fired && !other.goes_on;
            let hung = self.faults.iter().any(hangs);
            let due = fault.armed && !fault.fired && inside.nth <= 1 && acked && !hung;
            due.then(|| format!("this happens to device {device}: {cause}"))
        })
    }

    /// Whether an answer is held back, or would be, for the sake of another device's fault.
    pub(super) fn holds(&self) -> bool {
        self.faults.iter().any(|fault| fault.order.is_some() && !fault.holds_for.is_empty())
    }

    /// Lets answers go that need not be held back any more, since those are lost for whom they are.
    pub(super) fn let_go(&mut self, is_lost: impl Fn(usize) -> bool) -> Result<(), RunError> {
        for fault in self.faults.iter_mut().filter(|fault| !fault.holds_for.is_empty()) {
            let (Some(order), Some(relay)) = (fault.order, self.relays.get(&fault.device)) else {
                continue;
            };
            fault.holds_for.retain(|&device| !is_lost(device));
            if fault.holds_for.is_empty() {
                relay.let_go(order).map_err(failed(fault.device))?;
            }
        }
        Ok(())
    }

    /// The processes behind relays, which the coordinator does not know.
    pub(super) fn behind_relays(&self) -> Result<Vec<(usize, Pid)>, RunError> {
        let of = |(&device, relay): (&usize, &Relay)| {
            let process = relay.device().map_err(failed(device));
            process.map(|process| process.map(|process| (device, process))).transpose()
        };
        self.relays.iter().filter_map(of).collect()
    }

    /// A device is another process now: it was not told anything.
    pub(super) fn is_new(&mut self, device: usize) {
        self.read();
        for fault in self.faults.iter_mut().filter(|fault| fault.device == device) {
            // What is to come in a later round is told to the new one.
            fault.over |= fault.armed || fault.fired;
        }
    }

    /// A device is no part of the machine any more: what was to come in later rounds does not.
    pub(super) fn is_gone(&mut self, device: usize) {
        self.read();
        self.faults.iter_mut().filter(|fault| fault.device == device).for_each(|f| f.over = true);
    }

    /// Whether that device can be expected to work.
    pub(super) fn works(&self, device: usize) -> bool {
        let mut own = self.faults.iter().filter(|fault| fault.device == device && !fault.over);
        own.all(|fault| !fault.fired || fault.goes_on)
    }

    /// Whether somebody goes on with his DMA although he has stopped.
    pub(super) fn lies(&self) -> bool {
        self.faults.iter().any(|fault| {
            fault.fired
                && matches!(&fault.cause, Cause::Inside(inside) if inside.action == Action::KeepDma)
        })
    }

    /// The faults that have happened since this was asked last, by their number in the plan.
    pub(super) fn newly_fired(&mut self) -> BTreeSet<usize> {
        self.read();
        let new = self.faults.iter_mut().enumerate().filter(|(_, f)| f.fired && !f.told);
        new.map(|(at, fault)| {
            fault.told = true;
            at
        })
        .collect()
    }

    /// For each fault of the plan, whether it has happened.
    pub(super) fn fired(&mut self) -> Vec<bool> {
        self.read();
        self.faults.iter().map(|fault| fault.fired).collect()
    }
}

impl Armed {
    /// The fault, if its process has to have it from the beginning: at a Hello, and at a query.
    fn in_environment(&self) -> Option<Fault> {
        match &self.cause {
            Cause::Inside(fault) if matches!(fault.point, Point::Hello | Point::Query) => {
                Some(*fault)
            }
            Cause::Inside(_) | Cause::Outside(_) => None,
        }
    }

    /// The moment of a packet at which something is done to it.
    fn moment(&self) -> Option<(Moment, OutsideAction)> {
        match &self.cause {
            Cause::Outside(outside) => match outside.moment {
                Moment::Running | Moment::Stopped => None,
                moment => Some((moment, outside.action)),
            },
            Cause::Inside(_) => None,
        }
    }
}

fn failed<E: Into<Box<dyn std::error::Error + Send + Sync>>>(
    device: usize,
) -> impl FnOnce(E) -> RunError {
    move |source| RunError::Fault { device, source: source.into() }
}

/// Whether a process could not be reached because there is none any more.
fn is_gone(error: &std::io::Error) -> bool {
    Errno::from_io_error(error) == Some(Errno::SRCH)
}

/// Does something to a process that lives, for which no packet is needed.
async fn do_to(pid: Pid, action: OutsideAction) -> std::io::Result<()> {
    let process: OwnedFd = pidfd_open(pid, PidfdFlags::empty())?;
    match action {
        OutsideAction::Kill => pidfd_send_signal(&process, Signal::KILL)?,
        OutsideAction::StopMs(ms) => {
            pidfd_send_signal(&process, Signal::STOP)?;
            if ms > 0 {
                tokio::time::sleep(Duration::from_millis(ms.into())).await;
                match pidfd_send_signal(&process, Signal::CONT) {
                    // It has stood, and has ended so.
                    Ok(()) | Err(Errno::SRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        OutsideAction::Limit(limit) => {
            limit.impose(pid)?;
        }
        other => {
            let what = format!("{other} cannot be done to a device process from here");
            return Err(std::io::Error::other(what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Limit, Resource};
    use std::process::{Command, Stdio};

    /// A process that waits for the end of its standard input.
    fn process() -> (std::process::Child, Pid) {
        let child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let pid = Pid::from_child(&child);
        (child, pid)
    }

    #[tokio::test]
    async fn nothing_can_be_done_to_a_process_that_has_ended_and_that_is_seen() {
        let limit = Limit { resource: Resource::Files, value: 0 };
        for action in [OutsideAction::Kill, OutsideAction::StopMs(0), OutsideAction::Limit(limit)] {
            let (mut child, pid) = process();
            child.kill().unwrap();
            child.wait().unwrap();
            let error = do_to(pid, action).await.unwrap_err();
            assert!(is_gone(&error), "{action}: {error}");
        }
        assert!(!is_gone(&std::io::Error::other("it lives")));
    }

    #[tokio::test]
    async fn a_process_that_ends_while_it_stands_has_stood() {
        let (mut child, pid) = process();
        let stands = do_to(pid, OutsideAction::StopMs(2000));
        let ends = async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            child.kill().unwrap();
            child.wait().unwrap();
        };
        let (stood, ()) = tokio::join!(stands, ends);
        stood.unwrap();
    }
}
