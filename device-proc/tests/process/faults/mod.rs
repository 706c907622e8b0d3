//! A device process that does wrong what it was told to, and says so first.

mod data;
mod every;
mod hello;
mod stream;

use crate::child::{Device, PATIENCE, until, wait};
use crate::client::Client;
use crate::probe::NUMBER;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use standstill_protocol::channel::RecvError;
use standstill_protocol::fault::{Action, Fault, Forgery, JournalLine, Packet, Point};
use standstill_protocol::message::{
    Arm, CoordinatorMessage, DeviceMessage, Epoch, MemoryDeclaration, Phase, Query, RefusalKind,
    Shutdown, Term,
};
use standstill_protocol::migration::MigrationState as S;
use std::io::{PipeReader, Read};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::Child;
use std::time::{Duration, Instant};

/// In which nothing is to come. A machine that is slower than this hides a mistake, it makes none.
const SILENCE: Duration = Duration::from_millis(150);

/// What a process that is armed says that it does.
pub(crate) struct Journal(PipeReader);

impl Journal {
    fn line(&mut self) -> JournalLine {
        let mut line = String::new();
        loop {
            let ready = poll(
                &mut [PollFd::new(&self.0, PollFlags::IN)],
                Some(&PATIENCE.try_into().unwrap()),
            );
            assert_eq!(ready, Ok(1), "no line within {PATIENCE:?}");
            let mut byte = [0];
            self.0.read_exact(&mut byte).expect("the journal has ended");
            match byte {
                [b'\n'] => return JournalLine::parse(&line).expect("a line of a journal"),
                [byte] => line.push(byte.into()),
            }
        }
    }

    /// The next line says that this fault has fired, at that occurrence.
    pub(crate) fn fired(&mut self, index: u32, occurrence: u32) {
        let JournalLine::Fired { index: found, occurrence: at, at_ns } = self.line() else {
            panic!("nothing more was armed");
        };
        assert_eq!((found, at), (index, occurrence));
        assert!(at_ns > 0);
    }

    /// Nothing more was done, and nothing more can be.
    fn ends(mut self) {
        let mut rest = String::new();
        self.0.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "");
    }
}

/// Arms a device and waits until it is.
pub(crate) fn arm(device: &Device, faults: &[Fault]) -> Journal {
    let (reader, writer) = std::io::pipe().unwrap();
    let arm = Arm { term: device.term, faults: faults.to_vec() };
    device.send_with(&CoordinatorMessage::Arm(arm), &[writer.as_fd()]);
    drop(writer);
    let mut journal = Journal(reader);
    let count = u32::try_from(faults.len()).unwrap();
    assert_eq!(journal.line(), JournalLine::Armed(count));
    journal
}

/// A device that does this wrong at that point, the first time.
fn armed(point: Point, action: Action) -> (Device, Journal) {
    let device = Device::welcomed("");
    let journal = arm(&device, &[Fault::new(point, action)]);
    (device, journal)
}

/// Brings the device to a point. What it says before that is read.
fn lead_to(device: &Device, point: Point) {
    let (epoch, grace_ns) = (Epoch(9), 1_000_000_000);
    match point {
        Point::Receipt(Phase::PrepareStop) | Point::BeforeAck(Phase::PrepareStop) => {
            device.command(1, Phase::PrepareStop, S::RunningP2p);
        }
        Point::Receipt(_) | Point::BeforeAck(_) => {
            device.go(1, Phase::PrepareStop, S::RunningP2p);
            device.command(1, Phase::Stop, S::Stop);
        }
        Point::AfterAck(_) => {
            device.go(1, Phase::PrepareStop, S::RunningP2p);
            device.go(1, Phase::Stop, S::Stop);
        }
        Point::Query => {
            device.send(&CoordinatorMessage::Query(Query { term: device.term, epoch }));
        }
        Point::Memory => {
            let (term, sequence) = (device.term, 3);
            let memory = MemoryDeclaration { term, sequence, ram_fds: 1, dirty_page_size: 0 };
            let file = tempfile::tempfile().unwrap();
            device.send_with(&CoordinatorMessage::Memory(memory), &[file.as_fd()]);
        }
        Point::Shutdown => {
            device.send(&CoordinatorMessage::Shutdown(Shutdown { term: device.term, grace_ns }));
        }
        other => panic!("{other} is not at the control channel"),
    }
}

