//! The program between a coordinator and a device process; see [`crate::outside::relay`].

mod child;
mod lane;
mod orders;
mod packet;

use crate::chain;
use crate::plan::{Moment, OutsideAction};
use child::Child;
use lane::{Fate, Lane};
use orders::Orders;
use packet::{Packet, Seen};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use standstill_protocol::channel::{DeviceEnd, Frame};
use standstill_protocol::codec::{HANDSHAKE_VERSION, HEADER};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, Hello, MAX_FDS, OrphanPolicy,
};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

pub(super) type Error = Box<dyn std::error::Error>;

/// How long a coordinator that was sent SIGSTOP may take to stand.
const STANDS: Duration = Duration::from_secs(5);

/// What is to be done at a time.
enum Later {
    ContinueDevice,
    ContinueCoordinator,
}

/// Runs the relay; what to exit with.
#[expect(clippy::print_stderr, reason = "standard error is how a device process says why it ends")]
pub(super) fn main(arguments: &[OsString]) -> u8 {
    let result = match arguments {
        [guard] if guard == child::GUARD => child::guard().map(|()| 0),
        [folder, program, arguments @ ..] => run(Path::new(folder), program, arguments),
        _ => Err("usage: relay FOLDER PROGRAM [ARGUMENT…]".into()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("relay: {}", chain(&*error));
        1
    })
}

fn run(folder: &Path, program: &OsStr, arguments: &[OsString]) -> Result<u8, Error> {
    let channel = DeviceEnd::from_fd(io::stdin().as_fd().try_clone_to_owned()?)?;
    rustix::stdio::dup2_stdin(std::fs::File::open("/dev/null")?)?;
    // Until the coordinator has said that the device may live without it.
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let coordinator = getppid().ok_or("the coordinator is gone")?;
    if coordinator.as_raw_pid() != channel.peer_credentials()?.pid {
        return Err("the coordinator is gone".into());
    }
    let orders = Orders::open(folder)?;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let child = Child::start(folder, program, arguments, theirs)?;
    orders.write(&format!("device {}", child.pid()))?;
    let relay = Relay {
        child,
        orders,
        coordinator,
        version: HANDSHAKE_VERSION,
        ends: Ends { coordinator: Some(channel.into_fd()), device: Some(ours) },
        to_device: Lane::default(),
        to_coordinator: Lane::default(),
        later: Vec::new(),
    };
    relay.pass_on()
}

/// The relay's ends of the two control channels; `None` once one is closed.
struct Ends {
    coordinator: Option<OwnedFd>,
    device: Option<OwnedFd>,
}

struct Relay {
    child: Child,
    orders: Orders,
    coordinator: Pid,
    /// The protocol version that was agreed on; 0 before.
    version: u16,
    ends: Ends,
    to_device: Lane,
    to_coordinator: Lane,
    later: Vec<(Instant, Later)>,
}

impl Relay {
    /// Passes packets on until the device process has ended and its last words are delivered.
    fn pass_on(mut self) -> Result<u8, Error> {
        let mut child_ended = false;
        loop {
            let at_once = self.orders.due_at_once()?;
            if self.act(at_once)?.cut {
                self.cut();
            }
            self.read_from_coordinator()?;
            self.read_from_device(child_ended)?;
            self.deliver()?;
            if child_ended && self.to_coordinator.is_done() {
                return self.child.end_likewise();
            }
            child_ended |= self.wait(child_ended)?;
            self.do_what_is_due()?;
        }
    }

