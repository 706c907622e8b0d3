//! A vfio-user client and a hostile server.
//!
//! The input is what the server does, step by step: see `standstill_fuzz::vfio_user::Step`. The
//! client makes one call after another, as its steps say.

#![no_main]

use libfuzzer_sys::fuzz_target;
use standstill_fuzz::memory::{Counting, used_by};
use standstill_fuzz::vfio_user::{Server, Steps, call, null};
use standstill_vfio_user::client::{Client, ClientError, DmaTarget};
use standstill_vfio_user::wire::{Capabilities, Errno};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most bytes of one transfer.
const TRANSFER: u32 = 4096;
/// What a session may take of the heap: buffers of both ends, and what may wait for the thread that
/// serves DMA.
const HEAP: usize = 8 << 20;
/// A server answers or closes, so no call waits for anything.
const LONG: Duration = Duration::from_secs(20);

/// Judges what reaches it.
struct Target;

impl DmaTarget for Target {
    fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
        judge(iova, data.len());
        data.fill(7);
        if iova & 1 == 0 { Ok(()) } else { Err(Errno::ENODEV) }
    }

    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno> {
        judge(iova, data.len());
        if iova & 1 == 0 { Ok(()) } else { Err(Errno::EFAULT) }
    }
}

fn judge(iova: u64, size: usize) {
    let size = u64::try_from(size).expect("64 bits");
    assert!((1..=u64::from(TRANSFER)).contains(&size));
    assert!(iova.checked_add(size - 1).is_some());
}

fuzz_target!(|input: &[u8]| {
    let lowest = null().as_raw_fd();
    let (_, usage) = used_by(|| session(input));
    assert!(usage.peak <= HEAP, "{} bytes of the heap", usage.peak);
    assert_eq!(null().as_raw_fd(), lowest, "an fd is left");
});

fn session(input: &[u8]) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    let steps = Steps::new(input);
    let calls = steps.clone();
    thread::scope(|scope| {
        scope.spawn(|| Server::new(theirs).run(steps));
        let capabilities = Capabilities {
            max_msg_fds: Some(2),
            max_data_xfer_size: Some(u64::from(TRANSFER)),
            write_multiple: Some(true),
            ..Capabilities::default()
        };
        let begin = Instant::now();
        let builder = Client::builder().timeout(LONG).capabilities(capabilities).dma(Target);
        let client = match builder.start(ours) {
            Ok(client) => client,
            Err(error) => return well_said(&error.to_string()),
        };
        let mut end: Option<ClientError> = None;
        for step in calls.skip(1) {
            let Err(error) = call(&client, step.call) else {
                assert!(end.is_none(), "an answer after the end");
                continue;
            };
            well_said(&error.to_string());
            assert!(!matches!(error, ClientError::Deadline { .. }), "{error:?}");
            match (&end, &error) {
                // The first reason is told to all.
                (Some(ClientError::Ended(first)), ClientError::Ended(reason)) => {
                    assert_eq!(first.to_string(), reason.to_string());
                }
                (None, ClientError::Ended(_)) => end = Some(error),
                // What is refused here needs no server.
                (_, ClientError::Request { .. }) | (None, _) => {}
                (Some(_), error) => panic!("{error:?} after the end"),
            }
        }
        drop(client);
        assert!(begin.elapsed() < LONG, "a call waited for too long");
    });
}

fn well_said(text: &str) {
    assert!(!text.is_empty() && text.len() < 400, "{text}");
}
