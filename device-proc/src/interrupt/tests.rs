use super::*;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::{read, write};
use std::os::fd::AsFd;
use std::time::Duration;

const MSI: u32 = IrqIndex::Msi as u32;
const MSIX: u32 = IrqIndex::Msix as u32;

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).expect("eventfd")
}

/// How often it was signalled since the last call.
fn signalled(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    read(fd, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
}

fn device() -> Interrupts {
    let interrupts = Interrupts::new();
    interrupts.set_counts(IrqCounts { intx: 1, msi: 2, msix: 4 });
    interrupts
}

fn set(
    interrupts: &Interrupts,
    flags: u32,
    index: u32,
    (start, count): (u32, u32),
    data: &[u8],
    fds: Vec<OwnedFd>,
) -> Result<(), SetIrqsError> {
    let request = SetIrqs { argsz: SET_IRQS_SIZE, flags, index, start, count };
    interrupts.set_irqs(&request, data, fds)
}

/// Installs an eventfd and keeps another fd of it.
fn install(interrupts: &Interrupts, index: u32, at: u32) -> OwnedFd {
    let fd = new_eventfd();
    let theirs = fd.as_fd().try_clone_to_owned().expect("dup");
    set(interrupts, DATA_EVENTFD | ACTION_TRIGGER, index, (at, 1), &[], vec![theirs])
        .expect("installed");
    fd
}

#[tokio::test]
async fn a_raised_vector_arrives_on_its_eventfd_only() {
    let interrupts = device();
    let fds = [install(&interrupts, MSIX, 0), install(&interrupts, MSIX, 1)];
    interrupts.raise(1);
    interrupts.raise(1);
    interrupts.raise(2);
    interrupts.raise(4);
    assert_eq!((signalled(&fds[0]), signalled(&fds[1])), (0, 2));
    assert_eq!((interrupts.raised(), interrupts.raised_by(1), interrupts.raised_by(2)), (2, 2, 0));
    assert_eq!(interrupts.latched(), Latched::default(), "without eventfd it is dropped");
}

#[tokio::test]
async fn a_frozen_vector_is_latched_and_raised_on_the_eventfd_installed_at_the_thaw() {
    let interrupts = device();
    let old = install(&interrupts, MSIX, 1);
    interrupts.freeze().await;
    interrupts.raise(1);
    interrupts.raise(3);
    assert_eq!(signalled(&old), 0);
    assert_eq!(interrupts.raised(), 0);
    assert_eq!(interrupts.latched(), Latched { msix: vec![1, 3], ..Latched::default() });
    // The client goes and comes back, disables what it had, and installs anew.
    interrupts.release();
    set(&interrupts, DATA_NONE | ACTION_TRIGGER, MSIX, (0, 0), &[], vec![]).expect("disabled");
    let new = install(&interrupts, MSIX, 1);
    assert_eq!(signalled(&new), 0, "still frozen");
    interrupts.thaw();
    assert_eq!((signalled(&old), signalled(&new)), (0, 1));
    assert_eq!(interrupts.latched().msix, [3], "nobody listens yet");
    let late = install(&interrupts, MSIX, 3);
    assert_eq!(signalled(&late), 1);
    assert_eq!(interrupts.latched(), Latched::default());
    assert_eq!(interrupts.raised(), 2);
}

#[tokio::test]
async fn what_waits_for_an_eventfd_is_not_lost_when_it_is_raised_again() {
    let interrupts = device();
    interrupts.freeze().await;
    interrupts.raise(1);
    interrupts.thaw();
    interrupts.raise(1);
    assert_eq!(interrupts.latched().msix, [1]);
    assert_eq!(signalled(&install(&interrupts, MSIX, 1)), 1);
}

#[test]
fn vectors_are_there_once_and_in_order() {
    let latched =
        |msix: &[u16], msi: &[u16]| Latched { intx: false, msix: msix.to_vec(), msi: msi.to_vec() };
    assert!(Latched::default().is_in_order() && latched(&[0, 2, 3], &[1]).is_in_order());
    for bad in [latched(&[2, 2], &[]), latched(&[3, 2], &[]), latched(&[], &[1, 0])] {
        assert!(!bad.is_in_order(), "{bad:?}");
    }
}

#[tokio::test]
async fn what_was_latched_is_restored_in_another_process() {
    let source = device();
    source.freeze().await;
    source.raise(2);
    source.raise_msi(1);
    source.set_intx(true);
    let saved = source.latched();

    let target = device();
    target.freeze().await;
    target.restore(&saved).expect("it has these vectors");
    assert_eq!(target.latched(), saved);
    let (vector, intx) = (install(&target, MSIX, 2), install(&target, 0, 0));
    let msi = install(&target, MSI, 1);
    target.thaw();
    assert_eq!((signalled(&vector), signalled(&intx), signalled(&msi)), (1, 1, 1));

    let restored = |latched: Latched| target.restore(&latched);
    let foreign = |index, vector, vectors| Err(NoVector { index, vector, vectors });
    let bad = Latched { msix: vec![4], ..Latched::default() };
    assert_eq!(restored(bad), foreign(IrqIndex::Msix, 4, 4));
    let bad = Latched { msi: vec![1, 2], ..Latched::default() };
    assert_eq!(restored(bad), foreign(IrqIndex::Msi, 2, 2));
    target.set_counts(IrqCounts::default());
    let bad = Latched { intx: true, ..Latched::default() };
    assert_eq!(restored(bad), foreign(IrqIndex::Intx, 0, 0));
}

#[test]
fn msi_vectors_are_lines_of_their_own() {
    let interrupts = device();
    let fds = [install(&interrupts, MSI, 0), install(&interrupts, MSI, 1)];
    let msix = install(&interrupts, MSIX, 1);
    interrupts.raise_msi(1);
    interrupts.raise_msi(2);
    assert_eq!((signalled(&fds[0]), signalled(&fds[1]), signalled(&msix)), (0, 1, 0));
    assert_eq!((interrupts.raised(), interrupts.raised_by(1)), (1, 0));
    set(&interrupts, DATA_NONE | ACTION_MASK, MSI, (0, 2), &[], vec![]).expect("masked");
    interrupts.raise_msi(0);
    assert_eq!(interrupts.latched(), Latched { msi: vec![0], ..Latched::default() });
    set(&interrupts, DATA_NONE | ACTION_UNMASK, MSI, (0, 1), &[], vec![]).expect("unmasked");
    assert_eq!(signalled(&fds[0]), 1);
    let beyond = set(&interrupts, DATA_NONE | ACTION_TRIGGER, MSI, (1, 2), &[], vec![]);
    assert_eq!(beyond.expect_err("no vector 2").errno(), libc::EINVAL);
}

#[test]
fn a_device_without_intx_asserts_nothing() {
    let interrupts = Interrupts::new();
    interrupts.set_counts(IrqCounts::default());
    interrupts.set_intx(true);
    assert_eq!(interrupts.latched(), Latched::default());
    let none = set(&interrupts, DATA_NONE | ACTION_TRIGGER, 0, (0, 1), &[], vec![]);
    assert_eq!(none.expect_err("no line").errno(), libc::EINVAL);
}

#[tokio::test]
async fn intx_goes_by_level() {
    let interrupts = device();
    interrupts.set_intx(true);
    let fd = install(&interrupts, 0, 0);
    assert_eq!(signalled(&fd), 1, "it was asserted before");
    interrupts.set_intx(true);
    assert_eq!(signalled(&fd), 0, "no edge, and masked since it was raised");
    let unmask = || set(&interrupts, DATA_NONE | ACTION_UNMASK, 0, (0, 1), &[], vec![]);
    unmask().expect("unmasked");
    assert_eq!(signalled(&fd), 1, "still asserted");
    interrupts.set_intx(false);
    unmask().expect("unmasked");
    assert_eq!(signalled(&fd), 0);
    interrupts.freeze().await;
    interrupts.set_intx(true);
    interrupts.set_intx(false);
    interrupts.thaw();
    assert_eq!(signalled(&fd), 0, "taken back before the thaw");
    interrupts.freeze().await;
    interrupts.set_intx(true);
    interrupts.thaw();
    assert_eq!(signalled(&fd), 1);
}

#[tokio::test]
async fn a_masked_vector_waits_until_it_is_unmasked() {
    let interrupts = device();
    let fd = install(&interrupts, MSIX, 2);
    let masking = |action, data: &[u8]| {
        set(&interrupts, DATA_BOOL | action, MSIX, (1, 3), data, vec![]).expect("masking");
    };
    masking(ACTION_MASK, &[0, 1, 0]);
    interrupts.raise(2);
    assert_eq!(signalled(&fd), 0);
    masking(ACTION_UNMASK, &[1, 0, 1]);
    assert_eq!(signalled(&fd), 0, "the others were unmasked");
    masking(ACTION_UNMASK, &[0, 1, 0]);
    assert_eq!(signalled(&fd), 1);
}

#[tokio::test]
async fn the_client_can_fire_and_remove_interrupts() {
    let interrupts = device();
    let fds = [install(&interrupts, MSIX, 0), install(&interrupts, MSIX, 1)];
    let all = |flags, data: &[u8]| {
        set(&interrupts, flags, MSIX, (0, 2), data, vec![]).expect("acceptable");
    };
    all(DATA_NONE | ACTION_TRIGGER, &[]);
    assert_eq!((signalled(&fds[0]), signalled(&fds[1])), (1, 1));
    all(DATA_BOOL | ACTION_TRIGGER, &[0, 1]);
    assert_eq!((signalled(&fds[0]), signalled(&fds[1])), (0, 1));
    interrupts.freeze().await;
    all(DATA_NONE | ACTION_TRIGGER, &[]);
    assert_eq!((signalled(&fds[0]), signalled(&fds[1])), (0, 0), "frozen");
    interrupts.thaw();
    assert_eq!((signalled(&fds[0]), signalled(&fds[1])), (1, 1));
    all(DATA_EVENTFD | ACTION_TRIGGER, &[]);
    interrupts.raise(0);
    assert_eq!(signalled(&fds[0]), 0, "removed");
}

#[tokio::test]
async fn a_reset_forgets_what_waits() {
    let interrupts = device();
    let fd = install(&interrupts, MSIX, 0);
    interrupts.freeze().await;
    interrupts.raise(0);
    interrupts.set_intx(true);
    interrupts.reset();
    assert_eq!(interrupts.latched(), Latched::default());
    interrupts.thaw();
    assert_eq!(signalled(&fd), 0);
    interrupts.raise(0);
    assert_eq!(signalled(&fd), 1, "eventfds stay");
}

#[test]
fn only_eventfds_are_accepted_and_all_or_none() {
    let interrupts = device();
    let (_reader, writer) = rustix::pipe::pipe().expect("pipe");
    let good = new_eventfd();
    let copy = good.as_fd().try_clone_to_owned().expect("dup");
    let error =
        set(&interrupts, DATA_EVENTFD | ACTION_TRIGGER, MSIX, (0, 2), &[], vec![copy, writer])
            .expect_err("a pipe");
    assert!(matches!(&error, SetIrqsError::NotEventfd { found } if found.starts_with("pipe:")));
    assert_eq!(error.errno(), libc::EINVAL);
    interrupts.raise(0);
    assert_eq!(signalled(&good), 0, "none was installed");
}

#[test]
fn a_full_counter_does_not_block() {
    let interrupts = device();
    // Blocking, as a client may make it.
    let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    write(&fd, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
    let theirs = fd.as_fd().try_clone_to_owned().expect("dup");
    set(&interrupts, DATA_EVENTFD | ACTION_TRIGGER, MSIX, (0, 1), &[], vec![theirs])
        .expect("installed");
    interrupts.raise(0);
    assert_eq!(signalled(&fd), u64::MAX - 1);
}

#[tokio::test]
async fn nothing_is_raised_between_freeze_and_thaw_and_nothing_is_lost() {
    let interrupts = device();
    let fd = install(&interrupts, MSIX, 0);
    let raiser = interrupts.clone();
    let thread = std::thread::spawn(move || {
        for _ in 0..20_000 {
            raiser.raise(0);
        }
    });
    let mut latched = false;
    while !thread.is_finished() {
        tokio::time::timeout(Duration::from_secs(20), interrupts.freeze())
            .await
            .expect("a wake-up was lost");
        // The raiser may have been the one to take what was latched, and the freeze waits for it.
        let came = signalled(&fd);
        assert!(!latched || came > 0, "a latched interrupt was lost");
        let before = interrupts.raised();
        std::thread::yield_now();
        assert_eq!(signalled(&fd), 0);
        assert_eq!(interrupts.raised(), before);
        latched = !interrupts.latched().msix.is_empty();
        interrupts.thaw();
    }
    thread.join().expect("no panic");
    assert!(!latched || signalled(&fd) > 0, "a latched interrupt was lost");
    assert_eq!(interrupts.latched(), Latched::default(), "one was forgotten at a thaw");
}

#[tokio::test]
async fn an_interrupt_that_meets_the_thaw_is_not_left_behind() {
    let interrupts = device();
    let fd = install(&interrupts, MSIX, 0);
    for _ in 0..20 {
        interrupts.freeze().await;
        let raiser = interrupts.clone();
        // It finds them frozen and is about to latch, but the lock is taken ...
        let lines = interrupts.lines();
        let thread = std::thread::spawn(move || raiser.raise(0));
        (0..200).for_each(|_| std::thread::yield_now());
        // ... until a thaw has passed that had nothing to deliver.
        interrupts.shared.raising.open();
        drop(lines);
        thread.join().expect("no panic");
        assert_eq!(signalled(&fd), 1);
    }
}

#[test]
fn an_eventfd_that_blocks_does_not_after_it_was_installed_and_a_full_one_is_no_error() {
    use rustix::fs::{OFlags, fcntl_getfl};

    let interrupts = device();
    let blocking = eventfd(0, EventfdFlags::CLOEXEC).expect("eventfd");
    let theirs = blocking.try_clone().expect("dup");
    set(&interrupts, DATA_EVENTFD | ACTION_TRIGGER, MSIX, (0, 1), &[], vec![theirs])
        .expect("installed");
    let flags = fcntl_getfl(&blocking).expect("flags");
    assert!(flags.contains(OFlags::NONBLOCK), "the open file is shared");
    // No number fits beside this one.
    write(&blocking, &(u64::MAX - 1).to_ne_bytes()).expect("filled");
    interrupts.raise(0);
    assert_eq!(interrupts.raised_by(0), 1);
    assert_eq!(signalled(&blocking), u64::MAX - 1);
    interrupts.raise(0);
    assert_eq!(signalled(&blocking), 1);
}
