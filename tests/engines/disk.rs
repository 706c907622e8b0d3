//! An engine whose state is saved to a disk that is full.

use crate::driver::MEMORY;
use crate::machine::LONG;
use standstill::protocol::channel::CoordinatorEnd;
use standstill::protocol::message::{
    Command, CoordinatorMessage, DeviceMessage, Epoch, OrphanPolicy, Phase, RefusalKind, Shutdown,
    Term, VERSIONS, Welcome,
};
use standstill::protocol::migration::MigrationState;
use std::fs::File;
use std::os::fd::AsFd;
use std::process::Stdio;

struct Engine {
    channel: CoordinatorEnd,
    process: std::process::Child,
    epoch: u64,
}

impl Engine {
    fn start(socket: &std::path::Path) -> Self {
        let (channel, stdin) = CoordinatorEnd::pair().unwrap();
        let process = std::process::Command::new(env!("CARGO_BIN_EXE_standstill"))
            .args(["device", "copy-engine"])
            .arg(format!("--memory={MEMORY}"))
            .arg("--socket")
            .arg(socket)
            .stdin(stdin)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let engine = Self { channel, process, epoch: 0 };
        let hello = engine.channel.recv(LONG).unwrap().message;
        assert!(matches!(hello, DeviceMessage::Hello(_)), "{hello:?}");
        let welcome = Welcome {
            version: VERSIONS.max,
            machine: uuid::Uuid::from_u128(1),
            name: "engine".into(),
            incarnation: 1,
            term: Term(1),
            epoch: Epoch(0),
            heartbeat_ns: 0,
            orphan: OrphanPolicy::Exit,
            listener: false,
            log: false,
        };
        engine.channel.send(&CoordinatorMessage::Welcome(welcome), &[], LONG).unwrap();
        engine.channel.set_version(VERSIONS.max);
        engine
    }

    /// Its answer.
    fn command(
        &mut self,
        phase: Phase,
        target: MigrationState,
        to: Option<&File>,
    ) -> DeviceMessage {
        self.epoch += 1;
        let (term, epoch) = (Term(1), Epoch(self.epoch));
        let budget_ns = u64::try_from(LONG.as_nanos()).unwrap();
        let command = Command { term, epoch, phase, target, budget_ns, lease_ns: 0 };
        let fds: Vec<_> = to.iter().map(AsFd::as_fd).collect();
        self.channel.send(&CoordinatorMessage::Command(command), &fds, LONG).unwrap();
        loop {
            match self.channel.recv(LONG).unwrap().message {
                DeviceMessage::Event(_) | DeviceMessage::Heartbeat(_) => {}
                answer => return answer,
            }
        }
    }

    fn reaches(&mut self, phase: Phase, target: MigrationState, to: Option<&File>) {
        let answer = self.command(phase, target, to);
        let there = matches!(&answer, DeviceMessage::Reached(r) if r.state == target);
        assert!(there, "{phase}: {answer:?}");
    }
}

#[test]
fn a_state_that_does_not_fit_on_the_disk_is_refused_and_nothing_is_lost() {
    use MigrationState::{Running, RunningP2p, StopCopy};
    let folder = tempfile::tempdir_in("/tmp").unwrap();
    let mut engine = Engine::start(&folder.path().join("engine.sock"));
    engine.reaches(Phase::PrepareStop, RunningP2p, None);
    engine.reaches(Phase::Stop, StopCopy, None);
    let full = File::options().write(true).open("/dev/full").unwrap();
    match engine.command(Phase::Save, StopCopy, Some(&full)) {
        DeviceMessage::Refused(refused) => {
            assert_eq!((refused.state, refused.refusal.kind), (StopCopy, RefusalKind::Stream));
            assert!(refused.refusal.text.contains("No space left"), "{}", refused.refusal.text);
        }
        other => panic!("{other:?}"),
    }
    // Elsewhere there is room for it.
    let file = tempfile::tempfile().unwrap();
    engine.reaches(Phase::Save, StopCopy, Some(&file));
    assert!(file.metadata().unwrap().len() >= MEMORY);
    engine.reaches(Phase::PrepareStart, RunningP2p, None);
    engine.reaches(Phase::Start, Running, None);
    let shutdown = Shutdown { term: Term(1), grace_ns: 1_000_000_000 };
    engine.channel.send(&CoordinatorMessage::Shutdown(shutdown), &[], LONG).unwrap();
    assert!(engine.process.wait().unwrap().success());
}
