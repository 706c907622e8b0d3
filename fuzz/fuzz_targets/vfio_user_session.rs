//! Whatever a client sends to a device process over its data socket, in whatever pieces and with
//! whatever fds, while a coordinator stops and starts the device.
//!
//! The first byte says whether the versions are exchanged first, the others are steps: see
//! `standstill_fuzz::track`. A message is what follows the id of a header, and its size is put right;
//! a packet is bytes as they are.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_device_proc::vfio_user::fuzzing::Session;
use standstill_fuzz::memory::{Counting, used_by};
use standstill_fuzz::socket::{fd, open_fds};
use standstill_fuzz::track::{Fds, Step, Steps};
use std::os::fd::AsFd;
use std::sync::Once;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a session may take of the heap: a longest message as it comes, as it waits and as it is
/// kept, its reply, and what the threads have.
const HEAP: usize = 12 << 20;
/// How long threads may take to end.
const LONG: Duration = Duration::from_secs(20);

fuzz_target!(|input: &[u8]| {
    static FIRST: Once = Once::new();
    // What is made once in the life of a process is made.
    FIRST.call_once(|| Session::begin().finish());
    let Some((&setup, steps)) = input.split_first() else { return };
    let fds = open_fds();
    let ((), usage) = used_by(|| play(setup, Steps(steps)));
    assert!(usage.peak <= HEAP, "a session takes {} bytes of the heap", usage.peak);
    // The last threads of a session may still be ending, and so may those of the one before have been
    // when the fds were counted.
    let began = Instant::now();
    while open_fds() > fds {
        assert!(began.elapsed() < LONG, "file descriptors are left open");
        std::thread::yield_now();
    }
});

fn play(setup: u8, steps: Steps<'_>) {
    let mut session = Session::begin();
    if setup & 1 == 0 {
        session.greet();
    }
    for step in steps.take(48) {
        match step {
            Step::Message(rest, fds) => {
                let mut message = vec![0, 0];
                message.extend(rest);
                message.resize(message.len().max(16), 0);
                let size = u32::try_from(message.len()).expect("it is short");
                message[4..8].copy_from_slice(&size.to_ne_bytes());
                send(&mut session, &message, fds);
            }
            Step::Packet(bytes, fds) => send(&mut session, bytes, fds),
            Step::Turns(count) => {
                for _ in 0..count.min(16) {
                    std::thread::yield_now();
                }
                session.look();
            }
            Step::Other(0, _) => session.reconnect(),
            Step::Other(1, more) => session.stop(more & 1 == 1),
            Step::Other(2, _) => session.start(),
            Step::Other(_, _) => {
                session.reconnect();
                session.greet();
            }
        }
    }
    session.finish();
}

fn send(session: &mut Session, bytes: &[u8], fds: Fds) {
    let kinds = (0..fds.count).map(|at| fds.first.wrapping_add(at));
    let fds: Vec<_> = kinds.map(fd).collect();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    session.send(bytes, &borrowed);
}
