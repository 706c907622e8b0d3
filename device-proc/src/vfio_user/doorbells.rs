//! Doorbells: eventfds that stand for writes into registers.
//!
//! A client gets one for each of the device's doorbells (`DEVICE_GET_REGION_IO_FDS`) and gives them
//! to KVM; a thread here reads them and tells the device. Each client gets eventfds of its own, which
//! are closed when it goes; what it has rung before that still counts, and is owed to the device.
//!
//! An eventfd keeps what is not read from it. So while the device is stopped, the thread reads
//! nothing, and after the start it looks at all of them again. What was rung before a stop is told
//! before it: see the [edge](crate::edge).

use super::endpoint::Endpoint;
use crate::device::{Device, Doorbell};
use crate::edge::Station;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use standstill_vfio_user::wire::{IoFd, IoFdKind};
use std::collections::BTreeSet;
use std::io::{self, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

/// How long the thread rests where it cannot wait.
const REST: Duration = Duration::from_millis(100);

/// `KVM_IOEVENTFD_FLAG_DATAMATCH`.
const DATAMATCH: u32 = 1;

/// Takes what was rung; false if nothing was. Who has the eventfd too may have read it meanwhile,
/// and may have made it block: never waits.
fn take(fd: &OwnedFd) -> bool {
    let mut counter = [0_u8; 8];
    // No position: it has none.
    let read = preadv2(fd, &mut [IoSliceMut::new(&mut counter)], u64::MAX, ReadWriteFlags::NOWAIT);
    read.is_ok()
}

/// Which ones were rung, by index. Nothing is taken.
fn rung(fds: &[Arc<OwnedFd>]) -> Vec<usize> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(&**fd, PollFlags::IN)).collect();
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if let Err(error) = poll(&mut polled, Some(&now)) {
        tracing::debug!(%error, "looking at the doorbells");
        return Vec::new();
    }
    let is_rung = |fd: &PollFd<'_>| fd.revents().contains(PollFlags::IN);
    polled.iter().enumerate().filter(|(_, fd)| is_rung(fd)).map(|(index, _)| index).collect()
}

/// Makes an eventfd readable.
fn ring(fd: &OwnedFd) {
    match rustix::io::write(fd, &1_u64.to_ne_bytes()) {
        // A counter that is full is readable.
        Ok(_) | Err(Errno::AGAIN) => {}
        Err(error) => tracing::warn!(%error, "what a client has rung is lost"),
    }
}

/// The doorbells of a device, and the eventfds of its present client.
#[derive(Debug)]
pub(super) struct Doorbells {
    list: Vec<Doorbell>,
    ringing: Mutex<Ringing>,
    /// Readable while something is owed.
    owed: Arc<OwnedFd>,
    station: Arc<Station>,
    /// Nobody listens any more.
    ended: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What is listened to.
#[derive(Debug, Default)]
struct Ringing {
    /// The eventfds of the present client, one for each doorbell.
    fds: Vec<Arc<OwnedFd>>,
    /// Which doorbells were rung by clients that have gone.
    owed: BTreeSet<usize>,
}

impl Doorbells {
    /// Begins to listen, on a thread of its own. `None` if the device has no doorbells.
    pub(super) fn start<D: Device>(endpoint: Endpoint<D>) -> io::Result<Option<Arc<Self>>> {
        let list = endpoint.parts().doorbells.clone();
        if list.is_empty() {
            return Ok(None);
        }
        let station = Station::new()?;
        let owed = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let doorbells = Arc::new(Self {
            list,
            ringing: Mutex::default(),
            owed,
            station: Arc::clone(&station),
            ended: AtomicBool::new(false),
            thread: Mutex::default(),
        });
        endpoint.parts().edge.set_doorbells(station);
        let listening = Arc::clone(&doorbells);
        let run = move || listening.run(&endpoint);
        let thread = Builder::new().name("doorbells".into()).spawn(run)?;
        *doorbells.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(Some(doorbells))
    }

    /// A client has come. Without eventfds it has to send messages.
    pub(super) fn connected(&self) {
        let fresh = self
            .list
            .iter()
            .map(|_| Ok(Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)));
        match fresh.collect::<Result<Vec<_>, Errno>>() {
            Ok(fresh) => self.replace(fresh),
            Err(error) => tracing::warn!(%error, "no eventfds for doorbells"),
        }
    }

