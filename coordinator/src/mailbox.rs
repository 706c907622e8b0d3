//! The way to the coordinator actor, and its alarms.
//!
//! In tests a [`Script`] can be at the other end instead: there the messages wait until the test
//! has them handled, and alarms go off when it says so.

use crate::coordinator::Message;
#[cfg(any(test, fuzzing))]
use crate::coordinator::script::Script;
use ractor::ActorRef;
use std::io;
use std::time::Duration;
use tokio::task::AbortHandle;

/// Where messages for the coordinator actor go.
#[derive(Clone, Debug)]
pub(crate) enum Mailbox {
    /// To the actor.
    Actor(ActorRef<Message>),
    /// To a test.
    #[cfg(any(test, fuzzing))]
    Script(Script),
}

/// There is no actor any more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Closed;

impl Mailbox {
    /// Sends a message, behind all others.
    pub(crate) fn cast(&self, message: Message) -> Result<(), Closed> {
        match self {
            Self::Actor(actor) => actor.cast(message).map_err(|_| Closed),
            #[cfg(any(test, fuzzing))]
            Self::Script(script) => script.cast(message),
        }
    }

    /// Sends a message after a time.
    pub(crate) fn cast_after(
        &self,
        time: Duration,
        message: impl FnOnce() -> Message + Send + 'static,
    ) -> Alarm {
        match self {
            Self::Actor(actor) => {
                let actor = actor.clone();
                let task = tokio::spawn(async move {
                    tokio::time::sleep(time).await;
                    // An actor that is gone has no deadlines.
                    let _ = actor.cast(message());
                });
                Alarm::Task(task.abort_handle())
            }
            #[cfg(any(test, fuzzing))]
            Self::Script(script) => Alarm::Script(script.clone(), script.arm(time, message())),
        }
    }

    /// The actor, to whom others may be linked.
    pub(crate) fn actor(&self) -> io::Result<&ActorRef<Message>> {
        match self {
            Self::Actor(actor) => Ok(actor),
            #[cfg(any(test, fuzzing))]
            Self::Script(_) => Err(io::Error::other("a test stands in for the actor")),
        }
    }

    /// Ends the actor after the message that it is at.
    pub(crate) fn stop(&self) {
        match self {
            Self::Actor(actor) => actor.stop(None),
            #[cfg(any(test, fuzzing))]
            Self::Script(script) => script.stop(),
        }
    }

    /// Ends the actor at once.
    pub(crate) fn kill(&self) {
        match self {
            Self::Actor(actor) => actor.kill(),
            #[cfg(any(test, fuzzing))]
            Self::Script(script) => script.stop(),
        }
    }
}

/// A message that is to be sent.
#[derive(Debug)]
pub(crate) enum Alarm {
    /// By a task.
    Task(AbortHandle),
    /// When a test says so.
    #[cfg(any(test, fuzzing))]
    Script(Script, u64),
}

impl Alarm {
    /// It is not sent, unless it was.
    pub(crate) fn abort(&self) {
        match self {
            Self::Task(task) => task.abort(),
            #[cfg(any(test, fuzzing))]
            Self::Script(script, alarm) => script.disarm(*alarm),
        }
    }
}
