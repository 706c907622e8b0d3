//! Faults while the state is saved or loaded.

use super::StreamError;
use super::format::{DIGEST, HEADER, Header, Tag};
use super::save::{Saver, Sink};
use crate::fault;
use standstill_protocol::fault::{Action, Packet, Point};
use std::io;

impl Saver {
    /// The record that was put together is to be written. What was done instead, if something was:
    /// the stream's end will be that of what should have been written.
    pub(super) fn spoil_record(&mut self, to: &mut impl Sink) -> Option<io::Result<()>> {
        if self.is_cut {
            return Some(Ok(()));
        }
        let mut header = [0; HEADER];
        header.copy_from_slice(self.record().get(..HEADER)?);
        if matches!(Header::from_bytes(header).tag, Tag::IDENTITY | Tag::END) {
            return None;
        }
        let spoils = |action: &Action| matches!(action, Action::Refuse(_) | Action::Send(_));
        let action =
            fault::reach(Point::Saving).filter(spoils).collect::<Vec<_>>().into_iter().next()?;
        let record = self.record();
        let end = record.len() - DIGEST;
        Some(match action {
            Action::Refuse(errno) => Err(io::Error::from_raw_os_error(errno)),
            Action::Send(Packet::Garbage) => {
                record[HEADER..end].iter_mut().for_each(|byte| *byte = !*byte);
                to.write_all(record)
            }
            Action::Send(Packet::Oversized) => {
                record[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
                to.write_all(record)
            }
            Action::Send(Packet::Truncated) => {
                self.is_cut = true;
                Ok(())
            }
            _ => Ok(()),
        })
    }
}

/// A record is to be read.
pub(super) fn reach_record() -> Result<(), StreamError> {
    for action in fault::reach(Point::Loading).collect::<Vec<_>>() {
        if let Action::Refuse(errno) = action {
            return Err(StreamError::Read(io::Error::from_raw_os_error(errno)));
        }
    }
    Ok(())
}
