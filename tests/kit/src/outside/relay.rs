//! A program between a coordinator and a device process, which does to their packets what it is told.
//!
//! ```text
//! coordinator ⇄ relay ⇄ device process
//! ```
//!
//! The relay starts the device process with a control channel of its own, and passes packets and file
//! descriptors on, both ways, also such as are no messages. It reads the messages only to know which
//! they are, so it works with any program, and "the third `PrepareStop`" is exactly that packet: it is
//! held back until what was armed for it is done.
//!
//! The process that the coordinator knows, and kills, is the relay. The device process ends with it:
//! by `PR_SET_PDEATHSIG`, which it sets itself if it is one of our runtime's, and by a guard, a third
//! process that sees the relay's end. That it has ended is part of the coordinator's proof: the relay
//! adds a file to the device's backing files whose lock is held as long as either of the two lives.
//! The device's own files pass through. The relay ends as the device does, with its status or by its
//! signal.
//!
//! A relay of a machine that is kept stays between the device and later coordinators too: it listens
//! in the device's place.
//!
//! ```no_run
//! use standstill_coordinator::DeviceSpec;
//! use standstill_protocol::message::Phase;
//! use standstill_testkit::outside::Relay;
//! use standstill_testkit::plan::{Moment, OutsideAction};
//!
//! let relay = Relay::new()?;
//! let device = relay.wrap(DeviceSpec::new("nic0", "/usr/bin/my-nic"))?;
//! // … start a machine with it, and then:
//! relay.arm(Moment::Answer(Phase::Stop), 1, OutsideAction::Drop)?;
//! // … pause the machine, and then:
//! assert_eq!(relay.fired()?.len(), 1, "the answer was not dropped");
//! # let _ = device;
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

#![expect(clippy::panic, reason = "a check fails by a panic")]

use super::Fired;
use crate::plan::{Moment, OutsideAction};
use crate::programs::{Program, ProgramError};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};
use standstill_coordinator::DeviceSpec;
use standstill_protocol::fault::JournalLine;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use thiserror::Error;

/// How long a fault may take to fire that is done at once.
const PATIENCE: Duration = Duration::from_secs(30);

/// What is armed, in the relay's folder.
pub(crate) const ORDERS: &str = "orders.json";
/// What has happened, in the relay's folder.
pub(crate) const JOURNAL: &str = "journal";
/// The file whose lock shows that the relay or its device process lives.
pub(crate) const LOCK: &str = "alive";

/// Something cannot be done with a relay.
#[derive(Debug, Error)]
pub enum RelayError {
    /// What is armed is done to a packet, and at that moment there is none.
    #[error("{action:?} needs a packet, and at {moment:?} there is none")]
    NoPacket {
        /// When.
        moment: Moment,
        /// What.
        action: OutsideAction,
    },
    /// It would end or stop this process, which is the coordinator itself.
    #[error(
        "{action:?} would hit this process itself: it is for a coordinator in another one (`Pilot`)"
    )]
    Oneself {
        /// What.
        action: OutsideAction,
    },
    /// A file of the relay cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The relay's program cannot be started.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// What is armed cannot be written down.
    #[error("what is armed cannot be written down: {0}")]
    Orders(#[from] serde_json::Error),
}

/// One fault that is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    pub(crate) moment: Moment,
    /// From 1; each time if 0.
    pub(crate) nth: u32,
    pub(crate) action: OutsideAction,
    /// Who has armed it: a coordinator of that process number is spared.
    pub(crate) owner: u32,
    /// A packet that it holds back is let go.
    pub(crate) let_go: bool,
}

/// What a test has of a relay. Copies of it are the same relay; with the last one its files go.
#[derive(Clone, Debug)]
pub struct Relay {
    folder: Arc<TempDir>,
    orders: Arc<Mutex<Vec<Order>>>,
}

impl Relay {
    /// A relay for one device, in which nothing is armed.
    ///
    /// # Errors
    ///
    /// [`RelayError::Io`], if its files cannot be made.
    pub fn new() -> Result<Self, RelayError> {
        let folder = tempfile::Builder::new().prefix("relay-").tempdir();
        let folder =
            folder.map_err(|source| RelayError::Io { path: std::env::temp_dir(), source })?;
        let relay = Self { folder: Arc::new(folder), orders: Arc::default() };
        for file in [JOURNAL, LOCK] {
            let path = relay.path(file);
            std::fs::File::create(&path).map_err(|source| RelayError::Io { path, source })?;
        }
        Ok(relay)
    }

    /// The same device, with the relay between it and its coordinator; in all its incarnations.
    ///
    /// # Errors
    ///
    /// [`RelayError::Program`].
    pub fn wrap(&self, device: DeviceSpec) -> Result<DeviceSpec, RelayError> {
        let arguments = self.arguments(&device);
        let launched = Program::Relay.launched(device.process().clone(), arguments)?;
        Ok(device.launched_by(|_| launched))
    }

