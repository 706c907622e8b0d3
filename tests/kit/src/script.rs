//! What a `rogue-device` process does at which message.
//!
//! Where a script says nothing, the device keeps to the protocol: it greets, carries every command
//! out at once by a real [`Lifecycle`](standstill_protocol::lifecycle::Lifecycle), accepts memory
//! declarations, sends its signs of life, and ends when it is told to or its coordinator is gone.
//! Where a script says something, its steps are done *instead*; [`Step::Ack`] is the honest answer
//! and can be one of them.
//!
//! ```
//! use standstill_protocol::message::Phase;
//! use standstill_testkit::{Forgery, Packet, Script, Step, Trigger};
//!
//! // Answers an earlier epoch first, then rightly, then once more.
//! let confused = Script::honest().on(Phase::Stop, [
//!     Step::Send(Packet::Forged(Forgery::EarlierEpoch)),
//!     Step::Ack,
//!     Step::Send(Packet::Forged(Forgery::Nothing)),
//! ]);
//! // Silent from its second PrepareStop on.
//! let tired = Script::honest().on_nth(Phase::PrepareStop, 2, []);
//! // Never says Hello.
//! let shy = Script::honest().on(Trigger::Hello, []);
//! # let _ = (confused, tired, shy);
//! ```

use crate::gate::{Gate, GateKey};
use crate::programs::{Program, ProgramError};
use crate::trace::Trace;
use serde::{Deserialize, Serialize};
use standstill_coordinator::DeviceSpec;
use standstill_protocol::message::{FileIdentity, PeerDma, Phase, VERSIONS, VersionRange};
use standstill_protocol::migration::MigrationFlags;
use std::path::PathBuf;
use std::time::Duration;
use thiserror::Error;

/// How many log lines its signs of life say it has dropped.
pub const DROPPED_LOGS: u64 = 3;

/// What a device process does. It travels as JSON, in the process's one argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Script {
    /// The name under which the device writes to the trace.
    pub name: String,
    /// Where the trace is; none is written without it.
    pub trace: Option<PathBuf>,
    /// The migration states that it claims.
    pub migration: MigrationFlags,
    /// Whether it claims that DMA between it and its peers is possible.
    pub peer_dma: PeerDma,
    /// The protocol versions that it claims.
    pub versions: VersionRange,
    /// A backing file that it declares, so that a fence needs the lock of it. It does not take
    /// that lock itself: who holds it, holds the fence up.
    pub backing_file: Option<PathBuf>,
    /// The files that it claims to have its memory in.
    pub memory: Vec<FileIdentity>,
    /// Whether it claims that its signs of life tell its progress.
    pub progress: bool,
    /// Whether it claims that it can mark the pages that it writes. It writes none.
    pub dirty_tracking: bool,
    /// What it does otherwise than it should.
    pub cues: Vec<Cue>,
}

/// Steps at a message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cue {
    /// The message.
    pub trigger: Trigger,
    /// The how-manieth of its kind, from 1; each if 0.
    pub nth: u32,
    /// In which incarnation of the device (by the trace), from 1; in each if 0.
    pub incarnation: u32,
    /// What is done instead of the honest answer.
    pub steps: Vec<Step>,
}

/// A message at which a device may misbehave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Trigger {
    /// None yet: it is time to say Hello.
    Hello,
    /// The coordinator's Welcome.
    Welcome,
    /// A command of that phase.
    Phase(Phase),
    /// A memory declaration.
    Memory,
    /// The coordinator wants the process to end.
    Shutdown,
}

impl From<Phase> for Trigger {
    fn from(phase: Phase) -> Self {
        Self::Phase(phase)
    }
}

/// One thing that a device does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The honest answer: Hello, the command carried out and its ack, the memory accepted, the end
    /// of the process.
    Ack,
    /// The command is refused, for this reason, unless it asks for what is already so. To
    /// [`Trigger::Phase`] only.
    Refuse(String),
    /// Sends something.
    Send(Packet),
    /// Sends that many signs of life, as fast as they are taken.
    Flood(u32),
    /// Goes on after this time; meanwhile a newer command or an abort ends the steps.
    Delay(Duration),
    /// Goes on when the gate is open; meanwhile as with [`Step::Delay`].
    Hold(GateKey),
    /// Begins to carry the command out, and is on the way until the gate is open. Messages are
    /// read meanwhile; an arc that was begun is finished. To [`Trigger::Phase`] only.
    Linger(GateKey),
    /// From now on its signs of life say this of its data threads.
    Pulse(Pulse),
    /// Stops itself by SIGSTOP.
    Freeze,
    /// Exits with this status.
    Exit(i32),
    /// Ends itself by SIGABRT.
    Crash,
    /// Closes its control channel and lives on.
    Disconnect,
    /// Writes a line to standard error.
    Say(String),
    /// Writes that many lines to standard error, as fast as they are taken, each of so many bytes:
    /// JSON lists, which are more work to read than they are long.
    Shout {
        /// How many lines.
        lines: u32,
        /// How long each is, without its end.
        length: u32,
    },
}

