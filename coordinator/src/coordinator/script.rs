//! What surrounds the coordinator actor, played by a test.
//!
//! A [`Script`] has the actor's mailbox, its alarms and its clock, and the processes that belong to
//! its devices. Nothing moves unless the test moves it, so a test decides what comes before what.
//! The control sockets are real ones: the test has the other ends.

mod actor;
mod calls;
mod device;
#[cfg_attr(
    not(fuzzing),
    expect(unreachable_pub, reason = "public where cargo-fuzz builds it, and nowhere else")
)]
pub mod packets;

pub(super) use actor::{ScriptedActor, Started, process};
#[cfg(test)]
pub(super) use calls::{Answer, Call, GAP};
pub(super) use device::Device;
#[cfg(test)]
pub(super) use device::{Answered, Down};

use super::Message;
use crate::clock;
use crate::device::Message as DeviceMessage;
use crate::mailbox::Closed;
use standstill_protocol::transition::ParticipantId;
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What surrounds one coordinator actor.
#[derive(Clone, Debug)]
pub(crate) struct Script(Arc<Mutex<Outside>>);

#[derive(Debug)]
struct Outside {
    began: Instant,
    now: Duration,
    mail: VecDeque<Message>,
    alarms: BTreeMap<u64, (Duration, Goes)>,
    next_alarm: u64,
    stopped: bool,
    asked: VecDeque<Asked>,
}

/// What happens when an alarm goes off.
#[derive(Debug)]
enum Goes {
    /// The coordinator has a message.
    Message(Message),
    /// A process is killed that was to end by itself.
    Kill(usize),
}

/// What the coordinator wants of the world outside.
#[derive(Debug)]
pub(super) enum Asked {
    /// The process with that number is the one of that incarnation.
    Begun(usize, ParticipantId),
    /// Its actor is told something.
    Told(usize, DeviceMessage),
    /// It is sent SIGKILL.
    Killed(usize),
    /// Nobody has its handle any more.
    LetGo(#[cfg_attr(not(test), expect(dead_code, reason = "for schedules alone"))] usize),
    /// In the place of the first incarnation the process of the second is to be started, for the
    /// device of that name.
    Start(ParticipantId, ParticipantId, String),
}

impl Script {
    /// An empty mailbox, at the present time.
    pub(super) fn new() -> Self {
        let outside = Outside {
            began: Instant::now(),
            now: Duration::ZERO,
            mail: VecDeque::new(),
            alarms: BTreeMap::new(),
            next_alarm: 0,
            stopped: false,
            asked: VecDeque::new(),
        };
        clock::set(Some(outside.began));
        Self(Arc::new(Mutex::new(outside)))
    }

    fn outside(&self) -> MutexGuard<'_, Outside> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a message behind all others.
    pub(crate) fn cast(&self, message: Message) -> Result<(), Closed> {
        let mut outside = self.outside();
        if outside.stopped {
            // Dropped without the lock: whoever waits for its answer may look in here.
            drop(outside);
            drop(message);
            return Err(Closed);
        }
        outside.mail.push_back(message);
        Ok(())
    }

    /// Has a message sent after a time. Returns the number of the alarm.
    pub(crate) fn arm(&self, after: Duration, message: Message) -> u64 {
        self.goes_off(after, Goes::Message(message))
    }

    /// Has a process killed after a time.
    pub(super) fn kill_after(&self, after: Duration, number: usize) {
        self.goes_off(after, Goes::Kill(number));
    }

    fn goes_off(&self, after: Duration, what: Goes) -> u64 {
        let mut outside = self.outside();
        let (at, number) = (outside.now.saturating_add(after), outside.next_alarm);
        outside.next_alarm += 1;
        outside.alarms.insert(number, (at, what));
        number
    }

    /// Has it not sent, unless it was.
    pub(crate) fn disarm(&self, alarm: u64) {
        let disarmed = self.outside().alarms.remove(&alarm);
        drop(disarmed);
    }

    /// The actor has ended, or is to.
    pub(crate) fn stop(&self) {
        self.outside().stopped = true;
    }

    /// True once it has.
    pub(super) fn is_stopped(&self) -> bool {
        self.outside().stopped
    }

    /// The next message that waits.
    pub(super) fn mail(&self) -> Option<Message> {
        self.outside().mail.pop_front()
    }

    /// How many messages wait.
    #[cfg(test)]
    pub(super) fn mails(&self) -> usize {
        self.outside().mail.len()
    }

    /// How long it is since the beginning.
    #[cfg(test)]
    pub(super) fn now(&self) -> Duration {
        self.outside().now
    }

    /// How many alarms are armed for messages of which that is true.
    #[cfg(test)]
    pub(super) fn alarms(&self, which: impl Fn(&Message) -> bool) -> usize {
        let counts = |goes: &Goes| matches!(goes, Goes::Message(message) if which(message));
        self.outside().alarms.values().filter(|(_, goes)| counts(goes)).count()
    }

    /// Has the alarm go off that is due next, at its time; false if none is armed.
    pub(super) fn go_off(&self) -> bool {
        let mut outside = self.outside();
        let next = outside.alarms.iter().min_by_key(|(number, (at, _))| (*at, **number));
        let Some((&number, &(at, _))) = next else { return false };
        outside.now = outside.now.max(at);
        clock::set(Some(outside.began + outside.now));
        match outside.alarms.remove(&number) {
            Some((_, Goes::Message(message))) => outside.mail.push_back(message),
            Some((_, Goes::Kill(number))) => {
                outside.asked.push_back(Asked::Told(number, DeviceMessage::Kill));
            }
            None => {}
        }
        true
    }

    /// What the coordinator has asked for since the last call.
    pub(super) fn asked(&self) -> VecDeque<Asked> {
        std::mem::take(&mut self.outside().asked)
    }

    /// Whatever is left is dropped; the clock is the system's again.
    fn forget(&self) {
        let left = {
            let mut outside = self.outside();
            let alarms = std::mem::take(&mut outside.alarms);
            (alarms, std::mem::take(&mut outside.mail))
        };
        drop(left);
        clock::set(None);
    }

    fn ask(&self, asked: Asked) {
        self.outside().asked.push_back(asked);
    }

    /// A process is to be started.
    pub(super) fn start_asked(&self, id: ParticipantId, next: ParticipantId, device: String) {
        self.ask(Asked::Start(id, next, device));
    }

    /// A process to give to the coordinator, by a number of the test's.
    pub(super) fn process(&self, number: usize) -> ScriptedProcess {
        ScriptedProcess { number, script: self.clone() }
    }
}

/// A process that a test plays.
#[derive(Debug)]
pub(crate) struct ScriptedProcess {
    number: usize,
    script: Script,
}

impl ScriptedProcess {
    /// It belongs to that incarnation from now on.
    pub(super) fn of(self, id: ParticipantId) -> Self {
        self.script.ask(Asked::Begun(self.number, id));
        self
    }

    /// Its actor is told something.
    pub(super) fn tell(&self, message: DeviceMessage) {
        self.script.ask(Asked::Told(self.number, message));
    }

    /// It is sent SIGKILL.
    pub(super) fn kill(&self) {
        self.script.ask(Asked::Killed(self.number));
    }
}

impl Drop for ScriptedProcess {
    fn drop(&mut self) {
        self.script.ask(Asked::LetGo(self.number));
    }
}
