//! What is armed, and what has fired.

use super::Error;
use crate::outside::relay::{JOURNAL, ORDERS, Order};
use crate::plan::Moment;
use crate::trace::now_ns;
use rustix::fs::inotify;
use standstill_protocol::fault::JournalLine;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The orders of a relay, read again whenever they have changed: what a test arms before it makes
/// something be sent is in force for that packet.
pub(super) struct Orders {
    path: PathBuf,
    /// The file that was read last. Each change is a new one, and none can have this one's number as long as
    /// it is open.
    read: Option<File>,
    orders: Vec<Order>,
    /// How often each one's moment has come.
    counts: Vec<u32>,
    /// Those that are done for good, also by earlier incarnations.
    done: BTreeSet<usize>,
    journal: File,
    /// Readable when the orders have changed.
    watch: OwnedFd,
}

impl Orders {
    pub(super) fn open(folder: &Path) -> Result<Self, Error> {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&watch, folder, inotify::WatchFlags::MOVED_TO)?;
        let journal = folder.join(JOURNAL);
        let fired = |line| match JournalLine::parse(line) {
            Some(JournalLine::Fired { index, .. }) => usize::try_from(index).ok(),
            _ => None,
        };
        let done = std::fs::read_to_string(&journal)?.lines().filter_map(fired).collect();
        Ok(Self {
            path: folder.join(ORDERS),
            read: None,
            orders: Vec::new(),
            counts: Vec::new(),
            done,
            journal: File::options().append(true).open(journal)?,
            watch,
        })
    }

    /// Readable when there may be something to do at once.
    pub(super) fn watch(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }

    /// What is to be done without a packet, in order.
    pub(super) fn due_at_once(&mut self) -> Result<Vec<(usize, Order)>, Error> {
        // What has changed is seen in the file itself.
        while matches!(rustix::io::read(&self.watch, &mut [0; 4096]), Ok(1..)) {}
        self.take(|moment| matches!(moment, Moment::Running | Moment::Stopped))
    }

    /// What is to be done at this moment, in order. It is written down before it is done.
    pub(super) fn due(&mut self, moment: Moment) -> Result<Vec<(usize, Order)>, Error> {
        self.take(|armed| armed == moment)
    }

    /// Those by which no packet is held back any more.
    pub(super) fn let_go(&self) -> impl Iterator<Item = usize> {
        let let_go = |(index, order): (usize, &Order)| order.let_go.then_some(index);
        self.orders.iter().enumerate().filter_map(let_go)
    }

    /// Each with its number.
    fn take(&mut self, is_now: impl Fn(Moment) -> bool) -> Result<Vec<(usize, Order)>, Error> {
        self.refresh()?;
        let mut due = Vec::new();
        for index in 0..self.orders.len() {
            let order = self.orders[index];
            if !is_now(order.moment) {
                continue;
            }
            self.counts[index] += 1;
            let occurrence = self.counts[index];
            let each_time = order.nth == 0;
            if each_time || (order.nth == occurrence && !self.done.contains(&index)) {
                let number = u32::try_from(index)?;
                let fired = JournalLine::Fired { index: number, occurrence, at_ns: now_ns() };
                self.write(&fired.to_string())?;
                due.push((index, order));
            }
        }
        Ok(due)
    }

    /// Adds a line to the journal.
    pub(super) fn write(&self, line: &str) -> Result<(), Error> {
        Ok((&self.journal).write_all(format!("{line}\n").as_bytes())?)
    }

    fn refresh(&mut self) -> Result<(), Error> {
        let (now, read) = (std::fs::metadata(&self.path), self.read.as_ref().map(File::metadata));
        let now = match now {
            Ok(now) => now,
            // Nothing was armed yet.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if read.transpose()?.is_none_or(|read| read.ino() != now.ino()) {
            let mut file = File::open(&self.path)?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            self.orders = serde_json::from_slice(&text)?;
            self.counts.resize(self.orders.len(), 0);
            self.read = Some(file);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outside::Relay;
    use crate::plan::OutsideAction;
    use standstill_protocol::message::Phase;

    #[test]
    fn no_change_is_overlooked_however_quickly_they_follow_each_other() {
        let relay = Relay::new().unwrap();
        let mut orders = Orders::open(relay.folder()).unwrap();
        let moment = Moment::Command(Phase::Stop);
        // Twice between two looks: the file system has the number of the first file again for the third one.
        for round in 0..200 {
            relay.arm(moment, round, OutsideAction::Drop).unwrap();
            let last = relay.arm(moment, round, OutsideAction::Hold).unwrap();
            orders.refresh().unwrap();
            assert_eq!(orders.orders.len(), 1 + last as usize, "round {round}");
        }
    }
}
