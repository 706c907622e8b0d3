//! The rounds: pause, look, resume, see that everything writes again.

use super::options::{DemoArgs, Slowness};
use super::summary::{Measurements, Summary};
use super::timeline::Timeline;
use super::{DemoError, memcpy};
use crate::engines::machine::{Blueprint, TRAFFIC_DEADLINE, Vmm, VmmError};
use crate::engines::oracle::{self, LateWrite, Proof, Sight, Verdict};
use crate::engines::pairs::Pair;
use indicatif::ProgressBar;
use standstill::coordinator::report::{TransitionReport, nanos};
use standstill::coordinator::{Deadlines, Machine, MachineBuilder, MachineError};
use standstill::protocol::message::{Evidence, Phase};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The machine for the coordinator.
pub(crate) fn machine(
    blueprint: &Blueprint,
    slowness: &[Slowness],
    single_phase: bool,
) -> Result<MachineBuilder, VmmError> {
    let slow = |(device, slow): (_, &Slowness)| -> standstill::coordinator::DeviceSpec {
        let spec: standstill::coordinator::DeviceSpec = device;
        spec.arg(format!("--slow-prepare={}", humantime::format_duration(slow.prepare)))
            .arg(format!("--slow-stop={}", humantime::format_duration(slow.stop)))
    };
    let devices = blueprint.devices()?.into_iter().zip(slowness).map(slow);
    let slowest = |which: fn(&Slowness) -> Duration| slowness.iter().map(which).max();
    let mut deadlines = Deadlines::default();
    deadlines.first_phase += slowest(|slow| slow.prepare).unwrap_or_default();
    deadlines.second_phase += slowest(|slow| slow.stop).unwrap_or_default();
    deadlines.undo += 2 * slowest(|slow| slow.prepare + slow.stop).unwrap_or_default();
    // Many processes start at the same time on few CPUs.
    deadlines.hello = Duration::from_secs(30);
    let builder = MachineBuilder::new("demo").devices(devices).deadlines(deadlines);
    Ok(if single_phase { builder.without_first_phase() } else { builder })
}

/// Runs what blocks on a thread of its own.
pub(crate) async fn on_own_thread<T, E>(
    work: impl FnOnce() -> Result<T, E> + Send + 'static,
) -> Result<T, DemoError>
where
    T: Send + 'static,
    E: Send + 'static,
    DemoError: From<E>,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result?),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(error) => Err(DemoError::System("finish work on a thread", error.into())),
    }
}

/// A machine at work, and what was measured so far.
pub(crate) struct Run<'a> {
    args: &'a DemoArgs,
    machine: Machine,
    /// Away only while a thread has it.
    vmm: Option<Vmm>,
    pairs: Arc<[Pair]>,
    bar: ProgressBar,
    measured: Measurements,
    /// Rounds that can be drawn, with the length of their pauses; kept only if one is wanted.
    timelines: Vec<(u64, Timeline)>,
}

/// What the VMM saw while the machine stood still.
struct Look {
    after_stop: Sight,
    before_start: Sight,
    interrupts: Vec<u64>,
    took_ns: u64,
}

impl<'a> Run<'a> {
    /// A run that has not begun.
    pub(crate) fn new(args: &'a DemoArgs, machine: Machine, vmm: Vmm, bar: ProgressBar) -> Self {
        let pairs = vmm.pairs().into();
        let measured = Measurements::default();
        Self { args, machine, vmm: Some(vmm), pairs, bar, measured, timelines: Vec::new() }
    }

    /// Every round, and the summary.
    pub(crate) async fn all(mut self) -> Result<(Summary, Option<Timeline>), DemoError> {
        let silent = self.traffic(vec![0; self.pairs.len()]).await?;
        if let Some(pair) = silent.first() {
            let others = silent.len() - 1;
            let Pair { writer, receiver, .. } = *pair;
            return Err(DemoError::NoTraffic { writer, receiver, others });
        }
        for round in 1..=self.args.rounds {
            self.one(round).await?;
            self.bar.inc(1);
        }
        let (work, memcpy) =
            self.with_vmm(|vmm| Ok((vmm.work()?, memcpy::bytes_per_second()))).await?;
        let status = self.machine.status().await.map_err(self.failed(self.args.rounds))?;
        let timeline = self.median_timeline();
        let summary = Summary::new(self.args, &self.pairs, &self.measured, &work, memcpy, &status);
        Ok((summary, timeline))
    }

