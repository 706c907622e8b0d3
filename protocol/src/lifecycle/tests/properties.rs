//! Random events in random order, under a runtime that ends what it was asked for sometime.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    /// What is outstanding ends well.
    Finish,
    /// It fails; an arc with the device where it was, or not.
    Fail {
        restored: bool,
    },
    Welcome {
        later: i64,
        epoch: u64,
    },
    Command {
        term: i64,
        epoch: i64,
        phase: Phase,
        target: MigrationState,
        lease: bool,
    },
    /// The second phase that fits what was answered last.
    Follow,
    /// A command that was taken before, again.
    Repeat(usize),
    Abort {
        term: i64,
        epoch: i64,
    },
    Query {
        term: i64,
    },
    Client(ClientRequest),
    Lease {
        own: bool,
    },
    Disconnected,
}

/// Takes weighted choices off a random number: a strategy for each step costs ten times as much.
struct Dice(u64);

impl Dice {
    /// 0 to `sides` - 1.
    fn roll(&mut self, sides: u64) -> u64 {
        let rolled = self.0 % sides;
        self.0 /= sides;
        rolled
    }

    fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.roll(len as u64)).expect("less than a length")
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.index(all.len())]
    }

    fn state(&mut self) -> MigrationState {
        self.pick(&MigrationState::ALL)
    }

    /// Mostly the usual one, else one around it.
    fn around(&mut self, usual: i64) -> i64 {
        match self.roll(8) {
            0 => self.pick(&[-1, 0, 1, 2]),
            _ => usual,
        }
    }

    fn phase(&mut self) -> (Phase, MigrationState) {
        use MigrationState as S;
        if self.roll(5) == 0 {
            let phase =
                self.pick(&[Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start]);
            return (phase, self.state());
        }
        self.pick(&[
            (Phase::PrepareStop, S::RunningP2p),
            (Phase::PrepareStop, S::PreCopyP2p),
            (Phase::Stop, S::Stop),
            (Phase::Stop, S::StopCopy),
            (Phase::PrepareStart, S::RunningP2p),
            (Phase::Start, S::Running),
            (Phase::Start, S::PreCopy),
            (Phase::Save, S::StopCopy),
            (Phase::Load, S::Stop),
            (Phase::Reset, S::Stop),
        ])
    }

    fn step(&mut self) -> Step {
        match self.roll(34) {
            0..12 => Step::Finish,
            12..14 => Step::Fail { restored: self.roll(2) == 0 },
            14 => Step::Welcome { later: self.pick(&[-1, 0, 1, 2]), epoch: self.roll(4) },
            15..21 => {
                let (phase, target) = self.phase();
                let lease = self.roll(2) == 0;
                Step::Command { term: self.around(0), epoch: self.around(1), phase, target, lease }
            }
            21..25 => Step::Follow,
            25..27 => Step::Repeat(self.index(64)),
            27 => Step::Abort { term: self.around(0), epoch: self.pick(&[-1, 0, 1, 2]) },
            28 => Step::Query { term: self.around(0) },
            29..31 => Step::Client(match self.roll(4) {
                0 => ClientRequest::Reset,
                _ => ClientRequest::SetState(self.state()),
            }),
            31..33 => Step::Lease { own: self.roll(2) == 0 },
            _ => Step::Disconnected,
        }
    }
}

/// A device, its runtime, and what was promised so far.
struct Rig {
    device: Lifecycle,
    outstanding: Option<Effect>,
    taken: Vec<Command>,
    /// The command that was begun last, until it is answered; true once it need not be.
    begun: Option<(Command, bool)>,
    /// What the last answer promised about peers and DMA.
    quiet: Activity,
    given_up: Option<Epoch>,
    client_waits: bool,
    lease: Option<Epoch>,
    saved: bool,
    loading: bool,
    exited: bool,
}

impl Rig {
    fn new(flags: MigrationFlags) -> Self {
        Self {
            device: device_with(flags),
            outstanding: None,
            taken: Vec::new(),
            begun: None,
            quiet: Activity::Full,
            given_up: None,
            client_waits: false,
            lease: None,
            saved: false,
            loading: false,
            exited: false,
        }
    }