    /// The folder of the relay, and what it is to start.
    fn arguments(&self, device: &DeviceSpec) -> Vec<OsString> {
        let process = device.process();
        let program = [self.folder.path().into(), process.program().into()];
        program.into_iter().chain(process.arguments().iter().cloned()).collect()
    }

    /// Does this at the `nth` such moment from now on (from 1; each time if 0). Returns its index in
    /// the journal. What has fired once does not fire again in a later incarnation.
    ///
    /// It is in force for every packet that is sent after this returns, also if the device process
    /// is not started yet. Several that are armed for one packet are done in their order; of those that
    /// decide what becomes of it, the worst one is. What is armed for [`Moment::Running`] or [`Moment::Stopped`] is done at once, or when the device
    /// process has been started: wait for it with [`until_fired`](Self::until_fired).
    ///
    /// # Errors
    ///
    /// [`RelayError::NoPacket`] if it needs a packet, and none is under way at that moment;
    /// [`RelayError::Oneself`] if it is done to the coordinator, and that is this process (a relay
    /// that learns so only later ends in its place); [`RelayError::Io`].
    pub fn arm(&self, moment: Moment, nth: u32, action: OutsideAction) -> Result<u32, RelayError> {
        // A channel can be cut at any time.
        let needs_one = action.needs_a_packet() && action != OutsideAction::Cut;
        if needs_one && matches!(moment, Moment::Running | Moment::Stopped) {
            return Err(RelayError::NoPacket { moment, action });
        }
        let owner = std::process::id();
        if action.hits_the_coordinator() && self.coordinator()? == Some(owner) {
            return Err(RelayError::Oneself { action });
        }
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        orders.push(Order { moment, nth, action, owner, let_go: false });
        self.write(&orders)?;
        Ok(u32::try_from(orders.len() - 1).unwrap_or(u32::MAX))
    }

    /// Lets packets go that [`Hold`](OutsideAction::Hold) of that index holds back, or would.
    ///
    /// # Errors
    ///
    /// [`RelayError::Io`].
    pub fn let_go(&self, index: u32) -> Result<(), RelayError> {
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        let order = usize::try_from(index).ok().and_then(|index| orders.get_mut(index));
        if let Some(order) = order {
            order.let_go = true;
        }
        self.write(&orders)
    }

    /// Writes down what is armed; the relay is told by the change.
    fn write(&self, orders: &[Order]) -> Result<(), RelayError> {
        let (path, new) = (self.path(ORDERS), self.path("orders.new"));
        let text = serde_json::to_vec(orders)?;
        let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path));
        written.map_err(|source| RelayError::Io { path, source })
    }

    /// What has happened so far, in that order.
    ///
    /// # Errors
    ///
    /// [`RelayError::Io`].
    pub fn fired(&self) -> Result<Vec<Fired>, RelayError> {
        let text = self.journal()?;
        let fired = |line| match JournalLine::parse(line) {
            Some(JournalLine::Fired { index, occurrence, at_ns }) => {
                Some(Fired { index, occurrence, at_ns })
            }
            _ => None,
        };
        Ok(text.lines().filter_map(fired).collect())
    }

    /// Waits until the fault of that index has fired.
    ///
    /// # Panics
    ///
    /// If it has not within half a minute, or the journal cannot be read.
    pub async fn until_fired(&self, index: u32) -> Fired {
        let end = Instant::now() + PATIENCE;
        loop {
            match self.fired() {
                Ok(fired) => {
                    if let Some(fired) = fired.into_iter().find(|fired| fired.index == index) {
                        return fired;
                    }
                }
                Err(error) => panic!("{error}"),
            }
            assert!(Instant::now() < end, "fault {index} has not fired after {PATIENCE:?}");
            // A file tells nobody that it has a new line.
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// The device process that the relay has started last; `None` before the first one. Signals and
    /// limits that are meant for the device go there, not to the process that the coordinator knows.
    ///
    /// # Errors
    ///
    /// [`RelayError::Io`].
    pub fn device(&self) -> Result<Option<Pid>, RelayError> {
        let text = self.journal()?;
        let pid = |line: &str| Pid::from_raw(line.strip_prefix("device ")?.parse().ok()?);
        Ok(text.lines().rev().find_map(pid))
    }

    /// The coordinator that came last.
    fn coordinator(&self) -> Result<Option<u32>, RelayError> {
        let text = self.journal()?;
        let pid = |line: &str| line.strip_prefix("coordinator ")?.parse().ok();
        Ok(text.lines().rev().find_map(pid))
    }

    fn journal(&self) -> Result<String, RelayError> {
        let path = self.path(JOURNAL);
        std::fs::read_to_string(&path).map_err(|source| RelayError::Io { path, source })
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join(file)
    }

    /// Where its files are.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }
}