impl Step {
    /// Goes on when this gate is open.
    #[must_use]
    pub fn hold(gate: &Gate) -> Self {
        Self::Hold(gate.key())
    }
}

/// What signs of life say of the data threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Pulse {
    /// They have nothing to do, and do nothing.
    Idle,
    /// They have something to do, and do it.
    Working,
    /// They have something to do, and do not do it.
    Hanging,
}

/// A packet that should not be sent, or not now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Packet {
    /// 64 bytes that are no message.
    Garbage,
    /// No bytes.
    Empty,
    /// More bytes than any message has.
    Oversized,
    /// The honest ack without its last byte.
    Truncated,
    /// A sign of life with 20 file descriptors.
    ManyFds,
    /// That another coordinator has the device, with term 99.
    Superseded,
    /// That it has failed, with the longest text there is, all of it escapes when it is shown.
    Complaint,
    /// A Hello whose list of files claims to have 2⁶⁰ entries.
    HugeHello,
    /// The honest ack with as many counters as it can have.
    FullAck,
    /// An ack that is forged.
    Forged(Forgery),
}

/// What about an ack is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Forgery {
    /// Nothing: as the honest one, though nothing was done.
    Nothing,
    /// It belongs to the epoch before.
    EarlierEpoch,
    /// It belongs to an epoch that has not been.
    LaterEpoch,
    /// It belongs to the term before.
    LowerTerm,
    /// It belongs to a term that has not been.
    HigherTerm,
    /// It belongs to the other phase of the same direction.
    Phase,
    /// It tells the state that the device should have left.
    State,
}

/// Why there is no such device.
#[derive(Debug, Error)]
pub enum RogueError {
    /// Its program is not there.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// The script cannot be written down.
    #[error("the script cannot be an argument: {0}")]
    Script(#[from] serde_json::Error),
}

impl Script {
    /// A device that keeps to the protocol, has P2P states, and has peers.
    #[must_use]
    pub fn honest() -> Self {
        Self {
            name: String::new(),
            trace: None,
            migration: MigrationFlags::STOP_COPY_P2P,
            peer_dma: PeerDma::Possible,
            versions: VERSIONS,
            backing_file: None,
            memory: Vec::new(),
            progress: false,
            dirty_tracking: true,
            cues: Vec::new(),
        }
    }

    /// Does these steps instead, each time.
    #[must_use]
    pub fn on(self, trigger: impl Into<Trigger>, steps: impl IntoIterator<Item = Step>) -> Self {
        self.on_nth(trigger, 0, steps)
    }

    /// Does these steps instead, the `nth` time (from 1). The first fitting one counts.
    #[must_use]
    pub fn on_nth(
        mut self,
        trigger: impl Into<Trigger>,
        nth: u32,
        steps: impl IntoIterator<Item = Step>,
    ) -> Self {
        let steps = steps.into_iter().collect();
        self.cues.push(Cue { trigger: trigger.into(), nth, incarnation: 0, steps });
        self
    }

    /// Does these steps instead in one incarnation of the device (from 1), each time.
    #[must_use]
    pub fn on_in(
        mut self,
        incarnation: u32,
        trigger: impl Into<Trigger>,
        steps: impl IntoIterator<Item = Step>,
    ) -> Self {
        let steps = steps.into_iter().collect();
        self.cues.push(Cue { trigger: trigger.into(), nth: 0, incarnation, steps });
        self
    }

    /// Claims to have its memory in these files.
    #[must_use]
    pub fn memory(mut self, files: impl IntoIterator<Item = FileIdentity>) -> Self {
        self.memory.extend(files);
        self
    }

