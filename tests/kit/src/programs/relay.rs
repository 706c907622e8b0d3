//! The program between a coordinator and a device process; see [`crate::outside::relay`].

mod child;
mod lane;
mod orders;
mod packet;
mod session;

use crate::chain;
use crate::outside::relay::Order;
use crate::plan::{Moment, OutsideAction};
use child::Child;
use lane::Fate;
use orders::Orders;
use packet::Packet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use session::{Coordinator, Session, Way, moment};
use standstill_protocol::channel::{ControlListener, CoordinatorEnd, DeviceEnd, Frame, bind};
use standstill_protocol::codec::{HANDSHAKE_VERSION, HEADER};
use standstill_protocol::message::{
    CoordinatorMessage, DeviceMessage, Hello, MAX_FDS, OrphanPolicy, Welcome,
};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

type Error = Box<dyn std::error::Error>;

/// Where the device process listens for later coordinators, in the relay's folder.
const SOCKET: &str = "control.sock";

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
    if getppid().map(Pid::as_raw_pid) != Some(channel.peer_credentials()?.pid) {
        return Err("the coordinator is gone".into());
    }
    let orders = Orders::open(folder)?;
    let (ours, theirs) =
        socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let child = Child::start(folder, program, arguments, theirs)?;
    orders.write(&format!("device {}", child.pid()))?;
    let session = Session::new(channel, ours)?;
    orders.write(&format!("coordinator {}", session.coordinator.pid()))?;
    let relay = Relay {
        child,
        orders,
        sessions: vec![session],
        listener: None,
        socket: folder.join(SOCKET),
        later: Vec::new(),
    };
    relay.pass_on()
}

/// What is to be done at a time.
enum Later {
    ContinueDevice,
    ContinueCoordinator(Rc<Coordinator>),
}

/// What is to be done to a packet.
struct Done {
    delay: Duration,
    held_by: Option<usize>,
    fate: Fate,
    cut: bool,
}

impl Done {
    fn befalls(&mut self, fate: Fate) {
        self.fate = self.fate.worse(fate);
    }
}

struct Relay {
    child: Child,
    orders: Orders,
    /// One for each coordinator that is connected.
    sessions: Vec<Session>,
    /// Where later coordinators find the device, if they may.
    listener: Option<ControlListener>,
    /// Where the device listens, for the relay.
    socket: PathBuf,
    later: Vec<(Instant, Later)>,
}

impl Relay {
    /// Passes packets on until the device process has ended, its last words are delivered, and no
    /// coordinator waits to be let go on.
    fn pass_on(mut self) -> Result<u8, Error> {
        let mut child_ended = false;
        loop {
            self.do_what_is_due()?;
            self.accept()?;
            for mut session in std::mem::take(&mut self.sessions) {
                self.serve(&mut session, child_ended)?;
                if !session.is_over() {
                    self.sessions.push(session);
                }
            }
            if child_ended && self.sessions.is_empty() && self.standing().next().is_none() {
                return self.child.end_likewise();
            }
            child_ended |= self.wait(child_ended)?;
        }
    }

    /// Coordinators that were stopped for a time that is not over.
    fn standing(&self) -> impl Iterator<Item = &Coordinator> {
        self.later.iter().filter_map(|(_, what)| match what {
            Later::ContinueCoordinator(coordinator) => Some(&**coordinator),
            Later::ContinueDevice => None,
        })
    }

    fn serve(&mut self, session: &mut Session, child_ended: bool) -> Result<(), Error> {
        while let Some(mut packet) = session.read(Way::ToDevice, child_ended)? {
            let message = packet::command(&packet.bytes, session.version);
            if let Some((CoordinatorMessage::Welcome(welcome), _)) = &message {
                session.version = welcome.version;
                self.welcomed(welcome, &mut packet)?;
            }
            self.meet(session, Way::ToDevice, packet, moment(message.as_ref()))?;
        }
        while let Some(mut packet) = session.read(Way::ToCoordinator, child_ended)? {
            let message = packet::answer(&packet.bytes, session.version);
            if let Some((DeviceMessage::Hello(hello), _)) = &message {
                self.add_backing_file(hello, &mut packet)?;
            }
            self.meet(session, Way::ToCoordinator, packet, moment(message.as_ref()))?;
        }
        session.deliver()
    }

    /// The device may outlive its coordinator; the relay stays between it and later ones.
    fn welcomed(&mut self, welcome: &Welcome, packet: &mut Packet) -> Result<(), Error> {
        if welcome.orphan == OrphanPolicy::Keep {
            set_parent_process_death_signal(None)?;
        }
        if let Some(listener) = packet.fds.first_mut().filter(|_| welcome.listener) {
            let theirs = std::mem::replace(listener, bind(&self.socket)?);
            self.listener = Some(ControlListener::from_fd(theirs)?);
        }
        Ok(())
    }