    fn act(&mut self, step: &Step) {
        let moved = |from: u64, by: i64| from.saturating_add_signed(by);
        let (term, epoch) = (self.device.term(), self.device.epoch());
        let event = match step {
            Step::Finish => match self.outstanding.as_ref().and_then(done) {
                Some(event) => event,
                None => return,
            },
            Step::Fail { restored } => match self.outstanding {
                Some(Effect::Arc(_)) => {
                    Event::ArcFailed { refusal: refusal(), restored: *restored }
                }
                Some(Effect::Reset) => Event::ResetFailed(refusal()),
                Some(_) => Event::StreamFailed(refusal()),
                None => return,
            },
            Step::Welcome { later, epoch } => Event::Welcome {
                term: Term(moved(term.0, *later)),
                epoch: Epoch(*epoch),
                orphan: OrphanPolicy::Keep,
            },
            Step::Command { term: t, epoch: e, phase, target, lease } => Event::Command(Command {
                term: Term(moved(term.0, *t)),
                epoch: Epoch(moved(epoch.0, *e)),
                phase: *phase,
                target: *target,
                budget_ns: 1,
                lease_ns: u64::from(*lease && *phase == Phase::Stop),
            }),
            Step::Follow => match self.taken.last() {
                Some(&first) if first.term == term && first.epoch == epoch => {
                    let (phase, target) = match first.phase {
                        Phase::PrepareStop => (Phase::Stop, MigrationState::StopCopy),
                        Phase::PrepareStart => (Phase::Start, MigrationState::Running),
                        _ => return,
                    };
                    Event::Command(Command { phase, target, ..first })
                }
                _ => return,
            },
            Step::Repeat(index) => match self.taken.len() {
                0 => return,
                len => Event::Command(self.taken[index % len]),
            },
            Step::Abort { term: t, epoch: e } => Event::Abort(Abort {
                term: Term(moved(term.0, *t)),
                epoch: Epoch(moved(epoch.0, *e)),
            }),
            Step::Query { term: t } => Event::Query(Query { term: Term(moved(term.0, *t)), epoch }),
            Step::Client(request) => Event::Client(*request),
            Step::Lease { own } => match self.lease {
                Some(lease) if *own => Event::LeaseExpired(lease),
                _ => Event::LeaseExpired(Epoch(1_000)),
            },
            Step::Disconnected => Event::Disconnected,
        };
        self.feed(&event);
    }

    fn feed(&mut self, event: &Event) {
        if self.exited {
            return;
        }
        let before = self.device.clone();
        let stale = self.is_stale(event);
        let effects = self.device.step(event.clone());
        let dropped = matches!(effects[..], [Effect::Dropped(_)]);
        assert!(!stale || dropped, "{event:?} is stale: {effects:?}");
        if dropped {
            assert_eq!(before, self.device, "{event:?} was dropped");
            return;
        }
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Dropped(_))));
        self.before_effects(event);
        for effect in &effects {
            self.note(effect);
        }
        self.check(event);
    }

    /// What no device may act upon, whatever it is at.
    fn is_stale(&self, event: &Event) -> bool {
        let (term, epoch) = (self.device.term(), self.device.epoch());
        match event {
            Event::Welcome { term: new, .. } => *new <= term,
            Event::Command(command) => {
                command.term != term
                    || self.given_up >= Some(command.epoch)
                    || command.epoch < epoch
                    || self.taken.contains(command)
            }
            Event::Abort(abort) => abort.term != term || abort.epoch < epoch,
            Event::Query(query) => query.term != term,
            Event::LeaseExpired(epoch) => self.lease != Some(*epoch),
            _ => false,
        }
    }

    fn excuse(&mut self) {
        if let Some((_, excused)) = &mut self.begun {
            *excused = true;
        }
    }

    fn before_effects(&mut self, event: &Event) {
        match event {
            Event::Command(command) => {
                self.taken.push(*command);
                self.excuse();
            }
            Event::Welcome { .. } => {
                self.excuse();
                self.taken.clear();
                self.given_up = None;
            }
            Event::Abort(abort) => {
                self.excuse();
                self.given_up = Some(abort.epoch);
            }
            Event::Disconnected => self.excuse(),
            Event::Client(_) => self.client_waits = true,
            Event::ArcDone => {
                let Some(Effect::Arc(arc)) = self.outstanding.take() else { unreachable!() };
                self.saved &= arc.from != MigrationState::StopCopy;
            }
            Event::ArcFailed { .. } | Event::StreamFailed(_) => self.outstanding = None,
            Event::StreamDone => {
                let whole = self.device.state() == MigrationState::StopCopy;
                self.saved |= self.outstanding.take() == Some(Effect::WriteStream) && whole;
            }
            Event::ResetDone => {
                self.outstanding = None;
                self.saved = false;
            }
            Event::ResetFailed(_) => self.outstanding = None,
            Event::LeaseExpired(_) => self.quiet = Activity::Full,
            _ => {}
        }
    }

    fn note(&mut self, effect: &Effect) {
        match effect {
            Effect::Arc(_) | Effect::WriteStream | Effect::ReadStream | Effect::Reset => {
                assert_eq!(self.outstanding, None, "two things to do at a time");
                self.outstanding = Some(effect.clone());
                self.loading = *effect == Effect::ReadStream;
            }
            Effect::Begin(command) => {
                self.check_ended();
                self.begun = Some((*command, false));
                if matches!(command.phase, Phase::PrepareStart | Phase::Start) {
                    self.quiet = Activity::Full;
                }
            }
            Effect::Reached(command, state) => {
                let begun = self.begun.take();
                assert_eq!(begun, Some((*command, false)), "one answer, and to this command");
                self.quiet = match command.phase {
                    Phase::PrepareStop => self.quiet.min(Activity::NoPeer),
                    Phase::Stop => Activity::Stopped,
                    _ => self.quiet,
                };
                match command.phase {
                    Phase::PrepareStop => assert!(state.activity() <= Activity::NoPeer),
                    Phase::Load => assert_eq!(*state, MigrationState::Stop),
                    Phase::Reset => assert_ne!(*state, MigrationState::Error),
                    _ => assert_eq!(*state, command.target),
                }
            }
            Effect::Refused(command, ..) => {
                let begun = self.begun.take();
                assert_eq!(begun, Some((*command, false)), "one answer, and to this command");
            }
            Effect::ClientAnswer(answer) => {
                let busy = matches!(answer, Err(refusal) if refusal.text.contains("earlier"));
                assert!(busy || self.client_waits, "an answer to nothing");
                self.client_waits &= busy;
            }
            Effect::ArmLease(_, epoch) => self.lease = Some(*epoch),
            Effect::DisarmLease => self.lease = None,
            Effect::Exit(reason) => {
                assert_eq!(*reason, ExitReason::HandedOver);
                assert!(self.saved, "nothing was handed over");
                self.exited = true;
            }
            Effect::Notify(DeviceEvent::LeaseExpired(_)) => {
                assert!(!self.saved, "the state was handed over: it must not run");
            }
            _ => {}
        }
    }

    /// A command that has ended without an answer was overtaken, given up or left behind.
    fn check_ended(&self) {
        assert!(!matches!(self.begun, Some((_, false))), "no answer to {:?}", self.begun);
    }

    fn check(&mut self, event: &Event) {
        if matches!(event, Event::LeaseExpired(_)) || self.device.lease.is_none() {
            self.lease = self.device.lease;
        }
        if self.exited {
            return;
        }
        let device = &self.device;
        assert_eq!(device.is_busy(), self.outstanding.is_some(), "busy with nothing");
        if !device.is_busy() {
            self.check_ended();
            assert!(device.next_command.is_none() && device.next_client.is_none(), "it waits");
            assert!(!self.client_waits && !device.lease_due);
        }
        // Two masters: never more than either wants, and one stream at most.
        let activity = device.activity();
        assert!(activity <= device.state().activity());
        assert!(activity <= device.client_state().activity());
        assert!(!(holds_stream(device.coordinator) && holds_stream(device.client)));
        // Quiet, on both ends of an arc.
        let most = match &self.outstanding {
            Some(Effect::Arc(arc)) => {
                assert_eq!(arc.before, activity);
                activity.max(arc.after)
            }
            _ => activity,
        };
        assert!(most <= self.quiet, "{most} after it promised {}", self.quiet);
        if self.loading && matches!(event, Event::StreamFailed(_)) {
            assert_eq!(device.state(), MigrationState::Error);
            self.loading = false;
        }
    }
}

