//! Faults while the state is saved or loaded.

use super::{StreamError, Writer, piece_length};
use crate::fault;
use standstill_protocol::fault::{Action, Packet, Point};
use std::hash::Hasher;
use std::io::{self, Write};

impl<W: Write> Writer<W> {
    /// A piece is to be written. What was done instead, if something was: the checksum is that of
    /// what should have been written.
    pub(super) fn spoil_piece(&mut self, piece: &[u8]) -> Option<io::Result<()>> {
        let spoils = |action: &Action| matches!(action, Action::Refuse(_) | Action::Send(_));
        let action = fault::reach(Point::Saving).into_iter().find(spoils)?;
        let length = piece_length(piece);
        self.checksum.write(&length);
        self.checksum.write(piece);
        Some(match action {
            Action::Refuse(errno) => Err(io::Error::from_raw_os_error(errno)),
            Action::Send(Packet::Garbage) => {
                let garbage: Vec<u8> = piece.iter().map(|byte| !byte).collect();
                self.put_unsummed(&length).and_then(|()| self.put_unsummed(&garbage))
            }
            Action::Send(Packet::Oversized) => {
                self.put_unsummed(&u32::MAX.to_le_bytes()).and_then(|()| self.put_unsummed(piece))
            }
            Action::Send(Packet::Truncated) => {
                self.is_cut = true;
                Ok(())
            }
            _ => Ok(()),
        })
    }

    fn put_unsummed(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_cut { Ok(()) } else { self.to.write_all(bytes) }
    }
}

/// A piece is to be read.
pub(super) fn reach_piece() -> Result<(), StreamError> {
    for action in fault::reach(Point::Loading) {
        if let Action::Refuse(errno) = action {
            return Err(StreamError::Read(io::Error::from_raw_os_error(errno)));
        }
    }
    Ok(())
}
