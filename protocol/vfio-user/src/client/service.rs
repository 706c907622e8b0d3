//! The thread that serves the server's commands: DMA by messages.

use super::error::EndError;
use super::exchange::{Exchange, Incoming};
use crate::Deadline;
use crate::wire::{Command, DmaAccess, Errno, Header, Kind, WireError};
use std::time::Duration;

/// The memory that a server reaches by messages, because it has no fd of it.
///
/// It is called from a thread of its own, one access at a time, also while calls of the client wait
/// for their answers. It must not call the client itself, nor wait for a thread that does: the
/// server may be waiting for this access.
pub trait DmaTarget: Send {
    /// Fills `data` with what is at `iova`. There are at most as many bytes as the client's
    /// `max_data_xfer_size`, and the range does not reach beyond the last address.
    ///
    /// # Errors
    ///
    /// The error number for the server: ENODEV where nothing is, EPERM where it may not read.
    fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), Errno>;

    /// Writes `data` to `iova`; as many bytes as above.
    ///
    /// # Errors
    ///
    /// The error number for the server: ENODEV where nothing is, EPERM where it may not write.
    fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno>;
}

/// Reaches nothing: for clients that give the server an fd of everything.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoDma;

impl DmaTarget for NoDma {
    fn read(&mut self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }

    fn write(&mut self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::ENODEV)
    }
}

/// Ends the connection with the thread, also if the target panics.
struct Guard<'a>(&'a Exchange);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        self.0.end(EndError::ServiceEnded);
    }
}

/// What the thread runs, until the connection ends. `limit` is the client's `max_data_xfer_size`,
/// `patience` how long the server may take to take an answer.
pub(super) fn run(exchange: &Exchange, target: &mut dyn DmaTarget, limit: u32, patience: Duration) {
    let _guard = Guard(exchange);
    let mut seen = 0;
    let mut data = Vec::new();
    while let Some(Incoming { header, body }) = exchange.next_command(&mut seen) {
        let outcome = serve(target, limit, header.command, &body, &mut data);
        exchange.recycle(body);
        if header.kind() == Some(Kind::Posted) {
            continue;
        }
        let (reply, access) = match outcome {
            Ok(access) => (header.reply(), Some(access)),
            Err(errno) => {
                data.clear();
                (header.refusal(errno), None)
            }
        };
        if answer(exchange, &reply, access, &data, &mut Deadline::within(patience)).is_err() {
            break;
        }
    }
}

fn answer(
    exchange: &Exchange,
    reply: &Header,
    access: Option<DmaAccess>,
    data: &[u8],
    deadline: &mut Deadline,
) -> Result<(), super::ClientError> {
    let sent = exchange.send(reply, Command::DmaRead, data, &[], deadline, |body| {
        if let Some(access) = access {
            access.encode(body);
        }
    });
    if let Err(super::ClientError::Deadline { .. }) = sent {
        // A server that does not take its answer waits for it for ever.
        exchange.end(EndError::Send(crate::connection::SendError::Deadline));
    }
    sent
}

/// Carries out a command; what was read is in `data`, which is empty otherwise.
fn serve(
    target: &mut dyn DmaTarget,
    limit: u32,
    command: u16,
    body: &[u8],
    data: &mut Vec<u8>,
) -> Result<DmaAccess, Errno> {
    data.clear();
    match Command::from_number(command) {
        Some(Command::DmaRead) => {
            let access = DmaAccess::decode_plain(body, limit).map_err(|error| errno(&error))?;
            // It is not more than the limit.
            data.resize(usize::try_from(access.count).unwrap_or(0), 0);
            target.read(access.address, data)?;
            Ok(access)
        }
        Some(Command::DmaWrite) => {
            let (access, written) =
                DmaAccess::decode_with_data(body, limit).map_err(|error| errno(&error))?;
            target.write(access.address, written)?;
            Ok(access)
        }
        _ => Err(Errno::ENOSYS),
    }
}

/// As QEMU answers: E2BIG for more than is possible or than came.
fn errno(error: &WireError) -> Errno {
    match error {
        WireError::TooLong { .. } => Errno::E2BIG,
        WireError::DataLength { length, count, .. } if *length as u64 <= *count => Errno::E2BIG,
        error => error.errno(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 256 bytes from address 0x1000.
    struct Memory([u8; 256]);

    impl Memory {
        fn at(&mut self, iova: u64, size: usize) -> Result<&mut [u8], Errno> {
            let start = iova.checked_sub(0x1000).ok_or(Errno::ENODEV)?;
            let start = usize::try_from(start).map_err(|_| Errno::ENODEV)?;
            self.0.get_mut(start..start + size).ok_or(Errno::EFAULT)
        }
    }

    impl DmaTarget for Memory {
        fn read(&mut self, iova: u64, data: &mut [u8]) -> Result<(), Errno> {
            data.copy_from_slice(self.at(iova, data.len())?);
            Ok(())
        }

        fn write(&mut self, iova: u64, data: &[u8]) -> Result<(), Errno> {
            self.at(iova, data.len())?.copy_from_slice(data);
            Ok(())
        }
    }

    fn body(address: u64, count: u64, data: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        DmaAccess { address, count }.encode(&mut out);
        out.extend(data);
        out
    }

    #[test]
    fn accesses_reach_the_memory_and_errors_the_server() {
        let mut memory = Memory([7; 256]);
        let mut serve = |command: Command, body: &[u8]| {
            let mut data = vec![1, 2, 3];
            serve(&mut memory, 64, command.number(), body, &mut data).map(|_| data)
        };
        assert_eq!(serve(Command::DmaWrite, &body(0x1002, 2, &[8, 9])), Ok(vec![]));
        assert_eq!(serve(Command::DmaRead, &body(0x1001, 4, &[])), Ok(vec![7, 8, 9, 7]));
        for (command, body, errno) in [
            (Command::DmaRead, body(0x10, 4, &[]), Errno::ENODEV),
            (Command::DmaRead, body(0x10fe, 4, &[]), Errno::EFAULT),
            (Command::DmaRead, body(0x1000, 65, &[]), Errno::E2BIG),
            (Command::DmaRead, body(0x1000, u64::MAX, &[]), Errno::E2BIG),
            (Command::DmaRead, body(u64::MAX, 2, &[]), Errno::EINVAL),
            (Command::DmaRead, vec![0; 15], Errno::EINVAL),
            (Command::DmaWrite, body(0x1000, 3, &[1, 2]), Errno::E2BIG),
            (Command::DmaWrite, body(0x1000, 1, &[1, 2]), Errno::EINVAL),
            (Command::RegionRead, vec![0; 16], Errno::ENOSYS),
        ] {
            assert_eq!(serve(command, &body), Err(errno), "{command}");
        }
        assert_eq!(NoDma.read(0, &mut []), Err(Errno::ENODEV));
        assert_eq!(NoDma.write(0, &[]), Err(Errno::ENODEV));
    }
}