/// Those at the control channel.
const POINTS: [Point; 8] = [
    Point::Receipt(Phase::PrepareStop),
    Point::BeforeAck(Phase::PrepareStop),
    Point::Receipt(Phase::Stop),
    Point::BeforeAck(Phase::Stop),
    Point::AfterAck(Phase::Stop),
    Point::Query,
    Point::Memory,
    Point::Shutdown,
];

fn assert_lives(process: &mut Child) {
    assert_eq!(process.try_wait().unwrap(), None);
}

fn assert_silent(device: &Device) {
    let silence = device.channel.recv(SILENCE);
    assert!(matches!(silence, Err(RecvError::TimedOut { .. })), "{silence:?}");
}

#[test]
fn a_process_exits_at_every_point_and_says_nothing_more() {
    for point in POINTS {
        let (mut device, mut journal) = armed(point, Action::Exit(47));
        lead_to(&device, point);
        journal.fired(0, 1);
        assert_eq!(wait(&mut device.process).code(), Some(47), "{point}");
        let end = device.channel.recv(PATIENCE);
        assert!(matches!(end, Err(RecvError::Disconnected)), "{point}: {end:?}");
        journal.ends();
    }
}

#[test]
fn a_process_ends_itself_by_a_signal() {
    for (action, signal) in [(Action::Abort, Signal::ABORT), (Action::Segv, Signal::SEGV)] {
        for point in [Point::Receipt(Phase::PrepareStop), Point::Query] {
            let (mut device, mut journal) = armed(point, action);
            lead_to(&device, point);
            journal.fired(0, 1);
            let status = wait(&mut device.process);
            assert_eq!(status.signal(), Some(signal.as_raw()), "{action} {point}: {status}");
        }
    }
}

#[test]
fn a_process_that_stops_itself_goes_on_when_it_is_continued() {
    let (device, mut journal) = armed(Point::BeforeAck(Phase::Stop), Action::Stop);
    lead_to(&device, Point::BeforeAck(Phase::Stop));
    journal.fired(0, 1);
    let pid = Pid::from_raw(i32::try_from(device.process.id()).unwrap()).unwrap();
    until("it is stopped", || {
        let changed = waitpid(Some(pid), WaitOptions::UNTRACED | WaitOptions::NOHANG).unwrap();
        changed.is_some_and(|(_, status)| status.stopped())
    });
    assert_silent(&device);
    kill_process(pid, Signal::CONT).unwrap();
    assert_eq!(device.reached().state, S::Stop);
    device.resume(2);
}

#[test]
fn a_control_thread_in_an_endless_loop_answers_nothing_and_lives() {
    let (mut device, mut journal) = armed(Point::BeforeAck(Phase::Stop), Action::Spin);
    lead_to(&device, Point::BeforeAck(Phase::Stop));
    journal.fired(0, 1);
    lead_to(&device, Point::Query);
    assert_silent(&device);
    assert_lives(&mut device.process);
}

#[test]
fn an_answer_comes_as_late_as_it_is_told_to() {
    let late = Duration::from_millis(120);
    let (device, mut journal) = armed(Point::BeforeAck(Phase::PrepareStop), Action::DelayMs(120));
    let begin = Instant::now();
    device.go(1, Phase::PrepareStop, S::RunningP2p);
    assert!(begin.elapsed() >= late);
    journal.fired(0, 1);
    device.go(1, Phase::Stop, S::Stop);
    journal.ends();
}

#[test]
fn a_command_is_not_answered_whether_it_is_carried_out_or_not() {
    for (point, state) in [
        (Point::Receipt(Phase::PrepareStop), S::Running),
        (Point::BeforeAck(Phase::PrepareStop), S::RunningP2p),
    ] {
        let (device, mut journal) = armed(point, Action::NoAck);
        lead_to(&device, point);
        journal.fired(0, 1);
        // The answer to a query would come behind an answer to the command.
        assert_eq!(device.query(1).state, state, "{point}");
        device.go(2, Phase::Start, S::Running);
    }
}

