//! Starts processes that end with this one.
//!
//! The kernel's signal for the death of a parent (`PR_SET_PDEATHSIG`, which QEMU asks for) comes when the
//! *thread* ends that has started the child, and tests end with their threads: one thread for all,
//! which never ends, starts them.

use std::io;
use std::process::{Child, Command};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};

type Job = (Command, Sender<io::Result<Child>>);

/// Starts the command.
pub(super) fn spawn(command: Command) -> io::Result<Child> {
    static JOBS: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (jobs, received) = channel::<Job>();
        std::thread::spawn(move || {
            for (mut command, answer) in received {
                // Whoever asked may be gone.
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(jobs)
    });
    let (answer, child) = channel();
    let gone = |_| io::Error::other("the thread that starts processes has ended");
    jobs.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(|_| gone(()))?;
    child.recv().map_err(|_| gone(()))?
}
