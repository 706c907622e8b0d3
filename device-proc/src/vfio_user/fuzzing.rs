//! The transport over a real device and its actor, for the fuzz target `vfio_user_session`: a client
//! sends what it likes while a coordinator stops and starts the device.

use super::rig::Rig;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use standstill_protocol::message::{DeviceMessage, Phase};
use standstill_protocol::migration::{MigrationFlags, MigrationState};
use standstill_vfio_user::framing::{Framer, FramingLimits};
use standstill_vfio_user::wire::{Capabilities, Command, Header, Kind, RegionAccess, Version};
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// A device process that has a client.
pub struct Session {
    /// Dropped before the device, whose transport serves it to its end.
    client: UnixStream,
    rig: Rig,
    replies: Framer,
    epoch: u64,
    /// The coordinator has stopped it, with a lease or without.
    stopped: Option<bool>,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("stopped", &self.stopped).finish_non_exhaustive()
    }
}

fn replies() -> Framer {
    Framer::new(FramingLimits { max_message: 2 << 20, max_fds: 16 })
}

impl Session {
    /// A device that has been started, with a client that has said nothing yet.
    #[must_use]
    pub fn begin() -> Self {
        let rig = Rig::with_flags(MigrationFlags::ALL);
        let client = rig.connect();
        Self { client, rig, replies: replies(), epoch: 1, stopped: None }
    }

    /// The client goes and another comes.
    pub fn reconnect(&mut self) {
        self.let_go();
        self.client = self.rig.connect();
        self.replies = replies();
    }

    /// The transport sees the end, and has no second client to wait for.
    fn let_go(&mut self) {
        if self.stopped == Some(true) {
            // With a lease it looks at nothing before the start.
            self.start();
        }
        self.look();
        // It may have ended already.
        let _ = self.client.shutdown(Shutdown::Both);
    }

    /// Sends bytes and fds as they are, unless nobody takes them.
    pub fn send(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        if bytes.is_empty() {
            return;
        }
        let mut room = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut control = SendAncillaryBuffer::new(&mut room);
        assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // A device that has closed the connection, or whose socket is full, takes no more.
        let _ = sendmsg(&self.client, &[IoSlice::new(bytes)], &mut control, flags);
    }

    /// Exchanges versions, as a client does that means what it says.
    pub fn greet(&mut self) {
        let mut bytes = Vec::new();
        let version = Version::new(Capabilities { max_msg_fds: Some(16), ..Default::default() });
        let header = Header::command(0, Command::Version);
        header.encode_message(&mut bytes, 0, |body| version.encode(body));
        self.send(&bytes, &[]);
    }

    /// Reads what has come: whole messages, each a reply or a request for DMA.
    pub fn look(&mut self) {
        self.client.set_nonblocking(true).unwrap();
        loop {
            match self.client.read(self.replies.space()) {
                Ok(0) | Err(_) => break,
                Ok(count) => self.replies.received(count, []),
            }
        }
        while let Some(message) = self.replies.next_message().expect("whole messages") {
            let command = Command::from_number(message.header.command);
            match message.kind {
                Kind::Refused(_) => assert!(message.body.is_empty() && message.header.error != 0),
                Kind::Done => assert!(command.is_some()),
                Kind::Command => {
                    assert!(matches!(command, Some(Command::DmaRead | Command::DmaWrite)));
                }
                Kind::Posted => panic!("nothing is posted to a client"),
            }
        }
    }

    /// The coordinator stops the device: in time, whatever its client does. It may be refused.
    pub fn stop(&mut self, lease: bool) {
        if self.stopped.is_some() {
            return;
        }
        self.stopped = Some(lease);
        self.epoch += 1;
        let lease = if lease { Duration::from_secs(1) } else { Duration::ZERO };
        let steps = [
            (Phase::PrepareStop, MigrationState::RunningP2p, Duration::ZERO),
            (Phase::Stop, MigrationState::Stop, lease),
        ];
        for (phase, target, lease) in steps {
            self.rig.command(self.epoch, phase, target, lease);
            self.answer();
        }
    }

    /// The coordinator starts it.
    pub fn start(&mut self) {
        if self.stopped.take().is_none() {
            return;
        }
        self.epoch += 1;
        let steps = [
            (Phase::PrepareStart, MigrationState::RunningP2p),
            (Phase::Start, MigrationState::Running),
        ];
        for (phase, target) in steps {
            self.rig.command(self.epoch, phase, target, Duration::ZERO);
            self.answer();
        }
    }

    fn answer(&mut self) {
        let answer = self.rig.answer();
        assert!(matches!(answer, DeviceMessage::Reached(_)), "{answer:?}");
    }

    /// Whatever there was before: the next client is served, and nothing is left of all that.
    pub fn finish(mut self) {
        self.reconnect();
        self.client.set_nonblocking(false).unwrap();
        self.greet();
        let mut header = [0; 16];
        self.client.read_exact(&mut header).expect("an answer to a version");
        let header = Header::decode(&header).unwrap();
        assert_eq!(header.kind(), Some(Kind::Done));
        self.client.read_exact(&mut vec![0; header.body_size().unwrap()]).unwrap();
        let mut message = Vec::new();
        let access = RegionAccess { offset: 0, region: 7, count: 4 };
        let header = Header::command(1, Command::RegionRead);
        header.encode_message(&mut message, 0, |body| access.encode(body));
        self.client.write_all(&message).unwrap();
        self.client.read_exact(&mut [0; 36]).expect("the configuration space");
    }
}