    /// The client has gone: what it has rung is owed, and its eventfds are closed.
    pub(super) fn disconnected(&self) {
        self.replace(Vec::new());
    }

    fn replace(&self, fresh: Vec<Arc<OwnedFd>>) {
        let mut ringing = self.ringing();
        let old = std::mem::replace(&mut ringing.fds, fresh);
        let rung = rung(&old);
        if !rung.is_empty() {
            ringing.owed.extend(rung);
            // Before the old ones are forgotten: whoever looks finds either.
            ring(&self.owed);
        }
        let sources: Vec<_> = ringing.fds.iter().chain([&self.owed]).map(Arc::clone).collect();
        self.station.take_from_eventfds(&sources);
        drop(ringing);
        self.station.ring();
    }

    /// Ends the thread.
    pub(super) fn end(&self) {
        self.ended.store(true, Ordering::SeqCst);
        self.station.ring();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // A panic has ended the process.
        let _ = thread.map(JoinHandle::join);
    }

    /// The doorbells of a region, and their eventfds.
    pub(super) fn of_region(&self, region: u32) -> (Vec<IoFd>, Vec<Arc<OwnedFd>>) {
        let ringing = self.ringing();
        let both = self.list.iter().zip(&ringing.fds);
        let ours = both.filter(|(doorbell, _)| doorbell.bar == region);
        let entries = (0..).zip(ours).map(|(fd_index, (doorbell, fd))| {
            let kind = IoFdKind::IoEventFd {
                flags: if doorbell.value.is_some() { DATAMATCH } else { 0 },
                datamatch: doorbell.value.unwrap_or(0),
            };
            let (offset, size) = (doorbell.offset, u64::from(doorbell.width));
            (IoFd { offset, size, fd_index, kind }, Arc::clone(fd))
        });
        entries.unzip()
    }

    fn ringing(&self) -> MutexGuard<'_, Ringing> {
        self.ringing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<D: Device>(&self, endpoint: &Endpoint<D>) {
        let station = &*self.station;
        while !self.ended.load(Ordering::SeqCst) {
            let request = station.request();
            let kept = !self.scan(endpoint);
            if let Some(request) = request {
                station.done(request);
            }
            if kept {
                // Rung, but not to be told before the start.
                station.keep();
                if endpoint.parts().accesses.is_closed() && station.request().is_none() {
                    self.wait(false);
                }
                continue;
            }
            station.idle();
            self.wait(true);
            station.busy();
        }
    }

    /// Tells the device what was rung. False if something was and the device is stopped.
    fn scan<D: Device>(&self, endpoint: &Endpoint<D>) -> bool {
        let (fds, owes) = {
            let ringing = self.ringing();
            (ringing.fds.clone(), !ringing.owed.is_empty())
        };
        let rung = rung(&fds);
        if rung.is_empty() && !owes {
            return true;
        }
        let Some(_permit) = endpoint.enter() else {
            return false;
        };
        let device = &endpoint.parts().device;
        for index in rung {
            if fds.get(index).is_some_and(|fd| self.take_rung(index, fd)) {
                device.doorbell(index);
            }
        }
        // What was not taken because its client has gone meanwhile is among it.
        self.take_owed().into_iter().for_each(|index| device.doorbell(index));
        true
    }

    fn take_owed(&self) -> BTreeSet<usize> {
        let mut ringing = self.ringing();
        take(&self.owed);
        std::mem::take(&mut ringing.owed)
    }

    /// Takes what was rung, if this is still the eventfd of that doorbell: else it is owed.
    fn take_rung(&self, index: usize, fd: &Arc<OwnedFd>) -> bool {
        let ringing = self.ringing();
        ringing.fds.get(index).is_some_and(|present| Arc::ptr_eq(present, fd)) && take(fd)
    }

    /// Waits until something is rung, if that counts, or the control side wants something.
    fn wait(&self, for_doorbells: bool) {
        let fds = if for_doorbells { self.ringing().fds.clone() } else { Vec::new() };
        let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(&**fd, PollFlags::IN)).collect();
        let alarm = self.station.alarm();
        polled.push(PollFd::new(&alarm, PollFlags::IN));
        match poll(&mut polled, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => {
                tracing::warn!(%error, "waiting for doorbells");
                // It fails again at once.
                std::thread::park_timeout(REST);
            }
        }
        if polled.last().is_some_and(|alarm| alarm.revents().contains(PollFlags::IN)) {
            self.station.looked_up();
        }
    }
}
