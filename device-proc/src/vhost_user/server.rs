//! The thread that serves one frontend after another.
//!
//! Each gets a message loop and threads of its own from the crate, which keeps what a frontend has
//! claimed for as long as such a loop lives. The socket is there only while the next frontend would be
//! answered: one that connects to a socket where nobody answers stands still with all of its VM.

#![forbid(unsafe_code)]

use super::claim;
use super::core::Core;
use super::device::VhostUserDevice;
use super::fail_stop::FailStop;
use super::kick::duplicate;
use super::pop_gate::Hold;
use super::served::Served;
use super::{Backend, Listen, Workers};
use crate::actor::Message;
use crate::actor::parts::Parts;
use crate::log;
use crate::serve::DataSocket;
use ractor::ActorRef;
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::Builder;
use std::time::Duration;
use thiserror::Error;
use vhost::vhost_user::{Error as ProtocolError, Listener};
use vhost_user_backend::{Error as DaemonError, VhostUserDaemon};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// After an error in a row of them the thread rests, first this long, then twice as long.
const FIRST_REST: Duration = Duration::from_millis(10);
const LONGEST_REST: Duration = Duration::from_secs(1);

/// How long the control side may take to hear of a frontend.
const PATIENCE: Duration = Duration::from_secs(4);

/// A frontend could not be served. The errors of the crate are no `std::error::Error`.
#[derive(Debug, Error)]
enum ServerError {
    #[error("the threads for a frontend cannot be made: {0}")]
    Daemon(DaemonError),
    #[error("the backend does not take the threads for a frontend")]
    Listen(#[source] io::Error),
    #[error("another fd of what the threads for a frontend wait by")]
    Epoll(#[source] io::Error),
    #[error("the data socket")]
    Socket(#[source] io::Error),
    #[error("accepting a frontend: {0}")]
    Accept(DaemonError),
}

/// Serves frontends on a thread of its own, until the process ends.
pub(super) fn start<B: Backend>(
    core: &Arc<Core<B>>,
    parts: Arc<Parts<VhostUserDevice<B>>>,
    actor: ActorRef<Message>,
    socket: DataSocket,
    listen: Option<Listen<B>>,
) -> io::Result<()> {
    #[cfg(feature = "fault-injection")]
    core.pops.leaks_with(&parts.gate);
    // There is one transport in a process.
    let _ = core.actor.set(actor.clone());
    claim::start(core)?;
    let server = Server { served: Served::new(Arc::clone(core), parts), actor, socket, listen };
    Builder::new().name("frontends".into()).spawn(move || server.run())?;
    Ok(())
}

struct Server<B: Backend> {
    served: Served<B>,
    actor: ActorRef<Message>,
    socket: DataSocket,
    listen: Option<Listen<B>>,
}

impl<B: Backend> Server<B> {
    fn run(&self) {
        let mut rest = FIRST_REST;
        loop {
            let Err(error) = self.serve() else {
                rest = FIRST_REST;
                continue;
            };
            let error = log::with_causes(&error);
            tracing::warn!(error, "serving frontends");
            // What fails, fails again at once.
            std::thread::park_timeout(rest);
            rest = (rest * 2).min(LONGEST_REST);
        }
    }

    /// Waits for a frontend and serves it until it goes.
    fn serve(&self) -> Result<(), ServerError> {
        let core = self.served.core();
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let shared = memory.clone();
        let name = "vhost-user".to_owned();
        let mut daemon =
            VhostUserDaemon::new(name, self.served.clone(), memory).map_err(ServerError::Daemon)?;
        let handlers = daemon.get_epoll_handlers();
        let epolls = handlers.iter().map(|handler| duplicate(&**handler).map(Arc::new));
        let epolls = epolls.collect::<io::Result<Vec<_>>>().map_err(ServerError::Epoll)?;
        core.connected(&epolls);
        let accepted = self.accept(&mut daemon);
        if accepted.is_ok() {
            core.frontend_is_there.store(true, Ordering::Relaxed);
            Message::tell_present(&self.actor, true, PATIENCE);
            match daemon.wait() {
                Ok(()) => tracing::debug!("the frontend has gone"),
                Err(DaemonError::HandleRequest(
                    ProtocolError::Disconnected | ProtocolError::PartialMessage,
                )) => tracing::debug!("the frontend has gone"),
                Err(error) => tracing::warn!(%error, "serving a frontend ended"),
            }
        }
        self.end(daemon);
        // Whoever has it has it in common: without this a guest's memory would stay as long as nobody
        // follows it.
        let locked = shared.lock().unwrap_or_else(PoisonError::into_inner);
        locked.replace(GuestMemoryMmap::new());
        if accepted.is_ok() {
            core.frontend_is_there.store(false, Ordering::Relaxed);
            Message::tell_present(&self.actor, false, PATIENCE);
        }
        accepted
    }

    /// Listens until a frontend connects, and no longer.
    fn accept(&self, daemon: &mut VhostUserDaemon<Served<B>>) -> Result<(), ServerError> {
        if let Some(listen) = &self.listen {
            let handlers = daemon.get_epoll_handlers();
            let backend = &self.served.core().backend;
            listen(backend, &Workers(&handlers)).map_err(ServerError::Listen)?;
        }
        let socket = self.socket.open().map_err(ServerError::Socket)?;
        let mut listener = Listener::from(UnixListener::from(socket));
        let _accepting = self.served.accepting();
        let accepted = daemon.start(&mut listener).map_err(ServerError::Accept);
        drop(listener);
        // Before it can be told that there is a frontend: another one that comes now has to see at once
        // that it must come again.
        self.socket.close();
        accepted
    }

    /// Brings the threads of a connection to their end, and with them what the frontend had asked for.
    fn end(&self, daemon: VhostUserDaemon<Served<B>>) {
        let core = self.served.core();
        let deadline = core.facts.drain_deadline;
        let _deadline = FailStop::arm("what a frontend has left".into(), deadline);
        core.pops.hold(Hold::Leaving);
        // There is always another moment, until the process ends.
        let _ = core.pops.drained_within(Duration::MAX);
        core.pops.hold(Hold::Exiting);
        drop(daemon);
        self.served.close_exit_fds();
        core.rings.disconnected();
        core.give_back();
        core.forget_memory();
        core.pops.release(Hold::Exiting);
        core.pops.release(Hold::Leaving);
    }
}