    /// Claims that its signs of life tell its progress; [`Step::Pulse`] says what they tell.
    #[must_use]
    pub fn progress(mut self) -> Self {
        self.progress = true;
        self
    }

    /// Claims that it cannot mark the pages that it writes.
    #[must_use]
    pub fn without_dirty_tracking(mut self) -> Self {
        self.dirty_tracking = false;
        self
    }

    /// Claims to speak these protocol versions.
    #[must_use]
    pub fn versions(mut self, min: u16, max: u16) -> Self {
        self.versions = VersionRange { min, max };
        self
    }

    /// Claims to have no P2P states.
    #[must_use]
    pub fn without_p2p(mut self) -> Self {
        self.migration = MigrationFlags::STOP_COPY;
        self
    }

    /// A device of a machine that another process starts: see [`Pilot`](crate::Pilot).
    #[must_use]
    pub fn named(mut self, name: &str, trace: &Trace) -> Self {
        name.clone_into(&mut self.name);
        self.trace = Some(trace.path().to_owned());
        self
    }

    /// Declares a backing file; see [`Script::backing_file`](field@Script::backing_file).
    #[must_use]
    pub fn backing_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.backing_file = Some(path.into());
        self
    }

    /// The steps at the `nth` message of that kind in that incarnation, if they are not the honest
    /// answer.
    #[must_use]
    pub fn steps(&self, incarnation: u32, trigger: Trigger, nth: u32) -> Option<&[Step]> {
        let fits = |wanted: u32, is: u32| wanted == 0 || wanted == is;
        let cue = self.cues.iter().find(|cue| {
            cue.trigger == trigger && fits(cue.nth, nth) && fits(cue.incarnation, incarnation)
        })?;
        Some(&cue.steps)
    }

    /// A device of a machine that follows this script and writes to the trace under its name.
    ///
    /// # Errors
    ///
    /// If the program is not there.
    pub fn device(self, name: &str, trace: &Trace) -> Result<DeviceSpec, RogueError> {
        self.named(name, trace).spec()
    }

    /// A device of a machine, of the name that the script has.
    ///
    /// # Errors
    ///
    /// If the program is not there.
    pub fn spec(&self) -> Result<DeviceSpec, RogueError> {
        let arguments = vec![serde_json::to_string(self)?.into()];
        // The program that is named here is another one in a moment.
        let device = DeviceSpec::new(&self.name, "rogue-device");
        let launched = Program::RogueDevice.launched(device.process().clone(), arguments)?;
        Ok(device.launched_by(|_| launched))
    }
}

/// Where the program `rogue-device` is, as [`Program::file`].
///
/// # Errors
///
/// As [`Program::file`].
pub fn rogue_device() -> Result<PathBuf, RogueError> {
    Ok(Program::RogueDevice.file()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_survives_its_way_through_an_argument() {
        let gate = Gate::closed().unwrap();
        let script = Script::honest()
            .without_p2p()
            .versions(7, 9)
            .on(Trigger::Hello, [Step::Say("boo".into()), Step::Exit(3)])
            .on_nth(Phase::Stop, 2, [Step::Send(Packet::Forged(Forgery::Phase)), Step::hold(&gate)])
            .on(Phase::Start, [Step::Delay(Duration::from_millis(5)), Step::Refuse("no".into())]);
        let argument = serde_json::to_string(&script).unwrap();
        assert_eq!(serde_json::from_str::<Script>(&argument).unwrap(), script);
    }

    #[test]
    fn the_nth_message_finds_its_cue() {
        let script =
            Script::honest().on_nth(Phase::Stop, 2, [Step::Crash]).on(Phase::Start, [Step::Freeze]);
        assert_eq!(script.steps(1, Phase::Stop.into(), 1), None);
        assert_eq!(script.steps(1, Phase::Stop.into(), 2), Some(&[Step::Crash][..]));
        assert_eq!(script.steps(1, Phase::Stop.into(), 3), None);
        assert_eq!(script.steps(7, Phase::Start.into(), 9), Some(&[Step::Freeze][..]));
    }

    #[test]
    fn a_cue_of_one_incarnation_is_for_no_other() {
        let script = Script::honest().on_in(2, Phase::Stop, [Step::Crash]);
        assert_eq!(script.steps(1, Phase::Stop.into(), 1), None);
        assert_eq!(script.steps(2, Phase::Stop.into(), 5), Some(&[Step::Crash][..]));
    }
}