    /// Waits until there is something to do. True if the device process has ended.
    fn wait(&self, child_ended: bool) -> Result<bool, Error> {
        let now = Instant::now();
        let blocked = |lane: &Lane| lane.due().is_some_and(|due| due <= now);
        let flags = |reads: &Lane, writes: &Lane| {
            let read = if reads.has_room() { PollFlags::IN } else { PollFlags::empty() };
            if blocked(writes) { read | PollFlags::OUT } else { read }
        };
        let coordinator = flags(&self.to_device, &self.to_coordinator);
        let device = flags(&self.to_coordinator, &self.to_device);
        let ends = [(&self.ends.coordinator, coordinator), (&self.ends.device, device)];
        // A hang-up is told whatever is asked for, and again and again.
        let ends = ends.into_iter().filter(|(_, flags)| !flags.is_empty());
        let mut fds: Vec<_> =
            ends.filter_map(|(end, flags)| Some(PollFd::new(end.as_ref()?, flags))).collect();
        fds.push(PollFd::from_borrowed_fd(self.orders.watch(), PollFlags::IN));
        if !child_ended {
            fds.push(PollFd::from_borrowed_fd(self.child.pidfd(), PollFlags::IN));
        }
        let dues = [self.to_device.due(), self.to_coordinator.due()].into_iter().flatten();
        let dues = dues.filter(|due| *due > now).chain(self.later.iter().map(|(due, _)| *due));
        let left = dues.min().map(|due| due.saturating_duration_since(now));
        let timeout = left.map(Timespec::try_from).transpose()?;
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(!child_ended && fds.last().is_some_and(|fd| fd.revents().contains(PollFlags::IN)))
    }

    fn do_what_is_due(&mut self) -> Result<(), Error> {
        let now = Instant::now();
        while let Some(at) = self.later.iter().position(|(due, _)| *due <= now) {
            match self.later.swap_remove(at).1 {
                Later::ContinueDevice => self.child.go_on()?,
                Later::ContinueCoordinator => self.signal_coordinator(Signal::CONT)?,
            }
        }
        Ok(())
    }

    fn read_from_coordinator(&mut self) -> Result<(), Error> {
        while self.to_device.has_room() {
            let Some(end) = &self.ends.coordinator else { return Ok(()) };
            match Packet::receive(end.as_fd())? {
                Seen::Packet(packet) => {
                    let message = packet::command(&packet.bytes, self.version);
                    if let Some((CoordinatorMessage::Welcome(welcome), _)) = &message {
                        self.version = welcome.version;
                        if welcome.orphan == OrphanPolicy::Keep {
                            set_parent_process_death_signal(None)?;
                        }
                    }
                    self.meet(Way::ToDevice, packet, message.and_then(|(_, moment)| moment))?;
                }
                Seen::Nothing => return Ok(()),
                Seen::End => self.to_device.ended = true,
            }
        }
        Ok(())
    }

    fn read_from_device(&mut self, child_ended: bool) -> Result<(), Error> {
        while self.to_coordinator.has_room() {
            let Some(end) = &self.ends.device else { return Ok(()) };
            match Packet::receive(end.as_fd())? {
                Seen::Packet(mut packet) => {
                    let message = packet::answer(&packet.bytes, self.version);
                    if let Some((DeviceMessage::Hello(hello), _)) = &message {
                        self.add_backing_file(hello, &mut packet)?;
                    }
                    self.meet(Way::ToCoordinator, packet, message.and_then(|(_, moment)| moment))?;
                }
                Seen::Nothing if !child_ended => return Ok(()),
                // A child of its own may have the socket still.
                Seen::Nothing | Seen::End => self.to_coordinator.ended = true,
            }
        }
        Ok(())
    }

    /// Adds the file whose lock shows that the device process lives, if there is room for it.
    fn add_backing_file(&self, hello: &Hello, packet: &mut Packet) -> Result<(), Error> {
        let count = usize::from(hello.backing_files);
        if count >= MAX_FDS || packet.fds.len() != count {
            return Ok(());
        }
        let hello = Hello { backing_files: hello.backing_files + 1, ..hello.clone() };
        let frame = Frame::new(&DeviceMessage::Hello(hello), HANDSHAKE_VERSION)?;
        packet.bytes = frame.as_bytes().to_vec();
        packet.fds.push(self.child.backing_file()?);
        Ok(())
    }

