//! Doorbells: eventfds that stand for writes into registers.
//!
//! A client gets one for each of the device's doorbells (`DEVICE_GET_REGION_IO_FDS`) and gives them
//! to KVM; a thread here reads them and tells the device. Each client gets eventfds of its own; what
//! it has rung before it goes still counts.
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

/// The doorbells of a device, and the eventfds of its present client.
#[derive(Debug)]
pub(super) struct Doorbells {
    list: Vec<Doorbell>,
    ringing: Mutex<Vec<Ringing>>,
    station: Arc<Station>,
    /// Nobody listens any more.
    ended: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// An eventfd that is listened to.
#[derive(Clone, Debug)]
struct Ringing {
    index: usize,
    fd: Arc<OwnedFd>,
    /// Its client has gone: it counts until it is found silent.
    retired: bool,
}

impl Doorbells {
    /// Begins to listen, on a thread of its own. `None` if the device has no doorbells.
    pub(super) fn start<D: Device>(endpoint: Endpoint<D>) -> io::Result<Option<Arc<Self>>> {
        let list = endpoint.parts().doorbells.clone();
        if list.is_empty() {
            return Ok(None);
        }
        let station = Station::new()?;
        let doorbells = Arc::new(Self {
            list,
            ringing: Mutex::default(),
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
        let fresh = (0..self.list.len()).map(|index| {
            let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
            Ok(Ringing { index, fd: Arc::new(fd), retired: false })
        });
        match fresh.collect::<Result<Vec<_>, Errno>>() {
            Ok(fresh) => self.change(|ringing| ringing.extend(fresh)),
            Err(error) => tracing::warn!(%error, "no eventfds for doorbells"),
        }
    }

    /// The client has gone.
    pub(super) fn disconnected(&self) {
        self.change(|ringing| ringing.iter_mut().for_each(|ringing| ringing.retired = true));
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
        let ours = ringing.iter().filter(|ringing| !ringing.retired).filter_map(|ringing| {
            let doorbell = self.list.get(ringing.index)?;
            (doorbell.bar == region).then_some((doorbell, &ringing.fd))
        });
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

    fn change(&self, change: impl FnOnce(&mut Vec<Ringing>)) {
        let mut ringing = self.ringing();
        change(&mut ringing);
        let fds: Vec<_> = ringing.iter().map(|ringing| Arc::clone(&ringing.fd)).collect();
        self.station.take_from_eventfds(&fds);
        drop(ringing);
        self.station.ring();
    }

    fn ringing(&self) -> MutexGuard<'_, Vec<Ringing>> {
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
        let ringing = self.ringing().clone();
        let mut polled: Vec<_> =
            ringing.iter().map(|ringing| PollFd::new(&*ringing.fd, PollFlags::IN)).collect();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        if let Err(error) = poll(&mut polled, Some(&now)) {
            tracing::debug!(%error, "looking at the doorbells");
            return true;
        }
        let rung: Vec<_> = polled.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        let mut told = true;
        for (ringing, _) in ringing.iter().zip(&rung).filter(|(_, rung)| **rung) {
            let Some(_permit) = endpoint.enter() else {
                told = false;
                break;
            };
            if take(&ringing.fd) {
                endpoint.parts().device.doorbell(ringing.index);
            }
        }
        // A retired one that was silent is silent for ever, as far as its client is concerned.
        let silent = |ringing: &Ringing, rung: bool| ringing.retired && !rung;
        if ringing.iter().zip(&rung).any(|(ringing, rung)| silent(ringing, *rung)) {
            let gone: Vec<_> = ringing
                .iter()
                .zip(&rung)
                .filter(|(ringing, rung)| silent(ringing, **rung))
                .map(|(ringing, _)| Arc::clone(&ringing.fd))
                .collect();
            let is_gone = |ringing: &Ringing| gone.iter().any(|fd| Arc::ptr_eq(fd, &ringing.fd));
            self.change(|ringing| ringing.retain(|ringing| !is_gone(ringing)));
        }
        told
    }

    /// Waits until something is rung, if that counts, or the control side wants something.
    fn wait(&self, for_doorbells: bool) {
        let ringing = if for_doorbells { self.ringing().clone() } else { Vec::new() };
        let mut polled: Vec<_> =
            ringing.iter().map(|ringing| PollFd::new(&*ringing.fd, PollFlags::IN)).collect();
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
