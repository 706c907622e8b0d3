//! Asks the scheduler to run a thread soon when a message for it comes.
//!
//! A machine under load has more threads that want the CPU than CPUs, data threads of devices
//! foremost. The kernel's fair scheduler lets a thread that wakes up wait behind those that are
//! due before it, and a thread is due one time slice after it wakes. So a thread that serves a
//! control channel, which needs some ten microseconds at a time, asks for the shortest slice: it
//! gets no more of the CPU than before, but it gets it sooner. (Linux 6.12 and later; sched(7),
//! `sched_setattr(2)`. Needs no privilege.)

use nix::errno::Errno;

/// The shortest time slice that the kernel gives, in nanoseconds.
const SHORTEST_SLICE_NS: u64 = 100_000;

/// `SCHED_FLAG_RESET_ON_FORK` of `<linux/sched.h>`.
const RESET_ON_FORK: u64 = 1;

/// Asks for short waits for the calling thread, at the cost of shorter turns. For the thread that
/// serves a control channel, at either end; a device process's control thread does it by itself.
///
/// The thread stays under the fair scheduler and keeps its nice value; what it makes later (threads,
/// processes) has the default slice and no negative nice value. Kernels before 6.12 accept it and
/// do no more than that.
///
/// # Errors
///
/// If the thread is under a real-time policy (it needs nothing then), or a seccomp filter forbids
/// it. Nothing has changed then, and nothing depends on it.
pub fn prefer_short_waits() -> std::io::Result<()> {
    let policy = present_policy()?;
    if policy != libc::SCHED_OTHER && policy != libc::SCHED_BATCH {
        return Err(Errno::EINVAL.into());
    }
    let nice = rustix::process::getpriority_process(None)?;
    let attributes = libc::sched_attr {
        size: SIZE,
        sched_policy: u32::try_from(policy).unwrap_or(0),
        // The threads and processes that this one makes are to be as others.
        sched_flags: RESET_ON_FORK,
        sched_nice: nice,
        sched_priority: 0,
        sched_runtime: SHORTEST_SLICE_NS,
        sched_deadline: 0,
        sched_period: 0,
    };
    // SAFETY: thread id 0 is the calling thread; the kernel reads `size` bytes of `attributes`,
    // which is alive and as long, and writes nothing but its size field on an error.
    let result =
        unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(&attributes), 0) };
    Errno::result(result).map(drop).map_err(Into::into)
}

#[expect(clippy::cast_possible_truncation, reason = "48 bytes")]
const SIZE: u32 = size_of::<libc::sched_attr>() as u32;

/// The calling thread's scheduling policy.
fn present_policy() -> std::io::Result<i32> {
    // SAFETY: takes a thread id, 0 being the calling thread, and touches no memory.
    let policy = unsafe { libc::sched_getscheduler(0) };
    Ok(Errno::result(policy)?)
}

#[cfg(test)]
mod tests {
    use super::prefer_short_waits;

    #[test]
    fn a_thread_keeps_its_policy_and_nice_value() {
        let thread = std::thread::spawn(|| {
            rustix::process::setpriority_process(None, 3).unwrap();
            prefer_short_waits().unwrap();
            rustix::process::getpriority_process(None).unwrap()
        });
        assert_eq!(thread.join().unwrap(), 3);
    }
}
