//! Random events in random order, under a runtime that ends what it was asked for sometime.

use super::*;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    /// What is outstanding ends well.
    Finish,
    /// It fails; an arc with the device where it was, or not.
    Fail { restored: bool },
    Welcome { later: i64, epoch: u64 },
    Command { term: i64, epoch: i64, phase: Phase, target: MigrationState, lease: bool },
    /// The second phase that fits what was answered last.
    Follow,
    /// A command that was taken before, again.
    Repeat(usize),
    Abort { term: i64, epoch: i64 },
    Query { term: i64 },
    Client(ClientRequest),
    Lease { own: bool },
    Disconnected,
}

fn state() -> impl Strategy<Value = MigrationState> {
    proptest::sample::select(MigrationState::ALL.to_vec())
}

fn phase() -> impl Strategy<Value = (Phase, MigrationState)> {
    use MigrationState as S;
    let usual = vec![
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
    ];
    let phases = vec![Phase::PrepareStop, Phase::Stop, Phase::PrepareStart, Phase::Start];
    prop_oneof![
        4 => proptest::sample::select(usual),
        1 => (proptest::sample::select(phases), state()),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let client = prop_oneof![
        1 => Just(ClientRequest::Reset),
        3 => state().prop_map(ClientRequest::SetState),
    ];
    let offset = || prop_oneof![8 => Just(0i64), 1 => -1i64..2];
    let order = (offset(), prop_oneof![6 => Just(1i64), 1 => -1i64..3], phase(), any::<bool>());
    prop_oneof![
        12 => Just(Step::Finish),
        2 => any::<bool>().prop_map(|restored| Step::Fail { restored }),
        1 => (-1i64..3, 0u64..4).prop_map(|(later, epoch)| Step::Welcome { later, epoch }),
        6 => order.prop_map(|(term, epoch, (phase, target), lease)| {
            Step::Command { term, epoch, phase, target, lease }
        }),
        4 => Just(Step::Follow),
        2 => any::<usize>().prop_map(Step::Repeat),
        1 => (offset(), -1i64..3).prop_map(|(term, epoch)| Step::Abort { term, epoch }),
        1 => offset().prop_map(|term| Step::Query { term }),
        2 => client.prop_map(Step::Client),
        2 => any::<bool>().prop_map(|own| Step::Lease { own }),
        1 => Just(Step::Disconnected),
    ]
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
            Step::Repeat(index) if self.taken.is_empty() => return drop(index),
            Step::Repeat(index) => Event::Command(self.taken[index % self.taken.len()]),
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
        self.feed(event);
    }

    fn feed(&mut self, event: Event) {
        if self.exited {
            return;
        }
        let before = self.device.clone();
        let stale = self.is_stale(&event);
        let effects = self.device.step(event.clone());
        let dropped = matches!(effects[..], [Effect::Dropped(_)]);
        assert!(!stale || dropped, "{event:?} is stale: {effects:?}");
        if dropped {
            assert_eq!(before, self.device, "{event:?} was dropped");
            return;
        }
        assert!(!effects.iter().any(|effect| matches!(effect, Effect::Dropped(_))));
        self.before_effects(&event);
        for effect in &effects {
            self.note(effect);
        }
        self.check(&event);
    }

    /// What no device may act upon, whatever it is at.
    fn is_stale(&self, event: &Event) -> bool {
        let (term, epoch) = (self.device.term(), self.device.epoch());
        match event {
            Event::Welcome { term: new, .. } => *new <= term,
            Event::Command(command) => {
                command.term != term || command.epoch < epoch || self.taken.contains(command)
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
            }
            Event::Abort(_) => self.excuse(),
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
    let bits = prop_oneof![4 => Just(7u64), 1 => Just(3u64), 1 => Just(1u64), 1 => Just(5u64)];
    (bits, proptest::collection::vec(step(), 0..80))
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
    #![proptest_config(cases(3000))]

    #[test]
    fn quiet_answers_terms_epochs_masters_and_leases_hold_in_any_order((bits, steps) in steps()) {
        run(bits, &steps);
    }

    #[test]
    fn it_is_never_stuck((bits, steps) in steps()) {
        let mut rig = run(bits, &steps);
        // Every walk, stream and reset ends, and then nothing waits; `check` looks.
        for _ in 0..40 {
            rig.act(&Step::Finish);
        }
        prop_assert!(rig.exited || (!rig.device.is_busy() && rig.outstanding.is_none()));
        prop_assert!(rig.exited || (!rig.client_waits && rig.begun.is_none_or(|(_, excused)| excused)));
    }

    #[test]
    fn it_always_comes_back_to_running((bits, steps) in steps()) {
        let mut rig = run(bits, &steps);
        let epoch = rig.device.epoch().0;
        let last = |by, phase, target| {
            Event::Command(Command { term: rig.device.term(), ..command(epoch + by, phase, target) })
        };
        let reset = last(1, Phase::Reset, MigrationState::Error);
        let start = last(2, Phase::Start, MigrationState::Running);
        for event in [reset, start] {
            rig.feed(event);
            for _ in 0..40 {
                rig.act(&Step::Finish);
            }
        }
        prop_assert!(rig.exited || rig.device.state() == MigrationState::Running);
    }
}
