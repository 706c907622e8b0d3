//! The thread that serves one client after another.

use super::connection::{Connection, Ended, rest_after_error};
use super::doorbells::Doorbells;
use super::endpoint::Endpoint;
use super::kept::Kept;
use super::link::LinkError;
use crate::device::Device;
use crate::edge::Station;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::Builder;
use std::time::Duration;

/// After an error in a row of them the thread rests, first this long, then twice as long.
const FIRST_REST: Duration = Duration::from_millis(10);
const LONGEST_REST: Duration = Duration::from_secs(1);

/// Serves clients of this listener on a thread of its own, until the process ends.
pub(crate) fn start<D: Device>(listener: OwnedFd, endpoint: Endpoint<D>) -> io::Result<()> {
    // It may be shared with whoever gave it; who is seen in poll may have gone in accept.
    rustix::io::ioctl_fionbio(&listener, true)?;
    let server = Server::new(endpoint)?;
    Builder::new().name("vfio-user".into()).spawn(move || server.run(&listener))?;
    Ok(())
}

/// What is there from one client to the next.
#[derive(Debug)]
pub(super) struct Server<D> {
    endpoint: Endpoint<D>,
    station: Arc<Station>,
    doorbells: Option<Arc<Doorbells>>,
    kept: Kept,
}

impl<D: Device> Server<D> {
    /// Makes the threads beside this one, and lets the control side know of this one.
    pub(super) fn new(endpoint: Endpoint<D>) -> io::Result<Self> {
        let station = Station::new()?;
        let doorbells = Doorbells::start(endpoint.clone())?;
        endpoint.parts().edge.set_socket(Arc::clone(&station));
        Ok(Self { endpoint, station, doorbells, kept: Kept::default() })
    }

    fn run(mut self, listener: &OwnedFd) {
        let mut rest = FIRST_REST;
        loop {
            self.wait_for_client(listener);
            match accept_with(listener, SocketFlags::CLOEXEC) {
                Ok(client) => {
                    rest = FIRST_REST;
                    self.serve(client);
                }
                Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
                Err(error) => {
                    tracing::warn!(%error, "accepting a client");
                    // Where accepting fails, it fails again at once.
                    std::thread::park_timeout(rest);
                    rest = (rest * 2).min(LONGEST_REST);
                }
            }
        }
    }

    /// Waits in poll, and does meanwhile what is left of the last client.
    fn wait_for_client(&mut self, listener: &OwnedFd) {
        loop {
            self.settle();
            let alarm = self.station.alarm();
            let mut polled =
                [PollFd::new(&alarm, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
            match poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => {
                    tracing::warn!(%error, "waiting for a client");
                    rest_after_error();
                }
            }
            let [alarm, client] = polled.map(|fd| !fd.revents().is_empty());
            self.station.busy();
            if alarm {
                self.station.looked_up();
            }
            if client {
                return;
            }
        }
    }

    /// Nobody sends anything: whoever waits for this thread need not.
    fn settle(&mut self) {
        if !self.kept.is_empty() {
            // Somebody sent it, and it is still to be done.
            self.station.keep();
            self.finish_kept();
        }
        if self.kept.is_empty() {
            self.station.idle();
        }
        if let Some(request) = self.station.request() {
            self.station.done(request);
        }
    }

    /// Carries out what was kept, if the device runs.
    fn finish_kept(&mut self) {
        if !self.kept.is_empty()
            && let Some(permit) = self.endpoint.enter()
        {
            self.kept.carry_out(&self.endpoint, &permit);
        }
    }

    /// Serves one client until it goes, or has to.
    pub(super) fn serve(&mut self, client: OwnedFd) {
        // Whoever calls this may have been idle: from here on something is taken out of a socket.
        self.station.busy();
        let client = Arc::new(client);
        self.endpoint.connected();
        if let Some(doorbells) = &self.doorbells {
            doorbells.connected();
        }
        self.station.take_from_socket(&client);
        let Self { endpoint, station, doorbells, kept } = self;
        let ended = Connection::new(endpoint, station, doorbells.as_deref(), kept, client)
            .and_then(|mut connection| connection.run());
        match ended {
            Ok(()) | Err(Ended::Link(LinkError::Gone)) => tracing::debug!("the client has gone"),
            Err(error) => {
                let error = crate::log::with_causes(&error);
                tracing::warn!(error, "serving a client ended");
            }
        }
        self.station.take_from_nobody();
        self.settle();
        if let Some(doorbells) = &self.doorbells {
            doorbells.disconnected();
        }
        self.endpoint.disconnected();
    }
}

impl<D> Drop for Server<D> {
    fn drop(&mut self) {
        if let Some(doorbells) = &self.doorbells {
            doorbells.end();
        }
    }
}

#[cfg(test)]
mod tests;
