//! Whatever a coordinator sends to a device process, with fds, while its client and the hooks of the
//! device do what they like.
//!
//! The first two bytes say how it begins, the others are steps: see `standstill_fuzz::track`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_device_proc::actor::fuzzing::{Fate, Session, Standing};
use standstill_fuzz::memory::Counting;
use standstill_fuzz::session;
use standstill_fuzz::socket::{fd, open_fds, send};
use standstill_fuzz::track::{Fds, Step, Steps};
use standstill_protocol::channel::{CoordinatorEnd, DeviceEnd};
use standstill_protocol::codec::{HEADER, MAGIC, Message, decode};
use standstill_protocol::lifecycle::ClientRequest;
use standstill_protocol::message::*;
use standstill_protocol::migration::{Activity, MigrationFlags, MigrationState};
use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::Receiver;
use std::time::Duration;
use uuid::Uuid;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const VERSION: u16 = 1;
const MACHINE: Uuid = Uuid::from_u128(7);
const FIRST_TERM: Term = Term(3);
const FIRST_EPOCH: Epoch = Epoch(16);
/// How long a device may take for what it is asked at the end; longer than any grace.
const LONG: Duration = Duration::from_secs(3600);
/// What a session may take of the heap, besides what is in its sockets: a place for 256 answers,
/// the actor, a piece of a state stream for each of a few threads.
const HEAP: usize = 2 << 20;
/// What a device may have open at a time: RAM, bitmaps, connections, what waits to be revoked.
const FDS: usize = 96;

const STATES: [MigrationState; 8] = [
    MigrationState::Error,
    MigrationState::Stop,
    MigrationState::Running,
    MigrationState::StopCopy,
    MigrationState::Resuming,
    MigrationState::RunningP2p,
    MigrationState::PreCopy,
    MigrationState::PreCopyP2p,
];

fuzz_target!(|input: &[u8]| {
    let Some((&[setup, fates], steps)) = input.split_first_chunk::<2>() else { return };
    session::run(HEAP, talk(setup, fates, Steps(steps)));
});

async fn talk(setup: u8, fates: u8, steps: Steps<'_>) {
    let mut world = World::begin(setup, fates).await;
    for step in steps.take(64) {
        world.step(step).await;
        world.settle().await;
        world.look();
    }
    world.finish().await;
}

/// A device, who coordinates it, and what was seen of it.
struct World {
    session: Session,
    orphan: OrphanPolicy,
    coordinator: CoordinatorEnd,
    /// Those of before, for the device may still say something to them.
    earlier: Vec<CoordinatorEnd>,
    term: Term,
    /// The coordinator has sent what no coordinator sends, or is gone.
    broken: bool,
    /// Something may have ended the device.
    may_end: bool,
    answered: HashSet<(Term, Epoch, Phase)>,
    statuses: usize,
    fds: usize,
    clients: Vec<Receiver<Result<MigrationState, Refusal>>>,
}

fn pair() -> (CoordinatorEnd, DeviceEnd) {
    let (coordinator, device) = CoordinatorEnd::pair().expect("sockets");
    let device = DeviceEnd::from_fd(device).expect("a socket of that kind");
    coordinator.set_version(VERSION);
    device.set_version(VERSION);
    (coordinator, device)
}

impl World {
    async fn begin(setup: u8, fates: u8) -> Self {
        let orphan = if setup & 1 == 0 { OrphanPolicy::Exit } else { OrphanPolicy::Keep };
        let migration = match setup >> 1 & 3 {
            0 => MigrationFlags::ALL,
            1 => MigrationFlags::STOP_COPY,
            _ => MigrationFlags::STOP_COPY_P2P,
        };
        let fates = [0, 2, 4, 6].map(|shift| match fates >> shift & 3 {
            0 | 1 => Fate::Succeeds,
            2 => Fate::Fails,
            _ => Fate::Hangs,
        });
        let fds = open_fds();
        let (coordinator, device) = pair();
        let heartbeat_ns = if setup & 8 == 0 { 0 } else { 250_000_000 };
        // The socket for later coordinators is anything.
        let socket: Vec<OwnedFd> = (setup & 16 != 0).then(|| fd(setup >> 5)).into_iter().collect();
        let welcome = welcome(FIRST_TERM, orphan, heartbeat_ns, !socket.is_empty());
        let session = Session::begin(migration, fates, device, welcome, socket).await;
        Self {
            session,
            orphan,
            coordinator,
            earlier: Vec::new(),
            term: FIRST_TERM,
            broken: false,
            may_end: false,
            answered: HashSet::new(),
            statuses: 0,
            fds,
            clients: Vec::new(),
        }
    }