#[test]
fn what_is_no_command_is_not_answered() {
    for point in [Point::Query, Point::Memory, Point::Shutdown] {
        let (mut device, mut journal) = armed(point, Action::NoAck);
        lead_to(&device, point);
        journal.fired(0, 1);
        assert_eq!(device.query(5).epoch, Epoch(5), "{point}");
        assert_lives(&mut device.process);
    }
}

#[test]
fn an_answer_comes_twice() {
    let points = [Point::BeforeAck(Phase::Stop), Point::Query, Point::Memory];
    for point in points {
        let (device, mut journal) = armed(point, Action::TwoAcks);
        lead_to(&device, point);
        let first = device.answer();
        assert_eq!(device.answer(), first, "{point}");
        journal.fired(0, 1);
        assert_eq!(device.query(5).epoch, Epoch(5), "and not a third time");
    }
}

#[test]
fn an_answer_is_forged_in_one_of_its_fields() {
    let rightly = (Term(1), Epoch(1), Phase::Stop, S::Stop);
    let (term, epoch, phase, state) = rightly;
    for (forgery, expected) in [
        (Forgery::LowerTerm, (Term(0), epoch, phase, state)),
        (Forgery::HigherTerm, (Term(2), epoch, phase, state)),
        (Forgery::EarlierEpoch, (term, Epoch(0), phase, state)),
        (Forgery::LaterEpoch, (term, Epoch(2), phase, state)),
        (Forgery::Phase, (term, epoch, Phase::PrepareStop, state)),
        (Forgery::State, (term, epoch, phase, S::RunningP2p)),
    ] {
        let point = Point::BeforeAck(Phase::Stop);
        let (device, mut journal) = armed(point, Action::Forge(forgery));
        lead_to(&device, point);
        let forged = device.reached();
        assert_eq!((forged.term, forged.epoch, forged.phase, forged.state), expected, "{forgery}");
        journal.fired(0, 1);
        assert_eq!(device.query(1).state, S::Stop, "nothing but the answer is wrong");
    }
}

#[test]
fn a_declaration_of_another_device_is_answered() {
    let forge = Action::Forge(Forgery::Declaration);
    let (device, mut journal) = armed(Point::Memory, forge);
    lead_to(&device, Point::Memory);
    match device.answer() {
        DeviceMessage::MemoryAccepted(accepted) => assert_eq!(accepted.sequence, 4, "not 3"),
        other => panic!("expected MemoryAccepted, got {other:?}"),
    }
    journal.fired(0, 1);
}

#[test]
fn a_command_is_refused_for_the_reason_that_was_told() {
    let point = Point::Receipt(Phase::Stop);
    let (device, mut journal) = armed(point, Action::Refuse(5));
    lead_to(&device, point);
    let refused = device.refused();
    journal.fired(0, 1);
    assert_eq!(
        (refused.epoch, refused.phase, refused.state),
        (Epoch(1), Phase::Stop, S::RunningP2p)
    );
    assert_eq!(refused.refusal.kind, RefusalKind::Device);
    assert!(refused.refusal.text.starts_with("Input/output error"), "{}", refused.refusal.text);
    device.go(2, Phase::Start, S::Running);
}

#[test]
fn what_is_no_message_comes_in_place_of_an_answer() {
    for point in POINTS {
        for packet in [Packet::Garbage, Packet::Empty, Packet::Truncated, Packet::Oversized] {
            let (device, mut journal) = armed(point, Action::Send(packet));
            lead_to(&device, point);
            journal.fired(0, 1);
            let broken = device.channel.recv(PATIENCE).unwrap_err();
            let expected = match packet {
                // Right before the end of the channel it cannot be told from that.
                Packet::Empty if point == Point::Shutdown => {
                    matches!(broken, RecvError::Empty | RecvError::Disconnected)
                }
                Packet::Empty => matches!(broken, RecvError::Empty),
                Packet::Oversized => matches!(broken, RecvError::Oversized { .. }),
                _ => matches!(broken, RecvError::Decode(_)),
            };
            assert!(expected, "{packet} {point}: {broken:?}");
        }
    }
}