    /// Lets later coordinators in.
    fn accept(&mut self) -> Result<(), Error> {
        let Some(listener) = &self.listener else { return Ok(()) };
        while let Some(coordinator) = listener.try_accept()? {
            // One that cannot be passed on sees the end of its connection.
            let Ok(device) = CoordinatorEnd::connect(&self.socket) else { continue };
            // One that is gone already is nobody's coordinator.
            let Ok(session) = Session::new(coordinator, device.into_fd()) else { continue };
            self.orders.write(&format!("coordinator {}", session.coordinator.pid()))?;
            self.sessions.push(session);
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
    fn meet(
        &mut self,
        session: &mut Session,
        way: Way,
        packet: Packet,
        moment: Option<Moment>,
    ) -> Result<(), Error> {
        let orders = moment.map(|moment| self.orders.due(moment)).transpose()?;
        let coordinator = Rc::clone(&session.coordinator);
        let Done { delay, held_by, fate, cut } =
            self.act(orders.unwrap_or_default(), &coordinator)?;
        if cut {
            session.cut();
            return Ok(());
        }
        session.push(way, packet, fate, delay, held_by)
    }

    /// Does what is done to processes; says what is to be done to the packet and the channel.
    fn act(
        &mut self,
        orders: Vec<(usize, Order)>,
        coordinator: &Rc<Coordinator>,
    ) -> Result<Done, Error> {
        let mut done =
            Done { delay: Duration::ZERO, held_by: None, fate: Fate::Deliver, cut: false };
        for (index, Order { action, owner, let_go, .. }) in orders {
            if action.hits_the_coordinator() && u32::try_from(coordinator.pid()) == Ok(owner) {
                return Err(
                    "the coordinator is the test itself, and not a process of its own".into()
                );
            }
            match action {
                OutsideAction::Kill => self.child.kill()?,
                OutsideAction::StopMs(ms) => {
                    self.child.stop()?;
                    self.later(ms, Later::ContinueDevice);
                }
                OutsideAction::Limit(limit) => self.child.limit(limit)?,
                OutsideAction::KillCoordinator => coordinator.signal(Signal::KILL)?,
                OutsideAction::StopCoordinatorMs(ms) => {
                    coordinator.stop()?;
                    self.later(ms, Later::ContinueCoordinator(Rc::clone(coordinator)));
                }
                OutsideAction::DelayMs(ms) => done.delay += Duration::from_millis(ms.into()),
                OutsideAction::Hold => done.held_by = (!let_go).then_some(index).or(done.held_by),
                OutsideAction::Drop => done.befalls(Fate::Drop),
                OutsideAction::Duplicate => done.befalls(Fate::Twice),
                // The first byte behind the header: which message it is.
                OutsideAction::Corrupt => done.befalls(Fate::CorruptAt(HEADER)),
                OutsideAction::CorruptAt(offset) => done.befalls(Fate::CorruptAt(offset.into())),
                OutsideAction::Split => done.befalls(Fate::Split),
                OutsideAction::Merge => done.befalls(Fate::Merge),
                OutsideAction::Swap => done.befalls(Fate::Swap),
                OutsideAction::Cut => done.cut = true,
            }
        }
        Ok(done)
    }

    /// 0 ms: never.
    fn later(&mut self, ms: u32, what: Later) {
        if ms > 0 {
            self.later.push((Instant::now() + Duration::from_millis(ms.into()), what));
        }
    }

    /// What was armed to be done at once, and what was put off until now.
    fn do_what_is_due(&mut self) -> Result<(), Error> {
        let at_once = self.orders.due_at_once()?;
        // The one that came last has the device.
        if let Some(last) = self.sessions.last() {
            let coordinator = Rc::clone(&last.coordinator);
            if self.act(at_once, &coordinator)?.cut {
                self.sessions.iter_mut().for_each(Session::cut);
            }
        }
        for order in self.orders.let_go() {
            self.sessions.iter_mut().for_each(|session| session.let_go(order));
        }
        let now = Instant::now();
        while let Some(at) = self.later.iter().position(|(due, _)| *due <= now) {
            match self.later.swap_remove(at).1 {
                Later::ContinueDevice => self.child.go_on()?,
                Later::ContinueCoordinator(coordinator) => coordinator.signal(Signal::CONT)?,
            }
        }
        Ok(())
    }

    /// Waits until there is something to do. True if the device process has ended.
    fn wait(&self, child_ended: bool) -> Result<bool, Error> {
        let now = Instant::now();
        let sessions = self.sessions.iter().flat_map(Session::polled);
        let listener = self.listener.iter().map(|listener| (listener.as_fd(), PollFlags::IN));
        let orders = [(self.orders.watch(), PollFlags::IN)];
        let child = (!child_ended).then(|| (self.child.pidfd(), PollFlags::IN));
        let mut fds: Vec<_> = sessions
            .chain(listener)
            .chain(orders)
            .chain(child)
            .map(|(fd, flags)| PollFd::from_borrowed_fd(fd, flags))
            .collect();
        let dues = self.sessions.iter().flat_map(Session::dues);
        let dues = dues.chain(self.later.iter().map(|(due, _)| *due));
        let left = dues.min().map(|due| due.saturating_duration_since(now));
        let timeout = left.map(Timespec::try_from).transpose()?;
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(!child_ended && fds.last().is_some_and(|fd| fd.revents().contains(PollFlags::IN)))
    }
}

/// Whatever ends the relay, no coordinator stands for ever that was to stand for a while.
impl Drop for Relay {
    fn drop(&mut self) {
        for coordinator in self.standing() {
            // Nothing more can be done about it.
            let _ = coordinator.signal(Signal::CONT);
        }
    }
}
