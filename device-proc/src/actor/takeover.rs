//! Later coordinators: who connects at the device's path is looked at, greeted, and, with a welcome
//! to this machine, brought to the actor.
//!
//! One at a time, each with [`PATIENCE`], so that none of them costs more than one connection, and
//! one that says nothing does not keep the next one out for longer.

use super::Message;
use super::control::Newcomer;
use super::introduction::{Facts, Introduction};
use ractor::ActorRef;
use rustix::process::geteuid;
use standstill_protocol::channel::{
    AsyncChannel, ControlListener, DeviceEnd, FromFdError, Readiness, RecvError, SendError,
};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, VERSIONS, VersionRange, Welcome,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use uuid::Uuid;

/// How long one that has connected may take until it has welcomed the device.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long nobody is accepted after that has failed: what is short then (fds, memory) does not
/// come back sooner by asking more often.
const PAUSE: Duration = Duration::from_millis(200);

/// The device cannot be found by later coordinators.
#[derive(Debug, Error)]
pub(super) enum ListenError {
    #[error("what came with the Welcome is no socket to listen on")]
    Socket(#[from] FromFdError),
    #[error("the socket for later coordinators cannot be watched")]
    Watch(#[source] io::Error),
}

/// Why one that has connected does not become the coordinator.
#[derive(Debug, Error)]
enum CandidateError {
    #[error("its credentials cannot be read")]
    Credentials(#[source] io::Error),
    #[error("user {uid} (process {pid}) is neither this process's nor root")]
    Foreign { uid: u32, pid: i32 },
    #[error("the backing files cannot be opened for it")]
    BackingFiles(#[source] io::Error),
    #[error("its connection cannot be watched")]
    Watch(#[source] io::Error),
    #[error("the greeting cannot be sent")]
    Send(#[from] SendError),
    #[error("no answer to the greeting")]
    Recv(#[from] RecvError),
    #[error("something else than Welcome or Reject came in answer to the greeting")]
    Unexpected,
    #[error("it speaks {versions} and rejected the device: {reason}")]
    Rejected { versions: VersionRange, reason: String },
    #[error("it speaks version {chosen}, offered was {VERSIONS}")]
    Version { chosen: u16 },
    #[error("it welcomed the device to machine {found}, which is {expected:?}'s")]
    Machine { found: Uuid, expected: Option<Uuid> },
    #[error("it took longer than {PATIENCE:?}")]
    Late,
    #[error("this process is ending")]
    Ending,
}

/// The task that waits for later coordinators; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Listening {
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listening {
    /// Begins to listen on the socket that came with a `Welcome`.
    pub(super) fn start(
        socket: OwnedFd,
        introduction: Arc<Introduction>,
        actor: ActorRef<Message>,
    ) -> Result<Self, ListenError> {
        let listener =
            Readiness::new(ControlListener::from_fd(socket)?).map_err(ListenError::Watch)?;
        let task = tokio::spawn(listen(listener, introduction, actor));
        Ok(Self { task: task.abort_handle() })
    }
}

async fn listen(
    listener: Readiness<ControlListener>,
    introduction: Arc<Introduction>,
    actor: ActorRef<Message>,
) {
    let mut failing = false;
    loop {
        let ready = match listener.readable().await {
            Ok(ready) => ready,
            Err(error) => {
                // The runtime is shutting down, and the process with it.
                tracing::debug!(%error, "nobody waits for later coordinators any more");
                return;
            }
        };
        match ready.get_ref().try_accept() {
            Ok(Some(channel)) => {
                failing = false;
                let candidate = candidate(channel, &introduction, &actor);
                match tokio::time::timeout(PATIENCE, candidate).await {
                    Ok(Ok(())) => {}
                    Ok(Err(CandidateError::Ending)) => return,
                    Ok(Err(error)) => refused(&error),
                    Err(_) => refused(&CandidateError::Late),
                }
                // Many that are refused at once must not keep the actor from its work.
                tokio::task::yield_now().await;
            }
            Ok(None) => ready.clear(),
            Err(error) => {
                if !failing {
                    tracing::warn!(%error, "a later coordinator cannot be accepted");
                }
                failing = true;
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

fn refused(error: &CandidateError) {
    let error = crate::log::with_causes(error);
    tracing::warn!(error, "one that wanted to take over was refused");
}

/// Whether a process of that user may take over from one of this user.
fn is_trusted(uid: u32, own: u32) -> bool {
    uid == own || uid == 0
}

/// From a connection to the actor.
async fn candidate(
    channel: DeviceEnd,
    introduction: &Introduction,
    actor: &ActorRef<Message>,
) -> Result<(), CandidateError> {
    let peer = channel.peer_credentials().map_err(CandidateError::Credentials)?;
    if !is_trusted(peer.uid, geteuid().as_raw()) {
        return Err(CandidateError::Foreign { uid: peer.uid, pid: peer.pid });
    }
    let (asked, facts) = oneshot::channel();
    actor.cast(Message::Facts(asked)).map_err(|_| CandidateError::Ending)?;
    let facts = facts.await.map_err(|_| CandidateError::Ending)?;
    let channel = AsyncChannel::new(channel).map_err(CandidateError::Watch)?;
    {
        // Closed before anybody is waited for.
        let (hello, files) = introduction.hello(facts).map_err(CandidateError::BackingFiles)?;
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let hello = DeviceMessage::Hello(hello);
        #[cfg(feature = "fault-injection")]
        let times = crate::fault::wire::greet(channel.channel(), &hello, false);
        #[cfg(not(feature = "fault-injection"))]
        let times = 1;
        for _ in 0..times {
            channel.channel().try_send(&hello, &fds)?;
        }
    }
    let received = channel.recv().await?;
    let welcome = match received.message {
        CoordinatorMessage::Welcome(welcome) => welcome,
        CoordinatorMessage::Reject(reject) => {
            let (versions, reason) = (reject.versions, reject.reason);
            return Err(CandidateError::Rejected { versions, reason });
        }
        _ => return Err(CandidateError::Unexpected),
    };
    check(&welcome, facts)?;
    let channel = channel.into_inner();
    channel.set_version(welcome.version);
    let newcomer = Newcomer { channel, welcome, fds: received.fds };
    let (done, is_done) = oneshot::channel();
    let take_over = Message::TakeOver(Box::new(newcomer), done);
    actor.cast(take_over).map_err(|_| CandidateError::Ending)?;
    is_done.await.map_err(|_| CandidateError::Ending)
}

/// The term is the actor's to check: it may have changed since the greeting.
fn check(welcome: &Welcome, facts: Facts) -> Result<(), CandidateError> {
    if !(VERSIONS.min..=VERSIONS.max).contains(&welcome.version) {
        return Err(CandidateError::Version { chosen: welcome.version });
    }
    if facts.machine != Some(welcome.machine) {
        let (found, expected) = (welcome.machine, facts.machine);
        return Err(CandidateError::Machine { found, expected });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_coordinator_is_of_the_same_user_or_root() {
        for (uid, own, trusted) in
            [(0, 0, true), (0, 1000, true), (1000, 1000, true), (1000, 1001, false), (1, 0, false)]
        {
            assert_eq!(is_trusted(uid, own), trusted, "{uid} to {own}");
        }
    }
}