#[test]
fn floods_come_before_the_answer() {
    let point = Point::BeforeAck(Phase::PrepareStop);
    let (device, mut journal) = armed(point, Action::MessageFlood(2000));
    lead_to(&device, point);
    for sequence in 0..2000 {
        match device.next() {
            DeviceMessage::Heartbeat(beat) => assert_eq!(beat.sequence, sequence),
            other => panic!("expected a sign of life, got {other:?}"),
        }
    }
    assert_eq!(device.reached().state, S::RunningP2p);
    journal.fired(0, 1);

    let (device, mut journal) = armed(point, Action::FdFlood(3));
    lead_to(&device, point);
    for _ in 0..3 {
        let broken = device.channel.recv(PATIENCE).unwrap_err();
        assert!(matches!(broken, RecvError::FdsTruncated { .. }), "{broken:?}");
    }
    assert_eq!(device.reached().state, S::RunningP2p);
    journal.fired(0, 1);
}

#[test]
fn a_process_that_has_cut_its_control_channel_lives_on() {
    for point in [Point::Receipt(Phase::Stop), Point::BeforeAck(Phase::Stop)] {
        let (mut device, mut journal) = armed(point, Action::Disconnect);
        lead_to(&device, point);
        journal.fired(0, 1);
        let end = device.channel.recv(PATIENCE);
        assert!(matches!(end, Err(RecvError::Disconnected)), "{point}: {end:?}");
        // It has stopped all the same, and serves its client.
        let mut client = Client::connect(&device.socket());
        until("it has stopped", || client.write_u32(0, NUMBER, 1).is_err());
        assert_lives(&mut device.process);
    }
}

#[test]
fn a_fault_waits_for_its_occurrence_and_comes_once() {
    let device = Device::welcomed("");
    let ack = Point::BeforeAck(Phase::PrepareStop);
    let second = Fault::new(ack, Action::TwoAcks).nth(2);
    let mut journal = arm(&device, &[Fault::new(Point::Query, Action::NoAck).nth(99), second]);
    for round in 0..3 {
        device.go(2 * round + 1, Phase::PrepareStop, S::RunningP2p);
        if round == 1 {
            assert_eq!(device.reached().epoch, Epoch(3), "the same answer again");
            journal.fired(1, 2);
        }
        device.go(2 * round + 1, Phase::Stop, S::Stop);
        device.resume(2 * round + 2);
    }
    // Armed later, it counts from then on; what was armed before stays armed.
    let mut every_time = arm(&device, &[Fault::new(ack, Action::TwoAcks).nth(0)]);
    for round in 4..6 {
        device.go(2 * round + 1, Phase::PrepareStop, S::RunningP2p);
        assert_eq!(device.reached().epoch, Epoch(2 * round + 1));
        every_time.fired(0, u32::try_from(round).unwrap() - 3);
        device.go(2 * round + 2, Phase::Start, S::Running);
    }
    device.shut_down();
    journal.ends();
    every_time.ends();
}

#[test]
fn faults_of_another_term_are_not_armed() {
    let device = Device::welcomed("");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let faults = vec![Fault::new(Point::Query, Action::Exit(1))];
    for term in [0, 2] {
        let arm = CoordinatorMessage::Arm(Arm { term: Term(term), faults: faults.clone() });
        device.send_with(&arm, &[writer.as_fd()]);
    }
    drop(writer);
    assert_eq!(device.query(1).state, S::Running);
    let mut journal = String::new();
    reader.read_to_string(&mut journal).unwrap();
    assert_eq!(journal, "");
    device.shut_down();
}

#[test]
fn a_journal_that_nobody_reads_holds_nothing_up() {
    let device = Device::welcomed("");
    let every_time = Fault::new(Point::Query, Action::DelayMs(0)).nth(0);
    let journal = arm(&device, &[every_time]);
    // Some hundred more lines than a pipe takes.
    for epoch in 1..5000 {
        assert_eq!(device.query(epoch).epoch, Epoch(epoch));
    }
    drop(journal);
    assert_eq!(device.query(5000).epoch, Epoch(5000));
    device.shut_down();
}