    async fn step(&mut self, step: Step<'_>) {
        match step {
            Step::Message(payload, fds) => {
                let mut packet = MAGIC.to_vec();
                packet.extend(VERSION.to_le_bytes());
                packet.extend([0, 0]);
                packet.extend(payload);
                self.send(&packet, fds);
            }
            Step::Packet(packet, fds) => self.send(packet, fds),
            Step::Turns(count) => {
                for _ in 0..count.min(16) {
                    tokio::task::yield_now().await;
                }
            }
            Step::Other(0, _) => self.close(),
            Step::Other(1, more) => self.take_over(more).await,
            Step::Other(2, more) => {
                let request = match more >> 3 & 1 {
                    0 => ClientRequest::SetState(STATES[usize::from(more & 7)]),
                    _ => ClientRequest::Reset,
                };
                self.clients.push(self.session.client(request));
            }
            Step::Other(_, more) => {
                // A lease may run out.
                self.may_end = true;
                tokio::time::advance(Duration::from_millis(10 * u64::from(more))).await;
            }
        }
    }

    fn send(&mut self, packet: &[u8], fds: Fds) {
        let kinds = (0..fds.count).map(|at| fds.first.wrapping_add(at));
        let fds: Vec<_> = kinds.map(fd).collect();
        let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        if !send(&self.coordinator, packet, &borrowed) || self.broken {
            return;
        }
        match decode::<CoordinatorMessage>(packet, VERSION) {
            Ok(message) if message.is_handshake() || message.fd_count() != fds.len() => {
                self.broken = true;
            }
            Ok(CoordinatorMessage::Shutdown(shutdown)) => {
                self.may_end |= shutdown.term == self.term;
            }
            Ok(_) => {}
            Err(error) => {
                assert!(packet.len() < HEADER || !error.to_string().is_empty());
                self.broken = true;
            }
        }
    }

    fn close(&mut self) {
        let (nobody, _) = pair();
        self.earlier.push(std::mem::replace(&mut self.coordinator, nobody));
        // Only the coordinator's own end: the other one is still with the device.
        self.earlier.clear();
        self.broken = true;
    }

    async fn take_over(&mut self, more: u8) {
        let term = Term(self.term.0.saturating_add(u64::from(more & 3)).saturating_sub(1));
        let orphan = if more & 4 == 0 { OrphanPolicy::Exit } else { OrphanPolicy::Keep };
        let (coordinator, device) = pair();
        let heartbeat_ns = if more & 8 == 0 { 0 } else { 1_000_000 };
        let highest = self.session.standing().map(|standing| standing.term);
        self.session.take_over(device, welcome(term, orphan, heartbeat_ns, false)).await;
        let Some(highest) = highest.filter(|_| self.session.standing().is_some()) else { return };
        if term <= highest {
            let told = coordinator.try_recv().expect("an answer").map(|told| told.message);
            let superseded = DeviceMessage::Event(DeviceEvent::Superseded(highest));
            assert_eq!(told, Some(superseded), "who comes too late is told so");
            return;
        }
        self.earlier.push(std::mem::replace(&mut self.coordinator, coordinator));
        (self.term, self.orphan, self.broken) = (term, orphan, false);
    }

    /// Lets the device do everything that it can do without time passing.
    async fn settle(&mut self) {
        loop {
            let read = self.session.read();
            for _ in 0..4 {
                tokio::task::yield_now().await;
            }
            if !read {
                break;
            }
        }
    }

    /// Everything that can be seen from outside is as it should be.
    fn look(&mut self) {
        assert!(self.session.keeps_its_word(), "what is in force is not what is allowed");
        self.hear();
        if let Some(outcome) = self.session.outcome() {
            let by_error = self.broken && self.orphan == OrphanPolicy::Exit;
            assert!(self.may_end || by_error, "it has ended: {outcome:?}");
            if let Err(why) = &outcome {
                assert!(by_error, "{why}");
                assert!(why.contains("coordinator") || why.contains("greeting"), "{why}");
            }
            self.may_end = true;
        } else if self.broken
            && let Some(standing) = self.session.standing()
        {
            assert_eq!(self.orphan, OrphanPolicy::Keep, "it goes on after an error: {standing:?}");
            assert!(!standing.has_coordinator, "it listens after an error: {standing:?}");
        }
    }

