//! Kicks that do not come from the guest, and who waits for kicks.

#![deny(unsafe_op_in_unsafe_fn)]

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use vmm_sys_util::event::EventConsumer;

/// Writes 1 to a kick eventfd, as a guest does. One whose count is full is left as it is: who waits
/// for it sees that already, and the write might block.
pub(super) fn kick(eventfd: &EventConsumer) -> io::Result<()> {
    // SAFETY: `eventfd` owns this descriptor, and is borrowed for longer than the result is used.
    let eventfd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut [PollFd::new(&eventfd, PollFlags::OUT)], Some(&now)) {
        Ok(0) => return Ok(()),
        // It is refused to a process that may have no fd at all: then it is written without a look.
        Ok(_) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    rustix::io::write(eventfd, &1_u64.to_ne_bytes())?;
    Ok(())
}

/// Another fd of what a thread of the crate waits by.
pub(super) fn duplicate(handler: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: `handler` owns this descriptor, and is borrowed for longer than the result is used.
    let epoll = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
    epoll.try_clone_to_owned()
}

/// Has a thread wait for that eventfd, as the crate has it: by the number of its ring. It may do so already.
pub(super) fn wait_for(epoll: &OwnedFd, eventfd: &EventConsumer, number: u64) -> io::Result<()> {
    // SAFETY: as above.
    let eventfd = unsafe { BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
    let data = epoll::EventData::new_u64(number);
    match epoll::add(epoll, eventfd, data, epoll::EventFlags::IN) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
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
