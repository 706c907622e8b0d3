//! tokio's view of an fd: only whether it can be read, never the reading itself.
//!
//! The one place that holds the `unsafe` of tokio's `AsyncFd`. It registers for READABLE alone: a
//! registration for both directions costs a wake-up for each queue that drains at the peer.

use std::fs::File;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::sync::Arc;
use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};
use tokio::runtime::Handle;

use super::{Channel, ControlListener};

/// An owner of one fd that stays the same and open for as long as the owner lives.
///
/// # Safety
///
/// From its construction to its drop, [`AsFd::as_fd`] of the value gives the same open fd of the
/// same open file description, whatever is called on a shared reference to it.
pub unsafe trait StableFd: AsFd {}

// SAFETY: owns one fd, which only its drop closes; nothing changes it through `&self`.
unsafe impl StableFd for OwnedFd {}
// SAFETY: as above.
unsafe impl StableFd for File {}
// SAFETY: as above.
unsafe impl StableFd for UnixStream {}
// SAFETY: as above.
unsafe impl StableFd for UnixListener {}
// SAFETY: as above.
unsafe impl StableFd for UnixDatagram {}
// SAFETY: as above.
unsafe impl StableFd for TcpStream {}
// SAFETY: as above.
unsafe impl StableFd for TcpListener {}
// SAFETY: its fd is that of a field of type `OwnedFd`, which nothing replaces.
unsafe impl<Tx, Rx> StableFd for Channel<Tx, Rx> {}
// SAFETY: its fd is that of a field of type `OwnedFd`, which nothing replaces.
unsafe impl StableFd for ControlListener {}
// SAFETY: as the shared value; this reference keeps it alive.
unsafe impl<F: StableFd + ?Sized> StableFd for Arc<F> {}

/// Tells a task when an fd can be read.
///
/// The fd must be read without blocking: with `MSG_DONTWAIT`, as [`Channel`] does, or set to
/// `O_NONBLOCK` by the caller.
///
/// The one rule: [`ReadyGuard::clear`] is for the caller who has just seen EAGAIN. tokio watches
/// edges, so whoever clears after one message while more are queued is not woken for them.
#[derive(Debug)]
pub struct Readiness<F: StableFd> {
    registered: AsyncFd<Registered<F>>,
}

/// The fd can probably be read: read until EAGAIN, then [`clear`](Self::clear).
///
/// Dropped without it, the next [`Readiness::readable`] returns at once.
#[must_use = "read the fd until EAGAIN, then clear"]
#[derive(Debug)]
pub struct ReadyGuard<'a, F: StableFd> {
    guard: AsyncFdReadyGuard<'a, Registered<F>>,
}

#[derive(Debug)]
struct Registered<F>(F);

impl<F: StableFd> AsRawFd for Registered<F> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl<F: StableFd> Readiness<F> {
    /// Registers the fd with the runtime of the calling task.
    ///
    /// # Errors
    ///
    /// Those of `epoll_ctl(2)` (a regular file cannot be watched), and an error if there is no
    /// runtime here. The fd is dropped then.
    ///
    /// # Panics
    ///
    /// If the runtime was built without I/O (`enable_io`): a mistake in this process.
    pub fn new(inner: F) -> io::Result<Self> {
        Ok(Self { registered: register(inner, Interest::READABLE)? })
    }

    /// The owner of the fd.
    #[must_use]
    pub fn get_ref(&self) -> &F {
        &self.registered.get_ref().0
    }

    /// Takes the fd out of the runtime again.
    #[must_use]
    pub fn into_inner(self) -> F {
        self.registered.into_inner().0
    }

    /// Waits until the fd can be read, which the end of the stream is too.
    ///
    /// May complete though nothing is there. Cancel safe: a readiness is kept until it is cleared.
    ///
    /// # Errors
    ///
    /// If the runtime is shutting down.
    pub async fn readable(&self) -> io::Result<ReadyGuard<'_, F>> {
        Ok(ReadyGuard { guard: self.registered.readable().await? })
    }
}

impl<F: StableFd> ReadyGuard<'_, F> {
    /// Says that the fd was read until EAGAIN: wait for new data.
    pub fn clear(mut self) {
        self.guard.clear_ready();
    }

    /// The owner of the fd.
    #[must_use]
    pub fn get_ref(&self) -> &F {
        &self.guard.get_ref().get_ref().0
    }
}

/// Waits until the fd can be written, through a registration of its own for just this time.
///
/// May complete though it cannot. Cancel safe.
pub(super) async fn writable(fd: BorrowedFd<'_>) -> io::Result<()> {
    // epoll knows a file by its fd, so a second registration needs a second one.
    let second = register(fd.try_clone_to_owned()?, Interest::WRITABLE)?;
    let _ready = second.writable().await?;
    Ok(())
}

fn register<F: StableFd>(inner: F, interest: Interest) -> io::Result<AsyncFd<Registered<F>>> {
    Handle::try_current().map_err(io::Error::other)?;
    // SAFETY: `StableFd` promises what `register_with_interest` asks for: `as_raw_fd` gives the
    // same open fd of the same description until `inner` is dropped. `AsyncFd` owns it, and nobody
    // gets more than a shared reference before `into_inner` has deregistered it.
    let registered = unsafe { AsyncFd::register_with_interest(Registered(inner), interest) };
    registered.map_err(Into::into)
}