    /// Reads what the device says to its coordinator.
    fn hear(&mut self) {
        loop {
            let received = match self.coordinator.try_recv() {
                Ok(Some(received)) => received,
                Ok(None) => return,
                // Its end, which may still be half open on our side.
                Err(error) => {
                    let gone = self.broken || self.session.standing().is_none();
                    return assert!(gone, "an honest device: {error}");
                }
            };
            assert!(received.fds.is_empty());
            match received.message {
                DeviceMessage::Reached(Reached { term, epoch, phase, state, .. }) => {
                    self.answer(term, epoch, phase);
                    let most = match phase {
                        Phase::PrepareStop => Activity::NoPeer,
                        Phase::Stop => Activity::Stopped,
                        _ => Activity::Full,
                    };
                    assert!(state.activity() <= most, "{phase} has led to {state}");
                }
                DeviceMessage::Refused(Refused { term, epoch, phase, refusal, .. }) => {
                    self.answer(term, epoch, phase);
                    assert!(!refusal.text.is_empty(), "{refusal:?} says nothing");
                }
                DeviceMessage::Status(status) => {
                    assert_eq!(status.term, self.term);
                    self.statuses += 1;
                }
                DeviceMessage::Hello(hello) => panic!("a second greeting: {hello:?}"),
                DeviceMessage::MemoryAccepted(_)
                | DeviceMessage::Heartbeat(_)
                | DeviceMessage::Event(_) => {}
            }
        }
    }

    /// No command is answered twice.
    fn answer(&mut self, term: Term, epoch: Epoch, phase: Phase) {
        assert_eq!(term, self.term, "an answer to another coordinator");
        assert!(self.answered.insert((term, epoch, phase)), "{phase} of {epoch} once more");
    }

    /// Whatever there was before: a device that has a coordinator does what it is told.
    async fn finish(mut self) {
        assert!(open_fds() <= self.fds + FDS, "{} fds are open", open_fds() - self.fds);
        if let Some(standing) = self.session.standing()
            && standing.has_coordinator
            && standing.epoch.0 < u64::MAX - 1
        {
            self.still_works(standing).await;
        }
        let Self { session, clients, .. } = self;
        session.end().await;
        for client in clients {
            assert!(client.try_iter().count() <= 1, "a request of the client has two answers");
        }
    }

    async fn still_works(&mut self, standing: Standing) {
        let (term, epoch) = (standing.term, standing.epoch.next());
        let statuses = self.statuses;
        self.say(&CoordinatorMessage::Query(Query { term, epoch }));
        self.settle().await;
        self.look();
        assert_eq!(self.statuses, statuses + 1, "a query has one answer");
        let (phase, target) = (Phase::PrepareStop, MigrationState::RunningP2p);
        let budget_ns = 1_000_000_000;
        let command = Command { term, epoch, phase, target, budget_ns, lease_ns: 0 };
        self.say(&CoordinatorMessage::Command(command));
        let key = (term, epoch, phase);
        let answer = async {
            loop {
                self.settle().await;
                self.look();
                if self.answered.contains(&key) || self.session.standing().is_none() {
                    return;
                }
                // Lets time pass where there is nothing else to do.
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = tokio::time::timeout(LONG, answer).await;
        assert!(in_time.is_ok(), "{phase} of {epoch} has no answer");
        if self.session.standing().is_none() {
            return;
        }
        self.may_end = true;
        self.say(&CoordinatorMessage::Shutdown(Shutdown { term, grace_ns: 1 }));
        self.settle().await;
        assert_eq!(self.session.outcome(), Some(Ok(())), "it does not end");
    }

    fn say(&self, message: &CoordinatorMessage) {
        self.coordinator.try_send(message, &[]).expect("a device that reads");
    }
}

fn welcome(term: Term, orphan: OrphanPolicy, heartbeat_ns: u64, listener: bool) -> Welcome {
    Welcome {
        version: VERSION,
        machine: MACHINE,
        name: "disk0".into(),
        incarnation: 1,
        term,
        epoch: FIRST_EPOCH,
        heartbeat_ns,
        orphan,
        listener,
        log: false,
    }
}
