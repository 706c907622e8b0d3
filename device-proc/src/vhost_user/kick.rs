//! Kicks that do not come from the guest.

#![deny(unsafe_op_in_unsafe_fn)]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use vmm_sys_util::event::EventConsumer;

/// Writes 1 to a kick eventfd, as a guest does. One whose count is full is left as it is: who waits
/// for it sees that already, and the write might block.
pub(super) fn kick(eventfd: &EventConsumer) -> io::Result<()> {
    // SAFETY: `eventfd` owns this descriptor, and is borrowed for longer than the result is used.
    let eventfd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&eventfd, PollFlags::OUT)], Some(&now))? == 0 {
        return Ok(());
    }
    rustix::io::write(eventfd, &1_u64.to_ne_bytes())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::event::{EventFlag, new_event_consumer_and_notifier};

    #[test]
    fn a_kick_arrives_and_a_full_count_is_not_waited_for() {
        let (consumer, notifier) = new_event_consumer_and_notifier(EventFlag::CLOEXEC).unwrap();
        kick(&consumer).unwrap();
        consumer.consume().unwrap();
        // SAFETY: as above.
        let fd = unsafe { BorrowedFd::borrow_raw(notifier.as_raw_fd()) };
        rustix::io::write(fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        kick(&consumer).unwrap();
        consumer.consume().unwrap();
    }
}