    /// A packet has come: does to it what is armed.
    fn meet(&mut self, way: Way, packet: Packet, moment: Option<Moment>) -> Result<(), Error> {
        let actions = moment.map(|moment| self.orders.due(moment)).transpose()?;
        let Done { delay, fate, cut } = self.act(actions.unwrap_or_default())?;
        if cut {
            self.cut();
            return Ok(());
        }
        match way {
            Way::ToDevice => self.to_device.push(packet, fate, delay),
            Way::ToCoordinator => self.to_coordinator.push(packet, fate, delay),
        }
    }

    /// Does what is done to processes; says what is to be done to the packet and the channel.
    fn act(&mut self, actions: Vec<OutsideAction>) -> Result<Done, Error> {
        let mut done = Done { delay: Duration::ZERO, fate: Fate::Deliver, cut: false };
        for action in actions {
            match action {
                OutsideAction::Kill => self.child.kill()?,
                OutsideAction::StopMs(ms) => {
                    self.child.stop()?;
                    self.later(ms, Later::ContinueDevice);
                }
                OutsideAction::Limit(limit) => self.child.limit(limit)?,
                OutsideAction::KillCoordinator => self.signal_coordinator(Signal::KILL)?,
                OutsideAction::StopCoordinatorMs(ms) => {
                    self.stop_coordinator()?;
                    self.later(ms, Later::ContinueCoordinator);
                }
                OutsideAction::DelayMs(ms) => done.delay += Duration::from_millis(ms.into()),
                OutsideAction::Drop => done.fate = Fate::Drop,
                OutsideAction::Duplicate => done.fate = Fate::Twice,
                // The first byte behind the header: which message it is.
                OutsideAction::Corrupt => done.fate = Fate::CorruptAt(HEADER),
                OutsideAction::CorruptAt(offset) => done.fate = Fate::CorruptAt(offset.into()),
                OutsideAction::Split => done.fate = Fate::Split,
                OutsideAction::Merge => done.fate = Fate::Merge,
                OutsideAction::Swap => done.fate = Fate::Swap,
                OutsideAction::Cut => done.cut = true,
            }
        }
        Ok(done)
    }

    /// Closes both channels.
    fn cut(&mut self) {
        self.ends = Ends { coordinator: None, device: None };
        self.to_device.give_up();
        self.to_coordinator.give_up();
    }

    /// 0 ms: never.
    fn later(&mut self, ms: u32, what: Later) {
        if ms > 0 {
            self.later.push((Instant::now() + Duration::from_millis(ms.into()), what));
        }
    }

    fn deliver(&mut self) -> Result<(), Error> {
        let Ends { coordinator, device } = &mut self.ends;
        if let Some(end) = device {
            if !self.to_device.deliver(end.as_fd())? {
                // What it has sent before it went counts.
                self.to_device.discard();
            }
            // As if the coordinator had closed its channel: it has.
            if self.to_device.is_done() {
                *device = None;
                self.to_coordinator.ended = true;
            }
        }
        if let Some(end) = coordinator {
            let receives = self.to_coordinator.deliver(end.as_fd())?;
            if !receives {
                self.to_coordinator.give_up();
            }
            if !receives || self.to_coordinator.is_done() {
                *coordinator = None;
                self.to_device.ended = true;
            }
        } else {
            self.to_coordinator.give_up();
        }
        Ok(())
    }

    fn signal_coordinator(&self, signal: Signal) -> Result<(), Error> {
        // Its number is not another one's: this process would have another parent by then.
        if getppid() != Some(self.coordinator) {
            return Ok(());
        }
        match kill_process(self.coordinator, signal) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// SIGSTOP, and waits until it stands.
    #[expect(clippy::disallowed_methods, reason = "nothing tells whoever is not its parent")]
    fn stop_coordinator(&self) -> Result<(), Error> {
        self.signal_coordinator(Signal::STOP)?;
        let stat = format!("/proc/{}/stat", self.coordinator.as_raw_pid());
        let end = Instant::now() + STANDS;
        while !crate::process::stands(&std::fs::read_to_string(&stat)?) {
            if Instant::now() >= end {
                return Err("the coordinator does not stand".into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// What is to be done to a packet.
struct Done {
    delay: Duration,
    fate: Fate,
    cut: bool,
}

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    ToDevice,
    ToCoordinator,
}