    async fn one(&mut self, round: u32) -> Result<(), DemoError> {
        let stopped = self.machine.pause().await.map_err(self.failed(round))?;
        let pause = Arc::clone(stopped.report());
        #[expect(clippy::panic, reason = "that a panic leaves no process behind is tested with it")]
        if self.args.panic_in_round == Some(round) {
            panic!("asked to panic in round {round}");
        }
        let look = self.with_vmm(|vmm| look(vmm)).await?;
        let resume = stopped.resume().await.map_err(self.failed(round))?;

        let verdict = self.judge(&pause, &resume, &look);
        let silent = self.traffic(look.before_start.mailboxes).await?;
        for pair in &silent {
            let Pair { writer, receiver, .. } = pair;
            tracing::warn!(round, "engine{writer} does not write to engine{receiver} any more");
        }
        self.measured.add(&pause, &resume, look.took_ns, &verdict, !silent.is_empty());
        if self.args.timeline.is_some() {
            let late = verdict.late.iter().filter_map(pair_of).collect();
            self.timelines.push((pause.net_ns(), Timeline::new(round, &pause, &resume, late)));
        }
        Ok(())
    }

    fn judge(&self, pause: &TransitionReport, resume: &TransitionReport, look: &Look) -> Verdict {
        let promised = if self.args.single_phase { Phase::Stop } else { Phase::PrepareStop };
        let proofs: Vec<_> = pause
            .participants
            .iter()
            .zip(&resume.participants)
            .map(|(stopped, started)| {
                let evidence = |of: &standstill::coordinator::report::ParticipantReport, phase| {
                    of.command(phase).and_then(|command| command.evidence()).cloned()
                };
                let or_nothing = Option::<Evidence>::unwrap_or_default;
                Some(Proof {
                    quiet: or_nothing(evidence(stopped, promised)),
                    stopped: or_nothing(evidence(stopped, Phase::Stop)),
                    leaving: or_nothing(evidence(started, Phase::PrepareStart)),
                })
            })
            .collect();
        oracle::check(&oracle::Round {
            pairs: &self.pairs,
            proofs: &proofs,
            after_stop: &look.after_stop,
            before_start: &look.before_start,
            interrupts: &look.interrupts,
        })
    }

    /// Waits until every pair has written; returns those that have not.
    async fn traffic(&mut self, since: Vec<u64>) -> Result<Vec<Pair>, DemoError> {
        self.with_vmm(move |vmm| vmm.wait_for_traffic(&since, |_| true, TRAFFIC_DEADLINE)).await
    }

    async fn with_vmm<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Vmm) -> Result<T, VmmError> + Send + 'static,
    ) -> Result<T, DemoError> {
        let Some(mut vmm) = self.vmm.take() else {
            let gone = std::io::Error::other("an earlier step has failed");
            return Err(DemoError::System("go on", gone));
        };
        let (vmm, result) = on_own_thread(move || {
            let result = work(&mut vmm);
            Ok::<_, VmmError>((vmm, result))
        })
        .await?;
        self.vmm = Some(vmm);
        Ok(result?)
    }

    fn failed(&self, round: u32) -> impl FnOnce(MachineError) -> DemoError + use<> {
        move |source| DemoError::Round { round, source: Box::new(source) }
    }

    /// The round whose pause was of median length, among those with late writes if there are any.
    fn median_timeline(&mut self) -> Option<Timeline> {
        let mut rounds = std::mem::take(&mut self.timelines);
        if rounds.iter().any(|(_, timeline)| !timeline.late.is_empty()) {
            rounds.retain(|(_, timeline)| !timeline.late.is_empty());
        }
        rounds.sort_by_key(|(pause_ns, _)| *pause_ns);
        let median = rounds.len() / 2;
        rounds.into_iter().nth(median).map(|(_, timeline)| timeline)
    }
}

/// Looks at everything twice: after the last `StopAck` and before the first `PrepareStart`. What
/// the eventfds have counted by the first is none of the standstill's.
fn look(vmm: &Vmm) -> Result<Look, VmmError> {
    let began = Instant::now();
    vmm.take_interrupts()?;
    let after_stop = vmm.look()?;
    let before_start = vmm.look()?;
    let interrupts = vmm.take_interrupts()?;
    Ok(Look { after_stop, before_start, interrupts, took_ns: nanos(began.elapsed()) })
}

fn pair_of(late: &LateWrite) -> Option<(usize, usize)> {
    match late {
        LateWrite::Mailbox { pair, place: oracle::Place::ReceiverStopping, .. } => {
            Some((pair.writer, pair.receiver))
        }
        _ => None,
    }
}
