//! Hello and Welcome.

use super::join::Failure;
use super::state::{EndingReply, Standing, Starting, State};
use crate::device::Message as DeviceMessage;
use crate::error::{GreetingError, ProtocolError, with_sources};
use crate::events::MachineEvent;
use crate::policy::Presence;
use crate::process::BackingFile;
use standstill_protocol::message::{CoordinatorMessage, Hello, Reject, Term, VERSIONS, Welcome};
use standstill_protocol::migration::MigrationState;
use standstill_protocol::transition::{Loss, ParticipantId};
use std::os::fd::{AsFd, OwnedFd};

impl State {
    /// A device process said Hello.
    pub(super) fn hello(&mut self, id: ParticipantId, hello: Hello, files: Vec<OwnedFd>) {
        // Nothing of another process is kept open, or closed later.
        let files = match BackingFile::reopen_all(files) {
            Ok(files) => files,
            Err(error) => {
                let error = GreetingError::Protocol(ProtocolError::BackingFile(error));
                return self.greeting_failed(id, error);
            }
        };
        if self.device(id).is_some_and(|device| device.care.join.is_some()) {
            return self.newcomer_greeted(id, hello, files);
        }
        match self.welcome(id, &hello, files) {
            Ok(()) => {
                if let Some(device) = self.device(id) {
                    tracing::debug!(
                        device = device.spec.name,
                        kind = hello.kind,
                        version = hello.program_version,
                        pid = device.pid(),
                        "greeted"
                    );
                    device.state = hello.state;
                    device.hello = Some(hello);
                    device.standing = Standing::Ready;
                }
                self.maybe_started();
            }
            Err(error) => self.greeting_failed(id, error),
        }
    }

    pub(super) fn welcome(
        &mut self,
        id: ParticipantId,
        hello: &Hello,
        files: Vec<BackingFile>,
    ) -> Result<(), GreetingError> {
        let protocol = |error| GreetingError::Protocol(error);
        let Some(device) = self.device(id) else { return Ok(()) };
        let Some(channel) = &device.channel else { return Ok(()) };
        let Some(version) = VERSIONS.negotiate(hello.versions) else {
            let (theirs, ours) = (hello.versions, VERSIONS);
            let reason = format!("this coordinator speaks protocol version {ours}, not {theirs}");
            let reject = Reject { versions: ours, reason };
            // It is killed next; the message is a courtesy to whoever reads its log.
            let _ = channel.try_send(&CoordinatorMessage::Reject(reject), &[]);
            return Err(GreetingError::Version { theirs, ours });
        };
        let fresh = hello.machine.is_none()
            && hello.term == Term(0)
            && hello.state == MigrationState::Running;
        if !fresh {
            return Err(protocol(ProtocolError::NotFresh));
        }
        // A fence waits for these locks: one that was never taken would prove nothing.
        if files.iter().any(|file| !file.is_locked().unwrap_or(false)) {
            return Err(protocol(ProtocolError::BackingFileUnlocked));
        }
        let listener =
            self.keep_device(id, &files).map_err(|error| GreetingError::Keep(Box::new(error)))?;
        let Some(welcome) = self.welcome_of(id, version) else { return Ok(()) };
        let welcome = Welcome { listener: listener.is_some(), ..welcome };
        let Some(device) = self.device(id) else { return Ok(()) };
        let Some(channel) = &device.channel else { return Ok(()) };
        let fds: Vec<_> = listener.iter().map(AsFd::as_fd).collect();
        channel
            .try_send(&CoordinatorMessage::Welcome(welcome), &fds)
            .map_err(|error| protocol(ProtocolError::Send(error)))?;
        channel.set_version(version);
        // What has files has sent them; kernels that cannot say so leave it at that.
        let _ = channel.refuse_fds();
        // An actor that is gone is seen at the socket.
        device.tell(DeviceMessage::BackingFiles(files));
        Ok(())
    }

    /// What a device is told with its Welcome, without fds.
    pub(super) fn welcome_of(&mut self, id: ParticipantId, version: u16) -> Option<Welcome> {
        let (machine, term, epoch) = (self.uuid, self.term, self.epoch);
        let (heartbeat_ns, orphan) = (self.heartbeat_ns, self.orphan);
        let device = self.device(id)?;
        Some(Welcome {
            version,
            machine,
            name: device.spec.name.clone(),
            incarnation: device.incarnation,
            term,
            epoch,
            heartbeat_ns,
            orphan,
            listener: false,
            log: false,
        })
    }

    /// One device that does not greet is one machine that does not start, unless it is optional or
    /// comes later.
    pub(super) fn greeting_failed(&mut self, id: ParticipantId, error: GreetingError) {
        let Some(device) = self.devices.get(id) else { return };
        if device.care.join.is_some() {
            return self.join_failed(id, Failure::Greeting(error));
        }
        if self.policies.resolve(&device.spec).1 == Presence::Optional {
            return self.not_started(id, &with_sources(&error));
        }
        if let Some(Starting { reply, deadline, .. }) = self.starting.take() {
            deadline.abort();
            self.end_after(EndingReply::Starter(reply, id, error));
        }
    }

    /// An optional device does not start with its machine.
    fn not_started(&mut self, id: ParticipantId, why: &str) {
        self.close(id);
        let Some(device) = self.device(id) else { return };
        device.standing = Standing::Lost(Loss::Refused, format!("it {why}"));
        let device = device.spec.name.clone();
        self.emit(MachineEvent::DeviceNotStarted { device, why: why.to_owned() });
        self.fence_outside(id, Loss::Refused, why);
        self.maybe_started();
    }

    /// Whoever has not said Hello is late. Those that have, and are to show that they outlive this
    /// coordinator, have a deadline of their own: they may have been asked for that only now.
    pub(super) fn hello_expired(&mut self) {
        let silent = self.devices.iter().filter(|device| device.standing == Standing::Greeting);
        self.are_silent(silent.map(|device| device.id).collect());
    }

    /// Whoever has not shown that it outlives this coordinator is late.
    pub(super) fn settling_expired(&mut self) {
        let settling = self.starting.as_ref().and_then(|starting| starting.settling.as_ref());
        self.are_silent(settling.into_iter().flatten().copied().collect());
    }

    fn are_silent(&mut self, silent: Vec<ParticipantId>) {
        let time = self.deadlines.hello;
        for id in silent {
            if self.starting.is_some() {
                self.greeting_failed(id, GreetingError::Silent(time));
            }
        }
    }
}