fn run(bits: u64, steps: &[Step]) -> Rig {
    let mut rig = Rig::new(MigrationFlags::new(bits).expect("a legal set"));
    for step in steps {
        rig.act(step);
    }
    rig
}

fn steps() -> impl Strategy<Value = (u64, Vec<Step>)> {
    let bits = proptest::sample::select(vec![7u64, 7, 7, 3, 1, 5]);
    let numbers = proptest::collection::vec(any::<u64>(), 0..80);
    (bits, numbers).prop_map(|(bits, numbers)| {
        (bits, numbers.into_iter().map(|number| Dice(number).step()).collect())
    })
}

fn cases(default: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok());
    ProptestConfig {
        cases: cases.unwrap_or(default),
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(10_000))]

    #[test]
    fn quiet_one_answer_terms_epochs_masters_and_leases_hold_in_any_order((bits, steps) in steps()) {
        run(bits, &steps);
    }

    #[test]
    fn it_is_never_stuck_and_a_reset_and_a_start_always_lead_to_running((bits, steps) in steps()) {
        let mut rig = run(bits, &steps);
        // Every walk, stream and reset ends, and then nothing waits: `check` looks.
        for _ in 0..40 {
            rig.act(&Step::Finish);
        }
        prop_assert!(rig.exited || (!rig.device.is_busy() && rig.outstanding.is_none()));
        prop_assert!(rig.exited || !rig.client_waits);
        prop_assert!(rig.exited || rig.begun.is_none_or(|(_, excused)| excused));
        let (term, epoch) = (rig.device.term(), rig.device.epoch().0);
        for (by, phase, target) in
            [(1, Phase::Reset, MigrationState::Error), (2, Phase::Start, MigrationState::Running)]
        {
            rig.feed(&Event::Command(Command { term, ..command(epoch + by, phase, target) }));
            for _ in 0..40 {
                rig.act(&Step::Finish);
            }
        }
        prop_assert!(rig.exited || rig.device.state() == MigrationState::Running);
    }
}
